# SPDX-License-Identifier: MIT
"""Two records compared, as plain text of at most 75 columns; the same for a mail."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from probe.diff.causes import EVERYWHERE
from probe.diff.moved import Comparison, Condition, Moved
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
    lines = [*paragraph(f"{title}{headline(found)}"), "", *name_files(before, after, hashes=hashes)]
    if before.sha256 == after.sha256:
        lines += field("", "both are the same file, or copies of it")
    lines += ["", *around_it(found), ""]
    lines += [*changes(found), *rules_note([found])]
    return joined(without_double_blanks(lines))


def without_double_blanks(lines: Sequence[str]) -> list[str]:
    """Leave out a blank line after another."""
    return [line for at, line in enumerate(lines) if line or not at or lines[at - 1]]


def headline(found: Comparison, more: int = 0) -> str:
    """Say how much moved, and how many things around it differ; more of them are not in the comparison."""
    if found.same:
        return "the same"
    count = len(found.moved) + bool(found.only_before) + bool(found.only_after)
    things = len({condition.what for condition in found.conditions}) + more
    around = f"; {things} things around it differ" if things > 1 else ""
    return f"{count} change{'s' if count > 1 else ''}{around}"


def name_files(before: File, after: File, *, hashes: bool) -> list[str]:
    """Name both files; for a mail with their checksums, and on what they were made, once if that is the same."""
    lines: list[str] = []
    for word, file in (("before", before), ("after", after)):
        lines += field(word, file.name)
        if hashes:
            lines += field("", f"SHA-256 {file.sha256}")
            if file.place and (file is before or after.place != before.place):
                lines += ["", *file.place, ""]
    return lines


def around_it(
    found: Comparison, apart: Sequence[tuple[Condition, str]] = (), title: str = "around it, not the same"
) -> list[str]:
    """Say what else differs, and what does not, so that a reader sees whether the comparison is fair.

    apart is what differs around some of several pairs, with their names.
    """
    lines: list[str] = []
    conditions = [*((one, "") for one in found.conditions), *((one, f"{whose}: ") for one, whose in apart)]
    if any(condition.what in ("machine", "called") for condition, _ in conditions):
        lines += paragraph("TWO DIFFERENT MACHINES: what moved may be due to that")
    if conditions:
        lines.append(title)
    for condition, whose in conditions:
        told = f"{whose}{condition.what}: {condition.before} -> {condition.after}"
        lines += paragraph(told, "  ", "      ")
    if found.alike:
        lines += paragraph(f"the same: {', '.join(found.alike)}", "", "  ")
    return lines


def changes(found: Comparison) -> list[str]:
    """Say what moved, a cause a line."""
    if found.same:
        return ["nothing moved"]
    lines = ["moved"]
    for moved in found.moved:
        lines += _moved(moved)
    for word, only in (("before", found.only_before), ("after", found.only_after)):
        if only:
            lines += paragraph(f"only {word}: {only}", "  ", "      ")
    return lines


def rules_note(found: Sequence[Comparison]) -> list[str]:
    """Say what rules over CPUID bits mean, where there are any."""
    if not any("with " in moved.where for one in found for moved in one.moved):
        return []
    return ["", *paragraph("rules over CPUID bits fit the guests that both measured; of others they say nothing")]


def _moved(moved: Moved) -> list[str]:
    """Write one cause: who did what, which bits, from what to what, where."""
    lines = paragraph(short(moved.told), "  ", "        ")
    if moved.where == EVERYWHERE or moved.where.startswith("CPU"):
        lines += paragraph(f"on {moved.where}", "      ", "      ")
    elif moved.where and not moved.count:
        lines += paragraph(moved.where, "      ", "      ")
    elif moved.where:
        lines += paragraph(f"{moved.count} profile{'s' if moved.count > 1 else ''}: {moved.where}", "      ", "      ")
    return lines


def short(text: str) -> str:
    """Leave a mask's leading zeros out."""
    return re.sub(r"0x0*([0-9a-f]+)\b", r"0x\1", text)
