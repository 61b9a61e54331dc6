# SPDX-License-Identifier: MIT
"""The sub-commands: printing and exit codes. The only file that prints or exits; arguments.py has the arguments.

What a sub-command needs is imported inside it, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import probe
from probe.arguments import make_parser
from probe.errors import ExitCode, ProbeError, RecordError, RequirementMissing, UsageError
from probe.masks import format_list

if TYPE_CHECKING:
    from probe import record as rec
    from probe.b4_check import Shelf
    from probe.cases import Report
    from probe.cpuid.dumps import Dump
    from probe.diff.moved import AnyRecord
    from probe.doctor import Check
    from probe.migration_record import MigrationRecord
    from probe.models.machine import Machine
    from probe.models.prediction import Model
    from probe.models.profile import Profile
    from probe.stream import Events


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors go to stderr as one line."""
    arguments = argparse.Namespace()  # an interrupt may come while the arguments are read
    try:
        arguments = make_parser().parse_args(argv)
        arguments.argv = list(sys.argv[1:] if argv is None else argv)
        if sys.stdout.isatty() and getattr(arguments, "format", "text") == "text":
            from probe.report import layout

            layout.narrow(shutil.get_terminal_size().columns)
        return int(_HANDLERS[arguments.command](arguments))
    except ProbeError as error:
        _complain("spec-ctrl-probe", error)
        if getattr(arguments, "stream", False):
            events = _events(arguments)
            events.send("error", exit_code=int(error.exit_code), message=str(error))
            events.finish()
        return int(error.exit_code)
    except KeyboardInterrupt as error:
        by = f"interrupted{f' by {error}' if error.args else ''}"
        _say(f"spec-ctrl-probe: {by}")
        if getattr(arguments, "stream", False):
            events = _events(arguments)
            events.send("error", exit_code=int(ExitCode.INTERRUPTED), message=by)
            events.finish()
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"use {error.filename}" if error.filename else "write standard output"
        _say(f"spec-ctrl-probe: cannot {what}: {error.strerror}")
        return int(ExitCode.FAILED)
    except Exception as error:  # a status of 1 would mean findings
        _say(f"spec-ctrl-probe: internal error: {error!r}")
        return int(ExitCode.FAILED)


def _complain(who: str, error: ProbeError) -> None:
    """Say what went wrong, and of a guest that was lost the last lines of its console."""
    from probe.errors import GuestLost
    from probe.report.layout import clean

    _say(f"{who}: {error}")
    if isinstance(error, GuestLost):
        for line in error.console:
            _say(f"  | {clean(line)}")


def entry() -> None:
    """Run as a program; a reader that has gone away (head, a closed terminal) is no error, and changes no answer."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (open until the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows ? instead
            stream.reconfigure(errors="replace")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what is open is closed, a guest of ours ends
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    code = int(ExitCode.AS_PREDICTED)
    try:
        try:
            code = main()
        except SystemExit as error:  # argparse: --help, --version, a wrong argument
            code = int(error.code or 0)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _say(f"spec-ctrl-probe: cannot write standard output: {error.strerror}")
        code = int(ExitCode.FAILED)
    sys.exit(code)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _say(text: str) -> None:
    """Print a line on stderr, if anyone is left to read it."""
    _try_to_print(text, sys.stderr)


def _tell(text: str) -> None:
    """Print a line on stdout, if anyone is left to read it: what was done, and its exit code, do not hang on that."""
    _try_to_print(text, sys.stdout)


def _show_report(text: str) -> None:
    """Print a report; on a terminal in colour, unless NO_COLOR is set."""
    if sys.stdout.isatty():
        from probe.report import terminal

        if not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb":
            text = terminal.coloured(text)
    sys.stdout.write(text)


def _write(text: str) -> None:
    """Write what programs read."""
    sys.stdout.write(text)


def _try_to_print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Progress:
    """One line on a terminal's stderr that counts steps; silent anywhere else."""

    def __init__(self, what: str = "bit trials") -> None:
        self._on = sys.stderr.isatty()
        self._next = 0.0
        self._what = what

    def __call__(self, done: int, total: int) -> None:
        clock = time.monotonic()
        if not self._on or (clock < self._next and done < total):
            return
        self._next = clock + 0.1
        try:
            sys.stderr.write("\r\x1b[K" if done == total else f"\r{self._what} {done}/{total} ")
            sys.stderr.flush()
        except OSError:
            self._on = False


class _Line:
    """One line on a terminal's stderr that is overwritten; "" removes it; silent anywhere else."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._on:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
                sys.stderr.flush()


class _Waiting:
    """One line on a terminal's stderr that counts the seconds while a guest runs; silent anywhere else."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._told = -1

    def __call__(self, seconds: float | None) -> None:
        if not self._on or (seconds is not None and int(seconds) == self._told):
            return
        text = "\r\x1b[K"
        if seconds is not None:
            self._told = int(seconds)
            text = f"\rthe guest runs: {self._told} s "
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


# --- run -----------------------------------------------------------------------------------------------------------

_MOST_GUEST_CPUS = 64
_PATH_OPTIONS = ("--record", "--record-dir", "--cpuid", "--state-dir", "--kernel", "--kernels", "--save")


def without_paths(argv: Sequence[str]) -> list[str]:
    """Return a command line that may stand in a record: every path becomes PATH."""
    kept: list[str] = []
    hide = False
    for word in argv:
        name, equals, value = word.partition("=")
        if hide:
            kept.append(_last_part(word))
        elif equals and name in _PATH_OPTIONS:
            kept.append(f"{name}={_last_part(value)}")
        else:
            kept.append(_last_part(word) if "/" in word else word)  # a policy's file, say
        hide = not equals and name in _PATH_OPTIONS
    return kept


def _last_part(text: str) -> str:
    """Hide a path; of several kernels with commas each."""
    return ",".join(part if part in ("-", "host") or part.startswith("debian:") else "PATH" for part in text.split(","))


def _run(arguments: argparse.Namespace) -> int:
    from probe.models import registry

    registry.get(arguments.model)
    if arguments.place == "kvm":
        return _run_in_kvm(arguments)
    place, because = _choose_place(arguments)
    if arguments.stream and (place == "guest" or arguments.json):
        raise UsageError("--stream tells of this machine, event by event", "with --in metal, and without --json")
    may = place == "guest" or not arguments.write or os.geteuid() == 0
    if may:
        _check_record_path(arguments.record)
    _say(f"place: {place} ({because})")
    if not may:
        raise RequirementMissing(
            "not root: the msr driver needs CAP_SYS_RAWIO", f"run it as root: {_metal_command(arguments)}"
        )
    record = _run_in_guest(arguments, because) if place == "guest" else _run_here(arguments, because)
    return _deliver(record, arguments)


def _check_record_path(path: str | None) -> None:
    """Find out before anything is measured that the record could not be written there."""
    if path is None or path == "-":
        return
    folder = Path(path).parent
    if Path(path).is_dir():
        raise UsageError(
            f"cannot write the record to {path}: it is a folder", f"name a file: --record {path}/NAME.json"
        )
    if not folder.is_dir():
        raise UsageError(f"cannot write the record to {path}: no folder {folder}", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write the record to {path}: {folder} is not writable", "give another: --record PATH")


def _choose_place(arguments: argparse.Namespace) -> tuple[str, str]:
    """Decide between this machine's msr driver and a guest; return the place and why."""
    from probe.host import Host, Modules

    guest_only = [name for name in ("kernel", "model_register") if getattr(arguments, name)]
    if arguments.place == "metal":
        if guest_only:
            raise UsageError(f"--{guest_only[0].replace('_', '-')} is for guests", "use --in guest")
        return "metal", "asked for with --in metal"
    if arguments.write and (arguments.place == "guest" or guest_only):
        raise UsageError("--write is for this machine's own registers; a guest needs no consent", "drop --write")
    if arguments.place == "guest":
        return "guest", "asked for with --in guest"
    if guest_only:
        return "guest", f"--{guest_only[0].replace('_', '-')} asks for a guest"
    there = bool(Host().msr_cpus())
    if not there and not Modules.available("msr"):
        if arguments.write:
            raise RequirementMissing(
                "this kernel has no msr driver: no /dev/cpu/0/msr, and modprobe finds no msr module (CONFIG_X86_MSR)",
                "boot a kernel that has it; or probe a guest: drop --write",
            )
        return "guest", "this kernel has no msr driver: no /dev/cpu/0/msr, and modprobe finds no msr module"
    if not arguments.write:
        return "guest", "without --write this machine's registers are not touched"
    return "metal", "the msr driver is there" if there else "the msr driver can be loaded"


def _program() -> str:
    """Return what the user has to type to call this program again."""
    name = sys.argv[0]
    if "/" not in name:
        return name if name == "spec-ctrl-probe" else "spec-ctrl-probe"
    if name.endswith("__main__.py"):
        return f"{shlex.quote(sys.executable)} -m probe"
    return shlex.quote(name if shutil.which("spec-ctrl-probe") != name else "spec-ctrl-probe")


def _metal_command(arguments: argparse.Namespace) -> str:
    """Return the command that does on this machine's registers what was asked for."""
    words = [word for word in arguments.argv if word != "--write"]
    return f"{_program()} {shlex.join([*words, '--write'])}"


def _dump(path: str | None) -> Dump | None:
    if path is None:
        return None
    from probe.cpuid.dumps import read_dump
    from probe.entries import dump_of_record

    return read_dump(path, sys.stdin.buffer, dump_of_record)


def _run_here(arguments: argparse.Namespace, because: str) -> rec.Record:
    from probe.journal import STATE_DIR
    from probe.run import Ears, Options, run

    options = Options(
        write=arguments.write,
        cpus=arguments.cpus,
        bits=arguments.bits,
        base_zero=arguments.base == "zero",
        clear_bits=arguments.clear_bits,
        pairs=arguments.pairs,
        repeat=arguments.repeat,
        judge=arguments.model,
        cpuid_file=_dump(arguments.cpuid),
        identity=arguments.identify,
        state_dir=Path(arguments.state_dir) if arguments.state_dir else STATE_DIR,
        allow_running_vms=arguments.allow_running_vms,
        allow_bad_microcode=arguments.allow_bad_microcode,
        allow_container=arguments.allow_container,
        because=because,
        arguments=tuple(without_paths(arguments.argv)),
    )
    intent = _no_intent
    if arguments.stream:
        events = _events(arguments)
        events.send("start", version=probe.__version__, agent=probe.AGENT)

        def intent(step: str, mask: int) -> None:
            events.send("intent", step=step, mask=f"{mask:#018x}")

    record = run(options, Ears(say=_say, progress=_Progress(), intent=intent))
    if not arguments.write:
        _say(f"nothing was written; {_how_to_probe_the_metal(arguments)}")
    return record


def _events(arguments: argparse.Namespace) -> Events:
    """Return what --stream writes to, the same one throughout a command."""
    from probe.stream import Events

    if not hasattr(arguments, "events"):
        arguments.events = Events(sys.stdout.fileno())
    found: Events = arguments.events
    return found


def _no_intent(step: str, mask: int) -> None:
    pass


def _how_to_probe_the_metal(arguments: argparse.Namespace) -> str:
    from probe.host import Host, Modules

    if Host().msr_cpus() or Modules.available("msr"):
        return f"to probe this machine's registers, as root: {_metal_command(arguments)}"
    return "this machine's registers cannot be probed: its kernel has no msr driver (CONFIG_X86_MSR)"


def _run_in_guest(arguments: argparse.Namespace, because: str) -> rec.Record:
    from kernel_harness.boot.agent import Wanted, probe_in_guest

    passed: list[str] = ["--bits", format_list(arguments.bits), "--base", arguments.base, "--model", arguments.model]
    passed += ["--repeat", str(arguments.repeat)]
    passed += ["--clear-bits"] if arguments.clear_bits else []
    passed += ["--pairs"] if arguments.pairs else []
    passed += ["--cpus", format_list(arguments.cpus)] if arguments.cpus else []
    passed += ["--identify", arguments.identify] if arguments.identify else []
    dump = _dump(arguments.cpuid)
    cpus = max(2, max(arguments.cpus or (0,)) + 1)
    if cpus > _MOST_GUEST_CPUS:
        raise UsageError(f"no CPU {cpus - 1} in a guest: it gets at most {_MOST_GUEST_CPUS}", "give other --cpus")
    record = probe_in_guest(
        Wanted(
            kernel=arguments.kernel,
            accelerator=arguments.accel,
            cpus=cpus,
            arguments=passed,
            cpuid=dump,
            register_model=arguments.model_register,
            because=because,
            waiting=_Waiting(),
        ),
        _say,
    )
    if "--model-register" not in arguments.argv and not arguments.kernel:
        _say(f"this was a guest's register; {_how_to_probe_the_metal(arguments)}")
    record.tool.arguments = without_paths(arguments.argv)
    return record


def _deliver(record: rec.Record, arguments: argparse.Namespace) -> int:
    """Write the record, print it or the report, and turn it into an exit code; a full disk loses no report."""
    from msgspec import UNSET

    from probe import record as rec
    from probe import store
    from probe.report import text

    raw = rec.encode(record)
    failed: ProbeError | None = None
    told = ""
    if arguments.record != "-" and (arguments.record or record.walk is not UNSET):  # a mere plan leaves no file
        path = Path(arguments.record) if arguments.record else store.default_path(record)
        try:
            taken = store.write_atomically(raw, path, replace=arguments.record is not None)
            told = f"record: {taken}"
        except ProbeError as error:
            failed = error
    try:
        if arguments.stream:
            import json

            events = _events(arguments)
            events.send("record", record=json.loads(raw))
            if not events.finish():
                failed = failed or ProbeError("the reader of --stream hangs: it has not taken the record", told)
        elif arguments.json or arguments.record == "-":
            sys.stdout.write(raw.decode())
        else:
            _show_report(text.render(record))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone; what the run found stays its exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # the terminal has gone (EIO), or standard output is a full disk
        if failed is None:
            failed = ProbeError(f"cannot print the report: {error.strerror}", "the record is written" if told else "")
    if failed is not None:
        if exit_code(record) == ExitCode.NOT_RESTORED:  # matters more than a file
            _say(f"spec-ctrl-probe: {failed}")
            return int(ExitCode.NOT_RESTORED)
        raise failed
    if told:
        _say(told)
    return exit_code(record)


def exit_code(record: rec.Record) -> int:
    """Return what a run's record means for a script."""
    from probe.report import text

    if any(entry.state != "verified" for entry in record.restore):
        return int(ExitCode.NOT_RESTORED)
    if not text.measured_anything(record):
        return int(ExitCode.REQUIREMENT_MISSING)
    if record.findings:
        return int(ExitCode.FINDINGS)
    return int(ExitCode.AS_PREDICTED)


# --- kvm -----------------------------------------------------------------------------------------------------------


def _run_in_kvm(arguments: argparse.Namespace) -> int:
    """Do the matrix for `run --in kvm`: what concerns one register's walk has no place there."""
    allowed = {"--in", "kvm", "--in=kvm", "run", "--json", "--record", "--identify"}
    other = [word for word in arguments.argv if word.startswith("--") and word.partition("=")[0] not in allowed]
    if other:
        raise UsageError(f"{other[0]} does not go with --in kvm", "see: spec-ctrl-probe kvm --help")
    arguments.profile, arguments.all_profiles, arguments.jobs, arguments.kvm_command = None, False, None, None
    arguments.programs, arguments.seed, arguments.write, arguments.state_dir = 0, 1, False, None
    return _kvm(arguments)


def _kvm(arguments: argparse.Namespace) -> int:
    """Do a sub-command of kvm; where a policy of the user's own runs, in a process that it may end or crash."""
    given = [getattr(arguments, name, None) for name in ("policy", "compare", "from_policy", "to_policy")]
    return _beside_policies(given, lambda: _kvm_here(arguments))


def _beside_policies(names: Sequence[str | None], work: Callable[[], int]) -> int:
    """Do work, in a process of its own if there are files among these policies."""
    if not any(name and name.endswith(".py") for name in names):
        return work()
    from kernel_harness.kvm.policed import lost
    from kernel_harness.kvm.policy_file import file_names
    from kernel_harness.kvm.processes import ProcessLost, apart

    try:
        return apart(work)
    except ProcessLost as error:
        raise lost(" or ".join(file_names(names)), error) from None


_HEEDED = {"replay": (), "explore": ("programs", "seed"), "migrate": ("record", "json", "identify")}


def _refuse_what_is_not_heeded(arguments: argparse.Namespace) -> None:
    """Raise UsageError for an option of the matrix that this sub-command of kvm would pass over in silence."""
    command = arguments.kvm_command
    if command is None or (command == "policy" and arguments.policy and not _asked_of_policy(arguments)):
        return
    plain = vars(make_parser().parse_args(["kvm"]))
    for name, default in plain.items():
        if name not in (*_HEEDED.get(command, ()), "command", "kvm_command") and getattr(arguments, name) != default:
            what = " ".join(["kvm", command, *_asked_of_policy(arguments)])
            cure = "see: kvm policy --help; kvm policy NAME heeds it" if command == "policy" else f"see: {what} --help"
            raise UsageError(f"--{name.replace('_', '-')} does not go with {what}", cure)


def _asked_of_policy(arguments: argparse.Namespace) -> list[str]:
    """Return the options that ask for something else than a run under a policy."""
    return [f"--{name}" for name in ("compare", "cost", "table") if getattr(arguments, name, None)]


def _kvm_here(arguments: argparse.Namespace) -> int:
    _refuse_what_is_not_heeded(arguments)
    if arguments.kvm_command == "replay":
        return _kvm_replay(arguments)
    if arguments.kvm_command == "explore":
        return _kvm_explore(arguments)
    if arguments.kvm_command == "migrate":
        return _kvm_migrate(arguments)
    policy = None
    if arguments.kvm_command == "policy":
        if not arguments.policy or _asked_of_policy(arguments):
            return _kvm_policy(arguments)
        from kernel_harness.kvm.policy_file import find

        policy = find(arguments.policy)
    from msgspec import UnsetType

    from kernel_harness.kvm.study import all_profiles, study
    from probe import kvm_record, store
    from probe.journal import STATE_DIR
    from probe.models.profile import parse_profile
    from probe.report import kvm_text

    if arguments.profile and arguments.all_profiles:
        raise UsageError("--profile and --all-profiles contradict each other", "give one of them")
    _check_record_path(arguments.record)
    profiles = [parse_profile(text) for text in arguments.profile or ()] or None
    record = study(
        all_profiles() if arguments.all_profiles else profiles,
        arguments=without_paths(arguments.argv),
        identity=arguments.identify,
        jobs=arguments.jobs,
        programs=arguments.programs,
        seed=arguments.seed,
        driver=Path(arguments.state_dir or STATE_DIR) if arguments.write else None,
        policy=policy,
        progress=_Progress("profiles"),
        say=_say,
    )
    raw = kvm_record.encode(record)
    broken = kvm_record.complaints(record)
    if broken and not arguments.record:
        _say("no record: the policy did not decide every write (--record PATH writes one)")
    elif arguments.record != "-":  # before anything is printed: nobody may be there to read it
        path = Path(arguments.record) if arguments.record else store.default_kvm_path(record)
        _say(f"record: {store.write_atomically(raw, path, replace=arguments.record is not None)}")
    if arguments.json or arguments.record == "-":
        sys.stdout.write(raw.decode())
    else:
        _show_report(kvm_text.render(record))
    sys.stdout.flush()
    if broken:
        return int(ExitCode.FAILED)
    if (
        not isinstance(record.driver, UnsetType) and record.driver.error
    ):  # it was asked for, and the record has the rest
        return record.driver.exit_code
    return int(ExitCode.AS_PREDICTED if kvm_record.as_predicted(record) else ExitCode.FINDINGS)


def _kvm_policy(arguments: argparse.Namespace) -> int:
    """List policies, compare two, or tell what they break and cost."""
    from kernel_harness.kvm import policy_file
    from kernel_harness.kvm.commands import judged, policy_costs
    from probe.models import machines
    from probe.models.difference import policy_difference
    from probe.models.migration import BY_NAME
    from probe.models.policy import POLICIES, PolicyMachine
    from probe.report import policy_text

    if arguments.compare and (arguments.cost or arguments.table):
        raise UsageError("--compare is of two policies", "without --cost and --table")
    over = machines.get("kvm-6.19-svm")  # the newest rule of KVM, over which policies are compared without a machine
    chosen = [policy_file.find(arguments.policy)] if arguments.policy else []
    if arguments.compare:
        if not chosen:
            raise UsageError("--compare wants a policy to compare with", "kvm policy NAME --compare OTHER")
        with judged([*chosen, policy_file.find(arguments.compare)]) as (both, complaints):
            one, other = (PolicyMachine(policy, over) for policy in both)
            found = policy_difference(one, other)
            values, differ = policy_text.writes(one, other), policy_text.fates(one, other)
            _show_report(policy_text.compared(one.policy, other.policy, over, found, values, differ))
        return _policy_code(complaints(), ExitCode.FINDINGS if found or values or differ else ExitCode.AS_PREDICTED)
    if not (arguments.cost or arguments.table):
        _show_report(policy_text.catalogue(policy_file.EXAMPLE))
        return int(ExitCode.AS_PREDICTED)
    policies = chosen or list(POLICIES)
    told: list[str] = []
    costs = None
    if arguments.cost:
        costs, told = policy_costs(policies, _Progress("rounds"))
    if arguments.table:
        with judged(policies) as (asked_policies, complaints):
            asked = [PolicyMachine(policy, over) for policy in asked_policies]
            rule = BY_NAME["qemu"]
            _show_report(policy_text.summary(asked, rule, costs) + "\n")
            _show_report(policy_text.survival(asked) + "\n")
            _show_report(policy_text.moves(asked, rule) + ("\n" if costs else ""))
        told += complaints()
    if costs is not None:
        _show_report(policy_text.costs(costs))
    return _policy_code(told, ExitCode.AS_PREDICTED)


def _policy_code(complaints: Sequence[str], otherwise: ExitCode) -> int:
    """Say what policies did that is no decision; the exit code is that of a failure then."""
    for complaint in complaints:
        _say(f"spec-ctrl-probe: {complaint}")
    return int(ExitCode.FAILED if complaints else otherwise)


def _kvm_migrate(arguments: argparse.Namespace) -> int:
    from kernel_harness.kvm.commands import migrate
    from kernel_harness.kvm.policy_file import find
    from probe import migration_record, store
    from probe.report import moved_text

    _check_record_path(arguments.record)
    record = migrate(
        None if arguments.program is None else _program_text(arguments.program),
        [migration_record.decode(*store.read_raw(path)) for path in arguments.restore or ()],
        source=find(arguments.from_policy) if arguments.from_policy else None,
        target=find(arguments.to_policy) if arguments.to_policy else None,
        profile=arguments.to_profile or "",
        rule=arguments.rule,
        arguments=without_paths(arguments.argv),
        identity=arguments.identify,
        progress=_Progress("guests"),
    )
    raw = migration_record.encode(record)
    if arguments.record not in (None, "-"):
        _say(f"record: {store.write_atomically(raw, Path(arguments.record), replace=True)}")
    if arguments.json or arguments.record == "-":
        sys.stdout.write(raw.decode())
    else:
        _show_report(moved_text.render([record]))
    sys.stdout.flush()
    return _migration_code([record])


def _migration_code(records: Sequence[MigrationRecord]) -> int:
    """A study shows what breaks: it has a finding where a model was wrong; a program's guest shall arrive whole."""
    from probe.migration_record import as_calculated, departed_of

    moved = all(record.study or entry.outcome == "works" for record in records for entry in record.arrivals)
    gone = any(not record.study and departed_of(one).gone for record in records for one in record.departures)
    fine = moved and not gone and all(as_calculated(record) for record in records)
    told = [text for record in records for text in record.complaints]
    return _policy_code(told, ExitCode.AS_PREDICTED if fine else ExitCode.FINDINGS)


def _migrate(arguments: argparse.Namespace) -> int:
    from probe import store
    from probe.models.migration import BY_NAME
    from probe.pool import advise, grouped, place_of
    from probe.report import migrate_text

    if arguments.rule and arguments.rule not in BY_NAME:
        raise UsageError(f"no rule is called {arguments.rule!r}", f"one of: {', '.join(BY_NAME)}")
    rule = BY_NAME[arguments.rule or "qemu"]
    folders = [path for path in map(Path, arguments.records) if path.is_dir()]
    places = []
    left_out = 0
    for path, name in _records_named(arguments.records):
        try:
            if name and not path.is_file():
                raise RecordError(f"{path} is no regular file", "a folder's records are its files *.json")
            places.append(place_of(store.read_any(path), name or path.name))
        except RecordError as error:
            if not name:
                raise
            left_out += 1
            _say(f"left out: {error}")
    if len(places) < 2:
        raise UsageError(
            "a migration needs two records of run or kvm",
            "give two, or a folder that holds some; records of kvm migrate are for show and kvm migrate --restore",
        )
    groups = grouped(places)
    rules = [rule] if arguments.rule else list(BY_NAME.values())
    advice = advise(groups, rule)
    if arguments.json:
        sys.stdout.writelines(migrate_text.as_json(groups, rule, rules, advice))
    else:
        parts = [migrate_text.matrix(groups, rule, advice)] if folders or len(places) > 2 else []
        if len(places) == 2:
            one, other = places
            parts = [migrate_text.pair(one, other, rules), migrate_text.pair(other, one, rules), *parts]
        _show_report("\n".join(parts))
    if left_out and not arguments.json:
        _show_report("\n" + migrate_text.left_out(left_out))
    return int(ExitCode.FINDINGS if advice.breaks.some else ExitCode.AS_PREDICTED)


def _records_named(arguments: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files that are given, and those of folders with a name: their path in it, of several with its name."""
    several = len(arguments) > 1
    for argument in map(Path, arguments):
        if not argument.is_dir():
            yield argument, ""
            continue
        for path in sorted(argument.rglob("*.json")):
            name = path.relative_to(argument)
            yield path, str(argument.resolve().name / name if several else name)


def _boot(arguments: argparse.Namespace) -> int:
    from kernel_harness.boot.kvm import Wanted, study_kernels
    from probe import kvm_record, store
    from probe.models.profile import parse_profile
    from probe.report import kvm_text

    inside = [word for word in arguments.inside if word != "--"] or ["kvm"]
    asked = _asked_inside(inside)
    if arguments.record_dir and not Path(arguments.record_dir).is_dir():
        raise UsageError(f"no folder {arguments.record_dir}", f"mkdir -p {arguments.record_dir}")
    # The guest has another working folder, and sees this machine's files.
    here = [str(Path(word).resolve()) if word.endswith(".py") and Path(word).is_file() else word for word in inside]
    wanted = Wanted(
        accelerator=arguments.accel,
        arguments=here[1:],
        append=arguments.append.split(),
        tested=arguments.tested,
        cpu=None if arguments.cpu is None else parse_profile(arguments.cpu),
        timeout=arguments.timeout,
        waiting=_Waiting(),
    )
    if asked.kvm_command == "migrate":
        from kernel_harness.boot.migrate import move_between

        return _boot_migrate(arguments, asked, functools.partial(move_between, arguments.kernels.split(","), wanted))
    booted = []
    for one in study_kernels(arguments.kernels.split(","), wanted, _say):
        booted.append(one)
        if one.error is not None:
            _complain(one.spec, one.error)
        if one.record is None:
            continue
        one.record.tool.arguments = without_paths(arguments.argv)
        path = store.default_kvm_path(one.record)
        if arguments.record_dir:
            path = Path(arguments.record_dir) / path.name
        _say(f"record: {store.write_atomically(kvm_record.encode(one.record), path, replace=False)}")
    told = [(_last_part(one.spec) if "/" in one.spec else one.spec, one.record, str(one.error or "")) for one in booted]
    _show_report(kvm_text.table(told))
    errors = [one.error for one in booted if one.error is not None]
    if errors and len(errors) == len(booted):
        return int(errors[0].exit_code)
    explained = all(one.record is not None and kvm_record.as_predicted(one.record) for one in booted)
    return int(ExitCode.AS_PREDICTED if explained else ExitCode.FINDINGS)


def _asked_inside(inside: Sequence[str]) -> argparse.Namespace:
    """Read what shall run in the guests; what is wrong with it is told before anything is booted."""
    want = "want: -- kvm [--profile ...] [--programs N]; -- kvm policy NAME; or -- kvm migrate [FILE]"
    unfit = UsageError(f"cannot run {' '.join(inside)!r} in the guests", want)
    if inside[0] != "kvm":
        raise unfit
    asked = make_parser().parse_args(inside)
    given = vars(asked)
    ours = ("record", "json", "restore", "write", "state_dir", "compare", "cost", "table")
    if asked.kvm_command in ("replay", "explore") or any(given.get(name) for name in ours):
        raise unfit
    from kernel_harness.kvm.policy_file import find
    from probe.models.migration import BY_NAME

    if asked.kvm_command == "policy" and not asked.policy:
        raise unfit
    names = [name for name in (given.get(key) for key in ("policy", "from_policy", "to_policy")) if name]
    _beside_policies(names, lambda: len([find(name) for name in names]))
    if asked.kvm_command == "migrate" and asked.rule not in BY_NAME:
        raise UsageError(f"no rule is called {asked.rule!r}", f"one of: {', '.join(BY_NAME)}")
    return asked


def _boot_migrate(arguments: argparse.Namespace, asked: argparse.Namespace, move: Callable[..., Sequence[Any]]) -> int:
    """Move guests between the kernels; every pair is one block of the report."""
    from probe import migration_record, store
    from probe.report import moved_text

    def options(*names: str) -> list[str]:
        found = {name: getattr(asked, name.replace("-", "_")) for name in names}
        files = {name: str(Path(value).resolve()) for name, value in found.items() if str(value).endswith(".py")}
        return [f"--{name}={files.get(name, value)}" for name, value in found.items() if value]

    done = move(
        None if asked.program is None else _program_text(asked.program),
        options("from-policy"),
        options("to-policy", "to-profile", "rule", "identify"),
        _say,
    )
    records = []
    for one in done:
        if one.error is not None:
            _complain(one.spec, one.error)
        if one.record is None:
            continue
        one.record.tool.arguments = without_paths(arguments.argv)
        records.append(one.record)
        path = store.default_migration_path(one.record)
        if arguments.record_dir:
            path = Path(arguments.record_dir) / path.name
        _say(f"record: {store.write_atomically(migration_record.encode(one.record), path, replace=False)}")
    errors = [one.error for one in done if one.error is not None]
    if not records:
        return int(errors[0].exit_code)
    _show_report(moved_text.render(records))
    code = _migration_code(records)
    return code or int(ExitCode.FINDINGS if errors else ExitCode.AS_PREDICTED)


def _program_text(path: str) -> str:
    """Read a program's text, of at most 1 MiB, from a file or standard input."""
    try:
        if path == "-":
            return sys.stdin.read(1 << 20)
        with open(path, encoding="utf-8") as file:
            return file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"cannot read {path}: {why}", "give a file with a program, or -") from error


def _kvm_replay(arguments: argparse.Namespace) -> int:
    from kernel_harness.kvm.commands import replay
    from kernel_harness.kvm.policy_file import find

    policy = find(arguments.policy) if arguments.policy else None
    outcome = replay(_program_text(arguments.program), arguments.model, policy)
    _show_report(outcome.text)
    return _policy_code(outcome.complaints, ExitCode.AS_PREDICTED if outcome.as_expected else ExitCode.FINDINGS)


def _kvm_explore(arguments: argparse.Namespace) -> int:
    from kernel_harness.kvm.commands import explore_model
    from probe import store

    _check_record_path(arguments.save)
    outcome = explore_model(
        arguments.model,
        programs=arguments.programs,
        seconds=arguments.seconds,
        seed=arguments.seed,
        progress=_Progress("programs"),
    )
    _show_report(outcome.text)
    if arguments.save and not outcome.as_expected:
        program = outcome.text.partition("\n\n")[2]
        _say(f"saved: {store.write_atomically(program.encode(), Path(arguments.save), replace=True)}")
    return int(ExitCode.AS_PREDICTED if outcome.as_expected else ExitCode.FINDINGS)


# --- the other commands ----------------------------------------------------------------------------------------------


def _predict(arguments: argparse.Namespace) -> int:
    from probe.models import registry
    from probe.report import prediction as report

    if arguments.host or arguments.guest or arguments.hardware is not None:
        return _what_if(arguments)
    names = arguments.model or ["vendor"]
    models = registry.MODELS if "all" in names else tuple(registry.get(name) for name in names)
    dump = _dump(arguments.file)
    if dump is None:
        from probe.cpuid.machine import read_machine
        from probe.host import Host

        machine = read_machine(Host().online())
        cpus, form = dict(machine.cpus), f"this machine ({' and '.join(machine.sources)})"
    else:
        cpus, form = dict(dump.cpus), dump.form
    if arguments.json and not arguments.model:
        models = registry.MODELS
    groups = report.grouped(cpus, models)
    if arguments.json:
        sys.stdout.write(report.as_json(form, groups))
    else:
        _show_report(report.as_text(form, groups))
    return int(ExitCode.AS_PREDICTED)


def _what_if(arguments: argparse.Namespace) -> int:
    """Answer what a hypervisor's rule would do on one host to one guest; asked by --host, --guest or --hardware."""
    from probe.models import machines, what_if
    from probe.models.profile import Profile, profile_of
    from probe.models.vendor import MODEL
    from probe.report import prediction as report

    if arguments.file is not None:
        raise UsageError("FILE does not go with --host, --guest or --hardware", "give the host's as --host FILE")
    names = arguments.model or ["all"]
    asked = [one for one in machines.MACHINES if one.family != "oracle"] if "all" in names else map(machines.get, names)
    dump = _dump(arguments.host)
    if dump is None:
        from probe.cpuid.machine import read_machine

        cpus = read_machine((0,)).cpus
        host, form = cpus[min(cpus)], "this machine"
    else:
        host, form = dump.cpus[min(dump.cpus)], dump.form
    features = profile_of(host).mask
    guest = _guest_profile(arguments.guest) if arguments.guest else Profile(what_if.offered(features))
    promised = MODEL.predict(host)
    accepts = arguments.hardware if arguments.hardware is not None else promised.accepts if promised.exists else None
    answers = [what_if.what_if(machine, features, guest, accepts) for machine in asked]
    tell = report.what_if_as_json if arguments.json else report.what_if_as_text
    told = tell(f"{host.vendor} {host.signature:#x}, {form}", features, guest, accepts, answers)
    (sys.stdout.write if arguments.json else _show_report)(told)
    return int(ExitCode.AS_PREDICTED)


def _guest_profile(text: str) -> Profile:
    """Read a guest's CPUID: a profile, or else the first CPU of a dump."""
    from probe.models.profile import parse_profile, profile_of

    if text != "-" and not Path(text).exists():
        return parse_profile(text)
    dump = _dump(text)
    assert dump is not None
    return profile_of(dump.cpus[min(dump.cpus)])


def _doctor(arguments: argparse.Namespace) -> int:
    from kernel_harness.boot.cache import default_cache
    from kernel_harness.boot.guest import remembered_accelerator, requirements
    from kernel_harness.boot.kernels import default_spec
    from probe.cpuid.machine import read_machine
    from probe.doctor import examine, look_around, ready_for
    from probe.host import Host, Modules

    host = Host()
    facts = host.facts()
    try:
        kernel = default_spec()
    except RequirementMissing:
        kernel = ""
    around = look_around(
        host.msr_cpus(), Modules.available("msr"), requirements(), kernel, remembered_accelerator(default_cache())
    )
    checks = examine(facts, around, read_machine(facts.online).cpus)
    if arguments.json:
        import json

        sys.stdout.write(json.dumps([vars(check) for check in checks], indent=2) + "\n")
    else:
        _print_checks(checks)
    places = ready_for(checks)
    if not arguments.json:
        print()
        print("ready for: " + (", ".join(places) or "nothing"))
    return int(ExitCode.AS_PREDICTED if places else ExitCode.REQUIREMENT_MISSING)


def _print_checks(checks: Sequence[Check]) -> None:
    import textwrap

    for check in checks:
        lines = textwrap.wrap(check.text, 52, break_on_hyphens=False) or [""]
        print(f"{check.state:<8}{check.name:<14}{lines[0]}")
        for line in lines[1:]:
            print(f"{'':<22}{line}")
        if check.remedy and check.state != "ok":
            print(f"{'':<22}-> {check.remedy.replace('spec-ctrl-probe', _program())}")


def _restore(arguments: argparse.Namespace) -> int:
    from probe.host import Host, Modules
    from probe.journal import STATE_DIR, Lock, read_leftover
    from probe.msr import MsrDriver
    from probe.run import settle
    from probe.scheduling import CpuPin, StopRequest

    if os.geteuid() != 0:
        raise RequirementMissing(
            "not root: the journal and the msr driver need it", f"run it as root: {_program()} restore"
        )
    state_dir = Path(arguments.state_dir) if arguments.state_dir else STATE_DIR
    if not state_dir.is_dir():
        if arguments.state_dir:
            raise UsageError(f"no folder {state_dir}", "give the --state-dir of the run that died")
        print(f"no journal: no run on this machine has ever used {state_dir}")
        return int(ExitCode.AS_PREDICTED)
    with Lock(state_dir), Modules() as modules:
        leftover = read_leftover(state_dir)
        if leftover is None:
            print(f"no journal in {state_dir}: nothing to put back")
            return int(ExitCode.AS_PREDICTED)
        boot_id = Host().boot_id()
        same_boot = bool(boot_id) and leftover.boot_id == boot_id
        if same_boot:
            modules.load("msr")
        with MsrDriver(writable=True) as msr, CpuPin() as pin, StopRequest():
            if same_boot:
                msr.claim(leftover.saved)
            proof = settle(leftover, msr, pin, boot_id, _tell)
    unproved = any(item.state != item.VERIFIED for item in proof)
    return int(ExitCode.NOT_RESTORED if unproved else ExitCode.AS_PREDICTED)


def _show(arguments: argparse.Namespace) -> int:
    from probe import kvm_record
    from probe import record as rec
    from probe.report import kvm_text, mail, moved_text, text

    _check_tester(arguments)
    record, sha256 = _record_and_hash(arguments.record, to_judge=False)
    if arguments.format == "mail":
        sys.stdout.write(mail.render(record, sha256, arguments.tester))
    elif isinstance(record, kvm_record.KvmRecord):
        _show_report(kvm_text.render(record, rows=1 << 30 if arguments.all else kvm_text.ROWS))
    elif isinstance(record, rec.Record):
        _show_report(text.render(record))
    else:
        _show_report(moved_text.render([record]))
    return int(ExitCode.AS_PREDICTED)


def _check_tester(arguments: argparse.Namespace) -> None:
    if arguments.tester and arguments.format != "mail":
        raise UsageError("--tester ends a mail", "give --format mail, too")
    if arguments.tester and not re.fullmatch(r"[^<>\n]+ <[^<>@\s]+@[^<>@\s]+>", arguments.tester.strip()):
        raise UsageError(
            f"--tester: {arguments.tester!r} is not NAME <ADDRESS>", "such as 'A Tester <tester@example.org>'"
        )


def _diff(arguments: argparse.Namespace) -> int:
    _check_tester(arguments)
    paths = [Path(arguments.before), Path(arguments.after)]
    compared = _diff_folders if any(path.is_dir() for path in paths) else _diff_records
    report, code = compared(arguments, paths)
    with contextlib.suppress(BrokenPipeError):  # whether anything moved does not hang on who reads on
        (sys.stdout.write if arguments.format == "mail" else _show_report)(report)
    return int(code)


def _diff_records(arguments: argparse.Namespace, paths: Sequence[Path]) -> tuple[str, ExitCode]:
    """Compare two records; return the report and the exit code."""
    from probe.diff.sets import compare
    from probe.report import diff_text
    from probe.report.mail import place, signed

    (before, one), (after, other) = (_record_and_hash(str(path)) for path in paths)
    comparison = compare(before, after)
    first = diff_text.File(str(paths[0].name or paths[0]), one, tuple(place(before)))
    second = diff_text.File(str(paths[1].name or paths[1]), other, tuple(place(after)))
    if arguments.tester and one == other:
        raise UsageError("both are the same file: nothing was tested", "give the records of before and after")
    report = diff_text.render(comparison, first, second, hashes=arguments.format == "mail")
    return report + signed(arguments.tester), ExitCode.AS_PREDICTED if comparison.same else ExitCode.FINDINGS


def _diff_folders(arguments: argparse.Namespace, paths: Sequence[Path]) -> tuple[str, ExitCode]:
    """Compare two folders, or a folder and a record; return the report and the exit code."""
    from probe.diff.sets import compare_sets
    from probe.report import diff_sets_text, diff_text
    from probe.report.mail import place, policy_of, signed

    read = [_records_below(path) for path in paths]
    for path, (side, _) in zip(paths, read):
        if not side:
            raise RecordError(f"there is no record in {path.name}", "give folders that hold records")
    sides = [side for side, _ in read]
    left_out = (read[0][1], read[1][1])
    found = compare_sets(*([(name, record) for name, record, _ in side] for side in sides))
    several = "POLICY" if len({policy_of(record) for side in sides for _, record, _ in side}) > 1 else ""
    files = [
        {name: diff_text.File(name, sha256, tuple(place(record, several))) for name, record, sha256 in side}
        for side in sides
    ]
    hashes = [(files[0][pair.before], files[1][pair.after]) for pair in found.pairs]
    report = diff_sets_text.render(
        found, arguments.before, arguments.after, hashes if arguments.format == "mail" else (), left_out
    )
    code = ExitCode.FINDINGS
    if found.same:
        code = ExitCode.FAILED if any(left_out) else ExitCode.AS_PREDICTED
    return report + (signed(arguments.tester) if found.pairs else ""), code


def _export(arguments: argparse.Namespace) -> int:
    """Print records in a form that CI systems and labs read; what did not pass is in it, not in the exit code."""
    from probe.cases import reports_of
    from probe.models import machines

    expect = machines.get(arguments.expect) if arguments.expect else None
    _check_output(arguments.output, arguments.force, arguments.records)
    read = [_record_and_hash(path) for path in arguments.records]
    reports = reports_of([record for record, _ in read], expect, [sha256 for _, sha256 in read])
    _write_output(_exported(arguments.format, reports, arguments.origin), arguments.output, arguments.force)
    return int(ExitCode.AS_PREDICTED)


def _b4_check(arguments: argparse.Namespace) -> int:
    """Answer b4 about a series: JSON on standard output, and then exit code 0 whatever it says."""
    import json

    from probe import b4_check
    from probe.kernel_tree import KernelTree, series_of

    message = b4_check.read_message(sys.stdin.buffer.read(b4_check.LARGEST_MESSAGE + 1))
    tracking = b4_check.Tracking()
    name = os.environ.get("B4_TRACKING_FILE", "")
    if name:
        try:
            with open(name, "rb") as file:
                tracking = b4_check.read_tracking(file.read(b4_check.LARGEST_TRACKING + 1))
        except OSError as error:
            tracking = b4_check.Tracking(complaint=f"b4's tracking file cannot be read: {error.strerror}")
    shelf = _shelf(arguments.records)
    releases = [one.record.kernel.release for one in shelf.files]
    series = series_of(KernelTree(Path()), tracking, message, releases, arguments.base or "", arguments.tip or "")
    notes = [tracking.complaint] if tracking.complaint else []
    told = b4_check.check(message, series, shelf, per_patch=arguments.per_patch, notes=notes)
    sys.stdout.write(json.dumps(told, indent=2) + "\n")
    return int(ExitCode.AS_PREDICTED)


def _shelf(paths: Sequence[str]) -> Shelf:
    """Read the records below folders, and files; what is none is kept by name and reason."""
    import hashlib

    from probe import store
    from probe.b4_check import File, Shelf

    found: dict[Path, tuple[str, Path]] = {}
    for folder in map(Path, paths):
        if not folder.exists():
            raise RecordError(f"no file or folder {folder}", "give where the records are, with its full path")
        for path in sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]:
            name = str(path.relative_to(folder)) if folder.is_dir() else path.name
            found.setdefault(path.resolve(), (name, path))
    files, left_out = [], []
    taken: set[str] = set()
    for name, path in found.values():
        name = name if name not in taken else str(path)
        taken.add(name)
        if not path.is_file():  # a FIFO would be waited for
            left_out.append((name, "no ordinary file"))
            continue
        try:
            raw, _ = store.read_raw(str(path))
            files.append(File(name, store.decode_any(raw, name, to_judge=True), hashlib.sha256(raw).hexdigest()))
        except RecordError as error:
            left_out.append((name, error.message))
    return Shelf(next((path for path in paths if Path(path).is_dir()), "DIR"), tuple(files), tuple(left_out))


def _exported(form: str, reports: Sequence[Report], origin: str) -> str:
    if form == "ktap":
        from probe.report import ktap

        return ktap.render(reports)
    if form == "junit":
        try:
            from probe.report import junit
        except ImportError as error:
            raise RequirementMissing(
                f"cannot write JUnit XML: {error}", "pip install 'spec-ctrl-probe[report]'"
            ) from error
        return junit.render(reports)
    if form == "kcidb":
        from probe.report import kcidb

        return kcidb.render(reports, origin)
    if form == "prometheus":
        from probe.report import prometheus

        return prometheus.render(reports)
    from probe.report import tables

    return tables.markdown(reports) if form == "markdown" else tables.comma_separated(reports)


def _html(arguments: argparse.Namespace) -> int:
    """Write one page of one record or several; two of one kind are compared on it."""
    try:
        from probe.report.page.render import render
    except ImportError as error:
        raise RequirementMissing(f"cannot write a page: {error}", "pip install 'spec-ctrl-probe[report]'") from error
    _check_output(arguments.output, arguments.force, arguments.records)
    records = [(Path(path).name or path, *_record_and_hash(path)) for path in arguments.records]
    _write_output(render(records), arguments.output, arguments.force)
    return int(ExitCode.AS_PREDICTED)


def _agent_build(arguments: argparse.Namespace) -> int:
    from kernel_harness.lab.agent_file import build

    _check_output(arguments.output, arguments.force)
    built = build(Path(arguments.output), _say, replace=arguments.force)
    print(f"{built.sha256}  {built.path}")
    return int(ExitCode.AS_PREDICTED)


def _lab(name: str) -> Callable[[argparse.Namespace], int]:
    """Return the handler of one of the lab's sub-commands; they have no voice of their own."""

    def handle(arguments: argparse.Namespace) -> int:
        from kernel_harness.lab import commands

        voice = commands.Voice(_say, _show_report, _write, _Line())
        return int(getattr(commands, name)(arguments, voice))

    return handle


def _check_output(path: str | None, force: bool, inputs: Sequence[str] = ()) -> None:
    """Raise UsageError, before the work, if a file is there that nobody said may be replaced, or that is read."""
    if not path or path == "-":
        return
    if any(_is_same_file(path, one) for one in inputs):
        raise UsageError(f"{path} is one of the records that are read", "give another -o PATH: a record is kept")
    if not Path(path).parent.is_dir():
        raise UsageError(f"no folder {Path(path).parent}", "mkdir -p, or another -o PATH")
    if os.path.lexists(path) and not force and not Path(path).is_char_device():
        raise UsageError(f"{path} exists", "give --force to replace it, or another -o PATH")


def _is_same_file(one: str, other: str) -> bool:
    """Tell whether two paths lead to one ordinary file, by whatever names or links."""
    try:
        return Path(one).is_file() and Path(one).samefile(other)
    except OSError:  # one of them is not there
        return False


def _write_output(text: str, path: str | None, force: bool) -> None:
    """Write to a file, whole or not at all, or to standard output."""
    from probe import store

    if path in (None, "-"):
        sys.stdout.write(text)
        return
    assert path is not None
    try:
        _say(f"written: {store.write_atomically(text.encode('utf-8'), Path(path), replace=True)}")
    except RecordError as error:
        raise RecordError(error.message.replace("the record ", ""), "give another place: -o PATH") from error


def _record_and_hash(path: str, *, to_judge: bool = True) -> tuple[AnyRecord, str]:
    """Read a record of any kind, and the SHA-256 of its bytes; to_judge: all that it names has to be known here."""
    import hashlib

    from probe import store

    raw, name = store.read_raw(path, sys.stdin.buffer)
    return store.decode_any(raw, name, to_judge=to_judge), hashlib.sha256(raw).hexdigest()


def _records_below(folder: Path) -> tuple[list[tuple[str, AnyRecord, str]], list[str]]:
    """Read the records below a folder, or of one file: name, record, SHA-256; and say what of it is none, and why."""
    found = []
    left_out = []
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]:
        name = str(path.relative_to(folder)) if folder.is_dir() else path.name
        try:
            record, sha256 = _record_and_hash(str(path))
        except RecordError as error:
            _say(f"left out: {error}")
            left_out.append(error.message.replace(str(path), name))
            continue
        found.append((name, record, sha256))
    return found, left_out


def _models(arguments: argparse.Namespace) -> int:
    from probe.models import machines, registry
    from probe.report.layout import joined, paragraph

    if arguments.models_command == "diff":
        return _models_diff(arguments)
    catalogue: list[tuple[str, Sequence[Model | Machine]]] = [
        ("predictors: masks from one CPUID (predict, run)", registry.MODELS),
        ("state machines: answers to any program (kvm, models diff)", machines.MACHINES),
    ]
    lines: list[str] = []
    for title, models in catalogue:
        lines += [*([""] if lines else []), title]
        for model in models:
            lines += paragraph(model.title, f"  {model.name:<18}", " " * 20)
            lines += paragraph(model.source, " " * 8, " " * 8)  # with room for a Message-ID in one piece
    sys.stdout.write(joined(lines))
    return int(ExitCode.AS_PREDICTED)


def _models_diff(arguments: argparse.Namespace) -> int:
    from probe.models import machines
    from probe.models.difference import MOST_STEPS, difference
    from probe.models.program import format_answer, written
    from probe.report.layout import joined, paragraph

    one, other = machines.get(arguments.one), machines.get(arguments.other)
    found = difference(one, other)
    if found is None:
        print(f"{one.name} and {other.name}: no difference in any program of up to {MOST_STEPS} operations")
        return int(ExitCode.AS_PREDICTED)
    before = [answer for answer in found.one[:-1] if answer is not None]
    print(written(found.program, before, between="\n"))  # in lines that kvm replay reads, whatever the window
    lines: list[str] = []
    for machine, answers in ((one, found.one), (other, found.other)):
        last = answers[-1]
        lines.append(f"{machine.name:<20}{'nothing' if last is None else format_answer(last)}")
    lines += paragraph(f"on {found.host}", "", "  ")
    for machine in (one, other):
        lines += paragraph(f"{machine.name}: {machine.source}", "", "  ")
    sys.stdout.write(joined(lines))
    return int(ExitCode.FINDINGS)


def _schema(arguments: argparse.Namespace) -> int:
    import json

    from probe import kvm_record, migration_record
    from probe import record as rec

    schemas = {"run": rec.schema, "kvm": kvm_record.schema, "migration": migration_record.schema}
    print(json.dumps(schemas[arguments.kind](), indent=2))
    return int(ExitCode.AS_PREDICTED)


_HANDLERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "kvm": _kvm,
    "boot": _boot,
    "predict": _predict,
    "doctor": _doctor,
    "restore": _restore,
    "show": _show,
    "diff": _diff,
    "export": _export,
    "b4-check": _b4_check,
    "agent-build": _agent_build,
    "sweep": _lab("sweep"),
    "ingest": _lab("ingest"),
    "history": _lab("history"),
    "nightly": _lab("nightly"),
    "html": _html,
    "models": _models,
    "migrate": _migrate,
    "schema": _schema,
}
