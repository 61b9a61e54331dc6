# SPDX-License-Identifier: MIT
"""Runs in the booted guest: the agent's walk, the C walk and msr-tools in turn over the same driver, on CPU 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from probe.journal import Journal, Watchdog
from probe.msr import MsrDriver
from probe.scheduling import CpuPin, Realtime
from probe.trial import Plan, Walk, read_saved

INDEX = 0x48
DEVICE = "/dev/cpu/0/msr"


def agent_walk(folder: Path) -> float:
    with MsrDriver(writable=True) as msr, CpuPin() as pin:
        saved = {cpu: int(value) for cpu, value in read_saved(msr, INDEX, [0], pin).items()}  # type: ignore[arg-type]
        journal = Journal(folder, INDEX, saved, "bench")
        watchdog = Watchdog(msr, INDEX, saved, journal, pin)

        def intent(step: str, mask: int) -> None:
            assert watchdog.alive()
            journal.intent(step, mask)

        with Realtime():
            begin = time.monotonic()
            Walk(msr, Plan(INDEX, [0]), saved, pin, intent=intent).run()
            took = time.monotonic() - begin
        watchdog.dismiss()
        journal.close(keep=False)
    return took


def c_walk(program: str, folder: Path) -> float:
    with CpuPin() as pin, Realtime():
        pin(0)
        done = subprocess.run([program, DEVICE, str(folder / "c")], capture_output=True, check=True, text=True)
    return float(done.stdout)


def tools_walk() -> float:
    """What a shell script does with msr-tools, at its cheapest: one wrmsr and one rdmsr process a bit."""
    begin = time.monotonic()
    for bit in range(64):
        subprocess.run(["wrmsr", "-p", "0", hex(INDEX), hex(1 << bit)], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["rdmsr", "-p", "0", hex(INDEX)], capture_output=True, check=False)
    return time.monotonic() - begin


def main() -> None:
    program, runs = sys.argv[1], int(sys.argv[2])
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    subprocess.run(["modprobe", "msr"], check=True)
    if len(sys.argv) > 3:
        subprocess.run(["insmod", *sys.argv[3:]], check=True)
    figures: dict[str, list[float]] = {"tools": []}
    # The journal as it is in life, on a file system that has to be synced; and in memory, where fsync costs nothing.
    memory = Path("/run/bench")
    memory.mkdir()
    for name, folder in (("synced", Path.cwd()), ("memory", memory)):
        agent_walk(folder)
        c_walk(program, folder)
        figures[f"agent {name}"], figures[f"c {name}"] = [], []
        for _ in range(runs):
            figures[f"agent {name}"].append(agent_walk(folder))
            figures[f"c {name}"].append(c_walk(program, folder))
    figures["tools"].append(tools_walk())
    Path("figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
