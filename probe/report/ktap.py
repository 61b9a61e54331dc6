# SPDX-License-Identifier: MIT
"""KTAP version 1, as the kernel documents it (Documentation/dev-tools/ktap.rst): subtests by CPUs or guest CPUID."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from probe.cases import Case, Report, Status, Suite, title_of
from probe.report import circumstances
from probe.report.layout import clean


def render(reports: Sequence[Report]) -> str:
    """Return the whole output: each record is a subtest, its suites are subtests of that, their cases the tests."""
    lines = ["KTAP version 1", f"1..{len(reports)}"]
    for number, report in enumerate(reports, 1):
        lines += [f"  {line}" for line in _report(report)]
        lines.append(_result(number, f"{report.kind}_{report.name}", report.status, "nothing was measured"))
    return "\n".join(lines) + "\n"


def _report(report: Report) -> Iterator[str]:
    yield "KTAP version 1"
    yield f"# Subtest: {report.kind}_{report.name}"
    yield _said(title_of(report))
    yield from map(_said, [*circumstances.warnings(report.record), *circumstances.lines(report)])
    yield f"1..{len(report.suites)}"
    for number, suite in enumerate(report.suites, 1):
        for line in _suite(suite):
            yield f"  {line}"
        yield _result(number, suite.name, suite.status, "" if suite.status is not Status.SKIP else "nothing measured")


def _suite(suite: Suite) -> Iterator[str]:
    yield "KTAP version 1"
    yield f"# Subtest: {suite.name}"
    yield _said(suite.title)
    yield f"1..{len(suite.cases)}"
    for number, case in enumerate(suite.cases, 1):
        yield from _case(number, case)


def _case(number: int, case: Case) -> Iterator[str]:
    if case.reason and case.status is not Status.SKIP:
        yield _said(f"{case.name}: {case.reason}")
    yield _result(number, case.name, case.status, case.reason)


def _result(number: int, name: str, status: Status, reason: str) -> str:
    good = "ok" if status in (Status.PASS, Status.SKIP) else "not ok"
    skip = f" # SKIP {_plain(reason)}".rstrip() if status is Status.SKIP else ""
    return f"{good} {number} {name}{skip}"


def _said(text: str) -> str:
    return f"# {_plain(text)}"


def _plain(text: str) -> str:
    """Keep to one line; a "#" would begin a directive."""
    return clean(" ".join(text.split())).replace("#GP", "GP fault").replace("#", "no. ")
