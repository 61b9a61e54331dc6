# SPDX-License-Identifier: MIT
"""The definitions for LAVA, tmt and labgrid, each with the field's own tools as far as these can be had here.

tmt and labgrid run for real, over ssh, on hosts with the real agent. Of LAVA, the definition and the job are checked
with its schema (from Debian's lava-common), and the steps run in a shell as its dispatcher writes it; no LAVA runs.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kernel_harness.boot.cache import default_cache
from kernel_harness.lab import nights
from kernel_harness.lab.agent_file import build
from tests.live.lab_hosts import Lab, lab

pytestmark = pytest.mark.lab
RECIPES = Path(__file__).resolve().parents[2] / "kernel_harness/lab/recipes"
BIN = Path(sys.executable).parent
SLOW = "--repeat 1000"  # some 20 s
FINDINGS, NO_REGISTER, HANGS = "lab1", "lab2", "lab3"


def lacking(why: str) -> NoReturn:
    """Skip, or fail where this tier is required."""
    if "lab" in os.environ.get("PROBE_REQUIRE", "").split(","):
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


def tool(name: str) -> str:
    """Return the path of a tool of the extra."""
    if not (BIN / name).exists():
        lacking(f"no {name} (pip install 'spec-ctrl-probe[recipes]')")
    return str(BIN / name)


def yaml() -> Any:
    try:
        import yaml
    except ImportError:
        lacking("no yaml (pip install 'spec-ctrl-probe[recipes]')")
    return yaml


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("agent") / "spec-ctrl-probe.pyz", print).path


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts: one with the register, one without, one that the test lets hang."""
    more = {NO_REGISTER: "rm -r /dev/cpu/0 /dev/cpu/1"}
    with lab(tmp_path_factory.mktemp("recipes"), 3) as made:
        for name in made.names:
            with open(made.folder / name / "sshd_config", "a") as file:
                file.write("Subsystem sftp internal-sftp\n")
            # tmt puts its own scripts there
            made.boot(name, f"mount -t tmpfs t /usr/local/bin\n{more.get(name, '')}")
        made.wait_for(made.names)
        yield made


def address(name: str) -> str:
    return f"192.0.2.{name.removeprefix('lab')}"


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def stub(folder: Path, code: int) -> Path:
    """Write an agent that ends with an exit code, after it said what the real one would, more or less."""
    lines = [{"event": "start", "version": "0", "agent": ""}, {"event": "intent", "step": "bit 3", "mask": "0x8"}]
    text = "".join(f"print({json.dumps(line)!r})\n" for line in lines)
    return write(
        folder / "spec-ctrl-probe.pyz", f"import sys\n{text}print('some words', file=sys.stderr)\nsys.exit({code})\n"
    )


# --- LAVA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lava_common() -> Path:
    """Return the folder with the Python package lava_common: PyPI has none, Debian has."""
    folder = default_cache() / "lava-common"
    found = folder / "usr/lib/python3/dist-packages"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for command in (["apt-get", "download", "-q", "lava-common"], ["sh", "-c", "dpkg -x lava-common_*.deb ."]):
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            except FileNotFoundError as error:
                lacking(f"LAVA's schema cannot be had: {error}")
            if done.returncode:
                lacking(f"LAVA's schema cannot be had: {' '.join(command)}: {done.stderr.strip()[-200:]}")
    return found


def validate(lava_common: Path, what: str, data: object, **more: object) -> subprocess.CompletedProcess[str]:
    """Let LAVA's own schema judge a definition or a job; more are arguments of its validate()."""
    if not importlib.util.find_spec("voluptuous"):
        lacking("no voluptuous (pip install 'spec-ctrl-probe[recipes]')")
    code = f"import json, sys; from lava_common.schemas{what} import validate; validate(json.load(sys.stdin), **"
    code += "json.loads(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(more)],
        input=json.dumps(data),
        env={**os.environ, "PYTHONPATH": str(lava_common)},
        capture_output=True,
        text=True,
        check=False,
    )


def definition() -> Any:
    return yaml().safe_load((RECIPES / "lava/spec-ctrl-probe.yaml").read_text(encoding="utf-8"))


def run_script(folder: Path, **params: str) -> Path:
    """Write the shell script that LAVA's dispatcher makes of the definition (2023.01: TestRunnerAction)."""
    found = definition()
    lines = [f"{name}='{value or ''}'" for name, value in {**found["params"], **params}.items()]
    return write(folder / "run.sh", "\n".join([*lines, "set -e", "set -x", *found["run"]["steps"]]) + "\n")


def lava_commands(folder: Path) -> Path:
    """Write commands that LAVA has on the device; they append their arguments to folder/calls."""
    (folder / "bin").mkdir()
    for name in ("lava-test-case", "lava-test-reference"):
        write(folder / "bin" / name, f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n', 0o755)
    return folder / "bin"


def run_steps(folder: Path, **params: str) -> tuple[list[str], str]:
    """Run the definition's steps; return the calls of LAVA's commands, and stdout."""
    env = {**os.environ, "PATH": f"{lava_commands(folder)}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    script = run_script(folder, **params)
    done = subprocess.run(["sh", script], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "calls").read_text().splitlines(), done.stdout


def test_lava_takes_the_definition_and_the_job(lava_common: Path) -> None:
    job = yaml().safe_load((RECIPES / "lava/job.yaml").read_text(encoding="utf-8"))
    for what, data in ((".test.testdef", definition()), ("", job)):
        done = validate(lava_common, what, data)
        assert done.returncode == 0, done.stderr[-1000:]
    broken = {**definition(), "run": {"steps": [1]}}
    assert validate(lava_common, ".test.testdef", broken).returncode != 0, "it is a check"


def test_lava_takes_a_job_of_tuxlava_with_it(lava_common: Path) -> None:
    """TuxLAVA has no option for foreign definitions, so the test action is added to what it makes."""
    urls = ["--kernel", "https://files.example.org/bzImage", "--rootfs", "https://files.example.org/root.ext4"]
    made = subprocess.run(
        [tool("tuxlava"), "--device", "qemu-x86_64", *urls], capture_output=True, text=True, check=True
    )
    job = yaml().safe_load(made.stdout)
    own = yaml().safe_load((RECIPES / "lava/job.yaml").read_text(encoding="utf-8"))
    job["actions"].append(own["actions"][-1])
    # a lab allows more context than 2023.01 knows
    done = validate(lava_common, "", job, extra_context_variables=list(job.get("context", {})))
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize(
    ("code", "result", "back"),
    [
        (0, "pass", "pass"),
        (1, "fail", "pass"),
        (3, "fail", "unknown"),
        (4, "skip", "skip"),
        (5, "fail", "fail"),
        (130, "fail", "unknown"),
    ],
)
def test_lava_results(tmp_path: Path, code: int, result: str, back: str) -> None:
    stub(tmp_path, code)
    calls, said = run_steps(tmp_path)
    assert calls[0].rpartition(" --measurement")[0] == f"lava-test-case spec-ctrl-probe --result {result}"
    assert calls[1:] == [f"lava-test-case registers-put-back --result {back}"]
    assert [json.loads(line)["event"] for line in said.splitlines()] == ["start", "intent"]
    assert not list(tmp_path.glob("tmp.*")), "nothing is left behind"


def test_lava_without_an_agent(tmp_path: Path) -> None:
    calls, _ = run_steps(tmp_path)
    assert calls[0].startswith("lava-test-case spec-ctrl-probe --result fail ")


def test_lava_fetches_the_agent_and_uploads_the_stream(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    stub(tmp_path / "served", 1)
    got: dict[str, bytes] = {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"))

        def do_PUT(self) -> None:
            got[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(201)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            params = {"AGENT_URL": f"{url}/spec-ctrl-probe.pyz", "RESULTS_URL": f"{url}/night/", "MACHINE": "board1"}
            calls, said = run_steps(tmp_path, **params)
        finally:
            server.shutdown()
    assert got == {"/night/board1.ndjson": said.encode()}
    assert calls[-1] == f"lava-test-reference stream --result pass --reference {url}/night/board1.ndjson"


def test_lava_on_a_host_and_its_log(hosts: Lab, agent: Path, tmp_path: Path) -> None:
    """The real agent by the steps; what was printed, as LAVA's log has it, is taken out of that and taken in."""
    script = run_script(tmp_path, AGENT=str(agent))
    done = hosts.ssh(FINDINGS, f"PATH={lava_commands(tmp_path)}:$PATH sh {script} 2>&1")
    calls = (tmp_path / "calls").read_text()
    assert "spec-ctrl-probe --result fail" in calls, "findings: the register is a file"
    assert "registers-put-back --result pass" in calls
    quoted = [line.replace('"', '\\"') for line in done.stdout.splitlines()]  # as LAVA 2023.01 does
    for lines in (quoted, done.stdout.splitlines()):
        entries = [{"dt": "2026-11-25T01:00:00", "lvl": "target", "msg": line} for line in lines]
        log = "".join(f"- {json.dumps(entry)}\n" for entry in [{"dt": "", "lvl": "info", "msg": "x"}, *entries])
        taken = subprocess.run(
            [sys.executable, RECIPES / "lava/stream_of_log.py"], input=log, capture_output=True, text=True, check=False
        )
        if "No module named 'yaml'" in taken.stderr:
            lacking("no yaml (pip install 'spec-ctrl-probe[recipes]')")
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        write(out / "board1.ndjson", taken.stdout)
        told = nights.ingest(out, tmp_path / "nights", print)
        assert (told.new + told.again, told.lost, told.bad) == (1, {}, []), taken.stderr


# --- tmt --------------------------------------------------------------------------------------------------------------


def tmt_tree(folder: Path, provision: list[dict[str, str]]) -> Path:
    """Copy the recipe, and put guests into its plan."""
    tree = folder / "tmt"
    shutil.copytree(RECIPES / "tmt", tree)
    plan = yaml().safe_load((tree / "plan.fmf").read_text(encoding="utf-8"))
    write(tree / "plan.fmf", json.dumps({**plan, "provision": provision}))
    return tree


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """Make tmt's run folder; a guest has its own /var/tmp.

    The name is long: where no socket of ssh fits, tmt does without a master, for which it would wait 30 s, twice.
    """
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="spec-ctrl-probe-test-" + "x" * 60) as folder:
        yield Path(folder)


def tmt_results(run: Path) -> dict[str, Any]:
    """Return tmt's own results by guest."""
    found = yaml().safe_load((run / "plan/execute/results.yaml").read_text(encoding="utf-8"))
    return {one["guest"]["name"]: one for one in found}


def check_rsync() -> None:
    if not shutil.which("rsync", path="/usr/bin:/bin"):  # tmt looks nowhere else
        lacking("no rsync, which tmt needs (apt-get install rsync)")


def test_tmt_lint() -> None:
    done = subprocess.run([tool("tmt"), "--root", RECIPES / "tmt", "lint"], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not [line for line in said.splitlines() if line.startswith(("fail", "warn"))], said
    assert "/plan" in said and "/probe" in said


@pytest.mark.parametrize(("code", "result"), [(0, "pass"), (1, "fail"), (4, "skip"), (3, "error")])
def test_tmt_results(tmp_path: Path, run_folder: Path, code: int, result: str) -> None:
    tmt = tool("tmt")
    check_rsync()
    tree = tmt_tree(tmp_path, [{"name": "here", "how": "local"}])
    stub(tree, code)
    command = [tmt, "--root", str(tree), "--feeling-safe", "run", "--id", str(run_folder), "--all", "--skip", "prepare"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    one = tmt_results(run_folder)["here"]
    assert one["result"] == result, done.stdout + done.stderr
    assert "violation" not in done.stderr, done.stderr
    logs = [run_folder / "plan/execute" / log for log in one["log"]]
    assert [log.name for log in logs] == ["said.txt", "stream.ndjson"]
    assert logs[1].read_text().count("\n") == 2


def test_tmt_on_hosts_and_what_is_collected(hosts: Lab, agent: Path, tmp_path: Path, run_folder: Path) -> None:
    tmt = tool("tmt")
    check_rsync()
    key = str(hosts.folder / "key")
    guests = [
        {"name": name, "how": "connect", "guest": address(name), "user": "root", "key": key}
        for name in (FINDINGS, NO_REGISTER)
    ]
    tree = tmt_tree(tmp_path, guests)
    shutil.copy(agent, tree)
    done = hosts.command(tmt, "--root", str(tree), "run", "--id", str(run_folder), "--all", "--skip", "prepare")
    results = {name: one["result"] for name, one in tmt_results(run_folder).items()}
    assert results == {FINDINGS: "fail", NO_REGISTER: "skip"}, done.stdout + done.stderr
    out = tmp_path / "out"
    subprocess.run([tree / "collect.sh", run_folder, out], check=True)
    assert sorted(path.name for path in out.iterdir()) == ["lab1.ndjson", "lab2.ndjson"]
    told = nights.ingest(out, tmp_path / "nights", print)
    assert (told.new, list(told.lost), told.bad) == (1, [NO_REGISTER], [])


# --- labgrid ----------------------------------------------------------------------------------------------------------


def labgrid(hosts: Lab, agent: Path, folder: Path, name: str, **options: object) -> str:
    """Run the recipe's test on a host by labgrid's pytest plugin; return what pytest said."""
    tool("labgrid-client")
    shutil.copytree(RECIPES / "labgrid", folder / "labgrid")
    shutil.copy(agent, folder / "labgrid/spec-ctrl-probe.pyz")
    path = folder / "labgrid/environment.yaml"
    environment = yaml().safe_load(path.read_text(encoding="utf-8"))
    main = environment["targets"]["main"]
    main["resources"]["NetworkService"]["address"] = address(name)
    main["drivers"]["SSHDriver"]["keyfile"] = str(hosts.folder / "key")
    main["drivers"]["ExternalPowerDriver"]["cmd_cycle"] = f"touch {folder}/cycle"
    main["options"].update(options, place=name)
    write(path, json.dumps(environment))
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "--lg-env", str(path)]
    command += [f"--rootdir={folder}/labgrid", str(folder / "labgrid/test_spec_ctrl_probe.py")]
    done = hosts.command("env", f"OUT={folder}/out", *command)
    return done.stdout + done.stderr


def test_labgrid_reads_the_environment() -> None:
    tool("labgrid-client")
    code = "import sys; from labgrid import Environment; target = Environment(sys.argv[1]).get_target(); "
    code += "print(sorted(type(one).__name__ for one in target.drivers))"
    done = subprocess.run(
        [sys.executable, "-c", code, RECIPES / "labgrid/environment.yaml"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "['ExternalPowerDriver', 'SSHDriver']\n", done.stderr


@pytest.mark.parametrize(
    ("name", "outcome", "new"), [(FINDINGS, "1 failed", 1), (NO_REGISTER, "1 skipped", 0)], ids=["findings", "skip"]
)
def test_labgrid_on_a_host(hosts: Lab, agent: Path, tmp_path: Path, name: str, outcome: str, new: int) -> None:
    said = labgrid(hosts, agent, tmp_path, name)
    assert outcome in said
    if new:
        assert "exit code 1, findings" in said
    told = nights.ingest(tmp_path / "out", tmp_path / "nights", print, night="2026-11-25")
    assert (told.new, list(told.lost), told.bad) == (new, [] if new else [name], [])


def test_labgrid_cycles_the_power_of_a_board_that_hangs(hosts: Lab, agent: Path, tmp_path: Path) -> None:
    tool("labgrid-client")
    journal = hosts.folder / HANGS / "disk/spec-ctrl-probe/journal.ndjson"

    def board() -> None:
        """Do nothing more in the middle of the walk, not even on the network; boot when the power is cycled."""
        until(lambda: journal.exists() and b'"bit 9"' in journal.read_bytes())
        hosts.power_cut(HANGS)
        until((tmp_path / "cycle").exists, 120)
        hosts.boot(HANGS)

    thread = threading.Thread(target=board)
    thread.start()
    said = labgrid(hosts, agent, tmp_path, HANGS, arguments=SLOW, timeout=8)
    thread.join()
    assert f"{HANGS} hung; its journal is kept" in said, said
    told = nights.ingest(tmp_path / "out", tmp_path / "nights", print, night="2026-11-25")
    assert (told.new, list(told.lost), told.bad) == (0, [HANGS], [])
    assert told.lost[HANGS].startswith(("bit ", "pair ")), "this is where"


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)
