# SPDX-License-Identifier: MIT
"""The edge to CPUID: the instruction on a pinned CPU, and /dev/cpu/N/cpuid, behind the Protocol CpuidSource."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Protocol

from probe.cpuid.enumeration import EXTENDED, CpuidSource, LeafOutOfReach, Reading, read_cpu, read_snapshot
from probe.cpuid.snapshot import Registers
from probe.errors import DeviceError, RequirementMissing

__all__ = [
    "CPUID_DEVICE",
    "Affinity",
    "CpuOffline",
    "CpuidDevice",
    "CpuidInstruction",
    "CpuidSource",
    "LeafOutOfReach",
    "Reading",
    "read_cpu",
    "read_snapshot",
]

CPUID_DEVICE = "/dev/cpu/{cpu}/cpuid"

_REGISTERS = struct.Struct("<4I")


class CpuOffline(RequirementMissing):
    """That logical CPU is not online, or not any more."""


# --- the driver ----------------------------------------------------------------------------------------------------


class CpuidDevice:
    """The kernel's cpuid driver, which executes CPUID in the kernel on the CPU asked for; one descriptor per CPU.

    device is a template with {cpu}, so that a test can give ordinary files.
    Source: linux v7.1 arch/x86/kernel/cpuid.c: position = leaf | subleaf << 32, 16 bytes EAX EBX ECX EDX.
    """

    name = "/dev/cpu/N/cpuid"

    def __init__(self, device: str = CPUID_DEVICE) -> None:
        self._device = device
        self._fds: dict[int, int] = {}

    def __enter__(self) -> CpuidDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()

    def cpuid(self, cpu: int, leaf: int, subleaf: int) -> Registers:
        """Execute CPUID on one logical CPU with EAX = leaf and ECX = subleaf; cpu is N in /dev/cpu/N.

        Raise RequirementMissing if the driver is not loaded or may not be used, CpuOffline if the CPU is not online,
        DeviceError for any other error or a short read.
        Source: linux v7.1 arch/x86/kernel/cpuid.c, cpuid_open() (ENXIO, EIO), cpuid_read() (ENXIO).
        """
        fd = self._fds.get(cpu)
        if fd is None:
            fd = self._fds[cpu] = self._open(cpu)
        try:
            raw = os.pread(fd, _REGISTERS.size, leaf | subleaf << 32)
        except OSError as error:
            text = f"cannot read CPUID {leaf:08x}.{subleaf:x} from {self._path(cpu)}: {error.strerror}"
            if error.errno == errno.ENXIO:
                os.close(self._fds.pop(cpu))
                raise CpuOffline(text, f"CPU {cpu} has gone offline") from error
            raise DeviceError(text) from error
        if len(raw) != _REGISTERS.size:
            raise DeviceError(
                f"cannot read CPUID {leaf:08x}.{subleaf:x} from {self._path(cpu)}: "
                f"the driver gave {len(raw)} of {_REGISTERS.size} bytes"
            )
        return Registers(*_REGISTERS.unpack(raw))

    def _path(self, cpu: int | str) -> str:
        return self._device.format(cpu=cpu)

    def _is_loaded(self) -> bool:
        """Tell whether any CPU has its device; the driver makes one for each CPU that is online."""
        folder = Path(self._device.partition("{cpu}")[0] + "N").parent
        return any(folder.glob(str(Path(self._path("*")).relative_to(folder))))

    def _open(self, cpu: int) -> int:
        try:
            return os.open(self._path(cpu), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EMFILE and self._fds:  # RLIMIT_NOFILE is often 1024: fewer than there are CPUs
                self.close()
                return self._open(cpu)
            text = f"cannot open {self._path(cpu)}: {error.strerror}"
            if error.errno == errno.ENOENT:
                if self._is_loaded():
                    raise CpuOffline(text, f"CPU {cpu} is offline or does not exist") from error
                raise RequirementMissing(text, "load the driver with: modprobe cpuid") from error
            if error.errno in (errno.EACCES, errno.EPERM):
                raise RequirementMissing(
                    text, "needs root: run it with sudo, outside a container that hides devices"
                ) from error
            if error.errno == errno.ENXIO:
                raise CpuOffline(text, f"CPU {cpu} is offline, or the cpuid driver is not loaded") from error
            if error.errno == errno.EIO:
                raise RequirementMissing(text, "this CPU has no CPUID instruction") from error
            raise DeviceError(text) from error


# --- the instruction -----------------------------------------------------------------------------------------------


class Affinity(Protocol):
    """On which CPUs the calling thread may run."""

    def get(self) -> set[int]:
        """Return those CPUs."""
        ...

    def set(self, cpus: set[int]) -> None:
        """Allow these CPUs only and be on one of them; raise OSError if the kernel does not let us."""
        ...


class _ThreadAffinity:
    def get(self) -> set[int]:
        return os.sched_getaffinity(0)

    def set(self, cpus: set[int]) -> None:
        os.sched_setaffinity(0, cpus)


def _native() -> Callable[[int, int], tuple[int, int, int, int, int]]:
    # cpuid_native is the extension below the package cpuid. cpuid.cpuid_count() drops its first result, which is 0
    # when the instruction was not executed; the four others are then whatever was on the stack (version 0.1.1).
    try:
        from cpuid_native import get_cpuid_count
    except ImportError as error:
        raise RequirementMissing(
            f"cannot execute CPUID: {error}", "install the package cpuid: pip install cpuid"
        ) from error
    return get_cpuid_count  # type: ignore[no-any-return]


class CpuidInstruction:
    """The CPUID instruction, executed in user mode by the package cpuid on the CPU that the thread is pinned to.

    The package asks CPUID first for the highest leaf of the basic or the extended range, as GCC's __get_cpuid_count()
    does, and executes no leaf beyond: hypervisor and Centaur leaves are out of its reach.
    affinity and execute are the edges; a test gives its own. execute(leaf, subleaf) returns done, EAX, EBX, ECX, EDX.
    """

    name = "instruction"

    def __init__(
        self,
        affinity: Affinity | None = None,
        execute: Callable[[int, int], tuple[int, int, int, int, int]] | None = None,
    ) -> None:
        self._affinity: Affinity = affinity or _ThreadAffinity()
        self._execute = execute
        self._cpu: int | None = None

    @contextlib.contextmanager
    def on(self, cpu: int) -> Iterator[None]:
        """Keep the calling thread on one logical CPU while the block runs; put its affinity back at the end.

        Raise RequirementMissing if the kernel refuses: the CPU is offline, or outside the cpuset of this process.
        """
        before, home = self._cpu, self._affinity.get()
        try:
            self._affinity.set({cpu})
        except (OSError, ValueError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise RequirementMissing(
                f"cannot move to CPU {cpu}: {why}",
                "it is offline, or outside the cpuset (cgroup) or taskset of this process",
            ) from error
        self._cpu = cpu
        try:
            yield
        finally:
            self._cpu = before
            with contextlib.suppress(OSError):  # the CPUs of before may all have gone offline
                self._affinity.set(home)

    def cpuid(self, cpu: int, leaf: int, subleaf: int) -> Registers:
        """Execute CPUID on one logical CPU with EAX = leaf and ECX = subleaf.

        Outside on(), the thread is moved to the CPU and back for this one execution.
        Raise LeafOutOfReach for a leaf that the package does not execute, CpuOffline if the CPU went offline and the
        kernel moved the thread away, RequirementMissing if the package is not installed or the CPU is not allowed.
        """
        if self._cpu != cpu:
            with self.on(cpu):
                return self.cpuid(cpu, leaf, subleaf)
        if self._execute is None:
            self._execute = _native()
        done, *registers = self._execute(leaf, subleaf)
        # A CPU that goes offline takes the affinity of the threads pinned to it with it:
        # linux v7.1 kernel/sched/core.c, select_fallback_rq().
        if self._affinity.get() != {cpu}:
            raise CpuOffline(f"cannot stay on CPU {cpu}: the kernel moved this thread", f"CPU {cpu} has gone offline")
        if not done:
            raise LeafOutOfReach(
                f"the package cpuid executes no leaf {leaf:08x}: it is beyond what leaf {leaf & EXTENDED:08x} declares"
            )
        return Registers(*registers)
