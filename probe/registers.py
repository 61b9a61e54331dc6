# SPDX-License-Identifier: MIT
"""Table: IA32_SPEC_CTRL (MSR 0x48) and its kin, each bit with its name, the CPUID bits that enumerate it, its source.

A bit of a complete table that has no row is reserved. Where a register belongs to a wider subject, only the bits that
bear on IA32_SPEC_CTRL are listed, and complete is False.
"""

from __future__ import annotations

from dataclasses import dataclass

from probe import features
from probe.cpuid.snapshot import CpuidBit
from probe.masks import ALL_BITS, bits_of, format_bits

_SDM_T2_2 = "Intel SDM vol. 4 Table 2-2 (2025-26 editions), register 48H"
_APM = "AMD APM vol. 2 (24593) rev. 3.44 (March 2026) sec. 3.2.9"
_BOTH = f"{_SDM_T2_2}; {_APM}"
_INTEL_ENUM = 'Intel, "CPUID Enumeration and Architectural MSRs", version 7.0 (2022-11-10)'
_HDR = "linux v7.1 arch/x86/include/asm/msr-index.h"
_AMD_C = "linux v7.1 arch/x86/kernel/cpu/amd.c, bsp_init_amd(); hygon.c, bsp_init_hygon()"
_VIRT_MSRS = "Intel's proposal for virtual mitigation MSRs, 20240410143446.797262-1-chao.gao@intel.com (RFC v3)"


@dataclass(frozen=True)
class MsrBit:
    """One defined bit of an MSR.

    name is the documents' mnemonic; any_of the CPUID bits each of which enumerates it (none: CPUID does not tell);
    meaning is what a 1 does, in one clause.
    """

    name: str
    bit: int
    any_of: tuple[CpuidBit, ...]
    meaning: str
    source: str

    @property
    def mask(self) -> int:
        """64-bit mask with this bit set."""
        return 1 << self.bit


@dataclass(frozen=True)
class Msr:
    """One model-specific register.

    index is the 32-bit MSR address; access is "read-write", "read-only" or "write-only"; any_of are the CPUID bits
    each of which says that the register exists, and exists_when says it in words where CPUID alone does not.
    complete means that bits lists every defined bit, so that all others are reserved.
    """

    name: str
    index: int
    bits: tuple[MsrBit, ...]
    access: str
    source: str
    any_of: tuple[CpuidBit, ...] = ()
    exists_when: str = ""
    complete: bool = True

    @property
    def defined(self) -> int:
        """64-bit mask of the bits in the table."""
        return sum(bit.mask for bit in self.bits)

    @property
    def reserved(self) -> int:
        """64-bit mask of the reserved bits; 0 if the table does not list all defined ones."""
        return ALL_BITS & ~self.defined if self.complete else 0

    def name_of(self, bit: int) -> str:
        """Return the mnemonic of one bit, 0..63; "reserved", or "unlisted" if the table is not complete."""
        for row in self.bits:
            if row.bit == bit:
                return row.name
        return "reserved" if self.complete else "unlisted"

    def names(self, mask: int) -> str:
        """Name the bits of a 64-bit mask, lowest first: IBRS|STIBP, IBRS|reserved(9,11-63), or "none" for 0."""
        parts = [self.name_of(bit) for bit in bits_of(mask & self.defined)]
        rest = mask & ~self.defined
        if rest:
            parts.append(f"{'reserved' if self.complete else 'unlisted'}({format_bits(rest)})")
        return "|".join(parts) or "none"

    def describe(self, mask: int) -> str:
        """Return the bits of a 64-bit mask and the names of the defined ones: "1-2 (STIBP, SSBD)"."""
        if mask & self.defined == self.defined and mask != ALL_BITS:
            return f"{format_bits(mask)} (among them all that are defined)"
        return self.brief(mask)

    def brief(self, mask: int) -> str:
        """Return the same where room is short: numbers alone if all that are defined are among them."""
        known = mask & self.defined
        if not known or known == self.defined:
            return format_bits(mask)
        return f"{format_bits(mask)} ({', '.join(self.name_of(bit) for bit in bits_of(known))})"

    def told(self, mask: int) -> str:
        """Return brief() as part of a sentence: bit 1 (STIBP), bits 1-2 (STIBP, SSBD)."""
        return f"{'bits' if mask & (mask - 1) else 'bit'} {self.brief(mask)}"


SPEC_CTRL = Msr(
    "IA32_SPEC_CTRL",
    0x48,
    access="read-write",
    bits=(
        MsrBit(
            "IBRS",
            bit=0,
            any_of=(features.SPEC_CTRL, features.AMD_IBRS),
            meaning="restricts indirect-branch speculation from less privileged modes; implies STIBP",
            source=_BOTH,
        ),
        MsrBit(
            "STIBP",
            bit=1,
            any_of=(features.INTEL_STIBP, features.AMD_STIBP),
            meaning="keeps sibling threads from influencing indirect-branch predictions",
            source=_BOTH,
        ),
        MsrBit(
            "SSBD",
            bit=2,
            any_of=(features.SPEC_CTRL_SSBD, features.AMD_SSBD),
            meaning="makes loads wait for the addresses of older stores; on AMD also disables PSF",
            source=_BOTH,
        ),
        MsrBit(
            "IPRED_DIS_U",
            bit=3,
            any_of=(features.IPRED_CTRL,),
            meaning="indirect branches at CPL3 wait for their target; reserved on AMD",
            source=_SDM_T2_2,
        ),
        MsrBit(
            "IPRED_DIS_S",
            bit=4,
            any_of=(features.IPRED_CTRL,),
            meaning="indirect branches at CPL0-2 wait for their target; reserved on AMD",
            source=_SDM_T2_2,
        ),
        MsrBit(
            "RRSBA_DIS_U",
            bit=5,
            any_of=(features.RRSBA_CTRL,),
            meaning="near returns at CPL3 use no predictor but the RSB; reserved on AMD",
            source=_SDM_T2_2,
        ),
        MsrBit(
            "RRSBA_DIS_S",
            bit=6,
            any_of=(features.RRSBA_CTRL,),
            meaning="near returns at CPL0-2 use no predictor but the RSB; reserved on AMD",
            source=_SDM_T2_2,
        ),
        MsrBit(
            "PSFD",
            bit=7,
            any_of=(features.INTEL_PSFD, features.AMD_PSFD),
            meaning="disables fast (Intel) or predictive (AMD) store forwarding, and leaves store bypass on",
            source=_BOTH,
        ),
        MsrBit(
            "DDPD_U",
            bit=8,
            any_of=(features.DDPD_U,),
            meaning="disables the data-dependent prefetcher; reserved on AMD",
            source=_SDM_T2_2,
        ),
        MsrBit(
            "BHI_DIS_S",
            bit=10,
            any_of=(features.BHI_CTRL,),
            meaning="predictions at CPL0-2 do not depend on branch history from CPL3; reserved on AMD",
            source=_SDM_T2_2,
        ),
    ),
    any_of=(*features.INTEL_SPEC_CTRL.bits, *features.AMD_SPEC_CTRL.bits),
    source=_BOTH,
)

IBRS, STIBP, SSBD = (row.mask for row in SPEC_CTRL.bits[:3])
DEFINED = SPEC_CTRL.defined

PRED_CMD = Msr(
    "IA32_PRED_CMD",
    0x49,
    access="write-only",
    bits=(
        MsrBit(
            "IBPB",
            bit=0,
            any_of=(features.SPEC_CTRL, features.AMD_IBPB),
            meaning="later indirect branches do not use earlier predictions",
            source=f"{_INTEL_ENUM}; {_APM}",
        ),
        MsrBit(
            "SBPB",
            bit=7,
            any_of=(features.SBPB,),
            meaning="as IBPB, but need not clear branch-type predictions; reserved on Intel",
            source=_APM,
        ),
    ),
    any_of=(features.SPEC_CTRL, features.AMD_IBPB, features.SBPB),
    source=f"{_INTEL_ENUM}; {_APM}",
)

ARCH_CAPABILITIES = Msr(
    "IA32_ARCH_CAPABILITIES",
    0x10A,
    access="read-only",
    bits=(
        MsrBit("IBRS_ALL", 1, (), "enhanced IBRS: set once, it stays in force", _HDR),
        MsrBit("RSBA", 2, (), "near returns may use other predictors than the RSB", _HDR),
        MsrBit("SSB_NO", 4, (), "not affected by speculative store bypass, SSBD not needed", _HDR),
        MsrBit("RRSBA", 19, (), "as RSBA, with targets restricted by enhanced IBRS; see RRSBA_DIS_S", _HDR),
        MsrBit("BHI_NO", 20, (), "not affected by branch history injection", _HDR),
        MsrBit("PBRSB_NO", 24, (), "not affected by post-barrier RSB predictions", _HDR),
        MsrBit("ITS_NO", 62, (), "not affected by indirect target selection; set by hypervisors only", _HDR),
        MsrBit("VIRTUAL_ENUMERATION", 63, (), "a hypervisor offers MSR 0x50000000", _VIRT_MSRS),
    ),
    any_of=(features.ARCH_CAPABILITIES,),
    source=_INTEL_ENUM,
    complete=False,
)

FLUSH_CMD = Msr(
    "IA32_FLUSH_CMD",
    0x10B,
    access="write-only",
    bits=(MsrBit("L1D_FLUSH", 0, (features.FLUSH_L1D,), "writes back and invalidates the L1 data cache", _HDR),),
    any_of=(features.FLUSH_L1D,),
    source=_INTEL_ENUM,
)

EFER = Msr(
    "EFER",
    0xC0000080,
    access="read-write",
    bits=(
        MsrBit("AIBRSE", 21, (features.AUTOIBRS,), "Automatic IBRS; Linux uses it instead of SPEC_CTRL[IBRS]", _APM),
    ),
    source="AMD APM vol. 2 (24593) rev. 3.44 (March 2026) sec. 3.1.7",
    exists_when="every x86-64 CPU",
    complete=False,
)

VIRT_SPEC_CTRL = Msr(
    "VIRT_SPEC_CTRL",
    0xC001011F,
    access="read-write",
    bits=(MsrBit("SSBD", 2, (features.VIRT_SSBD,), "as SPEC_CTRL[SSBD], which is preferred if both exist", _APM),),
    any_of=(features.VIRT_SSBD,),
    source=_APM,
)

LS_CFG = Msr(
    "LS_CFG",
    0xC0011020,
    access="read-write",
    bits=(
        MsrBit("SSBD_17H", 10, (), "as SSBD, AMD family 17h and Hygon family 18h without AMD_SSBD", _AMD_C),
        MsrBit("SSBD_16H", 33, (), "as SSBD, AMD family 16h", _AMD_C),
        MsrBit("SSBD_15H", 54, (), "as SSBD, AMD family 15h", _AMD_C),
    ),
    source=_AMD_C,
    exists_when="AMD families 15h, 16h and 17h, Hygon family 18h; not enumerated",
    complete=False,
)

BP_CFG = Msr(
    "BP_CFG",
    0xC001102E,
    access="read-write",
    bits=(
        MsrBit("BP_SPEC_REDUCE", 4, (features.SRSO_BP_SPEC_REDUCE,), "mitigates SRSO for guests", _HDR),
        MsrBit("SHARED_BTB_FIX", 5, (), "Zen 4: fixes erratum 1485, which STIBP=0 with SMT on exposes", _HDR),
    ),
    source=_HDR,
    exists_when="AMD, model-specific and not enumerated; the bits listed are those of Zen 4 and later",
    complete=False,
)

VIRTUAL_ENUMERATION = Msr(
    "IA32_VIRTUAL_ENUMERATION",
    0x50000000,
    access="read-only",
    bits=(MsrBit("MITIGATION_CTRL", 0, (), "the hypervisor offers MSRs 0x50000001 and 0x50000002", _VIRT_MSRS),),
    source=_VIRT_MSRS,
    exists_when="IA32_ARCH_CAPABILITIES[63] is 1, which only a hypervisor sets",
)

KIN = (
    PRED_CMD,
    ARCH_CAPABILITIES,
    FLUSH_CMD,
    EFER,
    VIRT_SPEC_CTRL,
    LS_CFG,
    BP_CFG,
    VIRTUAL_ENUMERATION,
)
