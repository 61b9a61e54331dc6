# SPDX-License-Identifier: MIT
"""b4 itself runs b4-check: on a real mailbox, checked out for review, as the key c of `b4 review tui` does.

b4 is GPL-2.0-or-later and stays in processes of its own. What is not executed: the screens of its TUI (a class takes
their place and keeps what they would show), and its way to lore.kernel.org (the thread is in the review branch).
Source: b4 0.16.0, b4/review_tui/_common.py, CheckRunnerMixin; b4/review/_review.py, create_review_branch().
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from probe import kvm_record

ROOT = Path(__file__).parents[2]
NESTED = ROOT / "results/debian-kernels-nested/zen2-client"
OLD, NEW = (next(NESTED.glob(f"*-kvm-{release}*.json")) for release in ("6.1.0", "7.2"))
TOOL = "spec-ctrl-probe"

pytestmark = [
    pytest.mark.skipif(
        not (importlib.util.find_spec("b4") and importlib.util.find_spec("textual")),
        reason="no b4 here with its review (pip install 'b4>=0.15' textual; it needs Python 3.11)",
    ),
    pytest.mark.skipif(not shutil.which("git"), reason="no git here"),
]

DRIVER = r"""
import io, json, os, sys
import b4, b4.command, b4.review, b4.review.checks, b4.review.tracking
from b4.review_tui import _common

what, mailbox, change_id = sys.argv[1:]
b4.can_network = False
b4.setup_config(b4.command.setup_parser().parse_args(["--offline-mode", "review", "tui"]))
top = b4.git_get_toplevel()
messages = b4.get_msgs_from_mailbox_or_maildir(mailbox)
series = b4.review._review._get_lore_series(messages)
first = b4.review._review.get_reference_message(series)

class Screens(_common.CheckRunnerMixin):
    _check_loading = None
    shown = None

    class app:
        @staticmethod
        def call_from_thread(work, *args, **kwargs):
            return work(*args, **kwargs)

    def notify(self, message, *, severity=""):
        sys.exit(f"{severity}: {message}")

    def push_screen(self, screen, callback=None):
        self.shown = screen

if what == "checkout":
    ready = io.BytesIO()
    b4.save_git_am_mbox(series.get_am_ready(noaddtrailers=True), ready)
    b4.git_fetch_am_into_repo(top, ambytes=ready.getvalue(), at_base=series.base_commit, am_flags=["-3"])
    b4.review.create_review_branch(
        top, f"b4/review/{change_id}", series.base_commit, series, f"https://example.org/{first.msgid}",
        "https://example.org/%s",
    )
    assert b4.review.tracking._store_thread_blob(top, change_id, messages)
    print("{}")
else:
    screens = Screens()
    known = change_id if what != "untracked" else ""
    if not known:  # the thread would come from lore
        _common.get_thread_msgs = lambda *args, **kwargs: messages
    _common.worker_cancelled = lambda: False  # there is no worker of Textual
    screens._fetch_and_check(first.msgid, first.subject, change_id=known, force=what == "again")
    with b4.review.checks.get_db() as database:
        kept = b4.review.checks.get_cached_results(database, [one.msgid for one in series.patches if one])
    shown = [[number, tool, cell["status"]] for (number, tool), cell in screens.shown._matrix.items()]
    print(json.dumps({"kept": kept, "shown": shown}))
"""


@dataclass
class Lab:
    """A kernel's repository, a series of two patches in a mailbox, records, and a home of its own for b4."""

    folder: Path
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def tree(self) -> Path:
        return self.folder / "linux"

    @property
    def records(self) -> Path:
        return self.folder / "records of the lab"

    def environment(self, **more: str) -> dict[str, str]:
        """Commits of the author have a date, those that b4 makes have the time of day, and so other hashes."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "XDG_", "B4_"))}
        names = {f"GIT_{who}_{part}": text for who in ("AUTHOR", "COMMITTER") for part, text in NAMED.items()}
        return {**own, **names, "HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1", "PYTHONPATH": str(ROOT), **more}

    def git(self, *words: str) -> str:
        done = subprocess.run(
            ["git", *words],
            cwd=self.tree,
            env=self.environment(GIT_COMMITTER_DATE=DATE),
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def commit(self, name: str, path: str, text: str) -> None:
        (self.tree / path).parent.mkdir(parents=True, exist_ok=True)
        (self.tree / path).write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", f"KVM: x86: {name}\n\nIt does what it says.\n\nSigned-off-by: {SIGNED}")
        self.commits[name] = self.git("rev-parse", "HEAD")

    def configure(self, kind: str, *options: str) -> None:
        words = [sys.executable, "-m", "probe", "b4-check", str(self.records), *options]
        self.git("config", "--add", f"b4.review-{kind}-check-cmd", shlex.join(words))

    def b4(self, what: str) -> Any:
        """Let b4 do something, and return what it prints."""
        command = [sys.executable, "-c", DRIVER, what, str(self.folder / "series.mbox"), CHANGE]
        done = subprocess.run(
            command, cwd=self.tree, env=self.environment(), check=False, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    def check(self, what: str = "check") -> dict[str, Any]:
        """Let b4 run its checks; return what it keeps of the cover letter, which it shows as the first row."""
        said = self.b4(what)
        kept = [one for key, some in said["kept"].items() for one in some if key == COVER]
        assert [[0, one["tool"], one["status"]] for one in kept] == [row for row in said["shown"] if row[0] == 0]
        return kept[0] if kept else {}

    def record(self, name: str, source: Path, commit: str) -> None:
        record = kvm_record.decode(source.read_bytes(), source.name)
        record.kernel.release = f"6.19.0-rc1-00002-g{commit[:12]}"
        self.records.mkdir(exist_ok=True)
        (self.records / name).write_bytes(kvm_record.encode(record))


NAMED = {"NAME": "A Developer", "EMAIL": "developer@example.org"}
DATE = "2026-11-20T12:00:00Z"
SIGNED = f"{NAMED['NAME']} <{NAMED['EMAIL']}>"
CHANGE = "20261120-spec-ctrl-0123456789ab"
COVER = "cover.1@example.org"
FILE = "arch/x86/kvm/x86.c"
CODE = "".join(f"int line_{number};\n" for number in range(40))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path)
    lab.tree.mkdir()
    lab.records.mkdir()
    lab.git("init", "-q", "-b", "master")
    lab.git("config", "user.name", NAMED["NAME"])
    lab.git("config", "user.email", NAMED["EMAIL"])
    lab.commit("base", FILE, CODE)
    lab.commit("one", FILE, CODE.replace("int line_3;", "long line_3;"))
    lab.commit("two", FILE, CODE.replace("int line_3;", "long line_3;").replace("int line_30;", "long line_30;"))
    out = tmp_path / "out"
    options = ["--cover-letter", f"--base={lab.commits['base']}", "--thread=shallow", "-o", str(out)]
    lab.git("format-patch", "-q", *options, f"{lab.commits['base']}..")
    text = "".join(path.read_text() for path in sorted(out.iterdir()))
    text = text.replace("*** SUBJECT HERE ***", "KVM: x86: count longer").replace("*** BLURB HERE ***", "Two patches.")
    cover = next(line for line in text.splitlines() if line.lower().startswith("message-id: "))
    (tmp_path / "series.mbox").write_text(text.replace(cover[len("Message-ID: <") : -1], COVER))
    lab.git("reset", "-q", "--hard", lab.commits["base"])
    lab.configure("series")
    return lab


def reviewed(lab: Lab) -> str:
    """Check the series out for review; return the commit of its last patch, which git am made anew."""
    lab.b4("checkout")
    lab.git("checkout", "-q", "master")
    return lab.git("rev-parse", f"b4/review/{CHANGE}~1")


def test_b4_keeps_that_nothing_moved(lab: Lab) -> None:
    tip = reviewed(lab)
    lab.record("before.json", OLD, lab.commits["base"])
    lab.record("after.json", OLD, tip)
    said = lab.check()
    assert (said["tool"], said["status"]) == (TOOL, "pass")
    assert said["summary"] == "nothing moved: 245 guest CPUIDs x 64 bits, 1 pair of records, 1 machine"
    assert "before.json" in said["details"]


def test_b4_keeps_what_moved(lab: Lab) -> None:
    tip = reviewed(lab)
    lab.record("before.json", OLD, lab.commits["base"])
    lab.record("after.json", NEW, tip)
    said = lab.check()
    assert said["status"] == "warn"
    assert said["summary"].startswith("moved: explained by: kvm-6.1-svm -> kvm-6.19-svm, and 4 changes more")
    assert "guest write of IA32_PRED_CMD: bit 0: accepted -> #GP" in said["details"]


@pytest.mark.parametrize("built_from", ["the author's branch", "the review branch, with b4's own commit"])
def test_a_commit_with_the_same_sources_is_the_same_kernel(lab: Lab, built_from: str) -> None:
    tip = reviewed(lab)
    commit = lab.commits["two"] if "author" in built_from else lab.git("rev-parse", f"b4/review/{CHANGE}")
    assert commit != tip
    lab.record("before.json", OLD, lab.commits["base"])
    lab.record("after.json", OLD, commit)
    assert lab.check()["status"] == "pass"


def test_b4_keeps_an_answer_until_it_is_asked_again(lab: Lab) -> None:
    tip = reviewed(lab)
    said = lab.check()
    assert (said["status"], said["summary"]) == ("warn", "no record of this series' kernel")
    assert said["details"].count(f"{FILE}: KVM on x86") == 1
    assert tip[:12] in said["details"]
    lab.record("before.json", OLD, lab.commits["base"])
    lab.record("after.json", OLD, tip)
    assert lab.check() == said
    assert lab.check("again")["status"] == "pass"


def test_a_series_that_is_not_checked_out(lab: Lab) -> None:
    lab.record("before.json", OLD, lab.commits["base"])
    said = lab.check("untracked")
    assert said["status"] == "warn"
    assert said["summary"] == "no record of this series' kernel: its commits are not known"


def test_each_patch(lab: Lab) -> None:
    lab.git("config", "--unset-all", "b4.review-series-check-cmd")
    lab.configure("perpatch", "--per-patch")
    tip = reviewed(lab)
    lab.record("base.json", OLD, lab.commits["base"])
    lab.record("one.json", OLD, lab.git("rev-parse", f"{tip}^"))
    lab.record("two.json", NEW, tip)
    said = lab.b4("check")
    assert said["shown"] == [[1, f"{TOOL} patch", "pass"], [2, f"{TOOL} patch", "warn"]]


def test_an_error_is_what_b4_shows_as_one(lab: Lab) -> None:
    reviewed(lab)
    lab.records.rmdir()
    said = lab.check()
    assert said["status"] == "fail"
    assert said["summary"] == "exited with error code 3"
    assert said["details"].startswith("spec-ctrl-probe: no file or folder ")
    assert said["details"].count("\n") == 0
