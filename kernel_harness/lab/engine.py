# SPDX-License-Identifier: MIT
"""Ansible, run as a program: who is in an inventory, and one playbook over machines with its events as they come.

ansible-core (GPL) is never imported; ansible-runner (Apache-2.0) starts it and reads its events.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from probe.errors import ProbeError, RequirementMissing, UsageError

_PLAYBOOKS = Path(__file__).resolve().parent / "playbook"
_CURE = "pip install 'spec-ctrl-probe[lab]'"
# Without these a host that hangs is noticed when TCP gives up, after a quarter of an hour; nobody answers questions.
_SSH = (
    "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ConnectTimeout=10"
    "{{ '' if ansible_password is defined or ansible_ssh_pass is defined else ' -o BatchMode=yes' }}"
)
# Ansible asks its last workers every millisecond how far they are: a tenth of a CPU.
_CONFIGURATION = "[defaults]\ninternal_poll_interval = 0.02\n"
_SSH_OF_ANSIBLE = "-C -o ControlMaster=auto -o ControlPersist=60s"


def _program(name: str) -> str:
    """Return a program of ansible-core: that of this Python's environment, or the one in PATH."""
    own = Path(sys.executable).parent / name
    found = own if own.exists() else shutil.which(name)
    if found is None:
        raise RequirementMissing(f"no {name} here: Ansible is what a sweep runs on", _CURE)
    return str(found)


def configuration() -> Path | None:
    """Return the user's Ansible configuration, or None."""
    return next((path.resolve() for path in _configurations() if path.is_file()), None)


def _of_user(variable: str, section: str, key: str, otherwise: str) -> str:
    """Return a setting of the user's, from the environment or the configuration."""
    known = configparser.ConfigParser(interpolation=None, strict=False, inline_comment_prefixes=(";",))
    config = configuration()
    if config is not None:
        with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):  # Ansible itself will complain
            known.read(config)
    return os.environ.get(variable) or str(known.get(section, key, fallback=otherwise))


def _environment() -> dict[str, str]:
    """Return what Ansible's programs need: the user's configuration, and ours where a sweep depends on it."""
    config = configuration()
    ours = {
        "PATH": f"{Path(_program('ansible-playbook')).parent}:{os.environ.get('PATH', os.defpath)}",
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_RETRY_FILES_ENABLED": "0",
        "ANSIBLE_DEPRECATION_WARNINGS": "0",
        "ANSIBLE_NOCOLOR": "1",
        # a question would be waited for without a word
        "ANSIBLE_ASK_PASS": "0",
        "ANSIBLE_BECOME_ASK_PASS": "0",
        "ANSIBLE_ASK_VAULT_PASS": "0",
        # ansible-runner would switch this off
        "ANSIBLE_HOST_KEY_CHECKING": _of_user("ANSIBLE_HOST_KEY_CHECKING", "defaults", "host_key_checking", "True"),
        "ANSIBLE_LIBRARY": str(_PLAYBOOKS / "library"),
        "ANSIBLE_LOCAL_TEMP": os.environ.get("ANSIBLE_LOCAL_TEMP") or tempfile.gettempdir(),  # no home is needed
    }
    if config is not None:
        ours["ANSIBLE_CONFIG"] = str(config)
    return ours


def _configurations() -> Iterator[Path]:
    """Return where Ansible looks for its configuration, in its order; ansible-runner changes the folder."""
    if chosen := os.environ.get("ANSIBLE_CONFIG"):
        named = Path(chosen).expanduser()
        yield named / "ansible.cfg" if named.is_dir() else named
    here = Path.cwd()
    if not here.stat().st_mode & 0o002:  # as Ansible: not from a folder that anyone may write to
        yield here / "ansible.cfg"
    yield Path("~/.ansible.cfg").expanduser()
    yield Path("/etc/ansible/ansible.cfg")


def sources(inventory: Sequence[str]) -> list[str]:
    """Return inventories as Ansible takes them from any folder; raise UsageError for a file that is not there."""
    found = []
    for one in inventory:
        if "," in one:
            found.append(one)
        elif Path(one).exists():
            found.append(str(Path(one).resolve()))
        else:
            raise UsageError(f"no inventory {one}", "a file, a folder, a script, or names with a comma: lab1,lab2")
    return found


def complaint(text: str) -> str:
    """Return what Ansible complained of, in its words: the first of its errors, else of its warnings."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", text)
    found = re.findall(r"\[(ERROR|WARNING)\]: (.*?)(?=\[(?:ERROR|WARNING)\]:|\Z)", plain, re.S)
    first = next((told for kind, told in sorted(found)), plain)
    return " ".join(first.split())[:300]


def list_hosts(inventory: Sequence[str], limit: str = "") -> dict[str, dict[str, Any]]:
    """Return each machine of an inventory with its variables, as Ansible has them; limit is a pattern of Ansible's.

    Raise UsageError if there is none, with what Ansible said.
    """
    own = [word for one in sources(inventory) for word in ("-i", one)]
    command = [_program("ansible-inventory"), "--list", *own]
    if limit:
        command += ["--limit", limit]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **_environment()},
        check=False,
    )
    said = complaint(done.stderr)
    try:
        groups = json.loads(done.stdout)
        variables: dict[str, dict[str, Any]] = groups.pop("_meta").get("hostvars", {})
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"Ansible cannot read the inventory: {said or 'it said nothing'}") from error
    names = {name: None for group in groups.values() for name in group.get("hosts", ())}
    if not names:
        raise UsageError(
            f"no machine in {', '.join(inventory)}{f': {said}' if said else ''}",
            "ansible-inventory -i INVENTORY --list shows what there is",
        )
    return {name: variables.get(name, {}) for name in names}


@dataclass
class Engine:
    """Playbooks over an inventory, with the agent for those that lack it. stop() ends the one that runs, and tells why;
    hosts are the machines of the last one, known before the first is asked."""

    inventory: tuple[str, ...]
    agent: bytes
    forks: int
    values: Mapping[str, Any]
    limit: str = ""
    hosts: list[str] = field(default_factory=list)
    _why: list[str] = field(default_factory=list)

    def stop(self, why: str) -> None:
        """End the playbook that runs; agents on machines run on, and keep what they find."""
        self._why.append(why)

    @property
    def stopped(self) -> str:
        """Why it was stopped, or ""."""
        return self._why[0] if self._why else ""

    def play(
        self,
        name: str,
        hosts: Sequence[str] | None,
        event: Callable[[str, dict[str, Any]], None],
        *,
        known: bool = False,
    ) -> None:
        """Run one playbook over some machines (None: all); event gets each of the engine's events that has a machine.

        Of known ones it is taken that they have the agent, and a python3 in their PATH: neither is the agent sent (2 MB
        as text, half a second of a machine's CPU), nor a Python looked for. An interpreter that the inventory or the
        user names goes first.

        Raise KeyboardInterrupt for SIGINT and SIGTERM, ProbeError if Ansible does not run at all.
        """
        try:
            import ansible_runner
        except ImportError as error:
            raise RequirementMissing(f"cannot run Ansible: {error}", _CURE) from error
        with tempfile.TemporaryDirectory(prefix="sweep-") as made:
            folder = Path(made)
            cmdline = [word for one in sources(self.inventory) for word in ("-i", one)]
            if hosts is not None:
                (folder / "limit").write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")
                cmdline += ["--limit", f"@{folder / 'limit'}"]
            elif self.limit:
                cmdline += ["--limit", self.limit]
            self._pack(folder / "module_utils", carry=not known)
            seen: list[str] = []
            self.hosts = []

            def handle(one: dict[str, Any]) -> bool:
                seen.append(one.get("stdout", "")[-500:])
                del seen[:-20]
                data = one.get("event_data", {})
                if one.get("event") == "playbook_on_play_start":
                    self.hosts = self.hosts or _names(data.get("name"))
                if data.get("host") and not self.stopped:
                    event(one["event"], data)
                return False  # nothing is kept on disk

            own = _of_user("ANSIBLE_SSH_ARGS", "ssh_connection", "ssh_args", _SSH_OF_ANSIBLE)
            values = {
                **self.values,
                "ansible_ssh_args": f"{own} {_SSH}",
                "ansible_ssh_retries": 0,  # a second try would hide that the first had come through
            }
            # connections of this play alone: another's master may be that of a namesake
            private = {
                "ANSIBLE_MODULE_UTILS": str(folder / "module_utils"),
                "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder),
            }
            if configuration() is None and "ANSIBLE_CONFIG" not in os.environ:
                (folder / "ansible.cfg").write_text(_CONFIGURATION, encoding="utf-8")
                private["ANSIBLE_CONFIG"] = str(folder / "ansible.cfg")
            if known and not _of_user("ANSIBLE_PYTHON_INTERPRETER", "defaults", "interpreter_python", ""):
                private["ANSIBLE_PYTHON_INTERPRETER"] = "python3"
            interrupted: list[int] = []
            left: list[psutil.Process] = []

            def is_over() -> bool:
                if not interrupted and not self.stopped:
                    return False
                left.extend(psutil.Process().children(recursive=True))  # its workers have sessions of their own
                return True

            with _signals(interrupted):
                done = ansible_runner.run(
                    private_data_dir=str(folder),
                    playbook=str(_PLAYBOOKS / name),
                    cmdline=shlex.join(cmdline),
                    forks=self.forks,
                    extravars=values,
                    envvars={**_environment(), **private},
                    settings={"pexpect_timeout": 1, "suppress_ansible_output": True},
                    quiet=True,
                    event_handler=handle,
                    cancel_callback=is_over,
                )
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        if interrupted:
            by = signal.Signals(interrupted[0])
            raise KeyboardInterrupt(*([] if by is signal.SIGINT else [by.name]))
        if done.rc not in (0, 2, 4, 6) and not self.stopped:  # 2 failed, 4 unreachable
            raise ProbeError(
                f"Ansible ended with exit code {done.rc}: {complaint(' '.join(seen)) or 'it said nothing'}"
            )

    def _pack(self, folder: Path, *, carry: bool) -> None:
        """Write the agent's name as Python, which travels with the module; and the agent, if it is to be carried."""
        folder.mkdir(mode=0o700)
        text = base64.b64encode(self.agent).decode() if carry else ""
        digest = hashlib.sha256(self.agent).hexdigest()
        (folder / "spec_ctrl_agent.py").write_text(f'AGENT = "{text}"\nSHA256 = "{digest}"\n')


def _names(told: object) -> list[str]:
    """Return the machines that a play's name tells, [] if it is another's."""
    try:
        found = json.loads(str(told))
    except ValueError:
        return []
    return [str(one) for one in found] if isinstance(found, list) else []


@contextlib.contextmanager
def _signals(interrupted: list[int]) -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGHUP, for ansible-runner looks when it can end its child."""

    def note(number: int, _: FrameType | None) -> None:
        interrupted.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
