# SPDX-License-Identifier: MIT
"""Runs programs on vCPUs: a VM of our own, a guest CPUID made from a profile, and the guest's answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import TracebackType

from kernel_harness.kvm import guest_code, uapi
from kernel_harness.kvm.guest_code import Step
from kernel_harness.kvm.machine import RUN_SECONDS, CpuidTable, Kvm, Vcpu, Vm, exit_name
from probe.errors import GuestLost, RequirementMissing, UsageError
from probe.models.machine import SPEC_CTRL
from probe.models.profile import FEATURES, Profile
from probe.models.program import IN_GUEST, READING, Answer, Kind, Operation, Program, Word

# Guest physical pages that KVM wants for itself; far from all memory, below 2 GiB (Python's ioctl takes a C int).
_IDENTITY_MAP, _TSS = 0x40000000, 0x40001000
_EVERY_APIC = 0xFEEFF000  # MSI address with physical destination 0xFF, a broadcast: the VM of a program has one vCPU
_MSI_INIT = 5 << 8 | 1 << 14  # delivery mode INIT, level assert; Intel SDM vol. 3 sec. 12.11.2 (message data register)


class Cpuids:
    """Guest CPUIDs: what KVM supports, with a profile's features in the place of its own."""

    def __init__(self, kvm: Kvm) -> None:
        self._supported = kvm.get_supported_cpuid()
        self._made: dict[int, CpuidTable] = {}

    def mask(self) -> int:
        """Return the features that KVM supports, as a mask over FEATURES."""
        found = 0
        for position, bit in enumerate(FEATURES):
            for entry in self._supported:
                if (entry.function, entry.index) == (bit.leaf, bit.subleaf) and getattr(
                    entry, bit.register
                ) >> bit.bit & 1:
                    found |= 1 << position
        return found

    def table(self, profile: Profile) -> CpuidTable:
        """Return the CPUID of a profile; missing leaves are added, and the leaf counts raised to reach them."""
        made = self._made.get(profile.mask)
        if made is None:
            made = self._made[profile.mask] = CpuidTable(self.entries(profile))
        return made

    def entries(self, profile: Profile) -> list[uapi.kvm_cpuid_entry2]:
        """Return the leaves of a profile's CPUID."""
        entries = {(entry.function, entry.index): copy.copy(entry) for entry in self._supported}
        for bit in FEATURES:
            wanted = profile.mask >> FEATURES.index(bit) & 1
            entry = entries.get((bit.leaf, bit.subleaf))
            if entry is None:
                if not wanted:
                    continue
                flags = uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX if bit.leaf == 7 else 0
                entry = uapi.kvm_cpuid_entry2(function=bit.leaf, index=bit.subleaf, flags=flags)
                entries[bit.leaf, bit.subleaf] = entry
            value = getattr(entry, bit.register)
            setattr(entry, bit.register, value | 1 << bit.bit if wanted else value & ~(1 << bit.bit))
            if wanted:
                self._reach(entries, bit.leaf, bit.subleaf)
        return [entries[key] for key in sorted(entries)]

    @staticmethod
    def _reach(entries: dict[tuple[int, int], uapi.kvm_cpuid_entry2], leaf: int, subleaf: int) -> None:
        base = entries.setdefault((leaf & 0x80000000, 0), uapi.kvm_cpuid_entry2(function=leaf & 0x80000000))
        base.eax = max(base.eax, leaf)
        if leaf == 7:
            seven = entries.setdefault(
                (7, 0), uapi.kvm_cpuid_entry2(function=7, flags=uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
            )
            seven.eax = max(seven.eax, subleaf)


class Laboratory:
    """A VM whose vCPUs run programs, one vCPU after another.

    irqchip puts the interrupt controller into the kernel, without which nothing can send an INIT.
    """

    def __init__(self, kvm: Kvm, cpuids: Cpuids, *, irqchip: bool = False) -> None:
        self._cpuids = cpuids
        self.vm: Vm = kvm.create_vm()
        self._next = 0
        self._denied = False
        try:
            if irqchip:
                self.vm.create_irqchip()
            if kvm.check_extension(uapi.KVM_CAP_SET_TSS_ADDR):
                self.vm.set_identity_map_addr(_IDENTITY_MAP)
                self.vm.set_tss_addr(_TSS)
            self.memory = self.vm.set_user_memory_region(0, 0, guest_code.LOW_SIZE)
            reset = self.vm.set_user_memory_region(1, guest_code.RESET_PAGE, 0x1000)
            offset = guest_code.RESET_OFFSET
            reset[offset : offset + len(guest_code.JUMP)] = guest_code.JUMP
            at = guest_code.CODE_AT
            self.memory[at : at + len(guest_code.CODE)] = guest_code.CODE
        except BaseException:
            self.vm.close()
            raise

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.vm.close()

    def vcpu(self, profile: Profile) -> Vcpu:
        """Create a fresh vCPU with this CPUID."""
        vcpu = self.vm.create_vcpu(self._next)
        self._next += 1
        if not profile.no_cpuid:
            vcpu.set_cpuid2(self._cpuids.table(profile))
        return vcpu

    def guest(self, vcpu: Vcpu, steps: Sequence[Step], seconds: float = RUN_SECONDS) -> list[guest_code.Result]:
        """Run steps in the guest, all in one entry; raise GuestLost if it does anything else than finish them."""
        guest_code.write_table(self.memory, steps)
        self.enter(vcpu, seconds)
        # An OUT that is being timed goes on at once. A vCPU's page is looked at only where it must be: mapping costs.
        if any(step.kind == guest_code.TIMED_OUT for step in steps):
            while vcpu.exit_reason == uapi.KVM_EXIT_IO and vcpu.run_page.io.port == guest_code.TIMED_PORT:
                self.enter(vcpu, seconds)
        done = guest_code.read_table(self.memory, len(steps))
        if done is None:
            raise GuestLost(
                f"the guest did not finish its {len(steps)} steps: {exit_name(vcpu.exit_reason)}", "run it again"
            )
        return done

    def enter(self, vcpu: Vcpu, seconds: float) -> None:
        """Enter the guest until it exits."""
        vcpu.run(seconds)

    def set_cpuid(self, vcpu: Vcpu, profile: Profile) -> None:
        """Give the vCPU another CPUID, before its first entry."""
        vcpu.set_cpuid2(self._cpuids.table(profile))

    def host_set(self, vcpu: Vcpu, index: int, value: int) -> bool:
        """Write an MSR, host-initiated; tell whether KVM takes it."""
        return vcpu.set_msr(index, value)

    def host_get(self, vcpu: Vcpu, index: int) -> int | None:
        """Read an MSR, host-initiated; None if KVM refuses."""
        return vcpu.get_msr(index)

    def init(self, vcpu: Vcpu) -> None:
        """Send the vCPU an INIT and let it take it: it waits for the next entry."""
        self.vm.signal_msi(_EVERY_APIC, _MSI_INIT)
        self.guest(vcpu, [])

    def deny(self, index: int, denied: int) -> None:
        """Set the VM's MSR filter; denied as in Kind.DENY, 0 removes it."""
        ranges = [(index, denied)] if denied else []
        self.vm.set_msr_filter(ranges)
        self._denied = bool(denied)

    def run(self, program: Program) -> list[Answer]:
        """Run one program on a fresh vCPU; guest operations in a row share one entry."""
        vcpu = self.vcpu(program.profile)
        try:
            return self.run_on(vcpu, program.operations)
        finally:
            if self._denied:
                self.deny(0, 0)

    def saved_value(self, vcpu: Vcpu) -> int | None:
        """Return what a VMM saves of MSR 0x48 for a migration."""
        return self.host_get(vcpu, SPEC_CTRL)

    def run_on(self, vcpu: Vcpu, operations: Sequence[Operation]) -> list[Answer]:
        """Run operations on a vCPU; guest operations in a row share one entry."""
        answers: list[Answer] = []
        waiting: list[Operation] = []
        for operation in operations:
            if operation.kind in IN_GUEST:
                waiting.append(operation)
                continue
            answers += self._in_guest(vcpu, waiting)
            waiting = []
            answers.append(self._one(vcpu, operation))
        return answers + self._in_guest(vcpu, waiting)

    def _in_guest(self, vcpu: Vcpu, operations: Sequence[Operation]) -> list[Answer]:
        if not operations:
            return []
        steps = [
            Step(guest_code.READ if one.kind in READING else guest_code.WRITE, one.index, one.value)
            for one in operations
        ]
        return [
            Word.GP if result.faulted else result.value if one.kind in READING else Word.OK
            for one, result in zip(operations, self.guest(vcpu, steps))
        ]

    def _one(self, vcpu: Vcpu, operation: Operation) -> Answer:
        kind = operation.kind
        if kind is Kind.HOST_SET:
            return Word.OK if self.host_set(vcpu, operation.index, operation.value) else Word.REFUSED
        if kind is Kind.HOST_GET:
            value = self.host_get(vcpu, operation.index)
            return Word.REFUSED if value is None else value
        if kind is Kind.CPUID:
            self.set_cpuid(vcpu, Profile(operation.value))
        elif kind is Kind.INIT:
            self.init(vcpu)
        elif kind is Kind.DENY:
            self.deny(operation.index, operation.value)
        else:
            self.deny(0, 0)
        return Word.OK


def needs_irqchip(program: Program) -> bool:
    """Tell whether a program can only run with the interrupt controller in the kernel."""
    return any(operation.kind is Kind.INIT for operation in program.operations)


def check_program(kvm: Kvm, program: Program) -> None:
    """Raise RequirementMissing for a filter that this KVM lacks, UsageError for a CPUID that comes too late."""
    if any(one.kind in (Kind.DENY, Kind.ALLOW) for one in program.operations) and not kvm.check_extension(
        uapi.KVM_CAP_X86_MSR_FILTER
    ):
        raise RequirementMissing("this KVM has no MSR filter (KVM_CAP_X86_MSR_FILTER, Linux v5.10)")
    seen_guest = False
    for operation in program.operations:
        seen_guest = seen_guest or operation.kind in IN_GUEST
        if operation.kind is Kind.CPUID and seen_guest:
            raise UsageError("a vCPU's CPUID is set before its first entry; KVM refuses it later")


Make = Callable[[Kvm, Cpuids, bool], Laboratory]  # (KVM, CPUIDs, with the interrupt controller in the kernel)


def plain(kvm: Kvm, cpuids: Cpuids, irqchip: bool) -> Laboratory:
    """Make a VM whose guests meet KVM alone."""
    return Laboratory(kvm, cpuids, irqchip=irqchip)


def run_program(kvm: Kvm, cpuids: Cpuids, program: Program, make: Make = plain) -> list[Answer]:
    """Run one program in a VM of its own; it needs ticking() around it. Raise as check_program() does."""
    check_program(kvm, program)
    with make(kvm, cpuids, needs_irqchip(program)) as laboratory:
        return laboratory.run(program)
