# SPDX-License-Identifier: MIT
"""The command line: what is printed where, exit codes, and that a bad request costs one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from jsonschema import Draft202012Validator

import probe.run  # noqa: F401  # as_nobody() may not be able to read the sources any more
from probe import __version__, cli
from probe import record as rec
from probe.arguments import make_parser
from probe.cli import exit_code, main, without_paths
from probe.cpuid.dumps import format_raw
from probe.cpuid.machine import read_machine
from probe.cpuid.snapshot import Leaf, Snapshot
from probe.errors import ExitCode, ProbeError
from probe.host import Host, Modules
from probe.masks import hex64
from probe.models import machines, registry
from probe.models.machine import Machine
from probe.models.prediction import Model
from tests.fakes import FakeRegister
from tests.fakes_machine import DATA, facts_of, in_guest, record_of, sapphire_rapids, threadripper
from tests.unprivileged import as_nobody

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "probe"]
DUMP = str(DATA / "cpuid" / "threadripper-3970x.cpuid-r.txt")


def metal_record(**register: object) -> rec.Record:
    registers = {cpu: FakeRegister(**{"value": 2, "valid": 0x6, **register}) for cpu in (0, 1)}  # type: ignore[arg-type]
    return record_of(registers, threadripper(), facts_of("threadripper-3970x"))


def guest_record() -> rec.Record:
    registers = {cpu: FakeRegister(valid=0x4) for cpu in (0, 1)}
    return record_of(registers, {cpu: in_guest(one) for cpu, one in threadripper().items()}, facts_of("kvm-guest"))


@pytest.fixture
def record_file(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    path.write_bytes(rec.encode(guest_record()))
    return path


def spawn(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, **options}
    return subprocess.run([*COMMAND, *arguments], check=False, **options)  # type: ignore[call-overload, no-any-return]


Captured = pytest.CaptureFixture[str]


def fails(arguments: Sequence[str], code: ExitCode, capsys: Captured) -> str:
    """Run a command that must fail with one line on stderr and nothing on stdout; return the line."""
    try:
        got = main(arguments)
    except SystemExit as error:  # argparse
        got = int(error.code or 0)
    out, err = capsys.readouterr()
    assert (got, out) == (code, "")
    assert err.startswith("spec-ctrl-probe")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


# --- requests that make no sense ---


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["probe"], "'probe'"),
        (["run", "--colour"], "--colour"),
        (["run", "--in", "moon"], "'moon'"),
        (["run", "--base", "one"], "'one'"),
        (["run", "--repeat", "0"], "'0'"),
        (["run", "--repeat", "many"], "'many'"),
        (["run", "--repeat", "\u00b2"], "number from 1 to 1000"),
        (["predict", "a", "b"], "b"),
        (["show"], "RECORD"),
        (["schema", "x"], "x"),
    ],
)
def test_usage(arguments: list[str], word: str, capsys: Captured) -> None:
    assert word in fails(arguments, ExitCode.USAGE, capsys)


@pytest.mark.parametrize("option", ["--cpus", "--bits"])
@pytest.mark.parametrize("value", ["", "x", "3-1", "1-", "-1", "0,,1", "1.5", "0x3", "0-99999999999", "\u0661"])
def test_a_list_that_is_none(option: str, value: str, capsys: Captured) -> None:
    said = fails(["run", f"{option}={value}"], ExitCode.USAGE, capsys)
    assert f"argument {option}" in said
    assert "want" in said


def test_bits_end_at_63(capsys: Captured) -> None:
    assert "64 is too large" in fails(["run", "--bits", "0-64"], ExitCode.USAGE, capsys)
    assert make_parser().parse_args(["run", "--bits", "63,0-2"]).bits == (0, 1, 2, 63)
    assert make_parser().parse_args(["run"]).bits == tuple(range(64))


def test_lists_that_are(capsys: Captured) -> None:
    parsed = make_parser().parse_args(["run", "--cpus", "8,0-3", "--repeat", "1000"])
    assert (parsed.cpus, parsed.repeat) == ((0, 1, 2, 3, 8), 1000)


def test_an_unknown_model_is_answered_with_the_list(capsys: Captured) -> None:
    for command in (["predict", DUMP], ["run", "--in", "metal"]):
        said = fails([*command, "--model", "kvm-99"], ExitCode.USAGE, capsys)
        assert all(name in said for name in ("'kvm-99'", *registry.names()))


def test_options_of_a_guest_are_none_of_metal(capsys: Captured) -> None:
    said = fails(["run", "--in", "metal", "--model-register", "valid=0x6"], ExitCode.USAGE, capsys)
    assert "--model-register is for guests" in said


# --- bad files ---


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "No such file or directory"),
        (b"", "empty"),
        (bytes(range(256)), "binary"),
        (b"processor\t: 0\nvendor_id\t: GenuineIntel\n", "/proc/cpuinfo"),
        (Path(DUMP).read_bytes()[:3000], "cut"),
        (b"{}", "schema_version"),
    ],
)
@pytest.mark.parametrize("command", [["predict"], ["run", "--in", "metal", "--cpuid"]])
def test_a_dump_that_is_none(
    command: list[str], content: bytes | None, word: str, tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "dump.txt"
    if content is not None:
        path.write_bytes(content)
    code, said = main([*command, str(path)]), capsys.readouterr()
    assert (code, said.out) == (ExitCode.FAILED, "")
    last = said.err.splitlines()[-1]
    assert word in last
    assert "dump.txt" in last
    assert last.startswith("spec-ctrl-probe: ")


def bad_records() -> dict[str, tuple[bytes | None, str]]:
    whole = rec.encode(guest_record())
    return {
        "missing": (None, "No such file or directory"),
        "empty": (b"", "cut"),
        "cut": (whole[:5000], "cut"),
        "not JSON": (b"hello\n", "never a JSON file"),
        "a newer major version": (re.sub(rb"(?<=schema_version\": \")1", b"7", whole, count=1), "this tool reads 1.x"),
        "a field is missing": (whole.replace(b'"judge"', b'"judged"', 1), "`judge`"),
        "a mask of 65 bits": (whole.replace(b'"0x0000000000000004"', b'"0x10000000000000004"', 1), "matching regex"),
        "a dump": (Path(DUMP).read_bytes(), "never a JSON file"),
    }


@pytest.mark.parametrize("what", bad_records())
def test_a_record_that_is_none(what: str, tmp_path: Path, capsys: Captured) -> None:
    content, word = bad_records()[what]
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    said = fails(["show", str(path)], ExitCode.FAILED, capsys)
    assert word in said
    assert "record.json" in said


KVM = next(Path("results/debian-kernels-nested/zen2-client").glob("*-kvm-7.2*.json"))


def of_a_newer_minor(folder: Path, where: str) -> str:
    """A record of KVM with the name of a CPUID bit that this version does not know, in a row or in the host's own."""
    document = json.loads(KVM.read_bytes())
    document["schema_version"] = "1.9"
    if where == "row":
        document["rows"][0]["profiles"].append("AMD_STIBP,NEW_BIT")
    else:
        document["hardware"][where] += ",NEW_BIT"
    path = folder / "newer.json"
    path.write_text(json.dumps(document))
    return str(path)


@pytest.mark.parametrize("where", ["row", "host_cpuid", "supported_cpuid"])
@pytest.mark.parametrize(
    "command",
    [
        ["html"],
        ["diff", str(KVM)],
        ["export", "--format", "ktap"],
        ["export", "--format", "csv"],
        ["migrate", str(KVM)],
    ],
    ids=lambda command: command[0],
)
def test_a_cpuid_bit_that_is_not_known_is_said_with_the_file(
    command: list[str], where: str, tmp_path: Path, capsys: Captured
) -> None:
    said = fails([*command, of_a_newer_minor(tmp_path, where)], ExitCode.FAILED, capsys)
    assert "newer.json names CPUID bits that this version does not know: 'NEW_BIT'" in said
    assert "zen2-client-2020" not in said, "no list of all profiles"


def test_such_a_record_is_shown_and_left_out_of_a_folder(tmp_path: Path, capsys: Captured) -> None:
    path = of_a_newer_minor(tmp_path, "row")
    assert main(["show", path]) == main(["show", path, "--format", "mail"]) == ExitCode.AS_PREDICTED
    (tmp_path / "known.json").write_bytes(KVM.read_bytes())
    capsys.readouterr()
    assert main(["diff", str(tmp_path), str(KVM)]) == ExitCode.FAILED, (
        "what was compared is the same, and a file is not"
    )
    assert re.search(r"^left out: .*newer\.json names CPUID bits", capsys.readouterr().err)


def test_a_record_in_a_folders_place(tmp_path: Path, capsys: Captured) -> None:
    assert "Is a directory" in fails(["show", str(tmp_path)], ExitCode.FAILED, capsys)


# --- help, version, models, schema ---


def test_help_names_every_command_and_exit_code(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in (
        "run",
        "predict",
        "doctor",
        "restore",
        "show",
        "models",
        "schema",
        *(str(int(one)) for one in ExitCode),
    ):
        assert word in out


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"spec-ctrl-probe {__version__}\n"


def test_models_are_listed_with_their_sources(capsys: Captured) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    catalogue: list[Model | Machine] = [*registry.MODELS, *machines.MACHINES]
    for model in catalogue:
        assert f"\n  {model.name} " in "\n" + out
        assert model.title in " ".join(out.split())
        assert model.source.split()[0] in out


def test_the_schema_is_one(capsys: Captured) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(rec.encode(guest_record())))


# --- predict ---


def test_predict_a_dump(capsys: Captured) -> None:
    assert main(["predict", DUMP]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "model vendor" in out
    assert "model kvm-5.6" not in out
    assert hex64(0x6) in out


def test_predict_several_models(capsys: Captured) -> None:
    main(["predict", DUMP, "--model", "kvm-5.6", "--model", "vendor"])
    out = capsys.readouterr().out
    assert out.index("model kvm-5.6") < out.index("model vendor")
    main(["predict", DUMP, "--model", "all"])
    out = capsys.readouterr().out
    assert all(f"model {name}" in out for name in registry.names())


@pytest.fixture
def mixed_dump(tmp_path: Path) -> str:
    cpus = threadripper(4)
    leaves = dict(cpus[2].leaves)
    leaves[Leaf(0x80000008, 0)] = leaves[Leaf(0x80000008, 0)]._replace(ebx=0)
    path = tmp_path / "mixed.txt"
    path.write_text(format_raw({**cpus, 2: Snapshot(leaves)}))
    return str(path)


def test_predict_groups_cpus_that_are_alike(mixed_dump: str, capsys: Captured) -> None:
    main(["predict", mixed_dump])
    out = capsys.readouterr().out
    assert "3 CPUs: 0-1,3" in " ".join(out.split())
    assert "1 CPU: 2" in " ".join(out.split())
    assert "no such register" in out


def test_predict_json(mixed_dump: str, capsys: Captured) -> None:
    main(["predict", mixed_dump, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"form", "groups"}
    assert [group["cpus"] for group in document["groups"]] == ["0-1,3", "2"]
    for group in document["groups"]:
        assert set(group) == {"cpus", "vendor", "signature", "hypervisor", "models"}
        assert tuple(group["models"]) == registry.names()
        for masks in group["models"].values():
            assert set(masks) == {"exists", "accepts", "faults", "either", "reasons"}
            assert sum(int(masks[word], 16) for word in ("accepts", "faults", "either")) == (1 << 64) - 1
            assert all(set(one) == {"mask", "effect", "because", "source"} for one in masks["reasons"])
    first, second = (group["models"]["vendor"] for group in document["groups"])
    assert (first["accepts"], first["exists"]) == (hex64(0x6), True)
    assert (second["accepts"], second["exists"]) == (hex64(0x0), False)


def test_predict_json_of_one_model(capsys: Captured) -> None:
    main(["predict", DUMP, "--json", "--model", "vendor"])
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert list(group["models"]) == ["vendor"]


def test_predict_from_a_record_and_from_standard_input(record_file: Path, capsys: Captured) -> None:
    main(["predict", str(record_file)])
    of_record = capsys.readouterr().out
    assert "under hypervisor KVMKVMKVM" in of_record
    with open(record_file, "rb") as file:
        assert spawn("predict", "-", stdin=file).stdout.decode() == of_record
    with open(DUMP, "rb") as file:
        done = spawn("predict", "-", "--json", stdin=file)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["form"] == "cpuid -r"


def machine_readable() -> bool:
    try:
        read_machine((0,))
    except ProbeError:
        return False
    return True


needs_cpuid = pytest.mark.skipif(not machine_readable(), reason="CPUID of CPU 0 of this machine cannot be read")


@needs_cpuid
def test_predict_this_machine(capsys: Captured) -> None:
    assert main(["predict", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"]


@needs_cpuid
def test_doctor(capsys: Captured) -> None:
    code = main(["doctor"])
    out, err = capsys.readouterr()
    assert err == ""
    assert "ready for: " in out.splitlines()[-1]
    assert code == (ExitCode.REQUIREMENT_MISSING if out.endswith("nothing\n") else ExitCode.AS_PREDICTED)
    assert all(len(line) <= 100 for line in out.splitlines() if "->" not in line)
    assert main(["doctor", "--json"]) == code
    for check in json.loads(capsys.readouterr().out):
        assert set(check) == {"name", "state", "text", "needs", "remedy"}


# --- show ---


def test_show(record_file: Path, capsys: Captured) -> None:
    assert main(["show", str(record_file)]) == 0, "showing findings is no failure"
    out, err = capsys.readouterr()
    assert err == ""
    assert "unexpected_fault" in out
    with open(record_file, "rb") as file:
        done = spawn("show", "-", stdin=file)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, out, b"")


def test_show_of_empty_input() -> None:
    done = spawn("show", "-")
    assert (done.returncode, done.stdout) == (ExitCode.FAILED, b"")
    assert done.stderr.startswith(b"spec-ctrl-probe: standard input cannot be read")
    assert done.stderr.count(b"\n") == 1


def test_a_terminal_that_cannot_show_a_name_shows_the_rest(tmp_path: Path) -> None:
    record = guest_record()
    record.identity = "pr\u00fcfstand \u2603"
    path = tmp_path / "record.json"
    path.write_bytes(rec.encode(record))
    done = spawn("show", str(path), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"called pr?fstand ?" in done.stdout


# --- a reader that goes away ---


def with_reader_gone(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        return spawn(*arguments, capture_output=False, stdout=write_end, stderr=subprocess.PIPE)
    finally:
        os.close(write_end)


@pytest.mark.parametrize(
    "arguments",
    [["models"], ["schema"], ["predict", DUMP], ["predict", DUMP, "--json"], ["show", "{record}"], ["--help"]],
)
def test_a_pipe_whose_reader_has_gone_is_no_error(arguments: list[str], record_file: Path) -> None:
    done = with_reader_gone(*(word.format(record=record_file) for word in arguments))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("mail", [[], ["--format", "mail"]])
def test_a_diff_is_no_other_when_its_reader_has_gone(mail: list[str], tmp_path: Path) -> None:
    """Of a short report, which is flushed at the end, and of one that is longer than what is held back."""
    release = "results/debian-kernels-nested/zen2-client/2026-11-25T17{}.json"
    old, new = (
        str(ROOT / release.format(name)) for name in ("0958Z-kvm-6.1.0-56-amd64", "3852Z-kvm-7.2.13+deb14-amd64")
    )
    for number, (before, after, code) in enumerate([(old, new, 1), (old, old, 0)]):
        done = with_reader_gone("diff", before, after, *mail)
        assert (done.returncode, done.stderr) == (code, b""), number
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    for number in range(400):
        (tmp_path / "before" / f"a-machine-of-our-own-{number}.json").symlink_to(old)
    (tmp_path / "after" / "another-machine-1.json").symlink_to(new)
    done = with_reader_gone("diff", str(tmp_path / "before"), str(tmp_path / "after"), *mail)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", [["models"], ["predict", DUMP, "--json", "--model", "all"]])
def test_a_disk_that_is_full_on_standard_output_is_one_line(arguments: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "wb") as full:
        done = spawn(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == ExitCode.FAILED
    assert b"No space left on device" in done.stderr
    assert done.stderr.count(b"\n") == 1


_DELIVER = """
import sys
from probe import cli, record
with open(sys.argv[1], "rb") as file:
    found = record.decode(file.read(), "x")
cli._HANDLERS["run"] = lambda arguments: cli._deliver(found, arguments)
sys.argv = ["spec-ctrl-probe", "run", "--record", sys.stdin.readline().strip()]
cli.entry()
"""


def deliver(record: rec.Record, target: str, folder: Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Deliver the record of a run as `run --record target` does, in a process of its own."""
    path = folder / "given.json"
    path.write_bytes(rec.encode(record))
    options = {"capture_output": True, **options}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", _DELIVER, str(path)], cwd=ROOT, input=target.encode() + b"\n", check=False, **options
    )


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (metal_record, ExitCode.AS_PREDICTED),
        (guest_record, ExitCode.FINDINGS),
        (lambda: metal_record(sticky=0x4), ExitCode.NOT_RESTORED),
    ],
)
def test_what_a_run_found_stays_its_exit_code_when_the_reader_has_gone(
    make: Callable[[], rec.Record], code: ExitCode, tmp_path: Path
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = deliver(make(), "-", tmp_path, capture_output=False, stdout=write_end, stderr=subprocess.PIPE)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (code, b"")


def test_a_record_that_cannot_be_written_loses_no_report(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = deliver(guest_record(), str(tmp_path / "file" / "x.json"), tmp_path)
    assert done.returncode == ExitCode.FAILED
    assert b"unexpected_fault" in done.stdout
    assert done.stdout.endswith(b"\n")
    assert done.stderr.startswith(b"spec-ctrl-probe: cannot write the record to ")
    assert done.stderr.count(b"\n") == 1


def test_a_disk_that_is_full_loses_no_report(tmp_path: Path) -> None:
    small = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n" + _DELIVER
    path = tmp_path / "given.json"
    path.write_bytes(rec.encode(guest_record()))
    target = tmp_path / "out" / "x.json"
    done = subprocess.run(
        [sys.executable, "-B", "-c", small, str(path)],
        cwd=ROOT,
        input=f"{target}\n".encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == ExitCode.FAILED, done.stderr
    assert b"unexpected_fault" in done.stdout
    assert b"File too large" in done.stderr
    assert list(target.parent.iterdir()) == []


def test_a_register_that_is_not_put_back_matters_more_than_a_record_that_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = deliver(metal_record(sticky=0x4), str(tmp_path / "file" / "x.json"), tmp_path)
    assert done.returncode == ExitCode.NOT_RESTORED
    assert b"NOT PUT BACK" in done.stdout
    assert b"cannot write the record to " in done.stderr


def test_where_the_record_went_is_said_on_stderr(tmp_path: Path) -> None:
    done = deliver(guest_record(), str(tmp_path / "x.json"), tmp_path)
    assert done.returncode == ExitCode.FINDINGS
    assert done.stderr.decode() == f"record: {tmp_path}/x.json\n"
    assert (tmp_path / "x.json").read_bytes() == rec.encode(guest_record())
    alone = deliver(guest_record(), "-", tmp_path)
    assert (alone.stdout, alone.stderr) == (rec.encode(guest_record()), b"")


# --- interrupted ---


def test_an_interrupt_is_130_and_one_line() -> None:
    child = subprocess.Popen(
        [*COMMAND, "show", "-"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stderr is not None
    child.stdin.write(b" " * (1 << 20))  # more than a pipe holds: the child is reading when this is through
    child.stdin.flush()
    asleep = 0
    while asleep < 5:  # and now it waits for more
        time.sleep(0.02)
        state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
    child.send_signal(signal.SIGINT)
    said = child.stderr.read()
    assert child.wait(30) == ExitCode.INTERRUPTED
    assert said == b"spec-ctrl-probe: interrupted\n"
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    assert child.stdout is not None
    child.stdout.close()
    child.stderr.close()


# --- not root ---


def unprivileged(*arguments: str) -> str:
    def act() -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        return f"{code}\n{out.getvalue()}{err.getvalue()}"

    return as_nobody(act)


def test_writing_needs_root() -> None:
    code, *said = unprivileged("run", "--in", "metal", "--write").splitlines()
    assert code == str(int(ExitCode.REQUIREMENT_MISSING))
    assert said[0] == "place: metal (asked for with --in metal)"
    assert said[1].startswith("spec-ctrl-probe: not root: the msr driver needs CAP_SYS_RAWIO (run it as root: ")
    assert said[1].endswith(" run --in metal --write)"), "the command as it was given"
    assert len(said) == 2


def test_restore_needs_root() -> None:
    code, *said = unprivileged("restore").splitlines()
    assert code == str(int(ExitCode.REQUIREMENT_MISSING))
    assert len(said) == 1
    assert said[0].endswith(" restore)")


@pytest.mark.skipif(os.geteuid() != 0, reason="restore needs root")
def test_restore_of_a_folder_that_is_not_there_is_no_all_clear(tmp_path: Path, capsys: Captured) -> None:
    assert "no folder" in fails(["restore", "--state-dir", str(tmp_path / "typo")], ExitCode.USAGE, capsys)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(("target", "why"), [("", "it is a folder"), ("no/such/x.json", "no folder")])
def test_a_record_that_could_not_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, target: str, why: str, capsys: Captured
) -> None:
    said = fails(["run", "--in", "guest", "--record", str(tmp_path / target)], ExitCode.USAGE, capsys)
    assert why in said
    assert "booting" not in said


def test_a_guest_needs_no_consent(capsys: Captured) -> None:
    assert "drop --write" in fails(["run", "--in", "guest", "--write"], ExitCode.USAGE, capsys)
    assert "drop --write" in fails(["run", "--model-register", "valid=1", "--write"], ExitCode.USAGE, capsys)


@pytest.mark.skipif(bool(Host().msr_cpus()) or Modules.available("msr"), reason="this machine has an msr driver")
def test_write_without_a_driver_does_not_turn_into_a_guest(capsys: Captured) -> None:
    assert "no msr driver" in fails(["run", "--write"], ExitCode.REQUIREMENT_MISSING, capsys)


def test_a_closed_standard_output_is_no_traceback() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m probe models >&-"], cwd=ROOT, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_on_a_full_disk_is_no_success() -> None:
    with open("/dev/full", "wb") as full:
        done = spawn("--help", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == ExitCode.FAILED
    assert b"cannot write standard output: No space left on device" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="restore needs root")
def test_restore_without_a_journal(tmp_path: Path, capsys: Captured) -> None:
    assert main(["restore", "--state-dir", str(tmp_path)]) == 0
    assert "no journal" in capsys.readouterr().out


# --- what a record tells of its command line ---


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["run", "--write", "--cpus", "0-3"], ["run", "--write", "--cpus", "0-3"]),
        (["run", "--record", "/home/a-user/x.json"], ["run", "--record", "PATH"]),
        (["run", "--record=/home/a-user/x.json"], ["run", "--record=PATH"]),
        (["run", "--record", "-"], ["run", "--record", "-"]),
        (["run", "--cpuid", "../a-host/dump.txt"], ["run", "--cpuid", "PATH"]),
        (["run", "--state-dir", "/srv/a-user/"], ["run", "--state-dir", "PATH"]),
        (["run", "--state-dir", "/"], ["run", "--state-dir", "PATH"]),
        (["run", "--kernel", "/boot/vmlinuz-6.1"], ["run", "--kernel", "PATH"]),
        (["run", "--kernel", "debian:trixie"], ["run", "--kernel", "debian:trixie"]),
        (["run", "--record"], ["run", "--record"]),
        ([], []),
    ],
)
def test_without_paths(given: list[str], told: list[str]) -> None:
    assert without_paths(given) == told


@pytest.mark.parametrize("short", ["--rec", "--recor=/home/a-user/x", "--cpui", "--state", "--kern"])
def test_no_option_can_be_shortened_past_that(short: str, capsys: Captured) -> None:
    """--rec would be argparse's idea of --record, and its path would stand in the record."""
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["run", *([short] if "=" in short else [short, "x"])])
    assert caught.value.code == ExitCode.USAGE


def test_every_option_that_takes_a_path_is_known() -> None:
    from probe.cli import _PATH_OPTIONS

    known = set()
    for words in (["run"], ["boot", "--kernel", "x"], ["kvm", "explore", "--model", "x"]):
        known |= set(vars(make_parser().parse_args(words)))
    for option in _PATH_OPTIONS:
        assert option[2:].replace("-", "_") in known, f"{option} has gone"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["boot", "--kernels", "debian:sid,/home/a-user/bzImage,host"], ["boot", "--kernels", "debian:sid,PATH,host"]),
        (["kvm", "--record", "/home/a-user/x"], ["kvm", "--record", "PATH"]),
    ],
)
def test_paths_of_the_other_commands(given: list[str], told: list[str]) -> None:
    assert without_paths(given) == told


def test_models_diff(capsys: Captured) -> None:
    assert main(["models", "diff", "kvm-5.6-svm", "kvm-maxim-v1-svm"]) == ExitCode.FINDINGS
    out = capsys.readouterr().out
    assert "profile SPEC_CTRL\nguest-wr 0x48 0x2\nkvm-5.6-svm         ok\nkvm-maxim-v1-svm    gp\n" in out
    assert "6441fa6178f5" in out
    assert main(["models", "diff", "bhyve", "qemu-tcg"]) == ExitCode.AS_PREDICTED
    assert "no difference" in capsys.readouterr().out
    assert "no state machine is called 'x'" in fails(["models", "diff", "x", "xen"], ExitCode.USAGE, capsys)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["kvm", "--profile", "nope"], "no profile or CPUID bit is called 'nope'"),
        (["kvm", "--profile", "empty", "--all-profiles"], "contradict"),
        (["kvm", "replay", "/nonexistent"], "cannot read /nonexistent"),
        (["kvm", "explore", "--model", "xen", "--seconds", "-1"], "not a number of seconds"),
        (["run", "--in", "kvm", "--bits", "3"], "--bits does not go with --in kvm"),
        (["boot", "--kernel", "debian:bookworm", "--", "run"], "cannot run 'run' in the guests"),
        (["boot", "--kernel", "debian:bookworm", "--record-dir", "/nonexistent"], "no folder /nonexistent"),
        (["boot", "--kernel", "debian:bookworm", "--", "kvm", "--profile", "nope"], "'nope'"),
    ],
)
def test_usage_of_kvm_and_boot(arguments: list[str], why: str, capsys: Captured) -> None:
    assert why in fails(arguments, ExitCode.USAGE, capsys)


def test_a_program_from_standard_input_that_is_none() -> None:
    done = spawn("kvm", "replay", "-")
    assert done.returncode == ExitCode.USAGE
    assert b"begins with its guest's CPUID" in done.stderr


def test_the_schema_of_the_other_record(capsys: Captured) -> None:
    assert main(["schema", "kvm"]) == 0
    Draft202012Validator.check_schema(json.loads(capsys.readouterr().out))


# --- exit codes ---


def test_exit_codes_of_records() -> None:
    refused = metal_record(refuses=True)
    stuck = metal_record(sticky=0x4)
    plan = record_of({}, threadripper(), facts_of("threadripper-3970x"), written=False)
    assert exit_code(metal_record()) == 0
    assert exit_code(guest_record()) == 1
    assert exit_code(refused) == 4
    assert stuck.findings
    assert exit_code(stuck) == 5
    assert exit_code(plan) == 0
    absent = record_of(
        {0: FakeRegister(absent=True)},
        {0: Snapshot({leaf: found for leaf, found in threadripper()[0].leaves.items() if leaf.leaf != 0x80000008})},
        facts_of("threadripper-3970x", online=(0,)),
    )
    assert exit_code(absent) == 0, "a register that is not there, as predicted, was measured"


# --- speed ---


def best_processor_time(arguments: list[str], tries: int = 5) -> float:
    """Return the least processor time in seconds; the clock on the wall measures the neighbours on a busy machine."""
    best = float("inf")
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
    for _ in range(tries):
        pid = os.posix_spawn(sys.executable, [*COMMAND, *arguments], os.environ, file_actions=null)
        _, status, usage = os.wait4(pid, 0)
        assert status == 0
        best = min(best, usage.ru_utime + usage.ru_stime)
    return best


def test_help_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert best_processor_time(["--help"]) < 0.150


def test_predict_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert best_processor_time(["predict", DUMP]) < 0.300


def test_predict_of_a_large_dump_is_not_slower_per_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "512.txt"
    path.write_text(format_raw(sapphire_rapids(512)))
    monkeypatch.chdir(ROOT)
    assert best_processor_time(["predict", str(path)], tries=2) < 3.0


def test_an_interrupt_while_the_arguments_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_parser", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "spec-ctrl-probe: interrupted\n"
