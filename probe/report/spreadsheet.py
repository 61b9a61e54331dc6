# SPDX-License-Identifier: MIT
"""Rows as CSV that a spreadsheet may open: no text in it is a formula."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a header and a line for each row; a text that would be taken for a formula begins with '."""
    out = _Lines()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_harmless(text) for text in row] for row in rows)
    return "".join(out.lines)


class _Lines:
    """What csv writes to."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> int:
        """Take a line."""
        self.lines.append(line)
        return len(line)


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
