# SPDX-License-Identifier: MIT
from __future__ import annotations

import time
from pathlib import Path

import pytest

from probe.cpuid import compare
from probe.cpuid.compare import (
    SPEC_CTRL_REGISTERS,
    VARYING,
    Difference,
    comparable,
    core_type,
    cpus_that_differ,
    cross_check,
    differences,
    group_equal,
    unexplained,
)
from probe.cpuid.dumps import read_dump
from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from tests.fakes_cpuid import leaf0, registers, snapshot

DATA = Path(__file__).parents[1] / "data" / "cpuid"
ONES = 0xFFFFFFFF


def intel(changes: dict[tuple[int, int], tuple[int, int, int, int]] | None = None) -> Snapshot:
    leaves: dict[tuple[int, int], tuple[int, int, int, int]] = {
        (0, 0): leaf0(0x1F),
        (1, 0): (0x806F8, 0x00800800, 0x7FFEFBFF, 0xBFEBFBFF),
        (7, 0): (2, 1, 1 << 4, 1 << 26),
        (7, 2): (0, 0, 0, 0x17),
        (0x80000000, 0): (0x80000008, 0, 0, 0),
        (0x80000001, 0): (0, 0, 0x121, 0x2C100800),
    }
    return snapshot({**leaves, **(changes or {})})


def with_register(base: Snapshot, leaf: int, subleaf: int, register: str, value: int) -> Snapshot:
    old = base.registers(leaf, subleaf) or Registers(0, 0, 0, 0)
    return Snapshot({**base.leaves, Leaf(leaf, subleaf): old._replace(**{register: value})})


# --- comparable ---


def test_threads_of_one_core_are_equal() -> None:
    for name in ("threadripper-3970x.cpuid-r.txt", "sapphire-rapids.instlatx64.txt"):
        cpus = read_dump(str(DATA / name)).cpus
        assert cpus[0].leaves != cpus[1].leaves
        assert comparable(cpus[0]) == comparable(cpus[1])
        assert [members for members, _ in group_equal(cpus)] == [(0, 1)]


FIXED = [row for row in VARYING if not row.xen]
BASES = {0x00000000: 0xFF, 0x80000000: 0x800000FF, 0xC0000000: 0xC00000FF}
VENDORS = {"": "AuthenticAMD", "Intel": "GenuineIntel", "Centaur": "CentaurHauls"}


def vendor_of(row: compare.Varying) -> str:
    return VENDORS[row.vendors[0] if row.vendors else ""]


def with_ranges(vendor: str, signature: int = 0x600) -> Snapshot:
    leaves: dict[tuple[int, int], tuple[int, int, int, int]] = {
        (base, 0): leaf0(last, vendor) for base, last in BASES.items()
    }
    return snapshot({**leaves, (1, 0): (signature, 0, 0, 0)})


@pytest.mark.parametrize("row", FIXED, ids=lambda row: f"{row.leaf:x}.{row.subleaf}.{row.register}")
def test_bits_of_the_table_and_no_others_are_cleared(row: compare.Varying) -> None:
    for subleaf in (0, 1, 5) if row.subleaf is None else (row.subleaf,):
        base = with_ranges(vendor_of(row))
        all_set = with_register(base, row.leaf, subleaf, row.register, ONES)
        cleared = comparable(all_set).get(Leaf(row.leaf, subleaf), Registers(0, 0, 0, 0))
        others = sum(
            r.mask for r in FIXED if (r.leaf, r.register) == (row.leaf, row.register) and r.subleaf == row.subleaf
        )
        assert getattr(cleared, row.register) == ONES & ~others
        assert (differences(base, all_set) == ()) == (others == ONES)


def test_rows_are_for_their_subleaf_only() -> None:
    """OSPKE is 7.0 ECX[4]; the same bit of 7.1 is another."""
    other = with_register(intel(), 7, 1, "ecx", 1 << 4)
    assert differences(intel(), other) == (Difference(Leaf(7, 1), "ecx", 0, 1 << 4),)


@pytest.mark.parametrize("row", [row for row in FIXED if row.vendors], ids=lambda row: f"{row.leaf:x}")
def test_bits_that_vary_for_one_vendor_count_for_another(row: compare.Varying) -> None:
    base = with_ranges("AuthenticAMD")
    other = with_register(base, row.leaf, row.subleaf or 0, row.register, ONES)
    assert [d.register for d in differences(base, other)] == [row.register]


def test_every_row_says_why() -> None:
    for row in VARYING:
        assert 0 < row.mask <= ONES
        assert row.register in Registers._fields
        assert row.reason
        assert row.source
        assert row.why in (compare.EACH_CPU, compare.SETTING, compare.EACH_READING)


def test_spec_ctrl_registers_are_never_cleared() -> None:
    assert not {(row.leaf, row.register) for row in VARYING} & {
        (leaf.leaf, register) for leaf, register in SPEC_CTRL_REGISTERS if (leaf.leaf, register) != (0x7, "ecx")
    }


def test_leaves_beyond_the_ranges_do_not_count() -> None:
    junk = (0x123, 0x456, 0x789, 0xABC)
    beyond = {(0x20, 0): junk, (0x20000000, 0): junk, (0x40000000, 0): junk, (0x40000100, 0): junk}
    beyond |= {(0x80000009, 0): junk, (0x80860000, 0): junk, (0x8FFFFFFF, 0): junk, (0xC0000000, 0): junk}
    assert comparable(intel(beyond)) == comparable(intel())


def test_hypervisor_leaves_count_if_there_is_a_hypervisor() -> None:
    kvm = {(1, 0): (0x806F8, 0, 1 << 31, 0), (0x40000000, 0): (0x40000001, *registers("KVMKVMKVM"))}
    a = intel({**kvm, (0x40000001, 0): (0x01007EFB, 0, 0, 0)})
    b = intel({**kvm, (0x40000001, 0): (0x01007EFA, 0, 0, 0)})
    assert differences(a, b) == (Difference(Leaf(0x40000001, 0), "eax", 0x01007EFB, 0x01007EFA),)


def test_partial_snapshot_keeps_what_it_has() -> None:
    assert comparable(snapshot({(7, 0): (1, 2, 0, 4)})) == {Leaf(7, 0): Registers(1, 2, 0, 4)}


@pytest.mark.parametrize("base", [0x40000000, 0x40000100])
def test_xen_time_and_vcpu_id(base: int) -> None:
    xen: dict[tuple[int, int], tuple[int, int, int, int]] = {
        (1, 0): (0x806F8, 0, 1 << 31, 0),
        (0x40000000, 0): (0x40000000, *registers("Microsoft Hv")),
        (base, 0): (base + 4, *registers("XenVMMXenVMM")),
    }
    a = intel({**xen, (base + 3, 0): (7, 1, 2600000, 1), (base + 4, 0): (8, 0, 5, 0)})
    b = intel({**xen, (base + 3, 0): (7, 1, 2600000, 2), (base + 3, 1): (1, 2, 3, 4), (base + 4, 0): (8, 1, 5, 0)})
    assert differences(a, b) == ()
    c = with_register(b, base + 4, 0, "ecx", 6)
    assert [str(d.leaf) for d in differences(a, c)] == [f"{base + 4:08x}.0"]


# --- differences and groups ---


def test_differences_tell_leaf_register_and_both_values() -> None:
    other = with_register(intel(), 7, 2, "edx", 0x1F)
    assert differences(intel(), other) == (Difference(Leaf(7, 2), "edx", 0x17, 0x1F),)
    assert str(differences(intel(), other)[0]) == "CPUID 00000007.2 edx: 0x00000017 and 0x0000001f, bits 3"


def test_missing_leaf_counts_as_zero() -> None:
    without = Snapshot({leaf: found for leaf, found in intel().leaves.items() if leaf != Leaf(7, 2)})
    assert differences(intel(), without) == (Difference(Leaf(7, 2), "edx", 0x17, 0),)
    assert differences(without, intel()) == (Difference(Leaf(7, 2), "edx", 0, 0x17),)
    with_zero = intel({(3, 0): (0, 0, 0, 0)})
    assert comparable(with_zero) == comparable(intel())
    assert differences(with_zero, intel()) == ()


def test_groups_are_in_order_of_their_first_cpu() -> None:
    odd = with_register(intel(), 7, 0, "edx", 0)
    groups = group_equal({5: intel(), 0: intel(), 3: odd, 1: odd, 4: intel()})
    assert [members for members, _ in groups] == [(0, 4, 5), (1, 3)]
    assert groups[1][1].register(7, 0, "edx") == 0
    assert group_equal({}) == []


def test_a_group_has_one_set_of_leaves() -> None:
    """The record writes every CPU of a group as the first one's leaves and what differs."""
    groups = group_equal({0: intel(), 1: intel({(3, 0): (0, 0, 0, 0)}), 2: intel()})
    assert [members for members, _ in groups] == [(0, 2), (1,)]
    assert list(cpus_that_differ(groups)) == []


def test_a_thousand_cpus_are_grouped_quickly() -> None:
    cpus = {}
    for cpu in range(1024):
        leaves = {(leaf, sub): (leaf, sub, 3, 4) for leaf in range(2, 0x20) for sub in range(5)}
        cpus[cpu] = intel({**leaves, (1, 0): (0x806F8, cpu << 24 & ONES, 0, 0), (0xB, 0): (1, 2, 0x100, cpu)})
    started = time.monotonic()
    assert [len(members) for members, _ in group_equal(cpus)] == [1024]
    assert time.monotonic() - started < 5


# --- two readings of one CPU ---


def test_cross_check_finds_a_single_bit() -> None:
    other = with_register(intel(), 7, 0, "edx", 1 << 27)
    assert cross_check(intel(), other) == (Difference(Leaf(7, 0), "edx", 1 << 26, 1 << 27),)


@pytest.mark.parametrize(
    ("leaf", "register", "value"), [(1, "ebx", 0x01800800), (1, "ecx", 0x77FEFBFF), (7, "ecx", 0), (0xD, "ebx", 0x340)]
)
def test_cross_check_compares_what_is_one_cpus_own_and_what_the_kernel_sets(
    leaf: int, register: str, value: int
) -> None:
    other = with_register(intel(), leaf, 0, register, value)
    assert differences(intel(), other) == ()
    assert [(d.leaf.leaf, d.register) for d in cross_check(intel(), other)] == [(leaf, register)]


def test_cross_check_by_a_32_bit_reader() -> None:
    reader = with_register(intel(), 0x80000001, 0, "edx", 0x2C100000)
    assert cross_check(reader, intel()) == ()


def test_cross_check_leaves_out_what_the_package_cannot_read() -> None:
    extra = {(0x40000000, 0): (0x40000001, *registers("KVMKVMKVM")), (0x40000001, 0): (1, 0, 0, 0)}
    hypervisor = {(1, 0): (0x806F8, 0, 1 << 31, 0)}
    assert cross_check(intel(hypervisor), intel({**hypervisor, **extra})) == ()
    assert cross_check(intel({**hypervisor, **extra}), intel(hypervisor)) != ()
    other = {**extra, (0x40000001, 0): (3, 0, 0, 0)}
    assert cross_check(intel({**hypervisor, **extra}), intel({**hypervisor, **other})) == (
        Difference(Leaf(0x40000001, 0), "eax", 1, 3),
    )


def test_cross_check_misses_no_extended_leaf() -> None:
    without = Snapshot({leaf: found for leaf, found in intel().leaves.items() if leaf.leaf < 0x80000000})
    assert {d.leaf.leaf for d in cross_check(without, intel())} == {0x80000000, 0x80000001}


# --- hybrid ---

HYBRID = 1 << 15 | 1 << 26


def core(kind: int, changes: dict[tuple[int, int], tuple[int, int, int, int]] | None = None) -> Snapshot:
    leaves = {(7, 0): (2, 1, 0, HYBRID), (0x1A, 0): (kind << 24 | 1, 0, 0, 0), (4, 0): (kind, 0, 0, 0)}
    return intel({**leaves, **(changes or {})})


P, E = 0x40, 0x20


def test_core_types() -> None:
    assert core_type(core(P)) == "Intel Core core, native model 0x1"
    assert core_type(core(E)) == "Intel Atom core, native model 0x1"
    assert core_type(core(0x30)) == "Intel type 0x30 core, native model 0x1"
    assert core_type(intel()) == ""
    assert core_type(intel({(0x1A, 0): (0x20000003, 0, 0, 0)})) == ""  # Sierra Forest: all its cores are Atoms


def amd_core(kind: int) -> Snapshot:
    return snapshot(
        {
            (0, 0): leaf0(0x10, "AuthenticAMD"),
            (1, 0): (0x00B20F40, 0, 0, 0),
            (0x80000000, 0): (0x80000028, 0, 0, 0),
            (0x80000026, 0): (1 << 30 | 1, kind << 28 | 2, 0x100, 0),
        }
    )


def test_amd_core_types() -> None:
    assert core_type(amd_core(0)) == "AMD performance core, native model 0x0"
    assert core_type(amd_core(1)) == "AMD efficiency core, native model 0x0"
    assert unexplained(amd_core(0), amd_core(1)) == ()
    assert differences(amd_core(0), amd_core(1)) != ()


def test_hybrid_cores_are_grouped_apart_and_explained() -> None:
    groups = group_equal({0: core(P), 1: core(P), 2: core(E), 3: core(E)})
    assert [members for members, _ in groups] == [(0, 1), (2, 3)]
    assert differences(core(P), core(E)) != ()
    assert unexplained(core(P), core(E)) == ()
    assert list(cpus_that_differ(groups)) == []


@pytest.mark.parametrize(("leaf", "register"), sorted(SPEC_CTRL_REGISTERS))
def test_no_core_type_explains_a_difference_in_spec_ctrl(leaf: Leaf, register: str) -> None:
    base = core(E, {(0x80000000, 0): (0x80000021, 0, 0, 0)})
    value = base.register(*leaf, register)
    odd = with_register(base, *leaf, register, value ^ 1 << 24)
    p_core = core(P, {(0x80000000, 0): (0x80000021, 0, 0, 0)})
    assert unexplained(p_core, odd) == (Difference(leaf, register, value, value ^ 1 << 24),)
    assert [cpus for cpus, _ in cpus_that_differ(group_equal({0: p_core, 1: p_core, 2: odd}))] == [(2,)]


def test_cores_of_one_kind_may_differ_in_caches_only() -> None:
    low_power = core(E, {(4, 0): (0x99, 0, 0, 0)})
    assert unexplained(core(E), low_power) == ()
    assert unexplained(core(E), core(E, {(7, 0): (2, 3, 0, HYBRID)})) == (Difference(Leaf(7, 0), "ebx", 1, 3),)


def test_without_hybrid_nothing_is_explained() -> None:
    assert unexplained(intel(), intel({(4, 0): (1, 0, 0, 0)})) == (Difference(Leaf(4, 0), "eax", 0, 1),)


# --- what the report says ---


def test_the_odd_cpus_are_told_against_the_many() -> None:
    odd = with_register(intel(), 7, 0, "edx", 0)
    found = list(cpus_that_differ(group_equal({0: odd, **dict.fromkeys(range(1, 8), intel())})))
    assert found == [
        ((0,), "CPUs 1-7 and 0 differ: CPUID 00000007.0 edx: 0x04000000 and 0x00000000, bits 26"),
    ]


def test_an_odd_core_is_told_against_its_kind() -> None:
    odd = core(E, {(7, 0): (2, 3, 0, HYBRID)})
    cpus = {**dict.fromkeys(range(8), core(P)), 8: core(E), 9: core(E), 10: odd}
    found = list(cpus_that_differ(group_equal(cpus)))
    assert found == [((10,), "CPUs 8-9 and 10 differ: CPUID 00000007.0 ebx: 0x00000001 and 0x00000003, bits 1")]


def test_many_differences_are_cut_short_and_counted() -> None:
    many = intel({(leaf, 0): (1, 1, 1, 1) for leaf in (2, 3)})
    ((cpus, text),) = cpus_that_differ(group_equal({0: intel(), 1: intel(), 2: many}))
    assert cpus == (2,)
    assert text.endswith("; and 4 more registers")


def test_equal_cpus_give_nothing() -> None:
    assert list(cpus_that_differ(group_equal({0: intel(), 1: intel()}))) == []
    assert list(cpus_that_differ([])) == []
