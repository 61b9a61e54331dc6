# SPDX-License-Identifier: MIT
"""The edge to the disk: files that are there whole or not at all, and records read with a limit."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from msgspec import UnsetType

from probe.errors import RecordError
from probe.kvm_record import KvmRecord, check_names
from probe.kvm_record import decode as decode_kvm
from probe.migration_record import KIND, MigrationRecord
from probe.migration_record import decode as decode_migration
from probe.record import Machine, Record, decode, record_kind

LARGEST_RECORD = 64 << 20


def sync_directory(path: Path) -> None:
    """Make a directory's entries survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no directories to sync
            raise
    finally:
        os.close(fd)


def read_record(path: str, stdin: BinaryIO | None = None) -> Record:
    """Read a record from a file, or from stdin if path is "-".

    Raise RecordError with the path, the cause and the cure.
    """
    raw, name = read_raw(path, stdin)
    return decode(raw, name)


def read_raw(path: str, stdin: BinaryIO | None = None) -> tuple[bytes, str]:
    """Read a file of at most LARGEST_RECORD bytes, or stdin if path is "-"; return it and what to call it."""
    name = "standard input" if path == "-" else path
    try:
        if path == "-" and stdin is not None:
            raw = stdin.read(LARGEST_RECORD + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(LARGEST_RECORD + 1)
    except IsADirectoryError as error:
        raise RecordError(
            f"cannot read {name}: Is a directory", "give the records in it, such as FOLDER/*.json"
        ) from error
    except OSError as error:
        raise RecordError(f"cannot read {name}: {error.strerror}", "give a record, such as results/*/*.json") from error
    if len(raw) > LARGEST_RECORD:
        raise RecordError(f"{name} is larger than {LARGEST_RECORD >> 20} MiB", "a record of 512 CPUs has 64 KiB")
    return raw, name


def read_any(path: Path) -> Record | KvmRecord:
    """Read a record of a run or of KVM; raise RecordError if it is none."""
    raw, name = read_raw(str(path))
    kind, _ = record_kind(raw)
    if kind not in ("", "kvm"):
        raise RecordError(f"{name} is a record of another kind: {kind[:20]!r}", "spec-ctrl-probe show prints it")
    return decode_kvm(raw, name) if kind else decode(raw, name)


def decode_any(raw: bytes, name: str, *, to_judge: bool = False) -> Record | KvmRecord | MigrationRecord:
    """Read a record of any kind; raise RecordError if it is none, or has what cannot be judged here (to_judge)."""
    kind, _ = record_kind(raw)
    if kind == "kvm":
        record = decode_kvm(raw, name)
        if to_judge:
            check_names(record, name)
        return record
    return decode_migration(raw, name) if kind == KIND else decode(raw, name)


def write_atomically(raw: bytes, path: Path, *, replace: bool) -> Path:
    """Put a file in its place whole or not at all: temporary file, fsync, rename, fsync of the folder.

    With replace False an existing file is left alone and the name gets a number (-2, -3 ...). Return the path taken.
    Raise RecordError if the disk or the folder will not have it; nothing half-written stays.
    """
    if replace and path.exists() and not path.is_file() and not path.is_dir():
        return _write_device(raw, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        taken = path
        if replace:
            Path(temporary).replace(taken)
        else:
            number = 1
            while True:
                try:
                    os.link(temporary, taken)
                    break
                except FileExistsError:
                    number += 1
                    taken = path.with_name(f"{path.stem}-{number}{path.suffix}")
        sync_directory(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
    return taken


def _write_device(raw: bytes, path: Path) -> Path:
    """Write to a device or FIFO (/dev/null, say), which must stay what it is."""
    try:
        with open(path, "wb") as file:
            file.write(raw)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def _cannot_write(path: Path, error: OSError) -> RecordError:
    return RecordError(
        f"cannot write the record to {path}: {error.strerror}", "give another place: --record PATH, or - for stdout"
    )


_PLAIN_HYPERVISORS = {
    "TCGTCGTCGTCG": "tcg",
    "KVMKVMKVM": "kvm",
    "Microsoft Hv": "hyperv",
    "VMwareVMware": "vmware",
    "XenVMMXenVMM": "xen",
    "bhyve bhyve": "bhyve",
    "ACRNACRNACRN": "acrn",
}


def default_path(record: Record) -> Path:
    """Return results/<machine>/<time>-<kernel>.json; the machine is CPU signature, microcode and hypervisor."""
    time = record.started.replace(":", "")
    return Path("results") / machine_folder(record.machine) / f"{time}-{_file_word(record.kernel.release)}.json"


def default_kvm_path(record: KvmRecord) -> Path:
    """Return results/<machine>/<time>-kvm-<kernel>.json."""
    time = record.started.replace(":", "")
    policy = "" if isinstance(record.policy, UnsetType) else f"policy-{_file_word(record.policy.name)}-"
    name = f"{time}-kvm-{policy}{_file_word(record.kernel.release)}.json"
    return Path("results") / machine_folder(record.machine) / name


def default_migration_path(record: MigrationRecord) -> Path:
    """Return results/<machine>/<time>-migration-<kernel>.json."""
    time = record.started.replace(":", "")
    name = f"{time}-migration-{_file_word(record.kernel.release)}.json"
    return Path("results") / machine_folder(record.machine) / name


def machine_folder(machine: Machine) -> str:
    """Name a machine by CPU signature, microcode and hypervisor."""
    hypervisor = "metal"
    if machine.under_hypervisor:
        hypervisor = _PLAIN_HYPERVISORS.get(machine.hypervisor, _file_word(machine.hypervisor) or "hypervisor")
    microcode = machine.microcode[0].revision if machine.microcode else "unknown"
    return f"{_file_word(machine.vendor)}-{machine.signature[2:]:0>8}-ucode-{microcode}-{hypervisor}"


def _file_word(text: str) -> str:
    return "".join(char if char.isascii() and (char.isalnum() or char in "._+-") else "-" for char in text).strip("-.")
