# SPDX-License-Identifier: MIT
"""The host under KVM: its CPUID bits, KVM's modules and parameters."""

from __future__ import annotations

from pathlib import Path

from probe.cpuid.machine import MachineCpuid, read_machine
from probe.models.profile import parse_profile, profile_of

_MODULES = Path("/sys/module")
_BACKENDS = ("kvm_intel", "kvm_amd", "kvm_pvm")
_V_SPEC_CTRL = parse_profile("V_SPEC_CTRL").mask


def _parameter(module: str, name: str) -> str:
    """Return a module parameter's text; "" if there is none to be read."""
    try:
        return (_MODULES / module / "parameters" / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def backend() -> str:
    """Name the vendor modules that are loaded, with "+" between them; "" if none can be seen."""
    return "+".join(name for name in _BACKENDS if (_MODULES / name).exists())


def ignore_msrs() -> str:
    """Return kvm.ignore_msrs, "Y" or "N"; "" if it cannot be read."""
    return _parameter("kvm", "ignore_msrs")


def features(cpuid: MachineCpuid | None = None) -> int:
    """Return the host's FEATURES, as a mask: what the first CPU reports, which is more than a kernel sees that was told
    clearcpuid=, or has blacklisted the microcode.

    And V_SPEC_CTRL where our module spec_ctrl_model has made the kernel believe in it (boot --cpu V_SPEC_CTRL).
    """
    cpus = (cpuid or read_machine((0,))).cpus
    believed = _V_SPEC_CTRL if _parameter("spec_ctrl_model", "v_spec_ctrl") == "Y" else 0
    return profile_of(cpus[min(cpus)]).mask | believed
