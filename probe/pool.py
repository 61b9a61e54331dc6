# SPDX-License-Identifier: MIT
"""Records as sides of a migration: what guests may hold there, what a restore takes, and pools of many. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Union

from msgspec import UNSET

from probe import entries, kvm_record
from probe import record as rec
from probe.errors import RecordError
from probe.masks import ALL_BITS, hex64
from probe.models.migration import Mend, Move, Rule, Side, mend
from probe.models.profile import Profile, parse_profile, profile_of
from probe.models.what_if import offered

ANY = "any"  # the profile of a record that knows of no guests: a machine's own register
AnyRecord = Union[rec.Record, kvm_record.KvmRecord]


@dataclass(frozen=True)
class Place:
    """One record as source and destination, by guest profile. name is the file's, what a line on the machine."""

    name: str
    what: str
    sides: Mapping[str, Side]

    @property
    def key(self) -> tuple[tuple[str, Side], ...]:
        """What makes two places the same for every guest."""
        return tuple(sorted(self.sides.items(), key=lambda item: item[0]))

    @property
    def holds(self) -> int:
        """The bits that a guest of some CPUID may hold here."""
        held = 0
        for side in self.sides.values():
            held |= side.holds
        return held


def place_of(record: AnyRecord, name: str) -> Place:
    """Turn a record of either kind into a place; raise RecordError if it holds no measurement."""
    if isinstance(record, kvm_record.KvmRecord):
        return _of_kvm(record, name)
    return _of_run(record, name)


def _of_kvm(record: kvm_record.KvmRecord, name: str) -> Place:
    """A guest by itself is let through by its first accepted write; it holds what is saved, or reads back, after it."""
    if kvm_record.complaints(record):
        raise RecordError(f"{name} is of a policy that did not decide every write", "mend the policy, and run it again")
    offers = parse_profile(record.hardware.supported_cpuid).mask
    sides = {}
    for row in kvm_record.rows_of(record):
        cells = row.masks
        let_through = cells.get("guest_after_seen", 0) & cells.get("guest_after", 0) if cells["guest_first"] else 0
        reads = cells["guest_read"] != 0
        sides[kvm_record.profile_name(row.profile)] = Side(
            holds=cells["guest_first"] & cells["guest_first_kept"] | let_through,
            takes=cells["host_first"],
            keeps=cells["host_first_seen"] if reads else cells["host_first_kept"],
            sees=cells["guest_first_seen"] | let_through if reads else ALL_BITS,
            takes_zero=cells["host_zero"] != 0,
            listed=record.kvm.in_msr_index_list,
            offers=offers,
            guest=row.profile.mask,
        )
    if not sides:
        raise RecordError(f"{name} holds no row", "measure it again: spec-ctrl-probe kvm")
    rule = record.follows or ", ".join(record.explained_by[:2]) or "no model"
    under = f", policy {record.policy.name}" if isinstance(record.policy, kvm_record.PolicyEntry) else ""
    return Place(name, f"{_machine(record)}, {rule}{under}", sides)


def _of_run(record: rec.Record, name: str) -> Place:
    """A machine's own register, as KVM from v5.9 on gives it to guests: the hardware alone decides."""
    holds = 0
    takes = keeps = ALL_BITS
    walked = False
    for entry in record.observations:
        seen = rec.observation_of(entry.outcomes)
        if not seen.accepted | seen.fault and not entry.absent_because:  # a CPU that was gone says nothing
            continue
        if seen.refused:
            raise RecordError(f"{name} has no answer for bits {hex64(seen.refused)}", "walk it again")
        walked = True
        holds |= seen.retained
        takes &= seen.accepted
        keeps &= seen.retained
    if not walked:
        raise RecordError(f"{name} holds no walk: nothing was written", "measure it: spec-ctrl-probe run")
    cpuid = record.cpuid.groups if record.predicted_from is UNSET else record.predicted_from.groups
    cpus = entries.cpuid_of_groups(cpuid)
    features = profile_of(cpus[min(cpus)]).mask
    side = Side(
        holds, takes, keeps, listed=takes != 0, offers=offered(features), guest=offered(features), takes_zero=takes != 0
    )
    guests = record.machine.under_hypervisor or record.place.kind == "guest"
    whose = "the register of a guest, as a KVM inside would pass it on" if guests else "its own register"
    return Place(name, f"{_machine(record)}, {whose}", {ANY: side})


def _machine(record: AnyRecord) -> str:
    return f"{record.kernel.release}, {record.machine.brand or record.machine.vendor}"


def pairs(source: Place, target: Place) -> list[tuple[Side, Side]]:
    """Return what there is to compare: the sides of the guest profiles that both places know.

    A machine's own register stands for every profile. Raise RecordError if there is no profile in common.
    """
    if ANY in source.sides and ANY in target.sides:
        return [(source.sides[ANY], target.sides[ANY])]
    if ANY in source.sides:
        return [(source.sides[ANY], side) for side in target.sides.values()]
    if ANY in target.sides:
        return [(side, target.sides[ANY]) for side in source.sides.values()]
    common = [name for name in source.sides if name in target.sides]
    if not common:
        raise RecordError(
            f"{source.name} and {target.name} have no guest profile in common", "measure both with the same --profile"
        )
    return [(source.sides[name], target.sides[name]) for name in common]


def comparable(source: Place, target: Place) -> bool:
    """Tell whether there is a guest that both places know; a machine's own register stands for every one."""
    return ANY in source.sides or ANY in target.sides or bool(source.sides.keys() & target.sides.keys())


def move(rule: Rule, source: Place, target: Place) -> Move:
    """Move every guest that both places know; raise as pairs() does."""
    refused = lost = 0
    refuses_all = False
    for side, other in pairs(source, target):
        done = rule.move(side, other, side.holds)
        refused, lost, refuses_all = refused | done.refused, lost | done.lost, refuses_all or done.refuses_all
    return Move(refused, lost, refuses_all)


def in_common(places: Sequence[Place]) -> list[str]:
    """Name the guest profiles that all places know; a machine's own register stands for every one."""
    names = [set(place.sides) for place in places if ANY not in place.sides]
    return sorted(set.intersection(*names)) if names else [ANY]


def mended(places: Sequence[Place]) -> Mend | None:
    """Find what guests of a pool must not have, profile by profile; what is found for each is put together.

    None if it cannot be told: no guest CPUID is known to all, or nobody keeps what he takes (an emulated register).
    """
    common = in_common(places)
    kept = any(side.keeps for place in places for side in place.sides.values())
    if not common or (not kept and any(side.takes for place in places for side in place.sides.values())):
        return None
    found = [mend([place.sides.get(name) or place.sides[ANY] for place in places]) for name in common]
    keeps, hide, closes = ALL_BITS, 0, 0
    for one in found:
        keeps, hide, closes = keeps & one.keeps, hide | one.hide, closes | one.closes
    return Mend(keeps, hide, closes)


def held_without(places: Sequence[Place]) -> int:
    """Return the bits that a guest without any of the CPUID bits may hold somewhere, all the same."""
    held = 0
    for place in places:
        held |= place.sides["empty"].holds if "empty" in place.sides else 0
    return held


@dataclass(frozen=True)
class Group:
    """Places that are the same for every guest."""

    places: tuple[Place, ...]

    @property
    def first(self) -> Place:
        """The one that stands for all."""
        return self.places[0]


def grouped(places: Sequence[Place]) -> list[Group]:
    """Put places that are the same together, in the order of their first."""
    groups: dict[tuple[tuple[str, Side], ...], list[Place]] = {}
    for place in places:
        groups.setdefault(place.key, []).append(place)
    return [Group(tuple(members)) for members in groups.values()]


def features_of(mask: int) -> str:
    """Name the CPUID bits of a mask over profile.FEATURES."""
    return str(Profile(mask)).replace(",", ", ")
