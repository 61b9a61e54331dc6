# SPDX-License-Identifier: MIT
"""Policies of users' own: a Python file with a function decide(host, guest, vcpu, value)."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, ModuleType

from kernel_harness.kvm.machine import hurry, ticking
from kernel_harness.kvm.policed import text_of
from kernel_harness.kvm.processes import by_user
from probe.errors import PolicyError, UsageError
from probe.models.policy import BY_NAME, Policy

_LOAD_SECONDS = 5.0
_NO_FUNCTIONS = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
_NUMBERS = itertools.count()  # of modules, whose own names may be those of others
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
    guest reads come to us, too, who answer the shadow. It may import what lies beside it, while it is loaded.
    Raise UsageError for a name that is none, PolicyError for a file that does not run, or has no decide().
    """
    if not name.endswith(".py"):
        if name not in BY_NAME:
            raise UsageError(
                f"no policy is called {name!r}", f"one of: {', '.join(BY_NAME)}; or a file that ends in .py"
            )
        return BY_NAME[name]
    path = Path(name)
    text = _text(path)
    try:
        code = compile(text, path.name, "exec", dont_inherit=True)
        title = (ast.get_docstring(ast.parse(text)) or path.stem).splitlines()[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PolicyError(f"cannot use the policy {name}: {error}", "see: spec-ctrl-probe kvm policy") from error
    module = _load(name, path, code)
    decide = getattr(module, "decide", None)
    if not callable(decide):
        raise PolicyError(f"the policy {name} has no function decide(host, guest, vcpu, value)", "see: kvm policy")
    if any(is_one(decide) for is_one in _NO_FUNCTIONS):
        raise PolicyError(
            f"decide() of the policy {name} returns no Decision but a coroutine or generator", "a plain def, no yield"
        )
    return Policy(path.name, text_of(title), "a file", decide, reads=getattr(module, "READS", None) is True)


def file_names(names: Iterable[str | None]) -> list[str]:
    """Return those that are files, without their folders."""
    return [Path(name).name for name in names if name and name.endswith(".py")]


def _text(path: Path) -> str:
    """Read a policy's file: a regular one, as a pipe may never give anything."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PolicyError(f"cannot use the policy {path}: it is no regular file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(
            f"cannot use the policy {path}: {error.strerror}", "see: spec-ctrl-probe kvm policy"
        ) from error
    except (OSError, ValueError) as error:
        raise PolicyError(f"cannot use the policy {path}: {error}") from error


def _load(name: str, path: Path, code: CodeType) -> ModuleType:
    """Run a policy's file as a module, as import does it: dataclasses and the like look for theirs."""
    module = ModuleType(f"policy_file_{next(_NUMBERS)}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        with ticking(), hurry(_LOAD_SECONDS), contextlib.redirect_stdout(sys.stderr), _siblings(path.parent.resolve()):
            exec(code, module.__dict__)
    except TimeoutError:
        raise PolicyError(f"the policy {name} does not come to an end when it is loaded", "it loops") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and by_user(error):
            raise
        raise PolicyError(
            f"the policy {name} raises when it is loaded: {type(error).__name__}: {text_of(error)}"
        ) from error
    return module


@contextlib.contextmanager
def _siblings(folder: Path) -> Iterator[None]:
    """Let a file import others of its folder; afterwards these are forgotten, for another folder's of the same name."""
    known = set(sys.modules)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file and folder in Path(file).parents:
                del sys.modules[name]
