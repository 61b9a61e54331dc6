# SPDX-License-Identifier: MIT
"""What breaks when a guest moves: the bits that it may hold on one machine and another would refuse or lose. Pure.

Every VMM saves and restores IA32_SPEC_CTRL its own way; the rules are those of their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from probe.masks import ALL_BITS
from probe.models.peer_machines import xen_bits
from probe.models.profile import ALL_FEATURES, FEATURES, Profile, mask_of_features
from probe.registers import SPEC_CTRL


@dataclass(frozen=True)
class Side:
    """One machine as source or destination; masks of 64 bits.

    holds: the bits that a guest may come to hold here, whatever its CPUID. takes: the bits that a restore
    (KVM_SET_MSRS) may have; takes_zero: it may be 0. keeps: of these, what is still there afterwards. sees: of what a
    guest holds, what it reads itself, where it reads at all: what it never saw cannot be lost to it. listed: the
    register is in KVM_GET_MSR_INDEX_LIST, by which QEMU decides. offers: what KVM gives guests, guest: what this one
    has, masks over profile.FEATURES.
    """

    holds: int
    takes: int
    keeps: int
    listed: bool
    offers: int = 0
    guest: int = 0
    sees: int = ALL_BITS
    takes_zero: bool = True


@dataclass(frozen=True)
class Move:
    """What becomes of a guest's bits: refused (the restore fails), lost (gone without a word); the rest works.

    refuses_all: the restore fails whatever the value, of 0 too.
    """

    refused: int = 0
    lost: int = 0
    refuses_all: bool = False

    @property
    def word(self) -> str:
        """The worst of it: "refused", "lost" or "works"."""
        if self.refused or self.refuses_all:
            return "refused"
        return "lost" if self.lost else "works"


# (what the guest holds, whether the register is listed on the source, the guest's CPUID) -> what is sent of it
Sends = Callable[[int, bool, Profile], "int | None"]


@dataclass(frozen=True)
class Rule:
    """How one VMM moves the register.

    sends says what of it goes into the stream, None: nothing. asks_list: the destination writes it only if its own KVM
    lists it. forgives: a value that is refused is left out, and the guest goes on without.
    """

    name: str
    title: str
    source: str
    sends: Sends
    asks_list: bool = False
    forgives: bool = False

    def move(self, source: Side, target: Side, held: int) -> Move:
        """Say what becomes of the bits of a mask that a guest holds."""
        sent = self.sends(held, source.listed, Profile(source.guest))
        if sent is None or (self.asks_list and not target.listed):
            refuses = self.asks_list and target.listed and not target.takes_zero  # it writes 0 then
            return Move(lost=0 if refuses else held & source.sees, refuses_all=refuses)
        clamped, refused = held & ~sent, sent & ~target.takes
        lost = (clamped | sent & target.takes & ~target.keeps) & source.sees
        if not self.forgives:
            return Move(refused, lost, refuses_all=not target.takes_zero)
        # One bit that is refused leaves the whole value out, the bits that would have been taken with it.
        return Move(lost=held & source.sees if refused or not target.takes_zero else lost)


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

# The CPUID bits by which KVM lets a guest touch the register at all: without them the guest has none to move.
GATE = mask_of_features([bit for bit in FEATURES if bit.name in ("SPEC_CTRL", "AMD_STIBP", "AMD_IBRS", "AMD_SSBD")])


def _all(values: Iterable[int]) -> int:
    return reduce(lambda one, other: one & other, values, ALL_BITS)


@dataclass(frozen=True)
class Mend:
    """The smallest change of guests' CPUID that makes a pool safe.

    keeps are the bits of the register that every machine takes and keeps; hide the features (a mask over
    profile.FEATURES) that enumerate others: without them it is safe for guests that set only what their CPUID
    enumerates. closes: the features to hide for guests that set what they please: the gate, so that they have no
    register.
    """

    keeps: int
    hide: int
    closes: int


def mend(pool: Sequence[Side]) -> Mend:
    """Find the CPUID bits that guests of a pool must not have, so that each may go everywhere.

    A field of the register is hidden by hiding every CPUID bit that enumerates it; one of two vendors' bits that is
    left would still promise it.
    """
    everywhere = _all(side.takes & side.keeps for side in pool)
    if not all(side.listed for side in pool):
        everywhere = 0
    offered = reduce(lambda one, side: one | side.offers, pool, 0) & ALL_FEATURES
    hide = 0
    for field in SPEC_CTRL.bits:
        if field.mask & ~everywhere:
            hide |= mask_of_features(field.any_of) & offered
    unsafe = any(side.holds & ~everywhere for side in pool)
    return Mend(everywhere, hide, offered & GATE if unsafe else 0)
