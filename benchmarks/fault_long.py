"""What takes longer: faults at random, none at all, and a node that is drained."""

import os
import random
import signal
import time
from collections.abc import Callable

from benchmarks.fault_cases import VICTIM
from benchmarks.fault_load import Kind
from benchmarks.fault_report import Report
from benchmarks.fault_scene import Scene, scene
from benchmarks.fault_world import World, signal_all
from tests.block_client import Client

DRAIN_BLOCKS, DRAIN_BLOCK_BYTES = 64, 1 << 20
CALM_S = 2.0  # between two faults at random, so that the stream has hits to lose
FREEZE_S = 3.0
SEED = 1


def nothing(world: World, seconds: float) -> Report:
    """Both engines compute without a pause. Nobody is taken for dead."""
    report = Report("none")
    with scene(world, report, turns=(Kind.NEW,), think_s=0.0) as it:
        it.load.start()
        it.inject(lambda: None)
        time.sleep(seconds)
        it.load.stop()
        for difference in world.differences():
            report.require(condition=False, text=difference)
        burials = it.watch.burials()
        report.require(not burials, f"{burials} nodes were taken for dead")
    return report


def drain(world: World) -> Report:
    """A third node has what nobody else has, and leaves."""
    report = Report("drain")
    node_id = world.add_node()
    leaving = Client(world.nodes.cluster, node_id, block_bytes=DRAIN_BLOCK_BYTES)
    reader = Client(world.nodes.cluster, world.nodes.node_ids[0], block_bytes=DRAIN_BLOCK_BYTES)
    try:
        keys = leaving.store(*(f"drained-{i}" for i in range(DRAIN_BLOCKS)))
        world.nodes.wait_listed(keys)
        with scene(world, report) as it:
            it.warm()
            report.blocks_before = sum(map(bool, world.where(keys)))
            it.inject(lambda: None)
            drained = world.nodes.cluster.drain(node_id)
            report.notes["drain_ms"] = round((time.monotonic() - it.fault_s) * 1_000)
            report.notes["drained"] = str(drained)
            left = [[p for p in places if p.node_id != node_id] for places in world.where(keys)]
            report.blocks_after = sum(map(bool, left))
            it.wait_after()
            it.load.stop()
            report.require(report.blocks_after == report.blocks_before, "blocks were lost")
            report.require(reader.hits(keys) == len(keys), "blocks can not be had any more")
            for difference in world.differences():
                report.require(condition=False, text=difference)
    finally:
        leaving.close()
        reader.close()
        world.remove_node(node_id)
    return report


# ---- at random


def at_random(world: World, seconds: float) -> Report:
    report = Report("random")
    chance = random.Random(SEED)
    done: dict[str, int] = {}
    with scene(world, report) as it:
        it.warm()
        it.inject(lambda: None)
        while time.monotonic() - it.fault_s < seconds:
            action = chance.choice(ACTIONS)
            name = action.__name__.strip("_")
            done[name] = done.get(name, 0) + 1
            action(it, chance)
            healed_s = time.monotonic()
            wanted = [(Kind.LOCAL, 0), (Kind.LOCAL, 1), (Kind.PEER, 0), (Kind.PEER, 1)]
            again = it.wait_hits(wanted, since_s=healed_s)
            report.require(None not in again, f"no hits of each kind after {name}: {again}")
            time.sleep(CALM_S)
        it.load.stop()
        report.notes["faults"] = done
        report.require(world.wait_whole(), "a node does not come back")
        for difference in world.differences():
            report.require(condition=False, text=difference)
    return report


def _kill_store(it: Scene, chance: random.Random) -> None:
    it.world.kill_store(chance.randrange(len(it.world.engines)))


def _kill_directory(it: Scene, _chance: random.Random) -> None:
    os.kill(it.world.directory_pid(), signal.SIGKILL)


def _freeze_node(it: Scene, _chance: random.Random) -> None:
    pids = it.world.node_pids(VICTIM)
    signal_all(pids, signal.SIGSTOP)
    try:
        time.sleep(FREEZE_S)
    finally:
        signal_all(pids, signal.SIGCONT)


def _kill_node(it: Scene, _chance: random.Random) -> None:
    signal_all(it.world.node_pids(VICTIM), signal.SIGKILL)
    time.sleep(CALM_S)  # its engine goes on meanwhile
    it.load.excuse(it.world.engines[VICTIM])
    it.world.replace_node(VICTIM)
    it.load.library.forget(VICTIM)


def _kill_engine(it: Scene, chance: random.Random) -> None:
    index = chance.randrange(len(it.world.engines))
    engine = it.world.engines[index]
    it.load.excuse(engine)
    engine.kill()
    it.world.replace_engine(index)


ACTIONS: list[Callable[[Scene, random.Random], None]] = [
    _kill_store,
    _kill_store,
    _kill_directory,
    _freeze_node,
    _kill_node,
    _kill_engine,
]
