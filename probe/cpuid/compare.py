# SPDX-License-Identifier: MIT
"""Compare the CPUID of CPUs, or of one CPU read in two ways: what may differ, what does, and what hybrid cores explain.

Pure. A leaf that was not recorded counts as all zero, as Snapshot.register() has it; a leaf beyond the highest of its
range counts as not recorded, since CPUs return anything there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from probe.cpuid.enumeration import (
    BASIC,
    CENTAUR,
    EXTENDED,
    HYPERVISOR,
    HYPERVISOR_BASES,
    XEN_SIGNATURE,
    last_leaf,
    range_of,
    signature_of,
)
from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.masks import format_bits, format_list

_SDM = "Intel SDM vol. 1 ch. 21 (2025-26 editions; before: vol. 2A, CPUID), "
_APM3 = "AMD APM vol. 3 (24594) appendix E, "
_XEN = "xen/include/public/arch-x86/cpuid.h (as of Xen 4.17), "
_ALL = 0xFFFFFFFF

# Why bits of a Varying row may differ.
EACH_CPU = "each CPU has its own"
SETTING = "set by the operating system in a control register"
EACH_READING = "may differ between two readings of one CPU"


@dataclass(frozen=True)
class Varying:
    """Bits of one register that do not tell one CPU's abilities from another's.

    leaf: the leaf, or for a hypervisor's leaf its number in the range at 4000_0000H. subleaf: None for every subleaf.
    mask: 32 bits. why: EACH_CPU, SETTING or EACH_READING. vendors: those that Snapshot.vendor names, () for all.
    xen: the row is for Xen's leaves, wherever their range begins.
    """

    leaf: int
    register: str
    mask: int
    why: str
    reason: str
    source: str
    subleaf: int | None = 0
    vendors: tuple[str, ...] = ()
    xen: bool = False


_X2APIC = "x2APIC ID of this CPU"

VARYING: tuple[Varying, ...] = (
    Varying(
        0x01, "ebx", 0xFF000000, EACH_CPU, "initial APIC ID", _SDM + "CPUID.01H:EBX[31:24]; " + _APM3 + "Fn0000_0001"
    ),
    Varying(
        0x01,
        "ecx",
        1 << 27,
        SETTING,
        "OSXSAVE mirrors CR4.OSXSAVE",
        _SDM + "CPUID.01H:ECX[27]; " + _APM3 + "Fn0000_0001",
    ),
    Varying(
        0x06,
        "edx",
        0xFFFF0000,
        EACH_CPU,
        "row of this CPU in the hardware feedback interface",
        _SDM + "CPUID.06H:EDX[31:16]",
        vendors=("Intel",),
    ),
    Varying(
        0x07, "ecx", 1 << 4, SETTING, "OSPKE mirrors CR4.PKE", _SDM + "CPUID.07H.00H:ECX[4]; " + _APM3 + "Fn0000_0007"
    ),
    Varying(0x0B, "edx", _ALL, EACH_CPU, _X2APIC, _SDM + "CPUID.0BH:EDX; " + _APM3 + "Fn0000_000B", subleaf=None),
    Varying(
        0x0D,
        "ebx",
        _ALL,
        SETTING,
        "size of what XCR0 enables now",
        _SDM + "CPUID.0DH.00H:EBX; " + _APM3 + "Fn0000_000D",
    ),
    Varying(
        0x0D,
        "ebx",
        _ALL,
        SETTING,
        "size of what XCR0 and IA32_XSS enable now",
        _SDM + "CPUID.0DH.01H:EBX; " + _APM3 + "Fn0000_000D",
        subleaf=1,
    ),
    Varying(0x19, "ebx", 1 << 0, SETTING, "AESKLE needs CR4.KL", _SDM + "CPUID.19H:EBX[0]", vendors=("Intel",)),
    Varying(0x1F, "edx", _ALL, EACH_CPU, _X2APIC, _SDM + "CPUID.1FH:EDX", subleaf=None),
    Varying(
        0x80000001,
        "edx",
        1 << 11,
        EACH_READING,
        "SYSCALL is 0 for a reader that is not in 64-bit mode",
        _SDM + "CPUID.80000001H:EDX[11]",
        vendors=("Intel", "Centaur", "Zhaoxin"),
    ),
    Varying(0x8000001E, "eax", _ALL, EACH_CPU, "extended APIC ID", _APM3 + "Fn8000_001E_EAX"),
    Varying(
        0x8000001E, "ebx", 0xFF, EACH_CPU, "core (before family 17h: compute unit) ID", _APM3 + "Fn8000_001E_EBX[7:0]"
    ),
    Varying(0x8000001E, "ecx", 0xFF, EACH_CPU, "node ID", _APM3 + "Fn8000_001E_ECX[7:0]"),
    Varying(0x80000026, "edx", _ALL, EACH_CPU, _X2APIC, _APM3 + "Fn8000_0026_EDX", subleaf=None),
    *(
        Varying(
            0xC0000002,
            register,
            _ALL,
            EACH_READING,
            "VIA C7: temperature, voltage and multiplier of this moment",
            "cpuid(1) 20230120, 0xc0000002; no public document",
            vendors=("Centaur", "Zhaoxin"),
        )
        for register in Registers._fields
    ),
    *(
        Varying(
            0xC0000004,
            register,
            _ALL,
            EACH_READING,
            "temperature and a mirror of MSR 198H",
            "cpuid(1) 20230120, 0xc0000004; no public document",
            vendors=("Centaur", "Zhaoxin"),
        )
        for register in Registers._fields
    ),
    Varying(0x40000003, "edx", _ALL, EACH_READING, "incarnation: migrations so far", _XEN + "leaf 4", xen=True),
    *(
        Varying(
            0x40000003,
            register,
            _ALL,
            EACH_READING,
            "offset and scale of the time stamp counter",
            _XEN + "leaf 4",
            subleaf=1,
            xen=True,
        )
        for register in Registers._fields
    ),
    Varying(0x40000003, "eax", _ALL, EACH_READING, "TSC frequency of the host", _XEN + "leaf 4", subleaf=2, xen=True),
    Varying(0x40000004, "ebx", _ALL, EACH_CPU, "vCPU ID", _XEN + "leaf 5", xen=True),
)

# The registers that enumerate IA32_SPEC_CTRL and its kin: no kind of core is an excuse for a difference here.
# Measured over 32 hybrid CPUs' dumps (InstLatx64, 2026-07-22): cores of both kinds agree in all of them.
SPEC_CTRL_REGISTERS = frozenset(
    {
        (Leaf(0x7, 0), "edx"),
        (Leaf(0x7, 2), "edx"),
        (Leaf(0x80000008, 0), "ebx"),
        (Leaf(0x80000021, 0), "eax"),
    }
)

# Cores of one kind may sit on different dies of a hybrid package: Meteor Lake's low-power E-cores have no L3.
# Source: Linux commit 9677be09e5e4 ("x86/cacheinfo: Delete global num_cache_leaves") (in v6.13).
CACHE_LEAVES = frozenset({0x2, 0x4, 0x18, 0x80000005, 0x80000006, 0x8000001D})


@dataclass(frozen=True)
class Difference:
    """One register of one subleaf in which two CPUs, or two readings, differ.

    a and b are its 32 bits in the first and the second, without those that were not compared.
    """

    leaf: Leaf
    register: str
    a: int
    b: int

    def __str__(self) -> str:
        return (
            f"CPUID {self.leaf} {self.register}: {self.a:#010x} and {self.b:#010x}, bits {format_bits(self.a ^ self.b)}"
        )


def _rows(whys: frozenset[str]) -> tuple[dict[int, list[Varying]], dict[int, list[Varying]]]:
    fixed: dict[int, list[Varying]] = {}
    xen: dict[int, list[Varying]] = {}
    for row in VARYING:
        if row.why in whys:
            (xen if row.xen else fixed).setdefault(row.leaf, []).append(row)
    return fixed, xen


_WHOLE = _rows(frozenset({EACH_CPU, SETTING, EACH_READING}))
_READING = _rows(frozenset({EACH_READING}))


def _limits(snapshot: Snapshot) -> dict[int, int]:
    """Map the first leaf of each range to its highest leaf; a range that the CPU does not have ends before it begins.

    A range whose first leaf was not recorded is left out: nothing is known about it.
    """
    limits: dict[int, int] = {}
    no_hypervisor = snapshot.registers(1) is not None and not snapshot.under_hypervisor
    for base in {range_of(leaf.leaf) for leaf in snapshot.leaves}:
        found = snapshot.registers(base)
        if found is None:
            continue
        last = None if base in HYPERVISOR_BASES and no_hypervisor else last_leaf(base, found)
        limits[base] = base - 1 if last is None else last
    return limits


def _cleared(
    snapshot: Snapshot, rows: tuple[dict[int, list[Varying]], dict[int, list[Varying]]]
) -> dict[Leaf, Registers]:
    fixed, xen = rows
    limits = _limits(snapshot)
    vendor = snapshot.vendor
    xen_bases = {
        base
        for base in limits
        if base in HYPERVISOR_BASES and signature_of(snapshot.leaves[Leaf(base, 0)]) == XEN_SIGNATURE
    }
    cleared: dict[Leaf, Registers] = {}
    for leaf, found in snapshot.leaves.items():
        base = range_of(leaf.leaf)
        known = base in (BASIC, EXTENDED, CENTAUR) or base in HYPERVISOR_BASES
        if leaf.leaf > limits.get(base, leaf.leaf if known else -1):
            continue
        applicable = xen.get(HYPERVISOR + leaf.leaf - base) if base in xen_bases else fixed.get(leaf.leaf)
        for row in applicable or ():
            if row.subleaf in (None, leaf.subleaf) and (not row.vendors or vendor in row.vendors):
                found = found._replace(**{row.register: getattr(found, row.register) & ~row.mask})
        if any(found):
            cleared[leaf] = found
    return cleared


def comparable(snapshot: Snapshot) -> Mapping[Leaf, Registers]:
    """Return a CPU's leaves with the VARYING bits cleared; leaves beyond the ranges and those all zero are left out.

    Two CPUs of one machine that are able to do the same have equal comparable leaves.
    """
    return _cleared(snapshot, _WHOLE)


def group_equal(cpus: Mapping[int, Snapshot]) -> list[tuple[tuple[int, ...], Snapshot]]:
    """Group CPUs with equal comparable CPUID; each group with its lowest CPU's snapshot, in the order of these.

    The CPUs of a group have the same leaves recorded, too, so that the first stands for all of them leaf by leaf.
    """
    groups: dict[tuple[frozenset[Leaf], frozenset[tuple[Leaf, Registers]]], list[int]] = {}
    for cpu in sorted(cpus):
        snapshot = cpus[cpu]
        key = (frozenset(snapshot.leaves), frozenset(comparable(snapshot).items()))
        groups.setdefault(key, []).append(cpu)
    return [(tuple(members), cpus[members[0]]) for members in groups.values()]


_ZERO = Registers(0, 0, 0, 0)


def _differences(a: Mapping[Leaf, Registers], b: Mapping[Leaf, Registers]) -> Iterator[Difference]:
    for leaf in sorted(a.keys() | b.keys()):
        mine, other = a.get(leaf, _ZERO), b.get(leaf, _ZERO)
        for register, left, right in zip(Registers._fields, mine, other):
            if left != right:
                yield Difference(leaf, register, left, right)


def differences(a: Snapshot, b: Snapshot) -> tuple[Difference, ...]:
    """Return the registers in which two CPUs differ in comparable form, by leaf; one that is missing counts as 0."""
    return tuple(_differences(comparable(a), comparable(b)))


def cross_check(instruction: Snapshot, device: Snapshot) -> tuple[Difference, ...]:
    """Return the registers in which two readings of one CPU differ, by leaf.

    Only what differs from one moment, or one reader's mode, to another is ignored: a different APIC ID means that one
    of the two was read on another CPU. Hypervisor and Centaur leaves count only if both could read them; the package
    cpuid cannot. Under Xen PV the two differ by design: the kernel asks Xen, the instruction the hardware.
    """
    readable = {range_of(leaf.leaf) for leaf in instruction.leaves}

    def both_could(leaf: Leaf) -> bool:
        base = range_of(leaf.leaf)
        return base in readable or not (base in HYPERVISOR_BASES or base == CENTAUR)

    a, b = _cleared(instruction, _READING), _cleared(device, _READING)
    return tuple(_differences(a, {leaf: found for leaf, found in b.items() if both_could(leaf)}))


# --- hybrid CPUs ---------------------------------------------------------------------------------------------------

_INTEL_CORES = {0x20: "Intel Atom", 0x40: "Intel Core"}
_AMD_CORES = {0: "AMD performance", 1: "AMD efficiency"}


def core_type(snapshot: Snapshot) -> str:
    """Return the kind of core that a CPU of a hybrid processor is, and its native model; "" if it is not hybrid.

    Source: Intel SDM vol. 1 ch. 21, CPUID.07H.00H:EDX[15], CPUID.1AH:EAX; linux v7.1 arch/x86/kernel/cpu/
    topology_amd.c, parse_topology_amd() (Fn8000_0026_EAX[30], EBX[31:28], [27:24]).
    """
    if snapshot.vendor == "Intel" and snapshot.register(0x7, 0, "edx") >> 15 & 1:
        word = snapshot.register(0x1A, 0, "eax")
        kind = _INTEL_CORES.get(word >> 24, f"Intel type {word >> 24:#x}")
        return f"{kind} core, native model {word & 0xFFFFFF:#x}"
    if snapshot.vendor in ("AMD", "Hygon") and snapshot.register(0x80000026, 0, "eax") >> 30 & 1:
        word = snapshot.register(0x80000026, 0, "ebx") >> 24
        return f"{_AMD_CORES.get(word >> 4, f'AMD type {word >> 4:#x}')} core, native model {word & 0xF:#x}"
    return ""


def unexplained(a: Snapshot, b: Snapshot) -> tuple[Difference, ...]:
    """Return the differences() of two CPUs of one machine that the design of a hybrid processor does not explain.

    Cores of two kinds may differ in everything but SPEC_CTRL_REGISTERS; cores of one kind in their caches.
    """
    kinds = core_type(a), core_type(b)
    found = differences(a, b)
    if not all(kinds):
        return found
    if kinds[0] != kinds[1]:
        return tuple(one for one in found if (one.leaf, one.register) in SPEC_CTRL_REGISTERS)
    return tuple(one for one in found if one.leaf.leaf not in CACHE_LEAVES)


_SHOWN = 4


def cpus_that_differ(groups: Sequence[tuple[tuple[int, ...], Snapshot]]) -> Iterable[tuple[tuple[int, ...], str]]:
    """Tell of each of group_equal()'s groups that differs unexplained from the largest: its CPUs, and in what.

    On a hybrid processor a group is compared with the largest of its kind of core, and that one with the largest of
    all.
    """
    by_size = sorted(groups, key=lambda group: (-len(group[0]), group[0]))
    references: dict[str, tuple[tuple[int, ...], Snapshot]] = {}
    for cpus, snapshot in by_size:
        reference = references.setdefault(core_type(snapshot), (cpus, snapshot))
        others, standard = by_size[0] if reference[0] == cpus else reference
        found = unexplained(standard, snapshot)
        if found:
            shown = "; ".join(str(one) for one in found[:_SHOWN])
            more = f"; and {len(found) - _SHOWN} more registers" if len(found) > _SHOWN else ""
            yield cpus, f"CPUs {format_list(others)} and {format_list(cpus)} differ: {shown}{more}"
