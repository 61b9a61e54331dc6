# SPDX-License-Identifier: MIT
"""What the agent learns from the kernel's files: folders of tests/data/hosts, and single files made on the spot."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from probe.host import (
    BAD_MICROCODE,
    CMDLINE_ALLOWED,
    Bios,
    Host,
    Modules,
    bad_microcode,
    has_erratum_1485,
    running_processes,
)
from tests.fakes_machine import HOSTS, facts_of, make_tree, small_cpu

# --- a whole machine ---


def test_a_machine_with_everything() -> None:
    facts = Host(HOSTS / "threadripper-3970x").facts()
    assert (facts.kernel, facts.kernel_version) == (os.uname().release, os.uname().version)
    assert facts.cmdline == ("mitigations=auto", "kvm_amd.nested=1")
    assert facts.online == (0, 1)
    assert facts.microcode == {0: 0x8301055, 1: 0x8301055}
    assert facts.bios == Bios("American Megatrends Inc.", "F6", "07/15/2021", "TRX40 example board")
    assert list(facts.mitigations) == ["meltdown", "retbleed", "spec_store_bypass", "spectre_v1", "spectre_v2"]
    assert facts.mitigations["retbleed"] == "Mitigation: untrained return thunk; SMT enabled with STIBP protection"
    assert (facts.lockdown, facts.allow_writes, facts.taint, facts.smt) == ("none", "default", 0, "on")
    assert facts.boot_id == "0f8fad5b-d9cb-469f-a165-70867728950e"
    assert facts.vms == ()
    assert not facts.legacy_ibrs
    assert Host(HOSTS / "threadripper-3970x").msr_cpus() == (0, 1)


def test_a_machine_that_stands_in_the_way() -> None:
    facts = Host(HOSTS / "skylake-legacy-ibrs").facts()
    assert (facts.lockdown, facts.allow_writes, facts.taint) == ("integrity", "off", 4)
    assert facts.legacy_ibrs
    assert facts.cmdline == ("retbleed=auto", "spectre_v2=ibrs")
    assert Host(HOSTS / "skylake-legacy-ibrs").msr_cpus() == ()


def test_a_guest_that_tells_little() -> None:
    facts = Host(HOSTS / "kvm-guest").facts()
    assert facts.microcode == {0: 0x1000065, 1: 0x1000065}, "from /proc/cpuinfo"
    assert (facts.lockdown, facts.allow_writes, facts.taint, facts.smt) == ("unknown", "", None, "")
    assert facts.bios == Bios()
    assert facts.cmdline == ("nosmt=force",)


def test_a_machine_without_any_of_the_files(tmp_path: Path) -> None:
    facts = Host(tmp_path).facts()
    assert facts.online == tuple(range(os.cpu_count() or 1))
    assert (facts.microcode, facts.mitigations, facts.cmdline, facts.vms) == ({}, {}, (), ())
    assert (facts.lockdown, facts.taint, facts.boot_id) == ("unknown", None, "")


@pytest.mark.parametrize("machine", sorted(path.name for path in HOSTS.iterdir() if path.is_dir()))
def test_no_name_address_or_serial_number_comes_through(machine: str) -> None:
    told = repr(dataclasses.asdict(Host(HOSTS / machine).facts()))
    for secret in ("a-host-name", "SERIAL", "UUID", "/dev/", "root=", "console", "BOOT_IMAGE"):
        assert secret not in told


# --- the kernel's command line ---


def cmdline(folder: Path, text: str) -> tuple[str, ...]:
    return Host(make_tree(folder, {"proc/cmdline": text + "\n"})).cmdline()


@pytest.mark.parametrize(
    "word",
    [
        "mitigations=off",
        "mitigations=auto,nosmt",
        "spectre_v2=eibrs,retpoline",
        "spectre_v2_user=seccomp,ibpb",
        "nospectre_v2",
        "spec_store_bypass_disable=prctl",
        "retbleed=auto,nosmt",
        "spec_rstack_overflow=safe-ret",
        "nosmt",
        "nosmt=force",
        "lockdown=integrity",
        "clearcpuid=speC_ctrl,514",
        "msr.allow_writes=on",
        "kvm.ignore_msrs=1",
        "kvm_intel.nested=1",
        "kvm_amd.sev_es=0",
        "dis_ucode_ldr",
        "vmscape=force",
    ],
)
def test_what_bears_on_the_result_comes_through(tmp_path: Path, word: str) -> None:
    assert cmdline(tmp_path, f"quiet {word} ro") == (word,)


@pytest.mark.parametrize(
    "word",
    [
        "secret=hunter2",
        "root=UUID=6d6a2b3e-0c1d-4f5a-9b7e-1f2e3d4c5b6a",
        "root=/dev/mapper/vg-root",
        "ip=192.0.2.7::192.0.2.1:255.255.255.0:a-host:eth0:off",
        "nfsroot=192.0.2.1:/srv/a-user",
        "BOOT_IMAGE=/boot/vmlinuz",
        "systemd.hostname=a-host",
        "mitigations_of=x",
        "xmitigations=off",
        "Mitigations=off",
        "my.mitigations=off",
        "mitigations=/home/a-user",
        "mitigations=off@a-host",
        "mitigations=off;secret",
        "mitigations=off'",
        'mitigations="off',
        "mitigations=a\u00fcthor",
        "mitigations=off\x1b[31m",
        "mitigations=off=secret",
        "lockdown=~a-user",
        "msr.allow_writes=$(secret)",
        "msr.",
        "msr.a/b=1",
        "kvm_secret.token=1",
        "kvmx.token=abc",
        "microcode=a\\b",
        "--",
        "=",
    ],
)
def test_everything_else_stays_on_the_machine(tmp_path: Path, word: str) -> None:
    assert cmdline(tmp_path, f"quiet {word} ro") == ()


def test_a_line_end_within_a_word_does_not_open_the_list() -> None:
    assert CMDLINE_ALLOWED.match("nosmt\n") is None
    assert CMDLINE_ALLOWED.match("mitigations=off\nsecret") is None


def test_a_dash_is_an_underscore(tmp_path: Path) -> None:
    """The kernel takes kvm-intel.nested=1 as well: linux v7.1 kernel/params.c, dash2underscore()."""
    assert cmdline(tmp_path, "kvm-intel.nested=1 spec-store-bypass-disable=on") == (
        "kvm-intel.nested=1",
        "spec-store-bypass-disable=on",
    )


def test_what_stands_in_quotes_is_one_value(tmp_path: Path) -> None:
    """linux v7.1 lib/cmdline.c, next_arg()."""
    assert cmdline(tmp_path, 'secret="a mitigations=off b" nosmt') == ("nosmt",)


def test_what_follows_two_dashes_is_for_init(tmp_path: Path) -> None:
    """linux v7.1 kernel/params.c, parse_args(): the kernel stops at --."""
    assert cmdline(tmp_path, "nosmt -- mitigations=off") == ("nosmt",)


def test_a_command_line_that_is_not_utf_8(tmp_path: Path) -> None:
    make_tree(tmp_path, {"proc/cmdline": ""})
    (tmp_path / "proc/cmdline").write_bytes(b"secret=\xff\xfe nosmt\n")
    assert Host(tmp_path).cmdline() == ("nosmt",)


# --- lockdown, taint, online ---


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("[none] integrity confidentiality\n", "none"),
        ("none [integrity] confidentiality\n", "integrity"),
        ("none integrity [confidentiality]\n", "confidentiality"),
        ("", "unknown"),
        ("something else\n", "unknown"),
    ],
)
def test_lockdown(tmp_path: Path, text: str, level: str) -> None:
    assert Host(make_tree(tmp_path, {"sys/kernel/security/lockdown": text})).lockdown() == level


@pytest.mark.parametrize(("text", "taint"), [("0\n", 0), ("4\n", 4), ("4613\n", 4613), ("", None), ("x", None)])
def test_taint(tmp_path: Path, text: str, taint: int | None) -> None:
    assert Host(make_tree(tmp_path, {"proc/sys/kernel/tainted": text})).taint() == taint


def test_online(tmp_path: Path) -> None:
    assert Host(make_tree(tmp_path, {"sys/devices/system/cpu/online": "0-2,8\n"})).online() == (0, 1, 2, 8)


def test_msr_nodes_of_online_cpus_only(tmp_path: Path) -> None:
    make_tree(tmp_path, {"sys/devices/system/cpu/online": "0,2\n", "dev/cpu/0/msr": "", "dev/cpu/1/msr": ""})
    assert Host(tmp_path).msr_cpus() == (0,)


# --- microcode ---


def microcode_file(cpu: int) -> str:
    return f"sys/devices/system/cpu/cpu{cpu}/microcode/version"


def test_microcode_of_cpus_that_differ(tmp_path: Path) -> None:
    make_tree(tmp_path, {microcode_file(0): "0xf0\n", microcode_file(1): "0xf4\n", microcode_file(2): "what\n"})
    assert Host(tmp_path).microcode((0, 1, 2, 3)) == {0: 0xF0, 1: 0xF4}


def test_cpuinfo_is_the_second_source_only(tmp_path: Path) -> None:
    cpuinfo = "processor\t: 0\nmicrocode\t: 0x1\n\nprocessor\t: 5\nmicrocode\t: 0xffffffff\n"
    make_tree(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert Host(tmp_path).microcode((0, 5)) == {0: 0x1, 5: 0xFFFFFFFF}
    assert Host(tmp_path).microcode((0,)) == {0: 0x1}
    make_tree(tmp_path, {microcode_file(0): "0xf0\n"})
    assert Host(tmp_path).microcode((0, 5)) == {0: 0xF0}


@pytest.mark.parametrize(("model", "stepping"), sorted(BAD_MICROCODE))
def test_the_last_bad_revision_is_bad_and_the_next_is_not(model: int, stepping: int) -> None:
    last = BAD_MICROCODE[model, stepping]
    cpu = small_cpu("GenuineIntel", 6, model, stepping)
    assert (cpu.family, cpu.model, cpu.stepping) == (6, model, stepping)
    why = bad_microcode(cpu, last)
    assert f"{last:#x}" in why
    assert f"06-{model:02x}-{stepping:02x}" in why
    assert bad_microcode(cpu, last - 1)
    assert bad_microcode(cpu, last + 1) == ""


def test_the_list_is_for_intel_family_6_on_bare_metal() -> None:
    # linux v7.1 arch/x86/kernel/cpu/intel.c, bad_spectre_microcode()
    assert bad_microcode(small_cpu("GenuineIntel", 6, 0x55, 4), 0x0200003C)
    assert bad_microcode(small_cpu("GenuineIntel", 6, 0x55, 4, hypervisor="KVMKVMKVM"), 0x0200003C) == ""
    assert bad_microcode(small_cpu("GenuineIntel", 0xF, 0x55, 4), 0x0200003C) == ""
    assert bad_microcode(small_cpu("AuthenticAMD", 6, 0x55, 4), 0x0200003C) == ""
    assert bad_microcode(small_cpu("GenuineIntel", 6, 0x55, 5), 0x0200003C) == ""
    assert bad_microcode(small_cpu("GenuineIntel", 6, 0x5E, 3), 0) == ""


def test_the_list_is_linux_list() -> None:
    assert len(BAD_MICROCODE) == 20
    assert BAD_MICROCODE[0x3D, 4] == 0x28  # Broadwell
    assert BAD_MICROCODE[0x2D, 7] == 0x712  # Sandy Bridge X


# --- erratum 1485, legacy IBRS ---


@pytest.mark.parametrize(
    ("model", "has"),
    [
        (0x0F, False),
        (0x10, True),
        (0x11, True),
        (0x1F, True),
        (0x20, False),
        (0x50, False),
        (0x5F, False),
        (0x60, True),
        (0x61, True),
        (0xA0, True),
        (0xAF, True),
        (0xB0, False),
    ],
)
def test_erratum_1485_is_in_zen_4(model: int, has: bool) -> None:
    assert has_erratum_1485(small_cpu("AuthenticAMD", 0x19, model, 1)) is has


def test_erratum_1485_elsewhere() -> None:
    assert not has_erratum_1485(small_cpu("AuthenticAMD", 0x19, 0x11, 1, hypervisor="KVMKVMKVM"))
    assert not has_erratum_1485(small_cpu("AuthenticAMD", 0x1A, 0x11, 1))
    assert not has_erratum_1485(small_cpu("AuthenticAMD", 0x17, 0x61, 1))
    assert not has_erratum_1485(small_cpu("HygonGenuine", 0x19, 0x11, 1))


# linux v7.1 arch/x86/kernel/cpu/bugs.c, spectre_v2_strings[] and spectre_v2_show_state(), and its forms since v4.15.
@pytest.mark.parametrize(
    ("line", "legacy"),
    [
        ("Mitigation: IBRS; IBPB: conditional; STIBP: conditional; RSB filling; PBRSB-eIBRS: Not affected", True),
        ("Mitigation: IBRS, IBPB: always-on, RSB filling", True),
        ("Mitigation: IBRS", True),
        ("Mitigation: Enhanced / Automatic IBRS; IBPB: conditional; PBRSB-eIBRS: SW sequence; BHI: BHI_DIS_S", False),
        ("Mitigation: Enhanced IBRS; IBPB: conditional; RSB filling; PBRSB-eIBRS: SW sequence", False),
        ("Mitigation: Enhanced IBRS, IBPB: conditional, RSB filling", False),
        ("Mitigation: Enhanced / Automatic IBRS + Retpolines; IBPB: conditional", False),
        ("Mitigation: Enhanced / Automatic IBRS + LFENCE", False),
        ("Mitigation: Retpolines; IBPB: conditional; IBRS_FW; STIBP: conditional; RSB filling", False),
        ("Mitigation: Full generic retpoline, IBPB, IBRS_FW", False),
        ("Mitigation: IBRS_FW", False),
        ("Mitigation: LFENCE", False),
        ("Vulnerable; IBPB: disabled; STIBP: disabled; PBRSB-eIBRS: Vulnerable; BHI: Vulnerable", False),
        ("Vulnerable: eIBRS with unprivileged eBPF", False),
        ("Not affected", False),
        ("", False),
    ],
)
def test_legacy_ibrs_by_the_kernels_own_words(line: str, legacy: bool) -> None:
    facts = dataclasses.replace(facts_of("kvm-guest"), mitigations={"spectre_v2": line})
    assert facts.legacy_ibrs is legacy


def test_without_a_line_there_is_no_legacy_ibrs() -> None:
    assert not dataclasses.replace(facts_of("kvm-guest"), mitigations={}).legacy_ibrs


# --- running VMs ---


PROCESSES: list[tuple[int, str]] = []


@pytest.fixture(autouse=True)
def no_processes() -> None:
    PROCESSES.clear()


def process(root: Path, pid: int, name: str, files: dict[int, str]) -> None:
    (root / "proc" / str(pid) / "fd").mkdir(parents=True)
    PROCESSES.append((pid, name))
    for fd, target in files.items():
        (root / "proc" / str(pid) / "fd" / str(fd)).symlink_to(target)


def test_a_process_that_holds_a_vm_is_found(tmp_path: Path) -> None:
    process(tmp_path, 1, "systemd", {0: "/dev/null", 1: "anon_inode:[eventpoll]"})
    process(tmp_path, 1200, "qemu-system-x86", {9: "/dev/kvm", 10: "anon_inode:kvm-vm", 11: "anon_inode:kvm-vcpu:0"})
    process(tmp_path, 300, "firecracker", {4: "anon_inode:kvm-vm", 5: "anon_inode:kvm-vm"})
    process(tmp_path, 7, "idle-opener", {3: "/dev/kvm"})
    assert Host(tmp_path, lambda: PROCESSES).vms() == ((300, "firecracker"), (1200, "qemu-system-x86"))


def test_a_process_that_goes_away_or_is_closed_to_us_is_passed_over(tmp_path: Path) -> None:
    PROCESSES.append((40, "gone"))  # no fd folder: it has just gone
    process(tmp_path, 41, "qemu", {3: "anon_inode:kvm-vm"})
    assert Host(tmp_path, lambda: PROCESSES).vms() == ((41, "qemu"),)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_the_processes_of_this_machine() -> None:
    """The test itself is among them, under the name that the kernel has for it."""
    found = dict(running_processes())
    assert found[os.getpid()] == Path("/proc/self/comm").read_text().strip()


# --- modules ---


def test_a_module_that_no_kernel_has(tmp_path: Path) -> None:
    assert not Modules.available("spec_ctrl_probe_no_such_module")
    with Modules() as modules:
        assert modules.loaded == []
