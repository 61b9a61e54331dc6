# SPDX-License-Identifier: MIT
"""The tables of CPUID bits and MSRs: what they say, and that every row says where it is from."""

from __future__ import annotations

import re

import pytest

from probe import features, registers
from probe.cpuid.snapshot import CpuidBit, Leaf, Registers, Snapshot
from probe.masks import ALL_BITS
from probe.registers import SPEC_CTRL, Msr

ALL_MSRS = (SPEC_CTRL, *registers.KIN)

# A version, a revision, an edition or a date: "v7.1", "rev. 3.44", "version 7.0", "2025-26", "2024-09-19".
DATED = re.compile(r"\bv\d|rev\. \d|version \d|\b20\d\d")

# Intel SDM vol. 4 Table 2-2 row 48H; AMD APM vol. 2 rev. 3.44 Figure 3-13.
NAMES = {
    0: "IBRS",
    1: "STIBP",
    2: "SSBD",
    3: "IPRED_DIS_U",
    4: "IPRED_DIS_S",
    5: "RRSBA_DIS_U",
    6: "RRSBA_DIS_S",
    7: "PSFD",
    8: "DDPD_U",
    10: "BHI_DIS_S",
}

# CPUID input, register, bit -> the fields of IA32_SPEC_CTRL that it enumerates, as the manuals list them.
ENUMERATION = {
    (0x7, 0, "edx", 26): 0x1,
    (0x7, 0, "edx", 27): 0x2,
    (0x7, 0, "edx", 31): 0x4,
    (0x7, 2, "edx", 0): 0x80,
    (0x7, 2, "edx", 1): 0x18,
    (0x7, 2, "edx", 2): 0x60,
    (0x7, 2, "edx", 3): 0x100,
    (0x7, 2, "edx", 4): 0x400,
    (0x80000008, 0, "ebx", 14): 0x1,
    (0x80000008, 0, "ebx", 15): 0x2,
    (0x80000008, 0, "ebx", 24): 0x4,
    (0x80000008, 0, "ebx", 28): 0x80,
}

# Bits that the report lists beside them.
OTHERS = {
    "FLUSH_L1D": (0x7, 0, "edx", 28),
    "ARCH_CAPABILITIES": (0x7, 0, "edx", 29),
    "AMD_IBPB": (0x80000008, 0, "ebx", 12),
    "AMD_IBRS_ALWAYS_ON": (0x80000008, 0, "ebx", 16),
    "AMD_STIBP_ALWAYS_ON": (0x80000008, 0, "ebx", 17),
    "AMD_IBRS_PREFERRED": (0x80000008, 0, "ebx", 18),
    "AMD_IBRS_SAME_MODE": (0x80000008, 0, "ebx", 19),
    "VIRT_SSBD": (0x80000008, 0, "ebx", 25),
    "AMD_SSB_NO": (0x80000008, 0, "ebx", 26),
    "BTC_NO": (0x80000008, 0, "ebx", 29),
    "AMD_IBPB_RET": (0x80000008, 0, "ebx", 30),
    "V_SPEC_CTRL": (0x8000000A, 0, "edx", 20),
    "AUTOIBRS": (0x80000021, 0, "eax", 8),
    "SBPB": (0x80000021, 0, "eax", 27),
    "IBPB_BRTYPE": (0x80000021, 0, "eax", 28),
    "SRSO_NO": (0x80000021, 0, "eax", 29),
    "SRSO_USER_KERNEL_NO": (0x80000021, 0, "eax", 30),
    "SRSO_BP_SPEC_REDUCE": (0x80000021, 0, "eax", 31),
}

Place = tuple[int, int, str, int]


def place(bit: CpuidBit) -> Place:
    return bit.leaf, bit.subleaf, bit.register, bit.bit


def test_spec_ctrl_has_these_fields_and_no_others() -> None:
    assert SPEC_CTRL.index == 0x48
    assert {row.bit: row.name for row in SPEC_CTRL.bits} == NAMES
    assert SPEC_CTRL.defined == registers.DEFINED == 0x5FF
    assert SPEC_CTRL.reserved == 0xFFFF_FFFF_FFFF_FA00
    assert (registers.IBRS, registers.STIBP, registers.SSBD) == (1, 2, 4)
    assert [SPEC_CTRL.name_of(bit) for bit in (0, 10, 9, 11, 63)] == ["IBRS", "BHI_DIS_S"] + ["reserved"] * 3


def test_spec_ctrl_fields_are_enumerated_where_the_manuals_say() -> None:
    found: dict[Place, int] = {}
    for row in SPEC_CTRL.bits:
        for bit in row.any_of:
            found[place(bit)] = found.get(place(bit), 0) | row.mask
    assert found == ENUMERATION
    assert {place(bit) for bit in SPEC_CTRL.any_of} == set(ENUMERATION)
    own = {place(bit) for bit in (*features.INTEL_SPEC_CTRL.bits, *features.AMD_SPEC_CTRL.bits)}
    assert own == set(ENUMERATION)


def test_other_features_are_where_the_manuals_say() -> None:
    own = {place(bit) for bit in (*features.INTEL_SPEC_CTRL.bits, *features.AMD_SPEC_CTRL.bits)}
    assert {bit.name: place(bit) for bit in features.ALL if place(bit) not in own} == OTHERS


def test_no_feature_is_listed_twice() -> None:
    assert len({place(bit) for bit in features.ALL}) == len(features.ALL)
    assert len({bit.name for bit in features.ALL}) == len(features.ALL)


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (0x0, "none"),
        (0x3, "IBRS|STIBP"),
        (0x400, "BHI_DIS_S"),
        (0x200, "reserved(9)"),
        (0x201, "IBRS|reserved(9)"),
        (ALL_BITS & ~0x5FE, "IBRS|reserved(9,11-63)"),
    ],
)
def test_names_of_a_mask(mask: int, names: str) -> None:
    assert SPEC_CTRL.names(mask) == names


def test_a_table_that_is_not_complete_calls_no_bit_reserved() -> None:
    assert registers.EFER.name_of(21) == "AIBRSE"
    assert registers.EFER.name_of(0) == "unlisted"
    assert registers.EFER.names(1 << 21 | 1) == "AIBRSE|unlisted(0)"
    assert registers.EFER.reserved == 0


@pytest.mark.parametrize(
    ("msr", "index", "bits"),
    [
        (registers.PRED_CMD, 0x49, {0, 7}),
        (registers.ARCH_CAPABILITIES, 0x10A, {1, 2, 4, 19, 20, 24, 62, 63}),
        (registers.FLUSH_CMD, 0x10B, {0}),
        (registers.EFER, 0xC0000080, {21}),
        (registers.VIRT_SPEC_CTRL, 0xC001011F, {2}),
        (registers.LS_CFG, 0xC0011020, {10, 33, 54}),
        (registers.BP_CFG, 0xC001102E, {4, 5}),
        (registers.VIRTUAL_ENUMERATION, 0x50000000, {0}),
    ],
    ids=lambda value: value.name if isinstance(value, Msr) else "",
)
def test_kin(msr: Msr, index: int, bits: set[int]) -> None:
    assert msr in registers.KIN
    assert msr.index == index
    assert {row.bit for row in msr.bits} == bits


@pytest.mark.parametrize("msr", ALL_MSRS, ids=lambda msr: msr.name)
def test_every_register_is_sound(msr: Msr) -> None:
    assert len({row.bit for row in msr.bits}) == len({row.name for row in msr.bits}) == len(msr.bits)
    assert msr.access in ("read-write", "read-only", "write-only")
    assert msr.any_of or msr.exists_when
    assert msr.defined & msr.reserved == 0
    assert all(bit in features.ALL for row in msr.bits for bit in row.any_of)
    assert all(bit in features.ALL for bit in msr.any_of)


def test_every_row_has_a_dated_source() -> None:
    sources = {bit.name: bit.source for bit in features.ALL}
    for msr in ALL_MSRS:
        sources[msr.name] = msr.source
        sources.update({f"{msr.name}.{row.name}": row.source for row in msr.bits})
    assert {name: source for name, source in sources.items() if not DATED.search(source)} == {}


def one_leaf(leaf: int, subleaf: int, *, edx: int, max_leaf: int, max_7: int = 0) -> Snapshot:
    return Snapshot(
        {
            Leaf(leaf & 0x80000000, 0): Registers(max_leaf, 0, 0, 0),
            Leaf(0x7, 0): Registers(max_7, 0, 0, 0),
            Leaf(leaf, subleaf): Registers(max_7 if (leaf, subleaf) == (0x7, 0) else 0, 0, 0, edx),
        }
    )


@pytest.mark.parametrize(
    ("cpuid", "bit", "expected"),
    [
        (one_leaf(0x7, 0, edx=1 << 26, max_leaf=0x7), features.SPEC_CTRL, True),
        (one_leaf(0x7, 0, edx=1 << 26, max_leaf=0x6), features.SPEC_CTRL, False),
        (one_leaf(0x7, 2, edx=1 << 4, max_leaf=0x20, max_7=2), features.BHI_CTRL, True),
        (one_leaf(0x7, 2, edx=1 << 4, max_leaf=0x20, max_7=1), features.BHI_CTRL, False),
        (one_leaf(0x8000000A, 0, edx=1 << 20, max_leaf=0x8000000A), features.V_SPEC_CTRL, True),
        (one_leaf(0x8000000A, 0, edx=1 << 20, max_leaf=0x80000008), features.V_SPEC_CTRL, False),
        (Snapshot({Leaf(0x7, 0): Registers(0, 0, 0, 1 << 26)}), features.SPEC_CTRL, True),
        (Snapshot({}), features.SPEC_CTRL, False),
    ],
)
def test_a_bit_counts_only_in_a_leaf_that_exists(cpuid: Snapshot, bit: CpuidBit, expected: bool) -> None:
    assert features.reported(cpuid, bit) is expected
    assert features.reported_of(cpuid, (bit,)) == ((bit,) if expected else ())
