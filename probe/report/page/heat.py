# SPDX-License-Identifier: MIT
"""The heat map of a record as data: rows of CPUs or guest CPUIDs, columns of bits, cells of outcome and verdict. Pure.

Bits that are alike in every row share a column. A cell is two characters: a state (one of STATES) and a mark (MARKS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
from msgspec import UNSET

from probe import kvm_record
from probe import record as rec
from probe.cases import groups_of, judge_of, said_of
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
WRONG, OPEN, PLAIN = "!", "~", " "  # marks: otherwise than the judge says, left open by it, neither of them
_MOST_RESERVED = 5  # columns; the classes beyond share one, whose cells may be mixed
_OF_OUTCOME = {"retained": "a", "dropped": "d", "fault": "f", "altered": "o", "unstable": "o"}


@dataclass(frozen=True)
class Column:
    """Bits that are alike in every row: a mask, its short head, and its name."""

    mask: int
    head: str
    name: str


@dataclass(frozen=True)
class Row:
    """One row: names of its CPUs or guests, and for each question the cells of all columns, in two characters each.

    beside: in a question that the map does not show something is otherwise than the judge says. prediction is the
    number of the judge's prediction for these CPUs.
    """

    names: tuple[str, ...]
    cells: tuple[str, ...]
    beside: bool = False
    prediction: int = 0

    @property
    def wrong(self) -> bool:
        """True if something is otherwise than the judge says."""
        return self.beside or any(WRONG in cells for cells in self.cells)


@dataclass(frozen=True)
class Map:
    """A heat map; columns are those of each question.

    rule says in a line what the judge goes by, where it gives no reason for a single bit. open: cells that the judge
    leaves open are marked so; else that is not known.
    """

    questions: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    judge: str
    source: str = ""
    rule: str = ""
    open: bool = True


# Name, cell of acceptance, cell of read-back.
_QUESTIONS = (
    ("guest write, first", "guest_first", "guest_first_seen"),
    ("guest write, after a host's", "guest_after", "guest_after_seen"),
    ("host write, first", "host_first", "host_first_kept"),
    ("host write, guest let through", "host_after", ""),
)
# accepted and kept, not kept, refused, odd, otherwise than the judge says, left open by it
_Masks = tuple[int, int, int, int, int, int]
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
    columns, mapped = _mapped(found)
    if judge is None:
        return Map(tuple(questions), columns, mapped, "")
    return Map(tuple(questions), columns, mapped, judge.name, judge.source, judge.title)


def _kvm_masks(masks: Mapping[str, int], said: Expected | None, accept: str, kept: str) -> _Masks:
    if accept not in masks:
        return 0, 0, 0, 0, 0, 0
    took = masks[accept]
    keeps = masks.get(kept, took) if kept else took
    wrong = left = 0
    if said is not None:
        decided = said.decided.get(accept, 0)
        wrong = (took ^ said.masks.get(accept, 0)) & decided
        left = ALL_BITS & ~decided
        if kept in masks:
            decided = said.decided.get(kept, 0)
            wrong |= (masks[kept] ^ said.masks.get(kept, 0)) & decided
            left |= took & ~decided  # of what took #GP nothing is kept, whatever is said
    return took & keeps, took & ~keeps, ALL_BITS & ~took, 0, wrong, left & ~wrong


def of_run(record: rec.Record) -> Map:
    """Return the map of a run: a row for each group of CPUs that are alike in everything."""
    rows: list[_Found] = []
    numbers = numbered(record)
    for group in groups_of(record):
        masks = dict.fromkeys(STATES, 0)
        if group.observation is not None and record.walk is not UNSET:
            for outcome, state in _OF_OUTCOME.items():
                masks[state] |= parse_hex64(getattr(group.observation.outcomes, outcome))
        verdict, prediction = group.verdict, group.prediction
        wrong = 0
        if verdict is not None:
            for name in ("unexpected_fault", "unexpected_accept", "not_retained"):
                wrong |= parse_hex64(getattr(verdict, name))
        measured = masks["a"] | masks["d"] | masks["f"] | masks["o"]
        left = 0 if prediction is None else parse_hex64(prediction.either) & measured & ~wrong
        each = (masks["a"], masks["d"], masks["f"], masks["o"], wrong, left)
        rows.append(((told_cpus(group.cpus),), (each,), False, numbers.get(id(prediction), 0)))
    return Map(("write",), *_mapped(rows), record.judge)


def numbered(record: rec.Record) -> dict[int, int]:
    """Return a number for each prediction (by id); those that say the same for the same reasons share one."""
    found: dict[bytes, int] = {}
    return {
        id(entry): found.setdefault(msgspec.json.encode((entry.model, entry.reasons)), len(found))
        for entry in record.predictions
    }


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
        masks = (row.retained & row.accepts & known, dropped, row.faults & known, row.odd, row.wrong, 0)
        names = hosts.setdefault((cpu, masks), [])
        if row.host not in names:
            names.append(row.host)
    found: list[_Found] = [
        ((f"{cpu}: {len(names)} machine{'' if len(names) == 1 else 's'}", *sorted(names)), (masks,), False, 0)
        for (cpu, masks), names in sorted(hosts.items())
    ]
    return Map(("write",), *_mapped(found), "its record's model", open=False)


def _mapped(rows: Sequence[_Found]) -> tuple[tuple[Column, ...], tuple[Row, ...]]:
    columns = tuple(_columns([masks for _, each, *_ in rows for masks in each]))
    bits = tuple(column.mask for column in columns)
    found = (
        Row(names, tuple(_cells_of(bits, masks) for masks in each), beside, prediction)
        for names, each, beside, prediction in rows
    )
    return columns, tuple(found)


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


@lru_cache(maxsize=4096)
def _cells_of(bits: tuple[int, ...], masks: _Masks) -> str:
    kept, lost, refused, odd, wrong, left = masks
    nothing = ALL_BITS & ~(kept | lost | refused | odd)
    states = (("a", kept), ("f", refused), ("d", lost), ("n", nothing), ("o", odd))
    cells = []
    for bit in bits:
        cells.append(next((state for state, mask in states if mask & bit == bit), "m"))
        cells.append(WRONG if wrong & bit else OPEN if left & bit == bit else PLAIN)
    return "".join(cells)
