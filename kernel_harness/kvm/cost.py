# SPDX-License-Identifier: MIT
"""What a guest pays for WRMSR and RDMSR of IA32_SPEC_CTRL, in TSC cycles, read by the guest itself.

The rows beside the policies say what is in such a number: the timing itself, an exit to KVM (CPUID), and an exit to
this VMM (OUT), which is in Python: a policy in C costs less than one here, but never less than the exit.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kernel_harness.kvm import guest_code
from kernel_harness.kvm.guest_code import Step
from kernel_harness.kvm.machine import Kvm, Vcpu, ticking
from kernel_harness.kvm.policed import Judge, PolicedLaboratory
from kernel_harness.kvm.runner import Cpuids, Laboratory
from probe.models.cost import Cost, Costs, Row
from probe.models.machine import SPEC_CTRL, Host
from probe.models.policy import has_register
from probe.models.profile import Profile, parse_profile

_ROUNDS = 8  # all is timed in turn: what disturbs the machine for a while disturbs all alike
_SAMPLES, _WARM = 60, 10  # of each round, and how many of these do not count
_EVERY_GATE = parse_profile("SPEC_CTRL,INTEL_STIBP,SPEC_CTRL_SSBD,AMD_IBRS,AMD_STIBP,AMD_SSBD")
_BARE = (
    ("nothing: the timing itself", guest_code.TIMED_NOTHING),
    ("CPUID: an exit to KVM", guest_code.TIMED_CPUID),
    ("OUT: an exit to this VMM", guest_code.TIMED_OUT),
)
_PAIR = (("WRMSR", guest_code.TIMED_WRITE), ("RDMSR", guest_code.TIMED_READ))


@dataclass
class _Access:
    """One access of one guest, and what it has taken so far."""

    laboratory: Laboratory
    vcpu: Vcpu
    what: str
    kind: int
    results: list[guest_code.Result] = field(default_factory=list)

    def time(self) -> None:
        """Do it many times in one table."""
        steps = [Step(self.kind, SPEC_CTRL, 0)] * _SAMPLES
        self.results += self.laboratory.guest(self.vcpu, steps)[_WARM:]

    def cost(self) -> Cost:
        if any(result.faulted for result in self.results):
            return Cost(self.what, None)
        cycles = sorted(result.value for result in self.results)
        parts = statistics.quantiles(cycles, n=20)
        return Cost(self.what, round(statistics.median(cycles)), round(parts[0]), round(parts[-1]))


class _Guest:
    """A guest that pays, and its accesses."""

    def __init__(self, laboratory: Laboratory, vcpu: Vcpu, what: Sequence[tuple[str, int]] = _PAIR) -> None:
        self.accesses = [_Access(laboratory, vcpu, *one) for one in what]

    def row(self, name: str, *, took: bool = True, let_through: bool = False) -> Row:
        write, read = (access.cost() for access in self.accesses)
        return Row(name, write, read, took, let_through)


def guest_for(host: Host) -> Profile:
    """Return the CPUID of the guest that pays: what KVM offers, or, if that has no such register, all of its bits."""
    offered = Profile(host.caps)
    return offered if has_register(offered) else _EVERY_GATE


def measure_costs(
    judges: Sequence[Judge], host: Host, progress: Callable[[int, int], None] = lambda done, total: None
) -> Costs:
    """Measure all in one run, on fresh vCPUs; every bit is tried first, so that a policy may let the guest through.

    Policies are told that the host has the guest's CPUID bits: one that asks for them would not let the guest through
    where KVM offers none, and its cost would be that of another.
    """
    guest = guest_for(host)
    lent = Profile(guest.mask & ~(host.features | host.caps))
    told = replace(host, features=host.features | guest.mask, caps=host.caps | guest.mask)
    opener = host.hardware.tested & -host.hardware.tested
    with Kvm() as kvm, ticking(), contextlib.ExitStack() as open_ones:
        cpuids = Cpuids(kvm)
        plain = open_ones.enter_context(Laboratory(kvm, cpuids))
        vcpu = plain.vcpu(guest)
        khz = vcpu.get_tsc_khz()
        bare, before = _Guest(plain, vcpu, _BARE), _Guest(plain, vcpu)
        vcpu = plain.vcpu(guest)
        after = _Guest(plain, vcpu) if opener and plain.host_set(vcpu, SPEC_CTRL, opener) else None
        under = [_under(judge, kvm, cpuids, told, guest, open_ones) for judge in judges]
        guests = [bare, before, *([after] if after else []), *(one for one, *_ in under)]
        for number in range(_ROUNDS):
            progress(number, _ROUNDS)
            for access in (access for one in guests for access in one.accesses):
                access.time()
        progress(_ROUNDS, _ROUNDS)
    alone = [before.row("KVM alone, before the guest was let through")]
    alone += [after.row("KVM alone, after it", let_through=True)] if after else []
    return Costs(
        khz,
        tuple(access.cost() for access in bare.accesses),
        tuple(alone),
        alone[1].write if after else None,
        tuple(
            one.row(judge.policy.name, took=took, let_through=through)
            for judge, (one, took, through) in zip(judges, under)
        ),
        str(lent) if lent.mask else "",
    )


def _under(
    judge: Judge, kvm: Kvm, cpuids: Cpuids, host: Host, guest: Profile, open_ones: contextlib.ExitStack
) -> tuple[_Guest, bool, bool]:
    """Make a guest under a policy: whether it took a bit from it, and whether it lets it through by now."""
    laboratory = PolicedLaboratory(kvm, cpuids, judge, host)
    open_ones.enter_context(laboratory)
    vcpu = laboratory.vcpu(guest)
    tries = [Step(guest_code.WRITE, SPEC_CTRL, 1 << bit) for bit in range(64)]
    took = not all(result.faulted for result in laboratory.guest(vcpu, tries))
    return _Guest(laboratory, vcpu), took, laboratory.lets_through(vcpu)
