# SPDX-License-Identifier: MIT
"""A sweep without machines: what is counted, said, planned, kept and gone on with; and Ansible's module alone."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kernel_harness.lab import answers, commands, engine, nights, reasons, sweep
from kernel_harness.lab.engine import sources
from probe.cli import main
from probe.errors import ExitCode, UsageError
from probe.nights import read
from probe.report import night_text
from probe.sweep import How, Machine, Swept, Tally, canaries, event, folded, machine

MODULE = Path(sweep.__file__).parent / "playbook/library/spec_ctrl_probe.py"


def swept(*machines: Machine, stopped: str = "") -> Swept:
    done = Swept("s", "2026-11-28", "2026-11-28T02:00:00Z", 12.4, stopped=stopped)
    done.machines = {one.host: one for one in machines}
    return done


FINE = Machine("lab1", How.RECORD, 0)


@pytest.mark.parametrize(
    ("machines", "code"),
    [
        ([FINE], ExitCode.AS_PREDICTED),
        ([FINE, Machine("b", How.RECORD, 1)], ExitCode.FINDINGS),
        ([FINE, Machine("b", How.REFUSED, 4)], ExitCode.REQUIREMENT_MISSING),
        ([Machine("a", How.RECORD, 1), Machine("b", How.UNREACHED)], ExitCode.FAILED),
        ([FINE, Machine("b", How.DIED)], ExitCode.FAILED),
        ([FINE, Machine("b", How.UNTRIED)], ExitCode.FAILED),
        ([Machine("a", How.RECORD, 5), Machine("b", How.GONE)], ExitCode.NOT_RESTORED),
    ],
)
def test_the_worst_machine_makes_the_exit_code(machines: Sequence[Machine], code: ExitCode) -> None:
    assert swept(*machines).code() == code


def test_a_sweep_that_was_stopped_is_no_success() -> None:
    assert swept(FINE, stopped="no room").code() == ExitCode.FAILED


def test_a_machine_comes_back_as_it_was_written() -> None:
    one = Machine("lab 1\n", How.DIED, 3, "bit 37", 'it said "x"', 1.5, True)
    assert machine(one.as_json()) == one
    assert one.told() == 'bit 37, then it said "x"'
    for bad in ("[]", "{}", '{"host": "a", "how": "well"}', "no"):
        with pytest.raises((ValueError, KeyError, TypeError)):
            machine(bad)


def test_what_a_sweep_says_of_a_lost_machine_is_what_ingest_reads() -> None:
    one = Machine("lab1", How.DIED, step="bit 37", why="the machine went down and came back")
    said = read(json.dumps(event(one)).encode())
    assert (said.last_step, said.ended, said.bad) == ("bit 37", "the machine went down and came back", ())


def test_progress_in_a_line() -> None:
    assert Tally(16, 6, 1, 1, 8, 10.0).line() == "6 done, 1 failed, 1 lost, 8 running of 16, about 10 s left"
    assert Tally(0, 0, 0, 0, 3, 0.1).line() == "0 done, 0 failed, 0 lost, 3 running"
    assert Tally(2, 2, 0, 0, 0, 3.0).line() == "2 done, 0 failed, 0 lost, 0 running of 2"


def test_canaries_are_of_every_model() -> None:
    cpus = {f"a{number:02}": "Intel" for number in range(40)} | {"b1": "AMD", "c1": ""}
    assert canaries(cpus, 0.05) == ["a00", "a01", "b1", "c1"]
    assert canaries(cpus, 0.051) == ["a00", "a01", "a02", "b1", "c1"]
    assert canaries(cpus, 1.0) == sorted(cpus)
    assert canaries({}, 0.5) == []


def test_many_names_are_folded() -> None:
    assert folded(["b", "a"]) == "a, b"
    assert folded(f"m{number:02}" for number in range(14)).endswith("m11 and 2 more")


def test_the_mail_of_a_sweep() -> None:
    text = night_text.swept(
        swept(
            FINE,
            Machine("lab2", How.DIED, step="bit 37", why="the machine went down and came back"),
            Machine("lab3", How.UNREACHED, why="not reached: ssh: connect to host lab3 port 22: No route to host"),
            Machine("lab4", How.UNREACHED, why="not reached: ssh: connect to host lab3 port 22: No route to host"),
            Machine("lab5", How.RECORD, 5),
            Machine("lab6\x1b[2J", How.UNTRIED),
            stopped="no room",
        )
    )
    assert text == (
        "sweep of 2026-11-28T02:00:00Z: 6 machines, 12 s\n"
        "\n"
        "2 gave a record, 1 went down under the probe, 2 not reached, 1 not asked,\n"
        "or not kept\n"
        "stopped: no room\n"
        "\n"
        "REGISTER NOT PUT BACK, or not shown to be:\n"
        "  lab5: see its record\n"
        "\n"
        "went down under the probe:\n"
        "  lab2: bit 37, then the machine went down and came back\n"
        "\n"
        "not reached:\n"
        "  lab3, lab4: ssh: connect to host lab3 port 22: No route to host\n"
        "\n"
        "not asked, or not kept:\n"
        "  lab6?[2J: the same command, or --retry, takes them\n"
    )


@pytest.mark.parametrize("name", ["lab1", "lab1.example.com", "a b", "../x", ".hidden", "x.json", "ü", "n" * 300])
def test_each_machine_has_a_file_of_its_own_and_keeps_its_name(name: str) -> None:
    file = nights.file_name(name)
    assert "/" not in file
    assert not file.startswith(".")
    assert nights.host_of(f"{file}.ndjson") == file
    assert (file == name) == (name in ("lab1", "lab1.example.com"))
    assert nights.file_name(f"{name}!") != file


def test_an_inventory_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no inventory x"):
        sources(["x"])
    assert sources(["a,b"]) == ["a,b"]
    assert main(["sweep", "-i", str(tmp_path / "x"), "--store", str(tmp_path / "s"), "--check"]) == 2
    assert "no inventory" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (["--bits", "99"], "run would not take --bits 99: .*99"),
        (["--nonsense"], "run would not take --nonsense: unrecognized"),
        (["--help"], "run would not take --help: it asks for help"),
        (["--json"], "run's json is the sweep's own"),
        (["--record", "x"], "run's record is the sweep's own"),
        (["--in", "guest"], "run's place is the sweep's own"),
    ],
)
def test_what_the_agent_would_not_take_is_told_before_any_machine_is_touched(
    own: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "-i", "x,", "--store", str(tmp_path / "s"), "--", *own]) == 2
    assert re.search(why, capsys.readouterr().err)
    commands._check_run(["--write", "--bits", "0-2", "--pairs"])


def test_a_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "101", "x", "-5%", "nan"):
        with pytest.raises(SystemExit):
            main(["sweep", "-i", "x,", "--canary", text])
    capsys.readouterr()


# --- the store's folder of a sweep -----------------------------------------------------------------------------------


def folder(store: Path, *machines: Machine, ended: str = "", name: str = "20261128T020000Z-0000") -> answers.Folder:
    place = store / "sweeps" / name
    (place / "hosts").mkdir(parents=True)
    made = answers.Folder(place, {"hosts": ["a", "b", "c"], "ended": ended, "started": "2026-11-28T02:00:00Z"})
    made.save()
    for one in machines:
        made.keep(one, ['{"event": "start"}'])
    return made


def test_what_a_sweep_kept_is_read_again_but_for_a_line_that_was_cut(tmp_path: Path) -> None:
    made = folder(tmp_path, Machine("a", How.RECORD, 0), Machine("b", How.FAILED, 3, "bit 1", "it said: x"))
    with open(made.path / "results.ndjson", "a", encoding="utf-8") as file:
        file.write('{"host": "c", "how')
    (found,) = answers.folders(tmp_path)
    assert {host: one.how for host, one in found.answered.items()} == {"a": How.RECORD, "b": How.FAILED}
    assert (made.path / "hosts/a.ndjson").read_text() == '{"event": "start"}\n'
    assert read((made.path / "hosts/b.ndjson").read_bytes()).ended == "it said: x"


def test_retry_takes_those_without_a_record(tmp_path: Path) -> None:
    wish = sweep.Wish(("a,",), tmp_path, retry=True)
    with pytest.raises(UsageError, match="no sweep in"):
        sweep._to_retry(wish, None, ["a"])
    made = folder(tmp_path, Machine("a", How.RECORD, 0), Machine("b", How.FAILED))
    assert sweep._to_retry(wish, made, ["a", "b", "c", "new"]) == ["b", "c"], "c was not tried, new was not in it"


def test_the_stores_own_files_are_no_machines(tmp_path: Path) -> None:
    folder(tmp_path / "old", Machine("a", How.FAILED, 3, "bit 1", "it said: x"))
    (tmp_path / "old/sweeps/.lock").touch()
    done = nights.ingest(tmp_path / "old/sweeps/20261128T020000Z-0000/hosts", tmp_path / "old", print, "2026-11-28")
    assert done.lost == {"a": "bit 1, then it said: x"}
    (tmp_path / "old/note.json").write_text("{}")
    other = nights.ingest(tmp_path / "old", tmp_path / "new", print, "2026-11-28")
    assert {one.file for one in other.bad} == {"note.json"}
    assert set(other.lost) == {"note"}


def test_words_of_a_failed_task() -> None:
    ansible = "Module result deserialization failed: No start of json char found"
    answered = {"msg": ansible, "module_stdout": "x\r\n/bin/sh: 1: python3: not found\r\n", "module_stderr": ""}
    assert reasons.said_of_failure(answered) == "it answered: /bin/sh: 1: python3: not found"
    assert reasons.said_of_failure({"msg": "Task failed: Missing sudo password"}) == "Missing sudo password"
    assert reasons.said_of_failure({}) == "it said nothing"
    unreached = {
        "msg": "Task failed: Failed to connect to the host via ssh: @@@\r\nwarned\r\nHost key verification failed."
    }
    assert reasons.ssh_said(unreached) == "warned Host key verification failed."
    gone = 'Task failed: Data could not be sent to remote host "lab5". Make sure this host can be reached over ssh: '
    assert reasons.ssh_said({"msg": gone}) == ""


@pytest.mark.parametrize(
    ("result", "answer"),
    [
        ({"msg": "The module interpreter 'python3' was not found.", "rc": 127, "module_stderr": "x"}, True),
        ({"msg": "ansible-core requires a minimum of Python version 3.8. Current version: 3.6.8"}, True),
        ({"msg": "MODULE FAILURE", "module_stderr": "Traceback ...", "module_stdout": "", "rc": 1}, True),
        ({"msg": "Python 3.8 is here; the agent needs 3.9 to 3.13", "invocation": {}}, False),
        ({"msg": "Missing sudo password"}, False),
        ({"msg": "MODULE FAILURE", "module_stderr": "sudo: a password is required\n", "rc": 1}, False),
        ({"msg": "/bin/sh: 1: sudo: not found", "module_stderr": "/bin/sh: 1: sudo: not found", "rc": 127}, False),
        ({"msg": "Incorrect su password"}, False),
        ({"msg": "action failed to execute in the expected time frame (7) and was terminated"}, False),
        ({"msg": "Timed out after 7 second(s).", "timedout": {"period": 7}}, False),
    ],
)
def test_what_another_python_may_mend(result: dict[str, Any], answer: bool) -> None:
    assert reasons.never_began(result) is answer


def test_where_the_users_configuration_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    own = tmp_path / "home/x.cfg"
    own.write_text("[defaults]\ninterpreter_python = auto ; quietly\n")
    (tmp_path / "home/ansible.cfg").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for told, found in (("~/x.cfg", own), (str(tmp_path / "home"), tmp_path / "home/ansible.cfg")):
        monkeypatch.setenv("ANSIBLE_CONFIG", told)
        assert engine.configuration() == found
    monkeypatch.setenv("ANSIBLE_CONFIG", "~/x.cfg")
    assert engine._of_user("NO_SUCH_VARIABLE", "defaults", "interpreter_python", "") == "auto"


def test_names_that_a_play_tells() -> None:
    assert engine._names('["lab1", "b\\u00e4r"]') == ["lab1", "b\u00e4r"]
    assert engine._names("all") == engine._names("['lab1']") == engine._names('"x"') == engine._names(None) == []


# --- Ansible's module ------------------------------------------------------------------------------------------------

STUB = b"""import json, os, sys, time
print(json.dumps({"event": "start", "host": 1}), flush=True)
for bit in range(3):
    print(json.dumps({"event": "intent", "step": f"bit {bit}"}), flush=True)
if "wait" in sys.argv:
    open("waiting", "w").close()
    time.sleep(60)
if "die" in sys.argv:
    os.kill(os.getpid(), 9)
print(json.dumps({"event": "record", "record": {}}))
print("a line on stderr", file=sys.stderr)
sys.exit(1)
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Load the module as Ansible would, with a stub for an agent."""
    basic = types.ModuleType("ansible.module_utils.basic")
    basic.AnsibleModule = object  # type: ignore[attr-defined]
    carried = types.ModuleType("ansible.module_utils.spec_ctrl_agent")
    carried.AGENT = base64.b64encode(STUB).decode()  # type: ignore[attr-defined]
    carried.SHA256 = hashlib.sha256(STUB).hexdigest()  # type: ignore[attr-defined]
    for one in (types.ModuleType("ansible"), types.ModuleType("ansible.module_utils"), basic, carried):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    spec = importlib.util.spec_from_file_location("spec_ctrl_probe_module", MODULE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    yield loaded


def events(result: dict[str, Any]) -> list[str]:
    return [json.loads(line)["event"] for line in result["events"]]


def test_the_module_runs_the_agent_once_a_sweep(module: Any, tmp_path: Path) -> None:
    first = module.answer("one", [], 30, tmp_path)
    assert (first["how"], first["exit_code"], first["again"]) == ("ended", 1, False)
    assert events(first) == ["start", "record"]
    assert first["said"] == ["a line on stderr"]
    second = module.answer("one", [], 30, tmp_path)
    assert second["again"]
    assert {**second, "again": False, "seconds": 0} == {**first, "seconds": 0}
    other = module.answer("two", [], 30, tmp_path)
    assert not other["again"]
    assert {path.name for path in (tmp_path / "sweeps").iterdir()} == {"one", "two"}, "another controller's, perhaps"
    os.utime(tmp_path / "sweeps/one", (0, 0))
    module.answer("three", [], 30, tmp_path)
    assert {path.name for path in (tmp_path / "sweeps").iterdir()} == {"two", "three"}, "what is of another day is gone"
    assert len(list(tmp_path.glob("agent-*.pyz"))) == 1


def test_the_module_tells_of_an_agent_that_was_killed(module: Any, tmp_path: Path) -> None:
    found = module.answer("one", ["die"], 30, tmp_path)
    assert (found["how"], found["exit_code"]) == ("ended", 137)
    assert events(found) == ["start", "intent"]
    assert json.loads(found["events"][-1])["step"] == "bit 2"


def test_the_module_stops_an_agent_that_takes_too_long(module: Any, tmp_path: Path) -> None:
    found = module.answer("one", ["wait"], 0.5, tmp_path)
    assert (found["how"], found["exit_code"]) == ("too-long", 143)
    assert events(found) == ["start", "intent"]


def test_the_module_tells_of_a_machine_that_went_down(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal on the disk knows more than the stream, which nobody synced."""
    module.answer("one", ["die"], 30, tmp_path)
    boot = module.boot_id()
    (tmp_path / "sweeps/one/exit").unlink()
    saved = {"ev": "saved", "boot_id": boot}
    lines = [saved, *({"ev": "intent", "step": f"bit {bit}"} for bit in range(38))]
    text = "".join(f"{json.dumps(line)}\n" for line in lines) + '{"ev": "inte'
    (tmp_path / "journal.ndjson").write_text(text)
    monkeypatch.setattr(module, "boot_id", lambda: "another boot")
    found = module.answer("one", [], 30, tmp_path)
    assert (found["how"], found["step"]) == ("died", "bit 37")
    (tmp_path / "journal.ndjson").write_text(text.replace(boot, "a third boot"))
    assert module.answer("one", [], 30, tmp_path)["step"] == "", "a journal of another run"
    (tmp_path / "journal.ndjson").write_text(text.replace('{"ev": "inte', '{"ev": "restored"}\n'))
    assert module.answer("one", [], 30, tmp_path)["step"] == "", "it was past its last step"


def test_a_run_that_had_ended_when_the_machine_went_down_is_no_death(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = module.answer("one", [], 30, tmp_path)
    monkeypatch.setattr(module, "boot_id", lambda: "another boot")
    second = module.answer("one", [], 30, tmp_path)
    assert (second["how"], second["events"]) == ("ended", first["events"])


def test_two_names_of_one_machine_are_one_run(module: Any, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: module.answer("one", [], 30, tmp_path), range(8)))
    assert sorted(one["again"] for one in found) == [False] + [True] * 7
    assert len({tuple(one["events"]) for one in found}) == 1


def test_a_start_that_came_to_nothing_is_made_good(module: Any, tmp_path: Path) -> None:
    (tmp_path / "sweeps/one").mkdir(parents=True)
    module.STARTING = 0.1
    assert module.answer("one", [], 30, tmp_path)["again"] is False
    module.AGENT = "####"
    for old in tmp_path.glob("agent-*"):
        old.unlink()
    with pytest.raises(module.Missing):
        module.answer("two", [], 30, tmp_path)
    assert not (tmp_path / "sweeps/two").exists(), "the next try may begin"


def test_a_module_without_the_agent_asks_for_it_and_leaves_nothing(module: Any, tmp_path: Path) -> None:
    carried, module.AGENT = module.AGENT, ""
    assert module.answer("one", [], 30, tmp_path) == {"how": "needs-agent"}
    assert list((tmp_path / "sweeps").iterdir()) == []
    module.AGENT = carried
    assert module.answer("one", [], 30, tmp_path)["again"] is False
    module.AGENT = ""
    assert module.answer("two", [], 30, tmp_path)["how"] == "ended", "it is there now"
    assert module.answer("one", [], 30, tmp_path)["again"], "an answer needs none"
    for old in tmp_path.glob("agent-*"):
        old.write_bytes(b"damaged")
    assert module.answer("three", [], 30, tmp_path) == {"how": "needs-agent"}


def test_the_module_keeps_no_agent_that_came_through_damaged(module: Any, tmp_path: Path) -> None:
    module.AGENT = base64.b64encode(STUB + b"#").decode()
    with pytest.raises(module.Missing, match="damaged"):
        module.answer("one", [], 30, tmp_path)


def test_the_module_is_read_by_old_pythons() -> None:
    """Python 3.6: no walrus, no positional-only parameters, no subscripted builtins."""
    import ast

    ast.parse(MODULE.read_text(encoding="utf-8"), feature_version=(3, 6))
    assert "annotations" not in MODULE.read_text(encoding="utf-8")
