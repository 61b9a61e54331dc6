# SPDX-License-Identifier: MIT
"""What an export tells of its record besides the cases: whether it is of hardware, where, how made, which file."""

from __future__ import annotations

import shlex

from msgspec import UnsetType

from probe import record as rec
from probe.cases import Report
from probe.diff.moved import AnyRecord
from probe.report.mail import not_hardware

FIELDS = ("not_hardware", "hypervisor", "accelerator", "command", "record_sha256")
_TITLES = {"hypervisor": "hypervisor", "accelerator": "accelerator", "command": "command", "record_sha256": "SHA-256"}
_TCG = "TCGTCGTCGTCG"  # CPUID leaf 0x40000000 of QEMU's emulated CPU


def of(report: Report) -> dict[str, str]:
    """Return a text for each of FIELDS; hypervisor is "none" on bare metal, others are "" if nothing is to be said."""
    record = report.record
    machine, tool = record.machine, record.tool
    return {
        "not_hardware": "; ".join(warnings(record)),
        "hypervisor": (machine.hypervisor or "unnamed") if machine.under_hypervisor else "none",
        "accelerator": _accelerator(record),
        "command": f"{tool.name} {shlex.join(tool.arguments)}" if tool.arguments else "",
        "record_sha256": report.sha256,
    }


def lines(report: Report) -> list[str]:
    """Return for a reader what warnings() does not say; what is empty is left out."""
    return [f"{_TITLES[name]}: {text}" for name, text in of(report).items() if text and name in _TITLES]


def warnings(record: AnyRecord) -> list[str]:
    """Return what of a record is not the hardware's own, an emulated CPU among it."""
    told = not_hardware(record)
    emulated = _accelerator(record) == "tcg" or record.machine.hypervisor == _TCG
    if emulated and not any("NOT HARDWARE" in one for one in told):
        told = ["NOT HARDWARE: the CPU is emulated (QEMU TCG)", *told]
    return told


def _accelerator(record: AnyRecord) -> str:
    guest = record.place.guest if isinstance(record, rec.Record) else record.guest
    return "" if isinstance(guest, UnsetType) else guest.accelerator
