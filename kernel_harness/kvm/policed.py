# SPDX-License-Identifier: MIT
"""Real guests that obey a policy: the filter denies their accesses, KVM brings each to us, and the policy decides.

KVM_X86_SET_MSR_FILTER denies guests MSR 0x48, KVM_CAP_X86_USER_SPACE_MSR turns the denial into KVM_EXIT_X86_WRMSR (or
RDMSR), what the policy completes goes to the vCPU with KVM_SET_MSRS. Both since Linux v5.10.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kernel_harness.kvm import guest_code, uapi
from kernel_harness.kvm.guest_code import Step
from kernel_harness.kvm.machine import RUN_SECONDS, Kvm, Vcpu, hurry
from kernel_harness.kvm.processes import ProcessLost, by_user
from kernel_harness.kvm.runner import Cpuids, Laboratory, Make, plain
from probe.errors import PolicyError, RequirementMissing
from probe.models.machine import DENY_READ, DENY_WRITE, SPEC_CTRL, Host
from probe.models.policy import Decision, Fate, Policy, VcpuState, fault, opener_for
from probe.models.profile import Profile
from probe.record import hide_paths

_DECIDE_SECONDS = 0.5  # a policy that takes longer for one write loops
_MOST_LOOPS = 3  # after which it is not asked any more
_EXITS = {uapi.KVM_EXIT_X86_WRMSR: DENY_WRITE, uapi.KVM_EXIT_X86_RDMSR: DENY_READ}


@dataclass
class _Known:
    """What the VMM knows of one vCPU; see probe.models.policy.PolicyState."""

    profile: Profile
    state: VcpuState = field(default_factory=VcpuState)
    through: bool = False
    opened: bool = False


class Judge:
    """Asks a policy, and lives with one that raises, loops, or answers nonsense: such a write takes #GP.

    complaints says what it did, each thing once; asked counts the writes.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.complaints: dict[str, int] = {}
        self.asked = 0
        self._loops = 0
        self._first: dict[str, str] = {}

    def __call__(self, host: Host, guest: Profile, state: VcpuState, value: int) -> Decision:
        """Return the policy's decision about one write."""
        self.asked += 1
        if self._loops >= _MOST_LOOPS:
            return self._complain("was not asked any more")
        stdout, sys.stdout = sys.stdout, sys.stderr  # a policy that prints must not print into our JSON
        try:
            with hurry(_DECIDE_SECONDS):
                decision = self.policy.decide(host, guest, state, value)
        except TimeoutError:
            self._loops += 1
            return self._complain(f"took longer than {_DECIDE_SECONDS:g} s")
        except BaseException as error:  # a policy may raise whatever it likes, SystemExit and GeneratorExit too
            if isinstance(error, KeyboardInterrupt) and by_user(error):
                raise
            return self._wrong(f"raised {type(error).__name__}", error)
        finally:
            sys.stdout = stdout
        if inspect.iscoroutine(decision):
            decision.close()  # or Python says on stderr that nobody awaited it
        if type(decision) is not Decision or type(decision.fate) is not Fate:
            return self._wrong(f"returned {type(decision).__name__}, no Decision", decision)
        for number in (decision.value, decision.shadow):
            if type(number) is not int or not 0 <= number < 1 << 64:
                return self._wrong(f"returned a {type(number).__name__} that is no value of 64 bits", number)
        return decision

    def _wrong(self, what: str, value: object) -> Decision:
        """Complain of one kind of thing, with the text of its first case: that may differ with every value."""
        return self._complain(self._first.setdefault(what, f"{what} ({text_of(value)})"))

    def take_complaints(self) -> dict[str, int]:
        """Return what there is to complain of, and begin anew."""
        taken, self.complaints = self.complaints, {}
        return taken

    def add_complaints(self, more: Mapping[str, int]) -> None:
        """Add what another process has to complain of."""
        for what, count in more.items():
            self.complaints[what] = self.complaints.get(what, 0) + count

    def _complain(self, what: str) -> Decision:
        what = hide_paths(what)  # it goes into the record
        self.complaints[what] = self.complaints.get(what, 0) + 1
        return fault()


def text_of(value: object) -> str:
    """Return what a policy's value or exception says of itself, shortly and printable, whatever it does to be asked."""
    try:
        text = ascii(str(value))[1:-1]
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and by_user(error):
            raise
        return "and cannot say what"
    return text[:60]


def lost(policy: str, error: ProcessLost) -> PolicyError:
    """Return the error that a policy's code ended the process in which it ran."""
    return PolicyError(f"the policy {policy} ended the process in which it ran ({error.message})")


class PolicedLaboratory(Laboratory):
    """A VM whose vCPUs run programs under a policy, one vCPU after another."""

    def __init__(self, kvm: Kvm, cpuids: Cpuids, judge: Judge, host: Host, *, irqchip: bool = False) -> None:
        if not (
            kvm.check_extension(uapi.KVM_CAP_X86_MSR_FILTER) and kvm.check_extension(uapi.KVM_CAP_X86_USER_SPACE_MSR)
        ):
            raise RequirementMissing(
                "this KVM cannot hand a guest's MSR accesses to a policy: no KVM_CAP_X86_MSR_FILTER, or no "
                "KVM_CAP_X86_USER_SPACE_MSR",
                "both came with Linux v5.10",
            )
        super().__init__(kvm, cpuids, irqchip=irqchip)
        self._judge, self._policy, self._host = judge, judge.policy, host
        self._known: dict[Vcpu, _Known] = {}
        self._filter = 0
        self._asked_denied = 0  # by the program
        try:
            self.vm.enable_cap(uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_FILTER)
        except BaseException:
            self.vm.close()
            raise

    def vcpu(self, profile: Profile) -> Vcpu:
        """Create a fresh vCPU behind the policy's filter."""
        self._asked_denied = 0
        if self._filter != self._policy.denied:
            self._put_filter(self._policy.denied)
        vcpu = super().vcpu(profile)
        value = self._policy.initial(self._host)
        self._known[vcpu] = _Known(profile, VcpuState(value))
        if value:
            vcpu.set_msr(SPEC_CTRL, value)
        return vcpu

    def set_cpuid(self, vcpu: Vcpu, profile: Profile) -> None:
        """Give the vCPU another CPUID, before its first entry."""
        super().set_cpuid(vcpu, profile)
        self._known[vcpu].profile = profile

    def init(self, vcpu: Vcpu) -> None:
        """Send an INIT; what the policy knows of the vCPU is gone with it, and it begins anew.

        The value is written, be it 0: with V_SPEC_CTRL KVM leaves the old one.
        """
        super().init(vcpu)
        known = self._known[vcpu]
        known.state, known.opened = VcpuState(), False
        if not (known.through or self._policy.opens):
            known.state = VcpuState(self._policy.initial(self._host))
            vcpu.set_msr(SPEC_CTRL, known.state.value)

    def deny(self, index: int, denied: int) -> None:
        """Change the program's own filter; the policy's stays beside it."""
        self._asked_denied = denied if index == SPEC_CTRL else 0
        through = bool(self._known) and self._known[next(reversed(self._known))].through
        mine = self._asked_denied | (0 if through else self._policy.denied)
        if index not in (0, SPEC_CTRL):
            self._put_filter(mine, (index, denied))
        else:
            self._put_filter(mine)
        self._denied = bool(denied)

    def _put_filter(self, denied: int, *more: tuple[int, int]) -> None:
        self.vm.set_msr_filter([*([(SPEC_CTRL, denied)] if denied else []), *more])
        self._filter = denied

    def host_set(self, vcpu: Vcpu, index: int, value: int) -> bool:
        """Write an MSR as the VMM: the policy is asked about 0x48, as for a restore."""
        known = self._known[vcpu]
        if index != SPEC_CTRL or self._policy.opens or known.through:
            return super().host_set(vcpu, index, value)
        return self._write(vcpu, known, value, by_host=True)

    def host_get(self, vcpu: Vcpu, index: int) -> int | None:
        """Read an MSR as the VMM: what the guest would read, where the policy answers reads."""
        known = self._known[vcpu]
        if index == SPEC_CTRL and self._policy.reads and not known.through:
            return known.state.shadow
        return super().host_get(vcpu, index)

    def saved_value(self, vcpu: Vcpu) -> int | None:
        """Return what a VMM saves: what it knows itself, until the policy has let go."""
        known = self._known[vcpu]
        if self._policy.opens or known.through:
            return super().saved_value(vcpu)
        return known.state.shadow if self._policy.reads else known.state.value

    def lets_through(self, vcpu: Vcpu) -> bool:
        """Tell whether the guest's writes do not come to us, or no more."""
        return self._policy.opens or self._known[vcpu].through

    def _write(self, vcpu: Vcpu, known: _Known, value: int, *, by_host: bool) -> bool:
        """Ask about one write and carry the decision out; tell whether it succeeds."""
        told = replace(known.state, by_host=True) if by_host else known.state  # every exit comes by here
        decision = self._judge(self._host, known.profile, told, value)
        if decision.fate is not Fate.COMPLETE:
            return decision.fate is Fate.DROP
        if not vcpu.set_msr(SPEC_CTRL, decision.value):
            return False
        known.state = VcpuState(decision.value, decision.shadow)
        if decision.let_through:
            known.through = True
            self._put_filter(self._asked_denied)
        return True

    def guest(self, vcpu: Vcpu, steps: Sequence[Step], seconds: float = RUN_SECONDS) -> list[guest_code.Result]:
        """Run steps in the guest, answering what comes to us."""
        known = self._known[vcpu]
        if known is not self._known[next(reversed(self._known))]:
            raise ValueError("the filter is the VM's: of its vCPUs only the one created last may run")
        if self._policy.opens and not known.opened and steps:
            self._open(vcpu, known)
        return super().guest(vcpu, steps, seconds)

    def _open(self, vcpu: Vcpu, known: _Known) -> None:
        """Bring KVM to let the guest through: after an entry, a value that is not 0, and then the old one again."""
        known.opened = True
        opener = opener_for(self._host, known.profile)
        if opener:
            super().guest(vcpu, [])
            before = vcpu.get_msr(SPEC_CTRL)
            vcpu.set_msr(SPEC_CTRL, opener)
            vcpu.set_msr(SPEC_CTRL, before or 0)

    def enter(self, vcpu: Vcpu, seconds: float) -> None:
        """Enter the guest until it exits for something else than an access that is ours to answer."""
        super().enter(vcpu, seconds)
        # No local name for the page: in the traceback of an exception it would keep the mapping from being closed.
        while (side := _EXITS.get(vcpu.run_page.exit_reason)) is not None:
            vcpu.run_page.msr.error = 0 if self._answer(vcpu, side) else 1
            vcpu.run(seconds)

    def _answer(self, vcpu: Vcpu, side: int) -> bool:
        """Answer one access of the guest that came to us; tell whether it succeeds."""
        known = self._known[vcpu]
        if vcpu.run_page.msr.index != SPEC_CTRL or self._asked_denied & side:  # the program's own filter
            return False
        if side == DENY_READ:
            vcpu.run_page.msr.data = known.state.shadow
            return True
        return self._write(vcpu, known, vcpu.run_page.msr.data, by_host=False)


def maker(judge: Judge | None, host: Host | None) -> Make:
    """Return what makes VMs: plain ones, or such that obey a policy."""
    if judge is None or host is None:
        return plain
    return lambda kvm, cpuids, irqchip: PolicedLaboratory(kvm, cpuids, judge, host, irqchip=irqchip)
