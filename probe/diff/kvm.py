# SPDX-License-Identifier: MIT
"""Two matrices over KVM: what moved per bit, guest CPUID, initiator and model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec import UnsetType

from probe import kvm_record
from probe.diff.around import conditions
from probe.diff.moved import Comparison, Moved
from probe.masks import ALL_BITS, bits_of, parse_hex64
from probe.profile_sets import Universe

# Cell -> (who does what, the word for a bit that is not in its mask, and for one that is).
_CELL_WORDS: Mapping[str, tuple[str, str, str]] = {
    "host_first": ("host write, first", "refused", "accepted"),
    "host_first_kept": ("host reads after its own first write", "something else", "what was written"),
    "host_first_seen": ("guest reads after a host's first write", "something else", "what was written"),
    "guest_first": ("guest write, first", "#GP", "accepted"),
    "guest_first_seen": ("guest reads after its own first write", "something else", "what was written"),
    "guest_first_kept": ("host reads after a guest's first write", "something else", "what was written"),
    "guest_after": ("guest write after a host's", "#GP", "accepted"),
    "guest_after_seen": ("guest reads after a write after a host's", "something else", "what was written"),
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
_GATE_OF_WRITES = "guest write, first (0, too)"
_GO_WITH_AFTER = {"guest_after_seen", "host_after"}
_SINGLE = {"host_zero", "guest_zero", "host_read", "guest_read"}


def compare(before: kvm_record.KvmRecord, after: kvm_record.KvmRecord) -> Comparison:
    """Compare two matrices; guest CPUIDs that one of them alone has are said."""
    rows = [{row.profile: row.masks for row in kvm_record.rows_of(record)} for record in (before, after)]
    both = [profile for profile in rows[0] if profile in rows[1]]
    universe = Universe(both)
    moved = [*_models_moved(before, after), *_hardware_moved(before, after)]
    moved += _rows_moved(universe, [rows[0][profile] for profile in both], [rows[1][profile] for profile in both])
    moved += _driver_moved(before, after)
    differing, alike = conditions(before, after)
    only = []
    for mine, theirs in ((rows[0], rows[1]), (rows[1], rows[0])):
        missing = [kvm_record.profile_name(profile) for profile in mine if profile not in theirs]
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        told = ", ".join(name.replace(",", "+") for name in missing[:4])
        only.append(f"{len(missing)} profile{'s' if len(missing) > 1 else ''}: {told}{more}" if missing else "")
    return Comparison("kvm", differing, alike, tuple(moved), *only)


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
    moved = [
        Moved(what, no, yes, bits, universe.describe(profiles), bin(profiles).count("1"))
        for what, no, yes, bits, profiles in found
    ]
    return sorted(moved, key=lambda one: (_WEIGHT.get(one.after, 2), -one.count))


_WEIGHT = {"#GP": 0, "refused": 1}  # what breaks guests, and restores, comes first
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
        single = change.cell in _SINGLE or not bits
        told = what if single else f"{what} (each profile in bits of its own)"
        moved.append(Moved(told, change.before, change.after, 0 if single else bits, where, bin(profiles).count("1")))
    return moved


def _lines(changes: Sequence[tuple[_Change, int, int]]) -> list[tuple[str, str, str, int, int]]:
    """Put changes of the same bits, words and profiles into one line; a gate that opened or closed is one, too.

    Changes are (change, bits, profiles), lines (what, before, after, bits, profiles).
    """
    cells: dict[tuple[str, str, int, int], list[str]] = {}
    for change, bits, profiles in changes:
        about = 0 if change.cell in _SINGLE else bits
        cells.setdefault((change.before, change.after, about, profiles), []).append(change.cell)
    moved = [(name, key) for key, names in cells.items() for name in names]
    zero, first = ({key[:2] + key[3:] for name, key in moved if name == one} for one in ("guest_zero", "guest_first"))
    gates = zero & first  # (before, after, profiles) of writes whose 0 moved with their bits
    opened = {profiles for before, _, profiles in gates if before == "#GP"}
    closed = {profiles for before, _, profiles in gates if before == "accepted"}
    # A read that moved the same way moved with the gate: from or to 0.
    reads = {key[3] for name, key in moved if name == "guest_read" and key[3] in (opened if key[1] == "0" else closed)}
    found = []
    for (before, after, bits, profiles), names in cells.items():
        told = []
        for name in names:
            if (before, after, profiles) in gates and name in ("guest_first", "guest_zero"):
                told += [_GATE if profiles in reads else _GATE_OF_WRITES] if name == "guest_first" else []
            elif not (name == "guest_read" and profiles in reads):
                told.append(_CELL_WORDS[name][0] if name in _CELL_WORDS else name)
        if told:
            found.append(("; ".join(told), before, after, bits, profiles))
    return found


def _cells_moved(one: Mapping[str, int], other: Mapping[str, int]) -> Iterable[tuple[_Change, int]]:
    """Yield what changed for one profile, and its bits; 0 where it is not about bits."""
    for cell in dict.fromkeys([*one, *other]):
        _, no, yes = _CELL_WORDS.get(cell, ("", "no", "yes"))
        if (cell in one) != (cell in other):
            if cell in _GO_WITH_AFTER and ("guest_after" in one) != ("guest_after" in other):
                continue
            words = ("no guest was let through", "asked") if cell == "guest_after" else ("not asked", "asked")
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
    """Say in one line that other models explain the kernel, and how right those of before are now."""
    moved = []
    fits = [{entry.model: (entry.agreements, entry.cases) for entry in record.fits} for record in (before, after)]
    if set(before.explained_by) != set(after.explained_by) or before.follows != after.follows:
        told = [_explained(record) for record in (before, after)]
        left = [model for model in before.explained_by if model not in after.explained_by and model in fits[1]]
        right = "; ".join(
            f"{_called(before, model)} is right in {fits[1][model][0]} of {fits[1][model][1]} cases now"
            for model in left[:3]
        )
        moved.append(Moved("explained by", told[0], told[1], 0, right))
    explaining = {*before.explained_by, *after.explained_by}
    others = [model for model in fits[0] if model in fits[1] and fits[0][model] != fits[1][model]]
    counted = [model for model in others if model not in explaining]
    if counted and not explaining:
        best = counted[0]
        words = [f"{fits[at][best][0]} of {fits[at][best][1]} cases" for at in (0, 1)]
        moved.append(Moved(f"nearest model {best} is right in", words[0], words[1]))
    explored = [{entry.model: entry.divergence for entry in record.explored} for record in (before, after)]
    for model in [name for name in explored[0] if name in explored[1]]:
        if explored[0][model] != explored[1][model]:
            words = [each[model] or "no divergence" for each in explored]
            moved.append(Moved(f"random programs on {model}", words[0], words[1]))
    said = ["; ".join(kvm_record.complaints(record)) or "decided every write" for record in (before, after)]
    if said[0] != said[1]:
        moved.append(Moved("the policy", said[0], said[1]))
    return moved


def _called(record: kvm_record.KvmRecord, model: str) -> str:
    """Call the model of a record's own policy so, that policies of which the same is true are told together."""
    own = "" if isinstance(record.policy, UnsetType) else f"{record.policy.name} over "
    return f"its policy over {model[len(own) :]}" if own and model.startswith(own) else model


def _explained(record: kvm_record.KvmRecord) -> str:
    names = ", ".join(_called(record, model) for model in record.explained_by) or "no model"
    return f"{names} (of its version: {record.follows})" if record.follows and len(record.explained_by) > 1 else names


_SAVES = ("does not save it", "saves it")


def _hardware_moved(before: kvm_record.KvmRecord, after: kvm_record.KvmRecord) -> list[Moved]:
    one, other = before.hardware, after.hardware
    moved = []
    both = one.let_through and other.let_through
    if one.let_through != other.let_through:
        met = ("none, so that nobody saw what it meets", "there was one")
        moved.append(Moved("a guest let through", met[one.let_through], met[other.let_through]))
    for name, what, no, yes in (
        ("tested", "KVM's own test of a value", "refused", "accepted"),
        ("valid", "WRMSR of a guest let through", "#GP", "accepted"),
        ("keep", "the register", "not kept", "kept"),
        ("pred_cmd", "IA32_PRED_CMD of a guest let through", "#GP", "accepted"),
    ):
        if name in ("valid", "keep") and not both:
            continue
        mine, theirs = parse_hex64(getattr(one, name)), parse_hex64(getattr(other, name))
        if theirs & ~mine:
            moved.append(Moved(what, no, yes, theirs & ~mine))
        if mine & ~theirs:
            moved.append(Moved(what, yes, no, mine & ~theirs))
    if one.start != other.start:
        moved.append(Moved("a register that nobody wrote holds", one.start, other.start))
    for name, what in (("exists", "the register"), ("loaded", "VM entry"), ("switched", "VM exit")):
        words = {
            "exists": ("absent", "there"),
            "loaded": ("does not load", "loads"),
            "switched": ("does not save", "saves"),
        }
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            moved.append(Moved(what, words[name][mine], words[name][theirs]))
    return moved


def _driver_moved(before: kvm_record.KvmRecord, after: kvm_record.KvmRecord) -> list[Moved]:
    """Compare what the msr driver said, if it was asked, bit by bit."""
    words = []
    for entry in (before.driver, after.driver):
        words.append(
            "not asked" if isinstance(entry, UnsetType) else f"gave none: {entry.error}" if entry.error else "asked"
        )
    one, other = before.driver, after.driver
    if words[0] != words[1]:
        return [Moved("the msr driver's answer", words[0], words[1])]
    if words[0] != "asked" or isinstance(one, UnsetType) or isinstance(other, UnsetType):
        return []
    said = {"accepts": "accepted", "faults": "#GP", "unanswered": "no answer"}
    both = []
    for entry in (one, other):
        masks = {word: parse_hex64(getattr(entry, name)) for name, word in said.items()}
        masks["not tried"] = ALL_BITS & ~(masks["accepted"] | masks["#GP"] | masks["no answer"])
        both.append(masks)
    return [
        Moved("write through the msr driver", word, its, mine & theirs)
        for word, mine in both[0].items()
        for its, theirs in both[1].items()
        if word != its and mine & theirs
    ]
