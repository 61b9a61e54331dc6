# SPDX-License-Identifier: MIT
"""What came of a sweep, machine by machine. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from probe.errors import ExitCode


class How(Enum):
    """How a machine's part of a sweep ended."""

    RECORD = "record"  # it gave a record
    REFUSED = "refused"  # the agent ran and ended with exit code 4: a requirement is missing there
    FAILED = "failed"  # it was reached, and there is no record
    DIED = "died"  # it went down under the probe, and is back
    GONE = "gone"  # it went away under the probe, and is not back
    UNREACHED = "unreached"  # nothing was ever started on it
    UNTRIED = "untried"  # the sweep was stopped before its turn


FAILED = (How.REFUSED, How.FAILED)
LOST = (How.DIED, How.GONE, How.UNREACHED)


@dataclass(frozen=True)
class Machine:
    """One machine: code is the agent's exit code (-1: it gave none), step the last that it announced if it gave no
    record, why in words, seconds of its run; again if the answer is that of a run that an earlier try had started; at
    when it was known, RFC 3339."""

    host: str
    how: How
    code: int = -1
    step: str = ""
    why: str = ""
    seconds: float = 0.0
    again: bool = False
    at: str = ""

    def told(self) -> str:
        """Say what became of it, where there is no record."""
        return ", then ".join(part for part in (self.step, self.why) if part)

    def as_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps({**vars(self), "how": self.how.value}) + "\n"


def machine(line: str) -> Machine:
    """Read what as_json() wrote; raise ValueError, KeyError or TypeError for anything else."""
    found = json.loads(line)
    return Machine(**{**found, "how": How(found["how"])})


@dataclass
class Swept:
    """A sweep: its name, night, when it began, in how many seconds, and its machines by name; stopped says why it did
    not come to its end, continued how many machines an earlier try had answered for."""

    name: str
    night: str
    started: str
    seconds: float = 0.0
    machines: dict[str, Machine] = field(default_factory=dict)
    stopped: str = ""
    continued: int = 0

    def of(self, *how: How) -> list[Machine]:
        """Return the machines that ended so, by name."""
        return sorted((one for one in self.machines.values() if one.how in how), key=lambda one: one.host)

    def code(self) -> ExitCode:
        """Return the exit code: the worst of all machines."""
        codes = {one.code for one in self.machines.values()}
        if ExitCode.NOT_RESTORED in codes:
            return ExitCode.NOT_RESTORED
        if self.stopped or self.of(*LOST, How.FAILED, How.UNTRIED):
            return ExitCode.FAILED
        if self.of(How.REFUSED):
            return ExitCode.REQUIREMENT_MISSING
        return ExitCode.FINDINGS if any(codes) else ExitCode.AS_PREDICTED


@dataclass(frozen=True)
class Tally:
    """Where a sweep is: machines of total that are done, failed, lost or running; seconds since its start."""

    total: int
    done: int
    failed: int
    lost: int
    running: int
    seconds: float

    def line(self) -> str:
        """Say it in one line of a terminal; the time that is left is as that of those who have ended."""
        ended = self.done + self.failed + self.lost
        left = ""
        if ended and self.total > ended:
            left = f", about {self.seconds * (self.total - ended) / ended:.0f} s left"
        total = f" of {self.total}" if self.total else ""
        return f"{self.done} done, {self.failed} failed, {self.lost} lost, {self.running} running{total}{left}"


def folded(names: Iterable[str], most: int = 12) -> str:
    """Return machines' names in a text, the first ones of many."""
    found = sorted(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def canaries(cpus: Mapping[str, str], share: float, tried: Mapping[str, Machine] | None = None) -> list[str]:
    """Return whom to try first: of each CPU model a share of its machines, rounded up. cpus: model by machine.

    Of a model none of whose machines that were tried gave a record as many again come next, until there are no more.
    """
    tried = tried or {}
    by_model: dict[str, list[str]] = {}
    for host in sorted(cpus):
        by_model.setdefault(cpus[host], []).append(host)
    found: list[str] = []
    for hosts in by_model.values():
        done = [host for host in hosts if host in tried]
        if any(tried[host].how is How.RECORD for host in done):
            continue
        count = len(done) or max(1, -int(-len(hosts) * share // 1))
        found += [host for host in hosts if host not in tried][:count]
    return sorted(found)


def alarm(machine: Machine) -> bool:
    """Tell whether what became of a machine must not happen to more of them."""
    return machine.how in (How.DIED, How.GONE) or machine.code == ExitCode.NOT_RESTORED


def event(machine: Machine) -> dict[str, Any]:
    """Return the line that ends the stream of a machine without a record, for ingest."""
    return {"event": "lost", "how": machine.how.value, "step": machine.step, "why": machine.why, "at": machine.at}
