# SPDX-License-Identifier: MIT
"""What this machine allows, and what to do about each thing that it does not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from probe.cpuid.snapshot import Snapshot
from probe.host import TAINT_CPU_OUT_OF_SPEC, Facts, bad_microcode


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    state is "ok", "no" (stands in the way of what needs names), "note" (worth knowing) or "unknown" (could not look).
    needs is "metal", "guest" or "". remedy is a command where there is one.
    """

    name: str
    state: str
    text: str
    needs: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Program:
    """A program that something needs: whether it is there, and the command that brings it."""

    name: str
    there: bool
    remedy: str


@dataclass(frozen=True)
class Surroundings:
    """What lies outside the kernel's own files: who we are, which devices and programs are there."""

    root: bool
    msr_loadable: bool
    msr_nodes: tuple[int, ...]
    cpuid_nodes: bool
    kvm: str  # "" if /dev/kvm can be opened, else why not
    programs: tuple[Program, ...]  # what booting a guest needs
    guest_kernel: str  # the kernel that a guest would boot, "" if there is none
    accelerator: tuple[str, str] | None = None  # "kvm" or "tcg" and why, if that was tried since the host booted


def look_around(
    msr_nodes: tuple[int, ...],
    msr_loadable: bool,
    programs: Iterable[Program],
    guest_kernel: str,
    accelerator: tuple[str, str] | None = None,
) -> Surroundings:
    """Look at devices (edge; changes nothing); the caller has looked for drivers, programs and kernels."""
    kvm = ""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        kvm = error.strerror or "cannot be opened"
    return Surroundings(
        root=os.geteuid() == 0,
        msr_loadable=msr_loadable,
        msr_nodes=msr_nodes,
        cpuid_nodes=Path("/dev/cpu/0/cpuid").exists(),
        kvm=kvm,
        programs=tuple(programs),
        guest_kernel=guest_kernel,
        accelerator=accelerator,
    )


def examine(facts: Facts, around: Surroundings, cpus: Mapping[int, Snapshot]) -> list[Check]:
    """Judge everything that a run would meet, in the order in which it would meet it (pure)."""
    return [
        _root(around),
        _msr_driver(around),
        _cpuid_driver(around),
        _lockdown(facts),
        _allow_writes(facts),
        _taint(facts),
        _vms(facts, around),
        _microcode(facts, cpus),
        _readback(facts),
        _kvm(around),
        *_programs(around),
        _guest_kernel(around),
    ]


def _root(around: Surroundings) -> Check:
    if around.root:
        return Check("root", "ok", "running as root", "metal")
    return Check("root", "no", "not root: the msr driver needs CAP_SYS_RAWIO", "metal", "sudo spec-ctrl-probe doctor")


def _msr_driver(around: Surroundings) -> Check:
    if around.msr_nodes:
        return Check("msr driver", "ok", f"/dev/cpu/N/msr is there for {len(around.msr_nodes)} CPUs", "metal")
    if around.msr_loadable:
        return Check("msr driver", "ok", "not loaded; run --write loads it and unloads it again", "metal")
    text = "no /dev/cpu/0/msr, and modprobe finds no msr module for this kernel (CONFIG_X86_MSR)"
    return Check("msr driver", "no", text, "metal", "spec-ctrl-probe run --in guest")


def _cpuid_driver(around: Surroundings) -> Check:
    if around.cpuid_nodes:
        return Check("cpuid driver", "ok", "/dev/cpu/N/cpuid is there for the cross-check")
    return Check("cpuid driver", "note", "no /dev/cpu/0/cpuid: CPUID is not cross-checked", "", "modprobe cpuid")


def _lockdown(facts: Facts) -> Check:
    if facts.lockdown == "none":
        return Check("lockdown", "ok", "none", "metal")
    if facts.lockdown == "unknown":
        remedy = "mount -t securityfs securityfs /sys/kernel/security"
        return Check("lockdown", "unknown", "securityfs does not tell", "metal", remedy)
    text = f"{facts.lockdown}: MSR writes are refused"
    return Check("lockdown", "no", text, "metal", "boot without lockdown= and without Secure Boot")


def _allow_writes(facts: Facts) -> Check:
    if facts.allow_writes == "off":
        remedy = "echo default > /sys/module/msr/parameters/allow_writes"
        return Check("allow_writes", "no", "msr.allow_writes=off: MSR writes are refused", "metal", remedy)
    return Check(
        "allow_writes", "ok", facts.allow_writes or "not set (the module is not loaded, or older than v5.9)", "metal"
    )


def _taint(facts: Facts) -> Check:
    if facts.taint is None:
        return Check("taint", "unknown", "/proc/sys/kernel/tainted cannot be read")
    if facts.taint & TAINT_CPU_OUT_OF_SPEC:
        return Check("taint", "note", f"{facts.taint}: already tainted 'S' (by an earlier MSR write, say)")
    return Check("taint", "note", f"{facts.taint}; run --write would add 4 ('S') until the next boot")


def _vms(facts: Facts, around: Surroundings) -> Check:
    if facts.vms:
        who = ", ".join(f"{name} ({pid})" for pid, name in facts.vms[:4])
        return Check(
            "running VMs", "no", f"{who}: vCPUs may run on any CPU", "metal", "stop them, or --allow-running-vms"
        )
    if facts.pid_namespace:
        text = "in a container: who ends it kills the watchdog with it, and VMs outside are not seen"
        return Check("running VMs", "no", text, "metal", "run it on the host, or --allow-container")
    if facts.kvm_users:
        text = "something that cannot be seen from here has KVM open"
        return Check("running VMs", "no", text, "metal", "lsof /dev/kvm; stop it, or --allow-running-vms")
    if not around.root:
        return Check(
            "running VMs", "unknown", "other users' processes cannot be seen without root", "metal", "use sudo"
        )
    return Check("running VMs", "ok", "none holds a KVM VM", "metal")


def _microcode(facts: Facts, cpus: Mapping[int, Snapshot]) -> Check:
    revisions = sorted(set(facts.microcode.values()))
    for cpu, snapshot in cpus.items():
        why = bad_microcode(snapshot, facts.microcode.get(cpu))
        if why:
            return Check("microcode", "no", why, "metal", "install intel-microcode and reboot")
    if not revisions:
        return Check("microcode", "unknown", "the kernel does not tell the revision", "metal")
    return Check("microcode", "ok", f"{', '.join(f'{rev:#x}' for rev in revisions)}, not on Linux's bad list", "metal")


def _readback(facts: Facts) -> Check:
    if facts.legacy_ibrs:
        return Check("read-back", "note", "legacy IBRS: the kernel rewrites the register; judged by the write alone")
    return Check("read-back", "ok", facts.mitigations.get("spectre_v2", "spectre_v2 unknown"))


_KVM_CURES = {"Permission denied": "run it as root, or as a member of the device's group (usually kvm)"}


def _kvm(around: Surroundings) -> Check:
    if not around.kvm and around.accelerator is not None:
        accelerator, because = around.accelerator
        if accelerator == "kvm":
            return Check("KVM", "ok", because)
        return Check("KVM", "note", f"/dev/kvm opens, but {because}: guests run emulated (TCG)")
    if not around.kvm:
        return Check("KVM", "ok", "/dev/kvm opens; whether a Linux guest boots is tried when one is needed")
    return Check(
        "KVM",
        "note",
        f"/dev/kvm: {around.kvm}; guests run emulated (TCG)",
        "",
        _KVM_CURES.get(around.kvm, "modprobe kvm_intel || modprobe kvm_amd"),
    )


def _programs(around: Surroundings) -> list[Check]:
    missing = [
        Check(program.name, "no", f"{program.name} is missing", "guest", program.remedy)
        for program in around.programs
        if not program.there
    ]
    there = ", ".join(program.name for program in around.programs if program.there)
    return missing or [Check("guest tools", "ok", there, "guest")]


def _guest_kernel(around: Surroundings) -> Check:
    if around.guest_kernel:
        return Check("guest kernel", "ok", f"{around.guest_kernel}, fetched into the cache when one is needed", "guest")
    remedy = "spec-ctrl-probe run --in guest --kernel /boot/vmlinuz-VERSION"
    return Check("guest kernel", "no", "none to boot: no apt-get, and the running one cannot be read", "guest", remedy)


def ready_for(checks: list[Check]) -> list[str]:
    """Return the places in which a run would work: those that no check stands in the way of."""
    blocked = {check.needs for check in checks if check.state == "no"}
    return [place for place in ("metal", "guest") if place not in blocked]
