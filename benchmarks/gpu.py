"""Copies between slab and GPU, next to one large pinned copy; names the card, and what was not run.

    equal       device to slab to device, fresh random data, poisoned targets
    long, small 256 chunks of 256 tokens of Llama-8B, in device blocks of 256 and of 16 tokens, as a
                share of one large pinned copy in the same round, both directions
    prepare     describing a job on this CPU (as benchmarks/descriptors.py)
    matmuls     their time beside continuous copies, over their time beside plain pinned copies
    pair        peer's slab, own slab, device: pipelined, over the slower of the two hops alone
    sanitizer   compute-sanitizer memcheck on a short run
    crossing    GB/s at each page size by each way: where core.copy_ways should change over

Needs torch; cupy for the kernel, nixl for `pair`. Without a GPU it names what it did not run, and
that is no failure. --smoke: tiny, without a GPU on tests/gpu/host_cuda.c, to see that the script
works; its figures mean nothing.

python benchmarks/gpu.py [--json] [--smoke] [--chunks N]
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import descriptor_jobs
from benchmarks.bars import Bar, at_least, at_most
from benchmarks.measure import json_line
from kvray.core.copy_ways import Way
from kvray.core.direction import Direction
from kvray.core.effects import Place
from kvray.engine.cuda_driver import the_driver
from tests.gpu.caches import CacheShape
from tests.gpu.rig import (
    ON_THE_HOST,
    ORDINAL,
    Blocks,
    Rig,
    Where,
    geometry_for,
    open_rig,
    why_no_gpu,
)

ROOT = Path(__file__).resolve().parent.parent
TOKENS_PER_CHUNK = 256
CHUNKS = 256
ROUNDS = 5
SHM_SHARE = 0.8  # of what is free in /dev/shm; fewer chunks where that is not enough
MATMUL_SIZE, MATMULS = 8_192, 60  # 60 of them are about 0.1 s on an H200, 1 s on a small card
PAIR_BYTES = 64 * 1024**2
SANITIZER_LIMIT_S = 120
SWEEP_TOKENS = (1, 2, 4, 8, 16, 64)  # 4 KiB a token and layer
SWEEP_BYTES = 512 * 1024**2

# What is to be shown, and by which bound, if nothing can be run.
TABLE = {
    "bytes after device, slab, device, all layouts": "equal",
    "256 chunks, 256-token blocks: load and store, of a pinned copy": "≥ 0.9",
    "256 chunks, 16-token blocks: load and store, of a pinned copy": "≥ 0.8",
    "matmuls beside our copies, over beside pinned copies": "≤ 1.03",
    "peer's slab to device, 64 MiB, over the slower hop alone": "≤ 1.2",
    "compute-sanitizer memcheck on a short run": "clean",
}


@dataclass(slots=True)
class Report:
    """The table: what was found, and what was not run, with the reason."""

    bars: list[Bar] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def skip(self, what: str, reason: str, bound: str = "") -> None:
        self.not_run.append({"what": what, "bound": bound, "reason": reason})

    def json_line(self, n: int) -> str:
        result = {**self.more, "not_run": self.not_run}
        return json_line("gpu", result, self.bars, n=n)

    def show(self) -> None:
        print(f"{'what':<66}{'found':>10}{'bound':>10}")
        for bar in self.bars:
            sign = "≤" if bar.is_upper else "≥"
            verdict = "" if bar.holds else "  missed"
            print(f"{bar.what:<66}{bar.found:>10.3f}{f'{sign} {bar.bound:g}':>10}{verdict}")
        for row in self.not_run:
            print(f"{row['what']} ({row['bound']}): not run: {row['reason']}")
        for name, value in self.more.items():
            print(f"{name}: {json.dumps(value)}")


class Bench:
    """Where, how much, and the report."""

    def __init__(self, where: Where, *, chunks: int, rounds: int, scale: int) -> None:
        """scale: by how much everything is smaller, on the host."""
        self.where = where
        self.rounds = rounds
        self.scale = scale
        self.chunks = chunks
        self.report = Report()
        self.random = torch.Generator(device=where.device)

    def sync(self) -> None:
        if self.where.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.sync()
        begun_s = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - begun_s

    # -- one large pinned copy -------------------------------------------------------------------

    def pinned(self, total_bytes: int) -> dict[Direction, Callable[[], object]]:
        """What torch does with one pinned tensor; the copies of both directions."""
        is_cuda = self.where.device == "cuda"
        host = torch.zeros(total_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        device = torch.zeros(total_bytes, dtype=torch.uint8, device=self.where.device)
        return {
            Direction.LOAD: lambda: device.copy_(host, non_blocking=True),
            Direction.STORE: lambda: host.copy_(device, non_blocking=True),
        }

    # -- the rows --------------------------------------------------------------------------------

    def shape(self, tokens_per_block: int) -> CacheShape:
        layers = max(1, 32 // self.scale)
        per_chunk = max(1, TOKENS_PER_CHUNK // tokens_per_block)
        name = f"Llama-8B, {tokens_per_block}-token blocks"
        return CacheShape(name, layers, 8, 256, tokens_per_block, per_chunk)

    def blocks(self, shape: CacheShape, chunks: int, seed: int = 0) -> Blocks:
        """All of a request, scattered over the device: neighbours are joined by chance only."""
        ids = np.random.default_rng(seed).permutation(chunks * shape.blocks_per_chunk)
        return Blocks((ids.astype(np.int32),), (0,))

    @contextmanager
    def rig(self, shape: CacheShape, chunks: int, **more: Any) -> Iterator[Rig]:
        blocks = chunks * shape.blocks_per_chunk
        where = Where(**{**{f: getattr(self.where, f) for f in WHERE_FIELDS}, **more})
        with open_rig(where, shape, "bf16", blocks=blocks, slots=chunks + 4) as rig:
            yield rig

    def copies(self, tokens_per_block: int, what: str, bound: float) -> None:
        """Both directions next to one pinned copy of 1 GiB, in turn; and equal bytes."""
        shape = self.shape(tokens_per_block)
        with self.rig(shape, self.chunks) as rig:
            (cache,) = rig.caches
            blocks = self.blocks(shape, self.chunks)
            total_bytes = sum(rig.slot_bytes(blocks))
            pinned_bytes = min(total_bytes, 1024**3)
            pinned = self.pinned(pinned_bytes)
            cache.randomize(self.random)
            before = cache.storage.clone()
            places = rig.slab.reserve(rig.slot_bytes(blocks))
            taken: dict[Direction, list[float]] = {way: [] for way in Direction}
            for number in range(self.rounds + 1):
                plain = {way: pinned_bytes / self.seconds(copy) for way, copy in pinned.items()}
                store_s = self.seconds(lambda: self.expect(rig, rig.begin_store(blocks, places)))
                if number == 0:
                    rig.slab.commit(places)
                    cache.randomize(self.random)  # poison
                load_s = self.seconds(lambda: self.expect(rig, rig.begin_load(blocks, places)))
                if number == 0:
                    equal = torch.equal(cache.storage, before)
                    self.report.bars.append(at_least(1, f"{what}: bytes equal", equal))
                    del before
                    continue  # the first round warms up
                taken[Direction.LOAD].append(total_bytes / load_s / plain[Direction.LOAD])
                taken[Direction.STORE].append(total_bytes / store_s / plain[Direction.STORE])
                self.report.more[f"{what}, GB/s"] = {
                    "load": round(total_bytes / load_s / 1e9, 2),
                    "store": round(total_bytes / store_s / 1e9, 2),
                    "pinned load": round(plain[Direction.LOAD] / 1e9, 2),
                    "pinned store": round(plain[Direction.STORE] / 1e9, 2),
                }
            for direction, shares in taken.items():
                share = statistics.median(shares)
                name = f"{what}: {direction.value}, of a pinned copy"
                self.report.bars.append(at_least(bound, name, share))

    def expect(self, rig: Rig, jobs: list[int]) -> None:
        assert all(end.ok for end in rig.ends(jobs)), "a copy has failed"

    def prepare(self) -> None:
        for job in descriptor_jobs.measure(max(3, 400 // self.scale))["jobs"]:
            what = f"prepare {job['rows']:,} rows, {job['case']}, p50, ms"
            bound = descriptor_jobs.MAX_MS[job["rows"]]
            self.report.bars.append(at_most(bound, what, job["prepare_ms"]["p50"]))

    def matmuls(self) -> None:
        """Alone, beside plain pinned copies, beside ours; each kind of copy covers all of them."""
        size = MATMUL_SIZE // self.scale
        kind = torch.bfloat16 if self.where.device == "cuda" else torch.float32
        matrix = torch.ones(size, size, dtype=kind, device=self.where.device)
        count = max(3, MATMULS // self.scale)

        def multiply() -> None:
            for _ in range(count):
                torch.mm(matrix, matrix)
            self.engine_sync()

        shape = self.shape(16)
        chunks = max(4, self.chunks // 8)
        with self.rig(shape, chunks) as rig:
            blocks = self.blocks(shape, chunks)
            places = rig.store(blocks)
            total_bytes = sum(rig.slot_bytes(blocks))
            plain = self.pinned(total_bytes)[Direction.LOAD]
            copies = 4 * self.covering(multiply, plain)
            ratios, rates = [], []
            self.seconds(multiply)
            for _ in range(self.rounds):
                alone_s = self.seconds_of(multiply)
                side = torch.cuda.Stream() if self.where.device == "cuda" else None
                begun_s = time.perf_counter()
                with torch.cuda.stream(side) if side else _nothing():
                    for _ in range(copies):
                        plain()
                beside_plain_s = self.seconds_of(multiply)
                self.sync()
                plain_rate = copies * total_bytes / (time.perf_counter() - begun_s)
                begun_s = time.perf_counter()
                jobs = [job for _ in range(copies) for job in rig.begin_load(blocks, places)]
                beside_ours_s = self.seconds_of(multiply)
                self.expect(rig, jobs)
                our_rate = copies * total_bytes / (time.perf_counter() - begun_s)
                ratios.append(beside_ours_s / beside_plain_s)
                rates.append(our_rate / plain_rate)
                self.report.more["matmuls, s"] = {
                    "alone": round(alone_s, 4),
                    "beside pinned copies": round(beside_plain_s, 4),
                    "beside kvray's": round(beside_ours_s, 4),
                }
        what = "matmuls beside our copies, over beside pinned copies"
        self.report.bars.append(at_most(1.03, what, statistics.median(ratios)))
        self.report.more["our rate over the pinned one meanwhile"] = round(
            statistics.median(rates), 3
        )

    def covering(self, work: Callable[[], None], copy: Callable[[], object]) -> int:
        """How many copies take as long as the work."""
        return max(1, round(self.seconds(work) / self.seconds(copy)))

    def engine_sync(self) -> None:
        if self.where.device == "cuda":
            torch.cuda.current_stream().synchronize()

    def seconds_of(self, work: Callable[[], None]) -> float:
        """Of what is on the engine's stream only: copies go on."""
        begun_s = time.perf_counter()
        work()
        return time.perf_counter() - begun_s

    def pair(self) -> None:
        what = "peer's slab to device, 64 MiB, over the slower hop alone"
        if importlib.util.find_spec("nixl") is None:
            self.report.skip(what, "nixl is not installed", "≤ 1.2")
            return
        from tests.gpu.pair import Reader, fetch_and_load, running_peer

        shape = self.shape(TOKENS_PER_CHUNK // 4)
        shape = CacheShape("pair", shape.layers, 8, 256, shape.tokens_per_block, 1)
        count = max(4, PAIR_BYTES // (shape.page_elements * 2 * shape.layers) // self.scale)
        with self.rig(shape, count) as rig:
            blocks = self.blocks(shape, count)
            sizes = rig.slot_bytes(blocks)
            with running_peer(geometry_for(sizes[0], count), sizes[0], count, seed=7) as peer:
                reader = Reader(rig, peer)
                ratios, hops = [], []
                for number in range(self.rounds + 1):
                    places = rig.slab.reserve(sizes)
                    fetch_s = reader.fetch(places)
                    load_s = self.load_s(rig, blocks, places)
                    rig.slab.evict(places)
                    places = rig.slab.reserve(sizes)
                    both_s = fetch_and_load(rig, reader, blocks, places)
                    rig.slab.evict(places)
                    if number:
                        ratios.append(both_s / max(fetch_s, load_s))
                        hops.append((fetch_s, load_s, both_s))
                reader.close()
        self.report.bars.append(at_most(1.2, what, statistics.median(ratios)))
        names = ("peer to slab", "slab to device", "both, pipelined")
        self.report.more["pair, ms"] = {
            name: round(statistics.median(column) * 1_000, 2)
            for name, column in zip(names, zip(*hops, strict=True), strict=True)
        }

    def load_s(self, rig: Rig, blocks: Blocks, places: list[Place]) -> float:
        return self.seconds(lambda: self.expect(rig, rig.begin_load(blocks, places)))

    def sanitizer(self) -> None:
        what = "compute-sanitizer memcheck, exit code"
        command = shutil.which("compute-sanitizer")
        if command is None or self.where.device != "cuda":
            reason = "it is not installed" if command is None else "there is no GPU"
            self.report.skip(what, reason, "≤ 0")
            return
        options = ["--tool", "memcheck", "--error-exitcode", "9"]
        try:
            done = subprocess.run(  # noqa: S603 (our own script)
                [command, *options, sys.executable, "-m", "tests.gpu.short"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=SANITIZER_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            self.report.skip(what, f"it took more than {SANITIZER_LIMIT_S} s", "≤ 0")
            return
        self.report.bars.append(at_most(0, what, done.returncode))
        self.report.more["compute-sanitizer"] = done.stdout.splitlines()[-1:]

    def crossing(self) -> None:
        """By each way, from small pages to large."""
        table: dict[str, dict[str, float]] = {}
        for tokens in SWEEP_TOKENS:
            shape = self.shape(tokens)
            page_bytes = shape.page_elements * 2
            chunk_bytes = page_bytes * shape.layers * shape.blocks_per_chunk
            chunks = max(1, SWEEP_BYTES // chunk_bytes // self.scale)
            rates = table[f"{page_bytes // 1024} KiB"] = {}
            for way in (Way.BATCH, Way.GATHER):
                with self.rig(shape, chunks, way=way) as rig:
                    for direction, rate in self.rates(rig, self.blocks(shape, chunks)).items():
                        rates[f"{direction.value} {way.value}"] = rate
        self.report.more["crossing, GB/s"] = table

    def rates(self, rig: Rig, blocks: Blocks) -> dict[Direction, float]:
        """GB/s of a job of these blocks."""
        places = rig.store(blocks)
        total_gb = sum(rig.slot_bytes(blocks)) / 1e9
        taken = {
            Direction.LOAD: lambda: self.expect(rig, rig.begin_load(blocks, places)),
            Direction.STORE: lambda: self.expect(rig, rig.begin_store(blocks, places)),
        }
        return {
            direction: round(
                total_gb / statistics.median(self.seconds(job) for _ in range(self.rounds)), 2
            )
            for direction, job in taken.items()
        }


WHERE_FIELDS = ("name", "device", "is_cuda", "version", "lockable_bytes", "way", "takes")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def chunks_that_fit(wanted: int) -> int:
    """Slots of 32 MiB, as far as /dev/shm has room."""
    free = os.statvfs("/dev/shm")
    room = int(free.f_bavail * free.f_frsize * SHM_SHARE) // (TOKENS_PER_CHUNK * 128 * 1024)
    return max(4, min(wanted, room - 4))


def measure(bench: Bench) -> None:
    report = bench.report
    driver = the_driver()
    if bench.where.device == "cuda" and driver is not None:
        report.more["card"] = driver.device_name(ORDINAL)
        report.more["driver"] = driver.version
    report.more["chunks"] = bench.chunks
    bench.copies(256, f"{bench.chunks} chunks, 256-token blocks", 0.9)
    bench.copies(16, f"{bench.chunks} chunks, 16-token blocks", 0.8)
    bench.prepare()
    bench.matmuls()
    bench.pair()
    bench.sanitizer()
    bench.crossing()


def main() -> int:
    parser = argparse.ArgumentParser(description="copies between slab and GPU")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny; no bar is held to")
    parser.add_argument("--chunks", type=int, default=CHUNKS, help="of 256 tokens")
    options = parser.parse_args()
    reason = why_no_gpu()
    where = Where("GPU", "cuda") if reason is None else ON_THE_HOST[1]
    if options.smoke:
        bench = Bench(where, chunks=4, rounds=1, scale=16)
    else:
        bench = Bench(where, chunks=chunks_that_fit(options.chunks), rounds=ROUNDS, scale=1)
    is_measured = reason is None or options.smoke
    if is_measured:
        measure(bench)
    else:
        assert reason is not None
        for what, bound in TABLE.items():
            bench.report.skip(what, reason, bound)
    if options.json:
        print(bench.report.json_line(bench.rounds if is_measured else 0))
    else:
        bench.report.show()
    return 0 if options.smoke or all(bar.holds for bar in bench.report.bars) else 1


if __name__ == "__main__":
    sys.exit(main())
