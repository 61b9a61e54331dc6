# SPDX-License-Identifier: MIT
"""The agent inside a guest that is booted for it: a real msr driver where the host has none, or must not be touched."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import UNSET

from kernel_harness.boot import guest, kernels, register_model
from kernel_harness.boot.cache import Say, default_cache, run_folder
from probe import record as rec
from probe.cpuid.dumps import Dump, format_raw
from probe.errors import GuestLost, Interrupted, NotRestored, ProbeError, RequirementMissing, UsageError
from probe.store import read_record

_BOOT_SECONDS = 240.0
STATE = "/run/spec-ctrl-probe-state"  # in the guest's memory: the guest is thrown away, and its root owns it
_PARAMETER = re.compile(
    r"(?:valid|dropped|sticky|unreadable|initial|rewrite_mask|rewrite_value|absent|noise|noise_mask|delay_us)"
    r"=(?:0x[0-9a-f]{1,16}|[0-9]+)(?:,(?:0x[0-9a-f]{1,16}|[0-9]+))*\Z"
)
# Constant text: the module's parameters were checked by _module_parameters() and hold no blank of their own.
_WITH_MODULE = 'insmod "$0" $REGISTER && exec "$@"'
_PACKAGE = Path(__file__).resolve().parents[2]  # the folder that holds probe/ and kernel_harness/


@dataclass(frozen=True)
class Wanted:
    """What to boot and what to run in it.

    kernel is a specification for kernels.obtain(), "" for the distribution's own; accelerator is "auto", "kvm" or
    "tcg"; arguments are those of `spec-ctrl-probe run` that concern the walk; cpuid is a recorded CPUID to predict
    from; register_model is the parameters of the module spec_ctrl_model, such as "valid=0x6 initial=0x2", for a guest
    whose msr driver shall have that register, "" for the guest CPU's own. waiting is called several times a second with
    the seconds since the start, and at the end with None.
    """

    kernel: str = ""
    accelerator: str = "auto"
    cpus: int = 2
    arguments: Sequence[str] = ()
    append: Sequence[str] = ()
    cpuid: Dump | None = None
    register_model: str = ""
    because: str = ""
    timeout: float = 600.0
    waiting: Callable[[float | None], None] = lambda seconds: None


def probe_in_guest(wanted: Wanted, say: Say, cache: Path | None = None) -> rec.Record:
    """Boot a guest, run the agent on its msr driver, and return the agent's record, completed by what was booted.

    Raise RequirementMissing if something to boot with is absent, GuestLost if the guest dies or the agent in it ends
    without a record; its own last words are in the message then.
    """
    parameters = _module_parameters(wanted.register_model)
    guest.check_requirements()  # before a kernel is fetched for nothing
    cache = cache or default_cache()
    kernel = kernels.obtain(wanted.kernel or kernels.default_spec(), cache, say)
    if wanted.accelerator == "auto":
        accelerator, why = guest.accelerator(cache, kernel)
    else:
        accelerator, why = wanted.accelerator, "asked for"
    environment = {"PYTHONPATH": str(_PACKAGE)}
    command = [sys.executable, "-m", "probe", "run", "--in", "metal", "--write"]
    if wanted.register_model:
        module = register_model.build(kernel, cache, say)
        environment["REGISTER"] = " ".join(parameters)
        command = ["sh", "-c", _WITH_MODULE, str(module), *command]
    with run_folder(cache) as folder:
        command += ["--record", str(folder / "record.json"), "--state-dir", STATE, *wanted.arguments]
        if wanted.cpuid is not None:
            (folder / "cpuid.txt").write_text(format_raw(wanted.cpuid.cpus), encoding="ascii")
            command += ["--cpuid", str(folder / "cpuid.txt")]
        say(f"booting {kernel.name} {kernel.release} under {accelerator.upper()} ({why})")
        result = guest.run(
            kernel,
            command,
            accel=accelerator,
            cpus=wanted.cpus,
            append=wanted.append,
            rw_dir=folder,
            timeout=wanted.timeout + _BOOT_SECONDS,
            env=environment,
            cache=cache,
            waiting=wanted.waiting,
        )
        say(f"the guest ran for {result.seconds:.0f} s, {result.boot_seconds:.0f} s of them to boot")
        path = folder / "record.json"
        if not path.exists():
            raise ended_without_record(result)
        record = read_record(str(path))
    if wanted.cpuid is not None and record.predicted_from is not UNSET:
        record.predicted_from.form = wanted.cpuid.form
    record.place = rec.Place(
        kind="guest",
        because=wanted.because,
        guest=rec.Guest(
            kernel=kernel.name,
            kernel_version=kernel.version,
            kernel_sha256=kernel.sha256,
            accelerator=accelerator,
            because=why,
            qemu=guest.qemu_version().replace("QEMU emulator version", "QEMU"),
            register_model=wanted.register_model,
        ),
    )
    return record


_ENDS: dict[int, type[ProbeError]] = {
    int(kind.exit_code): kind for kind in (UsageError, RequirementMissing, NotRestored, Interrupted)
}


def ended_without_record(result: guest.GuestResult) -> ProbeError:
    """Return the error with which the agent in the guest ended: it has said itself what was wrong."""
    lines = (result.stderr or result.stdout).strip().splitlines()
    kind = _ENDS.get(result.returncode)
    if kind is not None and lines:
        return kind("in the guest: " + lines[-1].partition("spec-ctrl-probe: ")[2])
    last = " | ".join(line.strip() for line in lines[-3:]) or "nothing"
    return GuestLost(
        f"the agent in the guest ended with exit code {result.returncode} and no record: {last}", "run it again"
    )


def _module_parameters(text: str) -> list[str]:
    words = text.split()
    for word in words:
        if not _PARAMETER.match(word):
            raise UsageError(
                f"cannot model a register with {word!r}",
                "want name=number with one of valid, dropped, sticky, unreadable, initial, rewrite_mask, "
                "rewrite_value, absent, noise, noise_mask, delay_us, such as valid=0x6; a list gives one per CPU",
            )
    return words
