# SPDX-License-Identifier: MIT
"""The cache folder: where kernels, built modules and remembered answers lie, and how two processes share it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable

from probe.errors import ProbeError

Say = Callable[[str], None]


def default_cache() -> Path:
    """Return the cache folder: $PROBE_CACHE, or $XDG_CACHE_HOME/spec-ctrl-probe, or ~/.cache/spec-ctrl-probe.

    The folder need not exist. A relative XDG_CACHE_HOME is ignored, as the XDG Base Directory Specification 0.8 asks.
    """
    if chosen := os.environ.get("PROBE_CACHE"):
        return Path(chosen).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "spec-ctrl-probe"


@contextmanager
def run_folder(cache: Path) -> Iterator[Path]:
    """Make a folder for what goes into one guest and comes out of it, and remove it at the end.

    What runs that were killed have left is removed too; none takes a day.
    """
    runs = cache / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for old in runs.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > 86400:
                    shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=runs))
    except OSError as error:
        raise storage_error("create a folder in", runs, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def storage_error(doing: str, path: Path, error: OSError) -> ProbeError:
    """Turn an OSError in the cache folder into one line; doing is a verb phrase such as "unpack"."""
    cure = (
        "free space there, or set PROBE_CACHE to a folder elsewhere"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "set PROBE_CACHE to a folder that can be written"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        else ""
    )
    return ProbeError(f"cannot {doing} {path}: {error.strerror or error}", cure)


@contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Hold an exclusive lock on a file for the length of the block, waiting for another holder.

    path is created if absent and never removed. The lock is flock(2)'s: it goes with the process, however that ends.
    Raise ProbeError if the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error("create", path, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that uses {path.parent}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def under_construction(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes target when the block ends well, and vanishes when it does not.

    The caller holds the lock of target's parent. What a killed run left behind is removed first; target, if it exists,
    is replaced. After a power cut target is either whole or absent. Raise ProbeError if the disk is full.
    """
    prefix = f".new-{target.name}-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    except OSError as error:
        raise storage_error("create", target, error) from error
    try:
        work.chmod(0o755)
        yield work
        os.sync()
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except OSError as error:
        raise storage_error("write", target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old text or the new, never a part.

    Raise ProbeError if it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        fresh.replace(path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise storage_error("write", path, error) from error
