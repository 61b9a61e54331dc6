# SPDX-License-Identifier: MIT
"""What a hypervisor's rule would do to a guest with one CPUID on a host with another, without any machine. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from probe import features as f
from probe.models.machine import Hardware, Host, Machine
from probe.models.profile import Profile, mask_of_features

_IBRS = mask_of_features((f.SPEC_CTRL, f.AMD_IBRS))
_STIBP = mask_of_features((f.INTEL_STIBP, f.AMD_STIBP))
_SSBD = mask_of_features((f.SPEC_CTRL_SSBD, f.AMD_SSBD))
_IBPB = mask_of_features((f.SPEC_CTRL, f.AMD_IBPB))
_AMD_IBPB = mask_of_features((f.AMD_IBPB,))
_AMD_IBRS = mask_of_features((f.AMD_IBRS,))
_SPEC_CTRL = mask_of_features((f.SPEC_CTRL,))
_BY_AMD = mask_of_features((f.AMD_IBPB, f.AMD_IBRS, f.AMD_IBPB_RET))
_AMD_SSBD = mask_of_features((f.AMD_SSBD,))
_VIRT_SSBD = mask_of_features((f.VIRT_SSBD,))
_IBPB_RET = mask_of_features((f.AMD_IBPB_RET,))
_ALSO = (
    (_STIBP, _STIBP),
    (_SSBD, _SSBD),
    (_IBPB, _AMD_IBPB),
    (_IBRS, _AMD_IBRS),
    (_SPEC_CTRL, _IBPB_RET),
)
_NOT_OFFERED = mask_of_features((f.V_SPEC_CTRL, f.VIRT_SSBD))


def offered(features: int) -> int:
    """Return what KVM offers to guests on a host with these features, as a mask over profile.FEATURES.

    STIBP and SSBD in both vendors' words, AMD's IBPB, IBRS and IBPB_RET for Intel's (the last not with the bug PBRSB,
    which CPUID does not tell), SPEC_CTRL only where all three AMD bits are (before v6.13 IBPB and IBRS were enough),
    VIRT_SSBD where AMD_SSBD is (kvm_amd). V_SPEC_CTRL needs nesting: left out.
    Source: linux v7.2.13 arch/x86/kvm/cpuid.c, kvm_set_cpu_caps(); svm/svm.c, svm_set_cpu_caps().
    """
    mask = features & ~_NOT_OFFERED | (_VIRT_SSBD if features & _AMD_SSBD else 0)
    for either, both in _ALSO:
        mask |= both if features & either else 0
    return mask | (_SPEC_CTRL if features & _BY_AMD == _BY_AMD else 0)


@dataclass(frozen=True)
class WhatIf:
    """What one rule does: masks of the bits that a write of 1 to a fresh or let-through vCPU may have.

    None: every such write is refused, of 0 too. after is None as well where no guest's write lets it through. read:
    whether a fresh guest's RDMSR succeeds. open_bits: what the rule leaves open.
    """

    machine: Machine
    guest_first: int | None
    guest_after: int | None
    host_first: int | None
    read: bool
    open_bits: int


def what_if(machine: Machine, host_features: int, guest: Profile, accepts: int | None) -> WhatIf:
    """Ask a machine; host_features is a mask over profile.FEATURES, accepts that of the bits its register takes.

    accepts None: the host has no such register.
    """
    bits = accepts or 0
    hardware = Hardware(exists=accepts is not None, tested=bits, valid=bits, keep=bits)
    host = Host(hardware, features=host_features, caps=offered(host_features))
    fresh = machine.start(guest, host)
    guest_first = machine.writable(fresh, by_host=False)
    host_first = machine.writable(fresh, by_host=True)
    after: int | None = None
    opener = (guest_first or 0) & -(guest_first or 0)
    if opener:
        state = machine.write(machine.enter(fresh), opener, by_host=False)
        after = machine.writable(state, by_host=False)
    return WhatIf(
        machine=machine,
        guest_first=guest_first,
        guest_after=after,
        host_first=host_first,
        read=machine.readable(fresh, by_host=False),
        open_bits=machine.open_bits(fresh, by_host=False),
    )
