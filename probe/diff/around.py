# SPDX-License-Identifier: MIT
"""What else differs between two records, so that a reader sees whether the comparison is fair."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256

import msgspec
from msgspec import UnsetType

from probe import kvm_record
from probe import record as rec
from probe.diff.moved import AnyRecord, Condition
from probe.entries import cpuid_of_groups
from probe.errors import RecordError
from probe.masks import told_cpus
from probe.models.profile import profile_of

# Told in words of their own, or not circumstances but what was seen.
_TOLD = {
    "machine.vendor",
    "machine.family",
    "machine.model",
    "machine.stepping",
    "machine.brand",
    "machine.microcode",
    "machine.bios.vendor",
    "machine.bios.version",
    "machine.bios.date",
    "kernel.release",
    "kernel.version",
    "kernel.taint_before",
    "kernel.taint_after",
    "kernel.modules_loaded",
    "place.because",
    "place.guest.because",
    "policy.complaints",
}
_NAMES = {
    "machine.signature": "CPUID.1:EAX",
    "machine.smt": "SMT",
    "machine.online": "CPUs online",
    "machine.hypervisor": "hypervisor",
    "machine.under_hypervisor": "in a guest",
    "machine.bios.product": "product",
    "kernel.cmdline": "command line",
    "kernel.lockdown": "lockdown",
    "kernel.allow_writes": "allow_writes",
    "kvm.backend": "KVM backend",
    "kvm.ignore_msrs": "ignore_msrs",
    "kvm.in_msr_index_list": "0x48 listed",
    "kvm.msr_filter": "MSR filter",
    "kvm.user_space_msr": "MSR exits",
    "hardware.host_cpuid": "host CPUID",
    "hardware.supported_cpuid": "CPUID that KVM offers",
    "policy.name": "policy",
    "walk.bits": "bits tried",
    "walk.base": "base",
}


def around(record: AnyRecord) -> dict[str, str]:
    """Return what bears on a result without being one, each with its name."""
    machine, kernel, bios = record.machine, record.kernel, record.machine.bios
    found = {
        "called": record.identity,
        "machine": f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x} {machine.brand}",
        "microcode": ", ".join(dict.fromkeys(one.revision for one in machine.microcode)) or "unknown",
        "firmware": f"{bios.vendor} {bios.version} {bios.date}".strip() or "unknown",
        "kernel": f"{kernel.release} {kernel.version}",
        "record version": record.schema_version,
        "tool": record.tool.version,
    }
    parts: list[tuple[str, object]] = [("machine", machine), ("kernel", kernel)]
    if isinstance(record, rec.Record):
        parts += [("place", record.place), ("walk", record.walk)]
        found["judge"] = record.judge
        found["held before the run"] = ", ".join(f"{entry.value} ({told_cpus(entry.cpus)})" for entry in record.saved)
        found["CPUID"] = _cpuid(record.cpuid.groups)
        given = record.predicted_from
        found["CPUID given"] = "" if isinstance(given, UnsetType) else f"{given.form}: {_cpuid(given.groups)}"
    else:
        parts += [("kvm", record.kvm), ("guest", record.guest)]
        cpuid = {name: getattr(record.hardware, name) for name in ("host_cpuid", "supported_cpuid")}
        parts.append(("hardware", cpuid))
        if isinstance(record, kvm_record.KvmRecord):
            parts.append(("policy", record.policy))
        else:
            found["model"] = record.model
            found["study"] = record.study
    for prefix, part in parts:
        if not isinstance(part, UnsetType):
            found.update(_flat(prefix, msgspec.to_builtins(part)))
    return found


def _flat(path: str, value: object) -> Iterable[tuple[str, str]]:
    """Yield (name, text) for every leaf of a part of a record, but those that are told otherwise."""
    if path in _TOLD:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}", inner)
        return
    text = " ".join(str(one) for one in value) if isinstance(value, list) else str(value)
    prefix, _, last = path.partition("kernel.mitigations.")
    yield (f"mitigation {last}" if last and not prefix else _NAMES.get(path, re.sub("[._]", " ", path))), text


def _cpuid(groups: Iterable[rec.CpuidGroup]) -> str:
    """Name the features that bear on the register, and a digest of all leaves, but of what differs from CPU to CPU."""
    groups = list(groups)
    leaves = repr(sorted(tuple(sorted(group.leaves.items())) for group in groups))
    try:
        cpus = cpuid_of_groups(groups)
        features = str(profile_of(cpus[min(cpus)])) if cpus else "none"
    except RecordError:
        features = "unreadable"
    return f"{features}; all leaves {sha256(leaves.encode()).hexdigest()[:8]}"


def conditions(before: AnyRecord, after: AnyRecord) -> tuple[tuple[Condition, ...], tuple[str, ...]]:
    """Return what is not the same around two records, and the names of what is."""
    one, other = ({name: text.strip() for name, text in around(record).items()} for record in (before, after))
    names = list(dict.fromkeys([*one, *other]))
    differing = tuple(
        Condition(name, one.get(name, "not recorded") or "(empty)", other.get(name, "not recorded") or "(empty)")
        for name in names
        if one.get(name, "") != other.get(name, "")
    )
    told = {condition.what for condition in differing}
    groups = dict.fromkeys("mitigations" if name.startswith("mitigation ") else name for name in names)
    moved = any(name.startswith("mitigation ") for name in told)
    alike = [
        name for name in groups if name not in told and one.get(name, "-") and not (name == "mitigations" and moved)
    ]
    return differing, tuple(alike)
