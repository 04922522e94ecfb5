"""The processes that benchmarks/lookup_directory.py has around the directory actor.

    Bare      an actor that answers with so many bytes and does nothing else
    Asker     a NodeStore's locates: messages made before, answers decoded
    Beaters   the heartbeats of many nodes, each as often as the directory tells it to

All are Ray actors of their own, with the directory's priority, and call it as a NodeStore does.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import ray

from kvray import __version__
from kvray.actors import run_at_normal_priority
from kvray.config import Config
from kvray.core.codec import decode, encode
from kvray.core.ids import KEY_BYTES, Epoch, NodeId, SlabId, Term
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import (
    ENTRY_DTYPE,
    MAX_CALL_BYTES,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    Locate,
    LocateReply,
    NodeHello,
    NodeHelloReply,
    NodeInfo,
)
from kvray.directory.actor import Directory

PART_ENTRIES = 65_536  # of one announce: 2.2 MB
POOL_PARTS = 8  # an Asker draws its keys from so many: half a million keys


# As kvray.cluster makes its directory; neither is found by name, or outlives the benchmark.
ACTOR_OPTIONS: dict[str, Any] = {"num_cpus": 0, "enable_task_events": False}


def place_nothing(_settings: dict[str, object], _node_id: str) -> None:
    """The directory has no NodeStores but those that are played."""


def make_actor(kind: type, *arguments: object, **options: object) -> Any:
    return ray.remote(kind).options(**ACTOR_OPTIONS, **options).remote(*arguments)


class TimedDirectory(Directory):
    """One that can be asked by itself."""

    def locate_in_a_row_us(self, messages: Sequence[bytes], count: int) -> list[float]:
        """Of `count` locates, one right after the other in this process, without a call."""
        taken = []
        for n in range(count):
            begun = time.perf_counter_ns()
            self.locate(messages[n % len(messages)])
            taken.append((time.perf_counter_ns() - begun) / 1_000)
        return taken


def make_directory(name: str) -> Any:
    return make_actor(
        TimedDirectory, Config(cluster_name=name).to_dict(), place_nothing, "benchmark"
    )


def info_of(node_id: str) -> NodeInfo:
    return NodeInfo(
        node_id=NodeId(node_id),
        epoch=Epoch(time.time_ns() // 1_000_000),
        link_name=f"kvray:{node_id}",
        link_metadata=bytes(460),  # as large as NIXL's
        slab_id=SlabId(bytes(16)),
        slab_address=4_096,
        slab_bytes=16 << 20,
        extent_bytes=1 << 20,
        host="benchmark",
        kvray_version=__version__,
        format_version=FORMAT_VERSION,
    )


def part_keys(part: int) -> bytes:
    """Of PART_ENTRIES keys that no other part has, the same in each process."""
    return np.random.default_rng(part).bytes(PART_ENTRIES * KEY_BYTES)


def part_entries(part: int) -> bytes:
    rows = np.zeros(PART_ENTRIES, ENTRY_DTYPE)
    rows["key"] = np.frombuffer(part_keys(part), ("V", KEY_BYTES))
    rows["slot"] = np.arange(PART_ENTRIES)
    rows["bytes"] = 2 << 20
    rows["generation"] = np.arange(PART_ENTRIES) + part * PART_ENTRIES
    return rows.tobytes()


def anonymous_bytes(pid: int) -> int:
    """Resident memory that is the process's own; without Ray's shared store of objects."""
    with open(f"/proc/{pid}/status") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1_024


class Bare:
    """answers: what to say to a message of so many bytes."""

    def __init__(self, answers: dict[int, bytes]) -> None:
        run_at_normal_priority()
        self._answers = answers

    def locate(self, data: bytes) -> bytes:
        return self._answers[len(data)]


class KeyPool:
    """Locate messages of keys that are all in the directory, drawn at random."""

    def __init__(self, parts: int, seed: int) -> None:
        self._dice = np.random.default_rng(seed)
        drawn = self._dice.choice(parts, min(parts, POOL_PARTS), replace=False)
        packed = b"".join(part_keys(int(part)) for part in drawn)
        self._keys = np.frombuffer(packed, ("V", KEY_BYTES))

    def message(self, key_count: int) -> bytes:
        at = self._dice.integers(0, len(self._keys), key_count)
        return encode(Locate(NodeId("asker"), Epoch(1), self._keys.take(at).tobytes()))


class Asker:
    """parts: how many the directory has."""

    def __init__(self, directory: Any, parts: int, key_count: int, seed: int) -> None:
        run_at_normal_priority()
        self._directory = directory
        self._key_count = key_count
        pool = KeyPool(parts, seed)
        self._messages = [pool.message(key_count) for _ in range(32)]

    def ask(self, seconds: float) -> tuple[float, float, int]:
        """One call after another, for so long; when it began and ended, and how many keys."""
        begun = time.monotonic()
        calls = 0
        while time.monotonic() < begun + seconds:
            message = self._messages[calls % len(self._messages)]
            data = ray.get(self._directory.locate.remote(message))
            reply = decode(data, max_bytes=MAX_CALL_BYTES, expect=LocateReply)
            assert len(reply.locations) >= self._key_count, "each of these keys has a location"
            calls += 1
        return begun, time.monotonic(), calls * self._key_count


class _Played:
    """What one node that is played knows."""

    def __init__(self, info: NodeInfo) -> None:
        self.info = info
        self.term = Term(0)
        self.sequence = 0
        self.roster_version = 0
        self.period_s = 0.0
        self.due_s = 0.0


class Beaters:
    """Many nodes without blocks. They say hello, then announce when each has to."""

    def __init__(self, directory: Any, numbers: list[int]) -> None:
        run_at_normal_priority()
        self._directory = directory
        self._nodes = [_Played(info_of(f"{number:056x}")) for number in numbers]
        self._stopping = threading.Event()
        self._beat_count = self._hello_count = 0
        self._late_s = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def counts(self) -> dict[str, float]:
        """Since the last call: beats, hellos, and by how much the latest beat was late."""
        assert self._thread.is_alive(), "the nodes are silent"
        found = {"beats": self._beat_count, "hellos": self._hello_count, "late_s": self._late_s}
        self._beat_count = self._hello_count = 0
        self._late_s = 0.0
        return found

    def flood(self, seconds: float) -> tuple[float, float, int]:
        """Beats of all nodes as fast as they are answered, sixteen at a time, after `stop`."""
        begun, count = time.monotonic(), 0
        while time.monotonic() < begun + seconds:
            for start in range(0, len(self._nodes), 16):
                calls = [
                    self._directory.announce.remote(self._announce(node))
                    for node in self._nodes[start : start + 16]
                ]
                count += len(ray.get(calls))
        return begun, time.monotonic(), count

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        for node in self._nodes:
            self._hello(node)
            self._beat_due(time.monotonic())
        while not self._stopping.is_set():
            self._beat_due(time.monotonic())
            next_s = min(node.due_s for node in self._nodes)
            self._stopping.wait(max(0.0, next_s - time.monotonic()))

    def _beat_due(self, now_s: float) -> None:
        for node in self._nodes:
            if node.sequence and node.due_s <= now_s and not self._stopping.is_set():
                self._beat(node)

    def _hello(self, node: _Played) -> None:
        data = encode(NodeHello(node.info, node.info.epoch))
        reply = decode(
            ray.get(self._directory.hello.remote(data)),
            max_bytes=MAX_CALL_BYTES,
            expect=NodeHelloReply,
        )
        self._hello_count += 1
        if reply.accepted_epoch != node.info.epoch:
            node.info = msgspec.structs.replace(node.info, epoch=reply.accepted_epoch)
            self._hello(node)
            return
        node.term, node.roster_version = reply.term, reply.roster_version
        node.sequence = 0
        self._beat(node)

    def _announce(self, node: _Played) -> bytes:
        """The first is the whole set, which is empty."""
        node.sequence += 1
        first = node.sequence == 1
        return encode(
            Announce(
                node.info.node_id, node.info.epoch, node.term, node.sequence, node.roster_version,
                b"", b"", int(first), first,
            )
        )  # fmt: skip

    def _beat(self, node: _Played) -> None:
        self._late_s = max(self._late_s, time.monotonic() - node.due_s if node.due_s else 0.0)
        reply = decode(
            ray.get(self._directory.announce.remote(self._announce(node))),
            max_bytes=MAX_CALL_BYTES,
            expect=AnnounceReply,
        )
        if reply.status not in (AnnounceStatus.OK, AnnounceStatus.RESYNC):
            # Buried: this machine is too slow for so many. As a NodeStore does, it comes back.
            node.info = msgspec.structs.replace(node.info, epoch=Epoch(node.info.epoch + 1))
            self._hello(node)
            return
        self._beat_count += 1
        node.roster_version = reply.roster_version
        node.period_s = reply.heartbeat_period_ms / 1_000
        node.due_s = time.monotonic() + node.period_s
