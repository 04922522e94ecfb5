"""A node's register and deregister at the directory, beside others that send their heartbeats.

register_p50_ms, register_p99_ms    hello and bye of one node, by Ray calls one after another,
                                    while REGISTERED_NODES others are registered
"""

import threading
import time
from typing import Any

import msgspec
import ray
from rich.console import Console
from rich.progress import track

from benchmarks.directory_players import info_of, make_directory
from benchmarks.lookup_scene import own_ray
from benchmarks.measure import percentile
from kvray.core.codec import decode, encode
from kvray.core.ids import Epoch, Term
from kvray.core.messages import (
    MAX_CALL_BYTES,
    Announce,
    AnnounceReply,
    NodeHello,
    NodeHelloReply,
    NodeInfo,
)

REGISTERED_NODES = 100
REGISTER_CALLS = 1_000
SMOKE_CALLS = 50

console = Console(stderr=True)


class Registered:
    """Nodes that are there, as far as the directory can tell: they say hello, and announce."""

    def __init__(self, directory: Any, count: int) -> None:
        self._directory = directory
        self._infos = [info_of(f"{i:056x}") for i in range(1, count + 1)]
        self._stopping = threading.Event()
        self._period_s = 0.0
        self._terms: dict[str, tuple[Term, int]] = {}  # term and roster version that each has heard
        for info in self._infos:
            self._terms[info.node_id] = self._join(info)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _join(self, info: NodeInfo) -> tuple[Term, int]:
        data = ray.get(self._directory.hello.remote(encode(NodeHello(info, info.epoch))))
        reply = decode(data, max_bytes=MAX_CALL_BYTES, expect=NodeHelloReply)
        assert reply.accepted_epoch == info.epoch
        self._period_s = reply.heartbeat_period_ms / 1_000
        return reply.term, reply.roster_version

    def _beat(self) -> None:
        sequence = 0
        while not self._stopping.is_set():
            sequence += 1
            begun = time.monotonic()
            for index, info in enumerate(self._infos):
                term, version = self._terms[info.node_id]
                first = sequence == 1
                announce = Announce(
                    info.node_id, info.epoch, term, sequence, version, b"", b"", int(first), first
                )
                data = ray.get(self._directory.announce.remote(encode(announce)))
                reply = decode(data, max_bytes=MAX_CALL_BYTES, expect=AnnounceReply)
                self._terms[info.node_id] = (term, reply.roster_version)
                due = begun + (index + 1) * self._period_s / len(self._infos)
                if self._stopping.wait(max(0.0, due - time.monotonic())):
                    return

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()


def call_ms(method: Any, *arguments: object) -> float:
    begun = time.perf_counter()
    ray.get(method.remote(*arguments))
    return (time.perf_counter() - begun) * 1_000


def measure_registering(*, smoke: bool = False) -> dict[str, Any]:
    """Calls one after another: hello, bye, hello, bye ... of one node."""
    with own_ray():
        return _measure(SMOKE_CALLS if smoke else REGISTER_CALLS)


def _measure(calls: int) -> dict[str, Any]:
    directory = make_directory("registering")
    others = Registered(directory, REGISTERED_NODES)
    try:
        info = info_of("f" * 56)
        taken_ms = []
        for n in track(range(calls // 2), "registering", console=console):
            info = msgspec.structs.replace(info, epoch=Epoch(info.epoch + n + 1))
            hello = encode(NodeHello(info, info.epoch))
            taken_ms.append(call_ms(directory.hello, hello))
            taken_ms.append(call_ms(directory.bye, info.node_id, info.epoch))
        nodes = ray.get(directory.status.remote())["nodes"]
        alive = sum(node["state"] == "alive" for node in nodes.values())
        assert alive == REGISTERED_NODES, f"{alive} of {REGISTERED_NODES} nodes are registered"
    finally:
        others.stop()
        ray.kill(directory)
    return {
        "register_calls": len(taken_ms),
        "register_p50_ms": round(percentile(taken_ms, 50), 2),
        "register_p99_ms": round(percentile(taken_ms, 99), 2),
    }
