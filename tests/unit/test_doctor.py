# SPDX-License-Identifier: MIT
"""Every state that each of doctor's checks can be in, and that whatever stands in the way comes with a remedy."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from probe.cpuid.snapshot import Snapshot
from probe.doctor import Check, Program, Surroundings, examine, look_around, ready_for
from probe.host import Facts
from tests.fakes_machine import facts_of, small_cpu, threadripper

FACTS = facts_of("threadripper-3970x")
CPUS = threadripper()
QEMU = Program("qemu-system-x86_64", True, "apt-get install qemu-system-x86")
VIRTME = Program("virtme-ng", True, "python3 -m pip install virtme-ng")
AROUND = Surroundings(
    root=True,
    msr_loadable=True,
    msr_nodes=(0, 1),
    cpuid_nodes=True,
    kvm="",
    programs=(QEMU, VIRTME),
    guest_kernel="debian:bookworm",
)


def examined(facts: Facts = FACTS, around: Surroundings = AROUND, cpus: dict[int, Snapshot] = CPUS) -> list[Check]:
    return examine(facts, around, cpus)


def check(name: str, facts: Facts = FACTS, around: Surroundings = AROUND, cpus: dict[int, Snapshot] = CPUS) -> Check:
    (found,) = (one for one in examined(facts, around, cpus) if one.name == name)
    return found


def facts(**changes: object) -> Facts:
    return dataclasses.replace(FACTS, **changes)  # type: ignore[arg-type]


def around(**changes: object) -> Surroundings:
    return dataclasses.replace(AROUND, **changes)  # type: ignore[arg-type]


def without(program: str) -> Surroundings:
    return around(programs=tuple(dataclasses.replace(one, there=one.name != program) for one in (QEMU, VIRTME)))


def test_a_machine_with_nothing_in_the_way() -> None:
    checks = examined()
    assert {one.state for one in checks} == {"ok", "note"}
    assert [one.name for one in checks if one.state == "note"] == ["taint"]
    assert ready_for(checks) == ["metal", "guest"]


def test_every_check_has_a_name_of_its_own() -> None:
    names = [one.name for one in examined()]
    assert len(set(names)) == len(names)


BAD_CPU = {0: small_cpu("GenuineIntel", 6, 0x55, 4)}

# name of the check, the world, its state, what its text says, what its remedy says, the places that are left
CASES: list[tuple[str, Facts, Surroundings, str, str, str, list[str]]] = [
    ("root", FACTS, AROUND, "ok", "running as root", "", ["metal", "guest"]),
    ("root", FACTS, around(root=False), "no", "CAP_SYS_RAWIO", "sudo", ["guest"]),
    ("msr driver", FACTS, AROUND, "ok", "for 2 CPUs", "", ["metal", "guest"]),
    ("msr driver", FACTS, around(msr_nodes=()), "ok", "not loaded", "", ["metal", "guest"]),
    (
        "msr driver",
        FACTS,
        around(msr_nodes=(), msr_loadable=False),
        "no",
        "no msr module",
        "run --in guest",
        ["guest"],
    ),
    ("cpuid driver", FACTS, AROUND, "ok", "is there", "", ["metal", "guest"]),
    ("cpuid driver", FACTS, around(cpuid_nodes=False), "note", "not cross-checked", "modprobe", ["metal", "guest"]),
    ("lockdown", FACTS, AROUND, "ok", "none", "", ["metal", "guest"]),
    (
        "lockdown",
        facts(lockdown="unknown"),
        AROUND,
        "unknown",
        "securityfs",
        "mount -t securityfs",
        ["metal", "guest"],
    ),
    ("lockdown", facts(lockdown="integrity"), AROUND, "no", "integrity", "Secure Boot", ["guest"]),
    ("lockdown", facts(lockdown="confidentiality"), AROUND, "no", "confidentiality", "lockdown=", ["guest"]),
    ("allow_writes", FACTS, AROUND, "ok", "default", "", ["metal", "guest"]),
    ("allow_writes", facts(allow_writes=""), AROUND, "ok", "not set", "", ["metal", "guest"]),
    ("allow_writes", facts(allow_writes="off"), AROUND, "no", "msr.allow_writes=off", "echo default >", ["guest"]),
    ("taint", FACTS, AROUND, "note", "0; run --write would add 4", "", ["metal", "guest"]),
    ("taint", facts(taint=516), AROUND, "note", "516: already tainted", "", ["metal", "guest"]),
    ("taint", facts(taint=512), AROUND, "note", "512; run --write would add 4", "", ["metal", "guest"]),
    ("taint", facts(taint=None), AROUND, "unknown", "cannot be read", "", ["metal", "guest"]),
    ("running VMs", FACTS, AROUND, "ok", "none", "", ["metal", "guest"]),
    ("running VMs", FACTS, around(root=False), "unknown", "without root", "sudo", ["guest"]),
    ("running VMs", facts(vms=((7, "qemu"),)), AROUND, "no", "qemu (7)", "--allow-running-vms", ["guest"]),
    ("microcode", FACTS, AROUND, "ok", "0x8301055", "", ["metal", "guest"]),
    ("microcode", facts(microcode={}), AROUND, "unknown", "does not tell", "", ["metal", "guest"]),
    ("read-back", FACTS, AROUND, "ok", "Retpolines", "", ["metal", "guest"]),
    ("read-back", facts_of("skylake-legacy-ibrs"), AROUND, "note", "legacy IBRS", "", ["guest"]),
    ("KVM", FACTS, AROUND, "ok", "/dev/kvm opens", "", ["metal", "guest"]),
    ("KVM", FACTS, around(kvm="No such file or directory"), "note", "TCG", "modprobe kvm", ["metal", "guest"]),
    ("guest tools", FACTS, AROUND, "ok", "qemu-system-x86_64, virtme-ng", "", ["metal", "guest"]),
    (
        "qemu-system-x86_64",
        FACTS,
        without("qemu-system-x86_64"),
        "no",
        "missing",
        "apt-get install qemu-system-x86",
        ["metal"],
    ),
    ("virtme-ng", FACTS, without("virtme-ng"), "no", "missing", "pip install", ["metal"]),
    ("guest kernel", FACTS, AROUND, "ok", "debian:bookworm", "", ["metal", "guest"]),
    ("guest kernel", FACTS, around(guest_kernel=""), "no", "no apt-get", "--kernel", ["metal"]),
]


@pytest.mark.parametrize(("name", "facts", "around", "state", "text", "remedy", "places"), CASES)
def test_a_check(
    name: str, facts: Facts, around: Surroundings, state: str, text: str, remedy: str, places: list[str]
) -> None:
    found = check(name, facts, around)
    assert found.state == state
    assert text in found.text
    assert remedy in found.remedy
    assert ready_for(examined(facts, around)) == places


def test_microcode_on_the_bad_list() -> None:
    found = check("microcode", facts(microcode={0: 0x0200003C}), cpus=BAD_CPU)
    assert (found.state, found.needs) == ("no", "metal")
    assert "broken speculation control" in found.text
    assert found.remedy


def test_whatever_stands_in_the_way_has_a_remedy_and_names_what_it_stops() -> None:
    worst = Surroundings(
        root=False,
        msr_loadable=False,
        msr_nodes=(),
        cpuid_nodes=False,
        kvm="Permission denied",
        programs=(dataclasses.replace(QEMU, there=False), dataclasses.replace(VIRTME, there=False)),
        guest_kernel="",
    )
    locked = facts(lockdown="integrity", allow_writes="off", vms=((7, "qemu"),), microcode={0: 0x0200003C})
    checks = examined(locked, worst, BAD_CPU)
    blocking = [one for one in checks if one.state == "no"]
    assert {one.name for one in blocking} == {
        "root",
        "msr driver",
        "lockdown",
        "allow_writes",
        "running VMs",
        "microcode",
        "qemu-system-x86_64",
        "virtme-ng",
        "guest kernel",
    }
    assert all(one.remedy and one.needs in ("metal", "guest") for one in blocking)
    assert ready_for(checks) == []


def test_only_what_stands_in_the_way_counts() -> None:
    states = ("ok", "no", "note", "unknown")
    for metal, guest in itertools.product(states, states):
        checks = [Check("a", metal, "", "metal"), Check("b", guest, "", "guest"), Check("c", "no", "")]
        assert ready_for(checks) == [place for place, state in (("metal", metal), ("guest", guest)) if state != "no"], (
            "a check that no place needs stops none"
        )


def test_many_vms_are_named_up_to_four() -> None:
    found = check("running VMs", facts(vms=tuple((pid, f"vm{pid}") for pid in range(1, 9))))
    assert found.text.startswith("vm1 (1), vm2 (2), vm3 (3), vm4 (4)")


def test_looking_around_changes_nothing_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    seen = look_around((), False, [QEMU], "host")
    assert (seen.programs, seen.guest_kernel) == ((QEMU,), "host")
    assert examine(FACTS, seen, CPUS)
    assert capsys.readouterr() == ("", "")
