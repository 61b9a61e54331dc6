# SPDX-License-Identifier: MIT
"""Run the agent on a labgrid target; its stream becomes OUT/PLACE.ndjson, which spec-ctrl-probe ingest takes.

OUT=out pytest --lg-env environment.yaml test_spec_ctrl_probe.py

The outcome is the agent's exit code: 0 passes, 4 skips, all others fail. Of a board that hangs, the stream so far is
kept; it is power-cycled if it has a driver for that, and what its journal says is added: the last step on its disk.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest
from labgrid import Target
from labgrid.driver import ExecutionError
from labgrid.exceptions import NoDriverFoundError, NoResourceFoundError
from labgrid.protocol import CommandProtocol, FileTransferProtocol, PowerProtocol
from labgrid.resource import RemotePlace

AGENT = "/var/tmp/spec-ctrl-probe.pyz"
SAID = "/var/tmp/spec-ctrl-probe.said"
JOURNAL = "/var/lib/spec-ctrl-probe/journal.ndjson"
MEANING = {1: "findings", 3: "the agent failed", 5: "a register was not put back"}


def option(target: Target, name: str, default: Any) -> Any:
    """Return an option of the target, as the environment has it."""
    return target.env.config.get_target_option(target.name, name, default)


@pytest.fixture
def stream(target: Target) -> Path:
    """Return the file for the stream: it has the place's name."""
    try:
        place = target.get_resource(RemotePlace, wait_avail=False).name
    except NoResourceFoundError:
        place = target.name
    out = Path(os.environ.get("OUT", "out"))
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{option(target, 'place', place)}.ndjson"


@pytest.fixture
def command(target: Target) -> Any:
    """Return the driver that runs commands, with the agent on the board."""
    if state := option(target, "state", ""):
        target.get_strategy().transition(state)
    target.get_driver(FileTransferProtocol).put(target.env.config.get_image_path("agent"), AGENT)
    return target.get_driver(CommandProtocol)


def events(lines: list[str]) -> str:
    """Return the lines that are events: a serial console mixes others in."""
    return "".join(f"{line}\n" for line in lines if line.startswith('{"ev'))


def bring_back(target: Target, command: Any) -> str:
    """Power-cycle the board, wait until it answers, and return its journal, or ""."""
    try:
        power = target.get_driver(PowerProtocol)
    except NoDriverFoundError:
        return ""
    power.cycle()
    target.deactivate(command)  # after that: a board that is up again ends ssh's old session, which else takes a minute
    end = time.monotonic() + option(target, "boot_timeout", 300)
    while True:
        try:
            target.activate(command)
            lines, _, code = command.run(f"cat {JOURNAL}")
        except Exception:  # drivers raise all sorts for a board that is not up yet
            if time.monotonic() > end:
                return ""
            time.sleep(1)
        else:
            return events(lines) if code == 0 else ""


def test_spec_ctrl_probe(target: Target, command: Any, stream: Path) -> None:
    """Run the agent and keep what it printed."""
    run = f"python3 {AGENT} run --in metal --write --stream --record /dev/null {option(target, 'arguments', '')}"
    try:
        lines, _, code = command.run(f"{run} 2>{SAID}", timeout=option(target, "timeout", 600))
    except (ExecutionError, subprocess.TimeoutExpired, pexpect.TIMEOUT) as error:
        printed = getattr(error, "output", None) or b""
        lines = printed.rpartition(b"\n")[0].decode(errors="replace").split("\n") if isinstance(printed, bytes) else []
        code = None
    stream.write_text(events(lines), encoding="utf-8")
    if code in (None, 255):  # 255: ssh lost the board
        journal = bring_back(target, command)
        stream.write_text(events(lines) + journal, encoding="utf-8")
        pytest.fail(f"{stream.stem} hung; {'its journal is kept' if journal else 'no journal could be had'}")
    said = "\n".join(command.run(f"cat {SAID}; rm -f {SAID} {AGENT}")[0])
    if code == 4:
        pytest.skip(said)
    if code != 0:
        pytest.fail(f"exit code {code}, {MEANING.get(code, 'the agent failed')}: {said}", pytrace=False)
