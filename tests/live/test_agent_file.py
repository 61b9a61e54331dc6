# SPDX-License-Identifier: MIT
"""The agent's file on every Python that is here, and on a real msr driver in a booted guest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernel_harness.boot import guest, kernels
from kernel_harness.boot.cache import default_cache
from kernel_harness.lab.agent_file import PYTHONS, Built, build
from probe import record as rec
from probe.journal import now

pytestmark = pytest.mark.boot


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("agent") / "spec-ctrl-probe.pyz", print)


def pythons() -> dict[str, str]:
    """Interpreters by version, from PATH and pyenv."""
    found = {}
    for version in PYTHONS:
        pyenv = sorted(
            Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
        )
        for path in (shutil.which(f"python{version}"), *map(str, pyenv)):  # what PATH has may be a stub that fails
            if path and subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0:
                found[version] = path
                break
    return found


@pytest.mark.parametrize("version", PYTHONS)
def test_it_runs_on_this_python_without_anything_installed(version: str, agent: Built, tmp_path: Path) -> None:
    python = pythons().get(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PROBE_CACHE": str(tmp_path)}
    command = [python, "-I", "-S", str(agent.path), "predict", "--json"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert time.monotonic() - started < 3, "the bench has the figure"


def test_it_is_small_and_the_same_twice(agent: Built, tmp_path: Path) -> None:
    again = build(tmp_path / "again.pyz", print)
    assert again.sha256 == agent.sha256
    assert again.path.read_bytes() == agent.path.read_bytes()
    assert agent.size < 8 << 20
    assert os.access(agent.path, os.X_OK)


def test_it_probes_a_real_msr_driver_and_streams_what_it_is_about_to_do(agent: Built, tmp_path: Path) -> None:
    cache = default_cache()
    kernel = kernels.obtain(kernels.default_spec(), cache, print)
    accelerator, _ = guest.accelerator(cache, kernel)
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(agent.path, folder / "agent.pyz")
    inside = f"{sys.executable} -I -S {folder}/agent.pyz run --in metal --write --stream --bits 0-3"
    inside += f" --record {folder}/record.json"
    inside += f" --state-dir /run/state > {folder}/events 2> {folder}/said; echo $? > {folder}/code"
    guest.run(kernel, ["sh", "-c", f"modprobe msr; {inside}"], accel=accelerator, rw_dir=folder, timeout=300)
    said = (folder / "said").read_text()
    assert (folder / "code").read_text().strip() == "1", said  # TCG ignores every write
    events = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
    assert [event["event"] for event in events[:1] + events[-1:]] == ["start", "record"]
    assert events[0]["agent"] == agent.sha256
    steps = [event["step"] for event in events if event["event"] == "intent"]
    assert [f"bit {bit}" for bit in range(4)] == [step for step in steps if step.startswith("bit ")]
    record = rec.decode((folder / "record.json").read_bytes(), "the record")
    assert record.tool.agent == agent.sha256
    assert rec.decode(json.dumps(events[-1]["record"]).encode(), "the stream") == record
    assert all(entry.state == "verified" for entry in record.restore)
    assert record.started <= now()
