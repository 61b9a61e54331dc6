# SPDX-License-Identifier: MIT
"""Two runs: what the writes of each bit did on each CPU, and what was made of it.

CPUs are compared as ranges, so that a machine of a million of them costs no more than its groups.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import UnsetType

from probe import record as rec
from probe.diff.around import conditions
from probe.diff.moved import Comparison, Moved
from probe.masks import ALL_BITS, format_bits, parse_hex64, told_cpus
from probe.outcome import Outcome
from probe.verdict import KINDS

_DIFFER = "cpus_differ"
_OF_WRITES = ("unexpected_fault", "unexpected_accept", "not_retained", "incomplete", _DIFFER)
_NOT_TRIED = "not tried"
_WRITE = "write"
_ABSENT = "absent"
_TOGETHER = "all accepted bits together"
_PAIRS = "pairs"
_CLEARED = "clearing it"
_UNSTEADY = "bits that answered now so, now otherwise"
_FINDS = {  # what moved, and goes without saying again, by the kind of a finding
    "combination_refused": _TOGETHER,
    "combination_altered": _TOGETHER,
    "pair_refused": _PAIRS,
    "not_clearable": _CLEARED,
    "inconsistent": _UNSTEADY,
}


def compare(before: rec.Record, after: rec.Record) -> Comparison:
    """Compare two runs; CPUs that one of them alone has are said."""
    causes = _Causes()
    lines: dict[str, list[tuple[tuple[int, int], int]]] = {}
    seen = [_spans(record.observations) for record in (before, after)]
    for span, one, other in _both(*seen):
        for what, word, its, mask in _observations_moved(one, other):
            causes.add(what, word, its, mask, span)
            lines.setdefault(what, []).append((span, mask))
    for model in dict.fromkeys(entry.model for entry in (*before.predictions, *after.predictions)):
        said = [[entry for entry in record.predictions if entry.model == model] for record in (before, after)]
        if not said[0] or not said[1]:
            span = _spans(said[0] or said[1])[0][0]
            causes.add(f"model {model}", *(("not asked", "asked") if said[1] else ("asked", "not asked")), 0, span)
        for span, one, other in _both(_spans(said[0]), _spans(said[1])):
            for word, its, mask in _words_moved(one, other, ("accepts", "faults", "either")):
                causes.add(f"model {model} predicts", word, its, mask, span)
    for span, one, other in _both(_spans(before.restore), _spans(after.restore)):
        if one.state != other.state:
            causes.add("put back", one.state, other.state, 0, span)
    moved = causes.moved()
    moved += _findings_moved(before, after, lines)
    moved += _rules_moved(before, after)
    differing, alike = conditions(before, after)
    only = [_without(seen[at], seen[1 - at]) for at in (0, 1)]
    everywhere = _cpus(span for span, _, _ in _both(*seen)) if seen[0] and seen[1] else ""
    return Comparison("run", differing, alike, tuple(moved), only[0], only[1], everywhere)


# --- ranges of CPUs --------------------------------------------------------------------------------------------------


def _ranges(cpus: str) -> list[tuple[int, int]]:
    """Read a CPU list as ranges."""
    return [(int(low), int(high or low)) for low, high in re.findall(r"([0-9]+)(?:-([0-9]+))?", cpus)]


def _spans(entries: Iterable[Any]) -> list[tuple[tuple[int, int], Any]]:
    """Return the ranges of entries, each with its entry, in order."""
    found = [(span, entry) for entry in entries for span in _ranges(entry.cpus)]
    return sorted(found, key=lambda item: item[0])


def _both(
    one: Sequence[tuple[tuple[int, int], Any]], other: Sequence[tuple[tuple[int, int], Any]]
) -> Iterator[tuple[tuple[int, int], Any, Any]]:
    """Yield the ranges that both sides have, with the entry of each."""
    at = there = 0
    while at < len(one) and there < len(other):
        (low, high), mine = one[at]
        (its_low, its_high), theirs = other[there]
        if max(low, its_low) <= min(high, its_high):
            yield (max(low, its_low), min(high, its_high)), mine, theirs
        if high < its_high:
            at += 1
        else:
            there += 1


def _without(one: Sequence[tuple[tuple[int, int], Any]], other: Sequence[tuple[tuple[int, int], Any]]) -> str:
    """Return the CPUs of one side that the other does not have, in words; "" if there is none."""
    left: list[tuple[int, int]] = []
    for (low, high), _ in one:
        for (its_low, its_high), _ in other:
            if its_high < low or its_low > high:
                continue
            if its_low > low:
                left.append((low, its_low - 1))
            low = max(low, its_high + 1)
        if low <= high:
            left.append((low, high))
    return _cpus(left) if left else ""


def _cpus(spans: Iterable[tuple[int, int]]) -> str:
    """Write ranges as a CPU list; neighbours become one."""
    merged: list[list[int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    return told_cpus(",".join(str(low) if low == high else f"{low}-{high}" for low, high in merged))


class _Causes:
    """Collects changes; those that are alike but for where they happened become one."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str, int], list[tuple[int, int]]] = {}

    def add(self, what: str, before: str, after: str, bits: int, span: tuple[int, int]) -> None:
        self._found.setdefault((what, before, after, bits), []).append(span)

    def moved(self) -> list[Moved]:
        return [
            Moved(what, before, after, bits, _cpus(spans), sum(high - low + 1 for low, high in spans))
            for (what, before, after, bits), spans in self._found.items()
        ]


# --- what was seen ---------------------------------------------------------------------------------------------------


def _observations_moved(one: rec.ObservationEntry, other: rec.ObservationEntry) -> Iterator[tuple[str, str, str, int]]:
    """Yield (what, before, after, bits) of everything that two observations have."""
    wrote = absent = 0
    gone = one.absent_because != other.absent_because
    ended = [False, False]
    for word, its, mask in _outcomes_moved(one.outcomes, other.outcomes):
        wrote |= mask
        ended = [was or said in (_NOT_TRIED, Outcome.ABSENT.value) for was, said in zip(ended, (word, its))]
        if gone and Outcome.ABSENT.value in (word, its):
            absent |= mask
        else:
            yield _WRITE, word, its, mask
    cleared = [entry.cleared if not isinstance(entry.cleared, UnsetType) else rec.Masks() for entry in (one, other)]
    for word, its, mask in _outcomes_moved(cleared[0], cleared[1]):
        yield _CLEARED, word, its, mask
    together = [
        "not tried" if isinstance(entry.combined, UnsetType) else _together(entry.combined) for entry in (one, other)
    ]
    if together[0] != together[1] and not _together_follows(one, other, wrote, ended):
        yield _TOGETHER, together[0], together[1], 0
    pairs = [
        f"{len(entry.bad_pairs)} of {entry.pairs_tried} bad: {' '.join(entry.bad_pairs)}" for entry in (one, other)
    ]
    if pairs[0] != pairs[1] and not (any(ended) or (wrote and _pairs_follow(one, other))):
        yield _PAIRS, pairs[0].rstrip(": "), pairs[1].rstrip(": "), 0
    told = [format_bits(parse_hex64(entry.inconsistent)) for entry in (one, other)]
    if told[0] != told[1]:
        yield _UNSTEADY, told[0], told[1], 0
    if gone:
        yield _ABSENT, one.absent_because or "no", other.absent_because or "no", absent


def _together_follows(
    one: rec.ObservationEntry, other: rec.ObservationEntry, wrote: int, ended: Sequence[bool]
) -> bool:
    """Tell whether all accepted bits together did what the bits did alone, and differ in bits that moved.

    A walk that ended before them never tried them: ended says of both sides whether bits that moved tell of that.
    """
    values = []
    outcomes = set()
    for entry, early in zip((one, other), ended):
        combined = entry.combined
        if isinstance(combined, UnsetType):
            if early or _accepted(entry):
                return early
            values.append((0, 0))
            continue
        unsteady = combined.outcome == Outcome.UNSTABLE.value
        if not unsteady and combined.got != combined.expected:
            return False
        outcomes.add(unsteady)
        values.append((parse_hex64(combined.value), parse_hex64(combined.expected)))
    differ = values[0][0] ^ values[1][0] | values[0][1] ^ values[1][1]
    return len(outcomes) == 1 and bool(wrote) and not differ & ~wrote


def _pairs_follow(one: rec.ObservationEntry, other: rec.ObservationEntry) -> bool:
    """Tell whether every pair of accepted bits was tried both times, and no bad one came or went but with its bits."""
    accepted = [_accepted(entry) for entry in (one, other)]
    for entry, mask in zip((one, other), accepted):
        count = bin(mask).count("1")
        if entry.pairs_tried != count * (count - 1) // 2:
            return False
    bad = [{parse_hex64(pair) for pair in entry.bad_pairs} for entry in (one, other)]
    return bad[1] == {pair for pair in bad[0] if not pair & ~accepted[1]}


def _accepted(entry: rec.ObservationEntry) -> int:
    return rec.observation_of(entry.outcomes).accepted


def _together(entry: rec.CombinedEntry) -> str:
    got = "" if isinstance(entry.got, UnsetType) else f", read back {entry.got}"
    return f"{entry.value} {entry.outcome}, {entry.expected} expected{got}"


def _outcomes_moved(one: rec.Masks, other: rec.Masks) -> Iterator[tuple[str, str, int]]:
    """Yield the bits that had one outcome and have another; a bit that was not tried has one, too."""
    both = []
    for masks in (one, other):
        seen = rec.observation_of(masks)
        words = {word.value: int(getattr(seen, word.value)) for word in Outcome}
        words[_NOT_TRIED] = ALL_BITS & ~sum(words.values())
        both.append(words)
    yield from _pairs(both[0], both[1])


def _words_moved(one: Any, other: Any, words: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    masks = [{word: parse_hex64(getattr(entry, word)) for word in words} for entry in (one, other)]
    for each in masks:
        each["nothing"] = ALL_BITS & ~functools.reduce(operator.or_, each.values())
    yield from _pairs(masks[0], masks[1])


def _pairs(one: dict[str, int], other: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    for word, mine in one.items():
        for its, theirs in other.items():
            if word != its and mine & theirs:
                yield word, its, mine & theirs


def _findings_moved(
    before: rec.Record, after: rec.Record, lines: Mapping[str, Sequence[tuple[tuple[int, int], int]]]
) -> Iterator[Moved]:
    """Yield findings that came and went, but for what became of what moved: of that lines has CPUs and bits.

    How CPUs differ from each other follows from whatever moved on any of them.
    """
    wrote = [*lines.get(_WRITE, ()), *lines.get(_ABSENT, ())]
    anywhere = functools.reduce(operator.or_, (bits for _, bits in wrote), 0)
    for kind in (*KINDS, *sorted({entry.kind for entry in (*before.findings, *after.findings)} - set(KINDS))):
        found = [[entry for entry in record.findings if entry.kind == kind] for record in (before, after)]
        if not (found[0] or found[1]):
            continue
        if kind not in _OF_WRITES:
            yield from _whole_findings_moved(kind, found[0], found[1], lines.get(_FINDS.get(kind, ""), ()))
            continue
        causes = _Causes()
        sides = [[(span, parse_hex64(entry.mask)) for span, entry in _spans(entries)] for entries in found]
        for span, mine, theirs, moved in _pieces(*sides, wrote):
            follows = anywhere if kind == _DIFFER else moved
            if theirs & ~mine & ~follows:
                causes.add(f"finding {kind}", "none", "new", theirs & ~mine & ~follows, span)
            if mine & ~theirs & ~follows:
                causes.add(f"finding {kind}", "there", "gone", mine & ~theirs & ~follows, span)
        for one in causes.moved():
            anywhere |= one.bits
            yield one


def _whole_findings_moved(
    kind: str,
    before: Sequence[rec.FindingEntry],
    after: Sequence[rec.FindingEntry],
    told: Sequence[tuple[tuple[int, int], int]],
) -> Iterator[Moved]:
    """Yield findings of a kind that came and went as a whole; the same one on other CPUs is another.

    told has the CPUs of which another line says the same.
    """
    one, other = ({(entry.mask, entry.cpus) for entry in entries} for entries in (before, after))
    for mask, cpus in sorted(one ^ other):
        if not _without([(span, None) for span in sorted(_ranges(cpus))], sorted(told)):
            continue
        word = ("there", "gone") if (mask, cpus) in one else ("none", "new")
        count = sum(high - low + 1 for low, high in _ranges(cpus))
        yield Moved(f"finding {kind}", *word, parse_hex64(mask), told_cpus(cpus), count)


def _pieces(*sides: Sequence[tuple[tuple[int, int], int]]) -> Iterator[tuple[tuple[int, int], int, int, int]]:
    """Cut ranges of CPUs with masks, of three sides, where any of them begins or ends; yield each with what all say."""
    edges: dict[int, list[tuple[int, int, int]]] = {}
    for side, spans in enumerate(sides):
        for (low, high), mask in spans:
            edges.setdefault(low, []).append((side, mask, 1))
            edges.setdefault(high + 1, []).append((side, mask, -1))
    active: list[dict[int, int]] = [{}, {}, {}]
    start = 0
    for edge in sorted(edges):
        said = [functools.reduce(operator.or_, masks, 0) for masks in active]
        if any(said):
            yield (start, edge - 1), said[0], said[1], said[2]
        for side, mask, step in edges[edge]:
            left = active[side].pop(mask, 0) + step
            if left:
                active[side][mask] = left
        start = edge


def _rules_moved(before: rec.Record, after: rec.Record) -> list[Moved]:
    """Hypervisors' rules that fit, may, or are refuted, otherwise than before."""
    told = [{entry.model: entry.says for entry in record.hypervisor_rules} for record in (before, after)]
    groups: dict[tuple[str, str], list[str]] = {}
    for model in dict.fromkeys([*told[0], *told[1]]):
        words = (told[0].get(model, "not asked"), told[1].get(model, "not asked"))
        if words[0] != words[1]:
            groups.setdefault(words, []).append(model)
    return [Moved(f"hypervisor rules {', '.join(models)}", *words) for words, models in groups.items()]
