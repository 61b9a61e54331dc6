# SPDX-License-Identifier: MIT
"""Prediction and observation compared, as masks; and the findings that a reader must see first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from probe.masks import ALL_BITS, format_bits, format_list, hex64, mask_of
from probe.models.prediction import Prediction
from probe.outcome import CpuResult, Observation, Outcome, Restored
from probe.registers import SPEC_CTRL


@dataclass(frozen=True)
class Verdict:
    """Disjoint 64-bit masks; a bit in none of them was not measured, or its prediction is open.

    unexpected_fault: predicted to be accepted, took #GP (the KVM bug of July 2020). unexpected_accept: predicted to
    take #GP, did not. not_retained: accepted as predicted, but does not read back. as_predicted: the rest of what
    was measured. not_measured: refused, CPU gone, or not tried.
    """

    unexpected_fault: int = 0
    unexpected_accept: int = 0
    not_retained: int = 0
    as_predicted: int = 0
    not_measured: int = 0

    @property
    def findings(self) -> int:
        """Mask of the bits on which prediction and observation disagree."""
        return self.unexpected_fault | self.unexpected_accept | self.not_retained


def compare(prediction: Prediction, seen: Observation, *, no_register: bool = False) -> Verdict:
    """Compare one CPU's observation with a prediction.

    no_register says that the bits counted as absent are so because RDMSR took #GP, which the register's absence
    predicts; absent for any other reason (offline) measures nothing. An unstable read-back says nothing about
    retention, so it counts as accepted only.
    """
    fault = seen.fault | (seen.absent if no_register else 0)
    measured = fault | seen.accepted
    unexpected_fault = prediction.accepts & fault
    unexpected_accept = prediction.faults & seen.accepted
    not_retained = prediction.accepts & (seen.dropped | seen.altered) if prediction.reads_back else 0
    return Verdict(
        unexpected_fault=unexpected_fault,
        unexpected_accept=unexpected_accept,
        not_retained=not_retained,
        as_predicted=measured & ~(unexpected_fault | unexpected_accept | not_retained),
        not_measured=~measured & ALL_BITS,
    )


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    kind is a stable word (see KINDS); cpus a kernel CPU list; mask the 64-bit mask of the bits it is about, 0 if it
    is not about bits; text one or two sentences.
    """

    kind: str
    cpus: str
    mask: int
    text: str


# The order in which findings are told: what must be acted on first comes first.
KINDS = (
    "not_restored",
    "not_verified",
    "walk_stopped",
    "vm_started",
    "base_refused",
    "unexpected_fault",
    "unexpected_accept",
    "not_retained",
    "inconsistent",
    "not_clearable",
    "combination_refused",
    "combination_altered",
    "pair_refused",
    "changed_by_others",
    "incomplete",
    "cpus_differ",
    "cpuid_cross_check",
    "cpuid_differs",
)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings into the order of KINDS, then by CPU list."""
    return sorted(findings, key=lambda finding: (KINDS.index(finding.kind), finding.cpus, finding.mask))


def findings_of_verdict(
    cpus: Iterable[int], model: str, verdict: Verdict, seen: Observation, *, hypervisor: bool, recorded: bool
) -> list[Finding]:
    """Put the three ways to disagree into words, for CPUs that agree with each other."""
    found = []
    where = format_list(cpus)
    if verdict.unexpected_fault:
        absent = verdict.unexpected_fault & seen.absent
        what = "the register is enumerated but RDMSR takes #GP" if absent else "enumerated, but the write takes #GP"
        if recorded:
            what += "; the CPUID that was given enumerates these bits (KVM 5.6-5.8 refused STIBP to such a guest)"
        elif hypervisor:
            what += "; the hypervisor offers these bits in CPUID and refuses them (as KVM 5.6-5.8 did with STIBP)"
        found.append(
            Finding(
                "unexpected_fault", where, verdict.unexpected_fault, f"{named_bits(verdict.unexpected_fault)}: {what}"
            )
        )
    for mask, how in (
        (verdict.unexpected_accept & seen.dropped, _ignored(seen)),
        (verdict.unexpected_accept & seen.retained, "the register takes and keeps bits that CPUID does not enumerate"),
        (verdict.unexpected_accept & seen.altered, "the write does not fault, something else reads back, or nothing"),
        (
            verdict.unexpected_accept & seen.unstable,
            "the write does not fault; read-back is not steady, or means nothing",
        ),
    ):
        if mask:
            if hypervisor and how.startswith("the register"):
                how += " (a hypervisor that passes the register through lets them reach the hardware)"
            found.append(
                Finding("unexpected_accept", where, mask, f"{named_bits(mask)}: model {model} says #GP; {how}")
            )
    if verdict.not_retained:
        found.append(
            Finding(
                "not_retained",
                where,
                verdict.not_retained,
                f"{named_bits(verdict.not_retained)}: accepted, but not kept",
            )
        )
    return found


def findings_of_walk(result: CpuResult, planned: Iterable[int]) -> list[Finding]:
    """Tell what the walk itself found on one CPU, whatever any model says; planned are the bits to be tried."""
    found = []
    cpu = str(result.cpu)
    missing = mask_of(planned) & ~(result.observation.accepted | result.observation.fault)
    if result.base_refused:
        found.append(Finding("base_refused", cpu, missing, f"nothing was tried: {result.absent_because}"))
    elif missing and not result.no_register:
        because = result.absent_because or ("the kernel refused" if result.observation.refused else "the walk stopped")
        found.append(Finding("incomplete", cpu, missing, f"{named_bits(missing)}: no answer: {because}"))
    if result.moved:
        text = f"{named_bits(result.moved)}: something else changed them during the walk; the new value was kept"
        found.append(Finding("changed_by_others", cpu, result.moved, text))
    if result.inconsistent:
        text = f"{named_bits(result.inconsistent)}: took #GP in one walk and was accepted in another; counted as fault"
        found.append(Finding("inconsistent", cpu, result.inconsistent, text))
    combined = result.combined
    if combined is not None:
        if combined.outcome is Outcome.FAULT:
            text = f"all accepted bits together ({hex64(combined.value)}) take #GP, though each alone is accepted"
            found.append(Finding("combination_refused", cpu, combined.value, text))
        elif (
            combined.got is not None and combined.got != combined.expected and combined.outcome is not Outcome.UNSTABLE
        ):
            text = (
                f"all accepted bits together ({hex64(combined.value)}) read back as {hex64(combined.got)}, "
                f"wanted {hex64(combined.expected)}"
            )
            found.append(Finding("combination_altered", cpu, combined.got ^ combined.expected, text))
    found += [
        Finding("pair_refused", cpu, pair, f"bits {format_bits(pair)} are accepted alone and take #GP together")
        for pair in result.bad_pairs
    ]
    stuck = result.cleared.tried & ~(result.cleared.retained | result.cleared.unstable | result.cleared.absent)
    if stuck:
        found.append(Finding("not_clearable", cpu, stuck, f"{named_bits(stuck)}: set at first, and cannot be cleared"))
    return found


def findings_of_restore(proof: Iterable[Restored]) -> list[Finding]:
    """Tell which registers could not be put back, and which could not be shown to be back."""
    return [
        Finding(
            "not_verified",
            str(item.cpu),
            item.saved ^ item.reads if item.reads is not None else 0,
            f"the register held {hex64(item.saved)}"
            + (f" and reads {hex64(item.reads)}" if item.reads is not None else "")
            + f": {item.note}",
        )
        for item in proof
        if item.state == Restored.LEFT
    ] + [
        Finding(
            "not_restored",
            str(item.cpu),
            item.saved ^ item.reads if item.reads is not None else 0,
            f"the register held {hex64(item.saved)} and now reads "
            f"{hex64(item.reads) if item.reads is not None else item.note}",
        )
        for item in proof
        if item.failed
    ]


def merge_cpus(findings: Iterable[Finding]) -> list[Finding]:
    """Join findings that say the same of several CPUs into one."""
    cpus: dict[tuple[str, int, str], list[str]] = {}
    for finding in findings:
        cpus.setdefault((finding.kind, finding.mask, finding.text), []).append(finding.cpus)
    merged = []
    for (kind, mask, text), members in cpus.items():
        numbers = [int(cpu) for cpu in members if cpu.isdigit()]
        merged.append(Finding(kind, format_list(numbers) if len(numbers) == len(members) else members[0], mask, text))
    return merged


def _ignored(seen: Observation) -> str:
    if seen.dropped == ALL_BITS:
        return "no write faults and nothing is kept: whatever answers here ignores the register (QEMU TCG does)"
    return "the write does not fault and the bits read 0: it is ignored"


def named_bits(mask: int) -> str:
    """Write bits with their names: bit 1 (STIBP)."""
    return f"{'bit' if mask & (mask - 1) == 0 else 'bits'} {SPEC_CTRL.describe(mask)}"
