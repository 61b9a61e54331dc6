# SPDX-License-Identifier: MIT
"""Events as lines of JSON to a reader that may hang, or be gone: a run that writes MSRs must not wait for it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import time


class Events:
    """One line an event, at once: whoever reads it may lose the machine at the next.

    A reader that takes nothing for patience seconds is not waited for any more, but at the end (finish), when nothing
    is at stake: farewell seconds; one that is gone is forgotten. Source of the case: an ssh session whose link was cut
    takes no byte until TCP gives up, which is a quarter of an hour (tcp(7), tcp_retries2).
    """

    def __init__(self, fd: int, patience: float = 5.0, farewell: float = 120.0) -> None:
        self._patience, self._farewell = patience, farewell
        self._pending = bytearray()
        self._late = self._gone = False
        self._fd = fd
        self._socket: socket.socket | None = None
        self._wait = True  # a file takes all there is
        mode = os.fstat(fd).st_mode
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(mode) or os.isatty(fd):  # its own file description: other writers' flags stay as they are
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._wait = False
            elif stat.S_ISSOCK(mode):
                self._socket = socket.socket(fileno=os.dup(fd))
                self._wait = False

    def send(self, event: str, **what: object) -> None:
        """Hand over one event."""
        if not self._gone:
            self._pending += json.dumps({"event": event, **what}).encode() + b"\n"
            self._late = not self._flush(0 if self._late else self._patience)

    def finish(self) -> bool:
        """Hand over what is left; return False if the reader hangs: then nothing more is said to it."""
        done = self._flush(self._farewell)
        self._gone = self._gone or not done
        return done

    def close(self) -> None:
        """Close this object's own descriptors; the one that was given stays open."""
        if self._socket is not None:
            self._socket.close()
        elif not self._wait:
            os.close(self._fd)

    def _flush(self, patience: float) -> bool:
        """Write what is pending; give up when nothing was taken for so many seconds."""
        end = time.monotonic() + patience
        while self._pending:
            try:
                taken = self._write()
            except BlockingIOError:
                rest = end - time.monotonic()
                if rest <= 0:
                    return False
                waiting = select.poll()  # poll, not select: a descriptor may be beyond 1,023
                waiting.register(self._fd, select.POLLOUT)
                waiting.poll(rest * 1000)
                continue
            except OSError:
                self._gone = True
                self._pending.clear()
                return True
            del self._pending[:taken]
            end = time.monotonic() + patience
        return True

    def _write(self) -> int:
        if self._socket is not None:
            return self._socket.send(self._pending, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.write(self._fd, self._pending)
