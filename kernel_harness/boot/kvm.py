# SPDX-License-Identifier: MIT
"""The study of KVM inside guests that are booted for it: one kernel after the other, each with its own KVM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_harness.boot import guest, kernels, register_model
from kernel_harness.boot.agent import ended_without_record
from kernel_harness.boot.cache import Say, default_cache, run_folder
from probe import kvm_record
from probe.errors import ProbeError, RequirementMissing
from probe.masks import hex64

_PACKAGE = Path(__file__).resolve().parents[2]  # the folder that holds probe/ and kernel_harness/
_BOOT_SECONDS = 240.0
# Constant text. Both vendors' modules are tried: the one that fits the (emulated) CPU loads.
_WITH_KVM = (
    "modprobe kvm_amd 2>/run/kvm_amd || modprobe kvm_intel 2>/run/kvm_intel || { cat /run/kvm_* >&2; exit 99; }; "
    # the cpuid driver tells what the instruction, as Python reads it, does not: the hypervisor's name
    "modprobe cpuid 2>/dev/null; "
    '[ -z "$MODULE" ] || insmod "$MODULE" kvm_test=1 kvm_valid="$MASK" || exit 98; exec "$@"'
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
    module spec_ctrl_model; None leaves the test alone.
    """

    accelerator: str = "auto"
    arguments: Sequence[str] = ()
    append: Sequence[str] = ()
    tested: int | None = None
    timeout: float = 1800.0
    waiting: Callable[[float | None], None] = lambda seconds: None


def study_in_guest(spec: str, wanted: Wanted, say: Say, cache: Path | None = None) -> kvm_record.KvmRecord:
    """Boot one kernel, run `spec-ctrl-probe kvm` on its KVM, and return the record.

    Raise RequirementMissing if the kernel cannot be had or has no KVM for this CPU, GuestLost, with the console's last
    lines, if it does not get through.
    """
    guest.check_requirements()
    cache = cache or default_cache()
    kernel = kernels.obtain(spec, cache, say)
    if wanted.accelerator == "auto":
        accelerator, why = guest.accelerator(cache, kernel)
    else:
        accelerator, why = wanted.accelerator, "asked for"
    environment = {"PYTHONPATH": str(_PACKAGE)}
    if wanted.tested is not None:
        environment["MODULE"] = str(register_model.build(kernel, cache, say))
        environment["MASK"] = f"{wanted.tested:#x}"
    with run_folder(cache) as folder:
        say(f"booting {kernel.name} {kernel.release} under {accelerator.upper()} ({why})")
        inside = [sys.executable, "-m", "probe", "kvm", "--record", str(folder / "kvm.json"), *wanted.arguments]
        result = guest.run(
            kernel,
            ["sh", "-c", _WITH_KVM, "sh", *inside],
            accel=accelerator,
            cpus=_CPUS[accelerator],
            append=wanted.append,
            rw_dir=folder,
            timeout=wanted.timeout + _BOOT_SECONDS,
            env=environment,
            cache=cache,
            waiting=wanted.waiting,
        )
        say(f"the guest ran for {result.seconds:.0f} s, {result.boot_seconds:.0f} s of them to boot")
        path = folder / "kvm.json"
        if not path.exists():
            raise _no_record(kernel, result)
        record = kvm_record.decode(path.read_bytes(), f"the record of {kernel.name}")
    record.guest = kvm_record.GuestPlace(
        kernel=kernel.name,
        kernel_version=kernel.version,
        kernel_sha256=kernel.sha256,
        accelerator=accelerator,
        qemu=guest.qemu_version().replace("QEMU emulator version", "QEMU"),
    )
    if wanted.tested is not None:
        record.guest.tested = hex64(wanted.tested)
    return record


def _no_record(kernel: kernels.Kernel, result: guest.GuestResult) -> ProbeError:
    if result.returncode == _NO_KVM:
        said = " ".join(result.stderr.split()) or "modprobe said nothing"
        return RequirementMissing(f"{kernel.name} has no KVM for this guest's CPU: {said}", "boot another kernel")
    if result.returncode == _NO_MODEL:
        said = " ".join(result.stderr.split()) or "insmod said nothing"
        return RequirementMissing(
            f"{kernel.name}: KVM's test of a value cannot be given a mask: {said}", "it needs Linux v5.9 or newer"
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
            say(f"{spec}: {error}")
            yield Booted(spec, None, error)
