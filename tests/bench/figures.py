# SPDX-License-Identifier: MIT
"""Figures with their bounds, one line each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

missed: list[str] = []


def figure(name: str, value: float, bound: float, unit: str, *, at_least: bool = False) -> None:
    """Print a figure beside its bound, and remember it if it is missed."""
    met = value >= bound if at_least else value <= bound
    sign = ">=" if at_least else "<="
    print(f"{'ok' if met else 'MISSED':<8}{name:<52}{value:>9.2f}{unit:<4} {sign} {bound:g}{unit}", flush=True)
    if not met:
        missed.append(name)


def note(name: str, value: float, unit: str) -> None:
    """Print a figure that has no bound."""
    print(f"{'':<8}{name:<52}{value:>9.2f}{unit}", flush=True)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios pair by pair, so that a machine whose speed drifts does not decide."""
    return statistics.median(a / b for a, b in zip(above, below))
