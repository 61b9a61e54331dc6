# SPDX-License-Identifier: MIT
"""Which kernels a model stands for, and which kernel this is. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

Release = tuple[int, int, int]
_RELEASE = re.compile(r"(\d{1,3})\.(\d{1,3})(?:\.(\d{1,4}))?")
_DEBIAN = re.compile(r"\bDebian (\d{1,3})\.(\d{1,3})\.(\d{1,4})-")


@dataclass(frozen=True)
class Versions:
    """A range of mainline versions, from first up to but without before (None: still so), and of stable branches.

    branches are (major, minor, sublevel): that branch from that sublevel on, because the change was backported.
    """

    first: tuple[int, int] | None = None
    before: tuple[int, int] | None = None
    branches: tuple[Release, ...] = ()

    def sublevel(self, release: Release) -> int | None:
        """Return the sublevel from which on this stands for the release: 0 by the range; None if it does not."""
        found = [low for major, minor, low in self.branches if (major, minor) == release[:2] and low <= release[2]]
        if found:
            return max(found)
        inside = self.first is not None and self.first <= release[:2] and (not self.before or release[:2] < self.before)
        return 0 if inside else None


NEVER = Versions()


def release_of(release: str, version: str) -> Release | None:
    """Read which kernel this is from `uname -r` and `uname -v`; None if neither tells.

    Debian's release has no sublevel ("6.1.0-56-amd64"), its version has ("... Debian 6.1.192-2 (2026-11-16)").
    """
    match = _DEBIAN.search(version) or _RELEASE.match(release)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
