# SPDX-License-Identifier: MIT
"""What operating systems do with IA32_SPEC_CTRL, as writes: whether a guest lives under a rule. Pure.

Windows stops with a bug check when such a write takes #GP, and so does a hypervisor; Linux warns ("unchecked MSR access
error: WRMSR to 0x48") and runs on, without the mitigation. Each behaviour is the list of accesses that a system makes
with a given CPUID, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from probe import features as f
from probe.masks import bits_of
from probe.models.machine import Hardware, Host, Machine, Stepping, answers
from probe.models.matrix import guest_rd, guest_wr, host_get, host_set
from probe.models.migration import Move, Rule, Side
from probe.models.peer_machines import enumerated
from probe.models.profile import NAMED, Profile, mask_of_features
from probe.models.program import Answer, Operation, Program, Word
from probe.models.what_if import offered
from probe.registers import IBRS, SSBD, STIBP

_ANY = mask_of_features((f.SPEC_CTRL, f.INTEL_STIBP, f.SPEC_CTRL_SSBD, f.AMD_IBRS, f.AMD_STIBP, f.AMD_SSBD))
_LINUX = mask_of_features((f.SPEC_CTRL, f.AMD_IBRS, f.AMD_STIBP, f.AMD_SSBD))  # X86_FEATURE_MSR_SPEC_CTRL
_STIBP = mask_of_features((f.INTEL_STIBP, f.AMD_STIBP))
_PSFD = mask_of_features((f.AMD_PSFD,))
_LEAF_7 = mask_of_features((f.SPEC_CTRL, f.INTEL_STIBP, f.SPEC_CTRL_SSBD))  # bare metal: Intel's alone
_SPEC_CTRL = mask_of_features((f.SPEC_CTRL,))


@dataclass(frozen=True)
class System:
    """An operating system as far as this register goes; accesses returns nothing if it leaves the register alone.

    fate: what becomes of it if one takes #GP.
    """

    name: str
    title: str
    source: str
    accesses: Callable[[Profile], tuple[Operation, ...]]
    fate: str = "dies"


def _linux(guest: Profile) -> tuple[Operation, ...]:
    """Read the base value; set what mitigations may want, each bit that CPUID enumerates; context switches clear it."""
    if not guest.mask & _LINUX:
        return ()
    has = enumerated(guest.mask)
    base = has & STIBP
    writes = [base] if base else []
    writes += [base | bit for bit in (SSBD, IBRS) if has & bit]
    return (guest_rd(), *(guest_wr(value) for value in (*writes, 0)))


def _windows(guest: Profile) -> tuple[Operation, ...]:
    """Set STIBP, first thing, if CPUID enumerates it, IBRS or not: the crash of 2020."""
    return (guest_wr(STIBP),) if guest.mask & _STIBP else ()


def _hyperv(guest: Profile) -> tuple[Operation, ...]:
    """Clear the register if any of its controls is enumerated, PSFD among them."""
    return (guest_wr(0),) if guest.mask & (_ANY | _PSFD) else ()


SYSTEMS: tuple[System, ...] = (
    System(
        "linux",
        "a Linux guest with STIBP, SSBD and IBRS as its CPUID has them: warns, and runs without the mitigation",
        "linux v7.2.13 arch/x86/kernel/cpu/bugs.c, cpu/common.c, init_speculation_control(); asm/msr.h, EX_TYPE_WRMSR",
        _linux,
        "warns",
    ),
    System(
        "windows",
        "a Windows-like guest that sets STIBP first",
        "3793ae0da76fe00036ed0205b5ad8f1653f58ef2.camel@redhat.com (2020-07-05); RH bz 1853447",
        _windows,
    ),
    System(
        "hyper-v",
        "a nested hypervisor that writes 0 when it sees PSFD or any other control",
        "openvmm pull request 3534 (2026-05-20)",
        _hyperv,
    ),
)


_NO_CPUS = ("empty", "zen2-client-2020", "virt-ssbd")  # guests' CPUIDs that are nobody's own


@dataclass(frozen=True)
class Cpu:
    """A named CPU as host: its features, and the guest CPUID that KVM makes of them."""

    name: str
    features: int
    guest: Profile

    @property
    def host(self) -> Host:
        """The host whose register takes what its CPUID enumerates, as the vendors' documents promise.

        And STIBP wherever Intel's IBRS is, where it does not fault but need not be kept (SDM vol. 4, table 2-2, 48H).
        """
        bits = enumerated(self.features)
        taken = bits | (STIBP if self.features & _SPEC_CTRL else 0)
        hardware = Hardware(exists=bool(bits), tested=taken, valid=taken, keep=bits)
        return Host(hardware, self.features, offered(self.features), vmx=self.features & _LEAF_7 != 0)


def cpus() -> list[Cpu]:
    """Return the real CPUs among the named profiles, each with the guest CPUID that KVM offers there."""
    return [
        Cpu(one.name, one.profile.mask, Profile(offered(one.profile.mask)))
        for one in NAMED
        if not one.profile.no_cpuid and one.name not in _NO_CPUS
    ]


def breaks(machine: Machine | Stepping, cpu: Cpu, system: System) -> Program | None:
    """Return the program up to the access that takes #GP; None if none does, or the register is left alone."""
    operations = system.accesses(cpu.guest)
    for number, answer in enumerate(answers(machine, Program(cpu.guest, operations), cpu.host)):
        if answer is Word.GP:
            return Program(cpu.guest, operations[: number + 1])
    return None


def forgets(machine: Machine | Stepping, cpu: Cpu) -> int:
    """Return the bits that a guest's CPUID enumerates and whose write succeeds without being stored or read back."""
    forgotten = 0
    for bit in bits_of(enumerated(cpu.guest.mask)):
        program = Program(cpu.guest, (guest_wr(1 << bit), guest_rd(), host_get()))
        wrote, read, saved = answers(machine, program, cpu.host)
        if wrote is Word.OK and 1 << bit not in (read, saved):
            forgotten |= 1 << bit
    return forgotten


def side_of(machine: Machine | Stepping, host: Host, guest: Profile) -> Side:
    """Return a host under a rule as a side of migrations: what this guest may hold there, what a restore takes."""

    def last(*operations: Operation) -> list[Answer | None]:
        return answers(machine, Program(guest, operations), host)

    first = after = takes = keeps = sees = 0
    for value in (1 << bit for bit in range(64)):
        wrote, read, saved = last(guest_wr(value), guest_rd(), host_get())
        restored, seen, stored = last(host_set(value), guest_rd(), host_get())
        kept = stored if seen is Word.GP else seen  # a value may be stored and never loaded
        first |= value if wrote is Word.OK and saved == value else 0
        sees |= value if wrote is Word.OK and (read == value or read is Word.GP) else 0
        takes |= value if restored is Word.OK else 0
        keeps |= value if restored is Word.OK and kept == value else 0
    opener = first & -first
    for value in (1 << bit for bit in range(64) if opener):
        read, saved = last(guest_wr(opener), guest_wr(value), guest_rd(), host_get())[-2:]
        after |= value if saved == value else 0
        sees |= value if read == value else 0
    return Side(
        first | after,
        takes,
        keeps,
        listed=host.hardware.exists,
        offers=guest.mask,
        guest=guest.mask,
        sees=sees,
        takes_zero=last(host_set(0))[0] is Word.OK,
    )


def broken_moves(machine: Machine | Stepping, rule: Rule) -> list[tuple[str, str, Move]]:
    """Return the moves between named CPUs that break under a rule: from, to, and what becomes of which bits.

    The guest has the CPUID that KVM offers on both machines, as in a pool with a baseline.
    """
    sides: dict[tuple[str, int], Side] = {}

    def side(cpu: Cpu, guest: Profile) -> Side:
        key = (cpu.name, guest.mask)
        if key not in sides:
            sides[key] = side_of(machine, cpu.host, guest)
        return sides[key]

    found = []
    for source, target in itertools.permutations(cpus(), 2):
        guest = Profile(source.guest.mask & target.guest.mask)
        held = side(source, guest)
        done = rule.move(held, side(target, guest), held.holds) if held.holds else Move()
        if done.word != "works":
            found.append((source.name, target.name, done))
    return found
