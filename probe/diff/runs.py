# SPDX-License-Identifier: MIT
"""Two runs: what the writes of each bit did on each CPU, and what was made of it.

CPUs are compared as ranges, so that a machine of a million of them costs no more than its groups.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from msgspec import UnsetType

from probe import record as rec
from probe.diff.around import conditions
from probe.diff.moved import Comparison, Moved
from probe.masks import ALL_BITS, format_bits, parse_hex64, told_cpus
from probe.outcome import Outcome
from probe.verdict import KINDS

_VERDICTS = ("unexpected_fault", "unexpected_accept", "not_retained")
_NOT_TRIED = "not tried"


def compare(before: rec.Record, after: rec.Record) -> Comparison:
    """Compare two runs; CPUs that one of them alone has are said."""
    causes = _Causes()
    seen = [_spans(record.observations) for record in (before, after)]
    for span, one, other in _both(*seen):
        for what, word, its, mask in _observations_moved(one, other):
            causes.add(what, word, its, mask, span)
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
    moved += [one for one in _findings_moved(before, after) if not _follows(one, moved)]
    moved += _rules_moved(before, after)
    differing, alike = conditions(before, after)
    only = [_without(seen[at], seen[1 - at]) for at in (0, 1)]
    return Comparison("run", differing, alike, tuple(moved), only[0], only[1])


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
    for word, its, mask in _outcomes_moved(one.outcomes, other.outcomes):
        yield "write", word, its, mask
    cleared = [entry.cleared if not isinstance(entry.cleared, UnsetType) else rec.Masks() for entry in (one, other)]
    for word, its, mask in _outcomes_moved(cleared[0], cleared[1]):
        yield "clearing it", word, its, mask
    together = [
        "not tried" if isinstance(entry.combined, UnsetType) else _together(entry.combined) for entry in (one, other)
    ]
    if together[0] != together[1]:
        yield "all accepted bits together", together[0], together[1], 0
    pairs = [
        f"{len(entry.bad_pairs)} of {entry.pairs_tried} bad: {' '.join(entry.bad_pairs)}" for entry in (one, other)
    ]
    if pairs[0] != pairs[1]:
        yield "pairs", pairs[0].rstrip(": "), pairs[1].rstrip(": "), 0
    told = [format_bits(parse_hex64(entry.inconsistent)) for entry in (one, other)]
    if told[0] != told[1]:
        yield "bits that answered now so, now otherwise", told[0], told[1], 0
    if one.absent_because != other.absent_because:
        yield "absent", one.absent_because or "no", other.absent_because or "no", 0


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


def _findings_moved(before: rec.Record, after: rec.Record) -> list[Moved]:
    """Findings that came and went; the same one on other CPUs is another."""

    def keys(record: rec.Record) -> dict[tuple[str, str, str], rec.FindingEntry]:
        return {(entry.kind, entry.mask, entry.cpus): entry for entry in record.findings}

    one, other = keys(before), keys(after)
    moved = []
    for key in sorted({*one, *other}, key=lambda key: (KINDS.index(key[0]) if key[0] in KINDS else 99, key)):
        if (key in one) != (key in other):
            kind, mask, cpus = key
            word = ("there", "gone") if key in one else ("none", "new")
            count = sum(high - low + 1 for low, high in _ranges(cpus))
            moved.append(Moved(f"finding {kind}", *word, parse_hex64(mask), told_cpus(cpus), count))
    return moved


def _follows(finding: Moved, moved: Sequence[Moved]) -> bool:
    """Tell whether a finding is what became of writes that moved, and needs no line of its own."""
    if finding.what.removeprefix("finding ") not in _VERDICTS:
        return False
    return any(
        one.what == "write" and one.bits & finding.bits == finding.bits and one.where == finding.where for one in moved
    )


def _rules_moved(before: rec.Record, after: rec.Record) -> list[Moved]:
    """Hypervisors' rules that fit, may, or are refuted, otherwise than before."""
    told = [{entry.model: entry.says for entry in record.hypervisor_rules} for record in (before, after)]
    groups: dict[tuple[str, str], list[str]] = {}
    for model in dict.fromkeys([*told[0], *told[1]]):
        words = (told[0].get(model, "not asked"), told[1].get(model, "not asked"))
        if words[0] != words[1]:
            groups.setdefault(words, []).append(model)
    return [Moved(f"hypervisor rules {', '.join(models)}", *words) for words, models in groups.items()]
