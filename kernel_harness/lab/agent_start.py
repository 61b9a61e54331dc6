# SPDX-License-Identifier: MIT
"""What the agent's file does before it is the agent: it unpacks itself, since extension modules load from disk alone.

Once, into a folder that is named by the file's SHA-256 and that nobody else can write to; without one, into a temporary
folder that goes with the process.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NoReturn

_MARK = ".complete"


def main() -> None:
    """Unpack, if that has not been done, and run the command line."""
    archive = Path(sys.argv[0]).resolve()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    try:
        folder = unpacked(archive, digest)
    except (OSError, zipfile.BadZipFile) as error:
        _stop(f"cannot unpack {archive}: {error} (give TMPDIR a folder with 20 MiB of room, or copy the file again)")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)  # for whatever starts this Python again
    try:
        import cpuid_native  # noqa: F401
        import msgspec  # noqa: F401
        import psutil  # noqa: F401
    except ImportError as error:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        _stop(f"this file has nothing for Python {version} here: {error} (it is for 3.9 to 3.13, x86-64, glibc)")
    import probe
    from probe.cli import entry

    probe.AGENT = digest
    entry()


def _stop(text: str) -> NoReturn:
    sys.stderr.write(f"spec-ctrl-probe: {text}\n")
    sys.exit(4)


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder is one that nobody else can write to."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _homes() -> list[Path]:
    """Return where to keep it, the best place first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    homes = [cache / "spec-ctrl-probe"] if cache.is_absolute() else []
    return [Path("/var/cache/spec-ctrl-probe"), *homes] if os.geteuid() == 0 else homes


def unpacked(archive: Path, digest: str) -> Path:
    """Return a folder that holds all of the archive; raise OSError if there is no room for one anywhere."""
    for home in _homes():
        target = home / f"agent-{digest[:16]}"
        work: Path | None = None
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(home):
                continue
            if not (target / _MARK).exists():
                work = Path(tempfile.mkdtemp(prefix=".agent-", dir=home))
                _unpack(archive, work)
                work.rename(target)
            if _is_ours(target):
                return target
        except OSError:  # no room, read-only, or another one was faster
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
            if (target / _MARK).exists() and _is_ours(target):
                return target
    work = Path(tempfile.mkdtemp(prefix="spec-ctrl-probe-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(work, ignore_errors=True) if os.getpid() == owner else None)
    _unpack(archive, work)
    return work


def _unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as found:
        found.extractall(folder)
    (folder / _MARK).touch()
