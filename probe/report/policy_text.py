# SPDX-License-Identifier: MIT
"""Policies as plain text of at most 75 columns: the catalogue, two compared, what they break and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from probe.models.cost import Cost, Costs, Row, switches_for_one_percent
from probe.models.difference import POLICY_HOSTS, Difference, Writes, differing_writes
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


def writes(one: PolicyMachine, other: PolicyMachine) -> list[str]:
    """Return, for the named CPUs, the writes on which their guests see a difference; CPUs with the same ones share."""
    groups: dict[tuple[Writes, ...], list[str]] = {}
    for cpu in cpus():
        groups.setdefault(tuple(differing_writes(one, other, cpu)), []).append(cpu.name)
    lines = []
    for found, names in groups.items():
        if found:
            lines += paragraph(", ".join(names), "  ", "  ")
        for case in found:
            when = "first" if case.after is None else f"after {case.after:#x}"
            what = [f"bits {SPEC_CTRL.brief(case.bits)}"] if case.bits else []
            what += [f"{value:#x}" for value in case.values]
            lines += paragraph(
                f"{when}: {', '.join(what)}: {case.one} under {one.policy.name}, {case.other} under "
                f"{other.policy.name}",
                "    ",
                "      ",
            )
    return lines


def compared(
    one: Policy, other: Policy, over: Machine, found: Difference | None, values: Sequence[str], differ: Sequence[str]
) -> str:
    """Return where two policies differ: the smallest case, what guests of named CPUs see, as writes() says, and the
    guests that live under one only, as fates() says."""
    lines = [*paragraph(f"{one.name}: {one.title}"), *paragraph(f"{other.name}: {other.title}")]
    lines += paragraph(f"calculated, both over {over.name}: {over.title}")
    lines.append("")
    if found is None:
        lines += paragraph(
            f"no difference in any one or two accesses, of 0, each defined bit, bits 9 and 63, 0x3, 0x5, 0x6, 0x7, "
            f"0x87, on any named CPUID or single bit of one, on {len(POLICY_HOSTS)} kinds of host, nor of the guests "
            f"of {len(cpus())} named CPUs"
        )
    else:
        lines += paragraph(f"the smallest case, on {found.host}:")
        lines += paragraph(written(found.program, [a for a in found.one[:-1] if a is not None]), "  ", "  ")
        for policy, said in ((one, found.one), (other, found.other)):
            last = said[-1]
            lines.append(f"  {policy.name:<26}{'nothing' if last is None else format_answer(last)}")
    lines += [
        "",
        *paragraph("writes that guests of named CPUs, with the CPUID that KVM offers there, see answered otherwise:"),
    ]
    lines += values or ["  none"]
    return joined([*lines, "", "guests that take #GP under one and not under the other:", *(differ or ["  none"])])


_ASKED = {0: "none", DENY_WRITE: "writes", DENY_READ | DENY_WRITE: "all"}


def summary(machines: Sequence[PolicyMachine], rule: Rule, found: Costs | None) -> str:
    """Return one line for each policy: guests that break, moves that break, what each access costs.

    found is what was measured, None if nothing was.
    """
    heads = [f"{'':<24}{'guests:':>8}{'bits':>7}{'moves:':>8}{'':>5}  {'come':<6}"]
    heads.append(f"{'policy':<24}{'take #GP':>8}{'forgot':>7}{'refused':>8}{'lost':>5}  {'to VMM':<6}")
    if found is not None:
        heads[0] += f"{'WRMSR,':>7}{'1 % at':>8}"
        heads[1] += f"{'cycles':>7}{'/ s':>8}"
    lines = [head.rstrip() for head in heads]
    for machine in machines:
        dead = sum(breaks(machine, cpu, system) is not None for cpu in cpus() for system in SYSTEMS)
        words = [done.word for *_, done in broken_moves(machine, rule)]
        forgetful = sum(forgets(machine, cpu) != 0 for cpu in cpus())
        line = f"{machine.policy.name[:24]:<24}{dead:>8}{forgetful:>7}"
        line += f"{words.count('refused'):>8}{words.count('lost'):>5}"
        line += f"  {_ASKED[machine.asked_for(STUDY_CPU.guest, STUDY_CPU.host)]:<6}"
        if found is not None:
            line += "".join(_cells(found, row) for row in found.policies if row.name == machine.policy.name)
        lines.append(line.rstrip())
    return joined([*lines, "", *_legend(rule, found)])


def _cells(found: Costs, row: Row) -> str:
    """Return the two columns of a policy's cost; of one that took no bit nothing is told: it would be another's."""
    if not row.took:
        return f"{'-':>7}{'-':>8}"
    if row.write.median is None:
        return f"{'#GP':>7}{'-':>8}"
    per_second = None if row.let_through else switches_for_one_percent(found, row.write)
    return f"{row.write.median:>7,}{'-' if per_second is None else format(per_second, ','):>8}"


def _legend(rule: Rule, found: Costs | None) -> list[str]:
    each = len(cpus())
    lines = paragraph(
        f"guests: of {each * len(SYSTEMS)}, {len(SYSTEMS)} systems on {each} named CPUs (one of them, psfd-only, is a "
        "guest's CPUID that no CPU is known to have). forgot: on how many of these a write of a bit that the guest's "
        f"CPUID enumerates succeeds and does nothing. moves: of {each * (each - 1)} between these CPUs, by the rule of "
        f"{rule.name}. to VMM: the accesses of a guest that has set a bit that still come to it, an exit each; KVM "
        "answers the others, or nobody needs to."
    )
    if found is not None:
        lines += paragraph(
            "WRMSR: the guest's, the timing itself with it. 1 %: at how many context switches a second that write the "
            "register once it costs 1 % of a CPU more than a write that KVM lets through; -: it is one, or no dearer"
        )
    if found is not None and not all(row.took for row in found.policies):
        lines += paragraph("a policy with - in both columns took no bit on this machine: its cost was not seen")
    return lines


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
        "every row contains the timing itself. 1 %: at how many context switches a second that costs 1 % of a CPU, if "
        "each does this once instead of the WRMSR of a guest that KVM has let through. A policy in KVM itself would "
        "cost an exit to KVM, one in a VMM an exit to it and its own time: this one is in Python"
    )
    if found.lent:
        lines += paragraph(
            f"KVM offers no guest this register here: policies are told that the host has {found.lent}, too"
        )
    lines.append("")
    for cost in found.bare:
        lines.append(f"  {cost.what:<45}{_number(cost)}")
        if cost is not found.bare[0]:
            lines.append(f"    {_one_percent(found, cost)}")
    if (found.bare[0].median or 0) > 1000:
        lines += paragraph(
            "this KVM emulates the guest's code itself: differences between rows mean something, ratios do not",
            "  ",
            "  ",
        )
    lines.append("")
    lines += [line for row in found.alone for line in _both(row, row.name)]
    lines.append("")
    for row in found.policies:
        if not row.took:
            name = f"{row.name}, which took no bit here"
        else:
            name = f"{row.name}: let through" if row.let_through else row.name
        lines += _both(row, name)
        if not row.let_through:
            lines.append(f"    {_one_percent(found, row.write)}")
    return joined(lines)


def _both(row: Row, name: str) -> list[str]:
    return [f"  {name:<45}{_number(row.write)}", f"    RDMSR {_number(row.read)}"]


def _one_percent(found: Costs, cost: Cost) -> str:
    """Say at how many of these a second 1 % of a CPU is gone, or why that cannot be told."""
    if found.through is None:
        return "1 %: cannot be told, KVM lets no guest through here"
    per_second = switches_for_one_percent(found, cost)
    if per_second is not None:
        return f"1 % of a CPU at {per_second:,} a second"
    return "1 %: cannot be told, " + (
        "it takes #GP" if cost.median is None else "no dearer than a write that is let through"
    )


def _number(cost: Cost) -> str:
    if cost.median is None:
        return "takes #GP"
    return f"{cost.median:,} ({cost.low:,} .. {cost.high:,})"
