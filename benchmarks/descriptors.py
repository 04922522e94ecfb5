"""What describing a job costs the worker: from block ids and slots to what executors take.

    prepare_ms    for each case: all rows of a job (engine.pieces), cut into parts (copy_order)
    pieces        how many rows a job had, and how many are left when neighbours are one

The cases are caches as vLLM makes them: 16-token blocks, whose ids are scattered over the device
(nothing can be joined, the worst case) or side by side (a device that was idle); blocks of 256
tokens; multi-head latent attention; a hybrid of two groups. Nothing is copied.

python benchmarks/descriptors.py [--json] [--smoke]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, at_most
from benchmarks.descriptor_jobs import MAX_MS, measure
from benchmarks.measure import finish

ROUNDS, SMOKE_ROUNDS = 400, 3

console = Console(stderr=True)


def bars(result: dict[str, Any]) -> list[Bar]:
    return [
        at_most(
            MAX_MS[job["rows"]],
            f"prepare {job['rows']:,} rows, {job['case']}, p50, ms",
            job["prepare_ms"]["p50"],
        )
        for job in result["jobs"]
    ]


def show(jobs: Sequence[dict[str, Any]]) -> None:
    table = Table("job", "rows", "pieces", "p50 ms", "p99 ms", "n")
    for job in jobs:
        ms = job["prepare_ms"]
        counts = f"{job['rows']:,}", f"{job['pieces']:,}"
        table.add_row(job["case"], *counts, f"{ms['p50']}", f"{ms['p99']}", str(ms["n"]))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="what describing a copy job costs")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="a short run; no bar is held to")
    options = parser.parse_args()
    rounds = SMOKE_ROUNDS if options.smoke else ROUNDS
    result = measure(rounds)
    return finish(
        "descriptors", result, bars(result), n=rounds, as_json=options.json,
        is_smoke=options.smoke, show=lambda: show(result["jobs"]), console=console,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
