"""What faults happen to: a Ray cluster with kvray, an engine on each of two of its nodes.

    World.kill_store(1)   freeze(1) thaw(1)   kill_node(1) replace_node(1)   replace_engine(1)

Engine i belongs to node i. It is a plain process beside the raylet, so it outlives its node.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from benchmarks.fault_load import ENGINE_SETTINGS, Controls, Kind, Library, Load
from kvray.actors import RAY_NAMESPACE, directory_name
from kvray.core.ids import BlockKey
from tests.engines import Engine, Mode, start_engine
from tests.models import tiny
from tests.ray_nodes import (
    READY_LIMIT_S,
    Nodes,
    pins_of_requests,
    running_nodes,
    wait_until,
)

SLAB_BYTES = 1 << 30  # 100,000 blocks of 4 KiB, and 250 chunks of the engines beside them
EXTENT_BYTES = 16 << 20
# The product's own deadline, but not its 2 ms a step: beside another engine, two raylets and this
# benchmark on two cores, an answer takes longer now and then, and a late one is a miss by design.
TIMES = {"lookup_deadline_ms": 1_000, "step_budget_ms": 20}
ENGINE_COUNT = 2
SETTLE_LIMIT_S = 20.0
COUNT_LIMIT_S = 5.0


@dataclass
class World:
    """See the module's docstring. controls: prompts and the right answers."""

    nodes: Nodes
    folder: Path
    controls: Controls
    engines: list[Engine] = field(default_factory=list)
    loads: int = 0

    def load(self, *, turns: Sequence[Kind], think_s: float) -> Load:
        """A new stream, whose documents nobody has yet."""
        self.loads += 1
        prompts, controls = self.controls
        library = Library(prompts, controls, f"load-{self.loads}")
        return Load(self.engines, library, turns=turns, think_s=think_s)

    # ---- who is there

    def store_pid(self, index: int) -> int:
        return int(self.nodes.status(index)["pid"])

    def directory(self) -> Any:
        name = directory_name(self.nodes.cluster.name)
        return ray.get_actor(name, namespace=RAY_NAMESPACE)

    def directory_pid(self) -> int:
        return int(ray.get(self.directory().pid.remote()))

    def raylet_pid(self, index: int) -> int:
        node = self._ray_node(index)
        return int(node.all_processes["raylet"][0].process.pid)

    def keys(self, index: int) -> set[BlockKey]:
        return set(self.nodes.keys(index))

    def epoch(self, index: int) -> int:
        return int(self.nodes.status(index)["epoch"])

    # ---- faults

    def kill_store(self, index: int, *, pid: int | None = None) -> None:
        """pid: known beforehand, so that nothing but the kill takes time."""
        os.kill(pid or self.store_pid(index), signal.SIGKILL)

    def node_pids(self, index: int) -> list[int]:
        """Raylet and NodeStore."""
        return [self.raylet_pid(index), self.store_pid(index)]

    def start_engine(self, index: int, *, mode: Mode = Mode.IN_PROCESS) -> Engine:
        cores = sorted(os.sched_getaffinity(0))
        return start_engine(
            tiny(),
            folder=self.folder,
            mode=mode,
            kv_transfer_config=self.nodes.transfer(index, **TIMES),
            environment={
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to workers
                # One core for each engine, and none that waits by spinning.
                "VLLM_CPU_OMP_THREADS_BIND": str(cores[index % len(cores)]),
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "passive",
            },
            **ENGINE_SETTINGS,
        )

    def replace_engine(self, index: int) -> None:
        self.engines[index].close()
        self.engines[index] = self.start_engine(index).ready()

    def replace_node(self, index: int) -> None:
        """A new node in the place of a dead one, and a new engine on it."""
        dead = self._ray_node(index)
        self.nodes.ray_cluster.remove_node(dead, allow_graceful=False)
        self.nodes.node_ids[index] = self.add_node()
        self.replace_engine(index)

    def add_node(self) -> str:
        """Returns when it serves; its Ray node id."""
        node = self.nodes.ray_cluster.add_node(num_cpus=2)
        wait_until(
            lambda: node.node_id in {n.node_id for n in self.nodes.cluster.nodes()},
            what="the new node",
            limit_s=READY_LIMIT_S,
        )
        return str(node.node_id)

    def remove_node(self, node_id: str) -> None:
        """Of add_node."""
        self.nodes.ray_cluster.remove_node(self._find(node_id), allow_graceful=False)

    def _ray_node(self, index: int) -> Any:
        return self._find(self.nodes.node_ids[index])

    def _find(self, node_id: str) -> Any:
        (node,) = (n for n in self.nodes.ray_cluster.list_all_nodes() if n.node_id == node_id)
        return node

    # ---- what must be true whenever nothing is under way

    def wait_whole(self, *, limit_s: float = SETTLE_LIMIT_S) -> bool:
        """Until every node serves, and each knows all others."""
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            with suppress(RayError, AssertionError):
                status = self.nodes.cluster.status()
                ours = [n for n in status.nodes if n.node_id in self.nodes.node_ids]
                if len(ours) == len(self.nodes.node_ids) and all(
                    node.is_settled(status.roster_version) for node in ours
                ):
                    return True
            time.sleep(0.05)
        return False

    def differences(self) -> list[str]:
        """How the directory differs from the union of the nodes, and what no slot accounts for.
        Empty if all is well. To be asked while nothing is under way.
        """
        found: list[str] = []
        end_s = time.monotonic() + COUNT_LIMIT_S
        while time.monotonic() < end_s:
            found = self._differences()
            if not found:
                return []
            time.sleep(0.1)
        return found

    def _differences(self) -> list[str]:
        found = []
        listed = ray.get(self.directory().status.remote())["nodes"]
        for index, node_id in enumerate(self.nodes.node_ids):
            name = f"node {index}"
            status, keys = self.nodes.status(index), self.nodes.keys(index)
            store = status["store"]
            entries = listed.get(node_id, {}).get("entries")
            if entries != len(keys):
                found.append(f"{name} has {len(keys)} blocks, the directory lists {entries}")
            missing = sum(
                not any(p.node_id == node_id and p.epoch == status["epoch"] for p in places)
                for places in self.where(keys)
            )
            if missing:
                found.append(f"{missing} blocks of {name} are not in the directory")
            occupied = sum(row["occupied"] for row in store["classes"])
            if occupied != store["ready"] + store["writing"] + store["quarantined"]:
                found.append(f"{name} has {occupied} occupied slots: {store}")
            found += [
                f"{name} has {store[what]} {what}"
                for what in ("writing", "quarantined")
                if store[what]
            ]
            if pins := pins_of_requests(status):
                found.append(f"{name} has {pins} pins of requests")
            ray.get(self.nodes.store(index).check.remote())
        return found

    def where(self, keys: list[BlockKey]) -> list[Any]:
        """Cluster.where in pages."""
        page = 10_000
        return [
            places
            for start in range(0, len(keys), page)
            for places in self.nodes.cluster.where(*keys[start : start + page])
        ]

    def clear(self) -> None:
        """Every node empty, for the next fault."""
        for index in range(len(self.nodes.node_ids)):
            ray.get(self.nodes.store(index).clear.remote())


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


@contextmanager
def running_world(folder: Path, controls: Controls) -> Iterator[World]:
    """Two nodes, two engines. All of it is gone afterwards."""
    with (
        running_nodes(ENGINE_COUNT, slab_bytes=SLAB_BYTES, extent_bytes=EXTENT_BYTES) as nodes,
        populated(World(nodes, folder, controls)) as world,
    ):
        yield world


@contextmanager
def populated(world: World) -> Iterator[World]:
    """With an engine on each of the first nodes."""
    try:
        world.engines += [world.start_engine(index) for index in range(ENGINE_COUNT)]
        for engine in world.engines:
            engine.ready()
        world.wait_whole()
        yield world
    finally:
        for engine in world.engines:
            engine.ask_to_end()
        for engine in world.engines:
            engine.close()
