# SPDX-License-Identifier: MIT
"""Lines of at most 75 columns, with nothing in them that a mail or a terminal could take for more than text.

On a terminal that is narrower they are laid out for it: narrow() says so, for the context in which it is called.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from contextvars import ContextVar

WIDTH = 75
LABEL = 11
_HEAD = 20  # columns that a line may need before a name
_NARROWEST = 20
_ROOM = 24  # columns that a text needs beside its head; with fewer it stands below, a little indented
_BELOW = "    "
_columns: ContextVar[int] = ContextVar("columns", default=WIDTH)


def narrow(columns: int) -> None:
    """Lay out for a window of so many columns from now on, if that is narrower than a mail."""
    _columns.set(max(_NARROWEST, min(columns, WIDTH)))


def columns() -> int:
    """Return how many columns a line may have."""
    return _columns.get()


def clean(text: str) -> str:
    """Keep control characters of a foreign record away from the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _longest() -> int:
    """Return how long a name may be that is not broken: it has room beside a head, or below it."""
    columns = _columns.get()
    return max(columns - _HEAD, min(columns - 6, _ROOM - len(_BELOW)))


class _Wrapper(textwrap.TextWrapper):
    """Breaks at blanks, within a list of numbers after a comma, and a name too long for a line at its joints."""

    wordsep_simple_re = re.compile(r"(\s+)|(?<=[0-9],)(?=[0-9])")

    def _split(self, text: str) -> list[str]:
        chunks: list[str] = []
        joints = r"(?<=[/,+@.-])" if _columns.get() < WIDTH else r"(?<=[/-])"  # a Message-ID stays whole in a mail
        for chunk in super()._split(text):
            chunks += re.split(joints, chunk) if len(chunk) > _longest() else [chunk]
        return [chunk for chunk in chunks if chunk]


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return _Wrapper(_columns.get(), initial_indent=first, subsequent_indent=later, break_on_hyphens=False).wrap(text)


def paragraph(text: str, first: str = "", later: str = "") -> list[str]:
    """Wrap text behind the indentation of its first line and of those after it; always at least one line.

    In a window that leaves no room beside the indentation the text stands below its first line's head.
    """
    text = clean(text)
    columns = _columns.get()
    if columns < WIDTH and columns - len(later) < _ROOM and len(first) + len(text) > columns:
        below = _BELOW if len(later) > LABEL else "  "
        head = _wrapped(first.rstrip(), "", _BELOW) if first.strip() else []
        return [*head, *_wrapped(text, below, below)]
    return _wrapped(text, first, later) or [first.rstrip()]


def field(label: str, text: str) -> list[str]:
    """One labelled field."""
    return paragraph(text, f"{label:<{LABEL}}", " " * LABEL)


def fields(label: str, texts: Iterable[str]) -> list[str]:
    """Several fields under one label."""
    lines: list[str] = []
    for text in texts:
        lines += field("" if lines else label, text)
    return lines


def joined(lines: Iterable[str]) -> str:
    """Join lines into a report: each cleaned, and wrapped if something in it was longer than it should be."""
    fitted: list[str] = []
    for line in lines:
        line = clean(line).rstrip()
        columns = _columns.get()
        if len(line) <= columns:
            fitted.append(line)
        else:
            blanks = len(line) - len(line.lstrip())
            blanks = blanks if columns - blanks >= _ROOM else 1
            fitted += _wrapped(line.lstrip(), " " * blanks, " " * (blanks + 2))
    return "\n".join(fitted).rstrip("\n") + "\n"
