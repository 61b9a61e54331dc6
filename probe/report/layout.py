# SPDX-License-Identifier: MIT
"""Lines of at most 75 columns, with nothing in them that a mail or a terminal could take for more than text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

WIDTH = 75
LABEL = 11
_LONG = WIDTH - 20


def clean(text: str) -> str:
    """Keep control characters of a foreign record away from the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


class _Wrapper(textwrap.TextWrapper):
    """Breaks at blanks, within a list of numbers after a comma, and a name too long for a line after a slash."""

    wordsep_simple_re = re.compile(r"(\s+)|(?<=[0-9],)(?=[0-9])")

    def _split(self, text: str) -> list[str]:
        chunks: list[str] = []
        for chunk in super()._split(text):
            chunks += re.split(r"(?<=[/-])", chunk) if len(chunk) > _LONG else [chunk]
        return [chunk for chunk in chunks if chunk]


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return _Wrapper(WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False).wrap(text)


def paragraph(text: str, first: str = "", later: str = "") -> list[str]:
    """Wrap text behind the indentation of its first line and of those after it; always at least one line."""
    return _wrapped(clean(text), first, later) or [first.rstrip()]


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
        if len(line) <= WIDTH:
            fitted.append(line)
        else:
            blanks = len(line) - len(line.lstrip())
            fitted += _wrapped(line.lstrip(), " " * min(blanks, WIDTH // 2), " " * min(blanks + 2, WIDTH // 2))
    return "\n".join(fitted).rstrip("\n") + "\n"
