# SPDX-License-Identifier: MIT
"""Whole runs of the agent over scripted machines: what it refuses, what it changes, and what it puts back."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec import UNSET

from probe import entries
from probe import record as rec
from probe.cli import exit_code
from probe.cpuid.dumps import Dump
from probe.cpuid.machine import MachineCpuid
from probe.cpuid.snapshot import Snapshot
from probe.errors import DeviceError, ExitCode, Interrupted, NotRestored, ProbeError, RequirementMissing, UsageError
from probe.host import Host
from probe.journal import Journal, Lock, read_leftover
from probe.masks import ALL_BITS, hex64
from probe.outcome import Restored
from probe.registers import BP_CFG, STIBP
from probe.report import text
from probe.run import TAINT_WARNING, Ears, Options, run
from tests.fakes import SPEC_CTRL, FakeMsr, FakeRegister
from tests.fakes_machine import HOSTS, cpuid_of, in_guest, make_tree, sapphire_rapids, small_cpu, threadripper

BOOT_ID = "0f8fad5b-d9cb-469f-a165-70867728950e"  # of tests/data/hosts/threadripper-3970x


@dataclass
class World:
    """A machine whose every edge is ours; folder holds its kernel's files and the agent's state."""

    folder: Path
    registers: dict[int, FakeRegister]
    cpus: dict[int, Snapshot]
    others: dict[tuple[int, int], int] = field(default_factory=dict)
    processes: list[tuple[int, str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.msr = FakeMsr(self.registers, self.others)
        shutil.copytree(HOSTS / "threadripper-3970x", self.folder / "root")

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def set(self, files: dict[str, str]) -> None:
        make_tree(self.folder / "root", files)

    def run(self, **wanted: object) -> rec.Record:
        options = Options(**{"write": True, "state_dir": self.state, **wanted})  # type: ignore[arg-type]
        ears = Ears(self.said.append, lambda done, total: self.progress.append((done, total)))
        return run(
            options,
            ears,
            msr=self.msr,
            host=Host(self.folder / "root", lambda: self.processes),
            read_cpuid=self.read_cpuid,
        )

    def read_cpuid(self, cpus: Sequence[int]) -> MachineCpuid:
        return cpuid_of({cpu: self.cpus[cpu] for cpu in cpus})

    @property
    def writes(self) -> list[int]:
        return [value for register in self.registers.values() for value in register.writes]

    def assert_as_before(self, *values: int) -> None:
        """Every register holds what it held, and nothing is left to tell."""
        assert [register.value for register in self.registers.values()] == list(values)
        assert not (self.state / "journal.ndjson").exists()
        with Lock(self.state):
            pass


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    affinity = os.sched_getaffinity(0)
    yield World(tmp_path, {cpu: FakeRegister(value=0x2, valid=0x6) for cpu in (0, 1)}, threadripper())
    assert os.sched_getaffinity(0) == affinity, "a run leaves the process where it was"
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # the watchdog has gone and has been waited for


# --- whole runs ---


def test_as_predicted(world: World) -> None:
    record = world.run()
    world.assert_as_before(0x2, 0x2)
    assert record.findings == []
    assert exit_code(record) == ExitCode.AS_PREDICTED
    (observation,) = {entry.outcomes.retained for entry in record.observations}
    assert observation == hex64(0x6)
    assert [(entry.cpus, entry.value) for entry in record.saved] == [("0-1", hex64(0x2))]
    assert [(entry.cpus, entry.saved, entry.state) for entry in record.restore] == [("0-1", hex64(0x2), "verified")]
    assert record.judge == "vendor"
    assert record.walk is not UNSET
    assert (record.walk.cpus, record.walk.bits, record.walk.base) == ("0-1", "0-63", "saved")
    assert rec.decode(rec.encode(record), "x") == record
    assert world.progress[0] == (1, 64)
    assert world.progress[-1] == (64, 64)


def test_no_mitigation_that_is_on_goes_off_by_default(world: World) -> None:
    world.run()
    assert world.writes
    assert all(value & 0x2 for value in world.writes)


def test_the_taint_is_announced_before_the_first_write(world: World) -> None:
    said_before: list[list[str]] = []

    def note(cpu: int, kind: str, count: int) -> None:
        if kind == "write":
            said_before.append(list(world.said))

    world.msr.before = note
    world.run()
    assert TAINT_WARNING in said_before[0]
    assert "even one that takes #GP" in TAINT_WARNING


def test_taint_before_and_after(world: World) -> None:
    def taints(cpu: int, kind: str, count: int) -> None:
        if kind == "write":
            world.set({"proc/sys/kernel/tainted": "4\n"})

    world.msr.before = taints
    record = world.run()
    assert (record.kernel.taint_before, record.kernel.taint_after) == (0, 4)
    assert record.kernel.modules_loaded == []


def test_the_saved_values_are_on_disk_before_the_first_write(world: World) -> None:
    journals: list[str] = []

    def look(cpu: int, kind: str, count: int) -> None:
        if kind == "write" and not journals:
            journals.append((world.state / "journal.ndjson").read_text())

    world.msr.before = look
    world.run()
    head, intent = (json.loads(line) for line in journals[0].splitlines())
    assert head["saved"] == [["0-1", hex64(0x2)]]
    assert head["boot_id"] == BOOT_ID
    assert intent == {"ev": "intent", "step": "base value", "mask": hex64(0)}


def test_a_plan_writes_nothing_at_all(world: World) -> None:
    record = world.run(write=False)
    assert world.msr.count == 0, "a plan does not even read the register"
    assert not world.state.exists()
    assert record.walk is UNSET
    assert (record.saved, record.observations, record.restore) == ([], [], [])
    assert {entry.model for entry in record.predictions} >= {"vendor"}
    assert exit_code(record) == ExitCode.AS_PREDICTED
    assert TAINT_WARNING not in world.said


def test_chosen_cpus_and_bits_only(world: World) -> None:
    record = world.run(cpus=(1,), bits=(0, 2))
    assert world.registers[0].writes == []
    assert world.registers[0].reads == 0
    assert set(world.registers[1].writes) <= {0x2, 0x3, 0x6}
    (entry,) = record.observations
    assert (entry.cpus, entry.outcomes.retained, entry.outcomes.fault) == ("1", hex64(0x4), hex64(0x1))


def test_the_2020_case(world: World) -> None:
    world.cpus = {cpu: in_guest(snapshot) for cpu, snapshot in world.cpus.items()}
    for register in world.registers.values():
        register.value, register.valid = 0, 0x4
    record = world.run()
    (finding,) = record.findings
    assert (finding.kind, finding.cpus, finding.mask) == ("unexpected_fault", "0-1", hex64(STIBP))
    assert exit_code(record) == ExitCode.FINDINGS
    wrong = {entry.model: entry.unexpected_fault for entry in record.verdicts}
    assert wrong["vendor"] == hex64(STIBP)
    assert wrong["kvm-5.6"] == hex64(0)


def test_another_model_may_judge(world: World) -> None:
    record = world.run(judge="kvm-5.6")
    assert record.judge == "kvm-5.6"
    assert [(finding.kind, finding.mask) for finding in record.findings] == [("unexpected_accept", hex64(STIBP))]


def test_predictions_from_a_recorded_cpuid(world: World) -> None:
    record = world.run(cpuid_file=Dump("cpuid -r", sapphire_rapids()))
    assert record.predicted_from is not UNSET
    assert record.predicted_from.form == "cpuid -r"
    assert entries.cpuid_of_groups(record.cpuid.groups) == threadripper()
    assert entries.cpuid_of_groups(record.predicted_from.groups) == sapphire_rapids()
    assert any(finding.kind == "unexpected_fault" for finding in record.findings)
    assert any("recorded CPUID" in note for note in record.notes)


def test_a_register_that_is_not_there(world: World) -> None:
    for register in world.registers.values():
        register.absent = True
    record = world.run()
    assert world.writes == []
    assert TAINT_WARNING not in world.said
    assert [finding.kind for finding in record.findings] == ["unexpected_fault"]
    assert record.restore == []


def test_under_a_hypervisor_its_rules_are_asked(world: World) -> None:
    """A guest of VirtualBox: 0x3 and no other bit."""
    world.cpus = {cpu: in_guest(one) for cpu, one in threadripper().items()}
    for register in world.registers.values():
        register.valid = 0x3
    record = world.run()
    rules = {entry.model: entry for entry in record.hypervisor_rules}
    assert rules["virtualbox"].says == "fits"
    assert (rules["qemu-tcg"].says, rules["qemu-tcg"].against) == ("refuted", hex64(ALL_BITS))
    assert "kvm-unit-tests" not in rules, "an oracle is no hypervisor"
    assert "rules that fit what this guest saw: virtualbox" in " ".join(text.render(record).split())
    assert rec.decode(rec.encode(record), "x").hypervisor_rules == record.hypervisor_rules


def test_on_the_metal_no_hypervisor_is_asked(world: World) -> None:
    assert world.run().hypervisor_rules == []


def test_identity_and_arguments_are_what_was_given(world: World) -> None:
    record = world.run(identity="lab-7", arguments=("run", "--write"), because="a reason")
    assert (record.identity, record.tool.arguments, record.place.because) == ("lab-7", ["run", "--write"], "a reason")


# --- refusals, each before the first write ---


@contextlib.contextmanager
def refused(world: World, error: type[ProbeError], *words: str) -> Iterator[None]:
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert caught.value.remedy
    assert "\n" not in text
    assert world.writes == []
    assert not (world.state / "journal.ndjson").exists()


@pytest.mark.parametrize("level", ["integrity", "confidentiality"])
def test_lockdown(world: World, level: str) -> None:
    world.set({"sys/kernel/security/lockdown": f"none [{level}]\n"})
    with refused(world, RequirementMissing, "lockdown", level, "--in guest"):
        world.run()
    assert world.run(write=False).kernel.lockdown == level


def test_writes_switched_off_in_the_msr_module(world: World) -> None:
    world.set({"sys/module/msr/parameters/allow_writes": "off\n"})
    with refused(world, RequirementMissing, "msr.allow_writes=off", "echo default"):
        world.run()


def test_a_lockdown_that_cannot_be_seen_is_no_refusal_but_is_said(world: World) -> None:
    world.set({"sys/kernel/security/lockdown": ""})
    record = world.run()
    assert record.kernel.lockdown == "unknown"
    assert any("securityfs" in note for note in record.notes)


def test_writes_that_the_kernel_refuses_are_no_faults_and_no_success(world: World) -> None:
    """The three EPERMs are told apart beforehand; if one comes all the same, it must not look like an answer."""
    for register in world.registers.values():
        register.refuses = True
    record = world.run()
    assert {entry.outcomes.refused for entry in record.observations} == {hex64(ALL_BITS)}
    assert [finding.kind for finding in record.findings] == ["incomplete"]
    assert any("allow_writes" in note for note in record.notes)
    assert exit_code(record) == ExitCode.REQUIREMENT_MISSING


def vms(world: World, *pids: int) -> None:
    for pid in pids:
        folder = world.folder / "root" / "proc" / str(pid)
        (folder / "fd").mkdir(parents=True)
        world.processes.append((pid, "qemu-system-x86"))
        (folder / "fd" / "9").symlink_to("anon_inode:kvm-vm")


def test_running_vms(world: World) -> None:
    vms(world, 10, 11, 12, 13, 14)
    with refused(world, RequirementMissing, "qemu-system-x86 (10)", "and 2 more", "--allow-running-vms"):
        world.run()
    assert exit_code(world.run(allow_running_vms=True)) == ExitCode.AS_PREDICTED
    world.assert_as_before(0x2, 0x2)


def test_a_vm_that_was_started_during_the_run_is_told(world: World) -> None:
    world.msr.before = lambda cpu, kind, count: vms(world, 77) if count == 50 else None
    assert [(one.kind, "qemu-system-x86 (77)" in one.text) for one in world.run().findings] == [("vm_started", True)]


def test_kvm_that_is_opened_during_the_walk_stops_it(world: World) -> None:
    def open_kvm(cpu: int, kind: str, count: int) -> None:
        if count == 50:
            world.set({"sys/module/kvm_amd/refcnt": "1\n"})

    world.msr.before = open_kvm
    with pytest.raises(RequirementMissing, match=r"opened KVM during the walk.*2 registers put back and verified"):
        world.run()
    assert len(world.writes) < 80
    world.assert_as_before(0x2, 0x2)


def test_a_vm_that_starts_between_the_look_around_and_the_journal(world: World) -> None:
    world.msr.before = lambda cpu, kind, count: vms(world, 78) if count == 1 else None
    with refused(world, RequirementMissing, "qemu-system-x86 (78)"):
        world.run()


def test_microcode_on_the_bad_list(world: World) -> None:
    world.cpus = {cpu: small_cpu("GenuineIntel", 6, 0x55, 4, edx7=0x9C000000) for cpu in (0, 1)}
    world.set({f"sys/devices/system/cpu/cpu{cpu}/microcode/version": "0x200003c\n" for cpu in (0, 1)})
    with refused(world, RequirementMissing, "CPU 0", "0x200003c", "--allow-bad-microcode"):
        world.run()
    assert world.run(allow_bad_microcode=True).observations
    world.assert_as_before(0x2, 0x2)
    world.set({f"sys/devices/system/cpu/cpu{cpu}/microcode/version": "0x200003d\n" for cpu in (0, 1)})
    assert world.run().observations


def test_one_cpu_with_bad_microcode_is_enough_unless_it_is_left_out(world: World) -> None:
    world.cpus = {cpu: small_cpu("GenuineIntel", 6, 0x55, 4, edx7=0x9C000000) for cpu in (0, 1)}
    world.set({"sys/devices/system/cpu/cpu0/microcode/version": "0x2007006\n"})
    world.set({"sys/devices/system/cpu/cpu1/microcode/version": "0x200003c\n"})
    with refused(world, RequirementMissing, "CPU 1"):
        world.run()
    assert world.run(cpus=(0,)).observations


def test_a_second_probe(world: World) -> None:
    world.state.mkdir()
    with Lock(world.state), refused(world, RequirementMissing, "another probe", str(os.getpid())):
        world.run()
    world.run()


def test_cpus_that_are_not_online(world: World) -> None:
    with refused(world, UsageError, "no CPU 5,9 is online", "online: 0-1"):
        world.run(cpus=(0, 5, 9))


def test_a_state_folder_that_cannot_be(world: World) -> None:
    (world.folder / "file").write_text("")
    with refused(world, RequirementMissing, "--state-dir"):
        world.run(state_dir=world.folder / "file" / "state")


def test_base_zero_would_switch_mitigations_off(world: World) -> None:
    with refused(world, UsageError, "STIBP", "CPUs 0-1", "--clear-bits"):
        world.run(base_zero=True)


def test_base_zero_with_consent_or_nothing_to_lose(world: World) -> None:
    record = world.run(base_zero=True, clear_bits=True)
    assert 0x4 in world.writes
    world.assert_as_before(0x2, 0x2)
    assert record.walk is not UNSET
    assert record.walk.base == "zero"
    for register in world.registers.values():
        register.value = 0
    assert world.run(base_zero=True).findings == []


# --- erratum 1485 ---


def zen4(world: World, smt: str = "on", bp_cfg: int | None = None, stibp: int = STIBP) -> None:
    world.cpus = {cpu: small_cpu("AuthenticAMD", 0x19, 0x61, 2, ebx8=1 << 14 | 1 << 15 | 1 << 24) for cpu in (0, 1)}
    world.set({"sys/devices/system/cpu/smt/control": smt + "\n"})
    for register in world.registers.values():
        register.value, register.valid = stibp, 0x7
    if bp_cfg is not None:
        world.others.update({(cpu, BP_CFG.index): bp_cfg for cpu in (0, 1)})
    world.msr = FakeMsr(world.registers, world.others)


CLEARS = [{"clear_bits": True}, {"clear_bits": True, "base_zero": True, "bits": (0,)}]


@pytest.mark.parametrize("wanted", CLEARS)
@pytest.mark.parametrize("bp_cfg", [None, 0x0, 0x10])
def test_stibp_stays_where_clearing_it_is_erratum_1485(
    world: World, bp_cfg: int | None, wanted: dict[str, object]
) -> None:
    zen4(world, bp_cfg=bp_cfg)
    with refused(world, RequirementMissing, "erratum 1485", "BP_CFG bits 5", "--clear-bits"):
        world.run(**wanted)


@pytest.mark.parametrize("wanted", CLEARS)
def test_with_the_kernels_work_around_stibp_may_be_cleared(world: World, wanted: dict[str, object]) -> None:
    zen4(world, bp_cfg=1 << 5)
    world.run(**wanted)
    assert any(not value & STIBP for value in world.writes)
    world.assert_as_before(STIBP, STIBP)


def test_without_smt_the_erratum_does_not_bite(world: World) -> None:
    zen4(world, smt="off")
    world.run(clear_bits=True)
    assert any(not value & STIBP for value in world.writes)


def test_if_the_kernel_does_not_tell_smt_is_taken_as_on(world: World) -> None:
    zen4(world, smt="")
    with refused(world, RequirementMissing, "erratum 1485"):
        world.run(clear_bits=True)


def test_what_does_not_clear_stibp_needs_no_permission(world: World) -> None:
    zen4(world)
    world.run()
    world.run(clear_bits=True, bits=(0, 2))
    assert all(value & STIBP for value in world.writes)
    zen4(world, stibp=0)
    world.run(clear_bits=True)


# --- whatever happens, the registers come first ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", [5, 60, 130])
def test_a_signal_stops_between_two_writes(world: World, number: signal.Signals, at: int) -> None:
    before = signal.getsignal(number)
    world.msr.before = lambda cpu, kind, count: os.kill(os.getpid(), number) if count == at else None
    with pytest.raises(Interrupted, match=f"{number.name} before .*; 2 registers put back and verified") as caught:
        world.run()
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    world.assert_as_before(0x2, 0x2)
    assert signal.getsignal(number) is before


def when(world: World, at: Callable[[str, int], bool], error: BaseException) -> None:
    """Let an access raise: at(kind, count) says which."""

    def strike(cpu: int, kind: str, count: int) -> None:
        if at(kind, count):
            raise error

    world.msr.before = strike


@pytest.mark.parametrize("at", [7, 8, 9, 90, 130])
def test_an_error_of_the_device_in_mid_walk(world: World, at: int) -> None:
    when(world, lambda kind, count: count == at, DeviceError("cannot write MSR 0x48 on CPU 0: Invalid argument"))
    with pytest.raises(DeviceError, match="Invalid argument; 2 registers put back and verified, no record written"):
        world.run()
    world.assert_as_before(0x2, 0x2)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), AssertionError("a bug of ours")])
def test_any_other_exception_in_mid_walk(world: World, error: BaseException) -> None:
    when(world, lambda kind, count: count == 90, error)
    with pytest.raises(type(error)):
        world.run()
    world.assert_as_before(0x2, 0x2)


def test_a_device_that_errs_on_one_cpu_keeps_no_other_from_being_put_back(world: World) -> None:
    """CPU 0's device fails for good while CPU 1 holds a value of ours."""
    broken: list[int] = []

    def strike(cpu: int, kind: str, count: int) -> None:
        if cpu == 1 and kind == "read" and world.registers[1].value == 0x6:
            broken.append(count)
        if broken and (cpu == 0 or count == broken[0]):
            raise DeviceError(f"cannot {kind} MSR 0x48 on CPU {cpu}: Cannot allocate memory")

    world.msr.before = strike
    with pytest.raises(NotRestored, match="CPUs 0 ") as caught:
        world.run()
    assert caught.value.exit_code == ExitCode.NOT_RESTORED
    assert world.registers[1].value == 0x2
    assert '"failed": "0"' in (world.state / "journal.ndjson").read_text()


def test_an_error_before_the_first_write_leaves_no_journal(world: World) -> None:
    when(world, lambda kind, count: count == 2, DeviceError("cannot read MSR 0x48 on CPU 1: Invalid argument"))
    with pytest.raises(DeviceError):
        world.run()
    world.assert_as_before(0x2, 0x2)
    assert world.writes == []


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_in_mid_walk(world: World) -> None:
    with (
        files_of_at_most(1000),
        pytest.raises(ProbeError, match=r"cannot append to the journal .*2 registers put back and verified") as caught,
    ):
        world.run()
    assert caught.value.exit_code == ExitCode.FAILED
    assert world.writes, "it was in the middle"
    world.assert_as_before(0x2, 0x2)


def test_a_disk_that_is_full_from_the_start(world: World) -> None:
    with (
        files_of_at_most(20),
        pytest.raises(RequirementMissing, match="cannot put the saved values on disk"),
    ):
        world.run()
    assert world.writes == []
    world.assert_as_before(0x2, 0x2)
    assert exit_code(world.run()) == ExitCode.AS_PREDICTED
    assert not any("journal" in line for line in world.said), "there is nothing to tell of the run that could not start"


def test_a_line_that_did_not_fit_does_not_spoil_those_after_it(tmp_path: Path) -> None:
    """The disk was full for a moment; then the agent was killed, and the watchdog found room again."""
    journal = Journal(tmp_path, SPEC_CTRL, {0: 0x2}, BOOT_ID)
    journal.intent("bit 0", 1)
    with files_of_at_most(journal.path.stat().st_size + 10), pytest.raises(ProbeError):
        journal.intent("bit 1", 2)
    journal.restored("watchdog", [Restored(0, 0x2, 0x2, Restored.VERIFIED)])
    journal.close(keep=True)
    leftover = read_leftover(tmp_path)
    assert leftover is not None
    assert (leftover.step, leftover.restored_by) == ("bit 0", "watchdog")


def test_a_watchdog_that_dies_stops_the_walk(world: World) -> None:
    killed: list[int] = []

    def kill_watchdog(cpu: int, kind: str, count: int) -> None:
        if count == 100:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            killed.extend(int(pid) for pid in children)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and still to be noticed

    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel does not list a process's children (CONFIG_PROC_CHILDREN)")
    world.msr.before = kill_watchdog
    with pytest.raises(ProbeError, match=r"watchdog process has died.*2 registers put back"):
        world.run()
    assert len(killed) == 1
    world.assert_as_before(0x2, 0x2)


def test_a_register_that_sticks(world: World) -> None:
    world.registers[1].sticky = 0x4
    record = world.run()
    assert exit_code(record) == ExitCode.NOT_RESTORED
    assert record.findings[0].kind == "not_restored"
    assert (record.findings[0].cpus, record.findings[0].mask) == ("1", hex64(0x4))
    assert [(entry.cpus, entry.state) for entry in record.restore] == [("0", "verified"), ("1", "failed")]
    assert any(finding.kind == "walk_stopped" for finding in record.findings)
    assert world.registers[0].value == 0x2
    assert '"failed": "1"' in (world.state / "journal.ndjson").read_text()


def test_a_walk_that_stopped_early_says_nothing_of_bits_that_were_not_tried(world: World) -> None:
    world.registers[0].sticky = 0x4
    assert {finding.kind for finding in world.run().findings} == {"not_restored", "walk_stopped", "incomplete"}


# --- a CPU that goes ---


def test_a_cpu_that_goes_offline_in_mid_walk_is_an_outcome_not_a_difference(world: World) -> None:
    def unplug(cpu: int, kind: str, count: int) -> None:
        world.registers[1].offline = world.registers[1].offline or count > 40

    world.msr.before = unplug
    record = world.run()
    assert [finding.kind for finding in record.findings] == ["not_verified", "incomplete"]
    assert exit_code(record) == ExitCode.NOT_RESTORED, "nobody has seen what the register holds now"
    gone = next(entry for entry in record.observations if entry.cpus == "1")
    assert gone.absent_because == "went offline during the walk"
    assert world.registers[0].value == 0x2
    assert not (world.state / "journal.ndjson").exists()


def test_if_every_cpu_is_gone_nothing_was_measured(world: World) -> None:
    for register in world.registers.values():
        register.offline = True
    record = world.run()
    assert exit_code(record) == ExitCode.REQUIREMENT_MISSING


# --- what the kernel does meanwhile ---


def test_a_mitigation_that_the_kernel_switches_on_in_the_walk_stays_on(world: World) -> None:
    """A sibling comes online: cpu_bugs_smt_update() sets STIBP on every CPU, and its cache says so from then on."""

    def smt_update(cpu: int, kind: str, count: int) -> None:
        if count == 60:
            for register in world.registers.values():
                register.value |= 0x4

    world.msr.before = smt_update
    record = world.run()
    assert [register.value for register in world.registers.values()] == [0x6, 0x6]
    assert [(one.kind, one.mask) for one in record.findings] == [("changed_by_others", hex64(0x4))]
    assert [(entry.cpus, entry.saved, entry.state) for entry in record.restore] == [("0-1", hex64(0x6), "verified")]
    assert [(entry.cpus, entry.value) for entry in record.saved] == [("0-1", hex64(0x2))], "what it held at first"


def test_one_stray_sample_is_not_what_a_register_is_put_back_to(world: World) -> None:
    real = world.registers[0].read
    first: list[int] = []

    def stray() -> object:
        value = real()
        if not first:
            first.append(1)
            return 0x6
        return value

    world.registers[0].read = stray  # type: ignore[method-assign, assignment]
    record = world.run()
    assert [(entry.cpus, entry.value) for entry in record.saved] == [("0-1", hex64(0x2))]
    world.assert_as_before(0x2, 0x2)


def test_a_register_that_does_not_hold_still_is_not_walked(world: World) -> None:
    world.registers[1].unsteady = 0x4
    record = world.run()
    assert world.registers[1].writes == []
    assert [(one.kind, one.cpus) for one in record.findings] == [("incomplete", "1")]
    assert "does not hold still" in record.findings[0].text


def test_a_value_that_cannot_be_written_back_blames_no_bit(world: World) -> None:
    """Firmware may leave a bit that reads 1 and cannot be written."""
    world.registers[0].value = 0x102
    record = world.run()
    assert [(one.kind, one.cpus) for one in record.findings] == [("base_refused", "0")]
    assert world.registers[0].value == 0x102


def test_a_cpu_that_this_process_may_not_run_on_any_more_is_not_called_offline(world: World) -> None:
    allowed = {0, 1}

    def pin(cpu: int) -> bool:
        return cpu in allowed

    world.msr.before = lambda cpu, kind, count: allowed.discard(1) if count > 80 else None
    host = Host(world.folder / "root", lambda: world.processes)
    options = Options(write=True, state_dir=world.state)
    record = run(options, Ears(), msr=world.msr, host=host, pin=pin, read_cpuid=world.read_cpuid)
    gone = next(entry for entry in record.observations if entry.cpus == "1")
    assert gone.absent_because == "this process may not run on this CPU any more"
    assert [entry.state for entry in record.restore] == ["verified"]


# --- what an earlier run left ---


def leave(world: World, boot_id: str) -> None:
    world.state.mkdir()
    journal = Journal(world.state, SPEC_CTRL, {0: 0x2, 1: 0x2}, boot_id)
    journal.intent("bit 9", 1 << 9)
    journal.close(keep=True)


def test_a_journal_of_this_boot_is_settled_first(world: World) -> None:
    leave(world, BOOT_ID)
    world.registers[1].value = 0x202  # what the killed run left there
    record = world.run()
    assert [(entry.cpus, entry.value) for entry in record.saved] == [("0-1", hex64(0x2))], "not the killed run's value"
    assert "died at 'bit 9'" in world.said[0]
    assert "put back and verified" in world.said[1]
    world.assert_as_before(0x2, 0x2)


def test_what_the_kernel_has_changed_since_stays(world: World) -> None:
    """The killed run was at bit 9; that SSBD is on now is the kernel's doing (a task asked for it)."""
    leave(world, BOOT_ID)
    world.registers[1].value = 0x206
    record = world.run()
    assert [entry.value for entry in record.saved] == [hex64(0x2), hex64(0x6)]
    assert (
        "not verified: CPU 1: held 0x0000000000000002, reads 0x0000000000000006: bits 2 differ"
        in world.said[1] + world.said[2]
    )
    world.assert_as_before(0x2, 0x6)


def test_a_journal_of_an_earlier_boot_is_told_and_not_replayed(world: World) -> None:
    leave(world, "an earlier boot")
    world.registers[1].value = 0x6
    record = world.run()
    assert [entry.value for entry in record.saved] == [hex64(0x2), hex64(0x6)]
    assert "rebooted" in world.said[0]
    world.assert_as_before(0x2, 0x6)


def test_a_register_that_cannot_be_settled_stops_the_run(world: World) -> None:
    leave(world, BOOT_ID)
    world.registers[1].value = 0x202
    world.registers[1].sticky = 0x200
    with pytest.raises(NotRestored, match="CPUs 1 cannot be put back"):
        world.run()
    assert 0x3 not in world.writes, "no walk"
    assert (world.state / "journal.ndjson").exists()


# --- CPUs that differ ---


def test_cpus_that_do_otherwise(world: World) -> None:
    world.registers[1].valid = 0x7
    record = world.run()
    (finding,) = record.findings
    assert (finding.kind, finding.cpus, finding.mask) == ("cpus_differ", "1", hex64(0x1))
    assert "CPUs 0" in finding.text
    assert exit_code(record) == ExitCode.FINDINGS


def test_cpus_with_other_cpuid(world: World) -> None:
    other = threadripper()[1]
    leaves = {leaf: found for leaf, found in other.leaves.items() if leaf.leaf != 0x80000008}
    world.cpus[1] = Snapshot(leaves)
    kinds = [finding.kind for finding in world.run().findings]
    assert "cpuid_differs" in kinds
