# SPDX-License-Identifier: MIT
"""From what a run saw to its record: predictions, verdicts and findings put together. Pure."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import UNSET

import probe
from probe import entries
from probe import record as rec
from probe.cpuid.compare import cpus_that_differ, group_equal
from probe.cpuid.dumps import Dump
from probe.cpuid.machine import MachineCpuid
from probe.cpuid.snapshot import Snapshot
from probe.host import Facts
from probe.masks import ALL_BITS, format_list, grouped, hex64
from probe.models.inference import Inference, infer
from probe.models.machines import MACHINES
from probe.models.prediction import Prediction
from probe.models.profile import profile_of
from probe.models.registry import MODELS
from probe.outcome import CpuResult, Observation, Outcome, Restored
from probe.trial import Plan
from probe.verdict import (
    Finding,
    Verdict,
    compare,
    findings_of_restore,
    findings_of_verdict,
    findings_of_walk,
    in_order,
    merge_cpus,
    named_bits,
)


@dataclass
class Seen:
    """All that a run saw. results are empty and written is False if it only planned; duration is in seconds.

    stopped says why the walk ended early, "" if it did not; new_vms are VMs that were started meanwhile.
    """

    facts: Facts
    cpuid: MachineCpuid
    plan: Plan
    written: bool
    results: list[CpuResult] = field(default_factory=list)
    proof: list[Restored] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: str = ""
    new_vms: tuple[tuple[int, str], ...] = ()
    taint_after: int | None = None
    modules_loaded: list[str] = field(default_factory=list)
    duration: float = 0.0


def predict_all(cpus: Mapping[int, Snapshot], dump: Dump | None = None) -> dict[int, list[Prediction]]:
    """Ask every model about every CPU; a dump replaces the CPUID, CPU by CPU or with its first CPU."""
    if dump is not None:
        first = dump.cpus[min(dump.cpus)]
        cpus = {cpu: dump.cpus.get(cpu, first) for cpu in cpus}
    found: dict[int, list[Prediction]] = {}
    for members, snapshot in group_equal(cpus):
        predictions = [model.predict(snapshot) for model in MODELS]
        found.update((cpu, predictions) for cpu in members)
    return dict(sorted(found.items()))


def assemble(
    seen: Seen,
    *,
    started: str,
    judge: str,
    cpuid_file: Dump | None,
    because: str,
    identity: str,
    arguments: Sequence[str],
) -> rec.Record:
    """Put a run's record together.

    started is RFC 3339 in UTC; judge names the model that findings come from; cpuid_file replaces the machine's CPUID
    for the predictions; because says why this place was chosen; arguments are the command line's, without paths.
    """
    plan, facts = seen.plan, seen.facts
    predictions = predict_all({cpu: seen.cpuid.cpus[cpu] for cpu in plan.cpus}, cpuid_file)
    verdicts = {
        result.cpu: {
            prediction.model: compare(prediction, result.observation, no_register=result.no_register)
            for prediction in predictions[result.cpu]
        }
        for result in seen.results
    }
    return rec.Record(
        schema_version=f"{rec.SCHEMA_MAJOR}.{rec.SCHEMA_MINOR}",
        tool=tool_entry(arguments),
        started=started,
        duration=round(seen.duration, 3),
        identity=identity,
        place=rec.Place(kind="metal", because=because),
        machine=machine_entry(facts, seen.cpuid),
        kernel=kernel_entry(facts, seen.taint_after, seen.modules_loaded),
        cpuid=rec.Cpuid(
            sources=list(seen.cpuid.sources),
            cross_check=seen.cpuid.cross_check,
            groups=entries.cpuid_groups(seen.cpuid.cpus),
        ),
        predicted_from=(
            UNSET
            if cpuid_file is None
            else rec.CpuidFile(form=cpuid_file.form, groups=entries.cpuid_groups(cpuid_file.cpus))
        ),
        judge=judge,
        predictions=entries.prediction_entries(predictions, {model.name: model.title for model in MODELS}),
        walk=_walk(plan) if seen.written else UNSET,
        saved=entries.saved_entries(seen.results),
        observations=entries.observation_entries(seen.results),
        verdicts=entries.verdict_entries(verdicts),
        findings=entries.finding_entries(_findings(seen, judge, verdicts, recorded=cpuid_file is not None)),
        hypervisor_rules=entries.rule_entries(_hypervisor_rules(seen)),
        restore=entries.restore_entries(seen.proof),
        notes=_notes(seen, cpuid_file),
    )


_RULES = {"GenuineIntel": ("kvm-vmx", "policy", "peer"), "AuthenticAMD": ("kvm-svm", "policy", "peer")}
_OTHERS_RULES = ("kvm-vmx", "kvm-svm", "policy", "peer")


def _hypervisor_rules(seen: Seen) -> dict[int, list[Inference]]:
    """Ask every rule about every CPU's walk, if there is a hypervisor; the other vendor's and oracles are left out."""
    found: dict[int, list[Inference]] = {}
    for result in seen.results:
        cpu = seen.cpuid.cpus.get(result.cpu)
        walked = Observation(fault=ALL_BITS) if result.no_register else result.observation
        if cpu is None or not cpu.under_hypervisor or not walked.accepted | walked.fault:
            continue
        guest, families = profile_of(cpu), _RULES.get(cpu.vendor_string, _OTHERS_RULES)
        found[result.cpu] = [infer(machine, guest, walked) for machine in MACHINES if machine.family in families]
    return found


def tool_entry(arguments: Sequence[str]) -> rec.Tool:
    """Say what makes the record."""
    return rec.Tool(
        version=probe.__version__, python=platform.python_version(), arguments=list(arguments), agent=probe.AGENT
    )


def machine_entry(facts: Facts, cpuid: MachineCpuid) -> rec.Machine:
    """Turn CPUID and the kernel's facts into the machine's entry."""
    cpu = cpuid.cpus[min(cpuid.cpus)]
    return rec.Machine(
        vendor=cpu.vendor if cpu.vendor != "unknown" else cpu.vendor_string or "unknown",
        family=cpu.family,
        model=cpu.model,
        stepping=cpu.stepping,
        signature=f"{cpu.signature:#x}",
        brand=cpu.brand,
        online=format_list(facts.online),
        hypervisor=cpu.hypervisor,
        under_hypervisor=cpu.under_hypervisor,
        smt=facts.smt,
        microcode=[rec.Microcode(cpus=cpus, revision=f"{revision:#x}") for cpus, revision in grouped(facts.microcode)],
        bios=rec.BiosEntry(
            vendor=facts.bios.vendor,
            version=facts.bios.version,
            date=facts.bios.date,
            product=facts.bios.product,
        ),
    )


def kernel_entry(facts: Facts, taint_after: int | None, modules_loaded: list[str]) -> rec.Kernel:
    """Turn what the kernel shows of itself into its entry."""
    return rec.Kernel(
        release=facts.kernel,
        version=facts.kernel_version,
        cmdline=list(facts.cmdline),
        mitigations=dict(facts.mitigations),
        lockdown=facts.lockdown,
        allow_writes=facts.allow_writes,
        taint_before=UNSET if facts.taint is None else facts.taint,
        taint_after=UNSET if taint_after is None else taint_after,
        modules_loaded=modules_loaded,
    )


def _walk(plan: Plan) -> rec.WalkEntry:
    return rec.WalkEntry(
        msr=f"{plan.index:#x}",
        cpus=format_list(plan.cpus),
        bits=format_list(plan.bits),
        base="zero" if plan.base_zero else "saved",
        readback="meaningful" if plan.readback else "meaningless",
        repeat=plan.repeat,
        clear_bits=plan.clear_bits,
        pairs=plan.pairs,
    )


def _notes(seen: Seen, cpuid_file: Dump | None) -> list[str]:
    notes = [*seen.notes, *seen.cpuid.notes]
    if cpuid_file is not None:
        notes.append("the predictions are made from a recorded CPUID, not from this machine's")
    if seen.facts.legacy_ibrs:
        notes.append(
            "the kernel uses legacy IBRS and rewrites the register on every entry: read-back means nothing, "
            "accepted is judged by the write alone"
        )
    if any(result.observation.refused for result in seen.results):
        notes.append(
            "the kernel refused writes (EPERM): it is locked down and securityfs does not tell, or msr.allow_writes "
            "was set to off meanwhile: cat /sys/kernel/security/lockdown /sys/module/msr/parameters/allow_writes"
        )
    if seen.facts.lockdown == "unknown":
        notes.append("securityfs does not tell whether the kernel is locked down")
    return notes


def _findings(
    seen: Seen, judge: str, verdicts: Mapping[int, Mapping[str, Verdict]], *, recorded: bool
) -> list[Finding]:
    cpuid = seen.cpuid
    found = [
        Finding(
            "cpuid_cross_check",
            str(cpu),
            0,
            f"the instruction and /dev/cpu/N/cpuid differ: {'; '.join(str(one) for one in differences[:4])}",
        )
        for cpu, differences in cpuid.differences.items()
    ]
    for result in seen.results:
        verdict = verdicts[result.cpu][judge]
        found += findings_of_verdict(
            [result.cpu],
            judge,
            verdict,
            result.observation,
            hypervisor=cpuid.cpus[min(cpuid.cpus)].under_hypervisor,
            recorded=recorded,
        )
        found += findings_of_walk(result, seen.plan.bits)
    found = merge_cpus([*found, *findings_of_restore(seen.proof)])
    found += [
        Finding("cpuid_differs", format_list(cpus), 0, text) for cpus, text in cpus_that_differ(group_equal(cpuid.cpus))
    ]
    if seen.stopped:
        found.append(
            Finding("walk_stopped", format_list(seen.plan.cpus), 0, f"the walk stopped at once: {seen.stopped}")
        )
    if seen.new_vms:
        who = ", ".join(f"{name} ({pid})" for pid, name in seen.new_vms)
        text = f"KVM guests were started during the run and may have been entered with the probe's value: {who}"
        found.append(Finding("vm_started", format_list(seen.plan.cpus), 0, text))
    return in_order([*found, *_cpus_differ(seen.results)])


def _cpus_differ(results: Sequence[CpuResult]) -> Iterator[Finding]:
    """Tell which CPUs did something else than the largest group, on the bits that both were measured on.

    A walk that was cut short on one CPU (offline, refused, stopped) makes no difference between CPUs.
    """
    groups: dict[tuple[Observation, int], list[int]] = {}
    for result in results:
        seen = result.observation
        measured = seen.accepted | seen.fault | (seen.absent if result.no_register else 0)
        if measured:
            groups.setdefault((seen, measured), []).append(result.cpu)
    ordered = sorted(groups.items(), key=lambda item: (-bin(item[0][1]).count("1"), -len(item[1])))
    for (other, measured), cpus in ordered[1:]:
        (most, measured_there), standard = ordered[0]
        both = measured & measured_there
        mask = 0
        for outcome in Outcome:
            mask |= (getattr(other, outcome.value) ^ getattr(most, outcome.value)) & both
        if mask:
            text = (
                f"{named_bits(mask)}: these CPUs do otherwise than CPUs {format_list(standard)}: "
                f"accepted {hex64(other.accepted & both)}, there {hex64(most.accepted & both)}"
            )
            yield Finding("cpus_differ", format_list(cpus), mask, text)
