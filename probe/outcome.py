# SPDX-License-Identifier: MIT
"""What writes did, as values: outcomes, observations, one CPU's result, the proof of restore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

RestoreState = Literal["verified", "left", "failed"]


class Outcome(Enum):
    """What one write did."""

    RETAINED = "retained"
    DROPPED = "dropped"
    ALTERED = "altered"
    FAULT = "fault"
    REFUSED = "refused"
    UNSTABLE = "unstable"
    ABSENT = "absent"


@dataclass(frozen=True)
class Observation:
    """The outcomes of one walk as disjoint 64-bit masks, one per outcome; a bit in none of them was not tried."""

    retained: int = 0
    dropped: int = 0
    altered: int = 0
    fault: int = 0
    refused: int = 0
    unstable: int = 0
    absent: int = 0

    @property
    def tried(self) -> int:
        """Mask of the bits that have an outcome."""
        return self.accepted | self.fault | self.refused | self.absent

    @property
    def accepted(self) -> int:
        """Mask of the bits whose write did not fault, whatever was read back."""
        return self.retained | self.dropped | self.altered | self.unstable

    @classmethod
    def of(cls, outcomes: Mapping[int, Outcome]) -> Observation:
        """Build the masks from a map of bit number to outcome."""
        masks = dict.fromkeys(Outcome, 0)
        for bit, outcome in outcomes.items():
            masks[outcome] |= 1 << bit
        return cls(**{outcome.value: mask for outcome, mask in masks.items()})


@dataclass(frozen=True)
class Combined:
    """One trial of all accepted bits together.

    value is what was written, expected what the single trials lead one to read back, got what was read (None if the
    write faulted); both 64 bits.
    """

    value: int
    expected: int
    outcome: Outcome
    got: int | None


@dataclass(frozen=True)
class CpuResult:
    """All that the walk saw on one CPU.

    saved is the 64-bit value read first, None if RDMSR faulted (no_register) or the CPU was offline; absent_because
    says which.
    cleared holds the trials of clearing bits that were set (--clear-bits). bad_pairs are the masks of two bits that
    are accepted alone and fault together. inconsistent is the mask of bits that faulted in one walk and were accepted
    in another (--repeat); they count as fault. moved is the mask of bits that something else changed during the walk;
    base_refused: the value that the register held took #GP when it was written back unchanged, so nothing was tried.
    """

    cpu: int
    saved: int | None
    observation: Observation
    cleared: Observation = Observation()
    combined: Combined | None = None
    pairs_tried: int = 0
    bad_pairs: tuple[int, ...] = ()
    absent_because: str = ""
    no_register: bool = False
    inconsistent: int = 0
    moved: int = 0
    base_refused: bool = False


@dataclass(frozen=True)
class Restored:
    """Proof of restore for one CPU: what the register held first, and what it reads at the end (None: not readable).

    state is VERIFIED (it reads saved), LEFT (not verified, and not ours to write: the CPU is or was offline and the
    kernel sets it up, or bits differ that the interrupted step did not touch; note says which), or FAILED.
    """

    cpu: int
    saved: int
    reads: int | None
    state: RestoreState
    note: str = ""

    VERIFIED: ClassVar[RestoreState] = "verified"
    LEFT: ClassVar[RestoreState] = "left"
    FAILED: ClassVar[RestoreState] = "failed"

    @property
    def failed(self) -> bool:
        """True if the register may still hold what the probe wrote."""
        return self.state == self.FAILED
