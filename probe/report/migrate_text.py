# SPDX-License-Identifier: MIT
"""Migrations as plain text of at most 75 columns: one pair under every VMM's rule, or a pool as a matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence

from probe.masks import format_bits, hex64
from probe.models.migration import RULES, Mend, Move, Rule
from probe.models.profile import Profile
from probe.pool import ANY, Group, Place, features_of, in_common, mended, move, pairs
from probe.registers import SPEC_CTRL
from probe.report.layout import clean, joined, paragraph

_MARKS = {"works": ".", "lost": "l", "refused": "R"}


def pair(source: Place, target: Place) -> str:
    """Return what becomes of guests that go from one machine to the other."""
    lines = [
        *paragraph(f"from  {clean(source.name)}", "", "      "),
        *paragraph(clean(source.what), "      ", "      "),
    ]
    lines += [
        *paragraph(f"to    {clean(target.name)}", "", "      "),
        *paragraph(clean(target.what), "      ", "      "),
    ]
    lines += _mask("a guest may hold", source.holds)
    lines += paragraph(f"compared for {len(pairs(source, target))} guest CPUIDs", "      ", "      ")
    lines.append("")
    for rule in RULES:
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
        parts.append(f"refused if it holds one of {_named(done.refused)}")
    if done.lost:
        parts.append(f"lost without a word: {_named(done.lost)}")
    return "; ".join(parts) or "works"


def _named(mask: int) -> str:
    names = SPEC_CTRL.describe(mask & SPEC_CTRL.defined)
    rest = mask & ~SPEC_CTRL.defined
    return (
        f"bits {names}" + (f" and reserved {format_bits(rest)}" if rest else "")
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
    width = 2 if len(groups) < 10 else 3
    shown = groups[:22]
    lines.append("from\\to" + "".join(f"{number:>{width}}" for number in range(1, len(shown) + 1)))
    for number, source in enumerate(groups, 1):
        marks = [_MARKS[move(rule, source.first, target.first).word] for target in shown]
        lines.append(f"{number:>7}" + "".join(f"{mark:>{width}}" for mark in marks))
    lines.append("        . works   l lost without a word   R refused")
    if len(groups) > len(shown):
        lines.append(f"        columns of the first {len(shown)} kinds; --json has all")
    lines += ["", *_mended(mended([group.first for group in groups]))]
    return joined(lines)


def breaks(groups: Sequence[Group], rule: Rule) -> bool:
    """Tell whether some move between two kinds of machine breaks."""
    return any(
        move(rule, source.first, target.first).word != "works"
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
            if source is not target or len(source.places) > 1
            for rule in RULES
            for done in [move(rule, source.first, target.first)]
        ],
    }
    found = mended([group.first for group in groups])
    document["pool"] = {
        "keeps": hex64(found.keeps),
        "hide": str(Profile(found.hide)).split(",") if found.hide else [],
        "hide_for_every_guest": str(Profile(found.closes)).split(",") if found.closes else [],
    }
    return json.dumps(document, indent=2) + "\n"


def _mended(found: Mend) -> list[str]:
    lines = paragraph(f"every machine takes and keeps: {_named(found.keeps) if found.keeps else 'none of the bits'}")
    if not found.hide and not found.closes:
        return [*lines, "no guest needs another CPUID: the pool is safe"]
    if found.hide:
        lines += paragraph(
            f"safe for guests that set only what their CPUID enumerates, if they do not get: {features_of(found.hide)}"
        )
    else:
        lines += paragraph("safe as it is for guests that set only what their CPUID enumerates")
    if found.closes:
        lines += paragraph(
            f"safe for every guest only without the register, that is without: {features_of(found.closes)} "
            "(KVM lets a guest through after its first write)"
        )
    return lines
