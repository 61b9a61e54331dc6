# SPDX-License-Identifier: MIT
"""Guests that move, calculated and as records: every VMM's rule, the study of the thread, and what a file may hold."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec.structs
import pytest

from probe import migration_record as mig
from probe.cli import main
from probe.errors import RecordError
from probe.kvm_record import HardwareEntry, KvmEntry
from probe.masks import hex64
from probe.models import machines
from probe.models.guest_systems import SYSTEMS, breaks, broken_moves, cpus
from probe.models.machine import Host
from probe.models.migration import BY_NAME as RULES
from probe.models.moving import (
    STUDY,
    STUDY_CPU,
    STUDY_TO,
    Arrived,
    Departed,
    arrive,
    calculate_arrival,
    calculate_departure,
)
from probe.models.policy import BY_NAME, POLICIES, PolicyMachine
from probe.models.profile import ALL_FEATURES, EMPTY
from probe.models.program import Word, format_answer, parse
from probe.record import Kernel, Machine, Tool
from probe.report import moved_text

KERNEL = machines.get("kvm-6.19-svm")
HOST = Host(features=ALL_FEATURES, caps=ALL_FEATURES)
PROGRAM = parse("profile AMD_IBRS,AMD_STIBP; guest-wr 0x48 0x3")[0]
LEFT = Departed(PROGRAM, (Word.OK,), reads=0x3, held=0x3, listed=True)


def study(policy: str) -> tuple[str, int | None, list[str]]:
    """Answers, what is read, and outcomes of the study's guest under a policy ("": KVM alone), where bits are kept."""
    own = PolicyMachine(BY_NAME[policy], KERNEL) if policy else KERNEL
    departed = calculate_departure(own, STUDY, STUDY_CPU.host)
    to = [own, PolicyMachine(STUDY_TO, KERNEL)]
    outcomes = [calculate_arrival(departed, one, RULES["kvm"], STUDY_CPU.host).outcome for one in to]
    return " ".join("?" if one is None else format_answer(one) for one in departed.answers), departed.reads, outcomes


@pytest.mark.parametrize(
    ("policies", "wanted"),
    [
        # Let through, whether at once or later: the bit is set, and the mask of 2020 will not take it back.
        (("", "pass-through", "pass-through-after-write"), ("ok ok", 0x84, ["works", "refused"])),
        (("hardware-test", "emulate-host", "forced-shadow"), ("ok ok", 0x84, ["works", "refused"])),
        # The guest's CPUID has no PSFD, and is asked on every write.
        (("emulate-guest", "emulate"), ("ok gp", 0x4, ["works", "works"])),
        # The bug of the mask itself: it lets through what it refuses to restore, on the very same kernel.
        (("kvm-5.6-mask", "maxim-v1"), ("ok ok", 0x84, ["refused", "refused"])),
        (("xen",), ("gp gp", 0x0, ["works", "works"])),
    ],
)
def test_the_study_of_the_thread(policies: tuple[str, ...], wanted: tuple[str, int, list[str]]) -> None:
    for policy in policies:
        assert study(policy) == wanted, policy


class Vcpu:
    """Takes the bits of a mask; None: nothing, 0 neither."""

    def __init__(self, takes: int | None) -> None:
        self.takes = takes
        self.value = 0

    def put(self, value: int) -> bool:
        taken = self.takes is not None and not value & ~self.takes
        self.value = value if taken else self.value
        return taken

    def read(self) -> int | None:
        return self.value

    def saved(self) -> int | None:
        return self.value


@pytest.mark.parametrize(
    ("rule", "held", "listed", "wanted"),
    [
        ("kvm", 0x3, True, Arrived(0x3, 0x3, 0x3, "works")),
        ("kvm", 0x7, True, Arrived(0x7, None, None, "refused")),
        ("qemu", 0x7, True, Arrived(0x7, None, None, "refused")),
        ("qemu", 0x0, True, Arrived(None, 0x0, 0x0, "works")),
        # The destination without the MSR: QEMU loses it without a word, Firecracker fails, of 0 too.
        ("qemu", 0x3, False, Arrived(0x3, 0x0, 0x0, "lost")),
        ("firecracker", 0x0, False, Arrived(0x0, None, None, "refused")),
        ("cloud-hypervisor", 0x3, False, Arrived(0x3, 0x0, 0x0, "lost")),
        ("cloud-hypervisor", 0x7, True, Arrived(0x7, 0x0, 0x0, "lost")),
        # SSBD is not in the guest's policy: the source clamps it.
        ("xen", 0x7, True, Arrived(0x3, 0x3, 0x3, "changed")),
    ],
)
def test_a_guest_arrives_by_a_rule(rule: str, held: int, listed: bool, wanted: Arrived) -> None:
    departed = Departed(PROGRAM, (Word.OK,), reads=held, held=held, listed=True)
    vcpu = Vcpu(takes=0x3 if listed else None)
    assert arrive(departed, RULES[rule], listed, vcpu) == wanted


def test_qemu_writes_0_where_nothing_was_sent() -> None:
    """kvm_buf_set_msrs() puts what the destination lists, whatever came: a kernel that refuses 0 ends it."""
    nothing = Departed(PROGRAM, (Word.OK,), reads=0, held=0, listed=True)
    assert arrive(nothing, RULES["qemu"], True, Vcpu(takes=None)).outcome == "refused"
    assert arrive(nothing, RULES["xen"], True, Vcpu(takes=None)).outcome == "works", "Xen leaves out what is 0"


def test_a_source_without_the_register_sends_nothing_by_its_list() -> None:
    unlisted = Departed(PROGRAM, (Word.GP,), reads=None, held=0x3, listed=False)
    assert [RULES[name].name for name in RULES if unlisted.sent(RULES[name]) is None] == ["qemu", "firecracker"]
    nothing = Departed(PROGRAM, (Word.GP,), reads=None, held=None, listed=True)
    assert all(nothing.sent(rule) is None for rule in RULES.values())


def test_outcomes() -> None:
    assert LEFT.outcome(0x3, 0x3) == "works"
    assert LEFT.outcome(0x1, 0x1) == "changed"
    assert LEFT.outcome(0x0, 0x0) == "lost"
    assert LEFT.outcome(None, 0x3) == "unreadable", "its CPUID has no such register there"


def test_what_the_vmm_holds_counts_where_the_guest_reads_the_same() -> None:
    silent = Departed(PROGRAM, (Word.OK,), reads=0x0, held=0x3, listed=True)
    assert silent.outcome(0x0, 0x3) == "works"
    assert silent.outcome(0x0, 0x0) == "lost", "the next move sends 0"
    unreadable = Departed(PROGRAM, (Word.GP,), reads=None, held=0x1, listed=True)
    assert unreadable.outcome(None, 0x1) == "works", "it could not read it before, either"
    assert unreadable.outcome(None, None) == "lost"


def test_what_was_gone_before_it_left() -> None:
    gone = Departed(PROGRAM, (Word.OK,), reads=0x1, held=0x1, listed=True)
    assert gone.gone == 0x2
    assert LEFT.gone == 0
    refused = Departed(PROGRAM, (Word.GP,), reads=0, held=0, listed=True)
    assert refused.gone == 0, "what was refused was never there"


def test_a_model_that_does_not_say_departs_with_nothing() -> None:
    oracle = machines.get("kvm-unit-tests")
    departed = calculate_departure(oracle, parse("profile AMD_IBRS; guest-wr 0x48 0x400")[0], HOST)
    assert None in departed.answers


def test_the_destinations_own_cpuid_decides() -> None:
    said = calculate_arrival(LEFT, PolicyMachine(BY_NAME["emulate"], KERNEL), RULES["kvm"], HOST, EMPTY)
    assert said == Arrived(0x3, None, None, "refused")


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.name))
def test_both_vendors_newest_rule_gives_the_same_table(policy: str) -> None:
    """What lets --table calculate over kvm_amd's rule for CPUs of both vendors."""
    amd, intel = (PolicyMachine(policy, machines.get(f"kvm-6.19-{vendor}")) for vendor in ("svm", "vmx"))  # type: ignore[arg-type]
    for cpu in cpus():
        for system in SYSTEMS:
            assert breaks(amd, cpu, system) == breaks(intel, cpu, system)
    assert broken_moves(amd, RULES["qemu"]) == broken_moves(intel, RULES["qemu"])


def test_the_masks_of_2020_have_the_gate_of_their_vendor() -> None:
    """kvm_intel of v5.6 asked for SPEC_CTRL alone; AMD's bits opened nothing there."""
    amd_guest = parse("profile AMD_STIBP,AMD_IBRS; guest-wr 0x48 0x0")[0]
    for name, wanted in (("qemu-epyc-rome-v2", Word.OK), ("qemu-cascadelake", Word.GP)):
        host = next(cpu.host for cpu in cpus() if cpu.name == name)
        answers = calculate_departure(PolicyMachine(BY_NAME["kvm-5.6-mask"], KERNEL), amd_guest, host).answers
        assert answers == (wanted,), name


# --- records ---------------------------------------------------------------------------------------------------------


def record(kernel: str = "6.1.0", study_name: str = "", differs: str = "") -> mig.MigrationRecord:
    zero = hex64(0)
    departures = [mig.departure_entry(LEFT, kernel, "emulate", differs)]
    arrivals = [
        mig.arrival_entry(Arrived(0x3, 0x3, 0x3, "works"), 0, "qemu", "emulate"),
        mig.arrival_entry(Arrived(0x3, None, None, "refused"), 0, "qemu", "kvm-5.6-mask", "empty"),
    ]
    return mig.MigrationRecord(
        kind="migration",
        schema_version="1.0",
        tool=Tool(version="0", python="3", arguments=[]),
        started="2026-11-25T00:00:00Z",
        duration=1.0,
        machine=Machine(vendor="AuthenticAMD", family=23, model=1, stepping=0, signature="0x800f10", online="0"),
        kernel=Kernel(release=kernel, version="#1", lockdown="none", mitigations={}),
        kvm=KvmEntry(backend="kvm_amd", ignore_msrs="N", in_msr_index_list=True, msr_filter=True, user_space_msr=True),
        hardware=HardwareEntry(
            exists=True, tested=zero, valid=zero, keep=zero, switched=True, host_cpuid="empty", supported_cpuid="empty"
        ),
        model="kvm-6.1-svm",
        departures=departures,
        arrivals=arrivals,
        study=study_name,
    )


def test_a_record_and_back() -> None:
    raw = mig.encode(record())
    again = mig.decode(raw, "x")
    assert again == record()
    assert mig.departed_of(again.departures[0]) == LEFT
    assert again.arrivals[1].reads is msgspec.UNSET, "what was refused is read by nobody"
    assert json.loads(raw)["arrivals"][0]["sent"] == hex64(3)
    assert mig.schema()["$id"] == "urn:spec-ctrl-probe:migration-record:1.1"


def test_two_runs_on_one_kernel_are_one_record() -> None:
    both = mig.joined(record("a"), record("b"))
    assert [one.kernel for one in both.departures] == ["a", "b"]
    assert [one.departure for one in both.arrivals] == [0, 0, 1, 1]
    assert mig.decode(mig.encode(both), "x") == both
    report = moved_text.render([both])
    assert "measured, b to a" in report
    assert report.count("under kvm-5.6-mask, CPUID empty: refused") == 2
    assert report.count("as the models say") == 4
    assert all(len(line) <= 75 for line in report.splitlines())


def test_a_programs_report_is_a_program() -> None:
    report = moved_text.render([record()])
    assert parse(report)[0] == PROGRAM


def test_what_a_model_says_otherwise_is_told() -> None:
    told = record(study_name="thread-2020", differs="reads 0x7")
    assert not mig.as_calculated(told)
    assert "NOT AS CALCULATED: reads 0x7" in moved_text.render([told])
    told = record()
    told.arrivals[0].differs = "lost, reads 0x0"
    assert not mig.as_calculated(told)
    assert "# NOT AS CALCULATED: lost, reads 0x0" in moved_text.render([told])


def test_the_studys_report_has_every_policy_calculated() -> None:
    report = moved_text.render([record(study_name="thread-2020")])
    calculated = report.partition("calculated, ")[2]
    for policy in POLICIES:
        assert f"\n  {policy.name} " in calculated
    assert calculated.count("refused") == 10
    assert all(len(line) <= 75 for line in report.splitlines())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": "2.0"}, "version 2.0; this tool reads 1.x"),
        ({"kind": "kvm"}, "no record of a migration"),
        ({"departures": []}, "a departure that is not there"),
        (
            {"departures": [{"kernel": "a", "policy": "", "program": "nonsense", "listed": True}]},
            "unknown operation",
        ),
        ({"arrivals": [{"departure": -1, "rule": "qemu", "outcome": "works"}]}, "not there"),
        ({"arrivals": [{"departure": 0, "rule": "qemu", "outcome": "fine"}]}, "no valid migration record"),
        ({"hardware": {}}, "no valid migration record"),
    ],
)
def test_records_that_are_none(change: dict[str, object], said: str) -> None:
    raw = json.dumps({**json.loads(mig.encode(record())), **change}).encode()
    with pytest.raises(RecordError, match=said):
        mig.decode(raw, "x")


def test_a_cut_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = mig.encode(record())
    with pytest.raises(RecordError):
        mig.decode(raw[: len(raw) // 2], "x")
    path = tmp_path / "m.json"
    path.write_bytes(raw)
    assert main(["show", str(path)]) == 0
    assert "under emulate, it reads 0x3: works" in capsys.readouterr().out
    assert main(["migrate", str(path), str(path)]) == 3, "it says nothing of a machine's bits"
    assert "record of another kind: 'migration'" in capsys.readouterr().err
    assert main(["schema", "migration"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rule", "vmware"],
        ["--from-policy", "emulate"],
        ["--to-profile", "empty"],
        ["--restore", "EMPTY"],
        ["--restore", "FILE", "PROGRAM"],
        ["--restore", "FILE", "--from-policy", "xen"],
        ["PROGRAM", "--from-policy", "nope"],
    ],
)
def test_what_contradicts_itself_is_usage(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(mig.encode(record()))
    (tmp_path / "p").write_text(str(PROGRAM))
    (tmp_path / "e.json").write_bytes(mig.encode(msgspec.structs.replace(record(), departures=[], arrivals=[])))
    names = {"EMPTY": str(tmp_path / "e.json"), "FILE": str(tmp_path / "m.json"), "PROGRAM": str(tmp_path / "p")}
    assert main(["kvm", "migrate", *(names.get(word, word) for word in arguments)]) == 2
