# SPDX-License-Identifier: MIT
"""What a lab keeps of a night: a row for each group of CPUs of each record, and the machines that were lost. Pure.

Rows hold masks, not bits. Columns are named once, here; nothing guesses a type.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace

import msgspec

from probe import kvm_record, migration_record
from probe import record as rec
from probe.cases import groups_of, report_of
from probe.diff.moved import AnyRecord
from probe.errors import RecordError
from probe.masks import ALL_BITS, parse_hex64
from probe.outcome import Outcome

NIGHT = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])\Z")


@dataclass(frozen=True)
class Row:
    """CPUs of one machine that did alike in one run, or one KVM; masks of 64 bits, text where nothing is known "".

    odd are bits whose write did not fault, and of which the read-back tells nothing: altered or unstable (nights
    before this column have NULL). status is that of the whole record (pass, fail, skip, error); lost the step at
    which the machine was lost, then the masks are 0 and sha256 is "".
    """

    night: str
    host: str
    kind: str
    started: str
    vendor: str
    family: int
    model: int
    stepping: int
    microcode: str
    bios: str
    kernel: str
    hypervisor: str
    cpus: str
    accepts: int
    retained: int
    faults: int
    unmeasured: int
    wrong: int
    odd: int
    status: str
    findings: str
    explained: str
    lost: str
    agent: str
    sha256: str


MASKS = ("accepts", "retained", "faults", "unmeasured", "wrong", "odd")
COLUMNS: dict[str, str] = {
    field.name: "UBIGINT" if field.name in MASKS else "INTEGER" if field.type == "int" else "VARCHAR"
    for field in fields(Row)
}


def rows_of(record: AnyRecord, host: str, night: str, sha256: str) -> list[Row]:
    """Turn a record into rows; sha256 is that of its canonical text, in hexadecimal.

    Of KVM: accepts and faults are what KVM_SET_MSRS takes and refuses, retained is what a guest that is let through
    reads back.
    """
    machine = record.machine
    report = report_of(record)
    row = Row(
        night=night,
        host=host,
        kind=report.kind,
        started=record.started,
        vendor=machine.vendor,
        family=machine.family,
        model=machine.model,
        stepping=machine.stepping,
        microcode=", ".join(dict.fromkeys(one.revision for one in machine.microcode)),
        bios=f"{machine.bios.vendor} {machine.bios.version} {machine.bios.date}".strip(),
        kernel=record.kernel.release,
        hypervisor=(machine.hypervisor or "unnamed") if machine.under_hypervisor else "",
        cpus="",
        accepts=0,
        retained=0,
        faults=0,
        unmeasured=ALL_BITS,
        wrong=0,
        odd=0,
        status=report.status.value,
        findings="; ".join(report.told)[:2000],
        explained="",
        lost="",
        agent=record.tool.agent,
        sha256=sha256,
    )
    if isinstance(record, kvm_record.KvmRecord):
        hardware = record.hardware
        tested = parse_hex64(hardware.tested)
        explained = ", ".join(record.explained_by)
        return [
            replace(
                row,
                accepts=tested,
                retained=parse_hex64(hardware.keep),
                faults=ALL_BITS & ~tested,
                unmeasured=0 if hardware.let_through else tested,
                explained=explained,
            )
        ]
    if isinstance(record, migration_record.MigrationRecord):
        return [replace(row, explained=record.model)]
    return [_of_group(row, group.cpus, group.observation, group.verdict) for group in groups_of(record)]


def _of_group(row: Row, cpus: str, seen: rec.ObservationEntry | None, verdict: rec.VerdictEntry | None) -> Row:
    if seen is None or verdict is None:
        return replace(row, cpus=cpus)
    masks = {outcome.value: parse_hex64(getattr(seen.outcomes, outcome.value)) for outcome in Outcome}
    wrong = 0
    for name in ("unexpected_fault", "unexpected_accept", "not_retained"):
        wrong |= parse_hex64(getattr(verdict, name))
    accepts = masks["retained"] | masks["dropped"] | masks["altered"] | masks["unstable"]
    return replace(
        row,
        cpus=cpus,
        accepts=accepts,
        retained=masks["retained"],
        faults=masks["fault"],
        unmeasured=ALL_BITS & ~(accepts | masks["fault"]),
        wrong=wrong,
        odd=masks["altered"] | masks["unstable"],
    )


def check(rows: list[Row]) -> None:
    """Raise RecordError for numbers that no column holds."""
    for row in rows:
        for name in ("family", "model", "stepping"):
            if not 0 <= getattr(row, name) < 1 << 31:
                raise RecordError(f"{name} {getattr(row, name)} is no CPU's", "the record is not of this tool")


def lost_row(host: str, night: str, step: str) -> Row:
    """Return the row of a machine of which no record came: step is what it was about to do, or why it never began."""
    empty: dict[str, object] = {field.name: 0 if field.type == "int" else "" for field in fields(Row)}
    empty.update(night=night, host=host, kind="run", status="error", unmeasured=ALL_BITS, lost=step)
    return Row(**empty)  # type: ignore[arg-type]


# --- what comes from machines ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A line that is nothing this tool knows: its number from 1, why, and what it says."""

    line: int
    why: str
    text: str


@dataclass(frozen=True)
class Arrived:
    """What one file held: records as they came, the last step announced after the last record, and bad lines.

    ended says how a stream that has no record ended: an error of the agent's own, what a sweep knows, or ""; at is when
    the sweep knew, or "".
    """

    records: tuple[bytes, ...]
    last_step: str
    ended: str
    bad: tuple[Bad, ...]
    at: str = ""


def read(raw: bytes) -> Arrived:
    """Read a file that some engine left: one record, or lines of events (run --stream) or of a journal, in any mix."""
    kind, version = rec.record_kind(raw)
    if kind or version:
        return Arrived((raw,), "", "", ())
    records: list[bytes] = []
    bad: list[Bad] = []
    step = ended = at = ""
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            name = event.get("event", event.get("ev")) if isinstance(event, dict) else ""
            if name == "record" and isinstance(event.get("record"), dict):
                records.append(msgspec.json.format(msgspec.json.encode(event["record"]), indent=2) + b"\n")
                step = ended = ""
                continue
        except (ValueError, RecursionError) as error:  # of Unicode, too
            why = "no JSON" if isinstance(error, json.JSONDecodeError) else f"no JSON of use: {error}"
            bad.append(Bad(number, why[:200], line.decode(errors="backslashreplace")))
            continue
        if not isinstance(name, str):
            name = ""
        if name == "intent" and isinstance(event.get("step"), str):
            step = _plain(event["step"][:100])
        elif name == "error" and isinstance(event.get("message"), str):
            ended = f"it said: {_plain(event['message'][:500])}"
        elif name == "lost" and isinstance(event.get("why"), str) and isinstance(event.get("step"), str):
            step, ended = _plain(event["step"][:100]), _plain(event["why"][:500])
            at = _plain(str(event.get("at", ""))[:20])
        elif isinstance(event, dict) and isinstance(event.get("schema_version"), str):
            records.append(line + b"\n")
        elif name == "restored":
            step = ""
        elif name not in _EVENTS:
            bad.append(Bad(number, "no event, no record", line.decode(errors="backslashreplace")))
    return Arrived(tuple(records), step, ended, tuple(bad), at)


_EVENTS = {"start", "saved", "rebased"}  # besides those that read() looks at


def _plain(text: str) -> str:
    """Return a text without what no terminal, and no Parquet, should get."""
    return "".join(char if char.isprintable() else "?" for char in text)


def decode(raw: bytes, name: str) -> AnyRecord:
    """Read a record of any kind; raise RecordError if it is none."""
    kind, _ = rec.record_kind(raw)
    if kind == "kvm":
        record = kvm_record.decode(raw, name)
        kvm_record.check_names(record, name)
        return record
    return migration_record.decode(raw, name) if kind == migration_record.KIND else rec.decode(raw, name)


def canonical(record: AnyRecord) -> bytes:
    """Return the one text of a record, however it came: so it is never counted twice."""
    if isinstance(record, kvm_record.KvmRecord):
        return kvm_record.encode(record)
    return (
        migration_record.encode(record) if isinstance(record, migration_record.MigrationRecord) else rec.encode(record)
    )


def check_night(text: str) -> str:
    """Return a night's date; raise RecordError for what is none."""
    if not NIGHT.match(text):
        raise RecordError(f"{text[:20]!r} is no date", "such as 2026-11-25")
    return text
