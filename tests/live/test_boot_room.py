# SPDX-License-Identifier: MIT
"""The boot room on this machine: a real kernel in QEMU, its real msr driver, a register of our design in it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kernel_harness.boot import guest, kernels, register_model
from kernel_harness.boot.cache import default_cache
from kernel_harness.boot.kernels import Kernel
from kernel_harness.boot.register_model import ABSENT, ACCEPTS_ALL_DROPS_ALL, Register, arguments, parse_state
from probe.errors import GuestLost

pytestmark = pytest.mark.boot
BOOT = 240.0  # seconds that a boot may take on a slow machine without KVM
SCRIPT = Path(__file__).with_name("in_guest_register.py")
EVERY_BIT = (1 << 64) - 1


def progress(line: str) -> None:
    print(line)


@pytest.fixture(scope="session")
def cache() -> Path:
    return default_cache()


@pytest.fixture(scope="session")
def kernel(cache: Path) -> Kernel:
    return kernels.obtain(os.environ.get("PROBE_KERNEL") or kernels.default_spec(), cache, progress)


@pytest.fixture(scope="session")
def accel(cache: Path, kernel: Kernel) -> str:
    return guest.accelerator(cache, kernel)[0]


def group_is_empty(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


# (what the register is, the module's arguments, steps, their answers)
CASES: list[tuple[str, list[str], list[list[Any]], list[Any]]] = [
    (
        "a reserved bit faults and changes nothing",
        arguments(Register(valid=0x7, initial=0x1)),
        [["write", 0, 1 << 3], ["read", 0], ["write", 0, 0x7], ["read", 0], ["write", 0, 1 << 63 | 1], ["read", 0]],
        ["EIO", 0x1, "ok", 0x7, "EIO", 0x7],
    ),
    (
        "one CPU differs",
        arguments(Register(valid=0x7), {1: Register(valid=0x2)}),
        [["write", 0, 0x7], ["write", 1, 0x7], ["write", 1, 0x2], ["read", 0], ["read", 1]],
        ["ok", "EIO", "ok", 0x7, 0x2],
    ),
    ("no register", arguments(ABSENT), [["read", 0], ["write", 0, 0]], ["EIO", "EIO"]),
    (
        "a bit that stays",
        arguments(Register(sticky=0x4)),
        [["write", 0, 0x4], ["write", 0, 0x1], ["read", 0]],
        ["ok", "ok", 0x5],
    ),
    (
        "everything accepted, nothing kept",
        arguments(ACCEPTS_ALL_DROPS_ALL),
        [["write", 0, EVERY_BIT], ["read", 0]],
        ["ok", 0],
    ),
    ("a bit that is not shown", arguments(Register(unreadable=0x1)), [["write", 0, 0x7], ["read", 0]], ["ok", 0x6]),
    (
        "a kernel that rewrites",
        arguments(Register(rewrite_mask=0x1, rewrite_value=0x1)),
        [["write", 0, 0], ["read", 0], ["poke", 0, 0x4], ["read", 0]],
        ["ok", 0x1, "ok", 0x4],
    ),
    (
        "an unsteady read-back",
        arguments(noise=2, noise_mask=0x400),
        [["read", 0], ["read", 0], ["read", 0], ["read", 0], ["read", 1]],
        [0, 0x400, 0, 0x400, 0],
    ),
    (
        "a CPU that goes away and comes back",
        arguments(Register(initial=0x1)),
        [["write", 1, 0x3], ["online", 1, 0], ["read", 1], ["online", 1, 1], ["read", 1]],
        ["ok", "ok", "ENOENT", "ok", 0x1],
    ),
]


@pytest.fixture(scope="module")
def answers(cache: Path, kernel: Kernel, accel: str) -> dict[str, Any]:
    """What the guest answers to all cases, in one boot."""
    module = register_model.build(kernel, cache, progress)
    asked = json.dumps([[parameters, steps] for _, parameters, steps, _ in CASES])
    result = guest.run(
        kernel, [sys.executable, str(SCRIPT), str(module), asked], accel=accel, timeout=BOOT, cache=cache
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["release"] == kernel.release
    return {name: answer for (name, *_), answer in zip(CASES, said["answers"])}


@pytest.mark.parametrize(("name", "expected"), [(name, expected) for name, _, _, expected in CASES])
def test_register(answers: dict[str, Any], name: str, expected: list[Any]) -> None:
    assert answers[name]["results"] == expected


def test_what_the_model_saw(answers: dict[str, Any]) -> None:
    cpus, writes = parse_state(answers["a reserved bit faults and changes nothing"]["state"])
    first = cpus[0]
    assert (first.writes, first.faults, first.reads, first.cleared, first.set) == (3, 2, 3, 0, 0x7)
    assert [(write.cpu, write.value, write.result) for write in writes] == [
        (0, 0x8, -5),
        (0, 0x7, 0),
        (0, 1 << 63 | 1, -5),
    ]
    assert cpus[1].writes == 0
    cleared = parse_state(answers["a bit that stays"]["state"])[0][0]
    assert (cleared.value, cleared.cleared) == (0x5, 0)


def test_status_output_and_files(cache: Path, kernel: Kernel, accel: str, tmp_path: Path) -> None:
    kept = tmp_path / "exchange"
    kept.mkdir()
    own = tmp_path / "forgotten"
    script = 'pwd; echo "$WORD"; echo complaint >&2; echo 1 > "$1"; echo 2 > kept; modprobe msr; ls /dev/cpu; exit 7'
    result = guest.run(
        kernel,
        ["sh", "-c", script, "sh", str(own)],
        accel=accel,
        append=["msr.allow_writes=off"],
        rw_dir=kept,
        timeout=BOOT,
        env={"WORD": "a 'quoted' \"word\" $HOME"},
        cache=cache,
    )
    assert result.returncode == 7
    assert result.stdout == f"{kept}\na 'quoted' \"word\" $HOME\n0\n1\n"
    assert result.stderr == "complaint\n"
    assert (kept / "kept").read_text() == "2\n"
    assert not own.exists()
    assert 0 < result.boot_seconds < result.seconds


def test_a_guest_that_hangs_is_killed(cache: Path, kernel: Kernel, accel: str) -> None:
    with guest.start(kernel, ["sleep", "1000"], accel=accel, cache=cache) as running:
        pid = running.pid
        with pytest.raises(GuestLost, match="no answer within 2 s"):
            running.wait(timeout=2)
        assert group_is_empty(pid)


def test_a_power_cut(cache: Path, kernel: Kernel, accel: str, tmp_path: Path) -> None:
    command = ["sh", "-c", "echo begun; echo here > file; sync; sleep 1000"]
    with guest.start(kernel, command, accel=accel, rw_dir=tmp_path, cache=cache) as running:
        deadline = time.monotonic() + BOOT
        while "begun" not in running.stdout and running.running() and time.monotonic() < deadline:
            time.sleep(0.1)
        while not (tmp_path / "file").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        running.kill()
        assert not running.running()
        assert group_is_empty(running.pid)
        assert running.stdout == "begun\n"
        with pytest.raises(GuestLost, match="without an exit status"):
            running.wait(timeout=1)


def test_a_qemu_that_does_not_start(cache: Path, kernel: Kernel, accel: str) -> None:
    with pytest.raises(GuestLost, match="invalid option"):
        guest.run(kernel, ["true"], accel=accel, qemu_opts=["-no-such-option"], timeout=BOOT, cache=cache)
