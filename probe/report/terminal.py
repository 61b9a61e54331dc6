# SPDX-License-Identifier: MIT
"""A report for a terminal: in colour where it helps. Pure."""

from __future__ import annotations

import re

_RESET = "\x1b[0m"
# What must be seen first, what is as it should be, what begins a part; the text says the same without colour.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"NOT PUT BACK|NOT VERIFIED|DID NOT DECIDE|NOT AS CALCULATED|NOT ASKED|LEFT OUT|NOTHING TO MOVE"),
        "1;31",
    ),
    (re.compile(r"TWO DIFFERENT MACHINES|UNLIKE KVM_SET_MSRS"), "1;33"),
    (re.compile(r"^\*.*$"), "31"),  # a bit of which prediction and observation disagree
    (re.compile(r"\b[0-9]+ findings?$|\b[0-9]+ changes?(?=;|$)|\b[1-9][0-9]* different(?=;|$)"), "1;31"),
    (re.compile(r" as predicted$|(?<= )100 %(?= )|^nothing moved$|all [0-9]+ outcomes as the models say"), "32"),
    (re.compile(r"^(?:findings|moved|around (?:it|all of them), not the same)$"), "1"),
)


def coloured(text: str) -> str:
    """Colour a report: findings and what was not put back red, what is as it should be green."""
    return "".join(f"{_line(line)}\n" for line in text.splitlines())


def _line(line: str) -> str:
    spans: list[tuple[int, int, str]] = []
    for pattern, code in _RULES:
        for found in pattern.finditer(line):
            if not any(start < found.end() and found.start() < end for start, end, _ in spans):
                spans.append((found.start(), found.end(), code))
    for start, end, code in sorted(spans, reverse=True):
        line = f"{line[:start]}\x1b[{code}m{line[start:end]}{_RESET}{line[end:]}"
    return line
