# SPDX-License-Identifier: MIT
"""The register model: builds the kernel module spec_ctrl_model, writes its parameters, reads what it saw."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_harness.boot import kernels
from kernel_harness.boot.cache import Say, locked, under_construction
from kernel_harness.boot.kernels import Kernel
from probe.errors import ProbeError, RecordError, RequirementMissing, UsageError
from probe.masks import ALL_BITS

STATE = "/proc/spec_ctrl_model"
SOURCE = Path(__file__).resolve().parents[1] / "spec_ctrl_model"
_SOURCES = ("spec_ctrl_model.c", "Makefile")
_CPUS = 64  # spec_ctrl_model.c MODEL_CPUS


@dataclass(frozen=True)
class Register:
    """What one CPU's modelled MSR 0x48 does; masks and values are 64 bits wide.

    valid: bits that may be set, a write of any other faults. dropped: may be written but stay 0. sticky: stay 1 once
    they are. unreadable: keep their value but read 0. initial: value after boot, and after the CPU came online.
    rewrite_mask, rewrite_value: bits that "the kernel" sets anew after each write. absent: reads and writes fault.
    """

    valid: int = 0x7
    initial: int = 0
    dropped: int = 0
    sticky: int = 0
    unreadable: int = 0
    rewrite_mask: int = 0
    rewrite_value: int = 0
    absent: bool = False


ACCEPTS_ALL_DROPS_ALL = Register(valid=ALL_BITS, dropped=ALL_BITS)  # QEMU TCG, some hypervisors
ABSENT = Register(absent=True)


@dataclass(frozen=True)
class Write:
    """One write that the model saw: its number, the CPU, the process, the value, and 0 or -EIO."""

    sequence: int
    cpu: int
    pid: int
    value: int
    result: int


@dataclass(frozen=True)
class CpuState:
    """One CPU's register as the model has it, and what was done to it.

    writes and reads count attempts, faults the writes among them that faulted. cleared holds the bits of initial that
    were ever 0 after a write, set those that were ever 1.
    """

    cpu: int
    online: bool
    value: int
    initial: int
    reads: int
    writes: int
    faults: int
    cleared: int
    set: int


def arguments(
    register: Register | None = None,
    per_cpu: Mapping[int, Register] | None = None,
    *,
    noise: int = 0,
    noise_mask: int = 0x1,
    delay_us: int = 0,
) -> list[str]:
    """Return the arguments that follow `insmod spec_ctrl_model.ko`.

    register is every CPU's, per_cpu gives single CPUs (0 to 62) another. noise: every Nth read of a CPU shows
    noise_mask toggled (0: never). delay_us: microseconds that each access takes.
    Raise UsageError for a CPU or a mask that the module cannot take.
    """
    common = register or Register()
    others = dict(per_cpu or {})
    if any(not 0 <= cpu < _CPUS - 1 for cpu in others):
        raise UsageError(f"cannot model CPUs {sorted(others)}: only 0 to {_CPUS - 2} can have a register of their own")
    # The last element holds for all further CPUs, so the list ends with the common register.
    registers = [others.get(cpu, common) for cpu in range(max(others) + 1)] if others else []
    registers.append(common)
    if any(not 0 <= value <= ALL_BITS for each in registers for value in _masks(each).values()):
        raise UsageError(f"cannot model {registers}: a mask is wider than 64 bits")
    result = []
    for name, default in _masks(Register()).items():
        values = [_masks(each)[name] for each in registers]
        if any(value != default for value in values):
            result.append(f"{name}={','.join(f'{value:#x}' for value in values)}")
    if any(each.absent for each in registers):
        result.append(f"absent={','.join('1' if each.absent else '0' for each in registers)}")
    if noise:
        result += [f"noise={noise}", f"noise_mask={noise_mask:#x}"]
    if delay_us:
        result.append(f"delay_us={delay_us}")
    return result


def _masks(register: Register) -> dict[str, int]:
    return {
        "valid": register.valid,
        "initial": register.initial,
        "dropped": register.dropped,
        "sticky": register.sticky,
        "unreadable": register.unreadable,
        "rewrite_mask": register.rewrite_mask,
        "rewrite_value": register.rewrite_value,
    }


def parse_state(text: str) -> tuple[list[CpuState], list[Write]]:
    """Parse the text of /proc/spec_ctrl_model: one CpuState per possible CPU, and the last 4096 writes in order.

    Raise RecordError if a line is not as the module prints it.
    """
    cpus, writes = [], []
    for line in text.splitlines():
        words = line.split()
        try:
            if words[0] == "cpu":
                number = {name: int(value, 0) for name, value in zip(words[::2], words[1::2])}
                online = bool(number.pop("online"))
                cpus.append(CpuState(online=online, **number))
            elif words[0] == "write":
                number = {name: int(value, 0) for name, value in zip(words[2::2], words[3::2])}
                writes.append(Write(int(words[1]), **number))
            else:
                raise ValueError(words[0])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise RecordError(f"cannot read a line of {STATE}: {line!r}") from error
    return cpus, writes


def build(kernel: Kernel, cache: Path, say: Say) -> Path:
    """Build spec_ctrl_model.ko for a kernel and return its path; what was built before is used again.

    The cache keeps it by kernel release and version and by the hash of its source. Needs make and gcc, not necessarily
    the gcc that the kernel was built with. Raise RequirementMissing if something is absent, ProbeError with the first
    error line if the build fails.
    """
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((SOURCE / name).read_bytes())
    version = re.sub(r"[^A-Za-z0-9.+~-]+", "_", kernel.version)
    folder = cache / "modules" / f"{kernel.release}_{version}_{digest.hexdigest()[:16]}"
    module = folder / "spec_ctrl_model.ko"
    if module.exists():
        return module
    tree = kernels.headers(kernel, cache, say)
    for program, package in (("make", "make"), ("gcc", "gcc")):
        if shutil.which(program) is None:
            raise RequirementMissing(f"cannot build spec_ctrl_model: no {program}", f"apt-get install {package}")
    with locked(cache / "modules" / "lock", say):
        if module.exists():
            return module
        say(f"building spec_ctrl_model for {kernel.release}")
        with under_construction(folder) as work:
            for name in _SOURCES:
                shutil.copyfile(SOURCE / name, work / name)
            _make(tree, work, kernel)
    return module


def _make(tree: Path, work: Path, kernel: Kernel) -> None:
    command: Sequence[str] = [
        "make",
        "-C",
        str(tree),
        f"M={work}",
        "CC=gcc",  # Debian's tree names the compiler of its own release
        "CONFIG_DEBUG_INFO_BTF_MODULES=",  # nobody reads the module's types, and pahole is not everywhere
        *_missing_flags(tree),
        "modules",
    ]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        # make must not inherit the flags and job server of a make that runs us
        env={name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")},
    )
    if result.returncode != 0 or not (work / "spec_ctrl_model.ko").exists():
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error:" in line] + [line for line in lines if not line.startswith("make")]
        reason = (errors or lines or ["no reason given"])[0]
        raise ProbeError(f"cannot build spec_ctrl_model for {kernel.release}: {reason}", f"make -C {tree} M={SOURCE}")


def _missing_flags(tree: Path) -> list[str]:
    """Return make arguments that drop what the kernel's compiler knew and ours does not.

    None of these flags changes the module's interface to the kernel.
    Source: linux v6.12 Makefile, CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT (gcc 14).
    """
    try:
        config = (tree / ".config").read_text(encoding="utf-8")
    except OSError:
        return []
    if "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT=y" not in config:
        return []
    probe = subprocess.run(
        ["gcc", "-fmin-function-alignment=16", "-E", "-x", "c", "/dev/null", "-o", "/dev/null"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return [] if probe.returncode == 0 else ["CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="]
