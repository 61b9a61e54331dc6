# SPDX-License-Identifier: MIT
"""A record as a reviewer wants it in a mail: at most 75 columns, what was tested, what was found, and a checksum.

No Tested-by: line is written unless the name for it is given: it is a person's word (Documentation/process/
submitting-patches.rst).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from probe import kvm_record, migration_record
from probe import record as rec
from probe.diff.moved import AnyRecord
from probe.masks import format_bits, parse_hex64, told_bits, told_cpus
from probe.report import moved_text, text
from probe.report.kvm_text import CALLED, explained
from probe.report.layout import clean, field, fields, joined, paragraph

_COMMIT = re.compile(r"-g([0-9a-f]{7,40})(?![0-9a-f])(-dirty)?")
_MOST_TABLES, _MOST_FINDINGS = 8, 20
_VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "HygonGenuine": "Hygon"}


def render(record: AnyRecord, sha256: str, tester: str = "") -> str:
    """Return the mail's text; sha256 is the file's, in hexadecimal, tester "Name <mail>" or ""."""
    if isinstance(record, rec.Record):
        lines = _run(record)
    elif isinstance(record, kvm_record.KvmRecord):
        lines = _kvm(record)
    else:
        lines = [*place(record), "", *moved_text.render([record]).splitlines()]
    lines += ["", *field("record", f"version {record.schema_version}, SHA-256"), f"{'':<11}{sha256}"]
    return joined(lines) + signed(tester)


def signed(tester: str) -> str:
    """Return the last lines of a mail: a Tested-by: of the name that was given; "" if none was."""
    return f"\nTested-by: {clean(' '.join(tester.split()))}\n" if tester else ""


def commit_of(release: str) -> str:
    """Return the commit that a kernel's release names (6.19.0-rc1-00012-g0123456789ab); "" if it names none."""
    found = _COMMIT.search(release)
    return "" if not found else found[1] + (", and changes that are not in it" if found[2] else "")


def place(record: AnyRecord, policy: str = "") -> list[str]:
    """Say on what was tested: kernel, commit, machine, whether in a guest, and by which command.

    policy stands for the name of the record's own in the command, where records of several are told of together.
    """
    machine, kernel = record.machine, record.kernel
    lines = field("kernel", kernel.release)
    commit = commit_of(kernel.release)
    if commit:
        lines += field("", f"commit {commit}")
    lines += field("", kernel.version)
    if kernel.cmdline:
        lines += field("", " ".join(kernel.cmdline))
    vendor = _VENDORS.get(machine.vendor, machine.vendor)
    where = f"{vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x}"
    revisions = ", ".join(one.revision for one in machine.microcode) or "unknown"
    lines += field("machine", f"{where}, microcode {revisions}")
    if machine.brand:
        lines += field("", machine.brand)
    lines += field(
        "", f"under hypervisor {machine.hypervisor or '(unnamed)'}" if machine.under_hypervisor else "bare metal"
    )
    if record.identity:
        lines += field("", f"called {record.identity}")
    guest = record.place.guest if isinstance(record, rec.Record) else record.guest
    if not isinstance(guest, UnsetType):
        lines += field("", f"a guest booted for it: {guest.kernel} {guest.kernel_version}, {guest.accelerator}")
        lines += field("", guest.qemu)
    if isinstance(record, rec.Record):
        for told in not_hardware(record):
            lines += field("", told)
    else:
        lines += _kvm_place(record)
    if record.tool.arguments:
        own = policy and policy_of(record)
        words = [policy if own and word == own else word for word in record.tool.arguments]
        lines += field("command", f"{record.tool.name} {shlex.join(words)}")
    return lines


def policy_of(record: AnyRecord) -> str:
    """Return the policy under which a record was made, or ""."""
    if not isinstance(record, kvm_record.KvmRecord) or isinstance(record.policy, UnsetType):
        return ""
    return record.policy.name


def not_hardware(record: AnyRecord) -> list[str]:
    """Say what of a record is not the hardware's own: a modelled register, a CPUID that was given."""
    told = []
    if isinstance(record, rec.Record):
        guest = record.place.guest
        if not isinstance(guest, UnsetType) and guest.register_model:
            told.append(f"NOT HARDWARE: its register is a model, {guest.register_model}")
        if not isinstance(record.predicted_from, UnsetType):
            told.append(f"predicted from a recorded CPUID: {text.predicted_cpu(record)}")
    elif not isinstance(record.guest, UnsetType):
        if not isinstance(record.guest.tested, UnsetType):
            told.append(f"NOT HARDWARE: KVM's own test of a value was made to accept {record.guest.tested}")
        if record.guest.cpu:
            told.append(f"CPUID bits given to an emulated CPU: {record.guest.cpu.replace(',', ', ')}")
    return told


def _kvm_place(record: kvm_record.KvmRecord | migration_record.MigrationRecord) -> list[str]:
    kvm = record.kvm
    lines = field("KVM", f"{kvm.backend or 'backend not to be seen'}, kvm.ignore_msrs={kvm.ignore_msrs or 'unknown'}")
    if isinstance(record.guest, UnsetType):
        return lines
    if record.guest.cpu:
        lines += field("", f"CPUID given to the emulated CPU: {record.guest.cpu.replace(',', ', ')}")
    if not isinstance(record.guest.tested, UnsetType):
        lines += field("", f"its own test of a value was made to accept {record.guest.tested}")
    return lines


def _register(record: kvm_record.KvmRecord) -> list[str]:
    hardware = record.hardware
    keeps = f"keeps {_told(hardware.keep)}" if parse_hex64(hardware.keep) else "keeps none of them"
    through = f"a guest let through {keeps}" if hardware.let_through else "no guest was let through"
    lines = field("register", f"takes {_told(hardware.tested)}; {through}")
    if not parse_hex64(hardware.keep):
        lines += field("", "so whether VM entry loads a guest's value was not seen")
    return lines


def _run(record: rec.Record) -> list[str]:
    """The report's findings and bits, without what a reviewer does not need."""
    lines = [*text.headline(record), "", *place(record), "", *text.findings(record, _MOST_FINDINGS), ""]
    groups = list(text.walked_groups(record))
    shown = groups
    if len(groups) > _MOST_TABLES:
        shown = sorted(groups, key=lambda group: not group.wrong)[:_MOST_TABLES]
    for group in shown:
        lines += [*([told_cpus(group.seen.cpus)] if len(groups) > 1 else []), *text.bits(record, group), ""]
    if len(groups) > len(shown):
        wrong = sum(bool(group.wrong) for group in groups) - sum(bool(group.wrong) for group in shown)
        told = f"and {len(groups) - len(shown)} more groups of CPUs, {wrong} of them not as predicted: in the record"
        lines += [*paragraph(told), ""]
    return [*lines, *text.restored(record, _MOST_TABLES)]


def _kvm(record: kvm_record.KvmRecord) -> list[str]:
    policy = "" if isinstance(record.policy, UnsetType) else f" under policy {record.policy.name}"
    lines = [*paragraph(f"KVM and IA32_SPEC_CTRL (MSR 0x48){policy}: {explained(record)}"), ""]
    lines += [*place(record), *_register(record), ""]
    profiles = sum(len(row.profiles) for row in record.rows)
    lines += field("tested", f"{profiles} guest CPUIDs; every bit, host- and guest-initiated")
    for entry in record.explored:
        found = f"differs: {entry.divergence}, not {entry.model_says}" if entry.divergence else "no divergence"
        lines += field("", f"{entry.programs:,} random programs on {entry.model}: {found}")
    lines += _findings(record)
    lines += ["", f"{'model':<34}{'cases':>9}{'agree':>9}"]
    shown = [fit for fit in record.fits if fit.model in record.explained_by] or record.fits[:1]
    shown += [fit for fit in record.fits if fit not in shown][: 4 - min(len(shown), 3)]
    for fit in shown:
        lines.append(f"{clean(fit.model)[:33]:<34}{fit.cases:>9}{fit.agreements:>9}")
    return [*lines, "", *_masks(record.rows)]


def _findings(record: kvm_record.KvmRecord) -> list[str]:
    """What a reviewer has to look into: the nearest model's first divergence, a driver that disagrees, complaints."""
    told = []
    if not kvm_record.as_predicted(record) and record.fits and record.fits[0].first is not UNSET:
        fit = record.fits[0]
        assert not isinstance(fit.first, UnsetType)
        told.append(f"{fit.model}, the nearest: {fit.first.program} -> {fit.first.kernel}, not {fit.first.model}")
    differs = kvm_record.driver_differs(record)
    if differs:
        told.append(f"the msr driver is unlike KVM_SET_MSRS on {told_bits(differs)}")
    told += kvm_record.complaints(record)
    return fields("findings", told or ["none"])


def _masks(rows: Sequence[kvm_record.RowEntry]) -> list[str]:
    """What is accepted, by groups of guest CPUIDs, the largest first."""
    lines = [f"{'bits accepted of':<34}{'a guest,':<14}{'after a':<14}{'a host,'}"]
    lines.append(f"{'guests with these CPUIDs':<34}{'first':<14}{'host write':<14}{'first'}")
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        cells = tuple(_bits(row.cells.get(name)) for name in ("guest_first", "guest_after", "host_first"))
        groups.setdefault(cells, []).extend(row.profiles)
    for masks, names in sorted(groups.items(), key=lambda item: -len(item[1]))[:8]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        shown = f"{CALLED.get(names[0], names[0].replace(',', '+'))}{more}"
        tail = "".join(f"{mask:<14}" for mask in masks).rstrip()
        if len(shown) > 33:
            lines += paragraph(shown, "", "  ")
            shown = ""
        lines.append(f"{shown:<34}{tail}")
    if len(groups) > 8:
        lines.append(f"and {len(groups) - 8} more groups: in the record")
    return lines


def _told(mask: str) -> str:
    """Write a mask in a sentence; where most bits are set here and there, how many."""
    value = parse_hex64(mask)
    return told_bits(value) if len(format_bits(value)) < 13 else f"{bin(value).count('1')} of 64 bits"


def _bits(mask: str | None) -> str:
    if mask is None:
        return "-"
    told = format_bits(parse_hex64(mask))
    return told if len(told) < 13 else f"{bin(parse_hex64(mask)).count('1')} of 64"
