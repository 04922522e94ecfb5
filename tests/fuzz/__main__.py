"""Runs the fuzzers one after another; the last line of --json has cases and failures of each."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from random import Random

from rich.console import Console

from tests.fuzz import arguments, codec, command_line, page, server
from tests.fuzz.outcome import Outcome

TARGETS: dict[str, Callable[[Random, float], Outcome]] = {
    "codec": codec.run,
    "server": server.run,
    "page": page.run,
    "command_line": command_line.run,
    "arguments": arguments.run,
}
SECONDS = 20.0

console = Console(stderr=True, markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="seeded fuzzers")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=TARGETS)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # of what clients do wrong there is a line each, and it is wrong
    found: dict[str, dict[str, int]] = {}
    for name in options.only or TARGETS:
        outcome = TARGETS[name](Random(f"{name}/{options.seed}"), options.seconds)
        found[name] = {"cases": outcome.cases, "failures": len(outcome.failures)}
        if outcome.methods:
            found[name]["methods"] = outcome.methods
        console.print(f"{name}: {outcome.cases:,} cases, {len(outcome.failures)} failures")
        for text in outcome.failures:
            console.print(f"  {text}")
    if options.json:
        print(json.dumps({"targets": found}))  # noqa: T201
    return 1 if any(each["failures"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
