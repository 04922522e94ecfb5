"""The slots of one slab and the blocks in them: placing, state, eviction, effects.

    occupy ─▶ WRITING ─set READY─▶ READY ─evict─▶ ABSENT        hold / free: READY, not evictable
                 ├─set QUARANTINE─▶ QUARANTINE ─set WRITING─▶ WRITING
                 └─vacate, from WRITING or QUARANTINE─▶ ABSENT

The lower half of core.store: what a slot may become, not who may make it so. Where a free slot
comes from is core.extents' rule, which block goes first is core.eviction's order.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import msgspec

from kvray.core.adoption import Kept, Table, believe
from kvray.core.changes import Changes
from kvray.core.codec import pack_slot
from kvray.core.effects import Effect, MarkGeneration, Place, WriteExtent, WriteHeader
from kvray.core.eviction import Policy
from kvray.core.extents import Extent, Extents, SizeClass
from kvray.core.ids import (
    BlockKey,
    ClientId,
    Generation,
    Maker,
    OpId,
    Origin,
    SlotIndex,
    SlotState,
)
from kvray.core.layout import Geometry
from kvray.core.store_limits import EXTENT_SCAN, GENERATION_BATCH
from kvray.core.trusted import mark_of

# Who pins or reserves: one operation of a client, or of this node itself.
Holder = tuple[ClientId | Literal["node", "trust"], OpId]

# Bound once: they are compared for every key.
ABSENT, WRITING = SlotState.ABSENT, SlotState.WRITING
READY, QUARANTINE = SlotState.READY, SlotState.QUARANTINE


class Block(msgspec.Struct, eq=False, gc=False):
    """One occupied slot. A struct for its price: 55 ns to make."""

    place: Place
    row: bytes  # SLOT_DTYPE row of the place: a reply is nothing but these, one after another
    state: SlotState  # never ABSENT
    extent: Extent
    writer: int  # row of the client table, or layout.WRITER_NODE
    holder: Holder | None  # of a WRITING slot
    used_ms: int
    mark: int = 0  # trusted.mark_of once it is READY: one comparison tells a hit of a key
    pins: int = 0  # who keeps a READY block from eviction, counted
    is_held: bool = False  # a pinned one that the search for the coldest has met; see `pin`


class Search:
    """What one call has found out about room. Void as soon as anything is unpinned or committed,
    so it lives for one reserve: within it blocks only leave the order of eviction.
    """

    __slots__ = ("coldest", "settled", "slot_count")

    def __init__(self, slot_count: int) -> None:
        self.slot_count = slot_count  # how many slots are wanted at most
        self.settled: set[int] = set()  # sizes to which no other class gives an extent
        self.coldest: dict[int, list[SlotIndex]] = {}  # by size; the first to go is the last


class SlotTable:
    """Every slot of a slab. `blocks` holds those that are not ABSENT, `by_key` the READY and
    WRITING ones of them: a key is in at most one slot of these two states.
    """

    def __init__(
        self, geometry: Geometry, *, generation_mark: int, policy: Policy, recut_rest_ms: int
    ) -> None:
        self.blocks: dict[SlotIndex, Block] = {}
        self.by_key: dict[BlockKey, Block] = {}
        self.changes = Changes()
        self.evicted_count = 0
        self.recut_count = 0
        self._geometry = geometry
        self._policy = policy
        self.extents = Extents(geometry, recut_rest_ms=recut_rest_ms)
        self._next_generation = max(1, generation_mark)
        self._generation_mark = generation_mark
        self._effects: list[Effect] = []
        self._short_of_bytes = 0  # the slot size that has evicted since take_doubtful; 0: none

    def adopt(self, extents: Table, headers: Table, *, now_ms: int) -> None:
        """See StoreCore.adopt."""
        assert not self.blocks, "adopt comes first"
        assert not self._effects, "adopt comes first"
        belief = believe(self._geometry, extents, headers, generation_mark=self._generation_mark)
        for cut in belief.cuts:
            self.extents.adopt(cut, now_ms=now_ms)
        for slot in belief.garbage:
            self._effects.append(_blank_header(slot))
        for double in belief.doubles:
            self._write_header(self._adopted(double, now_ms), ABSENT)
        for kept in belief.kept:
            block = self._adopted(kept, now_ms)
            self.blocks[kept.place.slot] = block
            if kept.state is READY:
                block.mark = mark_of(kept.place.bytes, kept.place.maker)
                self.by_key[kept.place.key] = block
                self._policy.admit(block.extent.slot_bytes, kept.place.slot, kept.place.origin)
                self.changes.add(kept.place)
                continue
            block.extent.busy += 1
            if kept.state is WRITING:
                block.state = QUARANTINE
                self._write_header(block, QUARANTINE)

    # -- the life of a slot ----------------------------------------------------------------------

    def occupy(
        self,
        key: BlockKey,
        payload_bytes: int,
        found: tuple[Extent, SlotIndex],
        *,
        origin: Origin,
        maker: Maker,
        writer: int,
        holder: Holder,
        now_ms: int,
    ) -> Block:
        """WRITING: give the slot that `free_slot` has found its next generation."""
        extent, slot = found
        generation = self._new_generation()
        place = Place(slot, generation, extent.offset_of(slot), payload_bytes, key, origin, maker)
        row = pack_slot(slot, generation, place.offset)
        block = Block(place, row, WRITING, extent, writer, holder, now_ms)
        extent.busy += 1
        self.blocks[slot] = self.by_key[key] = block
        self._write_header(block, WRITING)
        return block

    def set_ready(self, block: Block, now_ms: int) -> None:
        """WRITING has come to a good end."""
        block.state = READY
        block.holder = None
        extent, place = block.extent, block.place
        block.used_ms = extent.size_class.used_ms = now_ms
        block.mark = mark_of(place.bytes, place.maker)
        extent.busy -= 1
        self._policy.admit(extent.slot_bytes, place.slot, place.origin)
        self.changes.add(place)
        self._write_header(block, READY)

    def set_quarantine(self, block: Block) -> None:
        """WRITING, but nobody waits for its end any more."""
        del self.by_key[block.place.key]
        block.state = QUARANTINE
        block.holder = None
        self._write_header(block, QUARANTINE)

    def set_writing(self, block: Block, holder: Holder) -> None:
        """QUARANTINE, and its writer has come back. Its key must be nowhere else."""
        assert block.place.key not in self.by_key
        self.by_key[block.place.key] = block
        block.state = WRITING
        block.holder = holder
        self._write_header(block, WRITING)

    def vacate(self, block: Block) -> None:
        """ABSENT, from WRITING or QUARANTINE: nobody writes into the slot any more. Here as in
        `evict`, generation, key, offset and bytes stay in the header; see core.effects.
        """
        if block.state is WRITING:
            del self.by_key[block.place.key]
        block.extent.busy -= 1
        del self.blocks[block.place.slot]
        self._write_header(block, ABSENT)
        self.extents.give_back(block.extent, block.place.slot)

    def evict(self, block: Block) -> None:
        """ABSENT, from READY without pins."""
        self._displace(block)
        self.extents.give_back(block.extent, block.place.slot)

    # -- the use of a block ----------------------------------------------------------------------

    def pin(self, blocks: Iterable[Block], now_ms: int) -> None:
        """One more that keeps each of these READY blocks from eviction; also a use of it.

        The order of eviction hears nothing of it yet: a reader waits for the end of this loop. A
        pinned block stays where it is in the order until the search for the coldest meets it, which
        takes it out then: so that is paid once a pin at most, and mostly never.
        """
        last = None
        for block in blocks:
            extent = block.extent
            if not block.pins:
                extent.busy += 1
            block.pins += 1
            block.used_ms = now_ms
            if extent is not last:  # neighbours in a chain mostly are in an extent
                extent.size_class.used_ms = now_ms
                last = extent

    def unpin(self, blocks: Iterable[Block], *, is_hit: bool) -> None:
        """One fewer, for each. The last one becomes the hottest. is_hit: it was a local reader that
        had pinned them.
        """
        policy = self._policy
        use = policy.hit if is_hit else policy.touch
        for block in blocks:
            extent = block.extent
            block.pins = pins = block.pins - 1
            if not pins:
                extent.busy -= 1
                if block.is_held:
                    block.is_held = False
                    policy.free(extent.slot_bytes, block.place.slot)
            use(extent.slot_bytes, block.place.slot)

    def shield(self, wants: Iterable[tuple[BlockKey, int]], now_ms: int) -> list[Block]:
        """Pin the READY ones of these until the caller unpins them."""
        by_key = self.by_key
        shielded = [
            block
            for key, _ in wants
            if (block := by_key.get(key)) is not None and block.state is READY
        ]
        self.pin(shielded, now_ms)
        return shielded

    def keep(self, block: Block) -> None:
        """Its original goes, wherever it was."""
        self._policy.keep(block.extent.slot_bytes, block.place.slot)

    def read(self, block: Block, now_ms: int) -> None:
        """A peer wanted the block."""
        self._policy.read(block.extent.slot_bytes, block.place.slot)
        block.used_ms = block.extent.size_class.used_ms = now_ms

    def spare(self, block: Block) -> None:
        """Another node is its home."""
        self._policy.spare(block.extent.slot_bytes, block.place.slot)

    def touch(self, block: Block, now_ms: int) -> None:
        """Used without a pin."""
        self._policy.touch(block.extent.slot_bytes, block.place.slot)
        block.used_ms = block.extent.size_class.used_ms = now_ms

    # -- room ------------------------------------------------------------------------------------

    def free_slot(
        self, class_bytes: int, search: Search, now_ms: int, *, evicts: bool
    ) -> tuple[Extent, SlotIndex] | None:
        """Make a slot of this size free for `occupy`, which must follow: a free one, of a spare
        extent, and if it evicts, of another class's extent, or the coldest block's. core.extents
        has the rule.
        """
        extents = self.extents
        size_class = extents.class_of(class_bytes)
        if size_class is not None:
            size_class.used_ms = now_ms
            if size_class.open:
                return extents.take(size_class)
        extent = extents.spare() if extents.spares else None
        if extent is None and evicts and class_bytes not in search.settled:
            extent = self._emptied_extent(class_bytes, size_class, search, now_ms)
        if extent is not None:
            return extents.take(self._cut(extent, class_bytes, now_ms))
        if not evicts:
            return None
        search.settled.add(class_bytes)
        coldest = self._coldest(size_class, search)
        if coldest is None:
            return None
        self._displace(coldest)
        return coldest.extent, coldest.place.slot

    # -- what comes out --------------------------------------------------------------------------

    def drain_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def take_doubtful(self, max_keys: int) -> list[BlockKey]:
        """Of the size that has evicted last; see StoreCore.take_doubtful."""
        slot_bytes, self._short_of_bytes = self._short_of_bytes, 0
        slots = islice(self._policy.doubtful(slot_bytes), max_keys) if slot_bytes else ()
        coldest = [self.blocks[slot] for slot in slots]
        return [block.place.key for block in coldest if not block.pins]

    def snapshot(self) -> dict[str, Any]:
        return {
            "evicted": self.evicted_count,
            "recut": self.recut_count,
            "next_generation": self._next_generation,
            "unannounced": len(self.changes),
            "policy": self._policy.snapshot(),
            "classes": self.extents.snapshot(),
        }

    # -- private ---------------------------------------------------------------------------------

    def _coldest(self, size_class: SizeClass | None, search: Search) -> Block | None:
        """What this size would evict next of its own."""
        if size_class is None:
            return None
        while True:
            slots = search.coldest.get(size_class.slot_bytes)
            if not slots:
                order = self._policy.coldest(
                    size_class.slot_bytes, slot_count=size_class.slot_count
                )
                slots = list(islice(order, search.slot_count))
                if not slots:
                    return None
                slots.reverse()
                search.coldest[size_class.slot_bytes] = slots
            while slots:
                # Blocks of the list may have gone meanwhile, with an extent or one by one.
                block = self.blocks.get(slots[-1])
                if block is not None and block.state is READY:
                    if not block.pins:
                        return block
                    self._hold(block)
                slots.pop()

    def _emptied_extent(
        self, class_bytes: int, size_class: SizeClass | None, search: Search, now_ms: int
    ) -> Extent | None:
        """Evict all blocks of an extent of another class, if the rule allows it."""
        coldest = self._coldest(size_class, search)
        victims = self.extents.victims(
            class_bytes, coldest_used_ms=coldest.used_ms if coldest else None, now_ms=now_ms
        )
        for victim in victims:
            extent = self._coldest_extent(victim)
            if extent is not None:
                for slot in map(SlotIndex, extent.used_slots()):
                    if slot in self.blocks:
                        self.evict(self.blocks[slot])
                return extent
        return None

    def _coldest_extent(self, victim: SizeClass) -> Extent | None:
        """Of the extents that can be emptied, the one that loses the fewest blocks other than the
        EXTENT_SCAN coldest of the class.
        """
        coldest = self._policy.coldest(victim.slot_bytes, slot_count=victim.slot_count)
        warm_counts: dict[Extent, int] = {}
        pinned = []
        for slot in islice(coldest, EXTENT_SCAN):
            block = self.blocks[slot]
            extent = block.extent
            if block.pins:
                pinned.append(block)
            if not extent.busy:
                warm_counts[extent] = warm_counts.get(extent, extent.occupied) - 1
        for block in pinned:
            self._hold(block)
        return min(warm_counts, key=warm_counts.__getitem__, default=None)

    def _hold(self, block: Block) -> None:
        """Out of the order of eviction until its last unpin: nobody has to step over it again."""
        if not block.is_held:
            block.is_held = True
            self._policy.hold(block.extent.slot_bytes, block.place.slot)

    def _cut(self, extent: Extent, class_bytes: int, now_ms: int) -> SizeClass:
        generation = self._new_generation()
        self.recut_count += 1
        self._effects.append(WriteExtent(extent.index, generation, class_bytes))
        return self.extents.cut(extent, class_bytes, generation=generation, now_ms=now_ms)

    def _new_generation(self) -> Generation:
        """Of a block or an extent: one counter. The mark is written before its first use."""
        generation = self._next_generation
        self._next_generation += 1
        if generation >= self._generation_mark:
            self._generation_mark = generation + GENERATION_BATCH
            self._effects.append(MarkGeneration(self._generation_mark))
        return Generation(generation)

    def _adopted(self, kept: Kept, now_ms: int) -> Block:
        place = kept.place
        extent = self.extents.extent_of(place.slot)
        row = pack_slot(place.slot, place.generation, place.offset)
        return Block(place, row, kept.state, extent, kept.writer, None, now_ms)

    def _displace(self, block: Block) -> None:
        """Write a block without pins off, and leave its slot to the caller."""
        place = block.place
        assert block.state is READY, place
        assert not block.pins, place
        self._short_of_bytes = block.extent.slot_bytes
        del self.by_key[place.key]
        del self.blocks[place.slot]
        self._policy.forget(block.extent.slot_bytes, place.slot)
        self.changes.remove(place.key)
        self.evicted_count += 1
        self._write_header(block, ABSENT)

    def _write_header(self, block: Block, state: SlotState) -> None:
        place = block.place
        self._effects.append(
            WriteHeader(
                place.slot,
                place.generation,
                place.key,
                place.offset,
                place.bytes,
                state,
                place.origin,
                block.writer,
                block.extent.generation,
                place.maker,
            )
        )

    def check(self) -> None:
        """Assert every relation between slots, keys, extents, order and changes, both ways."""
        self.extents.check()
        occupied: dict[Extent, int] = {}
        busy: dict[Extent, int] = {}
        ordered: dict[int, set[SlotIndex]] = {}  # by slot size; with pinned ones that no search met
        ready: dict[SlotIndex, BlockKey] = {}
        for slot, block in self.blocks.items():
            place, extent = block.place, block.extent
            assert place.slot == slot
            assert self.extents.extent_of(slot) is extent
            assert slot in extent.used_slots(), "occupied, but not given out"
            assert place.offset == extent.offset_of(slot)
            assert 0 < place.bytes <= extent.slot_bytes
            assert extent.generation < place.generation < self._next_generation
            is_named = self.by_key.get(place.key) is block
            assert is_named == (block.state in {READY, WRITING}), "its key does not lead to it"
            assert block.pins == 0 or block.state is READY, "pinned, but not READY"
            assert block.pins or not block.is_held, "held for nobody"
            mark = mark_of(place.bytes, place.maker)
            assert block.mark == (mark if block.state is READY else 0)
            assert block.row == pack_slot(slot, place.generation, place.offset)
            assert (block.holder is not None) == (block.state is WRITING), "held or not WRITING"
            occupied[extent] = occupied.get(extent, 0) + 1
            if block.state is READY:
                ready[slot] = place.key
            if block.state is READY and not block.is_held:
                ordered.setdefault(extent.slot_bytes, set()).add(slot)
            if block.state is not READY or block.pins:
                busy[extent] = busy.get(extent, 0) + 1
        for key, block in self.by_key.items():
            assert self.blocks.get(block.place.slot) is block, "a key leads to no block"
            assert block.place.key == key
        for extent in self.extents:
            assert extent.occupied == occupied.get(extent, 0)
            assert extent.busy == busy.get(extent, 0)
            assert not set(extent.freed) & self.blocks.keys(), "a free slot is occupied"
        for size_class in self.extents.classes():
            order = list(
                self._policy.coldest(size_class.slot_bytes, slot_count=size_class.slot_count)
            )
            assert len(set(order)) == len(order), "twice in the order of eviction"
            assert set(order) == ordered.get(size_class.slot_bytes, set()), "order of eviction"
        self._policy.check(ready)
        self.changes.check(set(ready.values()))
        assert self._next_generation <= max(1, self._generation_mark)


def _blank_header(slot: SlotIndex) -> WriteHeader:
    return WriteHeader(
        slot, Generation(0), BlockKey(bytes(16)), 0, 0, ABSENT, Origin.ORIGINAL, 0, 0
    )
