# SPDX-License-Identifier: MIT
"""The edge to a kernel's git repository: which commits a series under review has, and which of them are alike.

Read only. Without git, or outside of a repository, every question has an empty answer.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from probe.b4_check import Message, Series, Tracking, is_commit, is_tag, named_by

_SECONDS = 30  # for each question; a repository on a network may hang
_MOST_COMMITS = 2000


class KernelTree:
    """A git repository, by any folder in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _ask(self, *words: str, text: str = "") -> list[str]:
        """Run git and return its lines; none if it is not there, fails, or takes too long."""
        command = ["git", "-C", str(self._folder), "-c", "core.quotePath=false", *words]
        try:
            done = subprocess.run(
                command,
                input=text.encode(),
                capture_output=True,
                check=False,
                timeout=_SECONDS,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"},
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        return done.stdout.decode("utf-8", "replace").splitlines() if done.returncode == 0 else []

    def branch(self, first: str, change_id: str) -> tuple[str, tuple[str, ...]]:
        """Return the commit below a review branch and those of its patches, in their order; "" and none if unknown.

        first is the commit of the first patch. The branch's last commit is b4's own: it has no change, but the state of
        the review as its message, and is made anew when that changes. Source: b4 0.16.0, create_review_branch().
        """
        if not first or not change_id:
            return "", ()
        reference = f"refs/heads/b4/review/{change_id}"
        limit = f"--max-count={_MOST_COMMITS}"
        lines = self._ask("rev-list", "--reverse", "--parents", limit, f"{first}^..{reference}", "--")
        commits = [line.split() for line in lines]
        if len(commits) < 2 or len(commits[0]) < 2 or commits[0][0] != first:
            return "", ()
        return commits[0][1], tuple(words[0] for words in commits[:-1])

    def trees(self, names: Iterable[str]) -> dict[str, str]:
        """Return the tree of each commit or tag that there is; of an abbreviation only if it is of one commit."""
        asked = list(dict.fromkeys(names))
        # of a tag: not of a branch or file that is called so
        full = [f"{name if is_commit(name) else f'refs/tags/{name}'}^{{tree}}\n" for name in asked]
        answers = self._ask("cat-file", "--batch-check=%(objecttype) %(objectname)", text="".join(full))
        if len(answers) != len(asked):
            return {}
        found = {name: answer.split() for name, answer in zip(asked, answers)}
        return {name: words[1] for name, words in found.items() if len(words) == 2 and words[0] == "tree"}

    def paths(self, before: str, after: str) -> tuple[str, ...]:
        """Return the files that differ between two commits."""
        if not is_commit(before) or not is_commit(after):
            return ()
        return tuple(self._ask("diff-tree", "-r", "--name-only", "--no-renames", before, after, "--"))


def series_of(
    tree: KernelTree, tracking: Tracking, message: Message, releases: Iterable[str], base: str = "", tip: str = ""
) -> Series:
    """Put together what git, b4 and the message know of a series; base and tip, if given, count before all of them.

    releases are those of the recorded kernels: what they name is looked up, too.
    """
    below, commits = tree.branch(tracking.first, tracking.change_id)
    base = base or below or tracking.base or message.base
    whole = True
    if tip:
        commits = (tip,)
    elif not commits and tracking.first:
        commits, whole = (tracking.first,), tracking.patches == 1
    wanted = (base, *commits, *(commit for _, commit in tracking.tips))
    names = [name for name in wanted if is_commit(name) or is_tag(name)]
    names += [name for name in map(named_by, releases) if name]
    paths = tree.paths(base, commits[-1]) if commits and whole else ()
    return Series(base, commits, whole, tracking.tips, paths, tree.trees(names))
