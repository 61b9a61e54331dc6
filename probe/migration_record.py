# SPDX-License-Identifier: MIT
"""The record of guests that moved: what each held where it left, what it read where it arrived. Pure.

The same rules as for probe/record.py: no host name, no path; a minor version only adds optional fields.
"""

from __future__ import annotations

from typing import Any, Literal, Union

import msgspec.structs
from msgspec import UNSET, UnsetType

from probe.errors import RecordError, UsageError
from probe.kvm_record import GuestPlace, HardwareEntry, KvmEntry
from probe.masks import hex64, parse_hex64
from probe.models.moving import Arrived, Departed
from probe.models.program import parse, written
from probe.record import Entry, Kernel, Machine, Mask, Seconds, Time, Tool, Version, closed_schema, record_kind

KIND = "migration"
SCHEMA_MAJOR, SCHEMA_MINOR = 1, 1
SCHEMA_ID = f"urn:spec-ctrl-probe:migration-record:{SCHEMA_MAJOR}"


class DepartureEntry(Entry):
    """A guest where it left: its program with what the kernel answered, what it read then, and what the VMM read.

    policy is "" for KVM alone. reads is missing if the guest took #GP, held if KVM refused the VMM. differs: what the
    model of kernel and policy says instead; "" if it says the same, or nothing.
    """

    kernel: str
    policy: str
    program: str
    listed: bool
    reads: Union[Mask, UnsetType] = UNSET
    held: Union[Mask, UnsetType] = UNSET
    differs: str = ""


class ArrivalEntry(Entry):
    """What became of the guest of departures[departure] on this record's kernel.

    policy and profile are those of the destination ("": KVM alone, the same CPUID). sent is missing if nothing was
    sent; reads and held (what the VMM reads then) if the guest took #GP, KVM refused, or the move was refused. differs
    as above.
    """

    departure: int
    rule: str
    outcome: Literal["works", "refused", "lost", "changed", "unreadable"]
    policy: str = ""
    profile: str = ""
    sent: Union[Mask, UnsetType] = UNSET
    reads: Union[Mask, UnsetType] = UNSET
    held: Union[Mask, UnsetType] = UNSET
    differs: str = ""


class MigrationRecord(Entry):
    """Guests that left this kernel, and guests that arrived on it, from itself or another.

    study is the name of the study that chose them, "" for a program of the user's. model is the one that explains the
    kernel. complaints: what policies did that is no decision.
    """

    kind: Literal["migration"]
    schema_version: Version
    tool: Tool
    started: Time
    duration: Seconds
    machine: Machine
    kernel: Kernel
    kvm: KvmEntry
    hardware: HardwareEntry
    model: str
    departures: list[DepartureEntry]
    arrivals: list[ArrivalEntry]
    study: str = ""
    complaints: list[str] = []
    notes: list[str] = []
    guest: Union[GuestPlace, UnsetType] = UNSET
    identity: str = ""


def _mask(value: int | None) -> Mask | UnsetType:
    return UNSET if value is None else hex64(value)


def _number(mask: Mask | UnsetType) -> int | None:
    return None if isinstance(mask, UnsetType) else parse_hex64(mask)


def departure_entry(departed: Departed, kernel: str, policy: str, differs: str = "") -> DepartureEntry:
    """Turn a guest that has left into its entry."""
    return DepartureEntry(
        kernel=kernel,
        policy=policy,
        program=written(departed.program, [answer for answer in departed.answers if answer is not None]),
        listed=departed.listed,
        reads=_mask(departed.reads),
        held=_mask(departed.held),
        differs=differs,
    )


def departed_of(entry: DepartureEntry) -> Departed:
    """Turn an entry into its guest again; raise UsageError if its program is none."""
    program, answers = parse(entry.program)
    return Departed(program, tuple(answers), _number(entry.reads), _number(entry.held), entry.listed)


def arrival_entry(
    arrived: Arrived, departure: int, rule: str, policy: str, profile: str = "", differs: str = ""
) -> ArrivalEntry:
    """Turn what became of a guest into its entry."""
    return ArrivalEntry(
        departure=departure,
        rule=rule,
        outcome=arrived.outcome,  # type: ignore[arg-type]
        policy=policy,
        profile=profile,
        sent=_mask(arrived.sent),
        reads=_mask(arrived.reads),
        held=_mask(arrived.held),
        differs=differs,
    )


def joined(one: MigrationRecord, other: MigrationRecord) -> MigrationRecord:
    """Put what two runs on one kernel saw into one record; the first one's head stays."""
    moved = [
        msgspec.structs.replace(entry, departure=entry.departure + len(one.departures)) for entry in other.arrivals
    ]
    return msgspec.structs.replace(
        one,
        departures=[*one.departures, *other.departures],
        arrivals=[*one.arrivals, *moved],
        duration=round(one.duration + other.duration, 3),
        complaints=[*one.complaints, *other.complaints],
        notes=list(dict.fromkeys([*one.notes, *other.notes])),
    )


def as_calculated(record: MigrationRecord) -> bool:
    """Tell whether everything was as the models of kernel and policy say."""
    differs = [*(one.differs for one in record.departures), *(one.differs for one in record.arrivals)]
    return not any(differs)


def encode(record: MigrationRecord) -> bytes:
    """Return the record as JSON, two spaces deep, with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode(raw: bytes, name: str) -> MigrationRecord:
    """Read a record; name is what an error calls it. Raise RecordError for anything that is none of this version."""
    kind, version = record_kind(raw)
    if kind != KIND:
        raise RecordError(f"{name} is no record of a migration", "spec-ctrl-probe kvm migrate --record PATH makes one")
    if version.partition(".")[0] != str(SCHEMA_MAJOR):
        raise RecordError(
            f"{name} is a migration record of version {version[:20]}; this tool reads {SCHEMA_MAJOR}.x",
            "read it with the spec-ctrl-probe that wrote it, or a newer one",
        )
    try:
        record = msgspec.json.decode(raw, type=MigrationRecord)
    except msgspec.MsgspecError as error:
        raise RecordError(
            f"{name} is no valid migration record: {error}", "spec-ctrl-probe schema migration"
        ) from error
    if any(not 0 <= entry.departure < len(record.departures) for entry in record.arrivals):
        raise RecordError(f"{name}: an arrival speaks of a departure that is not there", "it is cut")
    for entry in record.departures:
        try:
            departed_of(entry)
        except UsageError as error:
            raise RecordError(f"{name}: {error.message}", "a departure's program is none") from error
    return record


def schema() -> dict[str, Any]:
    """Return the record's JSON Schema 2020-12; it allows no additional properties."""
    return closed_schema(MigrationRecord, f"{SCHEMA_ID}.{SCHEMA_MINOR}")
