# SPDX-License-Identifier: MIT
"""The edge to the running kernel: what it is, what it does to the register, and what it will let us do."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from probe.cpuid.snapshot import Snapshot
from probe.errors import RequirementMissing
from probe.masks import parse_list

# Parameters of the kernel's command line that bear on the result; everything else stays on the machine.
# Source: linux v7.1 Documentation/admin-guide/kernel-parameters.txt.
CMDLINE_ALLOWED = re.compile(
    r"(?:mitigations|attack_vector|nospectre_v1|nospectre_v2|spectre_v2|spectre_v2_user|spectre_bhi|"
    r"nospec_store_bypass_disable|spec_store_bypass_disable|retbleed|spec_rstack_overflow|l1tf|mds|tsx|"
    r"tsx_async_abort|mmio_stale_data|reg_file_data_sampling|gather_data_sampling|srbds|tsa|vmscape|"
    r"indirect_target_selection|its|nosmt|nopti|pti|lockdown|clearcpuid|setcpuid|dis_ucode_ldr|microcode(?:\.\w+)?|"
    r"ibt|intel_idle\.\w+|msr\.\w+|cpuid\.\w+|kvm\.\w+|kvm_intel\.\w+|kvm_amd\.\w+)"
    r"(?:=[A-Za-z0-9_,.:+-]*)?\Z"
)

# Intel microcode on which Linux turns speculation control off: model, stepping, last bad revision; family 6.
# Source: linux v7.1 arch/x86/kernel/cpu/intel.c, spectre_bad_microcodes[], bad_spectre_microcode().
BAD_MICROCODE: Mapping[tuple[int, int], int] = {
    (0x9E, 0x0B): 0x80,
    (0x9E, 0x0A): 0x80,
    (0x9E, 0x09): 0x80,
    (0x8E, 0x0A): 0x80,
    (0x8E, 0x09): 0x80,
    (0x55, 0x03): 0x0100013E,
    (0x55, 0x04): 0x0200003C,
    (0x3D, 0x04): 0x28,
    (0x47, 0x01): 0x1B,
    (0x56, 0x02): 0x14,
    (0x56, 0x03): 0x07000011,
    (0x4F, 0x01): 0x0B000025,
    (0x45, 0x01): 0x21,
    (0x46, 0x01): 0x18,
    (0x3C, 0x03): 0x23,
    (0x3F, 0x02): 0x3B,
    (0x3F, 0x04): 0x10,
    (0x3E, 0x04): 0x42A,
    (0x2D, 0x06): 0x61B,
    (0x2D, 0x07): 0x712,
}

# A double quote holds a value with blanks together: linux v7.1 lib/cmdline.c, next_arg().
_CMDLINE_WORD = re.compile(r'(?:"[^"]*"?|[^\s"])+')


def _underscored(word: str) -> str:
    """Return a parameter with its name as the kernel compares it: linux v7.1 kernel/params.c, dash2underscore()."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_") + equals + value


TAINT_CPU_OUT_OF_SPEC = 1 << 2  # 'S'; linux v7.1 include/linux/panic.h


def bad_microcode(cpu: Snapshot, revision: int | None) -> str:
    """Say why this microcode must not be probed, or return "".

    Linux does not apply the list under a hypervisor, because the revision seen there means nothing.
    Source: see BAD_MICROCODE.
    """
    if cpu.vendor != "Intel" or cpu.family != 6 or cpu.under_hypervisor:
        return ""
    last_bad = BAD_MICROCODE.get((cpu.model, cpu.stepping))
    if last_bad is None or (revision is not None and revision > last_bad):
        return ""
    which = "the revision is unknown, and early microcode" if revision is None else f"microcode {revision:#x}"
    return (
        f"{which} of {cpu.family:02x}-{cpu.model:02x}-{cpu.stepping:02x} is on Linux's list of "
        f"microcode with broken speculation control (up to {last_bad:#x}): writing MSR 0x48 made such machines unstable"
    )


def has_erratum_1485(cpu: Snapshot) -> bool:
    """Tell whether AMD erratum 1485 is in this silicon: with SMT on and STIBP off it may fetch wrong bytes.

    Source: linux f454b18e07f5 ("x86/cpu: Fix AMD erratum #1485 on Zen4-based CPUs"): family 19h, models 10h-1fh and
    60h-afh, bare metal only.
    """
    zen4 = 0x10 <= cpu.model <= 0x1F or 0x60 <= cpu.model <= 0xAF
    return cpu.vendor == "AMD" and cpu.family == 0x19 and zen4 and not cpu.under_hypervisor


@dataclass(frozen=True)
class Bios:
    """What the firmware calls itself; "" where DMI says nothing. No serial numbers."""

    vendor: str = ""
    version: str = ""
    date: str = ""
    product: str = ""


@dataclass(frozen=True)
class Facts:
    """The machine as the kernel shows it at one moment.

    microcode maps CPU to revision; mitigations maps the name of each file in .../cpu/vulnerabilities to its line;
    lockdown is none, integrity, confidentiality or unknown; allow_writes is the msr module's parameter, "" if the
    module is not loaded or older than v5.9; smt is the kernel's word for it (on, off, forceoff, notsupported ...).
    """

    kernel: str
    kernel_version: str
    cmdline: tuple[str, ...]
    online: tuple[int, ...]
    microcode: Mapping[int, int]
    bios: Bios
    mitigations: Mapping[str, str]
    lockdown: str
    allow_writes: str
    taint: int | None
    smt: str
    boot_id: str
    kvm_users: int = 0
    pid_namespace: bool = False
    vms: tuple[tuple[int, str], ...] = field(default=())

    @property
    def legacy_ibrs(self) -> bool:
        """True if the kernel rewrites the register on every entry and exit, so that reading it back means nothing.

        Source: linux v7.1 arch/x86/kernel/cpu/bugs.c, spectre_v2_strings[SPECTRE_V2_IBRS]; entry/calling.h.
        """
        line = self.mitigations.get("spectre_v2", "")
        return re.match(r"Mitigation: IBRS\b", line) is not None


Processes = Callable[[], Iterable[tuple[int, str]]]


def running_processes() -> Iterator[tuple[int, str]]:
    """Yield (pid, name) of every process that can be seen from here."""
    for process in psutil.process_iter(["name"]):
        yield process.pid, process.info["name"] or ""


class Host:
    """Reads the facts below a root folder: "/" in life, a folder of tests/data in a test."""

    def __init__(self, root: Path = Path("/"), processes: Processes | None = None) -> None:
        self._root = root
        self._processes = processes or running_processes

    def _text(self, path: str) -> str:
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def online(self) -> tuple[int, ...]:
        """Return the numbers of the logical CPUs that are online."""
        text = self._text("sys/devices/system/cpu/online")
        return parse_list(text) if text else tuple(range(os.cpu_count() or 1))

    def lockdown(self) -> str:
        """Return none, integrity or confidentiality; unknown if securityfs does not tell.

        Source: linux v7.1 security/lockdown/lockdown.c, lockdown_read(): the chosen level stands in brackets.
        """
        match = re.search(r"\[(\w+)\]", self._text("sys/kernel/security/lockdown"))
        return match[1] if match else "unknown"

    def taint(self) -> int | None:
        """Return the kernel's taint mask, or None if it cannot be read."""
        text = self._text("proc/sys/kernel/tainted")
        return int(text) if text.isdigit() else None

    def boot_id(self) -> str:
        """Return the random identifier of this boot."""
        return self._text("proc/sys/kernel/random/boot_id")

    def allow_writes(self) -> str:
        """Return the msr module's allow_writes parameter (on, off, default), or "" if there is none."""
        return self._text("sys/module/msr/parameters/allow_writes")

    def msr_cpus(self) -> tuple[int, ...]:
        """Return the CPUs that have a /dev/cpu/N/msr node."""
        return tuple(cpu for cpu in self.online() if (self._root / f"dev/cpu/{cpu}/msr").exists())

    def microcode(self, cpus: tuple[int, ...]) -> dict[int, int]:
        """Return the microcode revision of each CPU; a CPU on which the kernel does not tell is left out."""
        found: dict[int, int] = {}
        for cpu in cpus:
            text = self._text(f"sys/devices/system/cpu/cpu{cpu}/microcode/version")
            with contextlib.suppress(ValueError):
                found[cpu] = int(text, 16)
        if not found:  # no microcode driver (usual in guests): /proc/cpuinfo still has a line
            cpu = -1
            for line in self._text("proc/cpuinfo").splitlines():
                key, _, value = line.partition(":")
                if key.strip() == "processor":
                    cpu = int(value)
                elif key.strip() == "microcode" and cpu in cpus:
                    with contextlib.suppress(ValueError):
                        found[cpu] = int(value, 16)
        return found

    def mitigations(self) -> dict[str, str]:
        """Return the lines of /sys/devices/system/cpu/vulnerabilities."""
        folder = self._root / "sys/devices/system/cpu/vulnerabilities"
        try:
            names = sorted(path.name for path in folder.iterdir())
        except OSError:
            return {}
        return {name: self._text(f"sys/devices/system/cpu/vulnerabilities/{name}") for name in names}

    def cmdline(self) -> tuple[str, ...]:
        """Return those parameters of the kernel's command line that CMDLINE_ALLOWED lets through."""
        words = _CMDLINE_WORD.findall(self._text("proc/cmdline"))
        # What follows "--" is for init: linux v7.1 kernel/params.c, parse_args().
        ours = words[: words.index("--")] if "--" in words else words
        return tuple(word for word in ours if CMDLINE_ALLOWED.match(_underscored(word)))

    def bios(self) -> Bios:
        """Return what DMI says of the firmware and the machine's model."""
        dmi = "sys/class/dmi/id"
        return Bios(
            vendor=self._text(f"{dmi}/bios_vendor"),
            version=self._text(f"{dmi}/bios_version"),
            date=self._text(f"{dmi}/bios_date"),
            product=self._text(f"{dmi}/product_name"),
        )

    def vms(self) -> tuple[tuple[int, str], ...]:
        """Return (pid, name) of every process that holds a KVM VM open; their vCPUs may run on any CPU.

        Needs root to see other users' processes. Source: linux v7.1 virt/kvm/kvm_main.c, kvm_dev_ioctl_create_vm():
        the anonymous inode is called kvm-vm.
        """
        return tuple(self._vms())

    def _vms(self) -> Iterator[tuple[int, str]]:
        for pid, name in sorted(self._processes()):
            with contextlib.suppress(OSError):
                for fd in (self._root / f"proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(fd.readlink()).startswith("anon_inode:kvm-vm"):
                            yield pid, name
                            break

    def kvm_users(self) -> int:
        """Return how many references the KVM vendor modules have: open /dev/kvm and VMs, of hidden processes too.

        Cheap enough to be asked before every step of the walk.
        """
        total = 0
        for name in ("kvm_intel", "kvm_amd", "kvm_pvm"):
            with contextlib.suppress(OSError, ValueError), open(self._root / f"sys/module/{name}/refcnt") as file:
                total += int(file.read())
        return total

    def pid_namespace(self) -> bool:
        """Tell whether this process lives in a pid namespace of its own (a container): NSpid has several numbers."""
        match = re.search(r"^NSpid:(.*)$", self._text("proc/self/status"), re.MULTILINE)
        return match is not None and len(match[1].split()) > 1

    def facts(self) -> Facts:
        """Read everything at once."""
        online = self.online()
        uname = os.uname()
        return Facts(
            kernel=uname.release,
            kernel_version=uname.version,
            cmdline=self.cmdline(),
            online=online,
            microcode=self.microcode(online),
            bios=self.bios(),
            mitigations=self.mitigations(),
            lockdown=self.lockdown(),
            allow_writes=self.allow_writes(),
            taint=self.taint(),
            smt=self._text("sys/devices/system/cpu/smt/control"),
            boot_id=self.boot_id(),
            kvm_users=self.kvm_users(),
            pid_namespace=self.pid_namespace(),
            vms=self.vms(),
        )


class Modules:
    """Loads kernel modules that the probe needs, and unloads at the end those that it loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def __enter__(self) -> Modules:
        return self

    def __exit__(self, *_: object) -> None:
        with _signals_wait():
            for name in reversed(self.loaded):
                subprocess.run(
                    [_modprobe(), "--remove", name],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=False,
                    timeout=30,
                )

    @staticmethod
    def available(name: str) -> bool:
        """Tell whether modprobe would find the module (nothing is loaded)."""
        if shutil.which("modprobe", path=_SBIN) is None:
            return False
        done = subprocess.run(
            [_modprobe(), "--dry-run", "--quiet", name], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        return done.returncode == 0

    def load(self, name: str) -> None:
        """Load a module; raise RequirementMissing with modprobe's own words if it does not load."""
        if (Path("/sys/module") / name).exists():
            return
        if shutil.which("modprobe", path=_SBIN) is None:
            raise RequirementMissing(f"cannot load the {name} module: modprobe is missing", "apt-get install kmod")
        with _signals_wait():  # else it may be loaded without our knowing
            done = subprocess.run(
                [_modprobe(), name], stdin=subprocess.DEVNULL, capture_output=True, check=False, text=True
            )
            if done.returncode == 0:
                self.loaded.append(name)
        if done.returncode != 0:
            said = " ".join(done.stderr.split()) or f"modprobe ended with {done.returncode}"
            raise RequirementMissing(
                f"cannot load the {name} module: {said}",
                f"it belongs to the kernel's own package (CONFIG_X86_{name.upper()}); "
                "a kernel without it can be probed from a guest: run --in guest",
            )


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold back the signals that end the agent, here and in the modprobe that is started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _modprobe() -> str:
    return shutil.which("modprobe", path=_SBIN) or "modprobe"
