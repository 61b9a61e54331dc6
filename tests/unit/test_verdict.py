# SPDX-License-Identifier: MIT
from __future__ import annotations

import itertools

import pytest

from probe.cpuid.snapshot import Snapshot
from probe.masks import ALL_BITS
from probe.models.prediction import Effect, Prediction, Reason
from probe.outcome import Combined, CpuResult, Observation, Outcome, Restored
from probe.verdict import (
    KINDS,
    Finding,
    Verdict,
    compare,
    findings_of_restore,
    findings_of_verdict,
    findings_of_walk,
    in_order,
    merge_cpus,
)
from tests.fakes_machine import small_cpu

METAL = small_cpu()
GUEST = small_cpu(hypervisor="KVMKVMKVM")


def predict(accepts: int = 0, faults: int = 0, *, exists: bool = True, reads_back: bool = True) -> Prediction:
    masks = {Effect.ACCEPTS: accepts, Effect.FAULTS: faults, Effect.EITHER: ALL_BITS & ~(accepts | faults)}
    reasons = tuple(Reason(mask, effect, "because", "source") for effect, mask in masks.items() if mask)
    return Prediction("vendor", exists=exists, reasons=reasons, reads_back=reads_back)


# Every prediction times every outcome of one bit. None: not tried.
TABLE = {
    (Effect.ACCEPTS, Outcome.RETAINED): "as_predicted",
    (Effect.ACCEPTS, Outcome.DROPPED): "not_retained",
    (Effect.ACCEPTS, Outcome.ALTERED): "not_retained",
    (Effect.ACCEPTS, Outcome.FAULT): "unexpected_fault",
    (Effect.ACCEPTS, Outcome.REFUSED): "not_measured",
    (Effect.ACCEPTS, Outcome.UNSTABLE): "as_predicted",
    (Effect.ACCEPTS, Outcome.ABSENT): "not_measured",
    (Effect.ACCEPTS, None): "not_measured",
    (Effect.FAULTS, Outcome.RETAINED): "unexpected_accept",
    (Effect.FAULTS, Outcome.DROPPED): "unexpected_accept",
    (Effect.FAULTS, Outcome.ALTERED): "unexpected_accept",
    (Effect.FAULTS, Outcome.FAULT): "as_predicted",
    (Effect.FAULTS, Outcome.REFUSED): "not_measured",
    (Effect.FAULTS, Outcome.UNSTABLE): "unexpected_accept",
    (Effect.FAULTS, Outcome.ABSENT): "not_measured",
    (Effect.FAULTS, None): "not_measured",
    (Effect.EITHER, Outcome.RETAINED): "as_predicted",
    (Effect.EITHER, Outcome.DROPPED): "as_predicted",
    (Effect.EITHER, Outcome.ALTERED): "as_predicted",
    (Effect.EITHER, Outcome.FAULT): "as_predicted",
    (Effect.EITHER, Outcome.REFUSED): "not_measured",
    (Effect.EITHER, Outcome.UNSTABLE): "as_predicted",
    (Effect.EITHER, Outcome.ABSENT): "not_measured",
    (Effect.EITHER, None): "not_measured",
}
# A register that is not there takes #GP on everything: what is absent because of that did fault.
NO_REGISTER = {Effect.ACCEPTS: "unexpected_fault", Effect.FAULTS: "as_predicted", Effect.EITHER: "as_predicted"}


def word_of(verdict: Verdict, bit: int) -> str:
    (word,) = (name for name, mask in vars(verdict).items() if mask >> bit & 1)
    return str(word)


def one_bit(effect: Effect, bit: int) -> Prediction:
    masks = {effect: 1 << bit}
    return predict(masks.get(Effect.ACCEPTS, 0), masks.get(Effect.FAULTS, 0))


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(itertools.product(Effect, [*Outcome, None]))


@pytest.mark.parametrize("bit", [0, 63])
@pytest.mark.parametrize(("effect", "outcome"), TABLE, ids=str)
def test_prediction_times_outcome(effect: Effect, outcome: Outcome | None, bit: int) -> None:
    seen = Observation() if outcome is None else Observation.of({bit: outcome})
    verdict = compare(one_bit(effect, bit), seen)
    assert word_of(verdict, bit) == TABLE[effect, outcome]


@pytest.mark.parametrize("effect", Effect)
def test_a_register_that_is_not_there_faults_on_every_bit(effect: Effect) -> None:
    verdict = compare(one_bit(effect, 5), Observation(absent=ALL_BITS), no_register=True)
    assert word_of(verdict, 5) == NO_REGISTER[effect]
    assert verdict.not_measured == 0


def test_a_model_that_judges_faults_only_does_not_ask_for_read_back() -> None:
    seen = Observation(dropped=0x7, fault=ALL_BITS & ~0x7)
    verdict = compare(predict(accepts=0x7, faults=ALL_BITS & ~0x7, reads_back=False), seen)
    assert verdict == Verdict(as_predicted=ALL_BITS)
    assert verdict.findings == 0


def test_verdicts_are_disjoint_and_cover_all_64_bits() -> None:
    seen = Observation(
        retained=0x11, dropped=0x22, altered=0x44, fault=0x88, refused=0x300, unstable=0xC00, absent=1 << 63
    )
    verdict = compare(predict(accepts=0x0F0, faults=0xF0F), seen)
    masks = list(vars(verdict).values())
    assert sum(masks) == ALL_BITS
    assert all(not a & b for a, b in itertools.combinations(masks, 2))
    assert verdict.findings == verdict.unexpected_fault | verdict.unexpected_accept | verdict.not_retained
    assert verdict == Verdict(
        unexpected_fault=0x80,
        unexpected_accept=0xC07,
        not_retained=0x60,
        as_predicted=0x18,
        not_measured=ALL_BITS & ~0xCFF,
    )


# --- findings ---


def findings(
    prediction: Prediction, seen: Observation, cpu: Snapshot = METAL, *, recorded: bool = False, **more: bool
) -> list[Finding]:
    verdict = compare(prediction, seen, **more)
    return findings_of_verdict(
        [0, 1, 2, 8], "vendor", verdict, seen, hypervisor=cpu.under_hypervisor, recorded=recorded
    )


def test_a_fault_names_its_bits_and_cpus() -> None:
    (found,) = findings(predict(accepts=0x3, faults=ALL_BITS & ~0x3), Observation(retained=1, fault=ALL_BITS & ~1))
    assert (found.kind, found.cpus, found.mask) == ("unexpected_fault", "0-2,8", 0x2)
    assert found.text == "bit 1 (STIBP): enumerated, but the write takes #GP"


def test_under_a_hypervisor_the_fault_is_the_hypervisors() -> None:
    seen = Observation(fault=ALL_BITS)
    (found,) = findings(predict(accepts=0x6, faults=ALL_BITS & ~0x6), seen, GUEST)
    assert found.text.startswith("bits 1-2 (STIBP, SSBD): enumerated, but the write takes #GP; the hypervisor offers")


def test_a_recorded_cpuid_is_not_called_this_machines() -> None:
    seen = Observation(fault=ALL_BITS)
    (found,) = findings(predict(accepts=0x2, faults=ALL_BITS & ~0x2), seen, GUEST, recorded=True)
    assert "the CPUID that was given enumerates" in found.text
    assert "hypervisor" not in found.text


def test_a_bit_that_faults_in_one_walk_only() -> None:
    (found,) = findings_of_walk(result(inconsistent=0x4), ())
    assert (found.kind, found.mask) == ("inconsistent", 0x4)


def test_an_enumerated_register_that_is_not_there() -> None:
    seen = Observation(absent=ALL_BITS)
    (found,) = findings(predict(accepts=0x1, faults=ALL_BITS & ~1), seen, no_register=True)
    assert found.text == "bit 0 (IBRS): the register is enumerated but RDMSR takes #GP"


@pytest.mark.parametrize(
    ("seen", "how"),
    [
        (Observation(retained=0x80), "the register takes and keeps bits that CPUID does not enumerate"),
        (Observation(dropped=0x80), "the write does not fault and the bits read 0: it is ignored"),
        (Observation(altered=0x80), "the write does not fault, something else reads back, or nothing"),
        (Observation(unstable=0x80), "the write does not fault; read-back is not steady, or means nothing"),
    ],
)
def test_an_accept_says_how(seen: Observation, how: str) -> None:
    (found,) = findings(predict(faults=ALL_BITS), seen)
    assert (found.kind, found.mask) == ("unexpected_accept", 0x80)
    assert found.text == f"bit 7 (PSFD): model vendor says #GP; {how}"


def test_what_is_accepted_in_four_ways_is_four_findings() -> None:
    found = findings(predict(faults=ALL_BITS), Observation(retained=1, dropped=2, altered=4, unstable=8))
    assert sorted(one.mask for one in found) == [1, 2, 4, 8]
    assert {one.kind for one in found} == {"unexpected_accept"}


def test_a_hypervisor_may_pass_the_register_through() -> None:
    (found,) = findings(predict(faults=ALL_BITS), Observation(retained=1), GUEST)
    assert "a hypervisor that passes the register through" in found.text
    (metal,) = findings(predict(faults=ALL_BITS), Observation(retained=1), METAL)
    assert "hypervisor" not in metal.text


def test_a_machine_that_ignores_the_register_is_called_so() -> None:
    (found,) = findings(predict(faults=ALL_BITS), Observation(dropped=ALL_BITS))
    assert "whatever answers here ignores the register" in found.text


def test_not_kept() -> None:
    (found,) = findings(predict(accepts=0x7), Observation(retained=0x3, dropped=0x4))
    assert found == Finding("not_retained", "0-2,8", 0x4, "bit 2 (SSBD): accepted, but not kept")


def test_as_predicted_is_no_finding() -> None:
    assert findings(predict(accepts=0x7, faults=ALL_BITS & ~7), Observation(retained=7, fault=ALL_BITS & ~7)) == []


def result(**more: object) -> CpuResult:
    return CpuResult(3, 0, Observation(retained=0x7), **more)  # type: ignore[arg-type]


def test_together_refused() -> None:
    (found,) = findings_of_walk(result(combined=Combined(0x7, 0x7, Outcome.FAULT, None)), ())
    assert (found.kind, found.cpus, found.mask) == ("combination_refused", "3", 0x7)
    assert "0x0000000000000007" in found.text


def test_together_altered() -> None:
    (found,) = findings_of_walk(result(combined=Combined(0x7, 0x7, Outcome.ALTERED, 0x5)), ())
    assert (found.kind, found.mask) == ("combination_altered", 0x2)
    assert "read back as 0x0000000000000005, wanted 0x0000000000000007" in found.text


@pytest.mark.parametrize(
    "combined",
    [
        Combined(0x7, 0x7, Outcome.RETAINED, 0x7),
        Combined(0x87, 0x7, Outcome.DROPPED, 0x7),  # the bit that is dropped alone is dropped in company
        Combined(0x7, 0x7, Outcome.UNSTABLE, 0x1),
        Combined(0x7, 0x7, Outcome.ABSENT, None),
        None,
    ],
)
def test_together_as_each_alone_is_no_finding(combined: Combined | None) -> None:
    assert findings_of_walk(result(combined=combined), ()) == []


def test_pairs_and_clearing() -> None:
    found = findings_of_walk(
        result(bad_pairs=(0x5, 0x81), cleared=Observation(retained=0x1, dropped=0x2, fault=0x4, unstable=0x8)),
        (),
    )
    assert [(one.kind, one.mask) for one in found] == [
        ("pair_refused", 0x5),
        ("pair_refused", 0x81),
        ("not_clearable", 0x6),
    ]
    assert found[0].text == "bits 0,2 are accepted alone and take #GP together"
    assert found[2].text == "bits 1-2 (STIBP, SSBD): set at first, and cannot be cleared"


def test_not_put_back() -> None:
    proof = [
        Restored(0, 0x1, 0x1, Restored.VERIFIED),
        Restored(1, 0x1, 0x5, Restored.FAILED),
        Restored(2, 0x1, None, Restored.FAILED, "read-back: fault"),
        Restored(3, 0x1, None, Restored.LEFT, "offline"),
    ]
    found = findings_of_restore(proof)
    assert [(one.kind, one.cpus, one.mask) for one in found] == [
        ("not_verified", "3", 0),
        ("not_restored", "1", 0x4),
        ("not_restored", "2", 0),
    ]
    found = found[1:]
    assert found[0].text == "the register held 0x0000000000000001 and now reads 0x0000000000000005"
    assert "0x0000000000000001" in found[1].text
    assert "fault" in found[1].text


def test_what_must_be_acted_on_comes_first() -> None:
    shuffled = [Finding(kind, "0", 0, "") for kind in reversed(KINDS)]
    assert [one.kind for one in in_order(shuffled)] == list(KINDS)
    assert KINDS[:2] == ("not_restored", "not_verified")


def test_every_kind_that_is_made_is_in_the_list() -> None:
    made = [
        *findings(predict(accepts=0x3, faults=0x4), Observation(fault=1, dropped=2, retained=4)),
        *findings_of_walk(
            result(combined=Combined(7, 7, Outcome.FAULT, None), bad_pairs=(3,), inconsistent=8, moved=1), range(4)
        ),
        *findings_of_walk(
            result(combined=Combined(7, 7, Outcome.ALTERED, 1), cleared=Observation(fault=1), base_refused=True),
            range(4),
        ),
        *findings_of_restore([Restored(0, 1, 2, Restored.FAILED), Restored(1, 1, 2, Restored.LEFT)]),
    ]
    elsewhere = {"walk_stopped", "vm_started", "cpus_differ", "cpuid_cross_check", "cpuid_differs"}  # assembly.py
    assert {one.kind for one in in_order(made)} == set(KINDS) - elsewhere


def test_the_same_on_many_cpus_is_said_once() -> None:
    found = merge_cpus(
        [
            Finding("not_retained", "7", 2, "x"),
            Finding("not_retained", "0", 2, "x"),
            Finding("not_retained", "1", 2, "x"),
            Finding("not_retained", "2", 4, "x"),
            Finding("unexpected_fault", "3", 2, "x"),
        ]
    )
    assert [(one.kind, one.cpus, one.mask) for one in found] == [
        ("not_retained", "0-1,7", 2),
        ("not_retained", "2", 4),
        ("unexpected_fault", "3", 2),
    ]
