# SPDX-License-Identifier: MIT
"""Which kernels a model stands for, and which kernel this is. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

Release = tuple[int, int, int]
_RELEASE = re.compile(r"(\d{1,3})\.(\d{1,3})(?:\.(\d{1,4}))?")
_VENDORS = re.compile(r"\d+\.\d+\.0-\d")
_DEBIAN = re.compile(r"\bDebian (\d{1,3})\.(\d{1,3})\.(\d{1,4})-")


# Branches that took some of KVM's changes and not others, at points that no model here speaks of (5.4.87 took the mask
# of v5.6 and the gate of v5.11; 5.4.102 the hardware test): only a model that names the branch stands for them.
_MANY_BACKPORTS = ((4, 14), (4, 16), (4, 17), (4, 18), (4, 19), (5, 4), (5, 7), (5, 8))


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
        if release[2] and release[:2] in _MANY_BACKPORTS:
            return None
        inside = self.first is not None and self.first <= release[:2] and (not self.before or release[:2] < self.before)
        return 0 if inside else None


NEVER = Versions()


def release_of(release: str, version: str) -> Release | None:
    """Read which kernel this is from `uname -r` and `uname -v`; None if neither tells.

    Debian's release has no sublevel ("6.1.0-56-amd64"), its version has ("... Debian 6.1.192-2 (2026-11-16)"). Where a
    number follows ("5.15.0-91-generic", "4.18.0-553.el8") the 0 is the vendor's, and what it is made of not told.
    """
    match = _DEBIAN.search(version)
    if match is None and not _VENDORS.match(release):
        match = _RELEASE.match(release)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
