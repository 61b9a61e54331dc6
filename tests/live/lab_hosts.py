# SPDX-License-Identifier: MIT
"""A lab on one machine: hosts with their own network, sshd, disk and processes, and a register in a file.

Each host is a network namespace behind one bridge (192.0.2.0/24, no way out) with a mount, name and process namespace:
killing its first process is a power cut, and each boot has a boot_id of its own. /dev/cpu/N/msr is a sparse file, so
the agent is the real one; every bit "sticks", but for those that register() leaves out. What must outlive a power cut
is in folder/NAME/disk. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("gcc", "ip", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TOOLS = ("sh", "cat", "mktemp", "rm", "hostname")

# What a host's first process does; words in braces are filled in.
_BOOT = """
set -e
hostname {name}
mount --make-rprivate /
mount -t proc proc /proc
cat /proc/sys/kernel/random/uuid > {own}/boot_id
mount --bind {own}/boot_id /proc/sys/kernel/random/boot_id
for place in /run /root /var/tmp /var/cache /dev/cpu; do mount -t tmpfs t $place; done
mkdir /run/scratch && mount -t tmpfs t /run/scratch
mkdir -p /run/sshd /run/tools {disk}/state
cp {own}/../key.pub /run/key.pub
mount --bind {disk} /var/lib
mkdir -p /var/lib/spec-ctrl-probe
mount --bind /bin/true $(readlink -f $(command -v modprobe))
for cpu in 0 1; do mkdir -p /dev/cpu/$cpu; truncate -s 8G /dev/cpu/$cpu/msr; done
for tool in {tools}; do ln -s $(command -v $tool) /run/tools/; done
{more}
exec {sshd} -D -e -f {config}
"""


def lacks() -> str:
    """Return what this machine lacks for a lab, or ""."""
    if os.geteuid() != 0:
        return "not root"
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)} (apt-get install gcc openssh-server iproute2 util-linux)"
    done = subprocess.run(["ip", "netns", "add", _netns("try")], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no network namespaces: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", _netns("try")], check=True)
    return ""


def _netns(name: str) -> str:
    return f"scp{os.getpid()}-{name}"


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class Lab:
    """Hosts by name; a command runs where they can be reached."""

    folder: Path
    names: tuple[str, ...]
    ssh_config: Path
    running: dict[str, subprocess.Popen[bytes]]

    def command(self, *words: str, timeout: float = 120, stdin: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller."""
        with open(stdin or os.devnull, "rb") as file:
            return subprocess.run(
                ["ip", "netns", "exec", _netns("ctl"), *words],
                stdin=file,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                cwd=self.folder,
            )

    def start(self, *words: str, stdin: Path | None = None, stdout: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a command on the controller; what it says goes to folder/said."""
        with (
            open(stdin or os.devnull, "rb") as file,
            open(stdout or os.devnull, "wb") as out,
            open(self.folder / "said", "wb") as said,
        ):
            return subprocess.Popen(
                ["ip", "netns", "exec", _netns("ctl"), *words], stdin=file, stdout=out, stderr=said, cwd=self.folder
            )

    def ssh(self, name: str, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return self.command("ssh", "-F", str(self.ssh_config), name, command, timeout=60)

    def link(self, name: str, state: str) -> None:
        """Cut a host's link ("down"), or mend it ("up")."""
        _do("ip", "-n", _netns(name), "link", "set", "eth0", state)

    def inside(self, name: str, *command: str) -> str:
        """Run a command on a host, past its network."""
        first = _child_of(self.running[name].pid)
        return subprocess.run(
            ["nsenter", "-t", str(first), "-m", "-u", "-p", *command], check=True, capture_output=True, text=True
        ).stdout

    def register(self, name: str, valid: int) -> None:
        """Give a host's registers just these bits: a write of any other fails with EIO, as #GP does."""
        (self.folder / name / "valid").write_text(f"{valid:#x}\n")

    def power_cut(self, name: str) -> None:
        """End every process of a host at once, and its network."""
        self.link(name, "down")
        os.kill(_child_of(self.running[name].pid), signal.SIGKILL)
        self.running.pop(name).wait(10)

    def boot(self, name: str, more: str = "") -> None:
        """Start a host; more is what its shell does before sshd."""
        own = self.folder / name
        self.link(name, "up")
        text = _BOOT.format(
            name=name,
            own=own,
            disk=own / "disk",
            tools=" ".join(_TOOLS),
            more=more,
            sshd=shutil.which("sshd", path=PATH),
            config=own / "sshd_config",
        )
        with open(own / "log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    _netns(name),
                    *["unshare", "-m", "-u", "-p", "-f", "--kill-child", "sh", "-c"],
                    text,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": PATH},
            )

    def wait_for(self, names: Sequence[str]) -> None:
        """Wait until hosts answer."""
        for name in names:
            end = time.monotonic() + 20
            while self.ssh(name, ":").returncode == 255:
                log = (self.folder / name / "log").read_text()
                assert time.monotonic() < end, f"{name} does not answer: {log[-500:]}"
                time.sleep(0.2)


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@contextlib.contextmanager
def lab(folder: Path, count: int) -> Iterator[Lab]:
    """Make a lab of lab1, lab2 ...; it is gone afterwards, processes, namespaces and all."""
    names = tuple(f"lab{number}" for number in range(1, count + 1))
    made = Lab(folder, names, folder / "ssh_config", {})
    _keys(made)
    try:
        _do("ip", "netns", "add", _netns("ctl"))
        _do("ip", "-n", _netns("ctl"), "link", "add", "br0", "type", "bridge")
        _do("ip", "-n", _netns("ctl"), "addr", "add", "192.0.2.254/24", "dev", "br0")
        _do("ip", "-n", _netns("ctl"), "link", "set", "br0", "up")
        for number, name in enumerate(names, 1):
            _do("ip", "netns", "add", _netns(name))
            pair = ["ip", "link", "add", "name", f"ve{number}", "netns", _netns("ctl"), "type", "veth"]
            _do(*pair, "peer", "name", "eth0", "netns", _netns(name))
            _do("ip", "-n", _netns("ctl"), "link", "set", f"ve{number}", "master", "br0", "up")
            _do("ip", "-n", _netns(name), "addr", "add", f"192.0.2.{number}/24", "dev", "eth0")
            _do("ip", "-n", _netns(name), "link", "set", "eth0", "up")
            _do("ip", "-n", _netns(name), "link", "set", "lo", "up")
        yield made
    finally:
        for process in made.running.values():
            process.kill()  # unshare --kill-child ends the host's first process with it, and so all of them
            process.wait()
        for name in ("ctl", *names):
            subprocess.run(["ip", "netns", "del", _netns(name)], check=False, capture_output=True)


def _keys(made: Lab) -> None:
    """Write keys and configurations of ssh and sshd."""
    folder = made.folder
    source = Path(__file__).parent / "register.c"
    _do("gcc", "-shared", "-fPIC", "-O2", "-Wall", "-o", str(folder / "register.so"), str(source), "-ldl")
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    hosts, known = [], []
    for number, name in enumerate(made.names, 1):
        own = folder / name
        (own / "disk").mkdir(parents=True)
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(own / "host_key"))
        known.append(f"192.0.2.{number} " + (own / "host_key.pub").read_text())
        hosts.append(f"Host {name}\n    HostName 192.0.2.{number}\n")
        lines = ["Port 22", f"HostKey {own}/host_key", "PermitRootLogin yes", "UsePAM no", "StrictModes no"]
        lines += [
            "AuthorizedKeysFile /run/key.pub",
            f"SetEnv PATH={PATH} TMPDIR=/run/scratch LD_PRELOAD={folder}/register.so REGISTER={own}/valid",
            "PidFile none",
            "MaxStartups 100",
        ]
        (own / "sshd_config").write_text("".join(f"{line}\n" for line in lines))
    (folder / "known_hosts").write_text("".join(known))
    common = f"""Host *
    User root
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 5
    ServerAliveInterval 2
    ServerAliveCountMax 2
    LogLevel ERROR
"""
    made.ssh_config.write_text("".join(hosts) + common)
