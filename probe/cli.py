# SPDX-License-Identifier: MIT
"""The command line: arguments, printing, exit codes. The only file that prints or exits.

What a sub-command needs is imported inside it, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probe import __version__
from probe.errors import ExitCode, ProbeError, RequirementMissing, UsageError
from probe.masks import format_list, parse_list

if TYPE_CHECKING:
    from probe import record as rec
    from probe.cpuid.dumps import Dump
    from probe.doctor import Check

_EPILOG = """\
exit codes:
  0  as predicted          1  findings             2  usage
  3  the tool failed       4  requirement missing  5  a register could not be put back
  130  interrupted, everything put back
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command; help, manual and completions are made from it."""
    parser = argparse.ArgumentParser(
        prog="spec-ctrl-probe",
        description="Finds out which bits of IA32_SPEC_CTRL (MSR 0x48) this CPU or hypervisor accepts, keeps, drops "
        "or faults on, and whether that is what its CPUID predicts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spec-ctrl-probe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_predict(commands)
    _add_plain(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="probe this machine (--write), or a guest booted for it",
        description="Tries every bit of MSR 0x48 on every CPU and puts everything back. Without --write this "
        "machine's registers are not touched: a guest is booted, with the agent inside, and probed instead.",
    )
    where = run.add_argument_group("where")
    where.add_argument(
        "--in",
        dest="place",
        choices=("auto", "metal", "guest"),
        default="auto",
        help="metal: this machine's own msr driver; guest: a guest booted for it; auto chooses and says why",
    )
    where.add_argument(
        "--write", action="store_true", help="allow writes to this machine's MSR 0x48 (taints the kernel)"
    )
    where.add_argument("--kernel", default="", metavar="SPEC", help="guest: debian:SUITE or a path to a vmlinuz")
    where.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="guest: how QEMU runs it")
    where.add_argument(
        "--model-register",
        default="",
        metavar="PARAMS",
        help="guest: give its msr driver a modelled register instead of the CPU's, such as 'valid=0x6'",
    )
    what = run.add_argument_group("what")
    what.add_argument("--cpus", type=_numbers, metavar="LIST", help="logical CPUs, such as 0-3,8 (default: all online)")
    what.add_argument("--bits", type=_bits, default=tuple(range(64)), metavar="LIST", help="bits 0-63 (default: all)")
    what.add_argument(
        "--base",
        choices=("saved", "zero"),
        default="saved",
        help="try bit n as the value read first with bit n set, or as bit n alone",
    )
    what.add_argument(
        "--clear-bits", action="store_true", help="also try to clear bits that are set (mitigations go off)"
    )
    what.add_argument("--pairs", action="store_true", help="also try every pair of accepted bits")
    what.add_argument("--repeat", type=_count, default=1, metavar="N", help="walk N times; what differs is unstable")
    expect = run.add_argument_group("expectation")
    expect.add_argument("--cpuid", metavar="FILE", help="predict from a recorded CPUID (a dump, or a record) instead")
    expect.add_argument(
        "--model", default="vendor", metavar="NAME", help="the model that findings come from (see: models)"
    )
    output = run.add_argument_group("output")
    output.add_argument("--record", metavar="PATH", help="where to write the record; - for standard output")
    output.add_argument("--json", action="store_true", help="print the record instead of the report")
    output.add_argument("--identify", default="", metavar="NAME", help="put this name into the record")
    safety = run.add_argument_group("safety")
    safety.add_argument(
        "--state-dir", metavar="DIR", help="folder of journal and lock (default /var/lib/spec-ctrl-probe)"
    )
    safety.add_argument("--allow-running-vms", action="store_true", help="probe although KVM guests are running")
    safety.add_argument("--allow-bad-microcode", action="store_true", help="probe microcode on Linux's bad list")
    run.set_defaults(handler=_run)


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    predict = commands.add_parser(
        "predict",
        help="say which bits should be accepted, from CPUID alone",
        description="Prints the predicted masks with the reason and source of every bit. Reads this machine's CPUID, "
        "or a dump: cpuid -r, cpuid -1 -r, InstLatx64, or a record of this tool. Writes nothing, needs no root.",
    )
    predict.add_argument(
        "file", nargs="?", metavar="FILE", help="a dump or record; - for standard input; this CPU if left out"
    )
    predict.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="only this model; may be given again; 'all' for all (default: vendor)",
    )
    predict.add_argument("--json", action="store_true", help="print masks per group of equal CPUs and model, as JSON")
    predict.set_defaults(handler=_predict)


def _add_plain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser("doctor", help="say what this machine allows, and what to do about what it does not")
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    doctor.set_defaults(handler=_doctor)
    restore = commands.add_parser(
        "restore",
        help="put back what a killed run left",
        description="Reads the journal of a run that died. If the machine has not rebooted since and nobody has put "
        "the registers back, writes the saved values and verifies them; else only tells what happened.",
    )
    restore.add_argument("--state-dir", metavar="DIR", help="folder of the journal (default /var/lib/spec-ctrl-probe)")
    restore.set_defaults(handler=_restore)
    show = commands.add_parser("show", help="print a record as text for a mail")
    show.add_argument("record", metavar="RECORD", help="a record; - for standard input")
    show.set_defaults(handler=_show)
    models = commands.add_parser("models", help="list the models that predict, with their sources")
    models.set_defaults(handler=_models)
    schema = commands.add_parser("schema", help="print the record's JSON Schema")
    schema.set_defaults(handler=_schema)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return parse_list(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; want a list such as 0-3,8") from error


def _bits(text: str) -> tuple[int, ...]:
    try:
        return parse_list(text, limit=64)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; want bits 0-63 such as 0-2,7") from error


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors go to stderr as one line."""
    arguments = make_parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    handler: Callable[[argparse.Namespace], int] = arguments.handler
    try:
        return int(handler(arguments))
    except ProbeError as error:
        _say(f"spec-ctrl-probe: {error}")
        return int(error.exit_code)
    except KeyboardInterrupt:
        _say("spec-ctrl-probe: interrupted; no register was left changed")
        return int(ExitCode.INTERRUPTED)


def entry() -> None:
    """Run as a program; a reader that has gone away (head, a closed terminal) is no error."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = int(ExitCode.AS_PREDICTED)
    sys.exit(code)


def _say(text: str) -> None:
    """Print a line on stderr, if anyone is left to read it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class _Progress:
    """One line on a terminal's stderr that counts steps; silent anywhere else."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        clock = time.monotonic()
        if not self._on or (clock < self._next and done < total):
            return
        self._next = clock + 0.1
        try:
            sys.stderr.write("\r\x1b[K" if done == total else f"\rbit trials {done}/{total} ")
            sys.stderr.flush()
        except OSError:
            self._on = False


# --- run -----------------------------------------------------------------------------------------------------------

_PATH_OPTIONS = ("--record", "--cpuid", "--state-dir", "--kernel")


def without_paths(argv: Sequence[str]) -> list[str]:
    """Return a command line that may stand in a record: a path becomes its last part, or PATH if that is hidden."""
    kept: list[str] = []
    hide = False
    for word in argv:
        name, equals, value = word.partition("=")
        if hide:
            kept.append(_last_part(word))
        elif equals and name in _PATH_OPTIONS:
            kept.append(f"{name}={_last_part(value)}")
        else:
            kept.append(word)
        hide = not equals and name in _PATH_OPTIONS
    return kept


def _last_part(text: str) -> str:
    return (Path(text).name or "PATH") if "/" in text else text


def _run(arguments: argparse.Namespace) -> int:
    from probe.models import registry

    registry.get(arguments.model)
    place, because = _choose_place(arguments)
    _say(f"place: {place} ({because})")
    record = _run_in_guest(arguments, because) if place == "guest" else _run_here(arguments, because)
    return _deliver(record, arguments)


def _choose_place(arguments: argparse.Namespace) -> tuple[str, str]:
    """Decide between this machine's msr driver and a guest; return the place and why."""
    from probe.host import Host, Modules

    guest_only = [name for name in ("kernel", "model_register") if getattr(arguments, name)]
    if arguments.place == "metal":
        if guest_only:
            raise UsageError(f"--{guest_only[0].replace('_', '-')} is for guests", "use --in guest")
        return "metal", "asked for with --in metal"
    if arguments.place == "guest":
        return "guest", "asked for with --in guest"
    if guest_only:
        return "guest", f"--{guest_only[0].replace('_', '-')} asks for a guest"
    there = bool(Host().msr_cpus())
    if not there and not Modules.available("msr"):
        return "guest", "this kernel has no msr driver: no /dev/cpu/0/msr, and modprobe finds no msr module"
    if not arguments.write:
        return "guest", "without --write this machine's registers are not touched; to probe them: " + _metal_command()
    return "metal", "the msr driver is there" if there else "the msr driver can be loaded"


def _metal_command() -> str:
    return ("" if os.geteuid() == 0 else "sudo ") + "spec-ctrl-probe run --write"


def _dump(path: str | None) -> Dump | None:
    if path is None:
        return None
    from probe.cpuid.dumps import read_dump
    from probe.record import dump_of_record

    return read_dump(path, sys.stdin.buffer, dump_of_record)


def _run_here(arguments: argparse.Namespace, because: str) -> rec.Record:
    from probe.journal import STATE_DIR
    from probe.run import Ears, Options, run

    if arguments.write and os.geteuid() != 0:
        raise RequirementMissing("not root: the msr driver needs CAP_SYS_RAWIO", f"run it as: {_metal_command()}")
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
        because=because,
        arguments=tuple(without_paths(arguments.argv)),
    )
    record = run(options, Ears(say=_say, progress=_Progress()))
    if not arguments.write:
        _say(f"nothing was written; to probe this machine's registers: {_metal_command()}")
    return record


def _run_in_guest(arguments: argparse.Namespace, because: str) -> rec.Record:
    from kernel_harness.boot.agent import Wanted, probe_in_guest

    passed: list[str] = ["--bits", format_list(arguments.bits), "--base", arguments.base, "--model", arguments.model]
    passed += ["--repeat", str(arguments.repeat)]
    passed += ["--clear-bits"] if arguments.clear_bits else []
    passed += ["--pairs"] if arguments.pairs else []
    passed += ["--cpus", format_list(arguments.cpus)] if arguments.cpus else []
    passed += ["--identify", arguments.identify] if arguments.identify else []
    dump = _dump(arguments.cpuid)
    record = probe_in_guest(
        Wanted(
            kernel=arguments.kernel,
            accelerator=arguments.accel,
            cpus=max(2, max(arguments.cpus or (0,)) + 1),
            arguments=passed,
            cpuid=dump,
            register_model=arguments.model_register,
            because=because,
        ),
        _say,
    )
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
        path = Path(arguments.record) if arguments.record else rec.default_path(record)
        try:
            taken = store.write_atomically(raw, path, replace=arguments.record is not None)
            told = f"record: {taken}"
        except ProbeError as error:
            failed = error
    try:
        if arguments.json or arguments.record == "-":
            sys.stdout.write(raw.decode())
        else:
            sys.stdout.write(text.render(record))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:  # the terminal has gone (EIO), or standard output is a full disk
        if failed is None:
            failed = ProbeError(f"cannot print the report: {error.strerror}", "the record is written" if told else "")
    if failed is not None:
        raise failed
    if told:
        _say(told)
    return exit_code(record)


def exit_code(record: rec.Record) -> int:
    """Return what a run's record means for a script."""
    from probe.report import text

    if any(not entry.verified for entry in record.restore):
        return int(ExitCode.NOT_RESTORED)
    if record.findings:
        return int(ExitCode.FINDINGS)
    if not text.measured_anything(record):
        return int(ExitCode.REQUIREMENT_MISSING)
    return int(ExitCode.AS_PREDICTED)


# --- the other commands ----------------------------------------------------------------------------------------------


def _predict(arguments: argparse.Namespace) -> int:
    from probe.models import registry
    from probe.report import prediction as report

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
    sys.stdout.write(report.as_json(form, groups) if arguments.json else report.as_text(form, groups))
    return int(ExitCode.AS_PREDICTED)


def _doctor(arguments: argparse.Namespace) -> int:
    from probe.cpuid.machine import read_machine
    from probe.doctor import examine, look_around, ready_for
    from probe.host import Host, Modules

    host = Host()
    facts = host.facts()
    around = look_around(host.msr_cpus(), Modules.available("msr"))
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
            print(f"{'':<22}-> {check.remedy}")


def _restore(arguments: argparse.Namespace) -> int:
    from probe.host import Host, Modules
    from probe.journal import STATE_DIR, Lock, read_leftover
    from probe.msr import MsrDriver
    from probe.run import settle
    from probe.scheduling import CpuPin, StopRequest

    if os.geteuid() != 0:
        raise RequirementMissing(
            "not root: the journal and the msr driver need it", "run it as: sudo spec-ctrl-probe restore"
        )
    state_dir = Path(arguments.state_dir) if arguments.state_dir else STATE_DIR
    with Lock(state_dir), Modules() as modules:
        leftover = read_leftover(state_dir)
        if leftover is None:
            print(f"no journal in {state_dir}: no run was killed, nothing to put back")
            return int(ExitCode.AS_PREDICTED)
        boot_id = Host().boot_id()
        if leftover.boot_id == boot_id:
            modules.load("msr")
        with MsrDriver(writable=True) as msr, CpuPin() as pin, StopRequest():
            settle(leftover, msr, pin, boot_id, print)
    return int(ExitCode.AS_PREDICTED)


def _show(arguments: argparse.Namespace) -> int:
    from probe import store
    from probe.report import text

    record = store.read_record(arguments.record, sys.stdin.buffer)
    sys.stdout.write(text.render(record))
    return int(ExitCode.AS_PREDICTED)


def _models(arguments: argparse.Namespace) -> int:
    import textwrap

    from probe.models import registry

    for model in registry.MODELS:
        print(f"{model.name:<17}{model.title}")
        for line in textwrap.wrap(model.source, 58, break_on_hyphens=False, break_long_words=False):
            print(f"{'':<17}{line}")
    return int(ExitCode.AS_PREDICTED)


def _schema(arguments: argparse.Namespace) -> int:
    import json

    from probe import record as rec

    print(json.dumps(rec.schema(), indent=2))
    return int(ExitCode.AS_PREDICTED)
