"""A Ray cluster of several nodes on this machine with kvray on it, for integration tests.

    with running_nodes(2) as nodes:
        engine = start_engine(tiny(), folder=..., kv_transfer_config=nodes.transfer(0))

The engines are plain processes beside the raylets, as `vllm serve` is: each is told which node it
belongs to, since all nodes share one host here.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.cluster_utils import Cluster as RayCluster

import kvray
from kvray.actors import RAY_NAMESPACE, node_store_name
from kvray.config import socket_path
from kvray.core.ids import BlockKey
from kvray.core.keys import CANARY_CHUNKS
from kvray.engine.arguments import transfer_settings

SLAB_BYTES = 256 << 20  # 240 chunks of the tiny model
EXTENT_BYTES = 16 << 20
READY_LIMIT_S = 60.0  # two actor starts beside other work
WAIT_LIMIT_S = 10.0  # an announce goes out within 5 ms; ten seconds are a busy machine
POLL_S = 0.01
# On a busy machine an answer that is late is a miss, by design. These tests are about what happens
# when it is not late; that it may be is tested with the client and the cores.
PATIENT = {"step_budget_ms": 1_000, "lookup_deadline_ms": 20_000}


def wait_until(condition: Callable[[], bool], *, what: str, limit_s: float = WAIT_LIMIT_S) -> None:
    """Polls until the condition holds, or fails saying what did not come."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {limit_s:.0f} s"
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Nodes:
    """A running cluster. node_ids: Ray's, the head first."""

    cluster: kvray.Cluster
    ray_cluster: RayCluster
    node_ids: list[str]

    def settings(self, index: int, **settings: Any) -> dict[str, Any]:
        """EngineConfig of an engine that belongs to node `index`."""
        ours = self.cluster.engine_settings()
        return {**ours, **PATIENT, "node_id": self.node_ids[index], **settings}

    def transfer(self, index: int, **settings: Any) -> dict[str, Any]:
        """kv_transfer_config of such an engine."""
        return transfer_settings(self.settings(index, **settings))

    def store(self, index: int) -> Any:
        """The NodeStore actor of node `index`."""
        name = node_store_name(self.cluster.name, self.node_ids[index])
        return ray.get_actor(name, namespace=RAY_NAMESPACE)

    def status(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = ray.get(self.store(index).status.remote())
        return found

    def block(self, index: int, key: BlockKey) -> bytes | None:
        """The payload of a READY block in the slab of node `index`, copied."""
        found: bytes | None = ray.get(self.store(index).block_bytes.remote(key))
        return found

    def keys(self, index: int) -> list[BlockKey]:
        """Of all READY blocks of node `index`."""
        return [BlockKey(key) for key in ray.get(self.store(index).block_keys.remote())]

    def socket_path(self, index: int) -> str:
        return socket_path(None, self.cluster.name, self.node_ids[index])

    def wait_unpinned(self, index: int) -> None:
        """Until no request holds a slot of node `index` any more: what is left are the canaries of
        its engines.
        """

        wait_until(lambda: not pins_of_requests(self.status(index)), what="the end of all pins")

    def trusts(self, index: int, mine: int, other: int) -> bool:
        """Whether what maker `other` has stored counts for engines of `mine` on node `index`."""
        pairs = self.status(index)["trust"]["pairs"]
        wanted = (f"{mine:016x}", f"{other:016x}", "equal")
        return mine == other or wanted in {(p["mine"], p["other"], p["state"]) for p in pairs}

    def wait_listed(self, keys: list[BlockKey]) -> None:
        """Until the directory knows where each of these is."""
        wait_until(
            lambda: all(self.cluster.where(*keys)),
            what=f"the announcement of {len(keys)} blocks",
        )


def canary_pins(status: dict[str, Any]) -> int:
    """Of a NodeStore: what the engines that are there have pinned of their canaries."""
    there = [client for client in status["clients"] if client["state"] == "open"]
    return sum(CANARY_CHUNKS * client["chunk_kinds"] for client in there)


def pins_of_requests(status: dict[str, Any]) -> int:
    """And what is pinned beside them."""
    return int(status["store"]["pins"]) - canary_pins(status)


@contextmanager
def running_nodes(
    count: int = 2,
    *,
    slab_bytes: int = SLAB_BYTES,
    extent_bytes: int = EXTENT_BYTES,
    tracing_startup_hook: str | None = None,
) -> Iterator[Nodes]:
    """A cluster of `count` nodes with a NodeStore on each; all of it is gone afterwards.
    tracing_startup_hook: as of `ray start`; this process is traced then, too, until it ends.
    """
    ray_cluster = RayCluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "tracing_startup_hook": tracing_startup_hook},
    )
    try:
        for _ in range(count - 1):
            ray_cluster.add_node(num_cpus=2)
        ray_cluster.wait_for_nodes()
        ray.init(address=ray_cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        cluster = kvray.start(kvray.Config(slab_bytes=slab_bytes, extent_bytes=extent_bytes))
        try:
            cluster.wait_ready(count, deadline_s=READY_LIMIT_S)
            head = ray.get_runtime_context().get_node_id()
            others = [n["NodeID"] for n in ray.nodes() if n["NodeID"] != head]
            yield Nodes(cluster, ray_cluster, [head, *others])
        finally:
            cluster.stop()
    finally:
        ray.shutdown()
        ray_cluster.shutdown()


@contextmanager
def another_cluster(nodes: Nodes, *, name: str, **settings: Any) -> Iterator[Nodes]:
    """kvray once more on the same nodes, with a NodeStore of its own on each: engines of the one
    know nothing of those of the other. settings: of kvray.Config.
    """
    cluster = kvray.start(kvray.Config(cluster_name=name, **settings))
    try:
        cluster.wait_ready(len(nodes.node_ids), deadline_s=READY_LIMIT_S)
        yield replace(nodes, cluster=cluster)
    finally:
        cluster.stop()
