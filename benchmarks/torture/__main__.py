# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The command. It prints the counts, and writes them as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
COUNTS = {"kills": 48, "disk": 8, "fuzz": 5000, "soak": 5000}
"""Default counts: kills, runs on a full disk, inputs per fuzzed function, and steps."""


def main(arguments: list[str] | None = None) -> int:
    """Run one of the tests. Return 1 if it found a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=__doc__)
    parser.add_argument("what", choices=list(COUNTS))
    parser.add_argument("--count", type=int, help=f"Kills, runs, inputs or steps. Default: {COUNTS}.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file. Default: benchmarks/results/torture_WHAT.json.")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    count = given.count or COUNTS[given.what]
    with tempfile.TemporaryDirectory() as folder:
        # Each part imports only what it needs.
        if given.what == "kills":
            from .kills import kills as test
        elif given.what == "disk":
            from .disk import disk as test
        elif given.what == "fuzz":
            from .fuzz import fuzz as test
        else:
            from .soak import soak as test
        found = test(Path(folder), count, given.seed)
    found["seconds"] = round(time.monotonic() - begun)
    text = json.dumps(found, indent=1)
    print(text)
    output = given.output or RESULTS / f"torture_{given.what}.json"
    output.write_text(text + "\n", encoding="utf-8")
    return 1 if found.get("differing") or found.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
