# SPDX-License-Identifier: MIT
"""What moved between two records: one cause a line, judged by what else differs; and records in mails."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from probe import kvm_record
from probe import record as rec
from probe.cli import main
from probe.diff.moved import Moved
from probe.diff.sets import compare, compare_sets
from probe.errors import RecordError, UsageError
from probe.masks import ALL_BITS, hex64, told_bits
from probe.models.profile import FEATURES, NAMED, Profile, parse_profile
from probe.profile_sets import ALL, Universe
from probe.report import diff_sets_text, diff_text, kvm_text, mail
from probe.store import decode_any
from tests.unit.test_report import GOLDEN as RUNS
from tests.unit.test_report import as_predicted, july_2020_guest, july_2020_metal

Golden = Callable[[str, str], None]
NESTED = Path("results/debian-kernels-nested")
OLD, NEW = (next(NESTED.glob(f"zen2-client/*-kvm-{release}*.json")) for release in ("6.1.0", "7.2"))
GUEST = Path("results/modelled-threadripper-3970x/kvm-5.6-guest.json")
FILES = (diff_text.File("a.json", "a" * 64), diff_text.File("b.json", "b" * 64))


def kvm(path: Path = OLD) -> kvm_record.KvmRecord:
    return kvm_record.decode(path.read_bytes(), path.name)


def rows(**cells: dict[str, int]) -> list[kvm_record.RowEntry]:
    """One row for each profile, its cells as masks."""
    return [
        kvm_record.RowEntry(profiles=[name.replace("__", ",")], cells={cell: hex64(mask) for cell, mask in one.items()})
        for name, one in cells.items()
    ]


def moved(before: list[kvm_record.RowEntry], after: list[kvm_record.RowEntry]) -> list[Moved]:
    one, other = kvm(), kvm()
    one.rows, other.rows = before, after
    return list(compare(one, other).moved)


# --- sets of profiles ------------------------------------------------------------------------------------------------

PROFILES = list(dict.fromkeys(named.profile for named in NAMED if not named.profile.no_cpuid))


def holds(rule: str, profile: Profile) -> bool:
    """Read a rule again: what the words say, asked of one profile."""
    names = {feature.name for position, feature in enumerate(FEATURES) if profile.mask >> position & 1}
    if rule == ALL:
        return True
    gate = re.fullmatch(
        r"with (?:any of )?((?!none of )[A-Z0-9_, ]+?)?(?: and )?(?:(?:none of|without) ([A-Z0-9_, ]+))?", rule
    )
    if gate and ("none of " in rule or "any of " in rule):
        none_of = gate[2].split(", ") if gate[2] else []
        return not names & set(none_of) and (not gate[1] or bool(names & set(gate[1].split(", "))))
    if not rule.startswith(("with ", "without ")):
        own = {named.name for named in NAMED if named.profile == profile} | {str(profile).replace(",", "+")}
        return bool(own & set(rule.split(", ")))
    for term in rule.split("; or "):
        with_, _, without = term.partition("without ")
        wanted = with_.removeprefix("with ").rstrip(", ").split(" and ") if with_ else []
        if all(word in names for word in wanted) and not names & set(without.split(" and ") if without else ()):
            return True
    return False


@given(chosen=st.sets(st.integers(0, len(PROFILES) - 1), min_size=1))
@settings(max_examples=150, deadline=None)
def test_a_rule_says_exactly_which_profiles(chosen: set[int]) -> None:
    rule = Universe(PROFILES).describe(sum(1 << number for number in chosen))
    if " more" not in rule:
        assert {number for number, profile in enumerate(PROFILES) if holds(rule, profile)} == chosen, rule


def test_rules_are_those_that_a_person_would_write() -> None:
    universe = Universe([Profile(mask) for mask in range(1 << 6)])
    spec, stibp = (parse_profile(name).mask for name in ("SPEC_CTRL", "INTEL_STIBP"))

    def chosen(wanted: Callable[[int], bool]) -> int:
        return sum(1 << mask for mask in range(1 << 6) if wanted(mask))

    assert (
        universe.describe(chosen(lambda mask: bool(mask & stibp) and not mask & spec))
        == "with INTEL_STIBP, without SPEC_CTRL"
    )
    assert universe.describe(chosen(lambda mask: bool(mask & (stibp | spec)))) == "with any of SPEC_CTRL, INTEL_STIBP"
    assert universe.describe(universe.everything) == ALL
    assert universe.describe(1) == "empty"


# --- KVM -------------------------------------------------------------------------------------------------------------


def test_the_issue_of_2020_is_one_line() -> None:
    """STIBP where the guest has it and no IBRS, over a hundred CPUIDs: one cause, one line."""
    stibp, ibrs = (parse_profile(name).mask for name in ("AMD_STIBP", "AMD_IBRS"))
    before, after = [], []
    for mask in range(1 << 13):
        if mask & ~(stibp | ibrs | 0x3F):
            continue
        name = str(Profile(mask))
        fixed = mask & stibp and not mask & ibrs
        before += [kvm_record.RowEntry(profiles=[name], cells={"guest_first": hex64(0x4), "host_first": hex64(0x6)})]
        bits = 0x6 if fixed else 0x4
        after += [kvm_record.RowEntry(profiles=[name], cells={"guest_first": hex64(bits), "host_first": hex64(0x6)})]
    assert moved(before, after) == [
        Moved("guest write, first", "#GP", "accepted", 0x2, "with AMD_STIBP, without AMD_IBRS", 64)
    ]
    (back,) = moved(after, before)
    assert (back.before, back.after) == ("accepted", "#GP")


def test_what_follows_from_a_write_is_not_told_again() -> None:
    before = rows(AMD_IBRS={"guest_first": 0, "guest_first_seen": 0, "guest_first_kept": 0})
    after = rows(AMD_IBRS={"guest_first": 0x1, "guest_first_seen": 0x1, "guest_first_kept": 0x1})
    (one,) = moved(before, after)
    assert (one.what, one.bits) == ("guest write, first", 0x1)
    kept = rows(AMD_IBRS={"guest_first": 0x1, "guest_first_seen": 0, "guest_first_kept": 0x1})
    (one,) = moved(kept, after)
    assert (one.what, one.before, one.after) == (
        "guest reads after its own first write",
        "something else",
        "what was written",
    )


def test_a_gate_that_closes_is_one_line() -> None:
    opened = rows(AMD_IBRS={"guest_first": ALL_BITS, "guest_zero": 1, "guest_read": 1})
    closed = rows(AMD_IBRS={"guest_first": 0, "guest_zero": 0, "guest_read": 0})
    (one,) = moved(opened, closed)
    assert one.what.startswith("guest access, first")
    assert (one.before, one.after, one.bits) == ("accepted", "#GP", ALL_BITS)
    only_writes = rows(AMD_IBRS={"guest_first": 0, "guest_zero": 0, "guest_read": 1})
    (one,) = moved(opened, only_writes)
    assert one.what == "guest write, first (0, too)", "reads did not move"
    reads = rows(AMD_IBRS={"guest_first": ALL_BITS, "guest_zero": 1, "guest_read": 0})
    told = {(each.what, each.before, each.after) for each in moved(only_writes, reads)}
    assert told == {("guest write, first (0, too)", "#GP", "accepted"), ("guest read, first", "0", "not 0 or #GP")}
    zero = rows(AMD_IBRS={"guest_first": ALL_BITS, "guest_zero": 0, "guest_read": 1})
    (one,) = moved(opened, zero)
    assert (one.what, one.bits) == ("guest write of 0", 0)


def test_bit_by_bit_where_that_is_shorter() -> None:
    """Each guest gets what its CPUID has: two causes for three profiles, not three."""
    before = rows(AMD_IBRS={"host_first": 0}, AMD_STIBP={"host_first": 0}, AMD_IBRS__AMD_STIBP={"host_first": 0})
    after = rows(AMD_IBRS={"host_first": 1}, AMD_STIBP={"host_first": 2}, AMD_IBRS__AMD_STIBP={"host_first": 3})
    assert {(one.bits, one.where) for one in moved(before, after)} == {(0x1, "with AMD_IBRS"), (0x2, "with AMD_STIBP")}


def test_a_guest_that_is_not_let_through_any_more() -> None:
    before = rows(AMD_IBRS={"guest_first": 1, "guest_after": ALL_BITS, "guest_after_seen": 1, "host_after": 1})
    after = rows(AMD_IBRS={"guest_first": 1})
    (one,) = moved(before, after)
    assert (one.before, one.after) == ("asked", "no guest was let through")


def test_profiles_that_one_record_alone_has() -> None:
    one, other = kvm(), kvm()
    one.rows, other.rows = rows(AMD_IBRS={"host_first": 1}), rows(AMD_STIBP={"host_first": 1})
    found = compare(one, other)
    assert not found.moved
    assert not found.same
    assert (found.only_before, found.only_after) == ("1 profile: AMD_IBRS", "1 profile: AMD_STIBP")


def test_models_and_hardware_that_moved() -> None:
    one, other = kvm(), kvm()
    other.hardware.keep, other.hardware.loaded = hex64(0x7), False
    other.explained_by, other.follows = [], ""
    told = {(each.what, each.before, each.after, each.bits) for each in compare(one, other).moved}
    assert ("the register", "not kept", "kept", 0x7) in told
    assert ("VM entry", "loads", "does not load", 0) in told
    assert ("explained by", "kvm-6.1-svm", "no model", 0) in told


def test_what_no_guest_was_let_through_to_see_has_not_moved() -> None:
    one, other = kvm(), kvm()
    one.hardware.valid = one.hardware.keep = hex64(0)
    other.hardware.keep = hex64(0x7)
    told = {(each.what, each.before, each.after) for each in compare(one, other).moved}
    assert told == {("a guest let through", "none, so that nobody saw what it meets", "there was one")}
    assert "no guest was let through" in mail.render(one, "0" * 64)
    assert "no guest was let through" not in mail.render(other, "0" * 64)


def test_golden_of_two_kernels(golden: Golden) -> None:
    golden("diff-kvm-6.1-to-7.2.txt", diff_text.render(compare(kvm(OLD), kvm(NEW)), *FILES))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_golden_of_two_runs(golden: Golden) -> None:
    found = compare(july_2020_guest(), july_2020_metal())
    golden("diff-run-july-2020.mail.txt", diff_text.render(found, *FILES, hashes=True))
    assert ("write", "fault", "retained", 0x2) in {(one.what, one.before, one.after, one.bits) for one in found.moved}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_record_is_the_same_as_itself(name: str) -> None:
    record = RUNS[name]()
    found = compare(record, record)
    assert found.same
    assert not found.conditions
    assert re.search(r"the same: (called, )?machine", diff_text.render(found, *FILES))


# What may differ between two runs that saw the same: when, how long, in which words.
PASSED_OVER = re.compile(
    r"(started|duration|tool\.(arguments|python|name)|schema_version|kernel\.(taint_\w+|modules_loaded)|place\.because"
    r"|place\.guest\.because|findings\[\d+\]\.text|restore\[\d+\]\.(note|reads|saved)|\w+\[\d+\]\.reasons\b.*|notes\b.*"
    r"|predictions\[\d+\]\.(title|exists)|verdicts\[.*|fits\[\d+\]\.(model|title|family|first\b.*|divergences\b.*|cases|agreements)"
    r"|explored\[\d+\]\.(model|programs|seed|seconds|steady|model_says)|policy\.(title|source|over)|cpuid\.(sources\b.*|cross_check)"
    r"|.*\.varying\b.*|rows\[\d+\]\.(opener|cells\.\w+_(kept|seen))|hypervisor_rules\[\d+\]\.against|driver\.(cpu|exit_code)|kind|machine\.microcode\[\d+\]\.cpus"
    r"|observations\[\d+\]\.pairs_tried|departures\[\d+\]\.kernel|arrivals\[\d+\]\.departure)(\[\d+\])?"
)


Step = Union[str, int]


def leaves(value: Any, path: tuple[Step, ...] = ()) -> list[tuple[tuple[Step, ...], Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        return [(path, value)]
    return [leaf for key, one in inner for leaf in leaves(one, (*path, key))]


def told(path: tuple[Step, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def changed(value: Any) -> Any:
    """Another value of the same form."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if re.fullmatch(r"0x[0-9a-f]{16}", value):
        return hex64(int(value, 16) ^ 1)
    if re.fullmatch(r"0x[0-9a-f]+", value):
        return f"{int(value, 16) ^ 1:#x}"
    if re.fullmatch(r"[0-9a-f]{8}( [0-9a-f]{8}){3}", value):
        return f"{int(value[:8], 16) ^ 0x80:08x}{value[8:]}"
    return f"{value} otherwise"


def with_leaf(document: Any, path: tuple[Step, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(document))
    at = copy
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return copy


MUTATED = ["as-predicted", "every-trial", "july-2020-guest", "kvm", "migration"]


@pytest.mark.parametrize("name", MUTATED)
def test_nothing_that_differs_is_called_the_same(name: str) -> None:
    """Every field of a record, changed alone, is something that moved, or something around it that differs."""
    paths = {"kvm": OLD, "migration": Path("results/thread-2020/debian-6.1.192.json")}
    raw = paths[name].read_bytes() if name in paths else rec.encode(RUNS[name]())
    document = json.loads(raw)
    if name == "kvm":
        document["rows"] = document["rows"][:3]
        document["driver"] = {"cpu": 0, "accepts": hex64(3), "faults": hex64(4), "unanswered": hex64(8)}
    before = decode_any(json.dumps(document).encode(), name)
    tried = 0
    silent = []
    for path, value in leaves(document):
        if PASSED_OVER.fullmatch(told(path)):
            continue
        try:
            after = decode_any(json.dumps(with_leaf(document, path, changed(value))).encode(), name)
        except (RecordError, UsageError):
            continue  # no record any more
        try:
            found = compare(before, after)
        except RecordError:
            continue  # no CPUID bit is called so
        tried += 1
        if found.same and not found.conditions:
            silent.append(told(path))
    assert not silent
    assert tried > 25


def test_a_million_cpus_are_compared_as_ranges() -> None:
    one, other = as_predicted(), july_2020_metal()
    for record in (one, other):
        for entries in (record.observations, record.predictions, record.verdicts, record.restore, record.saved):
            for entry in entries:
                entry.cpus = "0-999999"
    started = time.perf_counter()
    compare(one, other)
    assert time.perf_counter() - started < 1
    other.observations[0].cpus = "0-9,20-1999999"
    assert compare(one, other).only_before == "CPUs 10-19"
    assert compare(one, other).only_after == "CPUs 1000000-1999999"


def test_a_driver_that_gives_no_answer_any_more_does_not_fault() -> None:
    zero = hex64(0)
    one, other = kvm(), kvm()
    one.driver = kvm_record.DriverEntry(cpu=0, accepts=hex64(7), faults=zero, unanswered=zero)
    other.driver = kvm_record.DriverEntry(cpu=0, accepts=zero, faults=zero, unanswered=hex64(7))
    (moved_,) = compare(one, other).moved
    assert (moved_.before, moved_.after, moved_.bits) == ("accepted", "no answer", 7)


def test_two_machines_are_compared_and_it_is_said() -> None:
    one, other = as_predicted(), as_predicted()
    other.machine.model += 1
    other.machine.microcode = [rec.Microcode(cpus="0-1", revision="0x99")]
    found = compare(one, other)
    assert found.same, "what is around it is not what was seen"
    report = diff_text.render(found, *FILES)
    assert "TWO DIFFERENT MACHINES" in report
    assert "microcode: " in report
    assert "nothing moved" in report


def test_cpus_that_one_run_alone_has() -> None:
    one, other = as_predicted(), as_predicted()
    other.observations[0].cpus = "0"
    found = compare(one, other)
    assert not found.same
    assert found.only_before.startswith("CPU 1")


@pytest.mark.parametrize("one", sorted(RUNS))
@pytest.mark.parametrize("other", ["as-predicted", "plan-only", "not-put-back"])
def test_every_pair_of_reports_fits_a_mail(one: str, other: str) -> None:
    report = diff_text.render(compare(RUNS[one](), RUNS[other]()), *FILES, hashes=True)
    assert all(len(line) <= 75 and line == line.rstrip() for line in report.splitlines())


def test_two_kinds_have_nothing_to_compare() -> None:
    with pytest.raises(UsageError, match="a record of a run and a record of KVM"):
        compare(as_predicted(), kvm())


def test_one_bit_and_one_cpu_are_in_the_singular() -> None:
    one, other = as_predicted(), as_predicted()
    other.observations = copy.deepcopy(one.observations)
    other.observations[0].cpus = "0"
    other.observations.append(copy.deepcopy(one.observations[0]))
    other.observations[1].cpus = "1"
    other.observations[1].outcomes.retained, other.observations[1].outcomes.fault = hex64(0x4), hex64(ALL_BITS & ~0x4)
    other.saved = [rec.Saved(cpus="0", value=hex64(2))]
    report = diff_text.render(compare(one, other), *FILES)
    assert "write: bit 1 (STIBP): retained -> fault\n      on CPU 1\n" in report
    assert "(CPU 0)" in report
    assert not re.search(r"bits [0-9]+[ :]|CPUs [0-9]+\n|CPUs [0-9]+\)", report)
    assert Moved("guest write of IA32_PRED_CMD", "accepted", "#GP", 1).told.endswith("bit 0: accepted -> #GP")
    assert [told_bits(mask) for mask in (0, 4, 6)] == ["no bits", "bit 2", "bits 1-2"]
    pair = compare_sets([("a", one)], [("a", other)])
    assert diff_sets_text.render(pair, "x", "y").startswith("1 pair of records: 0 the same, 1 different\n")


def test_a_mask_that_is_none_stands_beside_no_profile_of_that_name() -> None:
    record = kvm_record.decode(next(POLICIES.glob("emulate-guest-kvm-7.2*.json")).read_bytes(), "policy")
    for report in (kvm_text.render(record), mail.render(kvm(NEW), "c" * 64)):
        assert "\nnone (no CPUID set)" in report
        assert not re.search(r"^none  ", report, re.MULTILINE)


def test_a_mail_names_the_register_first() -> None:
    run, of_kvm = (compare(one, one) for one in (as_predicted(), kvm()))
    assert diff_text.render(run, *FILES, hashes=True).startswith("IA32_SPEC_CTRL (MSR 0x48), two runs: the same\n")
    assert diff_text.render(of_kvm, *FILES, hashes=True).startswith("KVM and IA32_SPEC_CTRL (MSR 0x48): the same\n")


def test_what_is_empty_is_not_called_none() -> None:
    one, other = as_predicted(), as_predicted()
    one.kernel.lockdown, other.kernel.lockdown = "", "none"
    (condition,) = compare(one, other).conditions
    assert (condition.before, condition.after) == ("(empty)", "none")


def healthy() -> rec.Record:
    """The machine of RUNS["one-cpu-differs"], with CPU 5 as the others."""
    record = RUNS["one-cpu-differs"]()
    record.observations = [copy.deepcopy(record.observations[0])]
    record.observations[0].cpus = "0-7"
    record.findings = []
    return record


def causes(before: rec.Record, after: rec.Record) -> set[tuple[str, str, str, int, str]]:
    return {(one.what, one.before, one.after, one.bits, one.where) for one in compare(before, after).moved}


def test_a_bit_that_one_cpu_refuses_is_one_line() -> None:
    """Together, that CPUs differ, and that the write is not as predicted follow from it."""
    sick = RUNS["one-cpu-differs"]()
    assert causes(healthy(), sick) == {("write", "retained", "fault", 0x2, "CPU 5")}
    assert causes(sick, healthy()) == {("write", "fault", "retained", 0x2, "CPU 5")}
    worse = copy.deepcopy(sick)
    worse.observations[1].outcomes.retained = hex64(0)
    worse.observations[1].outcomes.fault = hex64(ALL_BITS)
    worse.observations[1].combined = UNSET
    for finding in worse.findings:
        finding.mask = hex64(0x6)
    assert causes(sick, worse) == {("write", "retained", "fault", 0x4, "CPU 5")}
    worse.findings.append(rec.FindingEntry(kind="unexpected_fault", cpus="0-6", mask=hex64(0x8), text="new"))
    assert ("finding unexpected_fault", "none", "new", 0x8, "CPUs 0-6") in causes(sick, worse)


def test_cpus_that_one_run_alone_has_differ_in_one_line() -> None:
    few = healthy()
    few.observations[0].cpus = "0-1"
    assert causes(few, RUNS["one-cpu-differs"]()) == {("finding unexpected_fault", "none", "new", 0x2, "CPU 5")}


def test_pairs_that_follow_from_their_bits_are_not_told() -> None:
    metal, guest = (
        rec.decode(Path(f"results/modelled-threadripper-3970x/{name}.json").read_bytes(), name)
        for name in ("metal", "kvm-5.6-guest")
    )
    assert causes(metal, guest) == {("write", "retained", "fault", 0x2, "CPUs 0-1")}
    guest.observations[0].pairs_tried = 7
    assert "pairs" in {one[0] for one in causes(metal, guest)}


ALL_BUT = ALL_BITS & ~0x6


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("went-offline", {("absent", "no", "CPU is offline", ALL_BITS, "CPU 1")}),
        (
            "all-refused",
            {
                ("write", "retained", "refused", 0x6, "CPUs 0-1"),
                ("write", "fault", "refused", ALL_BUT, "CPUs 0-1"),
            },
        ),
    ],
)
def test_bits_without_an_answer_are_told_once(name: str, wanted: set[tuple[str, str, str, int, str]]) -> None:
    assert causes(as_predicted(), RUNS[name]()) == wanted


def test_findings_of_a_combination_and_of_pairs_are_told_once() -> None:
    told = [one[0] for one in causes(as_predicted(), RUNS["every-trial"]())]
    assert {"all accepted bits together", "pairs"} <= set(told)
    assert not [what for what in told if what.startswith("finding ")]
    stopped = [one[0] for one in causes(as_predicted(), RUNS["not-put-back"]())]
    assert "all accepted bits together" not in stopped, "the walk did not come so far"
    assert "finding not_restored" in stopped
    sick = RUNS["every-trial"]()
    sick.findings.append(rec.FindingEntry(kind="pair_refused", cpus="9", mask=hex64(0x6), text="elsewhere"))
    assert ("finding pair_refused", "none", "new", 0x6, "CPU 9") in causes(as_predicted(), sick)


def test_what_does_not_follow_from_a_bit_is_told() -> None:
    """A combination that is refused, a pair, CPUs that differ in another bit."""
    sick = RUNS["one-cpu-differs"]()
    combined = sick.observations[1].combined
    assert not isinstance(combined, UnsetType)
    combined.outcome, combined.got = "altered", hex64(0)
    assert "all accepted bits together" in {one[0] for one in causes(healthy(), sick)}
    sick = RUNS["one-cpu-differs"]()
    combined = sick.observations[1].combined
    assert not isinstance(combined, UnsetType)
    combined.value = combined.got = combined.expected = hex64(0x14)
    assert "all accepted bits together" in {one[0] for one in causes(healthy(), sick)}
    sick = RUNS["one-cpu-differs"]()
    sick.findings[-1].mask = hex64(0x8)
    assert ("finding cpus_differ", "none", "new", 0x8, "CPU 5") in causes(healthy(), sick)
    paired = healthy()
    paired.observations[0].pairs_tried, paired.observations[0].bad_pairs = 1, [hex64(0x6)]
    assert "pairs" in {one[0] for one in causes(healthy(), paired)}


# --- sets ------------------------------------------------------------------------------------------------------------


def named(**records: Any) -> list[tuple[str, Any]]:
    return list(records.items())


def test_sets_are_paired_by_machine_and_question() -> None:
    other = kvm(NEW)
    found = compare_sets(named(a=kvm(OLD), run=as_predicted()), named(b=other, run=as_predicted()))
    assert [(pair.before, pair.after) for pair in found.pairs] == [("a", "b"), ("run", "run")]
    assert not found.same
    forced = kvm(OLD)
    assert not isinstance(forced.guest, UnsetType)
    forced.guest.cpu = "AMD_IBRS"
    found = compare_sets(named(a=kvm(OLD)), named(a=forced))
    assert (found.pairs, found.only_before, found.only_after) == ((), ("a",), ("a",))
    assert not found.same


def test_of_several_those_of_one_kernel_are_counterparts_then_the_newest() -> None:
    old, new, late = kvm(OLD), kvm(NEW), kvm(OLD)
    late.started, late.kernel.release = "2030-01-01T00:00:00Z", "9.9"
    found = compare_sets(named(a=old, b=new, x=late), named(c=kvm(NEW), d=kvm(OLD)))
    assert {(pair.before, pair.after) for pair in found.pairs} == {("a", "d"), ("b", "c")}
    assert found.only_before == ("x",)
    found = compare_sets(named(a=old, x=late), named(c=kvm(NEW)))
    assert [(pair.before, pair.after) for pair in found.pairs] == [("x", "c")]


def test_nights_of_a_store_are_paired_by_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Names carry a hash, records no name: lab15 is not lab13, and what lab8 did is told."""
    nights = [Path("results/lab-two-nights") / date for date in ("2026-11-27", "2026-11-28")]
    for folders in (nights, [night / "records" for night in nights]):
        assert main(["diff", *map(str, folders)]) == 1
        out = capsys.readouterr().out
        assert out.startswith("13 pairs of records: 12 the same, 1 different\n")
        assert "\nlab8, record of a run: 1 change\n" in out
        assert "write: bits 1-2 (STIBP, SSBD): fault -> retained\n" in out
        assert "without a counterpart" not in out


def test_a_machine_of_a_store_has_no_other_machine_as_counterpart() -> None:
    def kept(*hosts: str) -> list[tuple[str, rec.Record]]:
        return [(f"records/{host}-{number:016x}.json", as_predicted()) for number, host in enumerate(hosts)]

    found = compare_sets(kept("lab1", "lab13"), kept("lab15", "lab1")[::-1])
    assert [pair.name for pair in found.pairs] == ["lab1, record of a run"]
    assert (len(found.only_before), len(found.only_after)) == (1, 1)
    found = compare_sets(kept("lab13"), kept("lab15"))
    assert not found.pairs, "each alone"
    twice = kept("lab1", "lab1")
    twice[1][1].started = "2030-01-01T00:00:00Z"
    (pair,) = compare_sets(twice, [(f"lab1-{7:016x}.json", as_predicted())]).pairs
    assert pair.before == twice[1][0], "the newest of one machine"


@pytest.mark.parametrize("form", ["{}.json", "{}/record.json", "{}/run/2026-11-28T0826{:02}Z-6.1.json"])
def test_what_an_engine_left_is_paired_by_machine(form: str) -> None:
    def left(*hosts: str, second: int = 0) -> list[tuple[str, rec.Record]]:
        return [(form.format(host, second), as_predicted()) for host in hosts]

    found = compare_sets(left("lab1", "lab2", "lab3"), left("lab2", "lab3", "lab4", second=7))
    assert [pair.machine for pair in found.pairs] == ["lab2", "lab3"]
    assert found.only_before == (form.format("lab1", 0),)
    assert found.only_after == (form.format("lab4", 7),)


def test_folders_that_are_not_machines_do_not_part_records() -> None:
    for one, other in (("base/kvm.json", "tip/kvm.json"), ("kvm.json", "tip/x.json")):
        assert len(compare_sets([(one, kvm(OLD))], [(other, kvm(NEW))]).pairs) == 1
    two = [("a.json", kvm(OLD)), ("b.json", kvm(OLD))]
    assert not compare_sets(two, [("c.json", kvm(OLD))]).pairs, "of one kernel: perhaps two machines"


POLICIES = NESTED / "policies"


def lab(hosts: int, change: Callable[[int, rec.Record], None]) -> list[tuple[str, rec.Record]]:
    """Machines of a store, each changed."""
    found = []
    for number in range(1, hosts + 1):
        record = july_2020_guest()
        change(number, record)
        found.append((f"lab{number}-{number:016x}.json", record))
    return found


def test_machines_with_one_cause_are_told_together() -> None:
    def mended(number: int, record: rec.Record) -> None:
        record.observations = july_2020_metal().observations
        record.findings = []
        record.kernel.release = "6.1.0-new"
        if number in (3, 5):
            record.machine.microcode[0].revision = "0x99"

    before, after = lab(40, lambda number, record: None), lab(40, mended)
    found = compare_sets(before, after)
    report = diff_sets_text.render(found, "x", "y")
    assert "40 machines, record of a run each: 1 change; 2 things around it differ\nmachines   lab1-lab40\n" in report
    assert report.count("write: bit 1 (STIBP): fault -> retained") == 1
    assert report.count("kernel: 6.1") == 1
    assert "\n  lab3, lab5: microcode: " in report
    assert len(report.splitlines()) < 30
    files = [
        (diff_text.File(one, "a" * 64, tuple(mail.place(before[at][1]))), diff_text.File(one, "b" * 64))
        for at, (one, _) in enumerate(before)
    ]
    letter = diff_sets_text.render(found, "x", "y", files)
    assert letter.count("made on, before") == letter.count("command    ") == 1
    assert letter.count("a" * 64) == letter.count("b" * 64) == 40
    assert all(len(line) <= 75 for line in letter.splitlines())


def test_machines_of_more_and_of_fewer_cpus_have_one_cause() -> None:
    def larger(number: int, record: rec.Record) -> None:
        record.observations[0].cpus = "0-7" if number == 1 else "0-1"

    def mended(number: int, record: rec.Record) -> None:
        record.observations = july_2020_metal().observations
        larger(number, record)

    report = diff_sets_text.render(compare_sets(lab(2, larger), lab(2, mended)), "x", "y")
    assert "2 machines, record of a run each" in report
    assert "write: bit 1 (STIBP): fault -> retained\n      on every CPU\n" in report


def test_what_moved_otherwise_is_told_apart_and_its_surroundings_once() -> None:
    def mended(number: int, record: rec.Record) -> None:
        record.kernel.release = "6.1.0-new"
        record.observations = july_2020_metal().observations
        if number == 2:
            record.restore[0].state = "left"

    report = diff_sets_text.render(compare_sets(lab(3, lambda *_: None), lab(3, mended)), "x", "y")
    assert "around all of them, not the same\n  kernel: " in report
    assert report.count("kernel: 6.1") == 1
    assert "2 machines, record of a run each" in report
    assert "machines   lab1, lab3\n" in report
    assert "\nlab2, record of a run: 2 changes\n" in report


def test_policies_over_two_kernels_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, release in (("before", "6.1.0"), ("after", "7.2")):
        (tmp_path / folder).mkdir()
        for path in POLICIES.glob(f"*-kvm-{release}*.json"):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    assert main(["diff", str(tmp_path / "before"), str(tmp_path / "after"), "--format", "mail"]) == 1
    out = capsys.readouterr().out
    assert "7 policies, record of KVM each: 4 changes; 7 things around it differ\n" in out
    assert out.count("around all of them, not the same") == out.count("guest kernel sha256:\n") == 1
    assert out.count("kvm policy POLICY") == 2
    assert "its policy over kvm-6.1-svm -> its policy over kvm-6.19-svm" in out


def test_names_in_a_row_are_folded() -> None:
    assert diff_sets_text.folded(f"lab{number}" for number in range(1, 41)) == "lab1-lab40"
    assert diff_sets_text.folded(["lab9", "lab10", "lab8", "lab2", "db"]) == "db, lab2, lab8-lab10"
    assert diff_sets_text.folded(["a08", "a09", "a10", "a100"]) == "a08-a10, a100"
    assert diff_sets_text.folded(["a1", "a2", "b"]) == "a1, a2, b"
    odd = ["²", "9" * 5000, "", "a\n1", "1" * 5000]
    assert set(diff_sets_text.folded(odd).split(", ")) == set(odd)
    assert diff_sets_text.folded((f"h{number}x" for number in range(0, 100, 2)), 3) == "h0x, h2x, h4x and 47 more"


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, path in (("before", OLD), ("after", NEW)):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "kvm.json").write_bytes(path.read_bytes())
        (tmp_path / folder / "guest.json").write_bytes(GUEST.read_bytes())
        (tmp_path / folder / "cut.json").write_bytes(GUEST.read_bytes()[:500])
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    assert main(["diff", before, after, "--format", "mail", "--tester", "A B <a@b.invalid>"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("IA32_SPEC_CTRL (MSR 0x48): 2 pairs of records: 1 the same, 1 different; 2\nfiles LEFT OUT\n")
    assert out.count("cut.json cannot be read: ") == 2
    assert str(tmp_path / "before" / "cut.json") not in out
    assert "SHA-256" in out
    assert out.endswith("\nTested-by: A B <a@b.invalid>\n")
    assert err.count("left out: ") == 2
    assert main(["diff", before, before]) == 3, "what cannot be read is not the same"
    assert "\nLEFT OUT before, not compared:\n  cut.json cannot be read" in capsys.readouterr().out
    for folder in ("before", "after"):
        (tmp_path / folder / "cut.json").unlink()
    assert main(["diff", before, before]) == 0
    assert main(["diff", before, after, "--format", "mail", "--tester", "foo"]) == 2
    assert main(["diff", before, after, "--tester", "A B <a@b.invalid>"]) == 2
    assert main(["diff", str(OLD), str(OLD), "--format", "mail", "--tester", "A B <a@b.invalid>"]) == 2
    assert main(["export", "--format", "csv", before]) == 3
    (tmp_path / "none").mkdir()
    assert main(["diff", before, str(tmp_path / "none")]) == 3


# --- the command, and mails ------------------------------------------------------------------------------------------


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(OLD), str(OLD)]) == 0
    assert "both are the same file, or copies of it" in capsys.readouterr().out
    assert main(["diff", str(OLD), str(NEW)]) == 1
    assert main(["diff", str(OLD), str(GUEST)]) == 2
    assert main(["diff", str(OLD), str(tmp_path / "none.json")]) == 3
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps({**json.loads(OLD.read_text()), "schema_version": "9.0"}))
    assert main(["diff", str(OLD), str(newer)]) == 3
    assert "version 9.0; this tool reads 1.x" in capsys.readouterr().err


def test_two_records_of_256_kib_are_compared_in_a_third_of_a_second() -> None:
    """By the demand 0.3 s for the command; here the comparison alone, of the worst: every profile differs otherwise."""
    before, after = kvm(), kvm()
    names = [str(Profile(mask)) for mask in range(1200)]
    cells = ("guest_first", "host_first", "guest_after")
    before.rows = [kvm_record.RowEntry(profiles=[n], cells={c: hex64(0) for c in cells}) for n in names]
    after.rows = [
        kvm_record.RowEntry(profiles=[n], cells={c: hex64(hash((number, c)) & ALL_BITS) for c in cells})
        for number, n in enumerate(names)
    ]
    assert len(kvm_record.encode(after)) > 256 << 10
    started = time.perf_counter()
    assert compare(before, after).moved
    assert time.perf_counter() - started < 3, "the bench has the figure; this is a bound that a loaded machine holds"


def test_golden_mail_of_kvm(golden: Golden) -> None:
    golden("mail-kvm-7.2.txt", mail.render(kvm(NEW), "c" * 64, "A Tester <tester@example.invalid>"))


@pytest.mark.parametrize("name", ["july-2020-guest", "as-predicted"])
def test_golden_mail_of_a_run(name: str, golden: Golden) -> None:
    golden(f"mail-{name}.txt", mail.render(RUNS[name](), "c" * 64))


@pytest.mark.parametrize("name", sorted(RUNS))
def test_every_mail_fits(name: str) -> None:
    text = mail.render(RUNS[name](), "c" * 64)
    assert all(len(line) <= 75 and line == line.rstrip() and line.isprintable() for line in text.splitlines())
    assert "Tested-by" not in text, "a name is a person's word"


@pytest.mark.parametrize(
    ("release", "commit"),
    [
        ("6.19.0-rc1-00012-g0123456789ab", "0123456789ab"),
        ("7.1.0-g1a2b3c4d-dirty", "1a2b3c4d, and changes that are not in it"),
        ("6.1.0-56-amd64", ""),
        ("6.1.0-generic", ""),
        ("6.9.0-gabc", ""),
    ],
)
def test_a_release_may_name_its_commit(release: str, commit: str) -> None:
    assert mail.commit_of(release) == commit


def test_every_record_of_results_can_be_mailed_and_is_itself() -> None:
    paths = sorted(Path("results").rglob("*.json"))
    assert len(paths) > 20
    for path in paths:
        record = decode_any(path.read_bytes(), path.name)
        assert compare(record, record).same, path
        assert all(len(line) <= 75 for line in mail.render(record, "0" * 64).splitlines()), path
