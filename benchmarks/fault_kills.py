"""Kills at the worst moment: in the middle of a store and of a peer's read, of an engine that
stores and loads, and of the directory of a large cache.
"""

import ctypes
import os
import random
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from benchmarks import fault_engine
from benchmarks.fault_cases import VICTIM, measure_store_kill
from benchmarks.fault_load import ANSWER_TOKENS, Kind
from benchmarks.fault_report import Report
from benchmarks.fault_scene import Scene, scene
from benchmarks.fault_world import World
from kvray.core.ids import BlockKey
from tests.block_client import Client, payload_of
from tests.engines import Engine, EngineError, Mode
from tests.ray_nodes import pins_of_requests, wait_until

DIRECTORY_PEER_MS = 4_000  # Ray starts it again in 1 s, the nodes say hello to it within another
DIRECTORY_WHOLE_MS = 6_000  # at BLOCK_COUNT blocks
BLOCK_COUNT = 100_000
SMALL_BYTES = 4_096
IN_TRANSIT = 2  # blocks of a document that is being announced
STORE_BATCH = 1_000  # keys a message may name
ENGINE_GONE_MS = 2_000

READ_BLOCKS, READ_BLOCK_BYTES = 48, 1 << 20  # two batches; 15 ms over cma
READ_ATTEMPTS = 5
MAX_CUT_AFTER_MS = 12.0


# ---- the NodeStore in the middle of a store and of a peer's read


def store_kill_mid_write(world: World) -> Report:
    """Until a read of the other node was really cut: over cma it takes milliseconds."""
    report = Report("store_kill_mid_write")
    node_ids = world.nodes.node_ids
    writer = Client(world.nodes.cluster, node_ids[VICTIM], block_bytes=READ_BLOCK_BYTES)
    reader = Client(world.nodes.cluster, node_ids[0], block_bytes=READ_BLOCK_BYTES)
    chance = random.Random(0)
    try:
        with scene(world, report) as it:
            it.warm()
            for attempt in range(READ_ATTEMPTS):
                name = f"{world.loads}-{attempt}"  # of this scene alone: it may be played again
                cut = _cut_read(it, writer, reader, name, chance.uniform(1.0, MAX_CUT_AFTER_MS))
                report.notes["attempts"], report.notes["cut_reads"] = attempt + 1, cut
                if cut:
                    break
            report.require(report.notes["cut_reads"] > 0, "no read was under way at the kill")
    finally:
        writer.close()
        reader.close()
    return report


def _cut_read(it: Scene, writer: Client, reader: Client, name: str, cut_after_ms: float) -> int:
    """How many of the reader's reads failed."""
    world, report = it.world, it.report
    writer.wait_connected()
    it.load.stop()
    keys = writer.store(*(f"read-{name}-{i}" for i in range(READ_BLOCKS)))
    world.nodes.wait_listed(keys)
    torn, places = _half_written(writer, f"torn-{name}")
    pid, before, epoch = world.store_pid(VICTIM), world.keys(VICTIM), world.epoch(VICTIM)
    failed_before = _failed_reads(world)
    it.load.start()
    ticket = reader.begin(keys, deadline_ms=1_000)
    time.sleep(cut_after_ms / 1_000)
    it.inject(lambda: os.kill(pid, signal.SIGKILL))
    wait_until(lambda: ticket.settled, what="the answer to the reader")
    reader.client.unpin(ticket)
    measure_store_kill(it, before, epoch, is_quiet=False)
    report.require(reader.hits([torn]) == 0, "a torn slot was served to a peer")
    writer.wait_connected()
    report.require(writer.hits([torn]) == 0, "a torn slot was served")
    # The engine's copy goes on into the mapped slab, and is committed in the new session.
    session = writer.client.session
    assert session is not None
    (slot, generation, offset) = places
    payload = payload_of(torn, READ_BLOCK_BYTES)
    ctypes.memmove(writer.slab().address + offset, payload, len(payload))
    writer.client.commit(session.slab_id, [(slot, generation, offset)])
    report.require(writer.client.drain(5.0), "the commit was not acknowledged")
    wait_until(lambda: writer.hits([torn]) == 1, what="the block that was finished")
    report.require(reader.hits(keys) == len(keys), "blocks of the cut read do not come")
    for difference in world.differences():
        report.require(condition=False, text=difference)
    return _failed_reads(world) - failed_before


def _half_written(writer: Client, name: str) -> tuple[BlockKey, tuple[int, int, int]]:
    (key,) = writer.keys(name)
    writer.client.begin_step()
    reserved = writer.client.reserve([key], run_lengths=[1], run_slot_bytes=[READ_BLOCK_BYTES])
    assert reserved is not None
    place = reserved.places[0]
    half = payload_of(key, READ_BLOCK_BYTES)[: READ_BLOCK_BYTES // 2]
    ctypes.memmove(writer.slab().address + place[2], half, len(half))
    return key, place


def _failed_reads(world: World) -> int:
    return int(world.nodes.status(0)["fetch"]["reads"]["failed_count"])


# ---- an engine that stores and loads


def engine_kill(world: World, *, mode: Mode = Mode.MULTIPROCESS) -> Report:
    """Its whole process tree, while slots are reserved and pinned for it."""
    report = Report("engine_kill")
    victim = world.start_engine(VICTIM, mode=mode)
    try:
        victim.ready()
        with scene(world, report) as it:
            report.notes["held"] = _busy_with_both(it, victim)
            it.warm()
            pids = set(victim.processes())
            it.inject(victim.kill)
            gone_ms = _until_gone(world, pids, it.fault_s)
            report.detect_ms = gone_ms
            it.wait_hits([(Kind.LOCAL, VICTIM), (Kind.PEER, 0), (Kind.PEER, 1)])
            it.wait_after()
            it.load.stop()
            report.require_within("pins and reservations back", gone_ms, ENGINE_GONE_MS)
            for difference in world.differences():
                report.require(condition=False, text=difference)
    finally:
        victim.kill()
        victim.close()
    return report


def _busy_with_both(it: Scene, victim: Engine) -> dict[str, int]:
    """Returns when the victim has a store and a load under way that will not end: how many slots
    are reserved and pinned for it, since nobody else asks for anything yet.
    """
    library, world = it.load.library, it.world
    victim.call(
        fault_engine.ask, library.prompts[0], "victim-loads", ANSWER_TOKENS
    )  # so that there is something to load
    victim.call(fault_engine.ask, library.prompts[1], "flush", ANSWER_TOKENS)
    victim.call(fault_engine.hold_copies)
    requests = threading.Thread(target=_ask_for_ever, args=(victim, library.prompts), daemon=True)
    requests.start()
    wait_until(
        lambda: all(_held(world).values()), what="a store and a load of the victim", limit_s=20.0
    )
    return _held(world)


def _ask_for_ever(victim: Engine, prompts: list[list[int]]) -> None:
    with suppress(EngineError):
        victim.call(fault_engine.ask, prompts[2], "victim-stores", ANSWER_TOKENS)
        victim.call(fault_engine.ask, prompts[0], "victim-loads", ANSWER_TOKENS)


def _held(world: World) -> dict[str, int]:
    """What is reserved and pinned on the victim's node, by anybody."""
    status = world.nodes.status(VICTIM)
    return {"writing": status["store"]["writing"], "pins": pins_of_requests(status)}


def _until_gone(world: World, pids: set[int], since_s: float) -> int | None:
    """Milliseconds until the node has no client of these processes and no slot in quarantine."""
    end_s = since_s + 15.0
    while time.monotonic() < end_s:
        status = world.nodes.status(VICTIM)
        if (
            not any(client["pid"] in pids for client in status["clients"])
            and not status["store"]["quarantined"]
        ):
            return round((time.monotonic() - since_s) * 1_000)
        time.sleep(0.02)
    return None


# ---- the directory


def directory_kill(world: World) -> Report:
    """With BLOCK_COUNT small blocks beside those of the engines."""
    report = Report("directory_kill")
    clients = [
        Client(world.nodes.cluster, node_id, block_bytes=SMALL_BYTES)
        for node_id in world.nodes.node_ids
    ]
    try:
        for index, client in enumerate(clients):
            _store_small(client, index, BLOCK_COUNT // len(clients))
        with scene(world, report) as it:
            it.warm()
            _kill_directory(it)
    finally:
        for client in clients:
            client.close()
    return report


def _kill_directory(it: Scene) -> None:
    world, report = it.world, it.report
    pid, term = world.directory_pid(), world.nodes.cluster.status().term
    report.blocks_before = sum(len(world.keys(i)) for i in range(len(world.nodes.node_ids)))
    it.inject(lambda: os.kill(pid, signal.SIGKILL))
    back_ms = it.watch.wait_for(it.fault_s, lambda look: look.term > term, limit_s=20.0)
    report.detect_ms = None if back_ms is None else round(back_ms)
    report.notes["whole_ms"] = _until_whole(it)
    peers = it.wait_hits([(Kind.PEER, 0), (Kind.PEER, 1)])
    report.peer_hits_again_ms = max(ms for ms in peers if ms is not None) if all(peers) else None
    report.local_hits_again_ms = it.first_hit(Kind.LOCAL)
    it.wait_after()
    away_s = it.fault_s + (back_ms or 0.0) / 1_000
    without = [o for o in it.load.since(it.fault_s) if o.began_s < away_s]
    report.notes["without_directory"] = {
        "requests": len(without),
        "local": sum(o.kind is Kind.LOCAL and o.local > 0 for o in without),
        "stored": sum(o.stored for o in without),
    }
    it.load.stop()
    report.blocks_after = sum(len(world.keys(i)) for i in range(len(world.nodes.node_ids)))
    locals_missed = sum(o.kind is Kind.LOCAL and not o.local for o in without)
    report.require(not locals_missed, f"{locals_missed} local hits were missed meanwhile")
    report.require(report.notes["without_directory"]["stored"] > 0, "nothing was stored meanwhile")
    report.require(report.blocks_after >= BLOCK_COUNT, "the nodes have lost blocks")
    report.require_within("peer hits", report.peer_hits_again_ms, DIRECTORY_PEER_MS)
    report.require_within("the union", report.notes["whole_ms"], DIRECTORY_WHOLE_MS)
    for difference in world.differences():
        report.require(condition=False, text=difference)


def _store_small(client: Client, index: int, count: int) -> None:
    """Blocks of which only the name matters: what the slots hold is left as it is."""
    for start in range(0, count, STORE_BATCH):
        keys = client.keys(*(f"small-{index}-{i}" for i in range(start, start + STORE_BATCH)))
        client.client.begin_step()
        reserved = client.client.reserve(
            keys, run_lengths=[len(keys)], run_slot_bytes=[SMALL_BYTES]
        )
        assert reserved is not None
        client.client.commit(reserved.slab_id, list(reserved.places.values()))
        assert client.client.drain(5.0)


def _until_whole(it: Scene) -> int | None:
    """Milliseconds until the directory lists as many blocks of each node as it has. Stores go on
    meanwhile, so node and directory are asked at the same time.
    """
    world = it.world
    end_s = it.fault_s + 20.0
    while time.monotonic() < end_s:
        with suppress(RayError):
            asked = [world.directory().status.remote()]
            asked += [
                world.nodes.store(i).status.remote() for i in range(len(world.nodes.node_ids))
            ]
            listed, *stores = ray.get(asked, timeout=1.0)
            if all(
                abs(_entries(listed, store["node_id"]) - store["store"]["ready"]) <= IN_TRANSIT
                for store in stores
            ):
                return round((time.monotonic() - it.fault_s) * 1_000)
        time.sleep(0.02)
    return None


def _entries(listed: dict[str, Any], node_id: str) -> int:
    return int(listed["nodes"].get(node_id, {}).get("entries", 0))
