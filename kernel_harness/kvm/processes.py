# SPDX-License-Identifier: MIT
"""Processes of our own for what users' policies may do to the one they run in: end it, crash it, write to its stdout.

A process that ends without an answer is noticed, whatever its exit code; none is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Generic, NoReturn, TypeVar

from probe.errors import ProbeError

_Task = TypeVar("_Task")
_Done = TypeVar("_Done")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 10.0  # that a process has to end in once it was interrupted


class Interruption(KeyboardInterrupt):
    """A signal's own KeyboardInterrupt: a policy may raise one of the plain kind."""


class ProcessLost(ProbeError):
    """A process ended before it had answered."""


def by_user(error: KeyboardInterrupt) -> bool:
    """Tell whether Ctrl-C raised this, and not a policy."""
    return isinstance(error, Interruption) or signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    for each in _SIGNALS:  # the terminal sends Ctrl-C to all of us, and our parent hands its own on
        signal.signal(each, signal.SIG_IGN)
    raise Interruption(*([] if number == signal.SIGINT else [signal.Signals(number).name]))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _how(status: int) -> str:
    """Say how a process ended, by what waitpid() tells."""
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.WEXITSTATUS(status)}"


def _sendable(result: object) -> object:
    """Return a result, or what stands for an exception that cannot be sent."""
    try:
        pickle.loads(pickle.dumps(result))
    except Exception:
        return ProbeError(f"internal error: {result!r}")
    return result


# --- one process for all of a command --------------------------------------------------------------------------------


def apart(work: Callable[[], _Done]) -> _Done:
    """Do work in a process of its own, whose stdout is ours, while policies that write to file 1 write to stderr.

    Return or raise what work does; raise ProcessLost if the process ends before. A signal that interrupts us is handed
    on; who does not heed it within _GRACE_SECONDS is killed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parent = os.getpid()
    mine, theirs = multiprocessing.Pipe(duplex=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    child = os.fork()
    if not child:
        _work_apart(work, theirs, parent, before)
    theirs.close()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        result = mine.recv()
        _, status = os.waitpid(child, 0)
    except EOFError:
        _, status = os.waitpid(child, 0)
        raise ProcessLost(_how(status)) from None
    except BaseException:
        _end(child)
        raise
    finally:
        mine.close()
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def _work_apart(work: Callable[[], object], pipe: Connection, parent: int, before: Iterable[int]) -> NoReturn:
    result: object
    try:
        _die_with(parent)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with _output_of_our_own():
            result = work()
    except BaseException as error:
        result = error
    with contextlib.suppress(BaseException):
        pipe.send(_sendable(result))
    os._exit(0)


@contextlib.contextmanager
def _output_of_our_own() -> Iterator[None]:
    """Keep stdout for ourselves: whoever else writes to file 1, writes to stderr."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # it is in memory: nothing that file 1 gets comes into it
        yield
        return
    with os.fdopen(os.dup(number), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as sys.stdout:
        os.dup2(2, 1)
        yield


def _end(child: int) -> None:
    """Interrupt a process, and kill it if that does not end it; if we are interrupted meanwhile, it dies with us."""
    limit = time.monotonic() + _GRACE_SECONDS
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGTERM)
        while time.monotonic() < limit:
            if os.waitpid(child, os.WNOHANG)[0]:
                return
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- many for many tasks ---------------------------------------------------------------------------------------------

# What a worker begins with, inside itself, and what it then does with each task.
Begin = Callable[[], contextlib.AbstractContextManager[Callable[[_Task], _Done]]]


class _Worker(Generic[_Task, _Done]):
    """A process that does one task after another."""

    def __init__(self, begin: Begin[_Task, _Done]) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        parent = os.getpid()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(begin, theirs, parent), daemon=True)
        self._process.start()
        theirs.close()
        self.number = -1  # of the task that it is about

    def give(self, number: int, task: _Task) -> None:
        self.number = number
        with contextlib.suppress(BrokenPipeError):  # it has ended: answer() tells
            self.pipe.send(task)

    def answer(self, about: Callable[[int], str]) -> _Done:
        """Return what came of its task; raise what it raised, or ProcessLost."""
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise ProcessLost(f"{how}, {about(self.number)}") from None
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[no-any-return]

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(begin: Begin[_Task, _Done], pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _die_with(parent)
    os.dup2(2, 1)
    try:
        with begin() as do:
            while True:
                pipe.send(_sendable(do(pipe.recv())))
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(_sendable(error))


def in_order(
    tasks: Sequence[_Task], jobs: int, begin: Begin[_Task, _Done], about: Callable[[int], str]
) -> Iterator[_Done]:
    """Do tasks in that many processes, and yield what came of them in their order.

    Raise what a task raises, and ProcessLost if a process ends in one; about says, by its number, what a task is about.
    """
    workers = [_Worker(begin) for _ in range(min(jobs, len(tasks)))]
    busy = {worker.pipe: worker for worker in workers}
    done: dict[int, _Done] = {}
    given = len(workers)
    try:
        for number, worker in enumerate(workers):
            worker.give(number, tasks[number])
        for number in range(len(tasks)):
            while number not in done:
                for pipe in wait(list(busy)):
                    worker = busy[pipe]  # type: ignore[index]
                    done[worker.number] = worker.answer(about)
                    if given < len(tasks):
                        worker.give(given, tasks[given])
                        given += 1
                    else:
                        del busy[worker.pipe]
            yield done.pop(number)
    finally:
        for worker in workers:
            worker.end()
