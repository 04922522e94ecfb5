"""Two `vllm serve` behind nginx, round robin, with kvray and without, asked by vLLM's own client.

    python benchmarks/behind_nginx.py [--load NAME] [--rounds N] [--json] [--smoke]

    prefix_repetition   8 prefixes of 3,000 tokens, 6 requests each, shuffled
    random              prompts of 1,000 tokens that share nothing: what kvray costs there
    timed_trace         60 requests of the committed trace, a block of it as 128 tokens
    multi_turn          8 sessions of 4 turns, two at a time; a client of our own (nginx_talks.py)

Each engine's device cache holds two of the longest requests, each node's slab all prefixes. Engine
i of either pair computes on core i. First the engines without kvray get all requests at once: what
they answer per second is what they sustain (`sustained_per_s`), and half of that is the rate of the
paced runs, whose arrivals are the same in both modes. A round is one paced run a mode, with prompts
that no other round has and an empty slab; who is first changes from round to round. Times are the
client's, through nginx. multi_turn has no rate: a session asks when it has its answer.
"""

import argparse
import json
import lzma
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks import nginx_loads
from benchmarks.bars import Bar, at_least, at_most
from benchmarks.measure import finish, percentile
from benchmarks.nginx_loads import Load, merged, order, paced_rate
from benchmarks.nginx_talks import Shape, Talks, talk
from benchmarks.nginx_world import MODES, NAME, Pairs, SceneError, grown, running_pairs, tokens

TRACE = Path(__file__).resolve().parent.parent / "tests" / "data" / "mooncake_conversation.jsonl.xz"
TRACE_BLOCKS = 16  # of the longest request: 2,048 tokens
LOADS = ("prefix_repetition", "random", "timed_trace", "multi_turn")
# All of them take an hour on two cores, a third of it the round of prefix_repetition.
ROUNDS = {"prefix_repetition": 1, "random": 5, "timed_trace": 1, "multi_turn": 1}
TALKS = Shape(sessions=8, turns=4, first_tokens=2_000)
SMOKE_TALKS = Shape(sessions=2, turns=2, first_tokens=300)
MIN_TTFT_GAIN = 2.0
MAX_OVERHEAD = 0.03

console = Console(stderr=True)


def load_of(name: str, folder: Path, *, rounds: int, is_smoke: bool) -> Load:
    if name == "prefix_repetition":
        if is_smoke:
            return nginx_loads.prefix_repetition(
                prefixes=2, prefix_tokens=400, requests_each=3, rounds=rounds
            )
        return nginx_loads.prefix_repetition(
            prefixes=8, prefix_tokens=3_000, requests_each=6, rounds=rounds
        )
    if name == "random":
        requests, tokens_each = (4, 300) if is_smoke else (16, 1_000)
        return nginx_loads.random_prompts(requests=requests, tokens=tokens_each, rounds=rounds)
    requests, blocks = (6, 4) if is_smoke else (60, TRACE_BLOCKS)
    return nginx_loads.timed_trace(
        folder / "trace.jsonl", requests=requests, max_blocks=blocks, rounds=rounds
    )


def measure_load(name: str, *, rounds: int, is_smoke: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kvray-trace-") as folder:
        load = load_of(name, Path(folder), rounds=rounds, is_smoke=is_smoke)
        rows = trace_rows(load) if name == "timed_trace" else []
        with running_pairs(load.request_tokens, slab_tokens=load.slab_tokens, say=say) as pairs:
            result = play(pairs, load, lambda rate, seed: write_trace(folder, rows, rate, seed))
    if rows:
        result["repeated_share"] = round(nginx_loads.repeated_share(rows), 3)
    return result


def play(pairs: Pairs, load: Load, write: Callable[[float, int], None]) -> dict[str, Any]:
    """write: the trace at this rate, where the load has one."""
    is_trace = load.name == "timed_trace"
    saturated: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    paced: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    rate = 0.0
    for number in range(load.rounds):
        if number == 0 or load.saturates_each_round:
            seed = 2 * number + 1
            write(1.0, seed)
            at_once = ("--no-self-timed",) if is_trace else ()
            for mode in order(number, MODES):
                run = pairs.bench(mode, (*load.arguments, *at_once), seed=seed)
                say(f"round {number + 1}, {mode}, all at once: {in_words(run)}")
                saturated[mode].append(run)
                if not rate:
                    rate = paced_rate(run["request_throughput"])
        seed = 2 * number + 2
        write(rate, seed)
        for mode in order(number, MODES):
            run = pairs.bench(mode, load.arguments, seed=seed, rate_per_s=rate)
            say(f"round {number + 1}, {mode}, {rate} requests/s: {in_words(run)}")
            paced[mode].append(run)
    return summary(load, rate, saturated, paced)


def summary(
    load: Load,
    rate: float,
    saturated: dict[str, list[dict[str, Any]]],
    paced: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    modes = {
        mode: told(paced[mode])
        | {
            "sustained_per_s": round(
                statistics.median(run["request_throughput"] for run in saturated[mode]), 4
            ),
            "saturated_tokens": added(run["tokens"] for run in saturated[mode]),
            "failed": sum(int(run["failed"]) for run in (*paced[mode], *saturated[mode])),
        }
        for mode in MODES
    }
    return {
        "load": load.name,
        "model": NAME,
        "rounds": load.rounds,
        "requests": load.requests,
        "request_rate_per_s": rate,
        "modes": modes,
        "ttft_gain": gain(modes),
        "ttft_ratios": ratios(paced, "mean_ttft_ms"),
        "throughput_ratios": ratios(saturated, "request_throughput"),
    }


def told(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the paced runs of one mode: all their requests together."""
    found = merged(runs)
    return {
        **times(found["ttft_ms"]),
        "completed": found["completed"],
        "requests_per_s": round(found["requests_per_s"], 4),
        **({"tokens": counted} if (counted := added(run["tokens"] for run in runs)) else {}),
    }


def added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """What is nowhere is left out."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return {name: count for name, count in total.items() if count}


def times(ttft_ms: Sequence[float]) -> dict[str, float]:
    return {
        "mean_ttft_ms": round(statistics.mean(ttft_ms), 1),
        "median_ttft_ms": round(statistics.median(ttft_ms), 1),
        "p99_ttft_ms": round(percentile(ttft_ms, 99), 1),
    }


def gain(modes: dict[str, Any]) -> float:
    """Mean TTFT without kvray over that with it."""
    return round(float(modes["none"]["mean_ttft_ms"] / modes["kvray"]["mean_ttft_ms"]), 2)


def ratios(runs: dict[str, list[dict[str, Any]]], key: str) -> list[float]:
    """kvray over none, of each round."""
    return [
        round(ours[key] / none[key], 4)
        for none, ours in zip(runs["none"], runs["kvray"], strict=True)
    ]


def measure_talks(*, rounds: int, is_smoke: bool) -> dict[str, Any]:
    shape = SMOKE_TALKS if is_smoke else TALKS
    taken: dict[str, list[Talks]] = {mode: [] for mode in MODES}
    counted: list[dict[str, int]] = []
    slab_tokens = shape.sessions * shape.session_tokens
    with running_pairs(shape.session_tokens, slab_tokens=slab_tokens, say=say) as pairs:
        for number in range(rounds):
            for mode in order(number, MODES):
                say(f"round {number + 1} of {rounds}: {mode}")
                scene = pairs.scenes[mode]
                if scene.cluster is not None:
                    scene.cluster.clear()
                before = tokens(scene)
                talks = talk(scene.port, NAME, shape, seed=number)
                counted.append(grown(before, tokens(scene)))
                for error in talks.errors:
                    console.print(error, style="red", markup=False)
                taken[mode].append(talks)
    modes = {mode: told_talks(runs) for mode, runs in taken.items()}
    modes["kvray"]["tokens"] = added(counted)
    return {
        "load": "multi_turn",
        "model": NAME,
        "rounds": rounds,
        "sessions": shape.sessions,
        "turns": shape.turns,
        "first_tokens": shape.first_tokens,
        "requests": shape.sessions * shape.turns,
        "modes": modes,
        "ttft_gain": gain(modes),
    }


def told_talks(runs: Sequence[Talks]) -> dict[str, Any]:
    """The first turn of a session is new to everybody: mean_later_ttft_ms leaves it out."""
    by_turn = [
        [ms for run in runs for ms in run.ttft_ms[turn]] for turn in range(len(runs[0].ttft_ms))
    ]
    every = [ms for turn in by_turn for ms in turn]
    later = [ms for turn in by_turn[1:] for ms in turn]
    return {
        **times(every),
        "mean_later_ttft_ms": round(statistics.mean(later), 1),
        "completed": len(every),
        "requests_per_s": round(len(every) / sum(run.duration_s for run in runs), 4),
        "failed": sum(run.failed for run in runs),
    }


def trace_rows(load: Load) -> list[list[int]]:
    with lzma.open(TRACE, "rt") as file:
        lines = [json.loads(line)["hash_ids"] for line in file]
    max_blocks = load.request_tokens // nginx_loads.CHUNK_TOKENS
    return nginx_loads.slice_of(lines, requests=load.requests, max_blocks=max_blocks)


def write_trace(folder: str, rows: Sequence[Sequence[int]], rate: float, seed: int) -> None:
    if rows:
        lines = nginx_loads.trace_lines(rows, rate_per_s=rate, seed=seed)
        (Path(folder) / "trace.jsonl").write_text("\n".join(lines) + "\n")


def bars(result: dict[str, Any]) -> list[Bar]:
    failed = sum(found["failed"] for found in result["modes"].values())
    promises = [at_most(0, "failed requests", failed)]
    if result["load"] == "prefix_repetition":
        promises.append(at_least(MIN_TTFT_GAIN, "mean TTFT, none / kvray", result["ttft_gain"]))
    if result["load"] == "random":
        ttft = statistics.median(result["ttft_ratios"])
        throughput = statistics.median(result["throughput_ratios"])
        promises += [
            at_most(1 + MAX_OVERHEAD, "mean TTFT, kvray / none, median of the rounds", ttft),
            at_least(
                1 - MAX_OVERHEAD, "sustained rate, kvray / none, median of the rounds", throughput
            ),
        ]
    return promises


def in_words(run: dict[str, Any]) -> str:
    return (
        f"{run['completed']} answered, {run['failed']} failed, {run['duration']:.0f} s, mean TTFT "
        f"{run['mean_ttft_ms']:,.0f} ms"
    )


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


def show(result: dict[str, Any]) -> None:
    table = Table(
        "", "mean TTFT", "median", "p99", "requests/s", "sustained", "failed",
        title=f"{result['load']}: {result['requests']} requests a round, {result['rounds']} rounds",
    )  # fmt: skip
    for mode, found in result["modes"].items():
        table.add_row(
            mode,
            *(f"{found[f'{which}_ttft_ms']:,.0f} ms" for which in ("mean", "median", "p99")),
            f"{found['requests_per_s']:.3f}",
            f"{found['sustained_per_s']:.3f}" if "sustained_per_s" in found else "",
            str(found["failed"]),
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="vllm serve behind nginx, with kvray and without")
    parser.add_argument("--load", choices=LOADS, default="prefix_repetition")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="one short round, no bars")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.smoke else ROUNDS[options.load])
    try:
        if options.load == "multi_turn":
            result = measure_talks(rounds=rounds, is_smoke=options.smoke)
        else:
            result = measure_load(options.load, rounds=rounds, is_smoke=options.smoke)
    except SceneError as exc:
        console.print(str(exc), style="red", markup=False)
        return 2
    return finish(
        "behind_nginx",
        result,
        bars(result),
        n=min(found["completed"] for found in result["modes"].values()),
        as_json=options.json,
        is_smoke=options.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
