# SPDX-License-Identifier: MIT
"""A sweep's folder in the store: what was asked for, who was asked, who has answered, on disk as soon as it is known.

STORE/sweeps/20261128T020000.000001Z-1f2e/
    plan.json          what was asked for, and when it ended
    results.ndjson     a line for each machine, as it comes
    begun.ndjson       machines that were asked; what has no answer may still be running
    hosts/NAME.ndjson  what the machine said; this is what ingest takes in
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel_harness.boot.cache import Say
from kernel_harness.lab import nights
from probe.errors import RecordError, RequirementMissing
from probe.store import write_atomically
from probe.sweep import How, Machine, event, machine


@dataclass
class Folder:
    """A sweep's folder in the store."""

    path: Path
    plan: dict[str, Any]
    answered: dict[str, Machine] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The sweep's name, under which machines keep their answers."""
        return self.path.name

    def touched(self) -> float:
        """Return when it was last written to, in seconds since 1970."""
        return max(path.stat().st_mtime for path in self.path.iterdir())

    def save(self) -> None:
        """Write the plan; raise RecordError if there is no room."""
        try:
            write_atomically(json.dumps(self.plan, indent=1).encode() + b"\n", self.path / "plan.json", replace=True)
        except RecordError as error:
            raise RecordError(
                error.message.replace("the record to ", ""), "make room, or give another --store"
            ) from error

    def begin(self, host: str) -> None:
        """Note that a machine is being asked: if the controller dies now, something may run there."""
        with contextlib.suppress(OSError), open(self.path / "begun.ndjson", "a", encoding="utf-8") as file:
            file.write(json.dumps(host) + "\n")

    def nothing_began(self, host: str) -> None:
        """Take that back: nothing runs there."""
        with contextlib.suppress(OSError), open(self.path / "begun.ndjson", "a", encoding="utf-8") as file:
            file.write(json.dumps({"nothing": host}) + "\n")

    def begun(self) -> list[str]:
        """Return the machines that were being asked and have not answered."""
        found: dict[str, None] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / "begun.ndjson").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    told = json.loads(line)
                    if isinstance(told, dict):
                        found.pop(str(told.get("nothing")), None)
                    else:
                        found[str(told)] = None
        return [host for host in found if host not in self.answered]

    def keep(self, found: Machine, events: Sequence[str]) -> None:
        """Keep a machine's answer, and then that it is there."""
        name = nights.file_name(found.host)
        text = "".join(f"{line}\n" for line in events)
        if found.how is not How.RECORD:
            text += json.dumps(event(found)) + "\n"
        write_atomically(text.encode(), self.path / "hosts" / f"{name}.ndjson", replace=True)
        with open(self.path / "results.ndjson", "a", encoding="utf-8") as file:
            file.write(found.as_json())
            file.flush()
            os.fsync(file.fileno())
        self.answered[found.host] = found


def folders(store: Path) -> Iterator[Folder]:
    """Return the store's sweeps, the newest first."""
    for path in sorted((store / "sweeps").glob("*/plan.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            found = Folder(path.parent, json.loads(path.read_text(encoding="utf-8")))
            with contextlib.suppress(FileNotFoundError):
                for line in (path.parent / "results.ndjson").read_text(encoding="utf-8").splitlines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a full disk
                        one = machine(line)
                        found.answered[one.host] = one
            yield found


@contextlib.contextmanager
def only_one(store: Path) -> Iterator[None]:
    """Hold the store against a second sweep; raise RequirementMissing if there is one."""
    try:
        (store / "sweeps").mkdir(parents=True, exist_ok=True)
        handle = os.open(store / "sweeps" / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RecordError(f"cannot write into {store}: {error.strerror}", "give another: --store DIR") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
            raise RequirementMissing(
                f"another sweep is using {store}{f' (process {pid})' if pid.isdigit() else ''}",
                "wait until it has ended",
            ) from error
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def take_in(folder: Folder, store: Path, say: Say) -> nights.Ingested | None:
    """Take what machines answered in a sweep into its night; None if there is nothing."""
    if not folder.answered:
        return None
    return nights.ingest(folder.path / "hosts", store, say, folder.plan["night"])
