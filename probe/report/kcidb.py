# SPDX-License-Identifier: MIT
"""KCIDB JSON, schema version 5.3 (kcidb-io 8971c026): one test for each suite that counts, masks as text in misc.

Written by ourselves, since kcidb-io is GPL; the tests validate it with kcidb-io. A matrix's profiles are one test, not
hundreds: KCIDB is no place for a row a bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

from probe import kvm_record
from probe.cases import Report, Status, Suite, title_of, worst
from probe.masks import hex64, mask_of
from probe.report import circumstances
from probe.report.layout import clean

_STATUS = {Status.PASS: "PASS", Status.FAIL: "FAIL", Status.SKIP: "SKIP", Status.ERROR: "ERROR"}
_OF_TEST = ("not_hardware", "record_sha256")  # beside its masks: a test may be read without its environment
_MOST_LOG = 16_000  # the schema allows 16,384 characters


def render(reports: Sequence[Report], origin: str) -> str:
    """Return checkouts, builds and tests; origin is the lab's name with KCIDB, of a-z, 0-9 and "_"."""
    builds: dict[str, dict[str, Any]] = {}
    checkouts: dict[str, dict[str, Any]] = {}
    tests: dict[str, dict[str, Any]] = {}
    for report in reports:
        kernel = report.record.kernel
        build = f"{origin}:{identifier(kernel.release + kernel.version)}"
        checkouts.setdefault(build, {"id": build, "origin": origin, "comment": clean(kernel.release)})
        builds.setdefault(
            build,
            {
                "id": build,
                "checkout_id": build,
                "origin": origin,
                "architecture": "x86_64",
                "comment": clean(f"{kernel.release} {kernel.version}"),
            },
        )
        tests.update((test["id"], test) for test in _tests(report, origin, build))
    document = {
        "version": {"major": 5, "minor": 3},
        "checkouts": list(checkouts.values()),
        "builds": list(builds.values()),
        "tests": list(tests.values()),
    }
    return json.dumps(document, indent=2) + "\n"


def identifier(text: str) -> str:
    """Return what names something in an object's id."""
    return sha256(text.encode("utf-8", "replace")).hexdigest()[:20]


def _tests(report: Report, origin: str, build: str) -> Iterator[dict[str, Any]]:
    profiles = [suite for suite in report.suites if suite.name.startswith("profile_")]
    rest = [suite for suite in report.suites if suite not in profiles]
    for suite in rest:
        yield _test(report, origin, build, suite.name, suite.status, [suite])
    if profiles:
        status = worst(suite.status for suite in profiles)
        yield _test(report, origin, build, "profiles", status, profiles)


def _test(
    report: Report, origin: str, build: str, name: str, status: Status, suites: Sequence[Suite]
) -> dict[str, Any]:
    record = report.record
    machine = record.machine
    around = {key: clean(text) for key, text in circumstances.of(report).items() if text}
    whole = f"{report.kind}{report.name}{record.started}{name}{record.identity}"
    test = {
        "id": f"{origin}:{identifier(whole)}",
        "origin": origin,
        "build_id": build,
        "path": f"spec_ctrl_probe.{report.kind}.{name}",
        "status": _STATUS[status],
        "start_time": record.started.replace("Z", "+00:00"),
        "duration": float(record.duration),
        "environment": {
            "comment": clean("; ".join([*circumstances.warnings(record), title_of(report)])),
            "misc": {"platform": clean(record.identity or f"{machine.vendor}-{machine.signature}"), **around},
        },
        "misc": {"spec_ctrl": {**_masks(report, suites), **{key: around[key] for key in _OF_TEST if key in around}}},
    }
    said = [
        f"{suite.name}.{case.name}: {case.reason}" for suite in suites for case in suite.cases if _tells(case.status)
    ]
    if said:
        test["log_excerpt"] = clean("; ".join([*circumstances.warnings(record), *said]))[:_MOST_LOG]
    return test


def _tells(status: Status) -> bool:
    return status in (Status.FAIL, Status.ERROR)


def _masks(report: Report, suites: Sequence[Suite]) -> dict[str, Any]:
    """Return how many cases ended how; of a run the bits of each kind, of KVM the register's own answers."""
    cases = [case for suite in suites for case in suite.cases]
    found: dict[str, Any] = {status.value: sum(case.status is status for case in cases) for status in Status}
    if suites[0].name == "bits":
        for status in Status:
            found[f"{status.value}_bits"] = hex64(
                mask_of(bit for bit, case in enumerate(cases) if case.status is status)
            )
    elif isinstance(report.record, kvm_record.KvmRecord):
        hardware = report.record.hardware
        found["tested"] = hardware.tested
        if hardware.let_through:  # else nobody looked
            found |= {"valid": hardware.valid, "keep": hardware.keep}
        found["explained_by"] = list(report.record.explained_by)
    return found
