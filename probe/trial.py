# SPDX-License-Identifier: MIT
"""One write and what came of it; the walk over 64 bits of one MSR on many CPUs.

The walk is bit-major: bit n on every CPU, then n+1. Each trial puts the register back before the next one starts,
so that between two trials every register holds what it held before the walk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from probe.errors import Interrupted, NotRestored, ProbeError
from probe.masks import ALL_BITS, bits_of, format_bits, hex64, mask_of
from probe.msr import Failure, MsrAccess
from probe.outcome import Combined, CpuResult, Observation, Outcome, Restored

READ_BACK_TRIES = 3
_LEAVING_TRIES, _LEAVING_SECONDS = 50, 0.02  # how long a CPU may take to go offline
STEADY_READS, MOST_READS = 3, 12  # what a register holds first is what it reads this often in a row


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
    first: int
    saved: int
    gone: bool = False
    left_out: str = ""
    dirty: bool = False
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    cleared: dict[int, Outcome] = field(default_factory=dict)
    combined: Combined | None = None
    pairs_tried: int = 0
    bad_pairs: list[int] = field(default_factory=list)
    inconsistent: int = 0
    moved: int = 0
    base_refused: bool = False


def read_saved(msr: MsrAccess, index: int, cpus: Iterable[int], pin: Pin) -> dict[int, int | Failure]:
    """Read the register on every CPU, before anything is written; Failure.UNSTEADY if it does not hold still.

    One stray sample must not become the value that everything is put back to.
    """
    saved: dict[int, int | Failure] = {}
    for cpu in cpus:
        pin(cpu)
        saved[cpu] = _steady(msr, index, cpu)
    return saved


def _steady(msr: MsrAccess, index: int, cpu: int) -> int | Failure:
    last: int | Failure = msr.read(cpu, index)
    same = 1
    for _ in range(MOST_READS):
        if isinstance(last, Failure) or same == STEADY_READS:
            return last
        now = msr.read(cpu, index)
        same = same + 1 if now == last else 1
        last = now
    return Failure.UNSTEADY


def put_back(
    msr: MsrAccess,
    index: int,
    saved: Mapping[int, int],
    pin: Pin,
    gone: Iterable[int] = (),
    ours: Callable[[int], int] = lambda cpu: ALL_BITS,
) -> list[Restored]:
    """Bring every register to its saved value and prove it by reading; one CPU that fails costs no other.

    ours gives for a CPU the mask of the bits that the probe may have changed; others that differ are left alone, and
    the register counts as LEFT then. A register in which all of ours read right is not written. Each is read on its own
    CPU, as the saved value was: seen from another CPU it may hold what the task that runs there asked for (SSBD,
    STIBP), so where this process may not run nothing is written. gone names CPUs that went offline on the way: the
    kernel sets their register up when they come back, so they are read, never written.
    """
    lost = set(gone)
    proof = []
    for cpu, value in saved.items():
        try:
            proof.append(_put_back_one(msr, index, cpu, value, pin, lost, ours(cpu)))
        except ProbeError as error:
            proof.append(Restored(cpu, value, None, Restored.FAILED, error.message))
    return proof


def _put_back_one(msr: MsrAccess, index: int, cpu: int, value: int, pin: Pin, lost: set[int], ours: int) -> Restored:
    there = pin(cpu)
    reads = msr.read(cpu, index)
    tries = 1
    while reads != value and isinstance(reads, int) and tries < READ_BACK_TRIES:  # one stray sample is no difference
        reads = msr.read(cpu, index)
        tries += 1
    tries = 0
    refused = ""
    while isinstance(reads, int) and (reads ^ value) & ours and there and cpu not in lost and tries < READ_BACK_TRIES:
        if msr.write(cpu, index, reads & ~ours | value & ours) is Failure.REFUSED:
            refused = "the kernel refuses writes now: msr.allow_writes=off, or lockdown"
        reads = msr.read(cpu, index)
        tries += 1
    if reads is Failure.OFFLINE:
        return Restored(
            cpu, value, None, Restored.LEFT, "offline: left to the kernel, which sets CPUs up that come back"
        )
    if isinstance(reads, Failure):
        return Restored(cpu, value, None, Restored.FAILED, f"read-back: {reads.value}")
    if reads == value:
        return Restored(cpu, value, reads, Restored.VERIFIED, "was offline in between" if cpu in lost else "")
    if cpu in lost:
        return Restored(cpu, value, reads, Restored.LEFT, "was offline in between: left to the kernel")
    if (reads ^ value) & ours:
        note = refused if there else "this process may not run on this CPU, so nothing was written"
        return Restored(cpu, value, reads, Restored.FAILED, note)
    other = format_bits(reads ^ value)
    return Restored(cpu, value, reads, Restored.LEFT, f"bits {other} differ and are not ours: left alone")


class Walk:
    """The walk itself, over registers whose saved values are already in the journal.

    intent is called before the first write of each step ("base value", "bit 3", "clear bit 0", "all accepted bits
    together", "pairs from bit 2") with the mask of the bits that the step may change, and must not return before that
    is on disk; rebased likewise, when a register is found to hold something else than at first. stopping is asked
    between two trials. progress gets (done, all).

    The kernel may switch a mitigation on while the walk is under way (a sibling comes online). So each trial first
    reads the register, and where it has changed, what it holds now is what it is put back to from then on.
    """

    def __init__(
        self,
        msr: MsrAccess,
        plan: Plan,
        saved: Mapping[int, int],
        pin: Pin,
        *,
        intent: Callable[[str, int], None] = lambda step, mask: None,
        rebased: Callable[[int, int], None] = lambda cpu, value: None,
        stopping: Callable[[], str] = lambda: "",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._msr = msr
        self._plan = plan
        self._pin = pin
        self._intent = intent
        self._rebased = rebased
        self._stopping = stopping
        self._progress = progress
        self._states = [_CpuState(cpu, saved[cpu], saved[cpu]) for cpu in plan.cpus if cpu in saved]

    @property
    def saved(self) -> dict[int, int]:
        """What every register is to be put back to: what it held at first, or what the kernel has made of it since."""
        return {state.cpu: state.saved for state in self._states}

    def ours(self, cpu: int) -> int:
        """Return the mask of the bits that the walk may have left changed: none where the last trial was undone."""
        return ALL_BITS if any(state.dirty for state in self._states if state.cpu == cpu) else 0

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
        if not plan.base_zero:
            self._step("base value", 0, self._try_base, 0)
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
            if not state.gone and not state.left_out and self._ready(state):
                trial(state, bit)

    def _ready(self, state: _CpuState) -> bool:
        """Be on the CPU, and know what its register holds now."""
        there = self._pin(state.cpu)
        reads = self._msr.read(state.cpu, self._plan.index)
        for _ in range(_LEAVING_TRIES):  # a CPU that goes offline takes no task before it takes no read
            if there or reads is Failure.OFFLINE:
                break
            time.sleep(_LEAVING_SECONDS)
            there = self._pin(state.cpu)
            reads = self._msr.read(state.cpu, self._plan.index)
        tries = 1
        while isinstance(reads, int) and reads != state.saved and tries < STEADY_READS:
            reads = self._msr.read(state.cpu, self._plan.index)
            tries += 1
        if reads is Failure.OFFLINE:
            state.gone = True
        elif not there:
            state.left_out = "this process may not run on this CPU any more"
        elif isinstance(reads, int) and reads != state.saved:
            reads = _steady(self._msr, self._plan.index, state.cpu)
            if isinstance(reads, Failure):
                state.left_out = f"its register could not be read any more ({reads.value})"
            else:
                self._rebased(state.cpu, reads)
                state.moved |= reads ^ state.saved
                state.saved = reads
        elif isinstance(reads, Failure):
            state.left_out = f"its register could not be read any more ({reads.value})"
        return not state.gone and not state.left_out

    def _try_base(self, state: _CpuState, _: int) -> None:
        """Write what the register holds: where that takes #GP, no trial over it says anything about its bit."""
        failure = self._msr.write(state.cpu, self._plan.index, state.saved)
        if failure is Failure.FAULT:
            state.left_out = f"the value that it holds, {hex64(state.saved)}, cannot be written: #GP"
            state.base_refused = True
        elif failure is Failure.OFFLINE:
            state.gone = True
        elif failure is None:
            state.dirty = True
            self._undo(state)

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
        because = "went offline during the walk" if state.gone else state.left_out
        outcomes = {**state.outcomes, **(dict.fromkeys(missing, Outcome.ABSENT) if because else {})}
        return CpuResult(
            cpu=state.cpu,
            saved=state.first,
            observation=Observation.of(outcomes),
            cleared=Observation.of(state.cleared),
            combined=state.combined,
            pairs_tried=state.pairs_tried,
            bad_pairs=tuple(state.bad_pairs),
            absent_because=because if missing else "",
            inconsistent=state.inconsistent,
            moved=state.moved,
            base_refused=state.base_refused,
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
        Failure.UNSTEADY: "its register does not hold still: what it is to be put back to cannot be told",
    }[failure]
    return CpuResult(
        cpu,
        None,
        Observation.of(dict.fromkeys(bits, Outcome.ABSENT)),
        absent_because=because,
        no_register=failure is Failure.FAULT,
    )
