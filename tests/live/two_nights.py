# SPDX-License-Identifier: MIT
"""Two nights of sixteen hosts, three of them failing in ways of their own, and one change: for the test, and by

    python -m tests.live.two_nights DIR

for results/ (needs root; the second night is today, the first is dated yesterday).
"""

from __future__ import annotations

import datetime
import shutil
import sys
import tempfile
import time
from pathlib import Path

from kernel_harness.lab.agent_file import build
from tests.live.lab_hosts import Lab, lab

COUNT = 16
VALID, PLANTED = 0x80, 0x86
DOWN, NO_PYTHON, DIES, CHANGES = "lab3", "lab5", "lab12", "lab8"
HIDE_PYTHON = """
touch /run/none
for file in /usr/bin/python3* /usr/local/bin/python3*; do [ ! -f $file ] || mount --bind /run/none $file; done
"""


def ready(hosts: Lab) -> Path:
    """Boot all hosts, with one's link down and one without Python, and return the inventory."""
    for name in hosts.names:
        hosts.register(name, VALID)
        hosts.boot(name, HIDE_PYTHON if name == NO_PYTHON else "")
    hosts.wait_for(hosts.names)
    hosts.link(DOWN, "down")
    lines = [f"{name} spec_ctrl_run='--repeat 1000'" if name == DIES else name for name in hosts.names]
    path = hosts.folder / "two.ini"
    common = [f"ansible_ssh_common_args='-F {hosts.ssh_config}'", "ansible_user=root"]
    path.write_text("\n".join([*lines, "[all:vars]", *common]) + "\n")
    return path


def night(hosts: Lab, inventory: Path, store: Path, date: str, agent: Path, *more: str) -> int:
    """Run one night, in which one host loses its power under the probe and comes back; return the exit code."""
    begun = time.time()
    command = [str(Path(sys.executable).parent / "spec-ctrl-probe"), "nightly", "run", "-i", str(inventory), "--write"]
    command += ["--store", str(store), "--night", date, "--agent", str(agent), "--wait", "30", *more]
    running = hosts.start(*command, stdout=hosts.folder / f"{date}.out")
    journal = hosts.folder / DIES / "disk/spec-ctrl-probe/journal.ndjson"
    while not (journal.exists() and journal.stat().st_mtime > begun and '"bit 63"' in journal.read_text()):
        assert running.poll() is None and time.time() < begun + 60, (hosts.folder / "said").read_text()
        time.sleep(0.05)
    hosts.power_cut(DIES)
    while f"{DIES} went away" not in (hosts.folder / "said").read_text():
        assert time.time() < begun + 90
        time.sleep(0.05)
    hosts.boot(DIES)
    return running.wait(180)


def main() -> None:
    """Make the evidence."""
    target = Path(sys.argv[1]).resolve()
    today = datetime.datetime.now(datetime.timezone.utc).date()
    with tempfile.TemporaryDirectory() as text, lab(Path(text), COUNT) as hosts:
        store = hosts.folder / "nights"
        build(hosts.folder / "agent.pyz", print)
        inventory = ready(hosts)
        for date, valid in ((today - datetime.timedelta(days=1), VALID), (today, PLANTED)):
            hosts.register(CHANGES, valid)
            more = ("--textfile", text, "--kcidb", "spec_ctrl_probe")
            code = night(hosts, inventory, store, str(date), hosts.folder / "agent.pyz", *more)
            print((hosts.folder / f"{date}.out").read_text(), f"exit code {code}", sep="")
        shutil.copy(hosts.folder / "spec_ctrl_probe_lab.prom", store)
        left_out = shutil.ignore_patterns("sweeps", ".lock", "*.parquet")
        shutil.copytree(store, target, ignore=left_out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
