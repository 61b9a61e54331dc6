# SPDX-License-Identifier: MIT
"""The agent as one file for a target without internet: a zip archive that Python runs, with its three dependencies for
every supported Python inside. The same sources give the same bytes."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_harness.boot.cache import Say, default_cache, locked
from probe.errors import ProbeError, RequirementMissing
from probe.store import write_atomically

PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
_PLATFORM = "manylinux2014_x86_64"
_HERE = Path(__file__).resolve().parent
_TOP = _HERE.parents[1]
LOCK = _HERE / "agent-lock.txt"
_FIRST = {"__main__.py": "agent_main.py", "agent_start.py": "agent_start.py"}
_PACKAGES = ("probe", "kernel_harness")
_LEFT_OUT = (".pyc", ".pyi", ".so.debug")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip archive can hold


@dataclass(frozen=True)
class Built:
    """The file: where it is, its size in bytes and its SHA-256 in hexadecimal."""

    path: Path
    size: int
    sha256: str


def build(path: Path, say: Say, cache: Path | None = None, *, replace: bool = False) -> Built:
    """Write the agent's file; what is not in the cache yet is fetched by pip, checked against agent-lock.txt.

    Raise RequirementMissing if pip or the files cannot be had, RecordError if the file cannot be written.
    """
    folder = (cache or default_cache()) / "wheels"
    with locked(folder / "lock", say):
        wheels = [wheel for python in PYTHONS for wheel in _fetch(folder / python, python, say)]
    content = archive(own_files(), wheels)
    taken = write_atomically(content, path, replace=replace)
    taken.chmod(0o755)
    return Built(taken, len(content), hashlib.sha256(content).hexdigest())


def _fetch(folder: Path, python: str, say: Say) -> list[Path]:
    """Return the wheels for one Python."""
    mark = folder / f"complete-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"
    if not mark.exists():
        say(f"fetching what the agent needs on Python {python}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "--requirement", str(LOCK), "--dest", str(folder)]
        command += ["--python-version", python, "--platform", _PLATFORM, "--implementation", "cp"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise RequirementMissing(
                f"cannot fetch the agent's dependencies for Python {python}: {last[:200]}",
                "give this machine pip and a package index once; what was fetched is kept",
            )
        mark.touch()
    return sorted(folder.glob("*.whl"))


def own_files() -> dict[str, bytes]:
    """Return this project's own files by their names in the archive, and what runs first."""
    found = {name: (_HERE / source).read_bytes() for name, source in _FIRST.items()}
    for package in _PACKAGES:
        for path in sorted((_TOP / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith(_LEFT_OUT):
                found[str(path.relative_to(_TOP))] = path.read_bytes()
    return found


def archive(own: Mapping[str, bytes], wheels: Sequence[Path]) -> bytes:
    """Put everything into one archive: names in order, no times, so that the same files give the same bytes.

    The extension modules for all Pythons lie side by side; every other file must be the same in all of its wheels.
    """
    files = dict(own)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as found:
            for name in found.namelist():
                info = name.partition("/")[0].endswith(".dist-info")
                if name.endswith(("/", *_LEFT_OUT)) or (info and "LICENSE" not in name):
                    continue
                content = found.read(name)
                if files.setdefault(name, content) != content:
                    raise ProbeError(f"{wheel.name} has another {name} than other wheels", "mend agent-lock.txt")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3
            entry.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(entry, files[name], compresslevel=9)
    return b"#!/usr/bin/env python3\n" + out.getvalue()
