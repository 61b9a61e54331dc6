# SPDX-License-Identifier: MIT
"""Two records, or two sets of them: what moved, grouped so that one cause is one line, and what else differs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from msgspec import UNSET, UnsetType

from probe import kvm_record, migration_record
from probe import record as rec
from probe.errors import UsageError
from probe.masks import bits_of, format_list, hex64, parse_hex64
from probe.models.profile import FEATURES, parse_profile
from probe.outcome import Outcome
from probe.profile_sets import Universe

AnyRecord = Union[rec.Record, kvm_record.KvmRecord, migration_record.MigrationRecord]


@dataclass(frozen=True)
class Moved:
    """One cause: what was seen before and after, of which bits (0: it is not about bits), where.

    what says who did what ("guest write, first"); where the CPUs or profiles, count how many of them.
    """

    what: str
    before: str
    after: str
    bits: int = 0
    where: str = ""
    count: int = 0


@dataclass(frozen=True)
class Condition:
    """One thing around the measurement that is not the same in both records."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """Two records of one kind.

    conditions say whether the comparison is fair; alike names what was looked at and is the same. only_before and
    only_after are the CPUs or profiles that one record alone has.
    """

    kind: str
    conditions: tuple[Condition, ...]
    alike: tuple[str, ...]
    moved: tuple[Moved, ...]
    only_before: str = ""
    only_after: str = ""

    @property
    def same(self) -> bool:
        """True if both saw the same, whatever else differs."""
        return not (self.moved or self.only_before or self.only_after)


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
        return _runs(before, after)
    if isinstance(before, kvm_record.KvmRecord) and isinstance(after, kvm_record.KvmRecord):
        return _kvms(before, after)
    if isinstance(before, migration_record.MigrationRecord) and isinstance(after, migration_record.MigrationRecord):
        return _migrations(before, after)
    raise UsageError(f"a {kind_of(before)} and a {kind_of(after)} have nothing to compare", "two records of one kind")


def kind_of(record: AnyRecord) -> str:
    """Say what a record is of."""
    if isinstance(record, rec.Record):
        return "record of a run"
    return "record of KVM" if isinstance(record, kvm_record.KvmRecord) else "record of migrations"


# --- what else differs -----------------------------------------------------------------------------------------------


def _around(record: AnyRecord) -> dict[str, str]:
    """Return what bears on a result without being one, each with its name."""
    machine, kernel = record.machine, record.kernel
    bios = machine.bios
    found = {
        "machine": f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x} {machine.brand}",
        "microcode": ", ".join(one.revision for one in machine.microcode) or "unknown",
        "firmware": f"{bios.vendor} {bios.version} {bios.date}".strip() or "unknown",
        "hypervisor": (machine.hypervisor or "unnamed") if machine.under_hypervisor else "none",
        "SMT": machine.smt or "unknown",
        "kernel": f"{kernel.release} {kernel.version}",
        "command line": " ".join(kernel.cmdline),
        "lockdown": kernel.lockdown,
        **{f"mitigation {name}": text for name, text in sorted(kernel.mitigations.items())},
        "record version": record.schema_version,
        "tool": record.tool.version,
    }
    if isinstance(record, rec.Record):
        return {**found, **_around_run(record)}
    hardware = record.hardware
    found |= {
        "KVM backend": record.kvm.backend or "not to be seen",
        "ignore_msrs": record.kvm.ignore_msrs or "unknown",
        "host CPUID": hardware.host_cpuid,
        "CPUID offered": hardware.supported_cpuid,
        "place": _kvm_place(record.guest),
    }
    if isinstance(record, kvm_record.KvmRecord):
        found["policy"] = "none" if isinstance(record.policy, UnsetType) else record.policy.name
    return found


def _around_run(record: rec.Record) -> dict[str, str]:
    walk = record.walk
    place: str = record.place.kind
    if not isinstance(record.place.guest, UnsetType):
        guest = record.place.guest
        place += f": {guest.kernel} {guest.kernel_version}, {guest.qemu}, {guest.accelerator} {guest.register_model}"
    return {
        "place": place.rstrip(),
        "allow_writes": record.kernel.allow_writes or "unknown",
        "bits tried": "none" if isinstance(walk, UnsetType) else walk.bits,
        "base": "none" if isinstance(walk, UnsetType) else walk.base,
        "judge": record.judge,
        "CPUID from": "this machine" if isinstance(record.predicted_from, UnsetType) else record.predicted_from.form,
    }


def _kvm_place(guest: kvm_record.GuestPlace | UnsetType) -> str:
    if isinstance(guest, UnsetType):
        return "this machine"
    tested = "" if isinstance(guest.tested, UnsetType) else f", tested {guest.tested}"
    cpu = f", CPUID {guest.cpu}" if guest.cpu else ""
    return f"guest: {guest.kernel} {guest.kernel_version}, {guest.qemu}, {guest.accelerator}{cpu}{tested}"


def _conditions(before: AnyRecord, after: AnyRecord) -> tuple[tuple[Condition, ...], tuple[str, ...]]:
    one, other = ({name: text.strip() for name, text in _around(record).items()} for record in (before, after))
    names = list(dict.fromkeys([*one, *other]))
    conditions = tuple(
        Condition(name, one.get(name, "not recorded") or "none", other.get(name, "not recorded") or "none")
        for name in names
        if one.get(name, "") != other.get(name, "")
    )
    differing = {condition.what for condition in conditions}
    groups = dict.fromkeys("mitigations" if name.startswith("mitigation ") else name for name in names)
    alike = [
        name
        for name in groups
        if name not in differing
        and not (name == "mitigations" and any(what.startswith("mitigation ") for what in differing))
    ]
    return conditions, tuple(alike)


# --- runs ------------------------------------------------------------------------------------------------------------


class _Causes:
    """Collects changes; those that are alike but for where they happened become one."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str, int], list[int]] = {}

    def add(self, what: str, before: str, after: str, bits: int, where: int) -> None:
        self._found.setdefault((what, before, after, bits), []).append(where)

    def moved(self, told: Callable[[list[int]], str]) -> list[Moved]:
        return [
            Moved(what, before, after, bits, told(where), len(where))
            for (what, before, after, bits), where in self._found.items()
        ]


def _by_cpu(entries: Iterable[Any], value: Callable[[Any], Any]) -> dict[int, Any]:
    return {cpu: value(entry) for entry in entries for cpu in rec.cpus_of(entry.cpus)}


def _cpus(cpus: Iterable[int]) -> str:
    return f"CPUs {format_list(cpus)}"


def _runs(before: rec.Record, after: rec.Record) -> Comparison:
    causes = _Causes()
    seen = [_by_cpu(record.observations, lambda entry: entry) for record in (before, after)]
    both = sorted(set(seen[0]) & set(seen[1]))
    cache: dict[tuple[int, int], list[tuple[str, str, int]]] = {}
    for cpu in both:
        one, other = seen[0][cpu], seen[1][cpu]
        key = (id(one), id(other))
        if key not in cache:
            cache[key] = list(_outcomes_moved(one.outcomes, other.outcomes))
        for word, its, mask in cache[key]:
            causes.add("write", word, its, mask, cpu)
    held = [_by_cpu(record.saved, lambda entry: entry.value) for record in (before, after)]
    for cpu in sorted(set(held[0]) & set(held[1])):
        if held[0][cpu] != held[1][cpu]:
            causes.add("held before the run", held[0][cpu], held[1][cpu], 0, cpu)
    for model in dict.fromkeys(entry.model for entry in (*before.predictions, *after.predictions)):
        said = [
            _by_cpu([entry for entry in record.predictions if entry.model == model], lambda entry: entry)
            for record in (before, after)
        ]
        for cpu in sorted(set(said[0]) & set(said[1])):
            for word, its, mask in _predictions_moved(said[0][cpu], said[1][cpu]):
                causes.add(f"model {model} predicts", word, its, mask, cpu)
    put_back = [_by_cpu(record.restore, lambda entry: entry.state) for record in (before, after)]
    for cpu in sorted(set(put_back[0]) & set(put_back[1])):
        if put_back[0][cpu] != put_back[1][cpu]:
            causes.add("put back", put_back[0][cpu], put_back[1][cpu], 0, cpu)
    moved = [*causes.moved(_cpus), *_findings_moved(before, after)]
    conditions, alike = _conditions(before, after)
    only = [sorted(set(seen[at]) - set(seen[1 - at])) for at in (0, 1)]
    return Comparison("run", conditions, alike, tuple(moved), *(_cpus(cpus) if cpus else "" for cpus in only))


def _outcomes_moved(one: rec.Masks, other: rec.Masks) -> Iterable[tuple[str, str, int]]:
    mine, theirs = rec.observation_of(one), rec.observation_of(other)
    for word in Outcome:
        for its in Outcome:
            mask = getattr(mine, word.value) & getattr(theirs, its.value)
            if word is not its and mask:
                yield word.value, its.value, mask


def _predictions_moved(one: rec.PredictionEntry, other: rec.PredictionEntry) -> Iterable[tuple[str, str, int]]:
    words = ("accepts", "faults", "either")
    for word in words:
        for its in words:
            mask = parse_hex64(getattr(one, word)) & parse_hex64(getattr(other, its))
            if word != its and mask:
                yield word, its, mask


def _findings_moved(before: rec.Record, after: rec.Record) -> list[Moved]:
    """Findings that came and went; the same one on other CPUs is another."""

    def keys(record: rec.Record) -> dict[tuple[str, str, str], rec.FindingEntry]:
        return {(entry.kind, entry.mask, entry.cpus): entry for entry in record.findings}

    one, other = keys(before), keys(after)
    moved = []
    for key in dict.fromkeys([*one, *other]):
        if (key in one) != (key in other):
            kind, mask, cpus = key
            word = ("there", "gone") if key in one else ("none", "new")
            count = len(rec.cpus_of(cpus))
            moved.append(Moved(f"finding {kind}", *word, parse_hex64(mask), f"CPUs {cpus}", count))
    return moved


# --- KVM -------------------------------------------------------------------------------------------------------------

# Cell -> (who does what, the word for a bit that is not in its mask, and for one that is).
_CELL_WORDS: Mapping[str, tuple[str, str, str]] = {
    "host_first": ("host write, first", "refused", "accepted"),
    "host_first_kept": ("host write, first, read back by the host", "not kept", "kept"),
    "host_first_seen": ("host write, first, read by the guest", "not seen", "seen"),
    "guest_first": ("guest write, first", "#GP", "accepted"),
    "guest_first_seen": ("guest write, first, read back by the guest", "not kept", "kept"),
    "guest_first_kept": ("guest write, first, read by the host", "not saved", "saved"),
    "guest_after": ("guest write after a host's", "#GP", "accepted"),
    "guest_after_seen": ("guest write after a host's, read back", "not kept", "kept"),
    "host_after": ("host write once the guest was let through", "refused", "accepted"),
    "host_zero": ("host write of 0", "refused", "accepted"),
    "guest_zero": ("guest write of 0", "#GP", "accepted"),
    "host_read": ("host read, first", "not 0", "0"),
    "guest_read": ("guest read, first", "not 0 or #GP", "0"),
    "pred_cmd_host": ("host write of IA32_PRED_CMD", "refused", "accepted"),
    "pred_cmd_guest": ("guest write of IA32_PRED_CMD", "#GP", "accepted"),
    "virt_spec_ctrl_host": ("host write of VIRT_SPEC_CTRL", "refused", "accepted"),
    "virt_spec_ctrl_guest": ("guest write of VIRT_SPEC_CTRL", "#GP", "accepted"),
}
# What is read back counts on the bits that were accepted both times: the rest follows from the write.
_FOLLOWS = {
    "host_first_kept": "host_first",
    "host_first_seen": "host_first",
    "guest_first_seen": "guest_first",
    "guest_first_kept": "guest_first",
    "guest_after_seen": "guest_after",
}
_GATE = "guest access, first (reads, too, and 0)"
_SINGLE = {"host_zero", "guest_zero", "host_read", "guest_read"}


def _kvms(before: kvm_record.KvmRecord, after: kvm_record.KvmRecord) -> Comparison:
    rows = [{row.profile: row.masks for row in kvm_record.rows_of(record)} for record in (before, after)]
    both = [profile for profile in rows[0] if profile in rows[1]]
    universe = Universe(both)
    moved = [*_models_moved(before, after), *_hardware_moved(before, after)]
    moved += _rows_moved(universe, [rows[0][profile] for profile in both], [rows[1][profile] for profile in both])
    moved += _driver_moved(before, after)
    conditions, alike = _conditions(before, after)
    only = []
    for mine, theirs in ((rows[0], rows[1]), (rows[1], rows[0])):
        missing = [kvm_record.profile_name(profile) for profile in mine if profile not in theirs]
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        told = ", ".join(name.replace(",", "+") for name in missing[:4])
        only.append(f"{len(missing)} profiles: {told}{more}" if missing else "")
    return Comparison("kvm", conditions, alike, tuple(moved), *only)


@dataclass(frozen=True)
class _Change:
    """One direction in which a cell changed."""

    cell: str
    before: str
    after: str


def _rows_moved(
    universe: Universe, before: Sequence[Mapping[str, int]], after: Sequence[Mapping[str, int]]
) -> list[Moved]:
    """Group what changed by profiles and bits: as masks of bits or bit by bit, whichever tells it in fewer lines."""
    cache: dict[tuple[int, int], list[tuple[_Change, int]]] = {}
    by_mask: dict[tuple[_Change, int], int] = {}
    by_bit: dict[tuple[_Change, int], int] = {}
    for number, (one, other) in enumerate(zip(before, after)):
        key = (id(one), id(other))
        if key not in cache:
            cache[key] = list(_cells_moved(one, other))
        for change, bits in cache[key]:
            by_mask[change, bits] = by_mask.get((change, bits), 0) | 1 << number
    whole = [(change, bits, profiles) for (change, bits), profiles in by_mask.items()]
    if len(whole) > _MOST_CAUSES:
        return _summed(universe, whole)
    for change, bits, profiles in whole:
        for bit in bits_of(bits) if bits else (-1,):
            by_bit[change, bit] = by_bit.get((change, bit), 0) | profiles
    merged: dict[tuple[_Change, int], int] = {}
    for (change, bit), profiles in by_bit.items():
        merged[change, profiles] = merged.get((change, profiles), 0) | (1 << bit if bit >= 0 else 0)
    single = [(change, bits, profiles) for (change, profiles), bits in merged.items()]
    found = min((_lines(single), _lines(whole)), key=len)
    return [
        Moved(what, no, yes, bits, universe.describe(profiles), bin(profiles).count("1"))
        for what, no, yes, bits, profiles in found
    ]


_MOST_CAUSES = 400  # beyond, nobody reads a line for each


def _summed(universe: Universe, changes: Sequence[tuple[_Change, int, int]]) -> list[Moved]:
    """Return one line for each cell and direction, where nearly every profile changed in bits of its own."""
    found: dict[_Change, tuple[int, int]] = {}
    for change, bits, profiles in changes:
        before = found.get(change, (0, 0))
        found[change] = (before[0] | bits, before[1] | profiles)
    moved = []
    for change, (bits, profiles) in found.items():
        what = _CELL_WORDS[change.cell][0] if change.cell in _CELL_WORDS else change.cell
        where = universe.describe(profiles)
        told = f"{what} (each profile in bits of its own)"
        moved.append(Moved(told, change.before, change.after, bits, where, bin(profiles).count("1")))
    return moved


def _lines(changes: Sequence[tuple[_Change, int, int]]) -> list[tuple[str, str, str, int, int]]:
    """Put changes of the same bits, words and profiles into one line; a gate that opened or closed is one, too.

    Changes are (change, bits, profiles), lines (what, before, after, bits, profiles).
    """
    cells: dict[tuple[str, str, int, int], list[str]] = {}
    for change, bits, profiles in changes:
        about = 0 if change.cell in _SINGLE else bits
        cells.setdefault((change.before, change.after, about, profiles), []).append(change.cell)
    gates = {key[:2] + key[3:] for key, names in cells.items() if "guest_zero" in names}
    gates &= {key[:2] + key[3:] for key, names in cells.items() if "guest_first" in names}
    moved = {profiles for _, _, profiles in gates}
    found = []
    for (before, after, bits, profiles), names in cells.items():
        told = []
        for name in names:
            if (before, after, profiles) in gates and name in ("guest_first", "guest_zero"):
                told += [_GATE] if name == "guest_first" else []
            elif not (name == "guest_read" and profiles in moved):  # it opens and closes with the gate
                told.append(_CELL_WORDS[name][0] if name in _CELL_WORDS else name)
        if told:
            found.append(("; ".join(told), before, after, bits, profiles))
    return found


def _cells_moved(one: Mapping[str, int], other: Mapping[str, int]) -> Iterable[tuple[_Change, int]]:
    """Yield what changed for one profile, and its bits; 0 where it is not about bits."""
    for cell in dict.fromkeys([*one, *other]):
        _, no, yes = _CELL_WORDS.get(cell, ("", "no", "yes"))
        if (cell in one) != (cell in other):
            if cell == "guest_after":  # the others of its kind go with it
                words = ("no guest was let through", "asked")
                mine, theirs = words if cell in other else words[::-1]
                yield _Change(cell, mine, theirs), 0
            continue
        both = ~0
        if cell in _FOLLOWS:
            both = one.get(_FOLLOWS[cell], 0) & other.get(_FOLLOWS[cell], 0)
        gained, lost = other[cell] & ~one[cell] & both, one[cell] & ~other[cell] & both
        if gained:
            yield _Change(cell, no, yes), gained
        if lost:
            yield _Change(cell, yes, no), lost


def _models_moved(before: kvm_record.KvmRecord, after: kvm_record.KvmRecord) -> list[Moved]:
    moved = []
    told = [", ".join(record.explained_by) or "no model" for record in (before, after)]
    if set(before.explained_by) != set(after.explained_by):
        moved.append(Moved("explained by", told[0], told[1]))
    if before.follows != after.follows:
        moved.append(Moved("model of its version", before.follows or "none", after.follows or "none"))
    fits = [{entry.model: entry for entry in record.fits} for record in (before, after)]
    for model in {**fits[0], **fits[1]}:
        if model not in fits[0] or model not in fits[1]:  # a policy's own, of a record that has another policy
            continue
        shares = [f"{fits[at][model].agreements} of {fits[at][model].cases} cases" for at in (0, 1)]
        explains = [model in record.explained_by for record in (before, after)]
        if shares[0] != shares[1] and any(explains) and not all(explains):
            moved.append(Moved(f"model {model} is right in", shares[0], shares[1]))
    explored = [{entry.model: entry.divergence for entry in record.explored} for record in (before, after)]
    for model in [name for name in explored[0] if name in explored[1]]:
        if explored[0][model] != explored[1][model]:
            words = [each[model] or "no divergence" for each in explored]
            moved.append(Moved(f"random programs on {model}", words[0], words[1]))
    return moved


_SAVES = ("does not save it", "saves it")


def _hardware_moved(before: kvm_record.KvmRecord, after: kvm_record.KvmRecord) -> list[Moved]:
    one, other = before.hardware, after.hardware
    moved = []
    for name, what, no, yes in (
        ("tested", "KVM's own test of a value", "refused", "accepted"),
        ("valid", "WRMSR of a guest let through", "#GP", "accepted"),
        ("keep", "the register", "not kept", "kept"),
        ("pred_cmd", "IA32_PRED_CMD of a guest let through", "#GP", "accepted"),
    ):
        mine, theirs = parse_hex64(getattr(one, name)), parse_hex64(getattr(other, name))
        if theirs & ~mine:
            moved.append(Moved(what, no, yes, theirs & ~mine))
        if mine & ~theirs:
            moved.append(Moved(what, yes, no, mine & ~theirs))
    for name, what in (("exists", "the register"), ("loaded", "VM entry"), ("switched", "VM exit")):
        words = {
            "exists": ("absent", "there"),
            "loaded": ("does not load", "loads"),
            "switched": ("does not save", "saves"),
        }
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            moved.append(Moved(what, words[name][mine], words[name][theirs]))
    for name, what in (("host_cpuid", "host CPUID"), ("supported_cpuid", "CPUID that KVM offers")):
        mine, theirs = parse_profile(getattr(one, name)).mask, parse_profile(getattr(other, name)).mask
        for position, bit in enumerate(FEATURES):
            if (mine ^ theirs) >> position & 1:
                moved.append(Moved(f"{what}: {bit.name}", *(("0", "1") if theirs >> position & 1 else ("1", "0"))))
    return moved


def _driver_moved(before: kvm_record.KvmRecord, after: kvm_record.KvmRecord) -> list[Moved]:
    one, other = before.driver, after.driver
    if isinstance(one, UnsetType) or isinstance(other, UnsetType):
        return []
    if one.error or other.error:
        words = ["not asked" if entry.error else "asked" for entry in (one, other)]
        return [Moved("the msr driver", words[0], words[1])] if words[0] != words[1] else []
    mine, theirs = parse_hex64(one.accepts), parse_hex64(other.accepts)
    found = [("#GP", "accepted", theirs & ~mine), ("accepted", "#GP", mine & ~theirs)]
    return [Moved("write through the msr driver", no, yes, bits) for no, yes, bits in found if bits]


# --- migrations ------------------------------------------------------------------------------------------------------


def _migrations(before: migration_record.MigrationRecord, after: migration_record.MigrationRecord) -> Comparison:
    found = [_arrivals(record) for record in (before, after)]
    moved = []
    for key in found[0]:
        if key in found[1] and found[0][key] != found[1][key]:
            moved.append(Moved(f"guest {key}", found[0][key], found[1][key]))
    conditions, alike = _conditions(before, after)
    only = ["; ".join(key for key in found[at] if key not in found[1 - at]) for at in (0, 1)]
    return Comparison("migration", conditions, alike, tuple(moved), *only)


def _arrivals(record: migration_record.MigrationRecord) -> dict[str, str]:
    """Return what became of every guest; the kernel's own name does not count, or two kernels had nothing in common."""
    found = {}
    for entry in record.arrivals:
        left = record.departures[entry.departure]
        origin = "from here" if left.kernel == record.kernel.release else f"from {left.kernel}"
        program = "" if record.study else f" {left.program}"
        to = entry.policy or "KVM alone"
        key = f"{origin}, {left.policy or 'KVM alone'} to {to}{f' ({entry.profile})' if entry.profile else ''}{program}"
        reads = "#GP" if entry.reads is UNSET else hex64(parse_hex64(str(entry.reads)))
        found[f"{key}, rule {entry.rule}"] = f"{entry.outcome}, reads {reads}"
    return found


# --- sets ------------------------------------------------------------------------------------------------------------


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
