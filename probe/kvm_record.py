# SPDX-License-Identifier: MIT
"""The record of one matrix over KVM, and its JSON Schema. Pure.

Rows hold masks, not cases; profiles that gave the same share one row. The same rules as for probe/record.py: no host
name, no path; a minor version only adds optional fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Union

import msgspec
from msgspec import UNSET, UnsetType

from probe.errors import RecordError, UsageError
from probe.masks import ALL_BITS, hex64, parse_hex64
from probe.models import machines
from probe.models.machine import Hardware, Host, first_difference
from probe.models.machine import Machine as Machine_
from probe.models.matrix import Fit, Measured, answers_of, program_of
from probe.models.policy import PolicyMachine
from probe.models.profile import NAMED, Profile, parse_profile
from probe.models.program import Answer, Program, format_answer, written
from probe.models.versions import release_of
from probe.record import Entry, Kernel, Machine, Mask, Seconds, Time, Tool, Version, closed_schema, record_kind

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 2
SCHEMA_ID = f"urn:spec-ctrl-probe:kvm-record:{SCHEMA_MAJOR}"


class KvmEntry(Entry):
    """KVM as userspace meets it. backend is the vendor module that is loaded ("" if none can be seen)."""

    backend: str
    ignore_msrs: str
    in_msr_index_list: bool
    msr_filter: bool
    user_space_msr: bool


class HardwareEntry(Entry):
    """The hardware's own answers, as measured through KVM; see probe.models.machine.Hardware and Host."""

    exists: bool
    tested: Mask
    valid: Mask
    keep: Mask
    switched: bool
    host_cpuid: str
    supported_cpuid: str
    start: Mask = hex64(0)
    pred_cmd: Mask = hex64(0)
    loaded: bool = True

    @property
    def let_through(self) -> bool:
        """Tell whether a guest met the register itself: then at least the bit that opened it was taken.

        Else valid and keep say nothing: nobody looked.
        """
        return parse_hex64(self.valid) != 0


class RowEntry(Entry):
    """What some profiles gave, all alike: for each cell the mask of the bits that answered so."""

    profiles: list[str]
    cells: dict[str, Mask]
    opener: Mask = hex64(0)


class DivergenceEntry(Entry):
    """The first divergence of a model, as a program: the kernel's answer to its last operation, and the model's."""

    cell: str
    program: str
    kernel: str
    model: str


class FitEntry(Entry):
    """How well one model explains the matrix."""

    model: str
    title: str
    family: str
    cases: int
    agreements: int
    divergences: dict[str, int] = {}
    first: Union[DivergenceEntry, UnsetType] = UNSET


class ExploredEntry(Entry):
    """Random programs that were run on kernel and model side by side; divergence is the shortest that differed.

    steady is false if the kernel answered so once, and not again when the program was run anew.
    """

    model: str
    programs: int
    seed: int
    seconds: float
    divergence: str = ""
    model_says: str = ""
    steady: bool = True


class PolicyEntry(Entry):
    """The policy that guests obeyed, over the model of the kernel that carried it out; source is a document or "FILE".

    complaints: what the policy did that is no decision (such a write took #GP), each with how often.
    """

    name: str
    title: str
    source: str
    over: str
    complaints: dict[str, int] = {}


class DriverEntry(Entry):
    """What the msr driver says of one CPU's own register, asked bit by bit: the masks of bits that it took, that took
    #GP, and that gave no answer.

    error: why it was not asked, or not to the end, with the exit code of that error; the masks are 0 then.
    """

    cpu: int
    accepts: Mask
    faults: Mask
    unanswered: Mask
    error: str = ""
    exit_code: int = 0


class GuestPlace(Entry):
    """The virtual machine that was booted for it.

    tested: KVM's own test of a value was made to accept this mask. cpu: the CPUID bits that the emulated CPU was given.
    """

    kernel: str
    kernel_version: str
    kernel_sha256: str
    accelerator: str
    qemu: str
    tested: Union[Mask, UnsetType] = UNSET
    cpu: str = ""


class KvmRecord(Entry):
    """One matrix. started is RFC 3339 in UTC, duration in seconds.

    explained_by names the models that decide every case and have every one right, follows the one of them that stands
    for this kernel's version ("" if none does, or that one is refuted). driver is there if the msr driver was asked,
    too, policy if guests obeyed one: then its own model has to explain what was seen.
    """

    kind: Literal["kvm"]
    schema_version: Version
    tool: Tool
    started: Time
    duration: Seconds
    machine: Machine
    kernel: Kernel
    kvm: KvmEntry
    hardware: HardwareEntry
    rows: list[RowEntry]
    fits: list[FitEntry]
    explained_by: list[str]
    follows: str = ""
    driver: Union[DriverEntry, UnsetType] = UNSET
    policy: Union[PolicyEntry, UnsetType] = UNSET
    explored: list[ExploredEntry] = []
    notes: list[str] = []
    guest: Union[GuestPlace, UnsetType] = UNSET
    identity: str = ""


_NAMES = {named.profile: named.name for named in NAMED}


def profile_name(profile: Profile) -> str:
    """Return a profile's own name, or its bits."""
    return _NAMES.get(profile, str(profile))


def parsed_profile(name: str) -> Profile:
    """Read a profile of a record; raise RecordError for a name that this version does not know."""
    try:
        return parse_profile(name)
    except UsageError as error:
        raise _unknown("the record", _strangers([name])) from error


def check_names(record: KvmRecord, name: str) -> None:
    """Raise RecordError, which calls the file by name, if the record has CPUID bits that this version does not know.

    A newer minor version may have them. It can be shown, but nothing can be calculated from it.
    """
    profiles = [profile for row in record.rows for profile in row.profiles]
    found = _strangers([*profiles, record.hardware.host_cpuid, record.hardware.supported_cpuid])
    if found:
        raise _unknown(name, found)


def _strangers(profiles: Iterable[str]) -> list[str]:
    """Return the words of profiles that name nothing that this version knows, each once."""
    words = {word.strip() for profile in profiles for word in (profile.split(",") if profile != "none" else ())}
    found = ["none"] if "none" in words else []  # with bits it makes no sense
    for word in words:
        try:
            parse_profile(word)
        except UsageError:
            found.append(word)
    return sorted(found)


def _unknown(name: str, words: Sequence[str]) -> RecordError:
    told = ", ".join(repr(word[:40]) for word in words[:5]) + (" ..." if len(words) > 5 else "")
    return RecordError(
        f"{name} names CPUID bits that this version does not know: {told}",
        "read it with the spec-ctrl-probe that wrote it, or a newer one; show prints it",
    )


def hardware_entry(host: Host) -> HardwareEntry:
    """Turn the measured host into its entry."""
    hardware = host.hardware
    return HardwareEntry(
        exists=hardware.exists,
        tested=hex64(hardware.tested),
        valid=hex64(hardware.valid),
        keep=hex64(hardware.keep),
        start=hex64(hardware.start),
        pred_cmd=hex64(hardware.pred_cmd),
        switched=host.switched,
        loaded=host.loaded,
        host_cpuid=str(Profile(host.features)),
        supported_cpuid=str(Profile(host.caps)),
    )


def host_of(record: KvmRecord) -> Host:
    """Return the host again that was measured."""
    entry = record.hardware
    return Host(
        Hardware(
            exists=entry.exists,
            tested=parse_hex64(entry.tested),
            valid=parse_hex64(entry.valid),
            keep=parse_hex64(entry.keep),
            start=parse_hex64(entry.start),
            pred_cmd=parse_hex64(entry.pred_cmd),
        ),
        features=parsed_profile(entry.host_cpuid).mask,
        caps=parsed_profile(entry.supported_cpuid).mask,
        switched=entry.switched,
        loaded=entry.loaded,
        ignore_msrs=record.kvm.ignore_msrs == "Y",
        vmx=record.kvm.backend == "kvm_intel",
    )


def row_entries(rows: Iterable[Measured]) -> list[RowEntry]:
    """Group rows that are equal but for their profile."""
    groups: dict[tuple[int, tuple[tuple[str, int], ...]], list[str]] = {}
    for row in rows:
        groups.setdefault((row.opener, tuple(sorted(row.masks.items()))), []).append(profile_name(row.profile))
    return [
        RowEntry(profiles=names, opener=hex64(opener), cells={name: hex64(mask) for name, mask in masks})
        for (opener, masks), names in groups.items()
    ]


def rows_of(record: KvmRecord) -> list[Measured]:
    """Unfold the rows again; raise RecordError for a profile that is none."""
    rows = []
    for entry in record.rows:
        masks = {name: parse_hex64(mask) for name, mask in entry.cells.items()}
        rows += [Measured(parsed_profile(name), parse_hex64(entry.opener), masks) for name in entry.profiles]
    return rows


def fit_entry(
    machine: Machine_ | PolicyMachine, fit: Fit, host: Host, run: Callable[[Program], Sequence[Answer]]
) -> FitEntry:
    """Turn a model's fit into its entry; run gives the kernel's answers to the program of the first divergence."""
    first: Union[DivergenceEntry, UnsetType] = UNSET
    if fit.first is not None:
        cell, row, bit = fit.first
        program = program_of(cell, row.profile, bit, row.opener)
        seen, said = run(program), answers_of(machine, cell, row, bit, host)
        at = first_difference(seen, said)
        last = len(seen) - 1 if at is None else at
        cut = Program(program.profile, program.operations[: last + 1])
        first = DivergenceEntry(
            cell=cell.name,
            program=written(cut, seen[:last]),
            kernel=format_answer(seen[last]),
            model=_said(said[last]) if at is not None else "another answer, once",
        )
    return FitEntry(
        model=fit.model,
        title=machine.title,
        family=machine.family,
        cases=fit.cases,
        agreements=fit.agreements,
        divergences=dict(fit.divergences),
        first=first,
    )


def _said(answer: Answer | None) -> str:
    return "nothing" if answer is None else format_answer(answer)


def in_order(fits: Iterable[Fit]) -> list[Fit]:
    """Sort fits: those that explain everything first, then by their share of agreements."""
    return sorted(fits, key=lambda fit: (-fit.agreements / max(fit.cases, 1), -fit.cases, fit.model))


def explaining(fits: Iterable[Fit]) -> list[str]:
    """Name the models that have every case right and leave none open."""
    return [fit.model for fit in fits if fit.explains]


def standing_of(record: KvmRecord) -> str:
    """Return the model that stands for this kernel's version, whether it explains the matrix or not; "" if none does.

    Under a policy none does: what is seen is the policy's.
    """
    if not isinstance(record.policy, UnsetType):
        return ""
    return machines.standing_model(record.kvm.backend, release_of(record.kernel.release, record.kernel.version))


def tries_values(record: KvmRecord) -> bool:
    """Tell whether this kernel's KVM tries a value on the hardware, as from v5.9 on; a version not known counts so."""
    version = release_of(record.kernel.release, record.kernel.version)
    return version is None or version >= (5, 9, 0)


def driver_differs(record: KvmRecord) -> int:
    """Return the mask of the bits on which the msr driver and KVM's own test of a value disagree; 0 if not asked.

    KVM tries a value on the hardware from v5.9 on: what an older one takes is its own mask, and need not agree.
    """
    if record.driver is UNSET or record.driver.error or not tries_values(record):
        return 0
    answered = ALL_BITS & ~parse_hex64(record.driver.unanswered)
    return (parse_hex64(record.driver.accepts) ^ parse_hex64(record.hardware.tested)) & answered


def refuted(record: KvmRecord) -> str:
    """Return the model that stands for this kernel's version and does not explain the matrix; "" if there is none."""
    standing = record.follows or standing_of(record)
    return "" if standing in record.explained_by else standing


def as_predicted(record: KvmRecord) -> bool:
    """Tell whether there is nothing to look into: a model explains every case, that of the kernel's version if there is
    one, and the msr driver agrees.

    Under a policy the model has to be the policy's own.
    """
    if record.policy is not UNSET:
        return f"{record.policy.name} over {record.policy.over}" in record.explained_by
    return bool(record.explained_by) and not refuted(record) and not driver_differs(record)


def complaints(record: KvmRecord) -> list[str]:
    """Return what the policy did that is no decision, each with how often; nothing without a policy."""
    if record.policy is UNSET:
        return []
    return [f"{count} times it {what}" for what, count in record.policy.complaints.items()]


def encode(record: KvmRecord) -> bytes:
    """Return the record as JSON, two spaces deep, with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode(raw: bytes, name: str) -> KvmRecord:
    """Read a record; name is what an error calls it. Raise RecordError for anything that is none of this version."""
    try:
        version = record_kind(raw)[1]
        if version.partition(".")[0] != str(SCHEMA_MAJOR):
            raise RecordError(
                f"{name} is a KVM record of version {version[:20]}; this tool reads {SCHEMA_MAJOR}.x",
                "read it with the spec-ctrl-probe that wrote it, or a newer one",
            )
        record = msgspec.json.decode(raw, type=KvmRecord)
    except msgspec.ValidationError as error:
        raise RecordError(
            f"{name} is no valid KVM record: {error}", "spec-ctrl-probe schema kvm prints what is"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{name} cannot be read: {error}", "it is cut or was never a JSON file") from error
    return record


def schema() -> dict[str, Any]:
    """Return the record's JSON Schema 2020-12; it allows no additional properties."""
    return closed_schema(KvmRecord, f"{SCHEMA_ID}.{SCHEMA_MINOR}")
