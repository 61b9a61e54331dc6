# SPDX-License-Identifier: MIT
"""Whole machines: the CPUID of many CPUs, the kernel's files, registers, and what the agent makes of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from probe.assembly import Seen, assemble
from probe.cpuid.dumps import read_dump
from probe.cpuid.machine import MachineCpuid
from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.errors import NotRestored
from probe.host import Facts, Host
from probe.record import Record
from probe.trial import Plan, Walk, not_walked, put_back, read_saved
from tests.fakes import SPEC_CTRL, FakeMsr, FakeRegister, pin_anywhere
from tests.fakes_cpuid import leaf0, registers

DATA = Path(__file__).parent / "data"
HOSTS = DATA / "hosts"

# Where a CPU's own number stands: leaf, subleaf, register, shift, width.
_APIC_ID = (
    (0x1, 0, "ebx", 24, 8),
    (0xB, 0, "edx", 0, 32),
    (0xB, 1, "edx", 0, 32),
    (0xB, 2, "edx", 0, 32),
    (0x1F, 0, "edx", 0, 32),
    (0x1F, 1, "edx", 0, 32),
    (0x1F, 2, "edx", 0, 32),
    (0x8000001E, 0, "eax", 0, 32),
)


def numbered(base: Snapshot, cpu: int) -> Snapshot:
    """Return the CPUID of one CPU of many that are alike but for their APIC ID."""
    leaves = {leaf: Registers(*found) for leaf, found in base.leaves.items()}
    for number, subleaf, register, shift, width in _APIC_ID:
        found = leaves.get(Leaf(number, subleaf))
        if found is not None:
            mask = ((1 << width) - 1) << shift
            value = getattr(found, register) & ~mask | cpu << shift & mask
            leaves[Leaf(number, subleaf)] = found._replace(**{register: value})
    core_and_node = leaves.get(Leaf(0x8000001E, 0))
    if core_and_node is not None:
        leaves[Leaf(0x8000001E, 0)] = core_and_node._replace(ebx=0x100 | cpu >> 1 & 0xFF, ecx=cpu >> 6)
    return Snapshot(leaves)


def in_guest(cpu: Snapshot, signature: str = "KVMKVMKVM") -> Snapshot:
    """Return what a guest is shown if its hypervisor passes this CPUID on and adds its own leaves."""
    leaves = dict(cpu.leaves)
    one = leaves[Leaf(1, 0)]
    leaves[Leaf(1, 0)] = one._replace(ecx=one.ecx | 1 << 31)
    leaves[Leaf(0x40000000, 0)] = Registers(0x40000001, *registers(signature))
    leaves[Leaf(0x40000001, 0)] = Registers(0x01007EFB, 0, 0, 0)
    return Snapshot(leaves)


def threadripper(cpus: int = 2) -> dict[int, Snapshot]:
    """Return the CPUID of a Threadripper 3970X: STIBP and SSBD without IBRS, the case of July 2020."""
    base = read_dump(str(DATA / "cpuid" / "threadripper-3970x.cpuid-r.txt")).cpus[0]
    return {cpu: numbered(base, cpu) for cpu in range(cpus)}


def sapphire_rapids(cpus: int = 2) -> dict[int, Snapshot]:
    """Return the CPUID of a Sapphire Rapids: every field of the register but DDPD_U and PSFD's neighbours."""
    base = read_dump(str(DATA / "cpuid" / "sapphire-rapids.instlatx64.txt")).cpus[0]
    return {cpu: numbered(base, cpu) for cpu in range(cpus)}


def signature_of(family: int, model: int, stepping: int) -> int:
    """Encode display family, model and stepping as leaf 1 EAX does."""
    return (max(family - 0xF, 0) << 20) | (model >> 4 << 16) | (min(family, 0xF) << 8) | ((model & 0xF) << 4) | stepping


def small_cpu(
    vendor: str = "GenuineIntel",
    family: int = 6,
    model: int = 0x5E,
    stepping: int = 3,
    *,
    edx7: int = 0,
    ebx8: int = 0,
    hypervisor: str = "",
) -> Snapshot:
    """Return a CPU with no more leaves than the predictors ask for."""
    cpu = Snapshot(
        {
            Leaf(0, 0): leaf0(0x16, vendor),
            Leaf(1, 0): Registers(signature_of(family, model, stepping), 0x00800800, 0, 0),
            Leaf(7, 0): Registers(0, 0, 0, edx7),
            Leaf(0x80000000, 0): Registers(0x80000008, 0, 0, 0),
            Leaf(0x80000008, 0): Registers(0, ebx8, 0, 0),
        }
    )
    return in_guest(cpu, hypervisor) if hypervisor else cpu


def cpuid_of(cpus: Mapping[int, Snapshot]) -> MachineCpuid:
    """Return CPUs as if both ways of reading them had agreed."""
    return MachineCpuid(cpus, sources=("instruction", "/dev/cpu/N/cpuid"), cross_check="equal")


def make_tree(root: Path, files: Mapping[str, str]) -> Path:
    """Write small files below a root folder for Host(root)."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def facts_of(host: str, *, online: Iterable[int] = (0, 1)) -> Facts:
    """Return the facts of a machine of tests/data/hosts, the kernel that runs the tests put aside."""
    return dataclasses.replace(
        Host(HOSTS / host).facts(),
        kernel="6.1.0-40-amd64",
        kernel_version="#1 SMP PREEMPT_DYNAMIC Debian 6.1.153-1 (2025-09-20)",
        online=tuple(online),
    )


def record_of(
    registers: Mapping[int, FakeRegister],
    cpuid: Mapping[int, Snapshot] | MachineCpuid,
    facts: Facts,
    *,
    written: bool = True,
    identity: str = "",
    judge: str = "vendor",
    base_zero: bool = False,
    clear_bits: bool = False,
    pairs: bool = False,
    repeat: int = 1,
    bits: tuple[int, ...] = tuple(range(64)),
) -> Record:
    """Walk scripted registers and return the record, the same on every machine and at any time."""
    seen_cpuid = cpuid if isinstance(cpuid, MachineCpuid) else cpuid_of(cpuid)
    plan = Plan(
        SPEC_CTRL,
        tuple(seen_cpuid.cpus),
        bits=bits,
        base_zero=base_zero,
        clear_bits=clear_bits,
        pairs=pairs,
        repeat=repeat,
        readback=not facts.legacy_ibrs,
    )
    seen = Seen(facts, seen_cpuid, plan, written=written, duration=0.25)
    seen.taint_after = facts.taint
    if written:
        seen.taint_after = (facts.taint or 0) | 4
        msr = FakeMsr(dict(registers))
        read = read_saved(msr, SPEC_CTRL, plan.cpus, pin_anywhere)
        saved = {cpu: value for cpu, value in read.items() if isinstance(value, int)}
        walk = Walk(msr, plan, saved, pin_anywhere)
        with contextlib.suppress(NotRestored):
            walk.run()
        seen.proof = put_back(msr, SPEC_CTRL, saved, pin_anywhere, walk.gone)
        unread = [not_walked(cpu, value, bits) for cpu, value in read.items() if not isinstance(value, int)]
        seen.results = sorted([*unread, *walk.results()], key=lambda result: result.cpu)
    record = assemble(
        seen,
        started="2026-07-22T10:00:00Z",
        judge=judge,
        cpuid_file=None,
        because="asked for with --in metal",
        identity=identity,
        arguments=["run", "--in", "metal", *(["--write"] if written else [])],
    )
    record.tool.version = "0.1.0"
    record.tool.python = "3.11.2"
    return record
