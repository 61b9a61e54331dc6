# SPDX-License-Identifier: MIT
"""Saved values on disk before the first write, and the watchdog process that puts them back if the agent dies.

The journal is a file of JSON lines, each fsync'd before the write that it announces:
    {"ev": "saved", "boot_id": ..., "pid": ..., "started": ..., "msr": "0x48", "saved": [["0-3", "0x..."], ...]}
    {"ev": "intent", "step": "bit 3", "mask": "0x0000000000000008"}
    {"ev": "rebased", "cpu": 3, "value": "0x..."}   what this register is to be put back to from now on
    {"ev": "restored", "by": "agent" | "watchdog" | "restore command", "verified": "0-2", "left": "3", "failed": "",
     "at": ...}
It is deleted when the agent itself has put everything back, and kept otherwise, so that the next run can tell what
happened.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.errors import ProbeError, RecordError, RequirementMissing
from probe.masks import ALL_BITS, format_list, grouped, hex64, parse_hex64, parse_list
from probe.msr import MsrAccess
from probe.outcome import Restored
from probe.registers import SPEC_CTRL
from probe.scheduling import Realtime
from probe.store import sync_directory
from probe.trial import Pin, put_back

STATE_DIR = Path("/var/lib/spec-ctrl-probe")
_NAME = "journal.ndjson"
_LAST = "last-incident.ndjson"


def now() -> str:
    """Return the time as RFC 3339 in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _make_private(folder: Path) -> None:
    """Make the state directory, for nobody but us: what lies in it decides what is written to registers."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_directory(folder.parent)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise RequirementMissing(
            f"the state directory {folder} belongs to, or can be written by, others", "give another: --state-dir DIR"
        )


class Lock:
    """One probe at a time on this machine: flock on a file in the state directory, held by the watchdog too."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "lock"
        self._fd = -1

    def __enter__(self) -> Lock:
        try:
            _make_private(self._path.parent)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            cure = "give another folder: --state-dir DIR" if os.geteuid() == 0 else "run it as root"
            raise RequirementMissing(
                f"cannot use {self._path.parent} as state directory: {error.strerror}", cure
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            who = f" (process {holder})" if holder.isdigit() else ""
            raise RequirementMissing(
                f"another probe is running on this machine{who}", "wait until it has ended"
            ) from error
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


@dataclass(frozen=True)
class Leftover:
    """What an earlier run left: it ended without putting the registers back itself.

    saved maps CPU to the 64-bit value; step is the last announced step ("" if none) and mask the bits that it may
    have changed; restored_by names the process that put the registers back since ("" if nobody), left and failed the
    CPUs where that could not be verified (see Restored).
    """

    path: Path
    boot_id: str
    pid: int
    started: str
    msr: int
    saved: Mapping[int, int]
    step: str
    mask: int
    restored_by: str
    failed: tuple[int, ...]
    left: tuple[int, ...] = ()

    def tell(self, same_boot: bool) -> str:
        """Say in one line what happened."""
        where = f"died at {self.step!r}" if self.step else "died before its first write"
        text = f"the run of {self.started} (process {self.pid}) {where}"
        if self.restored_by and self.failed:
            return f"{text}; the {self.restored_by} could not put back CPUs {format_list(self.failed)}"
        if self.restored_by and self.left:
            return f"{text}; the {self.restored_by} could not verify CPUs {format_list(self.left)}"
        if self.restored_by:
            return f"{text}; the {self.restored_by} put every register back, verified"
        if not self.saved:
            return f"{text}: nothing to put back"
        if not same_boot:
            return f"{text}, and the machine has rebooted since: its registers were set up anew, nothing to put back"
        return f"{text}, and nobody has put the registers back yet"


def read_leftover(state_dir: Path) -> Leftover | None:
    """Read what an earlier run left, or None. A last line cut by a power failure is passed over.

    Raise RecordError if there is a journal that cannot be understood.
    """
    path = state_dir / _NAME
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RequirementMissing(f"cannot read {path}: {error.strerror}", "needs root") from error
    events: list[dict[str, Any]] = []
    for line in lines[:-1]:  # what follows the last newline is cut or empty
        try:
            events.append(json.loads(line))
        except ValueError as error:
            if not events:
                raise _not_ours(path, error) from error
    if not events:  # the machine died before the saved values were on disk, hence before the first write
        return Leftover(path, "", 0, "unknown time", SPEC_CTRL.index, {}, "", 0, "", ())
    try:
        head = events[0]
        saved = {cpu: parse_hex64(value) for cpus, value in head["saved"] for cpu in parse_list(cpus)}
        if int(head["msr"], 16) != SPEC_CTRL.index:
            raise ValueError(f"it is about MSR {head['msr']}")
        saved.update({int(event["cpu"]): parse_hex64(event["value"]) for event in events if event["ev"] == "rebased"})
        steps = [(event["step"], parse_hex64(event["mask"])) for event in events if event["ev"] == "intent"]
        ends = [event for event in events if event["ev"] == "restored"]
        failed, left = (parse_list(ends[-1][name]) if ends and ends[-1][name] else () for name in ("failed", "left"))
        return Leftover(
            path=path,
            boot_id=head["boot_id"],
            pid=head["pid"],
            started=head["started"],
            msr=int(head["msr"], 16),
            saved=saved,
            step=steps[-1][0] if steps else "",
            mask=steps[-1][1] if steps else 0,
            restored_by=ends[-1]["by"] if ends else "",
            failed=failed,
            left=left,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_ours(path, error) from error


def _not_ours(path: Path, error: Exception) -> RecordError:
    return RecordError(f"journal {path} is not one of this tool's: {error!r}", f"look at it, then remove it: rm {path}")


def file_away(leftover: Leftover) -> None:
    """Keep a leftover that has been told as the last incident, and make room for a new journal."""
    leftover.path.replace(leftover.path.with_name(_LAST))
    sync_directory(leftover.path.parent)


_FULL = "free some space, or give another folder: --state-dir DIR"


class Journal:
    """The journal of one run; see the module's text for its lines.

    Raise RequirementMissing if it cannot be put on disk: without it nothing may be written to a register.
    """

    def __init__(self, state_dir: Path, msr: int, saved: Mapping[int, int], boot_id: str) -> None:
        self.path = state_dir / _NAME
        head = {
            "ev": "saved",
            "boot_id": boot_id,
            "pid": os.getpid(),
            "started": now(),
            "msr": f"{msr:#x}",
            "saved": [[cpus, hex64(value)] for cpus, value in grouped(saved)],
        }
        try:
            self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                self._append(json.dumps(head).encode())
                sync_directory(state_dir)
            except OSError:
                os.close(self.fd)
                self.path.unlink()  # nothing was written to a register: no incident for the next run
                raise
        except OSError as error:
            raise RequirementMissing(
                f"cannot put the saved values on disk in {self.path}: {error.strerror}; nothing was written to any MSR",
                "give another folder: --state-dir DIR",
            ) from error

    def _append(self, event: bytes) -> None:
        line = event + b"\n"
        written = os.write(self.fd, line)
        if written != len(line):  # half a line would run into the next one
            os.ftruncate(self.fd, os.fstat(self.fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self.fd)

    def intent(self, step: str, mask: int) -> None:
        """Put on disk what is about to be tried and which bits that may change; return only when it is there."""
        try:
            self._append(
                b'{"ev": "intent", "step": "%s", "mask": "0x%016x"}' % (step.encode("ascii"), mask)
            )  # on the hot path
        except OSError as error:
            raise ProbeError(f"cannot append to the journal {self.path}: {error.strerror}", _FULL) from error

    def rebased(self, cpu: int, value: int) -> None:
        """Put on disk what a register is to be put back to from now on; return only when it is there."""
        try:
            self._append(json.dumps({"ev": "rebased", "cpu": cpu, "value": hex64(value)}).encode())
        except OSError as error:
            raise ProbeError(f"cannot append to the journal {self.path}: {error.strerror}", _FULL) from error

    def restored(self, by: str, proof: Sequence[Restored]) -> None:
        """Note that the registers were put back, and by whom."""
        self._append(json.dumps(restored_event(by, proof)).encode())

    def saved_now(self, saved: Mapping[int, int]) -> Mapping[int, int]:
        """Return the saved values with what was rebased since, from disk; those given if the disk does not answer."""
        try:
            leftover = read_leftover(self.path.parent)
        except ProbeError:
            return saved
        return leftover.saved if leftover is not None and leftover.saved else saved

    def close(self, *, keep: bool) -> None:
        """Close the file; delete it unless something in it must still be told."""
        os.close(self.fd)
        if not keep:
            self.path.unlink()
            sync_directory(self.path.parent)


def restored_event(by: str, proof: Sequence[Restored]) -> dict[str, object]:
    """Build the journal line that ends an incident."""
    return {
        "ev": "restored",
        "by": by,
        "verified": format_list(item.cpu for item in proof if item.state == Restored.VERIFIED),
        "left": format_list(item.cpu for item in proof if item.state == Restored.LEFT),
        "failed": format_list(item.cpu for item in proof if item.failed),
        "at": now(),
    }


def replay(leftover: Leftover, msr: MsrAccess, pin: Pin) -> list[Restored]:
    """Put back what a killed run left, and note it in its journal. Only for the boot that the journal is of.

    Only the bits of the step that was announced last can have been left changed, for each trial ends with its restore;
    what differs otherwise the kernel may have changed since, and is left alone. Where somebody has tried before and
    failed, what differs is the probe's doing.
    """
    proof = put_back(
        msr,
        leftover.msr,
        leftover.saved,
        pin,
        ours=lambda cpu: ALL_BITS if cpu in leftover.failed else leftover.mask,
    )
    with contextlib.suppress(OSError):  # a full disk must not cost the registers
        fd = os.open(leftover.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, b"\n" + json.dumps(restored_event("restore command", proof)).encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
    return proof


class Watchdog:
    """A process of its own session that holds the saved values and puts them back if the agent vanishes.

    It waits on a pipe whose other end only the agent has: end of file without the farewell byte means that the agent
    is gone, SIGKILL included, for the kernel closes a dead process's files. It shares the agent's open devices, the
    journal and the lock, so that no second probe can start before it is done.
    """

    def __init__(self, msr: MsrAccess, index: int, saved: Mapping[int, int], journal: Journal, pin: Pin) -> None:
        wait_end, self._pipe = os.pipe()
        ready_end, ready = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._pipe)
                os.close(ready_end)
                self._serve(wait_end, ready, msr, index, saved, journal, pin)
            finally:
                os._exit(3)
        os.close(wait_end)
        os.close(ready)
        try:
            if os.read(ready_end, 1) != b"r":
                raise ProbeError("the watchdog process did not start; nothing was written to any MSR")
        finally:
            os.close(ready_end)

    @staticmethod
    def _serve(
        wait_end: int,
        ready: int,
        msr: MsrAccess,
        index: int,
        saved: Mapping[int, int],
        journal: Journal,
        pin: Pin,
    ) -> None:
        os.setsid()
        with contextlib.suppress(OSError):  # the agent was bound to the CPU that it read last
            os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP):
            signal.signal(name, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")
        os.write(ready, b"r")
        os.close(ready)
        if os.read(wait_end, 1) == b"":
            with Realtime():
                proof = put_back(msr, index, journal.saved_now(saved), pin)
            with contextlib.suppress(OSError):
                journal.restored("watchdog", proof)
            os._exit(5 if any(item.failed for item in proof) else 0)
        os._exit(0)

    def alive(self) -> bool:
        """Tell whether the watchdog still watches; without it nothing more may be written."""
        if self.pid < 0:
            return False
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            pid, status = self.pid, 0
        if pid and not os.WIFSTOPPED(status):
            self.pid = -1
        return pid == 0  # one that was stopped does not watch either

    def dismiss(self) -> None:
        """Tell it that everything is put back, and wait until it has gone."""
        with contextlib.suppress(OSError):
            os.write(self._pipe, b".")
        os.close(self._pipe)
        end = time.monotonic() + 2
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            while self.pid >= 0 and os.waitpid(self.pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > end:  # somebody has stopped it; it has nothing left to do
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.001)
        self.pid = -1
