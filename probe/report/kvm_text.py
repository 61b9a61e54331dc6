# SPDX-License-Identifier: MIT
"""A KVM record as plain text of at most 75 columns: which model explains this kernel, and what it did."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from probe.kvm_record import ExploredEntry, FitEntry, KvmRecord, RowEntry, driver_differs, refuted
from probe.masks import format_bits, hex64, parse_hex64, told_bits
from probe.models.matrix import CELLS
from probe.models.profile import NAMED
from probe.report.layout import WIDTH, field, fields, joined, paragraph

_KIN = (("pred_cmd", "IA32_PRED_CMD (0x49)"), ("virt_spec_ctrl", "VIRT_SPEC_CTRL (0xc001011f)"))


ROWS = 12
CALLED = {"none": "none (no CPUID set)"}  # beside a mask that is "none"


def render(record: KvmRecord, *, rows: int = ROWS) -> str:
    """Return the report; of the groups of profiles at most rows are shown, the largest first.

    Under a policy its own model, KVM's, and the named profiles are shown, unless more rows than ROWS are asked for.
    """
    lines = [*_headline(record), "", *_machine(record), ""]
    if record.policy is UNSET or rows > ROWS:
        lines += [*_models(record.fits), *_explored(record), *_rows(record, rows)]
    else:
        own = (f"{record.policy.name} over {record.policy.over}", record.policy.over)
        shown = [fit for fit in record.fits if fit.model in own]
        lines += [*_models(shown), f"and {len(record.fits) - len(shown)} other models: show --all", *_explored(record)]
        lines += ["", *_named(record)]
    if record.notes:
        lines += ["", *fields("notes", record.notes)]
    return joined(lines)


def _headline(record: KvmRecord) -> list[str]:
    if record.policy is UNSET:
        return paragraph(f"KVM and IA32_SPEC_CTRL (MSR 0x48): {explained(record)}")
    policy = record.policy
    lines = paragraph(f"KVM and IA32_SPEC_CTRL (MSR 0x48) under policy {policy.name}: {explained(record)}")
    if policy.complaints:
        lines += paragraph(
            f"the policy DID NOT DECIDE {sum(policy.complaints.values())} writes, which took #GP: "
            f"{'; '.join(policy.complaints)}"
        )
    return lines


def _named(record: KvmRecord) -> list[str]:
    """What the guests that people know may write under a policy, and what they read back."""
    names = {named.name for named in NAMED}
    lines = [f"{'guest CPUID':<26}{'may write':<16}{'reads back':<16}{'host may write'}"]
    rest = 0
    for row in record.rows:
        cells = [row.cells.get(name, hex64(0)) for name in ("guest_first", "guest_first_seen", "host_first")]
        known = [name for name in row.profiles if name in names]
        rest += len(row.profiles) - len(known)
        for name in known:
            lines.append(f"{CALLED.get(name, name):<26}" + "".join(f"{_bits(mask):<16}" for mask in cells).rstrip())
    lines.append("first writes, bit by bit" + (f"; {rest} more guest CPUIDs: show --all" if rest else ""))
    return lines


def explained(record: KvmRecord) -> str:
    """Say which model explains this kernel; if several do, the one that its version speaks for."""
    names = record.explained_by
    if not names:
        return "explained by no model"
    wrong = refuted(record)
    if wrong:
        return f"explained by {', '.join(names)}, and not by {wrong}, which stands for this kernel's version"
    others = [name for name in names if name != record.follows]
    if not record.follows or not others:
        return "explained by " + ", ".join(names)
    return f"explained by {record.follows}, of its version; alike here: {', '.join(others)}"


def _machine(record: KvmRecord) -> list[str]:
    machine, kvm, hardware = record.machine, record.kvm, record.hardware
    where = f"{machine.vendor} {machine.family:02x}-{machine.model:02x}-{machine.stepping:02x}"
    lines = field("machine", f"{where} (CPUID.1:EAX {machine.signature}) {machine.brand}".rstrip())
    if machine.under_hypervisor:
        lines += field("", f"under hypervisor {machine.hypervisor or '(its name was not read)'}")
    lines += field("kernel", f"{record.kernel.release} {record.kernel.version}")
    if record.kernel.cmdline:
        lines += field("", " ".join(record.kernel.cmdline))
    lines += field("KVM", f"{kvm.backend or 'backend not to be seen'}, ignore_msrs={kvm.ignore_msrs or 'unknown'}")
    lines += field("", f"0x48 in KVM_GET_MSR_INDEX_LIST: {'yes' if kvm.in_msr_index_list else 'no'}")
    if record.guest is not UNSET:
        guest = record.guest
        lines += field(
            "place", f"guest of our own: {guest.kernel} {guest.kernel_version}, {guest.qemu}, {guest.accelerator}"
        )
        if guest.cpu:
            lines += field("", f"CPUID bits given to the emulated CPU: {guest.cpu.replace(',', ', ')}")
        if guest.tested is not UNSET:
            lines += field("", f"KVM's own test of a value was made to accept {guest.tested} (spec_ctrl_model)")
    lines += field("register", f"KVM_SET_MSRS takes   {hardware.tested}  bits {_bits(hardware.tested)}")
    if record.hardware.let_through:
        lines += field("", f"a guest let through  {hardware.valid}  bits {_bits(hardware.valid)}")
        lines += field("", f"and reads back       {hardware.keep}  bits {_bits(hardware.keep)}")
    else:
        lines += field("", "no guest was let through: what it would meet was not measured")
    if record.driver is not UNSET:
        lines += field("", _driver(record))
    lines += field("", _switched(record))
    lines += field("CPUID", f"host: {hardware.host_cpuid.replace(',', ', ')}")
    lines += field("", f"offered to guests: {hardware.supported_cpuid.replace(',', ', ')}")
    profiles = sum(len(row.profiles) for row in record.rows)
    lines += field("run", f"{record.started}, {record.duration:.1f} s, {profiles} profiles, {record.tool.version}")
    return lines


def _driver(record: KvmRecord) -> str:
    """Say what the msr driver answered, beside what KVM's own test of a value did."""
    assert record.driver is not UNSET
    if record.driver.error:
        return f"the msr driver was NOT ASKED: {record.driver.error}"
    accepts, unanswered = record.driver.accepts, parse_hex64(record.driver.unanswered)
    differ = driver_differs(record)
    alike = f"UNLIKE KVM_SET_MSRS on {told_bits(differ)}" if differ else "as KVM_SET_MSRS"
    if record.guest is not UNSET and record.guest.tested is not UNSET:
        alike = "(spec_ctrl_model answers for both)"
    elif not differ and accepts != record.hardware.tested:
        alike = "(KVM has a mask of its own)"
    silent = f", no answer for {told_bits(unanswered)}" if unanswered else ""
    return f"the msr driver takes {accepts}  {alike}{silent} (CPU {record.driver.cpu})"


def _switched(record: KvmRecord) -> str:
    """Say whether VM entry loads and VM exit saves the register; where KVM keeps no host write, nobody can tell."""
    fresh = next((row.cells for row in record.rows if "none" in row.profiles), {})
    zero = hex64(0)
    hardware = record.hardware
    # Under a policy the rows say what it refuses; that KVM keeps a write is known from the model that it stands on.
    kept = record.policy is not UNSET and record.policy.over.startswith("kvm-")
    if not kept and (fresh.get("host_first", zero) == zero or fresh.get("host_first_kept", zero) == zero):
        return "whether VM entry loads it cannot be told: KVM keeps no host write, or none was measured (profile none)"
    if not record.hardware.let_through:
        return "whether VM entry loads it cannot be told: no guest was let through"
    if hardware.keep == zero:
        loads = "whether VM entry loads it cannot be told (it keeps nothing)"
    else:
        loads = "loaded at VM entry" if hardware.loaded else "not loaded at VM entry"
    saves = "saved at VM exit" if hardware.switched else "not saved at VM exit"
    if not hardware.switched:
        forced = record.guest is not UNSET and "V_SPEC_CTRL" in record.guest.cpu.split(",")
        saves += " (the kernel leaves it to V_SPEC_CTRL, which this CPU does not do)" if forced else ""
    return f"{loads}, {saves}"


def _bits(mask: str) -> str:
    text = format_bits(parse_hex64(mask))
    return text if len(text) < 24 else f"{bin(parse_hex64(mask)).count('1')} of 64"


def _models(fits: Sequence[FitEntry]) -> list[str]:
    lines = [f"{'model':<18}{'cases':>8}{'agree':>8}{'':>3}first divergence"]
    for fit in fits:
        lines += _fit(fit)
    return lines


def _explored(record: KvmRecord) -> list[str]:
    lines: list[str] = []
    for entry in record.explored:
        found = _found(entry)
        text = f"{entry.programs} random programs (seed {entry.seed}) against {entry.model}: {found}"
        lines += field("explored" if not lines else "", text)
    return ["", *lines] if lines else []


def _found(entry: ExploredEntry) -> str:
    if not entry.divergence:
        return "no divergence"
    once = "" if entry.steady else " (once, and not again)"
    return f"differs{once}: {entry.divergence}, not {entry.model_says}"


def table(records: Sequence[tuple[str, KvmRecord | None, str]]) -> str:
    """Return one table of several kernels: for each its models with every case right, and the nearest others.

    records are (kernel, record, why there is none).
    """
    lines = [f"{'kernel':<26}{'explained by':<49}"]
    for name, record, why in records:
        head = f"{name[:25]:<26}"
        if record is None:
            lines += paragraph(f"not measured: {why}", head, " " * 26)
            continue
        lines += paragraph(explained(record).replace("explained by ", ""), head, " " * 26)
        if record.driver is not UNSET and record.driver.error:
            lines += paragraph(f"msr driver not asked: {record.driver.error}", " " * 26, " " * 28)
        for entry in record.explored:
            found = _found(entry)
            lines += paragraph(f"{entry.model}: {entry.programs} random programs: {found}", " " * 26, " " * 28)
    if all(record is None for _, record, _ in records):
        return joined(lines)
    models = [fit.model for fit in next((record.fits for _, record, _ in records if record is not None), [])]
    measured = [record for _, record, _ in records if record is not None]
    releases = [record.kernel.release.partition("-")[0] for record in measured]
    lines += ["", f"{'agreements':<20}" + "".join(f"{release[:13]:>14}" for release in releases)]
    for model in models:
        shares = [next((_share(fit) for fit in record.fits if fit.model == model), "-") for record in measured]
        lines.append(f"{model:<20}" + "".join(f"{share:>14}" for share in shares))
    return joined(lines)


def _fit(fit: FitEntry) -> list[str]:
    long = [fit.model] if len(fit.model) > 18 else []
    head = f"{'' if long else fit.model:<18}{fit.cases:>8}{_share(fit):>8}{'':>3}"
    if fit.first is UNSET:
        return [*long, f"{head}none"]
    first = fit.first
    return [*long, *paragraph(f"{first.program} -> {first.kernel}, not {first.model}", head, " " * 37)]


def _share(fit: FitEntry) -> str:
    if fit.agreements == fit.cases:
        return "100 %"
    return f"{min(99.9, 100 * fit.agreements / max(fit.cases, 1)):.1f} %"


def _rows(record: KvmRecord, most: int) -> list[str]:
    groups = sorted(record.rows, key=lambda row: -len(row.profiles))
    lines: list[str] = []
    for row in groups[:most]:
        lines += _row(row)
    if len(groups) > most:
        lines += ["", f"and {len(groups) - most} more groups of profiles: in the record"]
    return lines


def _row(row: RowEntry) -> list[str]:
    count = len(row.profiles)
    names = ", ".join(name.replace(",", "+") for name in row.profiles[:6])
    more = f" and {count - 6} more" if count > 6 else ""
    lines = ["", *paragraph(f"{count} profile{'s' if count > 1 else ''}: {names}{more}")]
    for cell in CELLS:
        if cell.name in row.cells and not cell.single:
            lines.append(_line(cell.title, row.cells[cell.name]))
    zero = ", ".join(
        cell.title for cell in CELLS if cell.single and parse_hex64(row.cells.get(cell.name, "0x" + "0" * 16))
    )
    lines += paragraph(f"0 and reads: {zero or 'none succeeds'}", "  ", "    ")
    for name, title in _KIN:
        guest, host = row.cells.get(f"{name}_guest"), row.cells.get(f"{name}_host")
        if guest is not None and host is not None:
            lines += paragraph(f"{title}: guest writes bits {_bits(guest)}, host bits {_bits(host)}", "  ", "    ")
    return lines


def _line(title: str, mask: str) -> str:
    room = WIDTH - 2 - 18 - 2
    short = title if len(title) <= room - 8 else title.replace("guest write after an accepted host write", "after")
    return f"  {mask}  {short}"
