# SPDX-License-Identifier: MIT
"""Guests that moved, as plain text of at most 75 columns: a program's, and the study of the thread of 2020."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from probe.masks import parse_hex64, told_bits
from probe.migration_record import ArrivalEntry, DepartureEntry, MigrationRecord, departed_of
from probe.models import machines
from probe.models.migration import BY_NAME as RULES
from probe.models.migration import Rule
from probe.models.moving import STUDY, STUDY_CPU, STUDY_TO, calculate_arrival, calculate_departure
from probe.models.policy import POLICIES, PolicyMachine
from probe.models.program import Answer, format_answer
from probe.report.layout import joined, paragraph

ALONE = "KVM alone"
NEWEST = "kvm-6.19-svm"  # the rule of KVM over which a policy is calculated where no machine says another


def render(records: Sequence[MigrationRecord]) -> str:
    """Return the report of one record, or of those of several kernels between which guests moved."""
    study = records[0].study
    rule = next((RULES[entry.rule] for record in records for entry in record.arrivals if entry.rule in RULES), None)
    lines: list[str] = []
    if study and all(departed_of(one).program == STUDY for record in records for one in record.departures):
        lines += paragraph(f"study {study}: a guest sets a bit that the mask of 2020 does not know (PSFD), and moves")
        lines += paragraph(str(STUDY), "  ", "    ")
        lines += paragraph(f"on the destination the same policy, or {STUDY_TO.name}")
    mark = "" if study else "# "  # a program's report is a program again
    if rule is not None:
        lines += paragraph(f"restored by the rule of {rule.title}", mark, mark)
    for record in records:
        lines += ["", *_measured(record, with_kernel=len(records) > 1)]
    if study and rule is not None:
        lines += ["", *_calculated(rule)]
    for record in records:
        lines += [line for told in (*record.complaints, *record.notes) for line in paragraph(told, mark, mark)]
    return joined(lines)


def _measured(record: MigrationRecord, *, with_kernel: bool) -> list[str]:
    hardware = record.hardware
    keeps = f"a guest let through keeps {_bits(hardware.keep)}" if hardware.let_through else "no guest was let through"
    register = f"KVM takes {_bits(hardware.tested)}, {keeps}" if hardware.exists else "no such register"
    lines: list[str] = []
    for kernel in dict.fromkeys(departure.kernel for departure in record.departures):
        lines += [""] if lines else []
        to = f" to {record.kernel.release}" if with_kernel or kernel != record.kernel.release else ""
        mark = "" if record.study else "# "
        lines += paragraph(f"measured, {kernel}{to} ({record.model}; {register})", mark, mark)
        pairs = [
            (departure, [entry for entry in record.arrivals if entry.departure == number])
            for number, departure in enumerate(record.departures)
            if departure.kernel == kernel
        ]
        if record.study:
            lines += [_head(), *(line for pair in pairs for line in _study_row(*pair)), *_verdict(pairs)]
        else:
            lines += [line for pair in pairs for line in _program(*pair)]
    return lines


def _bits(mask: str) -> str:
    return told_bits(parse_hex64(mask))


def _verdict(pairs: Sequence[tuple[DepartureEntry, Sequence[ArrivalEntry]]]) -> list[str]:
    """Say whether the models agreed, and what the mark means."""
    every = [entry for _, arrivals in pairs for entry in arrivals]
    wrong = sum(bool(entry.differs) for entry in every) + sum(bool(departure.differs) for departure, _ in pairs)
    told = f"NOT as the models say: {wrong}" if wrong else f"all {len(every)} outcomes as the models say"
    lines = paragraph(told, "  ", "  ")
    if any(departed_of(departure).gone for departure, _ in pairs):
        lines += paragraph(
            "* what it wrote was gone before it left: this register keeps nothing, and there was nothing to lose",
            "  ",
            "    ",
        )
    return lines


def _head() -> str:
    return f"  {'policy of the source':<26}{'its writes':<12}{'reads':<8}{'to the same':<13}{STUDY_TO.name}"


def _row(name: str, answers: Sequence[Answer | None], reads: int | None, outcomes: Sequence[str]) -> str:
    wrote = " ".join("?" if answer is None else format_answer(answer) for answer in answers)
    return (f"  {name:<26}{wrote:<12}{_hex(reads):<8}" + "".join(f"{word:<13}" for word in outcomes)).rstrip()


def _study_row(departure: DepartureEntry, arrivals: Sequence[ArrivalEntry]) -> list[str]:
    departed = departed_of(departure)
    gone = "*" if departed.gone else ""
    outcomes = [f"{entry.outcome}{gone}" for entry in arrivals]
    lines = [_row(departure.policy or ALONE, departed.answers, departed.reads, outcomes)]
    differs = [text for text in (departure.differs, *(entry.differs for entry in arrivals)) if text]
    return lines + [line for text in differs for line in paragraph(f"NOT AS CALCULATED: {text}", "    ", "    ")]


def _program(departure: DepartureEntry, arrivals: Sequence[ArrivalEntry]) -> list[str]:
    lines = [part.strip() for part in departure.program.split(";")]
    lines.append(f"# under {departure.policy or ALONE} the guest reads {_told(departure.reads)}")
    gone = departed_of(departure).gone
    if gone:
        were = "were" if gone & (gone - 1) else "was"
        lines += paragraph(f"NOTHING TO MOVE: {told_bits(gone)} that it wrote {were} gone before it left", "# ", "# ")
    if departure.differs:
        lines += paragraph(f"NOT AS CALCULATED: {departure.differs}", "# ", "# ")
    for entry in arrivals:
        sent = "nothing" if isinstance(entry.sent, UnsetType) else _told(entry.sent)
        where = f"under {entry.policy or ALONE}" + (f", CPUID {entry.profile}" if entry.profile else "")
        reads = "" if entry.outcome == "refused" else f", it reads {_told(entry.reads)}"
        lines += paragraph(f"sent: {sent}; {where}{reads}: {entry.outcome}", "# ", "# ")
        said = f"NOT AS CALCULATED: {entry.differs}" if entry.differs else "as the models say"
        lines += paragraph(said, "# ", "# ")
    return lines


def _told(mask: str | UnsetType) -> str:
    return "#GP" if mask is UNSET or isinstance(mask, UnsetType) else f"{parse_hex64(mask):#x}"


def _hex(value: int | None) -> str:
    return "#GP" if value is None else f"{value:#x}"


def _calculated(rule: Rule) -> list[str]:
    """Return the same for a CPU that has the bit and keeps it, from the models alone."""
    over = machines.get(NEWEST)
    to = PolicyMachine(STUDY_TO, over)
    lines = paragraph(f"calculated, on a CPU that has STIBP, SSBD and PSFD and keeps them ({STUDY_CPU.name}; {NEWEST})")
    lines.append(_head())
    for policy in (None, *POLICIES):
        machine = PolicyMachine(policy, over) if policy else over
        departed = calculate_departure(machine, STUDY, STUDY_CPU.host)
        outcomes = [calculate_arrival(departed, where, rule, STUDY_CPU.host).outcome for where in (machine, to)]
        lines.append(_row(policy.name if policy else ALONE, departed.answers, departed.reads, outcomes))
    return lines
