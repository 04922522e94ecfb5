"""Which router makes a cluster answer soonest: a trace replayed in simulated time.

    python benchmarks/routing.py [TRACE] [--json] [--smoke]

    mean_ms     mean time to first token (queue, loads, prefill) by router, with kvray and without
    cases       trace: the public one. hot: most requests ask about a few long prefixes
                slow link: the trace, where a block comes hardly sooner than it is computed
    load        1 is what round-robin with kvray sustains in that case: replicas / its mean prefill

The trace has the prompts of 12,031 requests, in their order; when they came is not in it, so they
come at random (Poisson, seeded) at the rate that gives the load. The rates are parameters, those
of an 8B model (131,072 bytes of KV a token) that prefills 10,000 tokens/s, which nobody measured
here; links and copies run as benchmarks/RESULTS.md has measured them on CPUs (transfer: fetch over
cma and over tcp, 4 MiB and 256 slots; memcpy). decision_ms is real time, of choosing among 8
replicas, at prompts of 131,072 tokens; naming the chunks of a prompt is not part of it.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.bars import Bar, at_most
from benchmarks.hit_rate import read_trace
from benchmarks.measure import finish, spread
from benchmarks.routing_policies import Affinity, KVRay, RoundRobin, TwoChoices
from benchmarks.routing_world import BLOCK_TOKENS, Policy, Request, Speeds, World

TRACE = Path(__file__).resolve().parent.parent / "tests/data/mooncake_conversation.jsonl.xz"
REPLICAS = (4, 8)
LOADS = (0.3, 0.5, 0.7, 0.9)
SLOW_LOADS = (0.5, 0.9)
SMOKE_REQUESTS = 600

KV_BYTES_PER_TOKEN = 131_072  # 8B: 32 layers, 8 heads of 128, K and V, 2 bytes
PREFILL_TOKENS_PER_S = 10_000
LINK_GB_PER_S = 6.74  # RESULTS.md, transfer: cma
SLOW_LINK_GB_PER_S = 1.47  # the same: tcp
COPY_GB_PER_S = 11.86  # the same: memcpy
DEVICE_BLOCKS = 800  # 54 GB
SLAB_BLOCKS = 2_000  # 134 GB; the node of benchmarks/hit_rate.py

HOT_SHARE = 0.8  # of the requests
HOT_WEIGHTS = (0.5, 0.25, 0.15, 0.1)  # of the prefixes among them
HOT_BLOCKS = 40  # 20,480 tokens
HOT_TAIL_BLOCKS = 2  # each request's own

WITHIN = 1.02
MAX_DECISION_MS = 2.0
LONG_BLOCKS = 256
DECISIONS = 2_000

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    prompts: list[tuple[int, ...]]
    speeds: Speeds
    loads: tuple[float, ...]


def speeds(link_gb_per_s: float) -> Speeds:
    block_bytes = BLOCK_TOKENS * KV_BYTES_PER_TOKEN
    return Speeds(
        prefill_ms=BLOCK_TOKENS / PREFILL_TOKENS_PER_S * 1_000,
        copy_ms=block_bytes / COPY_GB_PER_S / 1e6,
        link_ms=block_bytes / link_gb_per_s / 1e6,
    )


def with_hot_set(prompts: Sequence[Sequence[int]], *, seed: int) -> list[tuple[int, ...]]:
    """Most of the prompts become one of a few prefixes with a tail of their own."""
    dice = random.Random(seed)
    fresh = iter(range(1 << 40, 1 << 50))
    hot = [tuple(next(fresh) for _ in range(HOT_BLOCKS)) for _ in HOT_WEIGHTS]
    made = []
    for prompt in prompts:
        if dice.random() < HOT_SHARE:
            (prefix,) = dice.choices(hot, HOT_WEIGHTS)
            made.append(prefix + tuple(next(fresh) for _ in range(HOT_TAIL_BLOCKS)))
        else:
            made.append(tuple(prompt))
    return made


def arrivals(prompts: Sequence[tuple[int, ...]], *, gap_ms: float, seed: int) -> list[Request]:
    """gap_ms: the mean time between two."""
    dice = random.Random(seed)
    requests, now_ms = [], 0.0
    for number, blocks in enumerate(prompts):
        now_ms += dice.expovariate(1 / gap_ms)
        requests.append(Request(number, now_ms, blocks))
    return requests


def policies(replica_count: int, case: Case, *, seed: int, slab_blocks: int) -> dict[str, Policy]:
    return {
        "round-robin": RoundRobin(),
        "pow2": TwoChoices(seed),
        "affinity": Affinity(seed, replica_count),
        "kvray": KVRay(
            replica_count,
            device_blocks=DEVICE_BLOCKS,
            slab_blocks=slab_blocks,
            speeds=case.speeds,
        ),
    }


def play(
    case: Case, policy: Policy, replica_count: int, *, slab_blocks: int, gap_ms: float, seed: int
) -> tuple[float, World, list[Request]]:
    """Mean ms to the first token, and what is left to look at."""
    world = World(
        replica_count,
        device_blocks=DEVICE_BLOCKS,
        slab_blocks=slab_blocks,
        speeds=case.speeds,
    )
    requests = arrivals(case.prompts, gap_ms=gap_ms, seed=seed)
    world.run(requests, policy)
    world.check(requests)
    waited_ms = sum(r.first_token_ms - r.arrival_ms for r in requests)
    return waited_ms / len(requests), world, requests


def sustained_gap_ms(case: Case, replica_count: int, *, seed: int) -> float:
    """Between two requests, at which round-robin with kvray computes all the time."""
    _, world, requests = play(
        case, RoundRobin(), replica_count, slab_blocks=SLAB_BLOCKS, gap_ms=1e4, seed=seed
    )
    return sum(r.busy_ms for r in world.replicas) / len(requests) / replica_count


def measure(cases: Sequence[Case], *, seed: int) -> list[dict[str, Any]]:
    """A row for each case, size and load."""
    points = [(c, n, load) for c in cases for n in REPLICAS for load in c.loads]
    gaps = {
        (case.name, n): sustained_gap_ms(case, n, seed=seed) for case in cases for n in REPLICAS
    }
    rows = []
    for case, count, load in track(points, "routing", console=console, transient=True):
        gap_ms = gaps[case.name, count] / load
        row: dict[str, Any] = {"case": case.name, "replicas": count, "load": load}
        row["requests_per_s"] = round(1_000 / gap_ms, 2)
        for way, slab_blocks in (("with", SLAB_BLOCKS), ("without", 0)):
            for name, policy in policies(count, case, seed=seed, slab_blocks=slab_blocks).items():
                mean_ms, _, _ = play(
                    case, policy, count, slab_blocks=slab_blocks, gap_ms=gap_ms, seed=seed
                )
                row[f"{name}_{way}"] = round(mean_ms, 1)
        row["over_better"] = round(
            row["kvray_with"] / min(row["round-robin_with"], row["affinity_with"]), 3
        )
        rows.append(row)
    return rows


def decisions(count: int) -> list[float]:
    """ms of real time, each for a long prompt whose prefix is spread over 8 full replicas."""
    policy = KVRay(
        8, device_blocks=DEVICE_BLOCKS, slab_blocks=SLAB_BLOCKS, speeds=speeds(LINK_GB_PER_S)
    )
    dice = random.Random(0)
    for number in range(count):
        document = dice.randrange(64) << 20
        shared = dice.randrange(LONG_BLOCKS)
        tail = (1 << 40) + (number << 12)
        blocks = (
            *range(document, document + shared),
            *range(tail, tail + LONG_BLOCKS - shared),
        )
        policy.choose(Request(number, number * 1_000.0, blocks), [])
    return policy.decision_ms


def bars(rows: Sequence[dict[str, Any]], decision_ms: dict[str, float]) -> list[Bar]:
    def worst(case: str) -> float:
        return float(max(row["over_better"] for row in rows if row["case"] == case))

    return [
        at_most(WITHIN, "trace: kvray / better of the two with kvray, the worst", worst("trace")),
        at_most(1.0, "hot set: kvray / better of the two with kvray, the worst", worst("hot")),
        at_most(MAX_DECISION_MS, "a decision, p99 ms", decision_ms["p99"]),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table(*result["mean_ms"][0], title="mean ms to the first token")
    for row in result["mean_ms"]:
        table.add_row(*map(str, row.values()))
    Console(width=180).print(table, f"a decision, ms: {result['decision_ms']}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, nargs="?", default=TRACE)
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and policies")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_REQUESTS} requests only")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    prompts = [tuple(ids) for ids in read_trace(options.trace)]
    if options.smoke:
        prompts = prompts[:SMOKE_REQUESTS]
    fast, slow = speeds(LINK_GB_PER_S), speeds(SLOW_LINK_GB_PER_S)
    cases = [
        Case("trace", prompts, fast, LOADS),
        Case("hot", with_hot_set(prompts, seed=options.seed), fast, LOADS),
        Case("slow link", prompts, slow, SLOW_LOADS),
    ]
    rows = measure(cases, seed=options.seed)
    decision_ms = spread(decisions(DECISIONS), digits=3)
    result = {
        "requests": len(prompts),
        "seed": options.seed,
        "kv_bytes_per_token": KV_BYTES_PER_TOKEN,
        "prefill_tokens_per_s": PREFILL_TOKENS_PER_S,
        "link_gb_per_s": LINK_GB_PER_S,
        "slow_link_gb_per_s": SLOW_LINK_GB_PER_S,
        "copy_gb_per_s": COPY_GB_PER_S,
        "device_blocks": DEVICE_BLOCKS,
        "slab_blocks": SLAB_BLOCKS,
        "mean_ms": rows,
        "decision_ms": decision_ms,
    }
    return finish(
        "routing",
        result,
        bars(rows, decision_ms),
        n=len(prompts),
        as_json=options.json,
        is_smoke=options.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
