# SPDX-License-Identifier: MIT
"""The store of a lab's nights: record files are the truth, one Parquet partition a night is for asking.

STORE/2026-11-25/records/HOST-SHA.json   each record once, whatever engine brought it, however often
STORE/2026-11-25/lost.ndjson             machines of which no record came: what they were about to do
STORE/2026-11-25/aside.ndjson            lines that are nothing this tool knows, with file, line and why
STORE/2026-11-25.parquet                 the night's rows (probe.nights.Row), compressed
STORE/sweeps/                            what sweeps are about (kernel_harness.lab.sweep); no part of any night
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_harness.boot.cache import Say, locked
from probe import nights
from probe.errors import RecordError, RequirementMissing
from probe.store import read_raw, write_atomically

if TYPE_CHECKING:
    import duckdb

_HOST = re.compile(r"[^A-Za-z0-9._-]+")
_LOST, _ASIDE = "lost.ndjson", "aside.ndjson"
_ENDING = re.compile(r"\.(json|ndjson|jsonl|log|out|txt)\Z")
_OF_A_NIGHT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\.(html|txt|kcidb)\Z")
_OF_STORE = re.compile(r"(?:(?P<night>[0-9-]{10})/)?(?:records/)?(?P<host>[A-Za-z0-9._-]{1,100})-[0-9a-f]{16}\.json\Z")


def connect() -> duckdb.DuckDBPyConnection:
    """Open DuckDB in memory, without a file or the network; raise RequirementMissing if it is not installed."""
    try:
        import duckdb
    except ImportError as error:
        raise RequirementMissing(f"cannot ask the nights: {error}", "pip install 'spec-ctrl-probe[lab]'") from error
    config: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    connection = duckdb.connect(":memory:", config=config)
    connection.execute("SET enable_progress_bar = false")
    return connection


@dataclass(frozen=True)
class Aside:
    """What is set aside: the file, the line in it (0: all of it), why, and its text."""

    file: str
    line: int
    why: str
    text: str


@dataclass
class Ingested:
    """What came of a folder: new records and those that were there already, machines lost, bad lines, the nights.

    rows are those of records that were read just now, by the file that holds each.
    """

    new: int = 0
    again: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    bad: list[Aside] = field(default_factory=list)
    dates: set[str] = field(default_factory=set)
    rows: dict[Path, list[nights.Row]] = field(default_factory=dict)


def ingest(folder: Path, store: Path, say: Say, night: str = "") -> Ingested:
    """Take in whatever an engine left below a folder; the file's, or its first folder's, name is the machine's.

    night is the night of all that comes; else it is that of the other store which a file is of, or the date on which a
    record was started, and the most frequent of these for machines without one. A night of the store without a Parquet
    file gets one. Raise RecordError for a folder or store that cannot be read or written, RequirementMissing without
    DuckDB.
    """
    if night:
        nights.check_night(night)
    if not folder.is_dir():
        raise RecordError(f"{folder} is no folder", "give what the engine left, such as clush --outdir")
    done = Ingested()
    connection = connect()
    store.mkdir(parents=True, exist_ok=True)
    with locked(store / ".lock", say):
        done.dates |= {path.parent.name for path in store.glob("*/records") if nights.NIGHT.match(path.parent.name)}
        done.dates = {date for date in done.dates if date == night or not (store / f"{date}.parquet").exists()}
        waiting: list[Waiting] = []
        with_record: set[str] = set()
        dates: Counter[str] = Counter()
        skipped = folder / "sweeps" if (folder / "sweeps/.lock").exists() else None  # of a store
        files = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and _is_foreign(path, store) and skipped not in path.parents
        ]
        if not files and not done.dates:
            raise RecordError(f"no file in {folder}", "give what the engine left, such as clush --outdir")
        for path in files:
            name = str(path.relative_to(folder))
            host = host_of(name)
            try:
                raw, _ = read_raw(str(path))
            except RecordError as error:  # one machine's file costs no other machine's
                done.bad.append(Aside(_printable(name), 0, error.message, ""))
                waiting.append(Waiting(host, "what it said can't be read", died=False))
                continue
            arrived = nights.read(raw)
            kept = False
            for text in arrived.records:
                date = _keep(text, host, store, _printable(name), night or _night_of(name), done)
                if date:
                    kept = True
                    with_record.add(host)
                    dates[date] += 1
            done.bad += [Aside(_printable(name), one.line, one.why, one.text) for one in arrived.bad]
            if arrived.last_step or arrived.ended:
                step = ", then ".join(part for part in (arrived.last_step, arrived.ended) if part)
                waiting.append(Waiting(host, step, died=True, at=arrived.at))
            elif arrived.records and not kept:
                waiting.append(Waiting(host, f"its record was set aside: {done.bad[-1].why}", died=False))
            elif not arrived.records:
                said = "nothing that it said is known" if arrived.bad else "it said nothing"
                waiting.append(Waiting(host, said, died=False))
        waiting = [one for one in waiting if one.died or one.host not in with_record]
        date = night or next((one for one, _ in dates.most_common(1)), "")
        if not date and (done.bad or waiting):
            raise RecordError("no record came, so that nobody knows which night it is", "give --night 2026-11-25")
        _lost(waiting, store, date, done)
        _aside(store, date, done)
        os.sync()  # once for all files; a night's partition is there only when its records are
        for one in sorted(done.dates):
            write_rows(connection, rows(store, one, done.rows, done.bad), store / f"{one}.parquet")
    return done


@dataclass(frozen=True)
class Waiting:
    """A machine of which no record came, or none after the step that it announced (died); at is when that was known."""

    host: str
    step: str
    died: bool
    at: str = ""


def _is_foreign(path: Path, store: Path) -> bool:
    """Tell whether a file is not of the store itself; of another store only records are."""
    if path.name.startswith(".") or path.suffix in (".parquet", ".prom") or path.name in (_LOST, _ASIDE):
        return False
    if _OF_A_NIGHT.match(path.name):  # what nightly makes of one
        return False
    try:
        inside = path.resolve().relative_to(store.resolve())
    except ValueError:
        return True
    return not nights.NIGHT.match(inside.parts[0].removesuffix(".parquet"))


def host_of(name: str) -> str:
    """Return the machine's name from a file's below the folder: its first folder, or its own without its ending.

    A file of a store is called as there. Bytes that are no text are told apart.
    """
    kept = _OF_STORE.match(name)
    if kept:
        return kept.group("host")
    first, _, rest = name.partition("/")
    word = first if rest else _ENDING.sub("", first)
    return _HOST.sub("-", _printable(word))[:100] or "unnamed"


def _night_of(name: str) -> str:
    """Return the night of a file of another store, or ""."""
    kept = _OF_STORE.match(name)
    night = (kept and kept.group("night")) or ""
    return night if nights.NIGHT.match(night) else ""


def file_name(host: str) -> str:
    """Return what a machine's file is called, without an ending: its name, if that is one; each has its own."""
    word = _HOST.sub("-", host)[:80]
    safe = word == host and word not in ("lost", "aside") and not word.startswith(".") and not _ENDING.search(word)
    return word if safe else f"{word.lstrip('.')}-{hashlib.sha256(host.encode()).hexdigest()[:8]}"


def _printable(name: str) -> str:
    return "".join(f"x{ord(char) - 0xDC00:02x}" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in name)


def _keep(text: bytes, host: str, store: Path, name: str, night: str, done: Ingested) -> str:
    """Put one record into its night, once, and return the night; a bad one is set aside, for which return ""."""
    try:
        record = nights.decode(text, name)
        canonical = nights.canonical(record)
        digest = hashlib.sha256(canonical).hexdigest()
        day = datetime.date.fromisoformat(nights.check_night(record.started[:10]))
        if day > datetime.datetime.now(datetime.timezone.utc).date() + datetime.timedelta(days=1):
            raise RecordError(f"its clock is ahead: started {record.started}", "set the machine's clock")
        around = [str(day + datetime.timedelta(days=one)) for one in (0, -1, 1)]
        file = f"{host}-{digest[:16]}.json"
        # where an earlier ingest put it, perhaps with --night
        date = next((one for one in (night, *around) if one and (store / one / "records" / file).exists()), "")
        again, date = bool(date), date or night or around[0]
        target = store / date / "records" / file
        found = nights.rows_of(record, host, date, digest)
        nights.check(found)
    except (RecordError, ValueError) as error:
        why = error.message if isinstance(error, RecordError) else str(error)
        done.bad.append(Aside(name, 0, why, text.decode(errors="backslashreplace")))
        return ""
    done.dates.add(date)
    done.rows[target] = found
    try:
        if again and target.read_bytes() == canonical:  # what a power cut left is written again
            done.again += 1
            return date
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_name(f".{target.name}.new")
        work.write_bytes(canonical)
        work.replace(target)
    except OSError as error:
        raise RecordError(f"cannot write {target}: {error.strerror}", "make room, and ingest it again") from error
    done.new += 1
    return date


def _lost(waiting: Sequence[Waiting], store: Path, date: str, done: Ingested) -> None:
    """Note machines of which no record came; only a run that was started later makes it good."""
    if not waiting:
        return
    newest: dict[str, str] = {}
    for row in rows(store, date, done.rows, []):
        if row.kind == "run" and not row.lost:
            newest[row.host] = max(newest.get(row.host, ""), row.started)
    path = store / date / _LOST
    known = {(entry["host"], entry["step"]): entry for entry in _entries(path)}
    for one in waiting:
        entry = {"host": one.host, "step": one.step, "after": one.at or newest.get(one.host, "")}
        if known.setdefault((one.host, one.step), entry)["after"] < one.at:
            known[one.host, one.step] = entry
    _write_lines(path, [known[one] for one in sorted(known)])
    done.lost = {one.host: one.step for one in waiting}
    done.dates.add(date)


def _aside(store: Path, date: str, done: Ingested) -> None:
    """Keep what is set aside, beside what an earlier ingest set aside."""
    if done.bad:
        path = store / date / _ASIDE
        entries = [*_entries(path), *(vars(one) for one in done.bad)]
        _write_lines(path, {json.dumps(entry): entry for entry in entries}.values())


def _entries(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return []


def _write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    write_atomically("".join(json.dumps(entry) + "\n" for entry in entries).encode(), path, replace=True)


def rows(
    store: Path, night: str, known: Mapping[Path, list[nights.Row]] | None = None, bad: list[Aside] | None = None
) -> list[nights.Row]:
    """Read a night's files, but those that are known; what cannot be read is added to bad.

    A machine that was lost, and whose later run gave a record, is not lost.
    """
    found: list[nights.Row] = []
    for path in sorted((store / night / "records").glob("*.json")):
        if path.name.startswith("."):
            continue
        if known is not None and path in known:
            found += known[path]
            continue
        try:
            raw, name = read_raw(str(path))
            record = nights.decode(raw, name)
        except RecordError as error:
            if bad is None:
                raise
            bad.append(Aside(str(path.relative_to(store)), 0, error.message, ""))
            continue
        found += nights.rows_of(record, path.stem.rpartition("-")[0], night, hashlib.sha256(raw).hexdigest())
    newest: dict[str, str] = {}
    for row in found:
        if row.kind == "run":
            newest[row.host] = max(newest.get(row.host, ""), row.started)
    last: dict[str, dict[str, Any]] = {}  # of several losses of a machine the last one counts
    for entry in _entries(store / night / _LOST):
        if (
            newest.get(entry["host"], "") <= entry["after"]
            and entry["after"] >= last.get(entry["host"], entry)["after"]
        ):
            last[entry["host"]] = entry
    return found + [nights.lost_row(host, night, last[host]["step"]) for host in sorted(last)]


def write_rows(connection: duckdb.DuckDBPyConnection, found: Sequence[nights.Row], target: Path) -> None:
    """Write rows as one Parquet file; the names of its columns and their types are those of probe.nights."""
    import duckdb

    columns = ", ".join(f"{name} {kind}" for name, kind in nights.COLUMNS.items())
    work = target.with_name(f".{target.name}.{os.getpid()}")
    names = ", ".join(f"'{name}': '{kind}'" for name, kind in nights.COLUMNS.items())
    lines = target.with_name(f".{target.name}.{os.getpid()}.ndjson")
    try:
        with open(lines, "w", encoding="utf-8") as file:
            for row in found:
                file.write(json.dumps(vars(row)) + "\n")
        connection.execute(f"CREATE OR REPLACE TEMP TABLE night ({columns})")
        if found:
            connection.execute(
                f"INSERT INTO night SELECT * FROM read_json(?, format='newline_delimited', columns={{{names}}})",
                [str(lines)],
            )
        connection.execute(f"COPY night TO '{_quoted(work)}' (FORMAT parquet, COMPRESSION zstd)")
        work.replace(target)
    except (OSError, duckdb.Error) as error:
        why = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise RecordError(f"cannot write {target}: {why}", "make room, and ingest it again") from error
    finally:
        for leftover in (work, lines):
            leftover.unlink(missing_ok=True)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def nights_of(store: Path) -> list[str]:
    """Return the dates of the nights that can be asked, the oldest first."""
    return sorted(path.stem for path in store.glob("*.parquet") if nights.NIGHT.match(path.stem))
