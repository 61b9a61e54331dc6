# SPDX-License-Identifier: MIT
"""Run a piece of a test without root's powers, whoever runs the tests."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

NOBODY = 65534


@contextlib.contextmanager
def readable_folder() -> Iterator[Path]:
    """Give a folder that everybody may enter and only its owner may write to; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(act: Callable[[], str]) -> str:
    """Return what act() returns as user 65534 in a child process; if we are not root, as who we are."""
    if os.geteuid() != 0:
        return act()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            try:
                said = act()
            except BaseException:
                said = traceback.format_exc()
            os.write(write_end, said.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said
