# SPDX-License-Identifier: MIT
"""A night on sixteen hosts, most of them failing in a way of their own, by the recipe of README; nothing is lost or
counted twice."""

from __future__ import annotations

import json
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernel_harness.lab import history, nights
from kernel_harness.lab.agent_file import build
from probe import record as rec
from tests.live.lab_hosts import PATH, Lab, lab

pytestmark = pytest.mark.lab
README = Path(__file__).resolve().parents[2] / "README.md"
COUNT = 16
GOOD = ("lab1", "lab2", "lab4", "lab6", "lab8", "lab15", "lab16")
SLOW = "--repeat 1000"  # some 20 s


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab"), COUNT) as made:
        build(made.folder / "spec-ctrl-probe.pyz", print)
        yield made


def recipe() -> str:
    """Return the command that clush gives to every host, as README has it."""
    text = README.read_text(encoding="utf-8")
    found = re.search(r"clush -S -w 'lab\[1-16\]' --outdir=out \\\n +'(.*)' < spec-ctrl-probe\.pyz", text)
    assert found, "README has the recipe"
    return found.group(1)


def clush(hosts: Lab, command: str) -> list[str]:
    """Return the command line on the controller."""
    clush = str(Path(sys.executable).parent / "clush")
    options = ["-S", "-w", f"lab[1-{COUNT}]", f"--outdir={hosts.folder}/out", "-o", f"-F {hosts.ssh_config}"]
    return [clush, *options, command]


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def register(hosts: Lab, name: str) -> int:
    """Return what is in IA32_SPEC_CTRL of a host's CPU 0."""
    code = "import os; print(os.pread(os.open('/dev/cpu/0/msr', os.O_RDONLY), 8, 0x48).hex())"
    value: int = struct.unpack("<Q", bytes.fromhex(hosts.inside(name, "python3", "-c", code).strip()))[0]
    return value


def configure(hosts: Lab, name: str, *lines: str, path: str = PATH) -> None:
    """Give a host's sshd more lines, and another PATH for what it starts."""
    file = hosts.folder / name / "sshd_config"
    text = file.read_text(encoding="utf-8").replace(f"PATH={PATH} ", f"PATH={path} ")
    file.write_text(text + "".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def night(hosts: Lab) -> tuple[Lab, nights.Ingested]:
    """One night by clush: hosts are down, cut off, killed, full, without Python, without rights, or talk nonsense."""
    out = hosts.folder / "out"
    slow = f"case $(hostname) in lab9|lab10|lab11) set -- {SLOW};; esac; "
    command = slow + recipe().replace("--stream", '--stream "$@"')
    configure(hosts, "lab5", path="/run/tools")
    configure(hosts, "lab7", r'ForceCommand printf "Last login: yesterday\n"')
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups env TMPDIR=/run/nobody"
    configure(hosts, "lab12", f'ForceCommand {nobody} sh -c "$SSH_ORIGINAL_COMMAND"')
    more = {
        "lab12": "mkdir -m 1777 /run/nobody",
        "lab14": "mount -o remount,size=16k /run/scratch",
    }
    for name in hosts.names:
        hosts.boot(name, more.get(name, ""))
    hosts.wait_for([name for name in hosts.names if name != "lab7"])
    hosts.link("lab3", "down")
    known = (hosts.folder / "known_hosts").read_text()
    other = (hosts.folder / "lab1" / "host_key.pub").read_text()
    wrong = f"192.0.2.13 {other.strip()}"
    keys = [wrong if line.startswith("192.0.2.13 ") else line for line in known.splitlines()]
    (hosts.folder / "known_hosts").write_text("".join(f"{line}\n" for line in keys))

    running = hosts.start(*clush(hosts, command), stdin=hosts.folder / "spec-ctrl-probe.pyz")
    for name in ("lab9", "lab10", "lab11"):  # clush writes some KiB at a time
        until(lambda file=out / name: file.exists() and b'"bit 63"' in file.read_bytes())  # type: ignore[misc]
    hosts.link("lab9", "down")
    hosts.power_cut("lab10")
    hosts.inside("lab11", "pkill", "-KILL", "-o", "-f", "^python3 .* run --in metal")
    running.wait(60)
    assert running.returncode != 0, "clush -S tells that hosts failed"
    said = (hosts.folder / "said").read_text()
    assert "clush: lab12: exited with exit code 4" in said, "the agent's own exit code"
    assert "clush: lab1: exited with exit code 1" in said, "findings: the register is a file"
    return hosts, nights.ingest(out, hosts.folder / "nights", print)


def test_who_gave_a_record_and_what_became_of_the_others(night: tuple[Lab, nights.Ingested]) -> None:
    hosts, done = night
    today = max(done.dates)
    rows = nights.rows(hosts.folder / "nights", today)
    assert sorted({row.host for row in rows if not row.lost}) == sorted(GOOD)
    assert (done.new, done.again) == (len(GOOD), 0)
    lost = dict(done.lost)
    for name in ("lab9", "lab10", "lab11"):
        assert re.match("pair |bit ", lost.pop(name)), "it died under the probe, and this is where"
    assert "root" in lost.pop("lab12")
    assert lost.pop("lab7") == "nothing that it said is known"
    assert lost == dict.fromkeys(("lab3", "lab5", "lab13", "lab14"), "it said nothing")
    assert {one.file for one in done.bad} == {"lab7"}
    assert {row.host for row in rows} == set(hosts.names), "every host is in the night, once"
    assert len({row.sha256 for row in rows if not row.lost}) == len(GOOD)
    assert all(row.retained == (1 << 64) - 1 for row in rows if not row.lost), "the register is a file"


def test_the_same_night_again_adds_nothing(night: tuple[Lab, nights.Ingested]) -> None:
    hosts, _ = night
    again = nights.ingest(hosts.folder / "out", hosts.folder / "nights", print)
    assert (again.new, again.again) == (0, len(GOOD))
    answer = history.ask(hosts.folder / "nights", "missing")
    assert {row[0] for row in answer.rows} == set(hosts.names) - set(GOOD)


def test_registers_are_put_back_whatever_happened(night: tuple[Lab, nights.Ingested]) -> None:
    """The agent of lab9 has lost its reader, that of lab11 was killed; lab10 has no power, so its journal tells."""
    hosts, _ = night
    for name in (*GOOD, "lab9", "lab11"):
        until(lambda name=name: register(hosts, name) == 0)  # type: ignore[misc]
    hosts.boot("lab10")
    hosts.wait_for(["lab10"])
    journal = (hosts.folder / "lab10/disk/spec-ctrl-probe/journal.ndjson").read_text()
    on_disk = [event["step"] for line in journal.splitlines() if (event := json.loads(line))["ev"] == "intent"]
    lines = (hosts.folder / "out/lab10").read_text().splitlines()
    streamed = [event["step"] for line in lines if (event := json.loads(line))["event"] == "intent"]
    assert streamed == on_disk[: len(streamed)], "the stream says what the disk says"
    assert len(on_disk) - len(streamed) < 200, "and is not far behind it: what was on its way"


def test_hosts_that_are_mended_are_lost_no_more(night: tuple[Lab, nights.Ingested]) -> None:
    hosts, _ = night
    store = hosts.folder / "nights"
    hosts.link("lab3", "up")
    hosts.link("lab9", "up")
    hosts.wait_for(["lab3", "lab9", "lab10", "lab11"])
    until(lambda: "run --in metal" not in hosts.inside("lab9", "ps", "axww"))
    again = hosts.folder / "again"
    words = clush(hosts, recipe())
    words[words.index("-w") + 1] = "lab[3,9-11]"
    words[words.index(f"--outdir={hosts.folder}/out")] = f"--outdir={again}"
    done = hosts.command(*words, stdin=hosts.folder / "spec-ctrl-probe.pyz")
    assert sorted(path.name for path in again.iterdir()) == ["lab10", "lab11", "lab3", "lab9"], done.stderr
    taken = nights.ingest(again, store, print)
    assert (taken.new, taken.lost) == (4, {}), done.stderr
    missing = {row[0] for row in history.ask(store, "missing").rows}
    assert missing == set(hosts.names) - set(GOOD) - {"lab3", "lab9", "lab10", "lab11"}
    records = list(store.glob("*/records/*.json"))
    assert len(records) == len(GOOD) + 4
    assert all(rec.decode(path.read_bytes(), path.name).tool.agent for path in records)
