# SPDX-License-Identifier: MIT
"""Policies of users' own: a Python file with a function decide(host, guest, vcpu, value)."""

from __future__ import annotations

import ast
from pathlib import Path

from kernel_harness.kvm.machine import hurry, ticking
from kernel_harness.kvm.policed import text_of
from probe.errors import UsageError
from probe.models.policy import BY_NAME, Policy

_LOAD_SECONDS = 5.0
EXAMPLE = '''\
"""Only what the guest's CPUID enumerates, and never STIBP."""
from probe.models.policy import complete, fault, guest_bits, has_register

def decide(host, guest, vcpu, value):
    if not has_register(guest) or value & ~guest_bits(guest):
        return fault()             # #GP; a refusal, if the VMM writes
    return complete(value & ~0x2)  # or drop(), which forgets the write
'''


def find(name: str) -> Policy:
    """Return a built-in policy, or the one of a file whose name ends in .py.

    It is called by the file's name, with .py: no file passes for a built-in one. decide() must depend on its arguments
    alone, or its model is asked something else than its guests. The file's docstring is the title; READS = True makes
    guest reads come to us, too, who answer the shadow.
    Raise UsageError for a name that is none, and for a file that cannot be read, does not run, or has no decide().
    """
    if not name.endswith(".py"):
        if name not in BY_NAME:
            raise UsageError(
                f"no policy is called {name!r}", f"one of: {', '.join(BY_NAME)}; or a file that ends in .py"
            )
        return BY_NAME[name]
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
        code = compile(text, path.name, "exec")
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise UsageError(f"cannot use the policy {name}: {error}", "see: spec-ctrl-probe kvm policy") from error
    scope: dict[str, object] = {"__name__": path.stem, "__file__": str(path)}
    try:
        with ticking(), hurry(_LOAD_SECONDS):
            exec(code, scope)
    except TimeoutError:
        raise UsageError(f"the policy {name} does not come to an end when it is loaded", "it loops") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(
            f"the policy {name} raises when it is loaded: {type(error).__name__}: {text_of(error)}"
        ) from error
    decide = scope.get("decide")
    if not callable(decide):
        raise UsageError(f"the policy {name} has no function decide(host, guest, vcpu, value)", "see: kvm policy")
    title = (ast.get_docstring(ast.parse(text)) or path.stem).splitlines()[0]
    return Policy(path.name, text_of(title), "a file", decide, reads=scope.get("READS") is True)
