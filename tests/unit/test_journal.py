# SPDX-License-Identifier: MIT
"""Journal, lock and watchdog, with ordinary files as registers: the real driver class, real processes, real SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from probe.errors import NotRestored, RecordError, RequirementMissing
from probe.journal import Journal, Lock, Watchdog, file_away, read_leftover, replay
from probe.msr import MsrDriver
from probe.outcome import Restored
from probe.run import settle
from tests.fakes import SPEC_CTRL, FakeMsr, FakeRegister, pin_anywhere


def make_registers(folder: Path, *values: int) -> str:
    """Make one file per CPU that holds its register at offset 0x48, and return the device template."""
    for cpu, value in enumerate(values):
        set_register(folder, cpu, value)
    return str(folder / "{cpu}")


def set_register(folder: Path, cpu: int, value: int) -> None:
    with open(folder / str(cpu), "r+b" if (folder / str(cpu)).exists() else "wb") as file:
        file.seek(SPEC_CTRL)
        file.write(value.to_bytes(8, "little"))


def register(folder: Path, cpu: int) -> int:
    with open(folder / str(cpu), "rb") as file:
        file.seek(SPEC_CTRL)
        return int.from_bytes(file.read(8), "little")


def wait_until(condition: object, seconds: float = 5.0) -> float:
    begin = time.monotonic()
    while not condition():  # type: ignore[operator]
        assert time.monotonic() - begin < seconds, "it did not happen in time"
        time.sleep(0.005)
    return time.monotonic() - begin


def test_saved_values_are_on_disk_before_anything_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SPEC_CTRL, {0: 1, 1: 1, 2: 5}, "boot")
    (head,) = (json.loads(line) for line in journal.path.read_text().splitlines())
    assert head["saved"] == [["0-1", "0x0000000000000001"], ["2", "0x0000000000000005"]]
    journal.intent("bit 3", 1 << 3)
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    assert (leftover.saved, leftover.step, leftover.restored_by) == ({0: 1, 1: 1, 2: 5}, "bit 3", "")
    assert "died at 'bit 3'" in leftover.tell(True)
    assert "rebooted" in leftover.tell(False)
    journal.close(keep=False)
    assert read_leftover(tmp_path) is None


def test_a_journal_cut_by_a_power_failure_still_tells_the_last_whole_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SPEC_CTRL, {0: 1}, "boot")
    journal.intent("bit 7", 1 << 7)
    journal.close(keep=True)
    with open(journal.path, "ab") as file:
        file.write(b'{"ev": "inte')
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    assert leftover.step == "bit 7"


def test_an_empty_journal_means_that_nothing_was_written(tmp_path: Path) -> None:
    (tmp_path / "journal.ndjson").write_bytes(b'{"ev": "sav')
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    assert "before its first write" in leftover.tell(False)


@pytest.mark.parametrize(
    "text", ["nonsense\n", "{}\n", '{"ev": "saved", "boot_id": "x", "saved": [["0", "1"]]}\n', "[]\n"]
)
def test_a_foreign_journal_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.ndjson"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"journal\.ndjson"):
        read_leftover(tmp_path)
    assert path.read_text() == text


def test_two_probes_at_once_are_refused(tmp_path: Path) -> None:
    with (
        Lock(tmp_path),
        pytest.raises(RequirementMissing, match=f"another probe is running.*{os.getpid()}"),
        Lock(tmp_path),
    ):
        pass
    with Lock(tmp_path):
        pass


def test_the_watchdog_goes_without_touching_anything_when_dismissed(tmp_path: Path) -> None:
    device = make_registers(tmp_path, 0x1)
    with MsrDriver(writable=True, device=device) as msr:
        msr.open(0)
        journal = Journal(tmp_path, SPEC_CTRL, {0: 0x1}, "boot")
        watchdog = Watchdog(msr, SPEC_CTRL, {0: 0x1}, journal, pin_anywhere)
        assert watchdog.alive()
        set_register(tmp_path, 0, 0x99)
        watchdog.dismiss()
        assert not watchdog.alive()
        assert register(tmp_path, 0) == 0x99
        journal.close(keep=False)


def test_a_dead_watchdog_is_noticed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SPEC_CTRL, {0: 0}, "boot")
    watchdog = Watchdog(FakeMsr({0: FakeRegister()}), SPEC_CTRL, {0: 0}, journal, pin_anywhere)
    os.kill(watchdog.pid, signal.SIGKILL)
    wait_until(lambda: not watchdog.alive())
    watchdog.dismiss()
    journal.close(keep=False)


_AGENT = """
import sys, time
from pathlib import Path
from probe.journal import Journal, Watchdog, Lock
from probe.msr import MsrDriver
folder, device = Path(sys.argv[1]), sys.argv[2]
with Lock(folder), MsrDriver(writable=True, device=device) as msr:
    saved = {cpu: msr.read(cpu, 0x48) for cpu in (0, 1)}
    journal = Journal(folder, 0x48, saved, "boot")
    watchdog = Watchdog(msr, 0x48, saved, journal, lambda cpu: True)
    journal.intent("bit 3", 1 << 3)
    for cpu in saved:
        msr.write(cpu, 0x48, saved[cpu] | 8)
    print("changed", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGQUIT])
def test_however_the_agent_dies_every_register_is_put_back_within_a_second(
    tmp_path: Path, number: signal.Signals
) -> None:
    device = make_registers(tmp_path, 0x1, 0x401)
    agent = subprocess.Popen(
        [sys.executable, "-c", _AGENT, str(tmp_path), device],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    assert agent.stdout is not None
    assert agent.stdout.readline() == b"changed\n"
    assert (register(tmp_path, 0), register(tmp_path, 1)) == (0x9, 0x409)
    os.killpg(agent.pid, number)  # the whole process group: the watchdog lives in a session of its own
    took = wait_until(lambda: (register(tmp_path, 0), register(tmp_path, 1)) == (0x1, 0x401))
    assert took < 1.0
    agent.wait()
    agent.stdout.close()
    wait_until(lambda: (found := read_leftover(tmp_path)) is not None and bool(found.restored_by))
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    assert "watchdog put every register back, verified" in leftover.tell(True)
    said: list[str] = []
    assert settle(leftover, FakeMsr({}), pin_anywhere, "boot", said.append) == []
    assert "watchdog" in said[0]
    assert read_leftover(tmp_path) is None
    assert (tmp_path / "last-incident.ndjson").exists()


def test_the_next_run_waits_for_the_watchdog(tmp_path: Path) -> None:
    """The watchdog shares the lock: a second probe cannot start between the agent's death and the restore."""
    lock = Lock(tmp_path).__enter__()
    journal = Journal(tmp_path, SPEC_CTRL, {0: 0}, "boot")
    watchdog = Watchdog(FakeMsr({0: FakeRegister()}), SPEC_CTRL, {0: 0}, journal, pin_anywhere)
    lock.__exit__()
    with pytest.raises(RequirementMissing, match="another probe"), Lock(tmp_path):
        pass
    watchdog.dismiss()
    journal.close(keep=False)
    with Lock(tmp_path):
        pass


def leave(folder: Path, boot_id: str) -> None:
    journal = Journal(folder, SPEC_CTRL, {0: 0x1, 1: 0x1}, boot_id)
    journal.intent("bit 9", 1 << 9)
    journal.close(keep=True)


def test_a_journal_of_this_boot_is_replayed(tmp_path: Path) -> None:
    leave(tmp_path, "this boot")
    registers = {0: FakeRegister(value=0x201), 1: FakeRegister(value=0x1)}
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    said: list[str] = []
    proof = settle(leftover, FakeMsr(registers), pin_anywhere, "this boot", said.append)
    assert registers[0].value == 0x1
    assert registers[1].writes == []
    assert not any(item.failed for item in proof)
    assert "nobody has put the registers back yet" in said[0]


def test_old_values_are_never_written_into_a_machine_that_has_rebooted(tmp_path: Path) -> None:
    leave(tmp_path, "an earlier boot")
    registers = {0: FakeRegister(value=0x201), 1: FakeRegister(value=0x1)}
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    said: list[str] = []
    settle(leftover, FakeMsr(registers), pin_anywhere, "this boot", said.append)
    assert registers[0].writes == registers[1].writes == []
    assert "died at 'bit 9'" in said[0]
    assert "rebooted" in said[0]
    assert read_leftover(tmp_path) is None


def test_a_register_that_cannot_be_put_back_keeps_the_journal(tmp_path: Path) -> None:
    leave(tmp_path, "this boot")
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    stuck = {0: FakeRegister(value=0x201, sticky=0x200), 1: FakeRegister(value=0x1)}
    with pytest.raises(NotRestored, match="CPUs 0 "):
        settle(leftover, FakeMsr(stuck), pin_anywhere, "this boot", lambda text: None)
    again = read_leftover(tmp_path)
    assert again is not None
    assert again.failed == (0,)
    assert [
        item.cpu for item in replay(again, FakeMsr({0: FakeRegister(value=1), 1: FakeRegister(value=1)}), pin_anywhere)
    ] == [0, 1]


def test_restore_needs_a_place_for_the_journal(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "there"
    with pytest.raises(RequirementMissing, match="nothing was written to any MSR"):
        Journal(missing, SPEC_CTRL, {0: 0}, "boot")


def test_file_away_keeps_the_last_incident(tmp_path: Path) -> None:
    leave(tmp_path, "x")
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    file_away(leftover)
    assert "bit 9" in (tmp_path / "last-incident.ndjson").read_text()


def test_proof_lines_name_who_and_which() -> None:
    from probe.journal import restored_event

    event = restored_event("agent", [Restored(0, 1, 1, "verified"), Restored(1, 1, 3, "failed")])
    assert (event["by"], event["verified"], event["failed"]) == ("agent", "0", "1")
