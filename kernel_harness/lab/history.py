# SPDX-License-Identifier: MIT
"""Questions to the nights: what changed, what flips a bit, a machine's life, who is missing. DuckDB over Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_harness.lab.nights import connect, nights_of
from probe.errors import RecordError, UsageError


def _machines(source: str = "runs") -> str:
    """Return CTEs that give a machine as one row a night: masks of all its CPUs; of several runs the newest counts."""
    return f"""
newest AS (SELECT night, host, kind, max(started) AS started FROM {source} WHERE kind IN ('run', 'kvm') GROUP BY ALL),
machine AS (
  SELECT r.night, r.host, r.kind, bit_and(r.accepts) AS accepts, bit_and(r.retained) AS retained,
         bit_or(r.faults) AS faults, bit_or(r.unmeasured) AS unmeasured, bit_or(r.wrong) AS wrong,
         min(r.status) AS status, min(r.microcode) AS microcode, min(r.bios) AS bios, min(r.kernel) AS kernel,
         min(r.explained) AS explained, max(r.lost) AS lost, any_value(r.vendor) AS vendor,
         any_value(r.family) AS family, any_value(r.model) AS model, any_value(r.stepping) AS stepping
  FROM {source} r JOIN newest n ON r.night = n.night AND r.host = n.host AND r.kind = n.kind AND r.started = n.started
  GROUP BY r.night, r.host, r.kind)"""


QUESTIONS: dict[str, tuple[str, str]] = {
    "changes": (
        "what is not as it was between two nights, on machines that both have",
        "WITH"
        + _machines()
        + """
SELECT a.host, a.kind, printf('0x%x', xor(a.retained, b.retained)) AS retained_differs,
       printf('0x%x', xor(a.faults, b.faults)) AS faults_differ, a.status || ' -> ' || b.status AS status,
       CASE WHEN a.explained <> b.explained THEN a.explained || ' -> ' || b.explained ELSE '' END AS explained,
       CASE WHEN a.microcode <> b.microcode THEN a.microcode || ' -> ' || b.microcode ELSE '' END AS microcode,
       CASE WHEN a.kernel <> b.kernel THEN a.kernel || ' -> ' || b.kernel ELSE '' END AS kernel,
       CASE WHEN a.bios <> b.bios THEN a.bios || ' -> ' || b.bios ELSE '' END AS bios,
       b.lost AS lost
FROM machine a JOIN machine b USING (host, kind)
WHERE a.night = $before AND b.night = $after
  AND (a.retained <> b.retained OR a.faults <> b.faults OR a.wrong <> b.wrong OR a.status <> b.status
       OR a.explained <> b.explained OR a.lost <> b.lost)
ORDER BY a.host, a.kind""",
    ),
    "missing": (
        "machines of the one night that the other does not have, and machines that were lost",
        """
SELECT host, 'not seen' AS what, max(night) AS last_night FROM runs
WHERE night <= $after AND host NOT IN (SELECT host FROM runs WHERE night = $after) GROUP BY host
UNION ALL SELECT host, 'lost: ' || lost, night FROM runs WHERE night = $after AND lost <> ''
ORDER BY 1""",
    ),
    "flips": (
        "bits that a machine did otherwise than the night before, with the microcode, BIOS, kernel that came with it",
        """
WITH restless AS (SELECT host, kind FROM runs WHERE lost = '' GROUP BY host, kind
                  HAVING min(retained) <> max(retained) OR min(faults) <> max(faults)),
moving AS (SELECT r.* FROM runs r JOIN restless USING (host, kind) WHERE lost = ''),"""
        + _machines("moving")
        + """,
steps AS (
  SELECT *, lag(night) OVER w AS earlier, lag(retained) OVER w AS kept, lag(faults) OVER w AS refused,
         lag(microcode) OVER w AS old_microcode, lag(bios) OVER w AS old_bios, lag(kernel) OVER w AS old_kernel
  FROM machine WINDOW w AS (PARTITION BY host, kind ORDER BY night)),
flips AS (
  SELECT *, CASE WHEN microcode <> old_microcode THEN old_microcode || ' -> ' || microcode ELSE '' END AS m,
         CASE WHEN bios <> old_bios THEN old_bios || ' -> ' || bios ELSE '' END AS b,
         CASE WHEN kernel <> old_kernel THEN old_kernel || ' -> ' || kernel ELSE '' END AS k
  FROM steps WHERE earlier IS NOT NULL AND (kept <> retained OR refused <> faults))
SELECT vendor, printf('%02x-%02x-%02x', family, model, stepping) AS cpu, kind,
       printf('0x%x', retained & ~kept) AS kept_now, printf('0x%x', kept & ~retained) AS no_longer_kept,
       printf('0x%x', faults & ~refused) AS faults_now, printf('0x%x', refused & ~faults) AS no_longer_faults,
       CASE WHEN m || b || k = '' THEN 'nothing that is known' ELSE '' END AS came_with,
       m AS microcode, b AS bios, k AS kernel, count(*) AS times, count(DISTINCT host) AS machines, min(night) AS first
FROM flips GROUP BY ALL ORDER BY machines DESC, first, cpu, kind""",
    ),
    "differ": (
        "machines whose CPUs did not do alike, in the last night",
        """
SELECT host, count(*) AS groups, string_agg(cpus || ': ' || printf('0x%x', retained), '; ') AS retained
FROM runs WHERE night = $after AND kind = 'run' AND lost = '' GROUP BY host, started HAVING count(DISTINCT retained) > 1
ORDER BY host""",
    ),
    "findings": (
        "findings that are open, and since which night without a break",
        """
WITH open AS (SELECT DISTINCT host, kind, findings FROM runs
              WHERE night = $after AND status IN ('fail', 'error') AND lost = ''),
seen AS (SELECT DISTINCT r.host, r.kind, r.findings, r.night FROM runs r JOIN open o
         ON r.host = o.host AND r.kind = o.kind AND r.findings = o.findings),
without AS (SELECT o.host, o.kind, o.findings, max(r.night) AS night FROM open o JOIN runs r
            ON r.host = o.host AND r.kind = o.kind AND r.findings <> o.findings AND r.night < $after GROUP BY ALL)
SELECT s.host, s.kind, min(s.night) AS since, s.findings FROM seen s LEFT JOIN without w
  ON w.host = s.host AND w.kind = s.kind AND w.findings = s.findings
WHERE w.night IS NULL OR s.night > w.night GROUP BY s.host, s.kind, s.findings ORDER BY ALL""",
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


def ask(store: Path, question: str, *, before: str = "", after: str = "", host: str = "", sql: str = "") -> Answer:
    """Ask one of QUESTIONS, or SQL of one's own over the view runs; before and after are nights (the last two).

    Raise RecordError for a store without such nights, UsageError for SQL that is none, RequirementMissing without
    DuckDB.
    """
    connection = connect()
    there = nights_of(store)
    if not there:
        raise RecordError(f"no night in {store}", "spec-ctrl-probe ingest DIR puts one there")
    after = after or there[-1]
    before = before or next((night for night in reversed(there) if night < after), "")
    if question == "changes" and not before:
        raise RecordError(f"no night before {after} in {store}", "changes are between two nights")
    for night in (before, after):
        if night and night not in there:
            raise RecordError(f"no night {night} in {store}", f"the oldest is {there[0]}, the newest {there[-1]}")
    wanted = [before, after] if question == "changes" else [night for night in there if night <= after]
    files = ", ".join("'" + str(store / f"{night}.parquet").replace("'", "''") + "'" for night in wanted)
    connection.execute(f"CREATE VIEW runs AS SELECT * FROM read_parquet([{files}], union_by_name = true)")
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
    return Answer(columns, tuple(tuple(row) for row in found.fetchall()), nothing)
