# SPDX-License-Identifier: MIT
"""Measures the matrix on this kernel: every profile, every bit, both initiators; each first write on a fresh vCPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from kernel_harness.kvm.guest_code import READ, WRITE, Step
from kernel_harness.kvm.host import backend
from kernel_harness.kvm.machine import Kvm, ticking
from kernel_harness.kvm.policed import Judge, lost, maker
from kernel_harness.kvm.processes import ProcessLost, in_order
from kernel_harness.kvm.runner import Cpuids, Laboratory, Make, plain
from probe.errors import ProbeError
from probe.models.machine import PRED_CMD, SPEC_CTRL, VIRT_SPEC_CTRL, Hardware, Host
from probe.models.matrix import Measured
from probe.models.profile import NONE, Profile, parse_profile

_EVERY_GATE = parse_profile("SPEC_CTRL,AMD_IBPB,AMD_IBRS,AMD_STIBP,AMD_SSBD")
_READ_BACK = (Step(READ, SPEC_CTRL),)


def measure_profile(kvm: Kvm, cpuids: Cpuids, profile: Profile, make: Make = plain) -> Measured:
    """Measure one profile: 128 fresh vCPUs for the first writes, and a few more for the rest."""
    masks: dict[str, int] = {}
    with make(kvm, cpuids, False) as laboratory:
        masks.update(first_writes(laboratory, profile))
        _zero_and_reads(laboratory, profile, masks)
        opener = masks["host_first"] & -masks["host_first"]
        if opener:
            _after(laboratory, profile, masks, opener)
        for name, index in (("pred_cmd", PRED_CMD), ("virt_spec_ctrl", VIRT_SPEC_CTRL)):
            _kin(laboratory, profile, masks, name, index)
    return Measured(profile, opener, masks)


def first_writes(laboratory: Laboratory, profile: Profile) -> dict[str, int]:
    """Write every bit first thing on a fresh vCPU, host-initiated and from the guest: 128 vCPUs of one VM."""
    masks: dict[str, int] = {}
    _first_by_host(laboratory, profile, masks)
    _first_by_guest(laboratory, profile, masks)
    return masks


def _first_by_host(laboratory: Laboratory, profile: Profile, masks: dict[str, int]) -> None:
    taken = kept = seen = 0
    for bit in range(64):
        value = 1 << bit
        vcpu = laboratory.vcpu(profile)
        if laboratory.host_set(vcpu, SPEC_CTRL, value):
            taken |= value
            if laboratory.host_get(vcpu, SPEC_CTRL) == value:
                kept |= value
            (result,) = laboratory.guest(vcpu, _READ_BACK)
            if not result.faulted and result.value == value:
                seen |= value
    masks.update(host_first=taken, host_first_kept=kept, host_first_seen=seen)


def _first_by_guest(laboratory: Laboratory, profile: Profile, masks: dict[str, int]) -> None:
    taken = kept = seen = 0
    for bit in range(64):
        value = 1 << bit
        vcpu = laboratory.vcpu(profile)
        wrote, read = laboratory.guest(vcpu, (Step(WRITE, SPEC_CTRL, value), *_READ_BACK))
        if not wrote.faulted:
            taken |= value
            if not read.faulted and read.value == value:
                seen |= value
            if laboratory.host_get(vcpu, SPEC_CTRL) == value:
                kept |= value
    masks.update(guest_first=taken, guest_first_kept=kept, guest_first_seen=seen)


def _zero_and_reads(laboratory: Laboratory, profile: Profile, masks: dict[str, int]) -> None:
    masks["host_zero"] = int(laboratory.host_set(laboratory.vcpu(profile), SPEC_CTRL, 0))
    (wrote,) = laboratory.guest(laboratory.vcpu(profile), (Step(WRITE, SPEC_CTRL, 0),))
    masks["guest_zero"] = int(not wrote.faulted)
    vcpu = laboratory.vcpu(profile)
    masks["host_read"] = int(laboratory.host_get(vcpu, SPEC_CTRL) == 0)
    (read,) = laboratory.guest(vcpu, _READ_BACK)
    masks["guest_read"] = int(not read.faulted and read.value == 0)


def _each_bit(laboratory: Laboratory, profile: Profile, opener: int, index: int) -> tuple[int, int]:
    """Write every bit in the guest, all in one entry; return the masks that were accepted and that read back."""
    vcpu = laboratory.vcpu(profile)
    if opener and not laboratory.host_set(vcpu, SPEC_CTRL, opener):
        return 0, 0
    steps = [step for bit in range(64) for step in (Step(WRITE, index, 1 << bit), Step(READ, index))]
    results = laboratory.guest(vcpu, steps)
    taken = seen = 0
    for bit in range(64):
        wrote, read = results[2 * bit], results[2 * bit + 1]
        taken |= 0 if wrote.faulted else 1 << bit
        seen |= 1 << bit if not wrote.faulted and not read.faulted and read.value == 1 << bit else 0
    return taken, seen


def _after(laboratory: Laboratory, profile: Profile, masks: dict[str, int], opener: int) -> None:
    masks["guest_after"], masks["guest_after_seen"] = _each_bit(laboratory, profile, opener, SPEC_CTRL)
    vcpu = laboratory.vcpu(profile)
    laboratory.host_set(vcpu, SPEC_CTRL, opener)
    laboratory.guest(vcpu, _READ_BACK)
    masks["host_after"] = sum(1 << bit for bit in range(64) if laboratory.host_set(vcpu, SPEC_CTRL, 1 << bit))


def _kin(laboratory: Laboratory, profile: Profile, masks: dict[str, int], name: str, index: int) -> None:
    """Write every bit of a register beside it, each as the first write that is accepted.

    A refused write leaves a vCPU as it was, so a vCPU serves until it has accepted one (KVM then lets the guest's
    writes of IA32_PRED_CMD through). A KVM that has taken four bits so takes what comes: the rest go to one vCPU.
    """
    by_guest = 0
    bits = list(range(64))
    for last in (False, False, False, False, True):
        results = laboratory.guest(laboratory.vcpu(profile), [Step(WRITE, index, 1 << bit) for bit in bits])
        taken = [bit for bit, result in zip(bits, results) if not result.faulted]
        by_guest |= sum(1 << bit for bit in (taken if last else taken[:1]))
        bits = [bit for bit in bits if taken and bit > taken[0]]
        if not bits:
            break
    vcpu = laboratory.vcpu(profile)
    by_host = sum(1 << bit for bit in range(64) if laboratory.host_set(vcpu, index, 1 << bit))
    masks[f"{name}_guest"], masks[f"{name}_host"] = by_guest, by_host


def measure_host(kvm: Kvm, cpuids: Cpuids, features: int, *, ignore_msrs: bool = False) -> Host:
    """Ask the hardware through KVM, and find out whether the kernel switches the register at entry and exit.

    features is what the host's own CPUID reports, as a mask over FEATURES. From v5.9 on KVM_SET_MSRS tries the value on
    the hardware; before, what it accepts is KVM's own mask, and models that ask the hardware are then told apart by the
    guest's writes after pass-through. The guest that meets the hardware is the first of some that is let through.
    """
    caps = Profile(cpuids.mask())
    guests = (NONE, caps, _EVERY_GATE)
    row = measure_profile(kvm, cpuids, NONE)
    let_through = next((each for each in map(_meets(kvm, cpuids), guests) if each.masks.get("guest_after")), row)
    with Laboratory(kvm, cpuids) as laboratory:
        vcpu = laboratory.vcpu(let_through.profile)
        switched = loaded = True
        start = 0
        opener = let_through.opener  # before v5.9 KVM takes no bit from the host for a guest without CPUID
        if opener:
            laboratory.host_set(vcpu, SPEC_CTRL, opener)
            (read,) = laboratory.guest(vcpu, _READ_BACK)
            switched = not read.faulted and laboratory.host_get(vcpu, SPEC_CTRL) == read.value
            kept = let_through.masks.get("guest_after_seen", 0) & opener
            # Of a register that keeps nothing nobody can tell whether it was loaded.
            loaded = not kept or (not read.faulted and read.value == opener)
            start = 0 if (switched and loaded) or read.faulted else read.value
    hardware = Hardware(
        exists=bool(row.masks["host_zero"]),
        tested=row.masks["host_first"],
        valid=let_through.masks.get("guest_after", 0),
        keep=let_through.masks.get("guest_after_seen", 0),
        start=start,
        pred_cmd=max(_pred_cmd(kvm, cpuids, profile) for profile in (caps, _EVERY_GATE)),
    )
    return Host(
        hardware,
        features=features,
        caps=caps.mask,
        switched=switched,
        loaded=loaded,
        ignore_msrs=ignore_msrs,
        vmx=backend() == "kvm_intel",
    )


def _meets(kvm: Kvm, cpuids: Cpuids) -> Callable[[Profile], Measured]:
    return lambda profile: measure_profile(kvm, cpuids, profile)


def _pred_cmd(kvm: Kvm, cpuids: Cpuids, profile: Profile) -> int:
    """Return the bits of IA32_PRED_CMD that a guest may write once its IBPB was accepted."""
    with Laboratory(kvm, cpuids) as laboratory:
        steps = [Step(WRITE, PRED_CMD, 1), *(Step(WRITE, PRED_CMD, 1 << bit) for bit in range(64))]
        first, *others = laboratory.guest(laboratory.vcpu(profile), steps)
    return 0 if first.faulted else sum(1 << bit for bit, result in enumerate(others) if not result.faulted)


# --- on every core ---------------------------------------------------------------------------------------------------

_Row = tuple[Measured, dict[str, int]]


@contextlib.contextmanager
def _worker(judge: Judge | None, host: Host | None) -> Iterator[Callable[[Profile], _Row]]:
    with Kvm() as kvm, ticking():
        cpuids, make = Cpuids(kvm), maker(judge, host)

        def one(profile: Profile) -> _Row:
            row = measure_profile(kvm, cpuids, profile, make)
            return row, judge.take_complaints() if judge is not None else {}

        yield one


def measure(
    profiles: Sequence[Profile],
    progress: Callable[[int, int], None],
    jobs: int | None = None,
    *,
    judge: Judge | None = None,
    host: Host | None = None,
) -> list[Measured]:
    """Measure many profiles on every core that this process may use; the rows come back in the profiles' order.

    With a judge, guests obey its policy, and what workers had to complain of it is added to its complaints.
    """
    count = jobs or len(os.sched_getaffinity(0))
    rows: list[Measured] = []
    for row, complaints in _rows(profiles, count, judge, host):
        rows.append(row)
        if judge is not None:
            judge.add_complaints(complaints)
        progress(len(rows), len(profiles))
    return rows


def _rows(profiles: Sequence[Profile], jobs: int, judge: Judge | None, host: Host | None) -> Iterator[_Row]:
    if jobs == 1:
        with Kvm() as kvm, ticking():
            cpuids, make = Cpuids(kvm), maker(judge, host)
            for profile in profiles:
                yield measure_profile(kvm, cpuids, profile, make), {}
        return
    try:
        yield from in_order(
            profiles, jobs, lambda: _worker(judge, host), lambda number: f"on guests with {profiles[number]}"
        )
    except ProcessLost as error:
        raise (lost(judge.policy.name, error) if judge is not None else _killed(error)) from None


def _killed(error: ProcessLost) -> ProbeError:
    return ProbeError(f"a process that measures guests has ended ({error.message})", "run it again; --jobs 1: in one")
