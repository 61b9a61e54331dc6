# SPDX-License-Identifier: MIT
"""The edge to the scheduler: be on one CPU, undisturbed, between a write and its read-back."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any


class CpuPin:
    """Moves this process from CPU to CPU and home again at the end.

    On the CPU that it probes, the msr driver needs no interrupt to another CPU, that CPU does not go idle, and no
    other task's SSBD or STIBP is switched in between write and read-back
    (linux v7.1 arch/x86/kernel/process.c, __speculation_ctrl_update()).
    """

    def __init__(self) -> None:
        self._home = os.sched_getaffinity(0)

    def __enter__(self) -> CpuPin:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the CPUs of before may all have gone offline
            os.sched_setaffinity(0, self._home)

    def __call__(self, cpu: int) -> bool:
        """Move to a CPU; return False if it is offline or the cpuset of this process does not contain it."""
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError:
            return False
        return True


class Realtime:
    """SCHED_FIFO at the lowest priority while the block runs; granted is False where the kernel does not allow it."""

    granted = False

    def __enter__(self) -> Realtime:
        self._policy = os.sched_getscheduler(0)
        self._param = os.sched_getparam(0)
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            self.granted = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.granted:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, self._policy, self._param)


class StopRequest:
    """SIGINT, SIGTERM and SIGHUP become a wish that the walk asks for between two writes.

    A signal that was ignored when the process started (nohup) stays ignored. Signals of the terminal that would stop
    the process where it stands, with a register changed, are ignored as long as the block runs.
    """

    reason = ""

    def __enter__(self) -> StopRequest:
        self._before: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        for number in (signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN):
            self._before[number] = signal.signal(number, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def __call__(self) -> str:
        """Return the name of the signal that came, or ""."""
        return self.reason
