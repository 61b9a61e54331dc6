# SPDX-License-Identifier: MIT
"""The CPUID of this machine: every CPU read in two ways that witness each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from probe.cpuid.compare import Difference, cross_check
from probe.cpuid.enumeration import CpuidSource, read_cpu
from probe.cpuid.live import CpuidDevice, CpuidInstruction
from probe.cpuid.snapshot import Snapshot
from probe.errors import RequirementMissing


@dataclass(frozen=True)
class MachineCpuid:
    """What CPUID says on every CPU, and how far that is confirmed.

    cpus maps CPU to snapshot; sources names the ways of reading that worked. cross_check is "equal", "differs", or
    "not done: " and why; differences maps the CPUs on which the two ways differ to in what. notes say what was not
    read.
    """

    cpus: Mapping[int, Snapshot]
    sources: tuple[str, ...] = ()
    cross_check: str = "not done: not read from a machine"
    differences: Mapping[int, tuple[Difference, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_machine(cpus: Sequence[int]) -> MachineCpuid:
    """Read the CPUID of every CPU by the instruction on the pinned CPU and from /dev/cpu/N/cpuid; compare the two.

    The instruction is believed; the device supplies what the cpuid package cannot read (hypervisor leaves), and the
    CPUs on which this process may not run. Raise RequirementMissing if a CPU can be read in neither way.
    """
    with CpuidDevice() as device:
        by_instruction, no_instruction, notes = _read_each(CpuidInstruction(), cpus)
        by_device, no_device, device_notes = _read_each(device, cpus)
    if len(by_instruction.keys() | by_device.keys()) < len(cpus):
        raise RequirementMissing(f"cannot read CPUID: {no_instruction}; {no_device}", "give a dump: --cpuid FILE")
    both = by_instruction.keys() & by_device.keys()
    differences = {cpu: cross_check(by_instruction[cpu], by_device[cpu]) for cpu in sorted(both)}
    differences = {cpu: found for cpu, found in differences.items() if found}
    if len(both) == len(cpus):
        crossed = "differs" if differences else "equal"
    else:
        crossed = "not done: " + "; ".join(text for text in (no_instruction, no_device) if text)
    return MachineCpuid(
        cpus={cpu: _joined(by_instruction.get(cpu), by_device.get(cpu)) for cpu in cpus},
        sources=tuple(
            name for name, seen in ((CpuidInstruction.name, by_instruction), (CpuidDevice.name, by_device)) if seen
        ),
        cross_check=crossed,
        differences=differences,
        notes=device_notes if len(by_device) == len(cpus) else notes,  # the device reads whatever CPUID tells
    )


def _read_each(source: CpuidSource, cpus: Sequence[int]) -> tuple[dict[int, Snapshot], str, tuple[str, ...]]:
    """Read the CPUs that this source can reach; return also why not all (or ""), and what was passed over."""
    found: dict[int, Snapshot] = {}
    why_not = ""
    notes: dict[str, None] = {}
    for cpu in cpus:
        try:
            reading = read_cpu(source, cpu)
        except RequirementMissing as error:
            why_not = error.message
            continue
        found[cpu] = reading.snapshot
        notes.update(dict.fromkeys(reading.notes))
    return found, why_not, tuple(notes)


def _joined(instruction: Snapshot | None, device: Snapshot | None) -> Snapshot:
    leaves = dict(device.leaves if device else {})
    leaves.update(instruction.leaves if instruction else {})
    return Snapshot(dict(sorted(leaves.items())))
