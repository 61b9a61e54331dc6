# SPDX-License-Identifier: MIT
"""The two masks of the July 2020 dispute, as predictors of a guest's first write of IA32_SPEC_CTRL.

"kvm-5.6" is the mask that was released; "kvm-maxim-v1" is the one proposed against it and never merged: v5.9 asks the
hardware instead (Linux commit 841c2be09fe4, in v5.9). A mask decides the first write only: once a guest's non-zero
write was accepted, KVM stops intercepting the register. It also decides #GP only: whether an accepted bit reaches the
hardware, and so reads back, is another question.

Functions take two CPUIDs. host is what the host kernel sees (boot_cpu_has); raw CPUID differs from it where the kernel
hides bits, as on Intel microcode of early 2018. guest is what userspace gave to the vCPU (guest_cpuid_has).
"""

from __future__ import annotations

from dataclasses import dataclass

from probe.cpuid.snapshot import CpuidBit, Snapshot
from probe.features import (
    AMD_IBRS,
    AMD_SSBD,
    AMD_STIBP,
    INTEL_STIBP,
    SPEC_CTRL,
    SPEC_CTRL_SSBD,
)
from probe.masks import ALL_BITS, bits_of
from probe.models.prediction import Effect, Model, Prediction, Reason
from probe.registers import IBRS, SSBD, STIBP
from probe.registers import SPEC_CTRL as REGISTER

_MASK_56 = 'Linux commit 6441fa6178f5 ("KVM: x86: avoid incorrect writes to host MSR_IA32_SPEC_CTRL") (in v5.6)'
_MASK_MAXIM = (
    'Maxim Levitsky, "[PATCH] kvm: x86: rewrite kvm_spec_ctrl_valid_bits" (2020-07-02), '
    "20200702174455.282252-1-mlevitsk@redhat.com"
)
_GATE_SVM = (
    'Linux commit df7e8818926e ("KVM: SVM: relax conditions for allowing MSR_IA32_SPEC_CTRL accesses") (in v5.6)'
)
_GATE_VMX = 'Linux commit e7c587da1252 ("x86/speculation: Use synthetic bits for IBRS/IBPB/STIBP") (in v4.17)'


@dataclass(frozen=True)
class Grant:
    """Fields of IA32_SPEC_CTRL (64-bit mask) that a mask function allows if any of the CPUID bits is set."""

    mask: int
    any_of: tuple[CpuidBit, ...]


# IBRS and STIBP are asked for together, and STIBP's own CPUID bits are not asked at all.
GRANTS_56 = (
    Grant(IBRS | STIBP, (SPEC_CTRL, AMD_IBRS)),
    Grant(SSBD, (SPEC_CTRL_SSBD, AMD_SSBD)),
)
GRANTS_MAXIM = (
    Grant(IBRS, (SPEC_CTRL,)),
    Grant(STIBP, (INTEL_STIBP,)),
    Grant(SSBD, (SPEC_CTRL_SSBD,)),
    Grant(IBRS | STIBP, (AMD_IBRS, AMD_STIBP)),
    Grant(IBRS | STIBP | SSBD, (AMD_SSBD,)),
)


def _granted(grants: tuple[Grant, ...], cpuid: Snapshot) -> int:
    mask = 0
    for grant in grants:
        if cpuid.has_any(grant.any_of):
            mask |= grant.mask
    return mask


def _valid_bits(grants: tuple[Grant, ...], host: Snapshot, guest: Snapshot) -> int:
    return _granted(grants, host) & _granted(grants, guest)


def valid_bits_56(host: Snapshot, guest: Snapshot) -> int:
    """Compute kvm_spec_ctrl_valid_bits() of v5.6 to v5.8, as a 64-bit mask.

    Host-initiated writes (KVM_SET_MSRS) are held to it too. Source: Linux commit 6441fa6178f5.
    """
    return _valid_bits(GRANTS_56, host, guest)


def valid_bits_maxim(host: Snapshot, guest: Snapshot) -> int:
    """Compute kvm_spec_ctrl_valid_bits() as rewritten on 2 July 2020, as a 64-bit mask.

    Source: 20200702174455.282252-1-mlevitsk@redhat.com.
    """
    return _valid_bits(GRANTS_MAXIM, host, guest)


def gate_svm_56(guest: Snapshot) -> bool:
    """Tell whether kvm_amd of v5.6 to v5.10 lets this guest touch the register at all.

    Source: Linux commit df7e8818926e (in v5.6); unchanged for SVM by 39485ed95d6b (in v5.11).
    """
    return guest.has_any((SPEC_CTRL, AMD_STIBP, AMD_IBRS, AMD_SSBD))


def gate_vmx_417(guest: Snapshot) -> bool:
    """Tell whether kvm_intel of v4.17 to v5.10 lets this guest touch the register at all.

    Source: Linux commit e7c587da1252 (in v4.17), until 39485ed95d6b (in v5.11; stable v5.10.4).
    """
    return guest.has(SPEC_CTRL)


def runs_svm(host: Snapshot) -> bool:
    """Tell whether KVM on this host is kvm_amd; on every other vendor's CPU it is kvm_intel.

    Source: linux v5.8 arch/x86/include/asm/virtext.h, cpu_has_svm(), which wants AMD or Hygon.
    """
    return host.vendor in ("AMD", "Hygon")


def gate_56(host: Snapshot, guest: Snapshot) -> bool:
    """Tell whether KVM of v5.6 to v5.8 on this host lets this guest touch the register at all."""
    return gate_svm_56(guest) if runs_svm(host) else gate_vmx_417(guest)


@dataclass(frozen=True)
class _MaskModel:
    """What the two models differ in."""

    name: str
    grants: tuple[Grant, ...]
    source: str


_KVM_56 = _MaskModel("kvm-5.6", GRANTS_56, _MASK_56)
_KVM_MAXIM = _MaskModel("kvm-maxim-v1", GRANTS_MAXIM, _MASK_MAXIM)


def _refused(model: _MaskModel, mask: int) -> tuple[Reason, ...]:
    """Return one reason for all fields of the mask that the same CPUID bits would have allowed."""
    by_wanted: dict[str, int] = {}
    for field in bits_of(mask):
        wanted = " or ".join(bit.name for grant in model.grants if grant.mask >> field & 1 for bit in grant.any_of)
        by_wanted[wanted] = by_wanted.get(wanted, 0) | 1 << field
    return tuple(
        Reason(
            fields, Effect.FAULTS, f"{REGISTER.names(fields)} wants {wanted}, in host and in guest CPUID", model.source
        )
        for wanted, fields in by_wanted.items()
    )


def _predict(model: _MaskModel, host: Snapshot, guest: Snapshot) -> Prediction:
    """Predict a guest's first write: fault if the gate is closed or the value has a bit outside the mask."""
    if not gate_56(host, guest):
        if runs_svm(host):
            wanted, source = "none of SPEC_CTRL, AMD_STIBP, AMD_IBRS, AMD_SSBD", _GATE_SVM
        else:
            wanted, source = "no SPEC_CTRL", _GATE_VMX
        because = f"guest CPUID has {wanted}: every guest access takes #GP, of value 0 too"
        return Prediction(
            model.name, exists=False, reasons=(Reason(ALL_BITS, Effect.FAULTS, because, source),), reads_back=False
        )
    valid = _valid_bits(model.grants, host, guest)
    known = IBRS | STIBP | SSBD
    because = f"host and guest CPUID allow {REGISTER.names(valid)}"
    reasons = (
        *((Reason(valid, Effect.ACCEPTS, because, model.source),) if valid else ()),
        *_refused(model, known & ~valid),
        Reason(ALL_BITS & ~known, Effect.FAULTS, "the mask knows IBRS, STIBP and SSBD only", model.source),
    )
    return Prediction(model.name, exists=True, reasons=reasons, reads_back=False)


def predict_56(snapshot: Snapshot) -> Prediction:
    """Predict a first guest write under v5.6 to v5.8, on a host and for a guest that both have this CPUID.

    The bits that KVM_GET_SUPPORTED_CPUID adds to a host's own do not change the answer: they follow from bits that the
    host has, and the mask asks host and guest alike. Given a guest's CPUID, the real host may allow less.
    """
    return _predict(_KVM_56, snapshot, snapshot)


def predict_maxim(snapshot: Snapshot) -> Prediction:
    """Predict a first guest write under the July 2020 proposal, on a host and for a guest that both have this CPUID.

    The gates are those of v5.6 to v5.8, which the patch left alone. As to bits that KVM adds, see predict_56().
    """
    return _predict(_KVM_MAXIM, snapshot, snapshot)


MODELS = (
    Model(
        _KVM_56.name,
        title="KVM v5.6 to v5.8: first guest write, guest CPUID as the host's",
        source=f"{_MASK_56}; {_GATE_SVM}; {_GATE_VMX}",
        predict=predict_56,
    ),
    Model(
        _KVM_MAXIM.name,
        title="KVM with the mask proposed on 2 July 2020, never merged: first guest write, guest CPUID as the host's",
        source=f"{_MASK_MAXIM}; {_GATE_SVM}; {_GATE_VMX}",
        predict=predict_maxim,
    ),
)
