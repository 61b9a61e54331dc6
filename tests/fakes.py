# SPDX-License-Identifier: MIT
"""Doubles that fit the Protocols at the edge: a register that does what it is told, and a scheduler that obeys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from probe.masks import ALL_BITS
from probe.msr import Failure

SPEC_CTRL = 0x48


@dataclass
class FakeRegister:
    """One CPU's register.

    valid: bits that do not fault; dropped: accepted but read 0; sticky: once set, stay; forbidden: values that fault
    although each bit is valid; unsteady: every second read shows this mask flipped. absent: every access faults.
    """

    value: int = 0
    valid: int = ALL_BITS
    dropped: int = 0
    sticky: int = 0
    unsteady: int = 0
    absent: bool = False
    offline: bool = False
    refuses: bool = False
    forbidden: Callable[[int], bool] = lambda value: False
    alters: Callable[[int], int] = lambda value: value
    reads: int = 0
    writes: list[int] = field(default_factory=list)

    def read(self) -> int | Failure:
        if self.offline:
            return Failure.OFFLINE
        if self.absent:
            return Failure.FAULT
        self.reads += 1
        return self.value ^ (self.unsteady if self.reads % 2 else 0)

    def write(self, value: int) -> Failure | None:
        if self.offline:
            return Failure.OFFLINE
        if self.refuses:
            return Failure.REFUSED
        self.writes.append(value)
        if self.absent or value & ~self.valid or self.forbidden(value):
            return Failure.FAULT
        self.value = self.alters(value & ~self.dropped) | (self.value & self.sticky)
        return None


class FakeMsr:
    """Registers by CPU; fits probe.msr.MsrAccess. before(cpu, kind, count) may change the world at any access."""

    def __init__(
        self,
        registers: dict[int, FakeRegister],
        others: dict[tuple[int, int], int] | None = None,
        before: Callable[[int, str, int], None] = lambda cpu, kind, count: None,
    ) -> None:
        self.registers = registers
        self.others = others or {}
        self.before = before
        self.count = 0

    def read(self, cpu: int, index: int) -> int | Failure:
        self.count += 1
        self.before(cpu, "read", self.count)
        if index != SPEC_CTRL:
            return self.others.get((cpu, index), Failure.FAULT)
        return self.registers[cpu].read()

    def write(self, cpu: int, index: int, value: int) -> Failure | None:
        self.count += 1
        self.before(cpu, "write", self.count)
        assert index == SPEC_CTRL, f"only MSR 0x48 may ever be written, not {index:#x}"
        return self.registers[cpu].write(value)


def pin_anywhere(cpu: int) -> bool:
    """Stand in for the scheduler: every CPU may be run on."""
    return True
