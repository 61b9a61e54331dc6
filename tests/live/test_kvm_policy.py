# SPDX-License-Identifier: MIT
"""Policies and live migrations on the running kernel's own KVM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import UNSET

from kernel_harness.kvm import uapi
from kernel_harness.kvm.commands import migrate, policy_costs
from kernel_harness.kvm.explore import explore
from kernel_harness.kvm.host import features
from kernel_harness.kvm.machine import Kvm, Vcpu, ticking
from kernel_harness.kvm.measure import measure, measure_host
from kernel_harness.kvm.migrate import Destination, Leaving, Station
from kernel_harness.kvm.policed import Judge, PolicedLaboratory, _Known, maker
from kernel_harness.kvm.policy_file import find
from kernel_harness.kvm.runner import Cpuids, run_program
from kernel_harness.kvm.study import kernel_model, study
from probe import kvm_record
from probe.errors import RequirementMissing
from probe.masks import hex64
from probe.migration_record import MigrationRecord, as_calculated, encode
from probe.models.machine import SPEC_CTRL, Host, Machine
from probe.models.machines import get
from probe.models.matrix import fit
from probe.models.migration import BY_NAME as RULES
from probe.models.policy import BY_NAME, POLICIES, Policy, PolicyMachine, complete
from probe.models.profile import NAMED, parse_profile
from probe.models.program import Word, format_answer, parse
from probe.report import kvm_text, moved_text, policy_text

pytestmark = pytest.mark.kvm
ROOT = Path(__file__).parents[2]
PROFILES = [named.profile for named in NAMED]


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    with Kvm() as opened, ticking():
        if not opened.check_extension(uapi.KVM_CAP_X86_MSR_FILTER):
            pytest.skip("this KVM has no MSR filter: no policy can run")
        yield opened


@pytest.fixture(scope="module")
def cpuids(kvm: Kvm) -> Cpuids:
    return Cpuids(kvm)


@pytest.fixture(scope="module")
def host(kvm: Kvm, cpuids: Cpuids) -> Host:
    return measure_host(kvm, cpuids, features())


@pytest.fixture(scope="module")
def over(host: Host) -> Machine:
    return kernel_model(host, "", None)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.name))
def test_a_policys_own_model_explains_the_kernel(
    kvm: Kvm, cpuids: Cpuids, host: Host, over: Machine, policy: Policy
) -> None:
    """Matrix and random programs under the policy, every one of them."""
    judge = Judge(policy)
    machine = PolicyMachine(policy, over)
    found = fit(machine, host, measure(PROFILES, lambda done, total: None, judge=judge, host=host))
    assert found.explains, (dict(found.divergences), found.first)
    done = explore(kvm, cpuids, [machine], host, most=150, seconds=120, seed_number=5, make=maker(judge, host))
    assert done.divergence is None, (str(done.divergence.program), done.divergence.kernel, done.divergence.model)
    assert not judge.complaints
    assert policy.opens or judge.asked, "nothing that the policy was asked about proves nothing"


def test_a_policy_is_obeyed_by_a_real_guest(kvm: Kvm, cpuids: Cpuids, host: Host) -> None:
    """STIBP where the guest's CPUID has it, and nothing else; whatever KVM itself would say."""
    text = "profile AMD_STIBP; guest-wr 0x48 0x2; guest-wr 0x48 0x1; guest-wr 0x48 0x0; host-set 0x48 0x4"
    said = run_program(kvm, cpuids, parse(text)[0], maker(Judge(BY_NAME["emulate-guest"]), host))
    assert [format_answer(one) for one in said] == ["ok", "gp", "ok", "refused"]


def test_a_policy_that_answers_reads_too(kvm: Kvm, cpuids: Cpuids, host: Host) -> None:
    text = "profile AMD_STIBP; guest-wr 0x48 0x2; guest-rd 0x48; host-get 0x48; deny 0x48 rd; guest-rd 0x48"
    said = run_program(kvm, cpuids, parse(text)[0], maker(Judge(BY_NAME["forced-shadow"]), host))
    assert said[:3] == [Word.OK, 0x2, 0x2]
    assert said[-1] is Word.GP


def test_a_program_is_replayed_under_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text("profile AMD_STIBP; guest-wr 0x48 0x2 -> ok; guest-wr 0x48 0x1 -> gp; guest-wr 0x48 0x0 -> ok")
    done = run_policy(path, "replay", "--policy", "emulate-guest")
    assert done.returncode == 0, done.stderr
    assert "guest-wr 0x48 0x1 -> gp\n" in done.stdout
    done = run_policy(path, "replay", "--policy", "hardware-test")
    assert done.returncode == 1, "this KVM's hardware test is not the guest's CPUID"
    assert "guest-wr 0x48 0x1 -> ok    wanted gp" in done.stdout
    wrong = run_policy(path, "replay", "--policy", "pass-through", "--model", "xen")
    assert "pass-through over xen says gp" in wrong.stdout
    (tmp_path / "mine.py").write_text("def decide(host, guest, vcpu, value):\n    return 7\n")
    done = run_policy(path, "replay", "--policy", tmp_path / "mine.py")
    assert done.returncode == 3
    assert "policy mine.py returned int, no Decision" in done.stderr
    assert "guest-wr 0x48 0x2 -> gp    wanted ok" in done.stdout


def test_pass_through_opens_again_after_init(kvm: Kvm, cpuids: Cpuids, host: Host) -> None:
    opened = []

    class Watched(PolicedLaboratory):
        def _open(self, vcpu: Vcpu, known: _Known) -> None:
            opened.append(vcpu)
            super()._open(vcpu, known)

    program = parse("profile AMD_STIBP; guest-rd 0x48; guest-rd 0x48; init; guest-rd 0x48")[0]
    with Watched(kvm, cpuids, Judge(BY_NAME["pass-through"]), host, irqchip=True) as laboratory:
        laboratory.run(program)
    assert len(opened) == 2


def test_a_policy_that_raises_costs_its_own_writes_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def decide(host, guest, vcpu, value):\n    raise OSError(value)\n")
    record = study([parse_profile("AMD_IBRS")], arguments=[], policy=find(str(path)))
    assert record.policy is not UNSET
    assert all(what.startswith("raised OSError") for what in record.policy.complaints)
    assert kvm_record.complaints(record)
    assert "such a write took #GP" in " ".join(kvm_text.render(record).split())
    done = subprocess.run(
        [sys.executable, "-m", "probe", "kvm", "policy", str(path), "--profile", "AMD_IBRS", "--record", "-"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr


def test_a_policy_that_loops_does_not_hang(kvm: Kvm, cpuids: Cpuids, host: Host) -> None:
    def decide(*given: object) -> object:
        while True:
            pass

    judge = Judge(Policy("loops", "", "", decide))  # type: ignore[arg-type]
    text = "profile AMD_IBRS; " + "; ".join(f"guest-wr 0x48 {1 << bit:#x}" for bit in range(20))
    assert set(run_program(kvm, cpuids, parse(text)[0], maker(judge, host))) == {Word.GP}
    assert any("was not asked any more" in one for one in judge.complaints)


def test_the_record_of_a_policy(tmp_path: Path) -> None:
    record = study(PROFILES[:4], arguments=["kvm", "policy", "emulate"], policy=BY_NAME["emulate"], programs=40)
    again = kvm_record.decode(kvm_record.encode(record), "x")
    assert again.policy is not UNSET
    assert f"emulate over {again.policy.over}" in again.explained_by
    assert kvm_record.as_predicted(again)
    report = kvm_text.render(again)
    assert "under policy emulate" in report
    assert all(len(line) <= 75 for line in report.splitlines())


def test_without_exits_to_userspace_there_is_no_policy(cpuids: Cpuids, host: Host) -> None:
    class Old(Kvm):
        def check_extension(self, cap: int) -> int:
            return 0 if cap == uapi.KVM_CAP_X86_USER_SPACE_MSR else super().check_extension(cap)

    with Old() as old, pytest.raises(RequirementMissing, match=r"KVM_CAP_X86_USER_SPACE_MSR.*v5\.10"):
        PolicedLaboratory(old, cpuids, Judge(BY_NAME["emulate"]), host)


def test_costs_are_those_of_exits(kvm: Kvm) -> None:
    names = ["emulate", "kvm-5.6-mask", "maxim-v1", "pass-through"]
    costs, complaints = policy_costs([BY_NAME[name] for name in names], lambda done, total: None)
    assert complaints == []
    nothing, to_kvm, to_us = (cost.median or 0 for cost in costs.bare)
    assert 0 < nothing < to_kvm < to_us
    assert all(row.took for row in costs.policies), "each cost is the policy's own, whatever this KVM offers guests"
    assert [row.let_through for row in costs.policies] == [False, True, True, True]
    writes = [row.write.median or 0 for row in costs.policies]
    assert writes[0] > to_us, "each write of the guest comes to us"
    assert max(writes[1:]) < to_us, "these let go"
    for row in (*costs.alone, *costs.policies):
        assert (row.write.median or 0) > nothing, "no access is cheaper than none"
    assert costs.khz > 100_000
    assert all(len(line) <= 75 for line in policy_text.costs(costs).splitlines())


# --- migration -------------------------------------------------------------------------------------------------------


def moved(
    text: str, source: Policy | None, target: Policy | None, profile: str = "", rule: str = "kvm"
) -> MigrationRecord:
    return migrate(text, [], source=source, target=target, profile=profile, rule=rule, arguments=[])


def test_a_guest_that_moves() -> None:
    text = "profile AMD_IBRS,AMD_STIBP; guest-wr 0x48 0x3; guest-rd 0x48"
    emulate, old = BY_NAME["forced-shadow"], BY_NAME["kvm-5.6-mask"]
    works = moved(text, emulate, emulate)
    assert [(one.outcome, one.reads) for one in works.arrivals] == [("works", hex64(3))]
    assert as_calculated(works)
    assert works.departures[0].program.endswith("guest-wr 0x48 0x3 -> ok; guest-rd 0x48 -> 0x3")
    assert works.departures[0].held == hex64(3)
    refused = moved(text, emulate, old, "empty")
    assert [one.outcome for one in refused.arrivals] == ["refused"]
    assert as_calculated(refused)
    lost = moved(text, emulate, old, "empty", "cloud-hypervisor")
    assert [one.outcome for one in lost.arrivals] == ["lost"]
    mine = Policy("mine", "", "", lambda *given: 7)  # type: ignore[arg-type]
    nonsense = moved(text, mine, old)
    assert any("policy mine returned int, no Decision (7)" in one for one in nonsense.complaints)
    assert as_calculated(nonsense), "the model lives with it as the VMM does"


def test_the_destination_may_change_what_it_takes() -> None:
    def decide(host: object, guest: object, vcpu: object, value: int) -> object:
        return complete(value & 0x1)

    text = "profile AMD_IBRS,AMD_STIBP; guest-wr 0x48 0x3"
    target = Policy("clears", "", "", decide, reads=True)  # type: ignore[arg-type]
    done = moved(text, BY_NAME["forced-shadow"], target)
    assert [(one.outcome, one.reads) for one in done.arrivals] == [("changed", hex64(1))]
    assert as_calculated(done)


def test_a_destination_without_the_register(kvm: Kvm, cpuids: Cpuids, host: Host, over: Machine) -> None:
    """A KVM that does not list MSR 0x48: QEMU does not write it there, and the guest does not have its value."""

    class Unlisting(Kvm):
        def get_msr_index_list(self) -> list[int]:
            return [index for index in super().get_msr_index_list() if index != SPEC_CTRL]

    program = parse("profile AMD_IBRS,AMD_STIBP; guest-wr 0x48 0x3")[0]
    shadow = BY_NAME["forced-shadow"]
    departed, differs = Station(kvm, cpuids, host, over).depart(Leaving(shadow, program))
    assert (departed.held, differs) == (0x3, "")
    departed = replace(departed, listed=True)
    with Unlisting() as unlisting:
        target = Station(unlisting, cpuids, host, over)
        arrived, differs = target.arrive(departed, RULES["qemu"], Destination(shadow))
        assert (arrived.sent, arrived.reads, arrived.outcome, differs) == (0x3, 0x0, "lost", "")
        arrived, differs = target.arrive(departed, RULES["kvm"], Destination(shadow))
        assert (arrived.outcome, differs) == ("works", ""), "who does not ask the list writes it"


def test_the_study_of_the_thread_is_as_its_models_say() -> None:
    record = migrate(None, [], source=None, target=None, profile="", rule="kvm", arguments=[])
    assert record.study == "thread-2020"
    assert [one.policy for one in record.departures] == ["", *(policy.name for policy in POLICIES)]
    assert len(record.arrivals) == 2 * len(record.departures)
    assert as_calculated(record), [one.differs for one in record.departures] + [one.differs for one in record.arrivals]
    (number,) = [at for at, one in enumerate(record.departures) if one.policy == "hardware-test"]
    outcomes = [one.outcome for one in record.arrivals if one.departure == number]
    assert outcomes[-1] == "refused", "what the mask of 2020 does not know"


def test_a_wrong_model_is_told(kvm: Kvm, cpuids: Cpuids, host: Host) -> None:
    """Held against a rule that this KVM does not follow, guests leave otherwise than it says."""
    wrong = Station(kvm, cpuids, host, get("virtualbox"))
    told = [wrong.depart(Leaving(None, parse(f"profile AMD_IBRS; guest-wr 0x48 {1 << bit:#x}")[0])) for bit in (0, 9)]
    assert any(differs for _, differs in told)


def test_guests_that_left_elsewhere_arrive_here(tmp_path: Path) -> None:
    """The record of one kernel is what another restores from."""
    left = moved("profile AMD_IBRS,AMD_STIBP; guest-wr 0x48 0x3", BY_NAME["forced-shadow"], None)
    left.kernel.release = left.departures[0].kernel = "5.0-elsewhere"
    path = tmp_path / "left.json"
    path.write_bytes(encode(left))
    done = subprocess.run(
        [sys.executable, "-m", "probe", "kvm", "migrate", "--restore", str(path), "--to-policy", "forced-shadow"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "measured, 5.0-elsewhere to" in done.stdout
    assert "under forced-shadow, it reads 0x3: works" in " ".join(done.stdout.replace("# ", "").split())


def test_ctrl_c_while_a_policy_decides(tmp_path: Path) -> None:
    """The mapping that a traceback holds must not hide what happened: 130, and nothing else."""
    (tmp_path / "busy.py").write_text(
        "import time\nfrom probe.models.policy import complete\n\ndef decide(host, guest, vcpu, value):\n"
        "    end = time.monotonic() + 0.3\n    while time.monotonic() < end:\n        pass\n"
        "    return complete(value)\n"
    )
    (tmp_path / "p").write_text("profile AMD_IBRS; " + "; ".join(["guest-wr 0x48 0x1"] * 40))
    for _ in range(4):
        running = subprocess.Popen(
            [sys.executable, "-m", "probe", "kvm", "migrate", tmp_path / "p", "--from-policy", tmp_path / "busy.py"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(2.5)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
        assert running.returncode == 130, said
        assert "internal error" not in said


def run_policy(path: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "probe", "kvm", *more, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("line", ["os._exit(0)", "ctypes.string_at(0)"])
def test_a_policy_that_ends_its_process_ends_the_run_with_3(line: str, tmp_path: Path) -> None:
    """Among the workers of the matrix, and where a guest moves."""
    path = tmp_path / "mine.py"
    path.write_text(f"import ctypes, os\ndef decide(host, guest, vcpu, value):\n    {line}\n")
    (tmp_path / "p").write_text("profile AMD_IBRS; guest-wr 0x48 0x1")
    for more in (
        ("policy", "--profile", "AMD_IBRS", "--record", "-"),
        ("policy", "--profile", "AMD_IBRS", "--record", "-", "--jobs", "1"),
        ("migrate", tmp_path / "p", "--from-policy"),
    ):
        done = run_policy(path, *more)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "the policy mine.py ended the process in which it ran" in done.stderr


def test_a_keyboard_interrupt_of_a_policy_is_one_of_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def decide(host, guest, vcpu, value):\n    raise KeyboardInterrupt\n")
    done = run_policy(path, "policy", "--profile", "AMD_IBRS", "--record", "-")
    assert done.returncode == 3
    assert "raised KeyboardInterrupt" in done.stdout


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    """Not even if the policy is in C code that does not return."""
    path = tmp_path / "mine.py"
    path.write_text("def decide(host, guest, vcpu, value):\n    sum(range(10**12))\n")
    running = subprocess.Popen(
        [sys.executable, "-m", "probe", "kvm", "policy", path, "--profile", "AMD_IBRS", "--profile", "AMD_STIBP"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(4)
    os.killpg(running.pid, signal.SIGINT)
    out, said = running.communicate(timeout=30)
    assert (running.returncode, out) == (130, ""), said
    assert said.splitlines()[-1] == "spec-ctrl-probe: interrupted"
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)


def test_a_policys_own_run_leaves_no_record_if_it_did_not_decide(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def decide(host, guest, vcpu, value):\n    return compleet(value)\n")
    done = subprocess.run(
        [sys.executable, "-m", "probe", "kvm", "policy", tmp_path / "broken.py", "--profile", "AMD_IBRS"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "the policy DID NOT DECIDE" in " ".join(done.stdout.split())
    assert "no record: " in done.stderr
    assert not (tmp_path / "results").exists()


def test_without_filters_the_study_is_of_kvm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(Kvm):
        def check_extension(self, cap: int) -> int:
            return 0 if cap == uapi.KVM_CAP_X86_MSR_FILTER else super().check_extension(cap)

    monkeypatch.setattr("kernel_harness.kvm.migrate.Kvm", Old)
    record = migrate(None, [], source=None, target=None, profile="", rule="kvm", arguments=[])
    assert [one.policy for one in record.departures] == [""]
    assert len(record.arrivals) == 1
    assert "the study is of KVM alone" in " ".join(moved_text.render([record]).split())


def test_a_program_that_expects_otherwise_is_told() -> None:
    done = moved("profile AMD_IBRS; guest-wr 0x48 0x1 -> gp", BY_NAME["forced-shadow"], BY_NAME["forced-shadow"])
    assert not as_calculated(done)
    assert done.departures[0].differs == "operation 1: the program expects gp"
