# SPDX-License-Identifier: MIT
"""One guest that moves: what it holds where it leaves, what is sent, what it reads where it arrives. Pure.

kernel_harness.kvm.migrate does it with real VMs; here the same is calculated with state machines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from probe.models.guest_systems import Cpu, cpus
from probe.models.machine import SPEC_CTRL, Host, Machine, Stepping, step
from probe.models.migration import Rule
from probe.models.policy import BY_NAME, PolicyMachine
from probe.models.profile import Profile
from probe.models.program import Answer, Kind, Operation, Program, Word, parse

# The case of the thread: a guest sets a bit that the mask of 2020 does not know (PSFD), after one that it knows, and
# moves to where that mask decides.
STUDY_NAME = "thread-2020"
STUDY = parse("profile zen2-client-2020; guest-wr 0x48 0x4; guest-wr 0x48 0x84")[0]
STUDY_TO = BY_NAME["kvm-5.6-mask"]
STUDY_CPU: Cpu = next(cpu for cpu in cpus() if cpu.name == "qemu-epyc-milan-v2")  # it has STIBP, SSBD and PSFD

OUTCOMES = ("works", "refused", "lost", "changed", "unreadable")


@dataclass(frozen=True)
class Departed:
    """A guest that has run its program, as a VMM may save it; 64-bit values.

    answers: to the program; None where a model does not say. reads: what the guest reads then, None if it takes #GP.
    held: what the VMM gets to know of the register, None if KVM refuses. listed: KVM_GET_MSR_INDEX_LIST has it.
    """

    program: Program
    answers: tuple[Answer | None, ...]
    reads: int | None
    held: int | None
    listed: bool

    def sent(self, rule: Rule) -> int | None:
        """Return what of the register goes into the stream; None: nothing."""
        return None if self.held is None else rule.sends(self.held, self.listed, self.program.profile)

    def outcome(self, reads: int | None, held: int | None) -> str:
        """Return what became of the register, if where it has arrived the guest reads this, and the VMM holds that.

        One of OUTCOMES. "unreadable": the guest could read it, and takes #GP now. "lost": it is 0, "changed": something
        else. Where the guest reads the same, what the VMM holds decides: it is what the next move would send.
        """
        if self.reads is not None and reads is None:
            return "unreadable"
        for before, now in ((self.reads, reads), (self.held, held)):
            if before is not None and (now or 0) != before:
                return "changed" if now else "lost"
        return "works"

    @property
    def gone(self) -> int:
        """The bits that the guest's last accepted write set, and that neither it nor the VMM has any more.

        Such a guest has nothing left to move: the register, or the policy, has forgotten it where it was.
        """
        wrote = 0
        for operation, answer in zip(self.program.operations, self.answers):
            if operation.kind in (Kind.GUEST_WR, Kind.HOST_SET) and operation.index == SPEC_CTRL and answer is Word.OK:
                wrote = operation.value
            elif operation.kind is Kind.INIT:
                wrote = 0
        return wrote & ~((self.reads or 0) | (self.held or 0))


@dataclass(frozen=True)
class Arrived:
    """What became of it.

    sent: what was; None: nothing. reads: what the guest reads, held: what the VMM does (None: it takes #GP, KVM
    refuses, or the move was refused).
    """

    sent: int | None
    reads: int | None
    held: int | None
    outcome: str


class Arrival(Protocol):
    """A vCPU where a guest arrives."""

    def put(self, value: int) -> bool:
        """Write the register, host-initiated; tell whether it was taken."""

    def read(self) -> int | None:
        """Let the guest read it; None if it takes #GP."""

    def saved(self) -> int | None:
        """Return what the VMM would save of it; None if KVM refuses."""


def arrive(departed: Departed, rule: Rule, listed: bool, vcpu: Arrival) -> Arrived:
    """Let a guest arrive; listed: the destination's KVM_GET_MSR_INDEX_LIST has the register.

    A VMM that asks the list writes 0 where nothing was sent: so QEMU's kvm_buf_set_msrs() does.
    """
    sent = departed.sent(rule)
    value = 0 if sent is None and rule.asks_list else sent
    if value is not None and (listed or not rule.asks_list) and not vcpu.put(value) and not rule.forgives:
        return Arrived(sent, None, None, "refused")
    reads = vcpu.read()
    held = vcpu.saved()
    return Arrived(sent, reads, held, departed.outcome(reads, held))


def calculate_departure(machine: Machine | Stepping, program: Program, host: Host) -> Departed:
    """Say what a model's guest holds after its program."""
    vcpu = _Vcpu(machine, program.profile, host)
    answers = tuple(vcpu.do(operation) for operation in program.operations)
    return Departed(program, answers, vcpu.read(), vcpu.saved(), host.hardware.exists)


def calculate_arrival(
    departed: Departed,
    machine: Machine | Stepping,
    rule: Rule,
    host: Host,
    profile: Profile | None = None,
    *,
    listed: bool | None = None,
) -> Arrived:
    """Say what a model makes of a guest that arrives; profile is its CPUID there (the same).

    listed: KVM_GET_MSR_INDEX_LIST has the register there (if it exists).
    """
    vcpu = _Vcpu(machine, profile or departed.program.profile, host)
    return arrive(departed, rule, host.hardware.exists if listed is None else listed, vcpu)


class _Vcpu:
    """A vCPU of a model."""

    def __init__(self, machine: Machine | Stepping, profile: Profile, host: Host) -> None:
        self._machine = machine
        self._do: Callable[[Any, Operation], tuple[Any, Answer | None]] = (
            machine.step if isinstance(machine, Stepping) else functools.partial(step, machine)
        )
        self._state: Any = machine.start(profile, host)

    def do(self, operation: Operation) -> Answer | None:
        self._state, answer = self._do(self._state, operation)
        return answer

    def read(self) -> int | None:
        answer = self.do(Operation(Kind.GUEST_RD, SPEC_CTRL))
        return answer if isinstance(answer, int) else None

    def put(self, value: int) -> bool:
        return self.do(Operation(Kind.HOST_SET, SPEC_CTRL, value)) is Word.OK

    def saved(self) -> int | None:
        if isinstance(self._machine, PolicyMachine):
            return self._machine.saved(self._state)
        answer = self.do(Operation(Kind.HOST_GET, SPEC_CTRL))
        return answer if isinstance(answer, int) else None
