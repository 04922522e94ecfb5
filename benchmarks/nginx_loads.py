"""What is asked of the engines behind nginx, as arguments of `vllm bench serve`, and how fast.

    prefix_repetition   8 prefixes of 3,000 tokens, 6 requests each, shuffled
    random              prompts that share nothing
    timed_trace         a slice of the committed trace, its blocks scaled from 512 to 128 tokens

Pure: no engine, no clock. The fourth load, multi_turn, is nginx_talks.py.
"""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK_TOKENS = 128  # vLLM's block on the CPU
OUTPUT_TOKENS = 16
PACED_SHARE = 0.5  # of what the engines without kvray sustain


@dataclass(frozen=True, slots=True)
class Load:
    """rounds: each is one run a mode. request_tokens: of the longest request, answer included.
    slab_tokens: what each node's slab is to hold. saturates_each_round: the throughput is a result,
    and not only what the rate is made of.
    """

    name: str
    requests: int
    request_tokens: int
    slab_tokens: int
    rounds: int
    arguments: tuple[str, ...]
    saturates_each_round: bool = False


def prefix_repetition(
    *, prefixes: int, prefix_tokens: int, requests_each: int, rounds: int
) -> Load:
    suffix_tokens = 64  # less than a chunk: what a request adds is computed anyway
    requests = prefixes * requests_each
    request_tokens = prefix_tokens + suffix_tokens + OUTPUT_TOKENS
    return Load(
        "prefix_repetition",
        requests=requests,
        request_tokens=request_tokens,
        # All prefixes, and of each request the chunk that its suffix fills.
        slab_tokens=prefixes * request_tokens + requests * CHUNK_TOKENS,
        rounds=rounds,
        arguments=(
            "--dataset-name", "prefix_repetition",
            "--num-prompts", str(requests),
            "--prefix-repetition-num-prefixes", str(prefixes),
            "--prefix-repetition-prefix-len", str(prefix_tokens),
            "--prefix-repetition-suffix-len", str(suffix_tokens),
            "--prefix-repetition-output-len", str(OUTPUT_TOKENS),
        ),
    )  # fmt: skip


def random_prompts(*, requests: int, tokens: int, rounds: int) -> Load:
    return Load(
        "random",
        requests=requests,
        request_tokens=tokens + OUTPUT_TOKENS,
        slab_tokens=requests * (tokens + OUTPUT_TOKENS),
        rounds=rounds,
        arguments=(
            "--dataset-name", "random",
            "--num-prompts", str(requests),
            "--random-input-len", str(tokens),
            "--random-output-len", str(OUTPUT_TOKENS),
        ),
        saturates_each_round=True,
    )  # fmt: skip


def timed_trace(path: Path, *, requests: int, max_blocks: int, rounds: int) -> Load:
    """path: where the slice will be written (write_trace)."""
    return Load(
        "timed_trace",
        requests=requests,
        request_tokens=max_blocks * CHUNK_TOKENS + OUTPUT_TOKENS,
        slab_tokens=requests * max_blocks * CHUNK_TOKENS // 2,  # a node computes half of them
        rounds=rounds,
        arguments=(
            "--dataset-name", "timed_trace",
            "--dataset-path", str(path),
            "--num-prompts", str(requests),
            "--timed-trace-chunk-hash-size", str(CHUNK_TOKENS),
        ),
    )  # fmt: skip


def paced_rate(sustained_per_s: float) -> float:
    """Requests per second of a paced run, rounded so that the command can be typed."""
    if not math.isfinite(sustained_per_s) or sustained_per_s <= 0:
        raise ValueError(f"expected requests per second, found {sustained_per_s}")
    return round(sustained_per_s * PACED_SHARE, 4)


def slice_of(lines: Iterable[Sequence[int]], *, requests: int, max_blocks: int) -> list[list[int]]:
    """The first requests of the trace that fit: of each its block ids."""
    fitting = [list(ids) for ids in lines if 1 <= len(ids) <= max_blocks]
    if len(fitting) < requests:
        raise ValueError(
            f"expected {requests} requests of at most {max_blocks} blocks, found {len(fitting)}"
        )
    return fitting[:requests]


def repeated_share(rows: Iterable[Sequence[int]]) -> float:
    """Of all blocks: those that an earlier request began with as well."""
    seen: set[int] = set()
    repeated = total = 0
    for ids in rows:
        head = 0
        while head < len(ids) and ids[head] in seen:
            head += 1
        repeated += head
        total += len(ids)
        seen.update(ids)
    return repeated / total if total else 0.0


def trace_lines(rows: Sequence[Sequence[int]], *, rate_per_s: float, seed: int) -> list[str]:
    """JSON lines of the timed_trace dataset. The committed trace has no times and no lengths:
    arrivals are Poisson at this rate, a prompt is all of its blocks.
    """
    source = random.Random(seed)
    at_s = 0.0
    lines = []
    for ids in rows:
        lines.append(
            json.dumps(
                {
                    "timestamp": round(at_s, 3),
                    "input_length": len(ids) * CHUNK_TOKENS,
                    "output_length": OUTPUT_TOKENS,
                    "hash_ids": list(ids),
                }
            )
        )
        at_s += source.expovariate(rate_per_s)
    return lines


def order(round_number: int, modes: Sequence[str]) -> list[str]:
    """Who is first changes from round to round."""
    return list(modes) if round_number % 2 == 0 else list(reversed(modes))


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the runs of one mode, each what `vllm bench serve --save-detailed` wrote: times of all
    requests together, in ms; failed and completed summed.
    """
    ttft_ms = [s * 1_000 for run in runs for s in run["ttfts"]]
    return {
        "ttft_ms": ttft_ms,
        "completed": sum(int(run["completed"]) for run in runs),
        "failed": sum(int(run["failed"]) for run in runs),
        "requests_per_s": sum(int(run["completed"]) for run in runs)
        / sum(float(run["duration"]) for run in runs),
    }
