# SPDX-License-Identifier: MIT
"""The store of a lab's nights: record files are the truth, one Parquet partition a night is for asking.

STORE/2026-11-25/records/HOST-SHA.json   each record once, whatever engine brought it, however often
STORE/2026-11-25/lost.ndjson             machines of which no record came: what they were about to do
STORE/2026-11-25/aside.ndjson            lines that are nothing this tool knows, with file, line and why
STORE/2026-11-25.parquet                 the night's rows (probe.nights.Row), compressed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
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
    """Take in whatever an engine left below a folder; the file's, or its folder's, name is the machine's.

    night puts what has no record into that date (else the date of the newest record there). Raise RecordError for a
    folder or store that cannot be read or written, RequirementMissing without DuckDB.
    """
    if night:
        nights.check_night(night)
    if not folder.is_dir():
        raise RecordError(f"{folder} is no folder", "give what the engine left, such as clush --outdir")
    done = Ingested()
    connection = connect()
    store.mkdir(parents=True, exist_ok=True)
    inside = store.resolve()
    with locked(store / ".lock", say):
        waiting: list[tuple[str, str]] = []
        with_record: set[str] = set()
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.name.startswith(".") or inside in path.resolve().parents:
                continue
            name = str(path.relative_to(folder))
            host = host_of(name)
            try:
                raw, _ = read_raw(str(path))
            except RecordError as error:  # one machine's file costs no other machine's
                done.bad.append(Aside(name, 0, error.message, ""))
                waiting.append((host, "what it said can't be read"))
                continue
            arrived = nights.read(raw)
            for text in arrived.records:
                taken = _keep(text, host, store, name, done)
                if taken:
                    with_record.add(host)
            done.bad += [Aside(name, one.line, one.why, one.text) for one in arrived.bad]
            if arrived.last_step or arrived.ended:
                waiting.append((host, arrived.last_step or f"it refused: {arrived.ended}"))
            elif not arrived.records:
                waiting.append((host, "nothing that it said is known" if arrived.bad else "it said nothing"))
        date = night or max(done.dates, default="")
        if not date and (done.bad or waiting):
            raise RecordError("no record came, so that nobody knows which night it is", "give --night 2026-11-25")
        _lost(waiting, with_record, store, date, done)
        _aside(store, date, done)
        os.sync()  # once for all files; a night's partition is there only when its records are
        for one in sorted(done.dates):
            write_rows(connection, rows(store, one, done.rows), store / f"{one}.parquet")
    return done


def host_of(name: str) -> str:
    """Return the machine's name from a file's below the folder: its first folder, or its own without its ending."""
    first, _, rest = name.partition("/")
    word = first if rest else first.removesuffix(".json").removesuffix(".ndjson").removesuffix(".log")
    return _HOST.sub("-", word)[:100] or "unnamed"


def _keep(text: bytes, host: str, store: Path, name: str, done: Ingested) -> bool:
    """Put one record into its night, once; a bad one is set aside."""
    try:
        record = nights.decode(text, name)
    except RecordError as error:
        done.bad.append(Aside(name, 0, error.message, text.decode(errors="backslashreplace")))
        return False
    canonical = nights.canonical(record)
    digest = hashlib.sha256(canonical).hexdigest()
    date = record.started[:10]
    target = (
        store / date / "records" / f"{_HOST.sub('-', record.identity) if record.identity else host}-{digest[:16]}.json"
    )
    done.dates.add(date)
    done.rows[target] = nights.rows_of(record, target.stem.rpartition("-")[0], date, digest)
    if target.exists() and target.stat().st_size == len(canonical):  # what a power cut left empty is written again
        done.again += 1
        return True
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_name(f".{target.name}")
        work.write_bytes(canonical)
        work.replace(target)
    except OSError as error:
        raise RecordError(f"cannot write {target}: {error.strerror}", "make room, and ingest it again") from error
    done.new += 1
    return True


def _lost(waiting: Sequence[tuple[str, str]], seen: set[str], store: Path, date: str, done: Ingested) -> None:
    """Note machines of which no record came."""
    found = {host: step for host, step in waiting if host not in seen}
    if not found:
        return
    path = store / date / "lost.ndjson"
    known = {entry["host"]: entry["step"] for entry in _entries(path)}
    known.update(found)
    _write_lines(path, ({"host": host, "step": step} for host, step in sorted(known.items())))
    done.lost = found
    done.dates.add(date)


def _aside(store: Path, date: str, done: Ingested) -> None:
    """Keep what is set aside, beside what an earlier ingest set aside."""
    if done.bad:
        path = store / date / "aside.ndjson"
        entries = [*_entries(path), *(vars(one) for one in done.bad)]
        _write_lines(path, {json.dumps(entry): entry for entry in entries}.values())


def _entries(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return []


def _write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    write_atomically("".join(json.dumps(entry) + "\n" for entry in entries).encode(), path, replace=True)


def rows(store: Path, night: str, known: Mapping[Path, list[nights.Row]] | None = None) -> list[nights.Row]:
    """Read a night's files, but those that are known; a machine that was lost first and gave a record later is not."""
    found: list[nights.Row] = []
    for path in sorted((store / night / "records").glob("*.json")):
        if known is not None and path in known:
            found += known[path]
            continue
        raw, name = read_raw(str(path))
        record = nights.decode(raw, name)
        found += nights.rows_of(record, path.stem.rpartition("-")[0], night, hashlib.sha256(raw).hexdigest())
    there = {row.host for row in found}
    lost = [
        nights.lost_row(entry["host"], night, entry["step"])
        for entry in _entries(store / night / "lost.ndjson")
        if entry["host"] not in there
    ]
    return found + lost


def write_rows(connection: duckdb.DuckDBPyConnection, found: Sequence[nights.Row], target: Path) -> None:
    """Write rows as one Parquet file; the names of its columns and their types are those of probe.nights."""
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
    except OSError as error:
        raise RecordError(f"cannot write {target}: {error.strerror}", "make room, and ingest it again") from error
    finally:
        for leftover in (work, lines):
            leftover.unlink(missing_ok=True)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def nights_of(store: Path) -> list[str]:
    """Return the dates of the nights that can be asked, the oldest first."""
    return sorted(path.stem for path in store.glob("*.parquet") if nights.NIGHT.match(path.stem))
