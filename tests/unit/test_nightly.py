# SPDX-License-Identifier: MIT
"""A night's end without machines: summary, page, monitor's file, mail, nights that go, and systemd's units."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kernel_harness.lab import commands, history, nightly, nights
from probe import nights as nights_
from probe import record as rec
from probe.arguments import make_parser
from probe.cli import main
from probe.errors import ProbeError, RequirementMissing, UsageError
from probe.masks import ALL_BITS, hex64, parse_hex64
from probe.night import Change, Night, grouped
from probe.report import kcidb_night, night_text, prometheus
from probe.report.page.night import render
from probe.sweep import How, Machine, Swept
from tests.unit.test_nights import INTENT, run, stream, without

QUIET = Night("2026-11-25", "2026-11-24", 16, 16)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two nights: two machines moved by one cause, one is lost, one not seen, one new."""
    for night, files in {
        "2026-11-24": {name: run("2026-11-24") for name in ("same", "moves", "moves-too", "dies", "goes")},
        "2026-11-25": {
            "same": run("2026-11-25"),
            "moves": without(run("2026-11-25"), 0x2),
            "moves-too": without(run("2026-11-25"), 0x2),
            "comes": run("2026-11-25"),
        },
    }.items():
        out = tmp_path / night
        out.mkdir()
        for name, record in files.items():
            (out / f"{name}.json").write_bytes(rec.encode(record))
        if night == "2026-11-25":
            (out / "dies.ndjson").write_bytes(stream(INTENT))
        nights.ingest(out, tmp_path / "store", print, night)
    return tmp_path / "store"


def test_the_planted_changes_and_nothing_else(store: Path) -> None:
    found = history.night(store)
    assert (found.date, found.before, found.machines, found.records) == ("2026-11-25", "2026-11-24", 5, 4)
    (change,) = found.changes
    assert change.hosts == ("moves", "moves-too"), "one cause, one line"
    assert change.what[:2] == ("no longer keeps bits 1 (STIBP)", "#GP on bits 1 (STIBP) now")
    assert (found.lost, found.missing, found.new) == ((("bit 37", "dies"),), (("goes", "2026-11-24"),), ("comes",))
    text = night_text.summary(found)
    assert text.splitlines()[:4] == [
        "night 2026-11-25 against 2026-11-24: 5 machines, 4 records",
        "",
        "2 machines changed, 1 lost, 1 not seen, 1 new",
        "",
    ]
    assert all(len(line) <= 75 and line == line.rstrip() for line in text.splitlines())
    assert "  moves, moves-too: no longer keeps bits 1 (STIBP), #GP on bits 1 (STIBP)" in text
    assert "same" not in text


def test_a_night_without_changes_says_so_and_the_first_has_nothing_to_compare_with() -> None:
    assert night_text.verdict(QUIET) == "nothing changed, nobody is missing"
    assert not QUIET.moved
    assert night_text.verdict(Night("2026-11-25", "", 1, 1)) == "nothing to compare with yet"
    assert night_text.verdict(Night("b", "a", 1, 1, lost=(("bit 1", "x"),))) == "no machine changed, 1 lost"


def test_what_the_night_before_had_to_say_as_well_is_no_news(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "2026-11-26"
    out.mkdir()
    for name in ("same", "comes"):
        (out / f"{name}.json").write_bytes(rec.encode(run("2026-11-26")))
    for name in ("moves", "moves-too"):
        (out / f"{name}.json").write_bytes(rec.encode(without(run("2026-11-26"), 0x2)))
    (out / "dies.ndjson").write_bytes(stream(INTENT))
    nights.ingest(out, store, print, "2026-11-26")
    found = history.night(store)
    assert (found.lost, found.still, found.missing, found.absent) == (
        (),
        (("bit 37", "dies"),),
        (),
        (("goes", "2026-11-24"),),
    )
    assert not found.moved, "no mail"
    text = night_text.summary(found)
    assert "nothing changed, 1 still lost\n" in text
    assert "lost, as the night before: dies\nnot seen for longer: goes (history missing)\n" in text
    page = Page(render(found, [], ""))
    assert "bit 37 (as the night before)" in page.sections["lost"]


def test_machines_on_which_the_same_happened_are_one_line() -> None:
    found = grouped([("b", "run", ("x",)), ("c", "run", ("y",)), ("a", "run", ("x",)), ("a", "kvm", ("x",))])
    assert found[0] == Change("run", ("x",), ("a", "b"))
    assert len(found) == 3


class Page(HTMLParser):
    """The texts of a page by the id of the heading that they follow, and its script and style elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tags: list[str] = []
        self._at = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "h2":
            self._at = dict(attributes).get("id") or ""

    def handle_data(self, data: str) -> None:
        self.sections[self._at] = self.sections.get(self._at, "") + data


def test_the_page_says_what_the_summary_says(store: Path) -> None:
    found = history.night(store)
    rows = nights.rows(store, "2026-11-25")
    page = Page(render(found, rows, nightly.pool(store, "2026-11-25")))
    order = [name for name in page.sections if name in ("changed", "lost", "night-title", "pool")]
    assert order == ["changed", "lost", "night-title", "pool"], "changes come first"
    assert "moves, moves-too" in page.sections["changed"]
    assert "dies" in page.sections["lost"]
    assert "bit 37" in page.sections["lost"]
    assert "goes (last on 2026-11-24)" in page.sections["lost"]
    assert ": 2 machines" in page.sections["night-title"], "machines that are alike share a row"
    assert "rule qemu" in page.sections["pool"]
    text = render(found, rows, "")
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(?!#)', text), "nothing comes from the network"


def test_the_heat_map_of_a_night_has_what_the_rows_have(store: Path) -> None:
    from probe.report.page import heat

    rows = [row for row in nights.rows(store, "2026-11-25") if not row.lost]
    map_ = heat.of_night(rows)
    assert len(map_.rows) == 2, "those that moved, and those that did not"
    columns = {column.mask: at for at, column in enumerate(map_.columns)}
    states = {row.names[1:]: row.cells[0][2 * columns[0x2]] for row in map_.rows}
    assert states == {("moves", "moves-too"): "f", ("comes", "same"): "a"}
    record = run("2026-11-25")
    faults = parse_hex64(record.observations[0].outcomes.fault)
    assert all(row.faults & ~0x2 == faults & ~0x2 for row in rows)


def test_where_nobody_looked_and_what_tells_nothing_is_not_told_as_dropped() -> None:
    """A KVM that let no guest through, and a register whose read-back is not steady (legacy IBRS)."""
    from probe.report.page import heat

    kvm = nights_.lost_row("k", "2026-11-25", "")
    nobody = replace(kvm, kind="kvm", vendor="Intel", accepts=0x6, faults=ALL_BITS & ~0x6, unmeasured=0x6)
    seen = run("2026-11-25")
    for entry in seen.observations:
        kept = parse_hex64(entry.outcomes.retained)
        entry.outcomes.retained, entry.outcomes.unstable = hex64(0), hex64(kept)
    (unsteady, *_) = nights_.rows_of(seen, "u", "2026-11-25", "")
    assert unsteady.odd
    assert unsteady.odd == unsteady.accepts
    map_ = heat.of_night([nobody, unsteady])
    columns = {column.mask: at for at, column in enumerate(map_.columns)}
    states = {row.names[1]: [row.cells[0][2 * columns[bit]] for bit in (0x2, 0x1)] for row in map_.rows}
    assert states["k"] == ["n", "f"]
    assert states["u"][0] == "o"
    assert not any("d" in row.cells[0] for row in map_.rows)


def test_a_change_that_only_the_judge_made_is_told() -> None:
    nothing = dict.fromkeys(("kept_now", "no_longer_kept", "faults_now", "no_longer_faults"), "0x0")
    texts = dict.fromkeys(("status", "explained", "microcode", "kernel", "bios", "lost"), "")
    assert history._told({**nothing, **texts}) == ("the same bits are judged otherwise",)


def test_a_hostile_name_or_reason_stays_text(store: Path) -> None:
    evil = '<script>alert(1)</script>"\x1b[2J'
    night = Night(
        "2026-11-25",
        "2026-11-24",
        1,
        1,
        (Change("run", (evil,), (evil,)),),
        ((evil, evil),),
        ((evil, evil),),
        ((evil, evil),),
        ((evil, evil),),
        (evil,),
        ((evil,) * 4,),
    )
    page = Page(render(night, [], evil))
    assert page.tags.count("script") == 1
    assert "\x1b" not in render(night, [], evil)
    assert "\x1b" not in night_text.summary(night)


def test_the_monitors_file() -> None:
    done = Swept("s", "2026-11-25", "2026-11-25T02:00:00Z", 61.5)
    done.machines = {"a": Machine("a", How.RECORD, 1), "b": Machine("b", How.DIED)}
    night = Night("2026-11-25", "2026-11-24", 2, 1, (Change("run", ("x",), ("a",)),), (("bit 1", "b"),))
    families = {family.name: family for family in text_string_to_metric_families(prometheus.of_night(night, done))}
    told = {
        name: {tuple(sample.labels.values()): sample.value for sample in family.samples}
        for name, family in families.items()
    }
    assert told["spec_ctrl_probe_lab_last_sweep_timestamp_seconds"] == {(): 1795572000.0}
    machines = told["spec_ctrl_probe_lab_machines"]
    assert (machines[("record",)], machines[("died",)], machines[("unreached",)]) == (1, 1, 0)
    assert told["spec_ctrl_probe_lab_changed_machines"] == {(): 1.0}
    assert set(told) == {f"spec_ctrl_probe_{name}" for name, _ in prometheus._LAB}


def test_kcidb_has_one_test_for_each_machine(store: Path) -> None:
    kcidb_io = pytest.importorskip("kcidb_io", reason="kcidb-io needs Python 3.10")
    nightly.conclude(store, "2026-11-25", "", 2, "our_lab")
    document = json.loads((store / "2026-11-25.kcidb").read_text())
    kcidb_io.schema.LATEST.validate(document)
    tests = {test["environment"]["misc"]["platform"]: test for test in document["tests"]}
    assert len(tests) == len(document["tests"]) == 5
    assert (tests["dies"]["status"], tests["dies"]["log_excerpt"]) == ("ERROR", "bit 37")
    (group,) = tests["moves"]["misc"]["spec_ctrl"]["groups"]
    row = next(row for row in nights.rows(store, "2026-11-25") if row.host == "moves")
    assert (int(group["faults"], 16), int(group["wrong"], 16)) == (row.faults, row.wrong)
    assert tests["same"]["status"] in ("PASS", "FAIL")
    never = nights.rows(store, "2026-11-25")[:1]
    assert json.loads(kcidb_night.render([], "lab"))["tests"] == []
    lost = nights_.lost_row("x", "2026-11-25", "not reached: ssh: connect to host")
    miss = json.loads(kcidb_night.render([*never, lost], "lab"))
    kcidb_io.schema.LATEST.validate(miss)
    assert [test["status"] for test in miss["tests"] if test["environment"]["misc"]["platform"] == "x"] == ["MISS"]


def test_old_nights_go_whole(store: Path) -> None:
    _, removed = nightly.conclude(store, "2026-11-25", "sweep\n\n", keep=2)
    assert removed == []
    assert (store / "2026-11-25.txt").read_text().startswith("sweep\n\nnight 2026-11-25 against 2026-11-24")
    (store / "2026-11-24.html").touch()
    (store / "notes-2026-11-24.txt").touch()
    assert nightly.prune(store, 1) == ["2026-11-24"]
    assert sorted(path.name for path in store.iterdir() if not path.name.startswith(".")) == [
        "2026-11-25",
        "2026-11-25.html",
        "2026-11-25.parquet",
        "2026-11-25.txt",
        "notes-2026-11-24.txt",
    ]
    with pytest.raises(UsageError):
        nightly.prune(store, 0)


def test_a_mail_goes_to_sendmail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sendmail"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\ncat > {tmp_path}/mail\n[ ! -e {tmp_path}/full ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    nightly.send("lab@example.com", "night\nBcc: x@example.com", "text\n")
    head, _, body = (tmp_path / "mail").read_text().partition("\n\n")
    assert body == "text\n"
    assert "Subject: night Bcc: x@example.com" in head.splitlines(), "one line, whatever is in it"
    assert (tmp_path / "given").read_text() == "-t -i\n"
    (tmp_path / "full").touch()
    with pytest.raises(ProbeError, match="took no mail"):
        nightly.send("lab@example.com", "night", "text\n")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(RequirementMissing, match="no sendmail"):
        nightly.send("lab@example.com", "night", "text\n")


# --- systemd ---------------------------------------------------------------------------------------------------------


def made(tmp_path: Path, *, user: bool, at: str = "02:00", words: tuple[str, ...] = ()) -> nightly.Units:
    own = ["-i", f"{tmp_path}/lab.ini", "--store", f"{tmp_path}/nights", *words]
    return nightly.units(own, tmp_path, user=user, run_as="root", at=at, textfile="")


@pytest.mark.parametrize("user", [True, False])
def test_systemd_takes_the_units(tmp_path: Path, user: bool) -> None:
    found = made(tmp_path, user=user, words=("--limit", "lab[1:3]:!x$y%z \"q\" 'r' \\;"))
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    assert nightly.verify(found, user=user) == ""
    assert "SuccessExitStatus=1" in found.service
    assert "OnCalendar=02:00" in found.timer
    assert ("User=root" in found.service) == (not user)
    broken = nightly.Units(found.folder, found.service.replace("Type=oneshot", "ExecStart=relative"), found.timer)
    with pytest.raises(UsageError, match="does not take these units"):
        nightly.verify(broken, user=user)


def test_a_time_that_is_none(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    with pytest.raises(UsageError, match="does not take these units"):
        nightly.verify(made(tmp_path, user=True, at="at night"), user=True)


def test_words_of_a_command_line_of_systemd() -> None:
    assert nightly._quoted("plain") == "plain"
    assert nightly._quoted("100%") == "100%%"
    assert nightly._quoted("a b") == '"a b"'
    assert nightly._quoted('$x "y"') == '"$$x \\"y\\""'


def test_what_install_asks_for_is_what_run_understands(tmp_path: Path) -> None:
    given = ["-i", "x,y", "--store", "n", "--limit", "a", "--forks", "7", "--host-timeout", "9.5", "--canary", "5%"]
    given += [
        "--kernel",
        "6.1",
        "--keep",
        "30",
        "--mail",
        "a@b",
        "--kcidb",
        "lab",
        "--write",
        "--no-become",
        "--",
        "--bits",
        "0-2",
    ]
    parser = make_parser()
    asked = parser.parse_args(["nightly", "install", "--user", *given])
    words = commands._for_run(asked, ["x,y"], tmp_path)
    again = parser.parse_args(["nightly", "run", *words])
    assert again.store == str(tmp_path)
    for name in (
        "inventory",
        "limit",
        "forks",
        "host_timeout",
        "canary",
        "kernel",
        "keep",
        "mail",
        "write",
        "no_become",
    ):
        assert getattr(again, name) == getattr(asked, name), name
    assert again.run_arguments == ["--bits", "0-2"]


def test_a_user_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no user nobody-at-all"):
        nightly.units([], tmp_path, user=False, run_as="nobody-at-all", at="02:00", textfile="")


def test_bad_wishes_are_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["-i", "x,", "--store", str(tmp_path / "s")]
    assert main(["nightly", "run", *where, "--keep", "0"]) == 2
    assert main(["nightly", "run", *where, "--textfile", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"


EVIDENCE = Path(__file__).parents[2] / "results/lab-two-nights"


def test_the_nights_in_results_are_what_their_records_say(tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(EVIDENCE, store, ignore=shutil.ignore_patterns("*.prom"))
    nights.ingest(store, store, print)
    before, date = nights.nights_of(store)
    (change,) = history.night(store).changes
    assert change.hosts == ("lab8",), "the one planted change"
    for one in (before, date):
        text = (EVIDENCE / f"{one}.txt").read_text(encoding="utf-8")
        assert text.endswith(night_text.summary(history.night(store, one)))
        nightly.conclude(store, one, text.partition("night ")[0], 365, "spec_ctrl_probe")
        for ending in (".txt", ".html", ".kcidb"):
            shown = (EVIDENCE / f"{one}{ending}").read_text(encoding="utf-8")
            assert (store / f"{one}{ending}").read_text(encoding="utf-8") == shown, f"{one}{ending}"
    assert len(list(EVIDENCE.glob("*/records/*.json"))) == 26


def test_another_stores_nights_stay_those_nights(tmp_path: Path) -> None:
    """All of these records were started on one day."""
    done = nights.ingest(EVIDENCE, tmp_path / "merged", print)
    assert (done.new, done.lost, done.bad) == (26, {}, [])
    (change,) = history.night(tmp_path / "merged").changes
    assert change.hosts == ("lab8",)
