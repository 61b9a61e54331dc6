# SPDX-License-Identifier: MIT
"""JUnit XML, by junitparser (extra "report"): what Jenkins, GitLab and their kin show."""

from __future__ import annotations

from collections.abc import Sequence

from junitparser import Error, Failure, JUnitXml, Properties, Property, Skipped, TestCase, TestSuite

from probe.cases import Case, Report, Status, Suite, title_of
from probe.report import circumstances
from probe.report.layout import clean


def render(reports: Sequence[Report]) -> str:
    """Return one testsuite for each suite of each record, with the record's circumstances as its properties."""
    xml = JUnitXml("spec-ctrl-probe")
    for report in reports:
        for suite in report.suites:
            xml.add_testsuite(_suite(report, suite))
    xml.update_statistics()
    return f"<?xml version='1.0' encoding='utf-8'?>\n{_indented(xml)}\n"


def _indented(xml: JUnitXml) -> str:
    return str(xml.tostring().decode("utf-8")).replace("><", ">\n<")


def _suite(report: Report, suite: Suite) -> TestSuite:
    found = TestSuite(f"{report.kind}_{report.name}.{suite.name}")
    found.timestamp = report.record.started.rstrip("Z")
    properties = Properties()
    kernel, machine = report.record.kernel, report.record.machine
    microcode = ", ".join(one.revision for one in machine.microcode) or "unknown"
    more = [(name, value) for name, value in circumstances.of(report).items() if value]
    about = (("record", title_of(report)), ("suite", suite.title), ("kernel", f"{kernel.release} {kernel.version}"))
    for name, value in (*about, ("microcode", microcode), ("tool", report.record.tool.version), *more):
        properties.add_property(Property(name, _xml(value)))
    found.append(properties)
    for case in suite.cases:
        found.add_testcase(_case(report, suite, case))
    return found


def _case(report: Report, suite: Suite, case: Case) -> TestCase:
    found = TestCase(case.name, f"spec_ctrl_probe.{report.kind}.{report.name}.{suite.name}", 0)
    kinds = {Status.FAIL: Failure, Status.ERROR: Error, Status.SKIP: Skipped}
    if case.status in kinds:
        found.result = [kinds[case.status](_xml(case.reason))]
    elif case.reason:
        found.system_out = _xml(case.reason)
    return found


def _xml(text: str) -> str:
    """Leave out what XML 1.0 cannot hold."""
    return clean(text)
