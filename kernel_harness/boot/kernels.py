# SPDX-License-Identifier: MIT
"""Kernels to boot: Debian's, fetched into the cache; the host's own; or any image with its modules."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kernel_harness.boot import debian
from kernel_harness.boot.cache import Say, locked, storage_error, under_construction, write_whole
from probe.errors import ProbeError, RequirementMissing, UsageError

_BUILDER = re.compile(r"^\([^)]*\)\s*")  # who built it, and on which host: nobody's business in a record
_CODENAME = re.compile(r"[a-z][a-z0-9.-]*\Z")
_OLDEST = ("buster", "stretch", "jessie", "wheezy")


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted, and where it comes from.

    name is the specification that found it, without paths ("debian:bookworm", "host", "file"); release is what
    `uname -r` will say; version the package's ("6.1.192-2"), or the image's build text; root the folder that has
    lib/modules/RELEASE; sha256 that of the .deb that holds the image, checked against Debian's signed index, or that of
    the image itself.
    """

    name: str
    release: str
    version: str
    image: Path
    root: Path
    sha256: str

    @property
    def modules(self) -> Path:
        """The folder of this release's modules; it may be absent for a kernel without modules."""
        return self.root / "lib" / "modules" / self.release


def parse_os_release(text: str) -> dict[str, str]:
    """Parse os-release(5): NAME=value lines, quotes removed; what does not parse is left out."""
    fields = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            fields[name] = value.strip().strip("\"'")
    return fields


def default_spec(os_release: Path = Path("/etc/os-release")) -> str:
    """Return the kernel to boot when none is asked for.

    Debian's own on Debian; elsewhere the running kernel, if its image can be read; elsewhere Debian bookworm's, if apt
    and Debian's keys are there. Raise RequirementMissing if nothing of this is possible.
    """
    try:
        fields = parse_os_release(os_release.read_text(encoding="utf-8"))
    except OSError:
        fields = {}
    if fields.get("ID") == "debian" and (codename := fields.get("VERSION_CODENAME")):
        return f"debian:{codename}"
    try:
        _host_kernel()
    except ProbeError:
        pass
    else:
        return "host"
    if shutil.which("apt-get") and debian.KEYRING.exists():
        return "debian:bookworm"
    raise RequirementMissing(
        f"no kernel to boot: this is {fields.get('PRETTY_NAME', 'an unknown system')} and its running kernel's image "
        "cannot be read",
        "give one: --kernel PATH",
    )


def parse_spec(spec: str) -> tuple[str, str]:
    """Split a specification into (kind, rest): ("debian", codename), ("host", "") or ("file", path).

    Raise UsageError if it is none of them.
    """
    if spec == "host":
        return "host", ""
    kind, colon, rest = spec.partition(":")
    if colon and "/" not in kind:
        if kind != "debian":
            raise UsageError(f"unknown kernel {spec}: no source called {kind}", "use debian:CODENAME, host or a path")
        if not _CODENAME.match(rest):
            raise UsageError(
                f"unknown kernel {spec}: {rest or 'nothing'} is no codename", "for example debian:bookworm"
            )
        if rest in _OLDEST:
            raise UsageError(f"unknown kernel {spec}: the oldest suite known here is bullseye (5.10)")
        return "debian", rest
    if not spec:
        raise UsageError("no kernel given", "use debian:CODENAME, host or a path")
    return "file", spec


def image_release(image: Path) -> tuple[str, str]:
    """Read (release, build text) from an x86 kernel image, for example ("6.1.0-44-amd64", "#1 SMP ... 6.1.192-2").

    Source: linux v7.1 Documentation/arch/x86/boot.rst, offsets 0x202 (header "HdrS") and 0x20e (kernel_version: a
    pointer to a NUL-terminated text, less 0x200). Raise RequirementMissing if it cannot be read or is no such image.
    """
    try:
        with open(image, "rb") as handle:
            head = handle.read(0x10200)
    except OSError as error:
        raise RequirementMissing(f"cannot read the kernel image {image}: {error.strerror}") from error
    pointer = int.from_bytes(head[0x20E:0x210], "little")
    if head[0x202:0x206] != b"HdrS" or not pointer:
        raise RequirementMissing(f"cannot boot {image}: not an x86 bzImage", "give a vmlinuz, not a vmlinux")
    text = head[pointer + 0x200 :].split(b"\0", 1)[0].decode("ascii", "replace")
    release, _, build = text.partition(" ")
    return release, _BUILDER.sub("", build)


def _file_kernel(name: str, image: Path) -> Kernel:
    image = image.absolute()
    release, build = image_release(image)
    # beside it (boot/vmlinuz-V, lib/modules/V), in it (lib/modules/V/vmlinuz), or installed
    roots = [folder for parent in image.parents for folder in (parent, parent / "usr")]
    root = next((folder for folder in roots if (folder / "lib" / "modules" / release).is_dir()), Path("/"))
    if not (root / "lib" / "modules" / release).is_dir():
        raise RequirementMissing(
            f"cannot boot {image}: no lib/modules/{release} beside it or in /",
            f"make modules_install INSTALL_MOD_PATH={image.parent}",
        )
    try:
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
    except OSError as error:
        raise RequirementMissing(f"cannot read the kernel image {image}: {error.strerror}") from error
    return Kernel(name, release, build, image, root, digest)


def _host_kernel() -> Kernel:
    release = platform.release()
    places = [
        Path(f"/boot/vmlinuz-{release}"),
        Path(f"/lib/modules/{release}/vmlinuz"),
        Path(f"/boot/vmlinux-{release}"),
    ]
    for image in places:
        if image.exists():
            return _file_kernel("host", image)
    raise RequirementMissing(
        f"cannot boot the host's kernel {release}: no image in /boot or /lib/modules",
        "give another: --kernel debian:bookworm, or --kernel PATH",
    )


def obtain(spec: str, cache: Path, say: Say, *, refresh: bool = False, archive: debian.Archive | None = None) -> Kernel:
    """Return the kernel that spec names, fetching it into the cache if need be.

    spec is "debian:CODENAME" (bullseye and later, sid), "host", or the path of a bzImage that has lib/modules/V beside
    it or installed. cache is the cache folder; say gets lines of progress. A Debian kernel in the cache is used without
    network; refresh asks the archive for the newest and keeps the old ones. archive stands in for apt in tests.
    Raise UsageError for a spec that is none, RequirementMissing for what this machine or the network lacks,
    ProbeError if the disk is full.
    """
    kind, rest = parse_spec(spec)
    if kind == "host":
        return _host_kernel()
    if kind == "file":
        return _file_kernel("file", Path(rest))
    home = cache / "kernels" / f"debian-{rest}"
    current = None if refresh else _current(spec, home)
    if current:
        return current
    with locked(home / "lock", say):
        current = None if refresh else _current(spec, home)  # another process may have been faster
        if current:
            return current
        return _fetch_debian(spec, rest, home, cache, say, archive)


def _fetch_debian(spec: str, suite: str, home: Path, cache: Path, say: Say, archive: debian.Archive | None) -> Kernel:
    with locked(cache / "apt" / f"{suite}.lock", say):
        source = archive or debian.PrivateApt(suite, cache / "apt" / suite, say)
        source.update()
        image = _real_image(source, suite)
        release = image.name[len("linux-image-") :]
        folder = home / f"{release}_{image.version}"
        if _load(spec, folder) is None:
            _unpack_kernel(source, image, release, folder)
    write_whole(home / "current", folder.name + "\n")
    kernel = _load(spec, folder)
    if kernel is None:
        raise ProbeError(f"cannot use {folder}: it has changed while it was written", "remove it and try again")
    return kernel


def _real_image(source: debian.Archive, suite: str) -> debian.Package:
    """Follow the metapackage to the image it stands for."""
    meta = source.show("linux-image-amd64")
    for name, version in meta.depends:
        if re.match(r"linux-image-\d", name):
            return source.show(name, version)
    raise ProbeError(f"cannot tell the kernel of Debian {suite}: linux-image-amd64 depends on no linux-image-VERSION")


def _unpack_kernel(source: debian.Archive, image: debian.Package, release: str, folder: Path) -> None:
    with under_construction(folder) as work:
        # Debian's 7.2 splits image and modules into packages that linux-image depends on; 6.12 does not yet.
        parts = [image]
        for name, version in image.depends:
            if re.match(r"linux-(modules|binary|base)-\d", name) and name.endswith(release):
                parts.append(source.show(name, version or image.version))
        holder = None
        for part in parts:
            source.unpack(part, work)
            if holder is None and _find_image(work, release):
                holder = part
        if not (work / "lib").exists() and (work / "usr" / "lib").exists():
            (work / "lib").symlink_to("usr/lib")
        _depmod(work, release)
        where = _find_image(work, release)
        if where is None or holder is None:
            raise ProbeError(f"cannot find the image of {release} in what Debian's packages hold")
        facts = {
            "release": release,
            "version": image.version,
            "image": str(where.relative_to(work)),
            "image_size": where.stat().st_size,
            "sha256": holder.sha256,
        }
        (work / "kernel.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _find_image(work: Path, release: str) -> Path | None:
    for name in (f"boot/vmlinuz-{release}", f"usr/lib/modules/{release}/vmlinuz"):
        if (work / name).exists():
            return work / name
    return None


def _depmod(root: Path, release: str) -> None:
    if (root / "lib" / "modules" / release / "modules.dep").exists():  # the package brought its index
        return
    program = shutil.which("depmod") or shutil.which("depmod", path="/usr/sbin:/sbin")
    if program is None:
        raise RequirementMissing(f"cannot index the modules of {release}: no depmod", "apt-get install kmod")
    result = subprocess.run(
        [program, "-b", str(root), release], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if result.returncode != 0 or not (root / "lib" / "modules" / release / "modules.dep").exists():
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[0]
        raise ProbeError(f"cannot index the modules of {release} with depmod: {reason}")


def _current(spec: str, home: Path) -> Kernel | None:
    try:
        name = (home / "current").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("read", home / "current", error) from error
    return _load(spec, home / name) if name and "/" not in name else None


def _load(spec: str, folder: Path) -> Kernel | None:
    """Return the kernel in a folder of the cache, or None if it is not there or not whole."""
    try:
        facts = json.loads((folder / "kernel.json").read_text(encoding="utf-8"))
        kernel = Kernel(spec, facts["release"], facts["version"], folder / facts["image"], folder, facts["sha256"])
        whole = kernel.image.stat().st_size == facts["image_size"] and (kernel.modules / "modules.dep").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kernel if whole else None


def headers(kernel: Kernel, cache: Path, say: Say, *, archive: debian.Archive | None = None) -> Path:
    """Return the build tree for modules of a kernel, for `make -C`.

    For Debian's kernels linux-headers, its common half and linux-kbuild are unpacked in the cache, nothing is
    installed; for others it is what lib/modules/RELEASE/build leads to. Raise RequirementMissing if there is none:
    Debian's archive keeps only the newest version of a suite, so an old kernel of the cache may have lost its headers.
    """
    if not kernel.name.startswith("debian:"):
        tree = kernel.modules / "build"
        if (tree / "Makefile").exists():
            return tree
        raise RequirementMissing(
            f"cannot build a module for {kernel.release}: no {tree}", f"apt-get install linux-headers-{kernel.release}"
        )
    suite = kernel.name[len("debian:") :]
    home = cache / "kernels" / f"debian-{suite}"
    folder = home / f"headers-{kernel.release}_{kernel.version}"
    tree = folder / "usr" / "src" / f"linux-headers-{kernel.release}"
    if (folder / "complete").exists():
        return tree
    with locked(home / "lock", say):
        if not (folder / "complete").exists():
            with locked(cache / "apt" / f"{suite}.lock", say):
                source = archive or debian.PrivateApt(suite, cache / "apt" / suite, say)
                _unpack_headers(source, kernel, folder)
    return tree


def _unpack_headers(source: debian.Archive, kernel: Kernel, folder: Path) -> None:
    name = f"linux-headers-{kernel.release}"
    try:
        wanted = source.show(name, kernel.version)
    except RequirementMissing:  # the index may be older than the kernel, or not there
        source.update()
        try:
            wanted = source.show(name, kernel.version)
        except RequirementMissing as error:
            raise RequirementMissing(error.message, f"fetch {kernel.name} anew, with its headers") from None
    with under_construction(folder) as work:
        parts = [wanted]
        for package, version in wanted.depends:
            if re.match(r"linux-(headers|kbuild)-\d", package):
                parts.append(source.show(package, version))
        for part in parts:
            source.unpack(part, work)
        for makefile in (work / "usr" / "src").glob("linux-headers-*/Makefile"):
            text = makefile.read_text(encoding="utf-8")
            # the absolute paths in there: "include /usr/src/linux-headers-V-common/Makefile", and in 7.2 KBUILD_OUTPUT=
            moved = re.sub(r"(?<=[ =])/usr/src/(?=linux-headers-)", f"{folder}/usr/src/", text)
            makefile.write_text(moved, encoding="utf-8")
        strangers = [program for program in _programs(work / "usr" / "lib") if not _runs(program)]
        if strangers:
            _bring_libraries(source, parts, strangers, work, folder)
        (work / "complete").touch()


def _programs(folder: Path) -> list[Path]:
    """List the ELF executables below a folder: fixdep, modpost, objtool and such."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o100:
            with open(path, "rb") as handle:
                if handle.read(4) == b"\x7fELF":
                    found.append(path)
    return found


def _runs(program: Path) -> bool:
    """Say whether the host's libraries are new enough for a program; what it does with --help does not matter."""
    try:
        result = subprocess.run(
            [str(program), "--help"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    # ld.so: "version `GLIBC_2.38' not found (required by ...)", "error while loading shared libraries: ..."
    return b"not found (required by" not in result.stderr and b"loading shared libraries" not in result.stderr


def _bring_libraries(
    source: debian.Archive, parts: list[debian.Package], programs: list[Path], work: Path, folder: Path
) -> None:
    """Unpack the libraries of the kernel's own suite beside its build programs, and run these with them.

    A newer suite's objtool needs a newer C library than the host has. An older suite's sign-file needs an older
    OpenSSL; it is brought along, but no build of a module calls it.
    """
    wanted = [name for part in parts if part.name.startswith("linux-kbuild") for name, _ in part.depends]
    seen: set[str] = set()
    libraries = work / "libraries"
    libraries.mkdir()
    while wanted:
        name = wanted.pop()
        if name in seen or not re.match(r"lib|zlib", name):
            continue
        seen.add(name)
        package = source.show(name)
        wanted += [other for other, _ in package.depends]
        source.unpack(package, libraries)
    loaders = sorted(libraries.glob("**/x86_64-linux-gnu/ld-linux-x86-64.so.2"))
    if not loaders:
        raise ProbeError("cannot find ld-linux-x86-64.so.2 in the libc6 package")
    loader = folder / loaders[0].relative_to(work)
    paths = sorted(
        {str(folder / found.parent.relative_to(work)) for found in libraries.glob("**/x86_64-linux-gnu/*.so*")}
    )
    for program in programs:
        program.rename(program.with_name(f"{program.name}.elf"))
        program.write_text(
            f'#!/bin/sh\nexec "{loader}" --argv0 "$0" --library-path "{":".join(paths)}" "$0.elf" "$@"\n',
            encoding="utf-8",
        )  # objtool and modpost look at argv[0] for the architecture
        program.chmod(0o755)


def cached(cache: Path) -> list[Kernel]:
    """List the Debian kernels that the cache holds, the current one of each suite."""
    found = (_current(f"debian:{home.name[7:]}", home) for home in sorted((cache / "kernels").glob("debian-*")))
    return [kernel for kernel in found if kernel is not None]
