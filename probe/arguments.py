# SPDX-License-Identifier: MIT
"""The arguments of every sub-command; help, manual and completions are made from here."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from probe import __version__
from probe.errors import ExitCode
from probe.masks import parse_list

_EPILOG = "exit codes:\n" + "".join(f"  {int(code):<5}{code.meaning}\n" for code in ExitCode)


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
    _add_kvm(commands)
    _add_boot(commands)
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
        choices=("auto", "metal", "guest", "kvm"),
        default="auto",
        help="metal: this machine's own msr driver; guest: a guest booted for it; auto chooses and says why; kvm: the "
        "matrix of the sub-command kvm",
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
    output.add_argument(
        "--stream",
        action="store_true",
        help="print events as lines of JSON: start, intent (before each bit), record, or error",
    )
    output.add_argument("--identify", default="", metavar="NAME", help="put this name into the record")
    safety = run.add_argument_group("safety")
    safety.add_argument(
        "--state-dir", metavar="DIR", help="folder of journal and lock (default /var/lib/spec-ctrl-probe)"
    )
    safety.add_argument("--allow-running-vms", action="store_true", help="probe although KVM guests are running")
    safety.add_argument("--allow-container", action="store_true", help="probe from a container (pid namespace)")
    safety.add_argument("--allow-bad-microcode", action="store_true", help="probe microcode on Linux's bad list")


def _add_kvm(commands: argparse._SubParsersAction[_Parser]) -> None:
    kvm = commands.add_parser(
        "kvm",
        help="measure what this kernel's KVM does for every guest, and which model it follows",
        description="Drives KVM through /dev/kvm: every profile (the CPUID bits given to a guest), all 64 bits, host- "
        "and guest-initiated, first write on a fresh vCPU and after pass-through; holds every model against it. Needs "
        "no QEMU and touches no register of this machine but through KVM.",
    )
    _add_matrix_options(kvm)
    inner = kvm.add_subparsers(dest="kvm_command", metavar="COMMAND")
    replay = inner.add_parser(
        "replay",
        help="run a program on this kernel",
        description="Runs a program such as 'profile AMD_STIBP; guest-wr 0x48 0x2 -> ok; guest-rd 0x48' on a fresh "
        "vCPU, prints the kernel's answers, and compares them with those that the program expects.",
    )
    replay.add_argument("program", metavar="FILE", help="a file with a program; - for standard input")
    replay.add_argument("--model", default="", metavar="NAME", help="also compare with this state machine")
    replay.add_argument(
        "--policy",
        metavar="NAME|FILE.py",
        help="the guest obeys this policy; --model is then the kernel that carries it out",
    )
    explore = inner.add_parser(
        "explore",
        help="search for programs on which this kernel and a model differ",
        description="Runs random programs on this kernel and on a model side by side and shrinks what differs to the "
        "shortest program, ready for kvm replay. The same seed gives the same programs.",
    )
    explore.add_argument("--model", required=True, metavar="NAME", help="a state machine (see: models)")
    explore.add_argument("--programs", type=_many, default=10000, metavar="N", help="how many (default 10000)")
    explore.add_argument("--seconds", type=_seconds, default=60.0, metavar="S", help="at most this long (default 60)")
    explore.add_argument("--seed", type=_many, default=1, metavar="N", help="default 1")
    explore.add_argument("--save", metavar="PATH", help="write what is found to a file, for kvm replay")
    _add_policy(inner)
    _add_live_migration(inner)


def _add_policy(inner: argparse._SubParsersAction[_Parser]) -> None:
    policy = inner.add_parser(
        "policy",
        help="run guests under a policy: who decides their writes",
        description="Guests obey a policy instead of KVM's own rule: the MSR filter denies them MSR 0x48, each write "
        "comes to us and is completed, dropped or answered with #GP. Without a name: lists the policies.",
    )
    policy.add_argument(
        "policy", nargs="?", metavar="NAME|FILE.py", help="a policy, or a file with a function decide()"
    )
    policy.add_argument(
        "--compare",
        metavar="NAME|FILE.py",
        help="calculated: the smallest case on which guests see a difference (exit code 1)",
    )
    policy.add_argument("--cost", action="store_true", help="what WRMSR and RDMSR cost a guest under it, or under all")
    policy.add_argument(
        "--table",
        action="store_true",
        help="calculated: guests that take #GP, moves that break; with --cost a column more",
    )
    _add_matrix_options(policy)
    for action in policy._actions:  # those of `kvm` itself have the defaults
        if action.dest not in ("policy", "compare", "cost", "table", "help"):
            action.default = argparse.SUPPRESS


def _add_live_migration(inner: argparse._SubParsersAction[_Parser]) -> None:
    migrate = inner.add_parser(
        "migrate",
        help="move a guest between two VMs of this KVM",
        description="Runs a program's guest on one VM, saves the register as a VMM saves it, restores it on another "
        "with its own policy and CPUID, and tells what the guest reads then. Exit code 1: it did not arrive whole, or "
        "an outcome is not as the models say.",
    )
    migrate.add_argument(
        "program", nargs="?", metavar="FILE", help="a file with a program; -; left out: the case of 2020, every policy"
    )
    migrate.add_argument("--from-policy", metavar="NAME|FILE.py", help="policy on the source (default: KVM alone)")
    migrate.add_argument("--to-policy", metavar="NAME|FILE.py", help="policy on the destination (default: KVM alone)")
    migrate.add_argument("--to-profile", type=_profile, metavar="NAME|BITS", help="guest's CPUID there (the same)")
    migrate.add_argument(
        "--rule", default="kvm", metavar="VMM", help="kvm (default), qemu, xen, firecracker or cloud-hypervisor"
    )
    migrate.add_argument(
        "--restore",
        action="append",
        metavar="RECORD",
        help="guests that left another kernel; may be given again",
    )
    quiet = argparse.SUPPRESS  # those of `kvm` itself have the defaults
    migrate.add_argument(
        "--record", default=quiet, metavar="PATH", help="write a record, from which guests can be restored; -"
    )
    migrate.add_argument("--json", action="store_true", default=quiet, help="print the record instead of the report")
    migrate.add_argument("--identify", default=quiet, metavar="NAME", help="put this name into the record")


def _add_boot(commands: argparse._SubParsersAction[_Parser]) -> None:
    boot = commands.add_parser(
        "boot",
        help="boot kernels and study the KVM of each",
        description="Boots each kernel in QEMU (KVM if it works, TCG if not: then kvm_amd runs on an emulated SVM), "
        "runs the sub-command kvm inside, brings the records out, and prints one table.",
    )
    boot.add_argument(
        "--kernel",
        "--kernels",
        dest="kernels",
        required=True,
        metavar="SPEC[,SPEC]",
        help="debian:CODENAME, host, or the path of a vmlinuz; several with commas",
    )
    boot.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="how QEMU runs it")
    boot.add_argument("--append", default="", metavar="PARAMS", help="kernel parameters, such as 'kvm.ignore_msrs=1'")
    boot.add_argument(
        "--tested",
        type=_mask,
        metavar="MASK",
        help="make KVM's own test of a value accept just these bits, such as 0x6 (an emulated CPU accepts every bit)",
    )
    boot.add_argument(
        "--cpu",
        type=_profile,
        metavar="NAME|BITS",
        help="give the emulated CPU these CPUID bits (it has none of its own), such as zen2-client,V_SPEC_CTRL",
    )
    boot.add_argument("--record-dir", metavar="DIR", help="folder for the records (default: below results/)")
    boot.add_argument("--timeout", type=_seconds, default=1800.0, metavar="S", help="per kernel (default 1800)")
    boot.add_argument(
        "inside",
        nargs=argparse.REMAINDER,
        metavar="-- kvm ...",
        help="to run inside: kvm, kvm policy NAME or kvm migrate, with options",
    )


def _add_matrix_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("what")
    which.add_argument(
        "--profile",
        action="append",
        type=_profile,
        metavar="NAME|BITS",
        help="only this profile: a name, or CPUID bits such as AMD_STIBP,AMD_SSBD; may be given again",
    )
    which.add_argument("--all-profiles", action="store_true", help="every combination of the CPUID bits: 65,537")
    which.add_argument(
        "--programs",
        type=_many,
        default=0,
        metavar="N",
        help="also run N random programs on each model that explains it",
    )
    which.add_argument("--seed", type=_many, default=1, metavar="N", help="of these programs (default 1)")
    which.add_argument(
        "--write",
        action="store_true",
        help="afterwards, ask the msr driver of one CPU, too, bit by bit (taints the kernel, see run)",
    )
    which.add_argument("--state-dir", metavar="DIR", help="folder for its journal (default /var/lib/spec-ctrl-probe)")
    which.add_argument("--jobs", type=_count, metavar="N", help="processes (default: one for each CPU)")
    output = parser.add_argument_group("output")
    output.add_argument("--record", metavar="PATH", help="where to write the record; - for standard output")
    output.add_argument("--json", action="store_true", help="print the record instead of the report")
    output.add_argument("--identify", default="", metavar="NAME", help="put this name into the record")


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
    question = predict.add_argument_group("what if", "a hypervisor's rule on a host and a guest, without any machine")
    question.add_argument("--host", metavar="FILE", help="CPUID of the host: a dump or record (default: this CPU)")
    question.add_argument(
        "--guest",
        metavar="FILE|PROFILE",
        help="CPUID of the guest: a dump, a record, or a profile such as zen2-client (default: what KVM would offer)",
    )
    question.add_argument(
        "--hardware",
        type=_mask,
        metavar="MASK",
        help="the bits that the host's register takes (default: those of the vendor's documents)",
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
    show = commands.add_parser("show", help="print a record as text")
    show.add_argument("record", metavar="RECORD", help="a record; - for standard input")
    show.add_argument("--all", action="store_true", help="every group of profiles, and every model, of a record of KVM")
    diff = commands.add_parser(
        "diff",
        help="say what moved between two records, or two folders of them",
        description="What moved per bit, profile, initiator and model, one cause a line; and what else differs "
        "(kernel, microcode, firmware, mitigations), by which the comparison can be judged. Of folders, records of one "
        "machine, CPUID given and policy are paired: those whose record or file name (HOST-HASH.json, HOST/..., "
        "HOST.json) tells of one machine; where names tell none apart those of one kernel, else the newest of each "
        "side. Exit code 0: both saw the same; 1: they did not; 3: a file cannot be read, and nothing else differs.",
    )
    diff.add_argument("before", metavar="A", help="a record, or a folder of records")
    diff.add_argument("after", metavar="B", help="another")
    for parser in (show, diff):
        parser.add_argument(
            "--format",
            choices=("text", "mail"),
            default="text",
            help="mail: for a review, with SHA-256",
        )
        parser.add_argument(
            "--tester", default="", metavar="'NAME <MAIL>'", help="in a mail: end with Tested-by: of this"
        )
    export = commands.add_parser(
        "export",
        help="print records for CI systems and labs",
        description="Prints records as test cases with stable names: KTAP, JUnit XML, KCIDB JSON, a Prometheus "
        "textfile, Markdown or CSV. A bit that was not measured is a skip with its reason. The exit code is 0 "
        "whatever failed.",
    )
    export.add_argument("records", nargs="+", metavar="RECORD", help="records of any kind; - for standard input")
    export.add_argument(
        "--format",
        required=True,
        choices=("ktap", "junit", "kcidb", "prometheus", "markdown", "csv"),
        help="JUnit needs the extra 'report'",
    )
    export.add_argument(
        "--origin", type=_origin, default="spec_ctrl_probe", metavar="NAME", help="the lab's name with KCIDB"
    )
    export.add_argument(
        "--expect",
        metavar="MODEL",
        help="judge KVM by this model, instead of the one that fits the record (see: models)",
    )
    _add_output(export)
    b4 = commands.add_parser(
        "b4-check",
        help="tell b4 review what the records say of a series",
        description="Speaks b4's review check protocol: reads the cover letter, or a patch, on standard input, finds "
        "records whose kernel release names the series' base and its commits, and prints JSON. pass: nothing moved; "
        "warn: something did, or a series that bears on the register has no record; fail: findings that the base does "
        "not have. For git config b4.review-series-check-cmd; b4 runs it in the top folder of the kernel's repository.",
    )
    b4.add_argument(
        "records", nargs="+", metavar="RECORD|DIR", help="records, or folders of them, with their full path"
    )
    b4.add_argument(
        "--base",
        type=_kernel,
        metavar="COMMIT|TAG|RELEASE",
        help="the kernel without the series (default: what b4 or base-commit: says)",
    )
    b4.add_argument(
        "--tip",
        type=_kernel,
        metavar="COMMIT|TAG|RELEASE",
        help="the kernel with it (default: what b4 says)",
    )
    b4.add_argument(
        "--per-patch",
        action="store_true",
        help="for b4.review-perpatch-check-cmd: compare the patch's own kernel with the one before it",
    )
    html = commands.add_parser(
        "html",
        help="write one page of records, to look at",
        description="Writes one self-contained page: a heat map of bits by CPUs or guest CPUIDs, findings, models with "
        "their first divergence, circumstances; of two records of one kind also what moved. It needs no network, and "
        "no JavaScript to be read.",
    )
    html.add_argument("records", nargs="+", metavar="RECORD", help="records of any kind; - for standard input")
    _add_output(html)
    models = commands.add_parser(
        "models",
        help="list the models, or find where two of them differ",
        description="Lists the models with their sources. models diff A B prints the shortest program, on the smallest "
        "profile, on which two state machines differ.",
    )
    inner = models.add_subparsers(dest="models_command", metavar="COMMAND")
    diff = inner.add_parser("diff", help="the shortest program on which two state machines differ")
    diff.add_argument("one", metavar="A", help="a state machine (see: models)")
    diff.add_argument("other", metavar="B", help="another one")
    migrate = commands.add_parser(
        "migrate",
        help="say what breaks when guests move between recorded machines",
        description="For two records, in both directions: the bits that a guest may hold on the one, and the other "
        "would refuse or lose, by each VMM's rule. For a folder, or more records: every pair as a matrix by one rule, "
        "and the smallest CPUID change that makes the pool safe. Exit code 1: a move breaks.",
    )
    migrate.add_argument(
        "records", nargs="+", metavar="RECORD|DIR", help="records, or folders of records: two at least"
    )
    migrate.add_argument("--rule", default="", metavar="VMM", help="of a pair only this rule; of a pool this (qemu)")
    migrate.add_argument(
        "--json", action="store_true", help="print every pair, by every rule or that of --rule, as JSON"
    )
    build = commands.add_parser(
        "agent-build",
        help="write the agent as one file for machines without internet",
        description="Writes one file that Python 3.9 to 3.13 runs on any x86-64 Linux with glibc: python3 FILE run "
        "--write. The same sources give the same bytes; every record that it makes has its SHA-256.",
    )
    build.add_argument("-o", "--output", default="spec-ctrl-probe.pyz", metavar="PATH", help="(spec-ctrl-probe.pyz)")
    build.add_argument("--force", action="store_true", help="replace the file if it exists")
    ingest = commands.add_parser(
        "ingest",
        help="take a night's output of any engine into the store",
        description="Takes what a folder holds: records, streams of events (run --stream), journals; the folder's or "
        "file's name is the machine's. No record is counted twice; a machine that announced a step and gave no record "
        "was lost there; lines that are nothing known are listed and set aside. Exit code 1: a machine was lost, or "
        "lines were set aside.",
    )
    ingest.add_argument("folder", metavar="DIR", help="what the engine left, such as that of clush --outdir")
    ingest.add_argument("--store", default="nights", metavar="DIR", help="the nights (default: nights/)")
    ingest.add_argument(
        "--night", default="", metavar="DATE", help="the night of all of it (default: the date a record was started)"
    )
    history = commands.add_parser(
        "history",
        help="ask the nights what changed, what flips a bit, who is missing",
        description="changes: what is not as it was between two nights; missing: machines not seen or lost; flips: "
        "microcode that flips a bit; differ: machines whose CPUs differ; findings: open ones, and since when; machine "
        "NAME: one machine's life; sql 'SELECT ...': your own question to the view runs.",
    )
    history.add_argument(
        "question", choices=("changes", "missing", "flips", "differ", "findings", "machine", "sql"), help="see above"
    )
    history.add_argument("what", nargs="?", default="", metavar="NAME|SQL", help="of machine and sql")
    history.add_argument("--store", default="nights", metavar="DIR", help="the nights (default: nights/)")
    history.add_argument(
        "--from", dest="before", default="", metavar="DATE", help="the night before (default: the last but one)"
    )
    history.add_argument("--to", dest="after", default="", metavar="DATE", help="the night (default: the last)")
    history.add_argument("--output-format", choices=("table", "json", "csv"), default="table", help="default: table")
    _add_sweep(commands)
    _add_nightly(commands)
    schema = commands.add_parser("schema", help="print a record's JSON Schema")
    kinds = ("run", "kvm", "migration")
    schema.add_argument("kind", nargs="?", choices=kinds, default="run", help="of which record (default: run)")


def _add_sweep(commands: argparse._SubParsersAction[_Parser]) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run the agent on every machine of an Ansible inventory, and take what it says into the store",
        description="One Ansible task on each machine, with the agent in hand: nothing need be installed there but ssh "
        "and Python 3.9 to 3.13. A machine that goes down under the probe is waited for and tells at which bit; one "
        "that was never reached is told apart. Interrupted, it goes on where it was when started again. Without "
        "--write the machines only read CPUID and predict. Exit code 3: a machine gave no record.",
    )
    _add_sweep_options(sweep)
    sweep.add_argument("--retry", action="store_true", help="only the machines of which the last sweep has no record")
    sweep.add_argument("--afresh", action="store_true", help="begin anew, even if the last sweep was interrupted")
    sweep.add_argument("--check", action="store_true", help="say what would be done where, and touch no machine")


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add what sweep and nightly have in common."""
    where = parser.add_argument_group("where")
    where.add_argument(
        "-i",
        "--inventory",
        action="append",
        required=True,
        metavar="PATH|HOSTS",
        help="an Ansible inventory: file, folder, script, or names with a comma (lab1,); may be given again",
    )
    where.add_argument("--limit", default="", metavar="PATTERN", help="only these machines, as Ansible's --limit")
    where.add_argument("--store", default="nights", metavar="DIR", help="the nights (default: nights/)")
    where.add_argument(
        "--night", default="", metavar="DATE", help="the night that it belongs to (default: today's date, UTC)"
    )
    where.add_argument("--no-become", action="store_true", help="do not become root (Ansible's become) on the machines")
    how = parser.add_argument_group("how")
    how.add_argument("--write", action="store_true", help="write to the registers (taints the kernels, see run)")
    how.add_argument("--forks", type=_count, default=32, metavar="N", help="machines at a time (default 32)")
    how.add_argument(
        "--host-timeout", type=_seconds, default=300.0, metavar="S", help="for one machine's probe (default 300)"
    )
    how.add_argument(
        "--wait", type=_seconds, default=300.0, metavar="S", help="for one that went down to be back (default 300)"
    )
    how.add_argument(
        "--canary",
        type=_percent,
        default=0.0,
        metavar="PERCENT",
        help="first so many of each CPU model's machines, at least one; stop if one of them dies",
    )
    how.add_argument(
        "--kernel",
        default="",
        metavar="RELEASE",
        help="boot this kernel first where it does not run: by kexec, or the inventory's own command spec_ctrl_boot",
    )
    how.add_argument("--agent", metavar="PATH", help="the agent's file (default: made of these sources)")
    how.add_argument("run_arguments", nargs="*", metavar="-- OPTION", help="for run, such as -- --bits 0-10")


def _add_nightly(commands: argparse._SubParsersAction[_Parser]) -> None:
    nightly = commands.add_parser(
        "nightly",
        help="a sweep every night: a systemd timer, a page, a mail of what changed",
        description="run: one sweep; then DATE.html and DATE.txt in the store, the Prometheus file and the mail that "
        "were asked for, and the nights that are too old go. install: a systemd service and a timer that do so.",
    )
    inner = nightly.add_subparsers(dest="nightly_command", metavar="COMMAND", required=True)
    for name, text in (("run", "do a night's work now"), ("install", "have systemd do it every night")):
        one = inner.add_parser(name, help=text, description=text)
        _add_sweep_options(one)
        after = one.add_argument_group("afterwards")
        after.add_argument("--keep", type=_many, default=365, metavar="N", help="nights to keep (default 365)")
        after.add_argument(
            "--textfile", metavar="DIR", help="write spec_ctrl_probe_lab.prom for node_exporter's textfile collector"
        )
        after.add_argument(
            "--kcidb", type=_origin, metavar="ORIGIN", help="write KCIDB JSON, one test for each machine"
        )
        after.add_argument("--mail", default="", metavar="ADDRESS", help="send what changed, if anything, by sendmail")
        if name == "install":
            place = one.add_argument_group("systemd")
            which = place.add_mutually_exclusive_group(required=True)
            which.add_argument(
                "--user", action="store_true", help="into your own systemd (loginctl enable-linger keeps it)"
            )
            which.add_argument("--system", action="store_true", help="into the machine's systemd; needs root")
            place.add_argument("--run-as", default="root", metavar="USER", help="whose ssh keys --system uses (root)")
            place.add_argument("--at", default="02:00", metavar="TIME", help="an OnCalendar of systemd (default 02:00)")
            place.add_argument("--dry-run", action="store_true", help="print both units, write nothing")


def _percent(text: str) -> float:
    try:
        value = float(text[:-1] if text.endswith("%") else text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage such as 5%")
    return value / 100


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="PATH", help="write to a file (default: standard output)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def _origin(text: str) -> str:
    if not re.match(r"[a-z0-9_]+\Z", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of a-z, 0-9 and _")
    return text


def _kernel(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no commit, tag or kernel release")
    return text


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


def _profile(text: str) -> str:
    from probe.errors import UsageError
    from probe.models.profile import parse_profile

    try:
        parse_profile(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _mask(text: str) -> int:
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a mask of 64 bits such as 0x6")
    return value


def _many(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number below 1,000,000,000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 86400")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5) or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)
