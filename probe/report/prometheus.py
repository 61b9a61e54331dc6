# SPDX-License-Identifier: MIT
"""Prometheus text format 0.0.4, for node_exporter's textfile collector: a few series a record, none a bit.

Timestamps are not allowed in textfiles, so when a record was made is a value of its own.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Sequence

from probe.cases import Report, Status
from probe.report.layout import clean

_METRICS = (
    ("last_run_timestamp_seconds", "When the record was made, seconds since 1970 UTC."),
    ("duration_seconds", "How long the run took."),
    ("cases", "Cases by how they ended: pass, fail, skip, error."),
    ("ok", "1 if nothing failed and something was measured, else 0."),
    ("info", "Always 1; kernel, microcode and tool as labels."),
)


def render(reports: Sequence[Report]) -> str:
    """Return the text; each series has the labels record and kind."""
    lines: list[str] = []
    for name, said in _METRICS:
        lines += [f"# HELP spec_ctrl_probe_{name} {said}", f"# TYPE spec_ctrl_probe_{name} gauge"]
        lines += [line for report in reports for line in _series(report, name)]
    return "\n".join(lines) + "\n"


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
        return [_line(name, {**labels, **about}, 1)]
    started = calendar.timegm(tuple(int(number) for number in re.findall("[0-9]+", record.started)))
    values = {
        "last_run_timestamp_seconds": started,
        "duration_seconds": record.duration,
        "ok": int(report.status is Status.PASS),
    }
    return [_line(name, labels, values[name])]


def _line(name: str, labels: dict[str, str], value: float) -> str:
    told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return (
        f"spec_ctrl_probe_{name}{{{told}}} {value:g}"
        if value < 1e6
        else f"spec_ctrl_probe_{name}{{{told}}} {value:.0f}"
    )


def _escaped(text: str) -> str:
    return clean(text).replace("\\", r"\\").replace('"', r"\"")
