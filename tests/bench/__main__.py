# SPDX-License-Identifier: MIT
"""make bench: every figure with its bound, as ratios in one run where two things are compared."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kernel_harness.boot import cache, guest, kernels, register_model
from probe.errors import ProbeError, RequirementMissing
from tests.bench.evidence import evidence_figures
from tests.bench.figures import figure, missed, note, ratio
from tests.bench.kvm import kvm_figures
from tests.bench.nights import nights_figures
from tests.bench.sweep import sweep_figures

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
DUMP = TOP / "tests/data/cpuid/threadripper-3970x.cpuid-r.txt"
RUNS = 7


def best(command: Sequence[str], runs: int = 10, *, fails: bool = False) -> float:
    """Whole-process wall time in ms, best of several: what the command costs when the machine lets it run."""
    times = []
    for _ in range(runs):
        begin = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=not fails, cwd=TOP)
        times.append((time.monotonic() - begin) * 1000)
    return min(times)


def walks() -> None:
    """The walk of one CPU through the real driver in a booted guest, against C and against msr-tools."""
    home = cache.default_cache()
    kernel = kernels.obtain(kernels.default_spec(), home, lambda text: print(text, file=sys.stderr))
    accelerator, _ = guest.accelerator(home, kernel)
    module = register_model.build(kernel, home, lambda text: print(text, file=sys.stderr))
    for name, register in (("CPU's own register", []), ("register 0x7", [str(module), "valid=0x7"])):
        with tempfile.TemporaryDirectory(dir=home) as text:
            folder = Path(text)
            compiler = ["gcc", "-O2", "-static", "-Wall", "-o", str(folder / "walk"), str(HERE / "walk.c")]
            subprocess.run(compiler, check=True)
            command = [sys.executable, str(HERE / "inside.py"), str(folder / "walk"), str(RUNS), *register]
            done = guest.run(
                kernel, command, accel=accelerator, rw_dir=folder, timeout=300, env={"PYTHONPATH": str(TOP)}
            )
            if done.returncode:
                raise ProbeError(f"the bench in the guest failed: {done.stderr.strip()[-500:]}")
            figures = json.loads((folder / "figures.json").read_text())
        agent = figures["agent synced"]
        figure(f"walk / C walk, {name}, {accelerator}", ratio(agent, figures["c synced"]), 1.5, "x")
        note(
            "  the same, journal in memory (fsync costs nothing)",
            ratio(figures["agent memory"], figures["c memory"]),
            "x",
        )
        tools = figures["tools"][0] / statistics.median(agent)
        figure(f"wrmsr and rdmsr processes / walk, {name}", tools, 50, "x", at_least=True)


def processes() -> None:
    """Start-up and prediction, as whole processes."""
    python = [sys.executable, "-m", "probe"]
    figure("--help", best([*python, "--help"]), 150, "ms")
    figure("predict, a dump", best([*python, "predict", str(DUMP)]), 300, "ms")
    figure("predict, this machine", best([*python, "predict"]), 300, "ms")


def large() -> None:
    """A scripted machine of 1,024 CPUs: walk, compare and record, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.large", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TOP)
    figures = json.loads(done.stdout)
    figure("1,024 scripted CPUs: walk, compare, record", figures["seconds"], 10, "s")
    figure("1,024 scripted CPUs: peak memory", figures["mib"], 150, "MiB")
    note("1,024 scripted CPUs: record", figures["record_kib"], "KiB")
    command[-1] = "512"
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TOP)
    figure("512 scripted CPUs: record", json.loads(done.stdout)["record_kib"], 64, "KiB")


def main() -> int:
    processes()
    large()
    evidence_figures(best)
    nights_figures()
    sweep_figures()
    if shutil.which("gcc") is None:
        print("not run: the walk against C (gcc is missing)")
        return 4
    try:
        kvm_figures()
    except RequirementMissing as error:
        print(f"not run: KVM from outside: {error}")
    try:
        walks()
    except ProbeError as error:
        print(f"not run: the walk in a guest: {error}")
        return int(error.exit_code)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
