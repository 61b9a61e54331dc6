# SPDX-License-Identifier: MIT
"""What breaks when a guest moves: the bits that it may hold on one machine and another would refuse or lose. Pure.

Every VMM saves and restores IA32_SPEC_CTRL its own way; the rules are those of their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from probe.masks import ALL_BITS
from probe.models.peer_machines import enumerated, xen_bits
from probe.models.profile import ALL_FEATURES, FEATURES, Profile, mask_of_features
from probe.registers import SPEC_CTRL


@dataclass(frozen=True)
class Side:
    """One machine as source or destination; masks of 64 bits.

    holds: the bits that a guest may come to hold here, whatever its CPUID. takes: the bits that a restore
    (KVM_SET_MSRS) may have. keeps: of these, what is still there afterwards. listed: the register is in
    KVM_GET_MSR_INDEX_LIST, by which QEMU decides. offers: what KVM gives guests, guest: what this one has, masks over
    profile.FEATURES.
    """

    holds: int
    takes: int
    keeps: int
    listed: bool
    offers: int = 0
    guest: int = 0


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


@dataclass(frozen=True)
class Rule:
    """How one VMM moves the register."""

    name: str
    title: str
    source: str
    move: Callable[[Side, Side, int], Move]  # (from, to, the bits that the guest holds)


def _kvm(source: Side, target: Side, held: int) -> Move:
    return Move(refused=held & ~target.takes, lost=held & target.takes & ~target.keeps)


def _qemu(source: Side, target: Side, held: int) -> Move:
    if not source.listed or not target.listed:  # not read, or not written
        return Move(lost=held)
    return _kvm(source, target, held)


def _xen(source: Side, target: Side, held: int) -> Move:
    """Clamp on the source to what the guest's policy has (nothing, if it has no such register), then as KVM alone."""
    allowed = xen_bits(Profile(source.guest)) or 0
    there = _kvm(source, target, held & allowed)
    return Move(refused=there.refused, lost=held & ~allowed | there.lost)


def _firecracker(source: Side, target: Side, held: int) -> Move:
    if not source.listed:  # it saves what is listed
        return Move(lost=held)
    return Move(refused=held, refuses_all=True) if not target.listed else _kvm(source, target, held)


def _cloud_hypervisor(source: Side, target: Side, held: int) -> Move:
    """One bit that is refused leaves the whole value out, the bits that would have been taken with it."""
    if not target.listed or held & ~target.takes:
        return Move(lost=held)
    return Move(lost=held & ~target.keeps)


RULES: tuple[Rule, ...] = (
    Rule("kvm", "KVM_SET_MSRS alone: a short count is a refusal", "linux Documentation/virt/kvm/api.rst", _kvm),
    Rule(
        "qemu",
        "QEMU: in the stream if listed and not 0; a refusal aborts the destination; not listed there: lost",
        "QEMU 10.0.50 target/i386/kvm/kvm.c, kvm_buf_set_msrs(); machine.c, subsection cpu/spec_ctrl",
        _qemu,
    ),
    Rule(
        "xen",
        "Xen: the source clamps to the guest's policy",
        "xen 969a57f73f (2022-01-19)",
        _xen,
    ),
    Rule(
        "firecracker",
        "Firecracker: a short count is an error",
        "Firecracker src/vmm/src/arch/x86_64/msr.rs, SERIALIZABLE_MSR_RANGES",
        _firecracker,
    ),
    Rule(
        "cloud-hypervisor",
        "cloud-hypervisor: an MSR that fails is left out",
        "cloud-hypervisor pull request 1543",
        _cloud_hypervisor,
    ),
)
BY_NAME = {rule.name: rule for rule in RULES}

# The CPUID bits by which KVM lets a guest touch the register at all: without them the guest has none to move.
GATE = mask_of_features([bit for bit in FEATURES if bit.name in ("SPEC_CTRL", "AMD_STIBP", "AMD_IBRS", "AMD_SSBD")])


def obedient(side: Side) -> int:
    """Return the bits that a guest holds that sets only what its CPUID enumerates."""
    return side.holds & enumerated(side.offers)


def _all(values: Iterable[int]) -> int:
    return reduce(lambda one, other: one & other, values, ALL_BITS)


@dataclass(frozen=True)
class Mend:
    """The smallest change of guests' CPUID that makes a pool safe.

    keeps are the bits of the register that every machine takes and keeps; hide the features (a mask over
    profile.FEATURES) that enumerate others; enough: then it is safe for guests that set only what their CPUID
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
