# SPDX-License-Identifier: MIT
"""What a sweep does with what its engine tells: canaries, interrupts, machines that went away, what is kept. The engine
is a script; the store, and what is taken into it, are real."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kernel_harness.lab import history, nights, sweep
from probe import record as rec
from probe.errors import ExitCode, ProbeError, UsageError
from probe.sweep import How, Swept
from tests.unit.test_nights import run

HOSTS = [f"h{number:02}" for number in range(1, 21)]
Event = Callable[[str, dict[str, Any]], None]
Script = Callable[[str, list[str], Event], None]


class Engine:
    """Plays a script; plays is what was asked of it, light which of those went without the agent."""

    script: Script = staticmethod(lambda name, hosts, event: None)
    plays: ClassVar[list[tuple[str, list[str]]]] = []
    light: ClassVar[list[bool]] = []

    def __init__(self, *_: object) -> None:
        self.stopped = ""
        self.hosts: list[str] = []

    def stop(self, why: str) -> None:
        self.stopped = self.stopped or why

    def play(self, name: str, hosts: Sequence[str] | None, event: Event, *, known: bool = False) -> None:
        self.hosts = asked = HOSTS if hosts is None else list(hosts)
        Engine.light.append(known)
        Engine.plays.append((name, asked))
        for host in asked:
            event("runner_on_start", {"host": host, "task": "probe"})
        Engine.script(name, asked, event)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    monkeypatch.setattr(sweep, "list_hosts", lambda *_: {host: {} for host in HOSTS})
    monkeypatch.setattr(sweep, "sources", list)
    monkeypatch.setattr(sweep, "_agent", lambda *_: b"")
    monkeypatch.setattr(sweep, "Engine", Engine)
    Engine.plays = []
    Engine.light = []
    return Engine


def swept(store: Path, **wish: Any) -> tuple[Swept, nights.Ingested | None]:
    return sweep.sweep(sweep.Wish(("x,",), store, **wish), lambda text: None, lambda tally: None)


def record(event: Event, host: str, code: int = 0, **changes: Any) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    made = run(f"{now:%Y-%m-%d}", now.hour)
    made.started = f"{now:%Y-%m-%dT%H:%M:%SZ}"
    for name, value in {"identity": host, **changes}.items():
        setattr(made, name, value)
    told = json.dumps({"event": "record", "record": json.loads(rec.encode(made))})
    event("runner_on_ok", {"host": host, "task": "probe", "res": {"how": "ended", "exit_code": code, "events": [told]}})


def died(event: Event, host: str) -> None:
    event("runner_on_ok", {"host": host, "task": "probe", "res": {"how": "died", "step": "bit 3", "events": []}})


def unreached(event: Event, host: str, msg: str = "ssh: connect to host x port 22: No route to host") -> None:
    event("runner_on_unreachable", {"host": host, "task": "probe", "res": {"msg": msg}})


def all_well(name: str, hosts: list[str], event: Event) -> None:
    for host in hosts:
        record(event, host)


def nobody(name: str, hosts: list[str], event: Event) -> None:
    for host in hosts:
        unreached(event, host)


def stored(store: Path) -> set[str]:
    return {path.stem.rpartition("-")[0] for path in store.glob("*/records/*.json")}


def test_every_machine_once(engine: type[Engine], tmp_path: Path) -> None:
    engine.script = all_well
    done, taken = swept(tmp_path / "s")
    assert done.code() == ExitCode.AS_PREDICTED
    assert taken is not None
    assert (taken.new, stored(tmp_path / "s")) == (20, set(HOSTS))
    assert engine.plays == [("probe.yml", HOSTS)]


def lacks(event: Event, host: str) -> None:
    event("runner_on_ok", {"host": host, "task": "probe", "res": {"how": "needs-agent"}})


def test_the_agent_is_carried_to_those_that_lack_it(engine: type[Engine], tmp_path: Path) -> None:
    engine.script = all_well
    swept(tmp_path / "s")
    assert engine.light == [False], "nobody knows whether they have it"

    def four_are_new(name: str, hosts: list[str], event: Event) -> None:
        answers = {
            "h03": lambda: lacks(event, "h03"),
            "h05": lambda: failed(event, "h05", module_stderr="sh: 1: python3: not found", rc=127),
            "h06": lambda: failed(event, "h06", msg="late", timedout={"period": 1}),
            "h07": lambda: lacks(event, "h07"),
            "h08": lambda: failed(event, "h08", msg="no room", invocation={}),
        }
        for host in hosts:
            if engine.light[-1] and host in answers:
                answers[host]()
            elif host == "h07":
                unreached(event, host, "kex_exchange_identification: Connection closed by remote host")
            else:
                record(event, host)

    engine.script = four_are_new
    engine.plays.clear()
    engine.light.clear()
    done, _ = swept(tmp_path / "s")
    assert engine.plays == [("probe.yml", HOSTS), ("probe.yml", ["h03", "h05", "h07"])]
    assert engine.light == [True, False]
    assert len(done.of(How.RECORD)) == 17
    assert [one.host for one in done.of(How.FAILED)] == ["h06", "h08"], "another Python would not help: not twice"
    assert [one.host for one in done.of(How.UNREACHED)] == ["h07"], "nothing had begun there"


def failed(event: Event, host: str, **result: Any) -> None:
    event("runner_on_failed", {"host": host, "task": "probe", "res": result})


def test_an_interrupt_before_the_agent_came_leaves_nothing_that_may_run(engine: type[Engine], tmp_path: Path) -> None:
    engine.script = all_well
    swept(tmp_path / "s")

    def stops(name: str, hosts: list[str], event: Event) -> None:
        for host in hosts:
            (lacks if host == "h03" else record)(event, host)
        raise KeyboardInterrupt

    engine.script = stops
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "s")
    engine.script = all_well
    engine.plays.clear()
    done, _ = swept(tmp_path / "s")
    assert (engine.plays, len(done.of(How.RECORD))) == ([("probe.yml", ["h03"])], 20)


def without_disks(name: str, hosts: list[str], event: Event) -> None:
    for host in hosts:
        (lacks if Engine.light[-1] else record)(event, host)


def test_the_agent_goes_along_where_machines_forget_it(engine: type[Engine], tmp_path: Path) -> None:
    engine.script = all_well
    swept(tmp_path / "s")

    engine.script = without_disks
    for _ in range(3):
        done, _ = swept(tmp_path / "s")
        assert len(done.of(How.RECORD)) == 20
    assert engine.light == [False, True, False, False, False]


def test_canaries_that_lack_the_agent_tell_of_the_others(engine: type[Engine], tmp_path: Path) -> None:
    engine.script = all_well
    swept(tmp_path / "s")

    engine.script = without_disks
    engine.light.clear()
    swept(tmp_path / "s", canary=0.1)
    assert engine.light[:2] == [True, False]
    assert not any(engine.light[2:])


@pytest.mark.parametrize("wish", [{"pattern": "h01"}, {"retry": True}])
def test_what_was_asked_of_others_tells_nothing(engine: type[Engine], tmp_path: Path, wish: dict[str, Any]) -> None:
    def one_fails(name: str, hosts: list[str], event: Event) -> None:
        for host in hosts:
            (unreached if host == "h01" else record)(event, host)

    engine.script = one_fails
    swept(tmp_path / "s")
    swept(tmp_path / "s", **wish)
    assert engine.light == [False, False]
    swept(tmp_path / "s")
    assert engine.light[2], "of these most ran it when they were asked last"


def test_machines_that_left_the_inventory_hide_no_loss(engine: type[Engine], tmp_path: Path) -> None:
    engine.script = all_well
    swept(tmp_path / "s")

    def leaves(name: str, hosts: list[str], event: Event) -> None:
        if name == "again.yml":
            failed(event, "h04", task="wait", msg="timed out")
        elif not engine.light[-1]:
            raise ProbeError("Ansible ended with exit code 1: no hosts to target")
        for host in hosts:
            if host == "h03":
                lacks(event, host)
            elif host == "h04":
                unreached(event, host, "Connection closed")
            else:
                record(event, host)

    engine.script = leaves
    done, taken = swept(tmp_path / "s")
    assert taken is not None
    assert [one.host for one in done.of(How.FAILED)] == ["h03"]
    assert "no hosts to target" in done.machines["h03"].why
    assert len(done.of(How.RECORD)) == 18


def test_another_agent_is_carried_to_all(engine: type[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.script = all_well
    swept(tmp_path / "s")
    monkeypatch.setattr(sweep, "_agent", lambda *_: b"another")
    swept(tmp_path / "s")
    swept(tmp_path / "s")
    assert engine.light == [False, False, True]


def test_an_inventory_without_machines_leaves_nothing(
    engine: type[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> dict[str, dict[str, Any]]:
        raise UsageError("no machine in x")

    def no_play(self: Engine, name: str, hosts: Sequence[str] | None, event: Event, *, known: bool = False) -> None:
        raise ProbeError("Ansible ended with exit code 1: [ERROR] x")

    monkeypatch.setattr(sweep, "list_hosts", none)
    monkeypatch.setattr(engine, "play", no_play)
    with pytest.raises(UsageError, match="no machine in x"):
        swept(tmp_path / "s")
    monkeypatch.setattr(engine, "play", lambda *_, **__: None)
    with pytest.raises(UsageError, match="no machine in x"):
        swept(tmp_path / "s")
    assert not list((tmp_path / "s").glob("sweeps/*/plan.json"))


def test_what_had_answered_before_an_interrupt_is_in_the_store(engine: type[Engine], tmp_path: Path) -> None:
    store = tmp_path / "s"

    def stops(name: str, hosts: list[str], event: Event) -> None:
        all_well(name, hosts[:12], event)
        raise KeyboardInterrupt

    engine.script = stops
    with pytest.raises(KeyboardInterrupt):
        swept(store)
    assert stored(store) == set(HOSTS[:12])
    engine.script = all_well
    done, _ = swept(store)
    assert engine.plays[1] == ("again.yml", HOSTS[12:]), "something may be running there: that is asked for first"
    assert (done.continued, len(done.of(How.RECORD))) == (12, 20)
    assert stored(store) == set(HOSTS)


def test_a_sweep_of_which_nobody_had_answered_goes_on_too(engine: type[Engine], tmp_path: Path) -> None:
    def stops(name: str, hosts: list[str], event: Event) -> None:
        raise KeyboardInterrupt

    engine.script = stops
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "s")
    engine.script = all_well
    done, _ = swept(tmp_path / "s")
    assert engine.plays[1:] == [("again.yml", HOSTS)], "agents may be running everywhere"
    assert len(done.of(How.RECORD)) == 20


@pytest.mark.parametrize("wish", [{"afresh": True}, {"arguments": ("--pairs",)}, {"pattern": "x"}])
def test_a_sweep_that_is_given_up_is_taken_in(engine: type[Engine], tmp_path: Path, wish: dict[str, Any]) -> None:
    """By whatever the next one asks for; the store may have been full when it was interrupted."""
    store = tmp_path / "s"

    def stops(name: str, hosts: list[str], event: Event) -> None:
        all_well(name, hosts[:12], event)
        raise KeyboardInterrupt

    engine.script = stops
    with pytest.raises(KeyboardInterrupt):
        swept(store)
    for path in store.glob("*/records/*"):
        path.unlink()
    engine.script = nobody
    done, _ = swept(store, **wish)
    assert len(done.of(How.UNREACHED)) == 20
    assert stored(store) == set(HOSTS[:12])


def test_retry_after_an_interrupt_asks_those_that_were_not_asked(engine: type[Engine], tmp_path: Path) -> None:
    store = tmp_path / "s"

    def stops(name: str, hosts: list[str], event: Event) -> None:
        all_well(name, hosts[:11], event)
        event("runner_on_failed", {"host": hosts[11], "res": {"msg": "boom"}})
        raise KeyboardInterrupt

    engine.script = stops
    with pytest.raises(KeyboardInterrupt):
        swept(store, night="2026-11-25")
    engine.script = all_well
    done, _ = swept(store, retry=True)
    assert engine.plays[-1] == ("probe.yml", HOSTS[11:])
    assert done.night == "2026-11-25", "it mends that night"
    with pytest.raises(UsageError, match="has a record of every machine"):
        swept(store, retry=True)


def test_a_machine_that_went_away_before_an_interrupt_is_not_told_as_never_reached(
    engine: type[Engine], tmp_path: Path
) -> None:
    def goes(name: str, hosts: list[str], event: Event) -> None:
        all_well(name, hosts[1:], event)
        unreached(event, hosts[0], "Connection closed")
        raise KeyboardInterrupt

    engine.script = goes
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "s")

    def stays_away(name: str, hosts: list[str], event: Event) -> None:
        assert (name, hosts) == ("again.yml", ["h01"])
        event("runner_on_failed", {"host": "h01", "task": "wait", "res": {"msg": "timed out"}})

    engine.script = stays_away
    done, _ = swept(tmp_path / "s")
    assert [(one.host, one.how) for one in done.machines.values() if one.how is not How.RECORD] == [("h01", How.GONE)]


@pytest.mark.parametrize("how", ["died", "5", "boot"])
def test_canaries_stop_the_rest(engine: type[Engine], tmp_path: Path, how: str) -> None:
    def script(name: str, hosts: list[str], event: Event) -> None:
        if name == "boot.yml":
            event("runner_on_failed", {"host": hosts[0], "task": "reboot", "res": {"msg": "Timed out waiting"}})
        elif how == "5":
            record(event, hosts[0], 5)
        else:
            died(event, hosts[0])

    engine.script = script
    done, _ = swept(tmp_path / "s", canary=0.05, kernel="6.9" if how == "boot" else "")
    assert done.stopped.startswith("h01 is one of those that go first: ")
    assert len(done.of(How.UNTRIED)) == 19
    assert all(hosts == ["h01"] for _, hosts in engine.plays)


def test_a_canary_that_died_before_an_interrupt_is_not_forgotten(engine: type[Engine], tmp_path: Path) -> None:
    def script(name: str, hosts: list[str], event: Event) -> None:
        died(event, hosts[0])
        raise KeyboardInterrupt

    engine.script = script
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "s", canary=0.1)
    engine.script = all_well
    done, _ = swept(tmp_path / "s", canary=0.1)
    assert done.stopped
    assert len(done.of(How.UNTRIED)) == 18, "but for the other canary, of which something may have been running"


def test_a_canary_that_is_not_there_is_none(engine: type[Engine], tmp_path: Path) -> None:
    def script(name: str, hosts: list[str], event: Event) -> None:
        for host in hosts:
            if host in ("h01", "h02"):
                unreached(event, host)
            else:
                record(event, host)

    engine.script = script
    done, _ = swept(tmp_path / "s", canary=0.05)
    assert [hosts for _, hosts in engine.plays][:3] == [["h01"], ["h02"], ["h03", "h04"]]
    assert (done.stopped, len(done.of(How.RECORD))) == ("", 18)


def test_a_record_that_the_store_sets_aside_is_no_success(engine: type[Engine], tmp_path: Path) -> None:
    def script(name: str, hosts: list[str], event: Event) -> None:
        record(event, hosts[0], started="2099-01-01T00:00:00Z")
        all_well(name, hosts[1:], event)

    engine.script = script
    done, _ = swept(tmp_path / "s")
    assert done.code() == ExitCode.FAILED
    assert "its clock is ahead" in done.machines["h01"].why
    (lost,) = history.night(tmp_path / "s").lost
    assert lost[1] == "h01"


def test_sudo_that_hangs_is_no_machine_that_went_away(engine: type[Engine], tmp_path: Path) -> None:
    def script(name: str, hosts: list[str], event: Event) -> None:
        unreached(event, hosts[0], "Timeout (12s) waiting for privilege escalation prompt: ")
        all_well(name, hosts[1:], event)

    engine.script = script
    done, _ = swept(tmp_path / "s")
    assert done.machines["h01"].how is How.FAILED
    assert "NOPASSWD" in done.machines["h01"].why
    assert [name for name, _ in engine.plays] == ["probe.yml"]


def test_lost_mended_and_lost_again_is_lost(engine: type[Engine], tmp_path: Path) -> None:
    store = tmp_path / "s"

    for script, count in ((nobody, 20), (all_well, 0), (nobody, 20)):
        engine.script = script
        done, _ = swept(store)
        later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=1)
        while datetime.datetime.now(datetime.timezone.utc) < later.replace(microsecond=0):
            pass  # times are in seconds
        assert len(history.night(store).lost) == count, done.started


def test_an_engine_that_does_not_run_says_why(engine: type[Engine], tmp_path: Path) -> None:
    def script(name: str, hosts: list[str], event: Event) -> None:
        raise ProbeError("Ansible ended with exit code 1: no such plugin")

    engine.script = script
    with pytest.raises(ProbeError, match="no such plugin"):
        swept(tmp_path / "s")
