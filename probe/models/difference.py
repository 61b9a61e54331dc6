# SPDX-License-Identifier: MIT
"""The shortest program, on the smallest profile, on which two state machines differ. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from probe.masks import ALL_BITS
from probe.models.machine import (
    DENY_READ,
    DENY_WRITE,
    SPEC_CTRL,
    Hardware,
    Host,
    Machine,
    State,
    Stepping,
    answers,
    first_difference,
    step,
)
from probe.models.matrix import distinguishable, guest_rd, guest_wr, host_get, host_set
from probe.models.profile import ALL_FEATURES, FEATURES, NAMED, NONE, Profile, mask_of_features
from probe.models.program import IN_GUEST, Answer, Kind, Operation, Program
from probe.registers import SPEC_CTRL as REGISTER

MOST_STEPS = 4
_V_SPEC_CTRL = mask_of_features([bit for bit in FEATURES if bit.name == "V_SPEC_CTRL"])
_WITHOUT = ALL_FEATURES & ~_V_SPEC_CTRL

# The hosts on which machines are compared, the plainest first.
HOSTS: tuple[tuple[str, Host], ...] = (
    ("a host that has every bit and keeps it", Host(features=_WITHOUT, caps=_WITHOUT)),
    (
        "a host with IBRS, STIBP and SSBD",
        Host(Hardware(tested=0x7, valid=0x7, keep=0x7), features=_WITHOUT, caps=_WITHOUT),
    ),
    ("a host whose CPUID has none of the bits", Host()),
    ("a host without the register", Host(Hardware(exists=False, tested=0, valid=0, keep=0))),
    ("a host with V_SPEC_CTRL", Host(features=ALL_FEATURES, caps=ALL_FEATURES)),
    ("a host that takes every bit and keeps none", Host(Hardware(keep=0), features=_WITHOUT, caps=_WITHOUT)),
    (
        "a host that does not switch the register",
        replace(Host(Hardware(keep=0)), switched=False),
    ),
)
# What policies are asked: 0, every bit that is defined, one that is not of either half, and what guests combine.
POLICY_VALUES = (0, *(field.mask for field in REGISTER.bits), 1 << 9, 1 << 63, 0x3, 0x5, 0x6, 0x7, 0x87)
_VALUES = (0, *(1 << bit for bit in (0, 1, 2, 3, 5, 7, 8, 9, 10, 32, 63)), ALL_BITS)


@dataclass(frozen=True)
class Difference:
    """Where two machines differ: the host in words, the program, and what each answers to its last operation."""

    host: str
    program: Program
    one: tuple[Answer | None, ...]
    other: tuple[Answer | None, ...]


def _operations() -> Iterator[Operation]:
    for value in _VALUES:
        yield guest_wr(value)
    yield guest_rd()
    for value in _VALUES:
        yield host_set(value)
    yield host_get()
    yield Operation(Kind.INIT)
    yield Operation(Kind.DENY, SPEC_CTRL, DENY_WRITE)
    yield Operation(Kind.DENY, SPEC_CTRL, DENY_READ)
    yield Operation(Kind.ALLOW)


def difference(one: Machine, other: Machine, hosts: Sequence[tuple[str, Host]] = HOSTS) -> Difference | None:
    """Search, the shortest programs first, of these the smallest profiles; None if up to MOST_STEPS nothing differs.

    hosts are tried in their order, each with what it is in words. Programs are on MSR 0x48 alone.
    """
    profiles = [*distinguishable([one, other], [host for _, host in hosts]), NONE]
    operations = list(_operations())
    for length in range(1, MOST_STEPS + 1):
        for (name, host), profile in itertools.product(hosts, profiles):
            found = _search(one, other, profile, host, operations, length)
            if found is not None:
                return Difference(name, *found)
    return None


def _search(
    one: Machine, other: Machine, profile: Profile, host: Host, operations: list[Operation], length: int
) -> tuple[Program, tuple[Answer | None, ...], tuple[Answer | None, ...]] | None:
    """Look for a program of exactly this length; states that were seen before are not walked again."""
    start = (one.start(profile, host), other.start(profile, host))
    paths: dict[tuple[State, State], tuple[Operation, ...]] = {start: ()}
    for depth in range(1, length + 1):
        reached: dict[tuple[State, State], tuple[Operation, ...]] = {}
        for (mine, theirs), path in paths.items():
            for operation in operations:
                next_one, answer_one = step(one, mine, operation)
                next_other, answer_other = step(other, theirs, operation)
                if answer_one is None or answer_other is None:
                    continue
                if answer_one != answer_other:
                    if depth == length:
                        return _told(one, other, Program(profile, (*path, operation)), host)
                    continue
                reached.setdefault((next_one, next_other), (*path, operation))
        paths = {pair: path for pair, path in reached.items() if pair not in paths}
    return None


def policy_difference(
    one: Stepping, other: Stepping, hosts: Sequence[tuple[str, Host]] = HOSTS, *, most: int = 2
) -> Difference | None:
    """Search the same for models that do each step themselves: named profiles and single CPUID bits, guest writes,
    reads and host writes; the shortest programs first, of these the smallest profiles."""
    profiles = sorted(
        {*(Profile(1 << bit) for bit in range(len(FEATURES))), *(named.profile for named in NAMED)},
        key=lambda profile: (bin(profile.mask).count("1"), profile.mask),
    )
    operations = [make(value) for make in (guest_wr, host_set) for value in POLICY_VALUES]
    operations += [guest_rd(), host_get()]
    for length in range(1, most + 1):
        for (name, host), profile in itertools.product(hosts, profiles):
            for program in itertools.product(operations, repeat=length):
                if program[-1].kind not in IN_GUEST:
                    continue
                whole = Program(profile, program)
                mine, theirs = answers(one, whole, host), answers(other, whole, host)
                if first_difference(mine, theirs) == length - 1:
                    return Difference(name, whole, tuple(mine), tuple(theirs))
    return None


def _told(
    one: Machine, other: Machine, program: Program, host: Host
) -> tuple[Program, tuple[Answer | None, ...], tuple[Answer | None, ...]]:
    return program, tuple(answers(one, program, host)), tuple(answers(other, program, host))
