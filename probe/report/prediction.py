# SPDX-License-Identifier: MIT
"""Predictions for groups of equal CPUs, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probe.cpuid.compare import group_equal
from probe.cpuid.snapshot import Snapshot
from probe.masks import bits_of, format_bits, format_list, hex64
from probe.models.prediction import Effect, Model, Prediction
from probe.models.profile import Profile
from probe.models.what_if import WhatIf
from probe.registers import SPEC_CTRL
from probe.report.layout import field, joined, paragraph


@dataclass(frozen=True)
class Group:
    """CPUs that report the same, and what each model says of them."""

    cpus: tuple[int, ...]
    snapshot: Snapshot
    predictions: tuple[Prediction, ...]


def grouped(cpus: Mapping[int, Snapshot], models: Sequence[Model]) -> list[Group]:
    """Group CPUs with equal CPUID and ask every model about each group."""
    return [
        Group(tuple(members), first, tuple(model.predict(first) for model in models))
        for members, first in group_equal(cpus)
    ]


def as_json(form: str, groups: Sequence[Group]) -> str:
    """Return masks per group and model, with their reasons, as JSON text."""
    document = {
        "form": form,
        "groups": [
            {
                "cpus": format_list(group.cpus),
                "vendor": group.snapshot.vendor,
                "signature": f"{group.snapshot.signature:#x}",
                "hypervisor": group.snapshot.hypervisor,
                "models": {
                    prediction.model: {
                        "exists": prediction.exists,
                        "accepts": hex64(prediction.accepts),
                        "faults": hex64(prediction.faults),
                        "either": hex64(prediction.either),
                        "reasons": [
                            {
                                "mask": hex64(reason.mask),
                                "effect": reason.effect.value,
                                "because": reason.because,
                                "source": reason.source,
                            }
                            for reason in prediction.reasons
                        ],
                    }
                    for prediction in group.predictions
                },
            }
            for group in groups
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def as_text(form: str, groups: Sequence[Group]) -> str:
    """Return the masks, the table of bits and the reasons of every group, at most 75 columns wide."""
    lines = paragraph(f"CPUID from {form}")
    for group in groups:
        cpu = group.snapshot
        name = f"{cpu.vendor} {cpu.family:02x}-{cpu.model:02x}-{cpu.stepping:02x} (CPUID.1:EAX {cpu.signature:#010x})"
        many = f"{len(group.cpus)} CPU{'s' if len(group.cpus) > 1 else ''}: {format_list(group.cpus)}"
        lines += ["", *paragraph(f"{name}, {many}")]
        if cpu.brand:
            lines += paragraph(cpu.brand)
        if cpu.under_hypervisor:
            lines.append(f"under hypervisor {cpu.hypervisor or '(unnamed)'}")
        for prediction in group.predictions:
            lines += ["", *_one(prediction)]
    return joined(lines)


def what_if_as_text(host: str, features: int, guest: Profile, accepts: int | None, answers: Sequence[WhatIf]) -> str:
    """Return what rules would do, at most 75 columns wide; features is the host's mask over profile.FEATURES."""
    lines = [*field("host", host), *field("", str(Profile(features)).replace(",", ", "))]
    lines += field("guest", str(guest).replace(",", ", "))
    if accepts is None:
        lines += field("hardware", "has no such register, by the vendor's documents")
    else:
        lines += field("hardware", f"is taken to accept {hex64(accepts)}  bits {format_bits(accepts)}")
    for answer in answers:
        lines += ["", *paragraph(answer.machine.title, f"{answer.machine.name:<18}", " " * 18)]
        for title, mask in (
            ("first guest write", answer.guest_first),
            ("once let through", answer.guest_after),
            ("host write", answer.host_first),
        ):
            lines.append(f"  {title:<19}{_accepted(title, mask)}")
        if answer.open_bits:
            lines.append(f"  left open          {hex64(answer.open_bits)}  bits {format_bits(answer.open_bits)}")
        lines += paragraph(answer.machine.source, "  ", "  ")
    return joined(lines)


def _accepted(title: str, mask: int | None) -> str:
    if mask is None:
        return "no write of the guest's lets it through" if title == "once let through" else "refused, of 0 too"
    return f"{hex64(mask)}  bits {format_bits(mask)}"


def what_if_as_json(host: str, features: int, guest: Profile, accepts: int | None, answers: Sequence[WhatIf]) -> str:
    """Return the same as JSON text; a mask that is null: every write is refused, or nothing lets the guest through."""
    document = {
        "host": {"cpu": host, "cpuid": str(Profile(features))},
        "guest": {"cpuid": str(guest)},
        "hardware": _or_null(accepts),
        "models": {
            answer.machine.name: {
                "guest_first": _or_null(answer.guest_first),
                "guest_let_through": _or_null(answer.guest_after),
                "host": _or_null(answer.host_first),
                "guest_reads": answer.read,
                "left_open": hex64(answer.open_bits),
                "title": answer.machine.title,
                "source": answer.machine.source,
            }
            for answer in answers
        },
    }
    return json.dumps(document, indent=2) + "\n"


def _or_null(mask: int | None) -> str | None:
    return None if mask is None else hex64(mask)


def _one(prediction: Prediction) -> list[str]:
    lines = [f"model {prediction.model}" + ("" if prediction.exists else ": no such register")]
    lines += [
        f"  {effect.value:<9}{hex64(mask)}  bits {format_bits(mask)}"
        for effect in Effect
        for mask in [prediction.mask(effect)]
    ]
    notes: dict[int, int] = {}
    lines += ["", "  bit      name           predicted  why"]
    for bit in bits_of(SPEC_CTRL.defined):
        reason = prediction.reason_for(bit)
        number = notes.setdefault(reason.mask, len(notes) + 1)
        lines.append(f"  {bit:<8} {SPEC_CTRL.name_of(bit):<14} {reason.effect.value:<10} [{number}]")
    for reason in prediction.reasons:
        rest = reason.mask & ~SPEC_CTRL.defined
        if rest:
            number = notes.setdefault(reason.mask, len(notes) + 1)
            lines.append(f"  {format_bits(rest):<8} {'reserved':<14} {reason.effect.value:<10} [{number}]")
    lines.append("")
    numbered = sorted((notes[reason.mask], reason) for reason in prediction.reasons if reason.mask in notes)
    for number, reason in numbered:
        lines += paragraph(f"{reason.because}. Source: {reason.source}", f"  [{number}] ", "      ")
    return lines
