# SPDX-License-Identifier: MIT
"""Ansible module: the agent on one machine, once a sweep, however often it is asked.

It travels with the agent inside (spec_ctrl_agent, which the sweep makes), or without where machines have it from an
earlier sweep; one that does not says so, and nothing has run there. What the agent says is kept in STATE/sweeps/SWEEP
on the machine until the next sweep: a controller that lost its connection, or was killed, asks again and gets the
answer of the run that there was; a machine that went down under it tells at which bit.
Python 3.6 reads this file, so that an old one can say that the agent needs a newer one.
"""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.spec_ctrl_agent import AGENT, SHA256

DOCUMENTATION = r"""
module: spec_ctrl_probe
short_description: run spec-ctrl-probe on a machine, once a sweep
description: See the module's docstring.
options:
  sweep: {description: The sweep's name; one run each., type: str, required: true}
  arguments: {description: What the agent is given., type: list, elements: str, required: true}
  limit: {description: Seconds after which the agent is told to stop., type: float, required: true}
  state: {description: Where to keep the agent and its answer., type: path, default: /var/lib/spec-ctrl-probe}
author: spec-ctrl-probe
"""

PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10", "python3.9")
# The agent does not end with the connection: it is given a session of its own, and its exit code is kept.
SUPERVISOR = '"$@" > out 2> err < /dev/null & echo $! > pid; wait $!; echo $? > exit.new; mv exit.new exit'
GRACE = 20  # seconds from SIGTERM, upon which it puts everything back, to SIGKILL
MOST = 200  # characters of a line of the agent's stderr that are told
STARTING = 10  # seconds that a start may take
OLD = 86400  # seconds after which what earlier runs left is removed


class Missing(Exception):
    """What the machine lacks."""


class NoAgent(Missing):
    """It lacks the agent, and none came with the module."""


def main() -> None:
    """Run the agent, or take up the run of this sweep that there was."""
    module = AnsibleModule(
        argument_spec={
            "sweep": {"type": "str", "required": True},
            "arguments": {"type": "list", "elements": "str", "required": True},
            "limit": {"type": "float", "required": True},
            "state": {"type": "path", "default": "/var/lib/spec-ctrl-probe"},
        }
    )
    given = module.params
    try:
        result = answer(given["sweep"], given["arguments"], given["limit"], Path(given["state"]))
    except OSError as error:
        module.fail_json(msg=f"cannot use {error.filename or 'a file'} on the machine: {error.strerror}")
    except Missing as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


def answer(sweep: str, arguments: list, limit: float, state: Path) -> dict:
    """Return how it ended (ended, killed, too-long, died), exit_code, the events that count, the end of stderr (said);
    or, as how alone, needs-agent.

    Raise OSError and Missing for what the machine lacks.
    """
    place = state / "sweeps" / sweep
    begun = time.time()
    try:
        earlier = read_text(place / "boot_id") or begin(place, arguments, state)
    except NoAgent:
        return {"how": "needs-agent"}
    if earlier and earlier != boot_id():
        ended = told(place)
        if (place / "exit").exists() or has_record(ended):  # it had ended before the machine went down
            return {**ended, "how": "ended", "again": True}
        return {**ended, "how": "died", "step": last_step(state, earlier), "again": True}
    how = wait(place, begun + limit)
    return {**told(place), "how": how, "again": bool(earlier), "seconds": round(time.time() - begun, 3)}


def boot_id() -> str:
    """Return what names this boot of the machine."""
    return read_text(Path("/proc/sys/kernel/random/boot_id"))


def begin(place: Path, arguments: list, state: Path) -> str:
    """Start the agent and return ""; or the boot_id of one that is being started, by a second name of this machine."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.parent.mkdir(mode=0o700, exist_ok=True)
    end = time.time() + STARTING
    while True:
        try:
            place.mkdir(mode=0o700)
        except FileExistsError:
            earlier = read_text(place / "boot_id")
            if earlier:
                return earlier
            if time.time() > end:  # who made it was killed before it began
                shutil.rmtree(str(place), ignore_errors=True)
            time.sleep(0.05)
            continue
        try:
            start(place, arguments, state)
        except (OSError, Missing):
            shutil.rmtree(str(place), ignore_errors=True)
            raise
        return ""


def start(place: Path, arguments: list, state: Path) -> None:
    """Start the agent; what sweeps of another day have left goes: another controller may still ask for today's."""
    for old in state.glob("sweeps/*"):
        if old != place and is_old(old) and not is_held(old):
            shutil.rmtree(str(old), ignore_errors=True)
    clean_up()
    python = find_python()
    agent = keep_agent(state)
    lock = os.open(str(place / "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # of the supervisor and the agent: free when both are gone
    write(place / "boot_id", boot_id().encode())
    for folder in (place, place.parent, state):
        sync(folder)
    subprocess.Popen(
        ["/bin/sh", "-c", SUPERVISOR, "sh", python, str(agent), *arguments],
        cwd=str(place),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[lock],
    )
    os.close(lock)


def wait(place: Path, end: float) -> str:
    """Wait for the run's end and say what it was: ended, killed, or too-long."""
    stopped = 0.0
    pause = 0.02
    while True:
        held = is_held(place)
        if (place / "exit").exists():  # looked at after the lock: it is written before that is free
            return "too-long" if stopped else "ended"
        if not held:
            return "killed"
        if time.time() > end and not stopped:
            stopped = time.time()
            kill(place, signal.SIGTERM)
        if stopped and time.time() > stopped + GRACE:
            kill(place, signal.SIGKILL)
            time.sleep(2)  # its watchdog puts the registers back within one
            return "too-long"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)


def kill(place: Path, number: int) -> None:
    """Send the agent a signal; its lock is held, so that its number is nobody else's."""
    pid = read_text(place / "pid")
    if pid.isdigit():
        with contextlib.suppress(OSError):
            os.kill(int(pid), number)


def is_held(place: Path) -> bool:
    """Tell whether a process of the run in this folder is alive."""
    try:
        lock = os.open(str(place / "lock"), os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def told(place: Path) -> dict:
    """Return what the agent said: its start, and its record or error, or else the last step that it announced."""
    first, step, last = "", "", ""
    other = []  # type: list
    with contextlib.suppress(OSError), open(str(place / "out"), "rb") as file:
        for raw in file:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            kind = event_of(line)
            if kind == "intent":
                step = line
            elif kind == "start":
                first = line
            elif kind in ("record", "error"):
                last = line
            elif kind and len(other) < 20:
                other.append(line[:2000])  # nothing that is known here
    code = read_text(place / "exit")
    said = [line[:MOST] for line in read_text(place / "err").splitlines()[-20:]]
    return {
        "events": [line for line in (first, *other, "" if event_of(last) == "record" else step, last) if line],
        "exit_code": int(code) if code.isdigit() else -1,
        "said": said,
        "seconds": 0.0,
        "agent": SHA256,
    }


def has_record(found: dict) -> bool:
    """Tell whether the agent gave its record."""
    return any(event_of(line) == "record" for line in found["events"])


def event_of(line: str) -> str:
    """Return a line's kind: an event's name, "" for an empty line, "other" for what is none."""
    found = re.match(r'\{"event": "([a-z]+)"', line)
    return found.group(1) if found else "other" if line.strip() else ""


def last_step(state: Path, boot: str) -> str:
    """Return the step that the journal on the disk announced last in that boot, or ""."""
    step = ""
    for line in read_text(state / "journal.ndjson").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the last line, cut by a power failure
            break
        if event.get("ev") == "saved" and event.get("boot_id") != boot:
            return ""
        if event.get("ev") == "intent":
            step = str(event.get("step", ""))
        if event.get("ev") == "restored":
            step = ""
    return step


def find_python() -> str:
    """Return a Python that runs the agent: this one, or one of PATH; raise Missing."""
    if (3, 9) <= sys.version_info[:2] <= (3, 13):
        return sys.executable
    for name in PYTHONS:
        found = shutil.which(name)
        if found:
            return found
    version = ".".join(str(part) for part in sys.version_info[:2])
    raise Missing(f"Python {version} is here; the agent needs 3.9 to 3.13")


def keep_agent(state: Path) -> Path:
    """Put the agent's file on the machine, unless it is there, and return its path; raise NoAgent if none came."""
    path = state / f"agent-{SHA256[:16]}.pyz"
    with contextlib.suppress(OSError):
        if hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
            os.utime(str(path))
            return path
    if not AGENT:
        raise NoAgent("no agent came with the module")
    content = base64.b64decode(AGENT)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise Missing("the agent came through damaged")
    for old in state.glob("agent-*"):
        if is_old(old):
            old.unlink()
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    write(fresh, content)
    fresh.rename(path)
    return path


def clean_up() -> None:
    """Remove what runs of this module that were killed have left where Ansible unpacks them."""
    for old in Path(tempfile.gettempdir()).glob("ansible_spec_ctrl_probe_payload_*"):
        with contextlib.suppress(OSError):
            if old.lstat().st_uid == os.geteuid() and is_old(old):
                shutil.rmtree(str(old), ignore_errors=True)


def is_old(path: Path) -> bool:
    """Tell whether nobody has touched it for a day."""
    try:
        return path.lstat().st_mtime < time.time() - OLD
    except OSError:
        return False


def read_text(path: Path) -> str:
    """Return a file's text without its last newline, or ""."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip()
    except OSError:
        return ""


def write(path: Path, content: bytes) -> None:
    """Write a file and have it on the disk."""
    with open(str(path), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Have a folder's entries on the disk."""
    handle = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


if __name__ == "__main__":
    main()
