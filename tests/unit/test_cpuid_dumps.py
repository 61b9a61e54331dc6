# SPDX-License-Identifier: MIT
from __future__ import annotations

import io
import os
import shutil
import subprocess
import time
import tracemalloc
from pathlib import Path

import pytest

from probe.cpuid import dumps
from probe.cpuid.dumps import Dump, format_raw, parse_dump, read_dump
from probe.cpuid.enumeration import read_snapshot
from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.errors import RecordError
from tests.fakes_cpuid import FakeCpuid, leaf0, registers, snapshot

DATA = Path(__file__).parents[1] / "data" / "cpuid"


def example(apic: int) -> Snapshot:
    """The example CPU of tests/data/cpuid, typed a second time."""
    leaves = {(leaf, 0): (0, 0, 0, 0) for leaf in (2, 3, 5, 6, *range(0x80000004, 0x80000008))}
    return snapshot(
        {
            **leaves,
            (0, 0): (0x7, 0x756E6547, 0x6C65746E, 0x49656E69),
            (1, 0): (0x306C3, apic << 24 | 0x100800, 0x7FFAFBFF, 0xBFEBFBFF),
            (4, 0): (0x1C004121, 0x01C0003F, 0x3F, 0),
            (4, 1): (0x1C004122, 0x01C0003F, 0x3F, 0),
            (4, 2): (0x1C004143, 0x01C0003F, 0x1FF, 0),
            (7, 0): (0, 0x27AB, 0, 0x9C000000),
            (0x80000000, 0): (0x80000008, 0, 0, 0),
            (0x80000001, 0): (0, 0, 0x21, 0x2C100800),
            (0x80000002, 0): (0x6D617845, 0x20656C70, 0x20555043, 0x7420666F),
            (0x80000003, 0): (0x74206568, 0x73747365, 0, 0),
            (0x80000008, 0): (0x3027, 0, 0, 0),
        }
    )


def text_of(name: str) -> str:
    return (DATA / name).read_text()


# --- the forms ---

FORMS = {
    "cpuid-r.txt": (dumps.RAW, [0, 1]),
    "cpuid-1-r.txt": (dumps.RAW, [0]),
    "instlatx64-logical-cpu.txt": (dumps.LOGICAL_CPU, [0, 1]),
    "instlatx64-cpuid-registers.txt": (dumps.CPUID_REGISTERS, [0, 1]),
    "instlatx64-bare.txt": (dumps.BARE, [0, 1]),
    "instlatx64-cpu-in-brackets.txt": (dumps.CPU_IN_BRACKETS, [1, 2]),
    "instlatx64-affmask.txt": (dumps.AFFINITY_MASK, [0, 1]),
    "instlatx64-tab-separated.txt": (dumps.NO_COLON, [0]),
}


def check_example(dump: Dump, name: str) -> None:
    form, numbers = FORMS[name]
    assert dump.form == form
    assert list(dump.cpus) == numbers
    for apic, cpu in enumerate(numbers):
        leaves = dict(dump.cpus[cpu].leaves)
        assert leaves.pop(Leaf(0x8FFFFFFF, 0), None) == (
            Registers(0, 0, 0, 0) if name == "instlatx64-logical-cpu.txt" else None
        )
        assert leaves == example(apic).leaves


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str) -> None:
    check_example(read_dump(str(DATA / name)), name)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "change", ["crlf", "mac", "bom", "utf-16", "latin-1", "trailing blanks", "no last line end", "ctrl-z"]
)
def test_form_from_other_systems(name: str, change: str, tmp_path: Path) -> None:
    text = text_of(name)
    raw = {
        "crlf": text.replace("\n", "\r\n").encode(),
        "mac": text.replace("\n", "\r").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "utf-16": b"\xff\xfe" + text.encode("utf-16-le"),
        "latin-1": text.replace("Example CPU of", "Example CPU \xae of").encode("latin-1"),
        "trailing blanks": text.replace("\n", " \n").encode(),
        "no last line end": text.rstrip("\n").encode(),
        "ctrl-z": text.encode() + b"\x1a",
    }[change]
    (tmp_path / "dump").write_bytes(raw)
    check_example(read_dump(str(tmp_path / "dump")), name)


@pytest.mark.parametrize("name", [path.name for path in DATA.glob("*.txt")])
def test_every_example_is_read(name: str) -> None:
    assert read_dump(str(DATA / name)).cpus


def test_threadripper_3970x() -> None:
    dump = read_dump(str(DATA / "threadripper-3970x.cpuid-r.txt"))
    assert list(dump.cpus) == [0, 1]
    for cpu in dump.cpus.values():
        assert (cpu.vendor, cpu.family, cpu.model, cpu.stepping) == ("AMD", 0x17, 0x31, 0)
        assert cpu.brand == "AMD Ryzen Threadripper 3970X 32-Core Processor"
        assert cpu.register(0x80000008, 0, "ebx") == 0x018CB757
        assert cpu.register(7, 0, "edx") == 0
        assert not cpu.under_hypervisor


def test_sapphire_rapids() -> None:
    dump = read_dump(str(DATA / "sapphire-rapids.instlatx64.txt"))
    assert list(dump.cpus) == [0, 1]
    for cpu in dump.cpus.values():
        assert (cpu.vendor, cpu.signature) == ("Intel", 0x806F8)
        assert cpu.registers(7, 0) == (2, 0xF3BFBFFB, 0xBB417FEE, 0xFFDD4430)
        assert cpu.registers(7, 2) == (0, 0, 0, 0x17)
        assert cpu.registers(0xD, 0x12) == (0x2000, 0xB00, 6, 0)
        assert not cpu.under_hypervisor


def test_subleaf_numbers_are_hexadecimal() -> None:
    line = "CPUID 0000000D: 00000080-00000340-00000000-00000000 [SL 3E] [LWP]\n"
    text = text_of("instlatx64-affmask.txt").replace("\nCPU#001", line + "\nCPU#001")
    assert parse_dump(text, "x").cpus[0].registers(0xD, 0x3E) == (0x80, 0x340, 0, 0)


def test_standard_input() -> None:
    check_example(read_dump("-", io.BytesIO((DATA / "cpuid-r.txt").read_bytes())), "cpuid-r.txt")


# --- writing ---


def test_what_was_written_is_what_the_tool_writes() -> None:
    for name in ("cpuid-r.txt", "threadripper-3970x.cpuid-r.txt"):
        assert format_raw(parse_dump(text_of(name), name).cpus) == text_of(name)


def live(vendor: str = "GenuineIntel") -> Snapshot:
    """A snapshot as read_snapshot() makes them, with every kind of range and subleaf."""
    return read_snapshot(
        FakeCpuid(
            {
                (0, 0): leaf0(0x20, vendor),
                (1, 0): (0x607B1, 0, 1 << 31, 0),
                (4, 0): (0x121, 1, 2, 3),
                (7, 0): (2, 0, 0, 0xFFFFFFFF),
                (7, 2): (0, 0, 0, 0x17),
                (0xD, 0): (0x600E7, 0, 0, 1 << 30),
                (0x40000000, 0): (0x40000001, *registers("Microsoft Hv")),
                (0x40000100, 0): (0x40000101, *registers("KVMKVMKVM")),
                (0x80000000, 0): (0x80000021, 0, 0, 0),
                (0xC0000000, 0): (0xC0000004, 0, 0, 0),
            }
        ),
        0,
    )


@pytest.mark.parametrize("vendor", ["GenuineIntel", "CentaurHauls"])
def test_round_trip(vendor: str) -> None:
    cpus = {0: live(vendor), 7: example(7), 1023: live(vendor)}
    dump = parse_dump(format_raw(cpus), "ours")
    assert dump.form == dumps.RAW
    assert {cpu: dict(found.leaves) for cpu, found in dump.cpus.items()} == {
        cpu: dict(found.leaves) for cpu, found in cpus.items()
    }


def cpuid_tool() -> str:
    tool = shutil.which("cpuid")
    if tool is None:
        pytest.skip("the program cpuid is not installed (package cpuid of the distribution)")
    return tool


def run_tool(*arguments: str, text: str = "") -> str:
    done = subprocess.run([cpuid_tool(), *arguments], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_real_tool_reads_what_we_write() -> None:
    text = format_raw({0: live(), 3: example(3)})
    assert run_tool("-r", "-f", "-", text=text) == text


def test_the_real_tool_understands_what_we_write() -> None:
    text = format_raw(read_dump(str(DATA / "threadripper-3970x.cpuid-r.txt")).cpus)
    assert "Threadripper" in run_tool("-f", "-", text=text)


@pytest.mark.parametrize("arguments", [("-r",), ("-1", "-r")])
def test_what_the_real_tool_writes_here(arguments: tuple[str, ...]) -> None:
    text = run_tool(*arguments)
    dump = parse_dump(text, "cpuid")
    assert dump.form == dumps.RAW
    assert format_raw(dump.cpus).replace("CPU 0:", "CPU:" if "-1" in arguments else "CPU 0:") == text


# --- what is refused ---


def refusal(text: str, name: str = "dump.txt") -> str:
    with pytest.raises(RecordError) as caught:
        parse_dump(text, name)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{name}: ")
    return message[len(name) + 2 :]


@pytest.mark.parametrize("text", ["", "\n", "  \r\n\t\n", "\ufeff", "\x1a"])
def test_empty(text: str) -> None:
    assert refusal(text) == "empty (make one with: cpuid -r > FILE)"


def test_json_is_told_apart() -> None:
    assert refusal(' {"schema_version": "1.0"}') == (
        "this looks like JSON, not like a CPUID dump "
        "(cpuid -r, cpuid -1 -r and the CPUID dumps of InstLatx64 and AIDA64 are read)"
    )


@pytest.mark.parametrize("name", sorted({*FORMS, "threadripper-3970x.cpuid-r.txt", "sapphire-rapids.instlatx64.txt"}))
def test_cut_anywhere_is_never_read_in_part(name: str) -> None:
    """Cut at every character: refused, or nothing is missing but whole CPUs and what follows the last register."""
    text = text_of(name)
    whole = parse_dump(text, name).cpus
    accepted = 0
    for length in range(len(text)):
        try:
            dump = parse_dump(text[:length], name)
        except RecordError as error:
            assert str(error).isprintable()
            continue
        accepted += 1
        for cpu, found in dump.cpus.items():
            missing = whole[cpu].leaves.keys() - found.leaves.keys()
            # Undeclared leaves at the end of a block; nothing tells that they were there.
            assert missing <= {Leaf(0x80860000, 0), Leaf(0xC0000000, 0), Leaf(0x8FFFFFFF, 0)}
            assert all(found.leaves[leaf] == whole[cpu].leaves[leaf] for leaf in found.leaves)
    assert accepted < len(text) / 4


def test_cut_in_a_line_names_the_line() -> None:
    text = text_of("cpuid-r.txt")
    assert refusal(text[:-9]) == (
        "cut in the middle of line 40: '08 0x00: eax=0x00003027 ebx=0x00000000 ecx=0x00000000 edx=0x' "
        "(make a whole one with: cpuid -r > FILE)"
    )
    text = text_of("instlatx64-affmask.txt")
    assert refusal(text[:-4]).startswith("cut in the middle of line 41: 'CPUID 80000008: ")


def test_cut_in_a_block_says_how_far_it_came() -> None:
    lines = text_of("cpuid-r.txt").splitlines(keepends=True)
    assert refusal("".join(lines[:-2])) == (
        "cut: leaf 80000000 of CPU 1 declares leaves up to 80000008, the last one is 80000006 "
        "(make a whole one with: cpuid -r > FILE)"
    )
    assert refusal("".join(lines[:25])).startswith(
        "cut: leaf 00000000 of CPU 1 declares leaves up to 00000007, the last one is 00000003"
    )
    assert refusal("".join(lines[:21])).startswith("cut: CPU 1 (line 21) has a header and no registers")
    extended = next(number for number, line in enumerate(lines) if "0x80000000" in line)
    assert refusal("".join(lines[:extended])).startswith("cut: CPU 0 has no extended leaves, the last one is 00000007")


def test_cut_at_the_front() -> None:
    lines = text_of("cpuid-r.txt").splitlines(keepends=True)
    assert refusal("".join(lines[1:])).startswith("line 1: registers before the first 'CPU' line: cut at the front")
    lines = text_of("instlatx64-bare.txt").splitlines(keepends=True)
    assert refusal("".join(lines[1:])).startswith("CPU 0 (line 1) has no leaf 0: a part of a dump")


def test_filtered() -> None:
    text = text_of("cpuid-r.txt")
    kept = [
        line for line in text.splitlines(keepends=True) if not line.startswith("   0x0000000") or " 0x00000001 " in line
    ]
    assert refusal("".join(kept)).startswith("CPU 0 (line 1) has no leaf 0")
    kept = [
        line
        for line in text.splitlines(keepends=True)
        if not line.startswith("   0x0000000") or "0x00000000 0x00:" in line
    ]
    assert refusal("".join(kept)).startswith(
        "cut or filtered: leaf 0 of CPU 0 declares 8 basic leaves, 1 are there, the last one is 00000000"
    )


def test_one_leaf_only() -> None:
    text = "CPU:\n   0x00000007 0x00: eax=0x00000001 ebx=0xf1bf07ab ecx=0x00405fc6 edx=0x00000010\n"
    assert refusal(text).startswith("CPU 0 (line 1) has no leaf 0: a part of a dump")


@pytest.mark.parametrize(
    ("name", "old", "new", "line"),
    [
        ("cpuid-r.txt", "ebx=0x000027ab", "ebx=0x00027ab", 11),
        ("cpuid-r.txt", "ebx=0x000027ab", "ebx=0x0000g7ab", 11),
        ("cpuid-r.txt", "   0x00000007 0x00:", "   0x00000007:", 11),
        ("cpuid-r.txt", "CPU 1:", "CPU one:", 21),
        ("cpuid-r.txt", " edx=0x9c000000", "", 11),
        ("instlatx64-affmask.txt", "-000027AB-", "-00027AB-", 11),
        ("instlatx64-affmask.txt", "-000027AB-", "-0000 7AB-", 11),
        ("instlatx64-affmask.txt", "CPUID 00000007:", "CPUID 0000007:", 11),
        ("instlatx64-affmask.txt", "9C000000 [SL 00]", "9C000000 [SL 0]", 11),
        ("instlatx64-affmask.txt", "9C000000 [SL 00]", "9C000000  [SL 0g]", 11),
        ("instlatx64-tab-separated.txt", "-9C000000", "", 10),
    ],
)
def test_damaged_line_is_named(name: str, old: str, new: str, line: int) -> None:
    assert refusal(text_of(name).replace(old, new, 1)).startswith(f"line {line} is not a CPUID line: ")


def test_terminal_escapes_are_not_passed_on() -> None:
    message = refusal(text_of("cpuid-r.txt").replace("ebx=0x000027ab", "\x1b[31m", 1))
    assert "\\x1b[31m" in message


def test_name_with_a_line_feed_stays_on_one_line() -> None:
    with pytest.raises(RecordError) as caught:
        parse_dump("", "a\nb")
    assert str(caught.value).startswith("'a\\nb': empty")


def test_two_dumps_in_one_file() -> None:
    text = text_of("cpuid-1-r.txt")
    assert refusal(text + text).startswith("line 21: CPU 0 was there before, on line 1 (give one dump per file)")
    text = text_of("instlatx64-affmask.txt")
    assert refusal(text + text).startswith("line 42: CPU 0 was there before, on line 1")


def test_leaf_twice() -> None:
    lines = text_of("cpuid-r.txt").splitlines(keepends=True)
    assert refusal("".join([*lines[:3], *lines[2:]])).startswith("line 4: leaf 00000001.0 of CPU 0 was there before")


OTHERS = {
    "cpuid without -r": 'CPU 0:\n   vendor_id = "AuthenticAMD"\n   version information (1/eax):\n',
    "kcpuid": "Basic Leafs :\n================\n0x00000000: EAX=0x0000000d, EBX=0x756e6547, ECX=0x6c65746e, ...\n",
    "/proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n",
    "lscpu": "Architecture:             x86_64\nCPU op-mode(s):           32-bit, 64-bit\n",
    "x86info": "x86info v1.31pre\nFound 2 identical CPUs\n",
    "CPU-Z": "CPU-Z TXT Report\n-------------------------\n\nBinaries\n",
    "libcpuid": "version=0.6.4\nbasic_cpuid[0]=0000000d 756e6547 6c65746e 49656e69\n",
    "dmidecode": "# dmidecode 3.4\nGetting SMBIOS data from sysfs.\n",
    "a web page or XML": "\n<!DOCTYPE html>\n<html>\n",
}


@pytest.mark.parametrize("tool", OTHERS)
def test_output_of_another_tool(tool: str) -> None:
    message = refusal(OTHERS[tool])
    assert message.startswith(f"this is the output of {tool}, not a CPUID dump (")
    assert "cpuid -r" in message


def test_unknown_text() -> None:
    assert refusal("Dear all,\n\nthe CPU is fine.\n") == (
        "this is no CPUID dump that is known "
        "(cpuid -r, cpuid -1 -r and the CPUID dumps of InstLatx64 and AIDA64 are read)"
    )


# --- files ---


def file_refusal(path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        read_dump(str(path))
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_one_gibibyte_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    assert file_refusal(path) == f"{path}: larger than 64 MiB; no CPUID dump is ({dumps.ACCEPTED})"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_endless_input_is_refused() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            assert 0 <= size <= dumps.LIMIT + 1
            self.given += size
            return b"x" * size

    with pytest.raises(RecordError, match="standard input: larger than 64 MiB"):
        read_dump("-", Endless())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "raw",
    [b"\0" * 100, b"\x7fELF\x02\x01\x01\0", b"CPU 0:\n\0", bytes(range(256)), b"\x1f\x8b\x08abc", b"\xff\xfe\x00"],
)
def test_binary(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(raw)
    assert file_refusal(path) == f"{path}: binary, not text ({dumps.ACCEPTED})"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    cure = "(give a dump file, or - for standard input)"
    assert file_refusal(tmp_path / "none") == f"cannot read {tmp_path}/none: No such file or directory {cure}"
    assert file_refusal(tmp_path) == f"cannot read {tmp_path}: Is a directory {cure}"


@pytest.mark.parametrize(
    "text", ["\n" * 3_000_000 + "x", " " * 3_000_000 + "x", "CPUID " * 500_000, "------[ " * 400_000]
)
def test_silly_input_takes_no_time(text: str) -> None:
    started = time.monotonic()
    refusal(text)
    assert time.monotonic() - started < 5


def test_a_thousand_cpus_are_read_at_once() -> None:
    text = format_raw(dict.fromkeys(range(1024), live()))
    started = time.monotonic()
    assert len(parse_dump(text, "many").cpus) == 1024
    assert time.monotonic() - started < 10
