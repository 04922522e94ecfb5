"""What kvray costs where it helps nobody: prompts that were never seen, every full chunk stored.

    python benchmarks/overhead.py [--model tiny|smollm2] [--pairs N] [--json] [--smoke]

One engine without kvray and one with it, the same prompt to both, one request at a time, who is
first changing from pair to pair. The ratios are medians of the pairs' own, kvray over none. A
request's time ends with its last token, with kvray only when the last chunk has been stored too.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.bars import Bar, at_least, at_most
from benchmarks.engine_world import (
    CHUNK_TOKENS,
    MODELS,
    Instance,
    Mode,
    Model,
    full_chunks,
    prompt_of,
    running_world,
)
from benchmarks.measure import finish, spread
from tests.engines import Answer

ANSWER_TOKENS = 32
SMOKE_TOKENS = 1_000
MAX_OVERHEAD = 0.03
WARM_TOKENS = 1_500

console = Console(stderr=True)


def ask(instance: Instance, prompt: list[int]) -> tuple[Answer, float]:
    """The answer, and the ms until all is done, stores included."""
    answer, ms = instance.ask_timed(prompt, max_tokens=ANSWER_TOKENS, with_stores=True)
    assert answer.cached_tokens == 0, "this prompt is not fresh"
    return answer, ms


def measure(model: Model, *, pairs: int, tokens: int, is_smoke: bool) -> dict[str, Any]:
    ttft_ms: dict[Mode, list[float]] = {Mode.NONE: [], Mode.P2P: []}
    whole_ms: dict[Mode, list[float]] = {Mode.NONE: [], Mode.P2P: []}
    with (
        console.status("") as status,
        running_world(
            model,
            {Mode.NONE: (0,), Mode.P2P: (0,)},
            slab_tokens=pairs * (tokens + ANSWER_TOKENS),
            pool_tokens=2 * tokens,
            warm_tokens=min(tokens, WARM_TOKENS),
            is_smoke=is_smoke,
            say=status.update,
        ) as world,
    ):
        status.stop()
        ours = world[Mode.P2P, 0]
        before = ours.stats()
        for n in track(range(pairs), f"{pairs} pairs", console=console):
            for mode in (Mode.NONE, Mode.P2P) if n % 2 else (Mode.P2P, Mode.NONE):
                answer, ms = ask(world[mode, 0], prompt_of(tokens, seed=n))
                ttft_ms[mode].append(answer.ttft_ms)
                whole_ms[mode].append(ms)
        after = ours.stats()
    # The last answered token has no KV: nobody computed with it.
    chunks = pairs * (full_chunks(tokens + ANSWER_TOKENS - 1) // CHUNK_TOKENS)
    ttft_ratio = statistics.median(_ratios(ttft_ms))
    # Tokens over time: the tokens are the same.
    throughput_ratio = 1 / statistics.median(_ratios(whole_ms))
    return {
        "model": model.name,
        "ttft_ratio": round(ttft_ratio, 4),
        "throughput_ratio": round(throughput_ratio, 4),
        "stored_bytes": after["stored_bytes"] - before["stored_bytes"],
        "expected_bytes": chunks * CHUNK_TOKENS * model.kv_bytes_per_token,
        "dropped_chunks": after["dropped_chunks"] - before["dropped_chunks"],
        "prompt_tokens": tokens,
        "output_tokens": ANSWER_TOKENS,
        "ttft_ms": {mode.value: spread(values) for mode, values in ttft_ms.items()},
        "request_ms": {mode.value: spread(values) for mode, values in whole_ms.items()},
        "tokens_per_s": {
            mode.value: round((tokens + ANSWER_TOKENS) * 1_000 / statistics.median(values), 1)
            for mode, values in whole_ms.items()
        },
    }


def _ratios(times: dict[Mode, list[float]]) -> list[float]:
    return [ours / none for ours, none in zip(times[Mode.P2P], times[Mode.NONE], strict=True)]


def bars(result: dict[str, Any]) -> list[Bar]:
    stored = result["stored_bytes"] / result["expected_bytes"]
    return [
        at_most(1 + MAX_OVERHEAD, "TTFT, kvray / none", result["ttft_ratio"]),
        at_least(1 - MAX_OVERHEAD, "tokens/s, kvray / none", result["throughput_ratio"]),
        at_least(1.0, "stored / all full chunks", stored),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table(
        "", "TTFT p50", "p99", "whole request p50", "tokens/s",
        title=f"{result['model']}, {result['prompt_tokens']:,} tokens that nobody has seen",
    )  # fmt: skip
    for mode, ttft in result["ttft_ms"].items():
        request = result["request_ms"][mode]
        table.add_row(
            mode,
            f"{ttft['p50']:,.1f} ms",
            f"{ttft['p99']:,.1f} ms",
            f"{request['p50']:,.1f} ms",
            f"{result['tokens_per_s'][mode]:,}",
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="what kvray costs where nothing is reused")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument(
        "--prompt-tokens", type=int, help="default: 6,000 of tiny, 5,000 of smollm2"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="two pairs of short prompts, no bars")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    tokens = SMOKE_TOKENS if arguments.smoke else arguments.prompt_tokens or model.prompt_tokens
    pairs = 2 if arguments.smoke else arguments.pairs
    result = measure(model, pairs=pairs, tokens=tokens, is_smoke=arguments.smoke)
    promises = bars(result)
    return finish(
        "overhead",
        result,
        promises,
        n=result["ttft_ms"]["p2p"]["n"],
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
