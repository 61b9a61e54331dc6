# SPDX-License-Identifier: MIT
"""A night as a lab looks at it in the morning: only what moved, and who is not there. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One thing that happened, and the machines on which it did: kind "run" or "kvm", what in words, bits first."""

    kind: str
    what: tuple[str, ...]
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Night:
    """A night against the one before it ("" if there is none).

    machines and records are counts; lost has (step and why, machine), still those of whom the night before had the same
    to say; missing has (machine, night it was last seen) of those that the night before had, absent of those seen last
    before that; new machines never seen before, findings (machine, kind, night since which it is open, reasons).
    """

    date: str
    before: str
    machines: int
    records: int
    changes: tuple[Change, ...] = ()
    lost: tuple[tuple[str, str], ...] = ()
    still: tuple[tuple[str, str], ...] = ()
    missing: tuple[tuple[str, str], ...] = ()
    absent: tuple[tuple[str, str], ...] = ()
    new: tuple[str, ...] = ()
    findings: tuple[tuple[str, str, str, str], ...] = ()

    @property
    def moved(self) -> bool:
        """Whether there is anything new that somebody should look at."""
        return bool(self.changes or self.lost or self.missing or self.new)


def grouped(found: Sequence[tuple[str, str, tuple[str, ...]]]) -> list[Change]:
    """Put machines (host, kind, what) on which the same happened together; what most of them did comes first."""
    hosts: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for host, kind, what in found:
        hosts.setdefault((kind, what), []).append(host)
    changes = [Change(kind, what, tuple(sorted(names))) for (kind, what), names in hosts.items()]
    return sorted(changes, key=lambda one: (-len(one.hosts), one.hosts))


_QUIET = ("not reached", "it said nothing", "it answered")  # nothing was started there, in whatever words


def is_no_news(lost: tuple[str, str], before: Sequence[tuple[str, str]]) -> bool:
    """Tell whether the night before had the same to say of a lost machine: (step and why, machine)."""
    why, host = lost
    quiet = why.startswith(_QUIET)
    return any(name == host and (told == why or (quiet and told.startswith(_QUIET))) for told, name in before)
