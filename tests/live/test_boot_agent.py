# SPDX-License-Identifier: MIT
"""The agent on a real msr driver with registers of our design, and what becomes of them when it is killed.

The scenarios run in inside.py, in one guest, and each test judges one of them; three more guests are for a power cut,
the boot after it, and a kernel that is locked down from the start. PROBE_SEED repeats the random moments of a run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import UNSET

from kernel_harness.boot import guest, kernels, register_model
from kernel_harness.boot.cache import default_cache
from kernel_harness.boot.register_model import CpuState, Register, Write
from probe import record as rec
from probe.errors import ExitCode, GuestLost, RequirementMissing
from probe.journal import read_leftover
from probe.masks import ALL_BITS, bits_of, hex64, parse_hex64, parse_list
from probe.outcome import Observation
from tests.live import inside
from tests.live.inside import Case, Machine, Run, Scenario

pytestmark = pytest.mark.boot

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 900.0  # for the longest boot, on a slow machine that has no KVM
TAINT_S = 1 << 2
# What model vendor says for the two CPUs of tests/data/cpuid: (accepts, open); everything else faults.
PREDICTED = {inside.THREADRIPPER: (0x6, 0x1), inside.SAPPHIRE_RAPIDS: (0x4FF, 0x0)}


@dataclass(frozen=True)
class Bench:
    """A kernel, its module, and how to boot them."""

    kernel: kernels.Kernel
    accelerator: str
    module: Path
    seed: int

    def command(self, part: str, folder: Path) -> list[str]:
        return [sys.executable, "-m", "tests.live.inside", part, str(folder), str(self.module), str(self.seed)]

    def boot(self, part: str, folder: Path, append: Iterable[str] = ()) -> Boot:
        trouble = ""
        try:
            result = guest.run(
                self.kernel,
                self.command(part, folder),
                accel=self.accelerator,
                append=list(append),
                rw_dir=folder,
                timeout=SECONDS,
                env={"PYTHONPATH": str(REPOSITORY)},
            )
            print(result.stdout)
            if result.returncode != 0:
                trouble = f"exit status {result.returncode}: {result.stderr[-2000:]}"
        except GuestLost as error:
            trouble = str(error)
        return Boot(inside.load(folder), trouble)


@dataclass(frozen=True)
class Boot:
    """What one guest wrote down."""

    report: inside.Report
    trouble: str

    def scenario(self, name: str) -> Scenario:
        seen = self.report.scenarios.get(name)
        if seen is None:
            pytest.fail(f"the guest did not get through {self.report.running!r}: {self.trouble}", pytrace=False)
        if seen.error:
            pytest.fail(f"in the guest: {seen.error}", pytrace=False)
        return seen

    def run(self, scenario: str, name: str = "run") -> Run:
        return self.scenario(scenario).runs[name]


@pytest.fixture(scope="module")
def bench() -> Bench:
    cache = default_cache()
    try:
        kernel = kernels.obtain(os.environ.get("PROBE_KERNEL") or kernels.default_spec(), cache, print)
        module = register_model.build(kernel, cache, print)
    except RequirementMissing as error:
        if "boot" in os.environ.get("PROBE_REQUIRE", "").split(","):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(f"tier boot cannot run here: {error}")
    seed = int(os.environ.get("PROBE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"PROBE_SEED={seed}")
    return Bench(kernel, guest.accelerator(cache, kernel)[0], module, seed)


@pytest.fixture(scope="module")
def main(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    return bench.boot("main", tmp_path_factory.mktemp("main"))


# --- how a run is judged -------------------------------------------------------------------------------------------


def ended(run: Run, code: ExitCode) -> None:
    assert run.code == code, f"exit code {run.code}, wanted {code.value}; stderr: {run.err}"


def put_back(run: Run) -> None:
    assert run.after.changed == []
    assert run.left == "", "a journal is left"


def no_mitigation_went_off(after: Machine) -> None:
    assert [cpu.cleared for cpu in after.cpus] == [0] * len(after.cpus)


def nothing_written(run: Run) -> None:
    """The module saw no write; neither did the kernel, or it would have set taint bit 2."""
    assert run.after.attempts == run.before.attempts
    assert run.after.taint == run.before.taint


def written(run: Run) -> list[Write]:
    """The writes that the module saw while this agent ran, whoever made them."""
    return [write for write in run.after.writes if write.sequence >= run.before.attempts]


def kinds(record: rec.Record) -> dict[str, int]:
    """The findings' kinds, each with the mask of all its bits."""
    found: dict[str, int] = {}
    for finding in record.findings:
        found[finding.kind] = found.get(finding.kind, 0) | parse_hex64(finding.mask)
    return found


def seen_on(record: rec.Record, cpu: int) -> rec.ObservationEntry:
    (entry,) = [entry for entry in record.observations if cpu in parse_list(entry.cpus)]
    return entry


def outcomes(record: rec.Record, cpu: int) -> Observation:
    return rec.observation_of(seen_on(record, cpu).outcomes)


def steps(journal: str) -> list[str]:
    events = [json.loads(line) for line in journal.splitlines()]
    return [event["step"] for event in events if event["ev"] == "intent"]


def restored_by(journal: str) -> list[str]:
    events = [json.loads(line) for line in journal.splitlines()]
    return [event["by"] for event in events if event["ev"] == "restored" and not event["failed"]]


# --- registers -----------------------------------------------------------------------------------------------------


def by_design(register: Register, tried: int) -> Observation:
    """What must be observed, said without the agent's code."""
    if register.absent:
        return Observation(absent=tried)
    lost = register.valid & (register.dropped | register.unreadable) & ~register.initial
    return Observation(
        retained=register.valid & ~lost & tried, dropped=lost & tried, fault=~register.valid & ALL_BITS & tried
    )


def findings_by_design(case: Case, cpus: Iterable[int], tried: int) -> dict[str, int]:
    accepts, either = PREDICTED[case.cpuid]
    found: dict[str, int] = {}
    registers = [case.others.get(cpu, case.register) for cpu in cpus]
    for register in registers:
        seen = by_design(register, tried)
        fault = seen.fault | seen.absent
        for kind, mask in (
            ("unexpected_fault", accepts & fault),
            ("unexpected_accept", (seen.retained | seen.dropped) & ~(accepts | either)),
            ("not_retained", accepts & seen.dropped),
        ):
            if mask:
                found[kind] = found.get(kind, 0) | mask
    return found


@pytest.mark.parametrize("name", inside.CASES)
def test_register_is_reported_as_it_is(main: Boot, name: str) -> None:
    case, run = inside.CASES[name], main.run(f"register {name}")
    record = run.record
    assert record.walk is not UNSET
    cpus = parse_list(record.walk.cpus)
    assert cpus == ((1,) if name == "some bits" else (0, 1))
    tried = 1 << 1 | 1 << 2 | 1 << 60 if name == "some bits" else ALL_BITS
    for cpu in cpus:
        register = case.others.get(cpu, case.register)
        assert outcomes(record, cpu) == by_design(register, tried)
        saved = [entry.value for entry in record.saved if cpu in parse_list(entry.cpus)]
        assert saved == ([] if register.absent else [hex64(register.initial)])
        restore = [entry for entry in record.restore if cpu in parse_list(entry.cpus)]
        assert [(entry.state, entry.reads) for entry in restore] == [("verified", value) for value in saved]
    found = kinds(record)
    others = found.pop("cpus_differ", 0)
    assert found == findings_by_design(case, cpus, tried)
    assert bool(others) == bool(case.others)
    ended(run, ExitCode.FINDINGS if record.findings else ExitCode.AS_PREDICTED)
    put_back(run)


@pytest.mark.parametrize("name", inside.CASES)
def test_module_saw_what_was_reported(main: Boot, name: str) -> None:
    """Every write came from the agent, started from the value read first and added to it, and its fault was counted."""
    case, run = inside.CASES[name], main.run(f"register {name}")
    clears = "--clear-bits" in case.arguments
    faults = {cpu.cpu: 0 for cpu in run.after.cpus}
    taken = {cpu.cpu: cpu.initial for cpu in run.after.cpus}
    for write in run.after.writes:
        register = case.others.get(write.cpu, case.register)
        assert write.pid == run.pid
        if write.value not in (register.initial, taken[write.cpu]):
            assert taken[write.cpu] == register.initial, "each trial starts from what the register held first"
        if write.result == 0:
            taken[write.cpu] = write.value
        assert clears or write.value & register.initial == register.initial
        assert (write.result == 0) == (write.value & ~register.valid == 0)
        faults[write.cpu] += write.result != 0
    for cpu in run.after.cpus:
        assert cpu.faults == faults[cpu.cpu]
        register = case.others.get(cpu.cpu, case.register)
        assert cpu.writes == 0 if register.absent or (name == "some bits" and cpu.cpu == 0) else cpu.writes > 0
        assert cpu.cleared == (register.initial if clears else 0)
        if cpu.writes and name != "some bits":
            repeat = 2 if "--repeat" in case.arguments else 1
            assert cpu.faults == repeat * len(list(bits_of(~register.valid & ALL_BITS)))
            assert cpu.set == (register.valid | register.initial) & ~register.dropped


def test_all_accepted_bits_together(main: Boot) -> None:
    for name, value, got in (
        ("0x5ff", 0x5FF, 0x5FF),
        ("accepts all, keeps all", ALL_BITS, ALL_BITS),
        ("accepts all, drops all", ALL_BITS, 0),
        ("dropped and unreadable", 0x1FF, 0x7D),
    ):
        together = seen_on(main.run(f"register {name}").record, 0).combined
        assert together is not UNSET
        assert (together.value, together.got) == (hex64(value), hex64(got))
        assert together.expected == together.got


def test_pairs(main: Boot) -> None:
    entry = seen_on(main.run("register pairs and repeat").record, 0)
    assert (entry.pairs_tried, entry.bad_pairs) == (10 * 9 // 2, [])


def test_clear_bits(main: Boot) -> None:
    for name in ("clear bits", "base zero"):
        cleared = seen_on(main.run(f"register {name}").record, 1).cleared
        assert cleared is not UNSET
        assert rec.observation_of(cleared) == Observation(retained=0x5)


def test_base_zero_needs_clear_bits(main: Boot) -> None:
    run = main.run("base zero refused")
    ended(run, ExitCode.USAGE)
    assert "would switch off IBRS|SSBD on CPUs 0-1" in run.err
    assert "--clear-bits" in run.err
    nothing_written(run)


def test_noise_is_unstable_never_dropped(main: Boot) -> None:
    unsteady = 0
    runs = main.scenario("noise").runs
    never_still = runs.pop("2")
    ended(never_still, ExitCode.REQUIREMENT_MISSING)
    assert "does not hold still" in seen_on(never_still.record, 0).absent_because
    assert never_still.after.attempts == 0
    for name, run in runs.items():
        for cpu in (0, 1):
            seen = outcomes(run.record, cpu)
            assert seen.retained | seen.unstable == 0x7, f"every {name}th read"
            assert (seen.dropped, seen.altered, seen.fault) == (0, 0, ALL_BITS & ~0x7)
            unsteady |= seen.unstable
        ended(run, ExitCode.AS_PREDICTED)
        put_back(run)
        no_mitigation_went_off(run.after)
    assert unsteady == 0x7


def test_kernel_that_rewrites_the_register(main: Boot) -> None:
    runs = main.scenario("rewrite").runs
    ended(runs["set"], ExitCode.AS_PREDICTED)
    assert outcomes(runs["set"].record, 0) == Observation(retained=0x7, fault=ALL_BITS & ~0x7)
    ended(runs["set, to be cleared"], ExitCode.FINDINGS)
    assert kinds(runs["set, to be cleared"].record) == {"not_clearable": 0x1}
    assert outcomes(runs["cleared"].record, 0) == Observation(retained=0x6, dropped=0x1, fault=ALL_BITS & ~0x7)
    for run in runs.values():
        put_back(run)


# --- a register that cannot be put back ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cpu", "base"), [("sticky", 0, 0x1), ("one sticky CPU", 1, 0x5)])
def test_sticky_bit_ends_the_walk_and_is_said_first(main: Boot, name: str, cpu: int, base: int) -> None:
    run = main.run(name)
    ended(run, ExitCode.NOT_RESTORED)
    assert [f"CPU {cpu}: {base | 2:#x}, not {base:#x}"] == run.after.changed
    lines = run.out.splitlines()
    assert lines[0].endswith("NOT PUT BACK")
    assert next(line for line in lines if line.startswith("  1.")).startswith(f"  1. not_restored, CPU {cpu}: ")
    assert run.record.findings[0].kind == "not_restored"
    assert f"{base | 2:#018x}" in run.record.findings[0].text
    assert {entry.cpus: entry.state for entry in run.record.restore} == {str(cpu): "failed", str(1 - cpu): "verified"}
    stuck = next(i for i, write in enumerate(run.after.writes) if write.cpu == cpu and write.value == base | 2)
    assert all(write.cpu == cpu and write.value == base for write in run.after.writes[stuck + 1 :])
    assert len(run.after.writes) > stuck + 1, "nobody tried to put it back"
    assert steps(run.left)[-1] == "bit 1", "the journal must stay, and tell where it was"


def test_stopped_walk_makes_no_difference_between_cpus(main: Boot) -> None:
    """CPU 0 got to bit 1, CPU 1 did not: that is no difference between the CPUs."""
    for name in ("sticky", "allow_writes=off in the middle"):
        assert "cpus_differ" not in kinds(main.run(name).record)


def test_sticky_register_is_still_there_for_the_next(main: Boot) -> None:
    for name in ("next", "restore"):
        run = main.run("sticky", name)
        ended(run, ExitCode.NOT_RESTORED)
        assert "CPUs 0 cannot be put back" in run.err
        assert "a reboot" in run.err
        assert {write.value for write in written(run)} == {0x1}


def test_writes_forbidden_in_the_middle_of_a_trial(main: Boot) -> None:
    run = main.run("allow_writes=off in the middle")
    ended(run, ExitCode.NOT_RESTORED)
    assert run.out.splitlines()[0].endswith("NOT PUT BACK")
    assert len(run.after.changed) == 1
    restore = main.run("allow_writes=off in the middle", "restore")
    ended(restore, ExitCode.AS_PREDICTED)
    put_back(restore)


# --- taint and modules ---------------------------------------------------------------------------------------------


def test_taint_goes_from_0_to_4_and_is_recorded(main: Boot) -> None:
    run = main.run("the CPU's own register", "own")
    assert run.code in (ExitCode.AS_PREDICTED, ExitCode.FINDINGS), run.err
    wrote = bool(run.record.restore)  # a guest CPU without the register: nothing was written, no taint
    assert (run.before.taint, run.after.taint) == (0, TAINT_S if wrote else 0)
    kernel = run.record.kernel
    assert (kernel.taint_before, kernel.taint_after) == (run.before.taint, run.after.taint)
    assert ("taints the kernel (bit 2, 'S'), even one that takes #GP" in run.err) == wrote


def test_modules_it_loaded_are_unloaded_again(main: Boot) -> None:
    run = main.run("the CPU's own register", "own")
    assert "msr" not in run.before.modules
    assert run.record.kernel.modules_loaded == ["cpuid", "msr"]
    assert run.after.modules == run.before.modules


def test_modules_that_were_there_stay(main: Boot) -> None:
    run = main.run("drivers there before")
    ended(run, ExitCode.AS_PREDICTED)
    assert {"msr", "cpuid"} <= set(run.before.modules)
    assert run.record.kernel.modules_loaded == []
    assert run.after.modules == run.before.modules


def test_no_run_that_ends_by_itself_leaves_a_module(main: Boot) -> None:
    for name, seen in main.report.scenarios.items():
        for which, run in seen.runs.items():
            if run.code >= 0:
                assert set(run.after.modules) <= set(run.before.modules), f"{name}: {which}"


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "run", "says"),
    [
        ("not root", "nobody", ["not root", "CAP_SYS_RAWIO"]),
        ("no CAP_SYS_RAWIO", "without", ["cannot open /dev/cpu/0/msr", "CAP_SYS_RAWIO"]),
        ("allow_writes=off", "off", ["msr.allow_writes=off", "/sys/module/msr/parameters/allow_writes"]),
        ("lockdown, securityfs not mounted", "mounted", ["kernel lockdown (integrity)"]),
    ],
)
def test_three_eperms_are_told_apart(main: Boot, scenario: str, run: str, says: list[str]) -> None:
    seen = main.run(scenario, run)
    ended(seen, ExitCode.REQUIREMENT_MISSING)
    assert [text for text in says if text not in seen.err] == []
    assert sum(word in seen.err for word in ("CAP_SYS_RAWIO", "allow_writes=off", "lockdown")) == 1
    nothing_written(seen)
    assert seen.raw == ""
    put_back(seen)


def test_refusals_left_no_taint(main: Boot) -> None:
    for scenario, name in (("not root", "nobody"), ("no CAP_SYS_RAWIO", "without"), ("allow_writes=off", "off")):
        assert main.run(scenario, name).after.taint == 0


def test_lockdown_that_securityfs_does_not_tell(main: Boot) -> None:
    """The kernel refuses every write: no bit is measured, and that is no success."""
    run = main.run("lockdown, securityfs not mounted")
    ended(run, ExitCode.REQUIREMENT_MISSING)
    assert run.out.splitlines()[0].endswith("nothing measured")
    assert "does not tell whether the kernel is locked down" in " ".join(run.out.split())
    assert outcomes(run.record, 0) == Observation(refused=ALL_BITS)
    nothing_written(run)
    put_back(run)


def test_plan_writes_nothing(main: Boot) -> None:
    run = main.run("plan", "plan")
    ended(run, ExitCode.AS_PREDICTED)
    assert run.record.walk is UNSET
    assert run.after.taint == 0
    assert main.scenario("plan").notes["state dir"] == "False"


def test_restore_needs_root(main: Boot) -> None:
    run = main.run("not root", "restore")
    ended(run, ExitCode.REQUIREMENT_MISSING)
    assert "not root" in run.err


def test_second_probe_is_refused(main: Boot) -> None:
    seen = main.scenario("two at once")
    first = seen.runs["first"]
    for name in ("second", "restore"):
        ended(seen.runs[name], ExitCode.REQUIREMENT_MISSING)
        assert f"another probe is running on this machine (process {first.pid})" in seen.runs[name].err
    assert seen.notes["the first still ran"] == "True"
    ended(first, ExitCode.AS_PREDICTED)
    assert {write.pid for write in first.after.writes} == {first.pid}
    put_back(first)


def test_second_probe_with_a_folder_of_its_own_is_refused(main: Boot) -> None:
    """It would read a trial's value of the first one, take it for the register's, and put that back."""
    seen = main.scenario("two at once, two folders")
    ended(seen.runs["second"], ExitCode.REQUIREMENT_MISSING)
    ended(seen.runs["first"], ExitCode.AS_PREDICTED)
    assert {write.pid for write in seen.runs["first"].after.writes} == {seen.runs["first"].pid}
    put_back(seen.runs["first"])


def test_journal_on_a_full_disk(main: Boot) -> None:
    run = main.run("disk full", "full")
    ended(run, ExitCode.REQUIREMENT_MISSING)
    assert "No space left on device" in run.err
    assert "--state-dir" in run.err
    assert run.after.attempts == 0
    put_back(run)


def test_full_disk_is_no_incident_for_the_next_run(main: Boot) -> None:
    run = main.run("disk full", "space again")
    ended(run, ExitCode.AS_PREDICTED)
    assert "found a journal" not in run.err


def test_disk_that_fills_up_in_the_middle(main: Boot) -> None:
    run = main.run("disk fills up")
    ended(run, ExitCode.FAILED)
    assert "cannot append to the journal" in run.err
    assert "2 registers put back and verified" in run.err
    assert run.after.attempts > 100
    put_back(run)


# --- signals and deaths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scenario", "run"), [("SIGINT", "run"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGHUP")])
def test_signal_stops_between_two_writes(main: Boot, scenario: str, run: str) -> None:
    seen = main.run(scenario, run)
    ended(seen, ExitCode.INTERRUPTED)
    assert f"{'SIGINT' if scenario == 'SIGINT' else run} before bit" in seen.err
    assert "2 registers put back and verified" in seen.err
    assert 0 < seen.after.attempts - seen.before.attempts < 100
    put_back(seen)
    no_mitigation_went_off(seen.after)
    assert {write.pid for write in written(seen)} == {seen.pid}


def test_sigint_at_any_moment(main: Boot, bench: Bench) -> None:
    for kill in main.scenario("SIGINT at any moment").kills:
        which = f"after {kill.after:.3f} s, PROBE_SEED={bench.seed}: {kill.err}"
        assert kill.code in (ExitCode.INTERRUPTED, ExitCode.AS_PREDICTED), which
        assert (kill.changed, kill.left, kill.cleared, kill.rescued) == ([], "", 0, False), which
        assert "Traceback" not in kill.err, which


def test_sigint_at_any_moment_leaves_no_module(main: Boot, bench: Bench) -> None:
    for kill in main.scenario("SIGINT at any moment").kills:
        assert kill.new_modules == [], f"after {kill.after:.3f} s, PROBE_SEED={bench.seed}: {kill.err}"


def test_sigkill_at_100_random_moments(main: Boot, bench: Bench) -> None:
    seen = main.scenario("SIGKILL at random moments")
    seed = f"PROBE_SEED={bench.seed}, {seen.notes}"
    assert len(seen.kills) == inside.KILLS == 100
    for number, kill in enumerate(seen.kills):
        which = f"kill {number}, {kill.after:.3f} s into the walk, {seed}; journal's end: {kill.left[-300:]}"
        assert kill.changed == [], which
        assert kill.cleared == 0, which
        if steps(kill.left):  # the agent may have put everything back before it was killed, and not ended the journal
            assert restored_by(kill.left) in (["watchdog"], ["agent", "watchdog"]), which
    in_the_walk = [kill for kill in seen.kills if kill.code < 0 and steps(kill.left)]
    assert len(in_the_walk) >= 60, f"only {len(in_the_walk)} of 100 kills fell into the walk; {seed}"
    rescued = [kill for kill in in_the_walk if kill.rescued]
    assert len(rescued) >= 15, f"only {len(rescued)} kills found a register changed; {seed}"
    assert seen.runs["last"].record.saved == [rec.Saved(cpus="0-1", value=hex64(0x5))]
    put_back(seen.runs["last"])


def test_registers_are_back_within_a_second(main: Boot) -> None:
    """The contract's second, for most of them: the computer that emulates all this may pause for longer."""
    waits = sorted(kill.seconds_to_free for kill in main.scenario("SIGKILL at random moments").kills)
    assert waits[len(waits) * 9 // 10] < 1.0, waits


def test_sigkill_in_a_trial_and_the_run_after_it(main: Boot) -> None:
    seen = main.scenario("agent killed")
    killed, after = seen.runs["killed"], seen.runs["next"]
    assert killed.code == -9
    assert killed.after.changed == []
    no_mitigation_went_off(killed.after)
    rescue = killed.after.writes[-1]
    assert (rescue.pid != killed.pid, rescue.value) == (True, 0x5)
    assert restored_by(killed.left) == ["watchdog"]
    ended(after, ExitCode.AS_PREDICTED)
    assert f"(process {killed.pid}) died at {steps(killed.left)[-1]!r}" in after.err
    assert "the watchdog put every register back, verified" in after.err
    assert seen.notes["filed away"] == killed.left
    put_back(after)


def test_restore_after_agent_and_watchdog_were_killed(main: Boot) -> None:
    seen = main.scenario("both killed, restore")
    killed, restore, again = (seen.runs[name] for name in ("killed", "restore", "restore again"))
    assert len(killed.after.changed) == 1
    assert restored_by(killed.left) == []
    ended(restore, ExitCode.AS_PREDICTED)
    assert f"died at {steps(killed.left)[-1]!r}, and nobody has put the registers back yet" in restore.out
    assert "put back and verified: CPUs 0-1: 0x0000000000000005" in restore.out
    (write,) = written(restore)  # the other register held the right value
    assert (write.pid, write.value) == (restore.pid, 0x5)
    put_back(restore)
    ended(again, ExitCode.AS_PREDICTED)
    assert "no journal" in again.out
    assert again.after.attempts == restore.after.attempts


def test_run_after_agent_and_watchdog_were_killed(main: Boot) -> None:
    seen = main.scenario("both killed, run")
    assert len(seen.runs["killed"].after.changed) == 1
    after = seen.runs["next"]
    ended(after, ExitCode.AS_PREDICTED)
    assert "nobody has put the registers back yet" in after.err
    assert "put back and verified: CPUs 0-1: 0x0000000000000005" in after.err
    assert after.record.saved == [rec.Saved(cpus="0-1", value=hex64(0x5))]
    put_back(after)


def test_walk_stops_when_the_watchdog_is_killed(main: Boot) -> None:
    seen = main.scenario("watchdog killed")
    run = seen.runs["run"]
    ended(run, ExitCode.FAILED)
    assert "the watchdog process has died" in run.err
    assert "2 registers put back and verified" in run.err
    killed_at = int(steps(seen.notes["killed at"])[0].split()[1])
    tried = {write.value & ~0x5 for write in run.after.writes}
    assert not [bit for bit in range(killed_at + 3, 64) if 1 << bit in tried], f"killed at bit {killed_at}"
    put_back(run)
    no_mitigation_went_off(run.after)


def test_watchdog_is_bound_to_no_cpu(main: Boot) -> None:
    """On the one CPU that the agent happened to read last, a real-time task could keep it from ever running."""
    seen = main.scenario("watchdog's CPUs")
    assert seen.notes["watchdog"] == seen.notes["machine"]


# --- CPUs that go --------------------------------------------------------------------------------------------------


def gone(run: Run) -> tuple[Observation, CpuState]:
    """CPU 1's observation, which ends where it went, and its register as the module has it."""
    record = run.record
    assert outcomes(record, 0) == Observation(retained=0x7, fault=ALL_BITS & ~0x7)
    one = outcomes(record, 1)
    assert one.tried == ALL_BITS
    assert one.absent.bit_length() == 64, "the last bit cannot have been tried"
    assert one.absent & (one.absent + (one.absent & -one.absent)) & ALL_BITS == 0, "all from one bit on"
    assert (one.retained | one.fault) & one.absent == 0
    assert (one.refused, one.dropped, one.altered, one.unstable) == (0, 0, 0, 0)
    assert "offline" in seen_on(record, 1).absent_because
    (state,) = [cpu for cpu in run.after.cpus if cpu.cpu == 1]
    return one, state


@pytest.mark.parametrize(("scenario", "online"), [("CPU offline", False), ("CPU offline and back", True)])
def test_cpu_goes_offline_in_the_walk(main: Boot, scenario: str, online: bool) -> None:
    run = main.run(scenario)
    one, state = gone(run)
    assert one.absent & 0x3 == 0, "bits 0 and 1 were tried before"
    assert state.online == online
    (proof,) = [entry for entry in run.record.restore if entry.cpus == "1"]
    assert "offline" in proof.note
    assert (proof.state, proof.reads) == (("verified", hex64(0x5)) if online else ("left", UNSET))
    put_back(run)
    no_mitigation_went_off(run.after)


def test_cpu_that_stays_away_is_not_verified(main: Boot) -> None:
    run = main.run("CPU offline")
    assert list(kinds(run.record)) == ["not_verified", "incomplete"]
    assert run.out.splitlines()[0].endswith("NOT VERIFIED")
    ended(run, ExitCode.NOT_RESTORED)


def test_cpu_that_comes_back_is_verified_and_incomplete(main: Boot) -> None:
    run = main.run("CPU offline and back")
    assert list(kinds(run.record)) == ["incomplete"]
    ended(run, ExitCode.FINDINGS)


def test_cpu_goes_and_comes_within_one_trial(main: Boot) -> None:
    run = main.run("CPU offline while changed")
    seen = outcomes(run.record, 1)
    assert seen.retained | seen.unstable | seen.absent | seen.fault == ALL_BITS
    assert (seen.dropped, seen.altered) == (0, 0)
    put_back(run)
    no_mitigation_went_off(run.after)


# --- power cut -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A guest was killed in the middle of a walk; state is what lay on its disk then."""

    folder: Path
    state: Path
    last_step: str


@pytest.fixture(scope="module")
def cut(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    folder = tmp_path_factory.mktemp("cut")
    journal = folder / "state" / "journal.ndjson"
    with guest.start(
        bench.kernel,
        bench.command("cut", folder),
        accel=bench.accelerator,
        rw_dir=folder,
        env={"PYTHONPATH": str(REPOSITORY)},
        lifetime=SECONDS,
    ) as machine:
        deadline = time.monotonic() + SECONDS
        while '"bit 5"' not in (journal.read_text(encoding="utf-8") if journal.exists() else ""):
            assert machine.running(), f"the guest ended: {machine.console} {machine.stderr}"
            assert time.monotonic() < deadline, f"no walk: {machine.console} {machine.stderr}"
            time.sleep(0.01)
        machine.kill()
    state = tmp_path_factory.mktemp("evidence") / "state"
    shutil.copytree(folder / "state", state)
    return Cut(folder, state, steps(journal.read_text(encoding="utf-8"))[-1])


@pytest.fixture(scope="module")
def after_cut(bench: Bench, cut: Cut) -> Boot:
    return bench.boot("after the cut", cut.folder)


def test_journal_tells_at_which_bit_the_power_went(cut: Cut) -> None:
    leftover = read_leftover(cut.state)
    assert leftover is not None
    assert leftover.step == cut.last_step
    assert int(cut.last_step.split()[1]) >= 5
    assert leftover.saved == {0: 0x5, 1: 0x5}
    assert leftover.restored_by == ""
    assert f"died at {cut.last_step!r}" in leftover.tell(same_boot=False)


def test_run_after_a_power_cut_reports_it_and_writes_no_old_value(cut: Cut, after_cut: Boot) -> None:
    run = after_cut.run("after the cut", "first")
    ended(run, ExitCode.AS_PREDICTED)
    assert f"died at {cut.last_step!r}, and the machine has rebooted since" in run.err
    assert 0x5 not in {write.value for write in run.after.writes}
    assert all(write.value & 0x2 for write in run.after.writes), "this boot's own value, in each of them"
    assert run.record.saved == [rec.Saved(cpus="0-1", value=hex64(0x2))]
    put_back(run)
    filed = (cut.folder / "state" / "last-incident.ndjson").read_text(encoding="utf-8")
    assert filed == (cut.state / "journal.ndjson").read_text(encoding="utf-8")


def test_power_cut_is_told_once(after_cut: Boot) -> None:
    run = after_cut.run("after the cut", "second")
    ended(run, ExitCode.AS_PREDICTED)
    assert "found a journal" not in run.err


# --- locked down from the start ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(bench: Bench, cut: Cut, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    folder = tmp_path_factory.mktemp("locked")
    shutil.copytree(cut.state, folder / "state")
    return bench.boot("locked down", folder, append=["lockdown=integrity"])


def test_kernel_booted_with_lockdown(locked: Boot) -> None:
    run = locked.run("locked down")
    ended(run, ExitCode.REQUIREMENT_MISSING)
    assert "kernel lockdown (integrity) forbids MSR writes" in run.err
    assert "run --in guest" in run.err
    assert (run.before.taint, run.after.taint) == (0, 0)
    assert run.after.modules == run.before.modules


def test_restore_after_a_power_cut_only_tells(cut: Cut, locked: Boot) -> None:
    run = locked.run("locked down", "restore")
    ended(run, ExitCode.AS_PREDICTED)
    assert f"died at {cut.last_step!r}, and the machine has rebooted since" in run.out
    assert "nothing to put back" in run.out
    assert run.left == ""
    assert run.after.taint == 0
