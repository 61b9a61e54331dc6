# SPDX-License-Identifier: MIT
"""Which CPUID leaves and subleaves a CPU says that it has, and the walk that reads them all through any source.

Pure: the CPU is behind the Protocol CpuidSource. The walk gathers what cpuid(1) and the kernel's kcpuid gather, so
that a record of it can be given to a virtual machine as its CPUID.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.errors import DeviceError

_SDM = "Intel SDM vol. 1 ch. 21 (2025-26 editions; before: vol. 2A, CPUID), "
_APM3 = "AMD APM vol. 3 (24594) appendix E, "


# --- ranges of leaves ----------------------------------------------------------------------------------------------

BASIC = 0x00000000
HYPERVISOR = 0x40000000
EXTENDED = 0x80000000
CENTAUR = 0xC0000000

# The highest leaf of a range is at most this far from its first; a larger maximum is garbage.
# Source: linux v7.1 tools/arch/x86/kcpuid/kcpuid.c, MAX_RANGE_INDEX_OFFSET: Linux commit 72383c8274ed
# ("tools/x86/kcpuid: Filter valid CPUID ranges").
LAST_OFFSET = 0xFF

# Several hypervisor interfaces stand one after another: Hyper-V's first, KVM's or Xen's behind it.
# Source: linux v7.1 arch/x86/include/asm/cpuid/api.h, for_each_possible_cpuid_base_hypervisor().
HYPERVISOR_BASES = range(0x40000000, 0x40010000, 0x100)

KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"
XEN_SIGNATURE = b"XenVMMXenVMM"


def range_of(leaf: int) -> int:
    """Return the first leaf of the range that a leaf belongs to: 0, 4000_0000H, 4000_0100H, 8000_0000H ...

    Source: linux v7.1 arch/x86/kvm/cpuid.c, get_out_of_range_cpuid_entry().
    """
    return leaf & (0xFFFFFF00 if HYPERVISOR <= leaf < 0x50000000 else 0xFFFF0000)


def signature_of(found: Registers) -> bytes:
    """Return the 12 characters that a hypervisor gives in EBX, ECX, EDX of the first leaf of its range."""
    return b"".join(register.to_bytes(4, "little") for register in (found.ebx, found.ecx, found.edx))


def last_leaf(base: int, found: Registers) -> int | None:
    """Return the highest leaf of a range, given what its first leaf said; None if that says that there is no range.

    The basic range always exists: a maximum beyond any CPU's is cut to LAST_OFFSET. Before the Pentium 4, 8000_0000H
    gives what leaf 0 gives, and above the highest leaf Intel CPUs give the data of the highest basic leaf: neither
    looks like a maximum of the range. KVM once gave EAX = 0 for 4000_0001H.
    Source: Intel SDM vol. 1 ch. 21, CPUID.80000000H; linux v7.1 Documentation/virt/kvm/x86/cpuid.rst.
    """
    if base <= found.eax <= base + LAST_OFFSET:
        return found.eax
    if base == BASIC:
        return LAST_OFFSET
    if base in HYPERVISOR_BASES and found.eax == 0:
        if signature_of(found) == KVM_SIGNATURE:
            return base + 1
        return base if base == HYPERVISOR else None
    return None


# --- subleaves -----------------------------------------------------------------------------------------------------

# kcpuid's MAX_SUBLEAF_NUM is 64; the highest that is defined is 62, leaf 0DH for XCR0[62].
LAST_SUBLEAF = 63


@dataclass(frozen=True)
class UpTo:
    """EAX of subleaf 0 is the number of the highest subleaf."""

    source: str


@dataclass(frozen=True)
class Marked:
    """Set bit n in the named 64-bit words means that there is a subleaf n; subleaves below always are read anyway.

    words: (subleaf, register of bits 31:0, register of bits 63:32 or "").
    """

    words: tuple[tuple[int, str, str], ...]
    source: str
    always: int = 1


@dataclass(frozen=True)
class Until:
    """Subleaves count up from 0 until, from subleaf start on, a field is 0; that last one is read too.

    stops: (register, mask) of the fields; one that is 0 is enough.
    """

    stops: tuple[tuple[str, int], ...]
    source: str
    start: int = 0


_CACHE = Until(stops=(("eax", 0x1F),), source=_SDM + "CPUID.04H; " + _APM3 + "Fn8000_001D: until the cache type is 0")
_TOPOLOGY = "until EBX[15:0] (SDM) or the level type ECX[15:8] (APM vol. 3, Fn0000_000B) is 0"

SUBLEAVES: Mapping[int, UpTo | Marked | Until] = {
    0x04: _CACHE,
    0x07: UpTo(_SDM + "CPUID.07H.00H:EAX"),
    0x0B: Until(stops=(("ebx", 0xFFFF), ("ecx", 0xFF00)), source=_SDM + "CPUID.0BH: " + _TOPOLOGY),
    0x0D: Marked(
        words=((0, "eax", "edx"), (1, "ecx", "edx")),
        always=2,
        source=_SDM + "CPUID.0DH: subleaf n > 1 for bit n of XCR0 (0DH.00H:EDX:EAX) or IA32_XSS (0DH.01H:EDX:ECX)",
    ),
    0x0F: Marked(words=((0, "edx", ""),), source=_SDM + "CPUID.0FH.00H:EDX: resource types that can be monitored"),
    0x10: Marked(words=((0, "ebx", ""),), source=_SDM + "CPUID.10H.00H:EBX: resource types that can be allocated"),
    0x12: Until(stops=(("eax", 0xF),), start=2, source=_SDM + "CPUID.12H: subleaf n > 1 until the type EAX[3:0] is 0"),
    0x14: UpTo(_SDM + "CPUID.14H.00H:EAX"),
    0x17: UpTo(_SDM + "CPUID.17H.00H:EAX, MaxSOCID_Index"),
    0x18: UpTo(_SDM + "CPUID.18H.00H:EAX"),
    0x1B: Until(stops=(("eax", 0xFFF),), source=_SDM + "CPUID.1BH: until the subleaf type EAX[11:0] is 0"),
    0x1D: UpTo(_SDM + "CPUID.1DH.00H:EAX, max_palette"),
    0x1E: UpTo("Intel ISE reference (319433), CPUID.1EH.00H:EAX; reserved and 0 where only subleaf 0 exists (SDM)"),
    0x1F: Until(stops=(("ebx", 0xFFFF), ("ecx", 0xFF00)), source=_SDM + "CPUID.1FH: " + _TOPOLOGY),
    0x20: UpTo(_SDM + "CPUID.20H.00H:EAX"),
    0x23: Marked(words=((0, "eax", ""),), source=_SDM + "CPUID.23H.00H:EAX, SUBLEAF_MASK"),
    0x24: UpTo(_SDM + "CPUID.24H.00H:EAX"),
    0x27: Marked(words=((0, "edx", ""),), source=_SDM + "CPUID.27H.00H:EDX (asymmetric RDT monitoring)"),
    0x28: Marked(words=((0, "ebx", ""),), source=_SDM + "CPUID.28H.00H:EBX (asymmetric RDT allocation)"),
    0x8000001D: _CACHE,
    0x80000020: Marked(
        words=((0, "ebx", ""),), source=_APM3 + "Fn8000_0020_EBX_x0: PQoS features, subleaf n for bit n"
    ),
    0x80000026: Until(stops=(("ecx", 0xFF00),), source=_APM3 + "Fn8000_0026: until the level type ECX[15:8] is 0"),
}


# --- the walk ------------------------------------------------------------------------------------------------------


class LeafOutOfReach(DeviceError):
    """This way of reading CPUID cannot execute that leaf; another may."""


class CpuidSource(Protocol):
    """A way of executing CPUID on one logical CPU. name is for people: "/dev/cpu/N/cpuid", "instruction"."""

    name: str

    def cpuid(self, cpu: int, leaf: int, subleaf: int) -> Registers:
        """Execute CPUID on one logical CPU with EAX = leaf and ECX = subleaf.

        Raise LeafOutOfReach if this source cannot execute that leaf, RequirementMissing if it cannot reach that CPU.
        """
        ...


@runtime_checkable
class Pinning(Protocol):
    """A source that has to be on a CPU to read it; on() stays there for a whole snapshot."""

    def on(self, cpu: int) -> contextlib.AbstractContextManager[None]:
        """Stay on one logical CPU while the block runs."""
        ...


@dataclass(frozen=True)
class Reading:
    """All CPUID leaves of one logical CPU, and in notes what was left out, one sentence each; mostly none."""

    snapshot: Snapshot
    notes: tuple[str, ...]


class _Walk:
    def __init__(self, source: CpuidSource, cpu: int) -> None:
        self._source = source
        self._cpu = cpu
        self.leaves: dict[Leaf, Registers] = {}
        self.notes: list[str] = []

    def execute(self, leaf: int, subleaf: int = 0) -> Registers:
        return self._source.cpuid(self._cpu, leaf, subleaf)

    def keep(self, leaf: int, subleaf: int = 0) -> Registers:
        found = self.leaves[Leaf(leaf, subleaf)] = self.execute(leaf, subleaf)
        return found

    def keep_all(self, leaf: int, rule: UpTo | Marked | Until | None) -> None:
        first = self.keep(leaf)
        if isinstance(rule, UpTo):
            if first.eax > LAST_SUBLEAF:
                self._note_subleaves(leaf, f"subleaf 0 EAX is {first.eax:08x}")
            for subleaf in range(1, min(first.eax, LAST_SUBLEAF) + 1):
                self.keep(leaf, subleaf)
        elif isinstance(rule, Marked):
            for subleaf in range(1, rule.always):
                self.keep(leaf, subleaf)
            for subleaf in range(rule.always, LAST_SUBLEAF + 1):
                if self._marked(leaf, rule) >> subleaf & 1:
                    self.keep(leaf, subleaf)
        elif isinstance(rule, Until):
            self._keep_until(leaf, rule, first)

    def _marked(self, leaf: int, rule: Marked) -> int:
        word = 0
        for subleaf, low, high in rule.words:
            found = self.leaves[Leaf(leaf, subleaf)]
            word |= getattr(found, low) | (getattr(found, high) << 32 if high else 0)
        return word

    def _keep_until(self, leaf: int, rule: Until, found: Registers) -> None:
        subleaf = 0
        while subleaf < rule.start or all(getattr(found, register) & mask for register, mask in rule.stops):
            subleaf += 1
            if subleaf > LAST_SUBLEAF:
                self._note_subleaves(leaf, "no subleaf says that it is the last")
                return
            found = self.keep(leaf, subleaf)

    def _note_subleaves(self, leaf: int, why: str) -> None:
        self.notes.append(f"CPUID {leaf:08x}: {why}; subleaves after {LAST_SUBLEAF:x} were not read")


def _basic(walk: _Walk) -> None:
    found = walk.keep(BASIC)
    if found.eax > LAST_OFFSET:
        walk.notes.append(f"CPUID 00000000: EAX is {found.eax:08x}; basic leaves after {LAST_OFFSET:08x} were not read")
    for leaf in range(1, min(found.eax, LAST_OFFSET) + 1):
        walk.keep_all(leaf, SUBLEAVES.get(leaf))


def _range(walk: _Walk, base: int) -> None:
    try:
        found = walk.keep(base)
    except LeafOutOfReach:
        return
    last = last_leaf(base, found)
    if last is None:
        if found.eax > base + LAST_OFFSET:
            walk.notes.append(f"CPUID {base:08x}: EAX is {found.eax:08x}, no maximum; no further leaf was read")
        return
    for leaf in range(base + 1, last + 1):
        walk.keep_all(leaf, SUBLEAVES.get(leaf))


def _hypervisor(walk: _Walk) -> None:
    for base in HYPERVISOR_BASES:
        try:
            found = walk.execute(base)
        except LeafOutOfReach as error:
            walk.notes.append(f"hypervisor leaves were not read: {error.message}")
            return
        last = last_leaf(base, found)
        signature = signature_of(found)
        if base != HYPERVISOR and (last is None or not signature.rstrip(b"\0") or not _printable(signature)):
            continue
        walk.leaves[Leaf(base, 0)] = found
        if last is None:
            walk.notes.append(f"CPUID {base:08x}: EAX is {found.eax:08x}, no maximum; no further leaf was read")
            continue
        for leaf in range(base + 1, last + 1):
            walk.keep(leaf)
            if signature == XEN_SIGNATURE and leaf == base + 3:
                walk.keep(leaf, 1)
                walk.keep(leaf, 2)


def _printable(signature: bytes) -> bool:
    return all(0x20 <= character < 0x7F for character in signature.rstrip(b"\0"))


@contextlib.contextmanager
def _staying_on(source: CpuidSource, cpu: int) -> Iterator[None]:
    if isinstance(source, Pinning):
        with source.on(cpu):
            yield
    else:
        yield


def read_cpu(source: CpuidSource, cpu: int) -> Reading:
    """Read every leaf and subleaf of one logical CPU: basic, extended, and if there are, hypervisor and Centaur leaves.

    cpu is N in /dev/cpu/N. A leaf is read if its range declares it, a subleaf by the rules of SUBLEAVES; leaf 7
    subleaf 2, for one, only if 7.0.EAX allows. The last subleaf, which says that there are no more, is recorded as
    cpuid(1) does. Whatever a hypervisor returns, at most 256 leaves of a range and 64 subleaves of a leaf are read,
    and notes say so. Leaves 2000_0000H and 8086_0000H (Xeon Phi, Transmeta) are not.
    Raise what source raises: RequirementMissing, DeviceError.
    """
    walk = _Walk(source, cpu)
    with _staying_on(source, cpu):
        _basic(walk)
        if Snapshot(walk.leaves).under_hypervisor:
            _hypervisor(walk)
        _range(walk, EXTENDED)
        if Snapshot(walk.leaves).vendor in ("Centaur", "Zhaoxin"):
            _range(walk, CENTAUR)
    return Reading(Snapshot(dict(sorted(walk.leaves.items()))), tuple(walk.notes))


def read_snapshot(source: CpuidSource, cpu: int) -> Snapshot:
    """Read every leaf and subleaf of one logical CPU, as read_cpu() does, and forget its notes."""
    return read_cpu(source, cpu).snapshot
