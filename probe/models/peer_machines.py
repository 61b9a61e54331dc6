# SPDX-License-Identifier: MIT
"""Peers of KVM, and rules on paper, as state machines: they intercept every access, or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from probe import features as f
from probe.masks import ALL_BITS
from probe.models.machine import BESIDE_NAMES, DENY_READ, DENY_WRITE, Host, State
from probe.models.profile import Profile, mask_of_features
from probe.registers import IBRS, SSBD, STIBP
from probe.registers import SPEC_CTRL as REGISTER

_SPEC_CTRL = mask_of_features((f.SPEC_CTRL,))
_IBRS = mask_of_features((f.SPEC_CTRL, f.AMD_IBRS))
_STIBP = mask_of_features((f.INTEL_STIBP, f.AMD_STIBP))
_SSBD = mask_of_features((f.SPEC_CTRL_SSBD, f.AMD_SSBD))
_PSFD = mask_of_features((f.INTEL_PSFD, f.AMD_PSFD))
_IPRED = mask_of_features((f.IPRED_CTRL,))
_RRSBA = mask_of_features((f.RRSBA_CTRL,))
_BHI = mask_of_features((f.BHI_CTRL,))
_KVM_GATE = _SPEC_CTRL | mask_of_features((f.AMD_STIBP, f.AMD_IBRS, f.AMD_SSBD))

# The fields of the register by the CPUID bits that enumerate them, from the table of registers.
_ENUMERATED = tuple((row.mask, mask_of_features(row.any_of)) for row in REGISTER.bits)


@functools.lru_cache(maxsize=1024)
def enumerated(features: int) -> int:
    """Return the 64-bit mask of the fields that a CPUID enumerates; features is a mask over profile.FEATURES."""
    mask = 0
    for field, any_of in _ENUMERATED:
        if features & any_of:
            mask |= field
    return mask


Writable = Callable[[Profile, Host], "int | None"]


@dataclass(frozen=True)
class PeerMachine:
    """A hypervisor that sees every access and stores the value itself.

    by_guest and by_host return the mask of the bits that a write may have, None if the register is not there. unsaid
    returns the bits on which the rule does not decide. stores False: writes are ignored, reads give 0.
    """

    name: str
    title: str
    source: str
    by_guest: Writable
    by_host: Writable
    unsaid: Callable[[Profile, Host], int] = lambda profile, host: 0
    unsaid_by_host: int = 0
    stores: bool = True
    family: str = "peer"
    others: int | None = None  # the bits of IA32_PRED_CMD and VIRT_SPEC_CTRL that it accepts; None: not said

    def start(self, profile: Profile, host: Host) -> State:
        """Return a fresh vCPU."""
        return State(profile, host)

    def enter(self, state: State) -> State:
        """Do nothing: nothing waits for an entry."""
        return state

    def writable(self, state: State, *, by_host: bool) -> int | None:
        """Return the mask of the bits that a write may have; None if every write is refused, of 0 too."""
        if by_host:
            return self.by_host(state.profile, state.host)
        return None if state.denied & DENY_WRITE else self.by_guest(state.profile, state.host)

    def readable(self, state: State, *, by_host: bool) -> bool:
        """Tell whether a read succeeds: where the register is there."""
        if by_host:
            return self.by_host(state.profile, state.host) is not None
        return not state.denied & DENY_READ and self.by_guest(state.profile, state.host) is not None

    def open_bits(self, state: State, *, by_host: bool) -> int:
        """Return the mask of the bits on which the rule does not decide."""
        return self.unsaid_by_host if by_host else self.unsaid(state.profile, state.host)

    def write(self, state: State, value: int, *, by_host: bool) -> State:
        """Store the value, or ignore it."""
        return replace(state, value=value if self.stores else 0)

    def read(self, state: State, *, by_host: bool) -> tuple[State, int | None]:
        """Return what is stored; a rule that leaves something open does not say what is read."""
        opened = self.open_bits(state, by_host=by_host)
        return state, None if opened else state.value

    def set_cpuid(self, state: State, profile: Profile) -> State:
        """Give the guest another CPUID."""
        return replace(state, profile=profile)

    def init(self, state: State) -> State:
        """Clear the stored value, as these peers do."""
        return replace(state, value=0)

    def set_filter(self, state: State, denied: int) -> State:
        """Deny guest accesses."""
        return replace(state, denied=denied)

    def beside(self, profile: Profile, host: Host) -> Mapping[str, tuple[int, int]]:
        """Say of the registers beside it what the rule says of every register."""
        return {} if self.others is None else dict.fromkeys(BESIDE_NAMES, (self.others, ALL_BITS))


@dataclass(frozen=True)
class PassThrough:
    """The register is the guest's from the start, if its CPUID has it; nothing is intercepted."""

    name: str
    title: str
    source: str
    family: str = "policy"

    def start(self, profile: Profile, host: Host) -> State:
        """Return a fresh vCPU."""
        return State(profile, host, direct=True)

    def _there(self, state: State) -> bool:
        return state.host.hardware.exists and state.profile.mask & _KVM_GATE != 0

    def enter(self, state: State) -> State:
        """Do nothing: nothing waits for an entry."""
        return state

    def writable(self, state: State, *, by_host: bool) -> int | None:
        """Ask the hardware; the guest also needs its CPUID."""
        if not by_host and (state.denied & DENY_WRITE or not self._there(state)):
            return None
        tested = state.host.hardware.tested if by_host else state.host.hardware.valid
        return tested if state.host.hardware.exists else None

    def readable(self, state: State, *, by_host: bool) -> bool:
        """Tell whether a read succeeds."""
        return by_host or (not state.denied & DENY_READ and self._there(state))

    def open_bits(self, state: State, *, by_host: bool) -> int:
        """Say of every bit what happens."""
        return 0

    def write(self, state: State, value: int, *, by_host: bool) -> State:
        """Write the hardware (at once, or with the next entry)."""
        return replace(state, value=value if by_host else value & state.host.hardware.keep)

    def read(self, state: State, *, by_host: bool) -> tuple[State, int | None]:
        """Read what was saved at the last exit, or the hardware."""
        if by_host:
            return state, state.value
        state = replace(state, value=state.value & state.host.hardware.keep)
        return state, state.value

    def set_cpuid(self, state: State, profile: Profile) -> State:
        """Give the guest another CPUID."""
        return replace(state, profile=profile)

    def init(self, state: State) -> State:
        """Clear the register."""
        return replace(state, value=0)

    def set_filter(self, state: State, denied: int) -> State:
        """Deny guest accesses."""
        return replace(state, denied=denied)

    def beside(self, profile: Profile, host: Host) -> Mapping[str, tuple[int, int]]:
        """Say nothing of the registers beside it."""
        return {}


# --- rules ---------------------------------------------------------------------------------------------------------


def _everything(profile: Profile, host: Host) -> int:
    return ALL_BITS


def _nothing(profile: Profile, host: Host) -> None:
    return None


def _always_emulate(profile: Profile, host: Host) -> int | None:
    if not profile.mask & _KVM_GATE:
        return None
    return enumerated(profile.mask) & enumerated(host.caps | host.features)


def _always_emulate_host(profile: Profile, host: Host) -> int:
    return enumerated(profile.mask) & enumerated(host.caps | host.features)


XEN_GATE = _IBRS  # each of these gives a guest of Xen the register


@functools.lru_cache(maxsize=1024)
def xen_bits(profile: Profile) -> int | None:
    """Return the bits that Xen lets a guest with this CPUID write; None if the register is not there for it."""
    if not profile.mask & XEN_GATE:
        return None
    mask = IBRS | STIBP
    for features, bits in ((_SSBD, SSBD), (_PSFD, 1 << 7), (_IPRED, 0x18), (_RRSBA, 0x60), (_BHI, 1 << 10)):
        mask |= bits if profile.mask & features else 0
    return mask


def _xen(profile: Profile, host: Host) -> int | None:
    return xen_bits(profile)


def _oracle_says(profile: Profile) -> int:
    """Return the bits that kvm-unit-tests wants to succeed."""
    mask = IBRS if profile.mask & _IBRS else 0
    mask |= STIBP if profile.mask & _STIBP else 0
    return mask | (SSBD if profile.mask & _SSBD else 0)


def _oracle(profile: Profile, host: Host) -> int | None:
    return _oracle_says(profile) or None


def _oracle_unsaid(profile: Profile, host: Host) -> int:
    said = _oracle_says(profile)
    return ALL_BITS & ~said if said else 0


def _exists_sdm(profile: Profile, host: Host) -> int | None:
    return 0 if enumerated(profile.mask) else None


def _exists_kvm(profile: Profile, host: Host) -> int | None:
    return 0 if profile.mask & _KVM_GATE else None


def _all_unsaid(profile: Profile, host: Host) -> int:
    return ALL_BITS


_THREAD = "f3c243b06b5acfea9ed4e4242d8287c7169ef1be.camel@redhat.com (2020-07-07)"
XEN = "xen c447b7308b13 (2026-08-20) xen/arch/x86/msr.c, guest_wrmsr(), msr_spec_ctrl_valid_bits()"
_VBOX = "VirtualBox src/VBox/VMM/VMMR3/CPUMAllMsrs.cpp, cpumMsrWr_Ia32SpecControl()"
_BHYVE = "FreeBSD usr.sbin/bhyve/amd64/xmsr.c; x86.strictmsr (bhyve_config(5))"
_KUT = "kvm-unit-tests 1da1819e x86/msr.c, test_mitigation_msrs() (since 70445405, June 2025)"
_QEMU = "QEMU target/i386/tcg/sysemu/misc_helper.c, helper_wrmsr(): no case for 0x48"

MACHINES: tuple[PeerMachine | PassThrough, ...] = (
    PassThrough("pass-through", "policy: let the guest through at once, if its CPUID has the register", _THREAD),
    PeerMachine(
        "always-emulate",
        "policy: intercept every write, and check every bit against guest and host",
        _THREAD,
        _always_emulate,
        _always_emulate_host,
        family="policy",
    ),
    PeerMachine("xen", "Xen's rule where it sees the write (PV, emulation, migration)", XEN, _xen, _xen),
    PeerMachine(
        "virtualbox",
        "VirtualBox: IBRS and STIBP, stored only",
        _VBOX,
        lambda profile, host: IBRS | STIBP,
        lambda profile, host: IBRS | STIBP,
    ),
    PeerMachine("bhyve-strict", "bhyve: no such register", _BHYVE, _nothing, _nothing, others=0),
    PeerMachine("bhyve", "bhyve -w: ignored, reads 0", _BHYVE, _everything, _everything, stores=False, others=ALL_BITS),
    PeerMachine(
        "bochs-2.7",
        "Bochs 2.7 and 2.8: IBRS, STIBP, SSBD if the CPU model has them",
        "Bochs 2.7 cpu/msr.cc, BX_CPU_C::wrmsr(), BX_ISA_SCA_MITIGATIONS",
        lambda profile, host: 0x7 if enumerated(profile.mask) else None,
        lambda profile, host: 0x7 if enumerated(profile.mask) else None,
    ),
    PeerMachine(
        "bochs-3.0",
        "Bochs 3.0: every defined bit of Intel's, whatever CPUID says",
        "Bochs 36b9cd93c (October 2024) cpu/msr.cc, isValidMSR_IA32_SPEC_CTRL()",
        lambda profile, host: 0x5FF,
        lambda profile, host: 0x5FF,
    ),
    PeerMachine(
        "qemu-tcg", "QEMU TCG: ignored, reads 0", _QEMU, _everything, _everything, stores=False, others=ALL_BITS
    ),
    PeerMachine(
        "kvm-unit-tests",
        "the oracle of kvm-unit-tests: enumerated bits of the first three succeed; with none of them, all take #GP",
        _KUT,
        _oracle,
        _everything,
        unsaid=_oracle_unsaid,
        unsaid_by_host=ALL_BITS,
        family="oracle",
    ),
    PeerMachine(
        "exists-sdm",
        "the manual on whether the register is there: any field's CPUID bit is enough; nothing more is said",
        "Intel SDM vol. 4 Table 2-2, register 48H, comment; AMD APM vol. 2 sec. 3.2.9",
        _exists_sdm,
        _everything,
        unsaid=_all_unsaid,
        unsaid_by_host=ALL_BITS,
        family="oracle",
    ),
    PeerMachine(
        "exists-kvm",
        "KVM on whether the register is there (v5.11 to v6.13): four CPUID bits; nothing more is said",
        'Linux commit 39485ed95d6b ("KVM: x86: reinstate vendor-agnostic check on SPEC_CTRL cpuid bits") (in v5.11)',
        _exists_kvm,
        _everything,
        unsaid=_all_unsaid,
        unsaid_by_host=ALL_BITS,
        family="oracle",
    ),
)
