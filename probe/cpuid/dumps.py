# SPDX-License-Identifier: MIT
"""CPUID dump files: cpuid -r, and the six forms of the InstLatx64 collection; reading all of them, writing the first.

Pure but for read_dump(). A dump that is cut or damaged is refused, never read in part: what it lacks would be
predicted as absent.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from probe.cpuid.enumeration import BASIC, EXTENDED, LAST_OFFSET, last_leaf, range_of
from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.errors import RecordError

LIMIT = 64 << 20  # bytes; 4,096 CPUs of 100 leaves in the longest of the forms are 40 MB

ACCEPTED = "cpuid -r, cpuid -1 -r and the CPUID dumps of InstLatx64 and AIDA64 are read"
_MAKE_ONE = "make one with: cpuid -r > FILE"
_MAKE_WHOLE = "make a whole one with: cpuid -r > FILE"

RAW = "cpuid -r"
LOGICAL_CPU = "InstLatx64, Logical CPU #n"
CPUID_REGISTERS = "InstLatx64, CPUID Registers / Logical CPU #n"
CPU_IN_BRACKETS = "InstLatx64, CPUID Registers (CPU #n)"
AFFINITY_MASK = "InstLatx64, CPU#nnn AffMask"
BARE = "InstLatx64, lines without a header"
NO_COLON = "InstLatx64, lines without a header or a colon"


@dataclass(frozen=True)
class Dump:
    """A dump file: form is the human name of its form, cpus maps the CPU numbers that it gives to their CPUID.

    Where a form numbers no CPUs, they count from 0.
    """

    form: str
    cpus: Mapping[int, Snapshot]


# --- what is not read ----------------------------------------------------------------------------------------------

_FOREIGN: tuple[tuple[str, str, str], ...] = (
    (r"^[ \t]+vendor_id = \"", "cpuid without -r", "use the raw form: cpuid -r > FILE"),
    (r"^[ \t]*(?:0x[0-9a-f]{8}|[0-9]+): EAX=0x|^CPUID_0x[0-9a-f]+_ECX|^(?:Basic|Extended) Leafs :", "kcpuid", ""),
    (r"^processor[ \t]*: [0-9]+$", "/proc/cpuinfo", ""),
    (r"^Architecture:[ \t]", "lscpu", ""),
    (r"^x86info ", "x86info", ""),
    (r"^CPU-Z (?:TXT Report|version)", "CPU-Z", ""),
    (r"^basic_cpuid\[\d+\]=", "libcpuid", ""),
    (r"^(?:Raw|Host)[ \t]+[0-9a-f]{8}:|^Xen reports ", "xen-cpuid", ""),
    (r"^# dmidecode ", "dmidecode", ""),
    (r"^Coreinfo v", "Coreinfo", ""),
    (r"\A\s*<(?:!DOCTYPE|html|\?xml)", "a web page or XML", ""),
)


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _foreign(text: str, name: str) -> RecordError:
    start = text[: 1 << 20]
    for pattern, tool, cure in _FOREIGN:
        if re.search(pattern, start, re.MULTILINE | re.IGNORECASE):
            return RecordError(f"{_shown(name)}: this is the output of {tool}, not a CPUID dump", cure or ACCEPTED)
    return RecordError(f"{_shown(name)}: this is no CPUID dump that is known", ACCEPTED)


# --- one CPU's block -----------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """The lines of one CPU while they come in: line is where it begins, last the leaf of the line that came last."""

    cpu: int
    line: int
    leaves: dict[Leaf, Registers] = field(default_factory=dict)
    counted: dict[int, int] = field(default_factory=dict)
    last: int = -1


class _Blocks:
    def __init__(self, name: str) -> None:
        self._name = name
        self._blocks: dict[int, _Block] = {}

    def error(self, message: str, cure: str = "") -> RecordError:
        return RecordError(f"{_shown(self._name)}: {message}", cure)

    def begin(self, cpu: int, line: int) -> _Block:
        if cpu in self._blocks:
            raise self.error(
                f"line {line}: CPU {cpu} was there before, on line {self._blocks[cpu].line}", "give one dump per file"
            )
        block = self._blocks[cpu] = _Block(cpu, line)
        return block

    def begin_next(self, line: int) -> _Block:
        return self.begin(max(self._blocks, default=-1) + 1, line)

    def add(self, block: _Block, line: int, leaf: int, subleaf: int | None, found: Registers) -> None:
        """Add a line to a block; subleaf None means that the line does not say, and counts up from 0."""
        if subleaf is None:
            subleaf = block.counted.get(leaf, 0)
            block.counted[leaf] = subleaf + 1
        key = Leaf(leaf, subleaf)
        if key in block.leaves:
            raise self.error(f"line {line}: leaf {key} of CPU {block.cpu} was there before", "give one dump per file")
        block.leaves[key] = found
        block.last = leaf

    def finish(self) -> dict[int, Snapshot]:
        for block in self._blocks.values():
            self._check_whole(block)
        return {cpu: Snapshot(block.leaves) for cpu, block in self._blocks.items()}

    def _check_whole(self, block: _Block) -> None:
        """Refuse a block that ends early, or lacks most of what it declares.

        Forms leave leaves out (AIDA64 leaf 4 of AMD CPUs) and old ones subleaves; the last leaf of a range they give.
        """
        cpu, leaves = block.cpu, block.leaves
        if not leaves:
            raise self.error(f"cut: CPU {cpu} (line {block.line}) has a header and no registers", _MAKE_WHOLE)
        if Leaf(BASIC, 0) not in leaves:
            raise self.error(f"CPU {cpu} (line {block.line}) has no leaf 0: a part of a dump", _MAKE_WHOLE)
        base = range_of(block.last)
        first = leaves.get(Leaf(base, 0))
        last = None if first is None else last_leaf(base, first)
        if first is not None and last is not None and first.eax == last and block.last < last:
            raise self.error(
                f"cut: leaf {base:08x} of CPU {cpu} declares leaves up to {last:08x}, the last one is {block.last:08x}",
                _MAKE_WHOLE,
            )
        highest = leaves[Leaf(BASIC, 0)].eax
        if highest > LAST_OFFSET:  # garbage, as some CPUs and hypervisors return: it says nothing
            return
        basic = {leaf.leaf for leaf in leaves if leaf.leaf <= highest}
        if 2 * len(basic) < highest + 1:
            raise self.error(
                f"cut or filtered: leaf 0 of CPU {cpu} declares {highest + 1} basic leaves, {len(basic)} are there, "
                f"the last one is {max(basic):08x}",
                _MAKE_WHOLE,
            )
        # Since the Pentium 4 there are extended leaves (Intel SDM vol. 1 ch. 21, CPUID.80000000H); CPUs before it had
        # no leaf 4.
        if highest >= 4 and Leaf(EXTENDED, 0) not in leaves:
            raise self.error(f"cut: CPU {cpu} has no extended leaves, the last one is {block.last:08x}", _MAKE_WHOLE)


# --- cpuid -r ------------------------------------------------------------------------------------------------------

_RAW_CPU = re.compile(r"CPU(?: ([0-9]{1,7}))?:\s*\Z")
_RAW_LINE = re.compile(
    r"\s*0x([0-9a-f]{8}) 0x([0-9a-f]{2,8}): eax=0x([0-9a-f]{8}) ebx=0x([0-9a-f]{8}) ecx=0x([0-9a-f]{8}) "
    r"edx=0x([0-9a-f]{8})\s*\Z"
)
_IS_RAW = re.compile(
    r"^(?:[ \t]*0x[0-9a-f]{8} 0x[0-9a-f]|CPU(?: [0-9]+)?:[ \t]*(?:\Z|\n[ \t]*(?:\Z|0x)))", re.MULTILINE
)


def _parse_raw(lines: list[str], name: str) -> Dump:
    blocks = _Blocks(name)
    block: _Block | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        header = _RAW_CPU.match(line)
        if header:
            block = blocks.begin(int(header[1] or 0), number)
            continue
        found = _RAW_LINE.match(line)
        if not found:
            raise _bad_line(blocks, number, line, last=number == len(lines))
        if block is None:
            raise blocks.error(f"line {number}: registers before the first 'CPU' line: cut at the front", _MAKE_WHOLE)
        leaf, subleaf, *registers = (int(word, 16) for word in found.groups())
        blocks.add(block, number, leaf, subleaf, Registers(*registers))
    return Dump(RAW, blocks.finish())


def _bad_line(blocks: _Blocks, number: int, line: str, *, last: bool) -> RecordError:
    """last: nothing follows this line, not even its line feed."""
    if last:
        return blocks.error(f"cut in the middle of line {number}: {line[-60:]!r}", _MAKE_WHOLE)
    return blocks.error(f"line {number} is not a CPUID line: {line[:60]!r}", _MAKE_ONE)


# --- InstLatx64 ----------------------------------------------------------------------------------------------------

_SECTION = re.compile(r"\s*------\[ (.*?) \]------\s*\Z")
_SECTION_CPU = re.compile(r"(CPUID Registers / )?Logical CPU #([0-9]{1,7})\Z")
_BRACKETS_CPU = re.compile(r"\s*CPUID[ -]Regist\w* \(CPU #([0-9]{1,7})\):?\s*\Z")
_AFFINITY_CPU = re.compile(r"\s*CPU#([0-9]{1,7}) +AffMask:")
_IS_LINE = re.compile(r"\s*CPUID\s+(?=[0-9]|[Cc]0000)")
_LINE = re.compile(
    r"\s*CPUID\s+([0-9A-Fa-f]{8})(:?)\s+([0-9A-Fa-f]{8})-([0-9A-Fa-f]{8})-([0-9A-Fa-f]{8})-([0-9A-Fa-f]{8})"
    r"(?:\s+\[SL ([0-9A-Fa-f]{2})\])?(?:\s+(?!\s|\[SL).*)?\s*\Z"
)
_IS_INSTLATX64 = re.compile(r"^[ \t]*CPUID[ \t]+[0-9A-Fa-f]{8}:?[ \t]+[0-9A-Fa-f]{1,8}(?:-|\Z)", re.MULTILINE)


def _parse_instlatx64(lines: list[str], name: str) -> Dump:
    blocks = _Blocks(name)
    block: _Block | None = None
    headed = False
    form = ""
    for number, line in enumerate(lines, 1):
        header = _instlatx64_header(line)
        if header is not None:
            cpu_form, cpu = header
            headed = cpu >= 0
            block = blocks.begin(cpu, number) if headed else None
            form = form or cpu_form
            continue
        if not _IS_LINE.match(line):
            if number == len(lines) and line.strip() and "CPUID ".startswith(line.strip()[:6]):
                raise _bad_line(blocks, number, line, last=True)
            continue
        found = _LINE.match(line)
        if not found:
            raise _bad_line(blocks, number, line, last=number == len(lines))
        form = form or (BARE if found[2] else NO_COLON)
        leaf = int(found[1], 16)
        if block is None or (not headed and leaf == BASIC):
            block = blocks.begin_next(number)
        blocks.add(
            block,
            number,
            leaf,
            None if found[7] is None else int(found[7], 16),
            Registers(*(int(found[group], 16) for group in (3, 4, 5, 6))),
        )
    return Dump(form, blocks.finish())


def _instlatx64_header(line: str) -> tuple[str, int] | None:
    """Return the form and the CPU number that a header gives, ("", -1) for a section that is no CPU's; else None."""
    section = _SECTION.match(line)
    if section:
        cpu = _SECTION_CPU.match(section[1])
        return (CPUID_REGISTERS if cpu[1] else LOGICAL_CPU, int(cpu[2])) if cpu else ("", -1)
    for pattern, form in ((_BRACKETS_CPU, CPU_IN_BRACKETS), (_AFFINITY_CPU, AFFINITY_MASK)):
        found = pattern.match(line)
        if found:
            return form, int(found[1])
    return None


# --- in and out ----------------------------------------------------------------------------------------------------


def parse_dump(text: str, name: str) -> Dump:
    """Read a dump in any of the forms; name is what messages call it.

    Return every CPU's leaves; where a form does not number subleaves, lines of one leaf are subleaves 0, 1, 2 ...
    Raise RecordError, one line, if the text is empty, binary, of another tool, damaged (with the line) or cut: in the
    middle of a line or of a CPU's leaves.
    """
    text = text.lstrip("\ufeff").rstrip("\x1a")
    if not text.strip():
        raise RecordError(f"{_shown(name)}: empty", _MAKE_ONE)
    if "\0" in text:
        raise RecordError(f"{_shown(name)}: binary, not text", ACCEPTED)
    if text.lstrip().startswith("{"):
        raise RecordError(f"{_shown(name)}: this looks like JSON, not like a CPUID dump", ACCEPTED)
    # Only \n, \r\n and \r end lines: str.splitlines() would also split at form feeds and at U+2028. What follows the
    # last line end is the last line; it is empty if the file was not cut.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if _IS_RAW.search(text):
        return _parse_raw(lines, name)
    if _IS_INSTLATX64.search(text):
        return _parse_instlatx64(lines, name)
    raise _foreign(text, name)


def _read_bytes(path: str, stdin: BinaryIO | None) -> bytes:
    too_large = f"larger than {LIMIT >> 20} MiB; no CPUID dump is"
    try:
        if path == "-":
            raw = (stdin or sys.stdin.buffer).read(LIMIT + 1)
        else:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if stat.S_ISREG(status.st_mode) and status.st_size > LIMIT:
                    raise RecordError(f"{_shown(path)}: {too_large}", ACCEPTED)
                raw = file.read(LIMIT + 1)
    except OSError as error:
        raise RecordError(
            f"cannot read {_shown(path)}: {error.strerror}", "give a dump file, or - for standard input"
        ) from error
    if len(raw) > LIMIT:
        raise RecordError(f"{'standard input' if path == '-' else _shown(path)}: {too_large}", ACCEPTED)
    return raw


_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x19\x1b-\x1f\x7f]")


def read_dump(path: str, stdin: BinaryIO | None = None, from_json: Callable[[bytes, str], Dump] | None = None) -> Dump:
    """Read a dump file, or standard input if path is "-" (stdin replaces it in a test).

    UTF-8, UTF-16 with its mark (what PowerShell writes) and Latin-1 are read. from_json gets what begins with a brace
    and the name that messages use: the record of a run, say.
    Raise RecordError, one line, if there is no such file, it is larger than 64 MiB (it is not read then), or as
    parse_dump() does.
    """
    raw = _read_bytes(path, stdin)
    name = "standard input" if path == "-" else path
    if from_json is not None and raw.lstrip()[:1] == b"{":
        return from_json(raw, _shown(name))
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if _CONTROLS.search(text):
        raise RecordError(f"{_shown(name)}: binary, not text", ACCEPTED)
    return parse_dump(text, name)


def format_raw(cpus: Mapping[int, Snapshot]) -> str:
    """Write CPUs in the form of cpuid -r, which parse_dump() and cpuid -f read.

    parse_dump() gives back exactly these CPUs and leaves, provided that each has the last leaf of its ranges.
    """
    lines = []
    for cpu in sorted(cpus):
        lines.append(f"CPU {cpu}:\n")
        for leaf, found in sorted(cpus[cpu].leaves.items()):
            lines.append(
                f"   0x{leaf.leaf:08x} 0x{leaf.subleaf:02x}: eax=0x{found.eax:08x} ebx=0x{found.ebx:08x} "
                f"ecx=0x{found.ecx:08x} edx=0x{found.edx:08x}\n"
            )
    return "".join(lines)
