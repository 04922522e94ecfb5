"""What a worker does: copies between an engine's own memory and the slab, a piece at a time.

    store   pieces into slots that were granted; then the engine commits, if no piece failed
    load    pieces out of slots that were pinned, or are filled just now: each waits until its
            header says READY, which may be too late; then the headers are compared with what was
            told (rule 2 at home), and only if all fit the load counts

A worker may be a process of its own. It does not hear when its engine dies, and goes on.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kvray.core.ids import BlockKey, ClientId, Role, SlabId, SlotState
from tests.shells import Slot
from tests.sim.makers import content_of
from tests.sim.session import Client
from tests.sim.slabs import PIECES, WatchedSlab, Writing

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.world import World


SLOW_STEPS_US = (5_000, 30_000, 200_000, 600_000)
FEWEST_PIECES = 2  # that a step copies


def longest_load_us(block_count: int) -> int:
    """What the slowest worker needs, and to compare the headers."""
    return (block_count * PIECES // FEWEST_PIECES + 2) * SLOW_STEPS_US[-1]


class Done(Protocol):
    """How a copy has ended."""

    def __call__(self, *, ok: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a job, in the slab."""

    key: BlockKey
    place: Slot
    bytes: int


class Worker:
    """client: its own, or that of the engine whose process it lives in."""

    def __init__(self, world: "World", client: Client) -> None:
        self.client = client
        self.slow_until_us = 0
        self._world = world
        self._stores: list[_Store] = []
        self.is_dead = False

    @classmethod
    def of_its_own(
        cls, world: "World", machine: "Machine", client_id: ClientId, engine_nonce: int
    ) -> "Worker":
        client = Client(world, machine, client_id, role=Role.WORKER, engine_nonce=engine_nonce)
        return cls(world, client)

    @property
    def is_busy(self) -> bool:
        return bool(self._stores)

    def storing(self) -> list[BlockKey]:
        """The blocks of the first store that has not ended."""
        return [block.key for block in self._stores[0].blocks] if self._stores else []

    def store(
        self, slab_id: SlabId, blocks: list[Block], done: Done, *, is_slow: bool = False
    ) -> None:
        """done(ok): nobody writes into these any more."""
        slab = self._slab_for(slab_id)
        if slab is None:
            self._world.schedule.after(50, partial(done, ok=False))
            return
        self._stores.append(_Store(self, slab, blocks, done, is_slow=is_slow))

    def load(self, slab_id: SlabId, blocks: list[Block], done: Done, *, until_us: int) -> None:
        """done(ok): whether all of it is what was asked for, which is held to the bytes here.
        until_us: what is not there by then does not come.
        """
        slab = self._slab_for(slab_id)
        if slab is None:
            self._world.schedule.after(50, partial(done, ok=False))
            return
        _Load(self, slab, blocks, done, until_us)

    def _slab_for(self, slab_id: SlabId) -> WatchedSlab | None:
        slab = self.client.slab
        return slab if slab is not None and slab.slab_id == slab_id and not self.is_dead else None

    def delay_us(self, *, is_slow: bool) -> int:
        """Until the next pieces of a copy."""
        world = self._world
        if is_slow or world.schedule.now_us < self.slow_until_us:
            return world.random.choice(SLOW_STEPS_US)
        return world.random.randrange(30, 1_500)

    def die(self) -> None:
        """Its process ends, and with it what it was writing."""
        self.is_dead = True
        for store in self._stores:
            store.end()
        self._stores.clear()

    def store_ended(self, store: "_Store") -> None:
        self._stores.remove(store)
        store.end()

    @property
    def world(self) -> "World":
        return self._world


class _Store:
    def __init__(
        self,
        worker: Worker,
        slab: WatchedSlab,
        blocks: list[Block],
        done: Done,
        *,
        is_slow: bool,
    ) -> None:
        self._worker = worker
        self.blocks = blocks
        self._done = done
        self._writings = [
            Writing(slab, block.place[0], block.place[1], block.place[2], block.bytes)
            for block in blocks
        ]
        world = worker.world
        self._steps = [(n, piece) for n in range(len(blocks)) for piece in range(PIECES)]
        world.random.shuffle(self._steps)
        fails = world.hits("copy_failed", worker.client.name)
        self._fails_at = world.random.randrange(len(self._steps)) if fails else -1
        self._is_slow = is_slow or world.hits("copy_slow", worker.client.name, "store")
        self._pieces_a_step = world.random.choice((FEWEST_PIECES, 4, 8))
        world.schedule.after(worker.delay_us(is_slow=self._is_slow), self._step)

    def _step(self) -> None:
        worker = self._worker
        if worker.is_dead:
            return
        for _ in range(min(self._pieces_a_step, len(self._steps))):
            n, piece = self._steps.pop()
            block = self.blocks[n]
            piece_bytes = block.bytes // PIECES
            self._writings[n].put(
                piece, content_of(block.key, piece_bytes, self._worker.client.maker)
            )
        if self._steps and len(self._steps) > self._fails_at:
            worker.world.schedule.after(worker.delay_us(is_slow=self._is_slow), self._step)
            return
        worker.store_ended(self)
        worker.world.schedule.after(20, partial(self._done, ok=not self._steps))

    def end(self) -> None:
        for writing in self._writings:
            writing.end()
        self._writings = []


class _Load:
    def __init__(
        self, worker: Worker, slab: WatchedSlab, blocks: list[Block], done: Done, until_us: int
    ) -> None:
        self._until_us = until_us
        self._worker = worker
        self._slab = slab
        self._blocks = blocks
        self._done = done
        self._got = [bytearray(block.bytes) for block in blocks]
        self._steps = [(n, piece) for n in range(len(blocks)) for piece in range(PIECES)]
        self._is_slow = worker.world.hits("copy_slow", worker.client.name, "load")
        self._pieces_a_step = worker.world.random.choice((FEWEST_PIECES, 4, 8))
        worker.world.schedule.after(worker.delay_us(is_slow=self._is_slow), self._step)

    def _step(self) -> None:
        worker = self._worker
        if worker.is_dead:
            return
        if not self._steps:
            worker.world.schedule.after(20, partial(self._done, ok=self._compare()))
            return
        arrived = {n for n in {n for n, _ in self._steps} if self._keeps(self._blocks[n])}
        is_late = worker.world.schedule.now_us >= self._until_us
        if any(n not in arrived and (is_late or self._is_lost(n)) for n, _ in self._steps):
            worker.world.schedule.after(20, partial(self._done, ok=False))
            return
        for n, piece in [step for step in self._steps if step[0] in arrived][
            -self._pieces_a_step :
        ]:
            self._steps.remove((n, piece))
            block = self._blocks[n]
            size = block.bytes // PIECES
            self._got[n][piece * size : (piece + 1) * size] = self._slab.piece(
                block.place[2] + piece * size, size
            )
        worker.world.schedule.after(worker.delay_us(is_slow=self._is_slow), self._step)

    def _compare(self) -> bool:
        """Headers first; what they vouch for must have the bytes."""
        for block, got in zip(self._blocks, self._got, strict=True):
            if not self._keeps(block):
                return False
            own = content_of(block.key, block.bytes, self._worker.client.maker)
            assert got == own, "a load succeeds with other bytes"
        return True

    def _keeps(self, block: Block) -> bool:
        slot, generation, offset = block.place
        return self._slab.keeps(slot, generation, block.key, offset, block.bytes)

    def _is_lost(self, n: int) -> bool:
        """Whether this block never comes into the slot that was told."""
        slot, generation, _ = self._blocks[n].place
        return self._slab.rows[slot] != (SlotState.WRITING, generation)
