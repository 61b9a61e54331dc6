# SPDX-License-Identifier: MIT
"""Questions to the nights: what changed, what flips a bit, a machine's life, who is missing. DuckDB over Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_harness.lab.nights import connect, nights_of
from probe.errors import RecordError, UsageError
from probe.masks import format_list
from probe.night import Change, Night, grouped, is_no_news
from probe.nights import NIGHT
from probe.registers import SPEC_CTRL

if TYPE_CHECKING:
    import duckdb


def _machines(source: str = "runs") -> str:
    """Return CTEs that give a machine as one row a night: masks of all its CPUs; of several runs the newest counts.

    A bit is retained if every CPU that measured it keeps it; unmeasured if none did.
    """
    return f"""
newest AS (SELECT night, host, kind, max(started) AS started FROM {source} WHERE kind IN ('run', 'kvm') GROUP BY ALL),
gone AS (SELECT night, host, 'run' AS kind, max(lost) AS lost FROM {source} WHERE lost <> '' GROUP BY night, host),
machine AS (
  SELECT r.night, r.host, r.kind, bit_and(r.retained | r.unmeasured) & ~bit_and(r.unmeasured) AS retained,
         bit_or(r.faults) AS faults, bit_and(r.unmeasured) AS unmeasured, bit_or(r.wrong) AS wrong,
         min(r.status) AS status, min(r.microcode) AS microcode, min(r.bios) AS bios, min(r.kernel) AS kernel,
         min(r.explained) AS explained, coalesce(any_value(g.lost), '') AS lost, any_value(r.findings) AS findings,
         any_value(r.vendor) AS vendor, any_value(r.family) AS family, any_value(r.model) AS model,
         any_value(r.stepping) AS stepping
  FROM {source} r JOIN newest n ON r.night = n.night AND r.host = n.host AND r.kind = n.kind AND r.started = n.started
  LEFT JOIN gone g ON r.night = g.night AND r.host = g.host AND r.kind = g.kind
  GROUP BY r.night, r.host, r.kind)"""


def _moved(column: str) -> str:
    """Return SQL that says how a text of machine b is not that of a; nothing of a machine that was lost."""
    return (
        f"CASE WHEN a.{column} <> b.{column} AND a.started_well AND b.started_well "
        f"THEN a.{column} || ' -> ' || b.{column} ELSE '' END AS {column}"
    )


def _mask(differs: str) -> str:
    """Return SQL for a mask of bits that both machines a and b measured."""
    return f"printf('0x%x', ({differs}) & ~(a.unmeasured | b.unmeasured))"


QUESTIONS: dict[str, tuple[str, str]] = {
    "changes": (
        "what is not as it was between two nights, on machines that both have; bits that both measured",
        "WITH"
        + _machines()
        + f""",
known AS (SELECT *, microcode || kernel || vendor <> '' AS started_well FROM machine)
SELECT a.host, a.kind,
       {_mask("b.retained & ~a.retained")} AS kept_now, {_mask("a.retained & ~b.retained")} AS no_longer_kept,
       {_mask("b.faults & ~a.faults")} AS faults_now, {_mask("a.faults & ~b.faults")} AS no_longer_faults,
       CASE WHEN a.status <> b.status THEN a.status || ' -> ' || b.status ELSE '' END AS status,
       {_moved("explained")}, {_moved("microcode")}, {_moved("kernel")}, {_moved("bios")},
       CASE WHEN a.lost <> '' AND b.lost = '' THEN 'is back' ELSE b.lost END AS lost
FROM known a JOIN known b USING (host, kind)
WHERE a.night = $before AND b.night = $after
  AND (xor(a.retained, b.retained) & ~(a.unmeasured | b.unmeasured) <> 0
       OR xor(a.faults, b.faults) & ~(a.unmeasured | b.unmeasured) <> 0
       OR xor(a.wrong, b.wrong) & ~(a.unmeasured | b.unmeasured) <> 0
       OR a.status <> b.status OR (a.explained <> b.explained AND a.started_well AND b.started_well)
       OR (a.lost = '') <> (b.lost = ''))
ORDER BY a.host, a.kind""",
    ),
    "missing": (
        "machines of the one night that the other does not have, and machines that were lost",
        """
SELECT host, 'not seen' AS what, max(night) AS last_night FROM runs
WHERE lost = '' AND night <= $after AND host NOT IN (SELECT host FROM runs WHERE night = $after) GROUP BY host
UNION ALL SELECT host, 'lost: ' || lost, night FROM runs WHERE night = $after AND lost <> ''
ORDER BY 1""",
    ),
    "flips": (
        "bits that a machine did otherwise than before, with the microcode, BIOS, kernel that came with it",
        """
WITH restless AS (SELECT host, kind FROM runs WHERE lost = '' GROUP BY host, kind
                  HAVING bit_or(retained) & ~bit_and(retained | unmeasured) <> 0
                         OR bit_or(faults) & ~bit_and(faults | unmeasured) <> 0),
moving AS (SELECT r.* FROM runs r JOIN restless USING (host, kind) WHERE lost = ''),"""
        + _machines("moving")
        + """,
steps AS (
  SELECT *, lag(night) OVER w AS earlier, lag(retained) OVER w AS kept, lag(faults) OVER w AS refused,
         ~(unmeasured | lag(unmeasured) OVER w) AS known,
         lag(microcode) OVER w AS old_microcode, lag(bios) OVER w AS old_bios, lag(kernel) OVER w AS old_kernel
  FROM machine WHERE ~unmeasured <> 0 WINDOW w AS (PARTITION BY host, kind ORDER BY night)),
flips AS (
  SELECT *, CASE WHEN microcode <> old_microcode THEN old_microcode || ' -> ' || microcode ELSE '' END AS m,
         CASE WHEN bios <> old_bios THEN old_bios || ' -> ' || bios ELSE '' END AS b,
         CASE WHEN kernel <> old_kernel THEN old_kernel || ' -> ' || kernel ELSE '' END AS k
  FROM steps WHERE earlier IS NOT NULL AND (xor(kept, retained) & known <> 0 OR xor(refused, faults) & known <> 0))
SELECT vendor, printf('%02x-%02x-%02x', family, model, stepping) AS cpu, kind,
       printf('0x%x', retained & ~kept & known) AS kept_now, printf('0x%x', kept & ~retained & known) AS no_longer_kept,
       printf('0x%x', faults & ~refused & known) AS faults_now,
       printf('0x%x', refused & ~faults & known) AS no_longer_faults,
       CASE WHEN m || b || k = '' THEN 'nothing that is known' ELSE '' END AS came_with,
       m AS microcode, b AS bios, k AS kernel, count(*) AS times, count(DISTINCT host) AS machines, min(night) AS first
FROM flips GROUP BY ALL ORDER BY machines DESC, first, cpu, kind""",
    ),
    "differ": (
        "machines whose CPUs did not do alike, in the last night; bits that more than one group measured",
        """
WITH newest AS (SELECT host, max(started) AS started FROM runs WHERE night = $after AND kind = 'run' AND lost = ''
                GROUP BY host)
SELECT r.host, count(*) AS groups,
       printf('0x%x', bit_or(retained) & ~bit_and(retained | unmeasured)) AS retained_differs,
       printf('0x%x', bit_or(faults) & ~bit_and(faults | unmeasured)) AS faults_differ,
       string_agg(cpus || ': ' || printf('0x%x', retained), '; ' ORDER BY cpus) AS retained
FROM runs r JOIN newest n ON r.host = n.host AND r.started = n.started
WHERE night = $after AND kind = 'run' AND lost = '' GROUP BY r.host
HAVING bit_or(retained) & ~bit_and(retained | unmeasured) <> 0 OR bit_or(faults) & ~bit_and(faults | unmeasured) <> 0
ORDER BY r.host""",
    ),
    "findings": (
        "findings that are open, bit by bit, and since which night without a break",
        """
WITH suspect AS (SELECT DISTINCT host, kind FROM runs WHERE night = $after AND status IN ('fail', 'error')),
theirs AS (SELECT r.* FROM runs r JOIN suspect USING (host, kind) WHERE lost = ''),"""
        + _machines("theirs")
        + """,
masks AS (SELECT host, kind, wrong AS mask FROM machine WHERE night = $after AND wrong <> 0),
bits AS (SELECT m.*, bit, (wrong >> bit::INTEGER) & 1 AS bad, (unmeasured >> bit::INTEGER) & 1 AS unknown
         FROM machine m JOIN masks USING (host, kind), range(64) t(bit) WHERE (mask >> bit::INTEGER) & 1 = 1),
open AS (SELECT host, kind, bit FROM bits WHERE night = $after AND bad = 1),
since AS (
  SELECT o.host, o.kind, o.bit,
         min(b.night) FILTER (bad = 1 AND b.night > coalesce(fine, '')) AS since
  FROM open o JOIN bits b USING (host, kind, bit)
  LEFT JOIN (SELECT host, kind, bit, max(night) AS fine FROM bits WHERE bad = 0 AND unknown = 0 GROUP BY ALL) f
    USING (host, kind, bit)
  GROUP BY o.host, o.kind, o.bit),
whole AS (SELECT host, kind, findings FROM machine WHERE night = $after AND status IN ('fail', 'error') AND wrong = 0),
without AS (SELECT w.host, w.kind, max(m.night) AS fine FROM whole w JOIN machine m USING (host, kind)
            WHERE m.findings <> w.findings AND m.night < $after GROUP BY ALL)
SELECT s.host, s.kind, s.since, list(s.bit ORDER BY s.bit) AS bits, any_value(m.findings) AS findings
FROM since s JOIN machine m ON m.host = s.host AND m.kind = s.kind AND m.night = $after GROUP BY s.host, s.kind, s.since
UNION ALL
SELECT w.host, w.kind, min(m.night), [], w.findings FROM whole w
  JOIN machine m ON m.host = w.host AND m.kind = w.kind AND m.findings = w.findings
  LEFT JOIN without f ON f.host = w.host AND f.kind = w.kind
WHERE m.night > coalesce(f.fine, '') GROUP BY w.host, w.kind, w.findings
ORDER BY ALL""",
    ),
    "machine": (
        "one machine's life: every night on which something about it is new",
        "WITH"
        + _machines()
        + """
SELECT night, kind, printf('0x%x', retained) AS retained, printf('0x%x', faults) AS faults, status, microcode, kernel,
       bios, explained, lost
FROM machine WHERE host = $host
WINDOW w AS (PARTITION BY kind ORDER BY night)
QUALIFY row_number() OVER w = 1 OR (machine.retained, machine.faults, status, microcode, kernel, bios, explained, lost)
     IS DISTINCT FROM lag((machine.retained, machine.faults, status, microcode, kernel, bios, explained, lost)) OVER w
ORDER BY night, kind""",
    ),
}
# What no row means; a lab reads it every morning.
NOTHING = {
    "changes": "nothing changed from {before} to {after}",
    "missing": "no machine is missing on {after}, and none was lost",
    "flips": "no bit flipped from {first} to {after}",
    "differ": "no machine's CPUs differ on {after}",
    "findings": "no findings are open on {after}",
    "machine": "no record of {host!r} up to {after}",
    "sql": "no rows",
}


@dataclass(frozen=True)
class Answer:
    """A table: names of the columns, and rows; nothing is what to say if there are no rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    nothing: str


def cpus_of(store: Path) -> dict[str, str]:
    """Return each machine's CPU as last seen, such as "GenuineIntel 06-6a-06 ucode 0xd0003f5"; nothing of an empty
    store."""
    if not nights_of(store):
        return {}
    told = "vendor || printf(' %02x-%02x-%02x ucode ', family, model, stepping) || microcode"
    sql = f"SELECT host, arg_max({told}, night || started) FROM runs WHERE vendor <> '' GROUP BY host"
    return {str(host): str(cpu) for host, cpu in ask(store, "sql", sql=sql).rows}


def ask(
    store: Path,
    question: str,
    *,
    before: str = "",
    after: str = "",
    host: str = "",
    sql: str = "",
    connection: duckdb.DuckDBPyConnection | None = None,
) -> Answer:
    """Ask one of QUESTIONS, or SQL of one's own over the view runs; before and after are nights (the last two);
    connection is one of connect(), where several are asked.

    Raise RecordError for a store without such nights, UsageError for SQL that is none, RequirementMissing without
    DuckDB.
    """
    connection = connection or connect()
    there = nights_of(store)
    if not there:
        raise RecordError(f"no night in {store.absolute()}", "sweep, or ingest DIR, puts one there; --store DIR")
    after = after or there[-1]
    before = before or next((night for night in reversed(there) if night < after), "")
    if question == "changes" and not before:
        raise RecordError(f"no night before {after} in {store}", "changes are between two nights")
    for night in (before, after):
        if night and night not in there:
            raise RecordError(f"no night {night} in {store}", f"the oldest is {there[0]}, the newest {there[-1]}")
    wanted = [before, after] if question == "changes" else [night for night in there if night <= after]
    # a path is a pattern to DuckDB
    paths = [re.sub(r"[*?\[]", r"[\g<0>]", str(store / f"{night}.parquet")).replace("'", "''") for night in wanted]
    files = ", ".join(f"'{path}'" for path in paths)
    connection.execute(f"CREATE OR REPLACE VIEW runs AS SELECT * FROM read_parquet([{files}], union_by_name = true)")
    import duckdb

    try:
        if question == "sql":
            found = connection.execute(sql)
        else:
            text = QUESTIONS[question][1]
            given = {"before": before, "after": after, "host": host}
            found = connection.execute(text, {name: value for name, value in given.items() if f"${name}" in text})
    except duckdb.Error as error:
        if question != "sql":
            raise
        raise UsageError(f"DuckDB: {str(error).splitlines()[0]}", "the view runs has the columns of README") from error
    columns = tuple(column[0] for column in found.description or ())
    nothing = NOTHING[question].format(before=before, after=after, first=there[0], host=host)
    rows = found.fetchall()
    if question == "findings":  # as bits are written everywhere: 0-6,8
        at = columns.index("bits")
        rows = [(*row[:at], format_list(row[at]), *row[at + 1 :]) for row in rows]
    return Answer(columns, tuple(tuple(row) for row in rows), nothing)


def night(store: Path, date: str = "", before: str = "") -> Night:
    """Return what a lab looks at in the morning: a night (the last one) against the one before it, if there is one.

    Raise as ask().
    """
    there = nights_of(store)
    date = date or (there[-1] if there else "")
    before = before or next((one for one in reversed(there) if one < date), "")
    if date and not NIGHT.match(date):
        raise RecordError(f"{date[:20]!r} is no date", "such as 2026-11-25")
    answers = partial(ask, store, after=date, connection=connect())
    count = "count(DISTINCT host), count(DISTINCT host || sha256) FILTER (sha256 <> '')"
    machines, records = answers("sql", sql=f"SELECT {count} FROM runs WHERE night = '{date}'").rows[0]
    lost = _lost(answers, date)
    known = _lost(answers, before) if before else []
    first = f"SELECT host FROM runs GROUP BY host HAVING min(night) = '{date}' ORDER BY 1"
    missing = [(str(row[0]), str(row[2])) for row in answers("missing").rows if row[1] == "not seen"]
    changes: list[Change] = []
    if before:
        answer = answers("changes", before=before)
        found = [dict(zip(answer.columns, row)) for row in answer.rows]
        changes = grouped(
            [
                (str(one["host"]), str(one["kind"]), _told(one))
                for one in found
                if not one["lost"] or one["lost"] == "is back"
            ]
        )
    findings = answers("findings")
    return Night(
        date=date,
        before=before,
        machines=int(machines),
        records=int(records),
        changes=tuple(changes),
        lost=tuple(one for one in lost if not is_no_news(one, known)),
        still=tuple(one for one in lost if is_no_news(one, known)),
        missing=tuple(one for one in missing if one[1] >= before),
        absent=tuple(one for one in missing if one[1] < before),
        new=tuple(str(row[0]) for row in answers("sql", sql=first).rows) if before else (),
        findings=tuple(
            (str(host), str(kind), str(since), f"bits {bits}: {told}" if bits else str(told))
            for host, kind, since, bits, told in findings.rows
        ),
    )


def _lost(answers: Callable[..., Answer], date: str) -> list[tuple[str, str]]:
    """Return what is known of each machine that was lost, and its name."""
    sql = f"SELECT lost, host FROM runs WHERE night = '{date}' AND lost <> '' ORDER BY ALL"
    return [(str(why), str(host)) for why, host in answers("sql", sql=sql).rows]


def _told(change: dict[str, Any]) -> tuple[str, ...]:
    """Say one row of changes: bits first, then what came with it."""
    bits = [
        ("kept_now", "keeps bits {} now"),
        ("no_longer_kept", "no longer keeps bits {}"),
        ("faults_now", "#GP on bits {} now"),
        ("no_longer_faults", "no #GP any more on bits {}"),
    ]
    told = [text.format(SPEC_CTRL.brief(int(change[name], 16))) for name, text in bits if int(change[name], 16)]
    told += [
        f"{name}: {change[name]}" for name in ("status", "explained", "microcode", "kernel", "bios") if change[name]
    ]
    told += ["it was lost, and is back"] if change["lost"] == "is back" else []
    return tuple(told or ["the same bits are judged otherwise"])
