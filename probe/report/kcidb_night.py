# SPDX-License-Identifier: MIT
"""A night as KCIDB JSON, schema version 5.3: one test for each machine, its masks as text in misc.

64 tests a machine would be 241 MB a night for 5,000 of them. What a machine's newest record of the night says is told;
one that gave none is ERROR, or MISS if it was never reached.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from probe.nights import Row
from probe.report.kcidb import identifier
from probe.report.layout import clean

_STATUS = {"pass": "PASS", "fail": "FAIL", "skip": "SKIP", "error": "ERROR"}
_MASKS = ("accepts", "retained", "faults", "unmeasured", "wrong", "odd")
_UNKNOWN = "not known: no record came"


def render(rows: Sequence[Row], origin: str) -> str:
    """Return checkouts, builds and tests; origin is the lab's name with KCIDB, of a-z, 0-9 and "_"."""
    machines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        machines.setdefault((row.host, row.kind), []).append(row)
    builds: dict[str, str] = {}
    tests = []
    for (host, kind), theirs in sorted(machines.items()):
        lost = next((row for row in theirs if row.lost), None)
        newest = max(row.started for row in theirs)
        shown = [lost] if lost else [row for row in theirs if row.started == newest]
        kernel = shown[0].kernel or _UNKNOWN
        build = f"{origin}:{identifier(kernel)}"
        builds[build] = kernel
        tests.append(_test(host, kind, shown, origin, build))
    document = {
        "version": {"major": 5, "minor": 3},
        "checkouts": [{"id": one, "origin": origin, "comment": clean(name)} for one, name in builds.items()],
        "builds": [
            {"id": one, "checkout_id": one, "origin": origin, "architecture": "x86_64", "comment": clean(name)}
            for one, name in builds.items()
        ],
        "tests": tests,
    }
    return json.dumps(document, indent=1) + "\n"


def _test(host: str, kind: str, rows: Sequence[Row], origin: str, build: str) -> dict[str, Any]:
    first = rows[0]
    platform = clean(host)
    test: dict[str, Any] = {
        "id": f"{origin}:{identifier(first.night + kind + host)}",
        "origin": origin,
        "build_id": build,
        "path": f"spec_ctrl_probe.{kind}",
        "environment": {"misc": {"platform": platform}},
    }
    if first.lost:
        test["status"] = "MISS" if first.lost.startswith(("not reached", "it said nothing")) else "ERROR"
        test["log_excerpt"] = clean(first.lost)
        return test
    test["status"] = next(_STATUS[one] for one in ("error", "fail", "pass", "skip") if one in {r.status for r in rows})
    test["start_time"] = first.started.replace("Z", "+00:00")
    cpu = f"{first.vendor} {first.family:02x}-{first.model:02x}-{first.stepping:02x} microcode {first.microcode}"
    test["environment"]["comment"] = clean(f"{cpu} {first.hypervisor and 'guest of ' + first.hypervisor}".rstrip())
    groups = [{"cpus": row.cpus, **{name: f"{getattr(row, name):#018x}" for name in _MASKS}} for row in rows]
    test["misc"] = {"spec_ctrl": {"groups": groups, "record_sha256": first.sha256}}
    if first.findings:
        test["log_excerpt"] = clean(first.findings)
    return test
