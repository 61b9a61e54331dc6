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
from probe.masks import ALL_BITS, format_list, mask_of, parse_hex64, parse_list, told_bits
from probe.models import machines
from probe.models.machine import Host, Machine
from probe.models.matrix import BESIDE, CELLS, Cell, Expected, Measured, expected, expected_by_programs
from probe.models.policy import BY_NAME, PolicyMachine
from probe.models.profile import Profile
from probe.outcome import Outcome
from probe.registers import SPEC_CTRL
from probe.verdict import KINDS


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
    """Cases of one subject: the bits, the CPUs, one guest CPUID, or the record as a whole.

    beside: it tells how the run went, nothing of what the register did.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    beside: bool = False

    @property
    def status(self) -> Status:
        """The worst of its cases; SKIP if none did anything else."""
        return worst(case.status for case in self.cases)


@dataclass(frozen=True)
class Report:
    """One record as suites. name is the machine's, whatever kernel it runs; kind "run", "kvm" or "migration"; sha256
    that of its file, in hexadecimal, "" if it has none."""

    name: str
    kind: str
    record: AnyRecord
    suites: tuple[Suite, ...]
    sha256: str = ""

    @property
    def status(self) -> Status:
        """The worst of its suites; SKIP if nothing was measured, however well the run went."""
        found = worst(suite.status for suite in self.suites)
        measured = worst(suite.status for suite in self.suites if not suite.beside)
        return measured if found is Status.PASS else found

    @property
    def told(self) -> tuple[str, ...]:
        """Why it failed, each reason once; what single CPUs did is among what the bits tell."""
        suites = [suite for suite in self.suites if suite.name != "cpus"]
        bad = (Status.FAIL, Status.ERROR)
        return tuple(dict.fromkeys(case.reason for suite in suites for case in suite.cases if case.status in bad))

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


def reports_of(
    records: Sequence[AnyRecord], expect: Machine | None = None, hashes: Sequence[str] | None = None
) -> list[Report]:
    """Turn records into reports; hashes are the SHA-256 of their files.

    Those that have one name get their kernel's, then their time, then a number, too.
    """
    found = [
        replace(report_of(record, expect), sha256=sha256)
        for record, sha256 in zip(records, hashes or [""] * len(records))
    ]
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


@functools.lru_cache(maxsize=64)
def bit_name(bit: int) -> str:
    """Return the name of a bit's case, such as bit01_stibp; of one that is not defined, bit09_reserved."""
    return f"bit{bit:02}_{SPEC_CTRL.name_of(bit).lower()}"


_BIT_NAMES = tuple(bit_name(bit) for bit in range(64))
_PASSED = tuple(Case(name, Status.PASS) for name in _BIT_NAMES)


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


MOST_CPUS = 4096  # with a case for each
_MOST_TOLD = 16  # groups of CPUs, or findings, in one reason
_LONGEST_LIST = 60
# Of several CPUs: what was not measured on one of them is no pass.
_ORDER = (Status.ERROR, Status.FAIL, Status.SKIP, Status.PASS)
_PLAN_ONLY = "plan only: nothing was written"
_NO_ANSWER = "no bit was answered"
_NOT_TRIED = "not tried"

# Kinds of findings that the cases of the bits tell, and those of restore.
TOLD_BY_BITS = ("unexpected_fault", "unexpected_accept", "not_retained")
TOLD_BY_RESTORE = ("not_restored", "not_verified")


@dataclass(frozen=True)
class _Judged:
    """CPUs that did alike, and how a case of theirs, or each bit's, ended."""

    group: Group
    cpus: tuple[int, ...]
    bits: tuple[Case, ...]


def _of_run(record: rec.Record) -> Iterator[Suite]:
    judged = [_Judged(group, parse_list(group.cpus), _bits(record, group)) for group in groups_of(record)]
    presence = [(one.cpus, *_presence(record, one.group)) for one in judged]
    yield Suite("register", "whether the register is there", (_on_all("as_enumerated", presence),))
    bits = (
        _on_all(bit_name(bit), [(one.cpus, one.bits[bit].status, one.bits[bit].reason) for one in judged])
        for bit in range(64)
    )
    yield Suite("bits", f"each bit, on every CPU; model {record.judge}", tuple(bits))
    yield Suite("cpus", f"each CPU, with every bit; model {record.judge}", tuple(_cpus(record, judged)))
    yield Suite("restore", "registers put back, proved by reading", (_put_back(record),), beside=True)
    kinds = [kind for kind in KINDS if kind not in (*TOLD_BY_BITS, *TOLD_BY_RESTORE)]
    kinds += [entry.kind for entry in record.findings if entry.kind not in KINDS]  # of a newer version
    findings = (_finding(record, kind, judged) for kind in dict.fromkeys(kinds))
    yield Suite("findings", "what no single bit tells", tuple(_worst_of_each(list(findings))), beside=True)


def _on_all(name: str, found: Sequence[tuple[tuple[int, ...], Status, str]]) -> Case:
    """Make one case of what some CPUs did: the worst, and on which of them if not on all."""
    status = min((status for _, status, _ in found), key=_ORDER.index, default=Status.SKIP)
    told: dict[str, list[tuple[int, ...]]] = {}
    for cpus, each, reason in found:
        if each is status:
            told.setdefault(reason, []).append(cpus)
    if not found:
        return Case(name, status, "no CPU was walked")
    if len(told) == 1 and len(next(iter(told.values()))) == len(found):
        return Case(name, status, next(iter(told)))
    where = [f"{_where([cpu for some in cpus for cpu in some])}: {reason}" for reason, cpus in told.items() if reason]
    return Case(name, status, _joined(where))


def _joined(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - _MOST_TOLD} more"] if len(texts) > _MOST_TOLD else []
    return "; ".join([*texts[:_MOST_TOLD], *more])


def _where(cpus: Sequence[int]) -> str:
    """Name CPUs; of a list that is long how many, and the first: each has a case of its own."""
    listed = format_list(cpus)
    if len(listed) > _LONGEST_LIST:
        return f"{len(cpus)} CPUs, the first is {min(cpus)}"
    return f"CPU{'' if len(cpus) == 1 else 's'} {listed}"


def _presence(record: rec.Record, group: Group) -> tuple[Status, str]:
    """Tell whether the register is there where CPUID says so, and only there."""
    if record.walk is UNSET:
        return Status.SKIP, _PLAN_ONLY
    if group.verdict is None or group.observation is None or group.prediction is None:
        return Status.SKIP, "not walked"
    exists = group.prediction.exists
    if _without_register(group):
        why = group.observation.absent_because
        return (Status.FAIL, f"CPUID enumerates it: {why}") if exists else (Status.PASS, f"as CPUID says: {why}")
    if parse_hex64(group.verdict.not_measured) == ALL_BITS:
        return Status.SKIP, _NO_ANSWER
    return (Status.PASS, "") if exists else (Status.SKIP, "RDMSR is answered, and CPUID enumerates no bit of it")


def _without_register(group: Group) -> int:
    """Return the mask of the bits that were not tried because RDMSR took #GP, which is an answer; else 0."""
    if group.verdict is None or group.observation is None:
        return 0
    outcomes = group.observation.outcomes
    if any(parse_hex64(getattr(outcomes, outcome.value)) for outcome in Outcome if outcome is not Outcome.ABSENT):
        return 0
    return parse_hex64(outcomes.absent) & ~parse_hex64(group.verdict.not_measured)


def _cpus(record: rec.Record, judged: Sequence[_Judged]) -> Iterator[Case]:
    found = [(one.cpus, *_of_group(record, one)) for one in judged]
    count = sum(len(one.cpus) for one in judged)
    if count > MOST_CPUS:
        case = _on_all("every_cpu", found)
        told = f"{count} CPUs, more than {MOST_CPUS:,}: no case for each"
        yield replace(case, reason=f"{told}; {case.reason}" if case.reason else told)
        return
    cases = {cpu: (status, reason) for cpus, status, reason in found for cpu in cpus}
    for cpu, (status, reason) in sorted(cases.items()):
        yield Case(f"cpu_{cpu}", status, reason)


def _of_group(record: rec.Record, one: _Judged) -> tuple[Status, str]:
    """Tell how every CPU of a group did: it passes if each bit that was to be tried has an answer, the right one."""
    ended = {status: mask_of(bit for bit in range(64) if one.bits[bit].status is status) for status in Status}
    if ended[Status.FAIL]:
        return Status.FAIL, f"otherwise than predicted: {told_bits(ended[Status.FAIL])}"
    verdict, walk = one.group.verdict, record.walk
    if not ended[Status.PASS] or verdict is None or isinstance(walk, UnsetType):
        return Status.SKIP, one.bits[0].reason
    lacking = mask_of(parse_list(walk.bits)) & parse_hex64(verdict.not_measured)
    if lacking:
        return Status.SKIP, f"no answer: {told_bits(lacking)}"
    left = ended[Status.SKIP]
    return Status.PASS, f"not judged: {told_bits(left)}" if left else ""


def _put_back(record: rec.Record) -> Case:
    told = [
        f"CPUs {entry.cpus}: {entry.state}: held {entry.saved} before; {entry.note}"
        for entry in record.restore
        if entry.state != "verified"
    ]
    told = told or [entry.text for entry in record.findings if entry.kind in TOLD_BY_RESTORE]
    if told:
        return Case("put_back", Status.ERROR, _joined(told))
    return Case("put_back", Status.PASS) if record.restore else Case("put_back", Status.SKIP, "nothing was written")


def _finding(record: rec.Record, kind: str, judged: Sequence[_Judged]) -> Case:
    told = [f"{_where(parse_list(entry.cpus))}: {entry.text}" for entry in record.findings if entry.kind == kind]
    if told:
        return Case(word(kind), Status.FAIL, _joined(told))
    why = _not_looked_for(record, kind, judged)
    return Case(word(kind), Status.SKIP if why else Status.PASS, why)


def _not_looked_for(record: rec.Record, kind: str, judged: Sequence[_Judged]) -> str:
    """Tell why a run could not find something; "" if it could."""
    if kind == "cpuid_cross_check":
        return "" if record.cpuid.cross_check == "equal" else f"CPUID was not cross-checked: {record.cpuid.cross_check}"
    walk = record.walk
    if kind == "cpuid_differs":
        return ""
    if isinstance(walk, UnsetType):
        return _PLAN_ONLY
    written = [one for one in judged if one.group.verdict and not _without_register(one.group)]
    if all(parse_hex64(one.group.verdict.not_measured) == ALL_BITS for one in written if one.group.verdict):
        return _NO_ANSWER
    asked = {
        "inconsistent": (walk.repeat > 1, "one walk only (--repeat)"),
        "not_clearable": (walk.clear_bits, "not asked (--clear-bits)"),
        "pair_refused": (walk.pairs, "not asked (--pairs)"),
        "cpus_differ": (sum(len(one.cpus) for one in written) > 1, "one CPU only"),
    }
    if kind.startswith("combination_") and all(entry.combined is UNSET for entry in record.observations):
        return "no bits were written together"
    done, why = asked.get(kind, (True, ""))
    return "" if done else why


def _worst_of_each(cases: Sequence[Case]) -> list[Case]:
    """Keep one case of each name, the worst."""
    order = (Status.ERROR, Status.FAIL, Status.PASS, Status.SKIP)
    found: dict[str, Case] = {}
    for case in cases:
        if case.name not in found or order.index(case.status) < order.index(found[case.name].status):
            found[case.name] = case
    return list(found.values())


def _bits(record: rec.Record, group: Group) -> tuple[Case, ...]:
    """Return how each bit ended on a group's CPUs."""
    verdict, seen = group.verdict, group.observation
    if record.walk is UNSET or verdict is None or seen is None:
        why = _PLAN_ONLY if record.walk is UNSET else "not walked"
        return tuple(Case(bit_name(bit), Status.SKIP, why) for bit in range(64))
    outcomes = {outcome.value: parse_hex64(getattr(seen.outcomes, outcome.value)) for outcome in Outcome}
    absent, because = _without_register(group), seen.absent_because
    fault = parse_hex64(verdict.unexpected_fault)
    either = ALL_BITS if group.prediction is None else parse_hex64(group.prediction.either)
    gone = f" ({because})" if because else ""
    rules = (  # the first that has the bit tells; with the outcome or without, and what follows it
        (fault & absent, Status.FAIL, f"predicted to be accepted, {because}", False, ""),
        (fault, Status.FAIL, "predicted to be accepted, the write took #GP", False, ""),
        (parse_hex64(verdict.unexpected_accept), Status.FAIL, "predicted to take #GP, the write did not: ", True, ""),
        (parse_hex64(verdict.not_retained), Status.FAIL, "accepted as predicted, and does not read back: ", True, ""),
        (absent, Status.SKIP, f"not tried: {because}", False, ""),
        (outcomes["absent"], Status.SKIP, "not measured: ", True, gone),
        (parse_hex64(verdict.not_measured), Status.SKIP, "not measured: ", True, ""),
        (either, Status.SKIP, "the documents leave it open: ", True, ""),
    )
    cases = []
    for bit in range(64):
        found = next((rule[1:] for rule in rules if rule[0] >> bit & 1), None)
        if found is None:
            cases.append(_PASSED[bit])
            continue
        status, told, tells, end = found
        outcome = next((name for name, mask in outcomes.items() if mask >> bit & 1), _NOT_TRIED) if tells else ""
        cases.append(Case(_BIT_NAMES[bit], status, f"{told}{outcome}{end}"))
    return tuple(cases)


def outcome_of(seen: rec.ObservationEntry, bit: int) -> str:
    """Return what the write of one bit did, as a word; "not tried" if there was none."""
    for outcome in Outcome:
        if parse_hex64(getattr(seen.outcomes, outcome.value)) >> bit & 1:
            return outcome.value
    return _NOT_TRIED


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
    if not isinstance(record.policy, UnsetType):
        told = "; ".join(kvm_record.complaints(record))
        yield Case("policy_decides", Status.ERROR if told else Status.PASS, told)
    yield Case("explained", *_explained(record, expect))
    if record.explored:
        found = "; ".join(
            f"{entry.model}: {entry.divergence}, not {entry.model_says}"
            for entry in record.explored
            if entry.divergence
        )
        told = ", ".join(f"{entry.programs} on {entry.model}" for entry in record.explored)
        yield Case("programs", Status.FAIL if found else Status.PASS, found or told)
    else:
        yield Case("programs", Status.SKIP, "no random programs were run (kvm --programs)")
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
        told = f"unlike KVM_SET_MSRS on {told_bits(differs)}" if differs else ""
        yield Case("msr_driver", Status.FAIL if differs else Status.PASS, told)


def _explained(record: kvm_record.KvmRecord, expect: Machine | None) -> tuple[Status, str]:
    """Tell whether the right model explains a matrix: the one that is expected, the policy's own, or that of the
    kernel's version; where no model stands for the version, any."""
    told = ", ".join(record.explained_by) or "no model"
    if expect is not None and expect.name not in record.explained_by:
        return Status.FAIL, f"by {told}, where {expect.name} was expected"
    own = "" if isinstance(record.policy, UnsetType) else f"{record.policy.name} over {record.policy.over}"
    refuted = kvm_record.refuted(record)
    if expect is None and record.explained_by and refuted:
        return Status.FAIL, f"by {told}, and not by {refuted}, which stands for this kernel's version"
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
    told = "" if cell.single else f" on {told_bits(wrong)}"
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
