# SPDX-License-Identifier: MIT
"""Pools of records: what breaks, what is said of it, and whether the advice holds on the machines that it is for."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec.structs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probe import kvm_record
from probe.cli import main
from probe.masks import ALL_BITS, mask_of
from probe.models.difference import HOSTS
from probe.models.guest_systems import cpus
from probe.models.machine import Host, answers
from probe.models.machines import get
from probe.models.matrix import CELLS, Cell, Measured, holds
from probe.models.migration import BY_NAME as RULE
from probe.models.migration import RULES, Move, Rule, Side
from probe.models.peer_machines import enumerated
from probe.models.policy import BY_NAME as POLICY
from probe.models.policy import PolicyMachine
from probe.models.profile import NAMED, Profile, parse_profile
from probe.models.program import Program, Word
from probe.pool import ANY, AnyRecord, Group, Place, advise, breaks_of, comparable, grouped, move, place_of, stays_of
from probe.record import decode
from probe.report import migrate_text
from tests.bench.distinct import distinct_kvm, distinct_runs

ZEN2 = Path("results/debian-kernels-nested/zen2-client")
ZEN = parse_profile("AMD_IBRS,AMD_STIBP,AMD_SSBD").mask
POLICIES = Path("results/debian-kernels-nested/policies")
THREADRIPPER = Path("results/modelled-threadripper-3970x")
METAL, GUEST = THREADRIPPER / "metal.json", THREADRIPPER / "kvm-5.6-guest.json"
TEMPLATE = kvm_record.decode(next(iter(sorted(POLICIES.glob("emulate-guest*6.1*")))).read_bytes(), "x")


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """What migrate prints, in one line, and its exit code."""
    code = main(["migrate", *map(str, arguments)])
    return code, " ".join(capsys.readouterr().out.split())


def pool(folder: Path, *records: Path) -> Path:
    for number, path in enumerate(records):
        (folder / f"{number}.json").write_bytes(path.read_bytes())
    return folder


# --- the advice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [METAL, GUEST, *sorted(POLICIES.glob("emulate*6.1*.json")), *sorted(POLICIES.glob("forced-shadow*6.1*.json"))],
    ids=lambda path: str(path.name),
)
@pytest.mark.parametrize("rule", ["qemu", "kvm", "firecracker", "cloud-hypervisor", "xen"])
def test_identical_machines_are_a_safe_pool(
    path: Path, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(capsys, pool(tmp_path, path, path, path), "--rule", rule)
    assert code == 0
    assert "no guest needs another CPUID: the pool is safe as it is" in text
    assert "leave out" not in text
    assert "hide the register" not in text


def test_what_no_guest_reads_back_is_not_called_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(POLICIES.glob("emulate-guest*6.1*"))
    _, text = said(capsys, pool(tmp_path, path, path))
    assert "every machine takes and keeps: none of the bits that guests read back" in text
    assert "a loss would not be seen for 11 of 16 guest CPUIDs" in text


def test_machines_that_keep_nothing_get_no_advice(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, ZEN2)
    assert code == 0
    assert "no move breaks, and no guest needs another CPUID; but whether the pool is safe cannot be told" in text
    assert "leave out" not in text
    assert "1 - - -" in text


def test_the_advice_is_the_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU is refused STIBP where the mask of 2020 decides; without IBRS a guest of Xen has no register at all."""
    folder = pool(tmp_path, METAL, METAL, GUEST)
    code, text = said(capsys, folder)
    assert (code, "leave out of guests' CPUID: INTEL_STIBP, AMD_STIBP; then guests" in text) == (1, True)
    code, text = said(capsys, folder, "--rule", "xen")
    assert (code, "the pool is safe as it is" in text) == (0, True)
    for rule, hide in (("qemu", ["INTEL_STIBP", "AMD_STIBP"]), ("xen", [])):
        assert main(["migrate", str(folder), "--json", "--rule", rule]) == int(rule == "qemu")
        document = json.loads(capsys.readouterr().out)
        assert (document["pool"]["rule"], document["pool"]["hide"]) == (rule, hide)
        assert {done["rule"] for done in document["moves"]} == {rule}


def test_a_folder_of_two_has_matrix_and_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, pool(tmp_path, METAL, GUEST))
    assert code == 1
    assert "qemu refused if it holds bit 1 (STIBP)" in text
    assert "from\\to 1 2" in text
    assert "leave out of guests' CPUID: INTEL_STIBP, AMD_STIBP" in text


def names(features: int | None) -> str:
    return "nothing helps" if features is None else str(Profile(features))


def test_an_unlisted_register_is_lost_for_every_measured_guest() -> None:
    """A kernel that does not list the register, and a VMM's own check: what KVM offers is not all that guests have."""
    sides = {
        name: Side(
            bits, bits, bits, listed=False, offers=parse_profile("INTEL_PSFD").mask, guest=parse_profile(name).mask
        )
        for name, bits in (("zen2-client", 0x6), ("qemu-epyc-milan-v2", 0x87), ("empty", 0), ("none", 0))
    }
    groups = grouped([Place(name, name, sides) for name in "abc"])
    found = advise(groups, RULE["qemu"])
    assert names(found.hide) == "AMD_IBRS,AMD_STIBP,AMD_SSBD,AMD_PSFD".replace("AMD_IBRS", "INTEL_PSFD,AMD_IBRS")
    assert found.unmeasured == (parse_profile("AMD_IBPB"),)
    assert not advise(groups, RULE["kvm"]).breaks.some


BITS = (0, 1, 2, 3, 7, 10, 63)  # the others are like one of these


@functools.cache
def row(policy: str, kernel: str, host: Host, profile: Profile) -> Measured:
    """What a model answers to the matrix."""
    machine = PolicyMachine(POLICY[policy], get(kernel)) if policy else get(kernel)

    def mask(cell: Cell, opener: int) -> int:
        asked = [(0, 0)] if cell.single else [(bit, 1 << bit) for bit in BITS]
        return mask_of(bit for bit, value in asked if answers_so(cell, value, opener))

    def answers_so(cell: Cell, value: int, opener: int) -> bool:
        said = answers(machine, Program(profile, cell.operations(value, opener)), host)
        refused = cell.answer is None and (Word.GP in said or Word.REFUSED in said)
        return holds(cell, value, said[-1]) and not refused

    first = mask(CELLS[0], 0)
    opener = first & -first
    return Measured(profile, opener, {cell.name: mask(cell, opener) for cell in CELLS if opener or not cell.after})


def modelled(policy: str, kernel: str, host: Host, profiles: Sequence[Profile], listed: bool) -> kvm_record.KvmRecord:
    """A record as this machine would leave one, with the model's answers."""
    rows = [row(policy, kernel, host, profile) for profile in profiles]
    return msgspec.structs.replace(
        TEMPLATE,
        rows=kvm_record.row_entries(rows),
        hardware=kvm_record.hardware_entry(host),
        kvm=msgspec.structs.replace(TEMPLATE.kvm, in_msr_index_list=listed),
    )


KERNELS = ("kvm-5.6-svm", "kvm-5.10.133-svm", "kvm-6.1-svm", "kvm-6.19-svm", "kvm-6.19-vmx", "kvm-4.17-vmx")
HOSTED = [host for _, host in HOSTS] + [cpu.host for cpu in cpus()]
machines = st.tuples(
    st.sampled_from(["", "", *POLICY]), st.sampled_from(KERNELS), st.sampled_from(HOSTED), st.booleans()
)


@given(
    made=st.lists(machines, min_size=2, max_size=4),
    profiles=st.lists(st.sampled_from([named.profile for named in NAMED]), min_size=1, max_size=4, unique=True),
    rule=st.sampled_from(RULES),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_advice_holds_on_the_machines_that_it_is_for(
    made: list[tuple[str, str, Host, bool]], profiles: list[Profile], rule: Rule
) -> None:
    """Each machine is modelled anew with the guests that the advice leaves, and they move: no cell is marked."""

    def measured(profiles: Sequence[Profile]) -> list[Place]:
        return [place_of(modelled(*one[:3], profiles, one[3]), str(n)) for n, one in enumerate(made)]

    for _ in range(20):  # what the advice leaves is measured, too, and it is asked again
        groups = grouped(measured(profiles))
        found = advise(groups, rule)
        assert found.breaks.some == any(breaking(groups, rule))
        lacking = {*found.unmeasured, *found.unmeasured_closed}
        if not lacking:
            break
        profiles = [*profiles, *lacking]
    assert not lacking
    assert found.breaks.some or (found.hide, found.closes) == (0, 0)
    for hide, careful in ((found.hide, True), (found.closes, False)):
        if hide is not None:
            after = measured([Profile(one.mask & ~hide) if one.mask & hide else one for one in profiles])
            if careful:
                after = [
                    replace(one, sides={name: obedient(side) for name, side in one.sides.items()}) for one in after
                ]
            assert not any(breaking(grouped(after), rule)), (names(hide), careful)


def breaking(groups: Sequence[Group], rule: Rule) -> Iterator[bool]:
    """Whether each move of the pool breaks, one by one."""
    for one in groups:
        for other in groups:
            if (one is not other or len(one.places) > 1) and comparable(one.first, other.first):
                yield move(rule, one.first, other.first).broken


def obedient(side: Side) -> Side:
    return replace(side, holds=side.holds & enumerated(side.guest))


# --- what cannot be told, and who has no register -------------------------------------------------------------------


def test_a_register_that_keeps_nothing_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pair = [next(ZEN2.glob("*5.10*.json")), next(ZEN2.glob("*7.2*.json"))]
    code, text = said(capsys, *pair)
    assert code == 0
    assert text.count("nothing can be said of hardware") == 2 * len(RULES)
    assert "this register keeps nothing" in text
    assert main(["migrate", *map(str, pair), "--json"]) == 0
    for done in json.loads(capsys.readouterr().out)["moves"]:
        assert (done["outcome"], done["profiles_unsaid"] > 0) == ("unsaid", True)
        assert done["unsaid"] == "nothing can be said of hardware: this register keeps nothing"


def test_what_is_refused_is_told_of_a_register_that_keeps_nothing() -> None:
    """It is what the destination says; reserved bits that read back say nothing of the defined ones."""
    forgetful = Side(1 << 63, ALL_BITS, 0, listed=True, forgets=True, sees=0)
    assert move(RULE["kvm"], Place("a", "", {"x": forgetful}), Place("b", "", {"x": forgetful})).word == "unsaid"
    strict = Place("c", "", {"x": Side(0, 0x6, 0x6, listed=True)})
    assert move(RULE["kvm"], Place("a", "", {"x": forgetful}), strict) == Move(refused=1 << 63)


def test_a_guest_of_xen_without_ibrs_has_no_register(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, METAL, METAL, "--rule", "xen")
    assert code == 0
    assert text.count("xen no register: this VMM answers such guests with #GP") == 2
    assert "lost" not in text
    assert main(["migrate", str(METAL), str(METAL), "--rule", "xen", "--json"]) == 0
    assert all(done["profiles_without_register"] == 1 for done in json.loads(capsys.readouterr().out)["moves"])


def test_a_guest_of_xen_holds_what_xen_lets_it() -> None:
    """IBRS, and STIBP with it, are not refused; PSFD is, unless an HVM guest is not intercepted: then it is clamped."""
    side = Side(0x87, ALL_BITS, ALL_BITS, listed=True, guest=parse_profile("AMD_IBRS").mask)
    place = Place("a", "", {"x": side})
    done = move(RULE["xen"], place, place)
    assert (RULE["xen"].held(side), done.word, done.beyond) == (0x3, "works", 0x84)
    assert "clamped: bits 2,7 (SSBD, PSFD)" in " ".join(migrate_text.pair(place, place, [RULE["xen"]]).split())
    assert move(RULE["kvm"], place, place).beyond == 0


# --- files and folders ------------------------------------------------------------------------------------------------


def test_what_is_no_regular_file_in_a_folder_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "x.json")
    (tmp_path / "folder.json").mkdir()
    assert main(["migrate", str(pool(tmp_path, METAL, METAL))]) == 0
    out, err = capsys.readouterr()
    assert err.count("is no regular file") == 2
    assert "2 files of this folder were LEFT OUT" in " ".join(out.split())


def test_folders_and_files_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, path in (("one", METAL), ("two", GUEST)):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "r.json").write_bytes(path.read_bytes())
    code, text = said(capsys, tmp_path / "one", tmp_path / "two")
    assert (code, "2 records, 2 kinds of machine" in text) == (1, True)
    assert "one/deep/r.json" in text
    assert "two/deep/r.json" in text
    code, text = said(capsys, tmp_path / "one", METAL, GUEST)
    assert (code, "3 records, 2 kinds of machine" in text) == (1, True)


# --- many machines ----------------------------------------------------------------------------------------------------


def some_side(number: random.Random) -> Side:
    holds, takes, keeps = (number.choice([0, 0x6, 0x7, 0x87, ALL_BITS, number.getrandbits(8)]) for _ in range(3))
    sees = number.choice([0, ALL_BITS, 0x3])
    listed, takes_zero = number.random() < 0.8, number.random() < 0.9
    return Side(holds, takes, keeps, listed, ZEN, ZEN, sees, takes_zero)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.name))
def test_all_moves_at_once_are_the_moves_one_by_one(rule: Rule) -> None:
    """Machines of one's own, of several guests, alone and several of a kind."""
    number = random.Random(48)
    for _ in range(200):
        places = [
            Place(str(n), "", {name: some_side(number) for name in number.choice([("x",), ("x", "y"), (ANY,)])})
            for n in range(number.randint(2, 5))
        ]
        groups = grouped(places + number.sample(places, 1))
        whole = breaks_of(stays_of(groups), rule, careful=False)
        assert whole.some == any(breaking(groups, rule))
        for kind, one in enumerate(groups):
            leaves = [
                move(rule, one.first, other.first).broken
                for other in groups
                if (one is not other or len(one.places) > 1) and comparable(one.first, other.first)
            ]
            assert (kind in whole.kinds) == any(leaves)


def careful(place: Place) -> Place:
    return replace(place, sides={name: obedient(side) for name, side in place.sides.items()})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.name))
def test_what_breaks_for_the_careful_is_what_breaks_if_they_hold_no_more(rule: Rule) -> None:
    number = random.Random(52)
    for _ in range(200):
        places = [
            Place(str(n), "", {name: some_side(number) for name in ("x", "y")}) for n in range(number.randint(2, 5))
        ]
        groups = [Group((place, *number.choice([(), (place,)]))) for place in places]
        found = breaks_of(stays_of(groups), rule, careful=True)
        held = breaks_of(stays_of([Group(tuple(map(careful, group.places))) for group in groups]), rule, careful=False)
        assert found == held


def test_a_matrix_of_too_many_kinds_says_what_it_leaves_out() -> None:
    """Those that break come first, and the numbers stay those of the JSON."""
    good = [Place(f"g{n}", "", {"x": Side(0, 0x6, 0x6 ^ n % 2, listed=True, offers=n)}) for n in range(100)]
    bad = Place("bad", "", {"x": Side(0x80, ALL_BITS, ALL_BITS, listed=True)})
    groups = grouped([*good, bad])
    text = migrate_text.matrix(groups, RULE["kvm"])
    assert "41 kinds are LEFT OUT here, of 101" in text
    assert "101  bad" in text
    assert sum(line.startswith("    101 ") for line in text.splitlines()) == 4, "a row in each block of columns"
    assert all(len(line) <= 75 for line in text.splitlines())
    document = json.loads("".join(migrate_text.as_json(groups, RULE["kvm"], [RULE["kvm"]])))
    assert (len(document["kinds"]), len(document["moves"])) == (101, 101 * 100)


def test_the_bench_has_a_pool_without_two_machines_alike() -> None:
    """And what it measures is a pool that breaks, as its exit code says."""
    made: list[AnyRecord] = [kvm_record.decode(raw, "x") for raw in [*distinct_kvm(20), *distinct_kvm(20, whole=True)]]
    made += [decode(raw, "x") for raw in distinct_runs(20)]
    groups = grouped([place_of(one, str(number)) for number, one in enumerate(made)])
    assert len(groups) == 60
    assert advise(groups, RULE["qemu"]).breaks.some
