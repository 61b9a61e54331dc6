# SPDX-License-Identifier: MIT
"""Records in the forms that CI systems and labs read, each read again by a consumer of that form."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import junitparser
import pytest
from msgspec import UNSET, UnsetType
from prometheus_client.parser import text_string_to_metric_families
from tap.parser import Parser

from probe import kvm_record, migration_record
from probe import record as rec
from probe.cases import Report, Status, bit_name, report_of, reports_of, word
from probe.cli import main
from probe.masks import ALL_BITS, hex64, parse_hex64
from probe.models import machines
from probe.report import circumstances, junit, kcidb, ktap, prometheus, tables
from probe.report.kvm_text import explained
from probe.report.page.render import render
from probe.store import decode_any
from probe.verdict import KINDS
from tests.fakes import FakeRegister
from tests.fakes_machine import record_of, threadripper
from tests.unit.test_report import GOLDEN as RUNS
from tests.unit.test_report import HOSTILE, METAL, as_predicted, every_cpu_differs, july_2020_guest

Golden = Callable[[str, str], None]
RECORDS = sorted(Path("results").rglob("*.json"))
OLD, NEW = (
    next(Path("results/debian-kernels-nested").glob(f"zen2-client/*-kvm-{release}*.json"))
    for release in ("6.1.0", "7.2")
)


def reports() -> list[Report]:
    """Every record that is kept as evidence, and every kind of run that reports know."""
    kept = [decode_any(path.read_bytes(), path.name) for path in RECORDS]
    return reports_of([*kept, *(make() for make in RUNS.values())])


ALL = reports()
GUEST = report_of(july_2020_guest())


def cases(report: Report) -> dict[str, tuple[str, str]]:
    return {
        f"{suite.name}.{case.name}": (case.status.value, case.reason) for suite in report.suites for case in suite.cases
    }


# --- the cases -------------------------------------------------------------------------------------------------------


def test_names_are_made_of_what_every_form_takes() -> None:
    for report in ALL:
        names = [report.name, *(suite.name for suite in report.suites)]
        names += [case.name for suite in report.suites for case in suite.cases]
        assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)
        assert len({suite.name for suite in report.suites}) == len(report.suites)
        for suite in report.suites:
            assert len({case.name for case in suite.cases}) == len(suite.cases)


def test_names_are_those_of_the_readme() -> None:
    text = Path("README.md").read_text(encoding="utf-8")
    assert bit_name(1) == "bit01_stibp"
    assert bit_name(9) == "bit09_reserved"
    for name in (
        "bit01_stibp",
        "bit09_reserved",
        "register",
        "as_enumerated",
        "cpu_0",
        "every_cpu",
        "put_back",
        "incomplete",
        "profile_zen2-client",
        "guest_first",
        "explained",
        "msr_driver",
    ):
        assert f"`{name}`" in text, name
    told = {"register.as_enumerated", "bits.bit01_stibp", "cpus.cpu_0", "restore.put_back", "findings.incomplete"}
    assert told <= cases(GUEST).keys()
    assert {"kvm.explained", "kvm.msr_driver", "profile_zen2-client.guest_first"} <= cases(
        report_of(decode_any(NEW.read_bytes(), "x"))
    ).keys()


def test_a_case_is_what_the_record_says() -> None:
    found = cases(GUEST)
    assert found["bits.bit01_stibp"] == ("fail", "predicted to be accepted, the write took #GP")
    assert found["bits.bit02_ssbd"] == ("pass", "")
    assert found["bits.bit00_ibrs"][0] == "skip", "the documents leave it open"
    assert found["restore.put_back"][0] == "pass"
    assert found["cpus.cpu_1"] == ("fail", "otherwise than predicted: bit 1")
    assert found["register.as_enumerated"] == ("pass", "")


def test_names_of_a_run_do_not_hang_on_what_was_seen() -> None:
    """The same machine, asked the same, has the same cases in every form, in the same order, whatever it did."""
    registers = {cpu: FakeRegister(valid=0x6) for cpu in range(8)}
    facts = dataclasses.replace(METAL, online=tuple(range(8)))
    usual = report_of(record_of(registers, threadripper(8), facts))
    others: tuple[dict[str, Any], ...] = (
        {"valid": 0x4},
        {"absent": True},
        {"offline": True},
        {"refuses": True},
        {"dropped": ALL_BITS},
        {"value": 0x1, "valid": 0x7, "sticky": 0x4},
    )
    assert list(cases(usual)) == list(cases(report_of(record_of({}, threadripper(8), facts, written=False))))
    for other in others:
        for which in ([5], range(8)):
            odd = {**registers, **{cpu: FakeRegister(**other) for cpu in which}}
            report = report_of(record_of(odd, threadripper(8), facts))
            assert list(cases(report)) == list(cases(usual)), other
            assert report.status in (Status.FAIL, Status.ERROR), other
            paths = [
                [test["path"] for test in json.loads(kcidb.render([one], "lab"))["tests"]] for one in (usual, report)
            ]
            assert paths[0] == paths[1]


def test_a_bit_is_the_worst_of_all_cpus() -> None:
    found = cases(report_of(RUNS["one-cpu-differs"]()))
    assert found["bits.bit01_stibp"] == ("fail", "CPU 5: predicted to be accepted, the write took #GP")
    assert found["bits.bit02_ssbd"] == ("pass", "")
    statuses = [found[f"cpus.cpu_{cpu}"][0] for cpu in range(8)]
    assert [cpu for cpu, status in enumerate(statuses) if status == "fail"] == [5]
    found = cases(report_of(RUNS["went-offline"]()))
    assert found["bits.bit02_ssbd"] == ("skip", "CPU 1: not measured: absent (CPU is offline)")
    assert (found["cpus.cpu_0"][0], found["cpus.cpu_1"][0]) == ("pass", "skip")
    record = as_predicted()
    record.verdicts[0].not_measured = hex64(1 << 40)
    record.verdicts[0].as_predicted = hex64(ALL_BITS & ~(1 << 40))
    assert cases(report_of(record))["cpus.cpu_0"] == ("skip", "no answer: bit 40")


def test_every_second_cpu_is_told_shortly() -> None:
    registers = {cpu: FakeRegister(valid=0x4 if cpu & 1 else 0x6) for cpu in range(128)}
    found = cases(
        report_of(record_of(registers, threadripper(128), dataclasses.replace(METAL, online=tuple(range(128)))))
    )
    told = "64 CPUs, the first is 1: predicted to be accepted, the write took #GP"
    assert found["bits.bit01_stibp"] == ("fail", told)


def test_a_run_that_measured_nothing_is_no_pass() -> None:
    report = report_of(RUNS["all-refused"]())
    assert cases(report)["findings.incomplete"][0] == "fail"
    assert report.status is Status.FAIL, "as its exit code is"
    assert "spec_ctrl_probe_ok{" in prometheus.render([report])
    record = RUNS["all-refused"]()
    record.findings = []
    report = report_of(record)
    assert cases(report)["restore.put_back"][0] == "pass"
    assert report.status is Status.SKIP, "that it was put back is no measurement"
    assert ktap.render([report]).endswith(" # SKIP nothing was measured\n")
    (line,) = [line for line in prometheus.render([report]).splitlines() if line.startswith("spec_ctrl_probe_ok{")]
    assert line.endswith(" 0")


def test_a_register_that_is_not_there_has_one_case() -> None:
    report = report_of(RUNS["no-register"]())
    found = cases(report)
    told = "RDMSR took #GP: no such register"
    assert found["register.as_enumerated"] == ("pass", f"as CPUID says: {told}")
    assert {found[f"bits.{bit_name(bit)}"] for bit in range(64)} == {("skip", f"not tried: {told}")}
    assert report.status is Status.PASS
    report = report_of(RUNS["enumerated-but-absent"]())
    found = cases(report)
    assert found["register.as_enumerated"] == ("fail", f"CPUID enumerates it: {told}")
    assert found["bits.bit02_ssbd"] == ("fail", f"predicted to be accepted, {told}")
    assert found["bits.bit09_reserved"] == ("skip", f"not tried: {told}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_looked_for_is_no_pass(kind: str) -> None:
    """not_clearable without --clear-bits, say: in a run that asked for all it passes, in a plan nothing of the walk."""
    if kind in ("not_restored", "not_verified", "unexpected_fault", "unexpected_accept", "not_retained"):
        return  # told by restore, and by the bits
    record = as_predicted()
    assert not isinstance(record.walk, UnsetType)
    plain = cases(report_of(record))[f"findings.{kind}"]
    asked = kind in ("inconsistent", "not_clearable", "pair_refused")
    assert plain[0] == ("skip" if asked else "pass"), plain
    record.walk.repeat, record.walk.pairs, record.walk.clear_bits = 2, True, True
    assert cases(report_of(record))[f"findings.{kind}"] == ("pass", "")
    plan = cases(report_of(RUNS["plan-only"]()))[f"findings.{kind}"]
    assert plan[0] == ("pass" if kind.startswith("cpuid_") else "skip")


@pytest.mark.parametrize("kind", KINDS)
def test_no_finding_is_a_pass(kind: str) -> None:
    """Whatever a run finds, with bits or without: its exports fail, as its exit code does."""
    record = as_predicted()
    record.findings = [rec.FindingEntry(kind=kind, cpus="0-1", text="what it is", mask=hex64(0x6))]
    if kind in ("not_restored", "not_verified"):
        record.restore[0].state = "failed" if kind == "not_restored" else "left"
    elif kind in ("unexpected_fault", "unexpected_accept", "not_retained"):
        for verdict in record.verdicts:
            setattr(verdict, kind, hex64(0x6))
    assert report_of(record).status in (Status.FAIL, Status.ERROR)


def test_a_driver_that_compared_nothing_is_a_skip() -> None:
    record = decode_any(NEW.read_bytes(), "x")
    assert isinstance(record, kvm_record.KvmRecord)
    zero, every = hex64(0), hex64(ALL_BITS)
    record.driver = kvm_record.DriverEntry(cpu=0, accepts=zero, faults=zero, unanswered=every)
    assert cases(report_of(record))["kvm.msr_driver"] == ("skip", "no bit was answered")
    record.driver = kvm_record.DriverEntry(cpu=0, accepts=hex64(0x7), faults=zero, unanswered=zero)
    record.kernel.release, record.kernel.version = "5.6.0", "#1 SMP Debian 5.6.7-1"
    assert cases(report_of(record))["kvm.msr_driver"][0] == "skip"


def test_a_migration_that_fails_is_in_no_other_ones_shadow() -> None:
    path = next(path for path in RECORDS if path.parent.name == "thread-2020" and "6.1" in path.name)
    for number in range(len(decode_any(path.read_bytes(), "x").arrivals)):  # type: ignore[union-attr]
        record = decode_any(path.read_bytes(), "x")
        assert isinstance(record, migration_record.MigrationRecord)
        record.arrivals[number].differs = "otherwise"
        assert report_of(record).count(Status.FAIL) == 1, number


def test_names_do_not_hang_on_kernel_or_order() -> None:
    one, other = as_predicted(), as_predicted()
    one.identity, other.identity = "host-a", "host-b"
    assert {report.name for report in reports_of([one, other])} == {report.name for report in reports_of([other, one])}
    other.identity, other.kernel.release = "host-a", "9.9"
    assert report_of(one).name == report_of(other).name, "a new kernel makes no case new"
    names = {report.name for report in reports_of([one, other])}
    assert names == {report.name for report in reports_of([other, one])}, "two of one machine are told by their kernels"
    assert any(name.endswith("-9-9") for name in names)
    names_of_three = [report.name for report in reports_of([as_predicted()] * 3)]
    assert len(set(names_of_three)) == 3


def test_a_kernel_is_judged_by_the_model_that_is_expected() -> None:
    record = decode_any(NEW.read_bytes(), "x")
    assert report_of(record).status is Status.PASS
    found = cases(report_of(record, machines.get("kvm-6.1-svm")))
    assert found["kvm.explained"] == ("fail", "by kvm-6.19-svm, where kvm-6.1-svm was expected")
    assert found["profile_qemu-ibrs.guest_first"][0] == "fail"
    assert report_of(record, machines.get("kvm-6.19-svm")).status is Status.PASS
    assert main(["export", "--format", "ktap", "--expect", "nope", str(NEW)]) == 2


def test_a_kernel_that_does_as_another_version_fails() -> None:
    """A 7.2 in which KVM does what 6.1 did: that some model explains it is no pass, its own has to."""
    record, newer = (decode_any(path.read_bytes(), "x") for path in (OLD, NEW))
    assert isinstance(record, kvm_record.KvmRecord)
    assert report_of(record).status is Status.PASS
    record.kernel, record.follows = newer.kernel, ""
    found = cases(report_of(record))
    told = "by kvm-6.1-svm, and not by kvm-6.19-svm, which stands for this kernel's version"
    assert found["kvm.explained"] == ("fail", told)
    assert not kvm_record.as_predicted(record), "exit code 1 of kvm and boot"
    assert explained(record) == f"explained {told}"
    assert "otherwise than kvm-6.19-svm says" in found["profile_zen2-client.guest_first_kept"][1]
    assert report_of(record, machines.get("kvm-6.1-svm")).status is Status.PASS, "it was asked for"
    record.kernel.release = record.kernel.version = "5.15.0-91-generic"
    assert report_of(record).status is Status.PASS, "no model stands for a vendor's kernel"
    assert kvm_record.as_predicted(record)
    assert explained(record) == "explained by kvm-6.1-svm"


def test_what_was_not_measured_never_passes() -> None:
    for name, make in RUNS.items():
        record = make()
        measured = {
            cpu: parse_hex64(entry.not_measured) ^ ALL_BITS
            for entry in record.verdicts
            if entry.model == record.judge
            for cpu in rec.cpus_of(entry.cpus)
        }
        found = cases(report_of(record))
        for bit in range(64):
            status, reason = found[f"bits.{bit_name(bit)}"]
            if status == "pass":
                assert all(mask >> bit & 1 for mask in measured.values()), (name, bit)
            if status == "fail":
                assert any(mask >> bit & 1 for mask in measured.values()), (name, bit)
            assert reason or status == "pass"
        for cpu in rec.cpus_of(record.machine.online):
            assert found[f"cpus.cpu_{cpu}"][0] != "pass" or measured[cpu], (name, cpu)


def test_a_plan_and_a_register_that_is_not_back() -> None:
    assert report_of(RUNS["plan-only"]()).status is Status.SKIP
    assert report_of(RUNS["not-put-back"]()).status is Status.ERROR


def test_a_matrix_that_differs_from_its_model_fails_where_it_does() -> None:
    record = decode_any(NEW.read_bytes(), "x")
    assert isinstance(record, kvm_record.KvmRecord)
    (row,) = [row for row in record.rows if "zen2-client" in row.profiles]
    row.profiles.remove("zen2-client")
    record.rows.append(
        kvm_record.RowEntry(profiles=["zen2-client"], opener=row.opener, cells={**row.cells, "guest_first": hex64(0x5)})
    )
    found = cases(report_of(record))
    assert found["profile_zen2-client.guest_first"][0] == "fail"
    assert "on bits 1,3-63" in found["profile_zen2-client.guest_first"][1]
    assert found["profile_zen2-client.host_first"][0] == "pass"


def test_a_policy_of_a_file_is_not_judged_by_a_model_that_nobody_has() -> None:
    path = next(path for path in RECORDS if path.name.startswith("emulate-guest-"))
    record = decode_any(path.read_bytes(), "x")
    assert isinstance(record, kvm_record.KvmRecord)
    assert not isinstance(record.policy, UnsetType)
    record.policy.name = "mine.py"
    found = cases(report_of(record))
    told = {name for name, (status, _) in found.items() if status != "skip"}
    assert told == {"kvm.policy_decides", "kvm.explained", "kvm.programs"}
    assert found["kvm.explained"][0] == "fail", "the record says that another policy explains it"
    assert found["profile_zen2-client.guest_first"] == (
        "skip",
        "this tool does not know the model that it is judged by",
    )


def test_names_of_a_matrix_do_not_hang_on_what_was_seen() -> None:
    path = next(path for path in RECORDS if path.name.startswith("emulate-guest-"))
    record = decode_any(path.read_bytes(), "x")
    assert isinstance(record, kvm_record.KvmRecord)
    assert not isinstance(record.policy, UnsetType)
    usual = cases(report_of(record))
    assert usual["kvm.policy_decides"] == ("pass", "")
    record.policy.complaints = {"raised ValueError": 3}
    record.explored, record.explained_by = [], []
    found = cases(report_of(record))
    assert list(found) == list(usual)
    assert found["kvm.policy_decides"] == ("error", "3 times it raised ValueError")
    assert found["kvm.programs"] == ("skip", "no random programs were run (kvm --programs)")


# --- KTAP ------------------------------------------------------------------------------------------------------------

RESULT = re.compile(r"(ok|not ok) ([1-9][0-9]*) ([^ #]+)(?: # (SKIP|TODO|XFAIL|TIMEOUT|ERROR)( .*)?)?")


def parsed(lines: list[str], indent: int) -> dict[str, Any]:
    """Read a KTAP block by the grammar of Documentation/dev-tools/ktap.rst: version, diagnostics, plan, results.

    Takes its lines from the front of the list. Subtests are indented, and come before their result.
    """
    assert lines.pop(0) == " " * indent + "KTAP version 1"
    planned = None
    found: dict[str, Any] = {}
    inner: dict[str, Any] | None = None
    while lines:
        line = lines[0]
        depth = len(line) - len(line.lstrip(" "))
        if depth < indent:
            break
        if depth > indent:
            inner = parsed(lines, depth)
            continue
        text = lines.pop(0).strip()
        plan = re.fullmatch(r"1\.\.([0-9]+)", text)
        if plan:
            assert planned is None
            planned = int(plan[1])
        elif not text.startswith("# "):
            result = RESULT.fullmatch(text)
            assert result, line
            assert int(result[2]) == len(found) + 1, "numbers run on"
            assert result[3] not in found
            found[result[3]] = (result[1], result[4] or "", inner)
            inner = None
    assert planned == len(found), "the plan is kept"
    assert inner is None, "a subtest has its result"
    return found


def test_ktap_by_the_kernels_grammar() -> None:
    text = ktap.render(ALL)
    found = parsed(text.splitlines(), 0)
    assert list(found) == [f"{report.kind}_{report.name}" for report in ALL]
    for report, (result, directive, suites) in zip(ALL, found.values()):
        assert (result == "ok") == (report.status in (Status.PASS, Status.SKIP))
        for suite, (good, _, inner) in zip(report.suites, suites.values()):
            assert (good == "ok") == (suite.status in (Status.PASS, Status.SKIP))
            for case, (mine, skip, none) in zip(suite.cases, inner.values()):
                assert none is None
                assert (mine == "ok") == (case.status in (Status.PASS, Status.SKIP))
                assert (skip == "SKIP") == (case.status is Status.SKIP)
        assert directive in ("", "SKIP")


def test_a_tap_consumer_reads_the_output() -> None:
    """tap.py reads the whole output as it is: of TAP it knows no subtests, so what is indented is unknown to it, as is
    the line "KTAP version 1". A suite's block is given to it without the indentation, and else as it is, too."""
    text = ktap.render([GUEST, report_of(RUNS["plan-only"]())])
    outer = list(Parser().parse_text(text))
    unknown = [line for line, seen in zip(text.splitlines(), outer) if seen.category == "unknown"]
    assert unknown == [line for line in text.splitlines() if line.startswith(("KTAP version 1", "  "))]
    assert [seen.expected_tests for seen in outer if seen.category == "plan"] == [2]
    assert [(seen.ok, seen.skip) for seen in outer if seen.category == "test"] == [(False, False), (True, True)]
    inner = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    starts = [number for number, line in enumerate(inner) if line == "KTAP version 1"]
    for suite, start, end in zip(GUEST.suites, starts, starts[1:]):
        block = list(Parser().parse_text("\n".join(inner[start:end])))
        assert [seen.category for seen in block if seen.category == "unknown"] == ["unknown"], "the line of the version"
        assert [seen.expected_tests for seen in block if seen.category == "plan"] == [len(suite.cases)]
        assert [(seen.description, seen.ok, seen.skip) for seen in block if seen.category == "test"] == [
            (case.name, case.status in (Status.PASS, Status.SKIP), case.status is Status.SKIP) for case in suite.cases
        ]


# --- what is not hardware --------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[list[Report]], str]] = {
    "ktap": ktap.render,
    "junit": junit.render,
    "kcidb": lambda some: kcidb.render(some, "lab"),
    "prometheus": prometheus.render,
    "markdown": tables.markdown,
    "csv": tables.comma_separated,
}
MODELLED = Path("results/modelled-threadripper-3970x/kvm-5.6-guest.json")
FORCED = next(Path("results").rglob("*zen2-client-v-spec-ctrl/*-kvm-7.2*.json"))


def around(form: str, text: str) -> dict[str, str]:
    """Return what a consumer of a form finds of a record's circumstances, at every place where they are told."""
    if form == "junit":
        found = [
            {one.name: one.value for one in suite.properties()}
            for suite in junitparser.JUnitXml.fromstring(text.encode())
        ]
    elif form == "kcidb":
        tests = json.loads(text)["tests"]
        found = [test["environment"]["misc"] for test in tests]
        for test in tests:
            told = test["misc"]["spec_ctrl"]
            assert told["record_sha256"] == test["environment"]["misc"]["record_sha256"]
            assert told.get("not_hardware") == test["environment"]["misc"].get("not_hardware")
            assert test["environment"]["comment"].startswith(told.get("not_hardware", "record"))
    elif form == "prometheus":
        families = {family.name: family for family in text_string_to_metric_families(text)}
        found = [sample.labels for sample in families["spec_ctrl_probe_info"].samples]
    else:
        found = list(csv.DictReader(io.StringIO(text)))
    picked = [{name: one[name] for name in circumstances.FIELDS if one.get(name)} for one in found]
    assert all(one == picked[0] for one in picked)
    return picked[0]


@pytest.mark.parametrize("form", ["junit", "kcidb", "prometheus", "csv"])
@pytest.mark.parametrize(
    ("path", "not_hardware"),
    [
        (MODELLED, "NOT HARDWARE: its register is a model, valid=0x4; predicted from a recorded CPUID: AMD 17-31-00"),
        (FORCED, "NOT HARDWARE: "),
    ],
    ids=["a register that is a model", "CPUID that was given"],
)
def test_every_form_tells_what_is_not_hardware(
    form: str, path: Path, not_hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--format", form, str(path)]) == 0
    found = around(form, capsys.readouterr().out)
    assert found["not_hardware"].startswith(not_hardware)
    assert found["hypervisor"] == "TCGTCGTCGTCG"
    assert found["accelerator"] == "tcg"
    assert found["command"].startswith("spec-ctrl-probe ")
    assert found["record_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("form", "mark"), [("ktap", "  # "), ("markdown", "- ")])
def test_a_reader_is_told_what_is_not_hardware(form: str, mark: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--format", form, str(MODELLED)]) == 0
    lines = [line.replace("\\", "").replace("**", "") for line in capsys.readouterr().out.splitlines()]
    assert f"{mark}NOT HARDWARE: its register is a model, valid=0x4" in lines
    assert f"{mark}command: spec-ctrl-probe run --model-register valid=0x4 --cpuid PATH --pairs --record PATH" in lines
    assert f"{mark}SHA-256: {hashlib.sha256(MODELLED.read_bytes()).hexdigest()}" in lines


@pytest.mark.parametrize("form", FORMS)
def test_a_tested_mask_forced_bits_and_an_emulated_cpu_are_told(form: str) -> None:
    record = decode_any(NEW.read_bytes(), "x")
    assert isinstance(record, kvm_record.KvmRecord)
    assert not isinstance(record.guest, UnsetType)
    record.guest.cpu, record.guest.accelerator = "", "kvm"
    record.guest.tested = UNSET
    record.machine.hypervisor = "KVMKVMKVM"
    assert "NOT HARDWARE" not in FORMS[form]([report_of(record)])
    record.guest.accelerator = "tcg"
    assert "the CPU is emulated (QEMU TCG)" in FORMS[form]([report_of(record)]).replace("\\", "")
    record.guest.tested = hex64(0x7)
    assert f"made to accept {hex64(0x7)}" in FORMS[form]([report_of(record)])
    record.guest.cpu = "amd-stibp=on"
    assert "CPUID bits given to an emulated CPU" in FORMS[form]([report_of(record)])


@pytest.mark.parametrize("form", FORMS)
def test_hardware_is_not_called_anything_else(form: str) -> None:
    assert "NOT HARDWARE" not in FORMS[form]([report_of(RUNS["july-2020-metal"]())])


# --- the others ------------------------------------------------------------------------------------------------------


def test_junit_by_junitparser() -> None:
    xml = junitparser.JUnitXml.fromstring(junit.render(ALL).encode())
    kinds = {junitparser.Failure: "fail", junitparser.Error: "error", junitparser.Skipped: "skip"}
    suites = list(xml)
    assert len(suites) == sum(len(report.suites) for report in ALL)
    every = [(report, suite) for report in ALL for suite in report.suites]
    for suite, (report, mine) in zip(suites, every):
        assert suite.name == f"{report.kind}_{report.name}.{mine.name}"
        said = [kinds[type(case.result[0])] if case.result else "pass" for case in suite]
        assert said == [case.status.value for case in mine.cases]
    assert xml.failures == sum(report.count(Status.FAIL) for report in ALL)
    assert xml.skipped == sum(report.count(Status.SKIP) for report in ALL)


def test_kcidb_by_its_newest_schema() -> None:
    kcidb_io = pytest.importorskip("kcidb_io", reason="kcidb-io needs Python 3.10")
    document = json.loads(kcidb.render(ALL, "spec_ctrl_probe"))
    assert kcidb_io.schema.LATEST.is_valid(document)
    kcidb_io.schema.LATEST.validate(document)
    ids = [test["id"] for test in document["tests"]]
    assert len(set(ids)) == len(ids)
    assert json.loads(kcidb.render([GUEST, GUEST], "lab")) == json.loads(kcidb.render([GUEST], "lab"))
    guest = [test for test in json.loads(kcidb.render([GUEST], "lab"))["tests"] if test["path"].endswith(".bits")]
    assert [test["status"] for test in guest] == ["FAIL"]
    assert guest[0]["misc"]["spec_ctrl"]["fail_bits"] == hex64(0x2)
    assert len(json.loads(kcidb.render([report_of(decode_any(NEW.read_bytes(), "x"))], "lab"))["tests"]) == 2


def test_prometheus_by_its_parser() -> None:
    text = prometheus.render(ALL)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {
        f"spec_ctrl_probe_{name}" for name in ("last_run_timestamp_seconds", "duration_seconds", "cases", "ok", "info")
    }
    assert all(sample.timestamp is None for family in families.values() for sample in family.samples), "forbidden there"
    series = [(sample.name, tuple(sample.labels.items())) for family in families.values() for sample in family.samples]
    assert len(set(series)) == len(series)
    found = {family.name: family for family in text_string_to_metric_families(prometheus.render([GUEST]))}
    counts = {sample.labels["status"]: sample.value for sample in found["spec_ctrl_probe_cases"].samples}
    assert counts == {status.value: GUEST.count(status) for status in Status}
    assert found["spec_ctrl_probe_ok"].samples[0].value == 0


def test_csv_by_its_reader() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(ALL))))
    assert len(rows) == sum(len(suite.cases) for report in ALL for suite in report.suites)
    assert {row["status"] for row in rows} == {"pass", "fail", "skip", "error"}
    assert all(row["reason"] for row in rows if row["status"] != "pass")


def test_markdown_tables_are_whole() -> None:
    for line in tables.markdown(ALL).splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 6)


@pytest.mark.parametrize("form", FORMS)
def test_golden_export(form: str, golden: Golden) -> None:
    golden(f"export-july-2020-guest.{form}", FORMS[form]([GUEST]))


def strings(record: rec.Record, hostile: str) -> Report:
    """A record whose every free text is hostile."""
    record.machine.brand = record.machine.vendor = record.kernel.release = record.kernel.version = hostile
    record.identity = record.machine.hypervisor = record.tool.version = hostile
    record.tool.name, record.tool.arguments = hostile, [hostile, "run"]
    for finding in record.findings:
        finding.text, finding.kind = hostile, "cpus_differ"
    for entry in record.restore:
        entry.note, entry.state = hostile, "failed"
    return report_of(record)


@pytest.mark.parametrize(
    "hostile", [*HOSTILE, "]]>", "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "a\nok 1 forged", "\\", '"']
)
def test_no_string_of_a_record_breaks_an_export(hostile: str) -> None:
    report = strings(july_2020_guest(), hostile)
    parsed(ktap.render([report]).splitlines(), 0)
    assert junitparser.JUnitXml.fromstring(junit.render([report]).encode()).errors == 1
    assert list(text_string_to_metric_families(prometheus.render([report])))
    rows = list(csv.reader(io.StringIO(tables.comma_separated([report]))))
    assert all(len(row) == len(tables.COLUMNS) for row in rows)
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)
    document = json.loads(kcidb.render([report], "lab"))
    assert len(document["tests"]) == 5
    assert "<script>" not in tables.markdown([report])


def test_a_million_cpus_and_deep_nesting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = as_predicted()
    for entries in (record.observations, record.predictions, record.verdicts, record.restore, record.saved):
        for entry in entries:
            entry.cpus = "0-999999"
    found = cases(report_of(record))
    assert len(found) == 1 + 64 + 1 + 1 + 13
    told = "1000000 CPUs, more than 4,096: no case for each; not judged: bit 0"
    assert found["cpus.every_cpu"] == ("pass", told)
    (tmp_path / "deep.json").write_text('{"schema_version": "1.0", "machine": ' + "[" * 100_000)
    (tmp_path / "nan.json").write_text('{"schema_version": "1.0", "duration": NaN}')
    for name in ("deep", "nan"):
        assert main(["export", "--format", "ktap", str(tmp_path / f"{name}.json")]) == 3
        assert "cannot be read" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.xml"
    arguments = ["export", "--format", "junit", str(RECORDS[0]), "-o", str(out)]
    assert main(arguments) == 0
    before = out.read_bytes()
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*arguments, "--force"]) == 0
    assert main(["export", "--format", "ktap", str(RECORDS[0]), str(RECORDS[0])]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "1..2"
    with pytest.raises(SystemExit) as exit_:
        main(["export", "--format", "kcidb", "--origin", "Our Lab", str(RECORDS[0])])
    assert exit_.value.code == 2
    assert main(["export", "--format", "csv", str(tmp_path / "none.json")]) == 3


@pytest.mark.parametrize("command", [["export", "--format", "csv"], ["html"]])
@pytest.mark.parametrize("linked", ["", "symbolic", "hard"])
def test_no_record_is_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], linked: str
) -> None:
    """Whatever --force says, and by whatever name the output is called."""
    record, out = tmp_path / "record.json", tmp_path / "record.json"
    before = RECORDS[0].read_bytes()
    record.write_bytes(before)
    if linked:
        out = tmp_path / "link"
        (os.symlink if linked == "symbolic" else os.link)(record, out)
    assert main([*command, str(RECORDS[0]), str(record), "-o", str(out), "--force"]) == 2
    assert "is one of the records that are read" in capsys.readouterr().err
    assert record.read_bytes() == out.read_bytes() == before
    assert main([*command, str(record), "-o", str(tmp_path / "new")]) == 0


def test_words_are_never_empty() -> None:
    assert word("///") == "unnamed"
    assert word("6.1.0-56 amd64") == "6-1-0-56-amd64"


# --- the page, without a browser -------------------------------------------------------------------------------------


def test_a_page_allows_its_own_style_and_script_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main(["html", str(RECORDS[0]), "-o", str(out)]) == 0
    assert main(["html", str(RECORDS[0]), "-o", str(out)]) == 2
    assert main(["html", str(RECORDS[0]), str(RECORDS[0]), "-o", str(out), "--force"]) == 0
    page = out.read_text(encoding="utf-8")
    assert "Both are the same file, or copies of it." in page
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'")
    for element in ("style", "script"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert not re.search(r"""(?:src|href)=["']?(?:https?:|//)""", page)
    assert " on" not in re.sub(r">[^<]*<", "><", page).replace(" only", ""), "no handler in an attribute"


def test_a_page_of_every_record_of_results() -> None:
    page = render([(path.name, decode_any(path.read_bytes(), path.name), "0" * 64) for path in RECORDS])
    assert page.count('<section id="r') == len(RECORDS)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plan-only", set()),
        ("all-refused", set()),
        ("as-predicted", {"all"}),
        ("went-offline", {"all that was measured"}),
    ],
)
def test_a_model_is_right_in_what_was_measured(name: str, told: set[str]) -> None:
    page = render([("run.json", RUNS[name](), "0" * 64)])
    assert set(re.findall(r'<b class="tick">✓ ([^<]+)<', page)) == told


def test_cpus_that_all_differ_share_what_is_alike_on_the_page() -> None:
    """A row for each, but reasons and models once; and the page is made in proportion to their number."""

    def page(count: int) -> tuple[str, float]:
        record = every_cpu_differs(count)
        started = time.process_time()
        return render([("run.json", record, "0" * 64)]), time.process_time() - started

    text, seconds = page(1000)
    assert 'data-rows="1000"' in text
    assert text.count("<tr data-p=") == text.count("<small>CPUs 0-999</small>") > 0, "each reason once"
    assert text.count("(CPUs 0-999)<br>") == 1, "one model"
    assert "wrong on bit 1 (STIBP)" in text
    assert seconds < 8 * 2 * min(page(125)[1] for _ in range(3)), "eight times as many"
