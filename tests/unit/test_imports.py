# SPDX-License-Identifier: MIT
"""Who may import whom (DESIGN section 3), who may print and exit, and the licence line: read from the source."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).replace(".__init__", ""): path
    for path in sorted((ROOT / "probe").rglob("*.py"))
}
CLI = "probe.cli"

# Pure rooms: what they decide depends on what they are given, on nothing else. A package means all that is in it.
PURE = (
    "probe.masks",
    "probe.registers",
    "probe.features",
    "probe.errors",
    "probe.outcome",
    "probe.cpuid.snapshot",
    "probe.cpuid.enumeration",
    "probe.cpuid.compare",
    "probe.cpuid.dumps",
    "probe.models",
    "probe.verdict",
    "probe.record",
    "probe.entries",
    "probe.kvm_record",
    "probe.migration_record",
    "probe.pool",
    "probe.profile_sets",
    "probe.diff",
    "probe.cases",
    "probe.nights",
    "probe.night",
    "probe.sweep",
    "probe.b4_check",
    "probe.arguments",
    "probe.report",
)
EDGES = {
    "probe.msr",
    "probe.host",
    "probe.journal",
    "probe.scheduling",
    "probe.run",
    "probe.store",
    "probe.stream",
    "probe.kernel_tree",
    "probe.cpuid.live",
    "probe.cpuid.machine",
    "probe.cli",
}
# Modules through which a program sees or touches the world outside it.
WORLD = {
    "asyncio",
    "cpuid",
    "cpuid_native",
    "ctypes",
    "datetime",
    "fcntl",
    "glob",
    "io",
    "locale",
    "logging",
    "mmap",
    "multiprocessing",
    "os",
    "platform",
    "psutil",
    "random",
    "resource",
    "select",
    "shutil",
    "signal",
    "socket",
    "stat",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "urllib",
}
# read_dump() takes a file or standard input; nothing else of that room touches either.
MAY = {"probe.cpuid.dumps": {"os", "stat", "sys"}}


@dataclass(frozen=True)
class Import:
    """One imported module: where, whether at run time, and whether as soon as the module is loaded."""

    name: str
    line: int
    at_once: bool
    for_types: bool


def _imports(tree: ast.AST, package: str) -> Iterator[Import]:
    def walk(node: ast.AST, at_once: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_once, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: -(node.level - 1) or None], *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in PROBE else base, node.lineno, at_once, for_types)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_once = False
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inside in node.body:
                yield from walk(inside, at_once, True)
            for otherwise in node.orelse:
                yield from walk(otherwise, at_once, for_types)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once, for_types)

    return walk(tree, True, False)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def imports_of(module: str) -> tuple[Import, ...]:
    path = PROBE[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return tuple(_imports(_tree(path), package))


def in_room(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


PURE_MODULES = [module for module in PROBE if in_room(module, PURE)]


def test_every_room_of_the_list_is_there() -> None:
    for room in (*PURE, *EDGES):
        assert room in PROBE, f"{room} has moved: tell this test"


@pytest.mark.parametrize("module", PURE_MODULES)
def test_a_pure_room_imports_no_edge_not_even_through_another(module: str) -> None:
    seen: dict[str, str] = {module: module}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        assert current not in EDGES, f"pure {module} reaches an edge: {seen[current]}"
        for one in imports_of(current):
            if one.name in PROBE and not one.for_types and one.name not in seen:
                seen[one.name] = f"{seen[current]} -> {one.name}"
                waiting.append(one.name)


@pytest.mark.parametrize("module", PURE_MODULES)
def test_a_pure_room_sees_nothing_of_the_world(module: str) -> None:
    for one in imports_of(module):
        top = one.name.partition(".")[0]
        assert top not in WORLD or top in MAY.get(module, set()), f"{module} line {one.line} imports {one.name}"
    for node in ast.walk(_tree(PROBE[module])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and module not in MAY:
            assert node.func.id not in ("open", "input"), f"{module} line {node.lineno} calls {node.func.id}()"


def test_the_agent_never_imports_the_kernel_harness() -> None:
    for module in PROBE:
        for one in imports_of(module):
            if one.name.partition(".")[0] == "kernel_harness":
                assert module == CLI, f"{module} line {one.line} imports {one.name}"
                assert not one.at_once, f"{CLI} line {one.line}: import it inside the sub-command that needs it"


def test_the_command_line_is_imported_by_nobody() -> None:
    for module in PROBE:
        if module != "probe.__main__":
            assert CLI not in {one.name for one in imports_of(module)}, module


def test_what_a_sub_command_needs_is_imported_inside_it() -> None:
    """--help must not wait for msgspec and the tables."""
    at_once = {one.name for one in imports_of(CLI) if one.at_once and not one.for_types}
    assert {name for name in at_once if name.startswith("probe.")} <= {"probe.arguments", "probe.errors", "probe.masks"}
    assert not at_once & {"msgspec", "psutil", "subprocess", "json", "textwrap"}


def test_no_two_modules_import_each_other() -> None:
    graph = {
        module: {one.name for one in imports_of(module) if one.name in PROBE and not one.for_types} - {module, "probe"}
        for module in PROBE
    }
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in finished:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            finished.add(module)

    for module in PROBE:
        visit(module, ())


def _name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


SAYS = {"print", "sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer.write", "exit", "quit", "sys.exit"}


@pytest.mark.parametrize("module", [module for module in PROBE if module != CLI])
def test_only_the_command_line_prints_or_exits(module: str) -> None:
    for node in ast.walk(_tree(PROBE[module])):
        if isinstance(node, ast.Call):
            name = _name_of(node.func)
            assert name not in SAYS, f"{module} line {node.lineno} calls {name}()"
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            assert _name_of(raised) != "SystemExit", f"{module} line {node.lineno} raises SystemExit"
    # os._exit() ends a forked child without running the parent's clean-up; nothing else may.
    leaves = [
        node for node in ast.walk(_tree(PROBE[module])) if isinstance(node, ast.Attribute) and node.attr == "_exit"
    ]
    assert not leaves or module == "probe.journal"


def test_the_rules_can_be_broken() -> None:
    """The reader of imports sees what it has to see."""
    text = "import os.path\ndef f():\n    from probe.msr import MsrDriver\nif TYPE_CHECKING:\n    import probe.run\n"
    assert list(_imports(ast.parse(text), "probe")) == [
        Import("os.path", 1, True, False),
        Import("probe.msr", 3, False, False),
        Import("probe.run", 5, True, True),
    ]
    relative = list(_imports(ast.parse("from . import msr\nfrom .cpuid import live\n"), "probe"))
    assert [one.name for one in relative] == ["probe.msr", "probe.cpuid.live"]
    assert _name_of(ast.parse("sys.stdout.write('x')").body[0].value.func) in SAYS  # type: ignore[attr-defined]


SOURCES = [
    path
    for folder in ("probe", "kernel_harness", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__pycache__" not in path.parts
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_licence_comes_first(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text:  # an empty __init__.py has nothing to license
        assert text.splitlines()[0] == "# SPDX-License-Identifier: MIT"
