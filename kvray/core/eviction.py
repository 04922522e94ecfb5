"""Which block goes first when a slot is needed. The seam, a plain LRU, and the default.

A policy knows the READY blocks by slot, one set of orders per slot size, since only a slot of the
same size can take a block's place. A pinned block is out of its order (`hold`) and comes back at
the hot end (`free`), so that finding the coldest never steps over pinned ones. Every verb is O(1).

    admit ──▶ evictable ──hold──▶ held ──free──▶ evictable        forget, from either: gone
                  └── hit, touch: to the hot end

A policy decides nothing else: whether a block may go at all is StoreCore's to say.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import Protocol

from kvray.core.ids import Origin, SlotIndex

# The first pin of a copy is the reader for whom it was fetched; the second one is a real reuse.
PROMOTE_HITS = 2


class Policy(Protocol):
    """What StoreCore asks of an order of eviction. slot_bytes is always the aligned slot size."""

    def admit(self, slot_bytes: int, slot: SlotIndex, origin: Origin) -> None:
        """A block became READY here: evictable, at the hot end."""

    def hold(self, slot_bytes: int, slot: SlotIndex) -> None:
        """Not evictable until `free`. Never called twice without a `free` between."""

    def free(self, slot_bytes: int, slot: SlotIndex) -> None:
        """Evictable again, at the hot end."""

    def hit(self, slot_bytes: int, slot: SlotIndex) -> None:
        """A local reader pinned the block; it may be held or not."""

    def touch(self, slot_bytes: int, slot: SlotIndex) -> None:
        """Used in another way (a peer read it, an engine has computed it again)."""

    def forget(self, slot_bytes: int, slot: SlotIndex) -> None:
        """The block is gone. Only an evictable one goes."""

    def coldest(self, slot_bytes: int, *, slot_count: int) -> Iterator[SlotIndex]:
        """All evictable blocks of this size, the first to go first; lazily, and void after the
        next call of any verb. slot_count: how many slots of this size there are now.
        """

    def check(self, ready: Collection[SlotIndex]) -> None:
        """Assert that the policy remembers nothing about slots other than the READY ones."""

    def snapshot(self) -> dict[str, int]:
        """Counts, for people."""


class Lru:
    """Least recently used, whatever the origin. The baseline to measure the default against."""

    def __init__(self) -> None:
        self._orders: defaultdict[int, OrderedDict[SlotIndex, None]] = defaultdict(OrderedDict)

    def admit(self, slot_bytes: int, slot: SlotIndex, origin: Origin) -> None:
        del origin
        self._orders[slot_bytes][slot] = None

    def hold(self, slot_bytes: int, slot: SlotIndex) -> None:
        del self._orders[slot_bytes][slot]

    def free(self, slot_bytes: int, slot: SlotIndex) -> None:
        self._orders[slot_bytes][slot] = None

    def hit(self, slot_bytes: int, slot: SlotIndex) -> None:
        self.touch(slot_bytes, slot)

    def touch(self, slot_bytes: int, slot: SlotIndex) -> None:
        order = self._orders[slot_bytes]
        if slot in order:
            order.move_to_end(slot)

    def forget(self, slot_bytes: int, slot: SlotIndex) -> None:
        del self._orders[slot_bytes][slot]

    def coldest(self, slot_bytes: int, *, slot_count: int) -> Iterator[SlotIndex]:
        del slot_count
        return iter(self._orders[slot_bytes])

    def check(self, ready: Collection[SlotIndex]) -> None:
        for order in self._orders.values():
            assert all(slot in ready for slot in order), "an evictable slot is not READY"

    def snapshot(self) -> dict[str, int]:
        return {"evictable": sum(map(len, self._orders.values()))}


class _Parts:
    """The two orders of one slot size. A block is of the probation part while it is in `hits`."""

    __slots__ = ("hits", "main", "probation")

    def __init__(self) -> None:
        self.main: OrderedDict[SlotIndex, None] = OrderedDict()
        self.probation: OrderedDict[SlotIndex, None] = OrderedDict()
        self.hits: dict[SlotIndex, int] = {}  # of the copies on probation, held ones too


class LruWithProbation:
    """LRU in which a copy of a peer's block is a guest until it has been used again.

        ORIGINAL ─────────────────────────▶ main
        COPY ──▶ probation ──second hit──▶ main

    Probation goes first while it has more than its fraction of the slots, or when main has nothing
    that may go; else main goes first. So copies can neither push out what only this node has nor
    be thrown away before anybody could use them twice, and N nodes hold nearly N times as many
    different blocks as one.
    """

    def __init__(self, probation_fraction: float) -> None:
        assert 0.0 <= probation_fraction <= 1.0
        self._fraction = probation_fraction
        self._sizes: defaultdict[int, _Parts] = defaultdict(_Parts)

    def admit(self, slot_bytes: int, slot: SlotIndex, origin: Origin) -> None:
        parts = self._sizes[slot_bytes]
        if origin is Origin.COPY:
            parts.hits[slot] = 0
            parts.probation[slot] = None
        else:
            parts.main[slot] = None

    def hold(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        if slot in parts.hits:
            del parts.probation[slot]
        else:
            del parts.main[slot]

    def free(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        if slot in parts.hits:
            parts.probation[slot] = None
        else:
            parts.main[slot] = None

    def hit(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        hits = parts.hits.get(slot)
        if hits is None:
            if slot in parts.main:
                parts.main.move_to_end(slot)
        elif hits + 1 < PROMOTE_HITS:
            parts.hits[slot] = hits + 1
            if slot in parts.probation:
                parts.probation.move_to_end(slot)
        else:
            del parts.hits[slot]
            if slot in parts.probation:
                del parts.probation[slot]
                parts.main[slot] = None

    def touch(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        if slot in parts.main:
            parts.main.move_to_end(slot)
        elif slot in parts.probation:
            parts.probation.move_to_end(slot)

    def forget(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        if parts.hits.pop(slot, None) is None:
            del parts.main[slot]
        else:
            del parts.probation[slot]

    def coldest(self, slot_bytes: int, *, slot_count: int) -> Iterator[SlotIndex]:
        parts = self._sizes[slot_bytes]
        # The copies that are too many, then main, then the other copies.
        surplus = max(0, len(parts.hits) - int(self._fraction * slot_count))
        if not surplus:
            return chain(parts.main, parts.probation)
        return chain(
            islice(parts.probation, surplus), parts.main, islice(parts.probation, surplus, None)
        )

    def check(self, ready: Collection[SlotIndex]) -> None:
        for parts in self._sizes.values():
            assert all(slot in ready for slot in parts.main), "an evictable slot is not READY"
            assert all(slot in ready for slot in parts.hits), "a slot on probation is not READY"
            assert parts.probation.keys() <= parts.hits.keys(), "in probation without a count"
            assert not parts.main.keys() & parts.hits.keys(), "in both parts"
            assert all(0 <= hits < PROMOTE_HITS for hits in parts.hits.values()), "not promoted"

    def snapshot(self) -> dict[str, int]:
        return {
            "evictable": sum(len(p.main) + len(p.probation) for p in self._sizes.values()),
            "probation": sum(len(p.hits) for p in self._sizes.values()),
        }
