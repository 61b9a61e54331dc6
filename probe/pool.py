# SPDX-License-Identifier: MIT
"""Records as sides of a migration: what guests may hold there, what a restore takes, and pools of many. Pure."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, Union

from msgspec import UNSET

from probe import entries, kvm_record
from probe import record as rec
from probe.errors import RecordError
from probe.masks import ALL_BITS, hex64, parse_hex64
from probe.models.migration import (
    GATE,
    Acts,
    Met,
    Move,
    Rule,
    Side,
    acting,
    closed,
    enumerators,
    met_on,
    met_on_both,
    worst_of,
)
from probe.models.peer_machines import enumerated
from probe.models.profile import NONE, Profile, parse_profile, profile_of
from probe.models.what_if import offered
from probe.registers import DEFINED

ANY = "any"  # the profile of a record that knows of no guests: a machine's own register
_NO_CPUID = str(NONE)
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

    @functools.cached_property
    def by_guest(self) -> Mapping[int, Side]:
        """The sides of guests that were measured, by their CPUID."""
        return {side.guest: side for name, side in self.sides.items() if name not in (ANY, _NO_CPUID)}


def place_of(record: AnyRecord, name: str) -> Place:
    """Turn a record of either kind into a place; raise RecordError if it holds no measurement."""
    if isinstance(record, kvm_record.KvmRecord):
        return _of_kvm(record, name)
    return _of_run(record, name)


@functools.lru_cache(maxsize=1 << 12)
def _guest(name: str) -> tuple[str, int]:
    """Return what a profile is called here, and its mask."""
    profile = parse_profile(name)
    return kvm_record.profile_name(profile), profile.mask


def _of_kvm(record: kvm_record.KvmRecord, name: str) -> Place:
    """A guest by itself is let through by its first accepted write; it holds what is saved, or reads back, after it."""
    if kvm_record.complaints(record):
        raise RecordError(f"{name} is of a policy that did not decide every write", "mend the policy, and run it again")
    kvm_record.check_names(record, name)
    offers = kvm_record.parsed_profile(record.hardware.supported_cpuid).mask
    listed = record.kvm.in_msr_index_list
    sides = {}
    for row in record.rows:
        cells = {cell: parse_hex64(mask) for cell, mask in row.cells.items()}
        let_through = cells.get("guest_after_seen", 0) & cells.get("guest_after", 0) if cells["guest_first"] else 0
        reads = cells["guest_read"] != 0
        holds = cells["guest_first"] & cells["guest_first_kept"] | let_through
        keeps = cells["host_first_seen"] if reads else cells["host_first_kept"]
        sees = cells["guest_first_seen"] | let_through if reads else ALL_BITS
        taken = cells["guest_first"] | cells.get("guest_after", 0)
        forgets = bool(taken & DEFINED) and not holds & DEFINED
        acts = Acts(holds, cells["host_first"], keeps, sees, listed, cells["host_zero"] != 0, forgets)
        for called, guest in map(_guest, row.profiles):
            sides[called] = acting(acts, guest, offers)
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
    guest = offered(features)
    forgets = bool(takes & DEFINED) and not holds & DEFINED
    side = Side(
        holds, takes, keeps, listed=takes != 0, offers=guest, guest=guest, takes_zero=takes != 0, forgets=forgets
    )
    guests = record.machine.under_hypervisor or record.place.kind == "guest"
    whose = "the register of a guest, as a KVM inside would pass it on" if guests else "its own register"
    return Place(name, f"{_machine(record)}, {whose}", {ANY: side})


def _machine(record: AnyRecord) -> str:
    return f"{record.kernel.release}, {record.machine.brand or record.machine.vendor}"


@functools.lru_cache(maxsize=1 << 14)
def _own_register_for(side: Side, guest: int) -> Side:
    """Return a machine's own register as a guest of a CPUID has it, by KVM's gate."""
    return replace(
        side, guest=guest, holds=side.holds if guest & GATE else 0, forgets=side.forgets and guest & GATE != 0
    )


def pairs(source: Place, target: Place) -> list[tuple[Side, Side]]:
    """Return what there is to compare: the sides of the guest profiles that both places know.

    A machine's own register stands for every profile. Raise RecordError if there is no profile in common.
    """
    if ANY in source.sides and ANY in target.sides:
        return [(source.sides[ANY], target.sides[ANY])]
    if ANY in source.sides:
        own = source.sides[ANY]
        return [(_own_register_for(own, side.guest), side) for side in target.sides.values()]
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
    return ANY in source.sides or ANY in target.sides or not source.sides.keys().isdisjoint(target.sides)


def move(rule: Rule, source: Place, target: Place) -> Move:
    """Move every guest that both places know; raise as pairs() does."""
    refused = lost = beyond = unsaid = absent = 0
    refuses_all = False
    both = pairs(source, target)
    alike: dict[tuple[object, ...], list[tuple[Side, Side]]] = {}
    for side, other in both:
        alike.setdefault((side.acts, other.acts, rule.lets and side.guest), []).append((side, other))
    for (side, other), *more in alike.values():
        held = rule.held(side)
        if held is None:
            absent += 1 + len(more)
            continue
        done = rule.move(side, other, held)
        refused, lost, refuses_all = refused | done.refused, lost | done.lost, refuses_all or done.refuses_all
        unsaid += 1 + len(more) if side.forgets and not done.broken else 0
        beyond |= side.holds & side.sees & ~held
    return Move(refused, lost, refuses_all, len(both), unsaid, absent, beyond)


def in_common(places: Sequence[Place]) -> list[str]:
    """Name the guest profiles that all places know; a machine's own register stands for every one."""
    names = [set(place.sides) for place in places if ANY not in place.sides]
    return sorted(set.intersection(*names)) if names else [ANY]


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


class Stay(NamedTuple):
    """A guest on one kind of machine.

    number is the kind's; acts: what that machine does with the guest's register; several: it has more than one machine;
    own: its own register stands for this guest's; guest: the CPUID that it gives its guests, where no guest is known.
    """

    number: int
    acts: Acts
    several: bool
    own: bool = False
    guest: int | None = None


Pool = Sequence["tuple[int, tuple[Stay, ...]]"]  # each guest CPUID that some kind knows, and where it may be


def stays_of(groups: Sequence[Group]) -> Pool:
    """Return where guests may be; a machine's own register takes every one."""
    guests = {name: side.guest for group in groups for name, side in group.first.sides.items()}
    return [
        (guest, tuple(stay for number, group in enumerate(groups) for stay in _stay_of(number, group, name, guest)))
        for name, guest in guests.items()
    ]


def _stay_of(number: int, group: Group, name: str, guest: int) -> Iterator[Stay]:
    side = group.first.sides.get(name)
    several = len(group.places) > 1
    if side is not None:
        yield Stay(number, side.acts, several, guest=side.guest if name == ANY else None)
    elif ANY in group.first.sides:
        yield Stay(number, _own_register_for(group.first.sides[ANY], guest).acts, several, own=True)


def _departures(stays: Sequence[Stay]) -> Iterator[tuple[Stay, Met]]:
    """Yield each stay with what its guest meets that leaves it for any other machine, as pairs() pairs them."""
    met = [met_on(acting(stay.acts)) for stay in stays]
    nothing: Met = {}
    known = functools.reduce(met_on_both, (one for one, stay in zip(met, stays) if not stay.own), nothing)
    before = list(accumulate(met, met_on_both, initial=nothing))
    after = list(accumulate(reversed(met), met_on_both, initial=nothing))[::-1]
    for at, stay in enumerate(stays):
        others = known if stay.own else met_on_both(before[at], after[at + 1])
        yield stay, met_on_both(others, met[at]) if stay.several and not stay.own else others


@dataclass(frozen=True)
class Breaks:
    """What breaks in a pool under a rule.

    kinds are the numbers of those that guests do not leave whole for every other machine; bits those without which
    their moves would work, by the CPUID of the guest; every_value: some machine refuses whatever the value.
    """

    kinds: frozenset[int]
    bits: Mapping[int, int]
    every_value: bool

    @property
    def some(self) -> bool:
        """Tell whether anything breaks."""
        return bool(self.kinds)


class _Broken(NamedTuple):
    """What breaks when guests leave one kind; refuses_zero: some machine refuses whatever the value."""

    stay: Stay
    held: int
    bits: int
    refuses_zero: bool
    refuses_all: bool


def breaks_of(pool: Pool, rule: Rule, *, careful: bool) -> Breaks:
    """Find what breaks in any move; careful: guests set only what their CPUID enumerates.

    Guests that every machine treats alike are looked at together.
    """
    alike: dict[tuple[object, tuple[Stay, ...]], list[int]] = {}
    for guest, stays in pool:
        alike.setdefault((rule.lets and rule.lets(Profile(guest)), stays), []).append(guest)
    kinds: set[int] = set()
    bits: dict[int, int] = {}
    every_value = False
    for (_, stays), guests in alike.items():
        for one in _broken(stays, rule, guests[0]):
            for guest in guests if one.stay.guest is None else (one.stay.guest,):
                left, refused = _left(one, rule, enumerated(guest)) if careful else (one.bits, one.refuses_all)
                if left or refused:
                    kinds.add(one.stay.number)
                    every_value = every_value or refused
                    bits[guest] = bits.get(guest, 0) | left
    return Breaks(frozenset(kinds), bits, every_value)


def _broken(stays: Sequence[Stay], rule: Rule, guest: int) -> Iterator[_Broken]:
    """Yield what breaks for a guest that leaves each kind."""
    for stay, met in _departures(stays):
        side = acting(stay.acts, guest if stay.guest is None else stay.guest)
        held = rule.held(side)
        if held is None:
            continue
        bits = 0
        refuses_zero = refuses_all = False
        for worst in worst_of(met):
            bits |= rule.culprits(side, worst, held)
            refuses_all = refuses_all or rule.move(side, worst, held).refuses_all
            refuses_zero = refuses_zero or rule.move(side, worst, 0).refuses_all
        if bits or refuses_all:
            yield _Broken(stay, held, bits, refuses_zero, refuses_all)


def _left(one: _Broken, rule: Rule, fields: int) -> tuple[int, bool]:
    """Return the bits, and whether any value is refused, that still break if the guest holds no other fields."""
    held = one.held & fields
    bits = one.bits & fields if not rule.forgives or held & one.stay.acts.sees else 0
    return bits, one.refuses_all and (one.refuses_zero or held != 0)


def _without(pool: Pool, places: Sequence[Place], hide: int) -> Pool:
    """Return where the same guests are without some CPUID bits: as measured, or by what CPUID still enumerates."""
    return [
        (guest & ~hide, tuple(_stay_without(stay, places[stay.number], guest, hide) for stay in stays))
        if any(stay.guest is not None for stay in stays) or guest & hide
        else (guest, stays)
        for guest, stays in pool
    ]


def _stay_without(stay: Stay, place: Place, guest: int, hide: int) -> Stay:
    """Return a stay of such a guest; one that has lost the last bit of KVM's gate is taken for one that has none."""
    if stay.guest is not None:
        if not stay.guest & hide:
            return stay
        left = stay.guest & ~hide
        return stay._replace(guest=left, acts=stay.acts if left & GATE else closed(stay.acts))
    left = guest & ~hide
    if not stay.own:
        side = place.by_guest.get(left) or (None if left & GATE else place.by_guest.get(0))
        if side is not None:
            return Stay(stay.number, side.acts, stay.several)
    return stay if left & GATE else Stay(stay.number, closed(stay.acts), stay.several, stay.own)


def _tried(pool: Pool, places: Sequence[Place], rule: Rule, found: Breaks, *, careful: bool) -> int | None:
    """Return the features without which no move breaks, as has been tried; 0: none breaks; None: there are none.

    Without a bit other bits may break, on a machine whose own test looks at the guest's CPUID: these go, too.
    """
    offered_to = _either(side.offers for place in places for side in place.sides.values())
    measured = _either(guest if stay.guest is None else stay.guest for guest, stays in pool for stay in stays)
    hide = 0
    while found.some:
        more = 0
        for guest, bits in found.bits.items():
            more |= (enumerators(bits) if careful else rule.gate) & (guest | offered_to & ~measured)
        if not more & ~hide:
            return None
        hide |= more
        found = breaks_of(_without(pool, places, hide), rule, careful=careful)
    return hide


@dataclass(frozen=True)
class Advice:
    """The smallest change of guests' CPUID that is found to make a pool safe under a rule.

    breaks says what breaks as it is. whole are the bits that some guest may hold and read, and that every move leaves.
    hide are the features (a mask over profile.FEATURES) to leave out for guests that set only what CPUID enumerates,
    closes those for guests that set what they like; 0: none, None: that makes nothing safe. Both were tried: every move
    of the pool without them works. hole: the bits that a guest with none of the features of closes may hold, and a move
    breaks. unmeasured: the CPUIDs that hide leaves and that some machine was not measured with, unmeasured_closed those
    that closes leaves: what such a guest does is taken from KVM's gate and what CPUID still enumerates. guests: so many
    CPUIDs are known; of unsaid of them nothing can be said (Side.forgets), of unseen a loss would not be seen, as the
    guest reads nothing back.
    """

    breaks: Breaks
    whole: int
    hide: int | None
    closes: int | None
    hole: int
    unmeasured: tuple[Profile, ...]
    unmeasured_closed: tuple[Profile, ...]
    unsaid: int
    unseen: int
    guests: int


def advise(groups: Sequence[Group], rule: Rule) -> Advice:
    """Find what guests of a pool must not have, from the moves that break under a rule, and try whether it helps."""
    places = [group.first for group in groups]
    pool = stays_of(groups)
    found = breaks_of(pool, rule, careful=False)
    careful = breaks_of(pool, rule, careful=True) if found.some else found
    hide = _tried(pool, places, rule, careful, careful=True)
    closes = _tried(pool, places, rule, found, careful=False)
    held = _either(
        (rule.held(side) or 0) & side.sees for place in places for side in place.sides.values() if not side.forgets
    )
    return Advice(
        breaks=found,
        whole=0 if found.every_value else held & ~_either(found.bits.values()),
        hide=hide,
        closes=closes,
        hole=_either(bits for guest, bits in found.bits.items() if not guest & rule.gate),
        unmeasured=_unmeasured(places, hide or 0),
        unmeasured_closed=_unmeasured(places, closes or 0),
        unsaid=sum(any(stay.acts.forgets for stay in stays) for _, stays in pool),
        unseen=sum(any(_unseen(stay.acts) for stay in stays) for _, stays in pool),
        guests=len(pool),
    )


def _unmeasured(places: Iterable[Place], hide: int) -> tuple[Profile, ...]:
    """Return the CPUIDs that hiding leaves and that some KVM was not measured with."""
    left: set[int] = set()
    for place in places if hide else ():
        if ANY not in place.sides:
            left |= {guest & ~hide for guest in place.by_guest if guest & hide} - place.by_guest.keys()
    return tuple(Profile(guest) for guest in sorted(left))


def _either(masks: Iterable[int]) -> int:
    return functools.reduce(int.__or__, masks, 0)


def _unseen(acts: Acts) -> bool:
    """Tell whether defined bits are held that the guest itself does not read."""
    return bool(acts.holds & DEFINED) and not acts.holds & acts.sees & DEFINED


def features_of(mask: int) -> str:
    """Name the CPUID bits of a mask over profile.FEATURES."""
    return str(Profile(mask)).replace(",", ", ")
