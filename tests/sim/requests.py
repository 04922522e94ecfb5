"""One request of an engine on its way.

lookup ─▶ (waits) ─▶ load of what is a HIT, or COMING behind one ─▶ unpin
                  └▶ reserve what is missing ─▶ store ─▶ commit or abandon
"""

from functools import partial
from typing import TYPE_CHECKING

from kvray.core.codec import pack_keys, unpack_slots
from kvray.core.ids import BlockKey, ClientId, OpId, SlabId
from kvray.core.messages import (
    Grant,
    KeyState,
    Lookup,
    LookupReply,
    LookupUpdate,
    Reserve,
    ReserveReply,
)
from tests.shells import BLOCK_BYTES, Slot, key
from tests.sim.copies import Block, longest_load_us
from tests.sim.makers import is_canary, note_audits

if TYPE_CHECKING:
    from tests.sim.engine import Engine

# What the engine says that one block takes it: mostly nothing yet, or so little that no fetch pays.
COMPUTE_US = (0, 0, 0, 20_000, 50)
OVERDUE_US = 800_000  # beyond the deadline, by a clock that is not the NodeStore's
STEP_US = 100_000  # of a scheduler, and a slow one


def bytes_of(block: BlockKey) -> int:
    """The size of a block."""
    return BLOCK_BYTES * (1 if is_canary(block) else 1 + block[14] % 4 // 3)


def chain(number: int, length: int) -> list[BlockKey]:
    """The first blocks of a prompt. Chains in threes share their head."""
    head = [key((number // 3 * 3 + 1) * 256 + i) for i in range(min(2, length))]
    return head + [key((number + 1) * 256 + i) for i in range(2, length)]


class Request:
    """One prompt on its way."""

    def __init__(self, engine: "Engine", keys: list[BlockKey]) -> None:
        self.engine = engine
        self.keys = keys
        self.is_slow = False
        self.loaded = 0  # blocks, by a load that has succeeded
        self._has_other_sizes = False  # than its blocks have: all of it is a miss
        self._held_until_us: int | None = None  # the limit of a wait, for an answer or for a load
        self.ended = False
        client = engine.client
        assert client.slab is not None
        self.slab_id: SlabId = client.slab.slab_id
        self._op = OpId(0)
        self._states = bytearray()
        self._places: dict[int, Slot] = {}
        self._went_on = False
        self._deadline_us = 0
        self._loads_early = False

    # -- lookup ----------------------------------------------------------------------------------

    def ask(self, *, deadline_ms: int, fetch: bool) -> None:
        client, world = self.engine.client, self.engine.world
        self._op = client.op()
        self._deadline_us = world.schedule.now_us + deadline_ms * 1_000
        self._loads_early = world.random.randrange(3) > 0
        # At the end of a run every fetch is worth it: it is looked whether they come about.
        is_over = self.engine.is_stopping
        compute_us = 0 if is_over else COMPUTE_US[self._op % len(COMPUTE_US)]
        self._has_other_sizes = world.hits("other_size", self.engine.name)
        if self._has_other_sizes:  # of what is just coming, too: it is a miss when it has come
            self.keys = self.engine.machine.being_stored() or self.keys
        runs = _runs(self.keys)
        message = Lookup(
            self._op,
            pack_keys(self.keys),
            [len(run) for run in runs],
            [True] * len(runs),
            [self._bytes_of(run[0]) for run in runs],
            deadline_ms,
            fetch=fetch,
            key_compute_us=compute_us,
            may_audit=True,
        )
        if not self.engine.lookup(self, message):
            self.end()
            return
        world.schedule.after(OVERDUE_US + deadline_ms * 1_000, self._overdue)
        self._held_until_us = self._deadline_us + OVERDUE_US + 2 * STEP_US
        if world.hits("gave_up_early", self.engine.name):
            world.schedule.after(world.random.randrange(1, 200_000), self._give_up)

    def hear(self, answer: LookupReply | LookupUpdate) -> None:
        if isinstance(answer, LookupReply):
            assert len(answer.states) == len(self.keys)
            self._states = bytearray(answer.states)
            indices = list(range(len(self.keys)))
        else:
            indices = answer.indices
            for i, state in zip(indices, answer.states, strict=True):
                assert self._states[i] in (KeyState.WAIT, KeyState.COMING), "settled twice"
                self._states[i] = state
        places = iter(unpack_slots(answer.slots))
        for i, state in zip(indices, answer.states, strict=True):
            if state in (KeyState.HIT, KeyState.COMING):
                self._places[i] = next(places)
        if self._may_load():
            self._go_on()

    def _may_load(self) -> bool:
        """All that comes is there; or its head is, and where the rest will be is known."""
        if KeyState.WAIT in self._states:
            return False
        if KeyState.COMING not in self._states:
            return True
        return self._loads_early and self._states[0] == KeyState.HIT

    def lose(self) -> None:
        """The session is gone: what is waited for does not come."""
        self._states = bytearray(self._states.translate(_SETTLED))
        self._go_on()

    def _overdue(self) -> None:
        """The deadline is the engine's own, too: a NodeStore may be frozen."""
        if not self._went_on and not self.ended and not self.engine.is_dead:
            self.engine.world.count("answer_overdue")
            self.lose()

    def _give_up(self) -> None:
        """The user has gone away while it waits."""
        if not self._went_on and not self.ended and not self.engine.is_dead:
            self._went_on = True
            self._unpin()
            self.end()

    def _go_on(self) -> None:
        """Load what is there, and what is coming."""
        if self._went_on:
            return
        self._went_on = True
        self._held_until_us = None
        hits = 0
        while hits < len(self._states) and self._states[hits] in (KeyState.HIT, KeyState.COMING):
            hits += 1
        if KeyState.COMING not in self._states[:hits]:
            self.engine.forget(self._op)
        else:
            self.engine.world.count("early_load")
        if not hits:
            self._loaded([], ok=True)
            return
        blocks = [
            Block(k, self._places[i], self._bytes_of(k)) for i, k in enumerate(self.keys[:hits])
        ]
        node = self.engine.client.node
        now_us = self.engine.world.schedule.now_us
        begins_us = max(now_us, self._deadline_us)  # by then all that comes has come
        self._held_until_us = begins_us + longest_load_us(hits) + 2 * STEP_US
        self.engine.worker.load(
            self.slab_id,
            blocks,
            partial(self._loaded, blocks, node=node),
            until_us=self._deadline_us,
        )

    def _loaded(self, blocks: list[Block], *, ok: bool, node: object = None) -> None:
        self._held_until_us = None
        count = len(blocks)
        engine = self.engine
        if engine.is_dead:
            return
        if count and ok:
            engine.world.loaded(engine.name, self.keys[:count])
            self.loaded = count
        elif count:
            engine.world.count("load_failed")
            process = engine.machine.process
            is_same = process is not None and process is node and engine.client.node is node
            held = is_same and process is not None and process.promises.holds(self._waiter)
            has_slab = engine.worker.client.slab is engine.client.slab
            is_pinned = all(
                self._states[i] == KeyState.HIT and self._places[i] == block.place
                for i, block in enumerate(blocks)
            )
            is_late = engine.world.schedule.now_us >= self._deadline_us
            must = held and has_slab and is_pinned and not is_late
            assert not must, "a load of pinned blocks has failed"
        self._unpin()
        missing = self.keys[count if ok else 0 :]
        if missing and ok and not self._has_other_sizes:
            self.reserve(missing)
        else:
            self.end()

    def _bytes_of(self, block: BlockKey) -> int:
        """What it asks for."""
        return 3 * BLOCK_BYTES - bytes_of(block) if self._has_other_sizes else bytes_of(block)

    @property
    def _waiter(self) -> tuple[ClientId, OpId]:
        return (self.engine.client.client_id, self._op)

    def _unpin(self) -> None:
        self.engine.forget(self._op)
        self.engine.client.unpin(self._op)

    # -- store -----------------------------------------------------------------------------------

    def reserve(self, keys: list[BlockKey]) -> None:
        client = self.engine.client
        if client.slab is None or client.slab.slab_id != self.slab_id:
            self.end()
            return
        self.keys = keys
        note_audits(keys)
        runs = _runs(keys)
        op = client.op()
        message = Reserve(
            op, pack_keys(keys), [len(run) for run in runs], [bytes_of(run[0]) for run in runs]
        )
        if not self.engine.reserve(self, message):
            self.end()

    def granted(self, reply: ReserveReply) -> None:
        engine, client = self.engine, self.engine.client
        assert client.slab is not None
        self.slab_id = client.slab.slab_id
        if Grant.FULL in reply.grants:
            engine.world.count("store_full")
        places = unpack_slots(reply.slots)
        granted = [k for k, g in zip(self.keys, reply.grants, strict=True) if g == Grant.GRANTED]
        blocks = [Block(k, p, bytes_of(k)) for k, p in zip(granted, places, strict=True)]
        for slot, generation, offset in places:
            client.writing[self.slab_id, slot, generation] = (slot, generation, offset)
        if not blocks:
            self.end()
            return
        engine.worker.store(
            self.slab_id,
            blocks,
            partial(self._stored, blocks),
            is_slow=self.is_slow,
        )

    def _stored(self, blocks: list[Block], *, ok: bool) -> None:
        if self.engine.is_dead:
            return
        client = self.engine.client
        places = [block.place for block in blocks]
        if ok:
            client.commit(self.slab_id, places)
        else:
            client.abandon(self.slab_id, places)
        self.end()

    def check(self) -> None:
        """After any fault it is computed, or ends, within its deadline and two steps; a load that
        has begun then has the time that the slowest worker needs for its bytes.
        """
        limit_us = self._held_until_us
        now_us = self.engine.world.schedule.now_us
        assert limit_us is None or now_us <= limit_us, "a request is held for ever"

    def end(self) -> None:
        self._held_until_us = None
        if not self.ended:
            self.ended = True
            if self in self.engine.requests:
                self.engine.requests.remove(self)


# What is waited for does not come.
_SETTLED = bytes.maketrans(
    bytes([KeyState.WAIT, KeyState.COMING]), bytes([KeyState.MISS, KeyState.MISS])
)


def _runs(keys: list[BlockKey]) -> list[list[BlockKey]]:
    """Neighbours of one size."""
    runs: list[list[BlockKey]] = []
    for block in keys:
        if not runs or bytes_of(runs[-1][0]) != bytes_of(block):
            runs.append([])
        runs[-1].append(block)
    return runs
