"""Which block goes first when a slot is needed. The seam, a plain LRU, and the default, Segmented.

A policy knows the READY blocks by slot, one set of orders per slot size, since only a slot of the
same size can take a block's place. A pinned block is taken out of its order (`hold`) when a search
for the coldest meets it, and comes back at the hot end with its last unpin (`free`): no search
steps over it twice. Until then it stays in the order, pinned or not. Every verb is O(1).

    admit ──▶ evictable ──hold──▶ held ──free──▶ evictable        forget, from evictable: gone
                  └── hit, read, touch: to the hot end

A policy decides nothing else: whether a block may go at all is StoreCore's to say.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import Literal, Protocol

from kvray.core.ids import Origin, SlotIndex

Replacement = Literal["segmented", "lru"]  # config has it too, which imports nothing

# Of a copy, until it is no guest any more. The first pin is the reader for whom it was fetched, the
# second may be one more turn of the same conversation, for which one replica in the cluster is
# enough.
PROMOTE_HITS = 3


class Policy(Protocol):
    """What StoreCore asks of an order of eviction. slot_bytes is always the aligned slot size."""

    def admit(self, slot_bytes: int, slot: SlotIndex, origin: Origin) -> None:
        """A block became READY here: evictable, at the hot end."""

    def hold(self, slot_bytes: int, slot: SlotIndex) -> None:
        """Not evictable until `free`. Never called twice without a `free` between."""

    def free(self, slot_bytes: int, slot: SlotIndex) -> None:
        """Evictable again, at the hot end."""

    def hit(self, slot_bytes: int, slot: SlotIndex) -> None:
        """A local reader has had the block pinned, and unpins it; it may be held or not."""

    def keep(self, slot_bytes: int, slot: SlotIndex) -> None:
        """The block's home goes: it is neither a guest nor to be spared; it may be held or not."""

    def read(self, slot_bytes: int, slot: SlotIndex) -> None:
        """A peer wanted the block, and this node is its home: nobody has had it for longer. It may
        be held or not.
        """

    def touch(self, slot_bytes: int, slot: SlotIndex) -> None:
        """Used in another way (an engine has computed it again); it may be held or not."""

    def spare(self, slot_bytes: int, slot: SlotIndex) -> None:
        """Another node is the block's home: losing it here costs little. A hint, and void with the
        next use; it may be held or not.
        """

    def forget(self, slot_bytes: int, slot: SlotIndex) -> None:
        """The block is gone. Only an evictable one goes."""

    def coldest(self, slot_bytes: int, *, slot_count: int) -> Iterator[SlotIndex]:
        """All evictable blocks of this size, the first to go first; lazily, and void after the
        next call of any verb. slot_count: how many slots of this size there are now.
        """

    def doubtful(self, slot_bytes: int) -> Iterator[SlotIndex]:
        """Blocks whose end is near, the nearest first, of which it matters whether they may be
        spared; lazily, and void after the next call of any verb.
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

    def keep(self, slot_bytes: int, slot: SlotIndex) -> None:
        self.touch(slot_bytes, slot)

    def read(self, slot_bytes: int, slot: SlotIndex) -> None:
        self.touch(slot_bytes, slot)

    def touch(self, slot_bytes: int, slot: SlotIndex) -> None:
        order = self._orders[slot_bytes]
        if slot in order:
            order.move_to_end(slot)

    def spare(self, slot_bytes: int, slot: SlotIndex) -> None:
        del slot_bytes, slot

    def forget(self, slot_bytes: int, slot: SlotIndex) -> None:
        del self._orders[slot_bytes][slot]

    def coldest(self, slot_bytes: int, *, slot_count: int) -> Iterator[SlotIndex]:
        del slot_count
        return iter(self._orders[slot_bytes])

    def doubtful(self, slot_bytes: int) -> Iterator[SlotIndex]:
        del slot_bytes
        return iter(())

    def check(self, ready: Collection[SlotIndex]) -> None:
        for order in self._orders.values():
            assert all(slot in ready for slot in order), "an evictable slot is not READY"

    def snapshot(self) -> dict[str, int]:
        return {"evictable": sum(map(len, self._orders.values()))}


class _Parts:
    """The orders of one slot size, coldest first, and to which part the held ones belong.

    A block is a guest while it is in `hits`, reused while it is in `proven`, else it was used once.
    """

    __slots__ = ("count", "guests", "hits", "once", "proven", "reused", "spares")

    def __init__(self) -> None:
        self.count = 0  # of all blocks, held ones too
        self.guests: OrderedDict[SlotIndex, None] = OrderedDict()
        self.spares: OrderedDict[SlotIndex, None] = OrderedDict()
        self.once: OrderedDict[SlotIndex, None] = OrderedDict()
        self.reused: OrderedDict[SlotIndex, None] = OrderedDict()
        self.hits: dict[SlotIndex, int] = {}  # of the guests
        self.proven: set[SlotIndex] = set()

    def order_of(self, slot: SlotIndex) -> OrderedDict[SlotIndex, None]:
        """Where the block is if it is evictable and no spare, and where it comes back to."""
        if slot in self.hits:
            return self.guests
        return self.reused if slot in self.proven else self.once

    def orders(self) -> tuple[OrderedDict[SlotIndex, None], ...]:
        return self.guests, self.spares, self.once, self.reused


class Segmented:
    """A block must be used again to be worth more than the next new one, and a copy of a peer's
    block is a guest.

        ORIGINAL ──▶ once ──hit, read──▶ reused ──too many: the coldest──▶ once
                      └──spare──▶ spares ──any use──▶ once, reused
        COPY ──▶ guests ──PROMOTE_HITS──▶ reused
                    └──read, keep──▶ once

    The order of eviction: guests beyond their fraction of the slots, spares, once, reused, the
    other guests. Within each the least recently used goes first.

    So a scan of blocks that nobody asks for again passes through `once` and leaves `reused` alone;
    guests can not push out what only this node has, and N nodes hold nearly N times as many
    different blocks as one. What falls out of `reused` gets the time of a new block once more.
    """

    def __init__(self, probation_fraction: float, reused_fraction: float) -> None:
        assert 0.0 <= probation_fraction <= 1.0
        assert 0.0 <= reused_fraction <= 1.0
        self._probation_fraction = probation_fraction
        self._reused_fraction = reused_fraction
        self._sizes: defaultdict[int, _Parts] = defaultdict(_Parts)

    def admit(self, slot_bytes: int, slot: SlotIndex, origin: Origin) -> None:
        parts = self._sizes[slot_bytes]
        parts.count += 1
        if origin is Origin.COPY:
            parts.hits[slot] = 0
            parts.guests[slot] = None
        else:
            parts.once[slot] = None

    def hold(self, slot_bytes: int, slot: SlotIndex) -> None:
        # Here and in `free` without order_of: `free` is called for each key of an unpin.
        parts = self._sizes[slot_bytes]
        if slot in parts.proven:
            del parts.reused[slot]
        elif slot in parts.once:
            del parts.once[slot]
        elif slot in parts.spares:
            del parts.spares[slot]
        else:
            del parts.guests[slot]

    def free(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        if slot in parts.proven:
            parts.reused[slot] = None
        elif slot in parts.hits:
            parts.guests[slot] = None
        else:
            parts.once[slot] = None

    def hit(self, slot_bytes: int, slot: SlotIndex) -> None:
        # What is asked for often is here already, and this is called for each key of an unpin.
        parts = self._sizes[slot_bytes]
        if slot in parts.reused:
            parts.reused.move_to_end(slot)
            return
        if slot in parts.proven:
            return  # held
        hits = parts.hits.get(slot)
        if hits is not None and hits + 1 < PROMOTE_HITS:
            parts.hits[slot] = hits + 1
            self.touch(slot_bytes, slot)
        else:
            self._prove(parts, slot)

    def keep(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        is_evictable = _take_out(parts, slot)
        parts.hits.pop(slot, None)
        if is_evictable:
            parts.order_of(slot)[slot] = None

    def read(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        if slot in parts.hits:
            self.keep(slot_bytes, slot)  # its original is gone
        else:
            self._prove(parts, slot)

    def touch(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        if _take_out(parts, slot):
            parts.order_of(slot)[slot] = None

    def spare(self, slot_bytes: int, slot: SlotIndex) -> None:
        """Guests go early enough, and what is held is in no order."""
        parts = self._sizes[slot_bytes]
        if slot in parts.once or slot in parts.reused:
            del parts.order_of(slot)[slot]
            parts.proven.discard(slot)
            parts.spares[slot] = None

    def forget(self, slot_bytes: int, slot: SlotIndex) -> None:
        parts = self._sizes[slot_bytes]
        if slot in parts.once:
            del parts.once[slot]
        else:
            self.hold(slot_bytes, slot)
            parts.hits.pop(slot, None)
            parts.proven.discard(slot)
        # While nothing has to go, nothing has to be too many; held ones can not be put back.
        while len(parts.proven) > self._reused_fraction * parts.count and parts.reused:
            demoted, _ = parts.reused.popitem(last=False)
            parts.proven.discard(demoted)
            parts.once[demoted] = None
        parts.count -= 1

    def coldest(self, slot_bytes: int, *, slot_count: int) -> Iterator[SlotIndex]:
        parts = self._sizes[slot_bytes]
        surplus = max(0, len(parts.hits) - int(self._probation_fraction * slot_count))
        return chain(
            islice(parts.guests, surplus),
            parts.spares,
            parts.once,
            parts.reused,
            islice(parts.guests, surplus, None),
        )

    def doubtful(self, slot_bytes: int) -> Iterator[SlotIndex]:
        parts = self._sizes[slot_bytes]
        return chain(parts.once, parts.reused)

    def _prove(self, parts: _Parts, slot: SlotIndex) -> None:
        is_evictable = _take_out(parts, slot)
        parts.hits.pop(slot, None)
        parts.proven.add(slot)
        if is_evictable:
            parts.reused[slot] = None

    def check(self, ready: Collection[SlotIndex]) -> None:
        for parts in self._sizes.values():
            for order in parts.orders():
                assert all(slot in ready for slot in order), "an evictable slot is not READY"
            for members in (parts.hits, parts.proven):
                assert all(slot in ready for slot in members), "a slot of a part is not READY"
            assert parts.guests.keys() <= parts.hits.keys(), "a guest without a count"
            assert parts.reused.keys() <= parts.proven, "reused, and nobody has seen it"
            assert not parts.hits.keys() & parts.proven, "in both parts"
            rest = parts.once.keys() | parts.spares.keys()
            assert not rest & (parts.hits.keys() | parts.proven), "in two parts"
            assert not parts.once.keys() & parts.spares.keys(), "in two orders"
            assert all(0 <= hits < PROMOTE_HITS for hits in parts.hits.values()), "not promoted"
            assert sum(map(len, parts.orders())) <= parts.count, "counted wrong"
        assert sum(parts.count for parts in self._sizes.values()) == len(ready), "counted wrong"

    def snapshot(self) -> dict[str, int]:
        sizes = self._sizes.values()
        return {
            "evictable": sum(len(order) for parts in sizes for order in parts.orders()),
            "probation": sum(len(parts.hits) for parts in sizes),
            "spares": sum(len(parts.spares) for parts in sizes),
            "reused": sum(len(parts.proven) for parts in sizes),
        }


def _take_out(parts: _Parts, slot: SlotIndex) -> bool:
    """Out of its order. False if it is held, and so in none."""
    order = parts.spares if slot in parts.spares else parts.order_of(slot)
    if slot not in order:
        return False
    del order[slot]
    return True


def policy_named(
    replacement: Replacement, *, probation_fraction: float, reused_fraction: float
) -> Policy:
    """As a configuration names it; a plain LRU has no use for the fractions."""
    if replacement == "lru":
        return Lru()
    return Segmented(probation_fraction, reused_fraction)
