# SPDX-License-Identifier: MIT
"""The figures of KVM from outside: the first-write matrix against C, the default run, comparing, random programs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kernel_harness.kvm import guest_code
from kernel_harness.kvm.explore import explore
from kernel_harness.kvm.guest_code import Step
from kernel_harness.kvm.machine import Kvm, ticking
from kernel_harness.kvm.measure import first_writes, measure_host
from kernel_harness.kvm.policed import Judge, PolicedLaboratory
from kernel_harness.kvm.runner import Cpuids, Laboratory
from kernel_harness.kvm.study import all_profiles, default_profiles
from probe import kvm_record
from probe.models.machine import SPEC_CTRL
from probe.models.machines import MACHINES, get
from probe.models.matrix import fit
from probe.models.policy import BY_NAME
from probe.models.profile import NONE, parse_profile
from tests.bench.distinct import distinct_kvm, distinct_runs
from tests.bench.figures import figure, ratio

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
PAIRS = 5


def first_write_matrix() -> None:
    """One process each, 32 profiles, in turn; the matrix over 256 is the same eight times."""
    with tempfile.TemporaryDirectory() as text, Kvm() as kvm, ticking():
        folder = Path(text)
        compiler = ["gcc", "-O2", "-Wall", "-o", str(folder / "matrix"), str(HERE / "matrix.c")]
        subprocess.run(compiler, check=True)
        cpuids = Cpuids(kvm)
        profiles = all_profiles()[1:33]
        tables = [bytes(cpuids.table(profile).buffer) for profile in profiles]
        (folder / "cpuids").write_bytes(b"".join(tables))
        (folder / "guest").write_bytes(guest_code.CODE)
        mine: list[float] = []
        theirs: list[float] = []
        for _ in range(PAIRS):
            begin = time.monotonic()
            for profile in profiles:
                with Laboratory(kvm, cpuids) as laboratory:
                    first_writes(laboratory, profile)
            mine.append(time.monotonic() - begin)
            command = [str(folder / "matrix"), str(folder / "guest"), str(folder / "cpuids")]
            theirs.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        figure("first-write matrix / C with the same ioctls", ratio(mine, theirs), 1.25, "x")


def default_run() -> None:
    """The whole command, its record, and comparing its matrix with all models."""
    with tempfile.TemporaryDirectory() as text:
        path = Path(text) / "kvm.json"
        begin = time.monotonic()
        command = [sys.executable, "-m", "probe", "kvm", "--record", str(path)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, cwd=TOP)
        figure("kvm, the default run", time.monotonic() - begin, 15, "s")
        figure("kvm, its record", path.stat().st_size / 1024, 256, "KiB")
        rows = kvm_record.rows_of(kvm_record.decode(path.read_bytes(), "the record"))
    with Kvm() as kvm, ticking():
        host = measure_host(kvm, Cpuids(kvm), 0)
    begin = time.monotonic()
    for machine in MACHINES:
        fit(machine, host, rows)
    figure(f"a matrix of {len(default_profiles(0))} profiles with all models", time.monotonic() - begin, 1, "s")


def random_programs() -> None:
    """Against a model that this kernel follows, so that nothing ends the search early."""
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, 0)
        with Laboratory(kvm, cpuids) as laboratory:
            row = first_writes(laboratory, NONE)
        model = get("qemu-tcg" if not row["host_first_kept"] else "kvm-5.19-vmx")
        done = explore(kvm, cpuids, [model], host, most=2000, seconds=120, seed_number=1)
    figure("10,000 random programs of up to 12 steps", done.seconds * 10000 / max(done.programs, 1), 60, "s")


def policy_path() -> None:
    """Exits per second that a policy handles, in turn with a C program that makes the same ioctls."""
    entries = 20
    steps = [Step(guest_code.WRITE, SPEC_CTRL, number & 1) for number in range(1000)]
    guest = parse_profile("AMD_IBRS")
    with tempfile.TemporaryDirectory() as text, Kvm() as kvm, ticking():
        folder = Path(text)
        compiler = ["gcc", "-O2", "-Wall", "-o", str(folder / "policy"), str(HERE / "policy.c")]
        subprocess.run(compiler, check=True)
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, 0)
        (folder / "cpuid").write_bytes(bytes(cpuids.table(guest).buffer))
        (folder / "guest").write_bytes(guest_code.CODE)
        mine: list[float] = []
        theirs: list[float] = []
        for _ in range(PAIRS):
            judge = Judge(BY_NAME["emulate-guest"])
            with PolicedLaboratory(kvm, cpuids, judge, host) as laboratory:
                vcpu = laboratory.vcpu(guest)
                begin = time.monotonic()
                for _ in range(entries):
                    laboratory.guest(vcpu, steps)
                mine.append(judge.asked / (time.monotonic() - begin))
            assert judge.asked == entries * len(steps)
            command = [str(folder / "policy"), str(folder / "guest"), str(folder / "cpuid"), str(entries)]
            theirs.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    figure("exits that a policy handles / C loop", ratio(mine, theirs), 0.5, "x", at_least=True)


def pools_of_records() -> None:
    """`migrate` over folders of 1,000 records, none like another: of KVM, of runs, and of both."""
    kinds = {
        "of KVM": list(distinct_kvm(1000)),
        "of KVM, 245 CPUIDs": list(distinct_kvm(1000, whole=True)),
        "of runs": list(distinct_runs(1000)),
        "of both": [*distinct_kvm(500), *distinct_runs(500)],
    }
    for name, records in kinds.items():
        with tempfile.TemporaryDirectory() as text:
            for number, raw in enumerate(records):
                Path(text, f"{number:04}.json").write_bytes(raw)
            begin = time.monotonic()
            command = [sys.executable, "-m", "probe", "migrate", text]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOP)
            seconds = time.monotonic() - begin
        assert done.returncode == 1, done.stderr
        assert "1000 records, 1000 kinds of machine" in done.stdout, done.stdout[:200]
        figure(f"migrate, 1,000 distinct records {name}", seconds, 5, "s")


def kvm_figures() -> None:
    """All of them."""
    first_write_matrix()
    default_run()
    random_programs()
    policy_path()
    pools_of_records()
