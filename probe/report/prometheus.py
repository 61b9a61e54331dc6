# SPDX-License-Identifier: MIT
"""Prometheus text format 0.0.4, for node_exporter's textfile collector: a few series a record, none a bit.

Timestamps are not allowed in textfiles, so when a record was made is a value of its own.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Sequence

from probe.cases import Report, Status
from probe.night import Night
from probe.report import circumstances
from probe.report.layout import clean
from probe.sweep import How, Swept

_METRICS = (
    ("last_run_timestamp_seconds", "When the record was made, seconds since 1970 UTC."),
    ("duration_seconds", "How long the run took."),
    ("cases", "Cases by how they ended: pass, fail, skip, error."),
    ("ok", "1 if nothing failed and something was measured, else 0."),
    ("info", "Always 1; kernel, microcode, tool, what is not hardware, where, command and SHA-256 as labels."),
)


def render(reports: Sequence[Report]) -> str:
    """Return the text; each series has the labels record and kind."""
    lines: list[str] = []
    for name, said in _METRICS:
        lines += [f"# HELP spec_ctrl_probe_{name} {said}", f"# TYPE spec_ctrl_probe_{name} gauge"]
        lines += [line for report in reports for line in _series(report, name)]
    return "\n".join(lines) + "\n"


_LAB = (
    ("lab_last_sweep_timestamp_seconds", "When the last sweep was started, seconds since 1970 UTC."),
    ("lab_sweep_duration_seconds", "How long it took."),
    ("lab_machines", "Machines by how their part of the sweep ended."),
    ("lab_changed_machines", "Machines that do otherwise than the night before."),
    ("lab_missing_machines", "Machines that an earlier night has, and this one does not."),
    ("lab_finding_machines", "Machines with open findings."),
)


def of_night(night: Night, done: Swept) -> str:
    """Return a sweep and its night as text: series of the lab, none of a machine."""
    values: dict[str, list[tuple[dict[str, str], float]]] = {
        "lab_last_sweep_timestamp_seconds": [({}, _seconds(done.started))],
        "lab_sweep_duration_seconds": [({}, round(done.seconds, 3))],
        "lab_machines": [({"ended": how.value}, len(done.of(how))) for how in How],
        "lab_changed_machines": [({}, len({host for one in night.changes for host in one.hosts}))],
        "lab_missing_machines": [({}, len(night.missing) + len(night.absent))],
        "lab_finding_machines": [({}, len({one[0] for one in night.findings}))],
    }
    lines: list[str] = []
    for name, said in _LAB:
        lines += [f"# HELP spec_ctrl_probe_{name} {said}", f"# TYPE spec_ctrl_probe_{name} gauge"]
        lines += [_line(name, labels, value) for labels, value in values[name]]
    return "\n".join(lines) + "\n"


def _seconds(text: str) -> int:
    """Return seconds since 1970 UTC of a time such as 2026-11-25T02:00:00Z."""
    return calendar.timegm(tuple(int(number) for number in re.findall("[0-9]+", text)))


def _series(report: Report, name: str) -> list[str]:
    record = report.record
    labels = {"record": report.name, "kind": report.kind}
    if record.identity:
        labels["identity"] = record.identity
    if name == "cases":
        return [_line(name, {**labels, "status": status.value}, report.count(status)) for status in Status]
    if name == "info":
        microcode = record.machine.microcode[0].revision if record.machine.microcode else "unknown"
        about = {"kernel": record.kernel.release, "microcode": microcode, "tool": record.tool.version}
        return [_line(name, {**labels, **about, **circumstances.of(report)}, 1)]
    values = {
        "last_run_timestamp_seconds": _seconds(record.started),
        "duration_seconds": record.duration,
        "ok": int(report.status is Status.PASS),
    }
    return [_line(name, labels, values[name])]


def _line(name: str, labels: dict[str, str], value: float) -> str:
    told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    labelled = f"spec_ctrl_probe_{name}{{{told}}}" if told else f"spec_ctrl_probe_{name}"
    return f"{labelled} {value:g}" if value < 1e6 else f"{labelled} {value:.0f}"


def _escaped(text: str) -> str:
    return clean(text).replace("\\", r"\\").replace('"', r"\"")
