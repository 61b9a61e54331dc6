# SPDX-License-Identifier: MIT
"""A sweep: the agent on every machine of an inventory, once, through Ansible; what it found goes into the store.

A machine counts as answered when its line is there. A controller that was killed and is started again goes on with the
rest; a machine that had begun is not probed twice, for the module keeps its answer under the sweep's name.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kernel_harness.boot.cache import Say, default_cache
from kernel_harness.lab import nights
from kernel_harness.lab.agent_file import LOCK, build, own_files
from kernel_harness.lab.answers import Folder, folders, only_one, take_in
from kernel_harness.lab.engine import Engine, list_hosts, sources
from kernel_harness.lab.history import cpus_of
from kernel_harness.lab.reasons import never_began, said_of_failure, ssh_said, was_never_reached, was_reached, with_cure
from probe.errors import ExitCode, ProbeError, RecordError, UsageError
from probe.nights import check_night
from probe.report.night_text import of
from probe.sweep import LOST, How, Machine, Swept, Tally, alarm, canaries, folded

_GRACE = 120  # seconds beyond the agent's own limit, for the connection and for putting back
_KEPT = 3  # sweeps whose raw answers are kept
_FRESH = 3 * 3600  # seconds since its last answer after which a sweep that did not end is not gone on with


@dataclass(frozen=True)
class Wish:
    """What was asked for. limit is in seconds for one machine, wait for one to come back; canary is a share, 0 to 1;
    forks machines at a time; pattern picks machines in Ansible's words; kernel is a release to boot first, or ""; night
    is the date that it belongs to, or "" for today's."""

    inventory: tuple[str, ...]
    store: Path
    arguments: tuple[str, ...] = ()
    pattern: str = ""
    forks: int = 32
    limit: float = 300.0
    wait: float = 300.0
    canary: float = 0.0
    retry: bool = False
    afresh: bool = False
    become: bool = True
    kernel: str = ""
    agent: Path | None = None
    night: str = ""

    def sameness(self) -> dict[str, Any]:
        """Return what two sweeps must have in common for the one to go on where the other ended."""
        return {**self.selection(), "arguments": list(self.arguments), "kernel": self.kernel, "night": self.night}

    def selection(self) -> dict[str, Any]:
        """Return which machines are asked."""
        return {"inventory": sources(self.inventory), "pattern": self.pattern}


@dataclass(frozen=True)
class Planned:
    """A machine as --check tells it: its address and user as Ansible has them, its CPU as last seen, whether it goes
    first, and what became of it in the last sweep ("" if it was in none)."""

    host: str
    address: str
    user: str
    cpu: str
    canary: bool
    last: str


def check(wish: Wish) -> list[Planned]:
    """Say what a sweep would do, and touch no machine; raise what sweep() would raise before its first connection."""
    found = list_hosts(wish.inventory, wish.pattern)
    last = next(folders(wish.store), None)
    known = cpus_of(wish.store)
    hosts = _to_retry(wish, last, list(found)) if wish.retry else list(found)
    going_on = unfinished(wish)
    if going_on:
        hosts = [host for host in hosts if host not in going_on.answered]
    first = set(canaries({host: known.get(nights.file_name(host), "") for host in hosts}, wish.canary or 0))
    return [
        Planned(
            host,
            str(found[host].get("ansible_host", host)),
            str(found[host].get("ansible_user", "")),
            known.get(nights.file_name(host), ""),
            bool(wish.canary) and host in first,
            last.answered[host].how.value if last and host in last.answered else "",
        )
        for host in hosts
    ]


def unfinished(wish: Wish) -> Folder | None:
    """Return the last sweep, if it was interrupted, not long ago, and asked for the same; else None."""
    last = next(folders(wish.store), None)
    same = last and not last.plan.get("ended") and last.plan.get("asked") == wish.sameness()
    goes_on = same and not wish.afresh and not wish.retry
    return last if last and goes_on and time.time() - last.touched() < _FRESH else None


def _to_retry(wish: Wish, last: Folder | None, hosts: Sequence[str]) -> list[str]:
    """Return the machines of which the last sweep has no record."""
    if last is None:
        raise UsageError(f"no sweep in {wish.store}", "--retry takes the last sweep's failures")
    there = set(last.plan.get("hosts") or hosts)  # it may have been interrupted before it knew them
    return [
        host
        for host in hosts
        if host in there and (host not in last.answered or last.answered[host].how is not How.RECORD)
    ]


def _memory(wish: Wish, digest: str) -> tuple[bool, bool]:
    """Tell whether most of these machines ran this agent in the last sweep of them, and whether they lose it (no disk,
    no python3): then it goes along from the start."""
    for one in folders(wish.store):
        asked = one.plan.get("asked", {})
        if one.plan.get("agent") != digest:
            break
        if one.plan.get("retry") or any(asked.get(key) != value for key, value in wish.selection().items()):
            continue
        ran = sum(machine.how in (How.RECORD, How.REFUSED, How.DIED) for machine in one.answered.values())
        forgetful = bool(one.plan.get("forgetful"))
        return not (forgetful or wish.retry) and 2 * ran > len(one.plan["hosts"]), forgetful
    return False, False


def sweep(wish: Wish, say: Say, tick: Callable[[Tally], None]) -> tuple[Swept, nights.Ingested | None]:
    """Run one sweep, take it into the store, and return what came of it, and of the taking in (None: nothing came).

    Raise UsageError for an inventory without machines, RequirementMissing without Ansible or beside another sweep,
    RecordError for a store that cannot be written, KeyboardInterrupt if it is interrupted: the same command goes on.
    """
    if wish.night:
        check_night(wish.night)
    sources(wish.inventory)
    with only_one(wish.store):
        return _Sweep(wish, say, tick).run()


class _Sweep:
    """One sweep on its way."""

    def __init__(self, wish: Wish, say: Say, tick: Callable[[Tally], None]) -> None:
        self._wish, self._say, self._tick = wish, say, tick
        self._agent = _agent(wish, say)
        self._digest = hashlib.sha256(self._agent).hexdigest()
        self._found: list[str] = []
        self._begun = time.monotonic()
        self._running: set[str] = set()
        self._vanished: dict[str, str] = {}
        self._strangers: set[str] = set()  # known machines on which nothing began, for want of the agent or of python3
        self._bare = 0  # of them, all in all
        self._counts = dict.fromkeys(How, 0)
        self._answered: set[str] = set()
        self._known, self._forgetful = _memory(wish, self._digest)
        self._folder, self._todo, self._continued = self._choose(next(folders(wish.store), None))

    def _hosts(self) -> list[str]:
        """Return the inventory's machines; raise UsageError if there is none. A playbook over all tells them, too."""
        self._found = self._found or list(list_hosts(self._wish.inventory, self._wish.pattern))
        return self._found

    def _choose(self, last: Folder | None) -> tuple[Folder, list[str] | None, int]:
        """Return the folder, the machines to ask (None: all), and how many an earlier try has answered for."""
        if self._wish.retry:
            todo = _to_retry(self._wish, last, self._hosts())
            if not todo:
                raise UsageError(
                    "the last sweep has a record of every machine", "sweep without --retry asks them again"
                )
            return self._make(last.plan["night"] if last else ""), todo, 0
        last = unfinished(self._wish)
        if last:
            todo = [host for host in self._hosts() if host not in last.answered]
            self._say(
                f"going on with the sweep of {last.plan['started']}: {of(len(last.answered), 'machine')} answered, "
                f"{len(todo)} are left (--afresh asks all of them again)"
            )
            for one in last.answered.values():
                self._counts[one.how] += 1
            self._answered |= set(last.answered)
            last.plan["agent"] = self._digest
            return last, todo, len(last.answered)
        return self._make(), None, 0

    def _make(self, night: str = "") -> Folder:
        for one in folders(self._wish.store):
            if not one.plan.get("ended"):
                self._say(
                    f"the sweep of {one.plan['started']} is given up; {of(len(one.answered), 'machine')} had answered"
                )
                take_in(one, self._wish.store, self._say)
                one.plan["ended"] = "never: what had answered was taken in"
                one.save()
        now = datetime.datetime.now(datetime.timezone.utc)
        path = self._wish.store / "sweeps" / f"{now:%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(2)}"
        plan = {
            "started": f"{now:%Y-%m-%dT%H:%M:%SZ}",
            "night": self._wish.night or night or f"{now:%Y-%m-%d}",
            "asked": self._wish.sameness(),
            "agent": self._digest,
            "forgetful": self._forgetful,
            "retry": self._wish.retry,
            "hosts": [],
            "ended": "",
        }
        found = Folder(path, plan)
        try:
            (path / "hosts").mkdir(parents=True)
            found.save()
        except OSError as error:
            raise RecordError(f"cannot write {path}: {error.strerror}", "give another: --store DIR") from error
        return found

    def run(self) -> tuple[Swept, nights.Ingested | None]:
        """Ask everyone, go back for those who went away, take it all in."""
        wish = self._wish
        engine = Engine(
            wish.inventory,
            self._agent,
            wish.forks,
            {
                "spec_ctrl_become": wish.become,
                "spec_ctrl_sweep": self._folder.name,
                "spec_ctrl_arguments": ["run", "--in", "metal", "--stream", "--record", os.devnull, *wish.arguments],
                "spec_ctrl_limit": wish.limit,
                "spec_ctrl_timeout": int(wish.limit + _GRACE),
                "spec_ctrl_wait": int(wish.wait),
                "spec_ctrl_kernel": wish.kernel,
            },
            wish.pattern,
        )
        self._engine = engine
        todo, stopped = self._todo, ""
        try:
            if self._todo is not None:  # of a sweep that goes on
                self._vanished = dict.fromkeys(
                    self._folder.begun(), "it was being asked when the sweep was interrupted"
                )
                self._ask_again()
            if wish.canary and todo != []:
                stopped = self._first()
                hosts = self._hosts() if todo is None else todo
                todo = [host for host in hosts if host not in self._answered]
            elif todo is not None:
                todo = [host for host in todo if host not in self._answered]
            if not stopped and todo != []:
                self._round(todo)
            self._hosts()
        except (KeyboardInterrupt, ProbeError) as error:
            if isinstance(error, ProbeError) and not self._folder.plan["hosts"]:
                self._no_host()
            take_in(self._folder, wish.store, self._say)
            raise
        return self._end(engine.stopped or stopped)

    def _no_host(self) -> None:
        """Nothing was begun: say so of an inventory that is none, in words of Ansible's that tell why."""
        try:
            self._hosts()
        except UsageError:
            shutil.rmtree(self._folder.path, ignore_errors=True)
            raise

    def _first(self) -> str:
        """Ask machines of every CPU model before the others; return why the sweep must stop, or ""."""
        hosts = self._hosts() if self._todo is None else [*self._folder.answered, *self._todo]
        known = cpus_of(self._wish.store)
        cpus = {host: known.get(nights.file_name(host), "") for host in hosts}
        while not self._engine.stopped:
            bad = [one for one in self._folder.answered.values() if alarm(one)]
            if bad:
                told = bad[0].told() or "its register could not be put back"
                return f"{bad[0].host} is one of those that go first: {told}"
            first = canaries(cpus, self._wish.canary, self._folder.answered)
            if not first:
                break
            self._say(
                f"first {len(first)} of {of(len(hosts), 'machine')}, of {of(len(set(cpus.values())), 'CPU model')}: "
                f"{folded(first)}"
            )
            self._round(first)
            for host in first:  # of whom the engine said nothing
                if host not in self._answered and not self._engine.stopped:
                    self._keep(Machine(host, How.FAILED, why="Ansible said nothing of it"), ())
        return ""

    def _ask_again(self) -> None:
        """Wait for those that went away, and ask for what there was."""
        if self._vanished and not self._engine.stopped:
            self._play_of("again.yml", sorted(self._vanished), self._seen_again, How.GONE)

    def _round(self, hosts: list[str] | None) -> None:
        """Ask some machines, or all, and wait for those that went away."""
        if self._wish.kernel:
            self._engine.play("boot.yml", hosts, self._booted)
            hosts = [host for host in (self._hosts() if hosts is None else hosts) if host not in self._answered]
            if not hosts:
                return
        self._engine.play("probe.yml", hosts, partial(self._seen, self._known), known=self._known)
        if self._strangers and not self._engine.stopped:
            self._bare += len(self._strangers)
            self._known = 2 * len(self._strangers) < len(hosts or self._hosts())  # of the others most, too, or not
            self._play_of("probe.yml", sorted(self._strangers), partial(self._seen, False), How.FAILED)
        self._ask_again()

    def _play_of(self, name: str, hosts: list[str], event: Callable[[str, dict[str, Any]], None], how: How) -> None:
        """Run a playbook over some; if Ansible does not take them (an inventory may have changed), the others count."""
        try:
            self._engine.play(name, hosts, event)
        except ProbeError as error:
            for host in hosts:
                if host not in self._answered:
                    self._keep(Machine(host, how, why=error.message), ())

    # --- the engine's events ---

    def _booted(self, name: str, data: dict[str, Any]) -> None:
        host, said = data["host"], said_of_failure(data.get("res", {}))
        if name == "runner_on_start":
            self._running.add(host)
        elif name == "runner_on_unreachable":
            never = data.get("task") == "ask the kernel"
            self._keep(Machine(host, How.UNREACHED if never else How.GONE, why=f"not reached: {said}"), ())
        elif name == "runner_on_failed":
            why = f"it does not run {self._wish.kernel}: {data.get('task')}: {said}"
            how = How.GONE if data.get("task") == "reboot" else How.FAILED
            self._keep(Machine(host, how, why=why), ())
        self._show()

    def _seen(self, known: bool, name: str, data: dict[str, Any]) -> None:
        """Take one event of machines that are asked; a known one on which nothing began is a stranger from then on."""
        host, result = data["host"], data.get("res", {})
        if name == "runner_on_start":
            self._running.add(host)
            self._folder.begin(host)
        elif name == "runner_on_ok":
            self._answer(host, result)
        elif name == "runner_on_unreachable":
            said = ssh_said(result)
            if was_reached(result):
                self._keep(Machine(host, How.FAILED, why=said), ())
            elif was_never_reached(result):
                self._keep(Machine(host, How.UNREACHED, why=f"not reached: {said}"), ())
            else:
                self._vanished[host] = said
                self._say(f"{host} went away under the probe; it will be waited for")
        elif name == "runner_on_failed":
            if known and never_began(result):
                self._estrange(host)
            else:
                self._keep(Machine(host, How.FAILED, why=said_of_failure(result)), ())
        self._show()

    def _seen_again(self, name: str, data: dict[str, Any]) -> None:
        """Take one event of machines that went away and are asked again."""
        host, result = data["host"], data.get("res", {})
        if name == "runner_on_ok" and data.get("task") == "probe":
            self._answer(host, result)
        elif name in ("runner_on_failed", "runner_on_unreachable"):
            if data.get("task") == "wait":
                why = f"it went away under the probe and was not back after {self._wish.wait:.0f} s"
                said = self._vanished[host]
                self._keep(Machine(host, How.GONE, why=f"{why}{f': {said}' if said else ''}"), ())
            elif name == "runner_on_unreachable":
                self._keep(Machine(host, How.GONE, why=f"it went away twice: {ssh_said(result)}"), ())
            else:
                self._keep(Machine(host, How.FAILED, why=said_of_failure(result)), ())
        self._show()

    def _answer(self, host: str, result: dict[str, Any]) -> None:
        """Take what the module found."""
        events = [str(line) for line in result.get("events", ())]
        step = ""
        last: dict[str, Any] = {}
        for line in events:
            with contextlib.suppress(ValueError, AttributeError):
                told = json.loads(line)
                step = str(told.get("step", "")) if told.get("event") == "intent" else step
                last = told if told.get("event") in ("record", "error") else last
        if result.get("how") == "needs-agent":
            self._estrange(host)
            return
        code = int(result.get("exit_code", -1))
        seconds, again = float(result.get("seconds", 0)), bool(result.get("again"))
        how, said = result.get("how"), " / ".join(result.get("said", ())[-3:])
        if how == "died":
            step = str(result.get("step") or step)
            why = "the machine went down and came back"
            self._keep(Machine(host, How.DIED, step=step, why=why, again=again), events)
        elif last.get("event") == "record":
            self._keep(Machine(host, How.RECORD, code, seconds=seconds, again=again), events)
        else:
            kind = How.REFUSED if code == ExitCode.REQUIREMENT_MISSING else How.FAILED
            why = (
                f"the agent was stopped after {self._wish.limit:.0f} s"
                if how == "too-long"
                else f"the agent was killed{f' (exit code {code})' if code > 0 else ''}"
                if how == "killed" or code in (137, 143) or code > 128
                else f"it said: {last.get('message') or said or 'nothing'}"
            )
            self._keep(Machine(host, kind, code, step, why, seconds, again), events)

    def _estrange(self, host: str) -> None:
        self._running.discard(host)
        self._strangers.add(host)
        self._folder.nothing_began(host)

    def _keep(self, found: Machine, events: Sequence[str]) -> None:
        self._running.discard(found.host)
        self._vanished.pop(found.host, None)
        self._strangers.discard(found.host)
        found = _short(found)
        try:
            self._folder.keep(found, events)
        except (OSError, RecordError) as error:
            why = error.message if isinstance(error, RecordError) else str(error.strerror)
            why = why.replace("the record to ", "")
            cure = "make room and give the same command: what has answered is kept, here or on the machines"
            self._engine.stop(f"cannot keep what {found.host} said: {why} ({cure})")
            return
        self._answered.add(found.host)
        self._counts[found.how] += 1

    def _show(self) -> None:
        if not self._folder.plan["hosts"]:
            self._found = self._found or self._engine.hosts  # if they were not known before, it is asking all
            asked = self._found if self._todo is None else [*self._folder.answered, *self._todo]
            self._folder.plan["hosts"] = asked
            if asked:
                with contextlib.suppress(RecordError):  # a full disk shows when the answer is kept
                    self._folder.save()
        self._tick(
            Tally(
                len(self._found) if self._todo is None else len(self._todo) + self._continued,
                self._counts[How.RECORD],
                self._counts[How.REFUSED] + self._counts[How.FAILED],
                sum(self._counts[how] for how in LOST),
                len(self._running),
                time.monotonic() - self._begun,
            )
        )

    def _end(self, stopped: str) -> tuple[Swept, nights.Ingested | None]:
        """Write down that it ended, and take it in."""
        folder, hosts = self._folder, self._hosts()
        asked = hosts if self._todo is None else [*folder.answered, *self._todo]
        for host in asked:
            if host not in folder.answered and not stopped:
                self._keep(Machine(host, How.FAILED, why="Ansible said nothing of it"), ())
        plan = folder.plan
        swept = Swept(folder.name, plan["night"], plan["started"], time.monotonic() - self._begun, stopped=stopped)
        swept.machines = {**{host: Machine(host, How.UNTRIED) for host in asked}, **folder.answered}
        swept.continued = self._continued
        if self._engine.stopped:  # for want of room: what the machines keep is asked for when there is some
            return swept, None
        done = take_in(folder, self._wish.store, self._say)
        hosts_of = {f"{nights.file_name(host)}.ndjson": host for host in folder.answered}
        for bad in done.bad if done else ():
            name = hosts_of.get(bad.file, "")
            if not bad.line and name and folder.answered[name].how is How.RECORD:
                why = f"its record was set aside: {bad.why}"
                swept.machines[name] = replace(folder.answered[name], how=How.FAILED, code=3, why=why)
        forgets = self._forgetful or 2 * self._bare > len(asked)
        folder.plan = {
            **plan,
            "hosts": asked,
            "forgetful": forgets,
            "ended": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        }
        folder.save()
        for old in [*folders(self._wish.store)][_KEPT:]:
            if old.plan.get("ended"):
                shutil.rmtree(old.path, ignore_errors=True)
        return swept, done


def _short(found: Machine) -> Machine:
    """Return a machine whose words are no longer than a reader's patience, and plain."""
    why = with_cure("".join(char if char.isprintable() else " " for char in found.why))
    at = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    return replace(found, why=why[:400], step=found.step[:100], at=at)


def _agent(wish: Wish, say: Say) -> bytes:
    """Return the agent's file: the one given, or one of these sources, which is kept."""
    if wish.agent is not None:
        try:
            content = wish.agent.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {wish.agent}: {error.strerror}", "make one: agent-build -o PATH") from error
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise UsageError(f"{wish.agent} is not the agent's file", "make one: agent-build -o PATH")
        return content
    digest = hashlib.sha256(LOCK.read_bytes())
    for name, content in sorted(own_files().items()):
        digest.update(name.encode() + b"\0" + content)
    path = default_cache() / "agents" / f"{digest.hexdigest()[:16]}.pyz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.pyz"):
            old.unlink(missing_ok=True)
        build(path, say, replace=True)
    return path.read_bytes()
