# SPDX-License-Identifier: MIT
"""What a lab's nights answer, as a table, JSON or CSV; and what an ingest did."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from probe.report import spreadsheet
from probe.report.layout import clean, joined, paragraph


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], nothing: str) -> str:
    """Return rows as aligned columns; columns that are empty throughout are left out, long last ones wrapped."""
    if not rows:
        return joined(paragraph(nothing))
    texts = [[_text(value) for value in row] for row in rows]
    shown = [at for at in range(len(columns)) if any(row[at] for row in texts)]
    widths = [max(len(columns[at]), *(len(row[at]) for row in texts)) for at in shown]
    lines = ["  ".join(columns[at].ljust(width) for at, width in zip(shown, widths)).rstrip()]
    lines += ["  ".join(row[at].ljust(width) for at, width in zip(shown, widths)).rstrip() for row in texts]
    return "".join(f"{line}\n" for line in lines)


def _text(value: Any) -> str:
    return "" if value is None else clean(str(value))


def as_json(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a list of objects; what is missing is missing."""
    objects = [{name: value for name, value in zip(columns, row) if value is not None} for row in rows]
    return json.dumps(objects, indent=2, default=str) + "\n"


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a header and a line for each row."""
    return spreadsheet.as_csv(columns, ([_text(value) for value in row] for row in rows))


def ingested(
    new: int, again: int, lost: Mapping[str, str], bad: Sequence[tuple[str, int, str]], nights: Sequence[str]
) -> str:
    """Say what came of a folder, machines that were lost first."""
    lines = paragraph(
        f"{_of(new, 'new record')}, {again} that {'was' if again == 1 else 'were'} there already; "
        f"nights: {', '.join(nights) or 'none'}; {_of(len(lost), 'machine')} lost, {_of(len(bad), 'line')} set aside"
    )
    for host, step in sorted(lost.items()):
        lines += paragraph(f"lost {host}: {step}", "  ", "      ")
    first: dict[tuple[str, str], int] = {}
    more: Counter[tuple[str, str]] = Counter()
    for name, line, why in bad:  # a file that is none of ours has a line here, not one for each of its own
        first.setdefault((name, why), line)
        more[name, why] += 1
    for (name, why), line in first.items():
        others = f" and {more[name, why] - 1:,} more" if more[name, why] > 1 else ""
        lines += paragraph(f"aside {name}{f':{line}' if line else ''}{others}: {why}", "  ", "      ")
    return joined(lines)


def _of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
