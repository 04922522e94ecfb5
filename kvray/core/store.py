"""StoreCore: which block is in which slot of one slab, and for whom.

    reserve ─▶ WRITING ─commit─▶ READY ─evict─▶ ABSENT         pin / unpin hold a READY block
                  ├─abandon─▶ ABSENT
                  └─quarantine, client_gone, restart─▶ QUARANTINE ─release─▶ ABSENT
                                                            └─restore_writing─▶ WRITING

Pure: what must be written to the slab comes out of `drain_effects`, what the directory should hear
out of `drain_changes`. A miss, a full store and a stale commit are values.

This file knows who pins and who reserves. Below it: core.slots (placing, state, effects),
core.extents (which extent serves which slot size), core.eviction (in which order blocks go),
core.changes (what the directory has not heard), core.adoption (what a restart may believe).
It does not know sessions, deadlines, fetches or who waits for a key.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, Final

from kvray.core.adoption import Table
from kvray.core.effects import Effect, MarkGeneration, Place, WriteExtent, WriteHeader
from kvray.core.eviction import Policy, Segmented
from kvray.core.ghosts import NODE_GHOSTS, Ghosts, Why, halves
from kvray.core.ids import UNKNOWN_MAKER, BlockKey, ClientId, Generation, Maker, Origin, SlotIndex
from kvray.core.layout import Geometry, aligned
from kvray.core.messages import Grant
from kvray.core.slots import (
    QUARANTINE,
    READY,
    WRITING,
    Block,
    Holder,
    Search,
    SlotTable,
)
from kvray.core.store_limits import StoreLimits

__all__ = [
    "NODE",
    "TRUST",
    "Effect",
    "Holder",
    "MarkGeneration",
    "Place",
    "StoreCore",
    "StoreLimits",
    "WriteExtent",
    "WriteHeader",
]

NODE: Final = "node"  # in a Holder: the NodeStore itself, which fetches
TRUST: Final = "trust"  # and which compares; see core.trust


class StoreCore:
    """The blocks of one slab. One thread calls it; no call takes time with the number of blocks,
    except adopt, clear, entries, snapshot, check and emptying an extent.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        generation_mark: int = 0,
        limits: StoreLimits | None = None,
        policy: Policy | None = None,
    ) -> None:
        """generation_mark: high_water of the last MarkGeneration written to this slab."""
        self._limits = limits or StoreLimits()
        self._extent_bytes = geometry.extent_bytes
        self._slots = SlotTable(
            geometry,
            generation_mark=generation_mark,
            policy=policy
            or Segmented(self._limits.probation_fraction, self._limits.reused_fraction),
            recut_rest_ms=self._limits.recut_rest_ms,
        )
        self._pins: dict[Holder, dict[Block, None]] = {}
        self._pin_count = 0
        self._reservations: dict[Holder, dict[SlotIndex, Block]] = {}
        self._reservation_count = 0
        self._quarantine: dict[SlotIndex, Block] = {}
        self._ghosts = Ghosts(NODE_GHOSTS)

    # -- restart ---------------------------------------------------------------------------------

    def adopt(self, extents: Table, headers: Table, *, now_ms: int) -> None:
        """Take over what an earlier epoch left in the slab; before any other call.

        extents: EXTENT_DTYPE, one per extent. headers: SLOT_HEADER_DTYPE, one per possible slot.
        READY blocks are kept (the older the generation, the colder), and are changes that the
        directory has to hear. Slots that somebody may still write into are quarantined; whatever
        else does not fit is ABSENT afterwards.
        """
        self._slots.adopt(extents, headers, now_ms=now_ms)
        self._quarantine = {
            slot: block for slot, block in self._slots.blocks.items() if block.state is QUARANTINE
        }

    def restore_writing(
        self, holder: Holder, slot: SlotIndex, generation: Generation, *, writer: int | None = None
    ) -> bool:
        """Give a quarantined slot back to the client that lists it as still its own.

        writer: the client's row; a slot of another row is refused. Also refused if its key has
        come back in another slot: the slot then stays in quarantine.
        """
        block = self._quarantine.get(slot)
        if block is None or block.place.generation != generation:
            return False
        if writer is not None and block.writer != writer:
            return False
        if block.place.key in self._slots.by_key:
            return False
        if self._reservation_count >= self._limits.max_reservations:
            return False
        del self._quarantine[slot]
        self._slots.set_writing(block, holder)
        self._reservations.setdefault(holder, {})[slot] = block
        self._reservation_count += 1
        return True

    # -- reading ---------------------------------------------------------------------------------

    def find(self, key: BlockKey) -> Place | None:
        """The READY block of this key; neither pinned nor touched."""
        block = self._slots.by_key.get(key)
        return block.place if block is not None and block.state is READY else None

    def is_writing(self, key: BlockKey) -> bool:
        """Whether somebody is about to commit this key."""
        block = self._slots.by_key.get(key)
        return block is not None and block.state is WRITING

    def occupant(self, slot: SlotIndex, generation: Generation) -> Place | None:
        """What is in this slot, in whatever state, if it is this generation."""
        block = self._slots.blocks.get(slot)
        return block.place if block is not None and block.place.generation == generation else None

    def pin(
        self,
        holder: Holder,
        keys: Sequence[BlockKey],
        *,
        slot_bytes: Sequence[int] | int | None,
        now_ms: int,
    ) -> list[Place | None]:
        """Pin those of the keys that are READY here.

        slot_bytes: the payload bytes that a block must have, one for all or one for each key; a
        block of another size is a miss. A holder pins a block once, however often it asks; a
        pinned block keeps its slot until `unpin`. Beyond max_pins a key is a miss.
        """
        held = self._pins.get(holder, {})
        before = len(held)
        room = self._limits.max_pins - self._pin_count + before
        by_key = self._slots.by_key
        new: list[Block] = []
        sizes: Iterable[int | None] = (
            repeat(slot_bytes) if slot_bytes is None or isinstance(slot_bytes, int) else slot_bytes
        )
        places: list[Place | None] = []
        for key, want_bytes in zip(keys, sizes, strict=False):
            block = by_key.get(key)
            if block is None or block.state is not READY:
                places.append(None)
                continue
            place = block.place
            if block not in held:
                if (want_bytes is not None and place.bytes != want_bytes) or len(held) >= room:
                    places.append(None)
                    continue
                held[block] = None
                new.append(block)
            places.append(place)
        assert len(places) == len(keys), "a size is missing"
        self._slots.pin(new, now_ms)
        if held:
            self._pins[holder] = held
            self._pin_count += len(held) - before
        return places

    def blocks_of(self, keys: Iterable[BlockKey]) -> list[Block | None]:
        """The block of each key, READY or WRITING; void after the next call. For `pin_blocks`, so
        that a long chain is gone through twice and no more.
        """
        return list(map(self._slots.by_key.get, keys))

    def pin_blocks(self, holder: Holder, blocks: Sequence[Block], now_ms: int) -> bool:
        """`pin`, all or nothing, of READY blocks for a holder that has pinned nothing yet. False
        beyond max_pins.
        """
        assert holder not in self._pins, "has pinned something"
        held = dict.fromkeys(blocks)
        if self._pin_count + len(held) > self._limits.max_pins:
            return False
        if held:
            self._slots.pin(held, now_ms)
            self._pins[holder] = held
            self._pin_count += len(held)
        return True

    def unpin(self, holder: Holder) -> None:
        """Drop all pins of this holder. May be repeated.

        The first pinned block, the head of a chain, becomes the hottest: without it the others are
        worth nothing.
        """
        held = self._pins.pop(holder, None)
        if held is None:
            return
        self._pin_count -= len(held)
        self._slots.unpin(reversed(held), is_hit=True)

    def touch(self, keys: Sequence[BlockKey], now_ms: int) -> None:
        """A chain whose last block was committed: head hottest."""
        for key in reversed(keys):
            block = self._slots.by_key.get(key)
            if block is not None and block.state is READY:
                self._slots.touch(block, now_ms)

    def read(self, keys: Sequence[BlockKey], now_ms: int) -> None:
        """Peers wanted these, of which this node is the home. A chain comes head first, and the
        head becomes the hottest.
        """
        for key in reversed(keys):
            block = self._slots.by_key.get(key)
            if block is not None and block.state is READY:
                self._slots.read(block, now_ms)

    def spare(self, keys: Iterable[BlockKey]) -> None:
        """Another node is the home of these: they may go before what only this node has."""
        for key in keys:
            block = self._slots.by_key.get(key)
            if block is not None and block.state is READY:
                self._slots.spare(block)

    def keep(self, key: BlockKey) -> bool:
        """A copy is no guest any more, since its original goes. False if it is not READY here."""
        block = self._slots.by_key.get(key)
        if block is None or block.state is not READY:
            return False
        self._slots.keep(block)
        return True

    # -- writing ---------------------------------------------------------------------------------

    def reserve(
        self,
        holder: Holder,
        wants: Sequence[tuple[BlockKey, int]],
        *,
        writer: int,
        origin: Origin,
        makers: Iterable[Maker] = repeat(UNKNOWN_MAKER),
        now_ms: int,
        evicts: bool = True,
    ) -> list[Grant | Place]:
        """Find a slot for each (key, payload bytes): a Place, or PRESENT, or FULL.

        Evicts as needed (unless told not to), but no block that is pinned, and none that this call
        answers PRESENT or has given out. A size that no slot can have is FULL. writer: who will
        write into the slots, as a row of the client table, or WRITER_NODE. makers: of each want.
        """
        slots, by_key = self._slots, self._slots.by_key
        shielded = slots.shield(wants, now_ms)
        mine = self._reservations.get(holder, {})
        before = len(mine)
        room = self._limits.max_reservations - self._reservation_count + before
        full: set[int] = set()  # sizes for which nothing is left; nothing comes back in this call
        search = Search(len(wants))
        class_bytes = last_bytes = 0
        answers: list[Grant | Place] = []
        for (key, want_bytes), maker in zip(wants, makers, strict=False):
            if key in by_key:
                answers.append(Grant.PRESENT)
                continue
            if want_bytes != last_bytes:
                last_bytes, class_bytes = want_bytes, aligned(want_bytes)
            if (
                not 0 < class_bytes <= self._extent_bytes
                or class_bytes in full
                or len(mine) >= room
            ):
                answers.append(Grant.FULL)
                continue
            found = slots.free_slot(class_bytes, search, now_ms, evicts=evicts)
            if found is None:
                full.add(class_bytes)
                answers.append(Grant.FULL)
                continue
            block = slots.occupy(
                key,
                want_bytes,
                found,
                origin=origin,
                maker=maker,
                writer=writer,
                holder=holder,
                now_ms=now_ms,
            )
            mine[block.place.slot] = block
            answers.append(block.place)
        if mine:
            self._reservations[holder] = mine
            self._reservation_count += len(mine) - before
        slots.unpin(reversed(shielded), is_hit=False)
        assert len(answers) == len(wants), "a want without a maker"
        return answers

    def commit(self, holder: Holder, slot: SlotIndex, generation: Generation, now_ms: int) -> bool:
        """The payload is whole: READY. False if the slot is not this holder's to commit (any
        more), so a commit may be repeated and may be late.
        """
        block = self._end_reservation(holder, slot, generation)
        if block is None:
            return False
        self._slots.set_ready(block, now_ms)
        return True

    def abandon(self, holder: Holder, slot: SlotIndex, generation: Generation) -> bool:
        """Nobody writes into the slot any more, and its content is worth nothing. False as in
        `commit`.
        """
        block = self._end_reservation(holder, slot, generation)
        if block is None:
            return False
        self._slots.vacate(block)
        return True

    def abandon_reservation(self, holder: Holder) -> list[Place]:
        """Abandon all that this holder still has in WRITING; these places. May be repeated."""
        places = [block.place for block in self._reservations.get(holder, {}).values()]
        for place in places:
            self.abandon(holder, place.slot, place.generation)
        return places

    def reservations_of(self, client: ClientId) -> dict[Holder, list[Place]]:
        """What this client has in WRITING, by operation."""
        return {
            holder: [block.place for block in blocks.values()]
            for holder, blocks in self._reservations.items()
            if holder[0] == client
        }

    # -- quarantine ------------------------------------------------------------------------------

    def quarantine(self, slot: SlotIndex, generation: Generation) -> bool:
        """A WRITING slot is given up, but its writer may still be at work. False if it is not
        WRITING with this generation (any more).
        """
        block = self._slots.blocks.get(slot)
        if block is None or block.holder is None:
            return False
        if self._end_reservation(block.holder, slot, generation) is None:
            return False
        self._slots.set_quarantine(block)
        self._quarantine[slot] = block
        return True

    def release(self, slot: SlotIndex, generation: Generation) -> bool:
        """The writer of a quarantined slot has surely ended. May be repeated."""
        block = self._quarantine.get(slot)
        if block is None or block.place.generation != generation:
            return False
        del self._quarantine[slot]
        self._slots.vacate(block)
        return True

    def quarantined_by(self, writer: int) -> list[tuple[SlotIndex, Generation]]:
        """The quarantined slots that this row of the client table may still write into."""
        return [
            (slot, block.place.generation)
            for slot, block in self._quarantine.items()
            if block.writer == writer
        ]

    def client_gone(self, client: ClientId) -> list[Place]:
        """The client's connection is gone, its processes perhaps not: drop its pins, quarantine
        its WRITING slots and name them.
        """
        for holder in [holder for holder in self._pins if holder[0] == client]:
            self.unpin(holder)
        places = [place for held in self.reservations_of(client).values() for place in held]
        for place in places:
            self.quarantine(place.slot, place.generation)
        return places

    # -- eviction --------------------------------------------------------------------------------

    def evict(self, key: BlockKey) -> bool:
        """Evict this block if it is READY and nobody has pinned it."""
        block = self._slots.by_key.get(key)
        if block is None or block.state is not READY or block.pins:
            return False
        self._slots.evict(block)
        return True

    def clear(self) -> int:
        """Evict every block that is READY and not pinned; how many."""
        return sum(self.evict(place.key) for place in list(self.entries()))

    def unoccupied(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) between these offsets of the slab where nothing is, nor is being written:
        what was there is void, and may be overwritten before the next event.
        """
        return self._slots.extents.unoccupied(begin, end)

    # -- what comes out --------------------------------------------------------------------------

    def drain_effects(self) -> list[Effect]:
        """What the slab must be told, in this order, before any answer leaves."""
        return self._slots.drain_effects()

    def drain_changes(self, max_changes: int) -> tuple[list[Place], list[BlockKey]]:
        """What the directory has not heard, at most so many: blocks added, keys removed."""
        adds, removes = self._slots.changes.drain(max_changes)
        if removes:
            self._ghosts.note(*halves(b"".join(removes)), Why.EVICTED)
        return adds, removes

    def was_evicted(self, key: BlockKey) -> bool:
        """Whether it was READY here not long ago, as far as anybody remembers."""
        return self._slots.changes.is_remove(key) or bool(self._ghosts.why(*halves(key))[0])

    def take_doubtful(self, max_keys: int) -> list[BlockKey]:
        """Blocks that go soon, if something had to go since the last call: of which it matters
        whether another node has them. At most so many.
        """
        return self._slots.take_doubtful(max_keys)

    def forget_changes(self) -> None:
        """The directory will ask for everything that is READY."""
        self._slots.changes.forget()

    def begin_listing(self) -> list[Block]:
        """All blocks, for `list_ready` to tell of bit by bit; changes are counted from now on.

        10 ms for a million, which is why nothing is asked of them yet.
        """
        self.forget_changes()
        return list(self._slots.blocks.values())

    def list_ready(self, blocks: Iterable[Block]) -> list[Place]:
        """Those of `begin_listing` that are READY, and have been since: what has become READY later
        is a change, and has to stay one, or a remove would cancel it without a word.
        """
        current, is_add = self._slots.blocks, self._slots.changes.is_add
        return [
            block.place
            for block in blocks
            if block.state is READY
            and current.get(block.place.slot) is block
            and not is_add(block.place.key)
        ]

    def entries(self) -> Iterator[Place]:
        """All READY blocks. Void after the next call; make a list of it."""
        return (b.place for b in self._slots.blocks.values() if b.state is READY)

    def snapshot(self) -> dict[str, Any]:
        """Plain data, for people."""
        return self._slots.snapshot() | {
            "ready": len(self._slots.by_key) - self._reservation_count,
            "writing": self._reservation_count,
            "quarantined": len(self._quarantine),
            "pinned": len({block.place.slot for held in self._pins.values() for block in held}),
            "pins": self._pin_count,
        }

    # -- private ---------------------------------------------------------------------------------

    def _end_reservation(
        self, holder: Holder, slot: SlotIndex, generation: Generation
    ) -> Block | None:
        """The WRITING block in this slot, now nobody's; None if it is not the holder's."""
        mine = self._reservations.get(holder)
        block = mine.get(slot) if mine is not None else None
        if mine is None or block is None or block.place.generation != generation:
            return None
        del mine[slot]
        if not mine:
            del self._reservations[holder]
        self._reservation_count -= 1
        return block

    def check(self) -> None:
        """Assert every invariant, from blocks to holders and back."""
        self._slots.check()
        blocks = self._slots.blocks
        pins: dict[SlotIndex, int] = {}
        for held in self._pins.values():
            assert held, "a holder of nothing"
            for block in held:
                slot = block.place.slot
                assert blocks.get(slot) is block, "pinned, but gone"
                pins[slot] = pins.get(slot, 0) + 1
        writing: dict[SlotIndex, Holder] = {}
        for holder, mine in self._reservations.items():
            assert mine, "a holder of nothing"
            for slot, block in mine.items():
                assert blocks.get(slot) is block, "reserved, but gone"
                assert slot not in writing, "reserved twice"
                writing[slot] = holder
        for slot, block in blocks.items():
            assert block.pins == pins.get(slot, 0), "a pin has leaked"
            assert block.holder == writing.get(slot), "WRITING and reserved differ"
            assert (slot in self._quarantine) == (block.state is QUARANTINE)
        assert all(blocks.get(slot) is block for slot, block in self._quarantine.items())
        assert sum(pins.values()) == self._pin_count <= self._limits.max_pins
        assert len(writing) == self._reservation_count <= self._limits.max_reservations
