# SPDX-License-Identifier: MIT
"""From what a run saw to the entries of its record, and the CPUID of a record back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from probe.cpuid.compare import group_equal
from probe.cpuid.dumps import Dump
from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.errors import RecordError
from probe.masks import format_list, hex64
from probe.models.inference import Inference
from probe.models.prediction import Prediction
from probe.outcome import Combined, CpuResult, Observation, Outcome, Restored
from probe.record import (
    CombinedEntry,
    CpuidGroup,
    FindingEntry,
    Masks,
    ObservationEntry,
    PredictionEntry,
    ReasonEntry,
    RestoreEntry,
    RuleEntry,
    Saved,
    Varying,
    VerdictEntry,
    cpus_of,
    decode,
)
from probe.verdict import Finding, Verdict

# --- CPUID ---------------------------------------------------------------------------------------------------------


def cpuid_groups(cpus: Mapping[int, Snapshot]) -> list[CpuidGroup]:
    """Fold the CPUID of many CPUs into groups; cpuid_of_groups() gives back exactly what went in."""
    groups = []
    for members, first in group_equal(cpus):
        columns: dict[str, list[str]] = {}
        for leaf, base in first.leaves.items():
            others = [cpus[cpu].leaves[leaf] for cpu in members]
            if all(other == base for other in others):
                continue
            for position, name in enumerate(Registers._fields):
                xor = " ".join(f"{other[position] ^ base[position]:x}" for other in others)
                if xor.strip("0 "):
                    columns.setdefault(xor, []).append(f"{leaf}.{name}")
        groups.append(
            CpuidGroup(
                cpus=format_list(members),
                leaves={str(leaf): " ".join(f"{value:08x}" for value in base) for leaf, base in first.leaves.items()},
                varying=[Varying(registers=names, xor=xor) for xor, names in columns.items()],
            )
        )
    return groups


def cpuid_of_groups(groups: Iterable[CpuidGroup]) -> dict[int, Snapshot]:
    """Unfold what cpuid_groups() made; raise RecordError if the columns do not fit the CPUs."""
    found: dict[int, Snapshot] = {}
    for group in groups:
        members = cpus_of(group.cpus)
        base = {
            _leaf(name): Registers(*(int(word, 16) for word in text.split())) for name, text in group.leaves.items()
        }
        leaves = [dict(base) for _ in members] if group.varying else []
        for column in group.varying:
            values = [int(word, 16) for word in column.xor.split()]
            if len(values) != len(members) or max(values) >> 32:
                raise RecordError(
                    f"the record's CPUID of CPUs {group.cpus} is damaged: {column.registers[:1]} does not fit"
                )
            for name in column.registers:
                leaf_name, _, register = name.rpartition(".")
                leaf = _leaf(leaf_name)
                if leaf not in base:
                    raise RecordError(f"the record's CPUID of CPUs {group.cpus} is damaged: no leaf {leaf_name}")
                for mine, value in zip(leaves, values):
                    old = mine[leaf]
                    mine[leaf] = old._replace(**{register: getattr(old, register) ^ value})
        for position, cpu in enumerate(members):
            found[cpu] = Snapshot(leaves[position] if leaves else base)
    return dict(sorted(found.items()))


def dump_of_record(raw: bytes, name: str) -> Dump:
    """Read a record as a CPUID dump: that of the machine it is about."""
    record = decode(raw, name)
    return Dump(f"a record of {record.tool.name}, {record.started}", cpuid_of_groups(record.cpuid.groups))


def _leaf(name: str) -> Leaf:
    leaf, _, subleaf = name.partition(".")
    return Leaf(int(leaf, 16), int(subleaf, 16))


# --- from results to entries ---------------------------------------------------------------------------------------


def _fold(entries: Iterable[tuple[int, Any]]) -> list[Any]:
    """Join entries that are equal but for their CPU into one with a CPU list. Entries come with cpus=""."""
    members: dict[bytes, list[int]] = {}
    first: dict[bytes, Any] = {}
    for cpu, entry in entries:
        key = msgspec.json.encode(entry)
        members.setdefault(key, []).append(cpu)
        first[key] = entry
    for key, entry in first.items():
        entry.cpus = format_list(members[key])
    return list(first.values())


def _masks(seen: Observation) -> Masks:
    return Masks(**{outcome.value: hex64(getattr(seen, outcome.value)) for outcome in Outcome})


def _combined(combined: Combined | None) -> CombinedEntry | UnsetType:
    if combined is None:
        return UNSET
    return CombinedEntry(
        value=hex64(combined.value),
        expected=hex64(combined.expected),
        outcome=combined.outcome.value,
        got=UNSET if combined.got is None else hex64(combined.got),
    )


def observation_entries(results: Iterable[CpuResult]) -> list[ObservationEntry]:
    """Group the walk's results."""
    return _fold(
        (
            result.cpu,
            ObservationEntry(
                cpus="",
                outcomes=_masks(result.observation),
                cleared=_masks(result.cleared) if result.cleared.tried else UNSET,
                combined=_combined(result.combined),
                pairs_tried=result.pairs_tried,
                bad_pairs=[hex64(pair) for pair in result.bad_pairs],
                absent_because=result.absent_because,
                inconsistent=hex64(result.inconsistent),
            ),
        )
        for result in results
    )


def saved_entries(results: Iterable[CpuResult]) -> list[Saved]:
    """Group the values that the registers held at first."""
    return _fold(
        (result.cpu, Saved(cpus="", value=hex64(result.saved))) for result in results if result.saved is not None
    )


def prediction_entries(
    predictions: Mapping[int, Sequence[Prediction]], titles: Mapping[str, str]
) -> list[PredictionEntry]:
    """Group the predictions of every CPU (one per model); titles maps a model's name to its title."""
    return _fold(
        (
            cpu,
            PredictionEntry(
                model=prediction.model,
                title=titles[prediction.model],
                cpus="",
                exists=prediction.exists,
                accepts=hex64(prediction.accepts),
                faults=hex64(prediction.faults),
                either=hex64(prediction.either),
                reasons=[
                    ReasonEntry(
                        mask=hex64(reason.mask),
                        effect=reason.effect.value,
                        because=reason.because,
                        source=reason.source,
                    )
                    for reason in prediction.reasons
                ],
            ),
        )
        for cpu, of_cpu in predictions.items()
        for prediction in of_cpu
    )


def verdict_entries(verdicts: Mapping[int, Mapping[str, Verdict]]) -> list[VerdictEntry]:
    """Group the verdicts of every CPU (one per model)."""
    return _fold(
        (
            cpu,
            VerdictEntry(
                model=model,
                cpus="",
                unexpected_fault=hex64(verdict.unexpected_fault),
                unexpected_accept=hex64(verdict.unexpected_accept),
                not_retained=hex64(verdict.not_retained),
                as_predicted=hex64(verdict.as_predicted),
                not_measured=hex64(verdict.not_measured),
            ),
        )
        for cpu, of_cpu in verdicts.items()
        for model, verdict in of_cpu.items()
    )


def rule_entries(rules: Mapping[int, Sequence[Inference]]) -> list[RuleEntry]:
    """Group what the hypervisors' rules have to do with every CPU's walk."""
    return _fold(
        (cpu, RuleEntry(model=one.model, cpus="", says=one.says, against=hex64(one.against)))
        for cpu, of_cpu in rules.items()
        for one in of_cpu
    )


def finding_entries(findings: Iterable[Finding]) -> list[FindingEntry]:
    """Turn findings into entries, in their order."""
    return [
        FindingEntry(kind=finding.kind, cpus=finding.cpus, mask=hex64(finding.mask), text=finding.text)
        for finding in findings
    ]


def restore_entries(proof: Iterable[Restored]) -> list[RestoreEntry]:
    """Group the proofs of restore."""
    return _fold(
        (
            item.cpu,
            RestoreEntry(
                cpus="",
                saved=hex64(item.saved),
                state=item.state,
                reads=UNSET if item.reads is None else hex64(item.reads),
                note=item.note,
            ),
        )
        for item in proof
    )
