# SPDX-License-Identifier: MIT
"""The catalogue of state machines, by name."""

from __future__ import annotations

from probe.errors import UsageError
from probe.models import kvm_machines, peer_machines
from probe.models.machine import Machine
from probe.models.versions import Release

MACHINES: tuple[Machine, ...] = (*kvm_machines.MACHINES, *peer_machines.MACHINES)


def get(name: str) -> Machine:
    """Return the machine of this name; raise UsageError, which lists the names, if there is none."""
    for machine in MACHINES:
        if machine.name == name:
            return machine
    raise UsageError(f"no state machine is called {name!r}", f"one of: {', '.join(one.name for one in MACHINES)}")


# Vendor modules, each with the family of the models of its eras.
FAMILIES = {"kvm_intel": "kvm-vmx", "kvm_amd": "kvm-svm"}


def standing_model(backend: str, version: Release | None) -> str:
    """Return the model that stands for a kernel's version and vendor module; "" if none does, or neither is known."""
    if version is None:
        return ""
    family = FAMILIES.get(backend, "")
    found = [(one.versions.sublevel(version), one.name) for one in kvm_machines.MACHINES if one.family == family]
    standing = [(low, name) for low, name in found if low is not None]
    return max(standing)[1] if standing else ""
