# SPDX-License-Identifier: MIT
"""One study of this kernel's KVM: measure the matrix, hold every model against it, and put the record together."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import probe
from kernel_harness.kvm import uapi
from kernel_harness.kvm.machine import Kvm, ticking
from kernel_harness.kvm.measure import measure, measure_host
from kernel_harness.kvm.runner import Cpuids, run_program
from probe import kvm_record
from probe.assembly import kernel_entry, machine_entry
from probe.cpuid.machine import MachineCpuid, read_machine
from probe.host import Host as HostFiles
from probe.journal import now
from probe.models.machine import SPEC_CTRL, Host
from probe.models.machines import MACHINES, get
from probe.models.matrix import distinguishable, fit
from probe.models.profile import ALL_FEATURES, FEATURES, NAMED, Profile, mask_of_features, profile_of
from probe.models.program import format_answer, written
from probe.record import Tool

_BACKENDS = ("kvm_intel", "kvm_amd", "kvm_pvm")
_IDEAL = ALL_FEATURES & ~mask_of_features([bit for bit in FEATURES if bit.name == "V_SPEC_CTRL"])


def default_profiles(supported: int) -> list[Profile]:
    """Return the named profiles, what KVM supports, and one for each class of CPUIDs that models tell apart.

    Classes that only a policy tells apart are left out: no kernel follows one. supported is a mask over FEATURES.
    """
    machines = [machine for machine in MACHINES if machine.family != "policy"]
    classes = distinguishable(machines, [Host(features=_IDEAL, caps=_IDEAL)])
    return list(dict.fromkeys([*(named.profile for named in NAMED), Profile(supported), *classes]))


def all_profiles() -> list[Profile]:
    """Return every combination of the CPUID bits that any model looks at, those with few bits first, and "none"."""
    masks = sorted(range(ALL_FEATURES + 1), key=lambda mask: (bin(mask).count("1"), mask))
    return [NAMED[0].profile, *(Profile(mask) for mask in masks)]


def study(
    profiles: Sequence[Profile] | None,
    *,
    arguments: Sequence[str],
    identity: str = "",
    jobs: int | None = None,
    programs: int = 0,
    seed: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> kvm_record.KvmRecord:
    """Measure and compare; profiles None means default_profiles(). programs random ones are tried on each model that
    explains the matrix.

    Raise RequirementMissing if there is no KVM, GuestLost if a guest does something else than its steps.
    """
    started, clock = now(), time.monotonic()
    files = HostFiles()
    facts = files.facts()
    cpuid = read_machine(facts.online)
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, _features(cpuid))
        wanted = list(profiles) if profiles is not None else default_profiles(cpuids.mask())
        entry = _kvm_entry(kvm)
    rows = measure(wanted, progress, jobs)
    fits = kvm_record.in_order(fit(machine, host, rows) for machine in MACHINES)
    explained = kvm_record.explaining(fits)
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        entries = [kvm_record.fit_entry(one, host, lambda program: run_program(kvm, cpuids, program)) for one in fits]
        explored = _explored(kvm, cpuids, explained, host, programs, seed)
    return kvm_record.KvmRecord(
        kind="kvm",
        schema_version=f"{kvm_record.SCHEMA_MAJOR}.{kvm_record.SCHEMA_MINOR}",
        tool=Tool(version=probe.__version__, python=platform.python_version(), arguments=list(arguments)),
        started=started,
        duration=round(time.monotonic() - clock, 3),
        machine=machine_entry(facts, cpuid),
        kernel=kernel_entry(facts, files.taint(), []),
        kvm=entry,
        hardware=kvm_record.hardware_entry(host),
        rows=kvm_record.row_entries(rows),
        fits=entries,
        explained_by=[name for name in explained if not _contradicted(name, explored)],
        explored=explored,
        notes=_notes(entry, host, explained),
        identity=identity,
    )


def _explored(
    kvm: Kvm, cpuids: Cpuids, names: Sequence[str], host: Host, programs: int, seed: int
) -> list[kvm_record.ExploredEntry]:
    """Run random programs against all models that explain the matrix at once; one that differs leaves the field."""
    from kernel_harness.kvm.explore import explore

    entries: list[kvm_record.ExploredEntry] = []
    left = [get(name) for name in names]
    while left and programs:
        done = explore(kvm, cpuids, left, host, most=programs, seconds=3600, seed_number=seed)
        found = done.divergence
        for machine in left if found is None else [found.machine]:
            entry = kvm_record.ExploredEntry(
                model=machine.name, programs=done.programs, seed=seed, seconds=round(done.seconds, 1)
            )
            if found is not None:
                entry.divergence = written(found.program, found.kernel)
                said = found.model[found.at]
                entry.model_says = "nothing" if said is None else format_answer(said)
                entry.steady = done.steady
            entries.append(entry)
        if found is None:
            break
        left.remove(found.machine)
    return entries


def _contradicted(model: str, explored: Sequence[kvm_record.ExploredEntry]) -> bool:
    return any(entry.model == model and entry.divergence for entry in explored)


def _features(cpuid: MachineCpuid) -> int:
    return profile_of(cpuid.cpus[min(cpuid.cpus)]).mask


def _kvm_entry(kvm: Kvm) -> kvm_record.KvmEntry:
    loaded = [name for name in _BACKENDS if Path("/sys/module", name).exists()]
    try:
        ignore = Path("/sys/module/kvm/parameters/ignore_msrs").read_text(encoding="ascii").strip()
    except OSError:
        ignore = ""
    return kvm_record.KvmEntry(
        backend="+".join(loaded),
        ignore_msrs=ignore,
        in_msr_index_list=SPEC_CTRL in kvm.get_msr_index_list(),
        msr_filter=kvm.check_extension(uapi.KVM_CAP_X86_MSR_FILTER) > 0,
        user_space_msr=kvm.check_extension(uapi.KVM_CAP_X86_USER_SPACE_MSR) > 0,
    )


def _notes(entry: kvm_record.KvmEntry, host: Host, explained: Sequence[str]) -> list[str]:
    notes = []
    if entry.ignore_msrs == "Y":
        notes.append(
            "kvm.ignore_msrs=1: KVM answers for MSRs that it does not know (VIRT_SPEC_CTRL on VMX, say) as if they "
            "were there; refusals of IA32_SPEC_CTRL are not hidden by it"
        )
    if not entry.backend:
        notes.append("neither kvm_intel nor kvm_amd is loaded as a module: which backend answers cannot be seen")
    if not host.hardware.exists:
        notes.append("no host write is accepted, of 0 neither: RDMSR of 0x48 takes #GP on this host, by KVM's own test")
    if len(explained) > 1:
        notes.append(
            f"{', '.join(explained)} give the same answers to every case on this host: what they differ in needs "
            "other hardware (V_SPEC_CTRL, a register that keeps what is written)"
        )
    if not explained:
        notes.append("no model explains every case: the first divergence of each is a program to replay")
    return notes
