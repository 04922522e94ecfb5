"""python -m tests.noise [--audits 100000] [--seed 0] [--json]: audits by recorded noise.

Ends with 1 if an honest engine is told apart, or one that computes something else is not. --json:
the last line is one JSON object.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tests.noise.record import PATH, load
from tests.noise.replay import replay


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.noise", description=__doc__)
    parser.add_argument("--audits", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=PATH)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    console = Console(stderr=options.json)
    begun_s = time.perf_counter()
    outcome = replay(load(options.record), audits=options.audits, seed=options.seed)
    took_s = time.perf_counter() - begun_s
    console.print(f"{outcome.audits} audits, {outcome.alarms} alarms, in {took_s:.0f} s")
    console.print(f"the nearest came to {outcome.nearest:.0%} of the limit")
    for name in outcome.names:
        console.print(f"not found: {name}", markup=False)
    if options.json:
        print(json.dumps(asdict(outcome)))  # noqa: T201 (for machines)
    return 1 if outcome.alarms or outcome.missed or not outcome.audits else 0


if __name__ == "__main__":
    sys.exit(main())
