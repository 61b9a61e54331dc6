# SPDX-License-Identifier: MIT
"""A live migration between two VMs of our own: a guest runs, its register is saved as a VMM saves it, and restored.

The destination has its own policy and guest CPUID. What a VMM restores by is one of the rules of
probe.models.migration; here it is carried out, there it is calculated.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernel_harness.kvm import guest_code
from kernel_harness.kvm.guest_code import Step
from kernel_harness.kvm.machine import Kvm, Vcpu
from kernel_harness.kvm.policed import Judge, PolicedLaboratory
from kernel_harness.kvm.runner import Cpuids, Laboratory, check_program, needs_irqchip
from probe.errors import UsageError
from probe.models.machine import SPEC_CTRL, Host
from probe.models.peer_machines import xen_bits
from probe.models.policy import BY_NAME
from probe.models.profile import Profile
from probe.models.program import Answer, Program, parse

RULES = ("kvm", "qemu", "xen", "firecracker", "cloud-hypervisor")
_READ = (Step(guest_code.READ, SPEC_CTRL),)

# The case of the thread: a guest sets a bit that the rule of 2020 does not know (PSFD), and moves.
STUDY = parse("profile zen2-client-2020; guest-wr 0x48 0x2; guest-wr 0x48 0x82")[0]
STUDY_TO = BY_NAME["kvm-5.6-mask"]


@dataclass(frozen=True)
class Moved:
    """What became of one guest.

    answers: to its program on the source. before and after: what the guest reads, None if it takes #GP. saved: what was
    sent, None if nothing. outcome: "works", "refused", "lost", "changed", or "unreadable" if the guest could read it.
    """

    answers: tuple[Answer, ...]
    before: int | None
    saved: int | None
    after: int | None
    outcome: str


def _make(kvm: Kvm, cpuids: Cpuids, judge: Judge | None, host: Host, irqchip: bool) -> Laboratory:
    if judge is None:
        return Laboratory(kvm, cpuids, irqchip=irqchip)
    return PolicedLaboratory(kvm, cpuids, judge, host, irqchip=irqchip)


def _read(laboratory: Laboratory, vcpu: Vcpu) -> int | None:
    (result,) = laboratory.guest(vcpu, _READ)
    return None if result.faulted else result.value


def move(
    kvm: Kvm,
    cpuids: Cpuids,
    host: Host,
    program: Program,
    *,
    source: Judge | None = None,
    target: Judge | None = None,
    profile: Profile | None = None,
    rule: str = "kvm",
) -> Moved:
    """Run a program on the source, and move its guest; profile is the guest's CPUID on the destination (the same).

    It needs ticking() around it. Raise UsageError for a rule or program that is none, KvmError as every run does.
    """
    if rule not in RULES:
        raise UsageError(f"no rule is called {rule!r}", f"one of: {', '.join(RULES)}")
    check_program(kvm, program)
    listed = SPEC_CTRL in kvm.get_msr_index_list()
    with _make(kvm, cpuids, source, host, needs_irqchip(program)) as here:
        vcpu = here.vcpu(program.profile)
        answers = tuple(here.run_on(vcpu, program.operations))
        before = _read(here, vcpu)
        held = here.saved_value(vcpu)
    saved = _sent(rule, held, listed, program.profile)
    with _make(kvm, cpuids, target, host, False) as there:
        vcpu = there.vcpu(profile or program.profile)
        took = saved is None or there.host_set(vcpu, SPEC_CTRL, saved)
        if not took and rule != "cloud-hypervisor":
            return Moved(answers, before, saved, None, "refused")
        after = _read(there, vcpu)
    return Moved(answers, before, saved, after, _outcome(before, after, held))


def _sent(rule: str, held: int | None, listed: bool, profile: Profile) -> int | None:
    """Return what a VMM sends of the register; None: nothing."""
    if held is None or (rule == "qemu" and (not listed or held == 0)) or (rule == "firecracker" and not listed):
        return None
    if rule == "xen":
        return held & (xen_bits(profile) or 0)
    return held


def _outcome(before: int | None, after: int | None, held: int | None) -> str:
    if before is not None and after is None:
        return "unreadable"
    seen = held or 0 if before is None else before
    now = after or 0
    if seen == now:
        return "works"
    return "lost" if not now else "changed"
