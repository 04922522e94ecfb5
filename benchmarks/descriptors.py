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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, at_most
from benchmarks.measure import finish, spread
from kvray.engine.copy_order import part_cuts
from kvray.engine.pieces import GroupPages, Pieces, TensorPages, build_pieces

ROUNDS, SMOKE_ROUNDS = 400, 3
DEVICE_BLOCKS = 16_384
LAYER_BYTES = 1 << 34  # address space between two layers
SLAB_ADDRESS = 1 << 45
KIB = 1_024
MAX_MS = {16_384: 1.0, 131_072: 4.0}  # by rows

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Case:
    """block_counts: for each cache group. is_scattered: block ids at random."""

    name: str
    layers: int
    page_bytes: int
    blocks_per_chunk: int
    block_counts: tuple[int, ...]
    is_scattered: bool = True

    @property
    def rows(self) -> int:
        return self.layers * sum(self.block_counts)


CASES = (
    Case("16-token blocks", 32, 64 * KIB, 16, (512,)),
    Case("16-token blocks, side by side", 32, 64 * KIB, 16, (512,), is_scattered=False),
    Case("256-token blocks", 32, 1_024 * KIB, 1, (512,)),
    Case("latent attention", 64, 18 * KIB, 8, (256,)),
    Case("hybrid, two groups", 16, 64 * KIB, 1, (768, 256)),
    Case("16-token blocks, long", 32, 64 * KIB, 16, (4_096,)),
    Case("16-token blocks, long, side by side", 32, 64 * KIB, 16, (4_096,), is_scattered=False),
)


class Job:
    """Of one case, with fresh block ids."""

    def __init__(self, case: Case, seed: int) -> None:
        random = np.random.default_rng(seed)
        pages = tuple(
            TensorPages(LAYER_BYTES * (i + 1), case.page_bytes, case.page_bytes)
            for i in range(case.layers)
        )
        self._counts = case.block_counts
        self._groups = [GroupPages(pages, case.blocks_per_chunk).joined()] * len(self._counts)
        ids = random.permutation(DEVICE_BLOCKS) if case.is_scattered else np.arange(DEVICE_BLOCKS)
        self._ids = ids[: sum(self._counts)].astype(np.int32)
        slots = sum(-(-count // case.blocks_per_chunk) for count in self._counts)
        slot_bytes = self._groups[0].part_bytes
        self._slots = (SLAB_ADDRESS + random.permutation(slots) * slot_bytes).astype(np.uint64)

    def prepare(self) -> Pieces:
        """What a worker does on its own thread when a job comes."""
        pieces = build_pieces(
            self._groups,
            block_ids=self._ids,
            group_sizes=self._counts,
            block_indices=[0] * len(self._counts),
            slot_pointers=self._slots,
        )
        part_cuts(pieces.bytes)
        return pieces


def measure(rounds: int) -> dict[str, Any]:
    """Each round has the cases in turn, so that what else the host does meets all of them."""
    jobs = {case.name: Job(case, seed) for seed, case in enumerate(CASES)}
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    pieces = {name: len(job.prepare().bytes) for name, job in jobs.items()}
    for _ in range(rounds):
        for name, job in jobs.items():
            begun_s = time.perf_counter()
            job.prepare()
            taken[name].append((time.perf_counter() - begun_s) * 1_000)
    return {
        "jobs": [
            {"case": case.name, "rows": case.rows, "pieces": pieces[case.name]}
            | {"prepare_ms": spread(taken[case.name], digits=3)}
            for case in CASES
        ]
    }


def bars(result: dict[str, Any]) -> list[Bar]:
    return [
        at_most(
            MAX_MS[job["rows"]],
            f"prepare {job['rows']:,} rows, {job['case']}, p99, ms",
            job["prepare_ms"]["p99"],
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
