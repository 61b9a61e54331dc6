# SPDX-License-Identifier: MIT
"""The arguments of every sub-command; help, manual and completions are made from here."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from probe import __version__
from probe.errors import ExitCode
from probe.masks import parse_list

_EPILOG = """\
exit codes:
  0  as predicted          1  findings             2  usage
  3  the tool failed       4  requirement missing  5  a register could not be put back
  130  interrupted, everything put back
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of repeating the whole usage; takes no shortened options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print, and do not pass over a full disk in silence as the base class does."""
        if file is None:
            super()._print_message(message, file)
        elif message:
            file.write(message)
            file.flush()

    def error(self, message: str) -> NoReturn:
        self.exit(int(ExitCode.USAGE), f"{self.prog}: {message} (see: {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command; help, manual and completions are made from it."""
    parser = _Parser(
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


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
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
    safety.add_argument("--allow-container", action="store_true", help="probe from a container (pid namespace)")
    safety.add_argument("--allow-bad-microcode", action="store_true", help="probe microcode on Linux's bad list")


def _add_predict(commands: argparse._SubParsersAction[_Parser]) -> None:
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


def _add_plain(commands: argparse._SubParsersAction[_Parser]) -> None:
    doctor = commands.add_parser("doctor", help="say what this machine allows, and what to do about what it does not")
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    restore = commands.add_parser(
        "restore",
        help="put back what a killed run left",
        description="Reads the journal of a run that died. If the machine has not rebooted since and nobody has put "
        "the registers back, writes the saved values and verifies them; else only tells what happened.",
    )
    restore.add_argument("--state-dir", metavar="DIR", help="folder of the journal (default /var/lib/spec-ctrl-probe)")
    show = commands.add_parser("show", help="print a record as text for a mail")
    show.add_argument("record", metavar="RECORD", help="a record; - for standard input")
    commands.add_parser("models", help="list the models that predict, with their sources")
    commands.add_parser("schema", help="print the record's JSON Schema")


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
    if not (text.isascii() and text.isdigit() and len(text) < 5) or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)
