# SPDX-License-Identifier: MIT
"""Two records, or two sets, compared, as plain text of at most 75 columns; the same for a mail."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from probe.diff.moved import Comparison, Moved
from probe.diff.sets import Sets
from probe.registers import SPEC_CTRL
from probe.report.layout import field, joined, paragraph

_TITLES = {  # of a mail, by the kind of a comparison
    "run": f"{SPEC_CTRL.name} (MSR {SPEC_CTRL.index:#x}), two runs: ",
    "kvm": f"KVM and {SPEC_CTRL.name} (MSR {SPEC_CTRL.index:#x}): ",
    "migration": f"{SPEC_CTRL.name} (MSR {SPEC_CTRL.index:#x}), guests that moved: ",
}


@dataclass(frozen=True)
class File:
    """A record as a file: its name as given, the SHA-256 of its bytes, in hexadecimal, and on what it was made."""

    name: str
    sha256: str
    place: tuple[str, ...] = ()


def render(found: Comparison, before: File, after: File, *, hashes: bool = False) -> str:
    """Return the report on two records; with the hashes of both, if it is for a mail."""
    title = _TITLES[found.kind] if hashes else ""
    lines = [*paragraph(f"{title}{_headline(found)}"), "", *_files(before, after, hashes=hashes)]
    if before.sha256 == after.sha256:
        lines += field("", "both are the same file, or copies of it")
    lines += ["", *_around(found), ""]
    lines += _changes(found)
    return joined(_without_double_blanks(lines))


def render_sets(found: Sets, before: str, after: str, hashes: Sequence[tuple[File, File]] = ()) -> str:
    """Return the report on two sets: what is alike in one line, what is not in full. hashes are those of the pairs."""
    differing = [pair for pair in found.pairs if not pair.comparison.same]
    alike = len(found.pairs) - len(differing)
    title = f"{SPEC_CTRL.name} (MSR {SPEC_CTRL.index:#x}): " if hashes else ""
    pairs = f"{len(found.pairs)} pair{'s' if len(found.pairs) != 1 else ''} of records"
    lines = paragraph(f"{title}{pairs}: {alike} the same, {len(differing)} different")
    lines += ["", *field("before", before), *field("after", after)]
    for word, names in (("before", found.only_before), ("after", found.only_after)):
        if names:
            lines += ["", f"only {word}, without a counterpart of the same machine, CPUID given and policy:"]
            lines += [f"  {name}" for name in names]
    by_name = {one.name: (one, other) for one, other in hashes}
    for pair in differing:
        lines += ["", *paragraph(f"{pair.name}: {_headline(pair.comparison)}")]
        if pair.before in by_name:
            lines += _files(*by_name[pair.before], hashes=True)
        else:
            lines += [*field("before", pair.before), *field("after", pair.after)]
        lines += [*_around(pair.comparison), *_changes(pair.comparison)]
    return joined(_without_double_blanks(lines))


def _without_double_blanks(lines: Sequence[str]) -> list[str]:
    return [line for at, line in enumerate(lines) if line or not at or lines[at - 1]]


def _headline(found: Comparison) -> str:
    if found.same:
        return "the same"
    count = len(found.moved) + bool(found.only_before) + bool(found.only_after)
    around = f"; {len(found.conditions)} things around it differ" if len(found.conditions) > 1 else ""
    return f"{count} change{'s' if count > 1 else ''}{around}"


def _files(before: File, after: File, *, hashes: bool) -> list[str]:
    """Name both files; for a mail with their checksums, and on what they were made, once if that is the same."""
    lines: list[str] = []
    for word, file in (("before", before), ("after", after)):
        lines += field(word, file.name)
        if hashes:
            lines += field("", f"SHA-256 {file.sha256}")
            if file.place and (file is before or after.place != before.place):
                lines += ["", *file.place, ""]
    return lines


def _around(found: Comparison) -> list[str]:
    """Say what else differs, and what does not, so that a reader sees whether the comparison is fair."""
    lines: list[str] = []
    if any(condition.what in ("machine", "called") for condition in found.conditions):
        lines += paragraph("TWO DIFFERENT MACHINES: what moved may be due to that")
    if found.conditions:
        lines.append("around it, not the same")
        for condition in found.conditions:
            lines += paragraph(f"{condition.what}: {condition.before} -> {condition.after}", "  ", "      ")
    if found.alike:
        lines += paragraph(f"the same: {', '.join(found.alike)}", "", "  ")
    return lines


def _changes(found: Comparison) -> list[str]:
    if found.same:
        return ["nothing moved"]
    lines = ["moved"]
    for moved in found.moved:
        lines += _moved(moved)
    for word, only in (("before", found.only_before), ("after", found.only_after)):
        if only:
            lines += paragraph(f"only {word}: {only}", "  ", "      ")
    if any("with " in moved.where for moved in found.moved):
        lines += ["", *paragraph("rules over CPUID bits fit the guests that both measured; of others they say nothing")]
    return lines


def _moved(moved: Moved) -> list[str]:
    """Write one cause: who did what, which bits, from what to what, where."""
    lines = paragraph(_hex(moved.told), "  ", "        ")
    if moved.where and moved.where.startswith("CPU"):
        lines += paragraph(f"on {moved.where}", "      ", "      ")
    elif moved.where and not moved.count:
        lines += paragraph(moved.where, "      ", "      ")
    elif moved.where:
        lines += paragraph(f"{moved.count} profile{'s' if moved.count > 1 else ''}: {moved.where}", "      ", "      ")
    return lines


def _hex(text: str) -> str:
    """Leave a mask's leading zeros out."""
    return re.sub(r"0x0*([0-9a-f]+)\b", r"0x\1", text)
