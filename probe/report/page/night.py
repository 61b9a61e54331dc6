# SPDX-License-Identifier: MIT
"""The page of a night: what changed, who is not there, every bit by CPU model and microcode, migration, findings."""

from __future__ import annotations

from collections.abc import Sequence

from probe.night import Night
from probe.nights import Row
from probe.report.night_text import verdict
from probe.report.page import heat
from probe.report.page.render import fill, mapped


def render(night: Night, rows: Sequence[Row], matrix: str) -> str:
    """Return the page's text; rows are the night's, matrix is the pool's (probe.report.migrate_text.matrix)."""
    map_ = heat.of_night(rows)
    findings: dict[tuple[str, str], list[str]] = {}
    for host, _, since, told in night.findings:
        findings.setdefault((since, told), []).append(host)
    return fill(
        "night.html.j2",
        night=night,
        verdict=verdict(night),
        section={"id": "night", **mapped("night", map_ if map_.rows else None), "reasons": []},
        matrix=matrix,
        findings=[(since, told, hosts) for (since, told), hosts in sorted(findings.items())],
    )
