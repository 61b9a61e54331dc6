# SPDX-License-Identifier: MIT
"""What it takes to compare two records, and to write, open and filter a page of many rows."""

from __future__ import annotations

import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from probe import kvm_record
from probe import record as rec
from probe.masks import ALL_BITS, hex64
from probe.models.matrix import CELLS
from probe.models.profile import ALL_FEATURES, Profile
from tests.bench.figures import figure, note
from tests.unit.test_report import every_cpu_differs

TOP = Path(__file__).resolve().parents[2]
BASE = next((TOP / "results/debian-kernels-nested/zen2-client").glob("*-kvm-7.2*.json"))
FILTER = """() => { const search = document.querySelector("input[type=search]"); const start = performance.now();
search.value = "AMD_STIBP"; search.dispatchEvent(new Event("input")); document.body.offsetHeight;
return performance.now() - start; }"""
OPENED = "() => performance.getEntriesByType('navigation')[0].loadEventEnd"


def scattered(rows: int, seed: int, bits: int = ALL_BITS) -> kvm_record.KvmRecord:
    """A matrix in which every guest CPUID gave something else, at random, of these bits, and no model is right."""
    record = kvm_record.decode(BASE.read_bytes(), BASE.name)
    draw = random.Random(seed)
    record.rows = [
        kvm_record.RowEntry(
            profiles=[str(Profile(mask))],
            opener=hex64(1),
            cells={cell.name: hex64(draw.getrandbits(64) & bits) for cell in CELLS},
        )
        for mask in draw.sample(range(ALL_FEATURES + 1), rows)
    ]
    return record


def evidence_figures(best: Callable[..., float]) -> None:
    """Measure as whole processes; the page in Chromium, if it is here."""
    python = [sys.executable, "-m", "probe"]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for name, seed in (("a", 1), ("b", 2)):
            (folder / f"{name}.json").write_bytes(kvm_record.encode(scattered(300, seed)))
        size = (folder / "a.json").stat().st_size / 1024
        command = [*python, "diff", str(folder / "a.json"), str(folder / "b.json")]
        figure(f"diff, two records of {size:.0f} KiB", best(command, 5, fails=True) / 1000, 0.3, "s")
        (folder / "large.json").write_bytes(kvm_record.encode(scattered(4096, 1)))
        page = folder / "page.html"
        command = [*python, "html", str(folder / "large.json"), "-o", str(page), "--force"]
        seconds = best(command, 3) / 1000
        rows = re.findall(r'data-rows="(\d+)"', page.read_text(encoding="utf-8"))
        assert rows == ["4096"], rows
        figure("html, 4,096 rows that all differ", seconds, 2, "s")
        figure("html, 4,096 rows: the page", page.stat().st_size / (1 << 20), 2, "MiB")
        _in_chromium(page)
        (folder / "run.json").write_bytes(rec.encode(every_cpu_differs(4096)))
        command = [*python, "html", str(folder / "run.json"), "-o", str(page), "--force"]
        figure("html, a run of 4,096 CPUs that all differ", best(command, 3) / 1000, 2, "s")
        command = [*python, "show", str(folder / "run.json"), "--format", "mail"]
        figure("show --format mail, the same run", best(command, 3) / 1000, 2, "s")


def _in_chromium(page: Path) -> None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        note(f"page in Chromium: not run: {error}", 0, "")
        return
    flags: Sequence[str] = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(flags))
        tab = browser.new_page()
        tab.goto(page.as_uri())
        opened = []
        for _ in range(5):
            tab.goto(page.as_uri())
            opened.append(tab.evaluate(OPENED))
        figure("page of 4,096 rows, opened in Chromium", min(opened), 200, "ms")
        figure("page of 4,096 rows, filtered in Chromium", min(tab.evaluate(FILTER) for _ in range(5)), 200, "ms")
        browser.close()
