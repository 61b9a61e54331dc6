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
from kernel_harness.kvm.migrate import Destination, Leaving, leave_and_arrive, study_destinations
from kernel_harness.kvm.policed import Judge, maker
from kernel_harness.kvm.runner import Cpuids, run_program
from probe import migration_record as mig
from probe.errors import RequirementMissing, UsageError
from probe.models import machines
from probe.models.cost import Costs
from probe.models.machine import Machine, answers
from probe.models.migration import BY_NAME as RULES
from probe.models.moving import STUDY, STUDY_NAME
from probe.models.policy import POLICIES, Policy, PolicyMachine
from probe.models.program import Answer, format_answer, parse, written


@dataclass(frozen=True)
class Outcome:
    """What there is to print, and whether everything was as expected."""

    text: str
    as_expected: bool
    complaints: tuple[str, ...] = ()


def replay(text: str, model: str = "", policy: Policy | None = None) -> Outcome:
    """Run a program on this kernel and compare its answers with those it expects, and with a model's if one is named.

    With a policy the guest obeys it, and the model is the policy's own, over the one that is named.
    Raise UsageError if the text is no program, RequirementMissing if this KVM cannot run it.
    """
    program, wanted = parse(text)
    machine: Machine | PolicyMachine | None = machines.get(model) if model else None
    judge = Judge(policy) if policy is not None else None
    if policy is not None and machine is not None:
        machine = PolicyMachine(dataclasses.replace(policy, decide=Judge(policy)), machines.get(model))
        model = machine.name
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, features()) if model or policy is not None else None
        seen = run_program(kvm, cpuids, program, maker(judge, host))
        said = answers(machine, program, host) if machine is not None and host is not None else None
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
    told = tuple(complaints_of(judge)) if judge is not None else ()
    return Outcome("\n".join(lines) + "\n", as_expected, told)


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


def migrate(
    text: str | None,
    restore: Sequence[mig.MigrationRecord],
    *,
    source: Policy | None,
    target: Policy | None,
    profile: str,
    rule: str,
    arguments: Sequence[str],
    identity: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> mig.MigrationRecord:
    """Move guests on this kernel: a program's, those of the study (no text), or those of other kernels' records.

    Raise UsageError for a rule, program or combination that is none, and as leave_and_arrive() does.
    """
    if rule not in RULES:
        raise UsageError(f"no rule is called {rule!r}", f"one of: {', '.join(RULES)}")
    if restore and (text is not None or source is not None):
        raise UsageError("--restore takes guests that have left already", "no program, no --from-policy")
    studies = {record.study for record in restore}
    if len(studies) > 1:
        raise UsageError("the records are of different studies", "restore them one after the other")
    others = [entry for record in restore for entry in record.departures if entry.kernel == record.kernel.release]
    if restore and not others:
        raise UsageError("no guest has left the kernels of these records", "kvm migrate --record makes such a record")
    study = STUDY_NAME if text is None and studies in (set(), {STUDY_NAME}) else ""
    if study and (source is not None or target is not None or profile):
        raise UsageError(
            "--from-policy, --to-policy and --to-profile need a program", "kvm migrate FILE --from-policy emulate"
        )
    leaving = []
    if text is not None:
        leaving = [Leaving(source, *parse(text))]
    elif not restore:
        leaving = [Leaving(policy, STUDY) for policy in (None, *POLICIES)]
    to = [Destination(target, profile)]
    return leave_and_arrive(
        leaving,
        others,
        RULES[rule],
        study_destinations if study else lambda policy: to,
        arguments=arguments,
        study=study,
        identity=identity,
        progress=progress,
    )


def _said(answer: Answer | None) -> str:
    return "nothing" if answer is None else format_answer(answer)
