# SPDX-License-Identifier: MIT
"""One write and what came of it; the walk over 64 bits of one MSR on many CPUs.

The walk is bit-major: bit n on every CPU, then n+1. Each trial puts the register back before the next one starts,
so that between two trials every register holds what it held before the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from probe.errors import Interrupted, NotRestored, ProbeError
from probe.masks import ALL_BITS, bits_of, format_bits, hex64, mask_of
from probe.msr import Failure, MsrAccess
from probe.outcome import Combined, CpuResult, Observation, Outcome, Restored

READ_BACK_TRIES = 3


class Pin(Protocol):
    """Move this process to one CPU, so that nothing runs there between a write and its read-back."""

    def __call__(self, cpu: int) -> bool:
        """Return False if the process may not run on that CPU, or the CPU is offline."""
        ...


@dataclass
class Plan:
    """What to try.

    bits: numbers 0..63. base_zero: try 1<<n alone, not saved | 1<<n. clear_bits: also try to clear the bits that
    are set. readback: False where the kernel rewrites the register on every entry (legacy IBRS), so that accepted
    is judged by the write alone.
    """

    index: int
    cpus: Sequence[int]
    bits: Sequence[int] = tuple(range(64))
    base_zero: bool = False
    clear_bits: bool = False
    pairs: bool = False
    repeat: int = 1
    readback: bool = True


@dataclass
class _CpuState:
    cpu: int
    saved: int
    gone: bool = False
    dirty: bool = False
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    cleared: dict[int, Outcome] = field(default_factory=dict)
    combined: Combined | None = None
    pairs_tried: int = 0
    bad_pairs: list[int] = field(default_factory=list)
    inconsistent: int = 0


def read_saved(msr: MsrAccess, index: int, cpus: Iterable[int], pin: Pin) -> dict[int, int | Failure]:
    """Read the register on every CPU, before anything is written."""
    saved: dict[int, int | Failure] = {}
    for cpu in cpus:
        pin(cpu)
        saved[cpu] = msr.read(cpu, index)
    return saved


def put_back(
    msr: MsrAccess,
    index: int,
    saved: Mapping[int, int],
    pin: Pin,
    gone: Iterable[int] = (),
    ours: int = ALL_BITS,
) -> list[Restored]:
    """Bring every register to its saved value and prove it by reading; one CPU that fails costs no other.

    ours masks the bits that the probe may have changed; others that differ are left to who changed them, and noted. A
    register in which all of ours read right is not written. Each is read on its own CPU, as the saved value was: seen
    from another CPU it may hold what the task that runs there asked for (SSBD, STIBP), so where this process may not
    run nothing is written. gone names CPUs that went offline on the way: the kernel sets their register up when they
    come back, so they are read, never written.
    """
    lost = set(gone)
    proof = []
    for cpu, value in saved.items():
        try:
            proof.append(_put_back_one(msr, index, cpu, value, pin, lost, ours))
        except ProbeError as error:
            proof.append(Restored(cpu, value, None, Restored.FAILED, error.message))
    return proof


def _put_back_one(msr: MsrAccess, index: int, cpu: int, value: int, pin: Pin, lost: set[int], ours: int) -> Restored:
    there = pin(cpu)
    reads = msr.read(cpu, index)
    tries = 0
    while isinstance(reads, int) and (reads ^ value) & ours and there and cpu not in lost and tries < READ_BACK_TRIES:
        msr.write(cpu, index, reads & ~ours | value & ours)
        reads = msr.read(cpu, index)
        tries += 1
    if reads is Failure.OFFLINE:
        return Restored(cpu, value, None, Restored.LEFT, "offline: the kernel sets it up when it comes back")
    if isinstance(reads, Failure):
        return Restored(cpu, value, None, Restored.FAILED, f"read-back: {reads.value}")
    if reads == value:
        return Restored(cpu, value, reads, Restored.VERIFIED, "was offline in between" if cpu in lost else "")
    if cpu in lost:
        return Restored(cpu, value, reads, Restored.LEFT, "was offline in between: the kernel has set it up anew")
    if (reads ^ value) & ours:
        note = "" if there else "this process may not run on this CPU, so nothing was written"
        return Restored(cpu, value, reads, Restored.FAILED, note)
    return Restored(cpu, value, reads, Restored.VERIFIED, f"bits {format_bits(reads ^ value)} were changed by others")


class Walk:
    """The walk itself, over registers whose saved values are already in the journal.

    intent is called before the first write of each step ("bit 3", "clear bit 0", "all accepted bits together",
    "pairs from bit 2") with the mask of the bits that the step may change, and must not return before that is on
    disk. stopping is asked between two trials. progress gets (done, all).
    """

    def __init__(
        self,
        msr: MsrAccess,
        plan: Plan,
        saved: Mapping[int, int],
        pin: Pin,
        *,
        intent: Callable[[str, int], None] = lambda step, mask: None,
        stopping: Callable[[], str] = lambda: "",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._msr = msr
        self._plan = plan
        self._pin = pin
        self._intent = intent
        self._stopping = stopping
        self._progress = progress
        self._states = [_CpuState(cpu, saved[cpu]) for cpu in plan.cpus if cpu in saved]

    @property
    def gone(self) -> tuple[int, ...]:
        """CPUs that went offline in the middle."""
        return tuple(state.cpu for state in self._states if state.gone)

    def run(self) -> list[CpuResult]:
        """Walk and return one result per CPU.

        Raise Interrupted between two trials if stopping() gives a reason, NotRestored as soon as one register cannot
        be put back (nothing more is tried then); in both cases the caller still has to put_back() and prove it.
        """
        plan = self._plan
        steps = len(plan.bits) * plan.repeat
        tried = ALL_BITS if plan.base_zero else mask_of(plan.bits)
        done = 0
        for _ in range(plan.repeat):
            for bit in plan.bits:
                self._step(f"bit {bit}", 1 << bit, self._try_bit, bit)
                done += 1
                self._progress(done, steps)
        if plan.clear_bits:
            set_somewhere = 0
            for state in self._states:
                set_somewhere |= state.saved
            for bit in bits_of(set_somewhere):
                if bit in plan.bits:
                    self._step(f"clear bit {bit}", 1 << bit, self._try_clear, bit)
        self._step("all accepted bits together", tried, self._try_combined, 0)
        if plan.pairs:
            for bit in plan.bits:
                self._step(f"pairs from bit {bit}", tried, self._try_pairs, bit)
        return [self._result(state) for state in self._states]

    def _step(self, name: str, mask: int, trial: Callable[[_CpuState, int], None], bit: int) -> None:
        self._intent(name, ALL_BITS if self._plan.base_zero else mask)
        for state in self._states:
            reason = self._stopping()
            if reason:
                raise Interrupted(f"{reason} before {name} on CPU {state.cpu}")
            if state.gone:
                continue
            if not self._pin(state.cpu):  # offline, or taken from this process's cpuset; its register is as it was
                state.gone = True
                continue
            trial(state, bit)

    def _base(self, state: _CpuState) -> int:
        return 0 if self._plan.base_zero else state.saved

    def _try_bit(self, state: _CpuState, bit: int) -> None:
        outcome, _ = self._attempt(state, self._base(state) | 1 << bit, 1 << bit)
        before = state.outcomes.get(bit)
        state.outcomes[bit] = outcome if before in (None, outcome) else self._reconciled(state, bit, before, outcome)
        self._undo(state)

    @staticmethod
    def _reconciled(state: _CpuState, bit: int, before: Outcome | None, now: Outcome) -> Outcome:
        """Return what two walks that disagree on a bit amount to."""
        assert before is not None
        if now in (Outcome.ABSENT, Outcome.REFUSED):
            return before
        if before in (Outcome.ABSENT, Outcome.REFUSED):
            return now
        if Outcome.FAULT in (before, now):
            state.inconsistent |= 1 << bit
            return Outcome.FAULT
        return Outcome.UNSTABLE

    def _try_clear(self, state: _CpuState, bit: int) -> None:
        if state.saved >> bit & 1:
            state.cleared[bit], _ = self._attempt(state, state.saved & ~(1 << bit), 1 << bit)
            self._undo(state)

    def _try_combined(self, state: _CpuState, _: int) -> None:
        seen = Observation.of(state.outcomes)
        if not seen.accepted:
            return
        value = self._base(state) | seen.accepted
        outcome, got = self._attempt(state, value, seen.accepted)
        state.combined = Combined(value, value & ~seen.dropped, outcome, got)
        self._undo(state)

    def _try_pairs(self, state: _CpuState, first: int) -> None:
        accepted = Observation.of(state.outcomes).accepted
        if not accepted >> first & 1:
            return
        for second in bits_of(accepted & ~((2 << first) - 1)):
            pair = 1 << first | 1 << second
            outcome, _ = self._attempt(state, self._base(state) | pair, pair)
            state.pairs_tried += 1
            if outcome is Outcome.FAULT:
                state.bad_pairs.append(pair)
            self._undo(state)
            if state.gone:
                return

    def _attempt(self, state: _CpuState, value: int, changed: int) -> tuple[Outcome, int | None]:
        """Write one value and read it back; return the outcome and what was read. The caller has to _undo()."""
        failure = self._msr.write(state.cpu, self._plan.index, value)
        if failure is not None:
            return self._not_written(state, failure), None
        state.dirty = True
        got = self._msr.read(state.cpu, self._plan.index)
        if not self._plan.readback:
            outcome = Outcome.UNSTABLE
        elif got == value:
            outcome = Outcome.RETAINED
        else:
            outcome = self._judge_other(state, value, changed, got)
        return outcome, None if isinstance(got, Failure) else got

    def _not_written(self, state: _CpuState, failure: Failure) -> Outcome:
        if failure is Failure.OFFLINE:
            state.gone = True
            return Outcome.ABSENT
        return Outcome.FAULT if failure is Failure.FAULT else Outcome.REFUSED

    def _judge_other(self, state: _CpuState, value: int, changed: int, got: int | Failure) -> Outcome:
        """Tell dropped and altered, which repeat, from unstable, which does not."""
        if got is Failure.OFFLINE:
            state.gone = True
            return Outcome.ABSENT
        for _ in range(READ_BACK_TRIES - 1):
            again = self._msr.write(state.cpu, self._plan.index, value)
            if again is Failure.OFFLINE:
                state.gone = True
                return Outcome.ABSENT
            if again is not None or self._msr.read(state.cpu, self._plan.index) != got:
                return Outcome.UNSTABLE
        if isinstance(got, Failure):
            return Outcome.ALTERED
        base = self._base(state)
        lost = value & ~base & changed if value != base else 0
        return Outcome.DROPPED if lost and got == value & ~lost else Outcome.ALTERED

    def _undo(self, state: _CpuState) -> None:
        """Write the saved value and read it back, if anything was written since the last time."""
        if not state.dirty:
            return
        msr, index, cpu, saved = self._msr, self._plan.index, state.cpu, state.saved
        reads: int | Failure = Failure.FAULT
        for _ in range(READ_BACK_TRIES):
            failure = msr.write(cpu, index, saved)
            reads = failure if failure is not None else msr.read(cpu, index)
            if reads == saved or reads is Failure.OFFLINE:
                state.gone = state.gone or reads is Failure.OFFLINE
                state.dirty = False
                return
        held = reads.value if isinstance(reads, Failure) else hex64(reads)
        raise NotRestored(f"MSR {index:#x} on CPU {cpu} cannot be put back: wanted {hex64(saved)}, reads {held}")

    def _result(self, state: _CpuState) -> CpuResult:
        missing = [bit for bit in self._plan.bits if bit not in state.outcomes]
        if state.gone:
            state.outcomes.update(dict.fromkeys(missing, Outcome.ABSENT))
        return CpuResult(
            cpu=state.cpu,
            saved=state.saved,
            observation=Observation.of(state.outcomes),
            cleared=Observation.of(state.cleared),
            combined=state.combined,
            pairs_tried=state.pairs_tried,
            bad_pairs=tuple(state.bad_pairs),
            absent_because="went offline during the walk" if state.gone else "",
            inconsistent=state.inconsistent,
        )

    def results(self) -> list[CpuResult]:
        """Return what is known so far, also after run() has raised."""
        return [self._result(state) for state in self._states]


def not_walked(cpu: int, failure: Failure, bits: Sequence[int]) -> CpuResult:
    """Return the result of a CPU whose register could not be read: nothing was written there."""
    because = {
        Failure.FAULT: "RDMSR took #GP: no such register",
        Failure.OFFLINE: "CPU is offline",
        Failure.REFUSED: "the kernel refused the read",
    }[failure]
    return CpuResult(
        cpu,
        None,
        Observation.of(dict.fromkeys(bits, Outcome.ABSENT)),
        absent_because=because,
        no_register=failure is Failure.FAULT,
    )
