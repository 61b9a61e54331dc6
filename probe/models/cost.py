# SPDX-License-Identifier: MIT
"""What accesses of a register cost a guest, as values. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Cycles of one access: median, and the 5th and 95th of 100 equal parts; None if the guest took #GP."""

    what: str
    median: int | None
    low: int = 0
    high: int = 0


@dataclass(frozen=True)
class Row:
    """What a write and a read cost under one rule.

    took is False if that took no bit from the guest; let_through: its writes are KVM's alone by now.
    """

    name: str
    write: Cost
    read: Cost
    took: bool = True
    let_through: bool = False


@dataclass(frozen=True)
class Costs:
    """All costs of one run; khz is the guest's TSC.

    bare: the timing itself, CPUID and OUT. alone: under KVM alone. through: a write of a guest that KVM has let
    through, against which others are held; None if it lets none through. lent: CPUID bits of the guest that the host
    does not have, and that policies were told it has.
    """

    khz: int
    bare: tuple[Cost, ...]
    alone: tuple[Row, ...]
    through: Cost | None
    policies: tuple[Row, ...]
    lent: str = ""


def switches_for_one_percent(costs: Costs, each: Cost) -> int | None:
    """Return how many context switches per second cost 1 % of a CPU more, if each does this instead of a let-through
    WRMSR; None if it takes no longer than that, or nothing is let through."""
    through = costs.through.median if costs.through is not None else None
    if each.median is None or through is None or each.median <= through:
        return None
    return round(costs.khz * 1000 / 100 / (each.median - through))
