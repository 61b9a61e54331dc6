# SPDX-License-Identifier: MIT
"""Writes share/: the manual page and the completions of bash, zsh and fish, all from the parser that answers --help.

What each file says of commands and options comes from probe/arguments.py, names of models and policies from their
tables.
"""

from __future__ import annotations

import argparse
import functools
import re
import textwrap
from collections.abc import Iterable, Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import shtab

from probe import __version__
from probe.arguments import make_parser
from probe.errors import ExitCode
from probe.journal import STATE_DIR
from probe.models import machines, migration, policy, profile, registry

ROOT = Path(__file__).parents[1]
NAME = "spec-ctrl-probe"
PAGE = f"share/man/man1/{NAME}.1"
COMPLETIONS = {
    "bash": f"share/bash-completion/completions/{NAME}",
    "zsh": f"share/zsh/site-functions/_{NAME}",
    "fish": f"share/fish/vendor_completions.d/{NAME}.fish",
}


def generate() -> dict[str, str]:
    """Return the text of every file in share/ by its path from the project's folder; only PAGE is committed."""
    return {PAGE: manual(), **{path: completion(shell) for shell, path in COMPLETIONS.items()}}


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of its sub-commands, in the order of --help."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in dict.fromkeys(action.choices.values()):
                yield from walk(one)


def summaries(parser: argparse.ArgumentParser) -> dict[argparse.ArgumentParser, str]:
    """Return the line that --help has for each sub-command."""
    said = {
        action.choices[choice.dest]: one._get_formatter()._expand_help(choice) if choice.help else ""
        for one in walk(parser)
        for action in one._actions
        if isinstance(action, argparse._SubParsersAction)
        for choice in action._choices_actions
    }
    return {one: said[one] for one in walk(parser) if one in said}


# --- the manual page -------------------------------------------------------------------------------------------------
# Not by argparse-manpage: its 4.8 tells the options of kvm after all of kvm migrate, and fills the usage like prose.

EXAMPLES = (
    ("Say which bits this CPU should accept; nothing is written:", "predict"),
    ("Probe the register of a guest that is booted for it:", "run"),
    ("Probe this machine, as root:", "run --write"),
    ("After a run that was killed, put back what it left:", "restore"),
    ("Find out which model this kernel's KVM follows:", "kvm"),
    ("Where a guest would see the difference between two policies:", "kvm policy emulate --compare kvm-5.6-mask"),
    ("The same of two models, without any machine:", "models diff kvm-5.6-svm kvm-maxim-v1-svm"),
    ("Study the KVM of two of Debian's kernels:", "boot --kernels debian:bookworm,debian:sid -- kvm"),
    ("What moved between two records, for a mail:", "diff before.json after.json --format mail"),
    ("A record for a CI system:", "export --format junit record.json -o results.xml"),
    ("A page of two records, compared:", "html before.json after.json -o page.html"),
)
FILES = (
    (f"{STATE_DIR}/journal.ndjson", "The journal of a run that writes, from which restore works; see --state-dir."),
    (
        f"~/.cache/{NAME}",
        "Kernels, modules built for them, and what has been found out about this machine; nothing that cannot be made "
        "again.",
    ),
    ("results/", "In the folder where the command is started: where records go if --record says nothing else."),
)
ENVIRONMENT = (
    ("PROBE_CACHE", f"Another folder instead of ~/.cache/{NAME}."),
    ("XDG_CACHE_HOME", "Another folder instead of ~/.cache."),
    ("B4_TRACKING_FILE", "What b4 knows of a series; b4 sets it for b4-check."),
    ("NO_COLOR", "Reports on a terminal are in colour unless this is set; from Python 3.14 on --help, too."),
)
SEE_ALSO = (("cpuid", 1), ("qemu-system-x86_64", 1), ("rdmsr", 1), ("wrmsr", 1), ("cpuid", 4), ("msr", 4))


def manual() -> str:
    """Return the manual page, in roff's man macros."""
    parser = make_parser()
    every = list(walk(parser))
    for one in every:
        vars(one)["color"] = False  # Python 3.14
        one.formatter_class = functools.partial(argparse.HelpFormatter, width=len("usage: ") + 71)
    summary = metadata(NAME)["Summary"]
    return "\n".join(
        (
            '.\\" SPDX-License-Identifier: MIT',
            '.\\" Made by "make docs"; do not edit.',
            f'.TH "{_roff(NAME.upper())}" 1 "{_released()}" "{_roff(NAME)} {__version__}" "User Commands"',
            ".nh",
            ".ad l",
            ".SH NAME",
            f"{_roff(NAME)} \\- {_roff(summary[0].lower() + summary[1:])}",
            ".SH SYNOPSIS",
            *_usage(parser),
            ".SH DESCRIPTION",
            _roff(parser.description or ""),
            ".PP",
            *_table((_name(one), said) for one, said in summaries(parser).items()),
            ".SH OPTIONS",
            *_arguments(parser),
            ".SH COMMANDS",
            *(line for one in every[1:] for line in _command(one)),
            ".SH EXIT STATUS",
            *_table((str(int(code)), code.meaning) for code in ExitCode),
            ".SH FILES",
            *_terms(FILES),
            ".SH ENVIRONMENT",
            *_terms(ENVIRONMENT),
            ".SH EXAMPLES",
            *(f".TP 4\n{_roff(said)}\n.B {_roff(f'{NAME} {command}')}" for said, command in EXAMPLES),
            ".SH SEE ALSO",
            ",\n".join(f".BR {_roff(page)} ({section})" for page, section in SEE_ALSO),
            "",
        )
    )


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f'.SS "{_roff(_name(parser))}"'
    yield from _usage(parser)
    if parser.description:
        yield f".PP\n{_roff(parser.description)}"
    yield from _arguments(parser)


def _usage(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """Return the usage, an option and its value on one line: where argparse breaks it hangs on Python's version."""
    words = " ".join(parser.format_usage().split())[len("usage: ") :]
    whole = re.sub(r"\[[^][]*\]|--\S+ (?![-[])\S+", lambda found: found[0].replace(" ", "\0"), words)
    lines = textwrap.wrap(whole, 71, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)
    return ".nf", *(_roff(line.replace("\0", " ")) for line in lines), ".fi"


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield positional arguments, options, and the groups that have a name; --help only of the whole command."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        if group not in (parser._positionals, parser._optionals):
            yield f".PP\n.I {_roff(f'{group.title}: {group.description or str()}'.strip())}"
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
                continue
            if "--help" in action.option_strings and parser.prog != NAME:
                continue
            options = ", ".join(rf"\fB{_roff(option)}\fR" for option in action.option_strings)
            value = "" if action.nargs == 0 else formatter._metavar_formatter(action, action.dest.upper())(1)[0]
            yield ".TP"
            yield " ".join(filter(None, (options, value and rf"\fI{_roff(value)}\fR")))
            yield _roff(formatter._expand_help(action)) if action.help else ""


def _name(parser: argparse.ArgumentParser) -> str:
    """Return "kvm policy" of the parser that calls itself "spec-ctrl-probe kvm policy"."""
    return parser.prog.partition(" ")[2]


def _released() -> str:
    """Return what CHANGELOG.md says of this version in parentheses: its date, or that it is not released."""
    found = re.search(rf"^## {re.escape(__version__)} \((.+)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert found, f"CHANGELOG.md has no line '## {__version__} (DATE)'"
    return found[1]


def _roff(text: str) -> str:
    return re.sub(r"^(?=[.'])", r"\\&", text.replace("\\", r"\e").replace("-", r"\-"), flags=re.M)


def _terms(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, said in rows:
        yield f".TP\n.B {_roff(term)}\n{_roff(said)}"


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield terms without empty lines between, all explained at the same column."""
    rows = list(rows)
    yield f".PD 0\n.TP {max(len(term) for term, _ in rows) + 3}"
    yield "\n.TP\n".join(f".B {_roff(term)}\n{_roff(said)}" for term, said in rows)
    yield ".PD"


# --- the completions -------------------------------------------------------------------------------------------------

_MACHINES = tuple(one.name for one in machines.MACHINES)
WORDS = {
    "kernel": ("host",),
    "machine": _MACHINES,
    "model": ("all", *registry.names(), *_MACHINES),
    "policy": tuple(one.name for one in policy.POLICIES),
    "predictor": registry.names(),
    "profile": (*(one.name for one in profile.NAMED), *(bit.name for bit in profile.FEATURES)),
    "rule": tuple(one.name for one in migration.RULES),
}
# Whose names an argument takes, by its dest; where a sub-command differs, by that and its dest.
NAMED = {
    "compare": "policy",
    "cpu": "profile",
    "from_policy": "policy",
    "guest": "profile",
    "kernel": "kernel",
    "kernels": "kernel",
    "model": "machine",
    "models diff one": "machine",
    "models diff other": "machine",
    "policy": "policy",
    "predict model": "model",
    "profile": "profile",
    "rule": "rule",
    "run model": "predictor",
    "to_policy": "policy",
    "to_profile": "profile",
}
# Which files an argument takes, by its metavar or a part of that, or by its sub-command and dest.
FILED = {
    "DIR": "*/",
    "FILE": "*",
    "FILE.py": "*.py",
    "PATH": "*",
    "RECORD": "*",
    "SPEC": "*",
    "diff after": "*",
    "diff before": "*",
}
# What only the user knows.
FREE = {"history what", "sweep run_arguments", "nightly run run_arguments", "nightly install run_arguments"}
_HEADER = """\
# Made by "make docs"; do not edit. The words are this project's, the code around them is the template of shtab
# (https://github.com/tqdm/shtab), under MPL-2.0 (https://mozilla.org/MPL/2.0/): so these files are not in the project.
"""


def completion(shell: str) -> str:
    """Return a shell's completion script."""
    parser = completable()
    for one, said in summaries(parser).items():
        one.description = said  # shtab shows the description: too long for a menu
    made = re.sub(r"\n?# AUTOMATICALLY GENERATED by .*\n(?:#.*\n)*", _HEADER, shtab.complete(parser, shell), count=1)
    if shell == "zsh":  # shtab 1.13.0: the first of several files would be the only one that is completed
        made = made.replace('"(*):', '"*:')
    return made.strip() + "\n"


def completable() -> argparse.ArgumentParser:
    """Return the parser, whose arguments know how they are completed."""
    parser = make_parser()
    for one in walk(parser):
        for action in one._actions:
            _complete(one, action)
    return parser


def _complete(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Give an argument that takes names or files what shtab goes by: choices, or the attribute complete."""
    whole = f"{_name(parser)} {action.dest}"
    kind = NAMED.get(whole, NAMED.get(action.dest, ""))
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    files = next((FILED[part] for part in (whole, *re.split(r"[|\[]", metavar)) if part in FILED), "")
    if action.nargs == argparse.REMAINDER:
        action.choices = _inside(metavar[len("-- ") :].partition(" ")[0])
    elif kind and files:
        action.complete = _either(kind, files)  # type: ignore[attr-defined]
    elif kind:
        action.choices = WORDS[kind]
    elif files:
        action.complete = shtab.DIRECTORY if files == "*/" else shtab.FILE  # type: ignore[attr-defined]


def _inside(name: str) -> tuple[str, ...]:
    """Return every word that a sub-command knows, for an argument that takes all of its command line."""
    own = [one for one in walk(make_parser()) if _name(one).split()[:1] == [name]]
    return tuple(dict.fromkeys(word for one in own for word in (*_name(one).split(), *one._option_string_actions)))


def _either(kind: str, files: str) -> dict[str, Any]:
    """Return completion by a name or a file: shtab has one or the other."""
    function = f"_{shtab.wordify(NAME)}_{kind}_or_file"
    words = " ".join(WORDS[kind])
    preamble = {
        "bash": f"""\
{function}() {{
  compgen -W "{words}" -- "$1"
  compgen -f -X "!{files}" -- "$1"
  compgen -d -- "$1"
}}""",
        "zsh": f"""\
{function}() {{
  _alternative "names:{kind}:({words})" 'files:file:_files -g "{files}"'
}}""",
        "fish": f"""\
function {function}
  printf '%s\\n' {words}
  __fish_complete_suffix '{files[1:]}'
end""",
    }
    return {"bash": function, "zsh": function, "fish": f"({function})", "preamble": preamble}


def main() -> None:
    for path, text in generate().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
