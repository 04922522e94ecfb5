"""Goal: kvray on a real Ray cluster comes, grows, heals and goes as kvray.cluster promises, and a
block finds its way between two nodes over NIXL.

Method: two raylets on this machine, slabs of 16 MiB, and clients that are no engines: they store
and look up blocks of stamped bytes through the very socket that engines use. What stands in files,
lists of actors and slabs is compared, not what somebody says of it.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import kvray
from kvray.actors import RAY_NAMESPACE, caller, node_store_name
from kvray.cluster.placement import ACTOR_OPTIONS, actor_names
from kvray.cluster.status import NodeState
from kvray.config import EngineConfig, find_sockets, socket_path
from kvray.core.codec import encode
from kvray.core.ids import BlockKey, Epoch, NodeId, SlabId
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import KeyState, NodeHello, NodeInfo
from kvray.core.way import MIN_JUDGED_BYTES, Outcome, Way
from kvray.node.actor import NodeStore
from kvray.node.client import ClientState
from kvray.node.scratch import PAGE_COUNT
from tests.block_client import BLOCK_BYTES, Client, payload_of
from tests.ray_nodes import wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(180)]

SLAB: dict[str, Any] = {"slab_bytes": 16 << 20, "extent_bytes": 1 << 20}
START_LIMIT_S = 60.0  # two actors that load NIXL, on two busy cores
JOIN_LIMIT_MS = 1_000  # from a NodeStore's start until its engines are served
IDLE_SHARE = 0.015  # of a core, for each process of kvray
IDLE_LOOKS = 6  # of ten seconds


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    """Two Ray nodes, and this process as their driver."""
    cluster = RayCluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def running(ray_cluster: RayCluster) -> Iterator[kvray.Cluster]:
    """kvray on both nodes. Tests that end something of it wait until it is whole again."""
    cluster = kvray.start(**SLAB, deadline_s=START_LIMIT_S)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def pair(running: kvray.Cluster) -> Iterator[tuple[Client, Client]]:
    """A client on each of two nodes."""
    a, b = (Client(running, node_id) for node_id in node_ids(running)[:2])
    try:
        yield a, b
    finally:
        a.close()
        b.close()


def node_ids(cluster: kvray.Cluster) -> list[str]:
    """Of the nodes that serve, this process's own first."""
    head = ray.get_runtime_context().get_node_id()
    return sorted((node.node_id for node in cluster.nodes()), key=lambda name: (name != head, name))


def store_of(cluster: kvray.Cluster, node_id: str) -> Any:
    name = node_store_name(cluster.name, node_id)
    return ray.get_actor(name, namespace=RAY_NAMESPACE)


def status_of(cluster: kvray.Cluster, node_id: str) -> dict[str, Any]:
    return {node.node_id: node.details for node in cluster.status().nodes}[node_id]


def files_of(cluster_name: str, node_id: str) -> list[Path]:
    """The slab and the socket that a NodeStore of this node has while it runs."""
    slab = Path(f"/dev/shm/kvray-{cluster_name}-{node_id[:16]}.slab")
    return [slab, Path(socket_path(None, cluster_name, node_id))]


def wait_listed(cluster: kvray.Cluster, keys: list[BlockKey], *, copies: int = 1) -> None:
    wait_until(
        lambda: all(len(places) == copies for places in cluster.where(*keys)),
        what=f"{copies} listed copies of each block",
    )


# ---- what is there


def test_start_gives_each_node_a_node_store_that_is_connected_to_the_other(
    ray_cluster: RayCluster, running: kvray.Cluster
) -> None:
    status = running.status()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert {node.node_id for node in status.nodes} == alive
    assert {node.state for node in status.nodes} == {NodeState.READY}
    assert len({node.pid for node in status.nodes}) == len({n.epoch for n in status.nodes}) == 2
    for node in status.nodes:
        assert node.peer_count == 1
        assert node.slab_bytes == SLAB["slab_bytes"]
        assert all(path.exists() for path in files_of("default", node.node_id))
    assert actor_names("kvray:default:node:") == sorted(
        node_store_name("default", node_id) for node_id in alive
    )


def test_status_is_a_table_with_a_row_a_node(running: kvray.Cluster) -> None:
    frame = running.status().to_frame()
    assert set(frame["state"]) == {"ready"}
    assert sorted(frame["node_id"]) == [node.node_id for node in running.nodes()]
    assert "details" not in frame.columns


def test_an_engine_of_this_process_is_told_where_its_node_store_listens(
    running: kvray.Cluster,
) -> None:
    settings = EngineConfig.parse(running.engine_settings())
    here = ray.get_runtime_context().get_node_id()
    assert find_sockets(settings) == [str(files_of("default", here)[1])]


# ---- the way of a block


def test_a_block_that_is_stored_on_one_node_is_a_hit_on_the_other(
    running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    node_a, node_b = node_ids(running)
    before = status_of(running, node_b)["link"]["read_bytes"]
    keys = a.store("one", "two", "three")
    wait_listed(running, keys)
    assert [places[0].node_id for places in running.where(*keys)] == [node_a] * 3

    assert b.hits(keys) == 3

    assert status_of(running, node_b)["link"]["read_bytes"] - before == 3 * BLOCK_BYTES
    for key in keys:
        payloads = [
            ray.get(store_of(running, node).block_bytes.remote(key)) for node in (node_a, node_b)
        ]
        assert payloads == [payload_of(key)] * 2
    wait_listed(running, keys, copies=2)


def test_what_nobody_has_is_a_miss_at_once_and_a_prefix_ends_there(
    running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    keys = a.store("there")
    wait_listed(running, keys)
    begun = time.monotonic()
    ticket = b.look_up([*b.keys("nowhere"), *keys], deadline_ms=5_000)
    assert bytes(ticket.states) == bytes([KeyState.MISS, KeyState.MISS])
    assert time.monotonic() - begun < 2.0, "a miss does not wait for the deadline"
    b.client.unpin(ticket)
    assert b.hits(keys) == 1


def test_links_are_measured_and_nothing_is_left_of_it(
    running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    """Both nodes are on this machine, so bytes are copied in memory and no counter sees them."""
    node_a, node_b = node_ids(running)
    keys = pair[0].store("before the measurement")
    wait_listed(running, keys)
    payload = ray.get(store_of(running, node_a).block_bytes.remote(keys[0]))

    links = running.measure_links()

    assert {(link.node_id, link.peer_id) for link in links} == {(node_a, node_b), (node_b, node_a)}
    for link in links:
        assert (link.outcome, link.reason) == (Outcome.MEASURED, "")
        assert (link.way, link.devices) == (Way.CMA, ())
        assert 0 < link.latency_us < 100_000
        assert link.gb_per_s > 0
        assert link.read_bytes >= MIN_JUDGED_BYTES
    for node_id in (node_a, node_b):
        ray.get(store_of(running, node_id).check.remote())
        link_state = status_of(running, node_id)["link"]
        assert link_state["measures_in_flight"] == 0
        assert link_state["scratch_pages_free"] == PAGE_COUNT
    assert ray.get(store_of(running, node_a).block_bytes.remote(keys[0])) == payload
    assert pair[1].hits(keys) == 1


def test_a_link_to_a_node_that_is_not_there_is_not_measured_and_says_so(
    running: kvray.Cluster,
) -> None:
    store = store_of(running, node_ids(running)[0])
    answer = ray.get(store.measure_link.remote("ab" * 28, is_far=True))
    assert answer["outcome"] == Outcome.NOT_CONNECTED
    assert "roster" in answer["reason"]


def test_two_models_share_nothing(running: kvray.Cluster) -> None:
    node_a, node_b = node_ids(running)
    one, other = Client(running, node_a, "one model"), Client(running, node_b, "another model")
    try:
        keys = one.store("same name")
        wait_listed(running, keys)
        foreign = other.keys("same name")
        assert foreign != keys
        assert other.hits(foreign) == 0
        other.store("same name")
        assert other.hits(foreign) == 1
        assert one.hits(keys) == 1
    finally:
        one.close()
        other.close()


# ---- a second one


def test_a_second_start_is_connect(running: kvray.Cluster) -> None:
    pids = [node.pid for node in running.nodes()]
    assert [node.pid for node in kvray.start().nodes()] == pids
    assert [node.pid for node in kvray.start(kvray.Config(**SLAB)).nodes()] == pids
    assert [node.pid for node in kvray.connect().nodes()] == pids


def test_a_second_start_that_wants_something_else_is_told_what_differs(
    running: kvray.Cluster,
) -> None:
    with pytest.raises(kvray.ConfigError) as caught:
        kvray.start(slab_bytes="32 MiB", lock="auto")
    assert "slab_bytes is 16777216 there and 33554432 here" in str(caught.value)
    assert "lock" not in str(caught.value)
    assert len(running.nodes()) == 2


def test_a_second_node_store_on_the_same_slab_is_refused(
    running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    node_id = node_ids(running)[0]
    keys = pair[0].store("kept by the first")
    intruder: Any = (
        ray.remote(NodeStore)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(kvray.Config(**SLAB).to_dict(), node_id)
    )
    try:
        wait_until(
            lambda: ray.get(intruder.status.remote())["phase"] == "failed",
            what="the refusal",
            limit_s=30.0,
        )
        problem = ray.get(intruder.status.remote())["problem"]
        assert problem["kind"] == "SlabBusyError"
        assert str(status_of(running, node_id)["pid"]) in problem["text"]
        assert ray.get(intruder.stop.remote()) == []
    finally:
        ray.kill(intruder)
    assert all(path.exists() for path in files_of("default", node_id))
    assert pair[0].hits(keys) == 1


def test_a_node_of_another_version_is_refused_by_name_and_not_misread(
    running: kvray.Cluster,
) -> None:
    """Its first byte says so, whatever the rest would mean in this version."""
    directory: Any = ray.get_actor("kvray:default:directory", namespace=RAY_NAMESPACE)
    info = NodeInfo(
        node_id=NodeId("ab" * 28),
        epoch=Epoch(2**45),
        link_name="another",
        link_metadata=b"m",
        slab_id=SlabId(bytes(16)),
        slab_address=4_096,
        slab_bytes=16 << 20,
        extent_bytes=1 << 20,
        host="elsewhere",
        kvray_version="9.9.9",
        format_version=FORMAT_VERSION + 1,
    )
    hello = encode(NodeHello(info, 0))
    with pytest.raises(
        kvray.KVRayError,
        match=f"speaks format version {FORMAT_VERSION + 1}, this one {FORMAT_VERSION}",
    ):
        ray.get(directory.hello.remote(bytes([FORMAT_VERSION + 1]) + hello[1:]))
    assert info.node_id not in {node.node_id for node in running.status().nodes}
    assert len(running.nodes()) == 2


# ---- what dies comes back


def test_a_killed_node_store_comes_back_in_a_new_epoch_and_has_lost_no_block(
    running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    node_id = node_ids(running)[0]
    keys = a.store("survivor")
    wait_listed(running, keys)
    before = status_of(running, node_id)
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = {node.node_id: node for node in running.status().nodes}[node_id]
        return now.state is NodeState.READY and now.pid not in (0, before["pid"])

    wait_until(is_back, what="the NodeStore", limit_s=START_LIMIT_S)
    running.wait_ready(2, deadline_s=START_LIMIT_S)
    after = status_of(running, node_id)
    assert after["epoch"] > before["epoch"]
    assert after["slab_id"] == before["slab_id"]
    a.wait_connected()
    assert a.hits(keys) == 1
    wait_until(lambda: b.hits(keys) == 1, what="a hit from the new epoch")


def test_a_killed_directory_comes_back_and_is_told_everything(
    running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    keys = a.store("told twice")
    wait_listed(running, keys)
    term = running.status().term
    directory = ray.get_actor("kvray:default:directory", namespace=RAY_NAMESPACE)
    ray.kill(directory, no_restart=False)

    def is_whole() -> bool:
        try:
            return running.status().term > term and all(running.where(*keys))
        except kvray.NodeLostError:
            return False

    wait_until(is_whole, what="the directory and what it knew", limit_s=START_LIMIT_S)
    # The other node joins it a moment later, and until then looks nothing up there.
    wait_until(lambda: b.hits(keys) == 1, what="a hit found by the new directory")
    running.wait_ready(2, deadline_s=START_LIMIT_S)


def test_a_node_store_that_somebody_killed_for_good_is_made_again(running: kvray.Cluster) -> None:
    node_id = node_ids(running)[1]
    old = status_of(running, node_id)
    ray.kill(store_of(running, node_id), no_restart=True)

    def is_back() -> bool:
        node = {node.node_id: node for node in running.status().nodes}[node_id]
        return node.state is NodeState.READY and node.pid not in (0, old["pid"])

    wait_until(is_back, what="another NodeStore", limit_s=START_LIMIT_S)
    assert status_of(running, node_id)["slab"]["adopted"], status_of(running, node_id)["slab"][
        "reason"
    ]
    running.wait_ready(2, deadline_s=START_LIMIT_S)


def test_a_node_that_joins_gets_a_node_store_and_one_that_leaves_is_forgotten(
    ray_cluster: RayCluster, running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    keys = pair[0].store("for the newcomer")
    wait_listed(running, keys)
    node = ray_cluster.add_node(num_cpus=1)
    try:
        running.wait_ready(3, deadline_s=START_LIMIT_S)
        newcomer = Client(running, node.node_id)
        assert newcomer.hits(keys) == 1
        assert status_of(running, node.node_id)["served_after_ms"] <= JOIN_LIMIT_MS
        newcomer.close()
    finally:
        ray_cluster.remove_node(node)
    wait_until(lambda: node.node_id not in {n.node_id for n in running.nodes()}, what="the burial")
    running.wait_ready(2, deadline_s=START_LIMIT_S)


def test_a_node_that_is_drained_leaves_its_blocks_to_the_others(
    ray_cluster: RayCluster, running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    node = ray_cluster.add_node(num_cpus=1)
    try:
        running.wait_ready(3, deadline_s=START_LIMIT_S)
        leaving = Client(running, node.node_id)
        sole, shared = leaving.store("sole 1", "sole 2", "sole 3"), leaving.store("shared")
        wait_listed(running, [*sole, *shared])
        assert a.hits(shared) == 1
        wait_listed(running, shared, copies=2)
        files = files_of("default", node.node_id)

        drained = running.drain(node.node_id)

        # Its slab was that of a node that left before, so more may be in it than was stored here.
        assert (drained.fetched, drained.lost) == (3, 0)
        assert drained.kept == drained.blocks - 3 >= 1
        wait_listed(running, [*sole, *shared])
        assert b.hits(sole) == 3
        assert b.hits(shared) == 1
        assert [path for path in files if path.exists()] == []
        states = {found.node_id: found.state for found in running.status().nodes}
        assert states.pop(node.node_id) is NodeState.DRAINED
        assert set(states.values()) - {NodeState.LOST} == {NodeState.READY}
        running.wait_ready(deadline_s=START_LIMIT_S)  # does not wait for the drained one
        with pytest.raises(kvray.NodeLostError, match="no node that serves"):
            running.drain(node.node_id)
        leaving.close()
    finally:
        ray_cluster.remove_node(node)
    wait_until(
        lambda: all(n.state is not NodeState.DRAINED for n in running.status().nodes),
        what="Ray's word that it is gone",
    )


def test_who_has_asked_for_it_is_in_the_logs_of_the_actors(running: kvray.Cluster) -> None:
    running.clear()
    node = running.nodes()[0]
    head: Any = ray._private.worker.global_worker.node  # noqa: SLF001
    folder = Path(head.get_logs_dir_path())
    (log,) = folder.glob(f"worker-*-{node.pid}.err")

    lines = [line for line in log.read_text().splitlines() if "kvray.audit" in line]

    assert f"clear, asked by {caller()}" in lines[-1]
    assert f"process {os.getpid()}" in lines[-1]
    with pytest.raises(kvray.ArgumentError, match="asked_by"):
        ray.get(store_of(running, node.node_id).clear.remote(asked_by="\x1b[2J"))


# ---- the end


def test_a_wiped_cluster_has_no_byte_of_what_it_has_forgotten(
    running: kvray.Cluster, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    (secret,) = a.store("a secret")
    (kept,) = a.store("in use")
    wait_listed(running, [secret, kept])
    assert b.hits([secret]) == 1, "and so it is in both slabs"
    held = a.look_up([kept])
    slabs = [files_of(running.name, node_id)[0] for node_id in node_ids(running)]
    words = payload_of(secret)[:64]
    running.clear()
    assert all(words in slab.read_bytes() for slab in slabs), "to forget is not to wipe"

    assert running.clear(wipe=True) > 2 * SLAB["slab_bytes"] * 0.9

    assert not any(words in slab.read_bytes() for slab in slabs)
    assert payload_of(kept)[:64] in slabs[0].read_bytes(), "a block that is in use stays"
    a.client.unpin(held)
    assert a.hits([kept]) == 1
    running.clear()


def test_stop_leaves_no_actor_no_slab_and_no_socket(
    ray_cluster: RayCluster, running: kvray.Cluster
) -> None:
    cluster = kvray.start(cluster_name="brief", **SLAB, deadline_s=START_LIMIT_S)
    pids = [node.pid for node in cluster.nodes()]
    files = [path for node in cluster.nodes() for path in files_of("brief", node.node_id)]
    assert all(path.exists() for path in files)
    client = Client(cluster, node_ids(cluster)[0])
    client.store("gone")

    cluster.stop()

    assert actor_names("kvray:brief:") == []
    assert [path for path in files if path.exists()] == []
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="their end")
    wait_until(lambda: client.client.state is ClientState.ABSENT, what="the client's notice")
    client.close()
    with pytest.raises(kvray.NodeLostError, match="does not answer"):
        cluster.status()
    with pytest.raises(kvray.NodeLostError, match="does not run"):
        kvray.connect("brief")
    cluster.stop()  # does nothing
    assert len(running.nodes()) == 2, "the other cluster is not concerned"


def test_stop_cleans_up_after_a_node_store_that_does_not_answer(
    ray_cluster: RayCluster, running: kvray.Cluster
) -> None:
    cluster = kvray.start(cluster_name="frozen", **SLAB, deadline_s=START_LIMIT_S)
    files = [path for node in cluster.nodes() for path in files_of("frozen", node.node_id)]
    os.kill(cluster.nodes()[0].pid, signal.SIGSTOP)
    cluster.stop(deadline_s=2.0)
    assert actor_names("kvray:frozen:") == []
    assert [path for path in files if path.exists()] == []


# ---- what can not be


def test_a_slab_that_does_not_fit_is_told_to_whoever_starts_and_nothing_is_left(
    ray_cluster: RayCluster,
) -> None:
    with pytest.raises(kvray.ConfigError) as caught:
        kvray.start(cluster_name="huge", slab_bytes="1 TiB", deadline_s=START_LIMIT_S)
    assert str(1 << 40) in str(caught.value)
    assert "/dev/shm has" in str(caught.value)
    assert actor_names("kvray:huge:") == []
    assert not list(Path("/dev/shm").glob("kvray-huge-*"))


def test_a_node_store_that_can_not_start_tells_why_and_does_not_die_of_it(
    ray_cluster: RayCluster,
) -> None:
    """Ray would start it again without end."""
    node_id = ray.get_runtime_context().get_node_id()
    store: Any = (
        ray.remote(NodeStore)
        .options(**(dict(ACTOR_OPTIONS) | {"lifetime": None, "name": "alone"}))
        .remote(kvray.Config(cluster_name="alone", slab_bytes=1 << 40).to_dict(), node_id)
    )
    try:
        wait_until(
            lambda: ray.get(store.status.remote())["phase"] == "failed",
            what="the failure",
            limit_s=30.0,
        )
        first = ray.get(store.status.remote())
        assert first["problem"]["kind"] == "ConfigError"
        assert ray.get(store.status.remote())["pid"] == first["pid"]
    finally:
        ray.kill(store)


def test_waiting_for_more_nodes_than_there_are_ends_at_the_deadline(running: kvray.Cluster) -> None:
    lines: list[str] = []
    with pytest.raises(kvray.NodeLostError, match="2 of 9 nodes"):
        running.wait_ready(9, deadline_s=0.5, progress=lines.append)
    assert sum(line.endswith(": ready") for line in lines) == 2


def test_python_without_asserts_is_refused() -> None:
    done = run_python("import kvray; kvray.start()", "-O")
    assert "python -O" in done.stderr
    assert "ConfigError" in done.stderr


# ---- idle, and alone


def test_a_quiet_cluster_costs_almost_nothing(running: kvray.Cluster) -> None:
    """The quietest of a few looks: what else runs here makes each wake-up dearer."""
    directory: Any = ray.get_actor("kvray:default:directory", namespace=RAY_NAMESPACE)
    pids = {node.node_id[:8]: node.pid for node in running.nodes()}
    pids["directory"] = ray.get(directory.pid.remote())
    quietest: dict[str, float] = dict.fromkeys(pids, 1.0)
    for _ in range(IDLE_LOOKS):
        if max(quietest.values()) <= IDLE_SHARE:
            break
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        begun = time.monotonic()
        time.sleep(10.0)  # the thing that is measured
        passed_s = time.monotonic() - begun
        for name, pid in pids.items():
            quietest[name] = min(quietest[name], (cpu_s(pid) - before[name]) / passed_s)
    assert max(quietest.values()) <= IDLE_SHARE, quietest


def cpu_s(pid: int) -> float:
    """What a process has used, to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((t / "schedstat").read_text().split()[0]) for t in threads) / 1e9


def test_without_a_ray_cluster_a_local_one_is_started_with_its_token() -> None:
    """Beside the cluster of this module, with kvray under the same name: nothing collides."""
    done = run_python(
        """
import os, kvray, ray
cluster = kvray.start(slab_bytes="16 MiB", extent_bytes="1 MiB", deadline_s=60)
print("nodes", len(cluster.nodes()))
print("auth", os.environ.get("RAY_AUTH_MODE"))
cluster.stop()
print("left", ray.util.list_named_actors(all_namespaces=True))
ray.shutdown()
"""
    )
    assert "nodes 1" in done.stdout, done.stderr
    assert "auth token" in done.stdout
    assert "left []" in done.stdout


def run_python(code: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """In a process that knows of no Ray cluster: "local" keeps it from those on this host."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["RAY_ADDRESS"] = "local"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
