# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from probe.cpuid.compare import cross_check
from probe.cpuid.enumeration import HYPERVISOR_BASES, LAST_SUBLEAF, SUBLEAVES
from probe.cpuid.live import (
    CpuidDevice,
    CpuidInstruction,
    CpuOffline,
    LeafOutOfReach,
    read_cpu,
    read_snapshot,
)
from probe.cpuid.snapshot import Leaf, Registers
from probe.errors import DeviceError, ExitCode, RequirementMissing
from tests.fakes_cpuid import FakeAffinity, FakeCpuid, PinnedCpuid, leaf0, registers

HYPERVISOR_BIT = 1 << 31


def subleaves(source: FakeCpuid, leaf: int) -> list[int]:
    """Return the subleaves of a leaf that a snapshot has, and check that nothing else was executed for it."""
    found = [key.subleaf for key in read_snapshot(source, 0).leaves if key.leaf == leaf]
    assert found == sorted(key.subleaf for key in source.asked if key.leaf == leaf)
    return found


# --- ranges ---


def test_all_basic_and_extended_leaves_are_read_and_none_beyond() -> None:
    source = FakeCpuid({(0, 0): leaf0(3), (0x80000000, 0): (0x80000002, 0, 0, 0)})
    assert list(read_snapshot(source, 0).leaves) == [
        Leaf(leaf, 0) for leaf in (0, 1, 2, 3, 0x80000000, 0x80000001, 0x80000002)
    ]


def test_registers_land_where_they_were_read() -> None:
    source = FakeCpuid({(0, 0): leaf0(7), (7, 0): (2, 3, 4, 5), (7, 2): (6, 7, 8, 9)})
    snapshot = read_snapshot(source, 0)
    assert snapshot.registers(7, 2) == Registers(6, 7, 8, 9)
    assert snapshot.vendor == "Intel"


@pytest.mark.parametrize("highest", [0, 1, 2, 3])
def test_leaf_7_ends_where_its_eax_says(highest: int) -> None:
    source = FakeCpuid({(0, 0): leaf0(7), (7, 0): (highest, 0, 0, 0)})
    assert subleaves(source, 7) == list(range(highest + 1))


def test_old_cpu_repeats_leaf_0_at_80000000() -> None:
    source = FakeCpuid(
        {(0, 0): leaf0(2), (0x80000000, 0): leaf0(2)}, otherwise=lambda leaf, subleaf: Registers(9, 9, 9, 9)
    )
    reading = read_cpu(source, 0)
    assert max(reading.snapshot.leaves) == Leaf(0x80000000, 0)
    assert reading.notes == ()


def test_a_source_that_cannot_reach_a_range_leaves_it_out() -> None:
    leaves = {(0, 0): leaf0(1), (1, 0): (0, 0, HYPERVISOR_BIT, 0)}
    reading = read_cpu(FakeCpuid(leaves, unreachable=(0x40000000, 0x80000000)), 0)
    assert list(reading.snapshot.leaves) == [Leaf(0, 0), Leaf(1, 0)]
    assert reading.notes == ("hypervisor leaves were not read: no leaf 40000000",)


@pytest.mark.parametrize(
    ("vendor", "family_model", "expected"),
    [
        ("CentaurHauls", 0x000607B1, 0xC0000002),
        ("CentaurHauls", 0x000006F2, 0xC0000002),
        ("  Shanghai  ", 0x000607B1, 0xC0000002),
        ("GenuineIntel", 0x000806F8, 0x80000000),
        ("AuthenticAMD", 0x00830F10, 0x80000000),
    ],
)
def test_centaur_leaves_are_read_of_those_vendors_only(vendor: str, family_model: int, expected: int) -> None:
    leaves = {(0, 0): leaf0(1, vendor), (1, 0): (family_model, 0, 0, 0), (0xC0000000, 0): (0xC0000002, 0, 0, 0)}
    assert max(read_snapshot(FakeCpuid(leaves), 0).leaves) == Leaf(expected, 0)


# --- hypervisors ---


def test_no_hypervisor_leaf_is_executed_without_the_bit() -> None:
    source = FakeCpuid({(0, 0): leaf0(1), (0x40000000, 0): (0x40000001, *registers("KVMKVMKVM"))})
    read_snapshot(source, 0)
    assert not [leaf for leaf in source.asked if 0x40000000 <= leaf.leaf < 0x80000000]


def hypervisor_leaves(leaves: dict[tuple[int, int], tuple[int, int, int, int]]) -> tuple[list[Leaf], tuple[str, ...]]:
    """Read a CPU that beyond its ranges gives its highest basic leaf; return its hypervisor leaves and the notes."""
    base = {(0, 0): leaf0(1), (1, 0): (0x806F8, 0x123, HYPERVISOR_BIT, 0x456)}
    source = FakeCpuid({**base, **leaves}, otherwise=lambda leaf, subleaf: Registers(*base[1, 0]))
    reading = read_cpu(source, 0)
    return [
        leaf for leaf in reading.snapshot.leaves if leaf.leaf >= 0x40000000 and leaf.leaf != 0x80000000
    ], reading.notes


def test_kvm_behind_hyperv() -> None:
    found, notes = hypervisor_leaves(
        {
            (0x40000000, 0): (0x40000002, *registers("Microsoft Hv")),
            (0x40000100, 0): (0x40000101, *registers("KVMKVMKVM")),
        }
    )
    assert [leaf.leaf for leaf in found] == [0x40000000, 0x40000001, 0x40000002, 0x40000100, 0x40000101]
    assert notes == ()


def test_old_kvm_gives_0_for_its_highest_leaf() -> None:
    found, _ = hypervisor_leaves({(0x40000000, 0): (0, *registers("KVMKVMKVM"))})
    assert [leaf.leaf for leaf in found] == [0x40000000, 0x40000001]


def test_xen_has_three_time_subleaves() -> None:
    found, _ = hypervisor_leaves({(0x40000000, 0): (0x40000004, *registers("XenVMMXenVMM"))})
    assert [leaf.subleaf for leaf in found if leaf.leaf == 0x40000003] == [0, 1, 2]
    assert Leaf(0x40000004, 0) in found


def test_hypervisor_range_with_garbage_is_bounded_and_said() -> None:
    found, notes = hypervisor_leaves({(0x40000000, 0): (0xFFFFFFFF, *registers("Garbage"))})
    assert found == [Leaf(0x40000000, 0)]
    assert notes == ("CPUID 40000000: EAX is ffffffff, no maximum; no further leaf was read",)


def test_a_further_range_needs_a_signature() -> None:
    leaves = {(0x40000000, 0): (0x40000000, *registers("KVMKVMKVM"))}
    for signature in ((0, 0, 0), (0x4D565F4B, 0x01020304, 0)):
        found, _ = hypervisor_leaves({**leaves, (0x40000100, 0): (0x40000101, *signature)})
        assert found == [Leaf(0x40000000, 0)]


def test_every_base_that_linux_looks_at_is_looked_at() -> None:
    found, _ = hypervisor_leaves({(0x4000FF00, 0): (0x4000FF00, *registers("Last one"))})
    assert Leaf(0x4000FF00, 0) in found
    assert len(HYPERVISOR_BASES) == 256


# --- subleaves ---


def cpu_with(leaf: int, *found: tuple[int, int, int, int]) -> FakeCpuid:
    base = leaf & 0xF0000000
    leaves: dict[tuple[int, int], tuple[int, int, int, int]] = {(0, 0): leaf0(0)}
    leaves[base, 0] = leaf0(leaf) if base == 0 else (leaf, 0, 0, 0)
    for subleaf, registers_of in enumerate(found):
        leaves[leaf, subleaf] = registers_of
    return FakeCpuid(leaves)


@pytest.mark.parametrize(
    ("leaf", "found", "expected"),
    [
        (0x04, [(1, 0, 0, 0), (2, 0, 0, 0), (0xFFFFFFE0, 9, 9, 9), (3, 0, 0, 0)], [0, 1, 2]),
        (0x04, [(0, 0, 0, 0)], [0]),
        (0x0B, [(1, 2, 0x100, 7), (6, 8, 0x201, 7), (0, 0, 2, 7), (1, 1, 0x300, 7)], [0, 1, 2]),
        (0x0B, [(0, 0, 0, 0)], [0]),
        (0x0F, [(0, 0, 0, 2)], [0, 1]),
        (0x0F, [(0, 0, 0, 0)], [0]),
        (0x10, [(0, 0x2E, 0, 0)], [0, 1, 2, 3, 5]),
        (0x12, [(0, 0, 0, 0)], [0, 1, 2]),
        (0x12, [(1, 0, 0, 0), (0, 0, 0, 0), (0x70200001, 0, 0, 0), (0x70200001, 0, 0, 0)], [0, 1, 2, 3, 4]),
        (0x14, [(1, 0, 0, 0)], [0, 1]),
        (0x17, [(3, 0, 0, 0)], [0, 1, 2, 3]),
        (0x18, [(8, 0, 0, 0)], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (0x19, [(7, 7, 7, 7)], [0]),
        (0x1B, [(1, 1, 0, 0)], [0, 1]),
        (0x1D, [(1, 0, 0, 0)], [0, 1]),
        (0x1E, [(1, 0, 0, 0)], [0, 1]),
        (0x1F, [(1, 2, 0x100, 7), (3, 8, 0x201, 7), (6, 16, 0x502, 7)], [0, 1, 2, 3]),
        (0x20, [(1, 1, 0, 0)], [0, 1]),
        (0x23, [(0b101011, 0, 0, 0)], [0, 1, 3, 5]),
        (0x24, [(2, 0, 0, 0)], [0, 1, 2]),
        (0x27, [(0, 0, 0, 2)], [0, 1]),
        (0x28, [(0, 0xE, 0, 0)], [0, 1, 2, 3]),
        (0x8000001D, [(0x121, 0, 0, 0), (0x143, 0, 0, 0)], [0, 1, 2]),
        (0x80000020, [(0, 0x1E, 0, 0)], [0, 1, 2, 3, 4]),
        (0x80000026, [(1, 2, 0x100, 0), (4, 16, 0x201, 0)], [0, 1, 2]),
    ],
)
def test_subleaves(leaf: int, found: list[tuple[int, int, int, int]], expected: list[int]) -> None:
    assert subleaves(cpu_with(leaf, *found), leaf) == expected


def test_xsave_subleaves_are_those_of_xcr0_and_xss() -> None:
    source = cpu_with(0x0D, (0x207, 0, 0, 1 << 30), (0xF, 0, 0x1800, 0))
    assert subleaves(source, 0x0D) == [0, 1, 2, 9, 11, 12, 62]


def test_every_rule_names_its_document() -> None:
    for leaf, rule in SUBLEAVES.items():
        assert any(word in rule.source for word in ("SDM", "APM", "319433")), f"{leaf:x}"


# --- garbage ---


def test_garbage_everywhere_ends_and_is_said() -> None:
    garbage = Registers(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    source = FakeCpuid({}, otherwise=lambda leaf, subleaf: garbage)
    reading = read_cpu(source, 0)
    assert "CPUID 00000000: EAX is ffffffff; basic leaves after 000000ff were not read" in reading.notes
    assert "CPUID 00000007: subleaf 0 EAX is ffffffff; subleaves after 3f were not read" in reading.notes
    assert "CPUID 00000004: no subleaf says that it is the last; subleaves after 3f were not read" in reading.notes
    assert "CPUID 80000000: EAX is ffffffff, no maximum; no further leaf was read" in reading.notes
    assert len(source.asked) < 256 + 64 * len(SUBLEAVES) + 256 + 2
    assert max(leaf.subleaf for leaf in source.asked) == LAST_SUBLEAF


def test_a_sane_cpu_has_no_notes() -> None:
    assert read_cpu(FakeCpuid({(0, 0): leaf0(0x20), (0x80000000, 0): (0x80000008, 0, 0, 0)}), 0).notes == ()


# --- pinning ---


def test_a_source_that_pins_stays_for_the_whole_snapshot() -> None:
    source = PinnedCpuid({(0, 0): leaf0(0x10)})
    read_snapshot(source, 5)
    assert source.log == ["to 5", "home"]


# --- /dev/cpu/N/cpuid ---


def device_at(tmp_path: Path, cpus: dict[int, dict[tuple[int, int], tuple[int, int, int, int]]]) -> str:
    """Make ordinary files that answer like the driver for leaves at least 16 apart."""
    for cpu, leaves in cpus.items():
        (tmp_path / str(cpu)).mkdir()
        with (tmp_path / str(cpu) / "cpuid").open("wb") as file:
            for (leaf, subleaf), found in leaves.items():
                file.seek(leaf | subleaf << 32)
                file.write(struct.pack("<4I", *found))
    return str(tmp_path / "{cpu}" / "cpuid")


def test_device_reads_at_leaf_and_subleaf(tmp_path: Path) -> None:
    path = device_at(
        tmp_path, {0: {(0x80000000, 0): (1, 2, 3, 4), (0x10, 3): (5, 6, 7, 0xFFFFFFFF)}, 3: {(0x10, 0): (9, 9, 9, 9)}}
    )
    with CpuidDevice(path) as device:
        assert device.cpuid(0, 0x80000000, 0) == (1, 2, 3, 4)
        assert device.cpuid(0, 0x10, 3) == (5, 6, 7, 0xFFFFFFFF)
        assert device.cpuid(3, 0x10, 0) == (9, 9, 9, 9)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_device_keeps_one_descriptor_a_cpu_and_closes_them(tmp_path: Path) -> None:
    path = device_at(tmp_path, {0: {(0x10, 0): (1, 2, 3, 4)}, 1: {(0x10, 0): (1, 2, 3, 4)}})
    before = open_descriptors()
    with CpuidDevice(path) as device:
        for _ in range(3):
            device.cpuid(0, 0x10, 0)
            device.cpuid(1, 0x10, 0)
        assert open_descriptors() == before + 2
    assert open_descriptors() == before


def test_device_gets_along_with_fewer_descriptors_than_cpus(tmp_path: Path) -> None:
    path = device_at(tmp_path, {cpu: {(0x10, 0): (cpu, 0, 0, 0)} for cpu in range(12)})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with CpuidDevice(path) as device:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 4, hard))
        try:
            assert [device.cpuid(cpu, 0x10, 0).eax for cpu in range(12)] == list(range(12))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_device_without_driver(tmp_path: Path) -> None:
    with CpuidDevice(str(tmp_path / "{cpu}" / "cpuid")) as device, pytest.raises(RequirementMissing) as caught:
        device.cpuid(0, 0, 0)
    assert str(caught.value) == (
        f"cannot open {tmp_path}/0/cpuid: No such file or directory (load the driver with: modprobe cpuid)"
    )
    assert not isinstance(caught.value, CpuOffline)
    assert caught.value.exit_code == ExitCode.REQUIREMENT_MISSING


def test_device_of_one_cpu_missing_means_offline(tmp_path: Path) -> None:
    path = device_at(tmp_path, {0: {(0x10, 0): (1, 2, 3, 4)}})
    with CpuidDevice(path) as device, pytest.raises(CpuOffline, match="CPU 7 is offline or does not exist"):
        device.cpuid(7, 0, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_device_that_may_not_be_opened(tmp_path: Path) -> None:
    path = device_at(tmp_path, {0: {(0x10, 0): (1, 2, 3, 4)}})
    (tmp_path / "0" / "cpuid").chmod(0)
    with CpuidDevice(path) as device, pytest.raises(RequirementMissing, match=r"Permission denied \(needs root"):
        device.cpuid(0, 0, 0)


def test_device_that_gives_too_little(tmp_path: Path) -> None:
    path = device_at(tmp_path, {0: {(0x10, 0): (1, 2, 3, 4)}})
    with CpuidDevice(path) as device, pytest.raises(DeviceError) as caught:
        device.cpuid(0, 0x1C, 0)
    assert str(caught.value) == (f"cannot read CPUID 0000001c.0 from {tmp_path}/0/cpuid: the driver gave 4 of 16 bytes")


def test_device_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "0" / "cpuid").mkdir(parents=True)
    with CpuidDevice(str(tmp_path / "{cpu}" / "cpuid")) as device, pytest.raises(DeviceError, match="Is a directory"):
        device.cpuid(0, 0, 0)


# --- the instruction ---


def executes(leaf: int, subleaf: int) -> tuple[int, int, int, int, int]:
    """Answer as cpuid_native does on a CPU with basic leaves up to 7 and extended ones up to 8000_0008H."""
    limit = 0x80000008 if leaf & 0x80000000 else 7
    return (1, leaf, subleaf, 3, 4) if leaf <= limit else (0, 0xBAD, 0xBAD, 0xBAD, 0xBAD)


def test_instruction_moves_there_and_back() -> None:
    affinity = FakeAffinity({0, 1, 2})
    source = CpuidInstruction(affinity, executes)
    assert source.cpuid(1, 7, 2) == (7, 2, 3, 4)
    assert affinity.history == [{1}, {0, 1, 2}]


def test_instruction_stays_for_a_snapshot() -> None:
    affinity = FakeAffinity({0, 1, 2})
    read_snapshot(CpuidInstruction(affinity, executes), 2)
    assert affinity.history == [{2}, {0, 1, 2}]


def test_instruction_goes_home_after_an_exception() -> None:
    affinity = FakeAffinity({0, 1})

    def fails(leaf: int, subleaf: int) -> tuple[int, int, int, int, int]:
        raise MemoryError

    with pytest.raises(MemoryError):
        read_snapshot(CpuidInstruction(affinity, fails), 1)
    assert affinity.now == {0, 1}


def test_instruction_on_a_cpu_that_the_cpuset_lacks() -> None:
    affinity = FakeAffinity({0, 1}, refused=(1,))
    with pytest.raises(RequirementMissing) as caught:
        CpuidInstruction(affinity, executes).cpuid(1, 0, 0)
    assert str(caught.value) == (
        "cannot move to CPU 1: Invalid argument "
        "(it is offline, or outside the cpuset (cgroup) or taskset of this process)"
    )
    assert affinity.now == {0, 1}


def test_instruction_notices_that_the_kernel_moved_it() -> None:
    affinity = FakeAffinity({0, 1})

    def goes_offline(leaf: int, subleaf: int) -> tuple[int, int, int, int, int]:
        affinity.now = {0}
        return executes(leaf, subleaf)

    with pytest.raises(CpuOffline, match="CPU 1 has gone offline"):
        CpuidInstruction(affinity, goes_offline).cpuid(1, 0, 0)


@pytest.mark.parametrize("leaf", [8, 0x40000000, 0x80000009, 0xC0000000])
def test_instruction_never_returns_what_was_not_executed(leaf: int) -> None:
    with pytest.raises(LeafOutOfReach, match=f"executes no leaf {leaf:08x}: it is beyond what leaf [08]0000000 "):
        CpuidInstruction(FakeAffinity({0}), executes).cpuid(0, leaf, 0)


def test_importing_the_edge_does_not_import_the_package() -> None:
    code = "import sys, probe.cpuid.live; sys.exit('cpuid_native' in sys.modules or 'cpuid' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# --- this machine ---


def test_this_machine_by_instruction() -> None:
    pytest.importorskip("cpuid_native", reason="the package cpuid is not installed")
    cpu = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    snapshot = read_snapshot(CpuidInstruction(), cpu)
    assert os.sched_getaffinity(0) == before
    assert len(snapshot.vendor_string) == 12
    assert snapshot.signature != 0
    assert max(leaf.leaf for leaf in snapshot.leaves if leaf.leaf < 0x40000000) == snapshot.register(0, 0, "eax")


def test_this_machine_read_in_two_ways() -> None:
    pytest.importorskip("cpuid_native", reason="the package cpuid is not installed")
    cpu = min(os.sched_getaffinity(0))
    with CpuidDevice() as device:
        try:
            by_device = read_snapshot(device, cpu)
        except RequirementMissing as error:
            pytest.skip(str(error))
    assert cross_check(read_snapshot(CpuidInstruction(), cpu), by_device) == ()
