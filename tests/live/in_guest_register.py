# SPDX-License-Identifier: MIT
"""Runs in a guest: drives /dev/cpu/N/msr over registers of our design and prints what happened as JSON.

Arguments: the module, then JSON: [[module arguments, steps], ...]; a step is ["read", cpu], ["write", cpu, value],
["poke", cpu, value], ["online", cpu, 0 or 1]. Answers per step: a value, "ok", or the errno's name.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MSR = 0x48
STATE = Path("/proc/spec_ctrl_model")


def step(action: str, cpu: int, value: int = 0) -> Any:
    try:
        if action == "poke":
            STATE.write_text(f"{cpu} {value:#x}")
        elif action == "online":
            Path(f"/sys/devices/system/cpu/cpu{cpu}/online").write_text(str(value))
        else:
            handle = os.open(f"/dev/cpu/{cpu}/msr", os.O_RDWR)
            try:
                if action == "read":
                    return int.from_bytes(os.pread(handle, 8, MSR), "little")
                os.pwrite(handle, value.to_bytes(8, "little"), MSR)
            finally:
                os.close(handle)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def main(module: str, cases: list[tuple[list[str], list[list[Any]]]]) -> None:
    subprocess.run(["modprobe", "msr"], check=True)
    answers = []
    for arguments, steps in cases:
        subprocess.run(["insmod", module, *arguments], check=True)
        results = [step(*each) for each in steps]
        answers.append({"results": results, "state": STATE.read_text()})
        subprocess.run(["rmmod", "spec_ctrl_model"], check=True)
    json.dump({"release": os.uname().release, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
