# SPDX-License-Identifier: MIT
"""Policies: who decides a write of IA32_SPEC_CTRL that does not go to KVM's own rule. Pure.

A policy is one small function of what a VMM knows when KVM_EXIT_X86_WRMSR comes (Linux v5.10): the host, the guest's
CPUID, the vCPU's state and the value. It says what becomes of the write. PolicyMachine is the same policy as a state
machine, over the machine of the kernel that carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from probe import features as f
from probe.models import kvm_machines, peer_machines
from probe.models.machine import DENY_READ, DENY_WRITE, SPEC_CTRL, Host, Machine, State, step
from probe.models.profile import Profile, mask_of_features
from probe.models.program import ACCESSES, IN_GUEST, Answer, Kind, Operation, Word


class Fate(Enum):
    """What becomes of a write: it is carried out, forgotten, or answered with #GP (a refusal, if the VMM wrote)."""

    COMPLETE = "complete"
    DROP = "drop"
    FAULT = "fault"


@dataclass(frozen=True)
class Decision:
    """What a policy says of one write; made by complete(), drop() and fault().

    value goes to the vCPU with KVM_SET_MSRS. shadow is what the guest reads from then on, where the policy also answers
    reads. let_through: from now on KVM alone decides, and lets the guest through as it does.
    """

    fate: Fate
    value: int = 0
    shadow: int = 0
    let_through: bool = False


def complete(value: int, *, shadow: int | None = None, let_through: bool = False) -> Decision:
    """Carry a write out with this value; the guest reads shadow back where reads are answered, else the value."""
    return Decision(Fate.COMPLETE, value, value if shadow is None else shadow, let_through)


def drop() -> Decision:
    """Forget the write: no fault, nothing stored."""
    return Decision(Fate.DROP)


def fault() -> Decision:
    """Answer with #GP."""
    return Decision(Fate.FAULT)


@dataclass(frozen=True)
class VcpuState:
    """What a policy is told of the vCPU: the value it holds, what its guest reads, and who writes now."""

    value: int = 0
    shadow: int = 0
    by_host: bool = False


# (host, guest, vCPU, value) -> what becomes of the write
Decide = Callable[[Host, Profile, VcpuState, int], Decision]


@dataclass(frozen=True)
class Policy:
    """A policy by name.

    reads: guest reads come to us, too, and get the shadow. opens: nothing comes to us; before the guest's first access,
    and the first after INIT, KVM is brought to let it through, if its CPUID has the register: a value that KVM takes is
    written, and taken back.
    initial: the value that a vCPU gets when it is created, and after INIT.
    """

    name: str
    title: str
    source: str
    decide: Decide
    reads: bool = False
    opens: bool = False
    initial: Callable[[Host], int] = lambda host: 0

    @property
    def denied(self) -> int:
        """What the MSR filter denies guests: a mask of DENY_READ and DENY_WRITE."""
        if self.opens:
            return 0
        return DENY_WRITE | (DENY_READ if self.reads else 0)


# --- what the built-in ones ask ------------------------------------------------------------------------------------

_GATE = mask_of_features((f.SPEC_CTRL, f.AMD_STIBP, f.AMD_IBRS, f.AMD_SSBD))


def has_register(guest: Profile) -> bool:
    """Tell whether the guest's CPUID has the register by KVM's gate of v5.11: four bits of either vendor."""
    return guest.mask & _GATE != 0


def guest_bits(guest: Profile) -> int:
    """Return the mask of the bits that the guest's CPUID enumerates."""
    return peer_machines.enumerated(guest.mask)


def host_bits(host: Host) -> int:
    """Return the mask of the bits that the host's CPUID, or what KVM makes of it, enumerates."""
    return peer_machines.enumerated(host.features | host.caps)


def hardware_takes(host: Host, value: int) -> bool:
    """Tell whether the hardware takes a value, as KVM's own test found out."""
    return host.hardware.exists and not value & ~host.hardware.tested


def _let_through(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
    if not (vcpu.by_host or has_register(guest)) or not hardware_takes(host, value):
        return fault()
    return complete(value, let_through=value != 0)


def _as_it_comes(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
    return complete(value)


def _emulate(mask: Callable[[Host, Profile], int]) -> Decide:
    def decide(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
        if not (vcpu.by_host or has_register(guest)) or value & ~mask(host, guest):
            return fault()
        return complete(value)

    return decide


def _mask_then_through(name: str) -> Decide:
    """Return the rule of an era that let guests through after the first accepted value that is not 0.

    It is that of the host's vendor: kvm_intel's gate asks for SPEC_CTRL alone.
    """
    eras = {one.name: one for one in kvm_machines.MACHINES}

    def decide(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
        era = eras[f"{name}-vmx" if host.vmx else f"{name}-svm"]
        allowed = era.test(guest, host)
        if not (vcpu.by_host or era.gate(guest.mask, host.caps)) or allowed is None or value & ~allowed:
            return fault()
        return complete(value, let_through=value != 0)

    return decide


def _hardware_test(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
    return complete(value) if hardware_takes(host, value) else fault()


def _xen(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
    allowed = peer_machines.xen_bits(guest)
    if allowed is None and vcpu.by_host:  # there is nothing to restore but 0
        allowed = 0
    return fault() if allowed is None or value & ~allowed else complete(value)


def forced(mask: int, force: int) -> Decide:
    """Return the rule of "virtualize IA32_SPEC_CTRL": bits of mask are as in force, the guest reads what it wrote.

    Where the hardware cannot do a bit of mask it is the guest's, as every other.
    """

    def decide(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
        able = mask & host.hardware.tested  # what this hardware cannot do is not forced on it
        real = value & ~able | force & able
        if not (vcpu.by_host or has_register(guest)) or not hardware_takes(host, real):
            return fault()
        return complete(real, shadow=value)

    return decide


_BHI_DIS_S = 1 << 10
_THREAD = "f3c243b06b5acfea9ed4e4242d8287c7169ef1be.camel@redhat.com (2020-07-07)"
_RFC = '"Virtualize IA32_SPEC_CTRL", RFC v3, 20240410143446.797262-2-chao.gao@intel.com (2024-04-10); never merged'

POLICIES: tuple[Policy, ...] = (
    Policy(
        "pass-through",
        "let the guest through at once, if its CPUID has the register",
        _THREAD,
        _as_it_comes,
        opens=True,
    ),
    Policy(
        "pass-through-after-write",
        "as KVM from v5.11 to v6.13: hardware test, let through after the first value that is not 0",
        "Linux commits 841c2be09fe4 (v5.9), 39485ed95d6b (v5.11)",
        _let_through,
    ),
    Policy(
        "emulate-guest",
        "every write is checked against the guest's CPUID",
        _THREAD,
        _emulate(lambda host, guest: guest_bits(guest)),
    ),
    Policy(
        "emulate-host", "every write is checked against the host's CPUID", _THREAD, _emulate(lambda h, g: host_bits(h))
    ),
    Policy(
        "emulate",
        "every write is checked against guest and host, as proposed on 7 July 2020",
        _THREAD,
        _emulate(lambda host, guest: guest_bits(guest) & host_bits(host)),
    ),
    Policy(
        "kvm-5.6-mask",
        "the mask of v5.6, let through after the first value that is not 0",
        "Linux commit 6441fa6178f5 (v5.6)",
        _mask_then_through("kvm-5.6"),
    ),
    Policy(
        "maxim-v1",
        "the mask proposed on 2 July 2020, let through after the first value that is not 0",
        "20200702174455.282252-1-mlevitsk@redhat.com; never merged",
        _mask_then_through("kvm-maxim-v1"),
    ),
    Policy(
        "hardware-test",
        "the hardware is asked on every write, CPUID is not looked at (reads are KVM's)",
        "7c1d9bbe-5f59-5b86-01e9-43c929b24218@redhat.com (2020-07-07)",
        _hardware_test,
    ),
    Policy("xen", "Xen's rule: the guest's CPUID", peer_machines.XEN, _xen),
    Policy(
        "forced-shadow",
        "BHI_DIS_S is forced on where the hardware has it, the guest reads what it wrote",
        _RFC,
        forced(_BHI_DIS_S, _BHI_DIS_S),
        reads=True,
        initial=lambda host: _BHI_DIS_S & host.hardware.tested,
    ),
)


# --- as a state machine --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyState:
    """A vCPU under a policy.

    kernel is what KVM has of it, vcpu what the policy knows. through: the policy has let go; opened: KVM was brought to
    let the guest through; denied: what the program's own filter denies.
    """

    kernel: State
    vcpu: VcpuState = VcpuState()
    through: bool = False
    opened: bool = False
    denied: int = 0


@dataclass(frozen=True)
class PolicyMachine:
    """A policy as a state machine, over the machine of the kernel that carries it out."""

    policy: Policy
    kernel: Machine

    @property
    def name(self) -> str:
        """Policy and kernel."""
        return f"{self.policy.name} over {self.kernel.name}"

    @property
    def title(self) -> str:
        """The policy's."""
        return self.policy.title

    @property
    def source(self) -> str:
        """The policy's and the kernel's."""
        return f"{self.policy.source}; {self.kernel.source}"

    @property
    def family(self) -> str:
        """Always "policy"."""
        return "policy"

    def start(self, profile: Profile, host: Host) -> PolicyState:
        """Return a fresh vCPU behind the policy's filter."""
        kernel = self._filtered(self.kernel.start(profile, host), self.policy.denied)
        return self._initialised(PolicyState(kernel))

    def _initialised(self, state: PolicyState) -> PolicyState:
        """Give the vCPU its first value, as the VMM does; 0 is there already when it is created."""
        value = self.policy.initial(state.kernel.host)
        state = replace(state, vcpu=VcpuState(value))
        if not value:
            return state
        return self._by_kernel(state, Operation(Kind.HOST_SET, SPEC_CTRL, value))[0]

    def _filtered(self, kernel: State, denied: int) -> State:
        return self.kernel.set_filter(kernel, denied) if denied != kernel.denied else kernel

    def step(self, state: PolicyState, operation: Operation) -> tuple[PolicyState, Answer | None]:
        """Do one operation; the answer is None where the kernel's machine does not say."""
        kind = operation.kind
        if operation.index != SPEC_CTRL and kind in ACCESSES:
            return state, None
        if kind in IN_GUEST:
            return self._in_guest(self._opened(state), operation)
        if kind is Kind.HOST_SET:
            return self._written(state, operation.value, by_host=True)
        if kind is Kind.HOST_GET:
            if self.policy.reads and not state.through:
                return state, state.vcpu.shadow
            return self._by_kernel(state, operation)
        if kind in (Kind.DENY, Kind.ALLOW):
            asked = operation.value if kind is Kind.DENY and operation.index == SPEC_CTRL else 0
            return self._denying(replace(state, denied=asked)), Word.OK
        after, answer = self._by_kernel(state, operation)
        if kind is Kind.INIT:
            after = replace(after, vcpu=VcpuState(), opened=False)  # kvm_amd of v6.17 and later intercepts again
            if not (state.through or self.policy.opens):
                value = self.policy.initial(state.kernel.host)
                after = self._by_kernel(after, Operation(Kind.HOST_SET, SPEC_CTRL, value))[0]
                after = replace(after, vcpu=VcpuState(value))
        return after, answer

    def saved(self, state: PolicyState) -> int | None:
        """Return what a VMM saves of MSR 0x48: what it knows itself, until the policy has let go; None if refused."""
        if not (self.policy.opens or state.through):
            return state.vcpu.shadow if self.policy.reads else state.vcpu.value
        _, answer = self._by_kernel(state, Operation(Kind.HOST_GET, SPEC_CTRL))
        return answer if isinstance(answer, int) else None

    def asked_for(self, profile: Profile, host: Host) -> int:
        """Return which accesses come to the VMM once a guest has set a bit, a mask of DENY_READ and DENY_WRITE."""
        state = self.start(profile, host)
        for bit in range(64):
            state, answer = self.step(state, Operation(Kind.GUEST_WR, SPEC_CTRL, 1 << bit))
            if answer is Word.OK:
                break
        return 0 if state.through else self.policy.denied

    def _by_kernel(self, state: PolicyState, operation: Operation) -> tuple[PolicyState, Answer | None]:
        kernel, answer = step(self.kernel, state.kernel, operation)
        return replace(state, kernel=kernel), answer

    def _denying(self, state: PolicyState) -> PolicyState:
        """Put the filter in place: the program's, and the policy's unless it has let go. KVM is told anew each time."""
        denied = state.denied | (0 if state.through else self.policy.denied)
        return replace(state, kernel=self.kernel.set_filter(state.kernel, denied))

    def _opened(self, state: PolicyState) -> PolicyState:
        """Bring KVM to let the guest through before its first access, as the VMM does."""
        if not self.policy.opens or state.opened:
            return state
        state = replace(state, opened=True)
        opener = opener_for(state.kernel.host, state.kernel.profile)
        if not opener:
            return state
        kernel = self.kernel.enter(state.kernel)
        kernel, before = step(self.kernel, kernel, Operation(Kind.HOST_GET, SPEC_CTRL))
        for value in (opener, before if isinstance(before, int) else 0):
            kernel, _ = step(self.kernel, kernel, Operation(Kind.HOST_SET, SPEC_CTRL, value))
        return replace(state, kernel=kernel)

    def _in_guest(self, state: PolicyState, operation: Operation) -> tuple[PolicyState, Answer | None]:
        side = DENY_WRITE if operation.kind is Kind.GUEST_WR else DENY_READ
        if not state.kernel.denied & side:
            return self._by_kernel(state, operation)
        state = replace(state, kernel=self.kernel.enter(state.kernel))
        answer: Answer | None = Word.GP
        if not state.denied & side:
            if side == DENY_READ:
                answer = state.vcpu.shadow
            else:
                state, answer = self._written(state, operation.value, by_host=False)
        return replace(state, kernel=self.kernel.enter(state.kernel)), answer

    def _written(self, state: PolicyState, value: int, *, by_host: bool) -> tuple[PolicyState, Answer | None]:
        """Ask the policy about one write, and carry its decision out."""
        no = Word.REFUSED if by_host else Word.GP
        if self.policy.opens or state.through:  # a host's write: the guest's do not come here any more
            return self._by_kernel(state, Operation(Kind.HOST_SET, SPEC_CTRL, value))
        kernel = state.kernel
        told = replace(state.vcpu, by_host=by_host)
        decision = self.policy.decide(kernel.host, kernel.profile, told, value)
        if decision.fate is Fate.FAULT:
            return state, no
        if decision.fate is Fate.DROP:
            return state, Word.OK
        kernel, answer = step(self.kernel, kernel, Operation(Kind.HOST_SET, SPEC_CTRL, decision.value))
        if answer is not Word.OK:
            return state, no
        state = replace(state, kernel=kernel, vcpu=VcpuState(decision.value, decision.shadow))
        if decision.let_through:
            state = self._denying(replace(state, through=True))
        return state, Word.OK


def opener_for(host: Host, guest: Profile) -> int:
    """Return the value with which KVM is brought to let a guest through; 0 if it is not to be, or nothing will do."""
    return host.hardware.tested & -host.hardware.tested if has_register(guest) and host.hardware.exists else 0


BY_NAME: Mapping[str, Policy] = {policy.name: policy for policy in POLICIES}
