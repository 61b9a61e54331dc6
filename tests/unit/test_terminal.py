# SPDX-License-Identifier: MIT
"""Reports on a terminal: they fit its window, have colour where it helps, and neither anywhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import copy_context
from pathlib import Path

import pytest

from probe import kvm_record
from probe.report import kvm_text, text
from probe.report.layout import narrow
from probe.report.terminal import coloured
from tests.unit.test_report import GOLDEN as RUNS

ROOT = Path(__file__).parents[2]
GUEST = "results/modelled-threadripper-3970x/kvm-5.6-guest.json"


@pytest.mark.parametrize("name", sorted(RUNS))
@pytest.mark.parametrize("columns", [20, 30, 40, 50, 75, 200])
def test_a_report_fits_the_window_and_loses_no_word(name: str, columns: int) -> None:
    def narrowed() -> str:
        narrow(columns)
        return text.render(RUNS[name]())

    report = text.render(RUNS[name]())
    fitted = copy_context().run(narrowed)
    assert all(len(line) <= min(columns, 75) for line in fitted.splitlines())
    assert "".join(fitted.split()) == "".join(report.split())
    assert columns < 75 or fitted == report
    assert text.render(RUNS[name]()) == report, "what one caller asks for is no other's"


KVM = next((ROOT / "results/debian-kernels-nested/zen2-client").glob("*-kvm-7.2*.json"))


def in_window(columns: int, report: Callable[[], str]) -> list[str]:
    """Lay a report out for a window."""

    def narrowed() -> str:
        narrow(columns)
        return report()

    return copy_context().run(narrowed).splitlines()


def words(lines: Iterable[str], most: int) -> Counter[str]:
    """Count the words that are no longer than so many characters; what is longer may have to be broken."""
    return Counter(word for line in lines for word in re.split(r"[\s,/+@.-]+", line) if 2 < len(word) <= most)


@pytest.mark.parametrize("columns", [25, 30, 40, 50, 60])
@pytest.mark.parametrize("name", [*sorted(RUNS), "kvm"])
def test_no_word_is_broken_in_a_narrow_window(name: str, columns: int) -> None:
    def report() -> str:
        if name == "kvm":
            return kvm_text.render(kvm_record.decode(KVM.read_bytes(), KVM.name), rows=1 << 30)
        return text.render(RUNS[name]())

    most = columns - 5
    lines = in_window(columns, report)
    assert not words(report().splitlines(), most) - words(lines, most)
    assert max(map(len, lines)) <= columns
    assert len(lines) < 9 * 75 / columns + 3.2 * 75 / columns * len(report().splitlines())


def test_a_matrix_at_40_columns_stacks_the_divergence_below_its_model() -> None:
    lines = in_window(40, lambda: kvm_text.render(kvm_record.decode(KVM.read_bytes(), KVM.name)))
    assert len(lines) < 400
    at = next(number for number, line in enumerate(lines) if line.startswith("kvm-6.14-svm"))
    assert lines[at : at + 3] == [
        "kvm-6.14-svm        204330  99.3 %",
        "    profile AMD_IBPB,AMD_STIBP,AMD_SSBD;",
        "    guest-wr 0x48 0x100000000 -> ok;",
    ]


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (64, ["*1        STIBP          accepts    fault      unexpected fault"]),
        (50, ["*1       STIBP       accepts   fault", "    unexpected fault"]),
        (40, ["*1       STIBP       accepts   fault", "    unexpected fault"]),
        (32, ["*1       STIBP       accepts", "    fault unexpected fault"]),
    ],
)
def test_a_row_of_bits_stacks_its_last_column(columns: int, rows: list[str]) -> None:
    lines = in_window(columns, lambda: text.render(RUNS["july-2020-guest"]()))
    at = next(number for number, line in enumerate(lines) if line.startswith("*1 "))
    assert lines[at : at + len(rows)] == rows
    assert any(re.match(r" bit +name +predicted( +observed)?( +verdict)?$", line) for line in lines)


@pytest.mark.parametrize("columns", [25, 40, 60, 80])
def test_the_catalogue_of_models_fits_the_window(columns: int) -> None:
    lines = on_a_terminal("models", columns=columns).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= columns
    wide = on_a_terminal("models", columns=200).replace("\r", "").splitlines()
    assert not words(wide, columns - 5) - words(lines, columns - 5)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_colour_changes_no_text(name: str) -> None:
    report = text.render(RUNS[name]())
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured(report)) == report


def test_colour_is_where_it_helps() -> None:
    found = coloured(text.render(RUNS["july-2020-guest"]()))
    assert re.search(r"\x1b\[1;31m1 finding\x1b\[0m", found)
    assert re.search(r"\x1b\[31m\*1 +STIBP .*\x1b\[0m", found)
    assert "\x1b[32m as predicted\x1b[0m" in found
    assert "\x1b[1;31mNOT PUT BACK" in coloured(text.render(RUNS["not-put-back"]()))


@pytest.mark.parametrize(
    "line",
    [
        "1 change",
        "5 changes; 6 things around it differ",
        "a, KVM: 2 changes; 3 things",
        "1 pair: 1 different",
        "1 different; 2 files",
    ],
)
def test_a_headline_of_changes_is_red_whatever_stands_beside_it(line: str) -> None:
    assert re.search(r"\x1b\[1;31m[125] (changes?|different)\x1b\[0m", coloured(line))
    assert "\x1b" not in coloured("40 pairs of records: 40 the same, 0 different")


def on_a_terminal(*command: str, columns: int = 100, **more: str) -> str:
    """Run a command with a terminal as standard output, and return what it printed."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **more}
    environment.pop("NO_COLOR", None) if "NO_COLOR" not in more else None
    done = subprocess.Popen(
        [sys.executable, "-m", "probe", *command], stdout=theirs, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
    )
    os.close(theirs)
    printed = b""
    try:
        while piece := os.read(ours, 65536):
            printed += piece
    except OSError:  # the other end is closed
        pass
    done.wait()
    os.close(ours)
    return printed.decode()


def test_a_terminal_gets_colour_and_its_width() -> None:
    assert "\x1b[31m" in on_a_terminal("show", GUEST)
    assert "\x1b" not in on_a_terminal("show", GUEST, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal("show", GUEST, TERM="dumb")
    narrow = on_a_terminal("diff", GUEST, GUEST, columns=40, NO_COLOR="1")
    assert max(map(len, narrow.splitlines())) <= 40
    assert "\x1b" not in on_a_terminal("export", "--format", "ktap", GUEST), "what others read has none"


def test_a_pipe_gets_neither() -> None:
    command = [sys.executable, "-m", "probe", "show", GUEST]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "30"}
    )
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) == 75
