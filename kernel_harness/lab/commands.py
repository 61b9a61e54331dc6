# SPDX-License-Identifier: MIT
"""The lab's sub-commands: what they do with their arguments. The command line gives them its voice, and exits."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from probe.arguments import make_parser
from probe.errors import ExitCode, UsageError
from probe.report import night_text, nights_text

if TYPE_CHECKING:
    from kernel_harness.lab.nights import Ingested
    from kernel_harness.lab.sweep import Wish
    from probe.sweep import Swept, Tally


@dataclass(frozen=True)
class Voice:
    """Where words go: say a line to people, show a report, write what programs read, and one line that is overwritten
    (progress; "" removes it)."""

    say: Callable[[str], None]
    show: Callable[[str], None]
    write: Callable[[str], None]
    progress: Callable[[str], None]


def ingest(arguments: argparse.Namespace, voice: Voice) -> ExitCode:
    """Take in what an engine left."""
    from kernel_harness.lab import nights

    done = nights.ingest(Path(arguments.folder), Path(arguments.store), voice.say, arguments.night)
    bad = [(one.file, one.line, one.why) for one in done.bad]
    voice.show(nights_text.ingested(done.new, done.again, done.lost, bad, sorted(done.dates)))
    return ExitCode.FINDINGS if done.lost or done.bad else ExitCode.AS_PREDICTED


def history(arguments: argparse.Namespace, voice: Voice) -> ExitCode:
    """Ask the nights."""
    from kernel_harness.lab.history import ask

    question, what = arguments.question, arguments.what
    if (question in ("machine", "sql")) != bool(what):
        raise UsageError(
            f"history {question} {'wants' if not what else 'takes no'} {'SQL' if question == 'sql' else 'NAME'}",
            "history machine NAME, history sql 'SELECT ...'",
        )
    if arguments.before and question != "changes":
        raise UsageError(f"history {question} takes no --from", "it looks at all nights up to --to")
    answer = ask(
        Path(arguments.store),
        question,
        before=arguments.before,
        after=arguments.after,
        host=what if question == "machine" else "",
        sql=what if question == "sql" else "",
    )
    if arguments.output_format == "json":
        voice.write(nights_text.as_json(answer.columns, answer.rows))
    elif arguments.output_format == "csv":
        voice.write(nights_text.as_csv(answer.columns, answer.rows))
    else:
        voice.show(nights_text.table(answer.columns, answer.rows, answer.nothing))
    found = bool(answer.rows) and question in ("changes", "missing", "differ", "findings")
    return ExitCode.FINDINGS if found else ExitCode.AS_PREDICTED


def sweep(arguments: argparse.Namespace, voice: Voice) -> ExitCode:
    """Run the agent on every machine of an inventory."""
    from kernel_harness.lab import sweep as lab
    from kernel_harness.lab.history import night

    wish = _wish(arguments)
    if arguments.check:
        rows = [(one.host, one.address, one.user, one.cpu, one.canary, one.last) for one in lab.check(wish)]
        voice.show(night_text.planned(rows, _would(arguments, wish, len(rows))))
        return ExitCode.AS_PREDICTED

    done, taken = _swept(wish, voice)
    voice.show(night_text.swept(done, brief=bool(taken and taken.dates)))
    if taken is not None and taken.dates:
        voice.show("\n" + night_text.summary(night(wish.store, done.night)))
    return done.code()


def _swept(wish: Wish, voice: Voice) -> tuple[Swept, Ingested | None]:
    """Sweep, and tell how far it is."""
    from kernel_harness.lab.sweep import sweep as run

    def tick(tally: Tally) -> None:
        voice.progress(tally.line())

    try:
        done, taken = run(wish, _after(voice), tick)
    except KeyboardInterrupt:
        _after(voice)("the same command goes on where this one was; agents that run put back what they wrote, and wait")
        raise
    finally:
        voice.progress("")
    for one in taken.bad if taken else ():
        voice.say(f"set aside: {one.file}{f':{one.line}' if one.line else ''}: {one.why}")
    return done, taken


def _after(voice: Voice) -> Callable[[str], None]:
    """Return a way to say a line where the progress line is."""

    def say(text: str) -> None:
        voice.progress("")
        voice.say(text)

    return say


def _wish(arguments: argparse.Namespace) -> Wish:
    """Return what the arguments ask for; raise UsageError if run would not take its own."""
    from kernel_harness.lab.sweep import Wish

    _check_date(arguments.night)
    own = [*(["--write"] if arguments.write else []), *arguments.run_arguments]
    _check_run(own)
    agent = Path(arguments.agent) if arguments.agent else None
    return Wish(
        inventory=tuple(arguments.inventory),
        store=Path(arguments.store),
        arguments=tuple(own),
        pattern=arguments.limit,
        forks=arguments.forks,
        limit=arguments.host_timeout,
        wait=arguments.wait,
        canary=arguments.canary,
        retry=getattr(arguments, "retry", False),
        afresh=getattr(arguments, "afresh", False),
        become=not arguments.no_become,
        kernel=arguments.kernel,
        agent=agent,
        night=arguments.night,
    )


def _check_date(night: str) -> None:
    """Raise UsageError for what is no date, and for one that is to come."""
    if night:
        try:
            date = datetime.date.fromisoformat(night)
        except ValueError as error:
            raise UsageError(f"--night {night}: {error}", "a date such as 2026-11-25") from error
        if date > datetime.datetime.now(datetime.timezone.utc).date() + datetime.timedelta(days=1):
            raise UsageError(f"--night {night} is to come", "a date such as today's")


_NOT_YOURS = ("place", "stream", "json", "record", "cpuid", "state_dir", "identify")


def _check_run(own: Sequence[str]) -> None:
    """Raise UsageError for arguments that the agent would not take, or that are the sweep's own."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            asked, plain = (make_parser().parse_args(["run", *words]) for words in (own, ()))
    except SystemExit as error:
        why = "it asks for help" if not error.code else " ".join(said.getvalue().split()).partition(": ")[2]
        raise UsageError(f"run would not take {shlex.join(own)}: {why}") from error
    for name in _NOT_YOURS:
        if getattr(asked, name, None) != getattr(plain, name, None):
            raise UsageError(f"run's {name.replace('_', '-')} is the sweep's own", "leave it out")


def _would(arguments: argparse.Namespace, wish: Wish, count: int) -> list[str]:
    """Say what a sweep would do."""
    from kernel_harness.lab.sweep import unfinished

    what = "write to IA32_SPEC_CTRL" if arguments.write else "read CPUID and predict (no --write)"
    lines = [f"would {what} on {night_text.of(count, 'machine')}, {min(wish.forks, count)} at a time"]
    if wish.arguments:
        lines.append(f"  run {shlex.join(wish.arguments)}")
    if wish.kernel:
        lines.append(f"  after booting {wish.kernel} where another kernel runs")
    going_on = unfinished(wish)
    if going_on:
        lines.append(f"  going on with the sweep of {going_on.plan['started']}, which was interrupted")
    lines.append(f"  at most {wish.limit:.0f} s a machine, {wish.wait:.0f} s for one that goes down to be back")
    return [*lines, f"  into {wish.store}", "no machine was touched"]


def nightly(arguments: argparse.Namespace, voice: Voice) -> ExitCode:
    """Do a night's work, or have systemd do it."""
    if arguments.nightly_command == "install":
        return _install(arguments, voice)
    return _nightly_run(arguments, voice)


def _nightly_run(arguments: argparse.Namespace, voice: Voice) -> ExitCode:
    """Sweep, and leave what people and monitors are to see of it."""
    from kernel_harness.lab import nightly as work
    from probe.report import prometheus
    from probe.store import write_atomically

    wish = _wish(arguments)
    _check_afterwards(arguments)
    done, taken = _swept(wish, voice)
    if taken is None or not taken.dates:
        voice.show(night_text.swept(done))
        return done.code()
    text = night_text.swept(done, brief=True)
    night, old = work.conclude(wish.store, done.night, text + "\n", arguments.keep, arguments.kcidb or "")
    if arguments.textfile:
        series = prometheus.of_night(night, done).encode()
        path = write_atomically(series, Path(arguments.textfile) / work.TEXTFILE, replace=True)
        voice.say(f"written: {path}")
    summary = night_text.summary(night)
    voice.show(f"{text}\n{summary}")
    voice.say(f"written: {wish.store / done.night}.html, .txt{', .kcidb' if arguments.kcidb else ''}")
    if old:
        voice.say(f"removed: {night_text.of(len(old), 'night')} up to {old[-1]}")
    if arguments.mail and night.before and night.moved:
        work.send(arguments.mail, f"IA32_SPEC_CTRL, night {night.date}: {night_text.verdict(night)}", summary)
        voice.say(f"sent to {arguments.mail}")
    return done.code()


def _check_afterwards(arguments: argparse.Namespace) -> None:
    """Raise UsageError and RequirementMissing for what could not be done after a sweep."""
    from kernel_harness.lab.nightly import sendmail

    if arguments.keep < 1:
        raise UsageError(f"cannot keep {arguments.keep} nights", "1 or more")
    if arguments.textfile and not Path(arguments.textfile).is_dir():
        raise UsageError(f"no folder {arguments.textfile}", "that of node_exporter's --collector.textfile.directory")
    if arguments.mail:
        if "@" not in arguments.mail or any(char.isspace() for char in arguments.mail):
            raise UsageError(f"{arguments.mail!r} is no address", "such as lab@example.com")
        sendmail()


def _install(arguments: argparse.Namespace, voice: Voice) -> ExitCode:
    """Have systemd do it every night; the inventory is asked first, so that a mistake shows now."""
    from kernel_harness.lab import nightly as work
    from kernel_harness.lab.engine import list_hosts, sources

    wish = _wish(arguments)
    _check_afterwards(arguments)
    if arguments.user and arguments.run_as != "root":
        raise UsageError("--run-as is for --system", "--user runs it as you")
    hosts = list_hosts(wish.inventory, wish.pattern)
    store = Path(arguments.store).absolute()
    if arguments.night:
        raise UsageError("a timer's night is the date on which it runs", "leave out --night")
    words = _for_run(arguments, sources(wish.inventory), store)
    textfile = str(Path(arguments.textfile).absolute()) if arguments.textfile else ""
    found = work.units(
        words,
        store,
        user=arguments.user,
        run_as=arguments.run_as,
        at=arguments.at,
        textfile=textfile,
        mail=bool(arguments.mail),
    )
    unsure = work.verify(found, user=arguments.user)
    if unsure:
        voice.say(unsure)
    if arguments.dry_run:
        voice.write(f"# {found.folder / work.SERVICE}\n{found.service}\n# {found.folder / work.TIMER}\n{found.timer}")
        return ExitCode.AS_PREDICTED
    if arguments.user:
        store.mkdir(parents=True, exist_ok=True)
    else:
        work.give(store, arguments.run_as, voice.say)
    work.install(found, user=arguments.user, say=voice.say)
    voice.say(f"{night_text.of(len(hosts), 'machine')} each night, into {store}")
    return ExitCode.AS_PREDICTED


def _for_run(arguments: argparse.Namespace, inventory: Sequence[str], store: Path) -> list[str]:
    """Return the arguments of "nightly run" that are meant, with paths that hold from any folder."""
    words = [word for one in inventory for word in ("-i", one)]
    words += ["--store", str(store)]
    plain = make_parser().parse_args(["nightly", "run", "-i", "x,"])
    paths = ("agent", "textfile")
    for name in ("limit", "forks", "host_timeout", "wait", "kernel", "agent", "keep", "textfile", "mail", "kcidb"):
        value = getattr(arguments, name)
        if value != getattr(plain, name):
            told = str(Path(value).absolute()) if name in paths else f"{value:g}" if isinstance(value, float) else value
            words += [f"--{name.replace('_', '-')}", str(told)]
    if arguments.canary:
        words += ["--canary", f"{arguments.canary * 100:g}%"]
    words += [word for word, on in (("--write", arguments.write), ("--no-become", arguments.no_become)) if on]
    return [*words, *(["--", *arguments.run_arguments] if arguments.run_arguments else [])]
