# SPDX-License-Identifier: MIT
"""What Ansible and ssh say of a machine that gave no answer: what it means, in few words, and what can be done."""

from __future__ import annotations

import re
from typing import Any

# Ansible's words for what it counts as unreachable, though the machine was reached and nothing was started there.
_NO_START = re.compile(r"privilege escalation prompt|Failed to create temporary directory|[Ii]ncorrect \S+ password")
# ssh's words when it never got as far as a shell (ssh.c, sshconnect.c, kex.c of OpenSSH 9): nothing was started there.
_NEVER = re.compile(
    r"ssh: connect to host|Could not resolve hostname|Host key verification failed|REMOTE HOST IDENTIFICATION"
    r"|Permission denied|[Nn]o route to host|banner exchange|kex_exchange_identification|Connection refused"
    r"|Too many authentication failures|no matching |Invalid/incorrect password"
)
# What Ansible puts around ssh's own words.
_AROUND = re.compile(
    r"^(Task failed: )?(Failed to connect to the host via ssh: |Data could not be sent to remote host \S+ "
    r"Make sure this host can be reached over ssh: ?)?"
)


def ssh_said(result: dict[str, Any]) -> str:
    """Return ssh's words, without Ansible's around them, the last two lines of many; "" if it had none."""
    lines = [line.strip() for line in str(result.get("msg", "")).splitlines() if line.strip()]
    words = lines[-1:] if lines and "ssh: connect" in lines[-1] and len(lines) > 1 else lines[-2:]
    return _AROUND.sub("", " ".join(words) + " ").strip()


# What an administrator can do about a reason that Ansible or ssh gives.
_CURES = (
    ("Host key verification failed", "log in there once by ssh, or take its key with ssh-keyscan"),
    ("Permission denied \\(", "ansible_user in the inventory, or a key that it knows"),
    ("sudo: not found", "log in as root: ansible_user=root, or --no-become"),
    (
        "interpreter .* was not found|python[0-9.]*: (not found|Permission denied)",
        "install one, or name it: ansible_python_interpreter",
    ),
    ("kexec: not found", "install kexec-tools there, or give the inventory spec_ctrl_boot"),
    ("privilege escalation prompt", "sudo there asks, or hangs: NOPASSWD, or ansible_user=root"),
)


def with_cure(why: str) -> str:
    """Add what can be done about a reason, where that is known."""
    cure = next((cure for pattern, cure in _CURES if re.search(pattern, why)), "")
    return f"{why} ({cure})" if cure else why


# What stands where a module's answer should be when it never began: no such Python, or one that is too old for Ansible.
_NO_MODULE = re.compile(r"interpreter .* was not found|requires a minimum of Python|command not found")
_SUDO = re.compile(r"sudo|[Pp]assword|privilege escalation")
_LATE = re.compile(r"expected time frame|[Tt]imed out")


def never_began(result: dict[str, Any]) -> bool:
    """Tell whether a task failed before its module began, for a reason that another Python may mend."""
    if "invocation" in result or result.get("timedout") or _LATE.search(_said(result)):
        return False
    words = " ".join([_said(result), *(str(result.get(key, "")) for key in ("module_stderr", "module_stdout"))])
    if _SUDO.search(words):
        return False
    return result.get("rc") == 127 or bool(_NO_MODULE.search(words)) or bool(result.get("module_stderr"))


def _said(result: dict[str, Any]) -> str:
    return " ".join(str(result.get("msg", "it said nothing")).split())


def said_of_failure(result: dict[str, Any]) -> str:
    """Say why a task failed on a machine: in the machine's words where Ansible got no answer of its module."""
    said = _AROUND.sub("", _said(result) + " ").strip()
    for key in ("module_stderr", "stderr", "module_stdout", "stdout"):
        lines = [line.strip() for line in str(result.get(key) or "").splitlines() if line.strip()]
        if lines:
            return f"it answered: {lines[-1]}" if said.startswith("Module result") else f"{said}: {lines[-1]}"
    return said


def was_never_reached(result: dict[str, Any]) -> bool:
    """Tell whether nothing can have been started on a machine that Ansible calls unreachable."""
    return bool(_NEVER.search(_said(result)))


def was_reached(result: dict[str, Any]) -> bool:
    """Tell whether a machine that Ansible calls unreachable was reached, and would not start anything."""
    return bool(_NO_START.search(_said(result)))
