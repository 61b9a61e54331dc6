# SPDX-License-Identifier: MIT
"""The record of one run and its JSON Schema. Pure; probe/store.py takes it to disk and back.

A record is made to be attached to a public mail: no host name, user, path, address or serial number, and of the
kernel's command line only what bears on the result. Masks are strings of 0x and 16 digits. CPUs that agree share one
entry. A minor version only adds optional fields; what is missing is missing: there are no nulls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from probe.cpuid.compare import group_equal
from probe.cpuid.dumps import Dump
from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.errors import RecordError
from probe.masks import format_list, hex64, parse_hex64, parse_list
from probe.models.prediction import Prediction
from probe.outcome import Combined, CpuResult, Observation, Outcome, Restored
from probe.verdict import Finding, Verdict

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 0
SCHEMA_ID = f"urn:spec-ctrl-probe:record:{SCHEMA_MAJOR}"

Mask = Annotated[str, Meta(pattern=r"^0x[0-9a-f]{16}$")]
Mask32 = Annotated[str, Meta(pattern=r"^0x[0-9a-f]{1,8}$")]
CpuList = Annotated[str, Meta(pattern=r"^([0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)?$")]
LeafName = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}\.[0-9a-f]{1,8}$")]
FourRegisters = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}( [0-9a-f]{8}){3}$")]
ColumnName = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}\.[0-9a-f]{1,8}\.e[abcd]x$")]
OutcomeName = Literal["retained", "dropped", "altered", "fault", "refused", "unstable", "absent"]


class _Entry(Struct, kw_only=True, omit_defaults=True):
    """Base of everything in a record: fields by name, defaults left out."""


class Tool(_Entry):
    """What made the record; arguments are those of the command line, without paths."""

    version: str
    python: str
    arguments: list[str]
    name: str = "spec-ctrl-probe"


class Guest(_Entry):
    """The virtual machine that the probe booted to have an msr driver."""

    kernel: str
    kernel_version: str
    kernel_sha256: str
    accelerator: str
    because: str
    qemu: str
    register_model: str = ""


class Place(_Entry):
    """Where the writes were tried: this machine's own msr driver, or that of a guest booted for it."""

    kind: Literal["metal", "guest"]
    because: str
    guest: Union[Guest, UnsetType] = UNSET


class Microcode(_Entry):
    """CPUs with one microcode revision."""

    cpus: CpuList
    revision: Mask32


class BiosEntry(Struct, kw_only=True, omit_defaults=True, frozen=True):
    """What the firmware calls itself."""

    vendor: str = ""
    version: str = ""
    date: str = ""
    product: str = ""


class Machine(_Entry):
    """The CPU as leaf 1 and the kernel identify it. brand is for people, nothing is decided by it."""

    vendor: str
    family: int
    model: int
    stepping: int
    signature: Mask32
    online: CpuList
    hypervisor: str = ""
    under_hypervisor: bool = False
    brand: str = ""
    smt: str = ""
    microcode: list[Microcode] = []
    bios: BiosEntry = BiosEntry()


class Kernel(_Entry):
    """The running kernel, its mitigations, and what the run did to it (taint is the kernel's bit mask)."""

    release: str
    version: str
    lockdown: str
    mitigations: dict[str, str]
    cmdline: list[str] = []
    allow_writes: str = ""
    taint_before: Union[int, UnsetType] = UNSET
    taint_after: Union[int, UnsetType] = UNSET
    modules_loaded: list[str] = []


class Varying(_Entry):
    """Registers that differ between the CPUs of a group in the same way (APIC IDs).

    xor holds one hexadecimal number per CPU of the group, in order, to be XORed into the group's leaves.
    """

    registers: list[ColumnName]
    xor: Annotated[str, Meta(pattern=r"^[0-9a-f]+( [0-9a-f]+)*$")]


class CpuidGroup(_Entry):
    """All leaves of the CPUs that report the same. Leaf "00000007.2" is leaf 7, subleaf 2: EAX EBX ECX EDX."""

    cpus: CpuList
    leaves: dict[LeafName, FourRegisters]
    varying: list[Varying] = []


class Cpuid(_Entry):
    """The CPUID of this machine. cross_check says whether two ways of reading it gave the same."""

    sources: list[str]
    cross_check: str
    groups: list[CpuidGroup]


class CpuidFile(_Entry):
    """A recorded CPUID from which the predictions were made instead of from this machine's."""

    form: str
    groups: list[CpuidGroup]


class ReasonEntry(_Entry):
    """Why some bits have one predicted effect, and who says so."""

    mask: Mask
    effect: Literal["accepts", "faults", "either"]
    because: str
    source: str


class PredictionEntry(_Entry):
    """What one model says for CPUs on which it says the same. title says in one line what the model is."""

    model: str
    title: str
    cpus: CpuList
    exists: bool
    accepts: Mask
    faults: Mask
    either: Mask
    reasons: list[ReasonEntry]


class WalkEntry(_Entry):
    """What was tried. readback is meaningless where the kernel rewrites the register on every entry."""

    msr: Mask32
    cpus: CpuList
    bits: CpuList
    base: Literal["saved", "zero"]
    readback: Literal["meaningful", "meaningless"]
    repeat: int = 1
    clear_bits: bool = False
    pairs: bool = False


class Saved(_Entry):
    """The value that the register held before the first write."""

    cpus: CpuList
    value: Mask


class Masks(_Entry):
    """Disjoint masks, one per outcome; an outcome that no bit had is left out."""

    retained: Mask = hex64(0)
    dropped: Mask = hex64(0)
    altered: Mask = hex64(0)
    fault: Mask = hex64(0)
    refused: Mask = hex64(0)
    unstable: Mask = hex64(0)
    absent: Mask = hex64(0)


class CombinedEntry(_Entry):
    """One write of all accepted bits together. got is left out if the write took #GP."""

    value: Mask
    expected: Mask
    outcome: OutcomeName
    got: Union[Mask, UnsetType] = UNSET


class ObservationEntry(_Entry):
    """What the CPUs named did, all alike."""

    cpus: CpuList
    outcomes: Masks
    cleared: Union[Masks, UnsetType] = UNSET
    combined: Union[CombinedEntry, UnsetType] = UNSET
    pairs_tried: int = 0
    bad_pairs: list[Mask] = []
    absent_because: str = ""
    pinned: bool = True


class VerdictEntry(_Entry):
    """Prediction and observation compared, for CPUs with the same result."""

    model: str
    cpus: CpuList
    unexpected_fault: Mask = hex64(0)
    unexpected_accept: Mask = hex64(0)
    not_retained: Mask = hex64(0)
    as_predicted: Mask = hex64(0)
    not_measured: Mask = hex64(0)


class FindingEntry(_Entry):
    """One thing that is not as it should be; see verdict.KINDS for the words of kind."""

    kind: str
    cpus: CpuList
    text: str
    mask: Mask = hex64(0)


class RestoreEntry(_Entry):
    """Proof that registers were put back. reads is left out where the register could not be read."""

    cpus: CpuList
    saved: Mask
    verified: bool
    reads: Union[Mask, UnsetType] = UNSET
    note: str = ""


class Record(_Entry):
    """One run. started is RFC 3339 in UTC, duration in seconds; judge names the model that findings come from."""

    schema_version: Annotated[str, Meta(pattern=r"^[0-9]+\.[0-9]+$")]
    tool: Tool
    started: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    duration: float
    place: Place
    machine: Machine
    kernel: Kernel
    cpuid: Cpuid
    judge: str
    predictions: list[PredictionEntry]
    findings: list[FindingEntry]
    predicted_from: Union[CpuidFile, UnsetType] = UNSET
    walk: Union[WalkEntry, UnsetType] = UNSET
    saved: list[Saved] = []
    observations: list[ObservationEntry] = []
    verdicts: list[VerdictEntry] = []
    restore: list[RestoreEntry] = []
    notes: list[str] = []
    identity: str = ""


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
        members = _cpu_list(group.cpus)
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


def _cpu_list(text: str) -> tuple[int, ...]:
    try:
        return parse_list(text)
    except ValueError as error:
        raise RecordError(f"the record has a CPU list that is none: {error}") from error


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


def observation_of(masks: Masks) -> Observation:
    """Read an entry's masks back; raise RecordError if two outcomes claim one bit."""
    values = {outcome.value: parse_hex64(getattr(masks, outcome.value)) for outcome in Outcome}
    seen = 0
    for name, value in values.items():
        if seen & value:
            raise RecordError(f"the record is damaged: bits {hex64(seen & value)} are {name} and something else too")
        seen |= value
    return Observation(**values)


def _combined(combined: Combined | None) -> Union[CombinedEntry, UnsetType]:
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
                pinned=result.pinned,
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
                verified=item.verified,
                reads=UNSET if item.reads is None else hex64(item.reads),
                note=item.note,
            ),
        )
        for item in proof
    )


# --- the file ------------------------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """Return the record as JSON, two spaces deep, with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


class _Head(Struct):
    schema_version: str


def decode(raw: bytes, name: str) -> Record:
    """Read a record; name is what an error calls it.

    A newer minor version is read (its new fields are passed over). Raise RecordError for anything else: another
    major version, a missing field, a mask of 65 bits, text that is not JSON.
    """
    try:
        head = msgspec.json.decode(raw, type=_Head)
        major, _, minor = head.schema_version.partition(".")
        if not (major.isdigit() and minor.isdigit()):
            raise RecordError(f"{name} is no record: schema_version {head.schema_version!r} is not major.minor")
        if int(major) != SCHEMA_MAJOR:
            raise RecordError(
                f"{name} is a record of version {head.schema_version}; this tool reads {SCHEMA_MAJOR}.x",
                "read it with the spec-ctrl-probe that wrote it, or a newer one",
            )
        record = msgspec.json.decode(raw, type=Record)
    except msgspec.ValidationError as error:
        raise RecordError(
            f"{name} is no valid record: {error}", "spec-ctrl-probe schema prints what is valid"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{name} cannot be read: {error}", "it is cut or was never a JSON file") from error
    for entry in record.observations:
        observation_of(entry.outcomes)
    return record


_PLAIN_HYPERVISORS = {
    "TCGTCGTCGTCG": "tcg",
    "KVMKVMKVM": "kvm",
    "Microsoft Hv": "hyperv",
    "VMwareVMware": "vmware",
    "XenVMMXenVMM": "xen",
    "bhyve bhyve": "bhyve",
    "ACRNACRNACRN": "acrn",
}


def default_path(record: Record) -> Path:
    """Return results/<machine>/<time>-<kernel>.json; the machine is CPU signature, microcode and hypervisor."""
    machine = record.machine
    hypervisor = "metal"
    if machine.under_hypervisor:
        hypervisor = _PLAIN_HYPERVISORS.get(machine.hypervisor, _file_word(machine.hypervisor) or "hypervisor")
    microcode = machine.microcode[0].revision if machine.microcode else "unknown"
    folder = f"{_file_word(machine.vendor)}-{machine.signature[2:]:0>8}-ucode-{microcode}-{hypervisor}"
    time = record.started.replace(":", "")
    return Path("results") / folder / f"{time}-{_file_word(record.kernel.release)}.json"


def _file_word(text: str) -> str:
    return "".join(char if char.isascii() and (char.isalnum() or char in "._+-") else "-" for char in text).strip("-.")


def schema() -> dict[str, Any]:
    """Return the record's JSON Schema 2020-12.

    It allows no additional properties: it says what this version writes. Reading is more lenient, see decode().
    """
    document = msgspec.json.schema(Record)
    for definition in document["$defs"].values():
        if definition.get("type") == "object" and "properties" in definition:
            definition["additionalProperties"] = False
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{SCHEMA_ID}.{SCHEMA_MINOR}",
        **document,
    }
