# SPDX-License-Identifier: MIT
"""The manual page and the completions: as the parser is now, whole, sound roff, and of use in real shells."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from probe.arguments import make_parser
from tests import share

PARSERS = list(share.walk(make_parser()))
PAGE = share.ROOT / share.PAGE


def run(*command: str | Path, **options: object) -> str:
    """Run a program of the system that must have nothing to say on stderr; skip if this machine does not have it."""
    if not shutil.which(str(command[0])):
        pytest.skip(f"no {command[0]} here")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)


def test_the_page_is_what_the_parser_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # as wide as whoever calls it has it
    assert PAGE.read_text("utf-8") == share.generate()[share.PAGE], "run: make docs"


# --- the manual page ---


def test_the_page_has_every_command_and_option() -> None:
    parts = re.split(r'^\.S[SH] "?(.+?)"?$', PAGE.read_text("utf-8").replace(r"\-", "-"), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2]))
    for parser in PARSERS:
        text = sections[parser.prog.partition(" ")[2] or "OPTIONS"]
        for option in parser._option_string_actions:
            if parser is PARSERS[0] or option not in ("-h", "--help"):
                assert rf"\fB{option}\fR" in text, f"{parser.prog} {option}"
    assert {"EXIT STATUS", "FILES", "ENVIRONMENT", "EXAMPLES", "SEE ALSO"} <= sections.keys()


@pytest.mark.parametrize("command", [command for _, command in share.EXAMPLES])
def test_the_examples_are_commands(command: str) -> None:
    make_parser().parse_args(shlex.split(command))


def test_groff_has_no_warning() -> None:
    text = run("groff", "-man", "-ww", "-Tascii", "-P-cbou", "-rLL=80n", PAGE)
    assert max(map(len, text.splitlines())) <= 80
    assert "  EXIT STATUS" not in text
    assert "\nEXIT STATUS\n" in text


# --- the completions ---


def test_the_tables_name_arguments_that_there_are() -> None:
    known = {action.dest for parser in PARSERS for action in parser._actions}
    known |= {f"{parser.prog.partition(' ')[2]} {action.dest}" for parser in PARSERS for action in parser._actions}
    assert {*share.NAMED, *(one for one in share.FILED if " " in one), *share.FREE} <= known


def test_every_positional_argument_completes() -> None:
    for parser in share.walk(share.completable()):
        for action in parser._get_positional_actions():
            free = f"{parser.prog.partition(' ')[2]} {action.dest}" in share.FREE
            known = free or action.choices or hasattr(action, "complete")
            assert known, f"{parser.prog} {action.metavar}: give it a row in NAMED or FILED of tests/share.py"


def commands_of(name: str) -> set[str]:
    """Return the sub-commands of a command."""
    names = [parser.prog.split()[1:] for parser in PARSERS]
    return {one[-1] for one in names if one and " ".join(one[:-1]) == name}


FILES = {"a.json", "mine.py", "folder"}
# A command line, with what must be among its completions; all of them start as its last word does.
ASKED = {
    "": commands_of(""),
    "k": {"kvm"},
    "kvm ": commands_of("kvm"),
    "kvm --profile dali po": {"policy"},
    "kvm policy em": {"emulate", "emulate-guest", "emulate-host"},
    "kvm policy m": {"maxim-v1", "mine.py"},
    "kvm policy emulate --compare x": {"xen"},
    "kvm policy --pro": {"--profile", "--programs"},
    "kvm migrate --rule ": set(share.WORDS["rule"]),
    "kvm explore --model kvm-6.": {name for name in share.WORDS["machine"] if name.startswith("kvm-6.")},
    "models diff xen ": set(share.WORDS["machine"]),
    "run --model ": set(share.WORDS["predictor"]),
    "run --in ": {"auto", "metal", "guest", "kvm"},
    "run --identify ": set(),
    "predict ": FILES,
    "predict --guest ": {*share.WORDS["profile"], *FILES},
    "migrate a.json ": FILES,
    "diff a.json ": FILES,
    "restore --state-dir ": {"folder"},
    "boot --kernels host -- kvm po": {"policy"},
    "boot --kernels host -- kvm --js": {"--json"},
}
# Each gets a completion script and command lines, and prints the completions of each, one on a line, and a line "%%".
BASH = r"""
source "$1"
function=$(complete -p spec-ctrl-probe | sed 's/.*-F \([^ ]*\).*/\1/')
for line in "${@:2}"; do
    read -ra COMP_WORDS <<<"$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    $function
    printf '%s\n' "${COMPREPLY[@]}" %%
done
"""
FISH = r"source $argv[1]; for line in $argv[2..]; complete -C $line | string split -f 1 \t; echo %%; end; true"
# Completion needs a terminal. What a completion function offers, it gives to compadd, which notes it here.
ZSH = r"""
zmodload zsh/zpty
folder=$(mktemp -d)
trap 'rm -rf $folder' EXIT
zpty inner zsh -f -i
zpty -w inner "PS1=; fpath=(${(q)1:h} \$fpath); out=$folder/out"
zpty -w inner 'autoload -Uz compinit; compinit -u -D; setopt no_auto_list
compadd() {
    [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]] && { builtin compadd "$@"; return }
    local -a found
    builtin compadd -O found "$@"
    offered+=($found)
    builtin compadd "$@"
}
note() {
    offered=()
    _main_complete
    print -rl -- "${(@Q)offered}" > $out.part
    mv $out.part $out
    BUFFER=
}
zle -C complete-and-note complete-word note
bindkey "^I" complete-and-note
bindkey "^U" kill-whole-line'
for line in "${@:2}"; do
    zpty -w -n inner $'\C-u'"$line"$'\t'
    for ((i = 0; i < 1500; i++)); do [[ -e $folder/out ]] && break; sleep 0.02; done
    cat $folder/out
    rm $folder/out
    print %%
done
zpty -d inner
"""
SHELLS = {
    "bash": ("bash", "--norc", "-c", BASH, "bash"),
    "zsh": ("zsh", "-f", "-c", ZSH, "zsh"),
    "fish": ("fish", "--no-config", "-c", FISH, "--"),
}


def written(folder: Path, shell: str) -> Path:
    """Write a shell's script into a folder, by the name that the shell looks for."""
    path = folder / share.COMPLETIONS[shell]
    path.parent.mkdir(parents=True)
    path.write_text(share.completion(shell), "utf-8")
    return path


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    (tmp_path / "here" / "folder").mkdir(parents=True)
    for name in ("a.json", "mine.py"):
        (tmp_path / "here" / name).touch()
    script = written(tmp_path, shell)
    lines = [f"{share.NAME} {line}" for line in ASKED]
    said = run(*SHELLS[shell], script, *lines, cwd=tmp_path / "here", env={**os.environ, "HOME": str(tmp_path)})
    answers = [{word.rstrip("/") for word in answer.split("\n")} - {""} for answer in said.split("%%\n")]
    assert len(answers) == len(ASKED) + 1
    for (line, wanted), found in zip(ASKED.items(), answers):
        assert wanted <= found, line
        assert all(word.startswith(line.rpartition(" ")[2]) for word in found), line
        assert wanted or not found, line
        assert "/" not in "".join(found), line


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_takes_the_script(shell: str, tmp_path: Path) -> None:
    run(shell, "-n", written(tmp_path, shell))
