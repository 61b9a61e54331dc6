# SPDX-License-Identifier: MIT
"""One self-contained page of one record or several: no network, of use without JavaScript, every text escaped.

The page's own style and script are allowed by their hashes (Content-Security-Policy), nothing else is.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
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
from probe.masks import parse_hex64, told_bits, told_cpus
from probe.models import machines
from probe.registers import SPEC_CTRL
from probe.report import moved_text
from probe.report.kvm_text import explained
from probe.report.layout import clean
from probe.report.mail import not_hardware
from probe.report.page import heat

MERGED_FROM = 200  # rows, from which neighbours that are alike share a cell, and cells are no links
_AT_ONCE = 100  # rows in the table; the others wait in a second one, which is text for a browser that has scripts
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
    merged = map_ is not None and len(map_.rows) >= MERGED_FROM
    if map_ is not None and merged:
        map_ = heat.merged(map_)
    return {
        "map": map_,
        "merged": merged,
        "beside": map_ is not None and any(row.beside for row in map_.rows),
        "body": "" if map_ is None else _body(prefix, map_, map_.rows[:_AT_ONCE], links=not merged),
        "rest": "" if map_ is None else _body(prefix, map_, map_.rows[_AT_ONCE:], links=not merged),
        "data": "" if map_ is None else _data(map_),
    }


def _badge(record: AnyRecord, report: Report) -> str:
    """Return the result in a word: of KVM which model explains it, which is no judgement of the kernel."""
    if isinstance(record, kvm_record.KvmRecord) and report.status is Status.PASS:
        return explained(record).partition(";")[0]
    return report.status.value


def _facts(record: AnyRecord) -> list[tuple[str, str]]:
    machine, kernel = record.machine, record.kernel
    facts = [
        (
            "machine",
            f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x} {machine.brand}",
        ),
        ("microcode", ", ".join(f"{one.revision} on {told_cpus(one.cpus)}" for one in machine.microcode) or "unknown"),
        ("hypervisor", (machine.hypervisor or "unnamed") if machine.under_hypervisor else "none: bare metal"),
        ("kernel", f"{kernel.release} {kernel.version}"),
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
        if not isinstance(record.guest, UnsetType):
            facts.append(("guest", f"{record.guest.kernel} {record.guest.kernel_version}, {record.guest.accelerator}"))
    spared = [name for name, text in sorted(kernel.mitigations.items()) if text == "Not affected"]
    facts += [(f"mitigation {name}", text) for name, text in sorted(kernel.mitigations.items()) if name not in spared]
    return [*facts, ("not affected", ", ".join(spared))] if spared else facts


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
    """Return why the judge predicts what it does, bit by bit."""
    return [
        {
            "number": str(number),
            "cpus": entry.cpus,
            "bits": SPEC_CTRL.brief(parse_hex64(reason.mask)),
            "effect": reason.effect,
            "because": reason.because,
            "source": reason.source,
        }
        for number, entry in enumerate(record.predictions)
        if entry.model == record.judge
        for reason in entry.reasons
    ]


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
    found: list[dict[str, Any]] = []
    for entry in record.predictions:
        wrong = 0
        for verdict in record.verdicts:
            if verdict.model == entry.model:
                for name in ("unexpected_fault", "unexpected_accept", "not_retained"):
                    wrong |= parse_hex64(getattr(verdict, name))
        found.append(
            {
                "name": entry.model,
                "title": f"{entry.title} ({told_cpus(entry.cpus)})",
                "source": "; ".join(dict.fromkeys(reason.source for reason in entry.reasons)),
                "right": f"accepts {SPEC_CTRL.brief(parse_hex64(entry.accepts))}",
                "all": "" if wrong else "all",
                "first": [],
                "answer": f"wrong on {SPEC_CTRL.told(wrong)}" if wrong else "",
            }
        )
    return found


def _body(prefix: str, map_: heat.Map, rows: Sequence[heat.Row], *, links: bool) -> Markup:
    """Return the rows of the heat map: cells of fixed words, names escaped, no end tags that HTML does not need."""
    lines = []
    for row in rows:
        shown = [clean(name).replace(",", "+") for name in row.names]
        more = f" and {len(shown) - _NAMES_SHOWN} more" if len(shown) > _NAMES_SHOWN else ""
        title = f' title="{escape(", ".join(shown))}"' if more else ""
        cells = [_cells(prefix, map_, question, each, links=links) for question, each in enumerate(row.cells)]
        wrong = " class=w" if row.wrong else ""
        wrong += f" data-p={row.prediction}" if row.prediction else ""
        names = escape(", ".join(shown[:_NAMES_SHOWN]) + more)
        mark = _BESIDE if row.beside else ""
        lines.append(f"<tr{wrong}><th scope=row{title}>{names}{mark}{''.join(cells)}")
    return Markup("\n".join(lines))


def _cells(prefix: str, map_: heat.Map, question: int, cells: Sequence[heat.Cell], *, links: bool) -> str:
    out = []
    at = 0
    for cell in cells:
        letter, said = heat.STATES[cell.state]
        mark = "!" if cell.wrong else ""
        name = (cell.state.upper() if at == 0 else cell.state) + ("x" if cell.wrong else "")  # A begins a question
        span = f" colspan={cell.span}" if cell.span > 1 else ""
        inner = letter + mark
        if links:
            told = f"{map_.questions[question]}, {map_.columns[at].name}: {said}"
            told += f"; {clean(map_.judge)} says otherwise" if cell.wrong else ""
            inner = f'<a href="#{prefix}-bits" title="{escape(told)}">{inner}</a>'
        shown = "" if name == "f" else f" class={name}"  # the most common one has none
        out.append(f"<td{shown}{span}>{inner}")
        at += cell.span
    return "".join(out)


def _data(map_: heat.Map) -> Markup:
    """Return what the script needs, as JSON that ends no element."""
    columns = [[column.head, column.name] for column in map_.columns]
    text = json.dumps(
        {"questions": map_.questions, "columns": columns, "judge": clean(map_.judge), "source": clean(map_.source)}
    )
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
