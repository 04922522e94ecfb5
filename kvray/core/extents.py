"""Which extent serves which slot size, and which of its slots are free.

    never cut ──cut──▶ of class A ──its last slot falls free──▶ spare ──cut──▶ of class B
                        (blocks)                              (of A still)

A size class is one aligned slot size. Its extents are cut into slots of that size; a spare extent
has no occupied slot and may be cut for any class, which costs nobody a block.

When a class has no free slot and no extent is spare, it may still be given an extent of another
class, whose blocks are evicted for it. To keep two classes under pressure from passing an extent
to and fro, that happens in these cases only (`victims`), in this order:

 1. The asking class has fewer extents than its share (all extents / number of classes), and the
    other one more than that. Afterwards the one is at most at its share and the other at least,
    so the extent does not come back: classes that all want more settle at their shares.
 2. The other class is idle: nobody has reserved, pinned or touched in it for recut_rest_ms, and its
    last use lies before that of the coldest block the asking class could evict instead. That is
    LRU across the classes, so a model that is gone does not keep its share for ever.
 3. The asking class has no extent at all and 1 and 2 found nothing (more classes than extents): the
    least recently used of the classes that have gained no extent for recut_rest_ms. So a cut
    lives for at least that long, and each class has its turn.

Else the class evicts its own coldest block, or the reservation is FULL.

This file knows nothing of blocks: StoreCore says which slots are occupied and which occupied ones
could not be evicted now (`busy`).
"""

from collections import OrderedDict
from collections.abc import Iterator

from kvray.core.adoption import Cut
from kvray.core.ids import ExtentIndex, SlotIndex
from kvray.core.layout import SLOT_ALIGN_BYTES, Geometry


class SizeClass:
    """The extents of one slot size. Exists only while it has extents."""

    __slots__ = ("extents", "gained_ms", "open", "slot_bytes", "slot_count", "used_ms")

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slot_count = 0
        self.extents: dict[ExtentIndex, Extent] = {}
        # Those with a free slot; spare ones at the end, so that they stay spare while others serve.
        self.open: OrderedDict[ExtentIndex, Extent] = OrderedDict()
        self.used_ms = 0  # last reserve, pin or touch
        self.gained_ms = 0  # last time an extent was cut for this class


_UNCUT = SizeClass(0)


class Extent:
    """One extent and its free slots. Of no use until it is cut: slot_bytes 0, no slots."""

    __slots__ = (
        "busy",
        "first_offset",
        "first_slot",
        "freed",
        "fresh",
        "generation",
        "index",
        "occupied",
        "size_class",
        "slot_bytes",
        "slot_count",
    )

    def __init__(self, index: ExtentIndex, *, first_slot: SlotIndex, first_offset: int) -> None:
        self.index = index
        self.first_slot = first_slot
        self.first_offset = first_offset
        self.slot_bytes = 0
        self.slot_count = 0
        self.size_class = _UNCUT
        self.generation = 0
        self.occupied = 0  # slots that are not ABSENT
        self.busy = 0  # of these, the ones that can not be evicted now
        self.freed: list[SlotIndex] = []  # used before in this cut, and ABSENT
        self.fresh = 0  # [fresh, slot_count) have not been used in this cut

    def offset_of(self, slot: SlotIndex) -> int:
        """Of the slot's payload, from the start of the slab."""
        return self.first_offset + (slot - self.first_slot) * self.slot_bytes

    def used_slots(self) -> range:
        """Slots that may be occupied; all others are ABSENT."""
        return range(self.first_slot, self.first_slot + self.fresh)


class Extents:
    """All extents of a slab."""

    def __init__(self, geometry: Geometry, *, recut_rest_ms: int) -> None:
        self._rest_ms = recut_rest_ms
        self._extent_bytes = geometry.extent_bytes
        per_extent = geometry.slots_per_extent
        self._all = [
            Extent(
                ExtentIndex(i),
                first_slot=SlotIndex(i * per_extent),
                first_offset=geometry.payload_offset + i * geometry.extent_bytes,
            )
            for i in range(geometry.extent_count)
        ]
        self._payload_offset = geometry.payload_offset
        self._slots_per_extent = per_extent
        self.spares: OrderedDict[ExtentIndex, Extent] = OrderedDict((e.index, e) for e in self._all)
        self._classes: dict[int, SizeClass] = {}

    def class_of(self, slot_bytes: int) -> SizeClass | None:
        """None if no extent serves this size now."""
        return self._classes.get(slot_bytes)

    def classes(self) -> list[SizeClass]:
        return list(self._classes.values())

    def extent_of(self, slot: SlotIndex) -> Extent:
        return self._all[slot // self._slots_per_extent]

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._all)

    def unoccupied(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of the payload between these offsets of the slab in which no block lies,
        in this order and merged.
        """
        for extent in self._all[max(0, begin - self._payload_offset) // self._extent_bytes :]:
            if extent.first_offset >= end:
                return
            free_from = extent.first_offset
            extent_end = free_from + self._extent_bytes
            occupied = set(extent.used_slots()).difference(extent.freed)
            ends = [extent.offset_of(SlotIndex(slot)) for slot in sorted(occupied)]
            for free_to in (*ends, extent_end):
                low, high = max(begin, free_from), min(end, free_to)
                if low < high:
                    yield low, high - low
                free_from = free_to + extent.slot_bytes

    def take(self, size_class: SizeClass) -> tuple[Extent, SlotIndex]:
        """Occupy a slot of a class that has an open extent."""
        extent = next(iter(size_class.open.values()))
        if extent.freed:
            slot = extent.freed.pop()
        else:
            slot = SlotIndex(extent.first_slot + extent.fresh)
            extent.fresh += 1
        if not extent.occupied:
            del self.spares[extent.index]
        extent.occupied += 1
        if extent.occupied == extent.slot_count:
            del size_class.open[extent.index]
        return extent, slot

    def give_back(self, extent: Extent, slot: SlotIndex) -> None:
        """The slot is ABSENT again."""
        size_class = extent.size_class
        extent.freed.append(slot)
        extent.occupied -= 1
        size_class.open[extent.index] = extent
        size_class.open.move_to_end(extent.index, last=not extent.occupied)
        if not extent.occupied:
            self.spares[extent.index] = extent

    def spare(self) -> Extent | None:
        """The extent that has been without an occupied slot for longest."""
        return next(iter(self.spares.values()), None)

    def cut(self, extent: Extent, slot_bytes: int, *, generation: int, now_ms: int) -> SizeClass:
        """Give a spare extent to a class. The caller has WriteExtent written."""
        assert extent.occupied == 0, "an extent is cut anew only when all its headers are ABSENT"
        if extent.slot_bytes:
            self._take_from_class(extent)
        size_class = self._classes.get(slot_bytes)
        if size_class is None:
            size_class = self._classes[slot_bytes] = SizeClass(slot_bytes)
            size_class.used_ms = now_ms
        extent.slot_bytes = slot_bytes
        extent.slot_count = self._extent_bytes // slot_bytes
        extent.size_class = size_class
        extent.generation = generation
        extent.freed = []
        extent.fresh = 0
        size_class.extents[extent.index] = extent
        size_class.open[extent.index] = extent
        size_class.slot_count += extent.slot_count
        size_class.gained_ms = now_ms
        return size_class

    def adopt(self, cut: Cut, *, now_ms: int) -> None:
        """Take over an extent from an earlier epoch, with the slots that stay in use."""
        extent = self._all[cut.extent]
        size_class = self.cut(extent, cut.slot_bytes, generation=cut.generation, now_ms=now_ms)
        if not cut.occupied:
            return
        used = set(cut.occupied)
        extent.fresh = max(used) - extent.first_slot + 1
        extent.freed = [SlotIndex(slot) for slot in extent.used_slots() if slot not in used]
        extent.occupied = len(used)
        del self.spares[extent.index]
        size_class.open.move_to_end(extent.index, last=False)
        if extent.occupied == extent.slot_count:
            del size_class.open[extent.index]

    def share(self, slot_bytes: int) -> int:
        """How many extents each class may count on, if slot_bytes is one of the classes."""
        class_count = len(self._classes) + (slot_bytes not in self._classes)
        return max(1, len(self._all) // class_count)

    def victims(
        self, slot_bytes: int, *, coldest_used_ms: int | None, now_ms: int
    ) -> Iterator[SizeClass]:
        """Classes that may lose an extent to slot_bytes, by the rule on top of this file.

        coldest_used_ms: last use of the block that slot_bytes would evict of its own; None if it
        has none that may go.
        """
        own = self._classes.get(slot_bytes)
        share = self.share(slot_bytes)
        others = [other for other in self._classes.values() if other is not own]
        if (len(own.extents) if own else 0) < share:
            over = [other for other in others if len(other.extents) > share]
            yield from sorted(over, key=lambda other: -len(other.extents))
        others.sort(key=lambda other: other.used_ms)
        rested_ms = now_ms - self._rest_ms
        if own is None:
            yield from (other for other in others if other.gained_ms <= rested_ms)
        elif coldest_used_ms is not None:
            idle_ms = min(rested_ms, coldest_used_ms - 1)
            yield from (other for other in others if other.used_ms <= idle_ms)

    def check(self) -> None:
        """Assert what this file promises, from extents to classes and back."""
        for extent in self._all:
            assert 0 <= extent.busy <= extent.occupied <= extent.fresh <= extent.slot_count
            assert len(set(extent.freed)) == len(extent.freed), "a slot is free twice"
            assert extent.occupied + len(extent.freed) == extent.fresh, "a slot is lost"
            assert all(slot in extent.used_slots() for slot in extent.freed), "free but not used"
            assert (extent.index in self.spares) == (extent.occupied == 0), "spare or occupied"
            if not extent.slot_bytes:
                assert extent.slot_count == 0, "never cut, but has slots"
                continue
            assert extent.slot_bytes % SLOT_ALIGN_BYTES == 0
            assert extent.slot_count == self._extent_bytes // extent.slot_bytes
            size_class = self._classes[extent.slot_bytes]
            assert extent.size_class is size_class
            assert size_class.extents.get(extent.index) is extent, "its class does not know it"
            is_open = extent.occupied < extent.slot_count
            assert (extent.index in size_class.open) == is_open, "open or full"
        for slot_bytes, size_class in self._classes.items():
            assert size_class.slot_bytes == slot_bytes
            assert size_class.extents, "a class without extents"
            assert all(e.slot_bytes == slot_bytes for e in size_class.extents.values())
            assert size_class.open.keys() <= size_class.extents.keys()
            assert size_class.slot_count == sum(e.slot_count for e in size_class.extents.values())

    def snapshot(self) -> list[dict[str, int]]:
        """One row a class, for people."""
        return [
            {
                "slot_bytes": c.slot_bytes,
                "extents": len(c.extents),
                "slots": c.slot_count,
                "occupied": sum(e.occupied for e in c.extents.values()),
                "busy": sum(e.busy for e in c.extents.values()),
                "used_ms": c.used_ms,
            }
            for c in self._classes.values()
        ]

    def _take_from_class(self, extent: Extent) -> None:
        size_class = extent.size_class
        del size_class.extents[extent.index]
        del size_class.open[extent.index]
        size_class.slot_count -= extent.slot_count
        if not size_class.extents:
            del self._classes[extent.slot_bytes]
