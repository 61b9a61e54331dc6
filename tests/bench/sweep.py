# SPDX-License-Identifier: MIT
"""A sweep against plain Ansible, on hosts in network namespaces: controller and hosts share this machine's CPUs."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from kernel_harness.lab.agent_file import build
from tests.bench.figures import figure, note, ratio
from tests.live.lab_hosts import Lab, lab, lacks

COUNT, ENTRIES, ROUNDS = 16, 160, 3
_BIN = Path(sys.executable).parent
_AGENT_SIZE = 1_500_000
# What the agent costs is the machine's; this one costs a second and gives a record that is real.
_PROBE = """import json, sys, time
time.sleep(1)
print(json.dumps({{"event": "record", "record": json.load(open({record!r}))}}))
"""
_PLAIN = """from ansible.module_utils.basic import AnsibleModule
import time
module = AnsibleModule(argument_spec={})
time.sleep(1)
module.exit_json(changed=False)
"""
RECORD = Path(__file__).resolve().parents[2] / "results/modelled-threadripper-3970x/metal.json"


def sweep_figures() -> None:
    """Measure a sweep of 16 hosts whose probe takes a second beside one module of plain Ansible that sleeps as long."""
    missing = lacks()
    if missing:
        print(f"not measured: a sweep beside plain Ansible: {missing}")
        return
    with tempfile.TemporaryDirectory() as text, lab(Path(text), COUNT) as hosts:
        for name in hosts.names:
            hosts.boot(name)
        hosts.wait_for(hosts.names)
        folder = hosts.folder
        (folder / "library").mkdir()
        (folder / "library/one_second.py").write_text(_PLAIN)
        with zipfile.ZipFile(folder / "probe.pyz", "w") as probe:
            probe.writestr("__main__.py", _PROBE.format(record=str(RECORD)))
            probe.writestr("ballast", os.urandom(_AGENT_SIZE))  # a first sweep carries the agent to every machine
        small = _inventory(hosts, "small", COUNT)
        playbook = folder / "plain.yml"
        playbook.write_text("- hosts: all\n  gather_facts: false\n  become: true\n  tasks:\n    - one_second:\n")
        first = _sweep(hosts, small, "small", folder / "probe.pyz")
        plain, swept, cpu = [], [], []
        for _ in range(ROUNDS):
            plain.append(_seconds(hosts, str(_BIN / "ansible-playbook"), "-i", small, "-f", str(COUNT), str(playbook)))
            before = _cpu()
            swept.append(_sweep(hosts, small, "small", folder / "probe.pyz"))
            cpu.append(_cpu() - before)
        note("plain Ansible, a module that sleeps 1 s, 16 hosts", min(plain), "s")
        figure("sweep of 16 hosts with a 1 s probe / that", ratio(swept, plain), 1.3, "x")
        note("  the first one of these, which carries the agent / that", first / min(plain), "x")
        figure("  controller CPU of a sweep of 16 machines, for each", statistics.median(cpu) / COUNT, 0.2, "s")
        many = _inventory(hosts, "many", ENTRIES)
        _sweep(hosts, many, "many", folder / "probe.pyz")
        before = _cpu()
        _sweep(hosts, many, "many", folder / "probe.pyz")
        figure(f"controller CPU of a sweep of {ENTRIES} machines, for each", (_cpu() - before) / ENTRIES, 0.2, "s")
        build(folder / "agent.pyz", lambda line: None)
        note(
            "sweep of 16 hosts with the real agent, first start",
            _sweep(hosts, small, "real", folder / "agent.pyz"),
            "s",
        )


def _inventory(hosts: Lab, name: str, count: int) -> str:
    """Write an inventory of so many machines on the hosts there are, each with a name and connection of its own."""
    config = hosts.folder / f"{name}.ssh_config"
    named = [f"Host m{number}\n    HostName 192.0.2.{number % COUNT + 1}\n" for number in range(count)]
    config.write_text("".join(named) + hosts.ssh_config.read_text())
    path = hosts.folder / f"{name}.ini"
    lines = [*(f"m{number} ansible_user=root" for number in range(count)), "[all:vars]"]
    path.write_text("\n".join([*lines, f"ansible_ssh_common_args='-F {config}'"]) + "\n")
    return str(path)


def _sweep(hosts: Lab, inventory: str, store: str, agent: Path) -> float:
    command = [str(_BIN / "spec-ctrl-probe"), "sweep", "-i", inventory, "--store", str(hosts.folder / store)]
    return _seconds(hosts, *command, "--forks", "32", "--agent", str(agent), "--write", ends=(0, 1))


def _seconds(hosts: Lab, *words: str, ends: tuple[int, ...] = (0,)) -> float:
    environment = [
        f"ANSIBLE_LIBRARY={hosts.folder}/library",
        "ANSIBLE_PIPELINING=1",
        f"PATH={_BIN}:{os.environ['PATH']}",
        # every run connects anew, as at night: a master of the run before would spare plain Ansible that
        f"ANSIBLE_SSH_CONTROL_PATH_DIR={tempfile.mkdtemp(dir=hosts.folder)}",
    ]
    begin = time.monotonic()
    done = hosts.command("env", *environment, *words, timeout=300)
    assert done.returncode in ends, done.stdout[-1000:] + done.stderr[-1000:]
    return time.monotonic() - begin


def _cpu() -> float:
    """Return the seconds of CPU of what was started from here and has ended: the controller's, not the hosts'; without
    those of ssh's masters, which stay a minute for the next connection."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
