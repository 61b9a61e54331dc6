# SPDX-License-Identifier: MIT
"""The catalogue of state machines, by name."""

from __future__ import annotations

from probe.errors import UsageError
from probe.models import kvm_machines, peer_machines
from probe.models.machine import Machine

MACHINES: tuple[Machine, ...] = (*kvm_machines.MACHINES, *peer_machines.MACHINES)


def get(name: str) -> Machine:
    """Return the machine of this name; raise UsageError, which lists the names, if there is none."""
    for machine in MACHINES:
        if machine.name == name:
            return machine
    raise UsageError(f"no state machine is called {name!r}", f"one of: {', '.join(one.name for one in MACHINES)}")
