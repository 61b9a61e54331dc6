# SPDX-License-Identifier: MIT
"""From inside a guest of unknown hypervisor: which rules fit what its writes did. Pure.

A guest sees neither the host's CPUID, nor the hardware, nor what was written before it came. So a rule that asks the
hardware, or lets guests through, can often not be refuted; what can be is said with the bits that speak against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probe.models.machine import Hardware, Host, Machine
from probe.models.profile import ALL_FEATURES, Profile
from probe.outcome import Observation

Says = Literal["fits", "possible", "refuted"]


@dataclass(frozen=True)
class Inference:
    """What one rule has to do with an observation.

    fits: it says of every bit that was tried what was seen, whatever hardware is beneath. possible: there are hardware
    and a history with which it does. refuted: not so for the bits of against.
    """

    model: str
    says: Says
    against: int = 0


def infer(machine: Machine, guest: Profile, seen: Observation) -> Inference:
    """Hold a rule against the walk of a guest with this CPUID."""
    least = _writable(machine, guest, Hardware(tested=0, valid=0, keep=0))
    most = _writable(machine, guest, Hardware())
    silent = machine.open_bits(machine.start(guest, Host(caps=ALL_FEATURES)), by_host=False)
    against = seen.accepted & ~(most or 0) | seen.fault & (least or 0)
    if _ignores(machine, guest):
        against |= seen.retained
    elif least == most and least:  # it stores what it takes
        against |= seen.dropped & least
    against &= ~silent
    if against and machine.family.startswith("kvm"):
        # The guest, or the host (a restored value), may have written before: then the hardware alone decides, whatever
        # CPUID says; as it does where V_SPEC_CTRL, which guests do not see, lets everyone through.
        return Inference(machine.name, "possible")
    if against:
        return Inference(machine.name, "refuted", against)
    return Inference(machine.name, "fits" if least == most and not silent else "possible")


def _writable(machine: Machine, guest: Profile, hardware: Hardware) -> int | None:
    host = Host(hardware, features=guest.mask, caps=ALL_FEATURES)
    return machine.writable(machine.start(guest, host), by_host=False)


def _ignores(machine: Machine, guest: Profile) -> bool:
    """Tell whether what the rule takes reads 0 whatever the hardware keeps."""
    host = Host(Hardware(), features=guest.mask, caps=ALL_FEATURES)
    fresh = machine.start(guest, host)
    writable = machine.writable(fresh, by_host=False)
    if not writable:
        return False
    return machine.read(machine.write(fresh, writable, by_host=False), by_host=False)[1] == 0
