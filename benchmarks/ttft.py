"""Time to the first token of one prompt, by where its KV comes from.

    cold     nowhere: the engine computes it
    device   the engine's own prefix cache
    local    the slab of its node: the prefix cache was reset
    peer     the slab of the other node

    python benchmarks/ttft.py --model tiny|smollm2 [--prompts N] [--json] [--smoke]

Two Ray nodes and two engines on this machine, a fresh prompt each time, all four one after another
for each prompt; the engines change parts from prompt to prompt. Each answer must be the one that
the device's own cache gives, and each hit must have come from where it should.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.bars import Bar, at_least, at_most
from benchmarks.engine_world import (
    MODELS,
    Instance,
    Mode,
    Model,
    World,
    full_chunks,
    prompt_of,
    running_world,
)
from benchmarks.measure import finish, spread
from tests.engines import Answer

ANSWER_TOKENS = 4  # to compare: a wrong byte of KV shows in the first ones
SMOKE_TOKENS = 1_500
MAX_INCOMPLETE = 4  # in a whole run; more is a fault and no bad luck
WAYS = ("cold", "device_hit", "local_hit", "peer_hit")
MAX_PEER_OVER_DEVICE = {"tiny": 1.4, "smollm2": 2.0}
MAX_LOCAL_OVER_DEVICE = 1.3
MIN_COLD_OVER_PEER = {"tiny": 15.0, "smollm2": 50.0}

console = Console(stderr=True)


class Incomplete(Exception):  # noqa: N818 (a value for the count, no error of the benchmark)
    """A hit did not bring all that was stored, or not from where it should. On a busy machine
    kvray drops a store or a look-up that would hold up the engine: such a prompt is counted and
    replaced, since its time is that of another way.
    """


def hit(instance: Instance, prompt: list[int], *, came: dict[str, int]) -> Answer:
    """Asks, and checks where the tokens of full chunks came from: came, by counter."""
    before = instance.stats()
    answer = instance.ask(prompt, max_tokens=ANSWER_TOKENS)
    after = instance.stats()
    for counter in ("hit_tokens_local", "hit_tokens_peer", "failed_loads", "dropped_chunks"):
        found = after[counter] - before[counter]
        if found != came.get(counter, 0):
            raise Incomplete(f"{counter}: {found} and not {came.get(counter, 0)}")
    return answer


def measure_prompt(first: Instance, second: Instance, prompt: list[int]) -> dict[str, float]:
    """ms of each way; `first` computes the prompt, `second` fetches it. Raises Incomplete."""
    whole = full_chunks(len(prompt))
    cold = hit(first, prompt, came={})
    assert cold.cached_tokens == 0, "this prompt is not fresh"
    first.settle()
    device = hit(first, prompt, came={})
    first.forget_device()
    local = hit(first, prompt, came={"hit_tokens_local": whole})
    peer = hit(second, prompt, came={"hit_tokens_peer": whole})
    second.settle()
    for answer in (device, local, peer):
        assert answer.cached_tokens == whole, f"{answer.cached_tokens} of {whole} tokens"
        assert answer.tokens == device.tokens, "another answer than from the device's own cache"
    return dict(zip(WAYS, (a.ttft_ms for a in (cold, device, local, peer)), strict=True))


def fetched(world: World) -> tuple[int, int]:
    """Bytes that the nodes have fetched so far, and the ms in which a read of theirs was under
    way, headers included.
    """
    assert world.nodes is not None
    counts = [world.nodes.status(index)["fetch"] for index in range(len(world.nodes.node_ids))]
    return sum(c["fetched_bytes"] for c in counts), sum(c["fetch_busy_ms"] for c in counts)


def measure_one(
    first: Instance, second: Instance, seeds: Iterator[int], tokens: int, incomplete: list[str]
) -> dict[str, float]:
    """Of the first fresh prompt that is complete; why the others were not goes to `incomplete`."""
    while True:
        try:
            return measure_prompt(first, second, prompt_of(tokens, seed=next(seeds)))
        except Incomplete as exc:
            incomplete.append(str(exc))
            if len(incomplete) > MAX_INCOMPLETE:
                raise


def measure(
    model: Model, *, prompts: int, tokens: int, is_smoke: bool, settings: dict[str, object]
) -> dict[str, Any]:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    incomplete: list[str] = []
    seeds = itertools.count()
    with (
        console.status("") as status,
        running_world(
            model,
            {Mode.P2P: (0, 1)},
            slab_tokens=(prompts + MAX_INCOMPLETE) * tokens,
            pool_tokens=2 * tokens,
            warm_tokens=tokens,
            is_smoke=is_smoke,
            say=status.update,
            settings=settings,
        ) as world,
    ):
        status.stop()
        instances = world.of(Mode.P2P)
        before = fetched(world)
        for n in track(range(prompts), f"{prompts} prompts", console=console):
            first, second = instances[n % 2], instances[1 - n % 2]
            taken = measure_one(first, second, seeds, tokens, incomplete)
            for way, ms in taken.items():
                times[way].append(ms)
        fetched_bytes, busy_ms = (b - a for a, b in zip(before, fetched(world), strict=True))
    median = {way: statistics.median(values) for way, values in times.items()}
    return {
        "model": model.name,
        "settings": settings,
        **{f"{way}_ms": round(ms, 2) for way, ms in median.items()},
        "peer_over_device": round(median["peer_hit"] / median["device_hit"], 3),
        "local_over_device": round(median["local_hit"] / median["device_hit"], 3),
        "cold_over_peer": round(median["cold"] / median["peer_hit"], 2),
        "prompt_tokens": tokens,
        "fetch_gb_per_s": round(fetched_bytes / max(1, busy_ms) / 1e6, 2),
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "incomplete": incomplete,
        "latencies_ms": {way: spread(values) for way, values in times.items()},
        "samples_ms": {way: [round(ms, 2) for ms in values] for way, values in times.items()},
    }


def bars(result: dict[str, Any]) -> list[Bar]:
    name = result["model"]
    return [
        at_most(MAX_PEER_OVER_DEVICE[name], "peer hit / device hit", result["peer_over_device"]),
        at_most(MAX_LOCAL_OVER_DEVICE, "local hit / device hit", result["local_over_device"]),
        at_least(MIN_COLD_OVER_PEER[name], "cold / peer hit", result["cold_over_peer"]),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table(
        "KV comes from", "p50", "p99", "n",
        title=f"{result['model']}, {result['prompt_tokens']:,} tokens: time to the first token",
    )  # fmt: skip
    for way, times in result["latencies_ms"].items():
        table.add_row(way, f"{times['p50']:,.1f} ms", f"{times['p99']:,.1f} ms", str(times["n"]))
    Console().print(table)
    for reason in result["incomplete"]:
        console.print(f"a prompt was replaced: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description="time to the first token, cold and of three hits")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument(
        "--prompt-tokens", type=int, help="default: 6,000 of tiny, 5,000 of smollm2"
    )
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="of kvray.EngineConfig, as JSON"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="two short prompts, no bars")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    tokens = SMOKE_TOKENS if arguments.smoke else arguments.prompt_tokens or model.prompt_tokens
    result = measure(
        model,
        prompts=2 if arguments.smoke else arguments.prompts,
        tokens=tokens,
        is_smoke=arguments.smoke,
        settings=arguments.settings,
    )
    promises = bars(result)
    return finish(
        "ttft",
        result,
        promises,
        n=result["latencies_ms"]["peer_hit"]["n"],
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
