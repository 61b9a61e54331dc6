# SPDX-License-Identifier: MIT
"""Migrations as plain text of at most 75 columns: one pair under every VMM's rule, or a pool as a matrix."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from probe.masks import format_bits, hex64, told_bits
from probe.models.migration import RULES, Move, Rule
from probe.models.profile import Profile
from probe.pool import (
    ANY,
    Advice,
    Group,
    Place,
    advise,
    comparable,
    features_of,
    in_common,
    move,
    pairs,
)
from probe.registers import SPEC_CTRL
from probe.report.layout import WIDTH, clean, joined, paragraph

_MARKS = {"works": ".", "lost": "l", "refused": "R", "unsaid": "-", "": "?"}
MOST_SHOWN = 60  # kinds of machine in a printed matrix
_NOTHING = "nothing can be said of hardware"


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


def _told_bits(mask: int) -> str:
    text = told_bits(mask)
    return text if len(text) < 25 else f"{bin(mask).count('1')} of 64 bits"


def _told(done: Move) -> str:
    if done.absent == done.guests:
        return "no register: this VMM answers such guests with #GP, and has nothing to move"
    parts = []
    if done.refuses_all:
        parts.append("refused, whatever the value")
    elif done.refused:
        one = "" if done.refused & (done.refused - 1) == 0 else "one of "
        parts.append(f"refused if it holds {one}{_named(done.refused)}")
    if done.lost and not done.refuses_all:
        parts.append(f"lost without a word: {_named(done.lost)}")
    if not parts and done.unsaid + done.absent < done.guests:
        parts.append("works")
    if done.unsaid:
        whose = f" for {done.unsaid} of {done.guests} guest CPUIDs" if done.unsaid < done.guests else ""
        parts.append(f"{_NOTHING}{whose}: this register keeps nothing")
    if done.absent:
        parts.append(f"no register for {done.absent} of {done.guests} guest CPUIDs")
    if done.beyond:
        parts.append(f"what only a guest that is not intercepted sets is clamped: {_named(done.beyond)}")
    return "; ".join(parts)


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


def matrix(groups: Sequence[Group], rule: Rule, advice: Advice | None = None, most: int = MOST_SHOWN) -> str:
    """Return a pool under one rule: from (row) to (column), of at most so many kinds; and what would make it safe."""
    count = sum(len(group.places) for group in groups)
    lines = paragraph(f"{count} records, {len(groups)} kinds of machine, rule {rule.name}: {rule.title}")
    profiles = in_common([group.first for group in groups])
    if profiles != [ANY]:
        lines += paragraph(f"all know {len(profiles)} guest CPUIDs; two are compared for those that both know")
    advice = advice or advise(groups, rule)
    shown = _shown(groups, advice, most)
    if len(shown) < len(groups):
        lines += paragraph(
            f"{len(groups) - len(shown)} kinds are LEFT OUT here, of {len(groups)}; those that guests do not leave "
            f"whole for everywhere, {len(advice.breaks.kinds)}, come first; --json has all"
        )
    lines.append("")
    for number in shown:
        first, more = groups[number].first, len(groups[number].places) - 1
        name = f"{clean(first.name)}{f' and {more} more' if more else ''}"
        lines += paragraph(f"{name}: {clean(first.what)}", f"{number + 1:>4}  ", "      ")
        lines += paragraph(f"a guest may hold {_told_bits(first.holds)}", "      ", "      ")
    lines += ["", *_cells(groups, shown, rule), "", *_advised(groups, advice)]
    return joined(lines)


def _shown(groups: Sequence[Group], advice: Advice, most: int) -> list[int]:
    """Return the numbers of the kinds that are printed: of too many, first those with moves that break."""
    breaking = sorted(range(len(groups)), key=lambda number: (number not in advice.breaks.kinds, number))
    return sorted(breaking[:most])


def _cells(groups: Sequence[Group], shown: Sequence[int], rule: Rule) -> list[str]:
    words = {
        (source, target): _word(rule, groups[source].first, groups[target].first)
        for source in shown
        for target in shown
    }
    width = len(str(shown[-1] + 1)) + 1
    room = (WIDTH - 7) // width
    lines = []
    for start in range(0, len(shown), room):
        columns = shown[start : start + room]
        lines.append("from\\to" + "".join(f"{number + 1:>{width}}" for number in columns))
        for source in shown:
            marks = [_MARKS[words[source, target]] for target in columns]
            lines.append(f"{source + 1:>7}" + "".join(f"{mark:>{width}}" for mark in marks))
    lines.append("        . works   l lost without a word   R refused   ? no guest CPUID in common")
    if "unsaid" in words.values():
        lines += paragraph(f"- {_NOTHING}: this register keeps nothing", " " * 8, " " * 10)
    return lines


def _word(rule: Rule, source: Place, target: Place) -> str:
    """Say what becomes of a move; "" if there is no guest that both know."""
    return move(rule, source, target).word if comparable(source, target) else ""


def as_json(
    groups: Sequence[Group], rule: Rule, rules: Sequence[Rule] = RULES, advice: Advice | None = None
) -> Iterator[str]:
    """Yield the parts of a JSON text: every kind of machine, every move between two, and the pool under one rule."""
    yield '{"kinds": ['
    yield from _lines(
        {
            "records": [place.name for place in group.places],
            "machine": group.first.what,
            "holds": hex64(group.first.holds),
        }
        for group in groups
    )
    yield '],\n"moves": ['
    yield from _lines(_moves(groups, rules))
    yield '],\n"pool": '
    yield json.dumps(_pool(groups, advice or advise(groups, rule), rule), indent=1)
    yield "}\n"


def _lines(entries: Iterable[dict[str, object]]) -> Iterator[str]:
    for number, entry in enumerate(entries):
        yield (",\n" if number else "\n") + json.dumps(entry)


def _moves(groups: Sequence[Group], rules: Sequence[Rule]) -> Iterator[dict[str, object]]:
    for number, source in enumerate(groups):
        for other, target in enumerate(groups):
            if (source is target and len(source.places) == 1) or not comparable(source.first, target.first):
                continue
            for rule in rules:
                yield {"from": number, "to": other, "rule": rule.name, **_moved(move(rule, source.first, target.first))}


def _moved(done: Move) -> dict[str, object]:
    """Return a move as JSON: what does not apply is not there."""
    entry: dict[str, object] = {
        "outcome": done.word,
        "refused": hex64(done.refused),
        "lost": hex64(done.lost),
        "refuses_every_value": done.refuses_all,
        "profiles": done.guests,
    }
    if done.unsaid:
        entry |= {"profiles_unsaid": done.unsaid, "unsaid": f"{_NOTHING}: this register keeps nothing"}
    if done.absent:
        entry["profiles_without_register"] = done.absent
    if done.beyond:
        entry["clamped_if_not_intercepted"] = hex64(done.beyond)
    return entry


def _pool(groups: Sequence[Group], advice: Advice, rule: Rule) -> dict[str, object]:
    """Return the advice as JSON; hide and hide_for_every_guest are missing where nothing helps, or cannot be told."""
    entry: dict[str, object] = {
        "rule": rule.name,
        "breaks": advice.breaks.some,
        "keeps": hex64(advice.whole),
        "profiles": advice.guests,
        "profiles_unsaid": advice.unsaid,
        "profiles_unseen": advice.unseen,
    }
    if _untold(groups, advice):
        return entry | {"untold": _untold(groups, advice)}
    for name, features in (("hide", advice.hide), ("hide_for_every_guest", advice.closes)):
        if features is not None:
            entry[name] = [bit.name for bit in Profile(features).bits()]
    for name, guests in (("hide", advice.unmeasured), ("hide_for_every_guest", advice.unmeasured_closed)):
        if guests:
            entry[f"{name}_leaves_unmeasured"] = [str(guest) for guest in guests]
    return entry


def _untold(groups: Sequence[Group], advice: Advice) -> str:
    """Say why nothing can be told of what would make a pool safe; "" if it can."""
    if not in_common([group.first for group in groups]):
        return "no guest CPUID was measured on all of them"
    return ""


def _advised(groups: Sequence[Group], advice: Advice) -> list[str]:
    untold = _untold(groups, advice)
    if untold:
        return paragraph(f"what would make this pool safe cannot be told: {untold}")
    if advice.breaks.some:
        lines = [*_whole(advice), *_for_the_careful(advice), *_for_everyone(advice)]
    elif advice.unsaid == advice.guests:
        return paragraph(
            "no move breaks, and no guest needs another CPUID; but whether the pool is safe cannot be told: these "
            "machines keep nothing of what they take (emulated ones do), so that nothing can be said of hardware"
        )
    else:
        lines = [*_whole(advice), "no guest needs another CPUID: the pool is safe as it is"]
    if advice.unsaid:
        lines += paragraph(
            f"but {_NOTHING} for {advice.unsaid} of {advice.guests} guest CPUIDs: some register keeps nothing there"
        )
    if advice.unseen:
        lines += paragraph(
            f"a loss would not be seen for {advice.unseen} of {advice.guests} guest CPUIDs: the guest reads nothing "
            "back of what it sets"
        )
    return lines


def _whole(advice: Advice) -> list[str]:
    whole = _named(advice.whole) if advice.whole else "none of the bits that guests read back"
    return paragraph(f"every machine takes and keeps: {whole}")


def _for_the_careful(advice: Advice) -> list[str]:
    who = "guests that set only what their CPUID enumerates"
    if advice.hide is None:
        every = ": some machine refuses every value, of 0 too" if advice.breaks.every_value else ""
        return paragraph(f"no change of guests' CPUID makes it safe, not even for {who}{every}")
    if not advice.hide:
        return paragraph(f"safe as it is for {who}")
    return [
        *paragraph(f"leave out of guests' CPUID: {features_of(advice.hide)}; then {who} are safe"),
        *_assumed(advice.unmeasured, "such guests are taken to set, and machines to take, what it still enumerates"),
    ]


def _assumed(guests: Sequence[Profile], what: str) -> list[str]:
    """Say that advice is about guests that were not measured."""
    if not guests:
        return []
    named = f" ({guests[0]})" if len(guests) == 1 else f", such as {guests[0]}"
    count = f"{len(guests)} {'was' if len(guests) == 1 else 'were'}"
    return paragraph(f"of the CPUIDs that this leaves {count} not measured everywhere{named}: {what}")


def _for_everyone(advice: Advice) -> list[str]:
    who = "for guests that set what they like"
    if advice.hole:
        return paragraph(f"{who}, no CPUID makes it safe: one without any of these bits may hold {_named(advice.hole)}")
    if advice.closes is None:
        return paragraph(f"{who}, no CPUID makes it safe")
    if not advice.closes & ~(advice.hide or 0):
        return [
            *paragraph(f"that hides the register, and makes it safe {who}, too"),
            *_assumed(advice.unmeasured_closed, "such guests are taken to have no register"),
        ]
    return [
        *paragraph(f"{who}, hide the register: leave out all of {features_of(advice.closes)}, too"),
        *_assumed(advice.unmeasured_closed, "such guests are taken to have no register"),
    ]
