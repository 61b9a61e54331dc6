# SPDX-License-Identifier: MIT
"""The predictor "vendor": what Intel's and AMD's documents say about a write of each bit.

What is enumerated must be accepted; what is not must fault, with one exception for each vendor (_intel_may, _amd_may).
For the other vendors no document on faults was found, and nothing of theirs is judged to fault. On bare metal a
vendor's own CPUID leaves count. Under a hypervisor both vendors' do, because KVM sets the other vendor's bits as well
(linux v7.1 arch/x86/kvm/cpuid.c, kvm_set_cpu_caps()).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from probe import features
from probe.cpuid.snapshot import CpuidBit, Snapshot
from probe.masks import ALL_BITS
from probe.models.prediction import Effect, Model, Prediction, Reason
from probe.registers import IBRS, SPEC_CTRL, SSBD, STIBP

NAME = "vendor"

_SDM_T2_2 = (
    "Intel SDM vol. 4 Table 2-2, register 48H, column Comment, as quoted in ZwY69phzk3GpGvsh@intel.com (2024-10-09)"
)
_SDM_WRMSR = "Intel SDM vol. 2, WRMSR, Protected Mode Exceptions (2025-26 editions)"
_INTEL_STIBP = 'Intel, "Single Thread Indirect Branch Predictors", ID 758387 (2018-01-03)'
_APM = "AMD APM vol. 2 (24593) rev. 3.44 (March 2026) sec. 3.2.9"
_APM_EXISTS = (
    "AMD white paper 111006 rev. 7.10.18 on IBRS and STIBP; AMD APM vol. 2 (24593) sec. 3.2.9, "
    "rev. 3.39 to 3.42 (2022-24), on any speculation control feature"
)
_WHITE_PAPERS = (
    "Maxim Levitsky reading the AMD white papers of kernel bugzilla 199889: "
    "20200702174455.282252-1-mlevitsk@redhat.com (2020-07-02), "
    "3793ae0da76fe00036ed0205b5ad8f1653f58ef2.camel@redhat.com (2020-07-05)"
)
_NO_TEXT = "no document of this vendor on SPEC_CTRL found (searched 2026)"

_HARDWARE = (
    "; the documents describe hardware, and a hypervisor that passes the register through lets through what the "
    "hardware has"
)

_INTEL_BITS = features.INTEL_SPEC_CTRL.bits
_AMD_BITS = features.AMD_SPEC_CTRL.bits
_BOTH = (*_INTEL_BITS, *_AMD_BITS)


def _defined(bits: tuple[CpuidBit, ...]) -> int:
    """Return the SPEC_CTRL fields that any of these CPUID bits enumerates."""
    return sum(row.mask for row in SPEC_CTRL.bits if set(row.any_of) & set(bits))


def _intel_may(enumerated: int) -> int:
    """STIBP, wherever the register exists."""
    return STIBP if enumerated else 0


def _amd_may(enumerated: int) -> int:
    """IBRS and STIBP if either is enumerated; IBRS, STIBP and SSBD if SSBD is."""
    pair = IBRS | STIBP
    return (pair if enumerated & pair else 0) | (pair | SSBD if enumerated & SSBD else 0)


class _Why(NamedTuple):
    because: str
    source: str


@dataclass(frozen=True)
class _Rules:
    """How one vendor's documents are read.

    leaves are the vendor's own CPUID bits; may computes, from the mask of the enumerated fields, the fields that may
    be written without a fault although they are not enumerated. The four reasons are for: nothing enumerated; a bit of
    may; a bit that the vendor does not define; a bit that it defines and CPUID does not enumerate.
    """

    leaves: tuple[CpuidBit, ...]
    may: Callable[[int], int]
    why_absent: _Why
    why_may: _Why
    why_undefined: _Why
    why_unenumerated: _Why


# Vendors whose documents say what faults.
_DOCUMENTED = {
    "Intel": _Rules(
        leaves=_INTEL_BITS,
        may=_intel_may,
        why_absent=_Why(
            "the register exists if any of its fields is enumerated, and none is: every access takes #GP, of value 0 "
            "too",
            f"{_SDM_T2_2}; {_SDM_WRMSR}",
        ),
        why_may=_Why(
            "not enumerated where the register is: WRMSR ignores the bit and takes no #GP; read-back is not promised",
            _INTEL_STIBP,
        ),
        why_undefined=_Why("reserved, and setting a reserved bit takes #GP", f"{_SDM_WRMSR}; {_SDM_T2_2}"),
        why_unenumerated=_Why(
            "defined but not enumerated, so taken as reserved, which takes #GP; no sentence names this bit",
            _SDM_WRMSR,
        ),
    ),
    "AMD": _Rules(
        leaves=_AMD_BITS,
        may=_amd_may,
        why_absent=_Why(
            "a field's feature bit is what implies the register, and none is set: every access takes #GP, of value 0 "
            "too",
            _APM_EXISTS,
        ),
        why_may=_Why(
            "not enumerated, but by a secondary reading takes no #GP beside the bits that are; the APM leaves it open",
            _WHITE_PAPERS,
        ),
        why_undefined=_Why("reserved (MBZ), and a write of 1 to a reserved bit takes #GP(0)", _APM),
        why_unenumerated=_Why(
            "defined but not enumerated, so taken as reserved, which takes #GP(0); the APM does not spell this out",
            _APM,
        ),
    ),
}
# The others, by whose leaves they enumerate with. Source: their dumps in InstLatx64 (snapshot of 2026-07-22).
_UNDOCUMENTED = {"Hygon": _AMD_BITS, "Centaur": _INTEL_BITS, "Zhaoxin": _INTEL_BITS}


def _accepted(snapshot: Snapshot, leaves: tuple[CpuidBit, ...]) -> tuple[Reason, ...]:
    """Return one reason per set of sources for the fields that CPUID enumerates through these bits."""
    by_source: dict[str, list[tuple[int, str]]] = {}
    for row in SPEC_CTRL.bits:
        found = features.reported_of(snapshot, tuple(bit for bit in row.any_of if bit in leaves))
        if found:
            source = "; ".join(dict.fromkeys(bit.source for bit in found))
            how = f"{row.name} by {' and '.join(str(bit) for bit in found)}"
            by_source.setdefault(source, []).append((row.mask, how))
    return tuple(
        Reason(
            sum(mask for mask, _ in rows), Effect.ACCEPTS, f"enumerated: {', '.join(how for _, how in rows)}", source
        )
        for source, rows in by_source.items()
    )


def _documented(rules: _Rules, accepted: tuple[Reason, ...], enumerated: int, note: str) -> tuple[Reason, ...]:
    """Return the reasons for all 64 bits; note is appended to why a bit that is not enumerated has its effect."""

    def reason(mask: int, effect: Effect, why: _Why) -> Reason:
        return Reason(mask, effect, why.because + note, why.source)

    if not enumerated:
        return (reason(ALL_BITS, Effect.FAULTS, rules.why_absent),)
    may = rules.may(enumerated) & ~enumerated
    rest = ALL_BITS & ~(enumerated | may)
    defined = _defined(rules.leaves)
    reasons = (
        *accepted,
        reason(may, Effect.EITHER, rules.why_may),
        reason(rest & defined, Effect.FAULTS, rules.why_unenumerated),
        reason(rest & ~defined, Effect.FAULTS, rules.why_undefined),
    )
    return tuple(each for each in reasons if each.mask)


def predict(snapshot: Snapshot) -> Prediction:
    """Predict, by the vendor's documents, what a write of each bit of IA32_SPEC_CTRL does on this CPU.

    snapshot is the CPUID of the CPU that writes: raw on bare metal, the guest's in a guest. exists is False if CPUID
    enumerates no field. For a vendor without documents everything not enumerated is open, so that nothing found on
    such a CPU contradicts a document that was never read; an unknown vendor is given both vendors' leaves.
    """
    rules = _DOCUMENTED.get(snapshot.vendor)
    if snapshot.under_hypervisor:
        leaves = _BOTH
    else:
        leaves = rules.leaves if rules else _UNDOCUMENTED.get(snapshot.vendor, _BOTH)
    accepted = _accepted(snapshot, leaves)
    enumerated = sum(reason.mask for reason in accepted)
    if rules:
        reasons = _documented(rules, accepted, enumerated, _HARDWARE if snapshot.under_hypervisor else "")
    else:
        because = f"not enumerated; vendor {snapshot.vendor}: no document says whether the write faults"
        reasons = (*accepted, Reason(ALL_BITS & ~enumerated, Effect.EITHER, because, _NO_TEXT))
    return Prediction(NAME, exists=bool(enumerated), reasons=reasons)


MODEL = Model(
    NAME,
    title="vendor documents: Intel SDM and security guidance, AMD APM and white papers",
    source=f"{_SDM_T2_2}; {_SDM_WRMSR}; {_INTEL_STIBP}; {_APM}; {_APM_EXISTS}",
    predict=predict,
)
