# SPDX-License-Identifier: MIT
"""The study of KVM inside other kernels: their real kvm_amd, nested in an emulated SVM."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import UNSET

from kernel_harness.boot.kvm import Wanted, study_in_guest, study_kernels
from kernel_harness.boot.migrate import move_between
from probe import kvm_record
from probe.errors import GuestLost, RequirementMissing
from probe.masks import ALL_BITS, hex64
from probe.migration_record import as_calculated
from probe.models.policy import POLICIES
from probe.models.profile import parse_profile
from probe.models.program import parse
from probe.report import kvm_text, moved_text

pytestmark = pytest.mark.boot

SOME = ("none", "empty", "zen2-client-2020", "psfd-only", "qemu-ibrs", "AMD_SSBD", "virt-ssbd", "INTEL_STIBP")
PROFILES = tuple(word for name in SOME for word in ("--profile", name))
ZEN2 = parse_profile("zen2-client")
ZEN2_VIRTUAL = parse_profile("zen2-client,V_SPEC_CTRL")


def explained(record: kvm_record.KvmRecord) -> list[str]:
    return [name for name in record.explained_by if name.startswith("kvm-")]


def masks_of(record: kvm_record.KvmRecord, name: str) -> dict[str, str]:
    (row,) = [row for row in record.rows if name in row.profiles]
    return row.cells


def study(kernel: str, programs: int = 40, **more: object) -> kvm_record.KvmRecord:
    return study_in_guest(kernel, Wanted(arguments=(*PROFILES, "--programs", str(programs)), **more), print)  # type: ignore[arg-type]


def test_debian_12_on_a_zen_2_follows_the_model_of_6_1() -> None:
    record = study("debian:bookworm", cpu=ZEN2)
    assert record.follows == "kvm-6.1-svm", [(fit.model, fit.agreements, fit.cases) for fit in record.fits[:4]]
    assert explained(record) == ["kvm-6.1-svm"]
    assert not any(entry.divergence for entry in record.explored)
    assert record.kernel.release.startswith("6.1.")
    assert record.kvm.backend == "kvm_amd"
    assert record.machine.hypervisor == "TCGTCGTCGTCG"
    assert record.guest is not UNSET
    assert record.guest.cpu == "AMD_IBPB,AMD_STIBP,AMD_SSBD"
    assert set(record.hardware.host_cpuid.split(",")) >= {"AMD_STIBP", "AMD_SSBD"}
    assert record.driver is not UNSET
    assert record.driver.accepts == record.hardware.tested == hex64(ALL_BITS), "both halves of KVM_SET_MSRS = pwrite"
    assert kvm_record.as_predicted(record)
    assert masks_of(record, "psfd-only")["guest_zero"] == hex64(0), "AMD_PSFD opens no gate"
    assert masks_of(record, "zen2-client-2020")["guest_first"] == hex64(ALL_BITS)
    assert masks_of(record, "empty")["guest_first"] == hex64(0)
    assert masks_of(record, "empty")["guest_after"] == hex64(ALL_BITS), "the hole: the host's write let it through"
    assert masks_of(record, "virt-ssbd")["virt_spec_ctrl_guest"] == hex64(0x4)
    assert masks_of(record, "empty")["virt_spec_ctrl_guest"] == hex64(0)
    assert masks_of(record, "zen2-client-2020")["pred_cmd_guest"] == hex64(0x1)
    oracle = next(fit for fit in record.fits if fit.model == "kvm-unit-tests")
    assert oracle.first is not UNSET
    assert parse(oracle.first.program)[0], "the first divergence is a program"
    report = kvm_text.render(record)
    assert "saved at VM exit" in report
    assert "as KVM_SET_MSRS" in report
    assert record.driver.error == ""
    assert all(len(line) <= 75 for line in report.splitlines())


def test_debian_13_with_v_spec_ctrl_lets_everyone_through_and_one_that_fails_costs_no_other(tmp_path: Path) -> None:
    wanted = Wanted(arguments=(*PROFILES, "--programs", "20"), cpu=ZEN2_VIRTUAL)
    missing, trixie = study_kernels([str(tmp_path / "vmlinuz-none"), "debian:trixie"], wanted, print)
    assert missing.record is None
    assert isinstance(missing.error, RequirementMissing)
    record = trixie.record
    assert record is not None
    assert (record.follows, record.kernel.release[:5]) == ("kvm-6.6-svm", "6.12.")
    assert "V_SPEC_CTRL" in record.hardware.host_cpuid.split(",")
    assert masks_of(record, "empty")["guest_first"] == hex64(ALL_BITS), "v5.13 to v6.16: no gate, no interception"
    assert not record.hardware.switched
    table = kvm_text.table([("none", None, str(missing.error)), ("debian:trixie", record, "")])
    assert "not measured" in table
    assert "6.12" in table


@pytest.mark.parametrize("tested", [0x7, 0x6, 0x87, 0x0], ids=hex)
def test_hardware_that_says_no_decides_first_writes_and_no_later_ones(tested: int) -> None:
    record = study("debian:bookworm", 20, cpu=ZEN2, tested=tested)
    assert record.follows == "kvm-6.1-svm", [(fit.model, fit.agreements, fit.cases) for fit in record.fits[:4]]
    assert record.guest is not UNSET
    assert record.guest.tested == record.hardware.tested == hex64(tested)
    assert "spec_ctrl_model answers for both" in " ".join(kvm_text.render(record).split())
    row = masks_of(record, "zen2-client-2020")
    assert (row["host_first"], row["guest_first"]) == (hex64(tested), hex64(tested))
    assert (row["host_zero"], row["guest_zero"]) == (hex64(1), hex64(1))
    if tested:
        assert record.hardware.valid == hex64(ALL_BITS)
        assert (row["guest_after"], row["host_after"]) == (hex64(ALL_BITS), hex64(tested))
    else:
        assert "guest_after" not in row, "nothing lets the guest through"
        assert "no guest was let through: what it would meet was not measured" in " ".join(
            kvm_text.render(record).split()
        )


def test_ignore_msrs_and_a_kernel_without_filters_are_said() -> None:
    record = study("debian:bookworm", 0, cpu=ZEN2, append=("kvm.ignore_msrs=1",))
    assert record.kvm.ignore_msrs == "Y"
    assert any("refusals of IA32_SPEC_CTRL are not hidden" in note for note in record.notes)
    assert masks_of(record, "empty")["guest_first"] == hex64(0), "it hides no refusal"
    assert record.follows == "kvm-6.1-svm"


def test_a_kernel_that_panics_is_lost_with_its_last_words() -> None:
    with pytest.raises(GuestLost) as caught:
        study("debian:bookworm", 0, append=("rdinit=/nowhere",))
    assert "Kernel panic" in str(caught.value)
    assert 5 < len(caught.value.console) <= 20
    assert any("Kernel panic" in line for line in caught.value.console)


def test_a_kernel_without_kvm_for_this_cpu_is_named() -> None:
    with pytest.raises(RequirementMissing, match="debian:bookworm has no KVM for this guest's CPU"):
        study("debian:bookworm", 0, append=("module_blacklist=kvm_amd,kvm_intel",))


def test_guests_that_move_from_one_kernel_to_another() -> None:
    """The study of the thread, from each kernel's KVM to the other's; every outcome as the models of both say."""
    specs = ["debian:bookworm", "debian:trixie"]
    done = move_between(specs, Wanted(cpu=ZEN2, tested=0x86), None, [], ["--rule=kvm"], print)
    records = [one.record for one in done if one.record is not None]
    assert len(records) == 2, [str(one.error) for one in done]
    for record, other in zip(records, reversed(records)):
        kernels = [one.kernel for one in record.departures]
        assert sorted(set(kernels)) == sorted({record.kernel.release, other.kernel.release})
        assert kernels.count(record.kernel.release) == kernels.count(other.kernel.release) == len(POLICIES) + 1
        assert len(record.arrivals) == 2 * len(kernels)
        assert as_calculated(record), [one.differs for one in record.departures] + [
            one.differs for one in record.arrivals
        ]
        assert record.guest is not UNSET
        assert record.guest.tested == hex64(0x86)
        shadowed = [at for at, one in enumerate(record.departures) if one.policy == "forced-shadow"]
        outcomes = [[one.outcome for one in record.arrivals if one.departure == at] for at in shadowed]
        assert outcomes == [["works", "refused"]] * 2
    assert [record.model for record in records] == ["kvm-6.1-svm", "kvm-6.6-svm"]
    assert all(len(line) <= 75 for line in moved_text.render(records).splitlines())
