# SPDX-License-Identifier: MIT
"""The msr driver's edge over ordinary files: where bytes go, and what each error of the kernel becomes."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from probe.errors import DeviceError, ExitCode, RequirementMissing
from probe.msr import Failure, MsrDriver, _failure_or_raise
from tests.fakes import SPEC_CTRL
from tests.unprivileged import as_nobody, readable_folder

VALUE = 0x8877665544332211


def device(folder: Path, cpu: int = 0, raw: bytes = bytes(0x50)) -> str:
    (folder / str(cpu)).write_bytes(raw)
    return str(folder / "{cpu}")


def test_a_value_is_8_bytes_little_endian_at_the_registers_number(tmp_path: Path) -> None:
    with MsrDriver(writable=True, device=device(tmp_path)) as msr:
        assert msr.write(0, SPEC_CTRL, VALUE) is None
        raw = (tmp_path / "0").read_bytes()
        assert raw == bytes(0x48) + bytes.fromhex("1122334455667788")
        assert msr.read(0, SPEC_CTRL) == VALUE


def test_each_cpu_has_its_own_device_and_each_register_its_place(tmp_path: Path) -> None:
    template = device(tmp_path, 0)
    device(tmp_path, 3, bytes(range(256)))
    with MsrDriver(writable=False, device=template) as msr:
        assert msr.read(0, SPEC_CTRL) == 0
        assert msr.read(3, SPEC_CTRL) == int.from_bytes(bytes(range(0x48, 0x50)), "little")
        assert msr.read(3, 0x49) == int.from_bytes(bytes(range(0x49, 0x51)), "little")


@pytest.mark.parametrize("value", [0, 1, (1 << 64) - 1])
def test_the_ends_of_the_range(tmp_path: Path, value: int) -> None:
    with MsrDriver(writable=True, device=device(tmp_path)) as msr:
        msr.write(0, SPEC_CTRL, value)
        assert msr.read(0, SPEC_CTRL) == value


@pytest.mark.parametrize("value", [1 << 64, -1])
def test_what_is_no_64_bit_value_is_never_written(tmp_path: Path, value: int) -> None:
    with MsrDriver(writable=True, device=device(tmp_path)) as msr, pytest.raises(OverflowError):
        msr.write(0, SPEC_CTRL, value)
    assert (tmp_path / "0").read_bytes() == bytes(0x50)


def test_no_driver(tmp_path: Path) -> None:
    with MsrDriver(writable=True, device=str(tmp_path / "{cpu}" / "msr")) as msr:
        with pytest.raises(RequirementMissing) as caught:
            msr.read(3, SPEC_CTRL)
        assert str(caught.value) == (
            f"cannot open {tmp_path}/3/msr: No such file or directory (load the driver with: modprobe msr)"
        )
        assert caught.value.exit_code == ExitCode.REQUIREMENT_MISSING
        with pytest.raises(RequirementMissing, match="modprobe msr"):
            msr.write(3, SPEC_CTRL, 0)


def test_a_device_that_may_not_be_opened() -> None:
    with readable_folder() as folder:
        template = device(folder)
        (folder / "0").chmod(0)

        def attempt() -> str:
            with MsrDriver(writable=True, device=template) as msr:
                try:
                    msr.open(0)
                except RequirementMissing as error:
                    return str(error)
                return "opened"

        assert as_nobody(attempt) == (
            f"cannot open {folder}/0: Permission denied (needs CAP_SYS_RAWIO; run it with sudo)"
        )


def test_reading_opens_read_only(tmp_path: Path) -> None:
    with MsrDriver(writable=False, device=device(tmp_path)) as msr:
        assert msr.read(0, SPEC_CTRL) == 0
        with pytest.raises(DeviceError, match="cannot write MSR 0x48 on CPU 0: Bad file descriptor"):
            msr.write(0, SPEC_CTRL, 1)
    assert (tmp_path / "0").read_bytes() == bytes(0x50)


@pytest.mark.parametrize("size", [0, 0x48, 0x4F])
def test_a_short_read_is_no_value(tmp_path: Path, size: int) -> None:
    got = max(size - 0x48, 0)
    with (
        MsrDriver(writable=False, device=device(tmp_path, raw=bytes(size))) as msr,
        pytest.raises(DeviceError, match=f"cannot read MSR 0x48 on CPU 0: the driver gave {got} of 8 bytes"),
    ):
        msr.read(0, SPEC_CTRL)


def test_a_short_write_is_an_error(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts the write in the middle of the value, as no msr driver should."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MsrDriver(writable=True, device=device(tmp_path, raw=b"")) as msr:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0x4C, hard))
        try:
            with pytest.raises(DeviceError, match="cannot write MSR 0x48 on CPU 0: the driver took 4 of 8 bytes"):
                msr.write(0, SPEC_CTRL, VALUE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    with (
        MsrDriver(writable=False, device=str(tmp_path / "{cpu}")) as msr,
        pytest.raises(DeviceError, match="cannot read MSR 0x48 on CPU 0: Is a directory"),
    ):
        msr.read(0, SPEC_CTRL)
    with (
        MsrDriver(writable=True, device=str(tmp_path / "{cpu}")) as msr,
        pytest.raises(DeviceError, match=r"cannot open .*/0: Is a directory"),
    ):
        msr.read(0, SPEC_CTRL)


def test_a_fifo_is_no_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0")
    with (
        MsrDriver(writable=True, device=str(tmp_path / "{cpu}")) as msr,
        pytest.raises(DeviceError, match="cannot read MSR 0x48 on CPU 0: Illegal seek"),
    ):
        msr.read(0, SPEC_CTRL)


def test_a_path_through_a_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    device(tmp_path)
    with (
        MsrDriver(writable=False, device=str(tmp_path / "{cpu}" / "msr")) as msr,
        pytest.raises(DeviceError, match=r"cannot open .*/0/msr: Not a directory"),
    ):
        msr.open(0)


@pytest.mark.parametrize(
    ("number", "failure"),
    [
        (errno.EIO, Failure.FAULT),
        (errno.ENXIO, Failure.OFFLINE),
        (errno.EPERM, Failure.REFUSED),
        (errno.EACCES, Failure.REFUSED),
    ],
)
def test_what_the_driver_says_is_data(number: int, failure: Failure) -> None:
    assert _failure_or_raise(OSError(number, os.strerror(number)), "write") is failure


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM, errno.EBUSY])
def test_any_other_errno_is_an_error(number: int) -> None:
    with pytest.raises(DeviceError, match=f"cannot write MSR 0x48 on CPU 3: {os.strerror(number)}"):
        _failure_or_raise(OSError(number, os.strerror(number)), "write MSR 0x48 on CPU 3")


def test_every_descriptor_is_closed_at_the_end(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # counts, does not look
    template = device(tmp_path, 0)
    device(tmp_path, 1)
    with MsrDriver(writable=True, device=template) as msr:
        msr.open(0)
        msr.open(1)
        msr.open(1)
        assert len(os.listdir("/proc/self/fd")) == before + 2  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
