# SPDX-License-Identifier: MIT
"""Sweeps over sixteen hosts with real sshd, by the real Ansible, most of the hosts failing in a way of their own; no
record is lost or counted twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel_harness.lab import history, nights
from kernel_harness.lab.agent_file import build
from probe import record as rec
from probe import sweep as told
from probe.sweep import How, Machine
from tests.live import two_nights
from tests.live.lab_hosts import Lab, lab
from tests.live.test_lab import configure, register, until
from tests.live.two_nights import HIDE_PYTHON

pytestmark = pytest.mark.lab
COUNT = 16
STIBP_SSBD = "1-2 (STIBP, SSBD)"
COMMAND = str(Path(sys.executable).parent / "spec-ctrl-probe")
GOOD = ("lab1", "lab2", "lab4", "lab6", "lab8")
SLOW = "--repeat 500"  # some 10 s
# Where there is no Python 3.8, one that says that it is: to Ansible, its module and the agent.
STAND_IN = """
mkdir /run/old && echo 'import sys; sys.version_info = (3, 8, 20, "final", 0)' > /run/old/sitecustomize.py
printf '#!/bin/sh\\nPYTHONPATH=/run/old PATH=/run/tools exec /usr/bin/python3 "$@"\\n' > /run/python3
chmod 755 /run/python3
"""
REAL = """
printf '#!/bin/sh\\nLD_LIBRARY_PATH={folder}/lib PATH=/run/tools exec {folder}/bin/python3.8 "$@"\\n' > /run/python3
chmod 755 /run/python3
"""
NO_SUDO = """
cp /etc/passwd /run/passwd && echo 'tester:x:1234:1234::/run/tester:/bin/sh' >> /run/passwd
mount --bind /run/passwd /etc/passwd && mkdir /run/tester && chown 1234:1234 /run/tester
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("sweep"), COUNT) as made:
        build(made.folder / "agent.pyz", print)
        prefix = next(iter(sorted(Path("~/.pyenv/versions").expanduser().glob("3.8.*"))), None)
        place = made.folder / "python3.8"
        place.mkdir()
        if prefix is not None:  # hosts have no home folders
            subprocess.run(["mount", "--bind", str(prefix), str(place)], check=True)
        yield made
        if prefix is not None:
            subprocess.run(["umount", "-l", str(place)], check=True)


def inventory(hosts: Lab, name: str, of_host: dict[str, str] | None = None) -> Path:
    """Write an inventory of all hosts; of_host has variables by host."""
    lines = [f"{host} {(of_host or {}).get(host, '')}".rstrip() for host in hosts.names]
    common = [f"ansible_ssh_common_args='-F {hosts.ssh_config}'", "ansible_user=root"]
    path = hosts.folder / f"{name}.ini"
    path.write_text("\n".join([*lines, "[all:vars]", *common]) + "\n")
    return path


def words(hosts: Lab, path: Path, *more: str, store: str = "nights") -> list[str]:
    agent = str(hosts.folder / "agent.pyz")
    where = ["--store", str(hosts.folder / store), "--agent", agent, "--host-timeout", "60", "--wait", "15"]
    return [COMMAND, "sweep", "-i", str(path), "--write", *where, *more]


def answers(hosts: Lab, store: str = "nights") -> dict[str, Machine]:
    """Return what the newest sweep of a store says of each machine."""
    newest = max((hosts.folder / store / "sweeps").glob("*/results.ndjson"))
    found = [told.machine(line) for line in newest.read_text().splitlines()]
    assert len({one.host for one in found}) == len(found), "no machine is answered for twice"
    return {one.host: one for one in found}


def records(hosts: Lab, store: str = "nights") -> list[rec.Record]:
    return [rec.decode(path.read_bytes(), path.name) for path in (hosts.folder / store).glob("*/records/*.json")]


def walking(hosts: Lab, name: str, since: float = 0) -> bool:
    """Tell whether the agent on a host is in the middle of its walk, which began after a time."""
    journal = hosts.folder / name / "disk/spec-ctrl-probe/journal.ndjson"
    try:
        return journal.stat().st_mtime > since and '"bit 63"' in journal.read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def night(hosts: Lab) -> tuple[Lab, str, int]:
    """One night in which ten hosts fail and one loses its link for a while; what the sweep said, and its exit code."""
    configure(hosts, "lab7", r'ForceCommand printf "Last login: yesterday\n"')
    more = {
        "lab5": HIDE_PYTHON,
        "lab12": NO_SUDO,
        "lab14": "mount -t tmpfs -o size=64k t /var/lib/spec-ctrl-probe",
        "lab16": REAL.format(folder=hosts.folder / "python3.8")
        if any((hosts.folder / "python3.8").iterdir())
        else STAND_IN,
    }
    for name in hosts.names:
        hosts.boot(name, more.get(name, ""))
    hosts.wait_for([name for name in hosts.names if name != "lab7"])
    hosts.link("lab3", "down")
    known = (hosts.folder / "known_hosts").read_text()
    other = (hosts.folder / "lab1" / "host_key.pub").read_text()
    keys = [f"192.0.2.13 {other.strip()}" if line.startswith("192.0.2.13 ") else line for line in known.splitlines()]
    (hosts.folder / "known_hosts").write_text("".join(f"{line}\n" for line in keys))
    slow = dict.fromkeys(("lab9", "lab10", "lab11", "lab15"), f"spec_ctrl_run='{SLOW}'")
    path = inventory(
        hosts,
        "night",
        {**slow, "lab12": "ansible_user=tester", "lab16": "ansible_python_interpreter=/run/python3"},
    )
    running = hosts.start(*words(hosts, path), stdout=hosts.folder / "night.txt")
    for name in ("lab9", "lab10", "lab11", "lab15"):
        until(lambda name=name: walking(hosts, name))  # type: ignore[misc]
    hosts.inside("lab11", "pkill", "-KILL", "-o", "-f", "^[^ ]*python3[^ ]* .*agent-.* run --in metal")
    hosts.link("lab9", "down")
    hosts.power_cut("lab10")
    hosts.power_cut("lab15")
    until(lambda: b"lab9 went away" in (hosts.folder / "said").read_bytes())
    hosts.link("lab9", "up")
    hosts.boot("lab10")
    running.wait(120)
    return hosts, (hosts.folder / "night.txt").read_text(), running.returncode


def test_what_became_of_each_machine(night: tuple[Lab, str, int]) -> None:
    hosts, text, code = night
    found = answers(hosts)
    said = (hosts.folder / "said").read_text()
    assert {host: one.how for host, one in found.items()} == {
        **dict.fromkeys((*GOOD, "lab9"), How.RECORD),
        **dict.fromkeys(("lab3", "lab13"), How.UNREACHED),
        **dict.fromkeys(("lab5", "lab7", "lab11", "lab12", "lab14", "lab16"), How.FAILED),
        "lab10": How.DIED,
        "lab15": How.GONE,
    }, said + text
    assert re.fullmatch(r"(pair|bit) .*, then the machine went down and came back", found["lab10"].told())
    assert re.search(r"went away under the probe and was not back after 15 s", found["lab15"].told())
    assert re.match(r"(pair|bit) .*, then the agent was killed", found["lab11"].told())
    assert "not reached: ssh: connect to host 192.0.2.3" in found["lab3"].why
    assert "Host key verification failed" in found["lab13"].why
    assert "python" in found["lab5"].why.lower()
    assert "sudo" in found["lab12"].why
    assert "No space left on device" in found["lab14"].why
    assert "Python 3.8 is here" in found["lab16"].why
    assert found["lab9"].again, "it was not probed again: its answer was there when the link was back"
    assert code == 3


def test_the_summary_is_a_mail(night: tuple[Lab, str, int]) -> None:
    _, text, _ = night
    assert all(len(line) <= 75 and line == line.rstrip() for line in text.splitlines())
    assert "16 machines" in text.splitlines()[0]
    assert "6 gave a record" in text
    assert re.search(r"lost:\n( .*\n)* +lab10: (pair|bit)", text)
    assert "2 not reached" in text


def test_nothing_is_lost_or_counted_twice(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    store = hosts.folder / "nights"
    (date,) = nights.nights_of(store)
    rows = nights.rows(store, date)
    assert sorted(row.host for row in rows if not row.lost) == sorted([*GOOD, "lab9"])
    lost = {row.host: row.lost for row in rows if row.lost}
    assert set(lost) == set(hosts.names) - {*GOOD, "lab9"}, "every machine is in the night, once"
    assert lost["lab10"] == answers(hosts)["lab10"].told()
    again = nights.ingest(max((store / "sweeps").glob("*/hosts")), store, print, date)
    assert (again.new, again.again) == (0, 6)
    assert len(records(hosts)) == 6


def test_registers_are_put_back_whatever_happened(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    for name in (*GOOD, "lab9", "lab11"):
        assert register(hosts, name) == 0


def test_the_mended_ones_are_asked_again_and_only_they(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    hosts.link("lab3", "up")
    hosts.boot("lab15")
    hosts.wait_for(["lab3", "lab10", "lab15"])
    text = hosts.command(*words(hosts, inventory(hosts, "again"), "--retry", "--limit", "!lab7"), timeout=180)
    assert text.returncode == 3, text.stdout + text.stderr
    found = answers(hosts)
    assert set(found) == set(hosts.names) - {*GOOD, "lab7", "lab9"}
    mended = {host for host, one in found.items() if one.how is How.RECORD}
    # lab12 and lab16 are asked as root and by their own Python now
    assert mended == {"lab3", "lab10", "lab11", "lab12", "lab15", "lab16"}, text.stdout
    assert len(records(hosts)) == 12
    missing = {row[0] for row in history.ask(hosts.folder / "nights", "missing").rows}
    assert missing == {"lab5", "lab7", "lab13", "lab14"}


def test_a_controller_that_was_killed_goes_on_and_probes_nobody_twice(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    own = dict.fromkeys(("lab1", "lab2"), f"spec_ctrl_run='{SLOW}'")
    asked = words(hosts, inventory(hosts, "killed", own), "--limit", "lab1,lab2,lab4,lab6", store="killed")
    first = hosts.start(*asked, stdout=hosts.folder / "killed.txt")
    for name in ("lab1", "lab2"):
        until(lambda name=name: walking(hosts, name))  # type: ignore[misc]
    until(
        lambda: (
            len(answers(hosts, "killed")) == 2 if list((hosts.folder / "killed").glob("sweeps/*/results*")) else False
        )
    )
    for pid in (*children(first.pid), first.pid):
        os.kill(pid, signal.SIGKILL)
    first.wait()
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    second = hosts.command(*asked, timeout=120)
    assert "2 machines answered, 2 are left" in second.stderr
    assert "2 of them had answered before this sweep was interrupted" in " ".join(second.stdout.split())
    found = answers(hosts, "killed")
    assert {host: (one.how, one.again) for host, one in found.items()} == {
        "lab1": (How.RECORD, True),
        "lab2": (How.RECORD, True),
        "lab4": (How.RECORD, False),
        "lab6": (How.RECORD, False),
    }, second.stdout
    assert len(records(hosts, "killed")) == 4
    assert all(record.started <= begun for record in records(hosts, "killed")), "no agent was started twice"
    third = hosts.command(*words(hosts, hosts.folder / "killed.ini", "--limit", "lab4", store="killed"), timeout=120)
    assert "going on" not in third.stderr, "that sweep has ended: this is another"


def children(pid: int) -> list[int]:
    """Return all processes below one."""
    found = []
    for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [*children(int(one)), int(one)]
    return found


def test_an_interrupt_leaves_no_process_here_and_goes_on(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    own = {"lab1": f"spec_ctrl_run='{SLOW}'"}
    asked = words(hosts, inventory(hosts, "interrupted", own), "--limit", "lab1,lab4", store="interrupted")
    begun = time.time()
    first = hosts.start(*asked)
    until(lambda: walking(hosts, "lab1", begun))
    until(lambda: "lab4" in kept(hosts))
    below = [*children(first.pid), first.pid]
    first.send_signal(signal.SIGINT)
    assert first.wait(30) == 130
    said = (hosts.folder / "said").read_text()
    assert said.splitlines()[-1] == "spec-ctrl-probe: interrupted"
    assert "the same command goes on" in said
    assert len(records(hosts, "interrupted")) == 1, "what had answered is in the store"
    until(lambda: not [pid for pid in below if alive(pid)], 10)
    second = hosts.command(*asked)
    assert "going on with the sweep" in second.stderr
    assert (second.returncode, len(records(hosts, "interrupted"))) == (1, 2)
    assert answers(hosts, "interrupted")["lab1"].again


def kept(hosts: Lab) -> set[str]:
    return {path.stem for path in hosts.folder.glob("interrupted/sweeps/*/hosts/*.ndjson")}


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_home_is_needed(night: tuple[Lab, str, int]) -> None:
    """A system service may not write to one: ProtectHome=read-only."""
    hosts, _, _ = night
    done = hosts.command("env", "HOME=/proc", *words(hosts, inventory(hosts, "home"), "--limit", "lab4", store="home"))
    assert (done.returncode, len(records(hosts, "home"))) == (1, 1), done.stdout + done.stderr


def test_two_sweeps_at_once(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    own = {"lab1": f"spec_ctrl_run='{SLOW}'"}
    asked = words(hosts, inventory(hosts, "twice", own), "--limit", "lab1", store="twice")
    first = hosts.start(*asked, stdout=hosts.folder / "twice.txt")
    until(lambda: walking(hosts, "lab1"))
    same = hosts.command(*asked)
    assert (same.returncode, same.stdout) == (4, "")
    assert re.fullmatch(r"spec-ctrl-probe: another sweep is using .*/twice \(process \d+\) \(.*\)\n", same.stderr)
    other = hosts.command(*[str(hosts.folder / "other") if word.endswith("/twice") else word for word in asked])
    assert other.returncode == 4, "another controller: the machine itself lets one probe run"
    assert "another probe is running" in " ".join(other.stdout.split())
    assert first.wait(60) == 1
    assert len(records(hosts, "twice")) == 1
    assert records(hosts, "other") == []


def test_a_full_disk_loses_nothing(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    small = hosts.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "t", str(small)], check=True)
    try:
        asked = words(hosts, inventory(hosts, "small"), "--limit", ",".join(GOOD), store="small/nights")
        full = hosts.command(*asked)
        assert full.returncode == 3, full.stdout
        assert "No space left on device" in full.stdout + full.stderr
        subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
        done = hosts.command(*asked)
        assert "going on with the sweep" in done.stderr
        assert done.returncode == 1, done.stdout + done.stderr
        assert {one.how for one in answers(hosts, "small/nights").values()} == {How.RECORD}
        assert len(records(hosts, "small/nights")) == len(GOOD)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_canary_that_dies_stops_the_rest(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    shutil.rmtree(hosts.folder / "canary", ignore_errors=True)
    own = dict.fromkeys(hosts.names, f"spec_ctrl_run='{SLOW}'")
    more = ("--limit", ",".join(GOOD), "--canary", "5%", "--wait", "5")
    asked = words(hosts, inventory(hosts, "canary", own), *more, store="canary")
    running = hosts.start(*asked, stdout=hosts.folder / "canary.txt")
    until(lambda: b"first 1 of 5 machines, of 1 CPU model: lab1" in (hosts.folder / "said").read_bytes())
    until(lambda: walking(hosts, "lab1"))
    hosts.power_cut("lab1")
    assert running.wait(120) == 3
    text = " ".join((hosts.folder / "canary.txt").read_text().split())
    assert "stopped: lab1 is one of those that go first: it went away" in text
    assert "4 not asked" in text
    assert set(answers(hosts, "canary")) == {"lab1"}
    assert not [name for name in ("lab2", "lab4", "lab6", "lab8") if walking(hosts, name)]
    hosts.boot("lab1")
    hosts.wait_for(["lab1"])


def test_check_touches_nothing(hosts: Lab, night: tuple[Lab, str, int]) -> None:
    before = {name: sorted((hosts.folder / name).rglob("*")) for name in hosts.names}
    looked = hosts.command(
        *words(hosts, hosts.folder / "night.ini", "--check", "--canary", "5%", "--limit", "lab1,lab2")
    )
    assert looked.returncode == 0, looked.stderr
    assert re.search(r"^lab1 +lab1 +root +(Intel|AMD) ", looked.stdout, re.M)
    assert "no machine was touched" in looked.stdout
    assert before == {name: sorted((hosts.folder / name).rglob("*")) for name in hosts.names}


def test_the_time_limit_of_a_machine(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    own = {"lab2": "spec_ctrl_run='--repeat 1000 --pairs'"}
    more = ("--limit", "lab2,lab4", "--host-timeout", "4")
    done = hosts.command(*words(hosts, inventory(hosts, "long", own), *more, store="long"))
    found = answers(hosts, "long")
    assert found["lab4"].how is How.RECORD
    assert (found["lab2"].how, found["lab2"].code) in ((How.FAILED, 130), (How.RECORD, 130)), done.stdout
    assert "was stopped after 4 s" in " ".join(done.stdout.split())
    assert register(hosts, "lab2") == 0


def test_the_agent_stays_on_the_machines_and_goes_where_it_is_lacking(night: tuple[Lab, str, int]) -> None:
    hosts, _, _ = night
    asked = words(hosts, inventory(hosts, "known"), "--limit", "lab1,lab2,lab4", store="known")
    hosts.command(*asked)
    (kept,) = (hosts.folder / "lab1/disk/spec-ctrl-probe").glob("agent-*")
    kept.unlink()
    done = hosts.command(*asked)
    assert {one.how for one in answers(hosts, "known").values()} == {How.RECORD}, done.stdout + done.stderr
    assert len(records(hosts, "known")) == 6
    assert kept.read_bytes() == (hosts.folder / "agent.pyz").read_bytes()


def test_a_kernel_is_booted_first(night: tuple[Lab, str, int]) -> None:
    """By the lab's own command; uname tells of the one that a file names, a reboot is a power cut."""
    hosts, _, _ = night
    release = "6.99.0-lab"
    fake = hosts.folder / "lab2/disk/uname"
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = -r ] && exec cat {hosts.folder}/lab2/disk/release\nexec /bin/uname.real "$@"\n'
    )
    fake.chmod(0o755)
    more = (
        "cp /bin/uname /run/uname.real; sed -i 's,/bin/uname.real,/run/uname.real,' /var/lib/uname; "
        "mount --bind /var/lib/uname $(readlink -f /bin/uname)"
    )
    hosts.power_cut("lab2")
    (hosts.folder / "lab2/disk/release").write_text("6.1.0-old\n")
    hosts.boot("lab2", more)
    hosts.wait_for(["lab2"])
    choose = f"echo {{{{ spec_ctrl_kernel }}}} > {hosts.folder}/lab2/disk/next"
    own = {"lab2": f"spec_ctrl_boot='{choose}' spec_ctrl_reboot='touch {hosts.folder}/lab2/disk/go'"}
    path = inventory(hosts, "kernel", own)
    running = hosts.start(
        *words(hosts, path, "--kernel", release, "--limit", "lab2", store="kernel"), stdout=hosts.folder / "k"
    )
    until(lambda: (hosts.folder / "lab2/disk/go").exists())
    hosts.power_cut("lab2")
    (hosts.folder / "lab2/disk/next").rename(hosts.folder / "lab2/disk/release")
    hosts.boot("lab2", more)
    assert running.wait(120) == 1, (hosts.folder / "k").read_text() + (hosts.folder / "said").read_text()
    assert answers(hosts, "kernel")["lab2"].how is How.RECORD
    wrong = hosts.command(*words(hosts, path, "--kernel", release, "--limit", "lab2", store="kernel"))
    assert wrong.returncode == 1, "it runs that kernel: no reboot"


def test_two_nights_and_one_planted_change(night: tuple[Lab, str, int], tmp_path: Path) -> None:
    """Sixteen hosts, three that fail in different ways; in the second night one register takes one bit more."""
    hosts, _, _ = night
    known = hosts.folder / "known_hosts"
    keys = [(hosts.folder / name / "host_key.pub").read_text() for name in hosts.names]
    known.write_text("".join(f"192.0.2.{number} {key}" for number, key in enumerate(keys, 1)))
    for name in hosts.names:
        if name in hosts.running:
            hosts.power_cut(name)
        file = hosts.folder / name / "sshd_config"
        file.write_text("".join(line for line in file.read_text().splitlines(True) if "ForceCommand" not in line))
    path = two_nights.ready(hosts)
    for date, valid in (("2026-11-24", two_nights.VALID), ("2026-11-25", two_nights.PLANTED)):
        hosts.register("lab8", valid)
        agent = hosts.folder / "agent.pyz"
        assert two_nights.night(hosts, path, hosts.folder / "two", date, agent, "--textfile", str(tmp_path)) == 3
    text = (hosts.folder / "two/2026-11-25.txt").read_text()
    assert "13 gave a record" in text
    found = history.night(hosts.folder / "two")
    (change,) = found.changes
    assert (change.hosts, change.what[:2]) == (
        ("lab8",),
        (f"keeps bits {STIBP_SSBD} now", f"no #GP any more on bits {STIBP_SSBD}"),
    )
    assert {host for _, host in found.still} >= {"lab3", "lab5"}
    assert {host for _, host in (*found.lost, *found.still)} == {"lab3", "lab5", "lab12"}
    assert (found.missing, found.new) == ((), ())
    page = (hosts.folder / "two/2026-11-25.html").read_text()
    assert (
        page.index(f"keeps bits {STIBP_SSBD} now")
        < page.index("went down and came back")
        < page.index("Migration in this pool")
    )
    monitor = (tmp_path / "spec_ctrl_probe_lab.prom").read_text()
    assert 'spec_ctrl_probe_lab_machines{ended="record"} 13\n' in monitor
    assert "spec_ctrl_probe_lab_changed_machines 1\n" in monitor


def test_nobody_to_ask(hosts: Lab, tmp_path: Path) -> None:
    empty = tmp_path / "empty.ini"
    empty.write_text("[nobody]\n")
    done = hosts.command(*words(hosts, empty, store="empty"))
    assert done.returncode == 2
    assert "no machine in" in done.stderr
    assert not list((hosts.folder / "empty/sweeps").glob("*/plan.json")), "and no sweep is left that could go on"
