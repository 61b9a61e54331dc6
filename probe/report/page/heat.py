# SPDX-License-Identifier: MIT
"""The heat map of a record as data: rows of CPUs or guest CPUIDs, columns of bits, cells of outcome and verdict. Pure.

Bits that are alike in every row share a column. A cell is a state (one of STATES) and whether it is otherwise than the
judge says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec import UNSET

from probe import kvm_record
from probe import record as rec
from probe.cases import groups_of, judge_of, outcome_of, said_of
from probe.masks import ALL_BITS, format_bits, parse_hex64, told_cpus
from probe.models.matrix import Expected
from probe.nights import Row as NightRow
from probe.registers import SPEC_CTRL

# State -> (letter, what it says). Letters are told apart without colour.
STATES: Mapping[str, tuple[str, str]] = {
    "a": ("A", "accepted, reads back"),
    "d": ("D", "accepted, does not read back"),
    "f": ("F", "#GP, or refused"),
    "n": ("·", "not measured"),
    "o": ("?", "accepted, altered or unsteady"),
    "m": ("≈", "several of these: in the record"),
}
_MOST_RESERVED = 5  # columns; the classes beyond share one, whose cells may be mixed
_OF_OUTCOME = {"retained": "a", "dropped": "d", "fault": "f", "altered": "o", "unstable": "o"}


@dataclass(frozen=True)
class Column:
    """Bits that are alike in every row: a mask, its short head, and its name."""

    mask: int
    head: str
    name: str


@dataclass(frozen=True)
class Cell:
    """What one column did: a state, whether the judge says otherwise, and over how many columns it runs."""

    state: str
    wrong: bool
    span: int = 1


@dataclass(frozen=True)
class Row:
    """One row: names of its CPUs or guests, and for each question the cells of all columns.

    beside: in a question that the map does not show something is otherwise than the judge says. prediction is the
    number of the judge's prediction for these CPUs.
    """

    names: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    beside: bool = False
    prediction: int = 0

    @property
    def wrong(self) -> bool:
        """True if something is otherwise than the judge says."""
        return self.beside or any(cell.wrong for cells in self.cells for cell in cells)


@dataclass(frozen=True)
class Map:
    """A heat map; columns are those of each question."""

    questions: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    judge: str
    source: str = ""


# Name, cell of acceptance, cell of read-back.
_QUESTIONS = (
    ("guest write, first", "guest_first", "guest_first_seen"),
    ("guest write, after a host's", "guest_after", "guest_after_seen"),
    ("host write, first", "host_first", "host_first_kept"),
    ("host write, guest let through", "host_after", ""),
)
_Masks = tuple[int, int, int, int, int]  # accepted and kept, not kept, refused, odd, otherwise than the judge says
_Found = tuple[tuple[str, ...], tuple[_Masks, ...], bool, int]  # names, masks of each question, beside, prediction


def of_kvm(record: kvm_record.KvmRecord) -> Map:
    """Return the map of a matrix: rows of guest CPUIDs that gave the same, the largest first."""
    judge = judge_of(record)
    host = kvm_record.host_of(record)
    rows: dict[tuple[bool, tuple[_Masks, ...]], list[str]] = {}
    shown = {name for _, *names in _QUESTIONS for name in names}
    for row in kvm_record.rows_of(record):
        said = None if judge is None else said_of(judge, row.profile, host, row.opener)
        masks = tuple(_kvm_masks(row.masks, said, accept, kept) for _, accept, kept in _QUESTIONS)
        beside = said is not None and any(
            (mask ^ said.masks.get(name, 0)) & said.decided.get(name, 0)
            for name, mask in row.masks.items()
            if name not in shown
        )
        name = kvm_record.profile_name(row.profile)
        names = rows.setdefault((beside, masks), [])
        if name not in names:
            names.append(name)
    order = sorted(rows.items(), key=lambda item: -len(item[1]))
    questions = [question for question, *_ in _QUESTIONS]
    found = [(tuple(names), masks, beside, 0) for (beside, masks), names in order]
    return _map(questions, found, judge.name if judge else "", judge.source if judge else "")


def _kvm_masks(masks: Mapping[str, int], said: Expected | None, accept: str, kept: str) -> _Masks:
    if accept not in masks:
        return 0, 0, 0, 0, 0
    took = masks[accept]
    keeps = masks.get(kept, took) if kept else took
    wrong = 0
    for name in (accept, kept):
        if said is not None and name in masks:
            wrong |= (masks[name] ^ said.masks.get(name, 0)) & said.decided.get(name, 0)
    return took & keeps, took & ~keeps, ALL_BITS & ~took, 0, wrong


def of_run(record: rec.Record) -> Map:
    """Return the map of a run: a row for each group of CPUs that are alike in everything."""
    rows: list[_Found] = []
    numbers = {id(entry): number for number, entry in enumerate(record.predictions)}
    for group in groups_of(record):
        masks = dict.fromkeys(STATES, 0)
        if group.observation is not None and record.walk is not UNSET:
            for bit in range(64):
                masks[_OF_OUTCOME.get(outcome_of(group.observation, bit), "n")] |= 1 << bit
        verdict = group.verdict
        wrong = 0
        if verdict is not None:
            for name in ("unexpected_fault", "unexpected_accept", "not_retained"):
                wrong |= parse_hex64(getattr(verdict, name))
        each = (masks["a"], masks["d"], masks["f"], masks["o"], wrong)
        rows.append(((told_cpus(group.cpus),), (each,), False, numbers.get(id(group.prediction), 0)))
    return _map(["write"], rows, record.judge)


def of_night(rows: Sequence[NightRow]) -> Map:
    """Return the map of a lab's night: a row for each CPU model and microcode, more if its machines are not alike."""
    hosts: dict[tuple[str, _Masks], list[str]] = {}
    for row in rows:
        if row.lost or row.kind not in ("run", "kvm"):
            continue
        where = "KVM on " if row.kind == "kvm" else ""
        under = f" under {row.hypervisor}" if row.hypervisor else ""
        cpu = f"{where}{row.vendor} {row.family:02x}-{row.model:02x}-{row.stepping:02x} ucode {row.microcode}{under}"
        known = ~row.unmeasured
        dropped = row.accepts & ~row.retained & ~row.odd & known
        masks = (row.retained & row.accepts & known, dropped, row.faults & known, row.odd, row.wrong)
        names = hosts.setdefault((cpu, masks), [])
        if row.host not in names:
            names.append(row.host)
    found: list[_Found] = [
        ((f"{cpu}: {len(names)} machine{'' if len(names) == 1 else 's'}", *sorted(names)), (masks,), False, 0)
        for (cpu, masks), names in sorted(hosts.items())
    ]
    return _map(["write"], found, "its record's model")


def merged(map_: Map) -> Map:
    """Return the same with neighbours of one row that are alike in one cell."""

    def run(cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
        found: list[Cell] = []
        for cell in cells:
            if found and (found[-1].state, found[-1].wrong) == (cell.state, cell.wrong):
                found[-1] = Cell(cell.state, cell.wrong, found[-1].span + 1)
            else:
                found.append(cell)
        return tuple(found)

    return replace(map_, rows=tuple(replace(row, cells=tuple(run(cells) for cells in row.cells)) for row in map_.rows))


def _map(questions: Sequence[str], rows: Sequence[_Found], judge: str, source: str = "") -> Map:
    columns = tuple(_columns([masks for _, each, *_ in rows for masks in each]))
    found = tuple(
        Row(names, tuple(_cells(columns, masks) for masks in each), beside, prediction)
        for names, each, beside, prediction in rows
    )
    return Map(tuple(questions), columns, found, judge, source)


def _columns(every: Sequence[_Masks]) -> Iterator[Column]:
    """A column for each defined bit, and one for each class of reserved bits that nothing tells apart."""
    for bit in SPEC_CTRL.bits:
        yield Column(bit.mask, str(bit.bit), bit.name)
    classes = [SPEC_CTRL.reserved]
    for mask in {mask for masks in every for mask in masks}:
        classes = [part for each in classes for part in (each & mask, each & ~mask) if part]
        if len(classes) > _MOST_RESERVED:
            classes = [SPEC_CTRL.reserved]
            break
    for mask in sorted(classes, key=lambda mask: mask & -mask):
        told = format_bits(mask)
        yield Column(mask, told if len(told) < 8 else f"{told.split(',')[0]}…", f"reserved {told}")


def _cells(columns: Sequence[Column], masks: _Masks) -> tuple[Cell, ...]:
    kept, lost, refused, odd, wrong = masks
    states = (("a", kept), ("d", lost), ("f", refused), ("o", odd))
    cells = []
    for column in columns:
        found = [state for state, mask in states if mask & column.mask]
        tried = sum(mask for _, mask in states)
        if column.mask & ~tried:
            found.append("n")
        cells.append(Cell(found[0] if len(found) == 1 else "m", bool(wrong & column.mask)))
    return tuple(cells)
