"""What a cluster of N nodes with C blocks each hits, against one pool of N x C: replays a trace.

    silo            kvray on each node, without peers
    kvray           kvray
    pooled          one LRU of N x C blocks: what a cluster could be without being one
    ratio_to_pooled   kvray / pooled
    local_share       of kvray's hits: those that were there without a peer

    python benchmarks/hit_rate.py TRACE --nodes N --capacity BLOCKS [--policy P] [--json]

A hit is a block that is there with all before it; the figures are shares of all blocks. Requests
come one after another, each at a random node (seeded, the same in each mode). TRACE is in the
format of Mooncake, plain or .gz or .xz: one request a line, its blocks in hash_ids. The cores are
the real ones (benchmarks/replay.py); the pool has one id a block, the head of a request younger
than its tail.
"""

import argparse
import gzip
import json
import lzma
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.bars import at_least
from benchmarks.measure import finish
from benchmarks.replay import EXTENT_BLOCKS, ReplayCluster, Settings, key_of
from kvray.config import REPLACEMENTS, Config

# Of the cluster's time, between two requests. The trace has four requests a second; at ten, what a
# node hears of its peers is older than it was.
REQUEST_MS = 100
SMOKE_REQUESTS = 1_000
MIN_RATIO_TO_POOLED = 0.98

console = Console(stderr=True)


def read_trace(path: Path) -> list[list[int]]:
    """The block ids of each request, in order."""
    with _open(path) as file:
        return [json.loads(line)["hash_ids"] for line in file if line.strip()]


def _open(path: Path) -> TextIO:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return cast("TextIO", opener(path, "rt", encoding="utf-8"))


def pooled_hits(requests: Sequence[Sequence[int]], capacity_blocks: int) -> int:
    """Of one LRU."""
    order: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for ids in requests:
        for block in ids:
            if block not in order:
                break
            hits += 1
        for block in reversed(ids):
            order[block] = None
            order.move_to_end(block)
            if len(order) > capacity_blocks:
                order.popitem(last=False)
    return hits


def replay(
    requests: Sequence[Sequence[int]], settings: Settings, *, seed: int, label: str
) -> tuple[int, int]:
    """Hits, and those of them that needed no peer."""
    dice = random.Random(seed)
    cluster = ReplayCluster(settings)
    hits = local_hits = 0
    for ids in _progress(requests, label):
        served = cluster.serve(dice.randrange(settings.node_count), [key_of(i) for i in ids])
        hits += served.hit_count
        local_hits += served.local_count
        if settings.peers:
            cluster.pass_ms(REQUEST_MS)
    return hits, local_hits


def _progress(requests: Sequence[Sequence[int]], label: str) -> Iterator[Sequence[int]]:
    yield from track(requests, description=label, console=console, transient=True)


def measure(
    requests: Sequence[Sequence[int]],
    *,
    node_count: int,
    capacity_blocks: int,
    config: Config,
    seed: int,
) -> dict[str, Any]:
    """The figures of one size. config: its policy is what kvray and the silos run with."""

    def settings(*, peers: bool) -> Settings:
        return Settings(
            node_count,
            capacity_blocks,
            config.replacement,
            config.probation_fraction,
            config.reused_fraction,
            peers,
        )

    blocks = sum(map(len, requests))
    silo, _ = replay(requests, settings(peers=False), seed=seed, label="silo")
    kvray, local = replay(requests, settings(peers=True), seed=seed, label="kvray")
    pooled = pooled_hits(requests, node_count * capacity_blocks)
    return {
        "nodes": node_count,
        "capacity_blocks": capacity_blocks,
        "policy": config.replacement,
        "requests": len(requests),
        "blocks": blocks,
        "seed": seed,
        "silo": round(silo / blocks, 4),
        "kvray": round(kvray / blocks, 4),
        "pooled": round(pooled / blocks, 4),
        "ratio_to_pooled": round(kvray / max(1, pooled), 4),
        "local_share": round(local / max(1, kvray), 4),
    }


def show(result: dict[str, Any]) -> None:
    table = Table(*result, title="blocks hit")
    table.add_row(*map(str, result.values()))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--capacity", type=int, default=2_000, help="of a node, in blocks")
    parser.add_argument("--policy", choices=REPLACEMENTS, default=Config().replacement)
    parser.add_argument("--probation-fraction", type=float, default=Config().probation_fraction)
    parser.add_argument("--reused-fraction", type=float, default=Config().reused_fraction)
    parser.add_argument("--seed", type=int, default=0, help="of the nodes that requests come to")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_REQUESTS} requests only")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.capacity % EXTENT_BLOCKS or options.capacity < EXTENT_BLOCKS:
        parser.error(f"--capacity must be a multiple of {EXTENT_BLOCKS}")
    requests = read_trace(options.trace)
    if options.smoke:
        requests = requests[:SMOKE_REQUESTS]
    result = measure(
        requests,
        node_count=options.nodes,
        capacity_blocks=options.capacity,
        config=Config(
            replacement=options.policy,
            probation_fraction=options.probation_fraction,
            reused_fraction=options.reused_fraction,
        ),
        seed=options.seed,
    )
    promises = [at_least(MIN_RATIO_TO_POOLED, "kvray / pooled LRU", result["ratio_to_pooled"])]
    return finish(
        "hit_rate",
        result,
        promises,
        n=1,
        as_json=options.json,
        is_smoke=options.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
