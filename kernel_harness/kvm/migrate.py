# SPDX-License-Identifier: MIT
"""Live migrations between VMs of our own: a guest runs, its register is saved as a VMM saves it, and restored.

The destination has its own policy and guest CPUID; it may be another kernel, which gets the record of the first. What a
VMM sends and restores is a rule of probe.models.migration; probe.models.moving calculates what is done here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernel_harness.kvm import guest_code
from kernel_harness.kvm import host as host_files
from kernel_harness.kvm.guest_code import Step
from kernel_harness.kvm.machine import Kvm, Vcpu, ticking
from kernel_harness.kvm.measure import measure_host
from kernel_harness.kvm.policed import Judge, maker
from kernel_harness.kvm.runner import Cpuids, Laboratory, check_program, needs_irqchip
from kernel_harness.kvm.study import kernel_model, kvm_entry
from probe import kvm_record
from probe import migration_record as mig
from probe.assembly import kernel_entry, machine_entry, tool_entry
from probe.cpuid.machine import read_machine
from probe.errors import UsageError
from probe.host import Host as HostFiles
from probe.journal import now
from probe.models.machine import SPEC_CTRL, Host, Machine
from probe.models.migration import Rule
from probe.models.moving import STUDY_TO, Arrived, Departed, arrive, calculate_arrival, calculate_departure
from probe.models.policy import BY_NAME, Policy, PolicyMachine
from probe.models.profile import parse_profile
from probe.models.program import Answer, Program, format_answer
from probe.models.versions import release_of

_READ = (Step(guest_code.READ, SPEC_CTRL),)


@dataclass(frozen=True)
class Destination:
    """Where guests of a departure go: the policy (None: KVM alone) and the guest's CPUID there ("": the same)."""

    policy: Policy | None = None
    profile: str = ""


@dataclass(frozen=True)
class Leaving:
    """A guest that is to leave: its policy (None: KVM alone), its program, and the answers that the program expects."""

    policy: Policy | None
    program: Program
    expected: Sequence[Answer | None] = ()


def _read(laboratory: Laboratory, vcpu: Vcpu) -> int | None:
    (result,) = laboratory.guest(vcpu, _READ)
    return None if result.faulted else result.value


@dataclass(frozen=True)
class _Arrival:
    """A vCPU of ours where a guest arrives."""

    laboratory: Laboratory
    vcpu: Vcpu

    def put(self, value: int) -> bool:
        return self.laboratory.host_set(self.vcpu, SPEC_CTRL, value)

    def read(self) -> int | None:
        return _read(self.laboratory, self.vcpu)

    def saved(self) -> int | None:
        return self.laboratory.saved_value(self.vcpu)


class Station:
    """This kernel's KVM, where guests leave and arrive; it needs ticking() around it.

    complaints says what policies did that is no decision. over is the model that explains the kernel alone.
    """

    def __init__(self, kvm: Kvm, cpuids: Cpuids, host: Host, over: Machine) -> None:
        self._kvm, self._cpuids, self._host, self._over = kvm, cpuids, host, over
        self.listed = SPEC_CTRL in kvm.get_msr_index_list()
        self.complaints: list[str] = []

    def depart(self, leaving: Leaving) -> tuple[Departed, str]:
        """Run a guest's program and save it; also say what the model says instead, "" if it says the same.

        Raise RequirementMissing or UsageError for a program that cannot run here.
        """
        program = leaving.program
        check_program(self._kvm, program)
        judge = Judge(leaving.policy) if leaving.policy else None
        with maker(judge, self._host)(self._kvm, self._cpuids, needs_irqchip(program)) as here:
            vcpu = here.vcpu(program.profile)
            answers = tuple(here.run_on(vcpu, program.operations))
            reads = _read(here, vcpu)
            departed = Departed(program, answers, reads, here.saved_value(vcpu), self.listed)
        self._complain(judge)
        for number, (mine, wanted) in enumerate(zip(answers, leaving.expected)):
            if wanted is not None and wanted != mine:
                return departed, f"operation {number + 1}: the program expects {format_answer(wanted)}"
        said = calculate_departure(self._model(leaving.policy), program, self._host)
        return departed, _departure_differs(departed, said)

    def arrive(self, departed: Departed, rule: Rule, to: Destination) -> tuple[Arrived, str]:
        """Restore a guest on a VM here; also say what the model says instead, "" if it says the same."""
        profile = parse_profile(to.profile) if to.profile else departed.program.profile
        judge = Judge(to.policy) if to.policy else None
        with maker(judge, self._host)(self._kvm, self._cpuids, False) as there:
            vcpu = there.vcpu(profile)
            arrived = arrive(departed, rule, self.listed, _Arrival(there, vcpu))
        self._complain(judge)
        said = calculate_arrival(departed, self._model(to.policy), rule, self._host, profile, listed=self.listed)
        return arrived, "" if said == arrived else f"{said.outcome}, reads {_hex(said.reads)}, VMM {_hex(said.held)}"

    def _model(self, policy: Policy | None) -> Machine | PolicyMachine:
        """Return the model of kernel and policy; it lives with a policy that raises or loops as the VMM does."""
        return PolicyMachine(dataclasses.replace(policy, decide=Judge(policy)), self._over) if policy else self._over

    def _complain(self, judge: Judge | None) -> None:
        if judge is not None:
            self.complaints += [
                f"policy {judge.policy.name} {what}: {count} times" for what, count in judge.take_complaints().items()
            ]


def _hex(value: int | None) -> str:
    return "#GP" if value is None else f"{value:#x}"


def _departure_differs(seen: Departed, said: Departed) -> str:
    """Say in what a model's departure is another one; where the model does not say there is no difference."""
    for number, (mine, its) in enumerate(zip(seen.answers, said.answers)):
        if its is not None and its != mine:
            return f"operation {number + 1} -> {format_answer(its)}"
    if None in said.answers:
        return ""
    if said.reads != seen.reads:
        return f"reads {_hex(said.reads)}"
    return "" if said.held == seen.held else f"the VMM reads {_hex(said.held)}"


def leave_and_arrive(
    leaving: Sequence[Leaving],
    others: Sequence[mig.DepartureEntry],
    rule: Rule,
    destinations: Callable[[str], Sequence[Destination]],
    *,
    arguments: Sequence[str],
    study: str = "",
    identity: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> mig.MigrationRecord:
    """Let guests leave this kernel, and let these and others, of other kernels' records, arrive on it.

    destinations says where the guest of a policy's name ("": KVM alone) goes. Raise RequirementMissing if there is no
    KVM, or it cannot hand accesses to a policy; ProbeError if no model explains the kernel.
    """
    started, clock = now(), time.monotonic()
    files = HostFiles()
    facts = files.facts()
    cpuid = read_machine(facts.online)
    with Kvm() as kvm, ticking():
        cpuids = Cpuids(kvm)
        host = measure_host(kvm, cpuids, host_files.features(cpuid), ignore_msrs=host_files.ignore_msrs() == "Y")
        entry = kvm_entry(kvm)
    notes = []
    if not (entry.msr_filter and entry.user_space_msr) and study:
        leaving = [one for one in leaving if one.policy is None]
        notes.append("this KVM cannot hand accesses to a policy (Linux v5.10): the study is of KVM alone")
    over = kernel_model(host, entry.backend, release_of(facts.kernel, facts.kernel_version))
    departures: list[mig.DepartureEntry] = []
    arrivals: list[mig.ArrivalEntry] = []
    with Kvm() as kvm, ticking():
        station = Station(kvm, Cpuids(kvm), host, over)
        for one in leaving:
            departed, differs = station.depart(one)
            departures.append(
                mig.departure_entry(departed, facts.kernel, one.policy.name if one.policy else "", differs)
            )
        departures += others
        for number, departure in enumerate(departures):
            progress(number, len(departures))
            for to in destinations(departure.policy):
                if notes and to.policy is not None:
                    continue
                arrived, differs = station.arrive(mig.departed_of(departure), rule, to)
                name = to.policy.name if to.policy else ""
                arrivals.append(mig.arrival_entry(arrived, number, rule.name, name, to.profile, differs))
        progress(len(departures), len(departures))
    return mig.MigrationRecord(
        kind="migration",
        schema_version=f"{mig.SCHEMA_MAJOR}.{mig.SCHEMA_MINOR}",
        tool=tool_entry(arguments),
        started=started,
        duration=round(time.monotonic() - clock, 3),
        machine=machine_entry(facts, cpuid),
        kernel=kernel_entry(facts, files.taint(), []),
        kvm=entry,
        hardware=kvm_record.hardware_entry(host),
        model=over.name,
        departures=departures,
        arrivals=arrivals,
        study=study,
        complaints=station.complaints,
        notes=notes,
        identity=identity,
    )


def study_destinations(policy: str) -> list[Destination]:
    """Return where a guest of the study goes: to the same policy, and to the mask of 2020.

    Raise UsageError for a policy that is not built in.
    """
    if policy and policy not in BY_NAME:
        raise UsageError(f"no policy is called {policy!r}", f"one of: {', '.join(BY_NAME)}")
    same = Destination(BY_NAME[policy] if policy else None)
    return [same, Destination(STUDY_TO)]
