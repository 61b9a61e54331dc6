# SPDX-License-Identifier: MIT
"""Boots a kernel in QEMU on the host's own root file system and runs one command in it, through virtme-ng.

The guest sees the host's files, the running Python and its packages among them, read-only; what it writes goes to a
layer in its memory, except below the one folder that it is given. Of virtme-ng the program virtme-run is used, which
`vng` itself runs: vng joins its arguments to a shell command without quoting (virtme-ng 1.42, virtme_ng/run.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from kernel_harness.boot import kernels
from kernel_harness.boot.cache import default_cache, locked, storage_error, write_whole
from kernel_harness.boot.kernels import Kernel
from probe.doctor import Program
from probe.errors import GuestLost, RequirementMissing, UsageError
from probe.record import hide_paths

QEMU = "qemu-system-x86_64"
EXCHANGE = "/run/spec-ctrl-probe"  # where the guest sees the folder through which it talks to us

# Where the guest may write without it being kept, as vng chooses them (virtme-ng 1.42 _get_virtme_overlay_rwdir), and
# /root. Over the others virtme-init lays empty file systems, which would hide what of the host's lies there.
_LAYERED = ("/etc", "/lib", "/home", "/opt", "/root", "/srv", "/usr", "/var", "/tmp")
_HIDDEN = ("/run", "/dev", "/var/log", "/var/tmp", "/var/cache", "/var/spool/rsyslog", "/var/lib/apt")
_PATH_THAT_VIRTME_TAKES = re.compile(r"[A-Za-z0-9_+/.-]+\Z")  # virtme-ng 1.42 _SAFE_PATH_PATTERN, less the blank
_CONSOLE_LINES = 20  # of a lost guest are shown
_APPEND_MAX = 900  # bytes; x86 takes 2048 (COMMAND_LINE_SIZE), virtme-run needs the rest

# Constant text: command, environment and folder come as files, so that nothing is ever quoted for a shell.
_GUEST_SCRIPT = f"""\
cd {EXCHANGE} || exit 125
mapfile -d '' -t command < command
mapfile -d '' -t environment < environment
mkdir -p /run/home
: > started
cd "$(cat folder)" && env -- HOME=/run/home LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 \\
    "${{environment[@]}}" "${{command[@]}}" > {EXCHANGE}/stdout 2> {EXCHANGE}/stderr < /dev/null
echo $? > {EXCHANGE}/returncode.new
mv {EXCHANGE}/returncode.new {EXCHANGE}/returncode
"""

# How long a kernel under KVM gets to reach its (absent) root file system; nested KVM on a busy host needs some seconds.
_KVM_TRIAL_SECONDS = 30.0
_KVM_TRIAL_MARK = "Unable to mount root fs"  # linux v7.1 init/do_mounts.c, mount_root_generic()


@dataclass(frozen=True)
class GuestResult:
    """What a command did in a guest: its exit status, its output, the kernel's console, and the times in seconds.

    returncode is as the shell has it: 126 not executable, 127 not found, 128 + N killed by signal N. console holds what
    the kernel said at level warning or above, and what QEMU and virtme-run said. seconds is from start to power off,
    boot_seconds from start to the first instruction of the command.
    """

    returncode: int
    stdout: str
    stderr: str
    console: str
    seconds: float
    boot_seconds: float


class Guest:
    """A running guest. Leaving the `with` block, or kill(), ends it as a power cut would: nothing is flushed."""

    def __init__(self, process: subprocess.Popen[bytes], exchange: Path, lock: int, name: str) -> None:
        self._process = process
        self._lock: int | None = lock
        self._exchange = exchange
        self._name = name
        self._began = time.monotonic()
        self._started: float | None = None
        self._gone = False
        self._console = bytearray()
        assert process.stderr is not None
        self._reader = threading.Thread(target=self._read_console, args=(process.stderr,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process group of virtme-run and QEMU."""
        return self._process.pid

    @property
    def started(self) -> bool:
        """Whether the command has begun to run in the guest."""
        return self._started is not None or self._look_for_start()

    @property
    def console(self) -> str:
        """What the console said so far."""
        return bytes(self._console).decode("utf-8", "replace").replace("\r\n", "\n")

    @property
    def stdout(self) -> str:
        """What the command has written to its standard output so far."""
        return self._text("stdout")

    @property
    def stderr(self) -> str:
        """What the command has written to its standard error so far."""
        return self._text("stderr")

    def running(self) -> bool:
        """Say whether QEMU still runs."""
        if not self._gone and self._process.poll() is not None:
            self.kill()
        return not self._gone

    def kill(self) -> None:
        """End QEMU and all that belongs to it with SIGKILL, now; for the guest this is a power cut.

        Harmless if it has ended. Return when no process of the group is left.
        """
        if self._gone:  # its number may be someone else's by now
            return
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            except PermissionError:  # only a zombie that nobody has waited for is left
                break
            if self._process.poll() is not None and not _alive(self._process.pid):
                break
            time.sleep(0.01)
        self._process.wait()
        self._gone = True

    def wait(self, timeout: float, waiting: Callable[[float | None], None] = lambda seconds: None) -> GuestResult:
        """Wait until the command has ended and the guest has powered off.

        timeout is in seconds from now; waiting is called meanwhile with the seconds since the start, at last with None.
        Raise GuestLost, with the console's last lines, if the time is up (the guest is killed then) or if the guest
        ended without telling the command's exit status: a panic, a QEMU that failed, a power cut. Whatever is raised,
        nothing is left running.
        """
        deadline = time.monotonic() + timeout
        try:
            while self.running():
                self._look_for_start()
                if time.monotonic() > deadline:
                    self.kill()
                    raise self._lost(f"no answer within {timeout:g} s")
                waiting(time.monotonic() - self._began)
                time.sleep(0.05)
            seconds = time.monotonic() - self._began
        finally:
            waiting(None)
            self.kill()
            self._reader.join(timeout=5)
        self._look_for_start()
        try:
            returncode = int(self._text("returncode"))
        except ValueError:
            raise self._lost("it ended without an exit status") from None
        return GuestResult(
            returncode, self.stdout, self.stderr, self.console, seconds, (self._started or self._began) - self._began
        )

    def close(self) -> None:
        """Kill the guest if it runs and remove its temporary folder."""
        try:
            self.kill()
        finally:
            self._reader.join(timeout=5)
            shutil.rmtree(self._exchange, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _read_console(self, pipe: IO[bytes]) -> None:
        with pipe:
            while chunk := os.read(pipe.fileno(), 65536):
                self._console += chunk

    def _look_for_start(self) -> bool:
        if self._started is None and (self._exchange / "started").exists():
            self._started = time.monotonic()
        return self._started is not None

    def _text(self, name: str) -> str:
        try:
            return (self._exchange / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def _lost(self, why: str) -> GuestLost:
        stage = "the command ran" if self._started else "before the command began"
        lines = [line.strip() for line in self.console.splitlines() if line.strip()]
        panic = [line for line in lines if "Kernel panic" in line or "BUG: " in line or "Oops: " in line][:1]
        said = (panic or lines[-1:] or ["nothing"])[0]
        word = "its kernel said" if panic else "its console said last"
        return GuestLost(
            f"lost the guest with {self._name} ({stage}): {why}; {word}: {said}", console=lines[-_CONSOLE_LINES:]
        )


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _virtme_run() -> str | None:
    """Return the path of virtme-run: beside the running Python, or on PATH; None if absent."""
    beside = Path(sys.executable).with_name("virtme-run")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("virtme-run")


def requirements() -> list[Program]:
    """Look for the programs that booting needs.

    virtme-run itself ends with a Python traceback if file and strings, modprobe or busybox are missing (1.42).
    """
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = [
        Program(" or ".join(names), any(shutil.which(name, path=path) for name in names), f"apt-get install {package}")
        for names, package in (
            ((QEMU,), "qemu-system-x86"),
            (("busybox",), "busybox-static"),
            (("modprobe",), "kmod"),
            (("file", "strings"), "file"),
            (("timeout",), "coreutils"),
        )
    ]
    return [*found, Program("virtme-ng", _virtme_run() is not None, f"{sys.executable} -m pip install virtme-ng")]


def check_requirements() -> None:
    """Raise RequirementMissing for the first program that booting needs and that is absent."""
    for program in requirements():
        if not program.there:
            raise RequirementMissing(f"cannot boot a kernel: no {program.name} on this system", program.remedy)


def _make_exchange(home: Path) -> tuple[Path, int]:
    """Make a guest's folder, and remove those of guests whose processes are all gone; return it and its lock.

    The lock is an open file that QEMU inherits; it is held until QEMU has ended and our Guest is closed.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / "lock", lambda line: None):
            for old in home.glob("guest-*"):
                try:
                    handle = os.open(old / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                except FileNotFoundError:  # its owner has just removed it
                    continue
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                finally:
                    os.close(handle)
                shutil.rmtree(old, ignore_errors=True)
            exchange = Path(tempfile.mkdtemp(prefix="guest-", dir=home))
            lock = os.open(exchange / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return exchange, lock
    except OSError as error:
        raise storage_error("create a folder in", home, error) from error


def _kernel_folder(kernel: Kernel, exchange: Path) -> Path:
    """Lay links to image and modules as virtme-run looks for them, and return the image's.

    Given the image itself it would take an arch/x86/boot/bzImage for a build tree and write its own modules there.
    """
    folder = exchange / "kernel"
    folder.mkdir()
    image = folder / f"vmlinuz-{kernel.release}"
    image.symlink_to(kernel.image.absolute())
    if kernel.root != Path("/"):
        (folder / "lib" / "modules").mkdir(parents=True)
        (folder / "lib" / "modules" / kernel.release).symlink_to(kernel.modules.absolute())
    return image


def _virtme_arguments(
    kernel: Kernel,
    exchange: Path,
    *,
    accel: str,
    cpus: int,
    memory: str,
    append: Sequence[str],
    rw_dir: Path | None,
    qemu_opts: Sequence[str],
) -> list[str]:
    """Return virtme-run's arguments. Raise UsageError for what it, or the kernel's command line, cannot carry."""
    if accel not in ("kvm", "tcg"):
        raise UsageError(f"unknown accelerator {accel}", "use kvm or tcg")
    if sum(len(item) + 1 for item in append) > _APPEND_MAX or any(c in item for item in append for c in '"\n'):
        raise UsageError(f"cannot give the kernel {' '.join(append)!r}: a quote in it, or longer than {_APPEND_MAX}")
    arguments = [
        f"--kimg={_kernel_folder(kernel, exchange)}",
        "--mods=auto",
        f"--memory={memory}",
        f"--cpus={cpus}",
        "--force-9p",
        "--show-boot-console",
        f"--script-sh=bash {EXCHANGE}/script",
        f"--rwdir={EXCHANGE}={exchange}",
    ]
    arguments += [f"--overlay-rwdir={name}" for name in _LAYERED if Path(name).is_dir() and not Path(name).is_symlink()]
    if accel == "tcg":
        arguments.append("--disable-kvm")
    if rw_dir is not None:
        arguments.append(f"--rwdir={rw_dir}={rw_dir}")
    for needed in {
        exchange / "kernel",
        kernel.root,
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(__file__).resolve().parents[2],
    }:
        if any(needed.is_relative_to(hidden) for hidden in _HIDDEN):
            arguments.append(f"--rodir={needed}={needed}")
    # What QEMU's console shows is what the user of a lost guest gets to see: warnings and worse.
    arguments += [f"--kopt={item}" for item in ("loglevel=5", *append)]
    arguments += [f"--qemu-opt={item}" for item in qemu_opts]
    return arguments


def start(
    kernel: Kernel,
    argv: Sequence[str],
    *,
    accel: str,
    cpus: int = 2,
    memory: str = "1G",
    append: Sequence[str] = (),
    rw_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
    qemu_opts: Sequence[str] = (),
    cache: Path | None = None,
    lifetime: float = 3600.0,
) -> Guest:
    """Start a guest that runs one command as root and powers off; return at once.

    accel is "kvm" or "tcg" (see accelerator); memory as QEMU writes it ("1G"); append holds kernel parameters; rw_dir
    is the folder that the guest may write, at the same path and the command's working directory; env is added to
    a small environment (HOME, LANG, PATH); qemu_opts go to QEMU as they are, last, so that `-cpu` among them wins.
    cache is the cache folder, default_cache() if None. lifetime, in seconds, ends QEMU even if this process was killed.
    Raise RequirementMissing if QEMU or virtme-ng is absent, UsageError for arguments that cannot be passed on.
    """
    check_requirements()
    if not argv or any("\0" in item for item in argv):
        raise UsageError("cannot start a guest without a command, or with a NUL in it")
    home = cache or default_cache()
    for path in (home, rw_dir):
        if path is not None and not (path.is_absolute() and _PATH_THAT_VIRTME_TAKES.match(str(path))):
            raise UsageError(
                f"cannot give {path} to virtme-ng: it takes absolute paths of letters, digits and _+-./",
                "set PROBE_CACHE, or use another folder",
            )
    exchange, lock = _make_exchange(home / "guests")
    try:
        arguments = _virtme_arguments(
            kernel, exchange, accel=accel, cpus=cpus, memory=memory, append=append, rw_dir=rw_dir, qemu_opts=qemu_opts
        )
        (exchange / "script").write_text(_GUEST_SCRIPT, encoding="utf-8")
        (exchange / "command").write_bytes(b"".join(os.fsencode(item) + b"\0" for item in argv))
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        (exchange / "environment").write_bytes(b"".join(os.fsencode(item) + b"\0" for item in settings))
        (exchange / "folder").write_text(str(rw_dir or "/"), encoding="utf-8")
        (exchange / "tmp").mkdir()
        program = _virtme_run() or "virtme-run"
        process = subprocess.Popen(
            ["timeout", "--signal=KILL", f"{lifetime:g}", program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=exchange,
            # virtme-run keeps a cache in HOME and builds an initramfs in TMPDIR; it finds modprobe on PATH.
            env={
                **os.environ,
                "HOME": str(exchange / "tmp"),
                "TMPDIR": str(exchange / "tmp"),
                "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin",
            },
            start_new_session=True,
            pass_fds=(lock,),
        )
    except BaseException as error:
        shutil.rmtree(exchange, ignore_errors=True)
        os.close(lock)
        if isinstance(error, OSError):
            raise storage_error("start a guest in", exchange, error) from error
        raise
    return Guest(process, exchange, lock, kernel.release)


def run(
    kernel: Kernel,
    argv: Sequence[str],
    *,
    accel: str,
    cpus: int = 2,
    memory: str = "1G",
    append: Sequence[str] = (),
    rw_dir: Path | None = None,
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
    qemu_opts: Sequence[str] = (),
    cache: Path | None = None,
    waiting: Callable[[float | None], None] = lambda seconds: None,
) -> GuestResult:
    """Boot a kernel, run one command in it as root, and return what it did; arguments are those of start().

    timeout, in seconds, covers boot and command. Raise GuestLost if the guest gives no exit status in that time, and
    what start() raises. Nothing is left running or on disk.
    """
    with start(
        kernel,
        argv,
        accel=accel,
        cpus=cpus,
        memory=memory,
        append=append,
        rw_dir=rw_dir,
        env=env,
        qemu_opts=qemu_opts,
        cache=cache,
        lifetime=timeout + 60,
    ) as guest:
        return guest.wait(timeout, waiting)


def qemu_version() -> str:
    """Return the first line of QEMU's --version. Raise RequirementMissing if there is no QEMU for x86-64."""
    try:
        result = subprocess.run(
            [QEMU, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise RequirementMissing(f"cannot boot a kernel: no {QEMU} here", "apt-get install qemu-system-x86") from None
    return (result.stdout.splitlines() or ["unknown"])[0]


def cpu_flags() -> frozenset[str]:
    """Return the names of the CPUID flags that this QEMU knows, such as "amd-stibp"."""
    result = subprocess.run(
        [QEMU, "-cpu", "help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return frozenset(result.stdout.partition("Recognized CPUID flags:")[2].split())


def accelerator(cache: Path, kernel: Kernel | None = None) -> tuple[str, str]:
    """Tell whether guests should run under KVM or TCG; return ("kvm" or "tcg", the reason in words).

    /dev/kvm may exist and yet not boot Linux (other KVM back ends, nesting that is switched off), so a kernel is
    booted under it, without a root file system, until it looks for one: about two seconds. kernel is the one to boot,
    by default any of the cache's. The answer is remembered in the cache for this boot of the host, its kernel and QEMU.
    Raise RequirementMissing if there is no QEMU for x86-64.
    """
    version = qemu_version()
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return "tcg", f"/dev/kvm cannot be opened: {error.strerror}"
    remembered = remembered_accelerator(cache)
    if remembered is not None:
        return remembered
    chosen = kernel or next(iter(kernels.cached(cache)), None)
    if chosen is None:
        return "kvm", "/dev/kvm can be opened; no kernel in the cache to try it with"
    answer, because = _try_kvm(chosen)
    write_whole(
        cache / _MEMORY,
        json.dumps({"key": _memory_key(version), "accelerator": answer, "because": because}, indent=1) + "\n",
    )
    return answer, because


_MEMORY = "accelerator.json"


def _memory_key(version: str) -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{os.uname().release} {boot_id} {version}"


def remembered_accelerator(cache: Path) -> tuple[str, str] | None:
    """Return what accelerator() found out since the host booted, with this QEMU; None if nothing."""
    try:
        remembered = json.loads((cache / _MEMORY).read_text(encoding="utf-8"))
        if remembered["key"] == _memory_key(qemu_version()) and remembered["accelerator"] in ("kvm", "tcg"):
            return remembered["accelerator"], str(remembered["because"])
    except (OSError, ValueError, KeyError, TypeError, RequirementMissing):
        pass
    return None


def _try_kvm(kernel: Kernel) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        console = Path(folder, "console")
        began = time.monotonic()
        command = [QEMU, "-accel", "kvm", "-cpu", "host", "-smp", "2", "-m", "256M", "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-no-reboot", "-serial", f"file:{console}", "-kernel", str(kernel.image)]
        command += ["-append", "console=ttyS0 panic=-1"]
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_KVM_TRIAL_SECONDS,
                cwd=folder,  # a QEMU that aborts may leave a core file
            )
        except subprocess.TimeoutExpired:
            return "tcg", f"{kernel.release} does not boot under KVM within {_KVM_TRIAL_SECONDS:g} s"
        if console.exists() and _KVM_TRIAL_MARK in console.read_text(encoding="utf-8", errors="replace"):
            return "kvm", f"{kernel.release} boots under KVM in {time.monotonic() - began:.0f} s"
        said = (result.stderr.strip().splitlines() or [f"QEMU ended with status {result.returncode}"])[0]
        said = hide_paths(said)  # it goes into the record
        return "tcg", f"{kernel.release} does not boot under KVM: {said}"
