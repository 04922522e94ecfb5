"""The link between two nodes is cut in the middle of a read, and healed.

    node 0: this process's own network     ══ data network (TCP, slowed down) ══ / ══ node 1: a
    raylet, directory, NodeStore, engine   ── control network (Ray) ───────────     namespace

The engines are beside it: they know nothing but their NodeStore's socket. A cut data network gives
no error, it is silent; Ray and kvray's own heartbeats go on over the other one.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.cluster_utils import Cluster as RayCluster

import kvray
from benchmarks.fault_load import Controls, Kind
from benchmarks.fault_report import Report, skipped
from benchmarks.fault_scene import Scene, scene
from benchmarks.fault_world import ENGINE_COUNT, EXTENT_BYTES, SLAB_BYTES, World, populated
from kvray.core.messages import KeyState
from tests.block_client import Client
from tests.namespaces import Namespaces, NamespacesError, namespaces
from tests.processes import ProcessGroup
from tests.ray_nodes import READY_LIMIT_S, Nodes, wait_until

NAMESPACE = "b"  # of node 1
RATE = "400mbit"  # 50 MB/s: what is read below takes half a second
LONG_READ_BLOCKS, LONG_READ_BYTES = 12, 2 << 20
CUT_AFTER_S = 0.15  # of the long read
CUT_S = 4.0  # longer than every deadline of a request
WAIT_MS = 1_250  # the deadline of a request, and a scheduler step of a busy machine
HEALED_PEER_MS = 3_000
MIN_CARRIED = 0.9  # of what the NodeStores say that they have read


def link_cut(folder: Path, controls: Controls) -> Report:
    try:
        with namespaces(NAMESPACE) as net, split_world(net, folder, controls) as world:
            return cut_and_heal(world, net)
    except NamespacesError as exc:
        return skipped("link_cut", f"no network namespaces here: {exc}")


def cut_and_heal(world: World, net: Namespaces) -> Report:
    report = Report("link_cut")
    reader, owner = (
        Client(world.nodes.cluster, node_id, block_bytes=LONG_READ_BYTES)
        for node_id in world.nodes.node_ids
    )
    try:
        keys = owner.store(*(f"long-{i}" for i in range(LONG_READ_BLOCKS)))
        world.nodes.wait_listed(keys)
        with scene(world, report) as it:
            it.warm()
            prove_path(it, net)
            begun_s = time.monotonic()
            ticket = reader.begin(keys, deadline_ms=1_000)
            time.sleep(CUT_AFTER_S)
            it.inject(lambda: net.cut(NAMESPACE, "data"))
            wait_until(lambda: ticket.settled, what="the deadline of the long read")
            report.notes["long_read_ms"] = round((time.monotonic() - begun_s) * 1_000)
            report.notes["long_read_hits"] = ticket.states.count(KeyState.HIT)
            reader.client.unpin(ticket)
            time.sleep(max(0.0, CUT_S - (time.monotonic() - it.fault_s)))
            report.notes["under_the_cut"] = summary(it)
            healed_s = time.monotonic()
            net.heal(NAMESPACE, "data")
            it.wait_hits_again(1, since_s=healed_s)
            it.wait_after()
            it.load.stop()
            for difference in world.differences():
                report.require(condition=False, text=difference)
            report.require_within("a request", report.notes["long_read_ms"], WAIT_MS)
            report.require_within("peer hits", report.peer_hits_again_ms, HEALED_PEER_MS)
            report.require(
                report.notes["long_read_hits"] < LONG_READ_BLOCKS, "the read was not cut"
            )
        report.require_within("worst wait", report.worst_extra_wait_ms, WAIT_MS)
    finally:
        reader.close()
        owner.close()
    return report


def prove_path(it: Scene, net: Namespaces) -> None:
    """That blocks really go over the network that is going to be cut."""
    begun_bytes, begun_carried = read_bytes(it.world), net.carried_bytes(NAMESPACE, "data")
    it.wait_hits([(Kind.PEER, 0), (Kind.PEER, 1)], since_s=time.monotonic())
    read = read_bytes(it.world) - begun_bytes
    carried = net.carried_bytes(NAMESPACE, "data") - begun_carried
    it.report.notes["carried"] = [read, carried]
    it.report.require(carried >= MIN_CARRIED * read > 0, f"{carried} of {read} bytes on the wire")


def read_bytes(world: World) -> int:
    return sum(int(world.nodes.status(i)["link"]["read_bytes"]) for i in range(ENGINE_COUNT))


def summary(it: Scene) -> dict[str, int]:
    """What the requests of the cut got."""
    outcomes = it.load.since(it.fault_s)
    return {
        "requests": len(outcomes),
        "local": sum(outcome.local > 0 for outcome in outcomes),
        "peer": sum(outcome.peer > 0 for outcome in outcomes),
    }


@contextmanager
def split_world(net: Namespaces, folder: Path, controls: Controls) -> Iterator[World]:
    """As running_world, with node 1 in a namespace of its own."""
    with split_nodes(net, folder) as nodes:
        net.slow_down(NAMESPACE, RATE)
        with populated(World(nodes, folder, controls)) as world:
            yield world


@contextmanager
def split_nodes(net: Namespaces, folder: Path) -> Iterator[Nodes]:
    """Two nodes with kvray and no engine, node 1 in the namespace."""
    os.environ["UCX_TLS"] = "tcp"  # else UCX finds that the pids are the same host's and uses cma
    os.environ["UCX_NET_DEVICES"] = net.own_device("data")
    ray_cluster = RayCluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "node_ip_address": net.own_address("control")},
    )
    other: ProcessGroup | None = None
    try:
        other = start_raylet(net, ray_cluster.address, folder)
        ray.init(
            address=ray_cluster.address,
            _node_ip_address=net.own_address("control"),
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        wait_until(
            lambda: sum(node["Alive"] for node in ray.nodes()) == ENGINE_COUNT,
            what="the raylet in the namespace",
            limit_s=READY_LIMIT_S,
        )
        cluster = kvray.start(kvray.Config(slab_bytes=SLAB_BYTES, extent_bytes=EXTENT_BYTES))
        try:
            cluster.wait_ready(ENGINE_COUNT, deadline_s=READY_LIMIT_S)
            head = ray.get_runtime_context().get_node_id()
            (far,) = (n["NodeID"] for n in ray.nodes() if n["NodeID"] != head)
            yield Nodes(cluster, ray_cluster, [head, far])
        finally:
            cluster.stop()
    finally:
        ray.shutdown()
        if other is not None:
            other.end()
        ray_cluster.shutdown()
        for name in ("UCX_TLS", "UCX_NET_DEVICES"):
            del os.environ[name]


def start_raylet(net: Namespaces, head_address: str, folder: Path) -> ProcessGroup:
    ray_command = str(Path(sys.executable).parent / "ray")
    return ProcessGroup(
        net.command(
            NAMESPACE,
            ray_command,
            "start",
            f"--address={head_address}",
            f"--node-ip-address={net.address(NAMESPACE, 'control')}",
            "--num-cpus=2",
            "--disable-usage-stats",
            "--block",
        ),
        environment={
            **os.environ,
            "UCX_NET_DEVICES": net.device("data"),
            # As the head, which ray.cluster_utils starts without: else `ray start` would find a
            # token of this user's and ask for it.
            "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
        },
        log=folder / "raylet-in-namespace.log",
    )
