# SPDX-License-Identifier: MIT
"""Debian's archive, read through a private apt: own lists, own sources, no root, nothing of the host's apt touched.

apt does what it is good at: it checks the archive's signature, and every file against the signed hashes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kernel_harness.boot.cache import Say, storage_error
from probe.errors import ProbeError, RequirementMissing

MIRROR = "http://deb.debian.org/debian"
SECURITY_MIRROR = "http://deb.debian.org/debian-security"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# Suites that get their security fixes directly: https://wiki.debian.org/DebianUnstable
_ROLLING = ("sid", "unstable", "experimental")

# What of the host's apt configuration says how to reach the network, and whether its clock and its mirrors' age are to
# be trusted (a frozen mirror has expired Release files); apt.conf(5), apt-transport-http(1).
_NETWORK = re.compile(r"^Acquire::(https?::|Proxy|Retries|ForceIPv[46]|Check-Valid-Until|Check-Date)", re.IGNORECASE)

_MORE_SPACE = "free space there, or set PROBE_CACHE to a folder elsewhere; a kernel takes up to 500 MB"
OWN_KERNEL = "boot a kernel that you have: --kernel PATH, or --kernel host"


def sources_text(suite: str) -> str:
    """Return sources.list for one suite, with its updates and security fixes where it has them.

    Source: sources.list(5); https://www.debian.org/security/faq names SUITE-security (Debian 11 and later).
    """
    option = f"[arch=amd64 signed-by={KEYRING}]"
    lines = [f"deb {option} {MIRROR} {suite} main"]
    if suite not in _ROLLING:
        lines += [
            f"deb {option} {MIRROR} {suite}-updates main",
            f"deb {option} {SECURITY_MIRROR} {suite}-security main",
        ]
    return "\n".join(lines) + "\n"


def network_settings(dump: str) -> list[str]:
    """Pick the lines about proxies, transports and expiry from the output of `apt-config dump`."""
    return [line for line in dump.splitlines() if _NETWORK.match(line) and not line.endswith(' "";')]


def config_text(folder: Path, network: list[str]) -> str:
    """Return the apt.conf that keeps apt inside folder; network holds lines of the host's own (network_settings).

    The host's hooks (APT::Update::Post-Invoke and such) are left out on purpose: they act on the host's apt.
    Raise ProbeError if folder has a character that apt.conf(5) cannot quote.
    """
    if '"' in str(folder) or "\n" in str(folder):
        raise ProbeError(
            f"cannot write apt.conf for {folder}: the path has a quote", "set PROBE_CACHE to another folder"
        )
    paths = {
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::sourcelist": f"{folder}/sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::trusted": "/dev/null",
        "Dir::Etc::trustedparts": "/dev/null",
        "Dir::State": f"{folder}",
        "Dir::State::lists": f"{folder}/lists",
        "Dir::State::status": f"{folder}/status",
        "Dir::Cache": f"{folder}",
        "Dir::Cache::archives": f"{folder}/archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Log": f"{folder}/log",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "root",  # _apt may not enter a user's home; without root this says nothing
        "APT::Update::Error-Mode": "any",
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::GzipIndexes": "true",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Acquire::http::Timeout": "30",
    }
    own = [f'{name} "{value}";' for name, value in paths.items()]
    return "\n".join(["#clear APT::Architectures;", *own, *network]) + "\n"


def parse_stanza(text: str) -> dict[str, str]:
    """Parse the first stanza of `apt-cache show` into field -> value; continuation lines keep their line ends."""
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if not line.strip():
            if fields:
                break
            continue
        if line[0] in " \t":
            fields[name] = f"{fields[name]}\n{line.strip()}"
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


@dataclass(frozen=True)
class Package:
    """One package in one version, as the signed index describes it."""

    name: str
    version: str
    sha256: str
    size: int  # of the .deb, in bytes
    depends: tuple[tuple[str, str], ...] = field(default=())  # (package, exact version or "")


def parse_package(text: str) -> Package:
    """Make a Package of `apt-cache show`'s output. Raise ProbeError if fields are missing."""
    stanza = parse_stanza(text)
    depends = []
    for relation in stanza.get("Depends", "").split(","):
        match = re.match(r"\s*([a-z0-9][a-z0-9+.-]*)(?::\w+)?\s*(?:\(=\s*([^)\s]+)\s*\))?", relation)
        if match:
            depends.append((match.group(1), match.group(2) or ""))
    try:
        return Package(
            stanza["Package"], stanza["Version"], stanza["SHA256"].lower(), int(stanza["Size"]), tuple(depends)
        )
    except (KeyError, ValueError) as error:
        raise ProbeError(f"cannot read apt-cache's description of a package: no {error}") from error


class Archive(Protocol):
    """A source of Debian packages."""

    def update(self) -> None:
        """Fetch the newest index."""

    def show(self, package: str, version: str = "") -> Package:
        """Describe a package, in its newest version unless one is given."""

    def unpack(self, package: Package, into: Path) -> None:
        """Download one package and unpack its files into a folder."""


class PrivateApt:
    """Debian's archive for one suite, through the host's apt programs with a configuration of our own.

    suite is a codename such as "bookworm"; folder, inside the cache, holds lists and configuration (10 to 20 MB).
    The caller holds a lock on it. Raise RequirementMissing if apt or Debian's keyring is not installed.
    """

    def __init__(self, suite: str, folder: Path, say: Say) -> None:
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise RequirementMissing(f"cannot fetch a kernel of Debian {suite}: no apt-get on this system", OWN_KERNEL)
        if not KEYRING.exists():
            raise RequirementMissing(
                f"cannot check the signature of Debian {suite}: no {KEYRING}",
                f"apt-get install debian-archive-keyring, or {OWN_KERNEL}",
            )
        self._suite = suite
        self._folder = folder
        self._say = say
        try:
            for name in ("lists/partial", "archives/partial"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / "status").touch()
            (folder / "sources.list").write_text(sources_text(suite), encoding="utf-8")
            config = folder / "apt.conf"
            config.touch(mode=0o600)  # a proxy's password may be in it
            config.chmod(0o600)
            dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
            config.write_text(config_text(folder, network_settings(dump)), encoding="utf-8")
        except OSError as error:
            raise storage_error("write", folder, error) from error

    def update(self) -> None:
        """Fetch the suite's index. Raise RequirementMissing if the archive cannot be reached or has no such suite."""
        self._say(f"fetching the package index of Debian {self._suite}")
        self._apt(["apt-get", "update"], "fetch the package index of")

    def show(self, package: str, version: str = "") -> Package:
        """Describe a package of the suite. Raise RequirementMissing if it is not there."""
        wanted = f"{package}={version}" if version else package
        return parse_package(self._apt(["apt-cache", "show", "--no-all-versions", wanted], f"find {wanted} in"))

    def unpack(self, package: Package, into: Path) -> None:
        """Download one package, unpack its files into a folder as the user who asks, and remove the .deb.

        apt checks its hash against the signed index, and so do we. Raise RequirementMissing if the archive no longer
        has it or cannot be reached, ProbeError if the disk is full or the file damaged.
        """
        wanted = f"{package.name}={package.version}"
        self._say(f"fetching {package.name} {package.version} ({_size(package.size)})")
        self._apt(["apt-get", "download", wanted], f"download {wanted} of", cwd=into)
        found = sorted(into.glob(f"{package.name}_*.deb"))
        if len(found) != 1:
            raise ProbeError(f"cannot find what apt-get downloaded for {wanted}: {len(found)} files in {into}")
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ProbeError(f"cannot use {found[0].name}: its SHA-256 is {digest}, the index says {package.sha256}")
        _extract(found[0], into)
        found[0].unlink()

    def _apt(self, argv: list[str], doing: str, cwd: Path | None = None) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self._folder / "apt.conf"), "LC_ALL": "C"}
        result = subprocess.run(
            argv, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if result.returncode == 0:
            return result.stdout
        lines = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        reason = lines[0][2:].strip() if lines else (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        if any(word in result.stderr for word in ("No space left on device", "enough free space", "Disk quota")):
            raise ProbeError(
                f"cannot {doing} Debian {self._suite}: no space left below {cwd or self._folder}", _MORE_SPACE
            )
        raise RequirementMissing(
            f"cannot {doing} Debian {self._suite}: {reason}", f"check network and proxy, or {OWN_KERNEL}"
        )


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _extract(deb: Path, into: Path) -> None:
    result = subprocess.run(
        ["dpkg-deb", "--extract", str(deb), str(into)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if result.returncode != 0:
        reason = next((line for line in result.stderr.splitlines() if line.strip()), "no reason given")
        raise ProbeError(f"cannot unpack {deb.name} into {into}: {reason.strip()}")
