# SPDX-License-Identifier: MIT
"""Events to readers that take them, take them late, hang, or are gone; through pipes, sockets and files."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from probe.stream import Events


def ends(kind: str) -> tuple[int, int]:
    """Return a descriptor to read from and one to write to."""
    if kind == "pipe":
        return os.pipe()
    one, other = socket.socketpair()
    return one.detach(), other.detach()


def everything(fd: int) -> list[dict[str, object]]:
    found = b""
    while part := os.read(fd, 65536):
        found += part
    return [json.loads(line) for line in found.splitlines()]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_reader_has_each_event_when_it_is_sent(kind: str) -> None:
    reader, writer = ends(kind)
    events = Events(writer)
    events.send("intent", step="bit 1")
    assert json.loads(os.read(reader, 4096)) == {"event": "intent", "step": "bit 1"}
    events.send("record", record="x" * 1000)
    assert events.finish()
    events.close()
    os.close(writer)
    assert everything(reader) == [{"event": "record", "record": "x" * 1000}]
    os.close(reader)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_reader_that_hangs_costs_its_patience_once(kind: str) -> None:
    reader, writer = ends(kind)
    events = Events(writer, patience=0.2, farewell=0.2)
    begin = time.monotonic()
    for number in range(20):
        events.send("intent", step="x" * 100_000, number=number)
    assert 0.15 < time.monotonic() - begin < 2
    assert not events.finish()
    events.close()
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_reader_that_is_late_has_all(kind: str) -> None:
    reader, writer = ends(kind)
    events = Events(writer, patience=0.2, farewell=0.2)
    for number in range(5):
        events.send("intent", step="x" * 100_000, number=number)
    found: list[list[dict[str, object]]] = []
    thread = threading.Thread(target=lambda: found.append(everything(reader)))
    thread.start()
    assert events.finish()
    events.close()
    os.close(writer)
    thread.join(10)
    assert [event["number"] for event in found[0]] == list(range(5))
    os.close(reader)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_reader_that_is_gone_is_forgotten(kind: str) -> None:
    reader, writer = ends(kind)
    events = Events(writer)
    os.close(reader)
    events.send("intent", step="bit 1")
    events.send("intent", step="bit 2")
    assert events.finish()
    events.close()
    os.close(writer)


def test_a_file_gets_lines_after_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with open(path, "wb", buffering=0) as file:
        file.write(b"before\n")
        events = Events(file.fileno())
        events.send("start")
        assert events.finish()
        file.write(b"after\n")
    assert path.read_bytes() == b'before\n{"event": "start"}\nafter\n'


def test_the_flags_of_others_stay_as_they_are() -> None:
    reader, writer = os.pipe()
    events = Events(writer)
    assert os.get_blocking(writer)
    events.send("start")
    events.close()
    assert os.get_blocking(writer)
    os.close(reader)
    os.close(writer)


def test_a_terminal_that_hangs_holds_up_nothing() -> None:
    controller, terminal = os.openpty()
    events = Events(terminal, patience=0.2, farewell=0.2)
    begin = time.monotonic()
    for number in range(2000):
        events.send("intent", step="x" * 100, number=number)
    assert not events.finish()
    assert time.monotonic() - begin < 3
    events.send("error", message="nothing more is said")
    events.close()
    os.close(controller)
    os.close(terminal)
