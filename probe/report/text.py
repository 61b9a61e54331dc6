# SPDX-License-Identifier: MIT
"""A record as plain text of at most 75 columns, ready for a mail."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from probe import record as rec
from probe.entries import cpuid_of_groups
from probe.masks import ALL_BITS, bits_of, format_bits, format_list, hex64, mask_of, parse_hex64, parse_list, told_cpus
from probe.models.prediction import Effect
from probe.outcome import Outcome
from probe.registers import SPEC_CTRL
from probe.report.layout import LABEL, WIDTH, clean, columns, field, fields, joined, paragraph


def render(record: rec.Record) -> str:
    """Return the whole report: findings first, then machine, masks, bits, models and the proof of restore."""
    lines = [*headline(record), "", *findings(record), "", *_machine(record), ""]
    for group in walked_groups(record):
        lines += [*_masks(record, group), "", *bits(record, group), ""]
    if record.walk is UNSET:
        lines += [*_plan(record), ""]
    lines += [*_models(record), "", *_rules(record), *restored(record)]
    if record.notes:
        lines += ["", *fields("notes", record.notes)]
    return joined(lines)


def headline(record: rec.Record) -> list[str]:
    """Return the first line: the register, and the result in a word."""
    title = f"{SPEC_CTRL.name} (MSR {SPEC_CTRL.index:#x})"
    if any(entry.state == "failed" for entry in record.restore):
        word = "NOT PUT BACK"
    elif any(entry.state == "left" for entry in record.restore):
        word = "NOT VERIFIED"
    elif record.walk is UNSET:
        word = "plan only, nothing written"
    elif not measured_anything(record):
        word = "nothing measured"
    elif record.findings:
        word = f"{len(record.findings)} finding" + ("s" if len(record.findings) > 1 else "")
    else:
        word = "as predicted"
    return [f"{title:<40}{word:>{WIDTH - 40}}"]


def measured_anything(record: rec.Record) -> bool:
    """Tell whether at least one bit gave an answer on one CPU; a mere plan counts as answered."""
    return record.walk is UNSET or any(parse_hex64(entry.not_measured) != ALL_BITS for entry in record.verdicts)


def findings(record: rec.Record, most: int | None = None) -> list[str]:
    """Return the findings, numbered, those that must be acted on first; at most so many, and how many are left out."""
    if not record.findings:
        return field("findings", "none in its CPUID; no write was tried" if record.walk is UNSET else "none")
    lines = ["findings"]
    for number, finding in enumerate(record.findings[:most], 1):
        lines += paragraph(f"{finding.kind}, {told_cpus(finding.cpus)}: {finding.text}", f"{number:>3}. ", "     ")
    if most is not None and len(record.findings) > most:
        lines.append(f"     and {len(record.findings) - most} more: in the record")
    return lines


def _machine(record: rec.Record) -> list[str]:
    machine, kernel = record.machine, record.kernel
    where = f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x}"
    lines = field("machine", f"{where} (CPUID.1:EAX {machine.signature}), {told_cpus(machine.online)}")
    if machine.brand:
        lines += field("", machine.brand)
    if record.identity:
        lines += field("", f"called {record.identity}")
    for entry in machine.microcode or [rec.Microcode(cpus="", revision="0x0")]:
        text = f"microcode {entry.revision}" if entry.cpus else "microcode unknown"
        lines += field("", text + (f" on {told_cpus(entry.cpus)}" if len(machine.microcode) > 1 else ""))
    firmware = " ".join(part for part in (machine.bios.vendor, machine.bios.version, machine.bios.date) if part)
    if firmware:
        lines += field("", f"firmware {firmware}")
    if machine.under_hypervisor:
        unnamed = "(unnamed)" if "/dev/cpu/N/cpuid" in record.cpuid.sources else "(its name was not read)"
        lines += field("", f"under hypervisor {machine.hypervisor or unnamed}")
    lines += field("kernel", f"{kernel.release}, lockdown {kernel.lockdown}, {_taint(kernel)}")
    if kernel.cmdline:
        lines += field("", " ".join(kernel.cmdline))
    for name in ("spectre_v2", "spec_store_bypass", "retbleed"):
        if name in kernel.mitigations:
            lines += field("", f"{name}: {kernel.mitigations[name]}")
    guest = record.place.guest
    if guest is not UNSET:
        lines += field(
            "place", f"guest of our own: {guest.kernel} {guest.kernel_version}, {guest.qemu}, {guest.accelerator}"
        )
        if guest.register_model:
            lines += field("", f"its msr driver has a modelled register: {guest.register_model}")
        lines += field("", "what follows is the guest's register, not that of the machine under it")
    elif record.walk is UNSET:
        lines += field("place", "this machine; nothing was written")
    else:
        lines += field("place", "this machine's own msr driver")
    lines += field("", record.place.because)
    lines += field("CPUID", f"read by {' and '.join(record.cpuid.sources)}; cross-check: {record.cpuid.cross_check}")
    if record.predicted_from is not UNSET:
        lines += field("", f"predictions from a recorded CPUID ({record.predicted_from.form}): {predicted_cpu(record)}")
    lines += field(
        "run",
        f"{record.started}, {record.duration:.1f} s, {record.tool.name} {record.tool.version}, "
        f"Python {record.tool.python}",
    )
    if record.tool.arguments:
        lines += field("command", f"{record.tool.name} {shlex.join(record.tool.arguments)}")
    return lines


def predicted_cpu(record: rec.Record) -> str:
    """Name the CPU whose recorded CPUID the predictions were made from; "" if it was this machine's."""
    if record.predicted_from is UNSET:
        return ""
    cpus = cpuid_of_groups(record.predicted_from.groups)
    cpu = cpus[min(cpus)]
    return f"{cpu.vendor} {cpu.family:02x}-{cpu.model:02x}-{cpu.stepping:02x} {cpu.brand}".strip()


def _taint(kernel: rec.Kernel) -> str:
    before, after = kernel.taint_before, kernel.taint_after
    if before is UNSET or after is UNSET:
        return "taint unknown"
    return f"taint {before}" if before == after else f"taint {before} -> {after}"


@dataclass(frozen=True)
class Walked:
    """CPUs that were predicted, observed and judged alike, by the record's judge; saved is what they held first."""

    seen: rec.ObservationEntry
    prediction: rec.PredictionEntry | None
    verdict: rec.VerdictEntry | None
    saved: tuple[rec.Saved, ...]

    @property
    def wrong(self) -> int:
        """Mask of the bits on which prediction and observation disagree."""
        return 0 if self.verdict is None else wrong_bits(self.verdict)


def walked_groups(record: rec.Record) -> Iterator[Walked]:
    """Split the observations so that CPUs that were predicted or judged otherwise have a table each."""
    predictions = _by_cpu(entry for entry in record.predictions if entry.model == record.judge)
    verdicts = _by_cpu(entry for entry in record.verdicts if entry.model == record.judge)
    saved = _by_cpu(record.saved)
    for entry in record.observations:
        groups: dict[tuple[int, int], list[int]] = {}
        for cpu in parse_list(entry.cpus):
            groups.setdefault((id(predictions.get(cpu)), id(verdicts.get(cpu))), []).append(cpu)
        for cpus in groups.values():
            held = {id(saved[cpu]): saved[cpu] for cpu in cpus if cpu in saved}
            first = cpus[0]
            seen = replace(entry, cpus=format_list(cpus))
            yield Walked(seen, predictions.get(first), verdicts.get(first), tuple(held.values()))


def _by_cpu(entries: Iterable[Any]) -> Mapping[int, Any]:
    """Return the first entry that names each CPU."""
    found: dict[int, Any] = {}
    for entry in entries:
        for cpu in parse_list(entry.cpus):
            found.setdefault(cpu, entry)
    return found


def wrong_bits(verdict: rec.VerdictEntry) -> int:
    """Return the mask of the bits on which prediction and observation disagree."""
    return (
        parse_hex64(verdict.unexpected_fault)
        | parse_hex64(verdict.unexpected_accept)
        | parse_hex64(verdict.not_retained)
    )


def _mask(outcomes: rec.Masks, name: str) -> int:
    seen = rec.observation_of(outcomes)
    return int(getattr(seen, name))


@lru_cache(maxsize=256)
def _numbers(cpus: str) -> frozenset[int]:
    return frozenset(parse_list(cpus))


def _mask_line(label: str, word: str, mask: int) -> str:
    return f"{label:<{LABEL}}{word:<11}{hex64(mask)}  bits {_short_bits(mask)}"


def _short_bits(mask: int) -> str:
    text = format_bits(mask)
    room = WIDTH - LABEL - 11 - 18 - 7
    return text if len(text) <= room else f"{bin(mask).count('1')} of 64"


def _masks(record: rec.Record, group: Walked) -> list[str]:
    """Predicted and observed masks one under the other."""
    entry, prediction = group.seen, group.prediction
    lines = [f"{told_cpus(entry.cpus)}, model {record.judge}"]
    label = "predicted"
    if prediction is not None:
        for word in Effect:
            mask = parse_hex64(getattr(prediction, word.value))
            if mask or word is Effect.ACCEPTS:
                lines.append(_mask_line(label, word.value, mask))
                label = ""
        if not prediction.exists:
            lines.append(f"{'':<{LABEL}}(no such register, by this CPUID)")
    label = "observed"
    for outcome in Outcome:
        mask = _mask(entry.outcomes, outcome.value)
        if mask or outcome is Outcome.RETAINED:
            lines.append(_mask_line(label, outcome.value, mask))
            label = ""
    if entry.absent_because:
        lines += field("", f"absent because: {entry.absent_because}")
    for saved in group.saved:
        which = "" if len(record.saved) == 1 else f"  {told_cpus(saved.cpus)}"
        lines += paragraph(f"{saved.value}{which}", f"{'held first':<{LABEL + 11}}", " " * (LABEL + 11))
    combined = entry.combined
    if combined is not UNSET:
        got = "took #GP" if combined.outcome == "fault" else str(combined.outcome)
        if combined.got is not UNSET:
            got = f"read back {combined.got}"
        lines.append(f"{'together':<{LABEL}}{'wrote':<11}{combined.value}  {got}")
    if entry.pairs_tried:
        bad = f"{len(entry.bad_pairs)} took #GP" if entry.bad_pairs else "none took #GP"
        lines.append(f"{'pairs':<{LABEL}}{entry.pairs_tried} tried, {bad}")
    if entry.cleared is not UNSET:
        cleared = rec.observation_of(entry.cleared)
        could = cleared.retained | cleared.unstable
        lines.append(f"{'cleared':<{LABEL}}{'tried':<11}{hex64(cleared.tried)}  could be: {format_bits(could)}")
    return lines


def bits(record: rec.Record, group: Walked) -> list[str]:
    """A row for each defined bit; reserved bits that are alike share a row."""
    prediction, verdict = group.prediction, group.verdict
    if prediction is None or verdict is None:
        return []
    seen = rec.observation_of(group.seen.outcomes)
    rows: list[tuple[str, str, str, str, str]] = []
    shown = ALL_BITS & (~parse_hex64(verdict.not_measured) | _planned(record))  # what nobody asked for needs no row
    reserved: dict[tuple[str, str, str], list[int]] = {}
    for bit in bits_of(shown):
        words = (
            _word_of(bit, [(effect.value, parse_hex64(getattr(prediction, effect.value))) for effect in Effect]),
            _word_of(bit, [(outcome.value, getattr(seen, outcome.value)) for outcome in Outcome]) or "not tried",
            _word_of(
                bit,
                [
                    ("unexpected fault", parse_hex64(verdict.unexpected_fault)),
                    ("unexpected accept", parse_hex64(verdict.unexpected_accept)),
                    ("not retained", parse_hex64(verdict.not_retained)),
                    ("as predicted", parse_hex64(verdict.as_predicted)),
                ],
            )
            or "not measured",
        )
        if SPEC_CTRL.defined >> bit & 1:
            verdict_word = "open" if words[0] == "either" and words[2] == "as predicted" else words[2]
            rows.append((str(bit), SPEC_CTRL.name_of(bit), words[0], words[1], verdict_word))
        else:
            reserved.setdefault(words, []).append(bit)
    rows += [(format_list(bits), "reserved", *words) for words, bits in reserved.items()]
    lines = _row("bit", "name", "predicted", "observed", "verdict")
    for row in rows:
        lines += _row(*row)
    return lines


def _planned(record: rec.Record) -> int:
    return mask_of(parse_list(record.walk.bits)) if record.walk is not UNSET else ALL_BITS


# Columns that bit, name, predicted and observed take; in a window where the verdict has no room beside them, it stands
# below, and in a narrower one what was observed as well.
_WIDTHS, _NARROW_WIDTHS = (9, 15, 11, 11), (8, 12, 10, 9)
_ROW = 64
_NARROW_ROW = 1 + sum(_NARROW_WIDTHS)


def _row(bit: str, name: str, predicted: str, observed: str, verdict: str) -> list[str]:
    flag = "*" if verdict.startswith(("unexpected", "not retained")) else " "
    wide = columns() >= _ROW
    widths = _WIDTHS if wide else _NARROW_WIDTHS
    cells = [f"{text:<{width}}" for text, width in zip((name, predicted, observed), widths[1:])]
    below = [] if wide else [verdict] if columns() >= _NARROW_ROW else [observed, verdict]
    beside = cells[: 3 if len(below) < 2 else 2] + ([] if below else [verdict])
    head = [] if len(bit) < widths[0] else paragraph(bit, flag, " ")
    start = " " * (1 + widths[0]) if head else f"{flag}{bit:<{widths[0]}}"
    lines = [*head, f"{start}{''.join(beside)}".rstrip()]
    return [*lines, f"    {' '.join(below)}"] if below else lines


def _word_of(bit: int, masks: Sequence[tuple[str, int]]) -> str:
    return next((word for word, mask in masks if mask >> bit & 1), "")


def _plan(record: rec.Record) -> list[str]:
    lines: list[str] = []
    for prediction in record.predictions:
        if prediction.model == record.judge:
            lines.append(f"{told_cpus(prediction.cpus)}, model {record.judge}")
            label = "predicted"
            for effect in Effect:
                mask = parse_hex64(getattr(prediction, effect.value))
                if mask or effect is Effect.ACCEPTS:
                    lines.append(_mask_line(label, effect.value, mask))
                    label = ""
    return lines


def _models(record: rec.Record) -> list[str]:
    """One line per model and group: its mask, and the bits on which it is wrong."""
    wrong_head = "measured bits on which it is wrong" if record.walk is not UNSET else ""
    lines = [f"{'model':<17}{'accepts':<20}{wrong_head}".rstrip()]
    verdicts_of: dict[str, list[rec.VerdictEntry]] = {}
    for entry in record.verdicts:
        verdicts_of.setdefault(entry.model, []).append(entry)
    by_cpu = {model: _by_cpu(entries) for model, entries in verdicts_of.items()}
    for prediction in record.predictions:
        cpus = "" if _covers_all(record, prediction.cpus) else f" ({told_cpus(prediction.cpus)})"
        mine = by_cpu.get(prediction.model, {})
        verdicts = {id(mine[cpu]): mine[cpu] for cpu in _numbers(prediction.cpus) if cpu in mine}
        wrong = 0
        for entry in verdicts.values():
            wrong |= wrong_bits(entry)
        looked = any(parse_hex64(entry.not_measured) != ALL_BITS for entry in verdicts.values())
        text = SPEC_CTRL.describe(wrong) if looked else "" if record.walk is UNSET else "-"
        lines += paragraph(f"{text}{cpus}", f"{clean(prediction.model)[:16]:<17}{prediction.accepts:<20}", " " * 37)
        lines += paragraph(prediction.title, "  ", "  ")
    return lines


def _rules(record: rec.Record) -> list[str]:
    """Name the hypervisors' rules that fit what was seen, and those that may; of the refuted, how many."""
    lines: list[str] = []
    rules: dict[str, list[rec.RuleEntry]] = {}
    for entry in record.hypervisor_rules:
        rules.setdefault(entry.cpus, []).append(entry)
    for cpus, of_cpus in rules.items():
        where = "" if _covers_all(record, cpus) else f" on {told_cpus(cpus)}"
        fits, may = _ranges(of_cpus, "fits"), _ranges(of_cpus, "possible")
        refuted = sum(entry.says == "refuted" for entry in of_cpus)
        lines += field("" if lines else "hypervisor", f"rules that fit what this guest saw{where}: {fits}")
        lines += field("", f"that may, with the right hardware and history: {may}")
        lines += field("", f"refuted: {refuted} others")
    return [*lines, ""] if lines else []


def _ranges(entries: Sequence[rec.RuleEntry], says: str) -> str:
    """Name the rules of one kind; three eras or more of KVM that follow one another as a range."""
    runs: list[list[str]] = []
    last = ""
    for entry in entries:
        era = clean(entry.model).rpartition("-")[2] if entry.model.startswith("kvm-") else ""
        if entry.says == says:
            if era and era == last:
                runs[-1].append(clean(entry.model))
            else:
                runs.append([clean(entry.model)])
        last = era if entry.says == says else ""
    told = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs]
    return ", ".join(told) or "none"


def _covers_all(record: rec.Record, cpus: str) -> bool:
    walked = record.walk.cpus if record.walk is not UNSET else record.machine.online
    return _numbers(cpus) >= _numbers(walked)


_RESTORE_WORDS = {"verified": "verified by reading", "left": "NOT VERIFIED", "failed": "NOT PUT BACK"}


def restored(record: rec.Record, most: int | None = None) -> list[str]:
    """Return the proof of restore, of at most so many groups of CPUs; then those that are not verified come first."""
    if record.walk is UNSET:
        return field("restored", "nothing was written, nothing to put back")
    if not record.restore:
        return field("restored", "nothing was written: no register could be read")
    entries = record.restore
    if most is not None and len(entries) > most:
        entries = sorted(entries, key=lambda entry: entry.state == "verified")
    lines = []
    for entry in entries[:most]:
        reads = entry.reads if entry.reads is not UNSET else "unreadable"
        word = _RESTORE_WORDS[entry.state]
        text = f"{told_cpus(entry.cpus)}: held {entry.saved}, reads {reads}: {word}"
        lines.append(text + (f" ({entry.note})" if entry.note else ""))
    left = entries[len(lines) :]
    if left:
        bad = sum(entry.state != "verified" for entry in left)
        how = f"{bad} of them not verified" if bad else "all verified by reading"
        lines.append(f"and {len(left)} more groups of CPUs, {how}: in the record")
    return fields("restored", lines)
