# SPDX-License-Identifier: MIT
"""The shortest program, on the smallest profile, on which two state machines differ. Pure."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from probe.masks import ALL_BITS
from probe.models.guest_systems import Cpu, cpus
from probe.models.machine import (
    DENY_READ,
    DENY_WRITE,
    SPEC_CTRL,
    Hardware,
    Host,
    Machine,
    Stepping,
    answers,
    step,
)
from probe.models.matrix import distinguishable, guest_rd, guest_wr, host_get, host_set
from probe.models.profile import ALL_FEATURES, FEATURES, NAMED, NONE, Profile, mask_of_features
from probe.models.program import IN_GUEST, Answer, Kind, Operation, Program, Word
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
POLICY_HOSTS = (*HOSTS, ("a host with VMX that has every bit and keeps it", replace(HOSTS[0][1], vmx=True)))
_GP = "#GP"
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
    one: Machine | Stepping,
    other: Machine | Stepping,
    profile: Profile,
    host: Host,
    operations: Sequence[Operation],
    length: int,
    *,
    by_guest: bool = False,
) -> tuple[Program, tuple[Answer | None, ...], tuple[Answer | None, ...]] | None:
    """Look for a program of exactly this length; states that were seen before are not walked again.

    by_guest: only a guest's access counts, the last of the program.
    """
    do_one, do_other = (_stepper(machine) for machine in (one, other))
    start = (one.start(profile, host), other.start(profile, host))
    paths: dict[tuple[Any, Any], tuple[Operation, ...]] = {start: ()}
    for depth in range(1, length + 1):
        reached: dict[tuple[Any, Any], tuple[Operation, ...]] = {}
        for (mine, theirs), path in paths.items():
            for operation in operations:
                if by_guest and depth == length and operation.kind not in IN_GUEST:
                    continue
                next_one, answer_one = do_one(mine, operation)
                next_other, answer_other = do_other(theirs, operation)
                if answer_one is None or answer_other is None:
                    continue
                if answer_one != answer_other:
                    if depth == length:
                        return _told(one, other, Program(profile, (*path, operation)), host)
                    continue
                reached.setdefault((next_one, next_other), (*path, operation))
        paths = {pair: path for pair, path in reached.items() if pair not in paths}
    return None


def _stepper(machine: Machine | Stepping) -> Callable[[Any, Operation], tuple[Any, Answer | None]]:
    return machine.step if isinstance(machine, Stepping) else functools.partial(step, machine)


def policy_difference(
    one: Stepping, other: Stepping, hosts: Sequence[tuple[str, Host]] | None = None, *, most: int = 2
) -> Difference | None:
    """Search the same for models that do each step themselves: guest writes, reads and host writes; the shortest
    programs first, of these the smallest profiles.

    Guests have named profiles and single CPUID bits. Hosts None are those of HOSTS, one with VMX, which policies may
    ask for, and the named CPUs, each with the guest CPUID that KVM offers there.
    """
    profiles = sorted(
        {*(Profile(1 << bit) for bit in range(len(FEATURES))), *(named.profile for named in NAMED)},
        key=lambda profile: (bin(profile.mask).count("1"), profile.mask),
    )
    cases = list(itertools.product(POLICY_HOSTS if hosts is None else hosts, profiles))
    if hosts is None:
        cases += [((cpu.name, cpu.host), cpu.guest) for cpu in cpus()]
    operations = [make(value) for make in (guest_wr, host_set) for value in POLICY_VALUES]
    operations += [guest_rd(), host_get()]
    for length in range(1, most + 1):
        for (name, host), profile in cases:
            found = _search(one, other, profile, host, operations, length, by_guest=True)
            if found is not None:
                return Difference(name, *found)
    return None


@dataclass(frozen=True)
class Writes:
    """Guest writes that two policies answer otherwise, all in the same way: what each answers, in words.

    after is the value that the guest has written before, None if these are its first. bits is the mask of single ones;
    values are others, that have none of these.
    """

    after: int | None
    one: str
    other: str
    bits: int = 0
    values: tuple[int, ...] = ()


def differing_writes(one: Stepping, other: Stepping, cpu: Cpu) -> list[Writes]:
    """Return the writes of a guest of this CPU that two policies answer otherwise.

    First writes; then, for those that are answered alike as such, the writes after the first bit that both take.
    """
    single = [1 << bit for bit in range(64)]
    more = [value for value in POLICY_VALUES if value not in single]
    values = [*single, *more]
    first = {value: _told_of(one, other, cpu, (value,)) for value in values}
    found = _grouped(None, {value: told for value, told in first.items() if told[0] != told[1]})
    opener = next((value for value in single if _GP not in first[value]), None)
    if opener is None:
        return found
    alike = [value for value in values if first[value][0] == first[value][1]]
    second = {value: _told_of(one, other, cpu, (opener, value)) for value in alike}
    return found + _grouped(opener, {value: told for value, told in second.items() if told[0] != told[1]})


def _grouped(after: int | None, differing: Mapping[int, tuple[str, str]]) -> list[Writes]:
    groups: dict[tuple[str, str], Writes] = {}
    for value, told in differing.items():
        group = groups.setdefault(told, Writes(after, *told))
        if value and not value & (value - 1):
            groups[told] = replace(group, bits=group.bits | value)
        elif not value & group.bits:
            groups[told] = replace(group, values=(*group.values, value))
    return list(groups.values())


def _told_of(one: Stepping, other: Stepping, cpu: Cpu, written: Sequence[int]) -> tuple[str, str]:
    """Say what two policies answer to the last of some writes, and to a read after it."""
    program = Program(cpu.guest, (*(guest_wr(value) for value in written), guest_rd()))
    told = []
    for machine in (one, other):
        wrote, read = answers(machine, program, cpu.host)[-2:]
        if wrote is not Word.OK:
            told.append(_GP)
        else:
            told.append("ok" if read == written[-1] else "ok, reads otherwise")
    return told[0], told[1]


def _told(
    one: Machine | Stepping, other: Machine | Stepping, program: Program, host: Host
) -> tuple[Program, tuple[Answer | None, ...], tuple[Answer | None, ...]]:
    return program, tuple(answers(one, program, host)), tuple(answers(other, program, host))
