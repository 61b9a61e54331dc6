# SPDX-License-Identifier: MIT
"""The first thing that runs in the agent's file: any Python can read it, so that it can say which one it needs."""

import sys

if sys.version_info < (3, 9):
    sys.stderr.write("spec-ctrl-probe: Python %d.%d is too old (give python3.9 or newer)\n" % sys.version_info[:2])
    sys.exit(4)

from agent_start import main

main()
