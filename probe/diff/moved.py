# SPDX-License-Identifier: MIT
"""What a comparison of two records says: what moved, one cause a line, and what else differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from probe import kvm_record, migration_record
from probe import record as rec
from probe.masks import format_bits, told_bits
from probe.registers import SPEC_CTRL

AnyRecord = Union[rec.Record, kvm_record.KvmRecord, migration_record.MigrationRecord]


@dataclass(frozen=True)
class Moved:
    """One cause: what was seen before and after, of which bits (0: it is not about bits), where.

    what says who did what ("guest write, first"); where the CPUs or profiles, count how many of them.
    """

    what: str
    before: str
    after: str
    bits: int = 0
    where: str = ""
    count: int = 0

    @property
    def numbers(self) -> str:
        """The bits in list notation, with the names that they have in IA32_SPEC_CTRL; "" if it is not about bits."""
        if not self.bits:
            return ""
        return format_bits(self.bits) if self._of_kin else SPEC_CTRL.brief(self.bits)

    @property
    def told(self) -> str:
        """The whole cause as a sentence, but for where."""
        bits = "" if not self.bits else told_bits(self.bits) if self._of_kin else SPEC_CTRL.told(self.bits)
        return f"{self.what}:{f' {bits}:' if bits else ''} {self.before} -> {self.after}"

    @property
    def _of_kin(self) -> bool:
        return any(name in self.what for name in ("IA32_PRED_CMD", "VIRT_SPEC_CTRL"))


@dataclass(frozen=True)
class Condition:
    """One thing around the measurement that is not the same in both records."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """Two records of one kind.

    conditions say whether the comparison is fair; alike names what was looked at and is the same. only_before and
    only_after are the CPUs or profiles that one record alone has, everywhere the CPUs that both have, as Moved.where
    would have them.
    """

    kind: str
    conditions: tuple[Condition, ...]
    alike: tuple[str, ...]
    moved: tuple[Moved, ...]
    only_before: str = ""
    only_after: str = ""
    everywhere: str = ""

    @property
    def same(self) -> bool:
        """True if both saw the same, whatever else differs."""
        return not (self.moved or self.only_before or self.only_after)


def kind_of(record: AnyRecord) -> str:
    """Say what a record is of."""
    if isinstance(record, rec.Record):
        return "record of a run"
    return "record of KVM" if isinstance(record, kvm_record.KvmRecord) else "record of migrations"
