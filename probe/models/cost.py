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
class Costs:
    """All costs of one run; khz is the guest's TSC."""

    khz: int
    bare: tuple[Cost, ...]
    policies: tuple[tuple[str, Cost, Cost], ...]  # name, write, read


def switches_for_one_percent(costs: Costs, write: Cost) -> int | None:
    """Return how many context switches per second cost 1 % of a CPU if each writes the register once."""
    nothing = costs.bare[0].median
    if write.median is None or nothing is None or write.median <= nothing:
        return None
    return round(costs.khz * 1000 / 100 / (write.median - nothing))
