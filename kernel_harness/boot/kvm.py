# SPDX-License-Identifier: MIT
"""The study of KVM inside guests that are booted for it: one kernel after the other, each with its own KVM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_harness.boot import guest, kernels, register_model
from kernel_harness.boot.agent import STATE, ended_without_record
from kernel_harness.boot.cache import Say, default_cache, run_folder
from probe import kvm_record
from probe.errors import ProbeError, RequirementMissing, UsageError
from probe.masks import hex64
from probe.models.profile import Profile, parse_profile

_PACKAGE = Path(__file__).resolve().parents[2]  # the folder that holds probe/ and kernel_harness/
_BOOT_SECONDS = 240.0
# Constant text. Our module comes between kvm, whose function it hooks, and kvm_amd, which looks at the CPU's features
# when it is loaded. Both vendors' modules are tried: the one that fits the (emulated) CPU loads. The cpuid driver tells
# what the instruction, as Python reads it, does not: the hypervisor's name.
_WITH_KVM = (
    '[ -z "$MODULE" ] || { modprobe kvm && insmod "$MODULE" $PARAMETERS; } || exit 98; '
    "modprobe kvm_amd 2>/run/kvm_amd || modprobe kvm_intel 2>/run/kvm_intel || { cat /run/kvm_* >&2; exit 99; }; "
    'modprobe cpuid 2>/dev/null; exec "$@"'
)
# Creating the first VM patches the scheduler's code (preempt_notifier_key, a static key). With several emulated CPUs
# one may meet the breakpoint of that patch when it has gone again: "Oops: int3" in finish_task_switch(), each time with
# Debian's 6.12 and 7.2 on two CPUs of QEMU 7.2's TCG.
_CPUS = {"kvm": 2, "tcg": 1}
_NO_KVM, _NO_MODEL = 99, 98


@dataclass(frozen=True)
class Wanted:
    """What to boot, and the arguments of `spec-ctrl-probe kvm` inside; append holds kernel parameters.

    tested is a mask that KVM's own test of a value shall accept instead of what the (emulated) hardware accepts, by the
    module spec_ctrl_model; None leaves the test alone. cpu gives the emulated CPU these CPUID bits (see forced_cpu());
    None leaves it as QEMU has it.
    """

    accelerator: str = "auto"
    arguments: Sequence[str] = ()
    append: Sequence[str] = ()
    tested: int | None = None
    cpu: Profile | None = None
    timeout: float = 1800.0
    waiting: Callable[[float | None], None] = lambda seconds: None


def study_in_guest(spec: str, wanted: Wanted, say: Say, cache: Path | None = None) -> kvm_record.KvmRecord:
    """Boot one kernel, run `spec-ctrl-probe kvm` on its KVM, and return the record.

    Raise RequirementMissing if the kernel cannot be had or has no KVM for this CPU, GuestLost, with the console's last
    lines, if it does not get through.
    """
    inside = ["--write", "--state-dir", STATE, *wanted.arguments]
    raw, place = in_guest(spec, wanted, inside, {}, say, cache)
    record = kvm_record.decode(raw, f"the record of {place.kernel}")
    record.guest = place
    return record


def in_guest(
    spec: str,
    wanted: Wanted,
    words: Sequence[str],
    files: Mapping[str, bytes],
    say: Say,
    cache: Path | None = None,
) -> tuple[bytes, kvm_record.GuestPlace]:
    """Boot one kernel, run `spec-ctrl-probe kvm --record ... WORDS` on its KVM, and return the record and where it ran.

    files are put into a folder that the guest sees; {folder} in a word is that folder. Raise as study_in_guest().
    """
    guest.check_requirements()
    cache = cache or default_cache()
    kernel = kernels.obtain(spec, cache, say)
    if wanted.accelerator == "auto":
        accelerator, why = guest.accelerator(cache, kernel)
    else:
        accelerator, why = wanted.accelerator, "asked for"
    if wanted.cpu is not None and accelerator != "tcg":
        raise UsageError("--cpu gives CPUID bits to an emulated CPU", "give --accel tcg")
    environment = {"PYTHONPATH": str(_PACKAGE)}
    parameters = _module_parameters(wanted)
    if parameters:
        environment["MODULE"] = str(register_model.build(kernel, cache, say))
        environment["PARAMETERS"] = " ".join(parameters)
    with run_folder(cache) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        say(f"booting {kernel.name} {kernel.release} under {accelerator.upper()} ({why})")
        inside = [sys.executable, "-m", "probe", "kvm"]
        inside += [word.replace("{folder}", str(folder)) for word in words]
        result = guest.run(
            kernel,
            ["sh", "-c", _WITH_KVM, "sh", *inside, "--record", str(folder / "kvm.json")],
            accel=accelerator,
            cpus=_CPUS[accelerator],
            append=wanted.append,
            rw_dir=folder,
            timeout=wanted.timeout + _BOOT_SECONDS,
            env=environment,
            qemu_opts=[] if wanted.cpu is None else ["-cpu", forced_cpu(wanted.cpu, guest.cpu_flags())],
            cache=cache,
            waiting=wanted.waiting,
        )
        say(f"the guest ran for {result.seconds:.0f} s, {result.boot_seconds:.0f} s of them to boot")
        path = folder / "kvm.json"
        if not path.exists():
            raise _no_record(kernel, result)
        raw = path.read_bytes()
    place = kvm_record.GuestPlace(
        kernel=kernel.name,
        kernel_version=kernel.version,
        kernel_sha256=kernel.sha256,
        accelerator=accelerator,
        qemu=guest.qemu_version().replace("QEMU emulator version", "QEMU"),
    )
    if wanted.tested is not None:
        place.tested = hex64(wanted.tested)
    if wanted.cpu is not None:
        place.cpu = str(wanted.cpu)
    return raw, place


def _module_parameters(wanted: Wanted) -> list[str]:
    """Return what our module shall do; nothing if it need not be loaded."""
    parameters = []
    if wanted.tested is not None:
        parameters += ["kvm_test=1", f"kvm_valid={wanted.tested:#x}", f"valid={wanted.tested:#x}"]
    if wanted.cpu is not None and wanted.cpu.mask & _V_SPEC_CTRL.mask:
        parameters.append("v_spec_ctrl=1")
    if parameters and wanted.tested is None:
        parameters.append(f"msr={_NO_MSR:#x}")  # the msr driver keeps the emulated CPU's register
    return parameters


# QEMU's names of our CPUID bits. It has none for V_SPEC_CTRL, in which our module makes the kernel believe.
_QEMU_FLAGS = {
    "SPEC_CTRL": "spec-ctrl",
    "INTEL_STIBP": "stibp",
    "SPEC_CTRL_SSBD": "ssbd",
    "INTEL_PSFD": "psfd",
    "IPRED_CTRL": "ipred-ctrl",
    "RRSBA_CTRL": "rrsba-ctrl",
    "DDPD_U": "ddpd-u",
    "BHI_CTRL": "bhi-ctrl",
    "AMD_IBPB": "ibpb",
    "AMD_IBRS": "ibrs",
    "AMD_STIBP": "amd-stibp",
    "AMD_SSBD": "amd-ssbd",
    "VIRT_SSBD": "virt-ssbd",
    "AMD_PSFD": "amd-psfd",
}
_V_SPEC_CTRL = parse_profile("V_SPEC_CTRL")
_NO_MSR = 0xFFFFFFFF


def forced_cpu(profile: Profile, known: Collection[str]) -> str:
    """Return QEMU's -cpu for an emulated CPU with these CPUID bits, which TCG itself would not offer.

    known are the flags that this QEMU has names for. Raise UsageError for a bit that it cannot be given.
    """
    names = []
    for bit in profile.bits():
        flag = _QEMU_FLAGS.get(bit.name, "")
        if flag in known:
            names.append(f"{flag}=on")
        elif bit.name != "V_SPEC_CTRL":
            can = ", ".join(name for name, flag in _QEMU_FLAGS.items() if flag in known)
            raise UsageError(f"this QEMU cannot give a CPU {bit.name}", f"it can: {can}; we can: V_SPEC_CTRL")
    return ",".join(["max", "x-force-features=on", *names])


def _no_record(kernel: kernels.Kernel, result: guest.GuestResult) -> ProbeError:
    if result.returncode == _NO_KVM:
        said = " ".join(result.stderr.split()) or "modprobe said nothing"
        return RequirementMissing(f"{kernel.name} has no KVM for this guest's CPU: {said}", "boot another kernel")
    if result.returncode == _NO_MODEL:
        said = " ".join(result.stderr.split()) or "insmod said nothing"
        return RequirementMissing(
            f"{kernel.name}: our module spec_ctrl_model cannot be loaded for --tested or --cpu: {said}",
            "--tested needs Linux v5.9 or newer",
        )
    return ended_without_record(result)


@dataclass(frozen=True)
class Booted:
    """One kernel of several: its record, or why there is none."""

    spec: str
    record: kvm_record.KvmRecord | None
    error: ProbeError | None = None


def study_kernels(specs: Sequence[str], wanted: Wanted, say: Say) -> Iterator[Booted]:
    """Study several kernels one after the other; one that fails costs no other, and each is yielded when it is done."""
    for spec in specs:
        try:
            yield Booted(spec, study_in_guest(spec, wanted, say))
        except ProbeError as error:
            yield Booted(spec, None, error)
