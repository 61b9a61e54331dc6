# SPDX-License-Identifier: MIT
"""Programs: ordered lists of operations on one vCPU, their answers, and the text in which both are written.

    profile AMD_STIBP,AMD_SSBD; guest-wr 0x48 0x2 -> gp; host-set 0x48 0x1 -> ok; guest-rd 0x48 -> 0x1

A program is what a model and a kernel are both asked, and what a divergence between them is told as.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Union

from probe.errors import UsageError
from probe.masks import ALL_BITS
from probe.models.profile import Profile, parse_profile


class Kind(Enum):
    """What an operation does.

    HOST_SET and HOST_GET are KVM_SET_MSRS and KVM_GET_MSRS with one entry; GUEST_WR and GUEST_RD WRMSR and RDMSR in the
    guest. CPUID is KVM_SET_CPUID2, before the first entry only; value is a profile's mask. INIT is an INIT of the vCPU.
    DENY and ALLOW change the VM's MSR filter: value is a mask of
    KVM_MSR_FILTER_READ (1) and KVM_MSR_FILTER_WRITE (2), denied from then on; ALLOW removes the filter.
    """

    HOST_SET = "host-set"
    HOST_GET = "host-get"
    GUEST_WR = "guest-wr"
    GUEST_RD = "guest-rd"
    CPUID = "cpuid"
    INIT = "init"
    DENY = "deny"
    ALLOW = "allow"


_TAKES_VALUE = (Kind.HOST_SET, Kind.GUEST_WR, Kind.DENY)
_TAKES_INDEX = (Kind.HOST_SET, Kind.HOST_GET, Kind.GUEST_WR, Kind.GUEST_RD, Kind.DENY)
READING = (Kind.HOST_GET, Kind.GUEST_RD)
IN_GUEST = (Kind.GUEST_WR, Kind.GUEST_RD)
ACCESSES = (Kind.HOST_SET, Kind.HOST_GET, Kind.GUEST_WR, Kind.GUEST_RD)
_DENIED = {"rd": 1, "wr": 2, "rdwr": 3}


class Word(Enum):
    """An answer that is no value: OK; REFUSED: KVM_SET_MSRS or KVM_GET_MSRS gave a short count; GP: guest took #GP."""

    OK = "ok"
    REFUSED = "refused"
    GP = "gp"


Answer = Union[Word, int]  # a read that succeeds answers with its 64-bit value


@dataclass(frozen=True)
class Operation:
    """One operation; index is the 32-bit MSR address, value 64 bits, each 0 where the kind takes none."""

    kind: Kind
    index: int = 0
    value: int = 0

    def __str__(self) -> str:
        words = [self.kind.value]
        if self.kind in _TAKES_INDEX:
            words.append(f"{self.index:#x}")
        if self.kind is Kind.CPUID:
            words.append(str(Profile(self.value)))
        elif self.kind is Kind.DENY:
            words.append(next(name for name, mask in _DENIED.items() if mask == self.value))
        elif self.kind in _TAKES_VALUE:
            words.append(f"{self.value:#x}")
        return " ".join(words)


@dataclass(frozen=True)
class Program:
    """A guest CPUID and what is done with its vCPU, in order."""

    profile: Profile
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        return written(self, None)


def format_answer(answer: Answer) -> str:
    """Write an answer as programs have it: ok, refused, gp, or the value read."""
    return answer.value if isinstance(answer, Word) else f"{answer:#x}"


def written(program: Program, answers: Sequence[Answer] | None, *, between: str = "; ") -> str:
    """Write a program, with the answers if there are any."""
    parts = [f"profile {program.profile}"]
    for number, operation in enumerate(program.operations):
        tail = f" -> {format_answer(answers[number])}" if answers is not None and number < len(answers) else ""
        parts.append(f"{operation}{tail}")
    return between.join(parts)


_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}|[0-9]{1,20}")


def parse(text: str) -> tuple[Program, tuple[Answer | None, ...]]:
    """Read a program and the answers that it expects (None where it expects none).

    Operations are separated by semicolons or line ends; # begins a comment. Raise UsageError that names the part.
    """
    profile: Profile | None = None
    operations: list[Operation] = []
    expected: list[Answer | None] = []
    for part in _parts(text):
        head, arrow, tail = (piece.strip() for piece in part.partition("->"))
        words = head.split()
        if words[0] == "profile":
            if profile is not None or operations or arrow:
                raise UsageError(f"cannot read {part!r}: the profile comes once, first, and answers nothing")
            profile = parse_profile(head[len("profile") :].strip())
            continue
        operations.append(_operation(words, part))
        expected.append(_answer(tail, operations[-1], part) if arrow else None)
    if profile is None:
        raise UsageError(
            "a program begins with its guest's CPUID", "such as: profile AMD_STIBP,AMD_SSBD; or: profile none;"
        )
    return Program(profile, tuple(operations)), tuple(expected)


def _parts(text: str) -> Iterable[str]:
    for line in text.splitlines():
        for part in line.partition("#")[0].split(";"):
            if part.strip():
                yield part.strip()


def _number(word: str, limit: int, part: str) -> int:
    if not _NUMBER.fullmatch(word) or int(word, 0) > limit:
        raise UsageError(f"cannot read {part!r}: {word!r} is no number up to {limit:#x}")
    return int(word, 0)


def _operation(words: Sequence[str], part: str) -> Operation:
    try:
        kind = Kind(words[0])
    except ValueError:
        known = ", ".join(one.value for one in Kind)
        raise UsageError(f"cannot read {part!r}: unknown operation {words[0]!r}", f"known: profile, {known}") from None
    if kind is Kind.CPUID:
        given = parse_profile(" ".join(words[1:]))
        if given.no_cpuid:
            raise UsageError(f"cannot read {part!r}: KVM_SET_CPUID2 cannot be undone")
        return Operation(kind, value=given.mask)
    wanted = 1 + (kind in _TAKES_INDEX) + (kind in _TAKES_VALUE)
    if len(words) != wanted:
        raise UsageError(f"cannot read {part!r}: {kind.value} takes {wanted - 1} words, not {len(words) - 1}")
    index = _number(words[1], 0xFFFFFFFF, part) if kind in _TAKES_INDEX else 0
    if kind is Kind.DENY:
        if words[2] not in _DENIED:
            raise UsageError(f"cannot read {part!r}: deny wants one of {', '.join(_DENIED)}")
        return Operation(kind, index, _DENIED[words[2]])
    return Operation(kind, index, _number(words[2], ALL_BITS, part) if kind in _TAKES_VALUE else 0)


def _answer(text: str, operation: Operation, part: str) -> Answer:
    if operation.kind in READING and _NUMBER.fullmatch(text):
        return _number(text, ALL_BITS, part)
    try:
        word = Word(text)
    except ValueError:
        raise UsageError(f"cannot read {part!r}: {text!r} is no answer", "ok, refused, gp, or a value read") from None
    if (word is Word.GP) != (operation.kind in IN_GUEST) and word is not Word.OK:
        raise UsageError(f"cannot read {part!r}: {word.value} is no answer to {operation.kind.value}")
    return word
