# SPDX-License-Identifier: MIT
"""A night's work: a sweep, what people and monitors are to see of it, and an end to nights that are too old; and the
systemd units that do so every night."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_harness.boot.cache import Say, locked
from kernel_harness.lab import nights
from kernel_harness.lab.engine import configuration
from kernel_harness.lab.history import night
from probe.errors import ProbeError, RecordError, RequirementMissing, UsageError
from probe.models.migration import BY_NAME
from probe.night import Night
from probe.nights import NIGHT, decode
from probe.pool import Place, grouped, place_of
from probe.report import kcidb_night, migrate_text
from probe.store import read_raw, write_atomically

SERVICE, TIMER = "spec-ctrl-probe-nightly.service", "spec-ctrl-probe-nightly.timer"
TEXTFILE = "spec_ctrl_probe_lab.prom"
_ENDINGS = (".parquet", ".html", ".txt", ".kcidb")
_MOST_KINDS = 60  # of machines in the page's matrix; migrate has no limit


def pool(store: Path, date: str) -> str:
    """Return the migration matrix of a night's machines, each as its newest record has it; or why there is none."""
    newest: dict[tuple[str, str], tuple[str, Place]] = {}
    for path in sorted((store / date / "records").glob("*.json")):
        host = path.stem.rpartition("-")[0]
        try:
            record = decode(read_raw(str(path))[0], path.name)
            place = place_of(record, host)  # type: ignore[arg-type]
        except (RecordError, AttributeError):  # nothing was measured, or it is of a guest that moved
            continue
        kind = type(record).__name__
        if record.started >= newest.get((host, kind), ("",))[0]:
            newest[host, kind] = (record.started, place)
    groups = grouped([place for _, place in newest.values()])
    if len(newest) < 2:
        return "fewer than two machines were measured\n"
    if len(groups) > _MOST_KINDS:
        return f"{len(groups)} kinds of machine: spec-ctrl-probe migrate {date}/records/ has the matrix\n"
    return migrate_text.matrix(groups, BY_NAME["qemu"])


def prune(store: Path, keep: int, date: str = "") -> list[str]:
    """Remove the oldest nights but keep, with everything that belongs to them, and never date; return their dates."""
    if keep < 1:
        raise UsageError(f"cannot keep {keep} nights", "1 or more")
    parts = [*store.glob("*/records"), *store.glob("*/lost.ndjson")]
    dates = {path.parent.name for path in parts if NIGHT.match(path.parent.name)} | set(nights.nights_of(store))
    old = [one for one in sorted(dates)[:-keep] if one != date]
    for one in old:
        shutil.rmtree(store / one, ignore_errors=True)
        for ending in _ENDINGS:
            (store / f"{one}{ending}").unlink(missing_ok=True)
    return old


def conclude(store: Path, date: str, text: str, keep: int, origin: str = "") -> tuple[Night, list[str]]:
    """Write DATE.txt and DATE.html into the store, remove what is too old, and return the night and what was removed.

    text stands before the summary. With an origin, the lab's name with KCIDB, there is DATE.kcidb, too.
    Raise RecordError if something cannot be written.
    """
    from probe.report.night_text import summary
    from probe.report.page.night import render

    found = night(store, date)
    write_atomically((text + summary(found)).encode(), store / f"{date}.txt", replace=True)
    rows = nights.rows(store, date, bad=[])
    if origin:
        write_atomically(kcidb_night.render(rows, origin).encode(), store / f"{date}.kcidb", replace=True)
    page = render(found, rows, pool(store, date))
    write_atomically(page.encode(), store / f"{date}.html", replace=True)
    with locked(store / ".lock", lambda _: None):
        return found, prune(store, keep, date)


def sendmail() -> str:
    """Return the machine's sendmail; raise RequirementMissing if there is none."""
    program = shutil.which("sendmail", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/lib")
    if program is None:
        raise RequirementMissing("no sendmail here", "install one (msmtp-mta, postfix), or leave out --mail")
    return program


def send(address: str, subject: str, text: str) -> None:
    """Hand a mail to the machine's sendmail; raise RequirementMissing if there is none, ProbeError if it refuses."""
    program = sendmail()
    plain = " ".join(subject.split())
    head = f"To: {address}\nSubject: {plain}\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n\n"
    try:
        done = subprocess.run(
            [program, "-t", "-i"], input=head + text, capture_output=True, text=True, check=False, timeout=60
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"{program} has not taken the mail after {error.timeout:.0f} s") from error
    if done.returncode:
        raise ProbeError(f"{program} took no mail: {' '.join(done.stderr.split())[-200:]}")


# --- systemd ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """The texts of both units, and the folder that they go to."""

    folder: Path
    service: str
    timer: str


def units(
    words: Sequence[str], store: Path, *, user: bool, run_as: str, at: str, textfile: str = "", mail: bool = False
) -> Units:
    """Return the units that run "nightly run" with words every night; store and textfile are where it may write.

    With mail sendmail must be able to do its work: be set-gid, and write to its spool. Raise UsageError for a user that
    is not there.
    """
    if not user:
        try:
            pwd.getpwnam(run_as)
        except KeyError as error:
            raise UsageError(f"no user {run_as}", "--run-as NAME, whose ssh keys the machines know") from error
    command = [*_program(), "nightly", "run", *words]
    lines = [
        "# Written by spec-ctrl-probe nightly install.",
        "[Unit]",
        "Description=What IA32_SPEC_CTRL does on the machines of the lab",
        "Documentation=man:spec-ctrl-probe(1)",
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        "Type=oneshot",
        f"ExecStart={' '.join(_quoted(word) for word in command)}",
        "# findings are no failure of this unit",
        "SuccessExitStatus=1",
        "TimeoutStartSec=12h",
        "Nice=10",
        "KillSignal=SIGINT",
        "# Ansible is told to stop, then the sweep",
        "KillMode=mixed",
        "TimeoutStopSec=60",
    ]
    config = configuration()
    if config is not None:
        lines.append(f"Environment={_quoted(f'ANSIBLE_CONFIG={config}')}")
    if not user:
        writable = " ".join(_quoted(str(path)) for path in (store, textfile) if path)
        lines += [
            f"User={run_as}",
            "CacheDirectory=spec-ctrl-probe",
            "Environment=PROBE_CACHE=%C/spec-ctrl-probe",
            f"ProtectSystem={'full' if mail else 'strict'}",
            "ProtectHome=read-only",
            f"ReadWritePaths={writable}",
            *([] if any("/tmp/" in word for word in [*command, str(store)]) else ["PrivateTmp=yes"]),
            *([] if mail else ["NoNewPrivileges=yes"]),
        ]
    timer = [
        "# Written by spec-ctrl-probe nightly install.",
        "[Unit]",
        "Description=Every night: what IA32_SPEC_CTRL does on the machines of the lab",
        "",
        "[Timer]",
        f"OnCalendar={at}",
        "RandomizedDelaySec=15min",
        "# after a night in which this machine was off, as soon as it is on",
        "Persistent=true",
        "",
        "[Install]",
        "WantedBy=timers.target",
    ]
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
    folder = own / "systemd/user" if user else Path("/etc/systemd/system")
    return Units(folder, "".join(f"{line}\n" for line in lines), "".join(f"{line}\n" for line in timer))


def _program() -> list[str]:
    """Return how this program is started, from any folder."""
    own = Path(sys.executable).parent / "spec-ctrl-probe"
    return [str(own)] if own.exists() else [sys.executable, "-m", "probe"]


def _quoted(word: str) -> str:
    """Quote a word for ExecStart= (systemd.service(5), COMMAND LINES): specifiers, variables and quotes are text."""
    plain = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$").replace('"', '\\"')
    return plain if plain and not any(char.isspace() or char in "'\";" for char in plain) else f'"{plain}"'


def verify(found: Units, *, user: bool) -> str:
    """Have systemd look at the units before they are installed; raise UsageError if it does not take them.

    Return what to tell where nothing could look at them, else "".
    """
    program = shutil.which("systemd-analyze")
    if program is None:
        return "systemd-analyze is not here: the units were not verified"
    with tempfile.TemporaryDirectory() as folder:
        for name, text in ((SERVICE, found.service), (TIMER, found.timer)):
            (Path(folder) / name).write_text(text, encoding="utf-8")
        command = [program, "verify", "--man=no", *(["--user"] if user else []), f"{folder}/{SERVICE}"]
        environment = {"XDG_RUNTIME_DIR": folder, **os.environ}  # a user's, where there is no session
        done = subprocess.run(
            [*command, f"{folder}/{TIMER}"], capture_output=True, text=True, check=False, env=environment
        )
        lines = (done.stdout + done.stderr).replace(f"{folder}/", "").splitlines()
        said = next((line for line in lines if "spec-ctrl-probe" in line), "")
    if done.returncode:
        raise UsageError(
            f"systemd does not take these units: {said or done.stderr.strip()[-300:]}",
            "--at takes an OnCalendar: 02:00",
        )
    return ""


def install(found: Units, *, user: bool, say: Say) -> None:
    """Write the units and start the timer.

    Raise RequirementMissing without the rights, ProbeError if systemd refuses.
    """
    try:
        found.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequirementMissing(f"cannot write {found.folder}: {error.strerror}", _as_root(user)) from error
    for name, text in ((SERVICE, found.service), (TIMER, found.timer)):
        try:
            say(f"written: {write_atomically(text.encode(), found.folder / name, replace=True)}")
        except RecordError as error:
            raise RequirementMissing(error.message.replace("the record ", ""), _as_root(user)) from error
    manager = ["systemctl", *(["--user"] if user else [])]
    if shutil.which("systemctl") is None or not Path("/run/systemd/system").exists():
        say(f"systemd does not run here; where it does: {' '.join(manager)} enable --now {TIMER}")
        return
    for command in ([*manager, "daemon-reload"], [*manager, "enable", "--now", TIMER]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProbeError(f"{' '.join(command)}: {' '.join(done.stderr.split())[-300:]}")
    say(f"{TIMER} is on; {' '.join(manager)} list-timers shows it, disable --now {TIMER} ends it")


def _as_root(user: bool) -> str:
    return "" if user else "run it as root, or give --user"


def give(store: Path, run_as: str, say: Say) -> None:
    """Make the store, for the user who is to write to it; say so if that user does not own one that is there."""
    owner = pwd.getpwnam(run_as)
    if not store.exists():
        store.mkdir(parents=True)
        os.chown(store, owner.pw_uid, owner.pw_gid)
    elif owner.pw_uid not in (0, store.stat().st_uid):
        say(f"{store} is not {run_as}'s: see that {run_as} can write there")
