# SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest

from probe.errors import Interrupted, NotRestored
from probe.masks import ALL_BITS
from probe.outcome import CpuResult, Observation, Outcome
from probe.trial import Plan, Walk, put_back, read_saved
from tests.fakes import SPEC_CTRL, FakeMsr, FakeRegister, pin_anywhere


def walk(msr: FakeMsr, **wanted: object) -> list[CpuResult]:
    plan = Plan(index=SPEC_CTRL, cpus=tuple(msr.registers), **wanted)  # type: ignore[arg-type]
    saved = {
        cpu: value
        for cpu, value in read_saved(msr, SPEC_CTRL, plan.cpus, pin_anywhere).items()
        if isinstance(value, int)
    }
    return Walk(msr, plan, saved, pin_anywhere).run()


@pytest.mark.parametrize("valid", [0x7, 0x6, 0x2, 0x5, 0x87, 0x5FF, 0, ALL_BITS])
def test_the_walk_finds_exactly_the_register_that_is_there(valid: int) -> None:
    register = FakeRegister(valid=valid)
    (result,) = walk(FakeMsr({0: register}))
    assert result.observation == Observation(retained=valid, fault=ALL_BITS & ~valid)
    assert register.value == 0


def test_accepted_and_dropped_is_not_retained() -> None:
    (result,) = walk(FakeMsr({0: FakeRegister(valid=0x87, dropped=0x80)}))
    assert result.observation == Observation(retained=0x7, dropped=0x80, fault=ALL_BITS & ~0x87)
    assert result.combined is not None
    assert (result.combined.value, result.combined.expected, result.combined.got) == (0x87, 0x7, 0x7)


def test_a_machine_that_takes_and_drops_everything() -> None:
    (result,) = walk(FakeMsr({0: FakeRegister(dropped=ALL_BITS)}))
    assert result.observation == Observation(dropped=ALL_BITS)


def test_other_bits_that_come_along_are_altered() -> None:
    def stibp_with_ibrs(value: int) -> int:
        return value | 2 if value & 1 else value

    (result,) = walk(FakeMsr({0: FakeRegister(valid=0x7, alters=stibp_with_ibrs)}))
    assert result.observation == Observation(altered=0x1, retained=0x6, fault=ALL_BITS & ~0x7)


def test_a_read_back_that_changes_by_itself_is_unstable_never_dropped() -> None:
    register = FakeRegister(valid=0x7)

    def meddle(cpu: int, kind: str, count: int) -> None:
        # the kernel rewrites the register now and then: once between a write of bit 2 and its read-back
        if kind == "read" and register.value == 0x4 and not meddled:
            meddled.append(count)
            register.value = 0

    meddled: list[int] = []
    (result,) = walk(FakeMsr({0: register}, before=meddle))
    assert meddled
    assert result.observation.unstable == 0x4
    assert result.observation.dropped == 0
    assert result.observation.retained == 0x3


def test_the_base_is_the_value_read_first_and_no_set_bit_is_ever_cleared() -> None:
    register = FakeRegister(value=0x401, valid=0x5FF)
    (result,) = walk(FakeMsr({0: register}))
    assert result.observation.retained == 0x5FF
    assert all(value & 0x401 == 0x401 for value in register.writes)


def test_clear_bits_tries_to_clear_what_is_set_and_nothing_else() -> None:
    register = FakeRegister(value=0x5, valid=0x7)
    (result,) = walk(FakeMsr({0: register}), clear_bits=True)
    assert result.cleared == Observation(retained=0x5)
    assert {0x1, 0x4} <= set(register.writes)
    assert register.value == 0x5


def test_base_zero_writes_each_bit_alone() -> None:
    register = FakeRegister(value=0x1, valid=0x7)
    walk(FakeMsr({0: register}), base_zero=True, bits=(1, 2))
    assert {0x2, 0x4, 0x6} <= set(register.writes)
    assert register.value == 0x1


def test_bit_major_order_over_cpus() -> None:
    order: list[tuple[int, str]] = []
    msr = FakeMsr({0: FakeRegister(valid=0), 1: FakeRegister(valid=0)})
    steps: list[str] = []
    msr.before = lambda cpu, kind, count: order.append((cpu, kind))
    Walk(
        msr,
        Plan(SPEC_CTRL, (0, 1), bits=(0, 1)),
        {0: 0, 1: 0},
        pin_anywhere,
        intent=lambda step, mask: steps.append(step),
    ).run()
    writes = [cpu for cpu, kind in order if kind == "write"]
    assert writes[:4] == [0, 0, 1, 1], "the value that it holds, and the same put back"
    assert writes[4:] == [0, 1, 0, 1]
    assert steps == ["base value", "bit 0", "bit 1", "all accepted bits together"]


def test_intent_comes_before_the_first_write_of_its_bit() -> None:
    log: list[str] = []
    register = FakeRegister(valid=0x1)
    msr = FakeMsr({0: register}, before=lambda cpu, kind, count: log.append(kind))
    Walk(msr, Plan(SPEC_CTRL, (0,), bits=(0,)), {0: 0}, pin_anywhere, intent=lambda step, mask: log.append(step)).run()
    assert log[0] == "base value"
    assert log.count("bit 0") == 1
    trial = log[log.index("bit 0") :]
    assert trial.index("write") > 0


def test_one_cpu_that_differs_has_its_own_result() -> None:
    one, other = walk(FakeMsr({0: FakeRegister(valid=0x7), 1: FakeRegister(valid=0x6)}))
    assert (one.observation.retained, other.observation.retained) == (0x7, 0x6)


def test_a_cpu_that_goes_offline_is_an_outcome() -> None:
    registers = {0: FakeRegister(valid=0x7), 1: FakeRegister(valid=0x7)}

    def unplug(cpu: int, kind: str, count: int) -> None:
        if count == 40:
            registers[1].offline = True

    stays, goes = walk(FakeMsr(registers, before=unplug))
    assert stays.observation.retained == 0x7
    assert goes.observation.absent
    assert goes.observation.tried == ALL_BITS
    assert goes.absent_because == "went offline during the walk"


def test_a_cpu_that_was_offline_in_between_is_read_but_not_written_at_the_end() -> None:
    register = FakeRegister(value=0x1)
    proof = put_back(FakeMsr({3: register}), SPEC_CTRL, {3: 0x5}, pin_anywhere, gone=(3,))
    assert register.writes == []
    assert proof[0].state == "left"
    assert "offline" in proof[0].note


def test_refused_is_not_fault() -> None:
    (result,) = walk(FakeMsr({0: FakeRegister(refuses=True)}))
    assert result.observation == Observation(refused=ALL_BITS)


def test_all_accepted_together_is_tried_and_may_fault() -> None:
    (result,) = walk(FakeMsr({0: FakeRegister(valid=0x7, forbidden=lambda value: value == 0x7)}))
    assert result.combined is not None
    assert result.combined.outcome is Outcome.FAULT
    assert result.observation.retained == 0x7


def test_pairs() -> None:
    (result,) = walk(FakeMsr({0: FakeRegister(valid=0xF, forbidden=lambda value: value & 0x5 == 0x5)}), pairs=True)
    assert result.pairs_tried == 6
    assert result.bad_pairs == (0x5,)


def test_repeat_finds_a_moody_bit_inconsistent_and_does_not_call_it_accepted() -> None:
    register = FakeRegister(valid=0x3)
    seen = []

    def mood(cpu: int, kind: str, count: int) -> None:
        if kind == "write":
            seen.append(count)
            register.valid = 0x3 if len(seen) < 12 else 0x1

    (result,) = walk(FakeMsr({0: register}, before=mood), bits=(0, 1), repeat=6)
    assert result.observation.retained == 0x1
    assert result.observation.fault == result.inconsistent == 0x2


def test_a_bit_that_cannot_be_put_back_stops_everything_at_once() -> None:
    register = FakeRegister(valid=0xF, sticky=0x2)
    plan = Plan(SPEC_CTRL, (0,))
    going = Walk(FakeMsr({0: register}), plan, {0: 0}, pin_anywhere)
    with pytest.raises(NotRestored, match="wanted 0x0000000000000000, reads 0x0000000000000002"):
        going.run()
    assert not any(value & 0xC for value in register.writes), "nothing more may be tried"
    assert going.results()[0].observation.retained == 0x3
    (proof,) = put_back(FakeMsr({0: register}), SPEC_CTRL, {0: 0}, pin_anywhere)
    assert proof.failed
    assert proof.reads == 0x2


def test_stop_comes_between_two_writes_with_the_register_at_its_old_value() -> None:
    register = FakeRegister(value=0x1, valid=0x7)
    asked = []

    def stopping() -> str:
        asked.append(register.value)
        return "SIGINT" if len(asked) == 3 else ""

    with pytest.raises(Interrupted, match="SIGINT before bit 1 on CPU 0"):
        Walk(FakeMsr({0: register}), Plan(SPEC_CTRL, (0,)), {0: 1}, pin_anywhere, stopping=stopping).run()
    assert asked == [1, 1, 1]
    assert register.value == 1


def test_without_a_meaningful_read_back_the_write_alone_decides() -> None:
    # legacy IBRS: the kernel's value is what one always reads
    register = FakeRegister(value=0x1, valid=0x7, alters=lambda value: 0x1)
    (result,) = walk(FakeMsr({0: register}), readback=False)
    assert result.observation == Observation(unstable=0x7, fault=ALL_BITS & ~0x7)


def test_put_back_writes_only_what_is_wrong_and_proves_it() -> None:
    right, wrong, gone = FakeRegister(value=0x1), FakeRegister(value=0x3), FakeRegister(offline=True)
    proof = put_back(FakeMsr({0: right, 1: wrong, 2: gone}), SPEC_CTRL, {0: 0x1, 1: 0x1, 2: 0x1}, pin_anywhere)
    assert right.writes == []
    assert wrong.writes == [0x1]
    assert [item.state for item in proof] == ["verified", "verified", "left"]


def test_a_register_that_cannot_be_read_at_the_end_is_not_verified() -> None:
    (proof,) = put_back(FakeMsr({0: FakeRegister(absent=True)}), SPEC_CTRL, {0: 0}, pin_anywhere)
    assert proof.failed
    assert proof.reads is None
