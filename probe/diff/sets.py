# SPDX-License-Identifier: MIT
"""Two records of one kind, or two sets of records: which are counterparts."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from msgspec import UnsetType

from probe import kvm_record, migration_record
from probe import record as rec
from probe.diff import kvm, migrations, runs
from probe.diff.moved import AnyRecord, Comparison, kind_of
from probe.errors import UsageError


@dataclass(frozen=True)
class Pair:
    """Two records of two sets that are of one machine and question.

    machine is what it is called, by its record or by the names of the files, or else its CPU; policy the one over KVM.
    """

    machine: str
    policy: str
    kind: str
    before: str
    after: str
    comparison: Comparison

    @property
    def name(self) -> str:
        """Which machine, and which question."""
        return f"{self.machine}{f', policy {self.policy}' if self.policy else ''}, {self.kind}"


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


_Item = tuple[str, AnyRecord]  # a file's name below the folder, and its record


@dataclass
class _Group:
    """The records of one question that may be counterparts, of both sets, in the order of their names."""

    before: list[_Item] = field(default_factory=list)
    after: list[_Item] = field(default_factory=list)

    def take(self, pairs: Iterable[tuple[_Item, _Item]]) -> list[tuple[_Item, _Item]]:
        """Take pairs out of what is left, and return them."""
        found = list(pairs)
        for left, taken in ((self.before, {one[0] for one, _ in found}), (self.after, {one[0] for _, one in found})):
            left[:] = [item for item in left if item[0] not in taken]
        return found


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


def compare_sets(before: Sequence[_Item], after: Sequence[_Item]) -> Sets:
    """Compare two sets of (name, record): those of one machine and question are counterparts.

    Names tell machines: of a lab's store HOST-<16 hexadecimal digits>.json, of what an engine left HOST/... or
    HOST.json. Of several records those of one name are counterparts, then those of one kernel, then the newest of each
    side; the last two only where the names do not speak against its being one machine. What is left has no counterpart.
    """
    groups: dict[tuple[Hashable, ...], _Group] = {}
    for number, records in enumerate((before, after)):
        for name, record in records:
            group = groups.setdefault(_question(record), _Group())
            (group.after if number else group.before).append((name, record))
    folders = [{_folder(name) for name, _ in records} for records in (before, after)]
    telling = bool((folders[0] & folders[1]) - {""})
    pairs: list[Pair] = []
    for group in groups.values():
        several = max(len(group.before), len(group.after)) > 1
        for mine, theirs in _counterparts(group, telling=telling):
            host = machine_of(mine[0])
            known = host == machine_of(theirs[0]) and (several or _is_stored(mine[0]))
            pairs.append(_pair(mine, theirs, host if known else ""))
    left = [sorted(name for group in groups.values() for name, _ in side(group)) for side in (_before, _after)]
    return Sets(tuple(sorted(pairs, key=lambda pair: pair.before)), tuple(left[0]), tuple(left[1]))


def _before(group: _Group) -> list[_Item]:
    return group.before


def _after(group: _Group) -> list[_Item]:
    return group.after


_STORED = re.compile(r"(?P<host>.+)-[0-9a-f]{16}\.json\Z")  # kernel_harness.lab.nights
_TIMED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{6}Z-")  # probe.store
_OF_STORE = re.compile(r"records\Z|[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")


def machine_of(name: str) -> str:
    """Return what a file's name, below the folder, calls its machine: as a store does, or an engine."""
    stored = _STORED.fullmatch(name.rpartition("/")[2])
    return stored["host"] if stored else _folder(name) or name.rpartition("/")[2].removesuffix(".json")


def _is_stored(name: str) -> bool:
    return bool(_STORED.fullmatch(name.rpartition("/")[2]))


def _folder(name: str) -> str:
    """Return the first folder of a name that is not of a store's making; "" if there is none."""
    return next((part for part in name.split("/")[:-1] if part and not _OF_STORE.match(part)), "")


def _counterparts(group: _Group, *, telling: bool) -> list[tuple[_Item, _Item]]:
    """Pair what is of one machine, and take it out of the group; telling: folders are called by machines."""
    hosts: dict[str, _Group] = {}
    for number, items in enumerate((group.before, group.after)):
        for item in items:
            one = hosts.setdefault(machine_of(item[0]), _Group())
            (one.after if number else one.before).append(item)
    found: list[tuple[_Item, _Item]] = []
    for one in hosts.values():
        if one.before and one.after:
            found += group.take(_of_one_machine(one))
    called = any(record.identity for _, record in group.before + group.after)
    if called or not found:
        rest = _Group(group.before[:], group.after[:])
        apart = any(_is_stored(name) or (telling and _folder(name)) for name, _ in rest.before) and any(
            _is_stored(name) or (telling and _folder(name)) for name, _ in rest.after
        )
        if called or (not apart and _may_be_one(rest.before) and _may_be_one(rest.after)):
            found += group.take(_by_kernel_then_newest(rest))
    return found


def _of_one_machine(group: _Group) -> list[tuple[_Item, _Item]]:
    """Pair records of one name; the rest, too, if they can be of one machine."""
    found = group.take(_matched(group.before, group.after, _by_name))
    both = group.before + group.after
    if all(_is_stored(name) for name, _ in both) or (
        not found and _may_be_one(group.before) and _may_be_one(group.after)
    ):
        found += _by_kernel_then_newest(group)
    return found


def _by_kernel_then_newest(group: _Group) -> list[tuple[_Item, _Item]]:
    found = group.take(_matched(group.before, group.after, _by_kernel))
    if group.before and group.after:
        newest = [max(items, key=lambda item: item[1].started) for items in (group.before, group.after)]
        found += group.take([(newest[0], newest[1])])
    return found


def _may_be_one(items: Sequence[_Item]) -> bool:
    """Tell whether records can be of one machine: of its kernels one each, or called by the time, as the probe does."""
    kernels = {record.kernel.release for _, record in items}
    return len(kernels) == len(items) or all(_TIMED.match(name.rpartition("/")[2]) for name, _ in items)


def _by_name(item: _Item) -> Hashable:
    return item[0]


def _by_kernel(item: _Item) -> Hashable:
    return item[1].kernel.release


def _matched(
    one: Sequence[_Item], other: Sequence[_Item], key: Callable[[_Item], Hashable]
) -> list[tuple[_Item, _Item]]:
    """Pair what has the same key and is alone with it on both sides."""
    sides: list[dict[Hashable, list[_Item]]] = [{}, {}]
    for found, items in zip(sides, (one, other)):
        for item in items:
            found.setdefault(key(item), []).append(item)
    return [
        (mine[0], sides[1][name][0])
        for name, mine in sides[0].items()
        if len(mine) == 1 and len(sides[1].get(name, ())) == 1
    ]


def _pair(mine: _Item, theirs: _Item, host: str) -> Pair:
    record = mine[1]
    machine = record.machine
    cpu = f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x}"
    policy = ""
    if isinstance(record, kvm_record.KvmRecord) and not isinstance(record.policy, UnsetType):
        policy = record.policy.name
    return Pair(record.identity or host or cpu, policy, kind_of(record), mine[0], theirs[0], compare(record, theirs[1]))
