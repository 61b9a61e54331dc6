# SPDX-License-Identifier: MIT
"""CPUID without a CPU: classes that fit the Protocols of probe.cpuid."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from typing import Callable

from probe.cpuid.enumeration import LeafOutOfReach
from probe.cpuid.snapshot import Leaf, Registers, Snapshot

ZERO = Registers(0, 0, 0, 0)


def registers(text: str = "") -> tuple[int, int, int]:
    """Return EBX, ECX, EDX that spell a 12-character hypervisor signature."""
    raw = text.encode().ljust(12, b"\0")
    ebx, ecx, edx = (int.from_bytes(raw[at : at + 4], "little") for at in (0, 4, 8))
    return ebx, ecx, edx


def leaf0(highest: int, vendor: str = "GenuineIntel") -> Registers:
    ebx, edx, ecx = registers(vendor)
    return Registers(highest, ebx, ecx, edx)


def snapshot(leaves: Mapping[tuple[int, int], tuple[int, int, int, int]]) -> Snapshot:
    return Snapshot({Leaf(*leaf): Registers(*found) for leaf, found in leaves.items()})


class FakeCpuid:
    """A CpuidSource over a table; what is not in it reads as otherwise(leaf, subleaf), by default as zero.

    asked lists every CPUID executed. Ranges in unreachable raise LeafOutOfReach, as the package cpuid makes them.
    """

    def __init__(
        self,
        leaves: Mapping[tuple[int, int], tuple[int, int, int, int]],
        *,
        otherwise: Callable[[int, int], Registers] = lambda leaf, subleaf: ZERO,
        unreachable: tuple[int, ...] = (),
        name: str = "fake",
    ) -> None:
        self.name = name
        self.asked: list[Leaf] = []
        self._leaves = {Leaf(*leaf): Registers(*found) for leaf, found in leaves.items()}
        self._otherwise = otherwise
        self._unreachable = unreachable

    def cpuid(self, cpu: int, leaf: int, subleaf: int) -> Registers:
        if leaf & 0xF0000000 in self._unreachable:
            raise LeafOutOfReach(f"no leaf {leaf:08x}")
        self.asked.append(Leaf(leaf, subleaf))
        return self._leaves.get(Leaf(leaf, subleaf)) or self._otherwise(leaf, subleaf)


class PinnedCpuid(FakeCpuid):
    """A source that must be on a CPU; log tells when it came and went, and a read elsewhere is an error."""

    def __init__(self, leaves: Mapping[tuple[int, int], tuple[int, int, int, int]]) -> None:
        super().__init__(leaves)
        self.log: list[str] = []
        self._here: int | None = None

    @contextlib.contextmanager
    def on(self, cpu: int) -> Iterator[None]:
        self.log.append(f"to {cpu}")
        self._here = cpu
        try:
            yield
        finally:
            self._here = None
            self.log.append("home")

    def cpuid(self, cpu: int, leaf: int, subleaf: int) -> Registers:
        assert self._here == cpu
        return super().cpuid(cpu, leaf, subleaf)


class FakeAffinity:
    """Affinity of a thread on a machine with these CPUs; history lists what was set. A refused CPU gives EINVAL."""

    def __init__(self, cpus: set[int], *, refused: tuple[int, ...] = ()) -> None:
        self.now = set(cpus)
        self.history: list[set[int]] = []
        self._refused = refused

    def get(self) -> set[int]:
        return set(self.now)

    def set(self, cpus: set[int]) -> None:
        if cpus & {*self._refused}:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.now = {*cpus}
        self.history.append({*cpus})
