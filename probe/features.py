# SPDX-License-Identifier: MIT
"""Table: every CPUID bit that bears on IA32_SPEC_CTRL, by who defined it, with its source.

Names are those of linux arch/x86/include/asm/cpufeatures.h and arch/x86/kvm/reverse_cpuid.h (v7.1) where Linux has
one, the vendor's otherwise. A row says where the bit is reported; what it enumerates is in probe.registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from probe.cpuid.snapshot import CpuidBit, Snapshot

_INTEL_ENUM = 'Intel, "CPUID Enumeration and Architectural MSRs", version 7.0 (2022-11-10)'
_SDM_7_2 = (
    "Intel SDM vol. 1 ch. 21 (2025-26 editions; before: vol. 2A, CPUID), CPUID.07H.02H:EDX, as quoted in "
    "20240919051011.118309-1-chao.gao@intel.com"
)
_APM = "AMD APM vol. 2 (24593) rev. 3.44 (March 2026) sec. 3.2.9"
_LINUX = "linux v7.1 arch/x86/include/asm/cpufeatures.h"


def _edx7(name: str, bit: int) -> CpuidBit:
    return CpuidBit(name, leaf=0x7, subleaf=0, register="edx", bit=bit, source=_INTEL_ENUM)


def _edx7_2(name: str, bit: int) -> CpuidBit:
    return CpuidBit(name, leaf=0x7, subleaf=2, register="edx", bit=bit, source=_SDM_7_2)


def _ebx8(name: str, bit: int, source: str = _APM) -> CpuidBit:
    return CpuidBit(name, leaf=0x80000008, subleaf=0, register="ebx", bit=bit, source=source)


def _eax21(name: str, bit: int, source: str) -> CpuidBit:
    return CpuidBit(name, leaf=0x80000021, subleaf=0, register="eax", bit=bit, source=source)


# Intel leaves. Bits 26, 27, 31 of 7.0.EDX and 0-4 of 7.2.EDX enumerate fields of IA32_SPEC_CTRL.
SPEC_CTRL = _edx7("SPEC_CTRL", 26)
INTEL_STIBP = _edx7("INTEL_STIBP", 27)
FLUSH_L1D = _edx7("FLUSH_L1D", 28)
ARCH_CAPABILITIES = _edx7("ARCH_CAPABILITIES", 29)
SPEC_CTRL_SSBD = _edx7("SPEC_CTRL_SSBD", 31)
INTEL_PSFD = _edx7_2("INTEL_PSFD", 0)
IPRED_CTRL = _edx7_2("IPRED_CTRL", 1)
RRSBA_CTRL = _edx7_2("RRSBA_CTRL", 2)
DDPD_U = _edx7_2("DDPD_U", 3)
BHI_CTRL = _edx7_2("BHI_CTRL", 4)

# AMD leaves. Bits 14, 15, 24, 28 of 8000_0008.EBX enumerate fields of SPEC_CTRL; 16-19 are hints and enumerate none.
AMD_IBPB = _ebx8("AMD_IBPB", 12)
AMD_IBRS = _ebx8("AMD_IBRS", 14)
AMD_STIBP = _ebx8("AMD_STIBP", 15)
AMD_IBRS_ALWAYS_ON = _ebx8("AMD_IBRS_ALWAYS_ON", 16)
AMD_STIBP_ALWAYS_ON = _ebx8("AMD_STIBP_ALWAYS_ON", 17)
AMD_IBRS_PREFERRED = _ebx8("AMD_IBRS_PREFERRED", 18)
AMD_IBRS_SAME_MODE = _ebx8("AMD_IBRS_SAME_MODE", 19)
AMD_SSBD = _ebx8("AMD_SSBD", 24)
VIRT_SSBD = _ebx8("VIRT_SSBD", 25)
AMD_SSB_NO = _ebx8("AMD_SSB_NO", 26)
AMD_PSFD = _ebx8("AMD_PSFD", 28)
BTC_NO = _ebx8("BTC_NO", 29, _LINUX)
AMD_IBPB_RET = _ebx8("AMD_IBPB_RET", 30)
V_SPEC_CTRL = CpuidBit(
    "V_SPEC_CTRL",
    leaf=0x8000000A,
    subleaf=0,
    register="edx",
    bit=20,
    source='Linux commit f333374e108e ("x86/cpufeatures: Add the Virtual SPEC_CTRL feature") (in v5.13)',
)
AUTOIBRS = _eax21("AUTOIBRS", 8, _APM)
SBPB = _eax21("SBPB", 27, _APM)
IBPB_BRTYPE = _eax21("IBPB_BRTYPE", 28, _APM)
SRSO_NO = _eax21("SRSO_NO", 29, _LINUX)
SRSO_USER_KERNEL_NO = _eax21("SRSO_USER_KERNEL_NO", 30, _LINUX)
SRSO_BP_SPEC_REDUCE = _eax21("SRSO_BP_SPEC_REDUCE", 31, _LINUX)


@dataclass(frozen=True)
class FeatureGroup:
    """Feature bits that one party defined and that answer one question; title is one line for people."""

    title: str
    bits: tuple[CpuidBit, ...]


INTEL_SPEC_CTRL = FeatureGroup(
    "Intel: fields of IA32_SPEC_CTRL",
    (SPEC_CTRL, INTEL_STIBP, SPEC_CTRL_SSBD, INTEL_PSFD, IPRED_CTRL, RRSBA_CTRL, DDPD_U, BHI_CTRL),
)
AMD_SPEC_CTRL = FeatureGroup("AMD: fields of SPEC_CTRL", (AMD_IBRS, AMD_STIBP, AMD_SSBD, AMD_PSFD))
INTEL_KIN = FeatureGroup("Intel: related registers", (FLUSH_L1D, ARCH_CAPABILITIES))
AMD_HINTS = FeatureGroup(
    "AMD: hints on how to use SPEC_CTRL; no field of it",
    (AMD_IBRS_ALWAYS_ON, AMD_STIBP_ALWAYS_ON, AMD_IBRS_PREFERRED, AMD_IBRS_SAME_MODE, AMD_SSB_NO, BTC_NO),
)
AMD_KIN = FeatureGroup(
    "AMD: related registers and virtualization",
    (
        AMD_IBPB,
        AMD_IBPB_RET,
        VIRT_SSBD,
        V_SPEC_CTRL,
        AUTOIBRS,
        SBPB,
        IBPB_BRTYPE,
        SRSO_NO,
        SRSO_USER_KERNEL_NO,
        SRSO_BP_SPEC_REDUCE,
    ),
)

GROUPS = (INTEL_SPEC_CTRL, INTEL_KIN, AMD_SPEC_CTRL, AMD_HINTS, AMD_KIN)
ALL: tuple[CpuidBit, ...] = tuple(bit for group in GROUPS for bit in group.bits)


def reported(snapshot: Snapshot, bit: CpuidBit) -> bool:
    """Tell whether a feature bit is set in a leaf that the CPU says it has.

    Beyond the maximum leaf an Intel CPU answers with the highest basic leaf, so what stands there is no feature bit;
    sub-leaf n of leaf 7 exists only if CPUID.7H.0H:EAX >= n. A maximum that was not recorded limits nothing.
    Source: Intel SDM vol. 1 ch. 21 (2025-26 editions), 21.1.3 "CPUID Basic and Extended Range" and CPUID.07H.
    """
    maximum = snapshot.registers(bit.leaf & 0x80000000)
    if maximum is not None and bit.leaf > maximum.eax:
        return False
    if bit.leaf == 0x7 and bit.subleaf > snapshot.register(0x7, 0, "eax"):
        return False
    return snapshot.has(bit)


def reported_of(snapshot: Snapshot, bits: tuple[CpuidBit, ...]) -> tuple[CpuidBit, ...]:
    """Return those of the feature bits that are reported, in the order given."""
    return tuple(bit for bit in bits if reported(snapshot, bit))
