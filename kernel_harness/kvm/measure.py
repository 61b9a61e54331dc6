# SPDX-License-Identifier: MIT
"""Measures the matrix on this kernel: every profile, every bit, both initiators; each first write on a fresh vCPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence

from kernel_harness.kvm.guest_code import READ, WRITE, Step
from kernel_harness.kvm.machine import Kvm, ticking
from kernel_harness.kvm.runner import Cpuids, Laboratory
from probe.models.machine import SPEC_CTRL, Hardware, Host
from probe.models.matrix import Measured
from probe.models.profile import NONE, Profile

PRED_CMD = 0x49
VIRT_SPEC_CTRL = 0xC001011F
_READ_BACK = (Step(READ, SPEC_CTRL),)


def measure_profile(kvm: Kvm, cpuids: Cpuids, profile: Profile) -> Measured:
    """Measure one profile: 128 fresh vCPUs for the first writes, and a few more for the rest."""
    masks: dict[str, int] = {}
    with Laboratory(kvm, cpuids) as laboratory:
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
        if vcpu.set_msr(SPEC_CTRL, value):
            taken |= value
            if vcpu.get_msr(SPEC_CTRL) == value:
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
            if vcpu.get_msr(SPEC_CTRL) == value:
                kept |= value
    masks.update(guest_first=taken, guest_first_kept=kept, guest_first_seen=seen)


def _zero_and_reads(laboratory: Laboratory, profile: Profile, masks: dict[str, int]) -> None:
    masks["host_zero"] = int(laboratory.vcpu(profile).set_msr(SPEC_CTRL, 0))
    (wrote,) = laboratory.guest(laboratory.vcpu(profile), (Step(WRITE, SPEC_CTRL, 0),))
    masks["guest_zero"] = int(not wrote.faulted)
    vcpu = laboratory.vcpu(profile)
    masks["host_read"] = int(vcpu.get_msr(SPEC_CTRL) == 0)
    (read,) = laboratory.guest(vcpu, _READ_BACK)
    masks["guest_read"] = int(not read.faulted and read.value == 0)


def _each_bit(laboratory: Laboratory, profile: Profile, opener: int, index: int) -> tuple[int, int]:
    """Write every bit in the guest, all in one entry; return the masks that were accepted and that read back."""
    vcpu = laboratory.vcpu(profile)
    if opener and not vcpu.set_msr(SPEC_CTRL, opener):
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
    vcpu.set_msr(SPEC_CTRL, opener)
    laboratory.guest(vcpu, _READ_BACK)
    masks["host_after"] = sum(1 << bit for bit in range(64) if vcpu.set_msr(SPEC_CTRL, 1 << bit))


def _kin(laboratory: Laboratory, profile: Profile, masks: dict[str, int], name: str, index: int) -> None:
    masks[f"{name}_guest"], _ = _each_bit(laboratory, profile, 0, index)
    vcpu = laboratory.vcpu(profile)
    masks[f"{name}_host"] = sum(1 << bit for bit in range(64) if vcpu.set_msr(index, 1 << bit))


def measure_host(kvm: Kvm, cpuids: Cpuids, features: int) -> Host:
    """Ask the hardware through KVM, and find out whether the kernel switches the register at entry and exit.

    features is what the host's own CPUID reports, as a mask over FEATURES. From v5.9 on KVM_SET_MSRS tries the value on
    the hardware; before, what it accepts is KVM's own mask, and models that ask the hardware are then told apart by the
    guest's writes after pass-through.
    """
    row = measure_profile(kvm, cpuids, NONE)
    with Laboratory(kvm, cpuids) as laboratory:
        vcpu = laboratory.vcpu(NONE)
        switched = True
        start = 0
        opener = row.opener
        if opener:
            vcpu.set_msr(SPEC_CTRL, opener)
            (read,) = laboratory.guest(vcpu, _READ_BACK)
            switched = not read.faulted and vcpu.get_msr(SPEC_CTRL) == read.value
            start = 0 if switched or read.faulted else read.value
    hardware = Hardware(
        exists=bool(row.masks["host_zero"]),
        tested=row.masks["host_first"],
        valid=row.masks.get("guest_after", 0),
        keep=row.masks.get("guest_after_seen", 0),
        start=start,
    )
    return Host(hardware, features=features, caps=cpuids.mask(), switched=switched)


# --- on every core ---------------------------------------------------------------------------------------------------

_worker: tuple[Kvm, Cpuids] | None = None


def _begin() -> None:
    global _worker
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    kvm = Kvm()
    _worker = kvm, Cpuids(kvm)


def _one(profile: Profile) -> Measured:
    assert _worker is not None
    with ticking():
        return measure_profile(*_worker, profile)


def measure(
    profiles: Sequence[Profile], progress: Callable[[int, int], None], jobs: int | None = None
) -> list[Measured]:
    """Measure many profiles on every core that this process may use; the rows come back in the profiles' order."""
    count = jobs or len(os.sched_getaffinity(0))
    rows: list[Measured] = []
    for row in _rows(profiles, count):
        rows.append(row)
        progress(len(rows), len(profiles))
    return rows


def _rows(profiles: Sequence[Profile], jobs: int) -> Iterator[Measured]:
    if jobs == 1:
        with Kvm() as kvm, ticking():
            cpuids = Cpuids(kvm)
            for profile in profiles:
                yield measure_profile(kvm, cpuids, profile)
        return
    with multiprocessing.get_context("fork").Pool(jobs, _begin) as pool:
        yield from pool.imap(_one, profiles, chunksize=1)
