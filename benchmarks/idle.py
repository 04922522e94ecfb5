"""What everybody uses while nobody asks anything: percent of a core, over 20 quiet seconds.

    python benchmarks/idle.py [--seconds S] [--looks N] [--json] [--smoke]

Two Ray nodes, an engine with kvray on each, and two engines without kvray beside them, all measured
over the same seconds after each has answered a request. What else runs here makes each wake-up
dearer, so of several looks each process is given its quietest.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.bars import Bar, at_most
from benchmarks.engine_world import MODELS, Mode, World, prompt_of, running_world
from benchmarks.measure import cpu_s, finish
from kvray.actors import RAY_NAMESPACE, directory_name

TOKENS = 1_000
POOL_TOKENS = 4_096
QUIET_S = 3.0  # between the last request and the first look: OpenMP's threads spin a while
TICK_S = 0.5  # of the progress bar
MAX_KVRAY_PERCENT = 1.5
MAX_ENGINE_POINTS = 0.5

console = Console(stderr=True)

Pids = Callable[[], list[int]]


def watched(world: World) -> dict[str, Pids]:
    """Name, and the processes that belong to it."""
    nodes = world.nodes
    assert nodes is not None
    name = directory_name(nodes.cluster.name)
    directory: Any = ray.get_actor(name, namespace=RAY_NAMESPACE)
    found: dict[str, Pids] = {}
    for index in range(len(nodes.node_ids)):
        pid = int(nodes.status(index)["pid"])
        found[f"node_store-{index}"] = partial(list, [pid])
    found["directory"] = partial(list, [int(ray.get(directory.pid.remote()))])
    for instance in world.instances.values():
        found[_engine_name(instance.mode, instance.index)] = instance.engine.processes
    return found


def _engine_name(mode: Mode, index: int) -> str:
    return f"engine-{index}" if mode is Mode.P2P else f"engine-{index}-without"


def look(everybody: dict[str, Pids], progress: Progress, seconds: float) -> dict[str, float]:
    """Percent of a core of each, over these seconds."""
    task = progress.add_task(f"{seconds:.0f} quiet seconds", total=seconds)
    before = {name: cpu_s(pids()) for name, pids in everybody.items()}
    begun_s = time.monotonic()
    while (passed_s := time.monotonic() - begun_s) < seconds:
        progress.update(task, completed=passed_s)
        time.sleep(min(TICK_S, seconds - passed_s))
    progress.update(task, completed=seconds)
    used = {name: cpu_s(pids()) - before[name] for name, pids in everybody.items()}
    return {name: used_s * 100 / passed_s for name, used_s in used.items()}


def measure(*, seconds: float, looks: int, is_smoke: bool) -> dict[str, Any]:
    wanted = {Mode.NONE: (0, 1), Mode.P2P: (0, 1)}
    with (
        console.status("") as status,
        running_world(
            MODELS["tiny"],
            wanted,
            slab_tokens=4 * TOKENS,
            pool_tokens=POOL_TOKENS,
            warm_tokens=0,
            is_smoke=is_smoke,
            say=status.update,
        ) as world,
    ):
        status.stop()
        for instance in world.instances.values():
            instance.ask(prompt_of(TOKENS, seed=instance.index), max_tokens=8)
            instance.settle()
        everybody = watched(world)
        time.sleep(QUIET_S)
        with Progress(console=console, refresh_per_second=1 / TICK_S) as progress:
            seen = [look(everybody, progress, seconds) for _ in range(looks)]
    quietest = {name: min(one[name] for one in seen) for name in everybody}
    without = [_engine_name(Mode.NONE, index) for index in wanted[Mode.NONE]]
    return {
        "seconds": seconds,
        "looks": looks,
        "processes": [_row(n, quietest, with_kvray=True) for n in everybody if n not in without],
        "baseline": [_row(name, quietest, with_kvray=False) for name in without],
    }


def _row(name: str, percents: dict[str, float], *, with_kvray: bool) -> dict[str, Any]:
    return {"name": name, "kvray": with_kvray, "cpu_percent": round(percents[name], 3)}


def bars(result: dict[str, Any]) -> list[Bar]:
    def dearest(rows: list[dict[str, Any]], *, engines: bool) -> float:
        return float(
            max(r["cpu_percent"] for r in rows if r["name"].startswith("engine") is engines)
        )

    ours = dearest(result["processes"], engines=True)
    without = dearest(result["baseline"], engines=True)
    return [
        at_most(
            MAX_KVRAY_PERCENT,
            "percent of a core of a process of kvray",
            dearest(result["processes"], engines=False),
        ),
        at_most(MAX_ENGINE_POINTS, "points of an engine above one without", ours - without),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table("process", "with kvray", "percent of a core")
    for row in result["processes"] + result["baseline"]:
        table.add_row(row["name"], "yes" if row["kvray"] else "no", f"{row['cpu_percent']:.2f}")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="what an idle cluster and its engines cost")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--looks", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="one look of 3 s, no bars")
    arguments = parser.parse_args()
    seconds, looks = (3.0, 1) if arguments.smoke else (arguments.seconds, arguments.looks)
    result = measure(seconds=seconds, looks=looks, is_smoke=arguments.smoke)
    promises = bars(result)
    return finish(
        "idle",
        result,
        promises,
        n=looks,
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
