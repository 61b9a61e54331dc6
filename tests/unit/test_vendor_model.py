# SPDX-License-Identifier: MIT
"""The predictor from vendor documents against real CPUs, QEMU's CPU models, and the corners between them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.masks import ALL_BITS
from probe.models import registry, vendor
from probe.models.prediction import Effect, Prediction
from probe.registers import SPEC_CTRL

REAL_CPUS = json.loads((Path(__file__).parent.parent / "data" / "real_cpus.json").read_text())["cpus"]

AMD_ZEN2 = 0x00830F10
INTEL_RAPTOR_LAKE = 0x000B0671


def snapshot(
    vendor_string: str,
    signature: int,
    *,
    hypervisor: bool = False,
    max_basic: int = 0x20,
    max_7: int = 2,
    edx7: int = 0,
    edx7_2: int = 0,
    ebx8: int = 0,
    eax21: int = 0,
) -> Snapshot:
    ebx, edx, ecx = (int.from_bytes(vendor_string[i : i + 4].encode(), "little") for i in (0, 4, 8))
    return Snapshot(
        {
            Leaf(0x0, 0): Registers(max_basic, ebx, ecx, edx),
            Leaf(0x1, 0): Registers(signature, 0, hypervisor << 31, 0),
            Leaf(0x7, 0): Registers(max_7, 0, 0, edx7),
            Leaf(0x7, 2): Registers(0, 0, 0, edx7_2),
            Leaf(0x80000000, 0): Registers(0x80000021, 0, 0, 0),
            Leaf(0x80000008, 0): Registers(0, ebx8, 0, 0),
            Leaf(0x80000021, 0): Registers(eax21, 0, 0, 0),
        }
    )


def amd(ebx8: int = 0, *, edx7: int = 0, hypervisor: bool = False) -> Snapshot:
    return snapshot("AuthenticAMD", AMD_ZEN2, ebx8=ebx8, edx7=edx7, hypervisor=hypervisor)


def intel(edx7: int = 0, *, edx7_2: int = 0, max_7: int = 2, ebx8: int = 0, hypervisor: bool = False) -> Snapshot:
    return snapshot(
        "GenuineIntel",
        INTEL_RAPTOR_LAKE,
        edx7=edx7,
        edx7_2=edx7_2,
        max_7=max_7,
        ebx8=ebx8,
        hypervisor=hypervisor,
    )


def real_cpu(row: dict[str, Any]) -> Snapshot:
    """Build the snapshot of one row; family, model and stepping are encoded as leaf 1 EAX has them."""
    family, model, stepping = (int(row[key], 16) for key in ("family", "model", "stepping"))
    signature = stepping | (model & 0xF) << 4 | min(family, 0xF) << 8 | model >> 4 << 16 | max(family - 0xF, 0) << 20
    registers = {name: int(value, 16) for name, value in row["registers"].items()}
    return snapshot(
        row["source"][:12],
        signature,
        max_7=2 if "7.2d" in registers else 0,
        edx7=registers.get("7.0d", 0),
        edx7_2=registers.get("7.2d", 0),
        ebx8=registers.get("8b", 0),
        eax21=registers.get("21a", 0),
    )


def masks(prediction: Prediction) -> tuple[int, int, int]:
    return prediction.accepts, prediction.either, prediction.faults


def test_the_corpus_is_whole() -> None:
    assert len(REAL_CPUS) == 52
    assert len({row["source"] for row in REAL_CPUS}) == 52
    assert {real_cpu(row).vendor for row in REAL_CPUS} == {"Intel", "AMD", "Hygon", "Zhaoxin", "Centaur"}


@pytest.mark.parametrize("row", REAL_CPUS, ids=[f"{row['cpu']}-{row['source'][:-4]}" for row in REAL_CPUS])
def test_real_cpu(row: dict[str, Any]) -> None:
    cpu = real_cpu(row)
    mask, may = int(row["mask"], 16), int(row["may"], 16)
    predicted = vendor.predict(cpu)

    named = re.match(r"[A-Za-z]{12}([0-9A-F]+)_", row["source"])
    assert named and cpu.signature == int(named[1], 16), "the dump's name tells leaf 1 EAX"
    assert predicted.accepts == mask
    assert predicted.exists == (mask != 0)
    if cpu.vendor in ("Intel", "AMD"):
        assert predicted.either == may
        assert predicted.faults == ALL_BITS & ~(mask | may)
    else:
        assert predicted.either == ALL_BITS & ~mask
        assert predicted.either & may == may
        assert predicted.faults == 0


# CPU models of QEMU 10.0, target/i386/cpu.c: the feature bits each turns on, as (vendor, registers, mask).
# spec-ctrl, stibp, ssbd are 7.0.EDX[26], [27], [31]; ibpb, ibrs, amd-stibp, amd-ssbd, amd-psfd 8000_0008.EBX[12], [14],
# [15], [24], [28]; intel-psfd, ipred-ctrl, rrsba-ctrl, ddpd-u, bhi-ctrl 7.2.EDX[0] to [4].
QEMU_MODELS = [
    ("Skylake-Server", "GenuineIntel", {}, 0x0),
    ("Skylake-Server-IBRS", "GenuineIntel", {"edx7": 1 << 26}, 0x1),
    ("Cascadelake-Server", "GenuineIntel", {"edx7": 1 << 26 | 1 << 31}, 0x5),
    ("Icelake-Server", "GenuineIntel", {"edx7": 1 << 26 | 1 << 31}, 0x5),
    ("SapphireRapids", "GenuineIntel", {"edx7": 1 << 26 | 1 << 31}, 0x5),
    ("Cooperlake", "GenuineIntel", {"edx7": 1 << 26 | 1 << 27 | 1 << 31}, 0x7),
    ("SierraForest-v1", "GenuineIntel", {"edx7": 1 << 26 | 1 << 31}, 0x5),
    ("SierraForest-v2", "GenuineIntel", {"edx7": 1 << 26 | 1 << 31, "edx7_2": 0b10111}, 0x4FD),
    ("ClearwaterForest", "GenuineIntel", {"edx7": 1 << 26 | 1 << 31, "edx7_2": 0b11111}, 0x5FD),
    ("EPYC-v1", "AuthenticAMD", {}, 0x0),
    ("EPYC-v2", "AuthenticAMD", {"ebx8": 1 << 12}, 0x0),
    ("Dhyana", "HygonGenuine", {"ebx8": 1 << 12}, 0x0),
    ("EPYC-Rome-v1", "AuthenticAMD", {"ebx8": 1 << 12 | 1 << 15}, 0x2),
    ("EPYC-Rome-v2", "AuthenticAMD", {"ebx8": 1 << 12 | 1 << 14 | 1 << 15 | 1 << 24}, 0x7),
    ("EPYC-Milan-v1", "AuthenticAMD", {"ebx8": 1 << 12 | 1 << 14 | 1 << 15 | 1 << 24}, 0x7),
    ("EPYC-Milan-v2", "AuthenticAMD", {"ebx8": 1 << 12 | 1 << 14 | 1 << 15 | 1 << 17 | 1 << 24 | 1 << 28}, 0x87),
    (
        "EPYC-Genoa",
        "AuthenticAMD",
        {"ebx8": 1 << 12 | 1 << 14 | 1 << 15 | 1 << 17 | 1 << 24 | 1 << 28, "eax21": 1 << 8},
        0x87,
    ),
    ("YongFeng", "  Shanghai  ", {"edx7": 1 << 26 | 1 << 29}, 0x1),
]


@pytest.mark.parametrize(
    ("vendor_string", "registers", "mask"), [row[1:] for row in QEMU_MODELS], ids=[row[0] for row in QEMU_MODELS]
)
def test_qemu_model_as_a_guest(vendor_string: str, registers: dict[str, int], mask: int) -> None:
    guest = snapshot(vendor_string, AMD_ZEN2, hypervisor=True, **registers)
    predicted = vendor.predict(guest)
    assert predicted.accepts == mask
    assert predicted.exists == (mask != 0)
    for reason in predicted.reasons:
        if reason.effect is Effect.FAULTS:
            assert "documents describe hardware" in reason.because


@pytest.mark.parametrize(
    ("cpu", "accepts", "either"),
    [
        # A KVM guest on AMD: the Intel bits that KVM adds name the same fields.
        (amd(0x018CB757, edx7=1 << 27 | 1 << 31, hypervisor=True), 0x6, 0x1),
        (amd(0, edx7=1 << 26, hypervisor=True), 0x1, 0x2),
        (amd(0, edx7=1 << 31, hypervisor=True), 0x4, 0x3),
        # ... and the reverse.
        (intel(0, ebx8=1 << 14, hypervisor=True), 0x1, 0x2),
        (intel(1 << 26, ebx8=1 << 15 | 1 << 24, hypervisor=True), 0x7, 0x0),
        (intel(1 << 26 | 1 << 27, ebx8=1 << 28, hypervisor=True), 0x83, 0x0),
    ],
)
def test_under_a_hypervisor_both_vendors_leaves_count(cpu: Snapshot, accepts: int, either: int) -> None:
    assert masks(vendor.predict(cpu)) == (accepts, either, ALL_BITS & ~(accepts | either))


def test_on_bare_metal_only_the_vendors_own_leaves_count() -> None:
    assert not vendor.predict(amd(0, edx7=1 << 26 | 1 << 27 | 1 << 31)).exists
    assert not vendor.predict(intel(0, ebx8=1 << 14 | 1 << 15 | 1 << 24 | 1 << 28)).exists


@pytest.mark.parametrize(
    ("cpu", "accepts", "either"),
    [
        (intel(edx7_2=1 << 0), 0x80, 0x2),
        (intel(edx7_2=1 << 1), 0x18, 0x2),
        (intel(edx7_2=1 << 2), 0x60, 0x2),
        (intel(edx7_2=1 << 3), 0x100, 0x2),
        (intel(edx7_2=1 << 4), 0x400, 0x2),
        (intel(1 << 27), 0x2, 0x0),
        (intel(1 << 31), 0x4, 0x2),
        (amd(1 << 28), 0x80, 0x0),
        (amd(1 << 14), 0x1, 0x2),
        (amd(1 << 24), 0x4, 0x3),
    ],
)
def test_any_one_field_says_that_the_register_exists(cpu: Snapshot, accepts: int, either: int) -> None:
    predicted = vendor.predict(cpu)
    assert predicted.exists
    assert masks(predicted) == (accepts, either, ALL_BITS & ~(accepts | either))


@pytest.mark.parametrize("edx7_2", [1 << 5, 1 << 6, 1 << 7])
def test_neighbours_in_leaf_7_2_are_no_fields(edx7_2: int) -> None:
    assert not vendor.predict(intel(edx7_2=edx7_2)).exists


@pytest.mark.parametrize("ebx8", [1 << 12, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 25, 1 << 26, 1 << 29, 1 << 30])
def test_amd_hints_and_relatives_are_no_fields(ebx8: int) -> None:
    predicted = vendor.predict(amd(ebx8))
    assert not predicted.exists
    assert masks(predicted) == (0, 0, ALL_BITS)


@pytest.mark.parametrize(("max_7", "accepts"), [(0, 0x1), (1, 0x1), (2, 0x5F9)])
def test_leaf_7_2_counts_only_if_leaf_7_0_says_it_is_there(max_7: int, accepts: int) -> None:
    assert vendor.predict(intel(1 << 26, edx7_2=0x1F, max_7=max_7)).accepts == accepts


@pytest.mark.parametrize(("max_basic", "exists"), [(0x2, False), (0x6, False), (0x7, True)])
def test_leaf_7_counts_only_up_to_the_maximum_leaf(max_basic: int, exists: bool) -> None:
    cpu = snapshot("GenuineIntel", INTEL_RAPTOR_LAKE, max_basic=max_basic, edx7=1 << 26)
    assert vendor.predict(cpu).exists is exists


@pytest.mark.parametrize(
    ("vendor_string", "registers", "accepts"),
    [
        ("HygonGenuine", {"ebx8": 0x0107D007}, 0x7),
        ("HygonGenuine", {"edx7": 1 << 26}, 0x0),
        ("CentaurHauls", {"edx7": 1 << 26}, 0x1),
        ("CentaurHauls", {"ebx8": 1 << 14}, 0x0),
        ("  Shanghai  ", {"edx7": 1 << 26}, 0x1),
        ("VIA VIA VIA ", {"edx7": 1 << 26, "ebx8": 1 << 28}, 0x81),
        ("VIA VIA VIA ", {}, 0x0),
    ],
)
def test_vendors_without_documents_are_never_judged_to_fault(
    vendor_string: str, registers: dict[str, int], accepts: int
) -> None:
    predicted = vendor.predict(snapshot(vendor_string, 0x00900F22, hypervisor=False, **registers))
    assert predicted.exists == (accepts != 0)
    assert masks(predicted) == (accepts, ALL_BITS & ~accepts, 0)


def test_amd_psfd_not_enumerated_faults_and_says_that_this_is_not_spelled_out() -> None:
    reason = vendor.predict(amd(0x018EF757)).reason_for(7)
    assert reason.mask == 0x80
    assert reason.effect is Effect.FAULTS
    assert "does not spell this out" in reason.because


def test_no_cpuid_at_all() -> None:
    predicted = vendor.predict(Snapshot({}))
    assert not predicted.exists
    assert masks(predicted) == (0, ALL_BITS, 0)


def random_snapshots(count: int) -> list[Snapshot]:
    rng = random.Random(0x48)
    vendors = ["GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls", "  Shanghai  ", "????????????"]
    return [
        snapshot(
            rng.choice(vendors),
            rng.getrandbits(32),
            hypervisor=rng.random() < 0.5,
            max_basic=rng.choice([0x2, 0x7, 0x20]),
            max_7=rng.randrange(4),
            # Empty, sparse and dense registers: an evenly random one would enumerate nearly everything every time.
            edx7=rng.getrandbits(32) & rng.choice([0, rng.getrandbits(32), ALL_BITS]),
            edx7_2=rng.getrandbits(32) & rng.choice([0, rng.getrandbits(32), ALL_BITS]),
            ebx8=rng.getrandbits(32) & rng.choice([0, rng.getrandbits(32), ALL_BITS]),
            eax21=rng.getrandbits(32),
        )
        for _ in range(count)
    ]


def test_every_model_accounts_for_every_bit_of_any_cpu() -> None:
    for cpu in random_snapshots(3000):
        for model in registry.MODELS:
            predicted = model.predict(cpu)
            accepts, either, faults = masks(predicted)
            assert predicted.model == model.name
            assert accepts ^ either ^ faults == ALL_BITS
            assert accepts | either | faults == ALL_BITS
            assert accepts & SPEC_CTRL.reserved == 0
            assert predicted.exists or accepts == 0
            assert all(reason.mask and reason.because and reason.source for reason in predicted.reasons)


def test_documents_leave_only_the_first_three_fields_open() -> None:
    for cpu in random_snapshots(3000):
        predicted = vendor.predict(cpu)
        if cpu.vendor in ("Intel", "AMD"):
            assert predicted.either & ~0x7 == 0
            assert predicted.exists or predicted.faults == ALL_BITS
        else:
            assert predicted.faults == 0
