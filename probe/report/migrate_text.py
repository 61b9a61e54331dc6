# SPDX-License-Identifier: MIT
"""Migrations as plain text of at most 75 columns: one pair under every VMM's rule, or a pool as a matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence

from probe.masks import format_bits, hex64
from probe.models.migration import RULES, Move, Rule
from probe.models.profile import Profile
from probe.pool import ANY, Group, Place, comparable, features_of, held_without, in_common, mended, move, pairs
from probe.registers import SPEC_CTRL
from probe.report.layout import WIDTH, clean, joined, paragraph

_MARKS = {"works": ".", "lost": "l", "refused": "R", "": "?"}


def pair(source: Place, target: Place, rules: Sequence[Rule] = RULES) -> str:
    """Return what becomes of guests that go from one machine to the other, by each of the rules."""
    lines = [
        *paragraph(f"from  {clean(source.name)}", "", "      "),
        *paragraph(clean(source.what), "      ", "      "),
    ]
    lines += [
        *paragraph(f"to    {clean(target.name)}", "", "      "),
        *paragraph(clean(target.what), "      ", "      "),
    ]
    lines += _mask("a guest may hold", source.holds)
    count = len(pairs(source, target))
    lines += paragraph(f"compared for {count} guest CPUID{'s' if count > 1 else ''}", "      ", "      ")
    lines.append("")
    for rule in rules:
        done = move(rule, source, target)
        lines += paragraph(_told(done), f"  {rule.name:<18}", " " * 20)
    return joined(lines)


def _place(word: str, place: Place) -> list[str]:
    return [*paragraph(clean(place.name), f"{word:<6}", " " * 6), *paragraph(clean(place.what), " " * 6, " " * 6)]


def _mask(title: str, mask: int) -> list[str]:
    return [f"      {title:<22}{hex64(mask)}  bits {_bits(mask)}"]


def _bits(mask: int) -> str:
    text = format_bits(mask)
    return text if len(text) < 20 else f"{bin(mask).count('1')} of 64"


def _told(done: Move) -> str:
    if done.refuses_all:
        return "refused, whatever the value"
    parts = []
    if done.refused:
        one = "" if done.refused & (done.refused - 1) == 0 else "one of "
        parts.append(f"refused if it holds {one}{_named(done.refused)}")
    if done.lost:
        parts.append(f"lost without a word: {_named(done.lost)}")
    return "; ".join(parts) or "works"


def _named(mask: int) -> str:
    names = SPEC_CTRL.describe(mask & SPEC_CTRL.defined)
    rest = mask & ~SPEC_CTRL.defined
    return (
        f"bit{'' if names.split()[0].isdigit() else 's'} {names}"
        + (f" and reserved {format_bits(rest)}" if rest else "")
        if mask & SPEC_CTRL.defined
        else (f"reserved bits {format_bits(rest)}")
    )


def left_out(count: int) -> str:
    """Say that a folder held files that are no records of machines."""
    return joined(paragraph(f"{count} files of this folder were LEFT OUT, as said on standard error"))


def matrix(groups: Sequence[Group], rule: Rule) -> str:
    """Return a pool under one rule: from (row) to (column); and what would make it safe."""
    count = sum(len(group.places) for group in groups)
    lines = paragraph(f"{count} records, {len(groups)} kinds of machine, rule {rule.name}: {rule.title}")
    profiles = in_common([group.first for group in groups])
    if profiles != [ANY]:
        lines += paragraph(f"all know {len(profiles)} guest CPUIDs; two are compared for those that both know")
    lines.append("")
    for number, group in enumerate(groups, 1):
        more = f" and {len(group.places) - 1} more" if len(group.places) > 1 else ""
        lines += paragraph(f"{clean(group.first.name)}{more}: {clean(group.first.what)}", f"{number:>4}  ", "      ")
        lines += paragraph(f"a guest may hold bits {_bits(group.first.holds)}", "      ", "      ")
    lines.append("")
    width = 2 if len(groups) < 10 else 3 if len(groups) < 100 else 4
    room = (WIDTH - 7) // width
    for start in range(0, len(groups), room):
        shown = groups[start : start + room]
        lines.append("from\\to" + "".join(f"{number:>{width}}" for number in range(start + 1, start + len(shown) + 1)))
        for number, source in enumerate(groups, 1):
            marks = [_MARKS[_word(rule, source.first, target.first)] for target in shown]
            lines.append(f"{number:>7}" + "".join(f"{mark:>{width}}" for mark in marks))
    lines.append("        . works   l lost without a word   R refused   ? no guest CPUID in common")
    lines += ["", *_mended([group.first for group in groups], broken=breaks(groups, rule))]
    return joined(lines)


def _word(rule: Rule, source: Place, target: Place) -> str:
    """Say what becomes of a move; "" if there is no guest that both know."""
    return move(rule, source, target).word if comparable(source, target) else ""


def breaks(groups: Sequence[Group], rule: Rule) -> bool:
    """Tell whether some move between two kinds of machine breaks."""
    return any(
        _word(rule, source.first, target.first) not in ("works", "")
        for source in groups
        for target in groups
        if source is not target or len(source.places) > 1
    )


def as_json(groups: Sequence[Group]) -> str:
    """Return every kind of machine, and every move between two under every rule, as JSON text."""
    document: dict[str, object] = {
        "kinds": [
            {
                "records": [place.name for place in group.places],
                "machine": group.first.what,
                "holds": hex64(group.first.holds),
            }
            for group in groups
        ],
        "moves": [
            {
                "from": number,
                "to": other,
                "rule": rule.name,
                "outcome": done.word,
                "refused": hex64(done.refused),
                "lost": hex64(done.lost),
                "refuses_every_value": done.refuses_all,
                "profiles": len(pairs(source.first, target.first)),
            }
            for number, source in enumerate(groups)
            for other, target in enumerate(groups)
            if (source is not target or len(source.places) > 1) and comparable(source.first, target.first)
            for rule in RULES
            for done in [move(rule, source.first, target.first)]
        ],
    }
    found = mended([group.first for group in groups])
    if found is not None:  # missing means that it cannot be told
        document["pool"] = {
            "keeps": hex64(found.keeps),
            "hide": str(Profile(found.hide)).split(",") if found.hide else [],
            "hide_for_every_guest": str(Profile(found.closes)).split(",") if found.closes else [],
        }
    return json.dumps(document, indent=2) + "\n"


def _mended(places: Sequence[Place], *, broken: bool) -> list[str]:
    found = mended(places)
    if found is None:
        why = (
            "these machines keep nothing of what they take (emulated ones do), so that a loss says nothing of hardware"
            if in_common(places)
            else "no guest CPUID was measured on all of them"
        )
        return paragraph(f"what would make this pool safe cannot be told: {why}")
    lines = paragraph(f"every machine takes and keeps: {_named(found.keeps) if found.keeps else 'none of the bits'}")
    if not found.hide and not found.closes:
        told = "moves break all the same, as above" if broken else "no guest needs another CPUID: the pool is safe"
        return [*lines, told]
    if found.hide:
        lines += paragraph(
            f"leave out of guests' CPUID: {features_of(found.hide)}; then guests are safe that set only what their "
            "CPUID enumerates"
        )
    else:
        lines += paragraph("safe as it is for guests that set only what their CPUID enumerates")
    if found.closes:
        hole = held_without(places)
        lines += paragraph(
            "for guests that set what they like, no CPUID makes it safe: one without any of these bits may hold "
            f"{_named(hole)}"
            if hole
            else "for guests that set what they like, hide the register: leave out all of "
            f"{features_of(found.closes)}, too"
        )
    return lines
