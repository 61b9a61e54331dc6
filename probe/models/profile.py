# SPDX-License-Identifier: MIT
"""Profiles: the SPEC_CTRL-related CPUID bits given to a guest, as one mask over FEATURES."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from probe import features
from probe.cpuid.snapshot import CpuidBit, Snapshot
from probe.errors import UsageError
from probe.masks import bits_of

# Every CPUID bit that any model looks at. A profile's mask counts positions in this tuple.
FEATURES: tuple[CpuidBit, ...] = (
    features.SPEC_CTRL,
    features.INTEL_STIBP,
    features.SPEC_CTRL_SSBD,
    features.INTEL_PSFD,
    features.IPRED_CTRL,
    features.RRSBA_CTRL,
    features.DDPD_U,
    features.BHI_CTRL,
    features.AMD_IBPB,
    features.AMD_IBRS,
    features.AMD_STIBP,
    features.AMD_SSBD,
    features.VIRT_SSBD,
    features.AMD_PSFD,
    features.AMD_IBPB_RET,
    features.V_SPEC_CTRL,
)
_POSITION = {bit.name: position for position, bit in enumerate(FEATURES)}
ALL_FEATURES = (1 << len(FEATURES)) - 1


def mask_of_features(bits: Iterable[CpuidBit]) -> int:
    """Return the mask in which exactly these features are set."""
    mask = 0
    for bit in bits:
        mask |= 1 << _POSITION[bit.name]
    return mask


@dataclass(frozen=True)
class Profile:
    """A guest's CPUID as far as models look at it.

    mask counts positions of FEATURES. no_cpuid: userspace never called KVM_SET_CPUID2, so the guest has no leaf at all
    (mask is 0 then).
    """

    mask: int = 0
    no_cpuid: bool = False

    def __str__(self) -> str:
        if self.no_cpuid:
            return "none"
        return ",".join(bit.name for bit in self.bits()) or "empty"

    def bits(self) -> Iterator[CpuidBit]:
        """Yield the features that are set."""
        for position in bits_of(self.mask):
            yield FEATURES[position]

    def has(self, mask: int) -> bool:
        """Tell whether any feature of a mask is set."""
        return self.mask & mask != 0


NONE = Profile(no_cpuid=True)
EMPTY = Profile()


def profile(*bits: CpuidBit) -> Profile:
    """Return the profile in which exactly these features are set."""
    return Profile(mask_of_features(bits))


def profile_of(snapshot: Snapshot) -> Profile:
    """Return the features that a CPU reports."""
    return Profile(mask_of_features(bit for bit in FEATURES if features.reported(snapshot, bit)))


_F = features
_QEMU = "QEMU 10.0.50 target/i386/cpu.c, builtin_x86_defs[]"
_INSTLATX64 = "InstLatx64 CPUID dumps, snapshot 087af2c7 (2026-07-22)"


@dataclass(frozen=True)
class Named:
    """A profile that people know by a name, and where its bits are written down."""

    name: str
    profile: Profile
    source: str


_SPEC_SSBD = (_F.SPEC_CTRL, _F.SPEC_CTRL_SSBD)
_ZEN2_SERVER = (_F.AMD_IBPB, _F.AMD_IBRS, _F.AMD_STIBP, _F.AMD_SSBD)
_SIERRA = (*_SPEC_SSBD, _F.INTEL_PSFD, _F.IPRED_CTRL, _F.RRSBA_CTRL, _F.BHI_CTRL)
NAMED: tuple[Named, ...] = (
    Named("none", NONE, "no KVM_SET_CPUID2 at all"),
    Named("empty", EMPTY, "a CPUID with none of these bits"),
    Named("zen2-client", profile(_F.AMD_IBPB, _F.AMD_STIBP, _F.AMD_SSBD), f"AMD 17-71-00, EBX 010cb657; {_INSTLATX64}"),
    Named(
        "zen2-client-2020",
        profile(_F.INTEL_STIBP, _F.SPEC_CTRL_SSBD, _F.AMD_IBPB, _F.AMD_STIBP, _F.AMD_SSBD),
        "the same with the Intel bits that KVM_GET_SUPPORTED_CPUID adds; the guest of July 2020, "
        "3793ae0da76fe00036ed0205b5ad8f1653f58ef2.camel@redhat.com",
    ),
    Named("dali", profile(_F.AMD_IBPB, _F.AMD_STIBP), f"AMD 17-20-01 (3020e), EBX 00029007; {_INSTLATX64}"),
    Named("4700s", profile(_F.AMD_SSBD, _F.AMD_IBPB), f"AMD 17-47-00, EBX 01023eff; {_INSTLATX64}"),
    Named(
        "virt-ssbd",
        profile(_F.AMD_IBPB, _F.VIRT_SSBD),
        "QEMU docs/system/cpu-models-x86.rst.inc, virt-ssbd on EPYC-IBPB: SSBD by MSR 0xc001011f",
    ),
    Named("psfd-only", profile(_F.AMD_PSFD), "openvmm pull request 3534 (2026-05-20)"),
    Named("knights-landing", profile(_F.SPEC_CTRL), f"Intel 06-57-01, 7.0.EDX 04000000; {_INSTLATX64}"),
    Named("qemu-ibrs", profile(_F.SPEC_CTRL), f"the -IBRS models (Nehalem to Skylake); {_QEMU}"),
    Named("qemu-cascadelake", profile(*_SPEC_SSBD), f"Cascadelake-Server to GraniteRapids, Denverton; {_QEMU}"),
    Named("qemu-cooperlake", profile(*_SPEC_SSBD, _F.INTEL_STIBP), f"Cooperlake; {_QEMU}"),
    Named("qemu-sierraforest-v2", profile(*_SIERRA), f"SierraForest-v2; {_QEMU}"),
    Named("qemu-clearwaterforest", profile(*_SIERRA, _F.DDPD_U), f"ClearwaterForest; {_QEMU}"),
    Named("qemu-epyc-ibpb", profile(_F.AMD_IBPB), f"EPYC-IBPB, EPYC-v3 and later, Dhyana; {_QEMU}"),
    Named("qemu-epyc-rome-v1", profile(_F.AMD_IBPB, _F.AMD_STIBP), f"EPYC-Rome-v1; {_QEMU}"),
    Named("qemu-epyc-rome-v2", profile(*_ZEN2_SERVER), f"EPYC-Rome-v2 and later, EPYC-Milan-v1; {_QEMU}"),
    Named("qemu-epyc-milan-v2", profile(*_ZEN2_SERVER, _F.AMD_PSFD), f"EPYC-Milan-v2, EPYC-Genoa; {_QEMU}"),
)
_BY_NAME = {named.name: named.profile for named in NAMED}


def parse_profile(text: str) -> Profile:
    """Read a named profile, CPUID bits by name, or both with commas; raise UsageError, which lists the names."""
    if text in _BY_NAME:
        return _BY_NAME[text]
    mask = 0
    for word in text.split(","):
        name = word.strip()
        if name in _BY_NAME and not _BY_NAME[name].no_cpuid:
            mask |= _BY_NAME[name].mask
            continue
        if name not in _POSITION:
            raise UsageError(
                f"no profile or CPUID bit is called {name!r}",
                f"profiles: {', '.join(_BY_NAME)}; bits: {', '.join(_POSITION)}",
            )
        mask |= 1 << _POSITION[name]
    return Profile(mask)
