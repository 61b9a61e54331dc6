# SPDX-License-Identifier: MIT
from __future__ import annotations

import random

import pytest

from probe.masks import ALL_BITS, bits_of, format_bits, format_list, hex64, mask_of, parse_hex64, parse_list


def test_hex64_is_sixteen_digits_and_reads_back() -> None:
    assert hex64(0x407) == "0x0000000000000407"
    assert parse_hex64(hex64(ALL_BITS)) == ALL_BITS


@pytest.mark.parametrize("text", ["0x1" + "0" * 16, "0x407", "0X0000000000000407", "0x000000000000040G", "", "1"])
def test_anything_but_sixteen_lower_case_digits_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_hex64(text)


def test_65_bits_cannot_be_written() -> None:
    with pytest.raises(ValueError):
        hex64(1 << 64)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), (" 8,0-1 ", (0, 1, 8)), ("5-5", (5,)), ("1,1-2", (1, 2))],
)
def test_list_notation(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_list(text) == numbers
    assert parse_list(format_list(numbers)) == numbers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "0,,1", "0x3", "1 2", "99999999"])
def test_lists_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_list(text)


def test_formatting() -> None:
    assert format_list([8, 0, 1, 2, 3]) == "0-3,8"
    assert format_list([]) == ""
    assert format_bits(0x5FF) == "0-8,10"
    assert format_bits(0) == "none"
    draw = random.Random(1)
    for mask in [ALL_BITS, 1 << 63, 3 << 62, *(draw.getrandbits(64) & draw.getrandbits(64) for _ in range(200))]:
        assert format_bits(mask) == format_list(bits_of(mask))
    assert mask_of(bits_of(0x8000000000000401)) == 0x8000000000000401
