"""What watching costs, and how soon one sees: status on fifty nodes, and look-ups while watched.

    status_ms                Cluster.status() of fifty simulated nodes: p50, p99
    typed_status_s           `kvray status --json` on a real node, as a process: Python, Ray, answer
    lookup_us                of 64 keys, `unwatched` and `watched`: by the page, looked at every
                             second as a browser does, and by another process that does what
                             `kvray top` does; rounds in turn
    watched_over_unwatched   the median over the rounds of the ratio of their medians

Simulated is what a NodeStore would have said: an actor for each node, with the whole word of a real
one. The directory, the heartbeats, all calls and what is made of the answers are real.

python benchmarks/watching.py [--nodes N] [--json] [--smoke]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ray
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvray
from benchmarks.bars import Bar, at_most
from benchmarks.directory_players import Beaters, make_actor, make_directory
from benchmarks.lookup_local import BLOCK_BYTES, EXTENT_BYTES, SLAB_BYTES, fill, lookup_times_us
from benchmarks.lookup_scene import READY_LIMIT_S, own_cluster, own_node_id
from benchmarks.measure import finish, spread
from kvray.actors import RAY_NAMESPACE, node_store_name, page_name
from kvray.cluster import Cluster, NodeState
from kvray.watch.page import WATCHED_PERIOD_S, open_page
from kvray.watch.tables import status_view
from tests.block_client import Client
from tests.ray_nodes import wait_until

NODES, SMOKE_NODES = 50, 4
STATUS_CALLS, SMOKE_CALLS = 40, 3
ROUNDS, SMOKE_ROUNDS = 8, 1
ROUND_S, SMOKE_ROUND_S = 6.0, 2.0  # of look-ups: some looks of each watcher fall into it
KEYS = 64
PACE_S = 0.005  # between two look-ups: an engine has one a request
MAX_STATUS_MS = 1_000.0
# "Nothing measurable": two medians of the same thing differ by as much here.
MAX_WATCHED_RATIO = 1.05
SIMULATED = "simulated"

console = Console(stderr=True)


class SimulatedNodeStore:
    """Says what a real one has said, under another name."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def status(self) -> dict[str, Any]:
        return self._status


class SimulatedCluster(Cluster):
    """Its nodes are no Ray nodes."""

    def __init__(self, directory: Any, node_ids: list[str]) -> None:
        super().__init__(SIMULATED, directory)
        self._node_ids = node_ids

    def _alive_hosts(self) -> dict[str, str]:
        return dict.fromkeys(self._node_ids, "simulated")


@contextmanager
def simulated(count: int, word: dict[str, Any]) -> Iterator[Cluster]:
    """word: what each of them says; its peers are made up, as many as there would be."""
    directory = make_directory(SIMULATED)
    beaters = make_actor(Beaters, directory, list(range(count)), max_concurrency=2)
    node_ids = [f"{number:056x}" for number in range(count)]
    peers = {node_id: {"fetched_bytes": 10**9, "bytes_per_ms": 5e6} for node_id in node_ids}
    fetch = word["fetch"] | {"peers": peers}
    stores = [
        make_actor(
            SimulatedNodeStore,
            word | {"node_id": node_id, "fetch": fetch},
            name=node_store_name(SIMULATED, node_id),
            namespace=RAY_NAMESPACE,
        )
        for node_id in node_ids
    ]
    try:
        ray.get([store.status.remote() for store in stores])
        ray.get(beaters.start.remote())
        cluster = SimulatedCluster(directory, node_ids)
        wait_until(
            lambda: [node.state for node in cluster.status().nodes] == [NodeState.READY] * count,
            what=f"{count} simulated nodes",
            limit_s=READY_LIMIT_S,
        )
        yield cluster
    finally:
        for actor in (beaters, *stores, directory):
            ray.kill(actor)


def measure_status(count: int, calls: int, word: dict[str, Any]) -> dict[str, Any]:
    taken = []
    with simulated(count, word) as cluster:
        for _ in track(range(calls), f"status of {count} nodes", console=console):
            begun_s = time.perf_counter()
            status = cluster.status()
            status_view(status)
            taken.append((time.perf_counter() - begun_s) * 1_000)
            assert [node.state for node in status.nodes] == [NodeState.READY] * count
    return {"nodes": count, "status_ms": spread(taken, digits=1)}


def typed_status_s(count: int) -> list[float]:
    """The whole command, from nothing to its exit."""
    address = ray.get_runtime_context().gcs_address
    taken = []
    for _ in range(count):
        begun_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "kvray.watch", "status", "--json"],
            env=os.environ | {"RAY_ADDRESS": address},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        taken.append(time.perf_counter() - begun_s)
    return taken


class Top:
    """What `kvray top` does, in a process of its own."""

    def run(self, seconds: float) -> int:
        cluster = kvray.connect()
        end_s, looks = time.monotonic() + seconds, 0
        while time.monotonic() < end_s:
            status_view(cluster.status())
            looks += 1
            time.sleep(WATCHED_PERIOD_S)
        return looks


class Browser:
    """Asks the page for its data as the page's script does."""

    def run(self, url: str, seconds: float) -> int:
        end_s, looks = time.monotonic() + seconds, 0
        while time.monotonic() < end_s:
            with urllib.request.urlopen(url + "data", timeout=READY_LIMIT_S) as answer:  # noqa: S310
                answer.read()
            looks += 1
            time.sleep(WATCHED_PERIOD_S)
        return looks


def lookups_us(client: Client, keys: list[Any], seconds: float) -> list[float]:
    """An engine's pace, not a flood: a watcher that takes a core would be waited for."""
    taken: list[float] = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        taken += lookup_times_us(client, keys, 1, churn=False)
        time.sleep(PACE_S)
    return taken


def measure_watched(
    cluster: Cluster, client: Client, rounds: int, seconds: float
) -> dict[str, Any]:
    """No page at all, then one that is looked at, in turn; each round begins with the other."""
    keys = client.store(*(f"watched {i}" for i in range(KEYS)))
    top, browser = make_actor(Top), make_actor(Browser)
    taken: dict[str, list[float]] = {"unwatched": [], "watched": []}
    ratios = []
    lookups_us(client, keys, seconds)
    for number in track(range(rounds), "look-ups, watched and not", console=console):
        medians = {}
        for way in sorted(taken, reverse=bool(number % 2)):
            looks = []
            if way == "watched":
                url = open_page(cluster)
                looks = [top.run.remote(seconds), browser.run.remote(url, seconds)]
            times = lookups_us(client, keys, seconds)
            if looks:
                assert min(ray.get(looks)) >= seconds / 2, "it was hardly watched"
                ray.kill(ray.get_actor(page_name(cluster.name), namespace=RAY_NAMESPACE))
            taken[way] += times
            medians[way] = statistics.median(times)
        ratios.append(medians["watched"] / medians["unwatched"])
    return {
        "lookup_us": {way: spread(times, digits=1) for way, times in taken.items()},
        "watched_over_unwatched": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def measure(nodes: int, *, smoke: bool) -> dict[str, Any]:
    calls, rounds, seconds = (
        (SMOKE_CALLS, SMOKE_ROUNDS, SMOKE_ROUND_S) if smoke else (STATUS_CALLS, ROUNDS, ROUND_S)
    )
    with own_cluster(slab_bytes=SLAB_BYTES, extent_bytes=EXTENT_BYTES) as cluster:
        client = Client(cluster, own_node_id(), block_bytes=BLOCK_BYTES)
        fill(client)
        (node,) = cluster.nodes()
        result = measure_watched(cluster, client, rounds, seconds)
        result["typed_status_s"] = spread(typed_status_s(1 if smoke else 5))
        result |= measure_status(nodes, calls, node.details)
        client.close()
    return result


def bars(result: dict[str, Any]) -> list[Bar]:
    return [
        at_most(
            MAX_STATUS_MS,
            f"status of {result['nodes']} nodes, p50, ms",
            result["status_ms"]["p50"],
        ),
        at_most(
            MAX_WATCHED_RATIO,
            "look-up p50, watched over unwatched",
            result["watched_over_unwatched"],
        ),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table("what", "p50", "p99", "n")
    rows = {f"status of {result['nodes']} nodes, ms": result["status_ms"]}
    rows |= {"`kvray status`, the command, s": result["typed_status_s"]}
    rows |= {f"look-up, {way}, µs": found for way, found in result["lookup_us"].items()}
    for name, found in rows.items():
        table.add_row(name, f"{found['p50']:,}", f"{found['p99']:,}", str(found["n"]))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="what watching costs")
    parser.add_argument("--nodes", type=int, default=0, help="how many to simulate")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="a short run; no bar is held to")
    options = parser.parse_args()
    nodes = options.nodes or (SMOKE_NODES if options.smoke else NODES)
    result = measure(nodes, smoke=options.smoke)
    return finish(
        "watching", result, bars(result), n=result["status_ms"]["n"], as_json=options.json,
        is_smoke=options.smoke, show=lambda: show(result), console=console,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
