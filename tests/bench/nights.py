# SPDX-License-Identifier: MIT
"""A lab's year, made here: 5,000 machines, 365 nights; taking in a night, and asking."""

from __future__ import annotations

import datetime
import json
import random
import tempfile
import time
from pathlib import Path

from kernel_harness.lab import history, nights
from tests.bench.figures import figure, note

TOP = Path(__file__).resolve().parents[2]
BASE = TOP / "results/modelled-threadripper-3970x/metal.json"
MACHINES, NIGHTS = 5_000, 365


def records(folder: Path, night: str, count: int) -> None:
    """Write a night as an engine leaves it: a stream of events for each machine."""
    chance = random.Random(1)
    record = json.loads(BASE.read_text(encoding="utf-8"))
    for number in range(count):
        record["started"] = f"{night}T02:{chance.randrange(60):02}:{chance.randrange(60):02}Z"
        record["machine"]["microcode"] = [{"cpus": "0-1", "revision": f"{0x1000000 + number % 40:#x}"}]
        record["machine"]["model"] = number % 200
        events = [{"event": "start"}, *({"event": "intent", "step": f"bit {bit}"} for bit in range(64))]
        events.append({"event": "record", "record": record})
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (folder / f"lab{number:05}").write_text(lines, encoding="utf-8")


def year(store: Path, night: str) -> None:
    """Make the other nights from the first one: now and then a microcode, a kernel, or what a bit does is another."""
    connection = nights.connect()
    source = f"read_parquet('{store / night}.parquet')"
    first = datetime.date.fromisoformat(night)
    for day in range(1, NIGHTS):
        date = str(first - datetime.timedelta(days=day))
        connection.execute(
            f"""COPY (SELECT * REPLACE ('{date}' AS night, '{date}' || substr(started, 11) AS started,
                CASE WHEN hash(host || '{day // 30}') % 50 = 0 THEN '0x2000000' ELSE microcode END AS microcode,
                CASE WHEN hash(host || '{day}') % 2000 = 0 THEN retained & ~2::UBIGINT ELSE retained END AS retained,
                '6.{day // 7}.0' AS kernel, sha256(sha256 || '{date}') AS sha256) FROM {source})
                TO '{store / date}.parquet' (FORMAT parquet, COMPRESSION zstd)"""
        )


def nights_figures() -> None:
    """Measure taking in a night and three questions over a year."""
    with tempfile.TemporaryDirectory() as text:
        folder, store = Path(text) / "out", Path(text) / "store"
        folder.mkdir()
        records(folder, "2026-11-25", MACHINES)
        begin = time.monotonic()
        done = nights.ingest(folder, store, lambda line: None)
        assert done.new == MACHINES
        figure(f"ingest of a night of {MACHINES:,} machines", time.monotonic() - begin, 10, "s")
        year(store, "2026-11-25")
        size = sum(path.stat().st_size for path in store.glob("*.parquet")) / 1e6
        figure(f"{NIGHTS} nights of {MACHINES:,} machines", size, 300, "MB")
        for question, bound, what in (
            ("changes", 0.5, "changed since last night"),
            ("flips", 2.0, "whole history: what flips a bit"),
            ("findings", 2.0, "whole history: open findings"),
        ):
            times = []
            for _ in range(3):
                begin = time.monotonic()
                history.ask(store, question)
                times.append(time.monotonic() - begin)
            figure(what, min(times), bound, "s")
        begin = time.monotonic()
        history.ask(store, "machine", host="lab00042")
        note("one machine's year", time.monotonic() - begin, "s")
