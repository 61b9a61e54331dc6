# SPDX-License-Identifier: MIT
"""One study of this kernel's KVM: measure the matrix, hold every model against it, and put the record together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import UNSET

from kernel_harness.kvm import host as host_files
from kernel_harness.kvm import uapi
from kernel_harness.kvm.machine import Kvm, ticking
from kernel_harness.kvm.measure import measure, measure_host
from kernel_harness.kvm.policed import Judge, maker
from kernel_harness.kvm.runner import Cpuids, Make, run_program
from probe import kvm_record
from probe.assembly import kernel_entry, machine_entry, tool_entry
from probe.cpuid.machine import read_machine
from probe.errors import NotRestored, ProbeError
from probe.host import Host as HostFiles
from probe.journal import now
from probe.masks import hex64, parse_hex64
from probe.models.difference import MOST_STEPS, difference
from probe.models.machine import SPEC_CTRL, Host, Machine
from probe.models.machines import FAMILIES, MACHINES, get, standing_model
from probe.models.matrix import distinguishable, fit
from probe.models.policy import Policy, PolicyMachine
from probe.models.profile import ALL_FEATURES, FEATURES, NAMED, Profile, mask_of_features
from probe.models.program import Answer, Program, format_answer, written
from probe.models.versions import Release, release_of
from probe.record import Masks, hide_paths
from probe.run import Ears, Options, run

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
    driver: Path | None = None,
    policy: Policy | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> kvm_record.KvmRecord:
    """Measure and compare; profiles None means default_profiles(). programs random ones are tried on each model that
    explains the matrix. driver, the folder for its journal, also asks the msr driver of one CPU, when no VM is left.
    Guests obey the policy, if there is one; its model stands on the one that explains the kernel alone.

    Raise RequirementMissing if there is no KVM, GuestLost if a guest does something else than its steps.
    """
    started, clock = now(), time.monotonic()
    files = HostFiles()
    facts = files.facts()
    cpuid = read_machine(facts.online)
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, host_files.features(cpuid), ignore_msrs=host_files.ignore_msrs() == "Y")
        wanted = list(profiles) if profiles is not None else default_profiles(cpuids.mask())
        entry = kvm_entry(kvm)
    version = release_of(facts.kernel, facts.kernel_version)
    models: dict[str, Machine | PolicyMachine] = {machine.name: machine for machine in MACHINES}
    judge = None
    if policy is not None:
        judge = Judge(policy)
        # The model lives with a policy that raises, loops or answers nonsense as the VMM does.
        own = PolicyMachine(
            dataclasses.replace(policy, decide=Judge(policy)), kernel_model(host, entry.backend, version, jobs)
        )
        models = {own.name: own, **models}
    make = maker(judge, host)
    rows = measure(wanted, progress, jobs, judge=judge, host=host)
    with ticking():
        fits = kvm_record.in_order(fit(machine, host, rows) for machine in models.values())
    explained = kvm_record.explaining(fits)
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)

        def ask(program: Program) -> list[Answer]:
            return run_program(kvm, cpuids, program, make)

        entries = [kvm_record.fit_entry(models[one.model], one, host, ask) for one in fits]
        tried = [models[name] for name in explained if policy is None or name == own.name]
        explored = _explored(kvm, cpuids, tried, host, programs, seed, make)
    explained = [name for name in explained if not _contradicted(name, explored)]
    follows = follow(explained, entry.backend, version) if policy is None else ""
    notes = _notes(entry, host, explained, follows, version) if policy is None else _policy_notes(judge)
    asked = UNSET if driver is None or policy is not None else _ask_driver(min(facts.online), driver, say)
    if driver is not None and policy is not None:
        notes.append("the msr driver was not asked: what it says does not depend on a policy (kvm --write asks it)")
    return kvm_record.KvmRecord(
        kind="kvm",
        schema_version=f"{kvm_record.SCHEMA_MAJOR}.{kvm_record.SCHEMA_MINOR}",
        tool=tool_entry(arguments),
        started=started,
        duration=round(time.monotonic() - clock, 3),
        machine=machine_entry(facts, cpuid),
        kernel=kernel_entry(facts, files.taint(), []),
        kvm=entry,
        hardware=kvm_record.hardware_entry(host),
        rows=kvm_record.row_entries(rows),
        fits=entries,
        explained_by=explained,
        follows=follows,
        driver=asked,
        policy=UNSET if policy is None or judge is None else _policy_entry(policy, own.kernel.name, judge),
        explored=explored,
        notes=notes,
        identity=identity,
    )


def kernel_model(host: Host, backend: str, version: Release | None, jobs: int | None = None) -> Machine:
    """Return the model that explains this kernel alone, by the named profiles; raise ProbeError if none does."""
    rows = measure([named.profile for named in NAMED], lambda done, total: None, jobs)
    explained = kvm_record.explaining(fit(machine, host, rows) for machine in MACHINES)
    if not explained:
        raise ProbeError(
            "no model explains what this kernel does without a policy: a policy's model would stand on nothing",
            "spec-ctrl-probe kvm tells the nearest",
        )
    return get(follow(explained, backend, version) or explained[-1])


def _policy_notes(judge: Judge | None) -> list[str]:
    """Say what the policy did that is no decision."""
    assert judge is not None
    return [f"the policy {what}: {count} times; such a write took #GP" for what, count in judge.complaints.items()]


def _policy_entry(policy: Policy, over: str, judge: Judge) -> kvm_record.PolicyEntry:
    return kvm_record.PolicyEntry(
        name=policy.name, title=policy.title, source=policy.source, over=over, complaints=dict(judge.complaints)
    )


def _explored(
    kvm: Kvm,
    cpuids: Cpuids,
    left: Sequence[Machine | PolicyMachine],
    host: Host,
    programs: int,
    seed: int,
    make: Make,
) -> list[kvm_record.ExploredEntry]:
    """Run random programs against all models that explain the matrix at once; one that differs leaves the field."""
    from kernel_harness.kvm.explore import explore

    entries: list[kvm_record.ExploredEntry] = []
    while left and programs:
        done = explore(kvm, cpuids, left, host, most=programs, seconds=3600, seed_number=seed, make=make)
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
        left = [machine for machine in left if machine is not found.machine]
    return entries


def _contradicted(model: str, explored: Sequence[kvm_record.ExploredEntry]) -> bool:
    return any(entry.model == model and entry.divergence for entry in explored)


def kvm_entry(kvm: Kvm) -> kvm_record.KvmEntry:
    """Return what this KVM offers to userspace, and how its modules are set."""
    return kvm_record.KvmEntry(
        backend=host_files.backend(),
        ignore_msrs=host_files.ignore_msrs(),
        in_msr_index_list=SPEC_CTRL in kvm.get_msr_index_list(),
        msr_filter=kvm.check_extension(uapi.KVM_CAP_X86_MSR_FILTER) > 0,
        user_space_msr=kvm.check_extension(uapi.KVM_CAP_X86_USER_SPACE_MSR) > 0,
    )


def follow(explained: Sequence[str], backend: str, version: Release | None) -> str:
    """Return the model that stands for a kernel's version, if it explains it; "" else."""
    name = standing_model(backend, version)
    return name if name in explained else ""


def _ask_driver(cpu: int, state_dir: Path, say: Callable[[str], None]) -> kvm_record.DriverEntry:
    """Ask the msr driver; what goes wrong is told in the entry, so that nothing measured before is lost."""
    try:
        return ask_driver(cpu, state_dir, say)
    except ProbeError as error:
        none = hex64(0)
        text = f"{hide_paths(error.message)}; for its cure see: spec-ctrl-probe run --write"
        return kvm_record.DriverEntry(
            cpu=cpu, accepts=none, faults=none, unanswered=none, error=text, exit_code=int(error.exit_code)
        )


def ask_driver(cpu: int, state_dir: Path, say: Callable[[str], None]) -> kvm_record.DriverEntry:
    """Try every bit through one CPU's msr driver, with all that the agent does for safety.

    Raise RequirementMissing if the machine refuses, NotRestored if the register cannot be put back.
    """
    options = Options(write=True, cpus=(cpu,), state_dir=state_dir, because="asked for by kvm --write")
    done = run(options, Ears(say=say))
    lost = [entry for entry in done.restore if entry.state != "verified"]
    if lost:
        raise NotRestored(f"the register of CPU {cpu} was not shown to be back")
    seen = [parse_masks(entry.outcomes) for entry in done.observations]
    took = sum(one["retained"] | one["dropped"] | one["altered"] | one["unstable"] for one in seen)
    return kvm_record.DriverEntry(
        cpu=cpu,
        accepts=hex64(took),
        faults=hex64(sum(one["fault"] for one in seen)),
        unanswered=hex64(sum(one["refused"] | one["absent"] for one in seen)),
    )


def parse_masks(masks: Masks) -> dict[str, int]:
    """Return an observation's masks as numbers, by outcome."""
    return {name: parse_hex64(getattr(masks, name)) for name in masks.__struct_fields__}


def _notes(
    entry: kvm_record.KvmEntry, host: Host, explained: Sequence[str], follows: str, version: Release | None
) -> list[str]:
    notes = []
    if entry.ignore_msrs == "Y":
        notes.append(
            "kvm.ignore_msrs=1: KVM answers for MSRs that it does not know (VIRT_SPEC_CTRL on VMX, say) as if they "
            "were there; refusals of IA32_SPEC_CTRL are not hidden by it"
        )
    if not entry.backend:
        notes.append("neither kvm_intel nor kvm_amd is loaded as a module: which backend answers cannot be seen")
    elif entry.backend not in FAMILIES:
        notes.append(f"{entry.backend} answers, neither kvm_intel nor kvm_amd alone, of which the eras of KVM speak")
    if not entry.msr_filter:
        notes.append("this KVM has no MSR filter (Linux v5.10): no random program changes one")
    if not entry.user_space_msr:
        notes.append("this KVM brings no MSR access to userspace (KVM_CAP_X86_USER_SPACE_MSR, Linux v5.10)")
    if not host.hardware.exists:
        notes.append("no host write is accepted, of 0 neither: RDMSR of 0x48 takes #GP on this host, by KVM's own test")
    standing = standing_model(entry.backend, version)
    number = ".".join(str(part) for part in version or ())
    if standing and standing not in explained:
        notes.append(
            f"this kernel's version, {number}, is one of {standing}, which is refuted: see its first divergence"
        )
    elif not standing and entry.backend in FAMILIES:
        notes.append("no model stands for this kernel's version: a vendor's, or a branch with backports of its own")
    if len(explained) > 1:
        notes += _alike(explained, follows, host, version)
    if not explained:
        notes.append("no model explains every case: the first divergence of each is a program to replay")
    return notes


def _alike(explained: Sequence[str], follows: str, host: Host, version: Release | None) -> list[str]:
    """Say why several models explain this kernel, for which its version speaks, and what would tell them apart."""
    others = [name for name in explained if name != follows]
    number = ".".join(str(part) for part in version or ())
    head = (
        f"{follows} by this kernel's version, {number}: " if follows else "by its version this kernel is none of them: "
    )
    one = get(follows or explained[0])
    here = [("this host", host)]
    notes = []
    for name in others:
        if name == one.name:
            continue
        apart = difference(one, get(name))
        if difference(one, get(name), here) is None:
            why = f"no program of up to {MOST_STEPS} operations tells it from {one.name} on this host"
        else:
            why = f"no case of this matrix tells it from {one.name}"
        if apart is not None:
            last = [("nothing" if said[-1] is None else format_answer(said[-1])) for said in (apart.one, apart.other)]
            why += f"; on {apart.host}: {apart.program} -> {last[0]}, not {last[1]}"
        notes.append(f"{head}{name} explains it as well: {why}")
        head = ""
    return notes
