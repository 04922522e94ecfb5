"""Faults of one process or one node, each with what must hold of it.

Every function takes a world in which all is well and leaves one; what it has killed is replaced
after the figures were taken.
"""

import os
import signal
import time

from benchmarks.fault_load import Kind
from benchmarks.fault_report import Report
from benchmarks.fault_scene import Scene, scene
from benchmarks.fault_world import World, signal_all
from kvray.core.ids import BlockKey

STORE_LOCAL_MS = 2_500  # Ray starts the actor again in 1 s, the slab is adopted in less
STORE_PEER_MS = 5_000  # a NIXL agent, a hello, the connections
NODE_OUT_MS = 2_000  # buried after 1.5 s of silence
NODE_WAIT_MS = 500  # of a request that asks a dead node
FROZEN_OUT_MS = 2_500
THAWED_BACK_MS = 3_000  # it hears that it was buried, makes another agent, says hello
FREEZE_S = 5.0  # > FROZEN_OUT_MS: it has been buried for a while

VICTIM = 1  # the node that it happens to; the directory and this process's raylet are on node 0


def store_kill(world: World) -> Report:
    report = Report("store_kill")
    with scene(world, report) as it:
        it.warm()
        it.load.stop()  # so that "the blocks before" is one set
        before, epoch = world.keys(VICTIM), world.epoch(VICTIM)
        pid = world.store_pid(VICTIM)
        it.load.start()
        it.inject(lambda: os.kill(pid, signal.SIGKILL))
        measure_store_kill(it, before, epoch)
    return report


def measure_store_kill(
    it: Scene, before: set[BlockKey], epoch: int, *, is_quiet: bool = True
) -> None:
    """Of the NodeStore of VICTIM, which has just been killed. Stops the load. is_quiet: nobody
    else has anything under way.
    """
    world, report = it.world, it.report
    node_id = world.nodes.node_ids[VICTIM]
    it.wait_hits_again(VICTIM)
    it.wait_after()
    report.detect_ms = _rounded(
        it.watch.first(it.fault_s, lambda look: look.epochs.get(node_id) != epoch)
    )
    it.load.stop()
    report.blocks_before = len(before)
    report.blocks_after = len(before & world.keys(VICTIM))
    report.require(report.blocks_after == len(before), "READY blocks were lost")
    report.require_within("local hits", report.local_hits_again_ms, STORE_LOCAL_MS)
    report.require_within("peer hits", report.peer_hits_again_ms, STORE_PEER_MS)
    report.require(world.epoch(VICTIM) > epoch, "no new epoch")
    for difference in world.differences() if is_quiet else ():
        report.require(condition=False, text=difference)


def node_kill(world: World) -> Report:
    """Raylet and NodeStore at once; the node's engine goes on, and counts. Afterwards there are
    another node and engine in their places.
    """
    report = Report("node_kill")
    with scene(world, report) as it:
        it.warm()
        node_id, pids = world.nodes.node_ids[VICTIM], world.node_pids(VICTIM)
        it.inject(lambda: signal_all(pids, signal.SIGKILL))
        out_ms = it.watch.wait_for(
            it.fault_s, lambda look: node_id not in look.epochs, limit_s=20.0
        )
        report.detect_ms = _rounded(out_ms)
        it.wait_after()
        it.wait_hits([(Kind.LOCAL, 0)])
    report.require_within("out of the roster", report.detect_ms, NODE_OUT_MS)
    report.require_within("worst wait", report.worst_extra_wait_ms, NODE_WAIT_MS)
    report.require(it.first_hit(Kind.LOCAL, engine=0) is not None, "the other node has no hits")
    world.replace_node(VICTIM)
    world.wait_whole()
    return report


def node_freeze(world: World) -> Report:
    """Raylet and NodeStore stand still, are buried, and go on."""
    report = Report("node_freeze")
    with scene(world, report) as it:
        it.warm()
        node_id, pids = world.nodes.node_ids[VICTIM], world.node_pids(VICTIM)
        epoch, before = world.epoch(VICTIM), world.keys(VICTIM)
        it.inject(lambda: signal_all(pids, signal.SIGSTOP))
        try:
            report.detect_ms = _rounded(
                it.watch.wait_for(it.fault_s, lambda look: node_id not in look.epochs, limit_s=20.0)
            )
            time.sleep(max(0.0, FREEZE_S - (time.monotonic() - it.fault_s)))
        finally:
            thawed_s = time.monotonic()
            signal_all(pids, signal.SIGCONT)
        back_ms = it.watch.wait_for(
            thawed_s, lambda look: look.epochs.get(node_id, 0) > epoch, limit_s=20.0
        )
        report.notes["back_ms"] = _rounded(back_ms)
        it.wait_hits_again(VICTIM, since_s=thawed_s)
        it.wait_after()
        it.load.stop()
        now = world.keys(VICTIM)
        report.blocks_before, report.blocks_after = len(before), len(before & now)
        places = [p for places in world.where(list(now)) for p in places if p.node_id == node_id]
        report.require(report.blocks_after == len(before), "READY blocks were lost")
        report.require(all(p.epoch > epoch for p in places), "a location of the old epoch")
        for difference in world.differences():
            report.require(condition=False, text=difference)
        report.require_within("out of the roster", report.detect_ms, FROZEN_OUT_MS)
        report.require_within("back", report.notes["back_ms"], THAWED_BACK_MS)
    return report


def _rounded(ms: float | None) -> int | None:
    return None if ms is None else round(ms)
