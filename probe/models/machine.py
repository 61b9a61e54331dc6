# SPDX-License-Identifier: MIT
"""Models of a virtualized IA32_SPEC_CTRL as state machines: (state, operation) -> (state, answer). Pure.

A machine says for every state which bits a write may have; single-write masks, programs and matrices are all made from
that, so that no rule is written twice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from probe.masks import ALL_BITS
from probe.models.profile import Profile
from probe.models.program import ACCESSES, IN_GUEST, Answer, Kind, Operation, Program, Word

SPEC_CTRL = 0x48
PRED_CMD = 0x49
VIRT_SPEC_CTRL = 0xC001011F
BESIDE_NAMES = ("pred_cmd_host", "pred_cmd_guest", "virt_spec_ctrl_host", "virt_spec_ctrl_guest")  # matrix cells
DENY_READ, DENY_WRITE = 1, 2


@dataclass(frozen=True)
class Hardware:
    """What the register itself does, measured and never assumed.

    exists: RDMSR does not take #GP. tested: mask of the bits that KVM's own test of a value accepts (the same as valid,
    unless somebody stands between them). valid: mask of the bits that a guest's own WRMSR takes without #GP. keep: mask
    of the bits that read back once written. start: what it holds when nobody has written. pred_cmd: mask of the bits of
    IA32_PRED_CMD that a guest's own WRMSR takes, 0 if no guest was let through.
    """

    exists: bool = True
    tested: int = ALL_BITS
    valid: int = ALL_BITS
    keep: int = ALL_BITS
    start: int = 0
    pred_cmd: int = 0


@dataclass(frozen=True)
class Host:
    """The machine under the hypervisor.

    features is a mask over profile.FEATURES: what the kernel sees (boot_cpu_has). caps: what it offers to guests
    (KVM_GET_SUPPORTED_CPUID). loaded: the stored value is loaded at VM entry; switched: what the register holds is
    saved at exit, where writes are not intercepted. Both are done by the kernel (X86_FEATURE_MSR_SPEC_CTRL; kvm_amd
    before v6.1 saves without asking for it) or the CPU (V_SPEC_CTRL); if not, a guest that is let through has the
    host's own register. ignore_msrs: kvm.ignore_msrs=1, KVM answers for MSRs that it does not know. vmx: kvm_intel
    carries guests, which no CPUID bit tells (KVM gives AMD guests Intel's).
    """

    hardware: Hardware = Hardware()
    features: int = 0
    caps: int = 0
    switched: bool = True
    loaded: bool = True
    ignore_msrs: bool = False
    vmx: bool = False


@dataclass(frozen=True)
class State:
    """One vCPU as a model sees it.

    value is what the hypervisor stores, register what the guest reads where it is let through (64 bits each); direct:
    guest accesses are not intercepted; pending: that is decided anew at the next entry; denied: a mask of DENY_READ and
    DENY_WRITE (the MSR filter).
    """

    profile: Profile
    host: Host
    value: int = 0
    register: int = 0
    direct: bool = False
    pending: bool = False
    denied: int = 0


class Machine(Protocol):
    """A model that answers any program."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def title(self) -> str:
        """One line on what it is."""

    @property
    def source(self) -> str:
        """Document or commits, with version or date."""

    @property
    def family(self) -> str:
        """Where it makes sense: "kvm", "kvm-vmx", "kvm-svm", "policy", "peer", "oracle"."""

    def start(self, profile: Profile, host: Host) -> State:
        """Return a fresh vCPU."""

    def enter(self, state: State) -> State:
        """Return the state in which the guest runs: what waits for the next entry is done."""

    def writable(self, state: State, *, by_host: bool) -> int | None:
        """Return the mask of the bits that a write may have; None if every write is refused, of 0 too."""

    def readable(self, state: State, *, by_host: bool) -> bool:
        """Tell whether a read succeeds."""

    def open_bits(self, state: State, *, by_host: bool) -> int:
        """Return the mask of the bits on which the model does not say; 0 for a model that always does."""

    def write(self, state: State, value: int, *, by_host: bool) -> State:
        """Return the state after an accepted write."""

    def read(self, state: State, *, by_host: bool) -> tuple[State, int | None]:
        """Return the state after a successful read, and the value; None if the model does not say."""

    def set_cpuid(self, state: State, profile: Profile) -> State:
        """Return the state after KVM_SET_CPUID2."""

    def init(self, state: State) -> State:
        """Return the state after INIT."""

    def set_filter(self, state: State, denied: int) -> State:
        """Return the state after a change of the MSR filter."""

    def beside(self, profile: Profile, host: Host) -> Mapping[str, tuple[int, int]]:
        """Say what single writes of other registers do: matrix cell -> (mask of bits accepted, mask of bits decided).

        IA32_PRED_CMD and VIRT_SPEC_CTRL; a cell that is not there is not decided.
        """


def step(machine: Machine, state: State, operation: Operation) -> tuple[State, Answer | None]:
    """Do one operation; the answer is None where the model does not say, as of every other MSR than 0x48."""
    kind = operation.kind
    if operation.index != SPEC_CTRL and kind in ACCESSES:
        return state, None
    by_host = kind in (Kind.HOST_SET, Kind.HOST_GET)
    no = Word.REFUSED if by_host else Word.GP
    if kind in IN_GUEST:
        state = machine.enter(state)
    if kind in (Kind.HOST_SET, Kind.GUEST_WR):
        writable = machine.writable(state, by_host=by_host)
        if writable is None:
            return state, no
        unsaid = machine.open_bits(state, by_host=by_host)
        undecided = operation.value & unsaid
        if by_host and unsaid == ALL_BITS:  # a rule about guests only: of the host it does not say a thing
            return state, None
        if operation.value & ~(writable | undecided):
            return state, no
        if undecided:
            return state, None
        return machine.write(state, operation.value, by_host=by_host), Word.OK
    if kind in (Kind.HOST_GET, Kind.GUEST_RD):
        if not machine.readable(state, by_host=by_host):
            return state, no
        return machine.read(state, by_host=by_host)
    if kind is Kind.CPUID:
        return machine.set_cpuid(state, Profile(operation.value)), Word.OK
    if kind is Kind.INIT:
        return machine.init(state), Word.OK
    denied = operation.value if kind is Kind.DENY and operation.index == SPEC_CTRL else 0  # a filter replaces the last
    return machine.set_filter(state, denied), Word.OK


@runtime_checkable
class Stepping(Protocol):
    """A model that does each operation itself: its rule need not be one of masks (policies)."""

    @property
    def name(self) -> str:
        """What users call it."""

    def start(self, profile: Profile, host: Host) -> Any:
        """Return a fresh vCPU."""

    def step(self, state: Any, operation: Operation) -> tuple[Any, Answer | None]:
        """Do one operation."""


def answers(machine: Machine | Stepping, program: Program, host: Host) -> list[Answer | None]:
    """Return a machine's answers to a whole program; after one on MSR 0x48 that it leaves open, it says no more."""
    do = machine.step if isinstance(machine, Stepping) else functools.partial(step, machine)
    state = machine.start(program.profile, host)
    found: list[Answer | None] = []
    lost = False
    for operation in program.operations:
        if lost:
            found.append(None)
            continue
        state, answer = do(state, operation)
        lost = answer is None and operation.index == SPEC_CTRL
        found.append(answer)
    return found


def first_difference(mine: Sequence[Answer | None], theirs: Sequence[Answer | None]) -> int | None:
    """Return the number of the first operation on which two lists of answers disagree, or None."""
    for number, (one, other) in enumerate(zip(mine, theirs)):
        if one is not None and other is not None and one != other:
            return number
    return None


def with_value(state: State, value: int) -> State:
    """Return the state with another stored value."""
    return replace(state, value=value)
