# SPDX-License-Identifier: MIT
"""Tiers: a test that this machine cannot hold is skipped with a reason, and the summary says so, one line a tier.

PROBE_REQUIRE=boot,kvm turns such a skip into a failure. --update-golden rewrites the whole files in tests/golden.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from probe.errors import RequirementMissing

GOLDEN = Path(__file__).parent / "golden"


def _boot() -> str:
    from kernel_harness.boot import guest

    try:
        guest.check_requirements()
    except RequirementMissing as error:
        return str(error)
    return ""


def _kvm() -> str:
    from kernel_harness.kvm.machine import Kvm

    try:
        with Kvm():
            return ""
    except RequirementMissing as error:
        return str(error)


def _browser() -> str:
    import shutil

    if not shutil.which("chromium"):
        return "no chromium (apt-get install chromium)"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError as error:
        return f"{error} (pip install 'spec-ctrl-probe[browser]')"
    return ""


def _lab() -> str:
    from tests.live import lab_hosts

    return lab_hosts.lacks()


# What a tier needs: a function that returns why it cannot run here, or "".
TIERS: dict[str, Callable[[], str]] = {"boot": _boot, "kvm": _kvm, "browser": _browser, "lab": _lab}
_missing: dict[str, str] = {}
_counts: dict[str, dict[str, int]] = {}


def tier_of(item: pytest.Item) -> str:
    return next((name for name in TIERS if item.get_closest_marker(name)), "unit")


def pytest_configure() -> None:
    """Undo that a shell, or nohup, lets what it starts in the background ignore signals: tests send them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code prints")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for name in {tier_of(item) for item in items} - {"unit"}:
        _missing[name] = TIERS[name]()
    for item in items:
        why = _missing.get(tier_of(item), "")
        if why and tier_of(item) not in os.environ.get("PROBE_REQUIRE", "").split(","):
            item.add_marker(pytest.mark.skip(reason=f"tier {tier_of(item)} cannot run here: {why}"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    why = _missing.get(tier_of(item), "")
    if why:
        pytest.fail(f"tier {tier_of(item)} is required (PROBE_REQUIRE) and cannot run: {why}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":  # type: ignore[attr-defined]
        counts = _counts.setdefault(tier_of(item), {})
        counts[report.outcome] = counts.get(report.outcome, 0) + 1  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, counts in sorted(_counts.items(), reverse=True):
        why = _missing.get(name, "")
        said = f"not run: {why}" if why and "passed" not in counts else ""
        said = said or ", ".join(f"{number} {word}" for word, number in sorted(counts.items()))
        terminalreporter.write_line(f"tier {name}: {said}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with a whole file of tests/golden; with --update-golden write it instead."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {name}: run pytest --update-golden and look at the diff"
        assert text == path.read_text(encoding="utf-8")

    return compare
