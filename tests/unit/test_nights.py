# SPDX-License-Identifier: MIT
"""A lab's nights: what comes of any engine's output, each record once, and what can be asked of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernel_harness.lab import history
from kernel_harness.lab import nights as store_
from probe import nights
from probe import record as rec
from probe.cli import main
from probe.errors import RecordError, UsageError
from probe.masks import ALL_BITS, hex64
from tests.unit.test_report import GOLDEN as RUNS
from tests.unit.test_report import as_predicted

KVM = next(Path("results/debian-kernels-nested").glob("zen2-client/*-kvm-7.2*.json"))


def run(night: str = "2026-11-25", hour: int = 2, **changes: Any) -> rec.Record:
    record = as_predicted()
    record.started = f"{night}T{hour:02}:00:00Z"
    for name, value in changes.items():
        setattr(record.machine if hasattr(record.machine, name) else record.kernel, name, value)
    return record


def without(record: rec.Record, mask: int) -> rec.Record:
    """The same machine whose writes of these bits take #GP now."""
    for entry in record.observations:
        seen = rec.observation_of(entry.outcomes)
        entry.outcomes.retained = hex64(seen.retained & ~mask)
        entry.outcomes.fault = hex64(seen.fault | seen.retained & mask)
    return record


def stream(*events: object, record: rec.Record | None = None) -> bytes:
    lines = [json.dumps(event) for event in events]
    if record is not None:
        lines.append(json.dumps({"event": "record", "record": json.loads(rec.encode(record))}))
    return "".join(f"{line}\n" for line in lines).encode()


INTENT = {"event": "intent", "step": "bit 37", "mask": hex64(1 << 37)}


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path


def taken(lab: Path, **files: bytes) -> store_.Ingested:
    for path in (lab / "out").iterdir():
        path.unlink()
    for name, content in files.items():
        (lab / "out" / name).write_bytes(content)
    return store_.ingest(lab / "out", lab / "store", lambda text: None)


def asked(lab: Path, question: str, **more: str) -> list[dict[str, Any]]:
    answer = history.ask(lab / "store", question, **more)
    return [dict(zip(answer.columns, row)) for row in answer.rows]


# --- what comes ------------------------------------------------------------------------------------------------------


def test_records_streams_and_journals_of_any_engine(lab: Path) -> None:
    journal = b'{"ev": "saved", "boot_id": "x"}\n{"ev": "intent", "step": "bit 3", "mask": "0x0000000000000008"}\n'
    done = taken(
        lab,
        plain=rec.encode(run()),
        streamed=stream({"event": "start"}, INTENT, record=run()),
        died=stream({"event": "start"}, INTENT),
        journal=journal,
        refused=stream({"event": "start"}, {"event": "error", "exit_code": 4, "message": "not root"}),
        silent=b"",
        garbage=b"Last login: yesterday\n",
        kvm=KVM.read_bytes(),
    )
    assert (done.new, done.again) == (3, 0)
    assert done.lost == {
        "died": "bit 37",
        "journal": "bit 3",
        "refused": "it refused: not root",
        "silent": "it said nothing",
        "garbage": "nothing that it said is known",
    }
    assert done.bad == [store_.Aside("garbage", 1, "no JSON", "Last login: yesterday")]
    aside = (lab / "store" / "2026-11-25" / "aside.ndjson").read_text()
    assert json.loads(aside) == vars(done.bad[0])
    rows = store_.rows(lab / "store", "2026-11-25")
    assert {row.host: row.lost for row in rows if row.lost} == done.lost


def test_no_record_is_counted_twice(lab: Path) -> None:
    raw = rec.encode(run())
    assert taken(lab, one=raw).new == 1
    again = taken(lab, one=stream({"event": "start"}, record=run()))
    assert (again.new, again.again) == (0, 1), "however it comes"
    assert len(store_.rows(lab / "store", "2026-11-25")) == 1
    assert taken(lab, one=rec.encode(run(hour=3))).new == 1, "another run is another record"


def test_a_machine_that_comes_back_is_not_lost(lab: Path) -> None:
    taken(lab, one=rec.encode(run()), two=stream({"event": "start"}, INTENT))
    assert asked(lab, "missing") == [{"host": "two", "what": "lost: bit 37", "last_night": "2026-11-25"}]
    taken(lab, two=rec.encode(run(hour=4)))
    assert asked(lab, "missing") == []


def test_bad_records_cost_no_other(lab: Path) -> None:
    whole = rec.encode(run())
    done = taken(
        lab, cut=whole[:2000], newer=whole.replace(b'"schema_version": "1', b'"schema_version": "9', 1), good=whole
    )
    assert done.new == 1
    assert {one.file for one in done.bad} == {"cut", "newer"}
    assert set(done.lost) == {"cut"}, "of the other there is a record, which is set aside"


def test_what_is_set_aside_stays_aside_and_whole(lab: Path) -> None:
    taken(lab, good=rec.encode(run()), bad=b"one\n")
    for _ in range(2):
        taken(lab, good=rec.encode(run()), worse=b"\xff two\n")
    raw = (lab / "store" / "2026-11-25" / "aside.ndjson").read_text(encoding="utf-8")
    found = [json.loads(line) for line in raw.splitlines()]
    assert [(one["file"], one["text"]) for one in found] == [("bad", "one"), ("worse", "\\xff two")]


def test_a_file_that_cannot_be_read_costs_no_other(lab: Path) -> None:
    (lab / "out" / "cut").mkdir()
    (lab / "out" / "cut" / "stdout").symlink_to("/proc/self/mem")
    (lab / "out" / "good").write_bytes(rec.encode(run()))
    done = store_.ingest(lab / "out", lab / "store", lambda text: None)
    assert (done.new, done.lost) == (1, {"cut": "what it said can't be read"})
    assert "Input/output error" in done.bad[0].why


def test_a_run_that_put_everything_back_and_gave_no_record_is_not_lost_at_a_bit() -> None:
    raw = stream({"ev": "intent", "step": "bit 3"}, {"ev": "restored", "by": "watchdog"})
    assert nights.read(raw).last_step == ""


@pytest.mark.parametrize(
    ("name", "host"),
    [("host1", "host1"), ("host1.ndjson", "host1"), ("host1/x/y.json", "host1"), ("a b/c", "a-b"), ("../x", "..")],
)
def test_a_machine_is_called_by_its_folder_or_file(name: str, host: str) -> None:
    assert store_.host_of(name) == host


def test_without_any_record_nobody_knows_the_night(lab: Path) -> None:
    with pytest.raises(RecordError, match="nobody knows which night"):
        taken(lab, one=stream(INTENT))
    with pytest.raises(RecordError, match="is no date"):
        store_.ingest(lab / "out", lab / "store", lambda text: None, "yesterday")
    assert store_.ingest(lab / "out", lab / "store", lambda text: None, "2026-11-24").lost == {"one": "bit 37"}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_rows_are_the_records(name: str) -> None:
    record = RUNS[name]()
    rows = nights.rows_of(record, "h", "2026-11-25", "0" * 64)
    assert rows
    for row in rows:
        assert row.accepts | row.faults | row.unmeasured == ALL_BITS
        assert not row.accepts & row.faults
        assert not row.retained & ~row.accepts
        assert set(nights.COLUMNS) == set(vars(row))
    assert {row.status for row in rows} <= {"pass", "fail", "skip", "error"}


# --- what can be asked -----------------------------------------------------------------------------------------------


@pytest.fixture
def two_nights(lab: Path) -> Path:
    """Three machines; in the second night the one bit of one has changed, one is gone, and one is new."""
    first = {name: rec.encode(run("2026-11-24")) for name in ("same", "moves", "goes")}
    taken(lab, **first)
    taken(
        lab,
        same=rec.encode(run("2026-11-25")),
        moves=rec.encode(without(run("2026-11-25"), 0x2)),
        comes=rec.encode(run("2026-11-25")),
    )
    return lab


def test_the_one_planted_change_is_all_that_changed(two_nights: Path) -> None:
    (change,) = asked(two_nights, "changes")
    assert (change["host"], change["retained_differs"], change["faults_differ"]) == ("moves", "0x2", "0x2")
    assert change["microcode"] == change["kernel"] == ""
    assert asked(two_nights, "changes", before="2026-11-24", after="2026-11-24") == []
    assert [one["host"] for one in asked(two_nights, "missing")] == ["goes"]


def test_of_several_runs_of_a_night_the_newest_counts(lab: Path) -> None:
    taken(lab, one=rec.encode(run("2026-11-24")))
    taken(lab, one=rec.encode(without(run("2026-11-25", 2), 0x2)))
    taken(lab, one=rec.encode(run("2026-11-25", 5)))
    assert asked(lab, "changes") == []


def test_which_microcode_flips_a_bit(lab: Path) -> None:
    def on(night: str, revision: str, mask: int) -> bytes:
        record = without(run(night), mask)
        record.machine.microcode = [rec.Microcode(cpus="0-1", revision=revision)]
        return rec.encode(record)

    taken(lab, one=on("2026-11-24", "0x10", 0), two=on("2026-11-24", "0x10", 0))
    taken(lab, one=on("2026-11-25", "0x11", 0x2), two=on("2026-11-25", "0x10", 0))
    (flip,) = asked(lab, "flips")
    assert (flip["no_longer_kept"], flip["faults_now"], flip["kept_now"]) == ("0x2", "0x2", "0x0")
    assert (flip["microcode"], flip["bios"], flip["kernel"], flip["machines"]) == ("0x10 -> 0x11", "", "", 1)
    taken(lab, one=on("2026-11-26", "0x11", 0), two=on("2026-11-26", "0x11", 0x2))
    back, forth = asked(lab, "flips")
    if not back["came_with"]:
        back, forth = forth, back
    assert (back["kept_now"], back["came_with"], back["machines"]) == ("0x2", "nothing that is known", 1)
    assert (forth["no_longer_kept"], forth["came_with"], forth["machines"]) == ("0x2", "", 2)
    (change,) = asked(lab, "changes", before="2026-11-24", after="2026-11-25")
    assert change["microcode"] == "0x10 -> 0x11"


def test_machines_whose_cpus_differ(lab: Path) -> None:
    record = RUNS["one-cpu-differs"]()
    record.started = "2026-11-25T02:00:00Z"
    taken(lab, odd=rec.encode(record), even=rec.encode(run()))
    (one,) = asked(lab, "differ")
    assert (one["host"], one["groups"]) == ("odd", 2)


def test_findings_and_since_when_without_a_break(lab: Path) -> None:
    def guest(night: str) -> bytes:
        record = RUNS["july-2020-guest"]()
        record.started = f"{night}T02:00:00Z"
        return rec.encode(record)

    taken(lab, one=guest("2026-11-21"))
    taken(lab, one=rec.encode(run("2026-11-22")))
    for night in ("2026-11-23", "2026-11-24", "2026-11-25"):
        taken(lab, one=guest(night), good=rec.encode(run(night)))
    (one,) = asked(lab, "findings")
    assert (one["host"], one["since"]) == ("one", "2026-11-23")


def test_a_machines_life_has_the_nights_on_which_something_is_new(two_nights: Path) -> None:
    assert [row["night"] for row in asked(two_nights, "machine", host="same")] == ["2026-11-24"]
    assert [row["night"] for row in asked(two_nights, "machine", host="moves")] == ["2026-11-24", "2026-11-25"]


def test_sql_of_ones_own(two_nights: Path) -> None:
    found = asked(two_nights, "sql", sql="SELECT count(*) AS n, max(retained) AS m FROM runs")
    assert found == [{"n": 6, "m": 0x6}]
    with pytest.raises(UsageError, match="DuckDB: "):
        asked(two_nights, "sql", sql="SELECT nonsense FROM runs")


def test_the_commands(two_nights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--store", str(two_nights / "store")]
    assert main(["history", "changes", *where]) == 1
    assert "moves" in capsys.readouterr().out
    assert main(["history", "changes", *where, "--output-format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["retained_differs"] == "0x2"
    assert main(["history", "flips", *where, "--output-format", "csv"]) == 0
    assert main(["history", "machine", *where]) == 2
    assert main(["history", "changes", "x", *where]) == 2
    assert main(["history", "flips", "--from", "2026-11-24", *where]) == 2
    assert main(["history", "changes", *where, "--to", "2026-01-01"]) == 3
    assert main(["history", "changes", "--store", str(two_nights / "none")]) == 3
    capsys.readouterr()
    for question in ("flips", "differ", "findings"):
        assert main(["history", question, *where, "--to", "2026-11-24"]) == 0
    assert main(["history", "machine", "nobody", *where]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "no bit flipped from 2026-11-24 to 2026-11-24",
        "no machine's CPUs differ on 2026-11-24",
        "no findings are open on 2026-11-24",
        "no record of 'nobody' up to 2026-11-25",
    ]
    assert main(["ingest", str(two_nights / "none"), *where]) == 3
    assert main(["ingest", str(two_nights / "out"), *where]) == 0
    assert "0 new records, 3 that were there already" in capsys.readouterr().out


def test_a_full_disk_loses_nothing_that_was_there(two_nights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = two_nights / "store"
    before = (store / "2026-11-25.parquet").read_bytes()

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RecordError, match="No space left"):
        store_.write_rows(store_.connect(), [], store / "2026-11-25.parquet")
    assert (store / "2026-11-25.parquet").read_bytes() == before
    assert not list(store.glob(".2026*"))
