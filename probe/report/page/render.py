# SPDX-License-Identifier: MIT
"""One self-contained page of one record or several: no network, of use without JavaScript, every text escaped.

The page's own style and script are allowed by their hashes (Content-Security-Policy), nothing else is.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from msgspec import UnsetType

import probe
from probe import kvm_record, migration_record
from probe import record as rec
from probe.cases import Report, Status, reports_of, title_of
from probe.diff.moved import AnyRecord, Comparison, kind_of
from probe.diff.sets import compare
from probe.masks import ALL_BITS, format_list, parse_hex64, parse_list, told_bits, told_cpus
from probe.models import machines
from probe.registers import SPEC_CTRL
from probe.report import moved_text
from probe.report.kvm_text import explained
from probe.report.layout import clean
from probe.report.mail import not_hardware
from probe.report.page import heat
from probe.report.text import wrong_bits

_MOST_LINKED = 200  # rows; of more of them cells are no links
_AT_ONCE = 50  # rows in the table; the others are letters, of which a browser that has scripts makes cells
_NAMES_SHOWN = 3
_BESIDE = " !"  # after a name; the legend says what it means


def render(records: Sequence[tuple[str, AnyRecord, str]]) -> str:
    """Return the page's text; records are (name, record, SHA-256). Two of one kind are compared at its top."""
    kinds = {kind_of(record) for _, record, _ in records}
    comparison = compare(records[0][1], records[1][1]) if len(records) == 2 and len(kinds) == 1 else None
    reports = reports_of([record for _, record, _ in records])
    sections = [
        _section(number, name, record, sha256, report)
        for number, ((name, record, sha256), report) in enumerate(zip(records, reports))
    ]
    return fill(
        "page.html.j2",
        title=title_of(reports[0]) if len(reports) == 1 else f"{len(reports)} records of IA32_SPEC_CTRL",
        sections=sections,
        comparison=None if comparison is None else _compared(comparison, records),
    )


def fill(template: str, **values: Any) -> str:
    """Fill a template of this room; style, script and their hashes, the bits and the tool's version are added."""
    environment = Environment(
        loader=FunctionLoader(_file),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = lambda text: clean(str(text))
    style, script = _file("page.css"), _file("page.js")
    return environment.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        states=heat.STATES,
        bits=[
            {"bit": bit.bit, "name": bit.name, "meaning": bit.meaning, "source": bit.source} for bit in SPEC_CTRL.bits
        ],
        tool=probe.__version__,
        **values,
    )


@functools.cache
def _file(name: str) -> str:
    return (files("probe.report.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _compared(found: Comparison, records: Sequence[tuple[str, AnyRecord, str]]) -> dict[str, Any]:
    return {
        "same": found.same,
        "before": records[0][0],
        "after": records[1][0],
        "identical": records[0][2] == records[1][2],
        "machines": any(condition.what in ("machine", "called") for condition in found.conditions),
        "conditions": found.conditions,
        "alike": ", ".join(found.alike),
        "moved": [(moved, moved.numbers) for moved in found.moved],
        "only": [("before", found.only_before), ("after", found.only_after)],
    }


def _section(number: int, name: str, record: AnyRecord, sha256: str, report: Report) -> dict[str, Any]:
    """Return what the template needs of one record."""
    map_ = None
    if isinstance(record, kvm_record.KvmRecord):
        map_ = heat.of_kvm(record)
    elif isinstance(record, rec.Record):
        map_ = heat.of_run(record)
    return {
        "id": f"r{number}",
        "name": name,
        "kind": kind_of(record),
        "title": title_of(report),
        "sha256": sha256,
        "status": report.status.value,
        "counts": [(status.value, report.count(status)) for status in Status],
        "facts": _facts(record),
        "warn": not_hardware(record),
        "moves": "" if not isinstance(record, migration_record.MigrationRecord) else moved_text.render([record]),
        "badge": _badge(record, report),
        "findings": _findings(report),
        **mapped(f"r{number}", map_),
        "reasons": _reasons(record) if isinstance(record, rec.Record) else [],
        "models": _models(record),
        "notes": getattr(record, "notes", []),
    }


def mapped(prefix: str, map_: heat.Map | None) -> dict[str, Any]:
    """Return what map.html.j2 needs of a heat map, whose elements are called after prefix."""
    if map_ is None:
        return {"map": None, "beside": False, "body": "", "rest": "", "data": ""}
    links = len(map_.rows) <= _MOST_LINKED
    return {
        "map": map_,
        "beside": any(row.beside for row in map_.rows),
        "body": _lines(map_.rows[:_AT_ONCE], _Cells(prefix, map_, links=links)),
        "rest": _lines(map_.rows[_AT_ONCE:], _letters),
        "heads": "".join(f"{column.head if column.mask in _SINGLE else 'r':<2}" for column in map_.columns),
        "data": _data(map_),
    }


def _badge(record: AnyRecord, report: Report) -> str:
    """Return the result in a word: of KVM which model explains it, which is no judgement of the kernel."""
    if isinstance(record, kvm_record.KvmRecord) and report.status is Status.PASS:
        return explained(record).partition(";")[0]
    return report.status.value


def _facts(record: AnyRecord) -> list[tuple[str, str]]:
    machine, kernel, bios = record.machine, record.kernel, record.machine.bios
    facts = [
        (
            "machine",
            f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x} {machine.brand}",
        ),
        ("microcode", ", ".join(f"{one.revision} on {told_cpus(one.cpus)}" for one in machine.microcode) or "unknown"),
        ("hypervisor", (machine.hypervisor or "unnamed") if machine.under_hypervisor else "none: bare metal"),
        ("firmware", " ".join(part for part in (bios.vendor, bios.version, bios.date) if part) or "unknown"),
        ("kernel", f"{kernel.release} {kernel.version}"),
        ("lockdown", kernel.lockdown or "unknown"),
        ("command line", " ".join(kernel.cmdline) or "nothing that bears on it"),
        ("made", f"{record.started}, {record.duration:.1f} s, spec-ctrl-probe {record.tool.version}"),
        ("command", " ".join(record.tool.arguments)),
    ]
    if record.identity:
        facts.insert(0, ("called", record.identity))
    if not isinstance(record, rec.Record):
        hardware = record.hardware
        facts += [
            (
                "KVM",
                f"{record.kvm.backend or 'backend not to be seen'}, ignore_msrs={record.kvm.ignore_msrs or 'unknown'}",
            ),
            ("KVM takes", _bits(hardware.tested)),
            (
                "a guest let through",
                f"{_bits(hardware.valid)}; keeps {_bits(hardware.keep)}" if hardware.let_through else "none was",
            ),
            ("host CPUID", hardware.host_cpuid.replace(",", ", ")),
            ("CPUID offered", hardware.supported_cpuid.replace(",", ", ")),
        ]
    facts += _place(record)
    spared = [name for name, text in sorted(kernel.mitigations.items()) if text == "Not affected"]
    facts += [(f"mitigation {name}", text) for name, text in sorted(kernel.mitigations.items()) if name not in spared]
    return [*facts, ("not affected", ", ".join(spared))] if spared else facts


def _place(record: AnyRecord) -> list[tuple[str, str]]:
    """Say where it was measured: on the machine itself, or in a guest that was booted for it, and how."""
    guest = record.place.guest if isinstance(record, rec.Record) else record.guest
    if isinstance(guest, UnsetType):
        return [("place", record.place.because)] if isinstance(record, rec.Record) else []
    facts = [
        ("guest", f"booted for it: {guest.kernel} {guest.kernel_version}"),
        ("QEMU", guest.qemu),
        ("accelerator", guest.accelerator),
    ]
    if isinstance(record, rec.Record):
        facts.insert(0, ("place", record.place.because))
    return facts


def _bits(mask: str) -> str:
    return told_bits(parse_hex64(mask))


def _findings(report: Report) -> list[tuple[str, str]]:
    """Return what failed, as (where, what); of a run its own findings, which say it in whole sentences."""
    if isinstance(report.record, rec.Record):
        found = [(f"{entry.kind}, {told_cpus(entry.cpus)}", entry.text) for entry in report.record.findings]
        return found + [
            (f"restore, {told_cpus(entry.cpus)}", f"{entry.state}: {entry.note}")
            for entry in report.record.restore
            if entry.state != "verified"
        ]
    return [
        (f"{suite.name}.{case.name}", case.reason)
        for suite in report.suites
        for case in suite.cases
        if case.status in (Status.FAIL, Status.ERROR)
    ][:200]


def _reasons(record: rec.Record) -> list[dict[str, str]]:
    """Return why the judge predicts what it does, bit by bit, once for all CPUs of which it says the same."""
    numbers = heat.numbered(record)
    cpus: dict[int, list[str]] = {}
    first: dict[int, rec.PredictionEntry] = {}
    for entry in record.predictions:
        if entry.model == record.judge:
            number = numbers[id(entry)]
            cpus.setdefault(number, []).append(entry.cpus)
            first.setdefault(number, entry)
    return [
        {
            "number": str(number),
            "cpus": _together(cpus[number]),
            "bits": SPEC_CTRL.brief(parse_hex64(reason.mask)),
            "effect": reason.effect,
            "because": reason.because,
            "source": reason.source,
        }
        for number, entry in first.items()
        for reason in entry.reasons
    ]


def _together(cpus: Sequence[str]) -> str:
    return cpus[0] if len(cpus) == 1 else format_list(cpu for some in cpus for cpu in parse_list(some))


def _models(record: AnyRecord) -> list[dict[str, Any]]:
    """Return each model with how right it is; the first divergence as a program."""
    if isinstance(record, kvm_record.KvmRecord):
        sources = {machine.name: machine.source for machine in machines.MACHINES}
        return [
            {
                "name": fit.model,
                "title": fit.title,
                "source": sources.get(fit.model, ""),
                "right": f"{fit.agreements} of {fit.cases}",
                "all": "all" if fit.model in record.explained_by else "",
                "first": [] if isinstance(fit.first, UnsetType) else fit.first.program.split("; "),
                "answer": "" if isinstance(fit.first, UnsetType) else f"{fit.first.kernel}, not {fit.first.model}",
            }
            for fit in record.fits
        ]
    if not isinstance(record, rec.Record):
        return []
    wrong: dict[str, dict[int, int]] = {}
    some, every = 0, ALL_BITS
    for verdict in record.verdicts:
        measured = ALL_BITS & ~parse_hex64(verdict.not_measured)
        some, every = some | measured, every & measured
        mask = wrong_bits(verdict)
        wrong.setdefault(verdict.model, {}).update(dict.fromkeys(parse_list(verdict.cpus), mask) if mask else {})
    found: dict[tuple[str, str], list[rec.PredictionEntry]] = {}
    for entry in record.predictions:
        found.setdefault((entry.model, entry.accepts), []).append(entry)
    right = "" if not some else "all" if every == ALL_BITS else "all that was measured"
    return [_model(entries, wrong.get(model, {}), right) for (model, _), entries in found.items()]


def _model(entries: Sequence[rec.PredictionEntry], wrong_on: Mapping[int, int], right: str) -> dict[str, Any]:
    """Return what one model says for all CPUs to which it says the same, and on which bits of any it is wrong; right is
    what to call it if on none."""
    entry = entries[0]
    cpus = _together([one.cpus for one in entries])
    wrong = 0
    if wrong_on:
        for cpu in parse_list(cpus):
            wrong |= wrong_on.get(cpu, 0)
    return {
        "name": entry.model,
        "title": f"{entry.title} ({told_cpus(cpus)})",
        "source": "; ".join(dict.fromkeys(reason.source for reason in entry.reasons)),
        "right": f"accepts {SPEC_CTRL.brief(parse_hex64(entry.accepts))}",
        "all": "" if wrong else right,
        "first": [],
        "answer": f"wrong on {SPEC_CTRL.told(wrong)}" if wrong else "",
    }


def _lines(rows: Sequence[heat.Row], told: Callable[[tuple[str, ...]], str]) -> Markup:
    """Return rows of the heat map: names escaped, no end tags that HTML does not need; told writes the cells of one."""
    lines = []
    for row in rows:
        names = [clean(name).replace(",", "+") for name in row.names]
        shown, more = ", ".join(names[:_NAMES_SHOWN]), names[_NAMES_SHOWN:]
        wrong = " class=w" if row.wrong else ""
        wrong += f" data-p={row.prediction}" if row.prediction else ""
        mark = _BESIDE if row.beside else ""
        rest = f"<details><summary>and {len(more)} more</summary>{escape(', '.join(more))}</details>" if more else ""
        lines.append(f"<tr{wrong}><th scope=row>{escape(shown)}{mark}{rest}{told(row.cells)}")
    return Markup("\n".join(lines))


class _Cells:
    """Writes each cell as an element, with a link to the reasons and what it says if there are not too many."""

    def __init__(self, prefix: str, map_: heat.Map, *, links: bool) -> None:
        self._prefix, self._map, self._links = prefix, map_, links

    def __call__(self, questions: tuple[str, ...]) -> str:
        return "".join(
            self._cell(question, at, cells[2 * at], cells[2 * at + 1])
            for question, cells in enumerate(questions)
            for at in range(len(cells) // 2)
        )

    def _cell(self, question: int, at: int, state: str, mark: str) -> str:
        letter, said = heat.STATES[state]
        inner = f"{letter}{mark}".rstrip()
        if self._links:
            told = f"{self._map.questions[question]}, {self._map.columns[at].name}: {said}"
            told += {heat.WRONG: "; {} says otherwise", heat.OPEN: "; {} leaves it open"}.get(mark, "").format(
                clean(self._map.judge)
            )
            inner = f'<a href="#{self._prefix}-bits" title="{escape(told)}">{inner}</a>'
        name = (state.upper() if at == 0 else state) + _MARKED[mark]  # A begins a question
        return f"<td>{inner}" if name == "f" else f"<td class={name}>{inner}"  # the most common one has no class


_MARKED = {heat.WRONG: "x", heat.OPEN: "u", heat.PLAIN: ""}
_SINGLE = {bit.mask for bit in SPEC_CTRL.bits}
_LETTERS = str.maketrans({state: letter for state, (letter, _) in heat.STATES.items()})
# Of what runs that are alike are made, and the element that colours them; #GP has none.
_RUNS = tuple(
    (re.compile(f"(?:[{letters}].)+"), rf"<{element}>\g<0></{element}>")
    for letters, element in (("A", "b"), ("D", "i"), ("·?≈", "u"))
)


def _letters(questions: tuple[str, ...]) -> str:
    """Write the cells of each question as one text, two characters each, with runs that are alike in an element."""
    out = []
    for cells in questions:
        text = cells.translate(_LETTERS)
        for runs, element in _RUNS:
            text = runs.sub(element, text)
        out.append(f"<td>{text}")
    return "".join(out)


def _data(map_: heat.Map) -> Markup:
    """Return what the script needs, as JSON that ends no element."""
    columns = [[column.head, column.name] for column in map_.columns]
    judge = {name: clean(getattr(map_, name)) for name in ("judge", "source", "rule")}
    text = json.dumps({"questions": map_.questions, "columns": columns, "open": map_.open, **judge})
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
