# SPDX-License-Identifier: MIT
"""Kernels to boot: what is asked for, where it comes from, and what the cache promises, without network or root."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kernel_harness.boot import debian, kernels, register_model
from kernel_harness.boot.cache import default_cache, locked, under_construction, write_whole
from kernel_harness.boot.register_model import CpuState, Register, Write
from probe.errors import ProbeError, RecordError, RequirementMissing, UsageError

RELEASE = "6.1.0-56-amd64"


def silent(line: str) -> None:
    del line


def bzimage(release: str) -> bytes:
    """The few bytes of an x86 boot header that say which kernel it is."""
    head = bytearray(0x400)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x100).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1 SMP Debian 6.1.192-2\0".encode("ascii")
    head[0x300 : 0x300 + len(text)] = text
    return bytes(head)


class FakeArchive:
    """An archive of two packages; it counts what it was asked and can break off in the middle."""

    def __init__(self, version: str = "6.1.192-2", breaks: bool = False) -> None:
        self.version = version
        self.breaks = breaks
        self.updates = 0
        self.unpacked: list[str] = []

    def update(self) -> None:
        self.updates += 1

    def show(self, package: str, version: str = "") -> debian.Package:
        assert version in ("", self.version)
        if package == "linux-image-amd64":
            depends = (("linux-base", ""), (f"linux-image-{RELEASE}", self.version))
            return debian.Package(package, self.version, "0" * 64, 1480, depends)
        return debian.Package(package, self.version, "a" * 64, 71_000_000, (("kmod", ""), ("initramfs-tools", "")))

    def unpack(self, package: debian.Package, into: Path) -> None:
        self.unpacked.append(package.name)
        (into / "boot").mkdir()
        (into / "boot" / f"vmlinuz-{RELEASE}").write_bytes(bzimage(RELEASE))
        if self.breaks:
            raise KeyboardInterrupt
        modules = into / "usr" / "lib" / "modules" / RELEASE
        modules.mkdir(parents=True)
        (modules / "modules.dep").touch()


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("debian:bookworm", ("debian", "bookworm")),
        ("debian:sid", ("debian", "sid")),
        ("host", ("host", "")),
        ("/boot/vmlinuz-6.1.0", ("file", "/boot/vmlinuz-6.1.0")),
        ("./odd:name/vmlinuz", ("file", "./odd:name/vmlinuz")),
    ],
)
def test_specifications(spec: str, parsed: tuple[str, str]) -> None:
    assert kernels.parse_spec(spec) == parsed


@pytest.mark.parametrize("spec", ["", "debian:", "debian:../etc", "debian:Book worm", "debian:buster", "fedora:42"])
def test_a_specification_that_is_none(spec: str) -> None:
    with pytest.raises(UsageError):
        kernels.parse_spec(spec)


def test_default_kernel_on_debian(tmp_path: Path) -> None:
    os_release = tmp_path / "os-release"
    os_release.write_text('# comment\nPRETTY_NAME="Debian GNU/Linux 12"\nID=debian\nVERSION_CODENAME=bookworm\n')
    assert kernels.default_spec(os_release) == "debian:bookworm"


def test_os_release_quotes() -> None:
    fields = kernels.parse_os_release("ID='ubuntu'\nNAME=\"Ubuntu\"\nbroken\n#ID=x\n")
    assert fields == {"ID": "ubuntu", "NAME": "Ubuntu"}


def test_release_is_read_from_the_image(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage("7.2.0-test"))
    assert kernels.image_release(image)[0] == "7.2.0-test"
    image.write_bytes(b"\x7fELF" + bytes(0x400))
    with pytest.raises(RequirementMissing, match="not an x86 bzImage"):
        kernels.image_release(image)
    with pytest.raises(RequirementMissing, match="No such file"):
        kernels.image_release(tmp_path / "none")


def test_a_file_and_its_modules(tmp_path: Path) -> None:
    image = tmp_path / "boot" / "vmlinuz-7.2.0-test"
    image.parent.mkdir()
    image.write_bytes(bzimage("7.2.0-test"))
    with pytest.raises(RequirementMissing, match=r"no lib/modules/7\.2\.0-test"):
        kernels.obtain(str(image), tmp_path, silent)
    (tmp_path / "lib" / "modules" / "7.2.0-test").mkdir(parents=True)
    kernel = kernels.obtain(str(image), tmp_path, silent)
    assert (kernel.name, kernel.release, kernel.root) == ("file", "7.2.0-test", tmp_path)
    assert len(kernel.sha256) == 64


def test_apt_stays_in_its_folder() -> None:
    text = debian.config_text(Path("/cache/apt/bookworm"), ['Acquire::http::Proxy "http://proxy:3128";'])
    settings = dict(line.rstrip(";").split(" ", 1) for line in text.splitlines() if line.startswith(("Dir", "APT")))
    for name, value in settings.items():
        if name.startswith("Dir::"):
            assert value.strip('"').startswith("/cache/apt/bookworm") or value in ('"/dev/null"', '""'), name
    assert 'Acquire::http::Proxy "http://proxy:3128";' in text
    assert 'Acquire::AllowInsecureRepositories "false";' in text
    assert "Post-Invoke" not in text
    with pytest.raises(ProbeError):
        debian.config_text(Path('/a"b'), [])


def test_of_the_hosts_apt_only_the_network_is_taken() -> None:
    dump = "\n".join(
        [
            'APT::Update::Post-Invoke:: "rm -f /var/cache/apt/archives/*.deb";',
            'Dir::State "var/lib/apt";',
            'Acquire::http "";',
            'Acquire::http::Proxy "http://proxy:3128";',
            'Acquire::https::CAInfo "/etc/ssl/ca.pem";',
            'Acquire::Check-Valid-Until "false";',
            'Acquire::AllowInsecureRepositories "1";',
        ]
    )
    assert debian.network_settings(dump) == [
        'Acquire::http::Proxy "http://proxy:3128";',
        'Acquire::https::CAInfo "/etc/ssl/ca.pem";',
        'Acquire::Check-Valid-Until "false";',
    ]


def test_sources_of_stable_and_sid() -> None:
    assert [line.split()[4] for line in debian.sources_text("bookworm").splitlines()] == [
        "bookworm",
        "bookworm-updates",
        "bookworm-security",
    ]
    assert [line.split()[4] for line in debian.sources_text("sid").splitlines()] == ["sid"]
    assert all("signed-by=" in line for line in debian.sources_text("trixie").splitlines())


def test_a_package_of_apt_cache() -> None:
    text = (
        "Package: linux-image-amd64\nVersion: 6.1.192-2\nSize: 1480\nSHA256: AB12\n"
        "Depends: linux-image-6.1.0-56-amd64 (= 6.1.192-2), kmod (>> 1), a:any | b\n"
        "Description: Linux\n for 64-bit PCs\n\nPackage: other\n"
    )
    package = debian.parse_package(text)
    assert package.sha256 == "ab12"
    assert package.depends == (("linux-image-6.1.0-56-amd64", "6.1.192-2"), ("kmod", ""), ("a", ""))
    with pytest.raises(ProbeError):
        debian.parse_package("Package: x\n")


def test_a_kernel_is_fetched_once(tmp_path: Path) -> None:
    archive = FakeArchive()
    first = kernels.obtain("debian:bookworm", tmp_path, silent, archive=archive)
    again = kernels.obtain("debian:bookworm", tmp_path, silent, archive=archive)
    assert first == again
    assert archive.updates == 1
    assert archive.unpacked == [f"linux-image-{RELEASE}"]
    assert (first.release, first.version, first.sha256) == (RELEASE, "6.1.192-2", "a" * 64)
    assert first.image.exists()
    assert (first.modules / "modules.dep").exists()
    assert kernels.cached(tmp_path) == [first]


def test_refresh_finds_the_newer_one_and_keeps_the_old(tmp_path: Path) -> None:
    old = kernels.obtain("debian:bookworm", tmp_path, silent, archive=FakeArchive())
    new = kernels.obtain("debian:bookworm", tmp_path, silent, refresh=True, archive=FakeArchive("6.1.193-1"))
    assert new.version == "6.1.193-1"
    assert old.image.exists()
    assert kernels.cached(tmp_path) == [new]


def test_an_interrupted_fetch_leaves_nothing_that_counts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        kernels.obtain("debian:bookworm", tmp_path, silent, archive=FakeArchive(breaks=True))
    assert kernels.cached(tmp_path) == []
    assert not list((tmp_path / "kernels" / "debian-bookworm").glob(".new-*"))
    assert kernels.obtain("debian:bookworm", tmp_path, silent, archive=FakeArchive()).image.exists()


@pytest.mark.parametrize("harm", ["image", "modules.dep", "kernel.json"])
def test_a_damaged_kernel_is_fetched_anew(tmp_path: Path, harm: str) -> None:
    kernel = kernels.obtain("debian:bookworm", tmp_path, silent, archive=FakeArchive())
    victim = {
        "image": kernel.image,
        "modules.dep": kernel.modules / "modules.dep",
        "kernel.json": kernel.root / "kernel.json",
    }[harm]
    victim.unlink()
    archive = FakeArchive()
    assert kernels.obtain("debian:bookworm", tmp_path, silent, archive=archive).image.exists()
    assert archive.unpacked


def test_two_at_once_fetch_once(tmp_path: Path) -> None:
    archive = FakeArchive()
    found: list[kernels.Kernel] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(kernels.obtain("debian:bookworm", tmp_path, silent, archive=archive))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert archive.updates == 1


def test_a_waiter_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    entered = threading.Event()

    def hear(line: str) -> None:
        said.append(line)
        entered.set()

    def wait() -> None:
        with locked(tmp_path / "lock", hear):
            pass

    with locked(tmp_path / "lock", silent):
        thread = threading.Thread(target=wait)
        thread.start()
        assert entered.wait(10)
    thread.join(10)
    assert not thread.is_alive()
    assert "waiting" in said[0]


def test_under_construction_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".new-thing-abc").mkdir()
    with under_construction(tmp_path / "thing") as work:
        (work / "file").touch()
        assert not (tmp_path / "thing").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert (tmp_path / "thing" / "file").exists()


def test_storage_errors_name_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProbeError, match="cannot write"):
        write_whole(tmp_path / "file" / "x", "text")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.delenv("PROBE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache() == Path("/xdg/spec-ctrl-probe")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache() == Path("/home/someone/.cache/spec-ctrl-probe")


def test_module_arguments() -> None:
    assert register_model.arguments() == []
    assert register_model.arguments(Register(valid=0x3, initial=0x1)) == ["valid=0x3", "initial=0x1"]
    # the list ends with the common register, which holds for all further CPUs
    assert register_model.arguments(Register(), {1: Register(valid=0x3)}) == ["valid=0x7,0x3,0x7"]
    assert register_model.arguments(None, {0: register_model.ABSENT}) == ["absent=1,0"]
    assert register_model.arguments(noise=3, delay_us=10) == ["noise=3", "noise_mask=0x1", "delay_us=10"]
    assert register_model.arguments(register_model.ACCEPTS_ALL_DROPS_ALL) == [
        "valid=0xffffffffffffffff",
        "dropped=0xffffffffffffffff",
    ]
    with pytest.raises(UsageError):
        register_model.arguments(None, {64: Register()})
    with pytest.raises(UsageError):
        register_model.arguments(Register(valid=1 << 64))


def test_module_state() -> None:
    text = (
        "cpu 0 online 1 value 0x0000000000000007 initial 0x0000000000000001 reads 3 writes 2 faults 1 "
        "cleared 0x0000000000000000 set 0x0000000000000007\n"
        "write 41 cpu 0 pid 301 value 0x0000000000000009 result -5\n"
    )
    cpus, writes = register_model.parse_state(text)
    assert cpus == [CpuState(0, True, 0x7, 0x1, 3, 2, 1, 0, 0x7)]
    assert writes == [Write(41, 0, 301, 0x9, -5)]
    for broken in ("cpu 0\n", "word\n", "write 1 cpu x\n", "cpu 0 online 1 colour 3\n"):
        with pytest.raises(RecordError):
            register_model.parse_state(broken)
