# SPDX-License-Identifier: MIT
"""Print the agent's stream from a LAVA job's log, which comes on stdin as YAML (lavacli jobs logs --raw; PyYAML)."""

import sys

import yaml

for entry in yaml.load(sys.stdin, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or []:
    if entry.get("lvl") != "target":
        continue
    said = str(entry.get("msg"))
    if '{\\"event\\"' in said:  # LAVA 2023.01 puts a backslash before every quotation mark that the device prints
        said = said.replace('\\"', '"')
    # A kernel message without a line end may stand before it.
    _, mark, rest = said.partition('{"event"')
    if mark:
        print(mark + rest)
