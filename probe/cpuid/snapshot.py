# SPDX-License-Identifier: MIT
"""What CPUID says on one logical CPU, as a value: no reading here, and no judging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Registers(NamedTuple):
    """EAX, EBX, ECX, EDX as one CPUID instruction returned them; each 32 bits."""

    eax: int
    ebx: int
    ecx: int
    edx: int


class Leaf(NamedTuple):
    """The input of one CPUID instruction: EAX (leaf) and ECX (subleaf); each 32 bits."""

    leaf: int
    subleaf: int

    def __str__(self) -> str:
        return f"{self.leaf:08x}.{self.subleaf:x}"


@dataclass(frozen=True)
class CpuidBit:
    """One feature bit: where CPUID reports it, and the document or header that says so.

    register is "eax", "ebx", "ecx" or "edx"; name is the name the source uses.
    """

    name: str
    leaf: int
    subleaf: int
    register: str
    bit: int
    source: str

    def __str__(self) -> str:
        return f"CPUID.{self.leaf:X}H.{self.subleaf:X}:{self.register.upper()}[{self.bit}]"


_VENDORS = {
    "GenuineIntel": "Intel",
    "AuthenticAMD": "AMD",
    "HygonGenuine": "Hygon",
    "CentaurHauls": "Centaur",
    "  Shanghai  ": "Zhaoxin",
}


@dataclass(frozen=True)
class Snapshot:
    """All CPUID leaves of one logical CPU.

    leaves maps (leaf, subleaf) to the four registers. A leaf that is not in the map was not reported or not
    recorded: register() gives 0 for it, as the architecture does for feature leaves beyond the maximum.
    """

    leaves: Mapping[Leaf, Registers]

    def registers(self, leaf: int, subleaf: int = 0) -> Registers | None:
        """Return the four registers of a leaf, or None if it was not recorded."""
        return self.leaves.get(Leaf(leaf, subleaf))

    def register(self, leaf: int, subleaf: int, name: str) -> int:
        """Return one 32-bit register by name ("eax" ...); 0 if the leaf was not recorded."""
        found = self.registers(leaf, subleaf)
        return 0 if found is None else int(getattr(found, name))

    def has(self, bit: CpuidBit) -> bool:
        """Tell whether a feature bit is set."""
        return bool(self.register(bit.leaf, bit.subleaf, bit.register) >> bit.bit & 1)

    def has_any(self, bits: tuple[CpuidBit, ...]) -> bool:
        """Tell whether any of the feature bits is set."""
        return any(self.has(bit) for bit in bits)

    @property
    def vendor_string(self) -> str:
        """The 12 characters of leaf 0 (EBX, EDX, ECX); empty if leaf 0 was not recorded."""
        found = self.registers(0)
        if found is None:
            return ""
        raw = b"".join(reg.to_bytes(4, "little") for reg in (found.ebx, found.edx, found.ecx))
        return raw.decode("latin-1").rstrip("\0")

    @property
    def vendor(self) -> str:
        """Intel, AMD, Hygon, Centaur or Zhaoxin; "unknown" for any other string.

        Zhaoxin's KX and KH parts mostly report CentaurHauls; from family 7 on those are called Zhaoxin.
        Source: linux v7.1 arch/x86/kernel/cpu/zhaoxin.c, centaur.c (the vendor strings they bind to).
        """
        name = _VENDORS.get(self.vendor_string, "unknown")
        return "Zhaoxin" if name == "Centaur" and self.family >= 7 else name

    @property
    def signature(self) -> int:
        """Leaf 1 EAX: stepping, model and family as the CPU encodes them."""
        return self.register(1, 0, "eax")

    @property
    def family(self) -> int:
        """Display family. Source: Intel SDM vol. 2A, CPUID, "INPUT EAX = 01H"."""
        base = self.signature >> 8 & 0xF
        return base + (self.signature >> 20 & 0xFF) if base == 0xF else base

    @property
    def model(self) -> int:
        """Display model: extended for family 6 and from family 0xf on, as Linux x86_model() computes it."""
        base = self.signature >> 4 & 0xF
        return base + ((self.signature >> 16 & 0xF) << 4) if self.family >= 6 else base

    @property
    def stepping(self) -> int:
        """Stepping, 4 bits."""
        return self.signature & 0xF

    @property
    def under_hypervisor(self) -> bool:
        """Leaf 1 ECX[31], which hardware keeps 0 and hypervisors set."""
        return bool(self.register(1, 0, "ecx") >> 31)

    @property
    def hypervisor(self) -> str:
        """The hypervisor's signature from leaf 4000_0000H, or "" on bare metal or if it gives none."""
        found = self.registers(0x40000000)
        if not self.under_hypervisor or found is None:
            return ""
        raw = b"".join(reg.to_bytes(4, "little") for reg in (found.ebx, found.ecx, found.edx))
        text = raw.decode("latin-1").rstrip("\0")
        return text if text.isprintable() else ""

    @property
    def brand(self) -> str:
        """The processor brand string of leaves 8000_0002..4H, for people; never used to decide anything."""
        raw = b""
        for leaf in (0x80000002, 0x80000003, 0x80000004):
            found = self.registers(leaf)
            if found is None:
                return ""
            raw += b"".join(reg.to_bytes(4, "little") for reg in found)
        return " ".join(raw.split(b"\0")[0].decode("latin-1").split())
