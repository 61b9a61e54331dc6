# SPDX-License-Identifier: MIT
"""What the sub-commands of `kvm` do; they return text and leave printing to the command line."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kernel_harness.kvm.cost import measure_costs
from kernel_harness.kvm.host import features
from kernel_harness.kvm.machine import Kvm, ticking
from kernel_harness.kvm.measure import measure_host
from kernel_harness.kvm.migrate import STUDY, STUDY_TO, Moved, move
from kernel_harness.kvm.policed import Judge
from kernel_harness.kvm.runner import Cpuids, run_program
from probe.errors import RequirementMissing
from probe.models import machines
from probe.models.cost import Costs
from probe.models.machine import answers
from probe.models.policy import POLICIES, Policy
from probe.models.profile import parse_profile
from probe.models.program import Answer, format_answer, parse, written


@dataclass(frozen=True)
class Outcome:
    """What there is to print, and whether everything was as expected."""

    text: str
    as_expected: bool
    complaints: tuple[str, ...] = ()


def replay(text: str, model: str = "") -> Outcome:
    """Run a program on this kernel and compare its answers with those it expects, and with a model's if one is named.

    Raise UsageError if the text is no program, RequirementMissing if this KVM cannot run it.
    """
    program, wanted = parse(text)
    machine = machines.get(model) if model else None
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        seen = run_program(kvm, cpuids, program)
        said = answers(machine, program, measure_host(kvm, cpuids, features())) if machine is not None else None
    lines = [f"profile {program.profile}"]
    as_expected = True
    for number, operation in enumerate(program.operations):
        line = f"{operation} -> {format_answer(seen[number])}"
        expected = wanted[number]
        if expected is not None and expected != seen[number]:
            line += f"    wanted {format_answer(expected)}"
            as_expected = False
        model_answer = said[number] if said is not None else None
        if model_answer is not None and model_answer != seen[number]:
            line += f"    {model} says {format_answer(model_answer)}"
            as_expected = False
        lines.append(line)
    return Outcome("\n".join(lines) + "\n", as_expected)


def explore_model(
    model: str,
    *,
    programs: int,
    seconds: float,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Search for a program on which this kernel and a model differ.

    Raise RequirementMissing if hypothesis is not installed, or there is no KVM.
    """
    try:
        from kernel_harness.kvm.explore import explore
    except ImportError as error:
        raise RequirementMissing(f"cannot explore: {error}", "pip install 'spec-ctrl-probe[explore]'") from error
    machine = machines.get(model)
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, features())
        done = explore(
            kvm, cpuids, [machine], host, most=programs, seconds=seconds, seed_number=seed, progress=progress
        )
    head = f"{done.programs} programs in {done.seconds:.1f} s, seed {seed}, model {model}: "
    again = "" if done.steady else " (once, and not again when the same program was run anew)"
    if done.divergence is None:
        return Outcome(f"{head}no divergence\n", True)
    found = done.divergence
    lines = [
        f"{head}the kernel does otherwise{again}",
        "",
        written(found.program, found.kernel, between="\n"),
        "",
        f"# {model} answers {_said(found.model[found.at])} to the last operation",
        f"# {model}: {machine.title}",
        f"# rule: {machine.source}",
    ]
    return Outcome("\n".join(lines) + "\n", False)


@contextlib.contextmanager
def judged(policies: Sequence[Policy]) -> Iterator[tuple[list[Policy], Callable[[], list[str]]]]:
    """Give policies that may raise, loop, or answer nonsense, and what tells afterwards what they did."""
    judges = [Judge(policy) for policy in policies]
    with ticking():
        yield (
            [dataclasses.replace(policy, decide=judge) for policy, judge in zip(policies, judges)],
            lambda: [text for judge in judges for text in complaints_of(judge)],
        )


def complaints_of(judge: Judge) -> list[str]:
    """Return what a policy did that is no decision, a line each."""
    return [f"policy {judge.policy.name} {what}: {count} times" for what, count in judge.complaints.items()]


def policy_costs(policies: Sequence[Policy], progress: Callable[[int, int], None]) -> tuple[Costs, list[str]]:
    """Measure what accesses cost a guest under each policy, on this host; and tell what policies did wrong."""
    with Kvm() as kvm, ticking():
        host = measure_host(kvm, Cpuids(kvm), features())
    judges = [Judge(policy) for policy in policies]
    costs = measure_costs(judges, host, progress)
    return costs, [text for judge in judges for text in complaints_of(judge)]


def migrate_program(
    text: str, *, source: Policy | None, target: Policy | None, profile: str | None, rule: str
) -> Outcome:
    """Move one program's guest, and say what became of it; as expected if it works."""
    program, _ = parse(text)
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, features())
        there = parse_profile(profile) if profile else None
        judges = [Judge(policy) if policy else None for policy in (source, target)]
        moved = move(kvm, cpuids, host, program, source=judges[0], target=judges[1], profile=there, rule=rule)
    lines = [written(program, moved.answers, between="\n"), *_moved_lines(moved)]
    told = tuple(text for judge in judges if judge for text in complaints_of(judge))
    return Outcome("\n".join(lines) + "\n", moved.outcome == "works", told)


def _moved_lines(moved: Moved) -> list[str]:
    return [
        f"# on the source the guest reads {_hex(moved.before)}; sent: {_hex(moved.saved, 'nothing')}",
        f"# on the destination it reads {_hex(moved.after)}: {moved.outcome}"
        if moved.outcome != "refused"
        else "# the destination refuses it",
    ]


def _hex(value: int | None, none: str = "#GP") -> str:
    return none if value is None else f"{value:#x}"


def migrate_study(rule: str) -> Outcome:
    """Move the guest of July 2020, which has set a bit that the rule of then does not know, under every policy.

    To a destination with the same policy, and to one with the rule of 2020. Always as expected: it is a demonstration.
    """
    lines = [f"the guest: {STUDY}", f"restored by the rule of {rule}", ""]
    lines.append(f"{'policy of the source':<26}{'its writes':<12}{'reads':<8}{'to the same':<14}to {STUDY_TO.name}")
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, features())
        for policy in (None, *POLICIES):
            mine, its = (Judge(policy), Judge(policy)) if policy else (None, None)
            same = move(kvm, cpuids, host, STUDY, source=mine, target=its, rule=rule)
            old = move(kvm, cpuids, host, STUDY, source=mine, target=Judge(STUDY_TO), rule=rule)
            name = policy.name if policy else "KVM alone"
            wrote = " ".join(format_answer(answer) for answer in same.answers)
            lines.append(f"{name:<26}{wrote:<12}{_hex(same.before):<8}{same.outcome:<14}{old.outcome}")
    return Outcome("\n".join(lines) + "\n", True)


def _said(answer: Answer | None) -> str:
    return "nothing" if answer is None else format_answer(answer)
