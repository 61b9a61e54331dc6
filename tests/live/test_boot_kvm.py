# SPDX-License-Identifier: MIT
"""The study of KVM inside other kernels: their real kvm_amd, nested in an emulated SVM."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import UNSET

from kernel_harness.boot.kvm import Wanted, study_in_guest, study_kernels
from probe import kvm_record
from probe.errors import RequirementMissing
from probe.masks import ALL_BITS, hex64
from probe.models.program import parse
from probe.report import kvm_text

pytestmark = pytest.mark.boot

SOME = ("none", "empty", "zen2-client-2020", "psfd-only", "qemu-ibrs", "qemu-epyc-rome-v2", "AMD_SSBD", "INTEL_STIBP")
PROFILES = tuple(word for name in SOME for word in ("--profile", name))
GATE_OF_CPUID = ["kvm-5.11", "kvm-5.13-svm", "kvm-5.19"]


def explained(record: kvm_record.KvmRecord) -> list[str]:
    return [name for name in record.explained_by if name.startswith("kvm-")]


def masks_of(record: kvm_record.KvmRecord, name: str) -> dict[str, str]:
    (row,) = [row for row in record.rows if name in row.profiles]
    return row.cells


def test_debian_12_follows_the_hardware_test_behind_the_gate_of_5_11(capsys: pytest.CaptureFixture[str]) -> None:
    record = study_in_guest("debian:bookworm", Wanted(arguments=(*PROFILES, "--programs", "40")), print)
    assert explained(record) == GATE_OF_CPUID, [(fit.model, fit.agreements, fit.cases) for fit in record.fits[:4]]
    assert not any(entry.divergence for entry in record.explored)
    assert record.kernel.release.startswith("6.1.")
    assert record.kvm.backend == "kvm_amd"
    assert record.machine.hypervisor == "TCGTCGTCGTCG"
    assert "not loaded at VM entry" in " ".join(kvm_text.render(record).split())
    assert masks_of(record, "psfd-only")["guest_zero"] == hex64(0), "AMD_PSFD opens no gate"
    assert masks_of(record, "zen2-client-2020")["guest_first"] == hex64(ALL_BITS)
    assert masks_of(record, "empty")["guest_first"] == hex64(0)
    assert masks_of(record, "empty")["guest_after"] == hex64(ALL_BITS), "the hole: the host's write let it through"
    oracle = next(fit for fit in record.fits if fit.model == "kvm-unit-tests")
    assert oracle.first is not UNSET
    assert parse(oracle.first.program)[0], "the first divergence is a program"
    assert all(len(line) <= 75 for line in kvm_text.render(record).splitlines())


def test_a_mask_for_kvms_own_test_decides_first_writes_and_no_later_ones() -> None:
    record = study_in_guest("debian:bookworm", Wanted(arguments=(*PROFILES, "--programs", "40"), tested=0x6), print)
    assert explained(record) == GATE_OF_CPUID
    assert (record.hardware.tested, record.hardware.valid) == (hex64(0x6), hex64(ALL_BITS))
    assert record.guest is not UNSET
    assert record.guest.tested == hex64(0x6)
    row = masks_of(record, "zen2-client-2020")
    assert (row["host_first"], row["guest_first"], row["guest_after"]) == (hex64(0x6), hex64(0x6), hex64(ALL_BITS))
    assert row["host_after"] == hex64(0x6)


def test_debian_13_as_well_and_one_that_fails_costs_no_other(tmp_path: Path) -> None:
    wanted = Wanted(arguments=(*PROFILES, "--programs", "20"))
    missing, trixie = study_kernels([str(tmp_path / "vmlinuz-none"), "debian:trixie"], wanted, print)
    assert missing.record is None
    assert isinstance(missing.error, RequirementMissing)
    assert trixie.record is not None
    assert explained(trixie.record) == GATE_OF_CPUID
    assert trixie.record.kernel.release.startswith("6.12.")
    table = kvm_text.table([("none", None, str(missing.error)), ("debian:trixie", trixie.record, "")])
    assert "not measured" in table
    assert "6.12" in table
