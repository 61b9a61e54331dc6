# SPDX-License-Identifier: MIT
"""One scripted run over many CPUs in a process of its own: seconds, peak memory and the record's size, as JSON."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.fakes import FakeRegister
from tests.scripted import run_scripted


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        raw = run_scripted(Path(folder), int(sys.argv[1]), FakeRegister(value=0x2, valid=0x6))
        seconds = time.monotonic() - begin
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "mib": mib, "record_kib": len(raw) / 1024}))


if __name__ == "__main__":
    main()
