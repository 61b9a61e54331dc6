# SPDX-License-Identifier: MIT
"""The VMM, programs and the matrix on the running kernel's own KVM."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel_harness.kvm import guest_code, uapi
from kernel_harness.kvm.commands import explore_model, replay
from kernel_harness.kvm.guest_code import READ, WRITE, Step
from kernel_harness.kvm.machine import Kvm, exit_name, ticking
from kernel_harness.kvm.measure import measure, measure_host, measure_profile
from kernel_harness.kvm.runner import Cpuids, Laboratory, run_program
from kernel_harness.kvm.study import default_profiles, study
from probe import kvm_record
from probe.errors import GuestLost, KvmError, RequirementMissing, UsageError
from probe.masks import hex64
from probe.models.machine import answers
from probe.models.machines import MACHINES
from probe.models.matrix import CELLS, holds, program_of
from probe.models.profile import EMPTY, FEATURES, NAMED, NONE, parse_profile
from probe.models.program import Word, parse
from probe.report import kvm_text

pytestmark = pytest.mark.kvm
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    with Kvm() as opened, ticking():
        yield opened


@pytest.fixture(scope="module")
def cpuids(kvm: Kvm) -> Cpuids:
    return Cpuids(kvm)


# --- numbers and code ------------------------------------------------------------------------------------------------


def test_numbers_sizes_and_offsets_are_the_headers(tmp_path: Path) -> None:
    """Against a C program built from <linux/kvm.h>."""
    numbers = sorted(name for name, value in vars(uapi).items() if name.startswith("KVM_") and isinstance(value, int))
    kinds = {
        name: kind
        for name, kind in vars(uapi).items()
        if isinstance(kind, type)
        and issubclass(kind, ctypes.Structure)
        and name.startswith("kvm_")
        and name != "kvm_run"
    }
    lines = [f'printf("{name} %llu\\n", (unsigned long long){name});' for name in numbers]
    for name, kind in kinds.items():
        lines.append(f'printf("sizeof {name} %zu\\n", sizeof(struct {name}));')
        for field, *_ in kind._fields_:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));')
    for field in ("immediate_exit", "exit_reason", "io", "msr", "fail_entry", "internal"):
        lines.append(f'printf("kvm_run.{field} %zu\\n", offsetof(struct kvm_run, {field}));')
    for field in ("reason", "index", "data"):
        lines.append(f'printf("kvm_run.msr.{field} %zu\\n", offsetof(struct kvm_run, msr.{field}));')
    source = "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n"
    (tmp_path / "numbers.c").write_text(source + "\n".join(lines) + "\nreturn 0; }\n")
    subprocess.run(["gcc", "-o", str(tmp_path / "numbers"), str(tmp_path / "numbers.c")], check=True)
    told = subprocess.run([str(tmp_path / "numbers")], capture_output=True, text=True, check=True).stdout
    wanted = {key: int(value) for key, _, value in (line.rpartition(" ") for line in told.splitlines())}
    mine: dict[str, int] = {name: getattr(uapi, name) for name in numbers}
    for name, kind in kinds.items():
        mine[f"sizeof {name}"] = ctypes.sizeof(kind)
        mine.update({f"{name}.{field}": getattr(kind, field).offset for field, *_ in kind._fields_})
    run = uapi.kvm_run
    exits = run.exits.offset
    mine["kvm_run.immediate_exit"], mine["kvm_run.exit_reason"] = run.immediate_exit.offset, run.exit_reason.offset
    mine.update({f"kvm_run.{name}": exits for name in ("io", "msr", "fail_entry", "internal")})
    mine.update(
        {f"kvm_run.msr.{name}": exits + getattr(uapi._exit_msr, name).offset for name in ("reason", "index", "data")}
    )
    assert mine == wanted
    assert len(mine) > 120


def test_the_guest_is_what_its_source_assembles_to(tmp_path: Path) -> None:
    (tmp_path / "guest.s").write_text(guest_code.ASSEMBLY)
    subprocess.run(["as", "--32", "-o", str(tmp_path / "guest.o"), str(tmp_path / "guest.s")], check=True)
    copy = ["objcopy", "-O", "binary", "-j", ".text", str(tmp_path / "guest.o"), str(tmp_path / "guest.bin")]
    subprocess.run(copy, check=True)
    assert (tmp_path / "guest.bin").read_bytes() == guest_code.CODE


# --- the VMM ---------------------------------------------------------------------------------------------------------


def test_a_table_of_steps_runs_in_one_entry(kvm: Kvm, cpuids: Cpuids) -> None:
    """TSC and an MSR that no CPU has: one reads, the other faults, both ways; the order is kept."""
    with Laboratory(kvm, cpuids) as laboratory:
        vcpu = laboratory.vcpu(EMPTY)
        steps = [Step(READ, 0x10), Step(READ, 0x4B564DFF), Step(WRITE, 0x4B564DFF, 1), Step(READ, 0x10)]
        first, nothing, wrote, second = laboratory.guest(vcpu, steps)
        assert (nothing.faulted, wrote.faulted) == (True, True)
        assert (first.faulted, second.faulted) == (False, False)
        assert second.value > first.value > 0
        assert laboratory.guest(vcpu, steps)[0].value > second.value, "the same vCPU, entered again"


def test_a_long_table(kvm: Kvm, cpuids: Cpuids) -> None:
    with Laboratory(kvm, cpuids) as laboratory:
        results = laboratory.guest(laboratory.vcpu(EMPTY), [Step(READ, 0x10)] * 1000)
    assert len({result.value for result in results}) == 1000


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("f4", "KVM_EXIT_HLT"),
        ("0f011e00300f0b", "did not"),  # lidt with a limit of 0, then ud2: a triple fault, or a KVM that goes round
    ],
)
def test_a_guest_that_does_something_else_is_lost_and_named(kvm: Kvm, cpuids: Cpuids, code: str, why: str) -> None:
    with Laboratory(kvm, cpuids) as laboratory:
        raw = bytes.fromhex(code)
        laboratory.memory[guest_code.CODE_AT : guest_code.CODE_AT + len(raw)] = raw
        with pytest.raises(GuestLost, match=why):
            laboratory.guest(laboratory.vcpu(EMPTY), [Step(READ, 0x10)], seconds=2)


def test_an_error_comes_through_from_a_worker(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, pytest.raises(KvmError) as caught:
        vm.create_vcpu(1 << 20)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.ioctl, again.errno) == (str(caught.value), caught.value.ioctl, caught.value.errno)


def test_a_guest_that_never_exits_is_given_up(kvm: Kvm, cpuids: Cpuids) -> None:
    with Laboratory(kvm, cpuids) as laboratory:
        laboratory.memory[guest_code.CODE_AT : guest_code.CODE_AT + 2] = bytes.fromhex("ebfe")  # jmp $
        vcpu = laboratory.vcpu(EMPTY)
        with pytest.raises(GuestLost, match=r"did not exit within 0\.6 s"):
            vcpu.run(0.6)


def test_an_ioctl_that_fails_names_itself_and_the_errno(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, pytest.raises(KvmError, match=r"KVM_CREATE_VCPU failed: .*\(E[A-Z]+\)") as caught:
        vm.create_vcpu(1 << 20)
    assert caught.value.ioctl == "KVM_CREATE_VCPU"


def test_no_device_is_a_requirement_with_a_cure() -> None:
    with pytest.raises(RequirementMissing, match=r"cannot open /dev/no-such-kvm.*modprobe"):
        Kvm("/dev/no-such-kvm")
    with pytest.raises(RequirementMissing, match="is no KVM"):
        Kvm("/dev/null")


def test_no_permission_is_a_requirement_with_a_cure(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody without permission")
    # All is imported before: who has no permission may not read this Python, or this checkout, either.
    code = (
        "import os, sys, kernel_harness.kvm.study, probe.kvm_record, probe.store, probe.report.kvm_text; "
        "from probe.cli import main; os.setgroups([]); os.setgid(65534); os.setuid(65534); "
        "sys.exit(main(['kvm', '--record', '-']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if Path("/dev/kvm").stat().st_mode & 0o006 == 0o006:
        pytest.skip("everybody may open /dev/kvm here")
    assert done.returncode == 4, done.stderr
    assert "cannot open /dev/kvm: Permission denied (run it as root, or as a member of the device" in done.stderr
    assert done.stdout == ""


class _OldKvm(Kvm):
    """KVM as it was before v5.10."""

    def check_extension(self, cap: int) -> int:
        if cap in (uapi.KVM_CAP_X86_MSR_FILTER, uapi.KVM_CAP_X86_USER_SPACE_MSR):
            return 0
        return super().check_extension(cap)


def test_a_kvm_without_filters_says_so_and_explores_without(cpuids: Cpuids, monkeypatch: pytest.MonkeyPatch) -> None:
    with _OldKvm() as old:
        with pytest.raises(RequirementMissing, match=r"no MSR filter \(KVM_CAP_X86_MSR_FILTER, Linux v5\.10\)"):
            run_program(old, cpuids, parse("profile none; deny 0x48 wr")[0])
        assert run_program(old, cpuids, parse("profile none; host-get 0x48")[0]) == [0]
    monkeypatch.setattr("kernel_harness.kvm.study.Kvm", _OldKvm)
    record = study([NONE], arguments=[], programs=50)
    assert (record.kvm.msr_filter, record.kvm.user_space_msr) == (False, False)
    assert any("no MSR filter" in note for note in record.notes)
    assert any("KVM_CAP_X86_USER_SPACE_MSR" in note for note in record.notes)


def test_a_backend_that_no_model_speaks_of_is_named(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_harness.kvm.host.backend", lambda: "kvm_new")
    record = study([NONE], arguments=[])
    assert any(note.startswith("kvm_new answers, neither kvm_intel nor kvm_amd") for note in record.notes)


def test_thousands_of_vcpus_leave_nothing_behind(kvm: Kvm, cpuids: Cpuids) -> None:
    """10,000 vCPUs: no descriptor, mapping or memory stays."""

    def fds() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    def round_of(count: int) -> None:
        with Laboratory(kvm, cpuids) as laboratory:
            for _ in range(count):
                laboratory.guest(laboratory.vcpu(EMPTY), [Step(READ, 0x10)])

    round_of(500)
    before = (fds(), maps(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    for _ in range(19):
        round_of(500)
    assert fds() == before[0]
    assert maps() <= before[1] + 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before[2] + 8192


def test_a_filter_denies_the_guest_and_not_the_host(kvm: Kvm, cpuids: Cpuids) -> None:
    if not kvm.check_extension(uapi.KVM_CAP_X86_MSR_FILTER):
        pytest.skip("this KVM has no MSR filter")
    text = "profile AMD_IBRS; deny 0x10 rd; guest-rd 0x10; host-get 0x10; allow; guest-rd 0x10"
    denied, by_guest, by_host, _, again = run_program(kvm, cpuids, parse(text)[0])
    assert (denied, by_guest) == (Word.OK, Word.GP)
    assert isinstance(by_host, int)
    assert isinstance(again, int)


def test_init_resets_the_vcpu(kvm: Kvm, cpuids: Cpuids) -> None:
    with Laboratory(kvm, cpuids, irqchip=True) as laboratory:
        vcpu = laboratory.vcpu(EMPTY)
        laboratory.guest(vcpu, [])
        regs = vcpu.get_regs()
        regs.rbx = 0x1234
        vcpu.set_regs(regs)
        laboratory.guest(vcpu, [])
        assert vcpu.get_regs().rbx == 0x1234
        laboratory.init(vcpu)
        assert vcpu.get_regs().rbx == 0
        assert not laboratory.guest(vcpu, [Step(READ, 0x10)])[0].faulted, "it runs on"


def test_cpuid_after_the_first_entry_is_a_usage_error(kvm: Kvm, cpuids: Cpuids) -> None:
    with pytest.raises(UsageError, match="before its first entry"):
        run_program(kvm, cpuids, parse("profile none; guest-rd 0x48; cpuid empty")[0])


def test_a_guest_cpuid_has_the_profiles_features_and_reaches_their_leaves(cpuids: Cpuids) -> None:
    for text in ("AMD_STIBP,BHI_CTRL", "V_SPEC_CTRL", "SPEC_CTRL,INTEL_PSFD,AMD_PSFD"):
        profile = parse_profile(text)
        entries = {(entry.function, entry.index): entry for entry in cpuids.entries(profile)}
        seen = {
            bit.name
            for bit in FEATURES
            if (bit.leaf, bit.subleaf) in entries
            and getattr(entries[bit.leaf, bit.subleaf], bit.register) >> bit.bit & 1
        }
        assert seen == set(text.split(","))
        for bit in profile.bits():
            assert entries[bit.leaf & 0x80000000, 0].eax >= bit.leaf
            assert bit.leaf != 7 or entries[7, 0].eax >= bit.subleaf


# --- the matrix ------------------------------------------------------------------------------------------------------


def test_every_bit_of_a_row_is_what_its_program_answers(kvm: Kvm, cpuids: Cpuids) -> None:
    """The matrix shares vCPUs and entries where it may; each of its bits must still be a program's answer."""
    for name in ("none", "zen2-client"):
        row = measure_profile(kvm, cpuids, parse_profile(name))
        for cell in CELLS:
            if cell.after and not row.opener:
                continue
            for bit in (0,) if cell.single else (0, 1, 2, 7, 33, 63):
                answer = run_program(kvm, cpuids, program_of(cell, row.profile, bit, row.opener))[-1]
                value = 0 if cell.single else 1 << bit
                assert holds(cell, value, answer) == bool(row.masks[cell.name] >> bit & 1), (name, cell.name, bit)


def test_rows_come_back_in_order_from_every_core() -> None:
    profiles = [named.profile for named in NAMED[:6]]
    told: list[tuple[int, int]] = []
    rows = measure(profiles, lambda done, total: told.append((done, total)))
    assert [row.profile for row in rows] == profiles
    assert told[-1] == (6, 6)
    assert [(row.opener, row.masks) for row in rows] == [
        (row.opener, row.masks) for row in measure(profiles, lambda done, total: None, jobs=1)
    ], "one process gives the same as several"


def test_this_kernel_is_explained_and_the_record_holds_it(kvm: Kvm) -> None:
    profiles = [named.profile for named in NAMED]
    record = study(profiles, arguments=["kvm"], programs=300)
    again = kvm_record.decode(kvm_record.encode(record), "x")
    assert kvm_record.encode(again) == kvm_record.encode(record)
    assert {row.profile for row in kvm_record.rows_of(again)} == set(profiles)
    assert {fit.model for fit in record.fits} == {machine.name for machine in MACHINES}
    assert record.explained_by, [(fit.model, fit.agreements, fit.cases) for fit in record.fits[:3]]
    assert all(not entry.divergence for entry in record.explored if entry.model in record.explained_by)
    report = kvm_text.render(record)
    assert all(len(line) <= 75 and line == line.rstrip() for line in report.splitlines())
    assert record.explained_by[0] in report.splitlines()[0]
    fresh = next(row.cells for row in record.rows if "none" in row.profiles)
    assert ("cannot be told" in report) == (hex64(0) in (fresh["host_first"], fresh["host_first_kept"]))
    assert not re.search(r"/(root|home|tmp)\b", kvm_record.encode(record).decode())


def test_a_divergence_of_the_record_is_a_program_that_replays(kvm: Kvm) -> None:
    record = study([NONE, EMPTY, parse_profile("psfd-only")], arguments=[])
    divergent = [fit.first for fit in record.fits if isinstance(fit.first, kvm_record.DivergenceEntry)]
    assert divergent
    for first in divergent:
        assert replay(f"{first.program} -> {first.kernel}").as_expected
        assert first.kernel != first.model


def test_the_hardware_is_measured(kvm: Kvm, cpuids: Cpuids) -> None:
    host = measure_host(kvm, cpuids, 0)
    assert host.caps == cpuids.mask()
    row = measure_profile(kvm, cpuids, NONE)
    assert host.hardware.tested == row.masks["host_first"]
    assert host.hardware.exists == bool(row.masks["host_zero"])


def test_default_profiles_hold_every_class_and_name() -> None:
    profiles = default_profiles(0)
    assert {named.profile for named in NAMED} <= set(profiles)
    assert len(profiles) == len(set(profiles)) > 100


# --- explore and replay ----------------------------------------------------------------------------------------------


def test_explore_finds_the_shortest_and_is_repeatable(kvm: Kvm, cpuids: Cpuids) -> None:
    """A model that says #GP to everything: one read is enough to tell."""
    found = explore_model("bhyve-strict", programs=500, seconds=60, seed=7)
    assert not found.as_expected
    program = found.text.partition("\n\n")[2]
    assert len(parse(program)[0].operations) == 1
    outcome = replay(program)
    assert outcome.as_expected, "what was found replays"
    again = explore_model("bhyve-strict", programs=500, seconds=60, seed=7).text.partition("\n\n")[2]
    assert again == program


def test_replay_tells_what_was_wanted_and_what_a_model_says(kvm: Kvm, cpuids: Cpuids) -> None:
    text = "profile none; host-get 0x48 -> 0x1"
    seen = run_program(kvm, cpuids, parse(text)[0])
    outcome = replay(text, "bhyve-strict")
    assert not outcome.as_expected
    assert "wanted 0x1" in outcome.text
    assert seen == [0]
    said = answers(
        next(one for one in MACHINES if one.name == "bhyve-strict"), parse(text)[0], measure_host(kvm, cpuids, 0)
    )
    assert said == [Word.REFUSED]
    assert "bhyve-strict says refused" in outcome.text


def test_exit_names() -> None:
    assert exit_name(8) == "KVM_EXIT_SHUTDOWN"
    assert exit_name(4711) == "exit reason 4711"


def test_interrupted_in_mid_matrix_leaves_no_process(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "probe", "kvm", "--record", str(tmp_path / "x.json")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    time.sleep(1.5)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 130, said
    assert b"Traceback" not in said
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
