# SPDX-License-Identifier: MIT
"""KVM's eras as state machines, for kvm_intel (VMX) and kvm_amd (SVM) where they differ.

What an era differs in is said in four parts: the gate (may this guest touch the register), the value test, when
interception ends and begins again, and what of an accepted value reaches the hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from probe import features as f
from probe.masks import ALL_BITS
from probe.models.machine import DENY_READ, DENY_WRITE, Host, State
from probe.models.profile import Profile, mask_of_features
from probe.registers import IBRS, SSBD, STIBP

_LOW_HALF = (1 << 32) - 1

_SPEC_CTRL = mask_of_features((f.SPEC_CTRL,))
_INTEL_STIBP = mask_of_features((f.INTEL_STIBP,))
_INTEL_SSBD = mask_of_features((f.SPEC_CTRL_SSBD,))
_AMD_IBRS = mask_of_features((f.AMD_IBRS,))
_AMD_STIBP = mask_of_features((f.AMD_STIBP,))
_AMD_SSBD = mask_of_features((f.AMD_SSBD,))
_V_SPEC_CTRL = mask_of_features((f.V_SPEC_CTRL,))
_ANY_56 = _SPEC_CTRL | _AMD_STIBP | _AMD_IBRS | _AMD_SSBD

Gate = Callable[[int, int], bool]  # (guest's features, host's caps)
ValueTest = Callable[[Profile, Host], "int | None"]  # the mask of bits that pass; None: even 0 is refused


# --- gates ---------------------------------------------------------------------------------------------------------


def _gate_vmx_416(guest: int, caps: int) -> bool:
    return guest & (_SPEC_CTRL | _AMD_IBRS) != 0


def _gate_vmx_417(guest: int, caps: int) -> bool:
    return guest & _SPEC_CTRL != 0


def _gate_svm_416(guest: int, caps: int) -> bool:
    return guest & _AMD_IBRS != 0


def _gate_svm_418(guest: int, caps: int) -> bool:
    return guest & (_AMD_IBRS | _AMD_SSBD) != 0


def _gate_56(guest: int, caps: int) -> bool:
    return guest & _ANY_56 != 0


def _gate_614(guest: int, caps: int) -> bool:
    return guest & caps & _ANY_56 != 0


# --- value tests ---------------------------------------------------------------------------------------------------


def _fixed(mask: int) -> ValueTest:
    return lambda profile, host: mask


def _granted_56(features: int) -> int:
    mask = IBRS | STIBP if features & (_SPEC_CTRL | _AMD_IBRS) else 0
    return mask | (SSBD if features & (_INTEL_SSBD | _AMD_SSBD) else 0)


def _mask_56(profile: Profile, host: Host) -> int:
    return _granted_56(host.features) & _granted_56(profile.mask)


def _granted_maxim(features: int) -> int:
    mask = IBRS if features & _SPEC_CTRL else 0
    mask |= STIBP if features & _INTEL_STIBP else 0
    mask |= SSBD if features & _INTEL_SSBD else 0
    mask |= IBRS | STIBP if features & (_AMD_IBRS | _AMD_STIBP) else 0
    return mask | (IBRS | STIBP | SSBD if features & _AMD_SSBD else 0)


def _mask_maxim(profile: Profile, host: Host) -> int:
    return _granted_maxim(host.features) & _granted_maxim(profile.mask)


def _asks_hardware(profile: Profile, host: Host) -> int | None:
    return host.hardware.tested if host.hardware.exists else None


# --- the machine ---------------------------------------------------------------------------------------------------

RECOMPUTE_SHADOW = (
    "shadow"  # <= v6.16: a filter change applies what accepted writes have decided; nothing else undoes it
)
# v6.17+: creation, KVM_SET_CPUID2 and filter changes ask for a new decision, which the next entry takes from the value
# that is stored then (KVM_REQ_RECALC_INTERCEPTS). Measured on Debian's 7.2.13: a host write of 1 and then of 0 before
# the first entry lets nobody through.
RECOMPUTE_VALUE = "value"


@dataclass(frozen=True)
class KvmMachine:
    """One era of KVM on one vendor's extension.

    loads: the bits of a stored value that VM entry loads. virtual: how hosts with V_SPEC_CTRL are treated: "" not at
    all, "always" let through from creation, "gate" let through iff the gate is open. init_intercepts: INIT intercepts
    again. Source: source; the predicates are in gate and test.
    """

    name: str
    title: str
    source: str
    family: str
    gate: Gate
    test: ValueTest
    recompute: str = RECOMPUTE_SHADOW
    loads: int = _LOW_HALF
    virtual: str = ""
    init_intercepts: bool = False

    def _is_virtual(self, host: Host) -> bool:
        return bool(self.virtual) and host.features & _V_SPEC_CTRL != 0

    def _open(self, state: State) -> bool:
        return self.gate(state.profile.mask, state.host.caps)

    def start(self, profile: Profile, host: Host) -> State:
        """Return a fresh vCPU."""
        state = State(profile, host, register=host.hardware.start, pending=self.recompute == RECOMPUTE_VALUE)
        if self._is_virtual(host):
            return replace(state, register=0, direct=self.virtual == "always" or self._open(state), pending=False)
        return state

    def enter(self, state: State) -> State:
        """Decide anew whether the guest is let through, if asked for; load and save as every entry and exit does.

        An access that takes #GP has entered and exited, too (random programs on Debian's 5.10 showed it).
        """
        if state.pending:
            state = replace(state, direct=state.value != 0, pending=False)
        return self._left(state)

    def _intercepts(self, state: State, denied: int) -> bool:
        direct = state.value != 0 if state.pending else state.direct
        return not direct or state.denied & denied != 0

    def writable(self, state: State, *, by_host: bool) -> int | None:
        """Return the mask of the bits that a write may have; None if every write is refused, of 0 too."""
        if not by_host:
            if state.denied & DENY_WRITE:
                return None
            if not self._intercepts(state, DENY_WRITE):
                return state.host.hardware.valid if state.host.hardware.exists else None
            if not self._open(state):
                return None
        return self.test(state.profile, state.host)

    def readable(self, state: State, *, by_host: bool) -> bool:
        """Tell whether a read succeeds."""
        if by_host:
            return True
        if state.denied & DENY_READ:
            return False
        if not self._intercepts(state, DENY_READ):
            return state.host.hardware.exists
        return self._open(state)

    def open_bits(self, state: State, *, by_host: bool) -> int:
        """Say of every bit what happens."""
        return 0

    def write(self, state: State, value: int, *, by_host: bool) -> State:
        """Store the value; if it is not zero, the guest is let through from now on, whoever wrote it."""
        if by_host:
            return replace(state, value=value, direct=state.direct or value != 0)
        if self._intercepts(state, DENY_WRITE):
            return self._left(replace(state, value=value, direct=state.direct or value != 0))
        entered = self._entered(state)
        return self._exited(replace(entered, register=value & state.host.hardware.keep))

    def read(self, state: State, *, by_host: bool) -> tuple[State, int | None]:
        """Read the stored value, or the hardware where the guest is let through."""
        if by_host:
            return state, state.value
        if self._intercepts(state, DENY_READ):
            return self._left(state), state.value
        entered = self._entered(state)
        return self._exited(entered), entered.register

    def _entered(self, state: State) -> State:
        """VM entry: load the stored value."""
        if self._is_virtual(state.host):
            return replace(state, register=state.value & state.host.hardware.keep)
        if not state.host.switched:
            return state
        return replace(state, register=state.value & self.loads & state.host.hardware.keep)

    def _exited(self, state: State) -> State:
        """VM exit: save what the guest may have written."""
        saves = self._is_virtual(state.host) or state.host.switched
        if saves and not self._intercepts(state, DENY_WRITE):
            return replace(state, value=state.register)
        return state

    def _left(self, state: State) -> State:
        """Go once more into the guest and out of it, as happens after every intercepted access."""
        return self._exited(self._entered(state))

    def set_cpuid(self, state: State, profile: Profile) -> State:
        """Give the guest another CPUID; from v6.17 on, interception is decided anew."""
        return self._recomputed(replace(state, profile=profile))

    def set_filter(self, state: State, denied: int) -> State:
        """Change the MSR filter."""
        return self._recomputed(replace(state, denied=denied))

    def init(self, state: State) -> State:
        """Clear the stored value, as the vCPU enters; whether that intercepts again depends on the era."""
        state = replace(self.enter(state), value=0)
        if self._is_virtual(state.host):
            return self._recomputed(state)
        return replace(state, direct=state.direct and not self.init_intercepts)

    def _recomputed(self, state: State) -> State:
        if self._is_virtual(state.host):
            return replace(state, direct=self.virtual == "always" or self._open(state))
        return replace(state, pending=self.recompute == RECOMPUTE_VALUE)


_C416V = 'Linux commit d28b387fb74d ("KVM/VMX: Allow direct access to MSR_IA32_SPEC_CTRL") (in v4.16)'
_C416S = 'Linux commit b2ac58f90540 ("KVM/SVM: Allow direct access to MSR_IA32_SPEC_CTRL") (in v4.16)'
_C417 = 'Linux commit e7c587da1252 ("x86/speculation: Use synthetic bits for IBRS/IBPB/STIBP") (in v4.17)'
_C417V = 'Linux commit da39556f66f5 ("x86/KVM/VMX: Expose SPEC_CTRL Bit(2) to the guest") (in v4.17)'
_C418S = 'Linux commit 6ac2f49edb1e ("x86/bugs: Add AMD\'s SPEC_CTRL MSR usage") (in v4.18)'
_C56 = 'Linux commit 6441fa6178f5 ("KVM: x86: avoid incorrect writes to host MSR_IA32_SPEC_CTRL") (in v5.6)'
_C56S = 'Linux commit df7e8818926e ("KVM: SVM: relax conditions for allowing MSR_IA32_SPEC_CTRL accesses") (in v5.6)'
_C59 = (
    'Linux commit 841c2be09fe4 ("kvm: x86: replace kvm_spec_ctrl_test_value with runtime test on the host") (in v5.9)'
)
_C511 = 'Linux commit 39485ed95d6b ("KVM: x86: reinstate vendor-agnostic check on SPEC_CTRL cpuid bits") (in v5.11)'
_C513 = 'Linux commit d00b99c514b3 ("KVM: SVM: Add support for Virtual SPEC_CTRL") (in v5.13)'
_C519 = 'Linux commit acac5e98ef8d ("x86/speculation: Remove x86_spec_ctrl_mask") (in v5.19)'
_C614 = (
    'Linux commit 8f2a27752e80 ("KVM: x86: Replace (almost) all guest CPUID feature queries with cpu_caps") (in v6.14)'
)
_C617 = (
    'Linux commit 674ffc650351 ("KVM: SVM: Disable interception of SPEC_CTRL iff the MSR exists for the guest") '
    "(in v6.17)"
)
_C617R = "the MSR interception rework of v6.17, 20250610225737.156318-1-seanjc@google.com"
_C618 = "Linux commit 32ed0bc2f0f8 (VMX) and 20251106011330.75571-1-seanjc@google.com (SVM): bits 63:32 (in v6.19)"
_MAXIM = (
    'Maxim Levitsky, "[PATCH] kvm: x86: rewrite kvm_spec_ctrl_valid_bits" (2020-07-02), '
    "20200702174455.282252-1-mlevitsk@redhat.com; never merged"
)
_MASKED = IBRS | STIBP | SSBD  # before v5.19 VM entry loads these at most (bugs.c, x86_virt_spec_ctrl())


def _m(name: str, title: str, gate: Gate, test: ValueTest, *sources: str, **more: object) -> KvmMachine:
    family = "kvm-vmx" if name.endswith("vmx") else "kvm-svm" if name.endswith("svm") else "kvm"
    return KvmMachine(name, title, "; ".join(sources), family, gate, test, **more)  # type: ignore[arg-type]


MACHINES: tuple[KvmMachine, ...] = (
    _m("kvm-4.16-vmx", "v4.16, kvm_intel: mask 0x3", _gate_vmx_416, _fixed(0x3), _C416V, loads=_MASKED),
    _m("kvm-4.16-svm", "v4.16, kvm_amd: mask 0x3", _gate_svm_416, _fixed(0x3), _C416S, loads=_MASKED),
    _m("kvm-4.17-vmx", "v4.17 to v5.5, kvm_intel: mask 0x7", _gate_vmx_417, _fixed(0x7), _C417, _C417V, loads=_MASKED),
    _m("kvm-4.18-svm", "v4.18 to v5.5, kvm_amd: mask 0x7", _gate_svm_418, _fixed(0x7), _C418S, loads=_MASKED),
    _m(
        "kvm-5.6-vmx",
        "v5.6 to v5.8, kvm_intel: mask from host and guest CPUID",
        _gate_vmx_417,
        _mask_56,
        _C56,
        loads=_MASKED,
    ),
    _m(
        "kvm-5.6-svm",
        "v5.6 to v5.8, kvm_amd: mask from host and guest CPUID",
        _gate_56,
        _mask_56,
        _C56,
        _C56S,
        loads=_MASKED,
    ),
    _m(
        "kvm-maxim-v1-vmx",
        "the mask proposed in July 2020, kvm_intel",
        _gate_vmx_417,
        _mask_maxim,
        _MAXIM,
        loads=_MASKED,
    ),
    _m("kvm-maxim-v1-svm", "the mask proposed in July 2020, kvm_amd", _gate_56, _mask_maxim, _MAXIM, loads=_MASKED),
    _m(
        "kvm-5.9-vmx",
        "v5.9 and v5.10 to v5.10.3, kvm_intel: the hardware is asked",
        _gate_vmx_417,
        _asks_hardware,
        _C59,
        loads=_MASKED,
    ),
    _m(
        "kvm-5.11",
        "v5.9 (kvm_amd) or v5.11 (kvm_intel; v5.10.4) to v5.18: one gate for both",
        _gate_56,
        _asks_hardware,
        _C59,
        _C511,
        loads=_MASKED,
    ),
    _m(
        "kvm-5.13-svm",
        "v5.13 to v5.18, kvm_amd: V_SPEC_CTRL let through from creation",
        _gate_56,
        _asks_hardware,
        _C513,
        loads=_MASKED,
        virtual="always",
    ),
    _m(
        "kvm-5.19",
        "v5.19 to v6.13: VM entry loads all of the low half",
        _gate_56,
        _asks_hardware,
        _C519,
        _C513,
        virtual="always",
    ),
    _m(
        "kvm-6.14",
        "v6.14 to v6.16: the gate also asks what KVM supports",
        _gate_614,
        _asks_hardware,
        _C614,
        virtual="always",
    ),
    _m(
        "kvm-6.17",
        "v6.17 and v6.18, kvm_intel: interception recomputed from the value",
        _gate_614,
        _asks_hardware,
        _C617,
        _C617R,
        recompute=RECOMPUTE_VALUE,
        virtual="gate",
    ),
    _m(
        "kvm-6.17-svm",
        "v6.17 and v6.18, kvm_amd: the same, and at INIT",
        _gate_614,
        _asks_hardware,
        _C617,
        _C617R,
        recompute=RECOMPUTE_VALUE,
        virtual="gate",
        init_intercepts=True,
    ),
    _m(
        "kvm-6.19",
        "v6.19 and later, kvm_intel: bits 63:32 are loaded, too",
        _gate_614,
        _asks_hardware,
        _C618,
        recompute=RECOMPUTE_VALUE,
        virtual="gate",
        loads=ALL_BITS,
    ),
    _m(
        "kvm-6.19-svm",
        "v6.19 and later, kvm_amd: the same, and at INIT",
        _gate_614,
        _asks_hardware,
        _C618,
        recompute=RECOMPUTE_VALUE,
        virtual="gate",
        loads=ALL_BITS,
        init_intercepts=True,
    ),
)
