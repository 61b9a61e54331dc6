# SPDX-License-Identifier: MIT
"""The edge to the registers: /dev/cpu/N/msr behind a Protocol."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import resource
from collections.abc import Iterable
from enum import Enum
from typing import Protocol

from probe.errors import DeviceError, RequirementMissing

MSR_DEVICE = "/dev/cpu/{cpu}/msr"


class Failure(Enum):
    """What a register access gave instead of a value: data, not an error.

    FAULT: the instruction took #GP (EIO). OFFLINE: the CPU is not there any more (ENXIO). REFUSED: the kernel would
    not try (EPERM: lockdown or msr.allow_writes=off). UNSTEADY: no two readings in a row are the same.
    Source: linux v7.1 arch/x86/kernel/msr.c, msr_read(), msr_write(), filter_write().
    """

    FAULT = "fault"
    OFFLINE = "offline"
    REFUSED = "refused"
    UNSTEADY = "unsteady"


_FAILURES = {
    errno.EIO: Failure.FAULT,
    errno.ENXIO: Failure.OFFLINE,
    errno.EPERM: Failure.REFUSED,
    errno.EACCES: Failure.REFUSED,
}


class MsrAccess(Protocol):
    """Read and write one MSR on one logical CPU. cpu is N in /dev/cpu/N; index is the 32-bit MSR address."""

    def read(self, cpu: int, index: int) -> int | Failure:
        """Return the 64-bit value, or why there is none."""
        ...

    def write(self, cpu: int, index: int, value: int) -> Failure | None:
        """Write a 64-bit value; return None if WRMSR did not fault, else why it did not happen."""
        ...


def _failure_or_raise(error: OSError, what: str) -> Failure:
    failure = _FAILURES.get(error.errno or 0)
    if failure is None:
        raise DeviceError(f"cannot {what}: {error.strerror}") from error
    return failure


class MsrDriver:
    """The kernel's msr driver; one file descriptor per CPU, opened once.

    Source: linux v7.1 arch/x86/kernel/msr.c. device is a template with {cpu}, so that a test can give files.
    """

    def __init__(self, *, writable: bool, device: str = MSR_DEVICE) -> None:
        self._flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._device = device
        self._fds: dict[int, int] = {}
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # one descriptor per CPU: 1,024 are not enough for 1,024 CPUs
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def __enter__(self) -> MsrDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()

    def open(self, cpu: int) -> Failure | None:
        """Open one CPU's device; return Failure.OFFLINE if that CPU is not online.

        Raise RequirementMissing if the driver is not there or the caller may not use it (CAP_SYS_RAWIO).
        """
        if cpu in self._fds:
            return None
        path = self._device.format(cpu=cpu)
        try:
            self._fds[cpu] = os.open(path, self._flags)
        except OSError as error:
            if error.errno == errno.ENXIO or (error.errno == errno.ENOENT and self._has_others(path)):
                return Failure.OFFLINE  # the node of a CPU that is offline is not there
            text = f"cannot open {path}: {error.strerror}"
            if error.errno == errno.ENOENT:
                raise RequirementMissing(text, "load the driver with: modprobe msr") from error
            if error.errno in (errno.EPERM, errno.EACCES):
                cure = "this root lacks CAP_SYS_RAWIO (a container?)" if os.geteuid() == 0 else "run it with sudo"
                raise RequirementMissing(text, f"needs CAP_SYS_RAWIO; {cure}") from error
            if error.errno == errno.EIO:
                raise RequirementMissing(text, "this CPU has no MSRs") from error
            raise DeviceError(text) from error
        return None

    def _has_others(self, path: str) -> bool:
        """Tell whether the driver has nodes for other CPUs, so that only this one is missing."""
        nodes = glob.glob(self._device.format(cpu="[0-9]*"))  # noqa: PTH207 (an absolute pattern)
        return any(node != path for node in nodes)

    def claim(self, cpus: Iterable[int]) -> None:
        """Take the MSRs of these CPUs for this process and its children: flock on the device nodes.

        The lock in the state directory holds off a second probe that uses the same directory, this one any other.
        Raise RequirementMissing if another process has claimed one of them.
        """
        for cpu in cpus:
            if self.open(cpu) is not None:
                continue
            try:
                fcntl.flock(self._fds[cpu], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RequirementMissing(
                    f"another probe is at the MSRs of CPU {cpu}, with another --state-dir", "wait until it has ended"
                ) from error

    def read(self, cpu: int, index: int) -> int | Failure:
        """Read one MSR on one logical CPU.

        Return the 64-bit value, or Failure.FAULT if RDMSR took #GP (EIO), Failure.OFFLINE if the CPU has gone.
        Source: linux v7.1 arch/x86/kernel/msr.c, msr_read().
        """
        fd = self._fds.get(cpu)
        if fd is None:
            failure = self.open(cpu)
            if failure is not None:
                return failure
            fd = self._fds[cpu]
        try:
            raw = os.pread(fd, 8, index)
        except OSError as error:
            return _failure_or_raise(error, f"read MSR {index:#x} on CPU {cpu}")
        if len(raw) != 8:
            raise DeviceError(f"cannot read MSR {index:#x} on CPU {cpu}: the driver gave {len(raw)} of 8 bytes")
        return int.from_bytes(raw, "little")

    def write(self, cpu: int, index: int, value: int) -> Failure | None:
        """Write one MSR on one logical CPU; taints the kernel ('S') even if it faults.

        Return None if WRMSR went through, else the Failure.
        Source: linux v7.1 arch/x86/kernel/msr.c, msr_write(): add_taint() precedes the WRMSR.
        """
        fd = self._fds.get(cpu)
        if fd is None:
            failure = self.open(cpu)
            if failure is not None:
                return failure
            fd = self._fds[cpu]
        try:
            written = os.pwrite(fd, value.to_bytes(8, "little"), index)
        except OSError as error:
            return _failure_or_raise(error, f"write MSR {index:#x} on CPU {cpu}")
        if written != 8:
            raise DeviceError(f"cannot write MSR {index:#x} on CPU {cpu}: the driver took {written} of 8 bytes")
        return None
