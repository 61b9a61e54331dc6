# SPDX-License-Identifier: MIT
"""The record of one run and its JSON Schema. Pure; probe/entries.py fills it, probe/store.py takes it to disk and back.

A record is made to be attached to a public mail: no host name, user, path, address or serial number, and of the
kernel's command line only what bears on the result. Masks are strings of 0x and 16 digits. CPUs that agree share one
entry. A minor version only adds optional fields; what is missing is missing: there are no nulls.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, Union

import msgspec.structs
from msgspec import UNSET, Meta, Struct, UnsetType

from probe.errors import RecordError
from probe.masks import hex64, parse_hex64, parse_list
from probe.outcome import Observation, Outcome

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 2
SCHEMA_ID = f"urn:spec-ctrl-probe:record:{SCHEMA_MAJOR}"

_END = r"$(?!\n)"  # Python's $ also matches before a line feed at the end; that of JSON Schema (ECMA-262) does not
Mask = Annotated[str, Meta(pattern=rf"^0x[0-9a-f]{{16}}{_END}")]
Mask32 = Annotated[str, Meta(pattern=rf"^0x[0-9a-f]{{1,8}}{_END}")]
CpuList = Annotated[str, Meta(pattern=rf"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*{_END}")]
LeafName = Annotated[str, Meta(pattern=rf"^[0-9a-f]{{8}}\.[0-9a-f]{{1,8}}{_END}")]
FourRegisters = Annotated[str, Meta(pattern=rf"^[0-9a-f]{{8}}( [0-9a-f]{{8}}){{3}}{_END}")]
ColumnName = Annotated[str, Meta(pattern=rf"^[0-9a-f]{{8}}\.[0-9a-f]{{1,8}}\.e[abcd]x{_END}")]
Version = Annotated[str, Meta(pattern=rf"^[0-9]{{1,9}}\.[0-9]{{1,9}}{_END}")]
Time = Annotated[
    str,
    Meta(
        pattern=rf"^[1-9][0-9]{{3}}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3])(:[0-5][0-9]){{2}}Z{_END}"
    ),
]
Seconds = Annotated[float, Meta(ge=0)]
OutcomeName = Literal["retained", "dropped", "altered", "fault", "refused", "unstable", "absent"]


_A_PATH = re.compile(r"(?<![\w.])/(?!dev/kvm\b)[^\s:,;'\"()]+")


def hide_paths(text: str) -> str:
    """Return a foreign program's words as they may stand in a record: every path but /dev/kvm becomes PATH."""
    return _A_PATH.sub("PATH", text)


class Entry(Struct, kw_only=True, omit_defaults=True):
    """Base of everything in a record: fields by name, defaults left out."""


class Tool(Entry):
    """What made the record; arguments are those of the command line, without paths.

    agent is the SHA-256 of the one file that the agent ran from, "" for an installed one.
    """

    version: str
    python: str
    arguments: list[str]
    name: str = "spec-ctrl-probe"
    agent: str = ""


class Guest(Entry):
    """The virtual machine that the probe booted to have an msr driver."""

    kernel: str
    kernel_version: str
    kernel_sha256: str
    accelerator: str
    because: str
    qemu: str
    register_model: str = ""


class Place(Entry):
    """Where the writes were tried: this machine's own msr driver, or that of a guest booted for it."""

    kind: Literal["metal", "guest"]
    because: str
    guest: Union[Guest, UnsetType] = UNSET


class Microcode(Entry):
    """CPUs with one microcode revision."""

    cpus: CpuList
    revision: Mask32


class BiosEntry(Struct, kw_only=True, omit_defaults=True, frozen=True):
    """What the firmware calls itself."""

    vendor: str = ""
    version: str = ""
    date: str = ""
    product: str = ""


class Machine(Entry):
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


class Kernel(Entry):
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


class Varying(Entry):
    """Registers that differ between the CPUs of a group in the same way (APIC IDs).

    xor holds one hexadecimal number per CPU of the group, in order, to be XORed into the group's leaves.
    """

    registers: list[ColumnName]
    xor: Annotated[str, Meta(pattern=rf"^[0-9a-f]+( [0-9a-f]+)*{_END}")]


class CpuidGroup(Entry):
    """All leaves of the CPUs that report the same. Leaf "00000007.2" is leaf 7, subleaf 2: EAX EBX ECX EDX."""

    cpus: CpuList
    leaves: dict[LeafName, FourRegisters]
    varying: list[Varying] = []


class Cpuid(Entry):
    """The CPUID of this machine. cross_check says whether two ways of reading it gave the same."""

    sources: list[str]
    cross_check: str
    groups: list[CpuidGroup]


class CpuidFile(Entry):
    """A recorded CPUID from which the predictions were made instead of from this machine's."""

    form: str
    groups: list[CpuidGroup]


class ReasonEntry(Entry):
    """Why some bits have one predicted effect, and who says so."""

    mask: Mask
    effect: Literal["accepts", "faults", "either"]
    because: str
    source: str


class PredictionEntry(Entry):
    """What one model says for CPUs on which it says the same. title says in one line what the model is."""

    model: str
    title: str
    cpus: CpuList
    exists: bool
    accepts: Mask
    faults: Mask
    either: Mask
    reasons: list[ReasonEntry]


class WalkEntry(Entry):
    """What was tried. readback is meaningless where the kernel rewrites the register on every entry."""

    msr: Mask32
    cpus: CpuList
    bits: CpuList
    base: Literal["saved", "zero"]
    readback: Literal["meaningful", "meaningless"]
    repeat: int = 1
    clear_bits: bool = False
    pairs: bool = False


class Saved(Entry):
    """The value that the register held before the first write."""

    cpus: CpuList
    value: Mask


class Masks(Entry):
    """Disjoint masks, one per outcome; an outcome that no bit had is left out."""

    retained: Mask = hex64(0)
    dropped: Mask = hex64(0)
    altered: Mask = hex64(0)
    fault: Mask = hex64(0)
    refused: Mask = hex64(0)
    unstable: Mask = hex64(0)
    absent: Mask = hex64(0)


class CombinedEntry(Entry):
    """One write of all accepted bits together. got is left out if the write took #GP."""

    value: Mask
    expected: Mask
    outcome: OutcomeName
    got: Union[Mask, UnsetType] = UNSET


class ObservationEntry(Entry):
    """What the CPUs named did, all alike."""

    cpus: CpuList
    outcomes: Masks
    cleared: Union[Masks, UnsetType] = UNSET
    combined: Union[CombinedEntry, UnsetType] = UNSET
    pairs_tried: int = 0
    bad_pairs: list[Mask] = []
    absent_because: str = ""
    inconsistent: Mask = hex64(0)


class VerdictEntry(Entry):
    """Prediction and observation compared, for CPUs with the same result."""

    model: str
    cpus: CpuList
    unexpected_fault: Mask = hex64(0)
    unexpected_accept: Mask = hex64(0)
    not_retained: Mask = hex64(0)
    as_predicted: Mask = hex64(0)
    not_measured: Mask = hex64(0)


class RuleEntry(Entry):
    """How a hypervisor's rule stands to what a guest saw: fits, possible, or refuted by the bits of against."""

    model: str
    cpus: CpuList
    says: Literal["fits", "possible", "refuted"]
    against: Mask = hex64(0)


class FindingEntry(Entry):
    """One thing that is not as it should be; see verdict.KINDS for the words of kind."""

    kind: str
    cpus: CpuList
    text: str
    mask: Mask = hex64(0)


class RestoreEntry(Entry):
    """Proof that registers were put back. reads is left out where the register could not be read."""

    cpus: CpuList
    saved: Mask
    state: Literal["verified", "left", "failed"]
    reads: Union[Mask, UnsetType] = UNSET
    note: str = ""


class Record(Entry):
    """One run. started is RFC 3339 in UTC, duration in seconds; judge names the model that findings come from.

    hypervisor_rules is there for a walk under a hypervisor (since version 1.1).
    """

    schema_version: Version
    tool: Tool
    started: Time
    duration: Seconds
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
    hypervisor_rules: list[RuleEntry] = []
    restore: list[RestoreEntry] = []
    notes: list[str] = []
    identity: str = ""


# --- the file ------------------------------------------------------------------------------------------------------


def cpus_of(text: str) -> tuple[int, ...]:
    """Read an entry's CPU list; raise RecordError for a range that is none."""
    try:
        return parse_list(text)
    except ValueError as error:
        raise RecordError(f"the record has a CPU list that is none: {error}") from error


def observation_of(masks: Masks) -> Observation:
    """Read an entry's masks back; raise RecordError if two outcomes claim one bit."""
    values = {outcome.value: parse_hex64(getattr(masks, outcome.value)) for outcome in Outcome}
    seen = 0
    for name, value in values.items():
        if seen & value:
            raise RecordError(f"the record is damaged: bits {hex64(seen & value)} are {name} and something else too")
        seen |= value
    return Observation(**values)


def encode(record: Record) -> bytes:
    """Return the record as JSON, two spaces deep, with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


_VALID = "spec-ctrl-probe schema prints what is valid"


class _Head(Struct):
    schema_version: str


class _Kind(Struct):
    kind: str = ""
    schema_version: str = ""


def record_kind(raw: bytes) -> tuple[str, str]:
    """Return the kind of a record ("" for one of a run, and for what is none) and its version, whatever that is."""
    try:
        head = msgspec.json.decode(raw, type=_Kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "", ""
    return head.kind, head.schema_version


def decode(raw: bytes, name: str) -> Record:
    """Read a record; name is what an error calls it.

    A newer minor version is read (its new fields are passed over). Raise RecordError for anything else: another
    major version, a missing field, a mask of 65 bits, text that is not JSON.
    """
    kind, _ = record_kind(raw)
    if kind:
        raise RecordError(
            f"{name} is a record of another kind, {kind[:20]!r}, which holds no register's walk and no whole CPUID",
            "give a record of run",
        )
    try:
        head = msgspec.json.decode(raw, type=_Head)
        major = head.schema_version.partition(".")[0]
        if not re.match(r"[0-9]{1,9}\.[0-9]{1,9}\Z", head.schema_version):
            raise RecordError(
                f"{name} is no record: schema_version {head.schema_version[:20]!r} is not major.minor", _VALID
            )
        if int(major) != SCHEMA_MAJOR:
            raise RecordError(
                f"{name} is a record of version {head.schema_version}; this tool reads {SCHEMA_MAJOR}.x",
                "read it with the spec-ctrl-probe that wrote it, or a newer one",
            )
        record = msgspec.json.decode(raw, type=Record)
    except msgspec.ValidationError as error:
        raise RecordError(f"{name} is no valid record: {error}", _VALID) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{name} cannot be read: {error}", "it is cut or was never a JSON file") from error
    try:
        _check(record)
    except RecordError as error:
        raise RecordError(f"{name} is no valid record: {error.message}", _VALID) from error
    return record


@cache
def _cpu_lists(kind: type[Struct]) -> tuple[tuple[str, bool], ...]:
    """Return the fields of a struct, each with whether it is a CPU list."""
    return tuple((field.name, field.type == CpuList) for field in msgspec.structs.fields(kind))


def _check(value: object) -> None:
    """Raise RecordError for what no pattern can say: a range that runs backwards, a bit that has two outcomes."""
    if isinstance(value, Masks):
        observation_of(value)
    elif isinstance(value, Struct):
        for name, is_list in _cpu_lists(type(value)):
            inner = getattr(value, name)
            if is_list:
                cpus_of(inner)
            else:
                _check(inner)
    elif isinstance(value, list):
        for inner in value:
            _check(inner)


def schema() -> dict[str, Any]:
    """Return the record's JSON Schema 2020-12.

    It allows no additional properties: it says what this version writes. Reading is more lenient, see decode().
    """
    return closed_schema(Record, f"{SCHEMA_ID}.{SCHEMA_MINOR}")


def closed_schema(kind: type[Struct], identity: str) -> dict[str, Any]:
    """Return a struct's JSON Schema 2020-12, without additional properties anywhere."""
    document = msgspec.json.schema(kind)
    for definition in document["$defs"].values():
        if definition.get("type") == "object" and "properties" in definition:
            definition["additionalProperties"] = False
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": identity,
        **document,
    }
