# SPDX-License-Identifier: MIT
"""Policies as plain text of at most 75 columns: the catalogue, two compared, what they break and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from probe.models.cost import Cost, Costs, switches_for_one_percent
from probe.models.difference import Difference
from probe.models.guest_systems import SYSTEMS, breaks, broken_moves, cpus, forgets
from probe.models.machine import DENY_READ, DENY_WRITE, Machine
from probe.models.migration import Rule
from probe.models.moving import STUDY_CPU
from probe.models.policy import POLICIES, Policy, PolicyMachine
from probe.models.program import format_answer, written
from probe.registers import SPEC_CTRL
from probe.report.layout import joined, paragraph


def catalogue(example: str) -> str:
    """Return the list of policies, and how one of one's own looks."""
    lines = ["policies: kvm policy NAME"]
    for policy in POLICIES:
        lines += paragraph(policy.title, f"  {policy.name:<26}", " " * 28)
        lines += paragraph(policy.source, " " * 28, " " * 28)
    lines += ["", "one of your own: kvm policy FILE.py, such as", ""]
    text = joined(lines)
    return text + "".join(f"  {line}".rstrip() + "\n" for line in example.splitlines())


def fates(one: PolicyMachine, other: PolicyMachine) -> list[str]:
    """Return the named CPUs and systems that take #GP under one of two policies, and not under the other."""
    told = []
    for cpu in cpus():
        for system in SYSTEMS:
            dies = [breaks(machine, cpu, system) is not None for machine in (one, other)]
            if dies[0] != dies[1]:
                where = (one if dies[0] else other).policy.name
                told.append(f"  {cpu.name:<24}{system.name:<10}{system.fate} under {where}")
    return told


def compared(one: Policy, other: Policy, over: Machine, found: Difference | None, differ: Sequence[str]) -> str:
    """Return where two policies differ: the smallest case, and the guests that live under one only, as fates() says."""
    lines = [*paragraph(f"{one.name}: {one.title}"), *paragraph(f"{other.name}: {other.title}")]
    lines += paragraph(f"calculated, both over {over.name}: {over.title}")
    lines.append("")
    if found is None:
        lines += paragraph(
            "no difference in any one or two accesses, of 0, each defined bit, bits 9 and 63, 0x3, 0x5, 0x6, 0x7, "
            "0x87, on any named CPUID or single bit of one"
        )
    else:
        lines += paragraph(f"the smallest case, on {found.host}:")
        lines += paragraph(written(found.program, [a for a in found.one[:-1] if a is not None]), "  ", "  ")
        for policy, said in ((one, found.one), (other, found.other)):
            last = said[-1]
            lines.append(f"  {policy.name:<26}{'nothing' if last is None else format_answer(last)}")
    return joined([*lines, "", "guests that take #GP under one and not under the other:", *(differ or ["  none"])])


_ASKED = {0: "none", DENY_WRITE: "writes", DENY_READ | DENY_WRITE: "all"}


def summary(machines: Sequence[PolicyMachine], rule: Rule, found: Costs | None) -> str:
    """Return one line for each policy: guests that break, moves that break, what each access costs.

    found is what was measured, None if nothing was.
    """
    heads = [f"{'':<25}{'guests:':>8}{'bits':>9}{'moves:':>8}{'':>5}  {'come':<8}"]
    heads.append(f"{'policy':<25}{'take #GP':>8}{'forgot':>9}{'refused':>8}{'lost':>5}  {'to VMM':<8}")
    if found is not None:
        heads[0] += f"{'WRMSR,':>9}"
        heads[1] += f"{'cycles':>9}"
    lines = [head.rstrip() for head in heads]
    measured = {name.partition(",")[0]: (name, write) for name, write, _ in found.policies} if found else {}
    for machine in machines:
        dead = sum(breaks(machine, cpu, system) is not None for cpu in cpus() for system in SYSTEMS)
        words = [done.word for *_, done in broken_moves(machine, rule)]
        forgetful = sum(forgets(machine, cpu) != 0 for cpu in cpus())
        line = f"{machine.policy.name[:24]:<25}{dead:>8}{forgetful:>9}"
        line += f"{words.count('refused'):>8}{words.count('lost'):>5}"
        line += f"  {_ASKED[machine.asked_for(STUDY_CPU.guest, STUDY_CPU.host)]:<8}"
        if machine.policy.name in measured:
            name, write = measured[machine.policy.name]
            line += f"{'#GP' if write.median is None else format(write.median, ','):>9}{'*' if ',' in name else ''}"
        lines.append(line.rstrip())
    each = len(cpus())
    lines += [
        "",
        *paragraph(
            f"guests: of {each * len(SYSTEMS)}, {len(SYSTEMS)} systems on {each} named CPUs. forgot: on how many of "
            "these a write of a bit that the guest's CPUID enumerates succeeds and does nothing. moves: of "
            f"{each * (each - 1)} between these CPUs, by the rule of {rule.name}. to VMM: the accesses of a guest "
            "that has set a bit that still come to it, an exit each; KVM answers the others, or nobody needs to."
        ),
    ]
    if any("," in name for name, _ in measured.values()):
        lines += paragraph("* took no bit on this machine, so that its guest was not let through when it was timed")
    return joined(lines)


def survival(machines: Sequence[PolicyMachine]) -> str:
    """Return for each policy the named CPUs on which each system takes #GP."""
    lines = paragraph(
        "guests that take #GP: named CPUs as hosts, their guests as KVM offers them, each policy over KVM's rule of "
        "Linux v6.19 (kvm_amd's and kvm_intel's give the same)"
    )
    lines += [line for system in SYSTEMS for line in paragraph(system.title, f"  {system.name:<10}", " " * 12)]
    lines.append("")
    for machine in machines:
        dead = {system.name: [cpu.name for cpu in cpus() if breaks(machine, cpu, system)] for system in SYSTEMS}
        told = "; ".join(f"{system}: {', '.join(names)}" for system, names in dead.items() if names)
        lines += paragraph(told or "none", f"  {machine.policy.name:<26}", " " * 28)
    return joined(lines)


def moves(machines: Sequence[PolicyMachine], rule: Rule) -> str:
    """Return for each policy, on source and destination, the moves between named CPUs that break."""
    lines = paragraph(
        f"moves that break between these CPUs, the policy on both, the guest with the CPUID that both offer; "
        f"rule {rule.name}: {rule.title}"
    )
    lines.append("")
    for machine in machines:
        found = broken_moves(machine, rule)
        kinds = {word: sum(done.word == word for *_, done in found) for word in ("refused", "lost")}
        told = ", ".join(f"{count} {word}" for word, count in kinds.items() if count) or "none"
        if found:
            source, target, done = found[0]
            told += f"; such as {source} to {target}, {SPEC_CTRL.describe(done.refused or done.lost)}"
        lines += paragraph(told, f"  {machine.policy.name:<26}", " " * 28)
    return joined(lines)


def costs(found: Costs) -> str:
    """Return what accesses cost, in TSC cycles: median, and between which values nine of ten lie."""
    lines = [f"TSC cycles in the guest, TSC at {found.khz / 1e6:.3f} GHz; median (5 % .. 95 %)"]
    lines += paragraph(
        "every row contains the timing itself; 1 % is of what a write costs above it. A policy in KVM itself would "
        "cost an exit to KVM, one in a VMM an exit to it and its own time: this one is in Python"
    )
    lines.append("")
    for cost in found.bare:
        lines.append(f"  {cost.what:<45}{_number(cost)}")
    if (found.bare[0].median or 0) > 1000:
        lines += paragraph(
            "this KVM emulates the guest's code itself: differences between rows mean something, ratios do not",
            "  ",
            "  ",
        )
    lines.append("")
    for name, write, read in found.policies:
        lines.append(f"  {name:<45}{_number(write)}")
        per_second = switches_for_one_percent(found, write)
        told = f"    RDMSR {_number(read)}"
        if per_second is not None:
            told += f"; 1 % of a CPU at {per_second:,} writes a second"
        lines.append(told)
    return joined(lines)


def _number(cost: Cost) -> str:
    if cost.median is None:
        return "takes #GP"
    return f"{cost.median:,} ({cost.low:,} .. {cost.high:,})"
