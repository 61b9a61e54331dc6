# SPDX-License-Identifier: MIT
"""Exceptions that name operation, object, cause and cure; and the exit codes of the command."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from errno import errorcode


class ExitCode(IntEnum):
    """Exit codes of spec-ctrl-probe, and what --help and the manual page say of each; 4 is kselftest's for a skip."""

    meaning: str

    AS_PREDICTED = 0, "as predicted"
    FINDINGS = 1, "findings; a bit without an answer is one"
    USAGE = 2, "usage"
    FAILED = 3, "the tool failed, a file is not what it should be, or a policy did not decide"
    REQUIREMENT_MISSING = 4, "a requirement is missing, the machine refuses, or nothing could be measured"
    NOT_RESTORED = 5, "a register could not be put back, or not be shown to be back"
    INTERRUPTED = 130, "interrupted; everything is put back"

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        """Make a member of its number and its meaning."""
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code


class ProbeError(Exception):
    """Base of everything this project raises on purpose.

    message names operation, object and cause; remedy, if known, is what the reader can do, as a command where one
    exists. str() joins them on one line.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class UsageError(ProbeError):
    """The request itself makes no sense: a CPU that is not there, a range that is none."""

    exit_code = ExitCode.USAGE


class RequirementMissing(ProbeError):
    """The machine lacks something, or forbids it: no root, no device, no KVM, lockdown."""

    exit_code = ExitCode.REQUIREMENT_MISSING


class DeviceError(ProbeError):
    """A device answered with an error that its documentation does not lead one to expect."""


class KvmError(ProbeError):
    """A KVM ioctl failed in a way that is no answer."""

    def __init__(self, ioctl: str, error: OSError, remedy: str = "") -> None:
        super().__init__(f"{ioctl} failed: {error.strerror} ({errorcode.get(error.errno or 0, error.errno)})", remedy)
        self.ioctl = ioctl
        self.errno = error.errno or 0
        self._made_of = (ioctl, error, remedy)

    def __reduce__(self) -> tuple[type[KvmError], tuple[str, OSError, str]]:
        """Pickle as it was made: it has to come through from a worker process."""
        return type(self), self._made_of


class GuestLost(ProbeError):
    """A virtual machine gave no verdict: it hung, died, or never started. console holds its last lines, if any."""

    def __init__(self, message: str, remedy: str = "", console: Sequence[str] = ()) -> None:
        super().__init__(message, remedy)
        self.console = tuple(console)


class RecordError(ProbeError):
    """A record, journal or CPUID dump cannot be read or written."""


class PolicyError(ProbeError):
    """The file of a policy is not what it should be, or its code ended the process that asked it."""


class NotRestored(ProbeError):
    """A register could not be put back, or that it was put back could not be verified."""

    exit_code = ExitCode.NOT_RESTORED


class Interrupted(ProbeError):
    """SIGINT or SIGTERM came; everything that was changed has been put back."""

    exit_code = ExitCode.INTERRUPTED
