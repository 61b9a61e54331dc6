# SPDX-License-Identifier: MIT
"""What-if questions without a machine, and which hypervisor's rule fits what a guest saw."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.cli import main
from probe.masks import ALL_BITS
from probe.models import machines
from probe.models.inference import infer
from probe.models.kvm_machines import MACHINES as KVM
from probe.models.machine import Hardware, Host, Machine
from probe.models.profile import ALL_FEATURES, EMPTY, Profile, parse_profile
from probe.models.what_if import offered, what_if
from probe.outcome import Observation

DUMP = "tests/data/cpuid/threadripper-3970x.cpuid-r.txt"
EVERYTHING = Observation(dropped=ALL_BITS)


def says(model: str, profile: str, seen: Observation) -> tuple[str, int]:
    found = infer(machines.get(model), parse_profile(profile), seen)
    return found.says, found.against


@pytest.mark.parametrize(
    ("model", "profile", "seen", "wanted"),
    [
        # facts: all values accepted and read 0 is TCG or a hypervisor that ignores it.
        ("qemu-tcg", "empty", EVERYTHING, ("fits", 0)),
        ("bhyve", "empty", EVERYTHING, ("fits", 0)),
        ("kvm-6.1-svm", "empty", EVERYTHING, ("possible", 0)),
        ("kvm-6.1-svm", "AMD_IBRS", EVERYTHING, ("possible", 0)),
        ("qemu-tcg", "empty", Observation(retained=0x3, fault=ALL_BITS & ~0x3), ("refuted", ALL_BITS)),
        # the accepted set is exactly 0x3: VirtualBox.
        ("virtualbox", "empty", Observation(retained=0x3, fault=ALL_BITS & ~0x3), ("fits", 0)),
        ("xen", "AMD_IBRS", Observation(retained=0x3, fault=ALL_BITS & ~0x3), ("fits", 0)),
        ("xen", "AMD_IBRS", Observation(retained=0x7, fault=ALL_BITS & ~0x7), ("refuted", 0x4)),
        ("virtualbox", "empty", Observation(retained=0x1, dropped=0x2, fault=ALL_BITS & ~0x3), ("refuted", 0x2)),
        # nothing is accepted: no register, or a gate.
        ("bhyve-strict", "AMD_IBRS", Observation(fault=ALL_BITS), ("fits", 0)),
        ("kvm-5.9-vmx", "AMD_IBRS", Observation(fault=ALL_BITS), ("fits", 0)),
        # a mask of 2020, until the guest was let through: then the hardware decides.
        ("kvm-5.6-svm", "zen2-client", Observation(retained=0x4, fault=ALL_BITS & ~0x4), ("fits", 0)),
        ("kvm-5.6-svm", "empty", Observation(retained=0x4, fault=ALL_BITS & ~0x4), ("possible", 0)),
        # V_SPEC_CTRL, which no guest sees, lets those through who have no such register; so does a restored value.
        ("kvm-6.4-svm", "empty", Observation(retained=0x7, fault=ALL_BITS & ~0x7), ("possible", 0)),
        ("kvm-5.6-svm", "zen2-client", Observation(retained=0x6, fault=ALL_BITS & ~0x6), ("possible", 0)),
        # bits that were not tried speak neither way.
        ("virtualbox", "empty", Observation(retained=0x1), ("fits", 0)),
        ("pass-through", "empty", Observation(retained=0x1), ("refuted", 0x1)),
        ("kvm-unit-tests", "INTEL_STIBP", Observation(retained=0x2, fault=0x8), ("possible", 0)),
    ],
)
def test_a_rule_fits_may_fit_or_is_refuted(
    model: str, profile: str, seen: Observation, wanted: tuple[str, int]
) -> None:
    assert says(model, profile, seen) == wanted


@given(
    mask=st.integers(0, ALL_FEATURES),
    tested=st.sampled_from([0, 0x6, 0x7, 0x87, 0x5FF, ALL_BITS]),
    machine=st.sampled_from([one for one in machines.MACHINES if one.family != "oracle"]),
    through=st.sampled_from(["", "guest", "host"]),
    virtual=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_rule_is_never_refuted_by_what_it_does_itself(
    mask: int, tested: int, machine: Machine, through: str, virtual: bool
) -> None:
    """On any host whose CPUID has what the guest's has, before and after the guest was let through, by whom ever."""
    guest = Profile(mask)
    features = mask | (parse_profile("V_SPEC_CTRL").mask if virtual else 0)
    host = Host(Hardware(tested=tested, valid=tested, keep=tested), features=features, caps=ALL_FEATURES)
    state = machine.start(guest, host)
    writable = machine.writable(state, by_host=through == "host")
    if through and writable:
        state = machine.write(machine.enter(state), writable & -writable, by_host=through == "host")
    writable = machine.writable(state, by_host=False)
    kept = 0
    for bit in range(64):
        if (writable or 0) >> bit & 1:
            after = machine.write(state, 1 << bit, by_host=False)
            kept |= (machine.read(after, by_host=False)[1] or 0) & 1 << bit
    taken = writable or 0
    seen = Observation(retained=kept & taken, dropped=taken & ~kept, fault=ALL_BITS & ~taken)
    assert infer(machine, guest, seen).says != "refuted"


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("zen2-client", "INTEL_STIBP,SPEC_CTRL_SSBD,AMD_IBPB,AMD_STIBP,AMD_SSBD,VIRT_SSBD"),  # as Debian's kernels did
        ("empty", "empty"),
        ("AMD_PSFD,AMD_IBPB_RET", "AMD_PSFD,AMD_IBPB_RET"),
        ("SPEC_CTRL", "SPEC_CTRL,AMD_IBPB,AMD_IBRS,AMD_IBPB_RET"),
        ("AMD_IBPB,AMD_IBRS", "AMD_IBPB,AMD_IBRS"),
        ("AMD_IBPB,AMD_IBRS,AMD_IBPB_RET", "SPEC_CTRL,AMD_IBPB,AMD_IBRS,AMD_IBPB_RET"),
        ("V_SPEC_CTRL,AMD_SSBD", "SPEC_CTRL_SSBD,AMD_SSBD,VIRT_SSBD"),
    ],
)
def test_what_kvm_offers(host: str, wanted: str) -> None:
    assert str(Profile(offered(parse_profile(host).mask))) == wanted


def test_the_case_of_2020_without_a_machine() -> None:
    zen2 = parse_profile("zen2-client").mask
    guest = Profile(offered(zen2))
    old = what_if(machines.get("kvm-5.6-svm"), zen2, guest, 0x6)
    assert (old.guest_first, old.guest_after, old.host_first) == (0x4, 0x6, 0x4)
    new = what_if(machines.get("kvm-5.9-svm"), zen2, guest, 0x6)
    assert (new.guest_first, new.guest_after, new.host_first) == (0x6, 0x6, 0x6)
    none = what_if(machines.get("kvm-5.9-svm"), 0, guest, None)
    assert (none.guest_first, none.host_first, none.read) == (None, None, True), "even 0 is refused; a read gives 0"
    closed = what_if(machines.get("kvm-5.9-svm"), zen2, EMPTY, 0x6)
    assert (closed.guest_first, closed.guest_after, closed.read, closed.host_first) == (None, None, False, 0x6)


def test_predict_answers_what_if(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model", "kvm-5.6-svm", "--host", DUMP]) == 0
    text = capsys.readouterr().out
    assert "first guest write  0x0000000000000004  bits 2" in text
    assert "once let through   0x0000000000000006  bits 1-2" in text
    assert all(len(line) <= 75 for line in text.splitlines())
    assert main(["predict", "--host", DUMP, "--guest", "psfd-only", "--hardware", "0x87", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["hardware"] == "0x0000000000000087"
    assert said["models"]["kvm-6.1-svm"]["guest_first"] is None
    assert said["models"]["kvm-6.1-svm"]["host"] == "0x0000000000000087"
    assert {one.name for one in KVM} <= set(said["models"])
    assert main(["predict", "--model", "xen", "--host", DUMP, "--guest", DUMP]) == 0
    assert "refused, of 0 too" in capsys.readouterr().out
    assert main(["predict", "--guest", "nope"]) == 2
    assert "no profile or CPUID bit is called 'nope'" in capsys.readouterr().err
    assert main(["predict", DUMP, "--guest", "empty"]) == 2
    assert main(["predict", "--model", "vendor", "--guest", "empty"]) == 2
