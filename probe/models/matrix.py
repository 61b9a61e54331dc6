# SPDX-License-Identifier: MIT
"""The matrix: what every bit does, host- and guest-initiated, before and after pass-through, as rows of masks. Pure.

A row is what one profile gave: for each cell a 64-bit mask of the bits whose program answered so. A model's row is made
from its machine; rows are compared with XOR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from probe.masks import ALL_BITS
from probe.models.machine import PRED_CMD, SPEC_CTRL, VIRT_SPEC_CTRL, Host, Machine, State, Stepping, answers
from probe.models.profile import FEATURES, Profile
from probe.models.program import Answer, Kind, Operation, Program, Word

Row = Mapping[str, int]  # cell -> mask


def host_set(value: int, index: int = SPEC_CTRL) -> Operation:
    """KVM_SET_MSRS of one MSR."""
    return Operation(Kind.HOST_SET, index, value)


def host_get(index: int = SPEC_CTRL) -> Operation:
    """KVM_GET_MSRS of one MSR."""
    return Operation(Kind.HOST_GET, index)


def guest_wr(value: int, index: int = SPEC_CTRL) -> Operation:
    """WRMSR in the guest."""
    return Operation(Kind.GUEST_WR, index, value)


def guest_rd(index: int = SPEC_CTRL) -> Operation:
    """RDMSR in the guest."""
    return Operation(Kind.GUEST_RD, index)


@dataclass(frozen=True)
class Cell:
    """One question asked of every bit.

    operations gives the program for a value and the value that opened pass-through (opener; 0 for cells that need
    none); the last operation's answer decides: the bit is in the mask if it is answer, or the value itself where answer
    is None. single cells are asked once, with value 0, and are bit 0 of their mask.
    """

    name: str
    title: str
    operations: Callable[[int, int], tuple[Operation, ...]]
    answer: Word | None = Word.OK
    single: bool = False
    after: bool = False


CELLS: tuple[Cell, ...] = (
    Cell("host_first", "first host write: accepted", lambda v, o: (host_set(v),)),
    Cell("host_first_kept", "first host write: the host reads it back", lambda v, o: (host_set(v), host_get()), None),
    Cell("host_first_seen", "first host write: the guest reads it", lambda v, o: (host_set(v), guest_rd()), None),
    Cell("guest_first", "first guest write: accepted", lambda v, o: (guest_wr(v),)),
    Cell(
        "guest_first_seen", "first guest write: the guest reads it back", lambda v, o: (guest_wr(v), guest_rd()), None
    ),
    Cell(
        "guest_first_kept",
        "first guest write: the host reads it",
        lambda v, o: (guest_wr(v), guest_rd(), host_get()),
        None,
    ),
    Cell(
        "guest_after",
        "guest write after an accepted host write: accepted",
        lambda v, o: (host_set(o), guest_wr(v)),
        after=True,
    ),
    Cell(
        "guest_after_seen",
        "guest write after an accepted host write: the guest reads it back",
        lambda v, o: (host_set(o), guest_wr(v), guest_rd()),
        None,
        after=True,
    ),
    Cell(
        "host_after",
        "host write after the guest was let through: accepted",
        lambda v, o: (host_set(o), guest_rd(), host_set(v)),
        after=True,
    ),
    Cell("host_zero", "host writes 0 first: accepted", lambda v, o: (host_set(0),), single=True),
    Cell("guest_zero", "guest writes 0 first: accepted", lambda v, o: (guest_wr(0),), single=True),
    Cell("host_read", "host reads first: 0", lambda v, o: (host_get(),), None, single=True),
    Cell("guest_read", "guest reads first: 0", lambda v, o: (guest_rd(),), None, single=True),
)
# The registers beside it: what a first write of each bit does. Models that speak of them are compared, too.
BESIDE: tuple[Cell, ...] = (
    Cell("pred_cmd_host", "first host write of IA32_PRED_CMD: accepted", lambda v, o: (host_set(v, PRED_CMD),)),
    Cell("pred_cmd_guest", "first guest write of IA32_PRED_CMD: accepted", lambda v, o: (guest_wr(v, PRED_CMD),)),
    Cell(
        "virt_spec_ctrl_host",
        "first host write of VIRT_SPEC_CTRL: accepted",
        lambda v, o: (host_set(v, VIRT_SPEC_CTRL),),
    ),
    Cell(
        "virt_spec_ctrl_guest",
        "first guest write of VIRT_SPEC_CTRL: accepted",
        lambda v, o: (guest_wr(v, VIRT_SPEC_CTRL),),
    ),
)


# Each with whether a model has to decide it to explain a kernel.
_ALL_CELLS = (*((cell, True) for cell in CELLS), *((cell, False) for cell in BESIDE))


def holds(cell: Cell, value: int, answer: Answer | None) -> bool:
    """Tell whether an answer puts the value's bit into the cell's mask."""
    if cell.answer is None:
        return answer == value
    return answer is cell.answer


def program_of(cell: Cell, profile: Profile, bit: int, opener: int) -> Program:
    """Return the program that a bit of a cell stands for."""
    return Program(profile, cell.operations(0 if cell.single else 1 << bit, opener))


@dataclass(frozen=True)
class Expected:
    """A model's row: masks, and for each cell the bits on which the model decides."""

    masks: Row
    decided: Row


def expected(machine: Machine, profile: Profile, host: Host, opener: int) -> Expected:
    """Return the row that a machine predicts; opener is the value that was measured to open pass-through, 0 for none.

    Asked with all writable bits at once instead of bit by bit: machines are linear in the value (a test holds them to
    it).
    """
    fresh = machine.start(profile, host)
    masks: dict[str, int] = {}
    decided: dict[str, int] = {}

    def put(name: str, mask: int, known: int) -> None:
        masks[name] = mask & known
        decided[name] = known

    for by_host, first in ((True, "host_first"), (False, "guest_first")):
        who = "host" if by_host else "guest"
        writable = machine.writable(fresh, by_host=by_host)
        unsaid = machine.open_bits(fresh, by_host=by_host)
        known = ALL_BITS & ~unsaid if writable is not None else ALL_BITS
        taken = (writable or 0) & known
        put(first, taken, known)
        put(f"{who}_zero", int(writable is not None), int(writable is None or unsaid != ALL_BITS or writable == 0) & 1)
        value = _read_value(machine, fresh, by_host=by_host)
        put(f"{who}_read", int(value == 0), 0 if value is _UNSAID else 1)
        # Of bits that are refused, too, a model may not say what is read then.
        seen_said = 0 if _read_value(machine, fresh, by_host=False) is _UNSAID else known
        kept_said = 0 if _read_value(machine, fresh, by_host=True) is _UNSAID else known if by_host else seen_said
        guest = kept = None
        if taken:
            state = machine.write(fresh, taken, by_host=by_host)
            guest = _read_value(machine, state, by_host=False)
            after_guest, _ = machine.read(state, by_host=False) if isinstance(guest, int) else (state, None)
            kept = _read_value(machine, state if by_host else after_guest, by_host=True)
        put(f"{first}_seen", taken & guest if isinstance(guest, int) else 0, seen_said)
        put(f"{first}_kept", taken & kept if isinstance(kept, int) else 0, kept_said)
    if opener:
        _after(machine, fresh, opener, put)
    for name, (mask, known) in machine.beside(profile, host).items():
        put(name, mask, known)
    return Expected(masks, decided)


def expected_by_programs(machine: Stepping, profile: Profile, host: Host, opener: int) -> Expected:
    """Return the row of a model that need not be linear: every bit of every cell is asked as its program."""
    masks: dict[str, int] = {}
    decided: dict[str, int] = {}
    for cell in CELLS:
        if cell.after and not opener:
            continue
        mask = known = 0
        for bit in (0,) if cell.single else range(64):
            said = answers(machine, program_of(cell, profile, bit, opener), host)
            known |= 0 if said[-1] is None else 1 << bit
            # What is read counts only after writes that were taken: else it is what was there before.
            refused = cell.answer is None and (Word.GP in said or Word.REFUSED in said)
            mask |= 1 << bit if holds(cell, 0 if cell.single else 1 << bit, said[-1]) and not refused else 0
        masks[cell.name], decided[cell.name] = mask, known
    return Expected(masks, decided)


class _Unsaid:
    """The model does not say what is read."""


_UNSAID = _Unsaid()


def _read_value(machine: Machine, state: State, *, by_host: bool) -> int | _Unsaid | None:
    """Return what a read gives; None if it is refused."""
    if not machine.readable(state, by_host=by_host):
        return None
    value = machine.read(state, by_host=by_host)[1]
    return _UNSAID if value is None else value


def _after(machine: Machine, fresh: State, opener: int, put: Callable[[str, int, int], None]) -> None:
    opened = machine.writable(fresh, by_host=True)
    unsaid = machine.open_bits(fresh, by_host=True)
    state = fresh
    if opened is not None and not opener & ~(opened | unsaid):
        if opener & unsaid:
            for name in ("guest_after", "guest_after_seen", "host_after"):
                put(name, 0, 0)
            return
        state = machine.write(fresh, opener, by_host=True)
    writable = machine.writable(state, by_host=False)
    unsaid = machine.open_bits(state, by_host=False)
    known = ALL_BITS & ~unsaid if writable is not None else ALL_BITS
    taken = (writable or 0) & known
    put("guest_after", taken, known)
    seen = _read_value(machine, machine.write(state, taken, by_host=False), by_host=False) if taken else None
    put("guest_after_seen", taken & seen if isinstance(seen, int) else 0, 0 if seen is _UNSAID else known)
    if machine.readable(state, by_host=False):
        state, _ = machine.read(state, by_host=False)
    by_host = machine.writable(state, by_host=True)
    unsaid = machine.open_bits(state, by_host=True)
    put("host_after", (by_host or 0) & ~unsaid, ALL_BITS & ~unsaid if by_host is not None else ALL_BITS)


@dataclass(frozen=True)
class Measured:
    """What one profile gave on a kernel. opener is the host-written value after which the after cells were asked, 0 if
    no host write was accepted."""

    profile: Profile
    opener: int
    masks: Row


@dataclass(frozen=True)
class Fit:
    """How well a model explains a matrix.

    cases counts the answers on which the model decides, agreements those that are as it says, silent the answers about
    MSR 0x48 on which it does not decide. divergences counts by cell; first is the first divergence: cell, profile and
    opener, bit.
    """

    model: str
    cases: int
    agreements: int
    divergences: Mapping[str, int]
    first: tuple[Cell, Measured, int] | None
    silent: int = 0

    @property
    def explains(self) -> bool:
        """True if every case agrees, and nothing about MSR 0x48 is left open: a silent oracle explains nothing."""
        return self.cases == self.agreements and self.cases > 0 and not self.silent


def _count(mask: int) -> int:
    return bin(mask).count("1")


def fit(machine: Machine | Stepping, host: Host, rows: Sequence[Measured]) -> Fit:
    """Compare a model with a measured matrix; rows in an order in which the first divergence is the simplest."""
    cases = agreements = silent = 0
    divergences: dict[str, int] = {}
    first: tuple[Cell, Measured, int] | None = None
    cache: dict[tuple[int, bool, int], Expected] = {}
    row_of = expected_by_programs if isinstance(machine, Stepping) else expected
    for row in rows:
        key = (row.profile.mask, row.profile.no_cpuid, row.opener)
        model = cache.get(key)
        if model is None:
            model = cache[key] = row_of(machine, row.profile, host, row.opener)  # type: ignore[arg-type]
        for cell, counts in _ALL_CELLS:
            seen = row.masks.get(cell.name)
            if seen is None:
                continue
            asked = 1 if cell.single else ALL_BITS
            known = model.decided.get(cell.name, 0) & asked
            wrong = (seen ^ model.masks.get(cell.name, 0)) & known
            count = _count(known)
            cases += count
            silent += _count(asked & ~known) if counts else 0
            agreements += count - _count(wrong)
            if wrong:
                divergences[cell.name] = divergences.get(cell.name, 0) + _count(wrong)
                if first is None:
                    first = (cell, row, (wrong & -wrong).bit_length() - 1)
    return Fit(machine.name, cases, agreements, divergences, first, silent)


def answers_of(machine: Machine | Stepping, cell: Cell, row: Measured, bit: int, host: Host) -> list[Answer | None]:
    """Return what a machine answers to the program of one bit of a cell."""
    if cell in BESIDE and not isinstance(machine, Stepping):
        taken = machine.beside(row.profile, host)[cell.name][0] >> bit & 1
        return [Word.OK if taken else Word.REFUSED if cell.name.endswith("host") else Word.GP]
    return answers(machine, program_of(cell, row.profile, bit, row.opener), host)


def distinguishable(machines: Iterable[Machine], hosts: Sequence[Host]) -> list[Profile]:
    """Return the smallest profile of each class of CPUIDs that some machine, on some host, tells from all others.

    Each feature bit is added to each class, until no new class comes of it, so that not every combination is asked; a
    test compares with all of them.
    """
    machines = tuple(machines)
    classes: dict[tuple[object, ...], int] = {_fingerprint(0, machines, hosts): 0}
    waiting = [0]
    while waiting:
        mask = waiting.pop(0)
        for position in range(len(FEATURES)):
            wider = mask | 1 << position
            key = _fingerprint(wider, machines, hosts)
            if key not in classes:
                classes[key] = wider
                waiting.append(wider)
    return [Profile(mask) for mask in sorted(classes.values(), key=lambda mask: (_count(mask), mask))]


def _fingerprint(mask: int, machines: Sequence[Machine], hosts: Sequence[Host]) -> tuple[object, ...]:
    """Return all that the machines say of a fresh vCPU with these features."""
    profile = Profile(mask)
    return tuple(
        (
            machine.writable(state, by_host=True),
            machine.writable(state, by_host=False),
            machine.readable(state, by_host=False),
            machine.open_bits(state, by_host=False),
        )
        for machine in machines
        for host in hosts
        for state in (machine.start(profile, host),)
    )
