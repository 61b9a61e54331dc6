# SPDX-License-Identifier: MIT
"""KVM's eras as state machines, for kvm_intel (VMX) and kvm_amd (SVM) where they differ.

What an era differs in is said in four parts: the gate (may this guest touch the register), the value test, when
interception ends and begins again, and what of an accepted value reaches the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from probe import features as f
from probe.masks import ALL_BITS
from probe.models.machine import DENY_READ, DENY_WRITE, Host, State
from probe.models.profile import Profile, mask_of_features
from probe.models.versions import NEVER, Versions
from probe.registers import IBRS, SSBD, STIBP

_LOW_HALF = (1 << 32) - 1
_IBPB, _SBPB = 1 << 0, 1 << 7  # of IA32_PRED_CMD

_SPEC_CTRL = mask_of_features((f.SPEC_CTRL,))
_INTEL_STIBP = mask_of_features((f.INTEL_STIBP,))
_INTEL_SSBD = mask_of_features((f.SPEC_CTRL_SSBD,))
_AMD_IBRS = mask_of_features((f.AMD_IBRS,))
_AMD_STIBP = mask_of_features((f.AMD_STIBP,))
_AMD_SSBD = mask_of_features((f.AMD_SSBD,))
_V_SPEC_CTRL = mask_of_features((f.V_SPEC_CTRL,))
_AMD_IBPB = mask_of_features((f.AMD_IBPB,))
_VIRT_SSBD = mask_of_features((f.VIRT_SSBD,))
_ANY_56 = _SPEC_CTRL | _AMD_STIBP | _AMD_IBRS | _AMD_SSBD

# v4.17 to v5.18: VM entry loads IBRS, and STIBP and SSBD where the host has them; the others stay as the host's own
# are, which is taken as 0 here (bugs.c, x86_spec_ctrl_mask and x86_virt_spec_ctrl()).
_MASKED = -1

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

    loads and saves: the bits of a stored value that VM entry loads, and that VM exit stores anew (the others keep what
    was stored). virtual: how hosts with V_SPEC_CTRL are treated: "" not at all, "always" let through from creation,
    "gate" let through iff the gate is open. vmcb: the bits that there is room for where V_SPEC_CTRL keeps the value.
    init_intercepts: INIT intercepts again. pred_cmd: what is done about IA32_PRED_CMD: "" is not said, "first" let
    through after the first write, "cpuid" let through by CPUID. versions: the kernels that it stands for.
    Source: source; the predicates are in gate and test.
    """

    name: str
    title: str
    source: str
    family: str
    gate: Gate
    test: ValueTest
    recompute: str = RECOMPUTE_SHADOW
    loads: int = ALL_BITS
    saves: int = ALL_BITS
    virtual: str = ""
    init_intercepts: bool = False
    vmcb: int = ALL_BITS
    pred_cmd: str = ""
    versions: Versions = NEVER

    def _is_virtual(self, host: Host) -> bool:
        return bool(self.virtual) and host.features & _V_SPEC_CTRL != 0

    def _open(self, state: State) -> bool:
        return self.gate(state.profile.mask, state.host.caps)

    def start(self, profile: Profile, host: Host) -> State:
        """Return a fresh vCPU."""
        again = self.recompute == RECOMPUTE_VALUE
        always = self._is_virtual(host) and self.virtual == "always"
        return State(profile, host, register=host.hardware.start, pending=again, direct=always)

    def enter(self, state: State) -> State:
        """Decide anew whether the guest is let through, if asked for; load and save as every entry and exit does.

        An access that takes #GP has entered and exited, too (random programs on Debian's 5.10 showed it).
        """
        if state.pending:
            state = replace(state, direct=self._direct(state), pending=False)
        return self._left(state)

    def _direct(self, state: State) -> bool:
        """Tell whether the next entry lets the guest through."""
        if not state.pending:
            return state.direct
        return self._open(state) if self._is_virtual(state.host) else state.value != 0

    def _intercepts(self, state: State, denied: int) -> bool:
        return not self._direct(state) or state.denied & denied != 0

    def _stored(self, state: State, value: int) -> State:
        room = self.vmcb if self._is_virtual(state.host) else ALL_BITS
        return replace(state, value=value & room, direct=state.direct or value != 0)

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
            return self._stored(state, value)
        if self._intercepts(state, DENY_WRITE):
            return self._left(self._stored(state, value))
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
        if not state.host.loaded:
            return state
        register = state.value & self._loads(state.host) & state.host.hardware.keep
        return state if register == state.register else replace(state, register=register)

    def _loads(self, host: Host) -> int:
        if self._is_virtual(host):
            return ALL_BITS
        if self.loads != _MASKED:
            return self.loads
        mask = IBRS | (STIBP if host.features & (_INTEL_STIBP | _AMD_STIBP) else 0)
        return mask | (SSBD if host.features & (_INTEL_SSBD | _AMD_SSBD) else 0)

    def _exited(self, state: State) -> State:
        """VM exit: save what the guest may have written."""
        if not state.host.switched or self._intercepts(state, DENY_WRITE):
            return state
        saves = ALL_BITS if self._is_virtual(state.host) else self.saves
        value = state.value & ~saves | state.register & saves
        return state if value == state.value else replace(state, value=value)

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
        """Clear the stored value, as the vCPU enters; whether that intercepts again depends on the era.

        What a host with V_SPEC_CTRL has in the VMCB stays: svm_vcpu_reset() clears svm->spec_ctrl, which is not used
        there (linux v6.1 to v7.2 arch/x86/kvm/svm/svm.c). What INIT asks to be decided anew is decided in the entry
        that takes it (random programs on Debian's 7.2.13 showed it).
        """
        state = self.enter(state)
        if self._is_virtual(state.host):
            return self.enter(self._recomputed(state))
        return replace(state, value=0, direct=state.direct and not self.init_intercepts)

    def beside(self, profile: Profile, host: Host) -> Mapping[str, tuple[int, int]]:
        """Say what single writes of the registers beside it do: cell -> (mask of bits accepted, mask of bits decided).

        IA32_PRED_CMD is decided from v5.9 on, its SBPB (bit 7) until v6.3 only: no profile has that CPUID bit.
        """
        return {**self._pred_cmd(profile, host), **self._virt_spec_ctrl(profile, host)}

    def _pred_cmd(self, profile: Profile, host: Host) -> Mapping[str, tuple[int, int]]:
        if not self.pred_cmd:
            return {}
        by_cpuid = self.pred_cmd == "cpuid"
        known = ALL_BITS & ~_SBPB if by_cpuid else ALL_BITS
        by_host = _IBPB if host.features & (_SPEC_CTRL | _AMD_IBPB) else 0
        granted = profile.mask & (host.caps if self.gate is _gate_614 else ALL_BITS) & (_SPEC_CTRL | _AMD_IBPB)
        by_guest = by_host if granted else 0
        if by_guest and by_cpuid:
            by_guest = host.hardware.pred_cmd
        return {"pred_cmd_host": (by_host, known), "pred_cmd_guest": (by_guest, known)}

    def _virt_spec_ctrl(self, profile: Profile, host: Host) -> Mapping[str, tuple[int, int]]:
        if self.family == "kvm-vmx":  # an MSR that it does not know
            known = 0 if host.ignore_msrs else ALL_BITS
            return {"virt_spec_ctrl_host": (0, known), "virt_spec_ctrl_guest": (0, known)}
        if self.name == "kvm-4.16-svm":  # came with v4.17
            return {}
        granted = profile.mask & (host.caps if self.gate is _gate_614 else ALL_BITS)
        return {
            "virt_spec_ctrl_host": (SSBD, ALL_BITS),
            "virt_spec_ctrl_guest": (SSBD if granted & _VIRT_SSBD else 0, ALL_BITS),
        }

    def _recomputed(self, state: State) -> State:
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
_C61S = (
    'Linux commit 9f2febf3f04d ("KVM: SVM: move MSR_IA32_SPEC_CTRL save/restore to assembly") (in v6.1); '
    "arch/x86/kvm/svm/vmenter.S, RESTORE_GUEST_SPEC_CTRL_BODY, RESTORE_HOST_SPEC_CTRL_BODY (v6.1.192, v6.12.118)"
)
_C519V = (
    'Linux commit 07853adc29a0 ("KVM: VMX: Prevent RSB underflow before vmenter") (in v5.19); '
    "arch/x86/kvm/vmx/vmenter.S, __vmx_vcpu_run(), vmx_spec_ctrl_restore_host() (v6.1.192, v6.12.118)"
)
_C64 = (
    "IA32_PRED_CMD moved to arch/x86/kvm/x86.c, kvm_set_msr_common(), and let through by vcpu_after_set_cpuid() "
    "(not in v6.1.192, in v6.12.118; v6.4 by memory of its pull request)"
)
_C66 = (
    '"KVM: SVM: correct the size of spec_ctrl field in VMCB save area", 20230717041903.85480-1-manali.shukla@amd.com '
    "(2023-07-17; not in v6.1.192, in v6.12.118)"
)
_STABLE = "arch/x86/kernel/cpu/bugs.c, x86_virt_spec_ctrl(); svm_vcpu_run() (v5.10.262)"
_C618 = "Linux commit 32ed0bc2f0f8 (VMX) and 20251106011330.75571-1-seanjc@google.com (SVM): bits 63:32 (in v6.19)"
_MAXIM = (
    'Maxim Levitsky, "[PATCH] kvm: x86: rewrite kvm_spec_ctrl_valid_bits" (2020-07-02), '
    "20200702174455.282252-1-mlevitsk@redhat.com; never merged"
)


def _m(
    name: str,
    title: str,
    gate: Gate,
    test: ValueTest,
    sources: tuple[str, ...],
    versions: Versions = NEVER,
    **more: object,
) -> KvmMachine:
    family = "kvm-vmx" if name.endswith("vmx") else "kvm-svm"
    return KvmMachine(name, title, "; ".join(sources), family, gate, test, versions=versions, **more)  # type: ignore[arg-type]


_ASKS = {"pred_cmd": "first"}
_UNMASKED = {"pred_cmd": "first", "loads": ALL_BITS, "saves": ALL_BITS}
_ASM_VMX = {"pred_cmd": "cpuid", "loads": _LOW_HALF, "saves": ALL_BITS}
_ASM_SVM = {"pred_cmd": "cpuid", "loads": _LOW_HALF, "saves": _LOW_HALF}
_WHOLE = {"pred_cmd": "cpuid", "loads": ALL_BITS, "saves": ALL_BITS}
_AGAIN = {"recompute": RECOMPUTE_VALUE, "virtual": "gate"}

MACHINES: tuple[KvmMachine, ...] = (
    # --- kvm_intel
    _m(
        "kvm-4.16-vmx",
        "v4.16, kvm_intel: mask 0x3",
        _gate_vmx_416,
        _fixed(0x3),
        (_C416V,),
        Versions((4, 16), (4, 17)),
    ),
    _m(
        "kvm-4.17-vmx",
        "v4.17 to v5.5, kvm_intel: mask 0x7",
        _gate_vmx_417,
        _fixed(0x7),
        (_C417, _C417V),
        Versions((4, 17), (5, 6)),
        loads=_MASKED,
    ),
    _m(
        "kvm-5.6-vmx",
        "v5.6 to v5.8, kvm_intel: mask from host and guest CPUID",
        _gate_vmx_417,
        _mask_56,
        (_C56,),
        Versions((5, 6), (5, 9)),
        loads=_MASKED,
    ),
    _m(
        "kvm-maxim-v1-vmx",
        "the mask proposed in July 2020, kvm_intel",
        _gate_vmx_417,
        _mask_maxim,
        (_MAXIM,),
        loads=_MASKED,
    ),
    _m(
        "kvm-5.9-vmx",
        "v5.9 to v5.10.3, kvm_intel: the hardware is asked",
        _gate_vmx_417,
        _asks_hardware,
        (_C59,),
        Versions((5, 9), (5, 11)),
        loads=_MASKED,
        **_ASKS,
    ),
    _m(
        "kvm-5.11-vmx",
        "v5.10.4, v5.11 to v5.18, kvm_intel: one gate for both vendors",
        _gate_56,
        _asks_hardware,
        (_C59, _C511),
        Versions((5, 11), (5, 19), ((5, 10, 4),)),
        loads=_MASKED,
        **_ASKS,
    ),
    _m(
        "kvm-5.10.133-vmx",
        "v5.10.133 and v5.15.57 and later of these, kvm_intel: VM entry loads what is stored",
        _gate_56,
        _asks_hardware,
        (_C519, _C59, _C511, _STABLE),
        Versions(branches=((5, 10, 133), (5, 15, 57))),
        **_UNMASKED,
    ),
    _m(
        "kvm-5.19-vmx",
        "v5.18.14, v5.19 to v6.3, kvm_intel: VM entry loads the low half, exit saves all",
        _gate_56,
        _asks_hardware,
        (_C519V, _C519, _C59, _C511),
        Versions((5, 19), (6, 4), ((5, 18, 14),)),
        pred_cmd="first",
        loads=_LOW_HALF,
    ),
    _m(
        "kvm-6.4-vmx",
        "v6.4 to v6.13, kvm_intel: the same; IA32_PRED_CMD let through by CPUID",
        _gate_56,
        _asks_hardware,
        (_C64, _C519V, _C59, _C511),
        Versions((6, 4), (6, 14)),
        **_ASM_VMX,
    ),
    _m(
        "kvm-6.14-vmx",
        "v6.14 to v6.16, kvm_intel: the gate also asks what KVM supports",
        _gate_614,
        _asks_hardware,
        (_C614,),
        Versions((6, 14), (6, 17)),
        **_ASM_VMX,
    ),
    _m(
        "kvm-6.17-vmx",
        "v6.17 and v6.18, kvm_intel: interception decided anew from the value",
        _gate_614,
        _asks_hardware,
        (_C617R, _C614),
        Versions((6, 17), (6, 19)),
        **_ASM_VMX,
        **_AGAIN,
    ),
    _m(
        "kvm-6.19-vmx",
        "v6.19 and later, kvm_intel: bits 63:32 are loaded, too",
        _gate_614,
        _asks_hardware,
        (_C618, _C617R, _C614),
        Versions((6, 19)),
        **_WHOLE,
        **_AGAIN,
    ),
    # --- kvm_amd
    _m(
        "kvm-4.16-svm",
        "v4.16, kvm_amd: mask 0x3",
        _gate_svm_416,
        _fixed(0x3),
        (_C416S,),
        Versions((4, 16), (4, 17)),
    ),
    _m(
        "kvm-4.17-svm",
        "v4.17, kvm_amd: the same; VM entry loads IBRS and what the host has of the others",
        _gate_svm_416,
        _fixed(0x3),
        (_C416S, _C417),
        Versions((4, 17), (4, 18)),
        loads=_MASKED,
    ),
    _m(
        "kvm-4.18-svm",
        "v4.18 to v5.5, kvm_amd: mask 0x7",
        _gate_svm_418,
        _fixed(0x7),
        (_C418S,),
        Versions((4, 18), (5, 6)),
        loads=_MASKED,
    ),
    _m(
        "kvm-5.6-svm",
        "v5.6 to v5.8, kvm_amd: mask from host and guest CPUID",
        _gate_56,
        _mask_56,
        (_C56, _C56S),
        Versions((5, 6), (5, 9)),
        loads=_MASKED,
    ),
    _m(
        "kvm-maxim-v1-svm",
        "the mask proposed in July 2020, kvm_amd",
        _gate_56,
        _mask_maxim,
        (_MAXIM,),
        loads=_MASKED,
    ),
    _m(
        "kvm-5.9-svm",
        "v5.9 to v5.12, kvm_amd: the hardware is asked",
        _gate_56,
        _asks_hardware,
        (_C59, _C56S),
        Versions((5, 9), (5, 13)),
        loads=_MASKED,
        **_ASKS,
    ),
    _m(
        "kvm-5.10.133-svm",
        "v5.10.133 and later v5.10, kvm_amd: VM entry loads what is stored",
        _gate_56,
        _asks_hardware,
        (_C519, _C59, _C511, _STABLE),
        Versions(branches=((5, 10, 133),)),
        **_UNMASKED,
    ),
    _m(
        "kvm-5.13-svm",
        "v5.13 to v5.18, kvm_amd: V_SPEC_CTRL let through from creation",
        _gate_56,
        _asks_hardware,
        (_C513, _C59, _C511),
        Versions((5, 13), (5, 19)),
        loads=_MASKED,
        virtual="always",
        vmcb=_LOW_HALF,
        **_ASKS,
    ),
    _m(
        "kvm-5.19-svm",
        "v5.15.57, v5.19, v6.0, kvm_amd: VM entry loads what is stored",
        _gate_56,
        _asks_hardware,
        (_C519, _C513),
        Versions((5, 19), (6, 1), ((5, 15, 57), (5, 18, 14))),
        virtual="always",
        vmcb=_LOW_HALF,
        **_UNMASKED,
    ),
    _m(
        "kvm-6.1-svm",
        "v6.1 to v6.3, kvm_amd: VM entry loads, and exit saves, the low half",
        _gate_56,
        _asks_hardware,
        (_C61S, _C513),
        Versions((6, 1), (6, 4)),
        virtual="always",
        vmcb=_LOW_HALF,
        pred_cmd="first",
        loads=_LOW_HALF,
        saves=_LOW_HALF,
    ),
    _m(
        "kvm-6.4-svm",
        "v6.4 and v6.5, kvm_amd: the same; IA32_PRED_CMD let through by CPUID",
        _gate_56,
        _asks_hardware,
        (_C61S, _C64, _C513),
        Versions((6, 4), (6, 6)),
        virtual="always",
        vmcb=_LOW_HALF,
        **_ASM_SVM,
    ),
    _m(
        "kvm-6.6-svm",
        "v6.6 to v6.13, kvm_amd: the same; 64 bits of room in the VMCB",
        _gate_56,
        _asks_hardware,
        (_C66, _C61S, _C64, _C513),
        Versions((6, 6), (6, 14)),
        virtual="always",
        **_ASM_SVM,
    ),
    _m(
        "kvm-6.14-svm",
        "v6.14 to v6.16, kvm_amd: the gate also asks what KVM supports",
        _gate_614,
        _asks_hardware,
        (_C614, _C61S),
        Versions((6, 14), (6, 17)),
        virtual="always",
        **_ASM_SVM,
    ),
    _m(
        "kvm-6.17-svm",
        "v6.17 and v6.18, kvm_amd: interception decided anew from the value, and at INIT",
        _gate_614,
        _asks_hardware,
        (_C617, _C617R, _C61S),
        Versions((6, 17), (6, 19)),
        init_intercepts=True,
        **_ASM_SVM,
        **_AGAIN,
    ),
    _m(
        "kvm-6.19-svm",
        "v6.19 and later, kvm_amd: bits 63:32 are loaded and saved, too",
        _gate_614,
        _asks_hardware,
        (_C618, _C617, _C617R),
        Versions((6, 19)),
        init_intercepts=True,
        **_WHOLE,
        **_AGAIN,
    ),
)
