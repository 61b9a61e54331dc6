# SPDX-License-Identifier: MIT
"""State machines: the predicates of every era, properties that hold for all of them, programs and their text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_harness.kvm.study import follow
from probe.errors import UsageError
from probe.masks import ALL_BITS
from probe.models import machines
from probe.models.difference import HOSTS, difference
from probe.models.kvm_machines import MACHINES as KVM
from probe.models.kvm_machines import KvmMachine
from probe.models.machine import Hardware, Host, answers, first_difference, step
from probe.models.machines import MACHINES
from probe.models.matrix import CELLS, Measured, distinguishable, expected, fit, holds, program_of
from probe.models.peer_machines import enumerated
from probe.models.profile import ALL_FEATURES, EMPTY, FEATURES, NAMED, NONE, Profile, parse_profile
from probe.models.program import Answer, Kind, Operation, Program, Word, format_answer, parse, written
from probe.models.versions import Release, release_of

WITHOUT_V = HOSTS[0][1]
BY_NAME = {machine.name: machine for machine in MACHINES}
profiles = st.one_of(st.just(NONE), st.integers(0, ALL_FEATURES).map(lambda mask: Profile(mask)))
hardware = st.builds(
    Hardware,
    exists=st.booleans(),
    tested=st.sampled_from([0x7, 0x6, 0x87, 0x5FF, ALL_BITS, 0]),
    valid=st.sampled_from([0x7, 0x87, ALL_BITS]),
    keep=st.sampled_from([0, 0x7, ALL_BITS]),
)
hosts = st.builds(
    Host,
    hardware=hardware,
    features=st.integers(0, ALL_FEATURES),
    caps=st.integers(0, ALL_FEATURES),
    switched=st.booleans(),
)
values = st.one_of(st.just(0), st.integers(0, 63).map(lambda bit: 1 << bit), st.integers(0, ALL_BITS))
indices = st.integers(0, 2**32 - 1)
every_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: str(machine.name))
every_kvm = pytest.mark.parametrize("machine", KVM, ids=lambda machine: str(machine.name))


def run(machine: str, text: str, host: Host = WITHOUT_V) -> str:
    program, _ = parse(text)
    return " ".join(
        "?" if answer is None else format_answer(answer) for answer in answers(BY_NAME[machine], program, host)
    )


# --- the eras --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "text", "wanted"),
    [
        # The dispute of July 2020: STIBP without IBRS, host and guest alike (facts: 6441fa6178f5, 20200702174455...).
        ("kvm-5.6-svm", "profile zen2-client-2020; guest-wr 0x48 0x2; guest-wr 0x48 0x4", "gp ok"),
        ("kvm-maxim-v1-svm", "profile zen2-client-2020; guest-wr 0x48 0x2; guest-wr 0x48 0x1", "ok ok"),
        ("kvm-5.11-vmx", "profile zen2-client-2020; guest-wr 0x48 0x2", "ok"),
        # 5.6 to 5.8: the mask holds for the host too, and without KVM_SET_CPUID2 nothing but 0 passes.
        ("kvm-5.6-svm", "profile none; host-set 0x48 0x1; host-set 0x48 0x0", "refused ok"),
        ("kvm-4.18-svm", "profile none; host-set 0x48 0x1; host-set 0x48 0x8", "ok refused"),
        ("kvm-4.16-svm", "profile AMD_IBRS; guest-wr 0x48 0x4; guest-wr 0x48 0x3", "gp ok"),
        # Intel, SPEC_CTRL without STIBP: 5.6 lets it pass, Maxim's does not.
        ("kvm-5.6-vmx", "profile SPEC_CTRL; guest-wr 0x48 0x2", "ok"),
        ("kvm-maxim-v1-vmx", "profile SPEC_CTRL; guest-wr 0x48 0x2", "gp"),
        # Gates.
        ("kvm-5.9-vmx", "profile AMD_SSBD; guest-wr 0x48 0x0", "gp"),
        ("kvm-5.11-vmx", "profile AMD_SSBD; guest-wr 0x48 0x0", "ok"),
        ("kvm-5.11-vmx", "profile psfd-only; guest-wr 0x48 0x0; guest-rd 0x48", "gp gp"),
        ("kvm-5.11-vmx", "profile INTEL_STIBP,SPEC_CTRL_SSBD; guest-wr 0x48 0x0", "gp"),
        # The hole: whoever wrote, the guest is let through, gate or not.
        ("kvm-5.11-vmx", "profile empty; guest-wr 0x48 0x1; host-set 0x48 0x1; guest-wr 0x48 0x400", "gp ok ok"),
        ("kvm-5.11-vmx", "profile empty; host-set 0x48 0x0; guest-wr 0x48 0x1", "ok gp"),
        # Filters deny the guest, never the host, and end with the filter: what was let through stays so.
        (
            "kvm-5.11-vmx",
            "profile AMD_IBRS; host-set 0x48 0x1; deny 0x48 wr; guest-wr 0x48 0x2; guest-rd 0x48; host-set 0x48 0x3; "
            "allow; guest-wr 0x48 0x2; guest-rd 0x48",
            "ok ok gp 0x1 ok ok ok 0x2",
        ),
        # An access that takes #GP enters and exits, too: what is let through is saved, less what was not loaded.
        (
            "kvm-5.11-vmx",
            "profile none; host-set 0x48 0x81; deny 0x48 rd; guest-rd 0x48; host-get 0x48",
            "ok ok gp 0x1",
        ),
        # 6.17 decides anew from the value; kvm_amd also at INIT.
        (
            "kvm-6.14-vmx",
            "profile empty; host-set 0x48 0x1; host-set 0x48 0x0; allow; guest-wr 0x48 0x1",
            "ok ok ok ok",
        ),
        (
            "kvm-6.17-vmx",
            "profile empty; host-set 0x48 0x1; host-set 0x48 0x0; allow; guest-wr 0x48 0x1",
            "ok ok ok gp",
        ),
        # ... at the next entry, from the value that is stored then.
        ("kvm-6.17-vmx", "profile none; host-set 0x48 0x1; host-set 0x48 0x0; guest-wr 0x48 0x0", "ok ok gp"),
        ("kvm-6.14-vmx", "profile none; host-set 0x48 0x1; host-set 0x48 0x0; guest-wr 0x48 0x0", "ok ok ok"),
        (
            "kvm-6.17-vmx",
            "profile none; guest-rd 0x48; host-set 0x48 1; host-set 0x48 0; guest-wr 0x48 0",
            "gp ok ok ok",
        ),
        ("kvm-6.17-vmx", "profile empty; host-set 0x48 0x1; init; host-get 0x48; guest-wr 0x48 0x1", "ok ok 0x0 ok"),
        ("kvm-6.17-svm", "profile empty; host-set 0x48 0x1; init; host-get 0x48; guest-wr 0x48 0x1", "ok ok 0x0 gp"),
        # What is saved at exit: kvm_amd from 6.1 to 6.18 leaves bits 63:32 of what is stored as they are.
        (
            "kvm-6.1-svm",
            "profile AMD_IBRS; guest-wr 0x48 0x100000001; guest-wr 0x48 0x2; host-get 0x48",
            "ok ok 0x100000002",
        ),
        ("kvm-5.19-vmx", "profile AMD_IBRS; guest-wr 0x48 0x100000001; host-get 0x48", "ok 0x1"),
        ("kvm-5.10.133-vmx", "profile AMD_IBRS; guest-wr 0x48 0x100000001; host-get 0x48", "ok 0x100000001"),
        ("kvm-5.19-svm", "profile AMD_IBRS; guest-wr 0x48 0x100000001; host-get 0x48", "ok 0x100000001"),
        # v4.16 loads all of it; v4.17 to v5.18 what the host has of the first three.
        ("kvm-4.16-vmx", "profile SPEC_CTRL; host-set 0x48 0x2; guest-rd 0x48", "ok 0x2"),
        # What is loaded at entry: bits 63:32 from 6.19 on, bits above SSBD from 5.19 on.
        ("kvm-5.11-vmx", "profile AMD_IBRS; host-set 0x48 0x81; guest-rd 0x48; host-get 0x48", "ok 0x1 0x1"),
        ("kvm-5.19-vmx", "profile AMD_IBRS; host-set 0x48 0x81; guest-rd 0x48; host-get 0x48", "ok 0x81 0x81"),
        ("kvm-6.17-vmx", "profile AMD_IBRS; host-set 0x48 0x100000001; guest-rd 0x48", "ok 0x1"),
        ("kvm-6.19-vmx", "profile AMD_IBRS; host-set 0x48 0x100000001; guest-rd 0x48", "ok 0x100000001"),
        # Peers.
        (
            "qemu-tcg",
            "profile empty; guest-wr 0x48 0xffff; guest-rd 0x48; host-set 0x48 0x1; host-get 0x48",
            "ok 0x0 ok 0x0",
        ),
        ("bhyve-strict", "profile AMD_IBRS; guest-wr 0x48 0x0; guest-rd 0x48", "gp gp"),
        ("xen", "profile AMD_SSBD; guest-wr 0x48 0x0", "gp"),
        ("xen", "profile SPEC_CTRL,DDPD_U; guest-wr 0x48 0x2; guest-wr 0x48 0x100", "ok gp"),
        ("xen", "profile AMD_IBRS,AMD_PSFD,BHI_CTRL; guest-wr 0x48 0x483; guest-rd 0x48", "ok 0x483"),
        ("virtualbox", "profile empty; guest-wr 0x48 0x3; guest-wr 0x48 0x4", "ok gp"),
        ("bochs-2.7", "profile SPEC_CTRL; guest-wr 0x48 0x7; guest-wr 0x48 0x80", "ok gp"),
        ("bochs-3.0", "profile empty; guest-wr 0x48 0x5ff; guest-wr 0x48 0x200", "ok gp"),
        ("always-emulate", "profile zen2-client; host-set 0x48 0x2; guest-wr 0x48 0x1; guest-wr 0x48 0x6", "ok gp ok"),
        ("pass-through", "profile empty; guest-wr 0x48 0x0; host-set 0x48 0x1; guest-wr 0x48 0x1", "gp ok gp"),
        ("kvm-unit-tests", "profile INTEL_STIBP; guest-wr 0x48 0x2", "ok"),
        ("kvm-unit-tests", "profile INTEL_STIBP; guest-wr 0x48 0x8", "?"),
        ("kvm-unit-tests", "profile psfd-only; guest-wr 0x48 0x0; guest-rd 0x48", "gp gp"),
        ("exists-sdm", "profile psfd-only; guest-wr 0x48 0x0", "ok"),
        ("exists-kvm", "profile psfd-only; guest-wr 0x48 0x0", "gp"),
    ],
)
def test_an_era(machine: str, text: str, wanted: str) -> None:
    assert run(machine, text) == wanted


def test_the_hardware_test_refuses_even_0_where_there_is_no_register() -> None:
    host = Host(Hardware(exists=False, tested=0, valid=0, keep=0))
    assert run("kvm-5.11-vmx", "profile none; host-set 0x48 0x0; host-get 0x48", host) == "refused 0x0"
    assert run("kvm-5.6-svm", "profile none; host-set 0x48 0x0", host) == "ok"


def test_first_writes_by_the_tested_mask_later_ones_by_what_the_guest_meets() -> None:
    host = Host(Hardware(tested=0x6, valid=ALL_BITS, keep=0))
    program = "profile AMD_STIBP; guest-wr 0x48 0x1; guest-wr 0x48 0x2; guest-wr 0x48 0x1; host-set 0x48 0x1"
    assert run("kvm-5.11-vmx", program, host) == "gp ok ok refused"


def test_v_spec_ctrl_until_6_17_lets_guests_without_the_register_use_it() -> None:
    host = Host(features=ALL_FEATURES, caps=ALL_FEATURES)
    assert run("kvm-5.9-svm", "profile empty; guest-wr 0x48 0x2", host) == "gp", "v5.12 does not look at it"
    assert run("kvm-5.13-svm", "profile empty; guest-wr 0x48 0x2; guest-rd 0x48; host-get 0x48", host) == "ok 0x2 0x2"
    assert run("kvm-6.17-svm", "profile empty; guest-wr 0x48 0x2; cpuid AMD_IBRS", host) == "gp ok"


@pytest.mark.parametrize(
    ("machine", "text", "wanted"),
    [
        # vmcb_save_area.spec_ctrl had 32 bits (v6.1.192), has 64 (v6.12.118).
        ("kvm-6.1-svm", "profile none; host-set 0x48 0x100000001; host-get 0x48", "ok 0x1"),
        ("kvm-6.4-svm", "profile none; host-set 0x48 0x100000001; host-get 0x48", "ok 0x1"),
        ("kvm-6.6-svm", "profile none; host-set 0x48 0x100000001; host-get 0x48", "ok 0x100000001"),
        # INIT clears svm->spec_ctrl, which is not used here.
        ("kvm-6.4-svm", "profile none; host-set 0x48 0x1; init; host-get 0x48", "ok ok 0x1"),
        # The hole is there between a host's write after the first entry and the next decision.
        ("kvm-6.17-svm", "profile none; host-set 0x48 0x1; guest-wr 0x48 0x1", "ok gp"),
        ("kvm-6.17-svm", "profile none; guest-rd 0x48; host-set 0x48 0x1; guest-wr 0x48 0x1", "gp ok ok"),
        ("kvm-6.17-svm", "profile AMD_IBRS; guest-wr 0x48 0x4; guest-rd 0x48; host-get 0x48", "ok 0x4 0x4"),
        # What INIT asks for is decided in the entry that takes it: a host's write after that stands.
        ("kvm-6.19-svm", "profile none; init; host-set 0x48 0x1; guest-wr 0x48 0x0", "ok ok ok"),
    ],
)
def test_with_v_spec_ctrl(machine: str, text: str, wanted: str) -> None:
    assert run(machine, text, Host(features=ALL_FEATURES, caps=ALL_FEATURES)) == wanted


def test_a_cpu_that_does_not_do_what_v_spec_ctrl_promises() -> None:
    """The kernel leaves the register to the CPU, and the CPU to the guest: what is stored and what is held part."""
    host = Host(Hardware(keep=0x7), features=ALL_FEATURES, caps=ALL_FEATURES, switched=False, loaded=False)
    text = "profile AMD_IBRS; host-set 0x48 0x1; guest-wr 0x48 0x2; guest-rd 0x48; host-get 0x48"
    assert run("kvm-6.4-svm", text, host) == "ok ok 0x2 0x1"


@pytest.mark.parametrize(
    ("machine", "profile", "host", "wanted"),
    [
        # (by the host, by the guest) of IA32_PRED_CMD; a host with IBPB whose hardware takes 0x3 of it.
        ("kvm-6.1-svm", "AMD_IBPB", 1, (0x1, 0x1)),
        ("kvm-6.4-svm", "AMD_IBPB", 1, (0x1, 0x3)),
        ("kvm-6.4-svm", "AMD_IBRS", 1, (0x1, 0x0)),
        ("kvm-6.4-svm", "SPEC_CTRL", 1, (0x1, 0x3)),
        ("kvm-5.9-vmx", "SPEC_CTRL", 1, (0x1, 0x1)),
        ("kvm-6.4-svm", "AMD_IBPB", 0, (0x0, 0x0)),
    ],
)
def test_pred_cmd(machine: str, profile: str, host: int, wanted: tuple[int, int]) -> None:
    seen = Host(Hardware(pred_cmd=0x3), features=parse_profile("AMD_IBPB").mask * host, caps=ALL_FEATURES)
    said = BY_NAME[machine].beside(parse_profile(profile), seen)
    assert (said["pred_cmd_host"][0], said["pred_cmd_guest"][0]) == wanted


def test_pred_cmd_of_6_14_asks_what_kvm_supports_and_older_models_do_not_say() -> None:
    host = Host(Hardware(pred_cmd=0x1), features=parse_profile("AMD_IBPB").mask)
    assert BY_NAME["kvm-6.14-svm"].beside(parse_profile("AMD_IBPB"), host)["pred_cmd_guest"][0] == 0
    assert "pred_cmd_guest" not in BY_NAME["kvm-5.6-svm"].beside(parse_profile("AMD_IBPB"), host)
    assert BY_NAME["xen"].beside(EMPTY, host) == {}


def test_virt_spec_ctrl_is_kvm_amds_alone() -> None:
    gate = parse_profile("virt-ssbd")
    for name in ("kvm-4.18-svm", "kvm-6.4-svm"):
        said = BY_NAME[name].beside(gate, WITHOUT_V)
        assert (said["virt_spec_ctrl_host"][0], said["virt_spec_ctrl_guest"][0]) == (0x4, 0x4)
        assert BY_NAME[name].beside(EMPTY, WITHOUT_V)["virt_spec_ctrl_guest"] == (0, ALL_BITS)
    assert BY_NAME["kvm-6.14-svm"].beside(gate, Host())["virt_spec_ctrl_guest"][0] == 0, "it is not offered"
    assert BY_NAME["kvm-6.4-vmx"].beside(gate, WITHOUT_V)["virt_spec_ctrl_host"] == (0, ALL_BITS)
    ignoring = replace(WITHOUT_V, ignore_msrs=True)
    assert BY_NAME["kvm-6.4-vmx"].beside(gate, ignoring)["virt_spec_ctrl_host"][1] == 0, "ignore_msrs answers for it"


def test_of_other_registers_a_machine_says_nothing_and_goes_on() -> None:
    text = "profile AMD_IBRS; host-set 0x49 0x1; host-set 0x48 0x1; guest-rd 0x49; guest-rd 0x48"
    assert run("kvm-6.4-svm", text) == "? ok ? 0x1"
    # A filter replaces the one before it: denying another register allows this one again.
    denied = "profile AMD_IBRS; deny 0x48 wr; guest-wr 0x48 0x1; deny 0x10 rd; guest-wr 0x48 0x1"
    assert run("kvm-6.4-svm", denied) == "ok gp ok ok"


def test_6_14_asks_what_kvm_supports() -> None:
    host = Host(features=0, caps=0)
    assert run("kvm-5.19-vmx", "profile AMD_IBRS; guest-wr 0x48 0x1", host) == "ok"
    assert run("kvm-6.14-vmx", "profile AMD_IBRS; guest-wr 0x48 0x1", host) == "gp"


def test_v5_18_loads_stibp_and_ssbd_only_where_the_host_has_them() -> None:
    knights_landing = Host(features=parse_profile("SPEC_CTRL").mask, caps=ALL_FEATURES)
    assert run("kvm-5.11-vmx", "profile SPEC_CTRL; host-set 0x48 0x7; guest-rd 0x48", knights_landing) == "ok 0x1"
    assert run("kvm-5.19-vmx", "profile SPEC_CTRL; host-set 0x48 0x7; guest-rd 0x48", knights_landing) == "ok 0x7"


def test_a_kernel_that_saves_and_does_not_load() -> None:
    """kvm_amd before v6.1 without X86_FEATURE_MSR_SPEC_CTRL: what the host's register holds becomes the guest's."""
    host = Host(Hardware(start=0x4), loaded=False)
    assert run("kvm-5.9-svm", "profile none; host-set 0x48 0x1; guest-rd 0x48; host-get 0x48", host) == "ok 0x4 0x4"


def test_a_kernel_that_does_not_switch_the_register_keeps_what_it_was_given() -> None:
    host = Host(Hardware(keep=0), switched=False)
    assert run("kvm-5.11-vmx", "profile none; host-set 0x48 0x1; guest-wr 0x48 0x2; host-get 0x48", host) == "ok ok 0x1"


# --- properties ------------------------------------------------------------------------------------------------------


@every_kvm
@given(profile=profiles, host=hosts, value=values)
@settings(max_examples=60, deadline=None)
def test_before_pass_through_no_guest_gets_past_a_closed_gate(
    machine: KvmMachine, profile: Profile, host: Host, value: int
) -> None:
    state = machine.start(profile, host)
    if not state.direct and not machine.gate(profile.mask, host.caps):
        assert step(machine, state, Operation(Kind.GUEST_WR, 0x48, value))[1] is Word.GP
        assert step(machine, state, Operation(Kind.GUEST_RD, 0x48))[1] is Word.GP


@every_machine
@given(profile=profiles, host=hosts, value=values, denied=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_a_filter_denies_the_guest_and_never_the_host(
    machine: KvmMachine, profile: Profile, host: Host, value: int, denied: int
) -> None:
    state = machine.set_filter(machine.start(profile, host), denied)
    if denied & 2:
        assert step(machine, state, Operation(Kind.GUEST_WR, 0x48, value))[1] is Word.GP
    if denied & 1:
        assert step(machine, state, Operation(Kind.GUEST_RD, 0x48))[1] is Word.GP
    by_host = machine.writable(state, by_host=True)
    assert by_host == machine.writable(machine.start(profile, host), by_host=True)


@every_kvm
@given(profile=profiles, host=hosts, value=values)
@settings(max_examples=40, deadline=None)
def test_a_write_of_0_lets_nobody_through(machine: KvmMachine, profile: Profile, host: Host, value: int) -> None:
    state = machine.start(profile, host)
    for kind in (Kind.HOST_SET, Kind.GUEST_WR):
        after, _ = step(machine, state, Operation(kind, 0x48, 0))
        assert machine.enter(after).direct == machine.enter(state).direct


@every_machine
@given(profile=profiles, host=hosts, opened=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_row_of_a_model_is_what_its_machine_answers_bit_by_bit(
    machine: KvmMachine, profile: Profile, host: Host, opened: bool
) -> None:
    """Rows are made with all bits at once; each of their bits stands for a program."""
    writable = machine.writable(machine.start(profile, host), by_host=True)
    opener = (writable & -writable) if opened and writable else 0
    row = expected(machine, profile, host, opener)
    for cell in CELLS:
        if cell.after and not opener:
            assert cell.name not in row.masks
            continue
        for bit in (0,) if cell.single else range(64):
            answer = answers(machine, program_of(cell, profile, bit, opener), host)[-1]
            if row.decided[cell.name] >> bit & 1:
                assert answer is not None, (cell.name, bit)
                value = 0 if cell.single else 1 << bit
                assert holds(cell, value, answer) == bool(row.masks[cell.name] >> bit & 1), (cell.name, bit)
            else:
                assert answer is None, (cell.name, bit)


@every_machine
@given(profile=profiles, host=hosts)
@settings(max_examples=20, deadline=None)
def test_a_model_explains_itself(machine: KvmMachine, profile: Profile, host: Host) -> None:
    writable = machine.writable(machine.start(profile, host), by_host=True) or 0
    opener = writable & -writable
    row = expected(machine, profile, host, opener)
    found = fit(machine, host, [Measured(profile, opener, row.masks)])
    assert found.cases == found.agreements
    assert found.explains == (found.silent == 0), "one that leaves something open explains nothing"


def test_a_model_that_is_wrong_once_is_told_so_with_its_program() -> None:
    machine = BY_NAME["kvm-5.11-vmx"]
    row = dict(expected(machine, EMPTY, WITHOUT_V, 1).masks)
    row["guest_after"] ^= 1 << 10
    found = fit(machine, WITHOUT_V, [Measured(EMPTY, 1, row)])
    assert (found.cases - found.agreements, found.divergences) == (1, {"guest_after": 1})
    assert found.first is not None
    cell, measured, bit = found.first
    assert str(program_of(cell, measured.profile, bit, 1)) == "profile empty; host-set 0x48 0x1; guest-wr 0x48 0x400"


def test_classes_found_step_by_step_are_those_of_every_combination() -> None:
    some = [BY_NAME[name] for name in ("kvm-5.6-svm", "kvm-maxim-v1-vmx", "xen", "kvm-unit-tests", "exists-sdm")]
    host = WITHOUT_V

    def fingerprint(profile: Profile) -> tuple[object, ...]:
        return tuple(
            (
                one.writable(one.start(profile, host), by_host=by_host),
                one.open_bits(one.start(profile, host), by_host=by_host),
            )
            for one in some
            for by_host in (True, False)
        )

    found = distinguishable(some, [host])
    of_found = {fingerprint(profile) for profile in found}
    assert len(of_found) == len(found)
    assert of_found == {fingerprint(Profile(mask)) for mask in range(ALL_FEATURES + 1)}


# --- differences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "program"),
    [
        ("kvm-5.6-svm", "kvm-maxim-v1-svm", "profile SPEC_CTRL; guest-wr 0x48 0x2"),
        ("kvm-6.19-vmx", "kvm-6.19-svm", "profile empty; host-set 0x48 0x1; init; guest-wr 0x48 0x0"),
        ("kvm-6.17-vmx", "kvm-6.17-svm", "profile SPEC_CTRL; guest-wr 0x48 0x100000000; host-get 0x48"),
        ("kvm-6.17-vmx", "kvm-6.19-vmx", "profile empty; host-set 0x48 0x100000000; guest-rd 0x48"),
    ],
)
def test_the_shortest_difference(one: str, other: str, program: str) -> None:
    found = difference(machines.get(one), machines.get(other))
    assert found is not None
    assert str(found.program) == program
    assert first_difference(found.one, found.other) == len(found.program.operations) - 1


def test_models_that_are_the_same_have_no_difference() -> None:
    assert difference(BY_NAME["bhyve"], BY_NAME["qemu-tcg"]) is None


def test_every_two_eras_of_kvm_differ_somewhere() -> None:
    """In programs on MSR 0x48, or in what they say of the registers beside it."""
    everything, hardware = Profile(ALL_FEATURES), Hardware(pred_cmd=ALL_BITS)
    host = Host(hardware, features=ALL_FEATURES, caps=ALL_FEATURES)
    for number, one in enumerate(KVM):
        for other in KVM[number + 1 :]:
            apart = difference(one, other) is not None or one.beside(everything, host) != other.beside(everything, host)
            assert apart, f"{one.name} and {other.name} are the same model"


@pytest.mark.parametrize(
    ("release", "version", "wanted"),
    [
        ("6.1.0-56-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)", (6, 1, 192)),
        ("6.18.44-fc-v669", "#1 SMP PREEMPT_DYNAMIC @0", (6, 18, 44)),
        ("7.2-rc3", "#1", (7, 2, 0)),
        ("6.17.0", "#1", (6, 17, 0)),
        ("6.17.0-rc2", "#1", (6, 17, 0)),
        ("5.15.0-91-generic", "#101-Ubuntu SMP", None),
        ("4.18.0-553.el8_10.x86_64", "#1 SMP", None),
        ("unknown", "", None),
    ],
)
def test_which_kernel_this_is(release: str, version: str, wanted: Release | None) -> None:
    assert release_of(release, version) == wanted


def test_every_mainline_kernel_since_4_16_has_one_model_for_each_vendor() -> None:
    kernels = [(4, minor, 0) for minor in range(16, 21)] + [(5, minor, 0) for minor in range(20)]
    kernels += [(6, minor, 0) for minor in range(20)] + [(7, 0, 0), (7, 2, 13)]
    for vendor in ("kvm-vmx", "kvm-svm"):
        for kernel in kernels:
            found = [one.name for one in KVM if one.family == vendor and one.versions.sublevel(kernel) is not None]
            assert len(found) == 1, (vendor, kernel, found)


@pytest.mark.parametrize(
    ("explained", "backend", "version", "wanted"),
    [
        (["kvm-5.9-svm", "kvm-5.10.133-svm", "kvm-5.19-svm"], "kvm_amd", (5, 10, 262), "kvm-5.10.133-svm"),
        (["kvm-5.9-svm", "kvm-5.10.133-svm", "kvm-5.19-svm"], "kvm_amd", (5, 10, 100), "kvm-5.9-svm"),
        (["kvm-5.11-vmx", "kvm-5.10.133-vmx"], "kvm_intel", (5, 15, 60), "kvm-5.10.133-vmx"),
        (["kvm-5.11-vmx", "kvm-5.10.133-vmx"], "kvm_intel", (5, 15, 3), "kvm-5.11-vmx"),
        # the version's own model is refuted: nothing is "of its version"
        (["kvm-5.9-vmx", "kvm-5.11-vmx"], "kvm_intel", (5, 10, 262), ""),
        (["kvm-5.6-svm"], "kvm_amd", (7, 2, 0), ""),
        (["kvm-5.11-vmx"], "kvm_intel", (5, 4, 250), ""),
        (["bhyve", "qemu-tcg"], "kvm_pvm", (6, 18, 44), ""),
        (["kvm-5.9-svm", "kvm-5.11-vmx"], "", (5, 11, 0), ""),
        (["xen"], "", None, ""),
        ([], "kvm_amd", (6, 1, 0), ""),
    ],
)
def test_of_several_the_one_of_this_version_is_followed(
    explained: list[str], backend: str, version: Release | None, wanted: str
) -> None:
    assert follow(explained, backend, version) == wanted


# --- profiles and programs -------------------------------------------------------------------------------------------


def test_every_machine_has_a_name_of_its_own_and_a_source() -> None:
    names = [machine.name for machine in MACHINES]
    assert len(set(names)) == len(names)
    assert all(machine.source and machine.title for machine in MACHINES)
    with pytest.raises(UsageError, match=r"kvm-5\.11"):
        machines.get("kvm-9.99")


def test_fields_that_a_cpuid_enumerates() -> None:
    assert enumerated(ALL_FEATURES) == 0x5FF
    assert enumerated(parse_profile("zen2-client").mask) == 0x6
    assert enumerated(0) == 0


@pytest.mark.parametrize("named", NAMED, ids=lambda named: str(named.name))
def test_a_named_profile_has_a_source_and_reads_back(named: object) -> None:
    from probe.models.profile import Named

    assert isinstance(named, Named)
    assert parse_profile(named.name) == named.profile
    assert parse_profile(str(named.profile)) == named.profile
    assert named.source


@given(
    st.builds(
        Program,
        profiles,
        st.lists(
            st.one_of(
                st.builds(
                    Operation, st.sampled_from([Kind.HOST_SET, Kind.GUEST_WR]), st.integers(0, 2**32 - 1), values
                ),
                st.builds(Operation, st.sampled_from([Kind.HOST_GET, Kind.GUEST_RD]), st.integers(0, 2**32 - 1)),
                st.builds(Operation, st.just(Kind.CPUID), st.just(0), st.integers(0, ALL_FEATURES)),
                st.builds(Operation, st.just(Kind.DENY), st.just(0x48), st.integers(1, 3)),
                st.builds(Operation, st.sampled_from([Kind.INIT, Kind.ALLOW])),
            ),
            max_size=8,
        ).map(tuple),
    )
)
@settings(max_examples=200, deadline=None)
def test_a_program_reads_back(program: Program) -> None:
    again, wanted = parse(written(program, None))
    assert again == program
    assert wanted == (None,) * len(program.operations)


def test_answers_read_back() -> None:
    text = "profile AMD_IBRS\nhost-set 0x48 0x1 -> ok   # let through\nguest-rd 0x48 -> 0x1; guest-wr 0x48 9 -> gp"
    program, wanted = parse(text)
    assert wanted == (Word.OK, 1, Word.GP)
    assert program.operations[2].value == 9
    given_answers: list[Answer] = [Word.OK, 1, Word.GP]
    assert parse(written(program, given_answers))[1] == tuple(given_answers)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "begins with its guest's CPUID"),
        ("guest-rd 0x48", "begins with its guest's CPUID"),
        ("profile nope", "no profile or CPUID bit is called 'nope'"),
        ("profile none; profile empty", "the profile comes once"),
        ("profile none; frobnicate 0x48", "unknown operation 'frobnicate'"),
        ("profile none; guest-wr 0x48", "takes 2 words, not 1"),
        ("profile none; guest-wr 0x48 0x1ffffffffffffffff", "is no number"),
        ("profile none; guest-wr 0x148000000 0x1", "is no number"),
        ("profile none; guest-wr 0x48 0x1 -> refused", "is no answer to guest-wr"),
        ("profile none; host-set 0x48 0x1 -> gp", "is no answer to host-set"),
        ("profile none; host-set 0x48 0x1 -> 0x1", "is no answer"),
        ("profile none; guest-rd 0x48 -> maybe", "'maybe' is no answer"),
        ("profile none; deny 0x48 all", "deny wants one of"),
        ("profile empty; cpuid none", "cannot be undone"),
    ],
)
def test_a_program_that_is_none(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse(text)


def test_features_of_a_profile_are_those_of_the_tables() -> None:
    assert len({bit.name for bit in FEATURES}) == len(FEATURES)
    assert str(Profile(ALL_FEATURES)).split(",") == [bit.name for bit in FEATURES]
    assert replace(EMPTY, no_cpuid=True) == NONE
