"""What an engine's questions to the NodeStore of its node cost, over the local socket.

    lookup_us                of 1, 64 and 512 keys that are READY: p50, p99
    bare_lookup_us           as many bytes to an echo server and back, one call right after the
                             other, so that neither side falls asleep: what the calls alone cost
    paused_lookup_us, paused_bare_lookup_us
                             the same two with a pause before each, in which both sides sleep: what
                             the echo takes longer then is the machine's waking, and no work
    held                     the p99 of 64 keys while one slot is being written, pinned or in
                             quarantine and other blocks are stored, loaded and evicted, relative
                             to no such slot
    local_client_operations, echo, p99_over_echo, engine_hello_bye_ms    see lookup_load

Everything is real: a Ray node on this machine with its NodeStore, clients on its socket. Variants
are interleaved, in rounds, and the ratio is that of medians over the rounds.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kvray
from benchmarks.lookup_load import FIRST_OP, Caller, measure_load, padded, running_echo
from benchmarks.lookup_scene import own_cluster, own_node_id
from benchmarks.measure import percentile, spread
from kvray.config import EngineConfig, find_sockets
from kvray.core.codec import encode
from kvray.core.ids import BlockKey, OpId
from kvray.core.messages import (
    MAX_MESSAGE_BYTES,
    SLOT_DTYPE,
    Ack,
    KeyState,
    Lookup,
    LookupReply,
    Unpin,
)
from kvray.node.worker_client import WorkerClient
from tests.block_client import Client
from tests.ray_nodes import wait_until

SLAB_BYTES, EXTENT_BYTES = 16 << 20, 1 << 20
BLOCK_BYTES = 4_096
KEY_COUNTS = (1, 64, 512)
LOOKUPS = 400  # of each variant in a round: enough for a p99
SMOKE_LOOKUPS = 50
PAUSE_S = 0.005  # as between two steps of a busy engine
PAUSED_LOOKUPS = 100  # in a round: for a median
ROUNDS = 7
SMOKE_ROUNDS = 2
CHURN = 16  # blocks that are stored (and as many evicted) in between, each time

FILL_KEYS = 512  # of a store, when the slab is filled
KILLED = Path(__file__).with_name("lookup_killed.py")  # the engine that reserves and is killed

console = Console(stderr=True)


def measure_local(*, smoke: bool = False) -> dict[str, Any]:
    """In a Ray cluster of its own."""
    lookups, rounds = (SMOKE_LOOKUPS, SMOKE_ROUNDS) if smoke else (LOOKUPS, ROUNDS)
    with own_cluster(slab_bytes=SLAB_BYTES, extent_bytes=EXTENT_BYTES) as cluster:
        client = Client(cluster, own_node_id(), block_bytes=BLOCK_BYTES)
        fill(client)
        found = measure_lookups(client, lookups, rounds)
        found["held"] = measure_held(cluster, client, lookups, rounds)
        client.close()
        path = find_sockets(EngineConfig.parse(cluster.engine_settings()))[0]
        return found | measure_load(path, smoke=smoke)


def fill(client: Client) -> None:
    """A slab in use is full: what is stored from now on evicts something."""
    for n in range(SLAB_BYTES // BLOCK_BYTES // FILL_KEYS):
        client.store(*(f"filling {n} {i}" for i in range(FILL_KEYS)))


def lookup_times_us(
    client: Client, keys: list[BlockKey], count: int, *, churn: bool, pause_s: float = 0.0
) -> list[float]:
    """Of `count` look-ups, all of them hits. churn: between them others are stored and evicted."""
    taken = []
    for n in range(count):
        if pause_s:
            time.sleep(pause_s)
        if churn and n % CHURN == 0:
            client.store(*(f"churn {time.monotonic_ns()} {i}" for i in range(CHURN)))
        begun = time.perf_counter_ns()
        ticket = client.begin(keys, deadline_ms=1_000)
        taken.append((time.perf_counter_ns() - begun) / 1_000)
        assert ticket.settled
        client.client.unpin(ticket)
        # An engine looks up once a request: the unpin of the one before has long been heard.
        client.client.drain(1.0)
    return taken


def bare_times_us(
    caller: Caller, key_count: int, count: int, *, pause_s: float = 0.0
) -> list[float]:
    """Of `count` calls, each followed by another one as short as an unpin is."""
    op = OpId(FIRST_OP)
    lookup = Lookup(op, bytes(16 * key_count), [key_count], [True], [BLOCK_BYTES], 1_000)
    hits = bytes([KeyState.HIT]) * key_count
    reply = LookupReply(op, hits, bytes(SLOT_DTYPE.itemsize * key_count))
    asked = padded(encode(lookup), len(encode(reply)))
    unpinned = padded(encode(Unpin(op, op)), len(encode(Ack(op))))
    taken = []
    for _ in range(count):
        if pause_s:
            time.sleep(pause_s)
        begun = time.perf_counter_ns()
        caller.sock.send(asked)
        caller.sock.recv(MAX_MESSAGE_BYTES)
        taken.append((time.perf_counter_ns() - begun) / 1_000)
        caller.sock.send(unpinned)
        caller.sock.recv(MAX_MESSAGE_BYTES)
    return taken


def measure_lookups(client: Client, lookups: int, rounds: int) -> dict[str, Any]:
    """Of all keys together, by their count. Interleaved, so that a busy moment hits each."""
    keys = {
        count: client.store(*(f"{count} keys, {i}" for i in range(count))) for count in KEY_COUNTS
    }
    names = ("lookup_us", "bare_lookup_us", "paused_lookup_us", "paused_bare_lookup_us")
    taken: dict[str, dict[int, list[float]]] = {
        name: {count: [] for count in KEY_COUNTS} for name in names
    }
    paused = min(lookups, PAUSED_LOOKUPS)
    with running_echo() as echo_path:
        caller = Caller(echo_path)
        for round_number in track(range(rounds + 1), "look-ups", console=console):
            for count in KEY_COUNTS:
                own = keys[count]
                times = (
                    lookup_times_us(client, own, lookups, churn=False),
                    bare_times_us(caller, count, lookups),
                    lookup_times_us(client, own, paused, churn=False, pause_s=PAUSE_S),
                    bare_times_us(caller, count, paused, pause_s=PAUSE_S),
                )
                if round_number:  # the first round warms
                    for name, found in zip(names, times, strict=True):
                        taken[name][count] += found
        caller.sock.close()
    return {
        name: {str(count): spread(found, digits=1) for count, found in by_count.items()}
        for name, by_count in taken.items()
    }


@contextmanager
def nothing_held(cluster: kvray.Cluster, client: Client) -> Iterator[None]:
    del cluster, client
    yield


@contextmanager
def a_slot_being_written(cluster: kvray.Cluster, client: Client) -> Iterator[None]:
    other = Client(cluster, own_node_id(), "another model", block_bytes=BLOCK_BYTES)
    del client
    keys = other.keys(f"written {time.monotonic_ns()}")
    other.client.begin_step()
    reserved = other.client.reserve(keys, run_lengths=[1], run_slot_bytes=[BLOCK_BYTES])
    assert reserved is not None
    try:
        yield
    finally:
        other.client.abandon(reserved.slab_id, list(reserved.places.values()))
        other.close()


@contextmanager
def a_slot_pinned(cluster: kvray.Cluster, client: Client) -> Iterator[None]:
    other = Client(cluster, own_node_id(), block_bytes=BLOCK_BYTES)
    ticket = other.look_up(client.store(f"pinned {time.monotonic_ns()}"))
    try:
        yield
    finally:
        other.client.unpin(ticket)
        other.close()


@contextmanager
def a_slot_in_quarantine(cluster: kvray.Cluster, client: Client) -> Iterator[None]:
    """An engine that reserves and is killed, while a worker of it is still there: this process."""
    del client
    settings = EngineConfig.parse(cluster.engine_settings())
    nonce = int.from_bytes(os.urandom(7), "little")
    worker = WorkerClient(
        find_socket=lambda: find_sockets(settings)[0], engine_nonce=nonce, label="a worker"
    )
    engine = subprocess.Popen(  # noqa: S603 (ourselves)
        [sys.executable, str(KILLED), find_sockets(settings)[0], str(nonce)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        worker.start()
        wait_until(lambda: worker.session is not None, what="the worker's session")
        assert engine.stdout is not None
        assert engine.stdout.readline() == "reserved\n"
        engine.kill()
        wait_until(lambda: store_states(cluster)["quarantined"] == 1, what="the quarantine")
        yield
    finally:
        engine.kill()
        engine.wait()
        worker.close()
        wait_until(lambda: not store_states(cluster)["quarantined"], what="the end of quarantine")


HOLDS = {
    "nothing": nothing_held,
    "writing": a_slot_being_written,
    "pinned": a_slot_pinned,
    "quarantined": a_slot_in_quarantine,
}


def measure_held(
    cluster: kvray.Cluster, client: Client, lookups: int, rounds: int
) -> dict[str, dict[str, float]]:
    """The p99 of 64 keys in each variant, medians over the rounds, and the ratio to `nothing`."""
    keys = client.store(*(f"held, {i}" for i in range(64)))
    p99s: dict[str, list[float]] = {name: [] for name in HOLDS}
    for _ in track(range(rounds), "look-ups while a slot is held", console=console):
        for name, hold in HOLDS.items():
            with hold(cluster, client):
                assert client.hits(keys) == len(keys), "still there, though others are evicted"
                p99s[name].append(
                    percentile(lookup_times_us(client, keys, lookups, churn=True), 99)
                )
    evicted = cluster.nodes()[0].details["store"]["evicted"]
    assert evicted > 0, "the slab was never full: nothing was evicted meanwhile"
    unloaded = statistics.median(p99s["nothing"])
    return {
        name: {
            "p99_us": round(statistics.median(values), 1),
            "ratio": round(statistics.median(values) / unloaded, 2),
        }
        for name, values in p99s.items()
    }


def store_states(cluster: kvray.Cluster) -> dict[str, int]:
    found: dict[str, int] = cluster.nodes()[0].details["store"]
    return found
