# SPDX-License-Identifier: MIT
"""A series under review, and records of its kernels: what b4's review check protocol wants to hear. Pure.

b4 gives a command the cover letter, or a patch, on standard input and reads a JSON array of objects with tool, status
(pass, warn, fail), summary and details. It keeps them by message and tool, so that there is one object or none; none
is not kept. Source: b4 0.16.0, b4/review/checks.py, b4/review_tui/_common.py; docs/maintainer/review.rst.
"""

from __future__ import annotations

import email.errors
import email.header
import email.message
import email.parser
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UnsetType

from probe import kvm_record
from probe import record as rec
from probe.cases import TOLD_BY_BITS, TOLD_BY_RESTORE, Status, report_of
from probe.diff.moved import AnyRecord, Comparison, kind_of
from probe.diff.sets import Sets, compare_sets
from probe.errors import RecordError
from probe.masks import parse_list, told_bits
from probe.report import diff_sets_text, diff_text
from probe.report.layout import clean, fields, joined, paragraph
from probe.report.layout import field as labelled
from probe.report.mail import commit_of, not_hardware, place

TOOL = "spec-ctrl-probe"
TOOL_OF_PATCH = "spec-ctrl-probe patch"  # b4 keeps one answer for each message and tool
LARGEST_MESSAGE = 32 << 20
LARGEST_TRACKING = 32 << 20
LARGEST_DETAILS = 16 << 10
LONGEST_SUMMARY = 160
_LONGEST_LINE = 1024  # a line with a path in it
_MOST_PATHS = 10_000
_MOST_NAMED = 6


# --- what b4 gives ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """What a cover letter or patch says of itself.

    number is n of [PATCH n/m], 0 of a cover letter, 1 if there is none; base the commit of its base-commit line, or "";
    prerequisites how many patches it says it needs between that commit and itself; paths the files it touches, of its
    diffs and diffstat, the latter perhaps with the front cut off (.../kvm/x86.c).
    """

    subject: str
    number: int = 1
    base: str = ""
    prerequisites: int = 0
    paths: tuple[str, ...] = ()


def read_message(raw: bytes) -> Message:
    """Read a mail; raise RecordError if it is none, or too large to be one."""
    if len(raw) > LARGEST_MESSAGE:
        raise RecordError(
            f"the message on standard input is larger than {LARGEST_MESSAGE >> 20} MiB", "give one patch, or the cover"
        )
    try:
        mail = email.parser.BytesParser().parsebytes(raw)
        subject = _decoded(mail["Subject"])
        text = "\n".join(_texts(mail))
    except (RecursionError, ValueError, LookupError, email.errors.MessageError) as error:
        raise RecordError("standard input is no mail that can be read", "give the cover letter, or a patch") from error
    if not subject:
        raise RecordError("standard input is no mail: it has no Subject", "give the cover letter, or a patch")
    prefix = re.match(r"(?:\[[^\]]{0,200}\]\s{0,8}){1,8}", subject)
    counted = re.search(r"(\d{1,4})/\d{1,4}", prefix[0]) if prefix else None
    bases = re.findall(r"^base-commit: ([0-9a-f]{7,64})\s*$", text, re.MULTILINE)
    return Message(
        subject,
        int(counted[1]) if counted else 1,
        bases[-1] if bases else "",
        len(re.findall(r"^prerequisite-patch-id: [0-9a-f]", text, re.MULTILINE)),
        tuple(dict.fromkeys(_paths(text))),
    )


def _decoded(value: object) -> str:
    """Return a header's text on one line, whatever it says of its own character set; "" if there is none."""
    if value is None:
        return ""
    parts = []
    for part, charset in email.header.decode_header(str(value)):
        if isinstance(part, str):
            parts.append(part)
            continue
        try:
            parts.append(part.decode(charset or "utf-8", "replace"))
        except LookupError:
            parts.append(part.decode("latin-1"))
    return " ".join("".join(parts).split())


def _texts(mail: email.message.Message) -> Iterable[str]:
    """Yield the text of every part that is one."""
    for part in mail.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                yield payload.decode("utf-8", "replace")


def _paths(text: str) -> Iterable[str]:
    """Yield the files that diffs and a diffstat name, at most _MOST_PATHS of them."""
    count = 0
    for line in text.split("\n"):
        found: list[str] = []
        if len(line) > _LONGEST_LINE:
            continue
        if line.startswith(("+++ b/", "--- a/")):
            found = [line[6:].rstrip()]
        elif line.startswith(" ") and "|" in line:
            name, _, rest = line.strip().partition("|")
            if re.match(r"\s*(?:\d+|Bin)\b", rest):
                found = _renamed(name.strip())
        for path in found:
            count += 1
            if count > _MOST_PATHS:
                return
            yield path


def _renamed(name: str) -> list[str]:
    """Return both names of what a diffstat says was renamed: a/{b => c}/d, or a => b."""
    found = re.fullmatch(r"([^{}]*)\{([^{}]*) => ([^{}]*)\}([^{}]*)", name)
    if found:
        front, old, new, rest = found.groups()
        return [f"{front}{part}{rest}".replace("//", "/") for part in (old, new)]
    return name.split(" => ")


@dataclass(frozen=True)
class Tracking:
    """What b4 knows of a series that is checked out for review: the file that B4_TRACKING_FILE names.

    base is the commit below it, first that of its first patch, change_id the name of its branch below b4/review/,
    patches how many it has (0: not said), tips (branch, commit) of branches that took it, the newest last. complaint
    says why nothing could be read, if so.
    """

    base: str = ""
    first: str = ""
    change_id: str = ""
    patches: int = 0
    tips: tuple[tuple[str, str], ...] = ()
    complaint: str = ""


def read_tracking(raw: bytes) -> Tracking:
    """Read b4's tracking file; what is not as it should be counts as not said."""
    if len(raw) > LARGEST_TRACKING:
        return Tracking(complaint=f"b4's tracking file is larger than {LARGEST_TRACKING >> 20} MiB")
    try:
        series = _object(_object(msgspec.json.decode(raw)).get("series"))
    except (msgspec.DecodeError, RecursionError, ValueError):
        return Tracking(complaint="b4's tracking file is not JSON")
    if not series:
        return Tracking(complaint="b4's tracking file tells of no series")
    tips = [_object(tip) for tip in _array(series.get("branch-tips"))]
    expected = series.get("expected")
    change_id = series.get("change-id")
    return Tracking(
        _commit(series.get("base-commit")),
        _commit(series.get("first-patch-commit")),
        change_id if isinstance(change_id, str) and _REF.fullmatch(change_id) and ".." not in change_id else "",
        expected if isinstance(expected, int) and 0 < expected < _MOST_PATHS else 0,
        tuple((str(tip.get("branch", "")), _commit(tip.get("sha"))) for tip in tips if _commit(tip.get("sha"))),
    )


_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,200}")
_FULL = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ABBREVIATED = re.compile(r"[0-9a-f]{7,64}")


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _array(value: object) -> list[Any]:
    return value[-_MOST_PATHS:] if isinstance(value, list) else []


def _commit(value: object) -> str:
    return value if isinstance(value, str) and _FULL.fullmatch(value) else ""


# --- which kernels ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """The commits of a series, as far as they are known.

    base is the commit or kernel release below it, commits those of its patches in their order, whole whether the last
    of them is the last patch's; tips (branch, commit) of branches that took it; paths what it touches; trees the tree
    of commits and tags, by which two commits with the same sources are one kernel.
    """

    base: str = ""
    commits: tuple[str, ...] = ()
    whole: bool = True
    tips: tuple[tuple[str, str], ...] = ()
    paths: tuple[str, ...] = ()
    trees: Mapping[str, str] = field(default_factory=dict)


def named_by(release: str) -> str:
    """Return what a kernel's release names in git: an abbreviated commit, the tag of a release, or "".

    A release such as 6.19.0-rc1 is that of the tag v6.19-rc1: with anything on top it ends in "+" or in a commit
    (scripts/setlocalversion). Of a kernel with changes that are in no commit (-dirty) nothing is returned.
    """
    commit, _, dirty = commit_of(release).partition(",")
    if commit or dirty:
        return "" if dirty else commit
    found = re.fullmatch(r"(\d{1,3}\.\d{1,3})(?:\.0(-rc\d{1,3})|\.0|(\.\d{1,4}))", release)
    return f"v{found[1]}{found[2] or found[3] or ''}" if found else ""


def is_commit(text: str) -> bool:
    """Tell whether a text can be a commit, of at least 7 digits."""
    return bool(_ABBREVIATED.fullmatch(text))


def is_tag(text: str) -> bool:
    """Tell whether a text is the tag of a kernel release."""
    return bool(re.fullmatch(r"v\d{1,3}\.\d{1,3}(?:-rc\d{1,3}|\.\d{1,4})?", text))


def _is_kernel(release: str, wanted: str, trees: Mapping[str, str]) -> bool:
    """Tell whether a kernel is that of a commit, or of a release."""
    name = named_by(release)
    if not wanted or wanted in (release, name):
        return bool(wanted)
    if is_commit(name) and is_commit(wanted) and (wanted.startswith(name) or name.startswith(wanted)):
        return True
    return bool(name) and name in trees and trees[name] == trees.get(wanted)


# --- which series ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bearing:
    """A file, or a folder with a slash at its end, on which the answers to MSR 0x48 depend, and why.

    Paths and functions as in linux v7.1.
    """

    path: str
    why: str


BEARING = (
    Bearing("arch/x86/kvm/", "KVM on x86"),
    Bearing("arch/x86/include/asm/kvm_host.h", "KVM on x86"),
    Bearing("arch/x86/include/asm/spec-ctrl.h", "how KVM and the kernel share the register"),
    Bearing("arch/x86/include/asm/nospec-branch.h", "the host's own value of the register"),
    Bearing("arch/x86/include/asm/msr-index.h", "the register's bits"),
    Bearing("arch/x86/include/asm/cpufeatures.h", "the CPUID bits that enumerate it"),
    Bearing("arch/x86/kernel/cpu/bugs.c", "the host's own value of the register"),
    Bearing("arch/x86/kernel/cpu/common.c", "the CPUID bits that enumerate it, init_speculation_control()"),
    Bearing("arch/x86/kernel/cpu/intel.c", "microcode with which it is not used, bad_spectre_microcode()"),
    Bearing("arch/x86/kernel/cpu/scattered.c", "the CPUID bits of leaf 7, subleaf 2"),
    Bearing("arch/x86/kernel/process.c", "a task's value of the register"),
    Bearing("arch/x86/kernel/msr.c", "the msr driver"),
)
# Shadow and nested page tables: no guest's access to an MSR comes there.
BEARS_NOT = ("arch/x86/kvm/mmu/",)


def bearing(paths: Iterable[str]) -> list[tuple[str, str]]:
    """Return (path, why) of the files that bear on the register; a path may have its front cut off (.../kvm/x86.c)."""
    found = []
    for path in paths:
        if any(_below(path, one) for one in BEARS_NOT):
            continue
        why = next((one.why for one in BEARING if _below(path, one.path)), "")
        if why:
            found.append((path, why))
    return found


def _below(path: str, row: str) -> bool:
    if not path.startswith(".../"):
        return path.startswith(row) if row.endswith("/") else path == row
    rest = path[len(".../") :]
    words = row.split("/")
    ends = ["/".join(words[at:]) for at in range(len(words) - 2)]  # two folders, or one and a file
    return any(rest.startswith(end) if end.endswith("/") else rest == end for end in ends)


# --- the answer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A record as a file: its name, what is in it, and the SHA-256 of its bytes."""

    name: str
    record: AnyRecord
    sha256: str


@dataclass(frozen=True)
class Shelf:
    """The records that there are: where, which, and (name, why) of files that are none."""

    folder: str
    files: tuple[File, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


def check(
    message: Message, series: Series, shelf: Shelf, *, per_patch: bool = False, notes: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Return what b4 is to be told: a list of one object, or of none.

    Of a series: the records of its base against those of its last commit that has some. With per_patch, of the
    message's own patch: those of the commit before it that has some, against those of its own. notes end the details.
    """
    measured = [one for one in shelf.files if _measured(one.record)]
    commits = list(series.commits)
    if per_patch:
        commits = commits[: message.number] if 0 < message.number <= len(commits) else []
    at, after = _last_with_records(commits[-1:] if per_patch else commits, measured, series)
    at = len(commits) if per_patch else at
    tip = ""
    if not after and not per_patch:
        for branch, commit in reversed(series.tips):
            after = _of(measured, commit, series)
            if after:
                tip = branch or commit[:12]
                break
    relevant = bearing(dict.fromkeys((*series.paths, *message.paths)))
    if not after and (per_patch or not relevant):
        return []
    below = (series.base, *commits[: at - 1]) if per_patch else (series.base,)
    since, before = _last_with_records(below, measured, series)
    ending = _ending(shelf, [*_about_base(message, series), *notes], per_patch)
    if not after:
        entry = _nothing(series, shelf, relevant, before)
    else:
        named = _Kernels(_word(below[since - 1] if since else series.base), after[0].record.kernel.release, [])
        if tip:
            named.doubts.append(f"compared is the tip of {clean(tip)}, which took the series and may have more in it")
        elif not per_patch and (at < len(commits) or not series.whole):
            named.doubts.append(
                f"compared is patch {at}{f' of {len(commits)}' if series.whole else ''}: the last has no record"
            )
        elif per_patch and since and since < len(below):
            named.doubts.append(f"the patch before it has no record: patches {since} to {at} are compared together")
        entry = _compared(before, after, named) if before else _alone(after, named, shelf)
    status, summary, lines = entry
    return [
        {
            "tool": TOOL_OF_PATCH if per_patch else TOOL,
            "status": status,
            "summary": _short(summary),
            "details": _bounded([*lines, *ending]),
        }
    ]


@dataclass(frozen=True)
class _Kernels:
    """What is compared, in words, and what makes that less than it should be."""

    base: str
    release: str
    doubts: list[str]


_Entry = tuple[str, str, list[str]]


def _last_with_records(commits: Sequence[str], files: Sequence[File], series: Series) -> tuple[int, list[File]]:
    """Return the last of some commits that has records, as its number from 1, and them; (0, []) if none has."""
    for number in range(len(commits), 0, -1):
        found = _of(files, commits[number - 1], series)
        if found:
            return number, found
    return 0, []


def _of(files: Sequence[File], wanted: str, series: Series) -> list[File]:
    return [one for one in files if _is_kernel(one.record.kernel.release, wanted, series.trees)]


def _measured(record: AnyRecord) -> bool:
    """Tell whether anything was written: a plan says nothing of a kernel."""
    return not isinstance(record, rec.Record) or (not isinstance(record.walk, UnsetType) and bool(record.observations))


def _word(kernel: str) -> str:
    return f"commit {kernel[:12]}" if is_commit(kernel) else clean(kernel)


def _nothing(series: Series, shelf: Shelf, relevant: Sequence[tuple[str, str]], before: Sequence[File]) -> _Entry:
    """Say that a series that bears on the register has no record, and how to make one."""
    if series.commits or series.tips:
        summary = "no record of this series' kernel"
        tip = series.commits[-1] if series.commits else series.tips[-1][1]
        wanted = [_word(tip) + (": the last patch" if series.commits and series.whole else "")]
    else:
        summary = "no record of this series' kernel: its commits are not known"
        wanted = ["check the series out for review in b4, or give --tip"]
    lines = [*paragraph(summary), ""]
    lines += fields("touches", [f"{path}: {why}" for path, why in relevant[:_MOST_NAMED]])
    if len(relevant) > _MOST_NAMED:
        lines += labelled("", f"and {len(relevant) - _MOST_NAMED} more")
    lines += fields("wanted", wanted)
    if not before:
        lines += labelled("", f"{_word(series.base)}: the base" if series.base else "the base: it names none (--base)")
    kernels = list(dict.fromkeys(one.record.kernel.release for one in shelf.files))
    more = f" and {len(kernels) - _MOST_NAMED} more" if len(kernels) > _MOST_NAMED else ""
    told = f"of {', '.join(kernels[:_MOST_NAMED])}{more}" if kernels else "none"
    lines += labelled("there are", f"{len(shelf.files)} records {told}" if kernels else "no records")
    return "warn", summary, [*lines, "", *_how(shelf)]


def _how(shelf: Shelf) -> list[str]:
    """Return the command that makes records, on a line of its own."""
    folder = shlex.quote(shelf.folder)
    return [
        *paragraph("Build with CONFIG_LOCALVERSION_AUTO=y, so that the release names the commit; then:"),
        f"  spec-ctrl-probe boot --kernels BASE/vmlinuz,PATCHED/vmlinuz --record-dir {folder} -- kvm",
    ]


def _alone(after: Sequence[File], kernels: _Kernels, shelf: Shelf) -> _Entry:
    """Judge the records of the series by themselves: those of its base are not there."""
    found = [(one, text) for one in after for text in _findings(one.record).values()]
    nothing = "nothing was compared, no record of the base"
    lines = [*_files("records", after), ""]
    lines += fields("findings", [f"{text} ({one.name})" for one, text in found] or ["none"])
    lines += fields("", kernels.doubts)
    lines += ["", *paragraph(f"{nothing}{f', {kernels.base}' if kernels.base else ''}"), *_how(shelf)]
    if found:
        return "fail", f"{nothing}; {_count(len(found), 'finding')}: {found[0][1]}", lines
    return ("warn" if kernels.doubts else "pass"), f"{nothing}; no findings", lines


def _compared(before: Sequence[File], after: Sequence[File], kernels: _Kernels) -> _Entry:
    """Compare the records of two kernels."""
    if {one.sha256 for one in before} & {one.sha256 for one in after}:
        lines = [*_files("records", after), "", *paragraph("they are of the base and of the series at once")]
        return "warn", "nothing was compared: base and series are one kernel", lines
    sets = compare_sets(*([(one.name, one.record) for one in side] for side in (before, after)))
    if not sets.pairs:
        lines = [*_files("before", before), *_files("after", after), ""]
        lines += paragraph("no two of them are of one machine, CPUID given and policy")
        return "warn", "nothing to compare: base and series were measured on different machines, or differently", lines
    files = [{one.name: one for one in side} for side in (before, after)]
    new, old = _new_findings(sets, files[0], files[1])
    doubts = list(kernels.doubts)
    if any(key[0] == _UNANSWERED for one in (*before, *after) for key in _findings(one.record)):
        doubts.append("there are bits without an answer")
    unmatched = len(sets.only_before) + len(sets.only_after)
    if unmatched:
        doubts.append(f"{_count(unmatched, 'record')} without a counterpart")
    lines = [*fields("findings", new), *fields("both have", old), *fields("note", doubts), ""]
    differing = [pair.comparison for pair in sets.pairs if not pair.comparison.same]
    of_pairs = [(_text_file(files[0][pair.before]), _text_file(files[1][pair.after])) for pair in sets.pairs]
    lines += diff_sets_text.render(sets, kernels.base, kernels.release, of_pairs).splitlines()
    for pair in sets.pairs:
        if pair.comparison.same:
            lines += ["", *paragraph(f"{pair.name}: nothing moved")]
            lines += [*_files("before", [files[0][pair.before]]), *_files("after", [files[1][pair.after]])]
            lines += fields("", not_hardware(files[1][pair.after].record))
            around = [one for one in pair.comparison.conditions if one.what != "kernel"]
            lines += fields("differs", [f"{one.what}: {one.before} -> {one.after}" for one in around])
    if new:
        return "fail", f"{_count(len(new), 'finding')} that the base does not have: {new[0]}", lines
    if differing:
        return "warn", _first_moved(differing), lines
    summary = f"nothing moved: {_extent([files[1][pair.after].record for pair in sets.pairs])}"
    return ("warn", f"{summary}; {doubts[0]}", lines) if doubts else ("pass", summary, lines)


def _new_findings(sets: Sets, before: Mapping[str, File], after: Mapping[str, File]) -> tuple[list[str], list[str]]:
    """Return what the patched kernel's records found and the base's did not, and what both did.

    A register that was not put back is always new.
    """
    counterpart = {pair.after: pair.before for pair in sets.pairs}
    new: list[str] = []
    old: list[str] = []
    for name, file in after.items():
        known = set(_findings(before[counterpart[name]].record)) if name in counterpart else set()
        for key, text in _findings(file.record).items():
            (old if key in known and key[0] != "restore" else new).append(text)
    return list(dict.fromkeys(new)), list(dict.fromkeys(old))


_UNANSWERED = "incomplete"  # the kind of a finding: bits that were to be tried have no answer
# Suites of a run that are told by the bits, and by each finding: so that the same on other CPUs is new.
_TOLD_ONE_BY_ONE = ("cpus", "findings")


def _findings(record: AnyRecord) -> dict[tuple[str, str], str]:
    """Return the findings of a record by what they are called; that a register was not put back is ("restore", ...)."""
    if isinstance(record, kvm_record.KvmRecord):
        found = {("kvm", "policy"): "; ".join(kvm_record.complaints(record))}
        found["kvm", "driver"] = ""
        if kvm_record.driver_differs(record):
            bits = told_bits(kvm_record.driver_differs(record))
            found["kvm", "driver"] = f"the msr driver is unlike KVM_SET_MSRS on {bits}"
        own = not isinstance(record.policy, UnsetType)
        explained = kvm_record.as_predicted(record) if own else bool(record.explained_by)
        found["kvm", "explained"] = (
            "" if explained else f"{'its policy does not explain' if own else 'no model explains'} every case"
        )
        for one in record.explored:
            found["programs", one.model] = f"{one.model}: {one.divergence}" if one.divergence else ""
        return {key: text for key, text in found.items() if text}
    found = {
        (suite.name, f"{case.name} {case.reason}" if suite.name == "bits" else case.name): f"{case.name}: {case.reason}"
        for suite in report_of(record).suites
        for case in suite.cases
        if case.status in (Status.FAIL, Status.ERROR) and suite.name not in _TOLD_ONE_BY_ONE
    }
    for entry in record.findings if isinstance(record, rec.Record) else ():
        if entry.kind not in (*TOLD_BY_BITS, *TOLD_BY_RESTORE):
            text = entry.text if entry.kind == _UNANSWERED else f"{entry.kind}, CPUs {entry.cpus}: {entry.text}"
            found[entry.kind, f"{entry.cpus} {entry.mask}"] = text
    return found


def _first_moved(differing: Sequence[Comparison]) -> str:
    """Say in one line what moved first, and how much more did."""
    count = sum(len(one.moved) + bool(one.only_before) + bool(one.only_after) for one in differing)
    moved = next((one for comparison in differing for one in comparison.moved), None)
    if moved is None:
        return "not the same CPUs or guest CPUIDs were measured"
    more = f", and {_count(count - 1, 'change')} more" if count > 1 else ""
    return f"moved: {moved.told}{more}"


def _extent(records: Sequence[AnyRecord]) -> str:
    """Say how much was compared."""
    told = []
    profiles = {
        name for one in records if isinstance(one, kvm_record.KvmRecord) for row in one.rows for name in row.profiles
    }
    if profiles:
        told.append(f"{len(profiles)} guest CPUIDs x 64 bits")
    runs = [one for one in records if isinstance(one, rec.Record)]
    if runs:
        cpus = sum(len(parse_list(entry.cpus)) for one in runs for entry in one.observations)
        told.append(_count(cpus, "CPU"))
    moves = sum(len(one.arrivals) for one in records if not isinstance(one, (rec.Record, kvm_record.KvmRecord)))
    if moves:
        told.append(_count(moves, "move"))
    machines = {(one.identity, one.machine.vendor, one.machine.signature, one.machine.hypervisor) for one in records}
    return ", ".join([*told, _count(len(records), "pair") + " of records", _count(len(machines), "machine")])


def _about_base(message: Message, series: Series) -> list[str]:
    if message.prerequisites and series.base == message.base:
        return [f"the series needs {message.prerequisites} more patches on its base: what those do is compared, too"]
    return []


def _ending(shelf: Shelf, notes: Sequence[str], per_patch: bool) -> list[str]:
    """Return the last lines: what could not be used, and that b4 keeps the answer."""
    left = [f"{name}: {why}" for name, why in shelf.left_out]
    for one in shelf.files:
        release = one.record.kernel.release
        if "," in commit_of(release):
            left.append(f"{one.name}: {release} has changes that are in no commit")
        elif not _measured(one.record):
            left.append(f"{one.name}: a plan, nothing was written")
    more = [f"and {len(left) - _MOST_NAMED} more"] if len(left) > _MOST_NAMED else []
    lines = fields("left out", [*left[:_MOST_NAMED], *more]) if left else []
    lines += fields("note", notes)
    key = "" if per_patch else " (R in the list of checks asks again)"
    return ["", *lines, *paragraph(f"b4 keeps this answer by message{key}.")]


def _files(label: str, files: Sequence[File]) -> list[str]:
    lines: list[str] = []
    for one in files[:_MOST_NAMED]:
        lines += labelled("" if lines else label, f"{one.name}, {kind_of(one.record)}, {one.record.kernel.release}")
        lines += labelled("", f"SHA-256 {one.sha256}")
    return lines + (labelled("", f"and {len(files) - _MOST_NAMED} more") if len(files) > _MOST_NAMED else [])


def _text_file(one: File) -> diff_text.File:
    return diff_text.File(one.name, one.sha256, tuple(place(one.record)))


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _short(text: str) -> str:
    """Return one line without control characters."""
    text = " ".join(clean(" ".join(text.split())).split())
    return text if len(text) <= LONGEST_SUMMARY else text[: LONGEST_SUMMARY - 4].rstrip() + " ..."


def _bounded(lines: Sequence[str]) -> str:
    """Join lines into at most LARGEST_DETAILS bytes, whole lines only, without control characters."""
    # A command stays on one line, to be copied.
    whole = "".join(
        clean(line).rstrip()[:_LONGEST_LINE] + "\n" if line.startswith("  spec-ctrl-probe ") else joined([line])
        for line in lines
    )
    whole = re.sub(r"\n{3,}", "\n\n", whole).strip("\n")
    if len(whole.encode("utf-8")) <= LARGEST_DETAILS:
        return whole
    ending = "\n... the rest: spec-ctrl-probe diff"
    size, kept = len(ending), []
    for line in whole.split("\n"):
        size += len(line.encode("utf-8")) + 1
        if size > LARGEST_DETAILS:
            break
        kept.append(line)
    return "\n".join(kept) + ending
