# SPDX-License-Identifier: MIT
"""Records as Markdown and as CSV: the cases as rows."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from probe.cases import Report, Status, title_of
from probe.report.layout import clean

COLUMNS = ("record", "kind", "suite", "case", "status", "reason")


def markdown(reports: Sequence[Report]) -> str:
    """Return a section for each record: counts, and every case that did not pass; equal ones of a suite share a row."""
    lines: list[str] = []
    for report in reports:
        lines += [f"## {_cell(report.kind)} {_cell(report.name)}", "", _cell(title_of(report)), ""]
        lines += ["| suite | pass | fail | skip | error |", "|---|---|---|---|---|"]
        groups: dict[tuple[int, ...], list[str]] = {}
        for suite in report.suites:
            counts = tuple(sum(case.status is status for case in suite.cases) for status in Status)
            groups.setdefault(counts, []).append(suite.name)
        for counts, names in groups.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"| {_cell(shown)} | " + " | ".join(map(str, counts)) + " |")
        lines += ["", *_told(report)]
    return "\n".join(lines).rstrip() + "\n"


def _told(report: Report) -> list[str]:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for suite in report.suites:
        for case in suite.cases:
            if case.status in (Status.FAIL, Status.ERROR):
                rows.setdefault((case.status.value, case.reason, suite.name), []).append(case.name)
    if not rows:
        return ["Nothing failed.", ""]
    lines = ["| suite | case | status | reason |", "|---|---|---|---|"]
    for (status, reason, where), names in rows.items():
        shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
        lines.append(f"| {_cell(where)} | {_cell(shown)} | {status} | {_cell(reason)} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """Keep a text of a record from becoming markup."""
    plain = clean(" ".join(text.split()))
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|~!&" else char for char in plain)


def comma_separated(reports: Sequence[Report]) -> str:
    """Return a header and a row for each case; a text that a spreadsheet would take for a formula begins with '."""
    out = _Lines()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for report in reports:
        for suite in report.suites:
            for case in suite.cases:
                row = (report.name, report.kind, suite.name, case.name, case.status.value, case.reason)
                writer.writerow([_harmless(clean(" ".join(text.split()))) for text in row])
    return "".join(out.lines)


class _Lines:
    """What csv writes to."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> int:
        self.lines.append(line)
        return len(line)


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
