"""All faults end. What must be true then, of any seed.

faults stop ─▶ engines come to rest ─▶ orphans end ─▶ heartbeats pass
  ─▶ the directory is the union of all READY blocks, nothing has leaked
  ─▶ each engine can load what another node has
  ─▶ everything is let go of: empty
"""

from typing import TYPE_CHECKING

from kvray.core.ids import BlockKey, Generation, NodeId, SlotIndex, SlotState
from kvray.core.trust import TrustState
from tests.sim.engine import Engine, end_worker
from tests.sim.machine import Machine
from tests.sim.makers import SETTLED_US, are_alike, canary_of, is_audit
from tests.sim.process import NodeProcess
from tests.sim.profile import CLOGGED_MS, FETCH_LIMITS, SESSION_GRACE_MS
from tests.sim.requests import bytes_of

if TYPE_CHECKING:
    from tests.sim.world import World

_STEP_US = 200_000
_REST_US = 25_000_000  # in which everything must have come to rest
_CALM_US = 13_000_000  # > the longest avoidance of a peer (8 s), > a burial and a hello
_LOAD_MS = 1_500

_Entry = tuple[NodeId, BlockKey, SlotIndex, Generation]


def heal(world: "World") -> None:
    """To be called once, at the end of a run."""
    _stop_faults(world)
    _rest(world)
    for worker in list(world.orphans):
        end_worker(worker)
    world.run(_CALM_US)
    world.check()
    assert_nothing_leaked(world)
    assert_directory_is_right(world)
    if world.has_makers:
        _assert_makers_are_known(world)
    for engine in world.engines:
        _assert_loads_from_peers(world, engine)
    world.run(2_000_000)
    assert_nothing_leaked(world)
    assert_directory_is_right(world)
    _assert_empty_after_clear(world)


def _stop_faults(world: "World") -> None:
    world.note("world", "heals")
    world.faults.stop()
    world.profile.chances.update(dict.fromkeys(world.profile.chances, 0))
    world.network.heal()
    world.directory.start()
    for engine in world.engines:
        engine.is_stopping = True
        engine.worker.slow_until_us = 0
        engine.client.stays_away_until_us = 0
    for machine in world.machines.values():
        machine.start()
        process = machine.process
        assert process is not None
        process.crash_after = None
        process.thaw()
        for transfer in list(process.transfers.values()):
            if world.random.randrange(4):  # else it never ends
                transfer.heal()


def _rest(world: "World") -> None:
    """Until nobody has anything to say any more."""
    end_us = world.schedule.now_us + _REST_US
    while not all(_is_at_rest(engine) for engine in world.engines):
        assert world.schedule.now_us < end_us, "an engine does not come to rest"
        world.run(_STEP_US)
    # Sessions that nobody has come back to lapse, and a clogged node starts anew.
    world.run(1_000 * max(SESSION_GRACE_MS, CLOGGED_MS))


def _is_at_rest(engine: Engine) -> bool:
    return engine.is_quiet and engine.client.is_connected and engine.worker.client.is_connected


def _processes(world: "World") -> list[NodeProcess]:
    processes = [machine.process for machine in world.machines.values()]
    assert all(processes), "a node is down"
    return [process for process in processes if process is not None]


def assert_nothing_leaked(world: "World") -> None:
    """Every slot is READY and may go, or ABSENT; but for targets of reads that never end."""
    for process in _processes(world):
        never = {
            (writing.slot, writing.generation)
            for writings in process.watched_slab.writings.values()
            for writing in writings
        }
        assert all(transfer.stuck for transfer in process.transfers.values()), "a read is lost"
        for slot, (state, generation) in enumerate(process.watched_slab.rows):
            if state is SlotState.QUARANTINE:
                assert (slot, generation) in never, "a slot is in quarantine for ever"
            else:
                assert state is not SlotState.WRITING, "a slot is WRITING for ever"
        snapshot = process.core.snapshot()
        assert not process.promises.is_waited_for, "a client waits for ever"
        assert not process.watched_slab.pins, "an engine holds pins"
        assert snapshot["store"]["pins"] == 0, "a pin has leaked"
        assert snapshot["store"]["writing"] == 0
        assert snapshot["lookups"]["waiting"] == 0, "a lookup waits for ever"
        assert snapshot["fetch"]["blocks"] == {}, "a fetch has not ended"


def assert_directory_is_right(world: "World") -> None:
    """It equals the union of all READY blocks."""
    ready: set[_Entry] = {
        (process.core.info.node_id, place.key, place.slot, place.generation)
        for process in _processes(world)
        for place in process.store.entries()
    }
    keys = sorted({entry[1] for entry in ready} | world.keys)
    core = world.directory.core
    assert core is not None
    listed: set[_Entry] = {
        (location.node_id, block, location.slot, location.generation)
        for block, locations in zip(keys, core.where(keys), strict=True)
        for location in locations
    }
    entries = core.snapshot()["entries"]
    assert entries == len(listed), "the directory lists keys that nobody has asked for"
    assert not listed - ready, f"phantoms: {_names(listed - ready)}"
    assert not ready - listed, f"missing: {_names(ready - listed)}"


def _names(entries: set[_Entry]) -> list[str]:
    return sorted(f"{node_id} {block[-3:].hex()} {slot}.{g}" for node_id, block, slot, g in entries)


def _assert_makers_are_known(world: "World") -> None:
    """Those that compute alike trust each other, soon; the others do not."""
    for engine in world.engines:
        engine.begin(canary_of(engine.client.maker), deadline_ms=_LOAD_MS, fetch=True)
    end_us = world.schedule.now_us + SETTLED_US
    while (wrong := _wrong_opinions(world)) or not all(map(_is_at_rest, world.engines)):
        assert world.schedule.now_us < end_us, wrong or "an engine does not come to rest"
        world.run(_STEP_US)


def _wrong_opinions(world: "World") -> list[str]:
    """What engines think of each other's makers, and should not."""
    there = {engine.client.maker for engine in world.engines}
    wrong: list[str] = []
    for engine in world.engines:
        process, mine = engine.machine.process, engine.client.maker
        assert process is not None
        if process.transfers and not _has_slots(process, canary_of(mine)[0]):
            continue  # a read that never ends holds the extent that canaries would be in
        pairs = process.core.snapshot()["trust"]["pairs"]
        states = {(row["mine"], row["other"]): row["state"] for row in pairs}
        for other in there - {mine}:
            state = states.get((f"{mine:016x}", f"{other:016x}"))
            known = TrustState.EQUAL if are_alike(mine, other) else TrustState.DIFFERENT
            if state != known.value:
                wrong.append(f"{engine.name} thinks {state} of maker {other:016x}")
    return wrong


def _assert_loads_from_peers(world: "World", engine: Engine) -> None:
    """An engine gets a block that only another node has, from each that can be asked."""
    machine = engine.machine
    for peer in world.machines.values():
        process, peer_process = machine.process, peer.process
        assert process is not None
        assert peer_process is not None
        if peer is machine or _owes(process, peer):
            continue
        here = {place.key for place in process.store.entries()}
        mine = engine.client.maker
        there = sorted(
            place.key
            for place in peer_process.store.entries()
            if process.seen.may_load(mine, place.maker) and not is_audit(place.key)
        )
        wanted = [block for block in there if block not in here]
        if not wanted or not _has_slots(process, wanted[0]):
            continue
        # So that no other node's copy will do.
        sources = [
            m.name
            for m in world.machines.values()
            if m.process is not None and m.process.store.find(wanted[0]) is not None
        ]
        request = engine.begin(wanted[:1], deadline_ms=_LOAD_MS, fetch=True)
        end_us = world.schedule.now_us + 2_500_000
        while not request.ended:
            assert world.schedule.now_us < end_us, "a request does not end"
            world.run(50_000)
        assert request.loaded == 1, f"{engine.name} can not load from {sources}"


def _owes(process: NodeProcess, peer: Machine) -> bool:
    """Whether reads of this peer that never end keep it from being asked, or all together do."""
    unended = len(process.transfers)
    return unended > 0 and (
        unended >= FETCH_LIMITS.max_unended_reads
        or any(transfer.node_id == peer.node_id for transfer in process.transfers.values())
    )


def _has_slots(process: NodeProcess, block: BlockKey) -> bool:
    """Whether there is an extent that could take the block: few are there, and a class of another
    size may hold them for a while.
    """
    classes = process.core.snapshot()["store"]["classes"]
    return any(
        row["slot_bytes"] == bytes_of(block) and row["slots"] > row["busy"] for row in classes
    )


def _assert_empty_after_clear(world: "World") -> None:
    for process in _processes(world):
        process.event(process.core.clear)
        left = process.watched_slab.states()
        assert left.keys() <= {SlotState.QUARANTINE}, "a block can not be evicted"
