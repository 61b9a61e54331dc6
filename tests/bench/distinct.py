# SPDX-License-Identifier: MIT
"""Records of machines that are all different, each in what its guests may hold and take: the worst pool there is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probe.masks import ALL_BITS, hex64
from probe.models.profile import NAMED

TOP = Path(__file__).resolve().parents[2]
KVM = TOP / "results/debian-kernels-nested/zen2-client/2026-11-25T173852Z-kvm-7.2.13+deb14-amd64.json"
RUN = TOP / "results/modelled-threadripper-3970x/metal.json"
_VARIED = (
    "guest_first",
    "guest_first_kept",
    "guest_first_seen",
    "guest_after",
    "guest_after_seen",
    "host_first",
    "host_first_kept",
    "host_first_seen",
)


def distinct_kvm(count: int, *, whole: bool = False) -> Iterator[bytes]:
    """Yield records of KVM with a row of its own for every named guest CPUID; or with all CPUIDs of a default run."""
    template: dict[str, Any] = json.loads(KVM.read_bytes())
    cells = template["rows"][0]["cells"]
    number = random.Random(2020)
    for _ in range(count):
        named = [{"profiles": [one.name], "opener": hex64(1), "cells": cells} for one in NAMED]
        rows = [row | {"cells": row["cells"] | _some_cells(number)} for row in (template["rows"] if whole else named)]
        yield json.dumps(template | {"rows": rows}).encode()


def _some_cells(number: random.Random) -> dict[str, str]:
    return {name: hex64(number.getrandbits(11) | number.getrandbits(11)) for name in _VARIED}


def distinct_runs(count: int) -> Iterator[bytes]:
    """Yield records of runs; of the 2,048 values of the low 11 bits each machine keeps another one."""
    template: dict[str, Any] = json.loads(RUN.read_bytes())
    (observation,) = template["observations"]
    for kept in random.Random(2020).sample(range(1, 1 << 11), count):
        outcomes = observation["outcomes"] | {"retained": hex64(kept), "fault": hex64(ALL_BITS & ~kept)}
        yield json.dumps(template | {"observations": [observation | {"outcomes": outcomes}]}).encode()
