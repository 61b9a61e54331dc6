# SPDX-License-Identifier: MIT
"""Live migrations from one kernel to another: guests leave in one booted guest, and arrive in the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernel_harness.boot.cache import Say
from kernel_harness.boot.kvm import Wanted, in_guest
from probe import migration_record as mig
from probe.errors import ProbeError

_PROGRAM = "program"


@dataclass(frozen=True)
class Moved:
    """One kernel of several: the record of what arrived there, or why there is none."""

    spec: str
    record: mig.MigrationRecord | None
    error: ProbeError | None = None


def move_between(
    specs: Sequence[str], wanted: Wanted, program: str | None, leave: Sequence[str], arrive: Sequence[str], say: Say
) -> list[Moved]:
    """Let guests leave every kernel, and arrive on every other; each is booted twice, a single one once.

    program is a text, None for the study. leave and arrive are the options of `kvm migrate` for both rounds. A kernel
    that fails costs its own pairs alone.
    """
    files = {} if program is None else {_PROGRAM: program.encode()}
    words = ["migrate", *([f"{{folder}}/{_PROGRAM}"] if files else []), *leave, *arrive]
    left = [_one(spec, wanted, words, files, say) for spec in specs]
    if len(specs) < 2:
        return left
    done: list[Moved] = []
    for number, moved in enumerate(left):
        others = [other.record for at, other in enumerate(left) if at != number and other.record is not None]
        if moved.record is None or not others:
            done.append(moved)
            continue
        names = {f"from-{at}": mig.encode(record) for at, record in enumerate(others)}
        again = ["migrate", *arrive, *(f"--restore={{folder}}/{name}" for name in names)]
        there = _one(moved.spec, wanted, again, names, say)
        if there.record is None:
            done.append(Moved(moved.spec, moved.record, there.error))
        else:
            done.append(Moved(moved.spec, mig.joined(moved.record, there.record)))
    return done


def _one(spec: str, wanted: Wanted, words: Sequence[str], files: dict[str, bytes], say: Say) -> Moved:
    try:
        raw, place = in_guest(spec, wanted, words, files, say)
        record = mig.decode(raw, f"the record of {place.kernel}")
    except ProbeError as error:
        return Moved(spec, None, error)
    record.guest = place
    return Moved(spec, record)
