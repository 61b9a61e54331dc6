# SPDX-License-Identifier: MIT
"""64-bit masks, and the kernel's list notation (0-3,8) for bits and for CPUs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

ALL_BITS = (1 << 64) - 1
_HEX64 = re.compile(r"0x[0-9a-f]{16}\Z")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?\Z")


def hex64(value: int) -> str:
    """Format a 64-bit value as 0x and 16 digits, the form used in records and reports."""
    if not 0 <= value <= ALL_BITS:
        raise ValueError(f"{value:#x} is not a 64-bit value")
    return f"{value:#018x}"


def parse_hex64(text: str) -> int:
    """Read what hex64() wrote; raise ValueError for anything else (65 bits, upper case, spaces)."""
    if not _HEX64.match(text):
        raise ValueError(f"{text!r} is not a 64-bit mask (0x and 16 hexadecimal digits)")
    return int(text, 16)


def bits_of(mask: int) -> Iterator[int]:
    """Yield the numbers of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def mask_of(bits: Iterable[int]) -> int:
    """Return the mask in which exactly these bits are set."""
    mask = 0
    for bit in bits:
        mask |= 1 << bit
    return mask


def format_list(numbers: Iterable[int]) -> str:
    """Write numbers as the kernel writes CPU lists: 0-3,8. No numbers: an empty string."""
    parts: list[str] = []
    first = last = -2
    for number in [*sorted(set(numbers)), -2]:
        if number == last + 1:
            last = number
            continue
        if first >= 0:
            parts.append(f"{first}-{last}" if last > first else f"{first}")
        first = last = number
    return ",".join(parts)


def parse_list(text: str, *, limit: int = 1 << 20) -> tuple[int, ...]:
    """Read the kernel's list notation (0-3,8) into sorted, distinct numbers below limit.

    Raise ValueError, naming the part that is wrong, for anything else: an empty list, a range that runs backwards.
    """
    numbers: set[int] = set()
    for part in text.strip().split(","):
        match = _RANGE.match(part.strip())
        if not match:
            raise ValueError(f"{part.strip()!r} is neither a number nor a range such as 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"range {part.strip()!r} runs backwards")
        if last >= limit:
            raise ValueError(f"{last} is too large (must be below {limit})")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


@functools.lru_cache(maxsize=4096)
def format_bits(mask: int) -> str:
    """Write the set bits of a mask in list notation, or 'none'."""
    parts: list[str] = []
    while mask:
        first = (mask & -mask).bit_length() - 1
        carried = mask + (1 << first)  # the lowest run of ones becomes zeros, with a one above them
        last = (carried & -carried).bit_length() - 2
        parts.append(f"{first}-{last}" if last > first else f"{first}")
        mask &= carried
    return ",".join(parts) or "none"


def told_bits(mask: int) -> str:
    """Write the set bits of a mask in a sentence: bit 1, bits 1-2, no bits."""
    return "no bits" if not mask else f"{'bits' if mask & (mask - 1) else 'bit'} {format_bits(mask)}"


def told_cpus(cpus: str) -> str:
    """Write a CPU list in a sentence: CPU 5, CPUs 0-3,8."""
    return f"CPU {cpus}" if cpus.isdigit() else f"CPUs {cpus}"


def grouped(values: Mapping[int, int]) -> list[tuple[str, int]]:
    """Turn CPU -> value into (CPU list, value) groups, in order of the first CPU."""
    cpus: dict[int, list[int]] = {}
    for cpu in sorted(values):
        cpus.setdefault(values[cpu], []).append(cpu)
    return [(format_list(members), value) for value, members in cpus.items()]
