# SPDX-License-Identifier: MIT
"""Two records of guests that moved: what became of each."""

from __future__ import annotations

from msgspec import UnsetType

from probe.diff.around import conditions
from probe.diff.moved import Comparison, Moved
from probe.masks import parse_hex64
from probe.migration_record import MigrationRecord


def compare(before: MigrationRecord, after: MigrationRecord) -> Comparison:
    """Compare what became of every guest; guests that one of them alone has are said."""
    found = [{**_departures(record), **_arrivals(record)} for record in (before, after)]
    moved = [
        Moved(f"guest {key}", mine, found[1][key]) for key, mine in found[0].items() if mine != found[1].get(key, mine)
    ]
    one, other = before.hardware, after.hardware
    for name in one.__struct_fields__:
        if getattr(one, name) != getattr(other, name) and name not in ("host_cpuid", "supported_cpuid"):
            moved.append(Moved(f"hardware {name}", str(getattr(one, name)), str(getattr(other, name))))
    told = ["; ".join(record.complaints) or "decided every write" for record in (before, after)]
    if told[0] != told[1]:
        moved.append(Moved("policies", told[0], told[1]))
    differing, alike = conditions(before, after)
    only = [_counted([key for key in found[at] if key not in found[1 - at]]) for at in (0, 1)]
    return Comparison("migration", differing, alike, tuple(moved), only[0], only[1])


def _counted(keys: list[str]) -> str:
    """Say how many guests one record alone has, and which the first are."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{len(keys)} guest{'s' if len(keys) > 1 else ''}: {'; '.join(keys[:3])}{more}" if keys else ""


def _value(mask: str | UnsetType) -> str:
    return "#GP" if isinstance(mask, UnsetType) else f"{parse_hex64(mask):#x}"


def _origin(record: MigrationRecord, kernel: str) -> str:
    """The kernel's own name does not count, or two kernels had nothing in common."""
    return "within the kernel" if kernel == record.kernel.release else "from another kernel"


def _departures(record: MigrationRecord) -> dict[str, str]:
    found: dict[str, str] = {}
    for left in record.departures:
        program = "" if record.study else f" {left.program.partition(';')[0]}"
        key = f"{_origin(record, left.kernel)}, {left.policy or 'KVM alone'}{program}"
        while key in found:
            key += ", again"
        differs = f"; NOT as the model says: {left.differs}" if left.differs else ""
        listed = "" if left.listed else ", not listed"
        found[key] = f"{left.program}, reads {_value(left.reads)}, VMM {_value(left.held)}{listed}{differs}"
    return found


def _arrivals(record: MigrationRecord) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in record.arrivals:
        left = record.departures[entry.departure]
        to = entry.policy or "KVM alone"
        key = f"{_origin(record, left.kernel)}, {left.policy or 'KVM alone'} to {to}"
        key += f" ({entry.profile})" if entry.profile else ""
        key += "" if record.study else f" {left.program.partition(';')[0]}"
        key += f", rule {entry.rule}"
        while key in found:
            key += ", again"
        differs = f"; NOT as the model says: {entry.differs}" if entry.differs else ""
        found[key] = (
            f"{entry.outcome}, sent {_value(entry.sent)}, reads {_value(entry.reads)}, "
            f"VMM {_value(entry.held)}{differs}"
        )
    return found
