# SPDX-License-Identifier: MIT
"""Runs in the guest, as root: sets the agent before registers of our design and writes down what came of it.

    python -m tests.live.inside PART FOLDER MODULE SEED

PART is a boot (see PARTS), FOLDER takes report.json, MODULE is spec_ctrl_model.ko, "-" where none can be loaded.
Nothing is judged here; test_boot_agent.py does that, outside. A scenario that crashes leaves its traceback in its own
entry and the next one runs.

The agent runs in children forked from this process, which has imported everything: on an emulated CPU a Python that
starts and imports takes longer than most scenarios.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import msgspec

from kernel_harness.boot import register_model
from kernel_harness.boot.register_model import ABSENT, ACCEPTS_ALL_DROPS_ALL, STATE, CpuState, Register, Write
from probe import cli
from probe import record as rec
from probe.masks import ALL_BITS

for _late in ("probe.cpuid.dumps", "probe.doctor", "probe.models.registry", "probe.report.text", "probe.run"):
    importlib.import_module(_late)  # what the command imports when it gets there: once, for all children

DATA = Path(__file__).resolve().parents[1] / "data" / "cpuid"
THREADRIPPER = "threadripper-3970x.cpuid-r.txt"
SAPPHIRE_RAPIDS = "sapphire-rapids.instlatx64.txt"
SCRATCH = Path("/run/inside")  # in the guest's memory
STATE_DIR = SCRATCH / "state"
KILLS = 100
INTERRUPTS = 12
LOG = 1000  # of the module's 4096 last writes; no run makes more, and reading them takes its time
CAP_SYS_RAWIO = 17  # linux v7.1 include/uapi/linux/capability.h


# --- what is written down ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The guest at one moment: the modelled registers (none without the module), kernel modules, taint."""

    cpus: list[CpuState]
    writes: list[Write]
    modules: list[str]
    taint: int

    @property
    def attempts(self) -> int:
        return sum(cpu.writes for cpu in self.cpus)

    @property
    def changed(self) -> list[str]:
        """The registers that do not hold what they held first."""
        return [f"CPU {cpu.cpu}: {cpu.value:#x}, not {cpu.initial:#x}" for cpu in self.cpus if cpu.value != cpu.initial]


@dataclass(frozen=True)
class Run:
    """One agent from start to end. code is negative if a signal ended it; raw is its record, left its journal."""

    code: int
    pid: int
    out: str
    err: str
    raw: str
    left: str
    before: Machine
    after: Machine
    seconds: float

    @property
    def record(self) -> rec.Record:
        assert self.raw, f"no record; exit code {self.code}, stderr: {self.err}"
        return rec.decode(self.raw.encode(), "the agent's record")


@dataclass(frozen=True)
class Kill:
    """One signal at a random moment, and what there was when the lock was free again.

    after is in seconds from the journal's appearance, or from the start; new_modules are those that stayed loaded;
    rescued says that a process other than the agent wrote a register.
    """

    after: float
    code: int
    left: str
    changed: list[str]
    cleared: int
    new_modules: list[str]
    rescued: bool
    seconds_to_free: float
    err: str


@dataclass
class Scenario:
    """What happened in one scenario; error is the traceback if the scenario itself crashed."""

    error: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Report:
    """All scenarios of one boot, in order; running is the one that was under way when this was written."""

    scenarios: dict[str, Scenario] = field(default_factory=dict)
    running: str = ""


def load(folder: Path) -> Report:
    """Read what a guest wrote down so far."""
    path = folder / "report.json"
    return msgspec.json.decode(path.read_bytes(), type=Report) if path.exists() else Report()


# --- the registers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A register, the CPUID from which the agent predicts, and more arguments for the agent."""

    register: Register
    others: Mapping[int, Register] = field(default_factory=dict)
    cpuid: str = THREADRIPPER
    arguments: tuple[str, ...] = ()


CASES: dict[str, Case] = {
    "0x7": Case(Register(valid=0x7)),
    "0x6": Case(Register(valid=0x6, initial=0x2)),  # Threadripper 3970X: STIBP and SSBD, no IBRS
    "0x2": Case(Register(valid=0x2)),
    "0x5": Case(Register(valid=0x5)),  # STIBP takes #GP though enumerated: KVM in July 2020
    "0x87": Case(Register(valid=0x87, initial=0x81)),
    "0x5ff": Case(Register(valid=0x5FF, initial=0x401), cpuid=SAPPHIRE_RAPIDS),
    "top": Case(Register(valid=1 << 63 | 1 << 32 | 1 << 31 | 1, initial=1 << 63)),  # both halves, both signs
    "absent": Case(ABSENT),
    "accepts all, drops all": Case(ACCEPTS_ALL_DROPS_ALL),
    "accepts all, keeps all": Case(Register(valid=ALL_BITS)),
    "dropped and unreadable": Case(Register(valid=0x1FF, dropped=0x82, unreadable=0x100, initial=0x1)),
    "one CPU differs": Case(Register(valid=0x7, initial=0x1), {1: Register(valid=0x3, initial=0x2)}),
    "one CPU has none": Case(Register(valid=0x7), {1: ABSENT}),
    "pairs and repeat": Case(Register(valid=0x5FF, initial=0x1), arguments=("--pairs", "--repeat", "2")),
    "set at first": Case(Register(valid=0x7, initial=0x5)),
    "clear bits": Case(Register(valid=0x7, initial=0x5), arguments=("--clear-bits",)),
    "base zero": Case(Register(valid=0x7, initial=0x5), arguments=("--base", "zero", "--clear-bits")),
    "some bits": Case(Register(valid=0x7, initial=0x1), arguments=("--bits", "1-2,60", "--cpus", "1")),
}


# --- the machine ---------------------------------------------------------------------------------------------------


def machine() -> Machine:
    cpus: list[CpuState] = []
    writes: list[Write] = []
    with contextlib.suppress(FileNotFoundError), open(STATE, encoding="ascii") as file:
        lines = file.readlines()
        log = [line for line in lines if line.startswith("write")]
        cpus, writes = register_model.parse_state("".join([*lines[: len(lines) - len(log)], *log[-LOG:]]))
    with open("/proc/modules", encoding="ascii") as file:
        modules = sorted(line.split()[0] for line in file)
    return Machine(cpus, writes, modules, int(Path("/proc/sys/kernel/tainted").read_text(encoding="ascii")))


def registers() -> list[CpuState]:
    """Read the registers without the log of writes."""
    cpus = []
    with open(STATE, encoding="ascii") as file:
        for line in file:
            if not line.startswith("cpu"):
                break
            cpus += register_model.parse_state(line)[0]
    return cpus


def is_changed() -> bool:
    return any(cpu.value != cpu.initial for cpu in registers())


def command(*words: str) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")


def set_parameter(module: str, name: str, value: object) -> None:
    (Path("/sys/module") / module / "parameters" / name).write_text(f"{value}\n", encoding="ascii")


def set_online(cpu: int, online: bool) -> None:
    Path(f"/sys/devices/system/cpu/cpu{cpu}/online").write_text("1" if online else "0", encoding="ascii")


def lock_down() -> None:
    Path("/sys/kernel/security/lockdown").write_text("integrity", encoding="ascii")


def give_up_rawio() -> None:
    """Take CAP_SYS_RAWIO from this process, which stays root. Source: capset(2)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same of bits 32-63
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    for position in range(3):
        data[position] &= ~(1 << CAP_SYS_RAWIO)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def unload() -> None:
    loaded = machine().modules
    for name in ("msr", "cpuid"):
        if name in loaded:
            command("modprobe", "--remove", name)


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.002)


# --- the agent -----------------------------------------------------------------------------------------------------


class Agent:
    """The agent's main() in a process group of its own; become() runs there first."""

    everyone: ClassVar[list[Agent]] = []  # of this scenario

    def __init__(self, *arguments: str, become: Callable[[], None] = lambda: None) -> None:
        self._place = SCRATCH / f"agent-{len(Agent.everyone)}"
        self._place.mkdir()
        self._record = self._place / "record.json"
        self.state_dir = STATE_DIR
        if arguments[0] == "run":
            arguments = (*arguments, "--in", "metal", "--record", str(self._record))
        if "--state-dir" in arguments:
            self.state_dir = Path(arguments[arguments.index("--state-dir") + 1])
        else:
            arguments = (*arguments, "--state-dir", str(self.state_dir))
        self.before = machine()
        self._began = time.monotonic()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._be(arguments, become)
        Agent.everyone.append(self)

    def _be(self, arguments: tuple[str, ...], become: Callable[[], None]) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for fd, name, flags in (
                (0, "/dev/null", os.O_RDONLY),
                (1, str(self._place / "out"), os.O_WRONLY | os.O_CREAT),
                (2, str(self._place / "err"), os.O_WRONLY | os.O_CREAT),
            ):
                os.dup2(os.open(name, flags, 0o644), fd)
            (self._place / "begun").touch()
            become()
            code = cli.main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    @property
    def ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def wait(self, seconds: float = 120.0) -> int:
        """Wait for the end; return the exit code, or minus the signal."""
        until(lambda: self.ended, f"the agent's end; it said: {self._text('err')}", seconds)
        status = self._status or 0
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def finish(self) -> Run:
        code = self.wait()
        seconds = time.monotonic() - self._began
        return Run(
            code=code,
            pid=self.pid,
            out=self._text("out"),
            err=self._text("err"),
            raw=self._text("record.json"),
            left=self.journal(),
            before=self.before,
            after=machine(),
            seconds=seconds,
        )

    def _text(self, name: str) -> str:
        try:
            return (self._place / name).read_text(encoding="utf-8")
        except OSError:
            return ""

    @property
    def err(self) -> str:
        return self._text("err")

    @property
    def begun(self) -> bool:
        return (self._place / "begun").exists()

    def journal(self) -> str:
        try:
            return (self.state_dir / "journal.ndjson").read_text(encoding="utf-8")
        except OSError:
            return ""

    def wait_for(self, step: str) -> None:
        """Wait until the journal announces a step, such as "bit 5"."""
        line = f'"{step}"'

        def there() -> bool:
            if self.ended:
                raise RuntimeError(f"the agent ended before {step}: {self._status}; it said: {self.err}")
            return line in self.journal()

        until(there, f"{step} in the journal")

    def watchdog(self) -> int:
        with open(f"/proc/{self.pid}/task/{self.pid}/children", encoding="ascii") as file:
            (child,) = file.read().split()
        return int(child)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop_while_changed(self) -> None:
        """Stop the agent at a moment at which a register holds a trial's value."""
        for _ in range(1000):
            self.send(signal.SIGSTOP)
            _, status = os.waitpid(self.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                self._status = status
                raise RuntimeError(f"the agent ended ({status}) before it could be stopped; it said: {self.err}")
            if is_changed():
                return
            self.send(signal.SIGCONT)
            time.sleep(0.003)
        raise TimeoutError("in 1000 stops no register was changed")

    def wait_until_free(self, seconds: float = 30.0) -> None:
        """Wait until nobody holds the lock: the watchdog has gone, too."""
        with open(self.state_dir / "lock", "rb") as file:

            def free() -> bool:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            until(free, "the lock", seconds)


def run(*arguments: str, become: Callable[[], None] = lambda: None) -> Run:
    return Agent(*arguments, become=become).finish()


@contextlib.contextmanager
def modelled(
    register: Register | None = None,
    others: Mapping[int, Register] | None = None,
    *,
    noise: int = 0,
    noise_mask: int = 0x1,
    delay_us: int = 0,
) -> Iterator[None]:
    """Give the msr driver these registers for the length of the block."""
    words = register_model.arguments(register, others, noise=noise, noise_mask=noise_mask, delay_us=delay_us)
    command("insmod", str(MODULE), *words)
    try:
        yield
    finally:
        command("rmmod", "spec_ctrl_model")


@contextlib.contextmanager
def driver(*parameters: str) -> Iterator[None]:
    """Have the msr and cpuid drivers loaded already, as an administrator would."""
    command("modprobe", "msr", *parameters)
    command("modprobe", "cpuid")
    try:
        yield
    finally:
        command("modprobe", "--remove", "msr")
        command("modprobe", "--remove", "cpuid")


# --- the scenarios -------------------------------------------------------------------------------------------------

MODULE = Path("-")
FOLDER = Path("-")
SEED = 0
Body = Callable[[Scenario], None]
PARTS: dict[str, dict[str, Body]] = {"main": {}, "cut": {}, "after the cut": {}, "locked down": {}}
CPUID = ("--cpuid", str(DATA / THREADRIPPER))
SLOW = 3000  # microseconds an access: two CPUs take about a second for all
STRONG = Register(valid=0x7, initial=0x5)  # two mitigations are on at first


def scenario(name: str, part: str = "main") -> Callable[[Body], Body]:
    def add(body: Body) -> Body:
        PARTS[part][name] = body
        return body

    return add


# Refusals come first: the taint bit that any write sets is not there yet, and its absence proves that there was none.


@scenario("plan")
def _plan(seen: Scenario) -> None:
    seen.runs["plan"] = run("run", *CPUID)
    seen.notes["state dir"] = str(STATE_DIR.exists())


@scenario("not root")
def _not_root(seen: Scenario) -> None:
    seen.runs["nobody"] = run("run", "--write", become=become_nobody)
    seen.runs["restore"] = run("restore", become=become_nobody)


@scenario("no CAP_SYS_RAWIO")
def _no_rawio(seen: Scenario) -> None:
    seen.runs["without"] = run("run", "--write", become=give_up_rawio)


@scenario("allow_writes=off")
def _allow_writes(seen: Scenario) -> None:
    with driver("allow_writes=off"):
        seen.runs["off"] = run("run", "--write")
        set_parameter("msr", "allow_writes", "on")
        seen.notes["then"] = Path("/sys/module/msr/parameters/allow_writes").read_text(encoding="ascii").strip()


@scenario("the CPU's own register")
def _own(seen: Scenario) -> None:
    """The one run that is a program of its own, as a user starts it."""
    before, began = machine(), time.monotonic()
    path = SCRATCH / "own.json"
    done = subprocess.run(
        [sys.executable, "-m", "probe", "run", "--write", "--record", str(path), "--state-dir", str(STATE_DIR)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    raw = path.read_text(encoding="utf-8") if path.exists() else ""
    left = str((STATE_DIR / "journal.ndjson").exists() or "")
    took = time.monotonic() - began
    seen.runs["own"] = Run(done.returncode, 0, done.stdout, done.stderr, raw, left, before, machine(), took)


def _case(case: Case) -> Body:
    def body(seen: Scenario) -> None:
        with modelled(case.register, case.others):
            seen.runs["run"] = run("run", "--write", "--cpuid", str(DATA / case.cpuid), *case.arguments)

    return body


for _name, _one in CASES.items():
    PARTS["main"][f"register {_name}"] = _case(_one)


@scenario("base zero refused")
def _base_zero(seen: Scenario) -> None:
    with modelled(STRONG):
        seen.runs["run"] = run("run", "--write", "--base", "zero")


@scenario("noise")
def _noise(seen: Scenario) -> None:
    for every in (2, 4, 5, 7):
        with modelled(Register(valid=0x7, initial=0x4), noise=every, noise_mask=0x8000):
            seen.runs[str(every)] = run("run", "--write", *CPUID)


@scenario("rewrite")
def _rewrite(seen: Scenario) -> None:
    """Something in the kernel sets bit 0 after every write, or clears it."""
    with modelled(Register(valid=0x7, initial=0x1, rewrite_mask=0x1, rewrite_value=0x1)):
        seen.runs["set"] = run("run", "--write", *CPUID)
    with modelled(Register(valid=0x7, initial=0x1, rewrite_mask=0x1, rewrite_value=0x1)):
        seen.runs["set, to be cleared"] = run("run", "--write", "--clear-bits", *CPUID)
    with modelled(Register(valid=0x7, rewrite_mask=0x1, rewrite_value=0x0)):
        seen.runs["cleared"] = run("run", "--write", *CPUID)


@scenario("sticky")
def _sticky(seen: Scenario) -> None:
    with modelled(Register(valid=0x7, initial=0x1, sticky=0x2)):
        seen.runs["run"] = run("run", "--write", *CPUID)
        seen.runs["next"] = run("run", "--write", *CPUID)
        seen.runs["restore"] = run("restore")


@scenario("one sticky CPU")
def _one_sticky(seen: Scenario) -> None:
    with modelled(STRONG, {1: Register(valid=0x7, initial=0x5, sticky=0x2)}):
        seen.runs["run"] = run("run", "--write", *CPUID)


@scenario("drivers there before")
def _loaded_before(seen: Scenario) -> None:
    with modelled(STRONG), driver():
        seen.runs["run"] = run("run", "--write", *CPUID)


@scenario("SIGINT")
def _sigint(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=SLOW):
        agent = Agent("run", "--write", *CPUID)
        agent.wait_for("bit 5")
        os.killpg(agent.pid, signal.SIGINT)  # as a terminal does it
        seen.runs["run"] = agent.finish()


@scenario("SIGTERM")
def _sigterm(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=SLOW):
        for name in ("SIGTERM", "SIGHUP"):
            agent = Agent("run", "--write", *CPUID)
            agent.wait_for("bit 1")
            agent.stop_while_changed()  # it must also be put back when the signal finds it so
            agent.send(getattr(signal, name))
            agent.send(signal.SIGCONT)
            seen.runs[name] = agent.finish()


@scenario("SIGINT at any moment")
def _sigint_anywhere(seen: Scenario) -> None:
    """From the first instruction of main() to the last."""
    dice = random.Random(SEED)
    with modelled(STRONG, delay_us=100):
        seen.runs["undisturbed"] = run("run", "--write", *CPUID)
        for _ in range(INTERRUPTS):
            agent = Agent("run", "--write", *CPUID)
            until(lambda agent=agent: agent.begun, "main()")  # type: ignore[misc]
            after = dice.uniform(0, seen.runs["undisturbed"].seconds)
            time.sleep(after)
            if not agent.ended:
                os.killpg(agent.pid, signal.SIGINT)
            seen.kills.append(_aftermath(agent, after, time.monotonic()))
            unload()


def _aftermath(agent: Agent, after: float, sent: float) -> Kill:
    code = agent.wait()
    if (STATE_DIR / "lock").exists():
        agent.wait_until_free()
    took = time.monotonic() - sent
    before, now = agent.before, machine()
    log = [write for write in now.writes if not before.writes or write.sequence > before.writes[-1].sequence]
    return Kill(
        after=after,
        code=code,
        left=agent.journal(),
        changed=now.changed,
        cleared=max(cpu.cleared for cpu in now.cpus),
        new_modules=sorted(set(now.modules) - set(before.modules)),
        rescued=any(write.pid != agent.pid for write in log),
        seconds_to_free=took,
        err=agent.err,
    )


@scenario("two at once")
def _two(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=SLOW):
        first = Agent("run", "--write", *CPUID)
        first.wait_for("bit 5")
        seen.runs["second"] = run("run", "--write", *CPUID)
        seen.runs["restore"] = run("restore")
        seen.notes["the first still ran"] = str(not first.ended)
        seen.runs["first"] = first.finish()


@scenario("two at once, two folders")
def _two_folders(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=SLOW):
        first = Agent("run", "--write", *CPUID)
        first.wait_for("bit 1")
        first.stop_while_changed()  # a second probe would take the trial's value for what the register held
        second = Agent("run", "--write", *CPUID, "--state-dir", str(SCRATCH / "other"))
        until(lambda: second.ended or bool(second.journal()), "the second probe")
        first.send(signal.SIGCONT)
        seen.runs["second"] = second.finish()
        seen.runs["first"] = first.finish()


@scenario("CPU offline")
def _offline(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=3 * SLOW):
        agent = Agent("run", "--write", *CPUID)
        try:
            agent.wait_for("bit 3")
            set_online(1, False)
            seen.runs["run"] = agent.finish()
        finally:
            set_online(1, True)


@scenario("CPU offline and back")
def _offline_and_back(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=5 * SLOW):
        agent = Agent("run", "--write", *CPUID)
        try:
            agent.wait_for("bit 3")
            set_online(1, False)
            agent.wait_for("bit 20" if '"bit 15"' not in agent.journal() else "bit 40")
        finally:
            set_online(1, True)
        seen.notes["back at"] = agent.journal().splitlines()[-1]
        seen.notes["ended"] = str(agent.ended)
        seen.runs["run"] = agent.finish()


@scenario("CPU offline while changed")
def _offline_changed(seen: Scenario) -> None:
    """The agent is stopped in a trial, the CPUs go and come back, and it goes on."""
    with modelled(STRONG, delay_us=SLOW):
        agent = Agent("run", "--write", *CPUID, "--cpus", "1")
        agent.wait_for("bit 1")
        agent.stop_while_changed()
        set_online(1, False)
        set_online(1, True)
        agent.send(signal.SIGCONT)
        seen.runs["run"] = agent.finish()


@scenario("watchdog killed")
def _watchdog(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=SLOW):
        agent = Agent("run", "--write", *CPUID)
        agent.wait_for("bit 5")
        os.kill(agent.watchdog(), signal.SIGKILL)
        seen.notes["killed at"] = agent.journal().splitlines()[-1]
        seen.runs["run"] = agent.finish()


@scenario("watchdog's CPUs")
def _watchdog_cpus(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=SLOW):
        agent = Agent("run", "--write", *CPUID)
        agent.wait_for("bit 5")
        seen.notes["watchdog"] = str(sorted(os.sched_getaffinity(agent.watchdog())))
        seen.notes["machine"] = str(sorted(os.sched_getaffinity(0)))
        seen.runs["run"] = agent.finish()


@scenario("agent killed")
def _agent_killed(seen: Scenario) -> None:
    """One SIGKILL at the worst moment; then the next run finds the journal."""
    with modelled(STRONG, delay_us=SLOW):
        agent = Agent("run", "--write", *CPUID)
        agent.wait_for("bit 1")
        agent.stop_while_changed()
        agent.send(signal.SIGKILL)
        agent.wait()
        agent.wait_until_free()
        seen.runs["killed"] = agent.finish()
        set_parameter("spec_ctrl_model", "delay_us", 0)
        seen.runs["next"] = run("run", "--write", *CPUID)
        seen.notes["filed away"] = (STATE_DIR / "last-incident.ndjson").read_text(encoding="utf-8")


def _kill_both(seen: Scenario, name: str) -> None:
    agent = Agent("run", "--write", *CPUID)
    agent.wait_for("bit 1")
    agent.stop_while_changed()
    os.kill(agent.watchdog(), signal.SIGKILL)
    agent.send(signal.SIGKILL)
    agent.wait()
    agent.wait_until_free()
    seen.runs[name] = agent.finish()


@scenario("both killed, restore")
def _both_restore(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=SLOW):
        _kill_both(seen, "killed")
        command("modprobe", "--remove", "msr")
        seen.runs["restore"] = run("restore")
        seen.runs["restore again"] = run("restore")


@scenario("both killed, run")
def _both_run(seen: Scenario) -> None:
    with modelled(STRONG, delay_us=SLOW):
        _kill_both(seen, "killed")
        set_parameter("spec_ctrl_model", "delay_us", 0)
        seen.runs["next"] = run("run", "--write", *CPUID)


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[Path]:
    place = SCRATCH / "disk"
    place.mkdir()
    command("mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place))
    try:
        yield place
    finally:
        command("umount", str(place))


@scenario("disk full")
def _disk_full(seen: Scenario) -> None:
    with modelled(STRONG), small_disk("12k") as place:
        (place / "ballast").write_bytes(bytes(8192))  # the third page is the lock's
        arguments = ("run", "--write", *CPUID, "--state-dir", str(place / "state"))
        seen.runs["full"] = run(*arguments)
        (place / "ballast").unlink()
        seen.runs["space again"] = run(*arguments)


@scenario("disk fills up")
def _disk_fills(seen: Scenario) -> None:
    with modelled(STRONG), small_disk("8k") as place:  # one page for the lock, one for a journal of some 100 lines
        arguments = ("run", "--write", *CPUID, "--pairs", "--clear-bits", "--repeat", "2")
        seen.runs["run"] = run(*arguments, "--state-dir", str(place / "state"))


@scenario("allow_writes=off in the middle")
def _allow_writes_middle(seen: Scenario) -> None:
    with driver(), modelled(STRONG, delay_us=SLOW):
        agent = Agent("run", "--write", *CPUID)
        agent.wait_for("bit 1")
        agent.stop_while_changed()
        set_parameter("msr", "allow_writes", "off")
        agent.send(signal.SIGCONT)
        seen.runs["run"] = agent.finish()
        set_parameter("msr", "allow_writes", "on")
        seen.runs["restore"] = run("restore")


@scenario("SIGKILL at random moments")
def _sigkill(seen: Scenario) -> None:
    """The register keeps every bit, so that it is changed for most of the walk; two bits are set at first."""
    dice = random.Random(SEED)
    arguments = ("run", "--write", *CPUID)
    with driver(), modelled(Register(valid=ALL_BITS, initial=0x5), delay_us=200):
        agent = Agent(*arguments)
        until(lambda: bool(agent.journal()), "the journal")
        began = time.monotonic()
        until(lambda: not agent.journal(), "the end of the walk")
        length = time.monotonic() - began
        agent.wait()
        seen.notes["walk"] = f"{length:.3f} s"
        for _ in range(KILLS):
            kill = _kill_once(arguments, dice.uniform(0, length))
            seen.kills.append(kill)
            (STATE_DIR / "journal.ndjson").unlink(missing_ok=True)
            # The computer may have more or less else to do by now: measure the walk's length by each kill, too.
            steps = kill.left.count('"intent"')
            if not kill.left or steps > 5:
                length = (length + (kill.after * 65 / steps if kill.left else min(length, kill.after))) / 2
        seen.notes["walk, at last"] = f"{length:.3f} s"
        seen.runs["last"] = run(*arguments)


def _kill_once(arguments: tuple[str, ...], after: float) -> Kill:
    agent = Agent(*arguments)
    until((STATE_DIR / "journal.ndjson").exists, "the journal")
    time.sleep(after)
    agent.send(signal.SIGKILL)
    return _aftermath(agent, after, time.monotonic())


@scenario("lockdown, securityfs not mounted")
def _lockdown_unknown(seen: Scenario) -> None:
    """Lockdown stays until the guest ends, so this and the next come last."""
    with driver(), modelled(STRONG):
        lock_down()
        command("umount", "/sys/kernel/security")
        try:
            seen.runs["run"] = run("run", "--write", *CPUID)
        finally:
            command("mount", "-t", "securityfs", "none", "/sys/kernel/security")
        seen.runs["mounted"] = run("run", "--write", *CPUID)


# --- the other boots -----------------------------------------------------------------------------------------------


@scenario("power cut", "cut")
def _power_cut(seen: Scenario) -> None:
    """Never ends: the guest is killed in the middle of the walk."""
    with modelled(STRONG, delay_us=10 * SLOW):
        seen.runs["run"] = run("run", "--write", *CPUID, "--state-dir", str(FOLDER / "state"))


@scenario("after the cut", "after the cut")
def _after_cut(seen: Scenario) -> None:
    """The kernel of this boot sets the register up differently, so that the old values would be wrong."""
    with modelled(Register(valid=0x7, initial=0x2)):
        for name in ("first", "second"):
            seen.runs[name] = run("run", "--write", *CPUID, "--state-dir", str(FOLDER / "state"))


@scenario("locked down", "locked down")
def _locked(seen: Scenario) -> None:
    seen.runs["run"] = run("run", "--write")
    seen.runs["restore"] = run("restore", "--state-dir", str(FOLDER / "state"))


# --- the whole -----------------------------------------------------------------------------------------------------


def tidy() -> None:
    """Leave nothing of a scenario for the next one, crashed or not."""
    for agent in Agent.everyone:
        if not agent.ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            with contextlib.suppress(OSError, TimeoutError):
                agent.wait(10)
                agent.wait_until_free(10)
    Agent.everyone.clear()
    unload()
    shutil.rmtree(SCRATCH, ignore_errors=True)


def write_report(report: Report) -> None:
    path = FOLDER / "report.json"
    path.with_suffix(".new").write_bytes(msgspec.json.encode(report))
    path.with_suffix(".new").replace(path)


def main(part: str, folder: str, module: str, seed: str) -> None:
    global MODULE, FOLDER, SEED
    MODULE, FOLDER, SEED = Path(module), Path(folder), int(seed)
    report = Report()
    for name, body in PARTS[part].items():
        report.running = name
        write_report(report)
        seen = report.scenarios[name] = Scenario()
        began = time.monotonic()
        try:
            SCRATCH.mkdir()
            body(seen)
        except BaseException:
            seen.error = traceback.format_exc()
        with contextlib.suppress(RuntimeError):
            tidy()
        seen.seconds = time.monotonic() - began
        print(f"{seen.seconds:6.1f} s  {name}{'  CRASHED' if seen.error else ''}", flush=True)
    report.running = ""
    write_report(report)


if __name__ == "__main__":
    main(*sys.argv[1:])
