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
from probe.masks import ALL_BITS
from probe.models.migration import Move, Rule, Side
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
    def side(self) -> Side:
        """The place for a guest of any CPUID: it may hold what one guest may, and counts on what all may restore."""
        sides = list(self.sides.values())
        holds = takes = keeps = 0
        takes = keeps = ALL_BITS
        for side in sides:
            holds, takes, keeps = holds | side.holds, takes & side.takes, keeps & side.keeps
        return Side(holds, takes, keeps, sides[0].listed, sides[0].offers)


def place_of(record: AnyRecord, name: str) -> Place:
    """Turn a record of either kind into a place; raise RecordError if it holds no measurement."""
    if isinstance(record, kvm_record.KvmRecord):
        return _of_kvm(record, name)
    return _of_run(record, name)


def _of_kvm(record: kvm_record.KvmRecord, name: str) -> Place:
    """A guest by itself is let through by its first accepted write; it holds what is saved, or reads back, after it."""
    offers = parse_profile(record.hardware.supported_cpuid).mask
    sides = {}
    for row in kvm_record.rows_of(record):
        cells = row.masks
        let_through = cells.get("guest_after_seen", 0) & cells.get("guest_after", 0) if cells["guest_first"] else 0
        sides[kvm_record.profile_name(row.profile)] = Side(
            holds=cells["guest_first"] & cells["guest_first_kept"] | let_through,
            takes=cells["host_first"],
            keeps=cells["host_first_kept"],
            listed=record.kvm.in_msr_index_list,
            offers=offers,
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
    for entry in record.observations:
        seen = rec.observation_of(entry.outcomes)
        holds |= seen.retained
        takes &= seen.accepted
        keeps &= seen.retained
    if not record.observations:
        raise RecordError(f"{name} holds no walk: nothing was written", "measure it: spec-ctrl-probe run")
    cpuid = record.cpuid.groups if record.predicted_from is UNSET else record.predicted_from.groups
    cpus = entries.cpuid_of_groups(cpuid)
    features = profile_of(cpus[min(cpus)]).mask
    side = Side(holds, takes, keeps, listed=takes != 0, offers=offered(features))
    return Place(name, f"{_machine(record)}, its own register", {ANY: side})


def _machine(record: AnyRecord) -> str:
    return f"{record.kernel.release}, {record.machine.brand or record.machine.vendor}"


def move(rule: Rule, source: Place, target: Place, limit: int = ALL_BITS) -> Move:
    """Move every guest that both places know; limit is the mask of the bits that guests set at most."""
    refused = lost = 0
    refuses_all = False
    for name in source.sides:
        from_side = source.sides[name]
        to_side = target.sides.get(name) or target.sides.get(ANY)
        if to_side is None and ANY not in source.sides:
            continue
        done = rule.move(from_side, to_side or target.side, from_side.holds & limit)
        refused, lost, refuses_all = refused | done.refused, lost | done.lost, refuses_all or done.refuses_all
    return Move(refused, lost & ~refused, refuses_all)


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
