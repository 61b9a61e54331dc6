# SPDX-License-Identifier: MIT
"""Two records of one kind, or two sets of records: which are counterparts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from msgspec import UnsetType

from probe import kvm_record, migration_record
from probe import record as rec
from probe.diff import kvm, migrations, runs
from probe.diff.moved import AnyRecord, Comparison, kind_of
from probe.errors import UsageError


@dataclass(frozen=True)
class Pair:
    """Two records of two sets that are of one machine and question; name says which."""

    name: str
    before: str
    after: str
    comparison: Comparison


@dataclass(frozen=True)
class Sets:
    """Two sets: the pairs, and the records that have no counterpart."""

    pairs: tuple[Pair, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def same(self) -> bool:
        """True if every record has its counterpart, and it saw the same."""
        return not (self.only_before or self.only_after) and all(pair.comparison.same for pair in self.pairs)


def compare(before: AnyRecord, after: AnyRecord) -> Comparison:
    """Compare two records of one kind; raise UsageError for two kinds, which have nothing in common."""
    if isinstance(before, rec.Record) and isinstance(after, rec.Record):
        return runs.compare(before, after)
    if isinstance(before, kvm_record.KvmRecord) and isinstance(after, kvm_record.KvmRecord):
        return kvm.compare(before, after)
    if isinstance(before, migration_record.MigrationRecord) and isinstance(after, migration_record.MigrationRecord):
        return migrations.compare(before, after)
    raise UsageError(f"a {kind_of(before)} and a {kind_of(after)} have nothing to compare", "two records of one kind")


@dataclass
class _Side:
    """The records of one set under one key, in the order of their names."""

    records: list[tuple[str, AnyRecord]] = field(default_factory=list)


def _question(record: AnyRecord) -> tuple[Hashable, ...]:
    """Return what two records must share to be counterparts: the machine and what it was asked, not its kernel."""
    machine = record.machine
    key: tuple[Hashable, ...] = (
        kind_of(record),
        record.identity,
        machine.vendor,
        machine.signature,
        machine.hypervisor,
    )
    if isinstance(record, rec.Record):
        guest = record.place.guest
        model = "" if isinstance(guest, UnsetType) else guest.register_model
        return (*key, record.place.kind, model)
    guest_place = record.guest
    if not isinstance(guest_place, UnsetType):
        tested = "" if isinstance(guest_place.tested, UnsetType) else guest_place.tested
        key = (*key, guest_place.cpu, tested)
    if isinstance(record, kvm_record.KvmRecord):
        return (*key, "" if isinstance(record.policy, UnsetType) else record.policy.name)
    return (*key, record.study)


def compare_sets(before: Sequence[tuple[str, AnyRecord]], after: Sequence[tuple[str, AnyRecord]]) -> Sets:
    """Compare two sets of (name, record): those of one machine and question are counterparts.

    Of several, those of the same file name are, then those of the same kernel, then the newest of each side; what is
    left over has no counterpart.
    """
    sides: dict[tuple[Hashable, ...], tuple[_Side, _Side]] = {}
    for number, records in enumerate((before, after)):
        for name, record in records:
            sides.setdefault(_question(record), (_Side(), _Side()))[number].records.append((name, record))
    pairs: list[Pair] = []
    left: tuple[list[str], list[str]] = ([], [])
    for one, other in sides.values():
        for same in (_by_name, _by_kernel, None):
            for mine, theirs in _matched(one.records, other.records, same):
                one.records.remove(mine)
                other.records.remove(theirs)
                pairs.append(Pair(_named(mine[1]), mine[0], theirs[0], compare(mine[1], theirs[1])))
        left[0].extend(name for name, _ in one.records)
        left[1].extend(name for name, _ in other.records)
    return Sets(tuple(sorted(pairs, key=lambda pair: pair.before)), tuple(sorted(left[0])), tuple(sorted(left[1])))


def _by_name(item: tuple[str, AnyRecord]) -> Hashable:
    return item[0]


def _by_kernel(item: tuple[str, AnyRecord]) -> Hashable:
    return item[1].kernel.release


def _matched(
    one: Sequence[tuple[str, AnyRecord]],
    other: Sequence[tuple[str, AnyRecord]],
    key: Callable[[tuple[str, AnyRecord]], Hashable] | None,
) -> list[tuple[tuple[str, AnyRecord], tuple[str, AnyRecord]]]:
    """Pair what has the same key and is alone with it on both sides; without a key, the newest of each side."""
    if key is None:
        newest = [max(items, key=lambda item: item[1].started) for items in (one, other) if items]
        return [(newest[0], newest[1])] if len(newest) == 2 else []
    pairs = []
    for mine in one:
        alike = [item for item in other if key(item) == key(mine)]
        if len(alike) == 1 and sum(key(item) == key(mine) for item in one) == 1:
            pairs.append((mine, alike[0]))
    return pairs


def _named(record: AnyRecord) -> str:
    machine = record.machine
    name = f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x}"
    if isinstance(record, kvm_record.KvmRecord) and not isinstance(record.policy, UnsetType):
        name += f", policy {record.policy.name}"
    return f"{record.identity or name}, {kind_of(record)}"
