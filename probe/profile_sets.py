# SPDX-License-Identifier: MIT
"""Sets of profiles in words: which CPUID bits tell those that changed from those that did not. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from probe.models.profile import FEATURES, NAMED, Profile

_MOST_LITERALS = 3
_MOST_TERMS = 4
_NAMES = {named.profile: named.name for named in NAMED}
ALL = "every profile"


@dataclass(frozen=True)
class _Literal:
    """One CPUID bit that is there, or is not; members is a mask over the profiles' numbers."""

    feature: str
    present: bool
    members: int


class Universe:
    """The profiles that were measured; sets of them are masks over their numbers."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        self.profiles = tuple(profiles)
        self.everything = (1 << len(self.profiles)) - 1
        self._literals: list[_Literal] = []
        for position, feature in enumerate(FEATURES):
            having = 0
            for number, profile in enumerate(self.profiles):
                having |= (profile.mask >> position & 1) << number
            if 0 < having < self.everything:
                self._literals.append(_Literal(feature.name, True, having))
                self._literals.append(_Literal(feature.name, False, self.everything & ~having))
        self._names = [_NAMES.get(profile, str(profile).replace(",", "+")) for profile in self.profiles]
        self._said: dict[int, str] = {}
        self._rules: dict[int, dict[int, tuple[_Literal, ...]]] = {}

    def names(self, chosen: int) -> list[str]:
        """Name the profiles of a set: their own names, or their bits."""
        return [name for number, name in enumerate(self._names) if chosen >> number & 1]

    def describe(self, chosen: int) -> str:
        """Return the shortest rule over CPUID bits that holds for these profiles and no other that was measured.

        "with AMD_STIBP, without SPEC_CTRL"; several with "; or" between them. The names, where there is no such rule.
        """
        if chosen not in self._said:
            self._said[chosen] = self._describe(chosen)
        return self._said[chosen]

    def _describe(self, chosen: int) -> str:
        if chosen == self.everything:
            return ALL
        count = bin(chosen).count("1")
        if count == 1:
            return self.names(chosen)[0]
        for length in range(1, _MOST_LITERALS + 1):
            if length > 1 and count <= 2:
                return ", ".join(self.names(chosen))
            if chosen in self._conjunctions(length):
                return _told(self._conjunctions(length)[chosen])
            if length == 1:
                gate = self._gate(chosen)
                if gate:
                    return gate
        terms: list[str] = []
        left = chosen
        while left and len(terms) < _MOST_TERMS:
            best = max(
                (
                    (bin(members & left).count("1"), -len(literals), literals, members)
                    for length in (1, 2)
                    for members, literals in self._conjunctions(length).items()
                    if not members & ~chosen and members & left
                ),
                key=lambda found: found[:2],
                default=None,
            )
            if best is None:
                break
            terms.append(_told(best[2]))
            left &= ~best[3]
        if not left:
            return "; or ".join(terms)
        names = self.names(chosen)
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")

    def _conjunctions(self, length: int) -> dict[int, tuple[_Literal, ...]]:
        """Return the sets that so many literals together make, each with the first such literals."""
        if length not in self._rules:
            found = self._rules[length] = {}
            for literals in itertools.combinations(self._literals, length):
                members = self.everything
                for literal in literals:
                    members &= literal.members
                if members:
                    found.setdefault(members, literals)
        return self._rules[length]

    def _gate(self, chosen: int) -> str:
        """Return a rule "with any of these, and none of those", as gates are made; "" if none fits."""
        having = {one.feature: one.members for one in self._literals if one.present}
        absent = [feature for feature, members in having.items() if not members & chosen]
        for none_of in ([], self._telling(absent, having, chosen), absent):
            left = self.everything
            for feature in none_of:
                left &= ~having[feature]
            safe = [feature for feature, members in having.items() if not members & left & ~chosen]
            covered = 0
            for feature in safe:
                covered |= having[feature]
            if left == chosen and none_of:
                return _gate_told([], none_of)
            if not chosen & ~covered:
                return _gate_told(_cover(safe, having, chosen), none_of)
        return ""

    def _telling(self, absent: list[str], having: dict[str, int], chosen: int) -> list[str]:
        """Leave out features that hardly any other profile has: their absence is no rule, but chance."""
        others = self.everything & ~chosen
        few = bin(others).count("1") // 10
        return [feature for feature in absent if bin(having[feature] & others).count("1") > few]


def _gate_told(any_of: list[str], none_of: list[str]) -> str:
    first = "" if not any_of else f"with {'any of ' if len(any_of) > 1 else ''}{', '.join(any_of)}"
    last = "" if not none_of else ("without " if len(none_of) == 1 else "none of ") + ", ".join(none_of)
    if not first:
        return last if len(none_of) == 1 else f"with {last}"
    return (
        first if not last else f"{first}, {last}" if len(none_of) == 1 and len(any_of) == 1 else f"{first} and {last}"
    )


def _cover(features: list[str], having: dict[str, int], chosen: int) -> list[str]:
    """Choose as few of the features as have every profile of a set, the most telling first."""
    found: list[str] = []
    left = chosen
    while left:
        best = max(features, key=lambda one: bin(having[one] & left).count("1"))
        found.append(best)
        left &= ~having[best]
    return [one for one in features if one in found]


def _told(literals: Sequence[_Literal]) -> str:
    present = [one.feature for one in literals if one.present]
    absent = [one.feature for one in literals if not one.present]
    parts = ["with " + " and ".join(present)] if present else []
    return ", ".join([*parts, *(["without " + " and ".join(absent)] if absent else [])])
