# SPDX-License-Identifier: MIT
"""Searches for programs on which kernel and model differ: hypothesis drives both, and shrinks what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from kernel_harness.kvm import uapi
from kernel_harness.kvm.machine import Kvm
from kernel_harness.kvm.runner import Cpuids, Laboratory, Make, plain
from probe.errors import GuestLost
from probe.models.machine import SPEC_CTRL, Host, Machine, Stepping, answers, first_difference
from probe.models.profile import ALL_FEATURES, NAMED, NONE, Profile
from probe.models.program import IN_GUEST, Answer, Kind, Operation, Program

_VCPUS = 400  # per VM at most: KVM keeps a vCPU until its VM is gone
_VALUES = st.one_of(
    st.just(0),
    st.integers(0, 63).map(lambda bit: 1 << bit),
    st.sampled_from([0x3, 0x5, 0x6, 0x7, 0x80, 0x87, 0x400, 0x5FF, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
_PROFILES = st.one_of(
    st.sampled_from([named.profile for named in NAMED]), st.integers(0, ALL_FEATURES).map(lambda mask: Profile(mask))
)


@dataclass(frozen=True)
class Divergence:
    """The shortest program found on which the kernel does not answer as a model, and where."""

    machine: Machine | Stepping
    program: Program
    kernel: tuple[Answer, ...]
    model: tuple[Answer | None, ...]
    at: int


@dataclass(frozen=True)
class Exploration:
    """How many programs were run, in how many seconds, and what was found.

    steady is False if the kernel did so once and not again when the same program was run anew.
    """

    programs: int
    seconds: float
    divergence: Divergence | None
    steady: bool = True


class _DivergenceFound(Exception):
    def __init__(self, divergence: Divergence) -> None:
        super().__init__(str(divergence.program))
        self.divergence = divergence


def _operations(kinds: Sequence[Kind]) -> st.SearchStrategy[Operation]:
    def one(kind: Kind) -> st.SearchStrategy[Operation]:
        if kind in (Kind.HOST_SET, Kind.GUEST_WR):
            return _VALUES.map(lambda value: Operation(kind, SPEC_CTRL, value))
        if kind in (Kind.HOST_GET, Kind.GUEST_RD):
            return st.just(Operation(kind, SPEC_CTRL))
        if kind is Kind.CPUID:
            return _PROFILES.filter(lambda profile: profile != NONE).map(
                lambda found: Operation(kind, value=found.mask)
            )
        if kind is Kind.DENY:
            return st.integers(1, 3).map(lambda denied: Operation(kind, SPEC_CTRL, denied))
        return st.just(Operation(kind))

    return st.sampled_from(kinds).flatmap(one)


def _in_a_possible_order(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """Leave out KVM_SET_CPUID2 after the first entry: KVM refuses it there."""
    kept: list[Operation] = []
    entered = False
    for operation in operations:
        entered = entered or operation.kind in IN_GUEST or operation.kind is Kind.INIT
        if operation.kind is not Kind.CPUID or not entered:
            kept.append(operation)
    return tuple(kept)


class _Bench:
    """VMs that are used for many programs each."""

    def __init__(self, kvm: Kvm, cpuids: Cpuids, make: Make) -> None:
        self._kvm, self._cpuids, self._make = kvm, cpuids, make
        self._laboratory: Laboratory | None = None
        self._used = 0
        self._room = min(_VCPUS, kvm.check_extension(uapi.KVM_CAP_MAX_VCPUS) or 1)  # 288 in Linux v5.10

    def close(self) -> None:
        if self._laboratory is not None:
            self._laboratory.vm.close()
            self._laboratory = None

    def run(self, program: Program) -> list[Answer]:
        if any(operation.kind is Kind.INIT for operation in program.operations):
            with self._make(self._kvm, self._cpuids, True) as alone:
                return alone.run(program)
        if self._laboratory is None or self._used >= self._room:
            self.close()
            self._laboratory = self._make(self._kvm, self._cpuids, False)
            self._used = 0
        self._used += 1
        return self._laboratory.run(program)


def explore(
    kvm: Kvm,
    cpuids: Cpuids,
    machines: Sequence[Machine | Stepping],
    host: Host,
    *,
    most: int,
    seconds: float,
    seed_number: int,
    steps: int = 12,
    make: Make = plain,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exploration:
    """Run random programs on kernel and models side by side, until one differs, most were run, or the time is up.

    The same seed gives the same programs. What is found is shrunk to the shortest program that differs. It needs
    ticking() around it.
    """
    # INIT is rare: it needs a VM of its own, with the interrupt controller in the kernel.
    kinds = [Kind.HOST_SET, Kind.HOST_GET, Kind.GUEST_WR, Kind.GUEST_RD] * 8 + [Kind.CPUID] * 3 + [Kind.INIT]
    if kvm.check_extension(uapi.KVM_CAP_X86_MSR_FILTER):
        kinds += [Kind.DENY, Kind.ALLOW] * 2
    programs = st.builds(
        Program,
        _PROFILES,
        st.lists(_operations(kinds), min_size=1, max_size=steps).map(_in_a_possible_order),
    )
    bench = _Bench(kvm, cpuids, make)
    began = time.monotonic()
    count = 0
    found: Divergence | None = None
    last: Divergence | None = None
    steady = True

    @seed(seed_number)
    @settings(
        max_examples=most,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(programs)
    def agrees(program: Program) -> None:
        nonlocal count, last
        if last is None and time.monotonic() - began > seconds:
            return
        count += 1
        progress(min(count, most), most)
        kernel = bench.run(program)
        for machine in machines:
            model = answers(machine, program, host)
            at = first_difference(kernel, model)
            if at is not None:
                cut = Program(program.profile, program.operations[: at + 1])
                last = Divergence(machine, cut, tuple(kernel[: at + 1]), tuple(model[: at + 1]), at)
                raise _DivergenceFound(last)

    try:
        agrees()
    except _DivergenceFound as error:
        found = error.divergence
    except Flaky as error:
        if last is None:
            raise GuestLost(f"a program went wrong once and not again: {error}", "run it again") from error
        found, steady = last, False
    finally:
        bench.close()
    return Exploration(count, time.monotonic() - began, found, steady)
