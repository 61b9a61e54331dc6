# SPDX-License-Identifier: MIT
"""Whole reports as they are mailed: golden files, and what no record, however hostile, may do to them."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from probe import record as rec
from probe.cpuid.compare import Difference
from probe.cpuid.machine import MachineCpuid
from probe.cpuid.snapshot import Leaf, Snapshot
from probe.errors import RecordError
from probe.masks import ALL_BITS, hex64
from probe.models import registry
from probe.report import mail, prediction, text
from tests.fakes import FakeRegister
from tests.fakes_machine import cpuid_of, facts_of, in_guest, record_of, sapphire_rapids, small_cpu, threadripper

Golden = Callable[[str, str], None]

METAL = facts_of("threadripper-3970x")
GUEST = facts_of("kvm-guest")
SKYLAKE = {cpu: small_cpu("GenuineIntel", 6, 0x5E, 3, edx7=0x9C000000) for cpu in (0, 1)}


def guest(cpus: Mapping[int, Snapshot]) -> dict[int, Snapshot]:
    return {cpu: in_guest(snapshot) for cpu, snapshot in cpus.items()}


def both(**register: Any) -> dict[int, FakeRegister]:
    return {cpu: FakeRegister(**register) for cpu in (0, 1)}


def as_predicted() -> rec.Record:
    return record_of(both(value=0x2, valid=0x6), threadripper(), METAL)


def july_2020_guest() -> rec.Record:
    """KVM v5.6 to v5.8 on a 3970X: the guest's CPUID has STIBP, the mask asks for IBRS first and lets only SSBD in."""
    return record_of(both(valid=0x4), guest(threadripper()), GUEST)


def july_2020_metal() -> rec.Record:
    return record_of(both(valid=0x6), threadripper(), METAL, identity="lab-7")


def ignores_everything() -> rec.Record:
    return record_of(both(dropped=ALL_BITS), guest(sapphire_rapids()), GUEST)


def one_cpu_differs() -> rec.Record:
    registers = {cpu: FakeRegister(valid=0x4 if cpu == 5 else 0x6) for cpu in range(8)}
    return record_of(registers, threadripper(8), dataclasses.replace(METAL, online=tuple(range(8))))


def cpuid_differs() -> rec.Record:
    cpus = threadripper(4)
    cpus[3] = without_ssbd(cpus[3])
    seen = dataclasses.replace(
        cpuid_of(cpus),
        cross_check="differs",
        differences={1: (Difference(Leaf(7, 0), "edx", 0, 1 << 26),)},
    )
    registers = {cpu: FakeRegister(valid=0x6) for cpu in cpus}
    return record_of(registers, seen, dataclasses.replace(METAL, online=tuple(range(4))))


def without_ssbd(cpu: Snapshot) -> Snapshot:
    leaves = dict(cpu.leaves)
    found = leaves[Leaf(0x80000008, 0)]
    leaves[Leaf(0x80000008, 0)] = found._replace(ebx=found.ebx & ~(1 << 24))
    return Snapshot(leaves)


def no_register() -> rec.Record:
    return record_of(both(absent=True), {cpu: small_cpu("AuthenticAMD", 0x10, 2, 3) for cpu in (0, 1)}, METAL)


def enumerated_but_absent() -> rec.Record:
    return record_of(both(absent=True), guest(threadripper()), GUEST)


def not_put_back() -> rec.Record:
    registers = {0: FakeRegister(value=0x1, valid=0x7, sticky=0x4), 1: FakeRegister(value=0x1, valid=0x7)}
    return record_of(registers, threadripper(), METAL)


def legacy_ibrs() -> rec.Record:
    return record_of(both(value=0x1, valid=0x7, alters=lambda value: 0x1), SKYLAKE, facts_of("skylake-legacy-ibrs"))


def plan_only() -> rec.Record:
    return record_of({}, threadripper(), METAL, written=False)


def all_refused() -> rec.Record:
    return record_of(both(value=0x2, refuses=True), threadripper(), METAL)


def went_offline() -> rec.Record:
    return record_of({0: FakeRegister(valid=0x6), 1: FakeRegister(offline=True)}, threadripper(), METAL)


def every_trial() -> rec.Record:
    """--clear-bits --pairs, on a register that has something to tell in each part."""
    registers = both(value=0x1, valid=0x87, dropped=0x80, forbidden=lambda value: value & 0x6 == 0x6)
    return record_of(registers, threadripper(), METAL, clear_bits=True, pairs=True)


def scattered_bits() -> rec.Record:
    return record_of(both(valid=0x5555_5555_5555_5006), threadripper(), METAL)


def long_cpu_lists() -> rec.Record:
    """Siblings whose tasks asked for STIBP: every second CPU held something else."""
    registers = {cpu: FakeRegister(value=(cpu & 1) << 1, valid=0x6) for cpu in range(128)}
    return record_of(registers, threadripper(128), dataclasses.replace(METAL, online=tuple(range(128))))


GOLDEN = {
    make.__name__.replace("_", "-"): make
    for make in (
        as_predicted,
        july_2020_guest,
        july_2020_metal,
        ignores_everything,
        one_cpu_differs,
        cpuid_differs,
        no_register,
        enumerated_but_absent,
        not_put_back,
        legacy_ibrs,
        plan_only,
        all_refused,
        went_offline,
        every_trial,
        scattered_bits,
        long_cpu_lists,
    )
}


def check_form(report: str) -> None:
    """What holds for every report: at most 75 columns, no trailing blanks, no control characters, a last newline."""
    assert report.endswith("\n")
    assert not report.endswith("\n\n")
    for line in report[:-1].split("\n"):
        assert len(line) <= 75, line
        assert line == line.rstrip(), repr(line)
        assert line.isprintable(), repr(line)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_report(name: str, golden: Golden) -> None:
    report = text.render(GOLDEN[name]())
    check_form(report)
    golden(f"report-{name}.txt", report)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_report_is_the_same_after_the_disk(name: str) -> None:
    record = GOLDEN[name]()
    assert text.render(rec.decode(rec.encode(record), "x")) == text.render(record)


# --- what a reader must see, whatever the layout ---


def lines_of(record: rec.Record) -> list[str]:
    return text.render(record).splitlines()


def test_what_could_not_be_put_back_is_said_first() -> None:
    lines = lines_of(not_put_back())
    assert "NOT PUT BACK" in lines[0]
    assert lines[3].startswith("  1. not_restored, CPU 0: the register held 0x0000000000000001 and now")
    assert "reads 0x0000000000000005: NOT PUT BACK" in " ".join(text.render(not_put_back()).split())


def test_the_2020_case_is_shown() -> None:
    lines = lines_of(july_2020_guest())
    assert lines[0].split() == ["IA32_SPEC_CTRL", "(MSR", "0x48)", "1", "finding"]
    assert lines[3].startswith("  1. unexpected_fault, CPUs 0-1: bit 1 (STIBP)")
    assert any(line.split() == ["*1", "STIBP", "accepts", "fault", "unexpected", "fault"] for line in lines)
    assert any(line.split() == ["2", "SSBD", "accepts", "retained", "as", "predicted"] for line in lines)
    models = {line.split()[0]: line.split(None, 2)[2] for line in lines if line.startswith(("vendor  ", "kvm-"))}
    assert models["kvm-5.6"] == "none", "the mask of the time explains what was seen"
    assert models["vendor"] == "1 (STIBP)"
    assert "STIBP" in models["kvm-maxim-v1"]


def test_predicted_and_observed_masks_stand_one_under_the_other() -> None:
    lines = lines_of(july_2020_guest())
    (start,) = (number for number, line in enumerate(lines) if line.startswith("predicted"))
    rows = lines[start : start + 5]
    assert len({line.index("0x") for line in rows}) == 1
    assert [line[line.index("0x") :][:18] for line in rows] == [
        hex64(0x6),
        hex64(ALL_BITS & ~0x7),
        hex64(0x1),
        hex64(0x4),
        hex64(ALL_BITS & ~0x4),
    ]


def test_findings_come_before_the_machine() -> None:
    report = text.render(july_2020_guest())
    assert report.index("findings") < report.index("machine") < report.index("predicted") < report.index("restored")


@pytest.mark.parametrize("make", [all_refused, lambda: record_of(both(offline=True), threadripper(), METAL)])
def test_a_run_that_measured_nothing_is_not_as_predicted(make: Callable[[], rec.Record]) -> None:
    assert "nothing measured" in lines_of(make())[0]


def test_what_was_not_read_is_not_called_verified_by_reading() -> None:
    record = as_predicted()
    record.restore = [
        rec.RestoreEntry(cpus="0", saved=hex64(2), state="left", note="offline: the kernel sets it up on bring-up"),
        rec.RestoreEntry(cpus="1", saved=hex64(2), state="left", reads=hex64(0), note="was offline in between"),
    ]
    assert "verified by reading" not in text.render(record)


def test_cpus_that_did_the_same_but_were_predicted_otherwise_have_a_table_each() -> None:
    report = text.render(cpuid_differs())
    tables = [part for part in report.split("\n\n") if part.lstrip().startswith("bit ")]
    assert len(tables) == 2
    assert "unexpected accept" not in tables[0]
    assert "unexpected accept" in tables[1], "CPU 3 accepts SSBD, which its CPUID does not enumerate"


def test_a_plan_says_that_nothing_was_written() -> None:
    report = text.render(plan_only())
    assert "plan only, nothing written" in report.splitlines()[0]
    assert "nothing was written, nothing to put back" in report


def test_every_reserved_bit_that_disagrees_is_named_with_its_verdict() -> None:
    (found,) = [entry for entry in scattered_bits().findings if entry.kind == "unexpected_accept"]
    assert found.mask == hex64(0x5555_5555_5555_5000)
    report = text.render(scattered_bits())
    assert any(line.split()[-3:] == ["retained", "unexpected", "accept"] for line in report.splitlines())
    assert "12,14,16,18" in report.split("bit      name")[1]


# --- mails ---


def mail_of(record: rec.Record) -> str:
    report = mail.render(record, "0" * 64)
    check_form(report)
    return report


@pytest.mark.parametrize(("name", "heads"), [("one-cpu-differs", ["CPUs 0-4,6-7", "CPU 5"]), ("july-2020-guest", [])])
def test_tables_of_a_mail_say_whose_they_are_if_there_are_several(name: str, heads: list[str]) -> None:
    parts = mail_of(GOLDEN[name]()).split("\n\n")
    assert [part.splitlines()[0] for part in parts if part.startswith("CPU")] == heads


@pytest.mark.parametrize("make", [text.render, mail_of])
def test_reserved_bits_that_were_tried_have_one_row(make: Callable[[rec.Record], str]) -> None:
    rows = [line.split() for line in make(as_predicted()).splitlines() if "reserved" in line]
    assert rows == [["9,11-63", "reserved", "faults", "fault", "as", "predicted"]]


def every_cpu_differs(count: int) -> rec.Record:
    """As many groups as CPUs: observed, held first and judged each otherwise; every tenth kept STIBP from being set."""
    record = as_predicted()
    record.machine.online = record.walk.cpus = f"0-{count - 1}"  # type: ignore[union-attr]
    (judged,) = [entry for entry in record.verdicts if entry.model == record.judge]
    outcomes, verdicts, saved, restored = [], [], [], []
    for cpu in range(count):
        kept = 0x4 if cpu % 10 == 9 else 0x6
        odd = (cpu + 1) << 11
        outcomes.append(
            rec.ObservationEntry(
                cpus=str(cpu), outcomes=rec.Masks(retained=hex64(kept | odd), fault=hex64(ALL_BITS & ~(kept | odd)))
            )
        )
        refused = hex64(0x6 & ~kept)
        verdicts.append(rec.VerdictEntry(model=record.judge, cpus=str(cpu), unexpected_fault=refused))
        saved.append(rec.Saved(cpus=str(cpu), value=hex64(cpu)))
        state = "failed" if cpu == count - 1 else "verified"
        restored.append(rec.RestoreEntry(cpus=str(cpu), saved=hex64(cpu), reads=hex64(cpu), state=state))  # type: ignore[arg-type]
    record.observations, record.saved, record.restore = outcomes, saved, restored
    record.verdicts = [entry for entry in record.verdicts if entry is not judged] + verdicts
    record.predictions = [
        rec.PredictionEntry(**{**{name: getattr(entry, name) for name in entry.__struct_fields__}, "cpus": str(cpu)})
        for entry in record.predictions
        if entry.model == record.judge
        for cpu in range(count)
    ]
    record.findings = [
        rec.FindingEntry(kind="unexpected_fault", cpus=str(cpu), mask=hex64(0x2), text="bit 1 (STIBP): took #GP")
        for cpu in range(9, count, 10)
    ]
    return record


def test_a_mail_of_many_groups_shows_some_and_says_what_is_left_out() -> None:
    lines = mail_of(every_cpu_differs(400)).splitlines()
    assert len(lines) < 220
    heads = [line for line in lines if line.startswith("CPU ")]
    assert heads == [f"CPU {cpu}" for cpu in range(9, 80, 10)], "what is not as predicted comes first"
    assert "and 392 more groups of CPUs, 32 of them not as predicted: in the record" in lines
    assert "     and 20 more: in the record" in lines
    assert "restored   CPU 399: held 0x000000000000018f, reads 0x000000000000018f: NOT" in lines
    assert "and 392 more groups of CPUs, all verified by reading: in the record" in " ".join(" ".join(lines).split())


def test_a_report_of_many_groups_takes_time_in_proportion() -> None:
    def seconds(count: int) -> float:
        record = every_cpu_differs(count)
        started = time.process_time()
        assert text.render(record).count("model vendor") == count
        return time.process_time() - started

    assert seconds(1000) < 8 * 2 * min(seconds(125) for _ in range(3)), "eight times as many"


# --- hostile records ---

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "a\nb\r\nc",
    "tab\tand\x0bvertical\x0cform",
    "\x00\x01\x7f\x9b",
    "x" * 400,
    "word " * 60,
    " leading and trailing ",
    "\u202eright to left\u202c",
    "\u2028line\u2029paragraph\u0085next",
    "-" * 90,
    "1," * 90,
    "",
    " ",
]


def strings_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, str):
        return [path]
    if path[-1:] == ("leaves",):  # hundreds of strings of one pattern; see test_record
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in inner for found in strings_of(one, (*path, key))]


def put(document: Any, path: tuple[Any, ...], value: str) -> None:
    for step in path[:-1]:
        document = document[step]
    document[path[-1]] = value


@pytest.mark.parametrize("hostile", HOSTILE, ids=repr)
@pytest.mark.parametrize("name", ["july-2020-guest", "plan-only", "not-put-back"])
def test_no_string_of_a_record_breaks_the_report(name: str, hostile: str) -> None:
    """Every free string of a record, one after the other and then all at once."""
    raw = rec.encode(GOLDEN[name]())
    everywhere = json.loads(raw)
    free = 0
    for path in strings_of(json.loads(raw)):
        document = json.loads(raw)
        put(document, path, hostile)
        try:
            record = rec.decode(json.dumps(document).encode(), "x")
        except RecordError:
            continue
        free += 1
        put(everywhere, path, hostile)
        check_form(text.render(record))
    assert free > 25
    check_form(text.render(rec.decode(json.dumps(everywhere).encode(), "x")))


@pytest.mark.parametrize("seed", range(20))
def test_no_register_breaks_the_report(seed: int) -> None:
    draw = random.Random(seed)
    cpus = draw.choice([threadripper(24), sapphire_rapids(24), guest(threadripper(24))])
    registers = {
        cpu: FakeRegister(
            value=draw.choice([0, 0x1, 0x405]),
            valid=draw.getrandbits(64) | 0x405,
            dropped=draw.getrandbits(64) & draw.getrandbits(64) & ~0x405,
            absent=draw.random() < 0.1,
            offline=draw.random() < 0.1,
            refuses=draw.random() < 0.1,
        )
        for cpu in cpus
    }
    facts = dataclasses.replace(METAL, online=tuple(cpus))
    check_form(text.render(record_of(registers, cpus, facts, clear_bits=True, pairs=seed % 4 == 0)))


# --- predictions ---


def test_golden_prediction(golden: Golden) -> None:
    groups = prediction.grouped(threadripper(), registry.MODELS)
    report = prediction.as_text("cpuid -r", groups)
    check_form(report)
    golden("predict-threadripper-3970x.txt", report)
    golden("predict-threadripper-3970x.json", prediction.as_json("cpuid -r", groups))


def test_predictions_of_cpus_that_differ_are_grouped() -> None:
    cpus = {**threadripper(4), 3: without_ssbd(threadripper(4)[3])}
    document = json.loads(prediction.as_json("x", prediction.grouped(cpus, registry.MODELS)))
    assert [group["cpus"] for group in document["groups"]] == ["0-2", "3"]
    assert [group["models"]["vendor"]["accepts"] for group in document["groups"]] == [hex64(0x6), hex64(0x2)]
    assert set(document["groups"][0]["models"]) == set(registry.names())


def test_masks_of_a_prediction_cover_all_64_bits() -> None:
    for cpus in (threadripper(), sapphire_rapids(), guest(threadripper()), SKYLAKE):
        for group in json.loads(prediction.as_json("x", prediction.grouped(cpus, registry.MODELS)))["groups"]:
            for masks in group["models"].values():
                assert sum(int(masks[word], 16) for word in ("accepts", "faults", "either")) == ALL_BITS


@pytest.mark.parametrize("form", HOSTILE, ids=repr)
def test_no_form_of_a_dump_breaks_the_prediction(form: str) -> None:
    check_form(prediction.as_text(form, prediction.grouped(threadripper(), registry.MODELS)))


def test_no_brand_or_hypervisor_string_breaks_the_prediction() -> None:
    cpu = in_guest(threadripper()[0], "\x1b[31m\n")
    leaves = dict(cpu.leaves)
    for number in (0x80000002, 0x80000003, 0x80000004):
        leaves[Leaf(number, 0)] = leaves[Leaf(number, 0)]._replace(eax=0x1B5B1B5B, ebx=0x0A0D0A0D)
    check_form(prediction.as_text("x", prediction.grouped({0: Snapshot(leaves)}, registry.MODELS)))
    record = record_of({0: FakeRegister()}, MachineCpuid({0: Snapshot(leaves)}), GUEST)
    check_form(text.render(record))
