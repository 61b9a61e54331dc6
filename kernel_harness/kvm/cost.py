# SPDX-License-Identifier: MIT
"""What a guest pays for WRMSR and RDMSR of IA32_SPEC_CTRL, in TSC cycles, read by the guest itself.

The rows beside the policies say what is in such a number: the timing itself, an exit to KVM (CPUID), and an exit to
this VMM (OUT), which is in Python: a policy in C costs less than one here, but never less than the exit.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from kernel_harness.kvm import guest_code
from kernel_harness.kvm.guest_code import Step
from kernel_harness.kvm.machine import Kvm, Vcpu, ticking
from kernel_harness.kvm.policed import Judge, PolicedLaboratory
from kernel_harness.kvm.runner import Cpuids, Laboratory
from probe.models.cost import Cost, Costs, Row
from probe.models.machine import SPEC_CTRL, Host
from probe.models.policy import has_register
from probe.models.profile import Profile, parse_profile

SAMPLES = 400
_EVERY_GATE = parse_profile("SPEC_CTRL,INTEL_STIBP,SPEC_CTRL_SSBD,AMD_IBRS,AMD_STIBP,AMD_SSBD")


def _cost(what: str, results: Sequence[guest_code.Result]) -> Cost:
    if any(result.faulted for result in results):
        return Cost(what, None)
    cycles = sorted(result.value for result in results)
    parts = statistics.quantiles(cycles, n=20)
    return Cost(what, round(statistics.median(cycles)), round(parts[0]), round(parts[-1]))


def _timed(laboratory: Laboratory, vcpu: Vcpu, what: str, kind: int) -> Cost:
    """Time one access many times in one table; the first tenth warms up and does not count."""
    steps = [Step(kind, SPEC_CTRL, 0)] * SAMPLES
    return _cost(what, laboratory.guest(vcpu, steps)[SAMPLES // 10 :])


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
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        with Laboratory(kvm, cpuids) as plain:
            khz, bare, alone, through = _alone(plain, guest, host.hardware.tested & -host.hardware.tested)
        rows = []
        for number, judge in enumerate(judges):
            progress(number, len(judges))
            laboratory = PolicedLaboratory(kvm, cpuids, judge, told)
            with laboratory:
                vcpu = laboratory.vcpu(guest)
                tries = [Step(guest_code.WRITE, SPEC_CTRL, 1 << bit) for bit in range(64)]
                took = not all(result.faulted for result in laboratory.guest(vcpu, tries))
                costs = _pair(laboratory, vcpu)
                rows.append(Row(judge.policy.name, *costs, took=took, let_through=laboratory.lets_through(vcpu)))
        progress(len(judges), len(judges))
    return Costs(khz, bare, alone, through, tuple(rows), str(lent) if lent.mask else "")


def _alone(
    laboratory: Laboratory, guest: Profile, opener: int
) -> tuple[int, tuple[Cost, ...], tuple[Row, ...], Cost | None]:
    """Time guests under KVM alone: the TSC in kHz, bare exits, both kinds of rows, and the write that is let through.

    opener is a value that KVM takes from the host, 0 if there is none.
    """
    vcpu = laboratory.vcpu(guest)
    khz = vcpu.get_tsc_khz()
    bare = (
        _timed(laboratory, vcpu, "nothing: the timing itself", guest_code.TIMED_NOTHING),
        _timed(laboratory, vcpu, "CPUID: an exit to KVM", guest_code.TIMED_CPUID),
        _timed(laboratory, vcpu, "OUT: an exit to this VMM", guest_code.TIMED_OUT),
    )
    before = Row("KVM alone, before the guest was let through", *_pair(laboratory, vcpu))
    vcpu = laboratory.vcpu(guest)
    if not opener or not laboratory.host_set(vcpu, SPEC_CTRL, opener):
        return khz, bare, (before,), None
    after = Row("KVM alone, after it", *_pair(laboratory, vcpu), let_through=True)
    return khz, bare, (before, after), after.write


def _pair(laboratory: Laboratory, vcpu: Vcpu) -> tuple[Cost, Cost]:
    return (
        _timed(laboratory, vcpu, "WRMSR", guest_code.TIMED_WRITE),
        _timed(laboratory, vcpu, "RDMSR", guest_code.TIMED_READ),
    )
