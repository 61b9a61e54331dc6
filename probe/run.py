# SPDX-License-Identifier: MIT
"""One run on this machine's own msr driver: plan, refuse, save, walk, put back, record.

Order matters here and nowhere else: every refusal comes before the first write; the saved values are on disk and in
the watchdog before the first write; the registers are put back before anything else may fail.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from probe.assembly import Seen, assemble
from probe.cpuid.dumps import Dump
from probe.cpuid.machine import MachineCpuid, read_machine
from probe.errors import NotRestored, ProbeError, RequirementMissing, UsageError
from probe.host import Host, Modules, bad_microcode, has_erratum_1485
from probe.journal import STATE_DIR, Journal, Leftover, Lock, Watchdog, file_away, now, read_leftover, replay
from probe.masks import ALL_BITS, format_bits, format_list, grouped, hex64
from probe.msr import Failure, MsrAccess, MsrDriver
from probe.outcome import CpuResult, Restored
from probe.record import Record
from probe.registers import BP_CFG, SPEC_CTRL, STIBP
from probe.scheduling import CpuPin, Realtime, StopRequest
from probe.trial import Pin, Plan, Walk, not_walked, put_back, read_saved

_ERRATUM_1485_FIX = 1 << 5  # BP_CFG.SHARED_BTB_FIX; see has_erratum_1485()
TAINT_WARNING = (
    "note: a write through the msr driver taints the kernel (bit 2, 'S'), even one that takes #GP; "
    "the taint stays until the next boot"
)


@dataclass(frozen=True)
class Options:
    """What the user asked for. cpus None means all that are online; cpuid_file replaces this machine's CPUID."""

    write: bool = False
    cpus: tuple[int, ...] | None = None
    bits: tuple[int, ...] = tuple(range(64))
    base_zero: bool = False
    clear_bits: bool = False
    pairs: bool = False
    repeat: int = 1
    judge: str = "vendor"
    cpuid_file: Dump | None = None
    identity: str = ""
    state_dir: Path = STATE_DIR
    allow_running_vms: bool = False
    allow_bad_microcode: bool = False
    allow_container: bool = False
    because: str = "asked for with --in metal"
    arguments: tuple[str, ...] = ()


@dataclass
class Ears:
    """Where a run tells what it does: say() for lines, progress(done, all) for the walk, intent(step, mask) before the
    first write of each step, when it is in the journal already."""

    say: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int], None] = lambda done, total: None
    intent: Callable[[str, int], None] = lambda step, mask: None


def run(
    options: Options,
    ears: Ears,
    *,
    msr: MsrAccess | None = None,
    host: Host | None = None,
    pin: Pin | None = None,
    read_cpuid: Callable[[Sequence[int]], MachineCpuid] = read_machine,
) -> Record:
    """Do one run and return its record; without options.write only plan and predict.

    msr, host, pin and read_cpuid are the edges; a test gives its own. Raise RequirementMissing if the machine refuses,
    UsageError for CPUs or bits that make no sense, Interrupted after a signal (everything is put back then).
    """
    started, clock = now(), time.monotonic()
    host = host or Host()
    with Modules() as modules:
        if msr is None:
            load_cpuid(modules)
        facts = host.facts()
        cpuid = read_cpuid(facts.online)
        cpus = options.cpus or facts.online
        if options.write and options.cpuid_file is None and set(cpus) - set(cpuid.cpus) <= set(facts.online):
            unread = set(cpus) - set(cpuid.cpus)
            if unread:
                raise RequirementMissing(f"CPUID of CPUs {format_list(unread)} cannot be read", "see: doctor")
        missing = set(cpus) - set(facts.online)
        if missing:
            raise UsageError(
                f"no CPU {format_list(missing)} is online on this machine", f"online: {format_list(facts.online)}"
            )
        plan = Plan(
            index=SPEC_CTRL.index,
            cpus=cpus,
            bits=options.bits,
            base_zero=options.base_zero,
            clear_bits=options.clear_bits,
            pairs=options.pairs,
            repeat=options.repeat,
            readback=not facts.legacy_ibrs,
        )
        seen = Seen(facts, cpuid, plan, written=options.write)
        if options.write:
            if msr is None:
                modules.load("msr")
            refuse(options, seen, host)
            with contextlib.ExitStack() as stack:
                if msr is None:
                    driver = stack.enter_context(MsrDriver(writable=True))
                    _walk(options, ears, driver, seen, stack.enter_context(CpuPin()), host, driver.claim)
                else:
                    _walk(options, ears, msr, seen, pin or stack.enter_context(CpuPin()), host)
            seen.new_vms = tuple(sorted(set(host.vms()) - set(facts.vms)))
        seen.taint_after = host.taint()
        seen.modules_loaded = list(modules.loaded)
    seen.duration = time.monotonic() - clock
    return assemble(
        seen,
        started=started,
        judge=options.judge,
        cpuid_file=options.cpuid_file,
        because=options.because,
        identity=options.identity,
        arguments=options.arguments,
    )


def load_cpuid(modules: Modules) -> None:
    """Load the cpuid module if that is possible; without it there is no cross-check, and the record says so."""
    with contextlib.suppress(RequirementMissing):
        modules.load("cpuid")


def refuse(options: Options, seen: Seen, host: Host) -> None:
    """Raise RequirementMissing for each reason not to write that is known before the first write.

    The three EPERMs of the msr driver are told apart: no CAP_SYS_RAWIO (on open), lockdown, msr.allow_writes=off.
    """
    facts = seen.facts
    if facts.lockdown not in ("none", "unknown"):
        raise RequirementMissing(
            f"kernel lockdown ({facts.lockdown}) forbids MSR writes",
            "boot without lockdown= and, if Secure Boot sets it, without Secure Boot; or probe a guest: run --in guest",
        )
    if host.allow_writes() == "off":
        raise RequirementMissing(
            "the msr driver refuses writes (msr.allow_writes=off)",
            "echo default > /sys/module/msr/parameters/allow_writes",
        )
    if not facts.boot_id:
        raise RequirementMissing(
            "/proc does not tell the boot's identity, without which no journal is safe", "mount /proc"
        )
    if facts.pid_namespace and not options.allow_container:
        raise RequirementMissing(
            "this process is in a container: who ends the container kills the watchdog with it, and VMs are not seen",
            "run it on the host; or, if nobody will: --allow-container",
        )
    refuse_vms(options, facts.vms, facts.kvm_users)
    for cpu in seen.plan.cpus:
        why = bad_microcode(seen.cpuid.cpus[cpu], facts.microcode.get(cpu))
        if why and not options.allow_bad_microcode:
            raise RequirementMissing(f"CPU {cpu}: {why}", "update the microcode; or --allow-bad-microcode")


def refuse_vms(options: Options, vms: Sequence[tuple[int, str]], kvm_users: int) -> None:
    """Raise RequirementMissing if a VM runs, or if something that cannot be seen from here has KVM open."""
    if options.allow_running_vms:
        return
    if vms:
        who = ", ".join(f"{name} ({pid})" for pid, name in vms[:3])
        more = f" and {len(vms) - 3} more" if len(vms) > 3 else ""
        raise RequirementMissing(
            f"virtual machines are running: {who}{more}; KVM would enter a guest with the probe's value",
            "stop them; or, if you know that none of their vCPUs runs on these CPUs: --allow-running-vms",
        )
    if kvm_users:
        raise RequirementMissing(
            "something has KVM open that cannot be seen from here; KVM would enter a guest with the probe's value",
            "find it with: lsof /dev/kvm; or, if no vCPU runs on these CPUs: --allow-running-vms",
        )


def _walk(
    options: Options,
    ears: Ears,
    msr: MsrAccess,
    seen: Seen,
    pin: Pin,
    host: Host,
    claim: Callable[[Iterable[int]], None] = lambda cpus: None,
) -> None:
    """Do the whole walk under the lock; its results and the proof of restore go into seen."""
    plan = seen.plan
    with Lock(options.state_dir):
        leftover = read_leftover(options.state_dir)
        claim({*plan.cpus, *(leftover.saved if leftover else ())})
        with StopRequest() as stop:
            if leftover is not None:
                settle(leftover, msr, pin, seen.facts.boot_id, ears.say)
            unreachable = [
                cpu for cpu in plan.cpus if not pin(cpu) and msr.read(cpu, plan.index) is not Failure.OFFLINE
            ]
            if unreachable:
                raise RequirementMissing(
                    f"this process may not run on CPUs {format_list(unreachable)}, "
                    "where other tasks change the register",
                    "leave them out with --cpus, or run it outside this cpuset or container",
                )
            read = read_saved(msr, plan.index, plan.cpus, pin)
            saved = {cpu: value for cpu, value in read.items() if not isinstance(value, Failure)}
            refuse_vms(options, host.vms(), host.kvm_users())  # what has begun since the facts were read
            _check_clearing(options, msr, saved, seen)
            unread = [not_walked(cpu, value, plan.bits) for cpu, value in read.items() if isinstance(value, Failure)]
            seen.results = unread
            if saved:
                ears.say(TAINT_WARNING)
                results, seen.proof = _walk_saved(options, ears, msr, saved, seen, pin, stop, host)
                seen.results = sorted(unread + results, key=lambda result: result.cpu)


def _walk_saved(
    options: Options,
    ears: Ears,
    msr: MsrAccess,
    saved: Mapping[int, int],
    seen: Seen,
    pin: Pin,
    stop: StopRequest,
    host: Host,
) -> tuple[list[CpuResult], list[Restored]]:
    """Walk over registers whose values are known; put them back whatever happens, and only then let errors out."""
    plan = seen.plan
    journal = Journal(options.state_dir, plan.index, saved, seen.facts.boot_id)
    try:
        watchdog = Watchdog(msr, plan.index, saved, journal, pin)
    except BaseException:
        journal.close(keep=False)
        raise

    def intent(step: str, mask: int) -> None:
        if not watchdog.alive():
            raise ProbeError("the watchdog process has died or was stopped; the walk stops here", "run it again")
        if not options.allow_running_vms and host.kvm_users() > seen.facts.kvm_users:
            raise RequirementMissing(
                "somebody has opened KVM during the walk; a guest would be entered with the probe's value",
                "run it again when no VM is running",
            )
        journal.intent(step, mask)
        ears.intent(step, mask)

    walk = Walk(msr, plan, saved, pin, intent=intent, rebased=journal.rebased, stopping=stop, progress=ears.progress)
    ended_by: BaseException | None = None
    try:
        with Realtime() as realtime:
            if not realtime.granted:
                seen.notes.append("SCHED_FIFO was refused: another task may have run between a write and its read-back")
            walk.run()
    except BaseException as error:  # whatever it is, the registers come first
        ended_by = error
    ours = (lambda cpu: ALL_BITS) if isinstance(ended_by, NotRestored) else walk.ours
    proof = put_back(msr, plan.index, walk.saved, pin, walk.gone, ours)  # if this raises, the watchdog will do it
    failed = [item.cpu for item in proof if item.failed]
    with contextlib.suppress(OSError):  # a full disk: what is proved need not be written down
        journal.restored("agent", proof)
    with contextlib.suppress(OSError):
        journal.close(keep=bool(failed))  # before the watchdog goes: killed in between, nobody would end the journal
    watchdog.dismiss()
    if isinstance(ended_by, NotRestored):
        seen.stopped = ended_by.message
    elif ended_by is not None:
        if failed:
            raise NotRestored(f"the registers of CPUs {format_list(failed)} could not be put back") from ended_by
        if isinstance(ended_by, ProbeError):
            ended_by.message += f"; {_told(proof)}, no record written"
        raise ended_by
    return walk.results(), proof


def _told(proof: Sequence[Restored]) -> str:
    verified = sum(item.state == Restored.VERIFIED for item in proof)
    left = format_list(item.cpu for item in proof if item.state == Restored.LEFT)
    return f"{verified} registers put back and verified" + (f", CPUs {left} not verified" if left else "")


def settle(leftover: Leftover, msr: MsrAccess, pin: Pin, boot_id: str, say: Callable[[str], None]) -> list[Restored]:
    """Tell what an earlier run left, put its registers back if it was in this boot and nobody has, and file it away.

    Raise NotRestored if a register cannot be put back; the journal stays then.
    """
    same_boot = bool(boot_id) and leftover.boot_id == boot_id
    proof: list[Restored] = []
    if same_boot and leftover.step and leftover.saved and (leftover.failed or not leftover.restored_by):
        proof = replay(leftover, msr, pin)  # before anything is said: whoever listens may have gone
        say(f"found a journal: {leftover.tell(same_boot)}")
        failed = [item.cpu for item in proof if item.failed]
        if failed:
            raise NotRestored(
                f"the registers of CPUs {format_list(failed)} cannot be put back to what {leftover.path} says",
                "a reboot sets them up anew",
            )
        back = {item.cpu: item.saved for item in proof if item.state == Restored.VERIFIED}
        if back:
            say("put back and verified: " + ", ".join(f"CPUs {cpus}: {hex64(value)}" for cpus, value in grouped(back)))
        for item in proof:
            if item.state == Restored.LEFT:
                reads = "" if item.reads is None else f", reads {hex64(item.reads)}"
                say(f"not verified: CPU {item.cpu}: held {hex64(item.saved)}{reads}: {item.note}")
    else:
        say(f"found a journal: {leftover.tell(same_boot)}")
    file_away(leftover)
    return proof


def _check_clearing(options: Options, msr: MsrAccess, saved: Mapping[int, int], seen: Seen) -> None:
    """Refuse to clear a bit that is set unless --clear-bits asked for it, and STIBP where that is erratum 1485."""
    if options.base_zero and not options.clear_bits:
        for cpus, value in grouped(saved):
            if value:
                raise UsageError(
                    f"--base zero would switch off {SPEC_CTRL.names(value)} on CPUs {cpus}",
                    "say so with --clear-bits, or keep the default --base saved",
                )
    stibp_goes = options.clear_bits and (options.base_zero or any(STIBP >> bit & 1 for bit in options.bits))
    if not stibp_goes or seen.facts.smt in ("off", "forceoff", "notsupported"):
        return
    for cpu, value in saved.items():
        if value & STIBP and has_erratum_1485(seen.cpuid.cpus[cpu]):
            bp_cfg = msr.read(cpu, BP_CFG.index)
            if isinstance(bp_cfg, Failure) or not bp_cfg & _ERRATUM_1485_FIX:
                raise RequirementMissing(
                    f"CPU {cpu}: AMD erratum 1485: with SMT on and STIBP off this CPU may fetch wrong instructions, "
                    f"and the kernel's work-around ({BP_CFG.name} bits {format_bits(_ERRATUM_1485_FIX)}) is not on",
                    "leave STIBP alone: drop --clear-bits",
                )
