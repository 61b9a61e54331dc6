# SPDX-License-Identifier: MIT
"""python -m probe."""

from probe.cli import entry

entry()
