# SPDX-License-Identifier: MIT
"""Pairs of two sets in which the same moved, together; and what is around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from probe.diff.moved import Comparison, Condition, Moved
from probe.diff.sets import Pair

EVERYWHERE = "every CPU"


@dataclass(frozen=True)
class Cause:
    """What moved in one or several pairs.

    found is what they have in common: what moved, and what differs, or does not, around all of them; apart what differs
    around some, with these.
    """

    pairs: tuple[Pair, ...]
    found: Comparison
    apart: tuple[tuple[Condition, tuple[Pair, ...]], ...]


def causes(pairs: Sequence[Pair]) -> list[Cause]:
    """Group pairs that are not the same by what moved, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        found = pair.comparison
        if not found.same:
            key = (found.kind, _moved_anywhere(found), found.only_before, found.only_after)
            groups.setdefault(key, []).append(pair)
    return [_cause(tuple(group)) for group in groups.values()]


def shared(found: Sequence[Cause]) -> tuple[tuple[Condition, ...], tuple[str, ...]]:
    """Return what differs, and what does not, around every one of several causes."""
    first = found[0].found
    conditions = (one for one in first.conditions if all(one in cause.found.conditions for cause in found))
    return tuple(conditions), tuple(what for what in first.alike if all(what in cause.found.alike for cause in found))


def without(cause: Cause, conditions: Sequence[Condition], alike: Sequence[str]) -> Cause:
    """Leave out what is told elsewhere to be around it."""
    found = cause.found
    own = tuple(one for one in found.conditions if one not in conditions)
    return replace(
        cause, found=replace(found, conditions=own, alike=tuple(one for one in found.alike if one not in alike))
    )


def _moved_anywhere(found: Comparison) -> tuple[Moved, ...]:
    """Return what moved, with the CPUs of a machine called all, so that machines of more and of fewer are alike."""
    return tuple(
        replace(moved, where=EVERYWHERE, count=0) if found.everywhere and moved.where == found.everywhere else moved
        for moved in found.moved
    )


def _cause(pairs: tuple[Pair, ...]) -> Cause:
    first = pairs[0].comparison
    around: dict[Condition, list[Pair]] = {}
    for pair in pairs:
        for condition in pair.comparison.conditions:
            around.setdefault(condition, []).append(pair)
    common = tuple(condition for condition, those in around.items() if len(those) == len(pairs))
    apart = tuple((condition, tuple(those)) for condition, those in around.items() if len(those) < len(pairs))
    alike = tuple(what for what in first.alike if all(what in pair.comparison.alike for pair in pairs))
    moved = first.moved
    if any(pair.comparison.moved != moved for pair in pairs):
        moved = _moved_anywhere(first)
    return Cause(pairs, replace(first, conditions=common, alike=alike, moved=moved), apart)
