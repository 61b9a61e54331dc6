# SPDX-License-Identifier: MIT
"""The record: nothing lost on the way in and out, small, valid by its own schema, and on disk whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from msgspec import UNSET

from probe import entries, store
from probe import record as rec
from probe.cpuid.dumps import read_dump
from probe.cpuid.snapshot import Leaf, Registers, Snapshot
from probe.errors import ExitCode, RecordError
from probe.masks import hex64
from probe.outcome import Observation
from tests.fakes import FakeRegister
from tests.fakes_machine import (
    DATA,
    cpuid_of,
    facts_of,
    in_guest,
    numbered,
    record_of,
    sapphire_rapids,
    small_cpu,
    threadripper,
)
from tests.unprivileged import as_nobody, readable_folder

ROOT = Path(__file__).parents[2]
FACTS = facts_of("threadripper-3970x")


def an_ordinary_record() -> rec.Record:
    return record_of({cpu: FakeRegister(value=2, valid=0x6) for cpu in (0, 1)}, threadripper(), FACTS)


def a_full_record() -> rec.Record:
    """A record with an entry of every kind in it."""
    cpus = threadripper(4)
    cpus[3] = Snapshot({leaf: found for leaf, found in cpus[3].leaves.items() if leaf != Leaf(7, 0)})
    registers = {
        0: FakeRegister(value=0x5, valid=0x87, dropped=0x80, forbidden=lambda value: value & 0x7 == 0x7),
        1: FakeRegister(absent=True),
        2: FakeRegister(offline=True),
        3: FakeRegister(value=0x1, valid=0x2F),
    }
    facts = dataclasses.replace(FACTS, online=(0, 1, 2, 3))
    record = record_of(registers, cpus, facts, clear_bits=True, pairs=True, identity="lab-7")
    record.predicted_from = rec.CpuidFile(form="cpuid -r", groups=entries.cpuid_groups(threadripper()))
    record.place = rec.Place(
        kind="guest",
        because="asked for with --in guest",
        guest=rec.Guest(
            kernel="debian",
            kernel_version="6.1.153-1",
            kernel_sha256="0" * 64,
            accelerator="tcg",
            because="no /dev/kvm",
            qemu="QEMU 7.2.19",
            register_model="valid=0x6",
        ),
    )
    return record


def a_register_that_sticks() -> rec.Record:
    registers = {0: FakeRegister(value=0x1, valid=0x2F, sticky=0x8), 1: FakeRegister(valid=0x6)}
    return record_of(registers, threadripper(), FACTS)


def a_plan() -> rec.Record:
    return record_of({}, threadripper(), FACTS, written=False)


RECORDS = {"ordinary": an_ordinary_record, "full": a_full_record, "stuck": a_register_that_sticks, "plan": a_plan}
every_record = pytest.mark.parametrize("make", RECORDS.values(), ids=RECORDS)


def document_of(record: rec.Record) -> Any:
    return json.loads(rec.encode(record))


def decoded(document: object) -> rec.Record:
    return rec.decode(json.dumps(document).encode(), "NAME")


# --- CPUID in groups ---


def mixed(cpus: int, seed: int) -> dict[int, Snapshot]:
    """CPUs of two kinds, in no order, with APIC IDs, OSXSAVE and leaves that differ."""
    draw = random.Random(seed)
    bases = [sapphire_rapids(1)[0], in_guest(sapphire_rapids(1)[0]), small_cpu(edx7=0x9C000000)]
    found = {}
    for cpu in draw.sample(range(3 * cpus), cpus):
        snapshot = numbered(draw.choice(bases), draw.randrange(1 << 31))
        leaves = dict(snapshot.leaves)
        if draw.random() < 0.3:
            one = leaves[Leaf(1, 0)]
            leaves[Leaf(1, 0)] = one._replace(ecx=one.ecx ^ 1 << 27)
        if draw.random() < 0.1:
            leaves.pop(max(leaves))
        found[cpu] = Snapshot(leaves)
    return dict(sorted(found.items()))


@pytest.mark.parametrize("seed", range(5))
def test_cpuid_comes_back_exactly_as_it_went_in(seed: int) -> None:
    cpus = mixed(200, seed)
    groups = entries.cpuid_groups(cpus)
    assert len(groups) < 20
    assert entries.cpuid_of_groups(groups) == cpus


@pytest.mark.parametrize("name", sorted(path.name for path in (DATA / "cpuid").glob("*.txt")))
def test_every_dump_comes_back(name: str) -> None:
    cpus = dict(read_dump(str(DATA / "cpuid" / name)).cpus)
    assert entries.cpuid_of_groups(entries.cpuid_groups(cpus)) == cpus


def test_apic_ids_take_one_column_not_a_group_each() -> None:
    cpus = sapphire_rapids(256)
    (group,) = entries.cpuid_groups(cpus)
    assert group.cpus == "0-255"
    assert entries.cpuid_of_groups([group]) == cpus
    assert len(group.varying) <= 3


def test_a_record_is_a_dump_of_its_machine() -> None:
    dump = entries.dump_of_record(rec.encode(an_ordinary_record()), "NAME")
    assert dump.cpus == threadripper()
    assert "spec-ctrl-probe" in dump.form


@pytest.mark.parametrize(
    "spoil",
    [
        lambda group: group.update(cpus="0-2"),
        lambda group: group["varying"][0].update(xor="1 1ffffffff"),
        lambda group: group["varying"][0]["registers"].append("00abcdef.0.eax"),
        lambda group: group.update(cpus="1-0"),
    ],
)
def test_columns_that_do_not_fit_are_an_error(spoil: Any) -> None:
    document = document_of(an_ordinary_record())
    assert document["cpuid"]["groups"][0]["varying"]
    spoil(document["cpuid"]["groups"][0])
    with pytest.raises(RecordError):
        entries.cpuid_of_groups(decoded(document).cpuid.groups)


# --- size ---


def test_a_record_of_512_cpus_stays_under_64_kib() -> None:
    cpus = sapphire_rapids(512)
    registers = {cpu: FakeRegister(value=0x1, valid=0x5FF & ~0x180) for cpu in cpus}
    raw = rec.encode(record_of(registers, cpus, facts_of("threadripper-3970x", online=range(512))))
    assert len(raw) < 64 << 10
    assert entries.cpuid_of_groups(rec.decode(raw, "x").cpuid.groups) == cpus


def test_even_if_every_second_cpu_held_something_else() -> None:
    """STIBP and SSBD are set per task: siblings often hold different values when they are read first."""
    cpus = threadripper(512)
    registers = {cpu: FakeRegister(value=(cpu & 1) << 1 | (cpu >> 3 & 1) << 2, valid=0x6) for cpu in cpus}
    raw = rec.encode(record_of(registers, cpus, facts_of("threadripper-3970x", online=range(512))))
    assert len(raw) < 64 << 10


# --- what is in it ---


@every_record
def test_it_reads_back_equal(make: Any) -> None:
    record = make()
    raw = rec.encode(record)
    assert raw.endswith(b"}\n")
    again = rec.decode(raw, "x")
    assert again == record
    assert rec.encode(again) == raw


def walk_json(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk_json(inner)


@every_record
def test_there_are_no_nulls(make: Any) -> None:
    assert all(value is not None for value in walk_json(document_of(make())))


def test_cpus_that_did_the_same_share_an_entry() -> None:
    registers = {cpu: FakeRegister(valid=0x6 if cpu == 5 else 0x7) for cpu in range(8)}
    record = record_of(registers, threadripper(8), facts_of("threadripper-3970x", online=range(8)))
    assert [entry.cpus for entry in record.observations] == ["0-4,6-7", "5"]
    assert [entry.outcomes.retained for entry in record.observations] == [hex64(0x7), hex64(0x6)]
    assert [entry.cpus for entry in record.restore] == ["0-7"]
    assert [entry.cpus for entry in record.predictions] == ["0-7"] * len(record.predictions)


def test_the_full_record_holds_every_outcome_of_its_cpus() -> None:
    record = a_full_record()
    by_cpus = {entry.cpus: entry for entry in record.observations}
    assert set(by_cpus) == {"0", "1", "2", "3"}
    first = by_cpus["0"]
    assert first.outcomes.dropped == hex64(0x80)
    assert first.cleared is not UNSET
    assert first.combined is not UNSET
    assert first.pairs_tried
    assert by_cpus["1"].absent_because == "RDMSR took #GP: no such register"
    assert by_cpus["2"].absent_because == "CPU is offline"
    assert by_cpus["3"].outcomes.retained == hex64(0x2F)
    assert {entry.kind for entry in record.findings} >= {"unexpected_fault", "unexpected_accept", "cpus_differ"}


def test_what_could_not_be_put_back_comes_first() -> None:
    record = a_register_that_sticks()
    assert [entry.state for entry in record.restore] == ["failed", "verified"]
    assert record.findings[0].kind == "not_restored"
    assert record.findings[0].mask == hex64(0x8)


def test_no_host_name_path_or_serial_number() -> None:
    text = rec.encode(an_ordinary_record()).decode()
    for secret in ("a-host-name", "SERIAL", "UUID", "root=", "BOOT_IMAGE", str(ROOT)):
        assert secret not in text


# --- the schema ---


def test_the_schema_is_json_schema_2020_12() -> None:
    schema = rec.schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert f"{rec.SCHEMA_MAJOR}.{rec.SCHEMA_MINOR}" in schema["$id"]
    assert '"null"' not in json.dumps(schema)


@every_record
def test_a_record_is_valid_by_its_schema(make: Any) -> None:
    Draft202012Validator(rec.schema()).validate(document_of(make()))


def test_no_object_takes_an_additional_property() -> None:
    validator = Draft202012Validator(rec.schema())
    document = document_of(a_full_record())
    objects = [value for value in walk_json(document) if isinstance(value, dict)]
    assert len(objects) > 40
    for value in objects:
        value["surplus"] = 1
        assert not validator.is_valid(document), f"an additional property beside {sorted(value)} is accepted"
        del value["surplus"]
    validator.validate(document)


def test_the_schema_says_additional_properties_false_wherever_it_names_properties() -> None:
    for definition in walk_json(rec.schema()):
        if isinstance(definition, dict) and "properties" in definition:
            assert definition["additionalProperties"] is False


REFUSED = {
    "mask of 65 bits": ("observations", 0, "outcomes", "retained", "0x10000000000000000"),
    "mask in upper case": ("observations", 0, "outcomes", "retained", "0x000000000000000F"),
    "mask without 0x": ("observations", 0, "outcomes", "retained", "0000000000000006"),
    "short mask": ("predictions", 0, "accepts", "0x6"),
    "mask with a line feed": ("predictions", 0, "accepts", "0x0000000000000006\n"),
    "mask as a number": ("predictions", 0, "accepts", 6),
    "outcome that is none": ("observations", 0, "combined", "outcome", "kept"),
    "base that is none": ("walk", "base", "one"),
    "CPU list that is none": ("observations", 0, "cpus", "all"),
    "empty CPU list": ("observations", 0, "cpus", ""),
    "CPU list with a line feed": ("observations", 0, "cpus", "0-1\n"),
    "null": ("judge", None),
    "time": ("started", "yesterday"),
    "revision": ("machine", "microcode", 0, "revision", "0x123456789"),
    "string for a list": ("notes", "a note"),
    "text for a number": ("duration", "0.2"),
}


def put(document: Any, path: tuple[Any, ...], value: object) -> Any:
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return document


@pytest.mark.parametrize("what", REFUSED)
def test_what_reading_refuses_the_schema_refuses(what: str) -> None:
    *path, value = REFUSED[what]
    document = put(document_of(an_ordinary_record()), tuple(path), value)
    assert not Draft202012Validator(rec.schema()).is_valid(document)
    with pytest.raises(RecordError, match="NAME is no valid record"):
        decoded(document)


@pytest.mark.parametrize(
    "path",
    [
        ("observations", 0, "cpus"),
        ("predictions", 0, "cpus"),
        ("verdicts", 0, "cpus"),
        ("saved", 0, "cpus"),
        ("restore", 0, "cpus"),
        ("walk", "cpus"),
        ("machine", "online"),
    ],
)
@pytest.mark.parametrize("cpus", ["3-1", "0-99999999", "0,9-8"])
def test_a_range_that_is_none_is_refused_wherever_it_stands(path: tuple[Any, ...], cpus: str) -> None:
    with pytest.raises(RecordError, match="NAME"):
        decoded(put(document_of(an_ordinary_record()), path, cpus))


@pytest.mark.parametrize("where", ["outcomes", "cleared"])
def test_a_bit_with_two_outcomes_is_refused(where: str) -> None:
    document = document_of(an_ordinary_record())
    document["observations"][0][where] = {"retained": hex64(0x6), "fault": hex64(0x2)}
    with pytest.raises(RecordError, match="0x0000000000000002"):
        decoded(document)


def test_masks_of_an_entry_come_back() -> None:
    seen = Observation(retained=0x1, dropped=0x2, fault=0x4, absent=1 << 63)
    masks = rec.Masks(retained=hex64(1), dropped=hex64(2), fault=hex64(4), absent=hex64(1 << 63))
    assert rec.observation_of(masks) == seen


# --- versions ---


def test_a_newer_minor_version_with_new_fields_is_read() -> None:
    document = document_of(an_ordinary_record())
    document["schema_version"] = f"{rec.SCHEMA_MAJOR}.{rec.SCHEMA_MINOR + 7}"
    for value in [one for one in walk_json(document) if isinstance(one, dict) and not set(one) & {"spectre_v2"}]:
        if not any("." in key for key in value):  # the leaves of CPUID are named, not fields
            value["new_field"] = {"of": ["a", "later", "version"]}
    assert decoded(document).observations == an_ordinary_record().observations


@pytest.mark.parametrize("version", ["0.9", "2.0", "99.1"])
def test_another_major_version_is_named(version: str) -> None:
    document = put(document_of(an_ordinary_record()), ("schema_version",), version)
    document["tool"] = "a layout that we do not know"
    with pytest.raises(RecordError, match=rf"NAME is a record of version {version}; this tool reads 1\.x") as caught:
        decoded(document)
    assert caught.value.exit_code == ExitCode.FAILED
    assert caught.value.remedy


@pytest.mark.parametrize(
    "version", ["1", "", "one.two", "1.0.0", "1.-1", "\u00b2.0", "1.\u00b2", " 1.0", "1.0\n", "9" * 5000]
)
def test_a_version_that_is_none(version: str) -> None:
    with pytest.raises(RecordError, match="NAME is no"):
        decoded(put(document_of(an_ordinary_record()), ("schema_version",), version))


def test_every_field_that_has_no_default_is_missed() -> None:
    document = document_of(an_ordinary_record())
    required = set(rec.schema()["$defs"]["Record"]["required"])
    assert {"tool", "started", "machine", "kernel", "cpuid", "predictions", "findings", "judge"} <= required
    for name in required:
        cut = {key: value for key, value in document.items() if key != name}
        with pytest.raises(RecordError, match=f"missing required field `{name}`"):
            decoded(cut)


# --- what is no record ---


def bad_bytes() -> dict[str, bytes]:
    whole = rec.encode(an_ordinary_record())
    return {
        "empty": b"",
        "blank": b" \n",
        "text": b"not JSON at all\n",
        "a list": b"[1, 2]",
        "a number": b"7",
        "an empty object": b"{}",
        "cut in the middle": whole[: len(whole) // 2],
        "cut at the last brace": whole.rstrip()[:-1],
        "two records": whole + whole,
        "binary": bytes(range(256)),
        "not UTF-8": whole.replace(b"Ryzen", b"Ry\xffen"),
        "UTF-16": whole.decode().encode("utf-16"),
        "deep nesting": b'{"schema_version": "1.0", "x": ' + b"[" * 500_000,
        "deep nesting that ends": whole.rstrip()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "NaN": whole.replace(b'"duration": 0.25', b'"duration": NaN'),
        "a number too large": whole.replace(b'"taint_before": 0', b'"taint_before": ' + b"9" * 5000),
    }


@pytest.mark.parametrize("what", bad_bytes())
def test_what_is_no_record_is_an_error_of_one_line(what: str) -> None:
    raw = bad_bytes()[what]
    with pytest.raises(RecordError) as caught:
        rec.decode(raw, "some/file.json")
    text = str(caught.value)
    assert text.startswith("some/file.json ")
    assert "\n" not in text
    assert len(text) < 400
    assert text.isprintable()


def test_reading_from_disk(tmp_path: Path) -> None:
    record = an_ordinary_record()
    path = tmp_path / "a.json"
    path.write_bytes(rec.encode(record))
    assert store.read_record(str(path)) == record


@pytest.mark.parametrize(("name", "why"), [("missing.json", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_is_none(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(RecordError, match=f"cannot read .*{why}"):
        store.read_record(str(tmp_path / name))


def test_a_file_that_may_not_be_read() -> None:
    with readable_folder() as folder:
        (folder / "a.json").write_bytes(b"{}")
        (folder / "a.json").chmod(0)

        def attempt() -> str:
            try:
                store.read_record(str(folder / "a.json"))
            except RecordError as error:
                return str(error)
            return "read"

        assert (
            as_nobody(attempt)
            == f"cannot read {folder}/a.json: Permission denied (give a record, such as results/*/*.json)"
        )


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with open(path, "wb") as file:
        file.truncate(store.LARGEST_RECORD + 1)  # a hole: no disk is used
    with pytest.raises(RecordError, match="larger than 64 MiB"):
        store.read_record(str(path))


def test_standard_input(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(rec.encode(an_ordinary_record()))
    with open(path, "rb") as file:
        assert store.read_record("-", file) == an_ordinary_record()
    path.write_bytes(b"")
    with open(path, "rb") as file, pytest.raises(RecordError, match="standard input"):
        store.read_record("-", file)


# --- onto the disk ---

RAW = b'{"a": 1}\n' * 500


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_record_is_written_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "results" / "a machine" / "x.json"
    assert store.write_atomically(RAW, path, replace=False) == path
    assert path.read_bytes() == RAW
    assert files_in(path.parent) == ["x.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    paths = [store.write_atomically(b"%d" % n, tmp_path / "x.y.json", replace=False) for n in range(3)]
    assert [path.name for path in paths] == ["x.y.json", "x.y-2.json", "x.y-3.json"]
    assert [path.read_bytes() for path in paths] == [b"0", b"1", b"2"]
    assert len(files_in(tmp_path)) == 3


def test_a_name_that_the_user_gave_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"old")
    assert store.write_atomically(RAW, path, replace=True) == path
    assert path.read_bytes() == RAW
    assert files_in(tmp_path) == ["x.json"]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    children = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(10):
                    store.write_atomically(b"%d" % number, tmp_path / "x.json", replace=False)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    written = [path.read_bytes() for path in tmp_path.iterdir()]
    assert sorted(written) == sorted(b"%d" % number for number in range(4) for _ in range(10))


@pytest.mark.parametrize("replace", [False, True])
def test_a_disk_that_takes_only_a_part_keeps_nothing(tmp_path: Path, replace: bool) -> None:
    """RLIMIT_FSIZE makes the write fail in the middle (EFBIG), as a full disk does (ENOSPC)."""
    path = tmp_path / "x.json"
    if replace:
        path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(RAW) // 2, hard))
    try:
        with pytest.raises(RecordError, match=r"cannot write the record to .*x\.json: File too large") as caught:
            store.write_atomically(RAW, path, replace=replace)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "--record" in caught.value.remedy
    assert files_in(tmp_path) == (["x.json"] if replace else [])
    assert not replace or path.read_bytes() == b"old"


_WRITE_TO = """
import sys
from pathlib import Path
from probe import store
from probe.errors import RecordError
try:
    print(store.write_atomically(b"x" * 200_000, Path(sys.argv[1]) / "x.json", replace=False))
except RecordError as error:
    print(error.message)
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.parametrize(("options", "why"), [("size=64k", "No space left on device"), ("ro", "Read-only file system")])
def test_a_file_system_that_is_full_or_read_only(tmp_path: Path, options: str, why: str) -> None:
    mount = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*own, mount, str(tmp_path), "true"], check=False).returncode:
        pytest.skip("needs unshare(1) and the right to mount a tmpfs in a namespace of its own")
    done = subprocess.run(
        [*own, mount, str(tmp_path), sys.executable, "-c", _WRITE_TO, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    said, left = done.stdout.splitlines()
    assert said == f"cannot write the record to {tmp_path}/x.json: {why}"
    assert left == "[]"


def test_a_folder_that_may_not_be_written_to() -> None:
    with readable_folder() as folder:
        folder.chmod(0o555)

        def attempt() -> str:
            try:
                store.write_atomically(RAW, folder / "x.json", replace=False)
            except RecordError as error:
                return str(error)
            return "written"

        said = as_nobody(attempt)
        folder.chmod(0o755)
        assert said == (
            f"cannot write the record to {folder}/x.json: Permission denied "
            "(give another place: --record PATH, or - for stdout)"
        )
        assert files_in(folder) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("not a folder")
    with pytest.raises(RecordError, match="cannot write the record to"):
        store.write_atomically(RAW, tmp_path / "results" / "x.json", replace=False)


def test_a_folder_in_the_place_of_the_record_stays(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(RecordError, match=r"x\.json: Is a directory"):
        store.write_atomically(RAW, tmp_path / "x.json", replace=True)
    assert files_in(tmp_path) == ["x.json"]


def test_a_device_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    """--record /dev/null, by root, must leave /dev/null what it is."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert store.write_atomically(RAW, fifo, replace=True) == fifo
        assert os.read(reader, 1 << 16) == RAW
    finally:
        os.close(reader)
    assert fifo.is_fifo()
    assert files_in(tmp_path) == ["fifo"]


# --- where it goes by itself ---


def path_of(**machine: object) -> Path:
    record = an_ordinary_record()
    for name, value in machine.items():
        setattr(record.machine, name, value)
    return store.default_path(record)


def test_on_metal() -> None:
    assert store.default_path(an_ordinary_record()) == Path(
        "results/AMD-00830f10-ucode-0x8301055-metal/2026-07-22T100000Z-6.1.0-40-amd64.json"
    )


@pytest.mark.parametrize(
    ("signature", "word"),
    [
        ("TCGTCGTCGTCG", "tcg"),
        ("KVMKVMKVM", "kvm"),
        ("Microsoft Hv", "hyperv"),
        ("VMwareVMware", "vmware"),
        ("XenVMMXenVMM", "xen"),
        ("bhyve bhyve ", "bhyve-bhyve"),
        ("", "hypervisor"),
        ("../../etc", "etc"),
        ("a/b", "a-b"),
        ("..", "hypervisor"),
        ("\x1b[31m\n", "31m"),
        ("\u00e9\u00e9", "hypervisor"),
        ("$(reboot)", "reboot"),
    ],
)
def test_under_a_hypervisor(signature: str, word: str) -> None:
    folder = path_of(under_hypervisor=True, hypervisor=signature).parent.name
    prefix = "AMD-00830f10-ucode-0x8301055-"
    assert folder.startswith(prefix)
    assert folder[len(prefix) :].strip("-") == word


def test_without_microcode_and_of_an_unknown_vendor() -> None:
    assert path_of(microcode=[], vendor="Some/Vendor ").parent.name == "Some-Vendor-00830f10-ucode-unknown-metal"


@pytest.mark.parametrize("release", ["6.1.0-40-amd64", "../../x", "a b;c", "6.1\n", ".hidden", "x" * 64])
def test_a_kernels_name_makes_one_safe_file_name(release: str) -> None:
    record = an_ordinary_record()
    record.kernel.release = release
    path = store.default_path(record)
    assert len(path.parts) == 3
    assert path.parts[0] == "results"
    assert path.name.startswith("2026-07-22T100000Z-")
    assert path.suffix == ".json"
    assert str(path).isascii()
    assert str(path).isprintable()
    assert not set(str(path)) & set(" ;$`\\'\"*?")


def test_a_snapshot_that_lies_about_its_registers_is_still_32_bits() -> None:
    cpus = {0: Snapshot({Leaf(0, 0): Registers(0xFFFFFFFF, 0, 0xFFFFFFFF, 0)})}
    assert entries.cpuid_of_groups(entries.cpuid_groups(cpus)) == cpus
    assert copy.deepcopy(cpuid_of(cpus)).cpus == cpus
