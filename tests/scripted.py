# SPDX-License-Identifier: MIT
"""A whole machine of N CPUs that is scripted: CPUID, kernel files and registers, for whole runs without hardware."""

from __future__ import annotations

from pathlib import Path

from probe.cpuid.dumps import read_dump
from probe.cpuid.machine import MachineCpuid
from probe.cpuid.snapshot import Leaf, Snapshot
from probe.host import Host
from probe.run import Ears, Options, run
from tests.fakes import FakeMsr, FakeRegister, pin_anywhere

DATA = Path(__file__).parent / "data"


def cpuid_of(count: int, dump: str = "threadripper-3970x.cpuid-r.txt") -> MachineCpuid:
    """Every CPU like the dump's first, but for its APIC IDs."""
    cpus = read_dump(str(DATA / "cpuid" / dump)).cpus
    base = dict(cpus[min(cpus)].leaves)
    found = {}
    for cpu in range(count):
        leaves = dict(base)
        one = leaves[Leaf(1, 0)]
        leaves[Leaf(1, 0)] = one._replace(ebx=one.ebx & 0xFFFFFF | (cpu & 0xFF) << 24)
        for leaf in leaves:
            if leaf.leaf in (0xB, 0x1F):
                leaves[leaf] = leaves[leaf]._replace(edx=cpu)
            elif leaf.leaf == 0x8000001E:
                leaves[leaf] = leaves[leaf]._replace(eax=cpu, ebx=leaves[leaf].ebx & ~0xFF | (cpu >> 1 & 0xFF))
        found[cpu] = Snapshot(leaves)
    return MachineCpuid(cpus=found, sources=("script",), cross_check="equal")


def host_tree(folder: Path, count: int, **files: str) -> Host:
    """Write the few kernel files that a run looks at; files maps a name of _FILES to another content."""
    contents = {
        "sys/devices/system/cpu/online": f"0-{count - 1}",
        "sys/devices/system/cpu/smt/control": "on",
        "sys/devices/system/cpu/vulnerabilities/spectre_v2": "Mitigation: Retpolines; STIBP: always-on",
        "sys/kernel/security/lockdown": "[none] integrity confidentiality",
        "proc/sys/kernel/tainted": "0",
        "proc/sys/kernel/random/boot_id": "5d1b2d5e-0000-4000-8000-000000000000",
        "proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=1234 mitigations=auto quiet",
    }
    contents.update({name.replace("__", "/"): text for name, text in files.items()})
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    for cpu in range(count):
        path = folder / f"sys/devices/system/cpu/cpu{cpu}/microcode/version"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0x8301039\n")
    return Host(folder)


def run_scripted(folder: Path, count: int, register: FakeRegister) -> bytes:
    """Do a whole run over CPUs that all have a copy of one register; return the encoded record."""
    from dataclasses import replace

    from probe.record import encode

    host = host_tree(folder / "tree", count)
    msr = FakeMsr({cpu: replace(register, writes=[]) for cpu in range(count)})
    cpuid = cpuid_of(count)
    options = Options(write=True, state_dir=folder / "state")
    return encode(run(options, Ears(), msr=msr, host=host, pin=pin_anywhere, read_cpuid=lambda cpus: cpuid))
