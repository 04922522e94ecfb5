"""The jobs of descriptors.py, and what describing them takes. Needs numpy only, for gpu.py does the
same on a machine that has little more.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvray.core.copy_order import part_cuts
from kvray.engine.pieces import GroupPages, Pieces, TensorPages, build_pieces

DEVICE_BLOCKS = 16_384
LAYER_BYTES = 1 << 34  # address space between two layers
SLAB_ADDRESS = 1 << 45
KIB = 1_024
MAX_MS = {16_384: 1.0, 131_072: 4.0}  # by rows


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
            | {"prepare_ms": _spread(taken[case.name])}
            for case in CASES
        ]
    }


def _spread(taken_ms: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(taken_ms, (50, 99)).tolist()
    return {"p50": round(p50, 3), "p99": round(p99, 3), "n": len(taken_ms)}
