"""A node to read from: where its slots are, what it owes us, whether it is worth asking.

    usable ──a read fails or is late──▶ avoided, 0.5 s doubling to 1 s ──▶ usable
       ▲                                                                      │
       └───────────────── a read is proven: the doubling starts anew ─────────┘

It says what a peer is like. Which block is read from which peer is core.planner's to say, when and
how core.fetch's.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from kvray.core.break_even import RATE_SAMPLE_BYTES, Rate
from kvray.core.header_runs import Offsets
from kvray.core.ids import UNKNOWN_MAKER, Epoch, Generation, Maker, NodeId, SlotIndex
from kvray.core.layout import HEADER_BYTES, Geometry, aligned
from kvray.core.messages import NodeInfo

FIRST_AVOID_MS = 500  # long enough for a slow moment of a live peer to pass
MAX_AVOID_MS = 1_000  # with the deadline of a last vain read: a healed link is used within 3 s
MAX_SIZES_KEPT = 256  # of slots_in_extent: hints could name any size, models name a few


class Source(msgspec.Struct, frozen=True, gc=False):
    """A hint of the directory: one block on one node."""

    node_id: NodeId
    epoch: Epoch
    slot: SlotIndex
    generation: Generation
    bytes: int
    maker: Maker = UNKNOWN_MAKER


class Peer:
    """One node in one epoch."""

    __slots__ = (
        "_avoid_ms",
        "_geometry",
        "_payload_offset",
        "_slot_count",
        "_slots_in_extent",
        "_slots_per_extent",
        "avoid_until_ms",
        "fetched_bytes",
        "info",
        "last_payload_ms",
        "outstanding_bytes",
        "rate",
        "under_way",
    )

    def __init__(self, info: NodeInfo, *, rate_sample_bytes: int = RATE_SAMPLE_BYTES) -> None:
        self.info = info
        self.outstanding_bytes = 0  # planned, and not yet come
        self.under_way = 0  # reads that have been posted and not ended
        self.avoid_until_ms = 0
        self.rate = Rate(rate_sample_bytes)
        self.fetched_bytes = 0  # of payload that was proven
        self.last_payload_ms = 0  # when a read of payload last ended
        self._avoid_ms = 0
        # Geometry works out its numbers at each call; here they are needed for every block.
        self._geometry = Geometry(info.slab_bytes, info.extent_bytes)
        self._payload_offset = self._geometry.payload_offset
        self._slot_count = self._geometry.slot_count
        self._slots_per_extent = self._geometry.slots_per_extent
        self._slots_in_extent: dict[int, int] = {}  # by block size: a handful of sizes

    @property
    def node_id(self) -> NodeId:
        return self.info.node_id

    @property
    def epoch(self) -> Epoch:
        return self.info.epoch

    def can_hold(self, source: Source) -> bool:
        """Whether its slab has such a slot: a hint is not to be trusted with an address."""
        in_extent = self._slots_in_extent.get(source.bytes)
        if in_extent is None:
            in_extent = self._geometry.slots_in_extent(source.bytes) if source.bytes > 0 else 0
            if len(self._slots_in_extent) >= MAX_SIZES_KEPT:
                self._slots_in_extent.clear()
            self._slots_in_extent[source.bytes] = in_extent
        slot = source.slot
        return 0 <= slot < self._slot_count and slot % self._slots_per_extent < in_extent

    def payload_offsets(self, sources: Sequence[Source]) -> Offsets:
        """Geometry.slot_offset of each, in one go."""
        slots = np.array([source.slot for source in sources], np.uint64)
        sizes = np.array([aligned(source.bytes) for source in sources], np.uint64)
        extents = slots // np.uint64(self._slots_per_extent)
        indices = slots % np.uint64(self._slots_per_extent)
        in_payload: Offsets = extents * np.uint64(self.info.extent_bytes) + indices * sizes
        return in_payload + np.uint64(self._payload_offset)

    def header_offsets(self, sources: Sequence[Source]) -> Offsets:
        """Geometry.header_offset of each, in one go."""
        slots = np.array([source.slot for source in sources], np.uint64)
        return slots * np.uint64(HEADER_BYTES) + np.uint64(self._geometry.slot_table_offset)

    def end_payload(self, read_bytes: int, posted_ms: int, *, now_ms: int) -> None:
        """A read of payload is over; read_bytes: what came. Reads overlap, and their time counts
        once.
        """
        since_ms = max(posted_ms, self.last_payload_ms)
        self.last_payload_ms = now_ms
        if read_bytes:
            self.rate.add(read_bytes, now_ms - since_ms, now_ms=now_ms)

    def fail(self, now_ms: int) -> int:
        """It did not do what was asked: avoid it. For how long; 0 if it is avoided already, since
        reads that were posted before the first of them failed count as one failure.
        """
        if now_ms < self.avoid_until_ms:
            return 0
        self._avoid_ms = min(max(2 * self._avoid_ms, FIRST_AVOID_MS), MAX_AVOID_MS)
        self.avoid_until_ms = now_ms + self._avoid_ms
        self.rate.doubt()
        return self._avoid_ms

    def succeed(self) -> None:
        """A read of it has been proven."""
        self._avoid_ms = 0
        self.avoid_until_ms = 0
