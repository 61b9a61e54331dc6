# SPDX-License-Identifier: MIT
"""A lab's nights: what comes of any engine's output, each record once, and what can be asked of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernel_harness.lab import history
from kernel_harness.lab import nights as store_
from probe import kvm_record, nights
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


def asked(lab: Path, question: str, **more: Any) -> list[dict[str, Any]]:
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
        "refused": "it said: not root",
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
    assert set(done.lost) == {"cut", "newer"}, "no record of either is in the night"
    assert done.lost["newer"].startswith("its record was set aside: ")


def test_a_matrix_with_a_cpuid_bit_that_is_not_known_is_set_aside(lab: Path) -> None:
    document = json.loads(KVM.read_bytes())
    document["rows"][0]["profiles"].append("NEW_BIT")
    done = taken(lab, newer=json.dumps(document).encode(), good=rec.encode(run()))
    assert [one.file for one in done.bad] == ["newer"]
    assert "'NEW_BIT'" in done.bad[0].why
    assert len(done.rows) == 1


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


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": ["x"]}',
        b'{"event": {"x": 1}}',
        b'{"event": "record", "record": {"x": "\\ud800"}}',
        b'{"event": "intent", "step": "bit \\ud800 \\u0000 \\u001b"}',
        b'{"event": "error", "message": "\\ud800"}',
        b"[" * 5000,
        b"NaN",
        b"\x00\xff",
    ],
)
def test_no_line_of_one_machine_costs_another(line: bytes, lab: Path) -> None:
    done = taken(lab, good=rec.encode(run()), bad=line + b"\n")
    assert done.new == 1
    assert set(done.lost) == {"bad"}
    assert taken(lab, good=rec.encode(run(hour=3))).new == 1, "nor the night"
    assert {row["host"] for row in asked(lab, "missing")} == {"bad"}


def test_numbers_that_no_column_holds_are_set_aside(lab: Path) -> None:
    done = taken(lab, good=rec.encode(run()), bad=rec.encode(run(family=1 << 40)))
    assert (done.new, [one.file for one in done.bad]) == (1, ["bad"])
    ahead = taken(lab, good=rec.encode(run()), ahead=rec.encode(run("2099-01-01")))
    assert "its clock is ahead" in ahead.bad[0].why
    assert ahead.dates == {"2026-11-25"}


def test_a_machine_is_lost_until_a_later_run_gives_a_record(lab: Path) -> None:
    good = rec.encode(run())
    taken(lab, good=good, one=rec.encode(run(hour=1)))
    taken(lab, good=good, one=stream({"event": "start"}, INTENT))
    lost = [{"host": "one", "what": "lost: bit 37", "last_night": "2026-11-25"}]
    assert asked(lab, "missing") == lost, "it had a record, and died after it"
    taken(lab, one=rec.encode(run(hour=1)))
    assert asked(lab, "missing") == lost, "an old record is no sign of life"
    taken(lab, one=rec.encode(run(hour=2)))
    assert asked(lab, "missing") == []


def test_a_record_before_a_step_does_not_hide_it(lab: Path) -> None:
    done = taken(lab, one=stream({"event": "start"}, record=run()) + stream({"event": "start"}, INTENT))
    assert (done.new, done.lost) == (1, {"one": "bit 37"})


def test_what_an_agent_said_at_a_step_is_kept(lab: Path) -> None:
    failed = {"event": "error", "exit_code": 5, "message": "CPU 3: register 0x48 could not be put back"}
    done = taken(lab, good=rec.encode(run()), one=stream(INTENT, failed))
    assert done.lost == {"one": "bit 37, then it said: CPU 3: register 0x48 could not be put back"}


def test_what_a_power_cut_left_is_mended(lab: Path) -> None:
    raw = rec.encode(run())
    taken(lab, one=raw)
    folder = lab / "store/2026-11-25/records"
    (kept,) = folder.iterdir()
    (folder / f".{kept.name}.new").write_bytes(b"")
    (folder / ".x-0123456789abcdef.json").write_bytes(b"")
    kept.write_bytes(b"\0" * len(raw))
    (folder / "two-0123456789abcdef.json").write_bytes(b"{")
    done = taken(lab, one=raw)
    assert (done.new, kept.read_bytes()) == (1, raw)
    assert [one.file for one in done.bad] == ["2026-11-25/records/two-0123456789abcdef.json"]
    assert asked(lab, "sql", sql="SELECT DISTINCT host FROM runs") == [{"host": "one"}]


def test_parquet_is_made_again_from_the_records(lab: Path) -> None:
    taken(lab, one=rec.encode(run()), two=stream(INTENT))
    for path in (lab / "out").iterdir():
        path.unlink()
    (lab / "store" / "2026-11-25.parquet").unlink()
    done = store_.ingest(lab / "out", lab / "store", lambda text: None)
    assert done.dates == {"2026-11-25"}
    assert {row["host"] for row in asked(lab, "sql", sql="SELECT host FROM runs")} == {"one", "two"}
    with pytest.raises(RecordError, match="no file in"):
        store_.ingest(lab / "out", lab / "store", lambda text: None)


def test_a_folder_below_the_store_and_another_store_are_taken_in(lab: Path) -> None:
    (lab / "store" / "out").mkdir(parents=True)
    (lab / "store" / "out" / "one").write_bytes(rec.encode(run()))
    assert store_.ingest(lab / "store" / "out", lab / "store", lambda text: None).new == 1
    (lab / "store" / "out" / "one").unlink()
    assert store_.ingest(lab / "store", lab / "other", lambda text: None).new == 1
    assert [row.host for row in store_.rows(lab / "other", "2026-11-25")] == ["one"]


def test_a_night_of_its_own_name_takes_all_and_counts_nothing_twice(lab: Path) -> None:
    (lab / "out" / "one").write_bytes(rec.encode(run("2026-11-24", 23)))
    (lab / "out" / "two").write_bytes(rec.encode(run("2026-11-25", 0)))
    assert store_.ingest(lab / "out", lab / "store", lambda text: None, "2026-11-25").dates == {"2026-11-25"}
    again = store_.ingest(lab / "out", lab / "store", lambda text: None)
    assert (again.new, again.again, again.dates) == (0, 2, {"2026-11-25"})


def test_what_no_guest_of_a_kvm_was_let_through_to_see_is_unmeasured() -> None:
    record = kvm_record.decode(KVM.read_bytes(), "it")
    (row,) = nights.rows_of(record, "h", "2026-11-25", "0" * 64)
    assert (row.accepts, row.faults, row.unmeasured) == (ALL_BITS, 0, 0)
    record.hardware.valid = hex64(0)
    record.hardware.tested = hex64(0x7)
    (row,) = nights.rows_of(record, "h", "2026-11-25", "0" * 64)
    assert (row.accepts, row.retained, row.unmeasured) == (0x7, 0, 0x7)


def test_a_file_that_is_none_of_ours_is_told_once(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lab / "out" / "good").write_bytes(rec.encode(run()))
    (lab / "out" / "README.md").write_text("a\nb\nc\n")
    assert main(["ingest", str(lab / "out"), "--store", str(lab / "store")]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "aside README" in line]
    assert told == ["  aside README.md:1 and 2 more: no JSON"]


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
    assert (change["host"], change["no_longer_kept"], change["faults_now"]) == ("moves", "0x2", "0x2")
    assert (change["kept_now"], change["no_longer_faults"]) == ("0x0", "0x0")
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


def measured(record: rec.Record, mask: int) -> rec.Record:
    """The same run, of which only these bits were tried."""
    for entry in record.observations:
        for name in ("retained", "dropped", "altered", "fault", "unstable"):
            setattr(entry.outcomes, name, hex64(int(getattr(entry.outcomes, name), 16) & mask))
        entry.outcomes.absent = hex64(ALL_BITS & ~mask)
    return record


def test_a_bit_that_was_not_measured_has_not_changed(lab: Path) -> None:
    taken(lab, one=rec.encode(run("2026-11-23")))
    taken(lab, one=rec.encode(measured(run("2026-11-24"), 0x3)))
    assert asked(lab, "changes") == []
    assert asked(lab, "flips") == []
    taken(lab, one=rec.encode(measured(without(run("2026-11-25"), 0x2), 0x3)))
    (flip,) = asked(lab, "flips")
    assert (flip["no_longer_kept"], flip["faults_now"], flip["kept_now"]) == ("0x2", "0x2", "0x0")


def test_a_machine_that_merely_died_changed_no_bit(lab: Path) -> None:
    taken(lab, one=rec.encode(run("2026-11-24")), two=rec.encode(run("2026-11-24")))
    taken(lab, one=stream({"event": "start"}, INTENT), two=rec.encode(run("2026-11-25")))
    (change,) = asked(lab, "changes")
    assert (change["host"], change["lost"], change["no_longer_kept"]) == ("one", "bit 37", "0x0")
    assert change["microcode"] == change["kernel"] == change["bios"] == ""
    assert asked(lab, "flips") == []


def test_findings_are_bits_and_each_has_its_age(lab: Path) -> None:
    def wrong(night: str, mask: int, hour: int = 2) -> bytes:
        record = run(night, hour)
        for verdict in record.verdicts:
            if verdict.model == record.judge:
                verdict.unexpected_fault = hex64(mask)
                verdict.as_predicted = hex64(int(verdict.as_predicted, 16) & ~mask)
        return rec.encode(without(record, mask))

    for day, mask in enumerate((0x2, 0x2, 0x2, 0x4), 21):
        taken(lab, one=wrong(f"2026-11-{day}", mask), two=wrong(f"2026-11-{day}", 0x2 | (0x4 if day == 24 else 0)))
    found = {(row["host"], row["bits"]): row["since"] for row in asked(lab, "findings")}
    assert found == {("one", "2"): "2026-11-24", ("two", "1"): "2026-11-21", ("two", "2"): "2026-11-24"}
    taken(lab, three=wrong("2026-11-24", 0x7F))
    assert [row["bits"] for row in asked(lab, "findings") if row["host"] == "three"] == ["0-6"]
    taken(lab, three=rec.encode(run("2026-11-24", 5)))
    taken(lab, one=rec.encode(run("2026-11-24", 5)), two=rec.encode(run("2026-11-24", 5)))
    assert asked(lab, "findings") == [], "mended the same night"


def test_the_path_of_a_store_is_no_pattern(tmp_path: Path) -> None:
    for name in ("s*x", "s?x", "s[1]x", "s'x"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "one").write_bytes(rec.encode(run()))
        store_.ingest(tmp_path / "out", tmp_path / name, lambda text: None)
    for name in ("s*x", "s?x", "s[1]x", "s'x"):
        answer = history.ask(tmp_path / name, "sql", sql="SELECT count(*) FROM runs")
        assert answer.rows == ((1,),)


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
    assert json.loads(capsys.readouterr().out)[0]["no_longer_kept"] == "0x2"
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
