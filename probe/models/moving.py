# SPDX-License-Identifier: MIT
"""One guest that moves: what it holds where it leaves, what is sent, what it reads where it arrives. Pure.

kernel_harness.kvm.migrate does it with real VMs; here the same is calculated with state machines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

    def outcome(self, reads: int | None) -> str:
        """Return what became of the register, if the guest reads this where it has arrived; one of OUTCOMES.

        "unreadable": it could be read, and takes #GP now. "lost": it reads 0. "changed": it reads another value.
        """
        if self.reads is not None and reads is None:
            return "unreadable"
        before = (self.held or 0) if self.reads is None else self.reads
        now = reads or 0
        if before == now:
            return "works"
        return "changed" if now else "lost"


@dataclass(frozen=True)
class Arrived:
    """What became of it: what was sent, what the guest reads (None: #GP, or the move was refused), and the outcome."""

    sent: int | None
    reads: int | None
    outcome: str


def arrive(
    departed: Departed, rule: Rule, listed: bool, put: Callable[[int], bool], read: Callable[[], int | None]
) -> Arrived:
    """Let a guest arrive: put writes the value, host-initiated, and tells whether it was taken; read asks the guest.

    listed: the destination's KVM_GET_MSR_INDEX_LIST has the register.
    """
    sent = departed.sent(rule)
    if sent is not None and (listed or not rule.asks_list) and not put(sent) and not rule.forgives:
        return Arrived(sent, None, "refused")
    reads = read()
    return Arrived(sent, reads, departed.outcome(reads))


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
    return arrive(departed, rule, host.hardware.exists if listed is None else listed, vcpu.put, vcpu.read)


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
