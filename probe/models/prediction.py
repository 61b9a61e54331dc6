# SPDX-License-Identifier: MIT
"""What a model says about every bit of IA32_SPEC_CTRL, with a reason and a source for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from probe.cpuid.snapshot import Snapshot
from probe.masks import ALL_BITS, hex64


class Effect(Enum):
    """What a write of 1 to a bit should do."""

    ACCEPTS = "accepts"
    FAULTS = "faults"
    EITHER = "either"


@dataclass(frozen=True)
class Reason:
    """Why some bits have one predicted effect.

    mask is the 64-bit mask of the bits it speaks of; because is one clause in plain words; source names the document
    with version or date, or the kernel commit.
    """

    mask: int
    effect: Effect
    because: str
    source: str


@dataclass(frozen=True)
class Prediction:
    """Two disjoint 64-bit masks; the bits in neither may do either, because the documents leave them open.

    exists is False if nothing says that the register is there. Then faults covers all 64 bits (every access takes
    #GP, of value 0 too), or, for a vendor without documents, either does. reasons are disjoint and together cover
    all 64 bits; ValueError otherwise. reads_back is False for a model that decides only whether a write takes #GP:
    then a bit that is accepted and reads 0 is no finding.
    """

    model: str
    exists: bool
    reasons: tuple[Reason, ...]
    reads_back: bool = True

    def __post_init__(self) -> None:
        seen = 0
        for reason in self.reasons:
            if seen & reason.mask:
                raise ValueError(f"model {self.model} gives two reasons for bits {hex64(seen & reason.mask)}")
            seen |= reason.mask
        if seen != ALL_BITS:
            raise ValueError(f"model {self.model} gives no reason for bits {hex64(ALL_BITS & ~seen)}")

    def mask(self, effect: Effect) -> int:
        """64-bit mask of the bits with one effect."""
        return sum(reason.mask for reason in self.reasons if reason.effect is effect)

    @property
    def accepts(self) -> int:
        """64-bit mask of the bits that must be accepted, and read back unless reads_back is False."""
        return self.mask(Effect.ACCEPTS)

    @property
    def faults(self) -> int:
        """64-bit mask of the bits that must take #GP."""
        return self.mask(Effect.FAULTS)

    @property
    def either(self) -> int:
        """64-bit mask of the bits on which no document decides."""
        return self.mask(Effect.EITHER)

    def reason_for(self, bit: int) -> Reason:
        """Return the reason that speaks of one bit, 0..63."""
        return next(reason for reason in self.reasons if reason.mask >> bit & 1)


@dataclass(frozen=True)
class Model:
    """One named predictor.

    predict takes the CPUID of the CPU whose software does the write (in a guest: the guest's CPUID). title is one
    line; source says where the rule is written down.
    """

    name: str
    title: str
    source: str
    predict: Callable[[Snapshot], Prediction]
