# SPDX-License-Identifier: MIT
"""A record as test cases with stable names, from which every export is made. Pure.

Names are made of letters, digits, "_" and "-", and do not change between versions. A bit that was not measured, or of
which no document says a thing, is a skip with its reason, never a pass.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from msgspec import UNSET, UnsetType

from probe import kvm_record, migration_record
from probe import record as rec
from probe.diff.moved import AnyRecord, kind_of
from probe.masks import ALL_BITS, format_bits, format_list, parse_hex64, parse_list
from probe.models import machines
from probe.models.machine import Host, Machine
from probe.models.matrix import BESIDE, CELLS, Cell, Expected, Measured, expected, expected_by_programs
from probe.models.policy import BY_NAME, PolicyMachine
from probe.models.profile import Profile
from probe.outcome import Outcome
from probe.registers import SPEC_CTRL


class Status(Enum):
    """How one case ended. ERROR: a register was not put back, or a policy did not decide."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"


@dataclass(frozen=True)
class Case:
    """One case: its stable name, how it ended, and why ("" for a plain pass)."""

    name: str
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Suite:
    """Cases of one subject: the CPUs that did alike, one guest CPUID, or the record as a whole."""

    name: str
    title: str
    cases: tuple[Case, ...]

    @property
    def status(self) -> Status:
        """The worst of its cases; SKIP if none did anything else."""
        return worst(case.status for case in self.cases)


@dataclass(frozen=True)
class Report:
    """One record as suites. name is the machine's, whatever kernel it runs; kind "run", "kvm" or "migration"."""

    name: str
    kind: str
    record: AnyRecord
    suites: tuple[Suite, ...]

    @property
    def status(self) -> Status:
        """The worst of its suites."""
        return worst(suite.status for suite in self.suites)

    def count(self, status: Status) -> int:
        """Return how many cases ended so."""
        return sum(case.status is status for suite in self.suites for case in suite.cases)


def worst(statuses: Iterator[Status]) -> Status:
    """Return the worst of some; SKIP of none."""
    seen = set(statuses)
    for status in (Status.ERROR, Status.FAIL, Status.PASS):
        if status in seen:
            return status
    return Status.SKIP


def word(text: str) -> str:
    """Make a name of any text."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "unnamed"


def cpus_word(cpus: str) -> str:
    """Make a name of a CPU list: 0-3,8 is 0-3_8."""
    return word(cpus.replace(",", "_"))


def reports_of(records: Sequence[AnyRecord], expect: Machine | None = None) -> list[Report]:
    """Turn records into reports. Those that have one name get their kernel's, then their time, then a number, too."""
    found = [report_of(record, expect) for record in records]
    more: tuple[Callable[[Report], str], ...] = (
        lambda report: report.record.kernel.release,
        lambda report: report.record.started,
    )
    for label in more:
        names = [(report.kind, report.name) for report in found]
        found = [
            replace(report, name=f"{report.name}-{word(label(report))}") if names.count(name) > 1 else report
            for report, name in zip(found, names)
        ]
    taken: set[tuple[str, str]] = set()
    for number, report in enumerate(found):
        name, count = report.name, 1
        while (report.kind, name) in taken:
            count += 1
            name = f"{report.name}_{count}"
        taken.add((report.kind, name))
        found[number] = replace(report, name=name)
    return found


def report_of(record: AnyRecord, expect: Machine | None = None) -> Report:
    """Turn a record of any kind into cases; a matrix is judged by the model that is expected, if one is."""
    machine = record.machine
    called = f"{record.identity}-" if record.identity else ""
    name = word(f"{called}{machine.vendor}-{machine.signature}")
    if isinstance(record, rec.Record):
        return Report(name, "run", record, tuple(_of_run(record)))
    if isinstance(record, kvm_record.KvmRecord):
        if not isinstance(record.policy, UnsetType):
            name += f"-{word(record.policy.name)}"
        return Report(name, "kvm", record, tuple(_of_kvm(record, expect)))
    return Report(name, "migration", record, tuple(_of_migration(record)))


# --- runs ------------------------------------------------------------------------------------------------------------


def bit_name(bit: int) -> str:
    """Return the name of a bit's case, such as bit01_stibp; of one that is not defined, bit09_reserved."""
    return f"bit{bit:02}_{SPEC_CTRL.name_of(bit).lower()}"


@dataclass(frozen=True)
class Group:
    """CPUs that were predicted, observed and judged alike, by the record's judge; None where there was no walk."""

    cpus: str
    prediction: rec.PredictionEntry | None
    observation: rec.ObservationEntry | None
    verdict: rec.VerdictEntry | None


def groups_of(record: rec.Record) -> list[Group]:
    """Split the CPUs of a run into groups that are alike in everything."""
    maps: list[dict[int, object]] = []
    entries: tuple[Sequence[object], ...] = (
        [entry for entry in record.predictions if entry.model == record.judge],
        record.observations,
        [entry for entry in record.verdicts if entry.model == record.judge],
    )
    for some in entries:
        maps.append({cpu: entry for entry in some for cpu in parse_list(entry.cpus)})  # type: ignore[attr-defined]
    found: dict[tuple[int, ...], tuple[list[int], tuple[object, ...]]] = {}
    for cpu in sorted(maps[1] or maps[0]):
        mine = tuple(each.get(cpu) for each in maps)
        found.setdefault(tuple(id(entry) for entry in mine), ([], mine))[0].append(cpu)
    return [Group(format_list(cpus), *mine) for cpus, mine in found.values()]  # type: ignore[arg-type]


def _of_run(record: rec.Record) -> Iterator[Suite]:
    for group in groups_of(record):
        cases = tuple(_bit(record, group, bit) for bit in range(64))
        yield Suite(f"cpus_{cpus_word(group.cpus)}", f"CPUs {group.cpus}, model {record.judge}", cases)
    if record.restore:
        states = {"verified": Status.PASS, "left": Status.ERROR, "failed": Status.ERROR}
        yield Suite(
            "restore",
            "registers put back, proved by reading",
            tuple(
                Case(
                    f"cpus_{cpus_word(entry.cpus)}",
                    states[entry.state],
                    "" if entry.state == "verified" else f"{entry.state}: held {entry.saved} before; {entry.note}",
                )
                for entry in record.restore
            ),
        )
    others = [_finding(entry) for entry in record.findings if entry.kind not in _TOLD_BY_BITS]
    if others:
        yield Suite("findings", "findings that no single bit tells", tuple(_worst_of_each(others)))


# Kinds of findings that the cases of the bits tell, and those of restore.
_TOLD_BY_BITS = {
    *("unexpected_fault", "unexpected_accept", "not_retained", "incomplete"),
    "not_restored",
    "not_verified",
}


def _finding(entry: rec.FindingEntry) -> Case:
    bits = parse_hex64(entry.mask)
    name = f"{entry.kind}_{cpus_word(entry.cpus)}" + (f"_{bits:#x}" if bits else "")
    return Case(word(name), Status.FAIL, entry.text)


def _worst_of_each(cases: Sequence[Case]) -> list[Case]:
    """Keep one case of each name, the worst."""
    order = (Status.ERROR, Status.FAIL, Status.PASS, Status.SKIP)
    found: dict[str, Case] = {}
    for case in cases:
        if case.name not in found or order.index(case.status) < order.index(found[case.name].status):
            found[case.name] = case
    return list(found.values())


def _bit(record: rec.Record, group: Group, bit: int) -> Case:
    name = bit_name(bit)
    if record.walk is UNSET:
        return Case(name, Status.SKIP, "plan only: nothing was written")
    verdict, seen = group.verdict, group.observation
    if verdict is None or seen is None:
        return Case(name, Status.SKIP, "not walked")
    outcome = outcome_of(seen, bit)
    for field, told in (
        ("unexpected_fault", "predicted to be accepted, the write took #GP"),
        ("unexpected_accept", f"predicted to take #GP, the write did not: {outcome}"),
        ("not_retained", f"accepted as predicted, and does not read back: {outcome}"),
    ):
        if parse_hex64(getattr(verdict, field)) >> bit & 1:
            return Case(name, Status.FAIL, told)
    if parse_hex64(verdict.not_measured) >> bit & 1:
        why = f" ({seen.absent_because})" if seen.absent_because and outcome == "absent" else ""
        return Case(name, Status.SKIP, f"not measured: {outcome}{why}")
    if group.prediction is None or parse_hex64(group.prediction.either) >> bit & 1:
        return Case(name, Status.SKIP, f"the documents leave it open: {outcome}")
    return Case(name, Status.PASS)


def outcome_of(seen: rec.ObservationEntry, bit: int) -> str:
    """Return what the write of one bit did, as a word; "not tried" if there was none."""
    for outcome in Outcome:
        if parse_hex64(getattr(seen.outcomes, outcome.value)) >> bit & 1:
            return outcome.value
    return "not tried"


# --- KVM -------------------------------------------------------------------------------------------------------------


def judge_of(record: kvm_record.KvmRecord) -> Machine | PolicyMachine | None:
    """Return the model that a matrix is judged by: the policy's own, that of the kernel's version (if it is refuted,
    too), the first that explains it, or the nearest; None if this tool does not know it (a policy of a file, a model of
    a newer version)."""
    known = {machine.name: machine for machine in machines.MACHINES}
    if not isinstance(record.policy, UnsetType):
        policy, over = BY_NAME.get(record.policy.name), known.get(record.policy.over)
        return PolicyMachine(policy, over) if policy and policy.source == record.policy.source and over else None
    names = [record.follows, kvm_record.standing_of(record), *record.explained_by, *(fit.model for fit in record.fits)]
    return known.get(next((name for name in names if name), ""))


def said_of(judge: Machine | PolicyMachine, profile: Profile, host: Host, opener: int) -> Expected:
    """Return what a model says of one row of a matrix; that it has said is kept."""
    return _said_of(judge, profile, host, opener)  # type: ignore[arg-type]  # every model is a frozen dataclass


@functools.lru_cache(maxsize=8192)
def _said_of(judge: Machine | PolicyMachine, profile: Profile, host: Host, opener: int) -> Expected:
    make: Callable[..., Expected] = expected_by_programs if isinstance(judge, PolicyMachine) else expected
    return make(judge, profile, host, opener)


def _of_kvm(record: kvm_record.KvmRecord, expect: Machine | None) -> Iterator[Suite]:
    yield Suite("kvm", "the kernel as a whole", tuple(_whole(record, expect)))
    judge = expect or judge_of(record)
    host = kvm_record.host_of(record)
    told: set[str] = set()
    for row in kvm_record.rows_of(record):
        name = kvm_record.profile_name(row.profile)
        if name in told:  # two named profiles may be one CPUID
            continue
        told.add(name)
        said = None if judge is None else said_of(judge, row.profile, host, row.opener)
        cells = tuple(_cell(cell, row, said, judge) for cell in (*CELLS, *BESIDE))
        yield Suite(f"profile_{word(name)}", f"guests with {name.replace(',', '+')}", cells)


def _whole(record: kvm_record.KvmRecord, expect: Machine | None) -> Iterator[Case]:
    if kvm_record.complaints(record):
        yield Case("policy_decides", Status.ERROR, "; ".join(kvm_record.complaints(record)))
    yield Case("explained", *_explained(record, expect))
    if record.explored:
        found = "; ".join(
            f"{entry.model}: {entry.divergence}, not {entry.model_says}"
            for entry in record.explored
            if entry.divergence
        )
        told = ", ".join(f"{entry.programs} on {entry.model}" for entry in record.explored)
        yield Case("programs", Status.FAIL if found else Status.PASS, found or told)
    driver = record.driver
    if isinstance(driver, UnsetType):
        yield Case("msr_driver", Status.SKIP, "not asked (kvm --write)")
    elif driver.error:
        yield Case("msr_driver", Status.SKIP, driver.error)
    elif parse_hex64(driver.unanswered) == ALL_BITS:
        yield Case("msr_driver", Status.SKIP, "no bit was answered")
    elif not kvm_record.tries_values(record):
        yield Case("msr_driver", Status.SKIP, "before v5.9 KVM has a mask of its own, which need not agree with it")
    else:
        differs = kvm_record.driver_differs(record)
        told = f"unlike KVM_SET_MSRS on bits {format_bits(differs)}" if differs else ""
        yield Case("msr_driver", Status.FAIL if differs else Status.PASS, told)


def _explained(record: kvm_record.KvmRecord, expect: Machine | None) -> tuple[Status, str]:
    """Tell whether the right model explains a matrix: the one that is expected, the policy's own, or that of the
    kernel's version; where no model stands for the version, any."""
    told = ", ".join(record.explained_by) or "no model"
    if expect is not None and expect.name not in record.explained_by:
        return Status.FAIL, f"by {told}, where {expect.name} was expected"
    own = "" if isinstance(record.policy, UnsetType) else f"{record.policy.name} over {record.policy.over}"
    standing = record.follows or kvm_record.standing_of(record)
    if expect is None and record.explained_by and standing and standing not in record.explained_by:
        return Status.FAIL, f"by {told}, and not by {standing}, which stands for this kernel's version"
    if own in record.explained_by if own else record.explained_by:
        return Status.PASS, "by " + (own or record.follows or told)
    first = record.fits[0].first if record.fits else UNSET
    differs = "" if isinstance(first, UnsetType) else f": {first.program} -> {first.kernel}, not {first.model}"
    nearest = record.fits[0].model if record.fits else "none"
    return Status.FAIL, f"no model explains every case; the nearest is {nearest}{differs}"


def _cell(cell: Cell, row: Measured, said: Expected | None, judge: Machine | PolicyMachine | None) -> Case:
    seen = row.masks.get(cell.name)
    if seen is None:
        return Case(cell.name, Status.SKIP, "not asked: nothing lets this guest through" if cell.after else "not asked")
    if said is None or judge is None:
        return Case(cell.name, Status.SKIP, "this tool does not know the model that it is judged by")
    known = said.decided.get(cell.name, 0) & (1 if cell.single else ALL_BITS)
    if not known:
        return Case(cell.name, Status.SKIP, f"{judge.name} does not say")
    wrong = (seen ^ said.masks.get(cell.name, 0)) & known
    if not wrong:
        return Case(cell.name, Status.PASS)
    told = "" if cell.single else f" on bits {format_bits(wrong)}"
    return Case(cell.name, Status.FAIL, f"{cell.title}: otherwise than {judge.name} says{told}")


# --- migrations ------------------------------------------------------------------------------------------------------


def _of_migration(record: migration_record.MigrationRecord) -> Iterator[Suite]:
    names: list[str] = []
    for number, departure in enumerate(record.departures):
        policy = word(departure.policy or "kvm")
        cases = [Case("departs", *_as_said(departure.differs))]
        for entry in record.arrivals:
            if entry.departure == number:
                to = word(f"{entry.policy or 'kvm'}-{entry.profile}".strip("-"))
                cases.append(Case(f"to_{to}_by_{word(entry.rule)}", *_as_said(entry.differs, entry.outcome)))
        cases = _worst_of_each(cases)  # the study's second destination may be the first
        title = f"guest of {departure.policy or 'KVM alone'}, from {departure.kernel}"
        name = f"from_{policy}_on_{word(departure.kernel)}"
        names.append(name)
        count = names.count(name)
        yield Suite(name if count == 1 else f"{name}_{count}", title, tuple(cases))


def _as_said(differs: str, outcome: str = "") -> tuple[Status, str]:
    if differs:
        return Status.FAIL, f"{outcome or 'it is otherwise'}; the model says: {differs}"
    return Status.PASS, outcome


def title_of(report: Report) -> str:
    """Say what a record is of, in one line: machine, kernel, kind."""
    machine = report.record.machine
    where = f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x}"
    return f"{kind_of(report.record)}, {where}, {report.record.kernel.release}"
