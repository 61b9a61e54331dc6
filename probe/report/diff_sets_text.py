# SPDX-License-Identifier: MIT
"""Two sets of records compared, as plain text of at most 75 columns: pairs with one cause together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from probe.diff.causes import Cause, causes, shared, without
from probe.diff.moved import Comparison
from probe.diff.sets import Pair, Sets
from probe.registers import SPEC_CTRL
from probe.report.diff_text import File, around_it, changes, headline, name_files, rules_note, without_double_blanks
from probe.report.layout import field, joined, paragraph

_MOST_NAMES = 24
_NUMBERED = re.compile(r"(.*?)([0-9]{1,9})([^0-9]*)", re.DOTALL)


def render(
    found: Sets,
    before: str,
    after: str,
    hashes: Sequence[tuple[File, File]] = (),
    left_out: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> str:
    """Return the report on two sets: what is alike in one line, what is not in full, pairs with one cause together.

    hashes are those of the pairs, for a mail; left_out says of each side which files could not be read, and why.
    """
    differing = sum(not pair.comparison.same for pair in found.pairs)
    title = f"{SPEC_CTRL.name} (MSR {SPEC_CTRL.index:#x}): " if hashes else ""
    pairs = f"{len(found.pairs)} pair{'s' if len(found.pairs) != 1 else ''} of records"
    count = len(left_out[0]) + len(left_out[1])
    left = f"; {count} file{'s' if count > 1 else ''} LEFT OUT" if count else ""
    lines = paragraph(f"{title}{pairs}: {len(found.pairs) - differing} the same, {differing} different{left}")
    lines += ["", *field("before", before), *field("after", after)]
    for word, names in (("before", found.only_before), ("after", found.only_after)):
        if names:
            lines += ["", f"only {word}, without a counterpart of the same machine, CPUID given and policy:"]
            lines += [f"  {name}" for name in names]
    for word, told in (("before", left_out[0]), ("after", left_out[1])):
        if told:
            lines += ["", f"LEFT OUT {word}, not compared:"]
            lines += [line for one in told for line in paragraph(one, "  ", "      ")]
    files = {one.name: (one, other) for one, other in hashes}
    found_causes = causes(found.pairs)
    moved = [pair for cause in found_causes for pair in cause.pairs]
    if len(moved) == 1:
        lines += ["", *_alone(found_causes[0], files)]
    elif moved:
        lines += [*_places(moved, files), *_causes(found_causes)]
    lines += rules_note([cause.found for cause in found_causes])
    if len(moved) > 1:
        lines += _checksums(moved, files)
    return joined(without_double_blanks(lines))


def _alone(cause: Cause, files: Mapping[str, tuple[File, File]]) -> list[str]:
    """Tell the only pair that is not the same."""
    (pair,) = cause.pairs
    lines = paragraph(f"{pair.name}: {headline(cause.found)}")
    if pair.before in files:
        lines += name_files(*files[pair.before], hashes=True)
    else:
        lines += [*field("before", pair.before), *field("after", pair.after)]
    return [*lines, *around_it(cause.found), *changes(cause.found)]


def _causes(found: Sequence[Cause]) -> list[str]:
    """Tell every cause; first, and once, what is around all of them."""
    lines: list[str] = []
    conditions, alike = shared(found) if len(found) > 1 else ((), ())
    if conditions or alike:
        lines += ["", *around_it(Comparison("", conditions, alike, ()), title="around all of them, not the same")]
    for cause in found:
        lines += ["", *_cause(cause, without(cause, conditions, alike))]
    return lines


def _cause(cause: Cause, told: Cause) -> list[str]:
    """Tell the pairs in which the same moved: whose they are, what moved, and around it what told has."""
    count, first = len(cause.pairs), cause.pairs[0]
    apart = len({condition.what for condition, _ in cause.apart} - {one.what for one in cause.found.conditions})
    if count == 1:
        lines = paragraph(f"{first.name}: {headline(cause.found)}")
        lines += [*field("before", first.before), *field("after", first.after)]
        return [*lines, *around_it(told.found), *changes(told.found)]
    machines, policies = ({get(pair) for pair in cause.pairs} for get in (_machine, _policy))
    unit = "machines" if len(machines) == count else "policies" if len(policies) == count else "pairs"
    lines = paragraph(f"{count} {unit}, {first.kind} each: {headline(cause.found, apart)}")
    lines += field("machines" if len(machines) > 1 else "machine", folded(machines))
    if policies != {""}:
        lines += field("policies" if len(policies) > 1 else "policy", folded(policies))
    lines += field("before", folded((pair.before for pair in cause.pairs), 1))
    lines += field("after", folded((pair.after for pair in cause.pairs), 1))
    lines += around_it(told.found, [(condition, _whose(pairs, cause.pairs)) for condition, pairs in cause.apart])
    return [*lines, *changes(told.found)]


def _checksums(pairs: Iterable[Pair], files: Mapping[str, tuple[File, File]]) -> list[str]:
    if not files:
        return []
    lines = ["", "files, each with its SHA-256"]
    for pair in pairs:
        for word, file in zip(("before", "after"), files[pair.before]):
            lines += [*field(word, file.name), *field("", file.sha256)]
    return lines


def _places(pairs: Sequence[Pair], files: Mapping[str, tuple[File, File]]) -> list[str]:
    """Say on what records were made, for a mail: once what is the same for all of them, then what is not."""
    lines: list[str] = []
    for number, word in enumerate(("before", "after")) if files else ():
        blocks: dict[tuple[str, ...], list[Pair]] = {}
        for pair in pairs:
            for block in _blocks(files[pair.before][number].place):
                blocks.setdefault(block, []).append(pair)
        lines += ["", f"made on, {word}"]
        for block, those in sorted(blocks.items(), key=lambda item: len(item[1]) < len(pairs)):
            lines += [*([] if len(those) == len(pairs) else paragraph(f"{_whose(those, pairs)}:")), *block]
    return lines


def _blocks(place: Iterable[str]) -> list[tuple[str, ...]]:
    """Cut labelled fields where a label begins."""
    blocks: list[list[str]] = []
    for line in place:
        if blocks and line.startswith(" "):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return [tuple(block) for block in blocks]


def _whose(pairs: Iterable[Pair], among: Sequence[Pair]) -> str:
    """Name some of several pairs by what tells them apart."""
    gets: list[Callable[[Pair], str]] = [get for get in (_machine, _policy) if len({get(p) for p in among}) > 1]
    return folded(" ".join(get(pair) for get in gets) or pair.before for pair in pairs)


def _machine(pair: Pair) -> str:
    return pair.machine


def _policy(pair: Pair) -> str:
    return pair.policy


def folded(names: Iterable[str], most: int = _MOST_NAMES) -> str:
    """Write names in their order, numbers in a row as lab1-lab40, and of many the first ones."""
    runs: list[tuple[str, str, int]] = []  # first name, last name, how many
    for name in sorted(set(names), key=_natural):
        if runs and _follows(runs[-1][1], name):
            runs[-1] = (runs[-1][0], name, runs[-1][2] + 1)
        else:
            runs.append((name, name, 1))
    told = [
        (text, count)
        for first, last, length in runs
        for text, count in ([(f"{first}-{last}", length)] if length > 2 else [(first, 1), (last, 1)][:length])
    ]
    more = sum(count for _, count in told[most:])
    return ", ".join(text for text, _ in told[:most]) + (f" and {more} more" if more else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort lab2 before lab10: numbers by their length first, whatever it is."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if at % 2 else (0, part) for at, part in enumerate(parts)]


def _follows(one: str, other: str) -> bool:
    """Tell whether two names differ by one in their last number alone."""
    parts = [_NUMBERED.fullmatch(name) for name in (one, other)]
    if not parts[0] or not parts[1]:
        return False
    (head, number, tail), (its_head, its_number, its_tail) = parts[0].groups(), parts[1].groups()
    if (head, tail) != (its_head, its_tail) or not _same_form(number, its_number):
        return False
    return int(its_number) == int(number) + 1


def _same_form(number: str, other: str) -> bool:
    """Numbers with leading zeros have one length."""
    return len(number) == len(other) or not (number.startswith("0") or other.startswith("0"))
