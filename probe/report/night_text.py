# SPDX-License-Identifier: MIT
"""A night and a sweep as text for a mail, and for a terminal: what moved first, nothing of what did not. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from probe.errors import ExitCode
from probe.night import Night
from probe.report.layout import clean, joined, paragraph
from probe.sweep import LOST, How, Machine, Swept, folded

_MOST = 40  # lines of one section; the page and history have all
_TITLES = {
    How.DIED: "went down under the probe",
    How.GONE: "went away under the probe and did not come back",
    How.UNREACHED: "not reached",
    How.REFUSED: "refused",
    How.FAILED: "failed",
    How.UNTRIED: "not asked, or not kept",
}


def of(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def summary(night: Night) -> str:
    """Return a night as the text of a mail: changes only."""
    against = f" against {night.before}" if night.before else ", the first of this store"
    lines = [f"night {night.date}{against}: {of(night.machines, 'machine')}, {of(night.records, 'record')}"]
    lines += ["", *paragraph(verdict(night))]
    lines += _section("changed", [(", ".join(one.what), one.hosts) for one in night.changes])
    lines += _section("lost", _by_text(night.lost))
    lines += _section("not seen", [(f"last seen {last}", hosts) for last, hosts in _by_text_of(night.missing)])
    lines += _section("new", [("never seen before", night.new)] if night.new else [])
    rest = []
    if night.still:
        rest.append(f"lost, as the night before: {folded(host for _, host in night.still)}")
    if night.absent:
        rest.append(f"not seen for longer: {folded(host for host, _ in night.absent)} (history missing)")
    if night.findings:
        since = sum(one[2] < night.date for one in night.findings)
        hosts = len({one[0] for one in night.findings})
        text = f"open findings: {of(hosts, 'machine')}, {since} of {len(night.findings)} since an earlier night"
        rest.append(f"{text} (history findings)")
    lines += ["", *(line for one in rest for line in paragraph(one, "", "  "))] if rest else []
    return joined(lines)


def verdict(night: Night) -> str:
    """Say in a line whether anybody has to look."""
    if not night.before:
        return "nothing to compare with yet"
    if not night.moved:
        return "nothing changed" + (f", {len(night.still)} still lost" if night.still else ", nobody is missing")
    hosts = {host for one in night.changes for host in one.hosts}
    parts = [f"{of(len(hosts), 'machine')} changed"] if hosts else ["no machine changed"]
    parts += [
        f"{len(found)} {word}"
        for word, found in (("lost", night.lost), ("not seen", night.missing), ("new", night.new))
        if found
    ]
    return ", ".join(parts)


def _by_text(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, tuple[str, ...]]]:
    found: dict[str, list[str]] = {}
    for text, host in pairs:
        found.setdefault(text, []).append(host)
    return [(text, tuple(hosts)) for text, hosts in found.items()]


def _by_text_of(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, tuple[str, ...]]]:
    return _by_text([(text, host) for host, text in pairs])


def _section(title: str, found: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    if not found:
        return []
    lines = ["", f"{title}:"]
    for text, hosts in found[:_MOST]:
        lines += paragraph(f"{folded(hosts)}: {text}", "  ", "      ")
    if len(found) > _MOST:
        lines.append(f"  and {len(found) - _MOST} more")
    return lines


def swept(done: Swept, *, brief: bool = False) -> str:
    """Return a sweep as the text of a mail: how many machines, who gave no record and why; brief leaves out the why,
    where a night's summary follows that has it."""
    total = len(done.machines)
    records = done.of(How.RECORD)
    lines = [f"sweep of {done.started}: {of(total, 'machine')}, {done.seconds:.0f} s"]
    counts = [f"{len(records)} gave a record"]
    counts += [f"{len(found)} {_TITLES[how]}" for how in _TITLES if (found := done.of(how))]
    lines += ["", *paragraph(", ".join(counts))]
    if done.continued:
        lines += paragraph(f"{done.continued} of them had answered before this sweep was interrupted")
    if done.stopped:
        lines += paragraph(f"stopped: {done.stopped}")
    restore = [one.host for one in done.machines.values() if one.code == ExitCode.NOT_RESTORED]
    lines += _section("REGISTER NOT PUT BACK, or not shown to be", [("see its record", restore)] if restore else [])
    for how in () if brief else (*LOST, How.REFUSED, How.FAILED):
        told = [(one.told().removeprefix(f"{_TITLES[how]}: "), one.host) for one in done.of(how)]
        lines += _section(_TITLES[how], _by_text(told))
    untried = [one.host for one in done.of(How.UNTRIED)]
    lines += _section(_TITLES[How.UNTRIED], [("the same command, or --retry, takes them", untried)] if untried else [])
    return joined(lines)


def planned(rows: Sequence[tuple[str, str, str, str, bool, str]], what: Sequence[str]) -> str:
    """Return a table of what would be done where: machine, address, user, CPU, whether first, last time."""
    head = ("machine", "address", "user", "CPU, as last seen", "first", "last sweep")
    texts = [head, *((*(clean(one) for one in row[:4]), "yes" if row[4] else "", clean(row[5])) for row in rows)]
    shown = [at for at in range(len(head)) if any(row[at] for row in texts[1:])]
    widths = [max(len(row[at]) for row in texts) for at in shown]
    lines = ["  ".join(row[at].ljust(width) for at, width in zip(shown, widths)).rstrip() for row in texts]
    return "".join(f"{line}\n" for line in [*lines, "", *what])


def ended(machine: Machine) -> str:
    """Say in a line that a machine gave no record."""
    return f"{machine.host} {_TITLES[machine.how]}: {machine.told()}"
