# SPDX-License-Identifier: MIT
"""The agent as one file: what is in it, the same bytes twice, where it unpacks itself, what it says when it cannot."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from kernel_harness.lab import agent_file, agent_start
from probe.cli import main
from probe.errors import ProbeError, RequirementMissing

START = Path(agent_start.__file__).read_bytes()
MAIN = Path(agent_start.__file__).with_name("agent_main.py").read_bytes()


def wheel(folder: Path, name: str, **files: str) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as target:
        for file, text in files.items():
            target.writestr(file.replace("__", "/").replace("_py", ".py").replace("_so", ".so"), text)
    return path


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    one = wheel(tmp_path, "a-1-cp39.whl", a_py="x", a39_so="39")
    other = wheel(tmp_path, "a-1-cp310.whl", a310_so="310", a_py="x")
    first = agent_file.archive({"b.py": b"b", "__main__.py": b"m"}, [one, other])
    os.utime(one, (0, 0))
    assert agent_file.archive({"__main__.py": b"m", "b.py": b"b"}, [other, one]) == first
    assert first.startswith(b"#!/usr/bin/env python3\n")
    path = tmp_path / "x.pyz"
    path.write_bytes(first)
    with zipfile.ZipFile(path) as found:
        assert found.namelist() == ["__main__.py", "a.py", "a310.so", "a39.so", "b.py"]
        assert {info.date_time for info in found.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_wheels_that_contradict_each_other_are_no_agent(tmp_path: Path) -> None:
    one, other = wheel(tmp_path, "a.whl", a_py="x"), wheel(tmp_path, "b.whl", a_py="y")
    with pytest.raises(ProbeError, match=r"b\.whl has another a\.py"):
        agent_file.archive({}, [one, other])


def test_all_of_this_project_is_in_it_and_nothing_of_a_machine() -> None:
    files = agent_file.own_files()
    assert {
        "__main__.py",
        "agent_start.py",
        "probe/cli.py",
        "probe/report/page/page.css",
        "kernel_harness/kvm/uapi.py",
    } <= set(files)
    assert not [name for name in files if "__pycache__" in name or name.startswith(("tests", "results", "/"))]


def test_each_dependency_is_locked_for_every_python() -> None:
    text = agent_file.LOCK.read_text("utf-8")
    counts = {
        name: len(re.findall("--hash=sha256:[0-9a-f]{64}", rest))
        for name, rest in re.findall(r"(?m)^([a-z-]+)==\S+((?:.|\n)*?)(?=^[a-z]|\Z)", text)
    }
    assert counts == {
        "cpuid": 1,
        "cpuid-native": len(agent_file.PYTHONS),
        "msgspec": len(agent_file.PYTHONS),
        "psutil": 1,
    }


def test_without_an_index_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(RequirementMissing, match=r"dependencies for Python 3\.9"):
        agent_file.build(tmp_path / "x.pyz", lambda text: None, tmp_path / "cache")
    assert not (tmp_path / "x.pyz").exists()


def test_an_existing_file_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.pyz").write_text("mine")
    assert main(["agent-build", "-o", str(tmp_path / "x.pyz")]) == 2
    assert (tmp_path / "x.pyz").read_text() == "mine"


# --- what it does on the target --------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "agent.pyz"
    path.write_bytes(agent_file.archive({"thing.py": b"here = 1"}, []))
    return path


def unpacked(archive: Path, monkeypatch: pytest.MonkeyPatch, *homes: Path) -> Path:
    monkeypatch.setattr(agent_start, "_homes", lambda: list(homes))
    return agent_start.unpacked(archive, hashlib.sha256(archive.read_bytes()).hexdigest())


def test_it_unpacks_once(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = unpacked(archive, monkeypatch, tmp_path / "home" / "cache")
    assert (first / "thing.py").read_text() == "here = 1"
    (first / "thing.py").write_text("here = 2")
    assert unpacked(archive, monkeypatch, tmp_path / "home" / "cache") == first
    assert (first / "thing.py").read_text() == "here = 2", "not again"
    assert [path.name for path in first.parent.iterdir()] == [first.name], "no half of it is left"


def test_a_folder_that_others_can_write_to_is_not_trusted(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybodys = tmp_path / "everybodys"
    everybodys.mkdir()
    everybodys.chmod(0o777)
    assert unpacked(archive, monkeypatch, everybodys, tmp_path / "mine").parent == tmp_path / "mine"
    assert not list(everybodys.iterdir())


def test_what_a_killed_one_left_is_not_used(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without its mark is not whole: the temporary folder serves."""
    target = unpacked(archive, monkeypatch, tmp_path / "home")
    (target / ".complete").unlink()
    other = unpacked(archive, monkeypatch, tmp_path / "home")
    assert other.parent != tmp_path / "home"
    assert (other / "thing.py").exists()


def test_no_room_in_the_first_place(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert unpacked(archive, monkeypatch, tmp_path / "file" / "x", tmp_path / "y").parent == tmp_path / "y"


def test_an_old_python_is_told_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = namedtuple("version", "major minor micro releaselevel serial")
    monkeypatch.setattr(sys, "version_info", version(3, 8, 10, "final", 0))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(agent_start.__file__).with_name("agent_main.py")))
    assert ended.value.code == 4
    assert "Python 3.8 is too old (give python3.9 or newer)" in capsys.readouterr().err


def test_a_python_that_it_holds_nothing_for(tmp_path: Path) -> None:
    """Without the dependencies' modules inside: one line, and the code of a missing requirement."""
    path = tmp_path / "agent.pyz"
    path.write_bytes(agent_file.archive({"__main__.py": MAIN, "agent_start.py": START}, []))
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-I", "-S", str(path), "predict"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "this file has nothing for Python" in done.stderr


def test_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.pyz"
    whole = agent_file.archive({"__main__.py": MAIN, "agent_start.py": START}, [])
    path.write_bytes(whole[: len(whole) // 2])
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
