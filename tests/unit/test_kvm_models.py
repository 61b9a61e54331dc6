# SPDX-License-Identifier: MIT
"""The two masks of July 2020, on the cases that the thread and its sequels are about."""

from __future__ import annotations

import pytest

from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.errors import UsageError
from probe.masks import ALL_BITS
from probe.models import kvm, registry

# linux arch/x86/include/asm/cpufeatures.h, words 18 and 13.
SPEC_CTRL, INTEL_STIBP, SPEC_CTRL_SSBD = 1 << 26, 1 << 27, 1 << 31
AMD_IBPB, AMD_IBRS, AMD_STIBP, AMD_SSBD, AMD_PSFD = 1 << 12, 1 << 14, 1 << 15, 1 << 24, 1 << 28

# Leaf 8000_0008 EBX of a Threadripper 3970X: STIBP and SSBD without IBRS
# (InstLatx64, AuthenticAMD0830F10_K17_CastlePeak_CPUID.txt).
EBX8_3970X = 0x018CB757


def cpuid(vendor_string: str, edx7: int = 0, ebx8: int = 0, edx7_2: int = 0) -> Snapshot:
    ebx, edx, ecx = (int.from_bytes(vendor_string[i : i + 4].encode(), "little") for i in (0, 4, 8))
    return Snapshot(
        {
            Leaf(0x0, 0): Registers(0x20, ebx, ecx, edx),
            Leaf(0x7, 0): Registers(2, 0, 0, edx7),
            Leaf(0x7, 2): Registers(0, 0, 0, edx7_2),
            Leaf(0x80000008, 0): Registers(0, ebx8, 0, 0),
        }
    )


def intel(edx7: int = 0, ebx8: int = 0, edx7_2: int = 0) -> Snapshot:
    return cpuid("GenuineIntel", edx7, ebx8, edx7_2)


def amd(ebx8: int = 0, edx7: int = 0) -> Snapshot:
    return cpuid("AuthenticAMD", edx7, ebx8)


HOST_3970X = amd(EBX8_3970X)
# What KVM gave to its guests: the host's bits, and the Intel bits for STIBP and SSBD.
GUEST_3970X = amd(EBX8_3970X, INTEL_STIBP | SPEC_CTRL_SSBD)
NO_BITS = cpuid("GenuineIntel")

CASES = [
    # name, host, guest, mask of v5.6, mask of the proposal
    ("3970X, guest as KVM makes it", HOST_3970X, GUEST_3970X, 0x4, 0x7),
    ("3970X, AMD bits only", HOST_3970X, HOST_3970X, 0x4, 0x7),
    (
        "3970X, guest with SPEC_CTRL too",
        HOST_3970X,
        amd(EBX8_3970X, SPEC_CTRL | INTEL_STIBP | SPEC_CTRL_SSBD),
        0x4,
        0x7,
    ),
    ("SPEC_CTRL without INTEL_STIBP", intel(SPEC_CTRL), intel(SPEC_CTRL), 0x3, 0x1),
    ("guest without INTEL_STIBP", intel(SPEC_CTRL | INTEL_STIBP), intel(SPEC_CTRL), 0x3, 0x1),
    ("host without INTEL_STIBP", intel(SPEC_CTRL), intel(SPEC_CTRL | INTEL_STIBP), 0x3, 0x1),
    (
        "guest with SPEC_CTRL_SSBD only",
        intel(SPEC_CTRL | INTEL_STIBP | SPEC_CTRL_SSBD),
        intel(SPEC_CTRL_SSBD),
        0x4,
        0x4,
    ),
    ("empty guest CPUID", intel(SPEC_CTRL | INTEL_STIBP | SPEC_CTRL_SSBD), NO_BITS, 0x0, 0x0),
    ("host without the register", NO_BITS, intel(SPEC_CTRL | INTEL_STIBP | SPEC_CTRL_SSBD), 0x0, 0x0),
    ("guest with AMD_SSBD only", amd(AMD_IBRS | AMD_STIBP | AMD_SSBD), amd(AMD_SSBD), 0x4, 0x7),
    ("guest with AMD_STIBP only (EPYC-Rome v1)", amd(AMD_IBRS | AMD_STIBP | AMD_SSBD), amd(AMD_STIBP), 0x0, 0x3),
    ("AMD host, Intel bits in the guest", amd(AMD_IBRS | AMD_STIBP | AMD_SSBD), amd(0, SPEC_CTRL), 0x3, 0x1),
    ("PSFD in host and guest", amd(AMD_PSFD), amd(AMD_PSFD), 0x0, 0x0),
    ("leaf 7.2 in host and guest", intel(SPEC_CTRL, edx7_2=0x1F), intel(SPEC_CTRL, edx7_2=0x1F), 0x3, 0x1),
]


@pytest.mark.parametrize(("host", "guest", "old", "maxim"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_masks(host: Snapshot, guest: Snapshot, old: int, maxim: int) -> None:
    assert kvm.valid_bits_56(host, guest) == old
    assert kvm.valid_bits_maxim(host, guest) == maxim


@pytest.mark.parametrize(
    ("guest", "svm", "vmx"),
    [
        (intel(SPEC_CTRL), True, True),
        (intel(INTEL_STIBP), False, False),
        (intel(SPEC_CTRL_SSBD), False, False),
        (intel(edx7_2=0x1F), False, False),
        (amd(AMD_IBRS), True, False),
        (amd(AMD_STIBP), True, False),
        (amd(AMD_SSBD), True, False),
        (amd(AMD_PSFD), False, False),
        (amd(AMD_IBPB), False, False),
        (NO_BITS, False, False),
    ],
)
def test_gates(guest: Snapshot, svm: bool, vmx: bool) -> None:
    assert kvm.gate_svm_56(guest) is svm
    assert kvm.gate_vmx_417(guest) is vmx
    assert kvm.gate_56(amd(), guest) is svm
    assert kvm.gate_56(cpuid("HygonGenuine"), guest) is svm
    assert kvm.gate_56(intel(), guest) is vmx
    assert kvm.gate_56(cpuid("CentaurHauls"), guest) is vmx


@pytest.mark.parametrize(
    ("name", "cpu", "accepts"),
    [
        ("kvm-5.6", HOST_3970X, 0x4),
        ("kvm-5.6", GUEST_3970X, 0x4),
        ("kvm-maxim-v1", HOST_3970X, 0x7),
        ("kvm-maxim-v1", GUEST_3970X, 0x7),
        ("kvm-5.6", intel(SPEC_CTRL | INTEL_STIBP | SPEC_CTRL_SSBD, edx7_2=0x1F), 0x7),
        ("kvm-maxim-v1", intel(SPEC_CTRL | INTEL_STIBP | SPEC_CTRL_SSBD, edx7_2=0x1F), 0x7),
        ("kvm-5.6", amd(AMD_STIBP), 0x0),
        ("kvm-maxim-v1", amd(AMD_STIBP), 0x3),
    ],
)
def test_first_guest_write(name: str, cpu: Snapshot, accepts: int) -> None:
    predicted = registry.get(name).predict(cpu)
    assert predicted.exists
    assert predicted.accepts == accepts
    assert predicted.either == 0
    assert predicted.faults == ALL_BITS & ~accepts


def test_the_bug_of_2020_is_told_in_its_reason() -> None:
    reason = kvm.predict_56(HOST_3970X).reason_for(1)
    assert reason.because == "IBRS|STIBP wants SPEC_CTRL or AMD_IBRS, in host and in guest CPUID"
    assert "6441fa6178f5" in reason.source


@pytest.mark.parametrize("name", ["kvm-5.6", "kvm-maxim-v1"])
@pytest.mark.parametrize("cpu", [amd(AMD_IBPB), amd(AMD_PSFD), intel(INTEL_STIBP), intel(SPEC_CTRL_SSBD), NO_BITS])
def test_a_closed_gate_means_no_register(name: str, cpu: Snapshot) -> None:
    predicted = registry.get(name).predict(cpu)
    assert not predicted.exists
    assert predicted.faults == ALL_BITS


def test_the_registry_knows_its_models() -> None:
    names = registry.names()
    assert names[0] == "vendor"
    assert {"kvm-5.6", "kvm-maxim-v1"} < set(names)
    assert len(set(names)) == len(names)
    assert registry.DEFAULT is registry.get("vendor")
    assert all(registry.get(name).name == name for name in names)


def test_an_unknown_model_is_a_usage_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        registry.get("kvm-5.7")
    assert "'kvm-5.7'" in str(caught.value)
    assert ", ".join(registry.names()) in str(caught.value)
