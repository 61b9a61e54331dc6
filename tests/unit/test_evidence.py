# SPDX-License-Identifier: MIT
"""The files of results/evidence are what the commands beside them in results/README.md print today.

--update-golden rewrites them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from probe.cli import main

RESULTS = Path("results")
EVIDENCE = RESULTS / "evidence"
OLD, NEW = (
    str(next((RESULTS / "debian-kernels-nested/zen2-client").glob(f"*-kvm-{release}*.json")))
    for release in ("6.1.0", "7.2")
)
GUEST, METAL = (str(RESULTS / "modelled-threadripper-3970x" / f"{name}.json") for name in ("kvm-5.6-guest", "metal"))
COMMANDS = {
    "diff-6.1-to-7.2.txt": ["diff", OLD, NEW],
    "diff-6.1-to-7.2.mail.txt": ["diff", OLD, NEW, "--format", "mail"],
    "kvm-5.6-guest.mail.txt": ["show", GUEST, "--format", "mail"],
    "kvm-7.2.mail.txt": ["show", NEW, "--format", "mail"],
    "kvm-5.6-guest.ktap": ["export", "--format", "ktap", GUEST],
    "kvm-5.6-guest.xml": ["export", "--format", "junit", GUEST],
    "kvm-5.6-guest.kcidb": ["export", "--format", "kcidb", GUEST],
    "kvm-5.6-guest.prom": ["export", "--format", "prometheus", GUEST],
    "kvm-5.6-guest.md": ["export", "--format", "markdown", GUEST],
    "kvm-5.6-guest.csv": ["export", "--format", "csv", GUEST],
    "kernels-6.1-and-7.2.html": ["html", OLD, NEW],
    "threadripper-3970x.html": ["html", GUEST, METAL],
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_evidence_is_of_today(name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMANDS[name]) in (0, 1)
    printed = capsys.readouterr().out
    path = EVIDENCE / name
    if request.config.getoption("--update-golden"):
        path.write_text(printed, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == printed, "pytest --update-golden, then look at the diff"


def test_nothing_else_is_there() -> None:
    assert {path.name for path in EVIDENCE.iterdir()} == set(COMMANDS)
