# SPDX-License-Identifier: MIT
"""Records as Markdown and as CSV: the cases as rows."""

from __future__ import annotations

from collections.abc import Sequence

from probe.cases import Report, Status, title_of
from probe.report import circumstances
from probe.report.layout import clean
from probe.report.spreadsheet import as_csv

COLUMNS = ("record", "kind", "suite", "case", "status", "reason", *circumstances.FIELDS)


def markdown(reports: Sequence[Report]) -> str:
    """Return a section for each record: counts, and every case that did not pass; equal ones share a row."""
    lines: list[str] = []
    for report in reports:
        lines += [f"## {_cell(report.kind)} {_cell(report.name)}", "", _cell(title_of(report)), ""]
        lines += [f"- **{_cell(told)}**" for told in circumstances.warnings(report.record)]
        lines += [f"- {_cell(told)}" for told in circumstances.lines(report)]
        lines.append("")
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
    """Return what did not pass: errors, failures, then why others were skipped; equal ones share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for status in (Status.ERROR, Status.FAIL, Status.SKIP):
        for suite in report.suites:
            for case in suite.cases:
                if case.status is status:
                    where = suite.name if status is not Status.SKIP or report.kind == "run" else _kind_of(suite.name)
                    rows.setdefault((status.value, case.reason, where), []).append(case.name)
    lines = ["| suite | case | status | reason |", "|---|---|---|---|"]
    for (status_word, reason, where), names in rows.items():
        names = list(dict.fromkeys(names))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"| {_cell(where)} | {_cell(shown)} | {status_word} | {_cell(reason)} |")
    failed = any(word in ("fail", "error") for word, *_ in rows)
    measured = any(report.count(status) for status in (Status.PASS, Status.FAIL))
    head = [] if failed else ["Nothing failed." if measured else "Nothing was measured.", ""]
    return [*head, *(lines if rows else []), ""]


def _kind_of(suite: str) -> str:
    return "profiles" if suite.startswith("profile_") else suite


def _cell(text: str) -> str:
    """Keep a text of a record from becoming markup."""
    plain = clean(" ".join(text.split()))
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|~!&@$:" else char for char in plain)


def comma_separated(reports: Sequence[Report]) -> str:
    """Return a header and a row for each case."""
    rows = (
        (report.name, report.kind, suite.name, case.name, case.status.value, case.reason, *around)
        for report, around in ((report, circumstances.of(report).values()) for report in reports)
        for suite in report.suites
        for case in suite.cases
    )
    return as_csv(COLUMNS, ([clean(" ".join(text.split())) for text in row] for row in rows))
