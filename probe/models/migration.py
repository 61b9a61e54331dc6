# SPDX-License-Identifier: MIT
"""What breaks when a guest moves: the bits that it may hold on one machine and another would refuse or lose. Pure.

Every VMM saves and restores IA32_SPEC_CTRL its own way; the rules are those of their sources.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from probe.masks import ALL_BITS
from probe.models.peer_machines import XEN_GATE, xen_bits
from probe.models.profile import FEATURES, Profile, mask_of_features
from probe.registers import DEFINED, SPEC_CTRL


class Acts(NamedTuple):
    """What a machine does with the register of a guest, whoever that is: those fields of Side."""

    holds: int
    takes: int
    keeps: int
    sees: int
    listed: bool
    takes_zero: bool
    forgets: bool


@dataclass(frozen=True)
class Side:
    """One machine as source or destination; masks of 64 bits.

    holds: the bits that a guest may come to hold here, whatever its CPUID. takes: the bits that a restore
    (KVM_SET_MSRS) may have; takes_zero: it may be 0. keeps: of these, what is still there afterwards. sees: of what a
    guest holds, what it reads itself, where it reads at all: what it never saw cannot be lost to it. listed: the
    register is in KVM_GET_MSR_INDEX_LIST, by which QEMU decides. offers: what KVM gives guests, guest: what this one
    has, masks over profile.FEATURES. forgets: defined bits are taken here, and none is ever read back, by the guest or
    by the VMM: nobody knows what a guest of such hardware would hold.
    """

    holds: int
    takes: int
    keeps: int
    listed: bool
    offers: int = 0
    guest: int = 0
    sees: int = ALL_BITS
    takes_zero: bool = True
    forgets: bool = False

    @functools.cached_property
    def acts(self) -> Acts:
        """What does not depend on who the guest is."""
        return Acts(self.holds, self.takes, self.keeps, self.sees, self.listed, self.takes_zero, self.forgets)


def acting(acts: Acts, guest: int = 0, offers: int = 0) -> Side:
    """Return a side that acts so, for a guest CPUID; the sides of many guests share what they have in common."""
    holds, takes, keeps, sees, listed, takes_zero, forgets = acts
    side = Side(holds, takes, keeps, listed, offers, guest, sees, takes_zero, forgets)
    vars(side)["acts"] = acts
    return side


@functools.lru_cache(maxsize=1 << 14)
def closed(acts: Acts) -> Acts:
    """Return the same for a guest that has no register there."""
    return acts._replace(holds=0, forgets=False)


@dataclass(frozen=True)
class Move:
    """What becomes of a guest's bits: refused (the restore fails), lost (gone without a word); the rest works.

    refuses_all: the restore fails whatever the value, of 0 too. Of several guests' moves put together: guests is how
    many, unsaid those of which nothing can be said (Side.forgets), absent those that have no register under this rule;
    beyond: the bits that the VMM's rule refuses the guest, and that one which it does not intercept may hold all the
    same, until a move.
    """

    refused: int = 0
    lost: int = 0
    refuses_all: bool = False
    guests: int = 1
    unsaid: int = 0
    absent: int = 0
    beyond: int = 0

    @property
    def word(self) -> str:
        """The worst of it: "refused", "lost", "unsaid" or "works"."""
        if self.broken:
            return "refused" if self.refused or self.refuses_all else "lost"
        return "unsaid" if self.unsaid else "works"

    @property
    def broken(self) -> bool:
        """Tell whether something is refused or lost."""
        return bool(self.refused or self.lost or self.refuses_all)


# (what the guest holds, whether the register is listed on the source, the guest's CPUID) -> what is sent of it
Sends = Callable[[int, bool, Profile], "int | None"]

# The CPUID bits by which KVM lets a guest touch the register at all: without them the guest has none to move.
GATE = mask_of_features([bit for bit in FEATURES if bit.name in ("SPEC_CTRL", "AMD_STIBP", "AMD_IBRS", "AMD_SSBD")])


@dataclass(frozen=True)
class Rule:
    """How one VMM moves the register.

    sends says what of it goes into the stream, None: nothing. asks_list: the destination writes it only if its own KVM
    lists it. forgives: a value that is refused is left out, and the guest goes on without. lets: the bits that this VMM
    itself lets a guest of a CPUID have (None: it has no such register), where that is not left to KVM; gate: the CPUID
    bits each of which gives a guest the register.
    """

    name: str
    title: str
    source: str
    sends: Sends
    asks_list: bool = False
    forgives: bool = False
    lets: Callable[[Profile], int | None] | None = None
    gate: int = GATE

    def held(self, side: Side) -> int | None:
        """Return the bits that a guest may come to hold on a side under this VMM; None: it has no such register."""
        if self.lets is None:
            return side.holds
        allowed = self.lets(_profile(side.guest))
        return None if allowed is None else side.holds & allowed

    def culprits(self, source: Side, target: Side, held: int) -> int:
        """Return those of the bits that a guest holds without which the move would work; 0 if it does."""
        sent = self.sends(held, source.listed, _profile(source.guest))
        if sent is None or (self.asks_list and not target.listed):
            return held if self.asks_list and target.listed and not target.takes_zero else held & source.sees
        if not target.takes_zero:
            return held & source.sees if self.forgives else held
        refused = sent & ~target.takes
        lost = (held & ~sent | sent & target.takes & ~target.keeps) & source.sees
        return refused | lost if held & source.sees or not self.forgives else 0

    def move(self, source: Side, target: Side, held: int) -> Move:
        """Say what becomes of the bits of a mask that a guest holds."""
        sent = self.sends(held, source.listed, _profile(source.guest))
        if sent is None or (self.asks_list and not target.listed):
            refuses = self.asks_list and target.listed and not target.takes_zero  # it writes 0 then
            return Move(lost=0 if refuses else held & source.sees, refuses_all=refuses)
        clamped, refused = held & ~sent, sent & ~target.takes
        lost = (clamped | sent & target.takes & ~target.keeps) & source.sees
        if not self.forgives:
            return Move(refused, lost, refuses_all=not target.takes_zero)
        # One bit that is refused leaves the whole value out, the bits that would have been taken with it.
        return Move(lost=held & source.sees if refused or not target.takes_zero else lost)


_profile = functools.lru_cache(maxsize=1024)(Profile)


def _everything(held: int, listed: bool, guest: Profile) -> int | None:
    return held


def _if_listed(held: int, listed: bool, guest: Profile) -> int | None:
    return held if listed else None


def _if_listed_and_not_0(held: int, listed: bool, guest: Profile) -> int | None:
    return held if listed and held else None


def _clamped(held: int, listed: bool, guest: Profile) -> int | None:
    """Send what the guest's policy has, if that has such a register; an MSR that is 0 is left out."""
    allowed = xen_bits(guest)
    return None if allowed is None or not held else held & allowed


RULES: tuple[Rule, ...] = (
    Rule(
        "kvm",
        "KVM_SET_MSRS alone: a short count is a refusal",
        "linux Documentation/virt/kvm/api.rst",
        _everything,
    ),
    Rule(
        "qemu",
        "QEMU: in the stream if listed and not 0; a refusal aborts the destination; not listed there: lost",
        "QEMU 10.0.50 target/i386/kvm/kvm.c, kvm_buf_set_msrs(); machine.c, subsection cpu/spec_ctrl",
        _if_listed_and_not_0,
        asks_list=True,
    ),
    Rule(
        "xen",
        "Xen: the source clamps to the guest's policy",
        "xen 969a57f73f (2022-01-19)",
        _clamped,
        lets=xen_bits,
        gate=XEN_GATE,
    ),
    Rule(
        "firecracker",
        "Firecracker: a short count is an error",
        "Firecracker src/vmm/src/arch/x86_64/msr.rs, SERIALIZABLE_MSR_RANGES",
        _if_listed,
    ),
    Rule(
        "cloud-hypervisor",
        "cloud-hypervisor: an MSR that fails is left out",
        "cloud-hypervisor pull request 1543",
        _everything,
        forgives=True,
    ),
)
BY_NAME = {rule.name: rule for rule in RULES}


# What restoring meets on several machines: by (listed, takes_zero) the bits that all of them take, and those that some
# of them takes and does not keep.
Met = Mapping["tuple[bool, bool]", "tuple[int, int]"]


def met_on(side: Side) -> Met:
    """Return what a restore meets on one machine."""
    return {(side.listed, side.takes_zero): (side.takes, side.takes & ~side.keeps)}


def met_on_both(one: Met, other: Met) -> Met:
    """Put together what a restore meets on the machines of either."""
    if not one or not other:
        return one or other
    both = dict(one)
    for which, (takes, drops) in other.items():
        before = both.get(which, (ALL_BITS, 0))
        both[which] = (before[0] & takes, before[1] | drops)
    return both


def worst_of(met: Met) -> list[Side]:
    """Return sides that refuse and lose, together, exactly what some of these machines does."""
    return [
        Side(0, takes, ALL_BITS & ~drops, listed, takes_zero=takes_zero)
        for (listed, takes_zero), (takes, drops) in met.items()
    ]


def enumerators(fields: int) -> int:
    """Return the features each of which enumerates a field of a 64-bit mask of the register."""
    return mask_of_features(bit for row in SPEC_CTRL.bits if row.mask & fields & DEFINED for bit in row.any_of)
