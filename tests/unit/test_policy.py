# SPDX-License-Identifier: MIT
"""Policies and migrations without a machine: what they decide, what breaks, what a file of one's own may do."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_harness.kvm.policed import Judge
from kernel_harness.kvm.policy_file import EXAMPLE, find
from kernel_harness.kvm.processes import ProcessLost, apart, in_order
from probe.cli import main, without_paths
from probe.errors import ExitCode, PolicyError, ProbeError, RecordError, RequirementMissing, UsageError
from probe.kvm_record import decode as decode_kvm
from probe.masks import ALL_BITS
from probe.models import machines
from probe.models.cost import Cost, Costs, Row, switches_for_one_percent
from probe.models.difference import HOSTS, Writes, differing_writes, policy_difference
from probe.models.guest_systems import SYSTEMS, breaks, broken_moves, cpus, forgets
from probe.models.machine import Hardware, Host, answers
from probe.models.matrix import CELLS, Measured, expected_by_programs, fit
from probe.models.migration import BY_NAME as RULES
from probe.models.migration import Move, Side
from probe.models.policy import (
    BY_NAME,
    POLICIES,
    Decision,
    Fate,
    Policy,
    PolicyMachine,
    VcpuState,
    complete,
    drop,
    fault,
)
from probe.models.profile import ALL_FEATURES, EMPTY, NAMED, Profile, parse_profile
from probe.models.program import Kind, format_answer, parse
from probe.pool import Advice, Place, advise, grouped, move, place_of
from probe.record import decode
from probe.report import migrate_text, policy_text

KERNEL = machines.get("kvm-6.19-svm")
WITHOUT_V = ALL_FEATURES & ~parse_profile("V_SPEC_CTRL").mask
IDEAL = Host(features=WITHOUT_V, caps=WITHOUT_V)
ZEN2 = Host(Hardware(tested=0x6, valid=0x6, keep=0x6), features=parse_profile("zen2-client").mask, caps=WITHOUT_V)
METAL = Path("results/modelled-threadripper-3970x/metal.json")
GUEST = Path("results/modelled-threadripper-3970x/kvm-5.6-guest.json")


def run(policy: str | Policy, text: str, host: Host = IDEAL, kernel: str = "kvm-6.19-svm") -> str:
    asked = BY_NAME[policy] if isinstance(policy, str) else policy
    said = answers(PolicyMachine(asked, machines.get(kernel)), parse(text)[0], host)
    return " ".join("?" if one is None else format_answer(one) for one in said)


@pytest.mark.parametrize(
    ("policy", "text", "wanted"),
    [
        # The guest of July 2020: STIBP without IBRS.
        (
            "kvm-5.6-mask",
            "profile zen2-client-2020; guest-wr 0x48 0x2; guest-wr 0x48 0x4; guest-wr 0x48 0x2",
            "gp ok ok",
        ),
        ("maxim-v1", "profile zen2-client-2020; guest-wr 0x48 0x2; guest-rd 0x48", "ok 0x2"),
        ("hardware-test", "profile zen2-client-2020; guest-wr 0x48 0x2; guest-wr 0x48 0x1", "ok gp"),
        ("emulate", "profile zen2-client-2020; guest-wr 0x48 0x6; guest-wr 0x48 0x80; guest-rd 0x48", "ok gp 0x6"),
        # Emulation asks on every write; pass-through does not after the first that is not 0.
        (
            "emulate-guest",
            "profile AMD_STIBP; guest-wr 0x48 0x2; guest-wr 0x48 0x4; host-set 0x48 0x4",
            "ok gp refused",
        ),
        ("pass-through-after-write", "profile AMD_STIBP; guest-wr 0x48 0x2; guest-wr 0x48 0x4", "ok ok"),
        ("pass-through-after-write", "profile AMD_STIBP; guest-wr 0x48 0x1", "gp"),
        # The hardware does not fault on what a policy never sees any more, nor on what it does not let go.
        ("pass-through", "profile AMD_STIBP; guest-wr 0x48 0x4; guest-rd 0x48; host-get 0x48", "ok 0x4 0x4"),
        ("pass-through", "profile empty; guest-wr 0x48 0x0", "gp"),
        ("xen", "profile AMD_IBRS; guest-wr 0x48 0x2; guest-wr 0x48 0x4", "ok gp"),
        ("xen", "profile zen2-client; guest-wr 0x48 0x0; host-set 0x48 0x0; host-set 0x48 0x2", "gp ok refused"),
        # A program's own filter stays a filter.
        ("emulate", "profile AMD_STIBP; deny 0x48 wr; guest-wr 0x48 0x2; allow; guest-wr 0x48 0x2", "ok gp ok ok"),
        ("emulate", "profile AMD_STIBP; guest-wr 0x48 0x2; init; guest-rd 0x48", "ok ok 0x0"),
    ],
)
def test_a_policy_decides(policy: str, text: str, wanted: str) -> None:
    assert run(policy, text, ZEN2) == wanted


def test_forced_and_shadow() -> None:
    text = "profile AMD_STIBP; guest-wr 0x48 0x2; guest-rd 0x48; host-get 0x48"
    assert run("forced-shadow", text) == "ok 0x2 0x2"
    forced = PolicyMachine(BY_NAME["forced-shadow"], KERNEL)
    state = forced.start(parse_profile("AMD_STIBP"), IDEAL)
    state, _ = forced.step(state, parse("profile none; guest-wr 0x48 0x2")[0].operations[0])
    assert state.kernel.value == 0x402, "what the guest does not see: BHI_DIS_S is on"
    fresh = forced.start(EMPTY, IDEAL)
    assert (fresh.kernel.value, fresh.vcpu.shadow) == (0x400, 0), "a guest that does not know of it, too"
    state, _ = forced.step(state, parse("profile none; init")[0].operations[0])
    assert (state.kernel.value, state.vcpu.shadow) == (0x400, 0), "and after INIT"
    assert run("forced-shadow", text, ZEN2) == "ok 0x2 0x2", "hardware without the bit: nothing to force"


@pytest.mark.parametrize("kernel", ["kvm-6.19-svm", "kvm-6.17-svm", "kvm-6.1-svm", "kvm-6.19-vmx"])
def test_pass_through_is_that_after_init_too(kernel: str) -> None:
    """kvm_amd intercepts again at INIT from v6.17 on."""
    machine = PolicyMachine(BY_NAME["pass-through"], machines.get(kernel))
    state = machine.start(parse_profile("SPEC_CTRL,AMD_STIBP"), IDEAL)
    for operation in parse("profile none; guest-rd 0x48; init; guest-rd 0x48")[0].operations:
        state, _ = machine.step(state, operation)
        if operation.kind is not Kind.INIT:
            assert state.kernel.direct


def test_a_dropped_write_changes_nothing() -> None:
    def decide(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
        return drop() if value & 0x1 else complete(value)

    text = "profile AMD_IBRS; guest-wr 0x48 0x2; guest-wr 0x48 0x1; guest-rd 0x48"
    assert run(Policy("mine", "", "", decide), text) == "ok ok 0x2"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.name))
@given(mask=st.integers(0, ALL_FEATURES), keep=st.sampled_from([0, 0x7, ALL_BITS]))
@settings(max_examples=3, deadline=None)
def test_a_policys_model_explains_itself(policy: Policy, mask: int, keep: int) -> None:
    host = Host(Hardware(keep=keep), features=WITHOUT_V, caps=WITHOUT_V)
    machine = PolicyMachine(policy, KERNEL)
    row = expected_by_programs(machine, Profile(mask), host, 1)
    assert set(row.masks) == {cell.name for cell in CELLS}
    assert fit(machine, host, [Measured(Profile(mask), 1, row.masks)]).explains


# --- what a policy of one's own may do ------------------------------------------------------------------------------


def judged(decide: object) -> tuple[Decision, Judge]:
    judge = Judge(Policy("mine", "", "", decide))  # type: ignore[arg-type]
    return judge(IDEAL, EMPTY, VcpuState(), 1), judge


def raises(*given: object) -> Decision:
    raise KeyError("nothing")


class _Lies(int):
    """A number that says what one likes to hear of it."""

    def __le__(self, other: object) -> bool:
        return True

    __lt__ = __ge__ = __gt__ = __le__


class _Mute:
    """What cannot be printed."""

    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __repr__


class _MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def _raising(error: BaseException) -> object:
    def decide(*given: object) -> Decision:
        raise error

    return decide


def test_one_complaint_for_each_kind() -> None:
    judge = Judge(Policy("mine", "", "", lambda host, guest, vcpu, value: value))  # type: ignore[arg-type,return-value]
    for value in range(65):
        judge(IDEAL, EMPTY, VcpuState(), value)
    assert judge.complaints == {"returned int, no Decision (0)": 65}


def test_ctrl_c_in_a_policy_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt):
        Judge(Policy("mine", "", "", _raising(KeyboardInterrupt())))(IDEAL, EMPTY, VcpuState(), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ["raise GeneratorExit", "raise KeyError(1)", "import sys; sys.exit(1)", "1/0"])
def test_a_file_that_raises_when_it_is_loaded(line: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(line + "\n")
    with pytest.raises(PolicyError, match="raises when it is loaded"):
        find(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("decide", "complaint"),
    [
        (raises, "raised KeyError ('nothing')"),
        (lambda *given: None, "returned NoneType, no Decision (None)"),
        (lambda *given: 7, "returned int, no Decision (7)"),
        (lambda *given: complete(1 << 64), f"returned a int that is no value of 64 bits ({1 << 64})"),
        (lambda *given: complete(True), "returned a bool that is no value of 64 bits (True)"),
        (lambda *given: complete(_Lies(1 << 70)), "returned a _Lies that is no value of 64 bits"),
        (lambda *given: Decision("drop"), "returned Decision, no Decision"),  # type: ignore[arg-type]
        (lambda *given: _Mute(), "returned _Mute, no Decision (and cannot say what)"),
        (_raising(_MuteError()), "raised _MuteError (and cannot say what)"),
        (_raising(ValueError("\ud800")), "raised ValueError (\\ud800)"),
        (_raising(GeneratorExit("x")), "raised GeneratorExit (x)"),
        (_raising(SystemExit(0)), "raised SystemExit (0)"),
    ],
)
def test_a_policy_that_answers_nonsense_faults_and_is_told(decide: object, complaint: str) -> None:
    decision, judge = judged(decide)
    assert decision == fault()
    (said,) = judge.complaints
    assert said.startswith(complaint[:50])
    said.encode()


def test_no_path_of_a_policy_reaches_the_record() -> None:
    def reads_a_file(*given: object) -> Decision:
        raise FileNotFoundError(2, "No such file or directory", "/home/me/table")

    _, judge = judged(reads_a_file)
    assert not any("/home" in what for what in judge.complaints)
    assert any("'PATH'" in what for what in judge.complaints)
    assert without_paths(["kvm", "policy", "/home/me/mine.py", "--programs", "5"]) == [
        "kvm", "policy", "PATH", "--programs", "5",
    ]  # fmt: skip


def test_the_example_works(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE)
    policy = find(str(path))
    assert (policy.name, policy.title) == ("mine.py", "Only what the guest's CPUID enumerates, and never STIBP.")
    text = "profile AMD_STIBP,AMD_SSBD; guest-wr 0x48 0x6; guest-rd 0x48; guest-wr 0x48 0x80"
    assert run(policy, text) == "ok 0x4 gp"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_module", "raises when it is loaded: ModuleNotFoundError"),
        ("def decide(:", "cannot use the policy"),
        ("x = 1", r"has no function decide\(host, guest, vcpu, value\)"),
        ("while True: pass", "does not come to an end when it is loaded"),
        ("async def decide(host, guest, vcpu, value): ...", "returns no Decision but a coroutine or generator"),
        ("def decide(host, guest, vcpu, value): yield", "returns no Decision but a coroutine or generator"),
    ],
)
def test_a_file_that_is_no_policy(text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_harness.kvm.policy_file._LOAD_SECONDS", 0.3)
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(PolicyError, match=why) as raised:
        find(str(path))
    assert raised.value.exit_code is ExitCode.FAILED


def test_a_pipe_is_no_policy(tmp_path: Path) -> None:
    """Nobody may ever write into it."""
    os.mkfifo(tmp_path / "mine.py")
    with pytest.raises(PolicyError, match="no regular file"):
        find(str(tmp_path / "mine.py"))


def test_a_file_is_a_module_with_others_beside_it(tmp_path: Path) -> None:
    """The dataclass looks for its module; each file gets the neighbour of its own folder."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "neighbour_of_a_policy.py").write_text(f"NAME = {folder!r}\n")
        (tmp_path / folder / "mine.py").write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "from neighbour_of_a_policy import NAME\n@dataclass\nclass Rule:\n    name: str = NAME\n"
            "def decide(host, guest, vcpu, value):\n    raise OSError(Rule().name)\n"
        )
    path = list(sys.path)
    found = [find(str(tmp_path / folder / "mine.py")) for folder in ("one", "two")]
    assert sys.path == path
    for policy, folder in zip(found, ("one", "two")):
        judge = Judge(policy)
        judge(IDEAL, EMPTY, VcpuState(), 1)
        assert judge.complaints == {f"raised OSError ({folder})": 1}


def test_what_a_policy_prints_is_not_in_our_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import os\nfrom probe.models.policy import complete\nprint('loaded')\nos.system('echo a program')\n"
        "def decide(host, guest, vcpu, value):\n    print('decides')\n    os.write(1, b'file 1\\n')\n"
        "    return complete(value)\n"
    )
    assert main(["kvm", "policy", str(path), "--table"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(" ")
    for words in ("loaded", "a program", "decides", "file 1"):
        assert words not in out
        assert words in err


@pytest.mark.parametrize("line", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_policy_that_ends_its_process_is_told(
    line: str, inside: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"import ctypes, os\ndef decide(host, guest, vcpu, value):\n    {line}\n" + ("" if inside else line)
    )
    assert main(["kvm", "policy", "emulate", "--compare", str(path)]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "the policy mine.py ended the process in which it ran" in err
    if not inside:
        assert main(["boot", "--kernels", "host", "--", "kvm", "policy", str(path)]) == 3


def test_a_keyboard_interrupt_of_a_policy_is_not_ctrl_c(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def decide(host, guest, vcpu, value):\n    raise KeyboardInterrupt\n")
    assert main(["kvm", "policy", "emulate", "--compare", str(path)]) == 3
    assert "policy mine.py raised KeyboardInterrupt" in capfd.readouterr().err
    path.write_text("raise KeyboardInterrupt\n")
    assert main(["kvm", "policy", "emulate", "--compare", str(path)]) == 3


def test_work_apart_returns_and_raises_what_it_does() -> None:
    def wrong() -> int:
        raise RequirementMissing("no device", "make one")

    assert apart(lambda: 7) == 7
    with pytest.raises(RequirementMissing, match=r"no device \(make one\)"):
        apart(wrong)
    with pytest.raises(ProbeError, match="internal error"):
        apart(lambda: lambda: 7)


def _many(work: Callable[[int], int], tasks: int = 12) -> list[int]:
    return list(in_order(range(tasks), 2, lambda: contextlib.nullcontext(work), lambda number: f"in task {number}"))


def test_many_tasks_come_back_in_order() -> None:
    def slow_at_first(task: int) -> int:
        time.sleep(0.2 if task == 0 else 0)
        return task * task

    assert _many(slow_at_first) == [task * task for task in range(12)]
    assert _many(slow_at_first, 0) == []


def test_a_worker_that_ends_is_noticed() -> None:
    def ends(task: int) -> int:
        if task == 5:
            os._exit(0)
        return task

    with pytest.raises(ProcessLost, match="exit code 0, in task 5"):
        _many(ends)
    with pytest.raises(RequirementMissing, match="no device"):
        _many(lambda task: next(_raise(RequirementMissing("no device"))))
    assert not multiprocessing.active_children()


def _raise(error: Exception) -> Iterator[int]:
    raise error
    yield 0


def test_names_that_are_none() -> None:
    with pytest.raises(UsageError, match="no policy is called 'nope'"):
        find("nope")
    with pytest.raises(UsageError, match="cannot use the policy"):
        find("/no/such/file.py")


# --- what policies mean ---------------------------------------------------------------------------------------------


def dead(policy: str, system: str) -> list[str]:
    machine = PolicyMachine(BY_NAME[policy], KERNEL)
    (asked,) = [one for one in SYSTEMS if one.name == system]
    return [cpu.name for cpu in cpus() if breaks(machine, cpu, asked)]


def test_the_crash_of_2020_and_the_one_of_2026() -> None:
    assert {system.name: system.fate for system in SYSTEMS} == {"linux": "warns", "windows": "dies", "hyper-v": "dies"}
    assert dead("kvm-5.6-mask", "windows") == ["zen2-client", "dali", "qemu-epyc-rome-v1"]
    assert dead("kvm-5.6-mask", "linux") == ["zen2-client", "dali", "qemu-epyc-rome-v1"]
    for policy in ("maxim-v1", "pass-through-after-write", "emulate", "hardware-test"):
        assert dead(policy, "windows") == dead(policy, "linux") == []
    assert dead("pass-through-after-write", "hyper-v") == ["psfd-only"]
    assert dead("hardware-test", "hyper-v") == []


def test_two_policies_differ_in_a_program_that_both_answer_so() -> None:
    one, other = PolicyMachine(BY_NAME["emulate"], KERNEL), PolicyMachine(BY_NAME["pass-through"], KERNEL)
    found = policy_difference(one, other)
    assert found is not None
    assert len(found.program.operations) == 1
    assert found.one[-1] != found.other[-1]
    assert policy_difference(one, one, HOSTS[:1], most=1) is None
    values, differ = policy_text.writes(one, other), policy_text.fates(one, other)
    text = policy_text.compared(one.policy, other.policy, KERNEL, found, values, differ)
    assert str(found.program) in " ".join(text.split())


def test_a_policy_that_asks_for_vmx_differs() -> None:
    """The smallest case and the named CPUs may not contradict each other."""

    def decide(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
        return fault() if host.vmx else BY_NAME["emulate-guest"].decide(host, guest, vcpu, value)

    one, other = (
        PolicyMachine(policy, KERNEL) for policy in (BY_NAME["emulate-guest"], Policy("vmx.py", "", "", decide))
    )
    found = policy_difference(one, other)
    assert found is not None
    assert "VMX" in found.host
    told = " ".join(policy_text.writes(one, other))
    assert "knights-landing" in told
    assert "zen2-client" not in told


def test_a_policy_that_asks_for_one_cpu_differs_there() -> None:
    zen2 = next(cpu for cpu in cpus() if cpu.name == "zen2-client")

    def decide(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
        if host == zen2.host and value == 0x4:
            return fault()
        return BY_NAME["emulate-guest"].decide(host, guest, vcpu, value)

    one, other = (
        PolicyMachine(policy, KERNEL) for policy in (BY_NAME["emulate-guest"], Policy("zen2.py", "", "", decide))
    )
    found = policy_difference(one, other)
    assert found is not None
    assert found.host == "zen2-client"
    assert policy_text.writes(one, other) == [
        "  zen2-client",
        "    first: bits 2 (SSBD): ok under emulate-guest, #GP under zen2.py",
    ]


def test_the_writes_that_named_cpus_see_answered_otherwise() -> None:
    one, other = (PolicyMachine(BY_NAME[name], KERNEL) for name in ("emulate-guest", "kvm-5.6-mask"))
    zen2 = next(cpu for cpu in cpus() if cpu.name == "zen2-client")
    assert Writes(None, "ok", "#GP", 0x2, ()) in differing_writes(one, other, zen2)
    assert differing_writes(one, one, zen2) == []
    sierra = next(cpu for cpu in cpus() if cpu.name == "qemu-sierraforest-v2")
    (after,) = [case for case in differing_writes(one, other, sierra) if case.after]
    assert (after.after, after.one, after.other) == (0x1, "#GP", "ok, reads otherwise"), "let through by then"


def test_only_emulation_by_the_guests_cpuid_makes_every_move_safe() -> None:
    def moves(policy: str) -> list[tuple[str, str, Move]]:
        return broken_moves(PolicyMachine(BY_NAME[policy], KERNEL), RULES["qemu"])

    assert moves("emulate") == moves("emulate-guest") == []
    found = moves("pass-through-after-write")
    assert ("zen2-client", "dali") in [(source, target) for source, target, _ in found], "SSBD set by who has STIBP"


def test_the_table_of_the_readme() -> None:
    wanted = {
        "emulate": (0, 0),
        "pass-through-after-write": (45, 11),
        "emulate-host": (56, 0),
        "forced-shadow": (45, 0),
        "maxim-v1": (43, 0),
        "kvm-5.6-mask": (34, 6),
        "hardware-test": (88, 34),
        "xen": (0, 15),
    }
    for policy, counts in wanted.items():
        found = broken_moves(PolicyMachine(BY_NAME[policy], KERNEL), RULES["qemu"])
        words = [done.word for *_, done in found]
        assert (words.count("refused"), words.count("lost")) == counts, policy


def test_the_readme_has_the_costs_of_the_table() -> None:
    table = Path("results/policies/table.txt").read_text(encoding="utf-8")
    readme = Path("README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in table.splitlines()]
    for name in BY_NAME:
        *_, cycles, per_second = next(row for row in rows if row[:1] == [name])
        (said,) = [line for line in readme if line.startswith("| ") and f"`{name}`" in line]
        assert f"{round(int(cycles.replace(',', '')), -2):,}" in said or cycles in said, name
        assert per_second == "-" or f"({per_second}" in said, name
    for what in (
        "nothing: the timing itself",
        "CPUID: an exit to KVM",
        "OUT: an exit to this VMM",
        "KVM alone, after it",
    ):
        (cost,) = re.findall(rf"{what} +([\d,]+) \(", table)
        assert cost in "\n".join(readme), what


def test_a_policy_that_forgets_is_told_beside_its_breaking_nothing() -> None:
    nothing = PolicyMachine(Policy("nothing.py", "", "", lambda *given: drop()), KERNEL)
    text = policy_text.summary([nothing], RULES["qemu"], None)
    (row,) = [line.split() for line in text.splitlines() if line.startswith("nothing.py")]
    assert row == ["nothing.py", "0", "13", "0", "0", "writes"]
    assert [
        policy.name for policy in POLICIES if any(forgets(PolicyMachine(policy, KERNEL), cpu) for cpu in cpus())
    ] == []


@pytest.mark.parametrize("wrong", [1 << 4, 1 << 6, 0x3, 0x6])
def test_a_difference_in_one_bit_or_a_combination_is_found(wrong: int) -> None:
    def decide(host: Host, guest: Profile, vcpu: VcpuState, value: int) -> Decision:
        return fault() if value == wrong else BY_NAME["emulate-guest"].decide(host, guest, vcpu, value)

    other = PolicyMachine(Policy("other.py", "", "", decide), KERNEL)
    found = policy_difference(PolicyMachine(BY_NAME["emulate-guest"], KERNEL), other)
    assert found is not None
    assert found.program.operations[-1].value == wrong


def test_the_tables_fit_a_mail() -> None:
    asked = [PolicyMachine(policy, KERNEL) for policy in POLICIES]
    write, through = Cost("WRMSR", 2220, 1900, 3000), Cost("WRMSR", 220, 200, 300)
    costs = Costs(
        2_000_000,
        (Cost("nothing: the timing itself", 20, 18, 30), Cost("CPUID: an exit to KVM", 1220, 1200, 1300)),
        (Row("KVM alone, after it", through, through, let_through=True),),
        through,
        (
            Row("emulate", write, Cost("RDMSR", None)),
            Row("maxim-v1", write, write, took=False),
            Row("pass-through", Cost("WRMSR", 230, 225, 300), through, let_through=True),
            Row("xen", Cost("WRMSR", 210, 190, 300), through),
        ),
        lent="SPEC_CTRL",
    )
    qemu = RULES["qemu"]
    texts = [
        policy_text.summary(asked, qemu, costs),
        policy_text.summary(asked[:1], qemu, None),
        policy_text.survival(asked[:3]),
        policy_text.costs(costs),
        policy_text.catalogue(EXAMPLE),
    ]
    for text in texts:
        assert all(len(line) <= 75 for line in text.splitlines()), text
    rows = {line.split()[0]: line.split()[1:] for line in texts[0].splitlines() if line and line.split()[0] in BY_NAME}
    assert rows["emulate"] == ["1", "0", "0", "0", "writes", "2,220", "10,000"]
    assert rows["pass-through"][-3:] == ["none", "230", "-"], "the same instruction, whatever the clock says"
    assert rows["maxim-v1"][-2:] == ["-", "-"], "what was timed is a guest that was not let through"
    assert rows["xen"][-2:] == ["210", "-"], "cheaper than what it stands against: cannot be told"
    assert rows["pass-through-after-write"] == ["1", "0", "45", "11", "none"], "it has let go; nothing was measured"
    assert rows["forced-shadow"] == ["1", "0", "45", "0", "all"]
    assert rows["kvm-5.6-mask"] == ["7", "0", "34", "6", "none"]
    assert "cycles" not in texts[1]
    told = " ".join(policy_text.costs(costs).split())
    assert "CPUID: an exit to KVM 1,220 (1,200 .. 1,300) 1 % of a CPU at 20,000 a second" in told
    assert "emulate 2,220 (1,900 .. 3,000) RDMSR takes #GP 1 % of a CPU at 10,000 a second" in told
    assert "xen 210 (190 .. 300) RDMSR 220 (200 .. 300) 1 %: cannot be told" in told
    assert "pass-through: let through 230 (225 .. 300) RDMSR 220 (200 .. 300) xen" in told
    assert "maxim-v1, which took no bit here" in told
    assert switches_for_one_percent(replace(costs, through=None), write) is None
    assert "KVM lets no guest through here" in policy_text.costs(replace(costs, through=None))


# --- migrations -----------------------------------------------------------------------------------------------------

ZEN = parse_profile("AMD_IBRS,AMD_STIBP,AMD_SSBD").mask
ALL = Side(ALL_BITS, ALL_BITS, ALL_BITS, listed=True, offers=ZEN, guest=ZEN)
OLD = Side(0x7, 0x7, 0x7, listed=True, offers=ZEN, guest=ZEN)
NONE = Side(0, 0, 0, listed=False, takes_zero=False)
QEMU = RULES["qemu"]


@pytest.mark.parametrize(
    ("rule", "source", "target", "held", "wanted"),
    [
        ("kvm", ALL, OLD, 0x87, Move(refused=0x80)),
        ("qemu", ALL, OLD, 0x87, Move(refused=0x80)),
        ("qemu", ALL, NONE, 0x7, Move(lost=0x7)),
        # Clamped to what the guest's policy has, whose CPUID has no PSFD; then the destination's own test.
        ("xen", ALL, OLD, 0x87, Move(lost=0x80)),
        ("xen", ALL, Side(0x1, 0x1, 0x1, listed=True), 0x7, Move(refused=0x6)),
        ("xen", NONE, OLD, 0x7, Move(lost=0x7)),
        ("firecracker", ALL, NONE, 0x0, Move(refuses_all=True)),
        ("firecracker", NONE, NONE, 0x0, Move()),
        ("firecracker", ALL, OLD, 0x7, Move()),
        # One refused bit leaves the whole value out.
        ("cloud-hypervisor", ALL, OLD, 0x87, Move(lost=0x87)),
        ("cloud-hypervisor", ALL, OLD, 0x7, Move()),
        ("kvm", ALL, Side(0, ALL_BITS, 0x7, listed=True), 0x87, Move(lost=0x80)),
    ],
)
def test_a_rule_moves(rule: str, source: Side, target: Side, held: int, wanted: Move) -> None:
    assert RULES[rule].move(source, target, held) == wanted


@given(
    holds=st.integers(0, ALL_BITS), takes=st.integers(0, ALL_BITS), keeps=st.integers(0, ALL_BITS), listed=st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_nothing_is_both_refused_and_lost(holds: int, takes: int, keeps: int, listed: bool) -> None:
    target = Side(0, takes, keeps, listed)
    for rule in RULES.values():
        done = rule.move(ALL, target, holds)
        assert not done.refused & done.lost
        assert not (done.refused | done.lost) & ~holds


def test_the_smallest_change_that_makes_a_pool_safe() -> None:
    ssbd_less = Side(0x3, 0x3, 0x3, listed=True, offers=parse_profile("AMD_IBRS,AMD_STIBP").mask)
    found = advised(place("a", x=OLD), place("b", x=replace(ssbd_less, guest=ZEN)))
    assert (found.whole, names(found.hide)) == (0x3, "AMD_SSBD")
    assert names(found.closes) == "AMD_IBRS,AMD_STIBP,AMD_SSBD", "a guest that is let through sets what it likes"
    alike = advised(place("a", x=OLD), place("b", x=OLD))
    assert (alike.hide, alike.closes, alike.breaks.some) == (0, 0, False)
    none = advised(place("a", x=OLD), place("b", x=replace(NONE, guest=ZEN)))
    assert (none.whole, none.hide, none.closes) == (0, None, None), "it refuses 0, too"
    by_qemu = advised(place("a", x=OLD), place("b", x=replace(NONE, guest=ZEN)), rule="qemu")
    assert names(by_qemu.hide) == "AMD_IBRS,AMD_STIBP,AMD_SSBD", "what QEMU does not send cannot be lost"


def test_two_records_and_a_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", str(METAL), str(GUEST)]) == 1
    text = capsys.readouterr().out
    assert "refused if it holds bit 1 (STIBP)" in text
    assert all(len(line) <= 75 for line in text.splitlines())
    for number in range(3):
        (tmp_path / f"{number}.json").write_bytes(METAL.read_bytes())
    assert main(["migrate", str(tmp_path)]) == 0
    assert "3 records, 1 kinds of machine" in capsys.readouterr().out
    (tmp_path / "old.json").write_bytes(GUEST.read_bytes())
    assert main(["migrate", str(tmp_path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert len(said["kinds"]) == 2
    assert any(one["rule"] == "qemu" and one["outcome"] == "refused" for one in said["moves"])
    assert main(["migrate", str(METAL)]) == 2
    assert main(["migrate", str(METAL), str(GUEST), "--rule", "nope"]) == 2
    assert main(["migrate", str(METAL), str(tmp_path / "none.json")]) == 3


def test_a_guest_of_both_kinds_of_record() -> None:
    """What KVM lets guests hold against what a machine's own register takes."""
    files = sorted(Path("results/debian-kernels-nested/zen2-client").glob("*.json"))
    kvm = place_of(decode_kvm(files[0].read_bytes(), "x"), "kvm")
    metal = place_of(decode(METAL.read_bytes(), "x"), "metal")
    assert len(grouped([kvm, metal, kvm])) == 2
    for rule in RULES.values():
        # Of what the metal holds (STIBP, SSBD) Xen's guest has no register: IBRS is not there.
        done = move(rule, metal, metal)
        assert (done.word, done.absent) == ("works", 1 if rule.name == "xen" else 0)
    assert move(RULES["kvm"], metal, kvm).word == "lost", "an emulated CPU keeps nothing"
    assert f"compared for {len(kvm.sides)} guest CPUIDs" in migrate_text.pair(metal, kvm)


def place(name: str, **sides: Side) -> Place:
    return Place(name, name, sides)


def advised(*places: Place, rule: str = "kvm") -> Advice:
    return advise(grouped(places), RULES[rule])


def names(features: int | None) -> str | None:
    return None if features is None else str(Profile(features))


def test_places_that_know_no_guest_in_common_are_not_compared() -> None:
    with pytest.raises(RecordError, match="no guest profile in common"):
        move(RULES["kvm"], place("a", AMD_IBRS=OLD), place("b", AMD_STIBP=OLD))


def test_a_pool_is_mended_profile_by_profile() -> None:
    """A rule of the guest's CPUID: what one guest may hold, another may not, and each is safe everywhere."""
    one = place("one", AMD_IBRS=Side(0x1, 0x1, 0x1, listed=True), AMD_SSBD=Side(0x4, 0x4, 0x4, listed=True))
    found = advised(one, one)
    assert (found.hide, found.closes) == (0, 0)


def test_a_machine_loses_nothing_to_its_own_kind() -> None:
    """A register that keeps nothing: what a guest never read back is not lost when it moves."""
    for path in sorted(Path("results/debian-kernels-nested/policies").glob("*.json")):
        place_ = place_of(decode_kvm(path.read_bytes(), path.name), path.name)
        assert not move(RULES["kvm"], place_, place_).lost, path.name


def test_a_pool_of_which_nothing_can_be_told() -> None:
    """No guest CPUID that all know; or machines that keep nothing, from which no advice follows."""
    some = [place("a", x=OLD, y=OLD), place("b", y=OLD, z=OLD), place("c", x=OLD, z=OLD)]
    text = " ".join(migrate_text.matrix(grouped([*some, place("d", x=NONE)]), RULES["kvm"]).split())
    assert "cannot be told: no guest CPUID was measured on all of them" in text
    forgetful = Side(0x7, ALL_BITS, 0, listed=True, offers=ZEN, guest=ZEN)
    forgetful = replace(forgetful, holds=0, sees=0, forgets=True)
    text = " ".join(migrate_text.matrix(grouped([place("a", x=forgetful), place("b", x=forgetful)]), QEMU).split())
    assert "no guest needs another CPUID; but whether the pool is safe cannot be told" in text
    assert "leave out" not in text


def test_a_hole_is_told_with_the_advice() -> None:
    """V_SPEC_CTRL, v5.13 to v6.16: a guest without any of the bits is let through."""
    hole = Side(0x7, 0x7, 0x7, listed=True)
    places = [place("a", empty=hole, x=ALL), place("b", empty=Side(0x7, 0x3, 0x3, listed=True), x=OLD)]
    assert "no CPUID makes it safe" in " ".join(migrate_text.matrix(grouped(places), RULES["kvm"]).split())


def test_a_pool_of_many_kinds_has_every_column() -> None:
    places = [place(f"m{bit}", x=Side(1 << bit, 1 << bit, 1 << bit, listed=True)) for bit in range(40)]
    text = migrate_text.matrix(grouped(places), RULES["kvm"])
    assert text.count("from\\to") == 2
    assert all(len(line) <= 75 for line in text.splitlines())
    numbers = [int(word) for line in text.splitlines() if line.startswith("from") for word in line.split()[1:]]
    assert numbers == list(range(1, 41))


def test_a_rule_of_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", str(METAL), str(GUEST), "--rule", "kvm"]) == 1
    out = capsys.readouterr().out
    assert "  kvm " in out
    assert "  firecracker " not in out


def test_several_machines_of_one_kind_that_break_count() -> None:
    """v5.6: let through, then a bit that KVM_SET_MSRS refuses: on the very same kind of machine."""
    side = Side(0x7, 0x4, 0x4, listed=True)
    alone, twice = grouped([place("a", x=side)]), grouped([place("a", x=side), place("b", x=side)])
    assert (len(alone), len(twice)) == (1, 1)
    assert not advise(alone, RULES["qemu"]).breaks.some
    assert advise(twice, RULES["qemu"]).breaks.some
    assert json.loads("".join(migrate_text.as_json(twice, RULES["qemu"])))["moves"][0]["outcome"] == "refused"


@pytest.mark.parametrize("argument", ["--compare", "--table"])
def test_a_bad_policy_is_told_wherever_it_is_asked(
    argument: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import sys\ndef decide(host, guest, vcpu, value):\n    sys.exit(0)\n")
    more = ["emulate"] if argument == "--compare" else []
    assert main(["kvm", "policy", str(path), argument, *more]) == 3
    assert "policy mine.py raised SystemExit" in capfd.readouterr().err


def test_a_folder_with_other_files_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.json").write_bytes(METAL.read_bytes())
    (tmp_path / "x.json").write_bytes(GUEST.read_bytes())
    for name, text in (("cut", "["), ("other", '{"a": 1}'), ("newer", '{"schema_version": "9.0"}')):
        (tmp_path / f"{name}.json").write_text(text)
    assert main(["migrate", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert err.count("left out: ") == 3
    assert "3 files of this folder were LEFT OUT" in out, "a pool that is not whole says so where it is read"
    assert "a/x.json" in out, "a file is called by its path in the folder"


def test_named_profiles_have_policies_that_know_them() -> None:
    assert {cpu.name for cpu in cpus()} < {named.name for named in NAMED}
    assert all(policy.decide(IDEAL, EMPTY, VcpuState(by_host=True), 0).fate is Fate.COMPLETE for policy in POLICIES)


@pytest.mark.parametrize(
    "inside",
    [
        "kvm replay x",
        "kvm migrate --restore=left.json",
        "kvm migrate --record=x.json",
        "kvm migrate --rule vmware",
        "kvm migrate FILE --to-policy nope",
        "kvm policy nope",
        "kvm policy",
        "kvm policy emulate --cost",
        "kvm policy --table",
        "kvm policy emulate --compare xen",
        "kvm --json",
        "run",
    ],
)
def test_what_cannot_run_in_a_guest_is_told_before_one_is_booted(
    inside: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def boot(*given: object, **more: object) -> object:
        raise AssertionError("booted")

    monkeypatch.setattr("kernel_harness.boot.kvm.in_guest", boot)
    monkeypatch.setattr("kernel_harness.boot.migrate.in_guest", boot)
    assert main(["boot", "--kernels", "debian:bookworm", "--", *inside.split()]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("policy --table --json", "--json"),
        ("policy emulate --cost --record x", "--record"),
        ("policy --record x", "--record"),
        ("policy emulate --compare xen --cost", "--compare"),
        ("policy emulate --cost --profile zen2-client", "--profile"),
        ("--profile zen2-client policy emulate --cost", "--profile"),
        ("policy emulate --compare xen --profile zen2-client", "--profile"),
        ("policy emulate --compare xen --all-profiles", "--all-profiles"),
        ("policy --write", "--write"),
        ("policy --table --programs 5", "--programs"),
        ("policy --table --seed 5", "--seed"),
        ("policy --cost --jobs 1", "--jobs"),
        ("policy --cost --identify me", "--identify"),
        ("--json replay p", "--json"),
        ("--profile zen2-client explore --model xen", "--profile"),
        ("--write migrate", "--write"),
    ],
)
def test_an_option_that_would_not_be_heeded_is_refused(
    words: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kvm", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"spec-ctrl-probe: {option} ")
