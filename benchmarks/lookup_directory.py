"""What the directory actor costs, and where one of it ends.

    locate_us              of 64 and 512 keys, by a Ray call, encoding and decoding included
    bare_call_us           of an actor that answers with as many bytes to as many
    locate_in_a_row_us     the directory's part of a locate, one after another without a call: what
                           the same work takes where nobody sleeps
    directory_keys_per_s   located by 8 processes at once, 4,096 keys a call
    bytes_per_entry        resident memory of the directory's process, for one key at one node
    heartbeat_cpu_percent  of one core, for 1,000 nodes, each as often as it is told to
    one_actor              what a core of the directory can do: where one actor ends

    python benchmarks/lookup_directory.py [--json] [--smoke] [--entries N]

Everything is real: the directory's own class in a Ray actor, with messages as NodeStores send them.
Each key that is asked for has one location, which is the longest answer. Directory and askers share
the cores of this machine, so the keys located in a second of the directory's own CPU time are given
beside those of a second.
"""

import argparse
import functools
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.bars import Bar, at_least, at_most
from benchmarks.directory_players import (
    PART_ENTRIES,
    Asker,
    Bare,
    Beaters,
    KeyPool,
    anonymous_bytes,
    info_of,
    make_actor,
    make_directory,
    part_entries,
)
from benchmarks.lookup_scene import own_ray
from benchmarks.measure import cpu_s, finish, spread
from kvray.core.codec import decode, encode
from kvray.core.directory import DirectoryLimits
from kvray.core.ids import Term
from kvray.core.messages import (
    MAX_CALL_BYTES,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    LocateReply,
    NodeHello,
    NodeHelloReply,
)

ENTRIES, SMOKE_ENTRIES = 4_000_000, 200_000
HOLDING_NODES = 4  # that have them
KEY_COUNTS = (64, 512)
CALLS, SMOKE_CALLS = 1_500, 100  # locates and bare calls of each size, in turn
CLIENTS, CLIENT_KEYS = 8, 4_096
CLIENT_S, SMOKE_CLIENT_S = 10.0, 2.0
NODES, SMOKE_NODES = 1_000, 40
BEATERS = 4  # processes that play the nodes
BEAT_S, SMOKE_BEAT_S = 12.0, 3.0  # six periods
FLOOD_S, SMOKE_FLOOD_S = 5.0, 1.0
SETTLE_DEADLINE_S = 150.0  # a thousand hellos, each answered with the whole roster

MAX_LOCATE_OVER_BARE = 1.3
MIN_KEYS_PER_S = 1_000_000
MAX_BYTES_PER_ENTRY = 100
MAX_HEARTBEAT_PERCENT = 30

console = Console(stderr=True)


# ---- entries


class Holders:
    """Nodes that announce their whole sets, each once."""

    def __init__(self, directory: Any) -> None:
        self._directory = directory
        self._infos = [info_of(f"{i:056x}") for i in range(1, HOLDING_NODES + 1)]
        self._sequences = dict.fromkeys([info.node_id for info in self._infos], 0)
        self._term = Term(0)

    def announce_all(self, part_count: int) -> None:
        for info in self._infos:
            data = ray.get(self._directory.hello.remote(encode(NodeHello(info, info.epoch))))
            self._term = decode(data, max_bytes=MAX_CALL_BYTES, expect=NodeHelloReply).term
        rounds = math.ceil(part_count / HOLDING_NODES)
        for part in track(range(part_count), "entries", console=console):
            number, index = divmod(part, HOLDING_NODES)
            is_last = part + HOLDING_NODES >= part_count
            self._say(index, part_entries(part), part=number + 1, last=is_last)
        assert rounds, "at least one part"

    def beat(self) -> None:
        """So that none is buried. To be called at least once a second."""
        for index in range(HOLDING_NODES):
            self._say(index, b"", part=0, last=False)

    def _say(self, index: int, adds: bytes, *, part: int, last: bool) -> None:
        info = self._infos[index]
        self._sequences[info.node_id] += 1
        announce = Announce(
            info.node_id, info.epoch, self._term, self._sequences[info.node_id], 1, adds, b"",
            part, last,
        )  # fmt: skip
        data = ray.get(self._directory.announce.remote(encode(announce)))
        reply = decode(data, max_bytes=MAX_CALL_BYTES, expect=AnnounceReply)
        assert reply.status in (AnnounceStatus.OK, AnnounceStatus.RESYNC), reply.status


def measure_entries(directory: Any, holders: Holders, part_count: int) -> dict[str, Any]:
    pid = ray.get(directory.pid.remote())
    before_bytes, before_s = anonymous_bytes(pid), cpu_s([pid])
    holders.announce_all(part_count)
    taken_s, grown_bytes = cpu_s([pid]) - before_s, anonymous_bytes(pid) - before_bytes
    entries = ray.get(directory.status.remote())["entries"]
    assert entries == part_count * PART_ENTRIES, f"{entries} entries"
    return {
        "entries": entries,
        "bytes_per_entry": round(grown_bytes / entries, 1),
        "announced_entries_per_core_s": round(entries / taken_s),
    }


# ---- locates


def measure_locates(
    directory: Any, holders: Holders, part_count: int, calls: int
) -> dict[str, Any]:
    """One locate, one bare call, and so on, from this process."""
    pool = KeyPool(part_count, seed=1)
    messages = {count: [pool.message(count) for _ in range(16)] for count in KEY_COUNTS}
    answers = {
        len(sent[0]): ray.get(directory.locate.remote(sent[0])) for sent in messages.values()
    }
    bare = make_actor(Bare, answers)
    taken: dict[str, dict[int, list[float]]] = {
        kind: {count: [] for count in KEY_COUNTS} for kind in ("locate", "bare")
    }
    for n in track(range(calls), "locates", console=console):
        for count, sent in messages.items():
            begun = time.perf_counter_ns()
            answer = ray.get(bare.locate.remote(sent[n % 16]))
            ended = time.perf_counter_ns()
            taken["bare"][count].append((ended - begun) / 1_000)
            begun = time.perf_counter_ns()
            data = ray.get(directory.locate.remote(sent[n % 16]))
            decode(data, max_bytes=MAX_CALL_BYTES, expect=LocateReply)
            ended = time.perf_counter_ns()
            taken["locate"][count].append((ended - begun) / 1_000)
            assert len(answer) == len(data), "the bare call has as many bytes"
        if n % 50 == 0:
            holders.beat()
    ray.kill(bare)
    in_a_row = {
        count: ray.get(directory.locate_in_a_row_us.remote(sent, calls))
        for count, sent in messages.items()
    }
    holders.beat()
    return {
        "locate_in_a_row_us": {str(count): spread(us, digits=1) for count, us in in_a_row.items()},
        "locate_us": {str(count): spread(us, digits=1) for count, us in taken["locate"].items()},
        "bare_call_us": {str(count): spread(us, digits=1) for count, us in taken["bare"].items()},
        "locate_over_bare": {
            str(count): round(
                statistics.median(taken["locate"][count]) / statistics.median(taken["bare"][count]),
                3,
            )
            for count in KEY_COUNTS
        },
    }


def measure_clients(
    directory: Any, holders: Holders, part_count: int, seconds: float
) -> dict[str, Any]:
    """All of them at once, each in a process of its own, each one call after another."""
    askers = [
        make_actor(Asker, directory, part_count, CLIENT_KEYS, seed) for seed in range(CLIENTS)
    ]
    with console.status("8 clients"):
        wait_for([asker.ask.remote(0.1) for asker in askers], holders)  # warm
        pid = ray.get(directory.pid.remote())
        before_s = cpu_s([pid])
        found = wait_for([asker.ask.remote(seconds) for asker in askers], holders)
        taken_s = cpu_s([pid]) - before_s
    for asker in askers:
        ray.kill(asker)
    key_count = sum(count for _, _, count in found)
    span_s = max(end for _, end, _ in found) - min(begin for begin, _, _ in found)
    return {
        "directory_clients": CLIENTS,
        "directory_keys_per_s": round(key_count / span_s),
        "directory_cpu_percent": round(100 * taken_s / span_s, 1),
        "located_keys_per_core_s": round(key_count / taken_s),
    }


def wait_for(calls: list[Any], holders: Holders) -> list[Any]:
    """The answers; meanwhile the holders stay alive."""
    while len(ray.wait(calls, num_returns=len(calls), timeout=0.4)[0]) < len(calls):
        holders.beat()
    return ray.get(calls)


# ---- heartbeats


def measure_heartbeats(node_count: int, seconds: float, flood_s: float) -> dict[str, Any]:
    directory = make_directory("heartbeats")
    pid = ray.get(directory.pid.remote())
    beaters = [
        make_actor(Beaters, directory, numbers, max_concurrency=2)
        for numbers in (
            list(range(first, node_count + 1, BEATERS)) for first in range(1, BEATERS + 1)
        )
    ]
    ask = functools.partial(ask_all, beaters)
    begun, before_s = time.monotonic(), cpu_s([pid])
    with console.status(f"{node_count} nodes say hello"):
        ask("start")
        try:
            period_ms = wait_settled(directory, node_count)
        except TimeoutError:
            console.print(ask("counts"), ray.get(directory.status.remote())["counts"])
            raise
        joined_s, joining_cpu_s = time.monotonic() - begun, cpu_s([pid]) - before_s
        time.sleep(2 * period_ms / 1_000)  # each has heard of the last one, and of the period
    with console.status(f"heartbeats of {node_count} nodes"):
        ask("counts")
        begun, before_s = time.monotonic(), cpu_s([pid])
        time.sleep(seconds)
        counts = ask("counts")
        span_s, taken_s = time.monotonic() - begun, cpu_s([pid]) - before_s
    assert not any(count["hellos"] for count in counts), "nobody was lost"
    with console.status("heartbeats as fast as they go"):
        ask("stop")
        before_s = cpu_s([pid])
        found = ask("flood", flood_s)
        flood_cpu_s = cpu_s([pid]) - before_s
    for actor in (*beaters, directory):
        ray.kill(actor)
    flooded = sum(count for _, _, count in found)
    flooded_s = max(end for _, end, _ in found) - min(begin for begin, _, _ in found)
    return {
        "heartbeat_nodes": node_count,
        "heartbeat_period_ms": period_ms,
        "heartbeat_cpu_percent": round(100 * taken_s / span_s, 1),
        "heartbeats_per_s": round(sum(count["beats"] for count in counts) / span_s, 1),
        "heartbeat_late_ms": round(1_000 * max(count["late_s"] for count in counts), 1),
        "joining_s": round(joined_s, 1),
        "joining_cpu_s": round(joining_cpu_s, 1),
        "announces_per_s": round(flooded / flooded_s),
        "announces_per_core_s": round(flooded / flood_cpu_s),
    }


def ask_all(actors: list[Any], method: str, *arguments: object) -> list[Any]:
    return ray.get([getattr(actor, method).remote(*arguments) for actor in actors])


def wait_settled(directory: Any, node_count: int) -> int:
    """Until all are alive and in step; the period that all have been told."""
    ready: list[Any] = []
    deadline = time.monotonic() + SETTLE_DEADLINE_S
    while time.monotonic() < deadline:
        nodes = ray.get(directory.status.remote())["nodes"].values()
        ready = [n for n in nodes if n["state"] == "alive" and n["mirror"] == "in step"]
        periods = {node["heartbeat_period_ms"] for node in ready}
        if len(ready) == node_count and len(periods) == 1:
            return int(periods.pop())
        time.sleep(0.5)
    raise TimeoutError(
        f"{len(ready)} of {node_count} nodes are there after {SETTLE_DEADLINE_S:.0f} s"
    )


# ---- all of it


def measure_directory(*, smoke: bool, entries: int | None = None) -> dict[str, Any]:
    """On a Ray node of its own. Heartbeats first: what is left of memory then is less."""
    with own_ray():
        return _measure(smoke=smoke, entries=entries)


def _measure(*, smoke: bool, entries: int | None) -> dict[str, Any]:
    wanted = entries or (SMOKE_ENTRIES if smoke else ENTRIES)
    part_count = max(HOLDING_NODES, round(wanted / PART_ENTRIES))
    heartbeats = measure_heartbeats(
        *((SMOKE_NODES, SMOKE_BEAT_S, SMOKE_FLOOD_S) if smoke else (NODES, BEAT_S, FLOOD_S))
    )
    directory = make_directory("entries")
    holders = Holders(directory)
    try:
        filled = measure_entries(directory, holders, part_count)
        located = measure_locates(directory, holders, part_count, SMOKE_CALLS if smoke else CALLS)
        asked = measure_clients(
            directory, holders, part_count, SMOKE_CLIENT_S if smoke else CLIENT_S
        )
    finally:
        ray.kill(directory)
    one_actor = {
        "announces_per_core_s": heartbeats.pop("announces_per_core_s"),
        "announces_per_s": heartbeats.pop("announces_per_s"),
        "announced_entries_per_core_s": filled.pop("announced_entries_per_core_s"),
        "located_keys_per_core_s": asked.pop("located_keys_per_core_s"),
        "nodes_per_core": round(
            100 * heartbeats["heartbeat_nodes"] / heartbeats["heartbeat_cpu_percent"]
        ),
        "max_nodes": DirectoryLimits().max_nodes,
        "max_entries": DirectoryLimits().max_entries,
    }
    return {**located, **asked, **filled, **heartbeats, "one_actor": one_actor}


def bars(result: dict[str, Any]) -> list[Bar]:
    return [
        *(
            at_most(MAX_LOCATE_OVER_BARE, f"locate of {count} keys / a bare Ray call, p50", ratio)
            for count, ratio in result["locate_over_bare"].items()
        ),
        at_least(MIN_KEYS_PER_S, "keys located a second", result["directory_keys_per_s"]),
        at_most(MAX_BYTES_PER_ENTRY, "bytes per entry", result["bytes_per_entry"]),
        at_most(
            MAX_HEARTBEAT_PERCENT,
            f"percent of a core, {result['heartbeat_nodes']} nodes",
            result["heartbeat_cpu_percent"],
        ),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table("what", "measured", "bound", title="the directory actor", box=None)
    for count, ratio in result["locate_over_bare"].items():
        table.add_row(
            f"locate of {count} keys, p50",
            f"{result['locate_us'][count]['p50']} us, {ratio} x a bare call",
            f"{MAX_LOCATE_OVER_BARE} x",
        )
    table.add_row(
        f"keys located, {result['directory_clients']} clients",
        f"{result['directory_keys_per_s']:,} a second, "
        f"at {result['directory_cpu_percent']} % of a core",
        f"{MIN_KEYS_PER_S:,}",
    )
    table.add_row(
        f"memory of {result['entries']:,} entries",
        f"{result['bytes_per_entry']} bytes each",
        f"{MAX_BYTES_PER_ENTRY}",
    )
    table.add_row(
        f"{result['heartbeat_nodes']} nodes, every {result['heartbeat_period_ms']} ms",
        f"{result['heartbeat_cpu_percent']} % of a core",
        f"{MAX_HEARTBEAT_PERCENT} %",
    )
    for name, value in result["one_actor"].items():
        table.add_row(f"one actor: {name.replace('_', ' ')}", f"{value:,}", "")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="small, in half a minute")
    parser.add_argument("--entries", type=int, help=f"default {ENTRIES:,}")
    arguments = parser.parse_args()
    result = measure_directory(smoke=arguments.smoke, entries=arguments.entries)
    promises = bars(result)
    return finish(
        "lookup_directory",
        result,
        promises,
        n=result["locate_us"][str(KEY_COUNTS[0])]["n"],
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
