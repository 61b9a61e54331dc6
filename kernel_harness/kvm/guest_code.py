# SPDX-License-Identifier: MIT
"""The guest: an interpreter in real-mode machine code that runs a table of RDMSR and WRMSR steps.

One KVM_RUN runs the whole table. The interpreter stores for each step whether #GP came and what was read, and ends
with an OUT, which exits to us (a HLT would block in KVM if the interrupt controller is in the kernel). Entered again,
it starts with the table's first row again.

ASSEMBLY is the source of CODE for GNU as; a test assembles it and compares.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

LOW_SIZE = 0x10000  # bytes at guest physical 0: vectors, stack, code, table
CODE_AT = 0x1000
TABLE_AT = 0x2000
RESET_PAGE = 0xFFFFF000  # x86 starts at F000:FFF0 with a code segment base of 0xFFFF0000
RESET_OFFSET = 0xFF0
EXIT_PORT = 0x80
ROW = struct.Struct("<BBHIII")  # kind, faulted, padding, index, eax, edx
MOST_ROWS = (LOW_SIZE - TABLE_AT) // ROW.size - 1

END, WRITE, READ = 0, 1, 2
# Timed: the result's value is the TSC cycles that it took; NOTHING is what the timing itself takes. CPUID exits to KVM,
# an OUT to TIMED_PORT to us.
TIMED_WRITE, TIMED_READ, TIMED_CPUID, TIMED_OUT, TIMED_NOTHING = 3, 4, 5, 6, 7
TIMED_PORT = 0x81
_DONE = 2

ASSEMBLY = r"""
        .code16
        .org    0
start:  xorw    %ax, %ax            # cs:ip is 0:0x1000, by the far jump at the reset vector
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x1000, %sp
        movw    $fault + 0x1000, 13 * 4     # vector 13, #GP
        movw    %ax, 13 * 4 + 2
        movw    $0x2000, %si        # the table
next:   movb    (%si), %al
        testb   %al, %al
        jz      done
        movl    4(%si), %ecx
        movb    $0, 1(%si)
        cmpb    $2, %al
        je      read
        ja      timed
        movl    8(%si), %eax
        movl    12(%si), %edx
        wrmsr
        jmp     ahead
read:   rdmsr
        movl    %eax, 8(%si)
        movl    %edx, 12(%si)
ahead:  addw    $16, %si
        jmp     next
done:   movb    $2, 1(%si)
        outb    %al, $0x80
        jmp     start
        .macro  timing what:vararg  # edi: the time before; then nothing but what is asked; the cycles into the row
        lfence
        rdtsc
        movl    %eax, %edi
        movl    8(%si), %eax
        movl    12(%si), %edx
        \what
        lfence
        rdtsc
        subl    %edi, %eax
        movl    %eax, 8(%si)
        movl    $0, 12(%si)
        jmp     ahead
        .endm
timed:  cmpb    $4, %al             # told apart before the clock runs: that takes as long as an access
        jb      twrmsr
        je      trdmsr
        cmpb    $6, %al
        jb      tcpuid
        je      tout
        timing
twrmsr: timing  wrmsr
trdmsr: timing  rdmsr
tcpuid: timing  cpuid               # leaf 0: the row's value
tout:   timing  outb %al, $0x81
fault:  movb    $1, 1(%si)          # in real mode #GP pushes no error code: ip, cs, flags
        movw    %sp, %bp
        movw    $ahead + 0x1000, (%bp)
        iret
"""

CODE = bytes.fromhex(
    "31c08ed88ed0bc0010c70634002311a33600be00208a0484c07429668b4c04c64401003c02740e7723668b4408668b54"
    "0c0f30eb0a0f32668944086689540c83c610ebd1c6440102e680ebb43c04723074563c06727b0f84a0000faee80f3166"
    "89c7668b4408668b540c0faee80f316629f86689440866c7440c00000000ebbf0faee80f316689c7668b4408668b540c"
    "0f300faee80f316629f86689440866c7440c00000000eb970faee80f316689c7668b4408668b540c0f320faee80f3166"
    "29f86689440866c7440c00000000e96eff0faee80f316689c7668b4408668b540c0fa20faee80f316629f86689440866"
    "c7440c00000000e945ff0faee80f316689c7668b4408668b540ce6810faee80f316629f86689440866c7440c00000000"
    "e91cffc644010189e5c746003f10cf"
)
JUMP = bytes.fromhex("ea00100000")  # ljmp $0x0, $0x1000, for the reset vector


@dataclass(frozen=True)
class Step:
    """One RDMSR or WRMSR. kind is READ, WRITE or a timed one; index the 32-bit MSR address; value 64 bits to write."""

    kind: int
    index: int
    value: int = 0


@dataclass(frozen=True)
class Result:
    """What a step did: whether it took #GP, and the 64-bit value that was read, or the cycles (0 for a write)."""

    faulted: bool
    value: int


class Memory(Protocol):
    """Guest memory: what mmap offers of it."""

    def __setitem__(self, where: slice, what: bytes, /) -> None:
        """Write bytes."""

    def __getitem__(self, where: slice, /) -> bytes:
        """Read bytes."""


def write_table(memory: Memory, steps: Sequence[Step]) -> None:
    """Lay the steps down where the interpreter looks for them; at most MOST_ROWS."""
    rows = bytearray()
    for step in steps:
        low, high = step.value & 0xFFFFFFFF, step.value >> 32
        rows += ROW.pack(step.kind, 0, 0, step.index, low, high)
    rows += ROW.pack(END, 0, 0, 0, 0, 0)
    memory[TABLE_AT : TABLE_AT + len(rows)] = bytes(rows)


def read_table(memory: Memory, count: int) -> list[Result] | None:
    """Read what came of the rows; None if the guest did not get to the table's end."""
    raw = memory[TABLE_AT : TABLE_AT + (count + 1) * ROW.size]
    results: list[Result] = []
    for kind, faulted, _, _, low, high in ROW.iter_unpack(raw):
        if kind == END:
            return results if faulted == _DONE else None
        results.append(Result(bool(faulted), 0 if faulted or kind == WRITE else high << 32 | low))
    return None
