"""Where everything lies in a slab. Pure arithmetic on offsets; the mapping is node.slab's.

    0                header page: magic, format, slab id, boot id, epoch, geometry, generation mark,
                     own pid, table of clients                                     (4 KiB)
    extent_table     one 64-byte descriptor per extent
    slot_table       one 64-byte header per possible slot, extent by extent
    payload          extent_count extents of extent_bytes, each cut into slots of one size

Extents have a fixed size; what they are cut into changes with the models that use them. So a slot
is named by SlotIndex = extent * slots_per_extent + index, whatever the slot size, and its header
has a fixed place: a reader finds it without knowing what else is in the slab.
All integers are little-endian. Everything that a peer may read starts on a 64-byte line.
"""

from dataclasses import dataclass

import numpy as np

from kvray.core.ids import ExtentIndex, SlotIndex
from kvray.errors import ConfigError

FORMAT_VERSION = 2  # of the slab and of the wire; another version starts empty / is refused
MAGIC = b"kvraysl1"
PAGE_BYTES = 4_096
HEADER_BYTES = 64  # one cache line: written by one core, read by one transfer
SLOT_ALIGN_BYTES = 4_096  # pages: what RDMA registration and the page tables work in
MIN_EXTENT_BYTES = 64 * 1024
MAX_EXTENT_BYTES = 4 * 1024**3 - SLOT_ALIGN_BYTES  # a slot's bytes fit 32 bits
MAX_SLOTS = 2**32 - 1  # SlotIndex travels in 32 bits
MAX_CLIENTS = 96  # rows of the client table in the header page: engines and workers of one node
WRITER_NODE = 0xFFFF  # `writer` of a slot that the NodeStore itself fills (a fetch)

SLOT_HEADER_DTYPE = np.dtype(
    [
        ("generation", "<u8"),
        ("key", "V16"),
        ("offset", "<u8"),  # of the payload, from the start of the slab
        ("bytes", "<u4"),  # of the payload; MAX_EXTENT_BYTES is less than 4 GiB
        ("checksum", "<u4"),  # of the payload; 0: not computed, as everywhere today
        ("state", "<u4"),  # SlotState
        ("origin", "<u2"),  # Origin
        ("writer", "<u2"),  # row of the client table, or WRITER_NODE
        ("extent_generation", "<u8"),  # of the extent's descriptor when the slot was given out
        ("maker", "<u8"),  # who computed the block, see ids.maker_class; known when it is given out
    ]
)
EXTENT_DTYPE = np.dtype([("extent_generation", "<u8"), ("slot_bytes", "<u8"), ("spare", "V48")])
# word: pid, role and a sum, see core.header_page; 0 for a row that was never used.
CLIENT_DTYPE = np.dtype(
    [("word", "<u8"), ("start_ticks", "<u8"), ("nonce", "<u8"), ("engine", "<u8")]
)
assert SLOT_HEADER_DTYPE.itemsize == HEADER_BYTES
assert EXTENT_DTYPE.itemsize == HEADER_BYTES
assert CLIENT_DTYPE.itemsize * 2 == HEADER_BYTES


def aligned(count_bytes: int, to_bytes: int = SLOT_ALIGN_BYTES) -> int:
    """The smallest multiple of to_bytes that holds count_bytes."""
    return -(-count_bytes // to_bytes) * to_bytes


@dataclass(frozen=True, slots=True)
class Geometry:
    """The cut of one slab file, a function of two numbers. Two slabs with equal numbers are cut
    alike, so a peer computes remote offsets by itself.

    slab_bytes is the size of the whole file; as many extents as fit are made of it.
    Raises ConfigError if not even one extent fits.
    """

    slab_bytes: int
    extent_bytes: int

    def __post_init__(self) -> None:
        if not MIN_EXTENT_BYTES <= self.extent_bytes <= MAX_EXTENT_BYTES:
            raise ConfigError(
                f"extent_bytes is {self.extent_bytes}; "
                f"it must be between {MIN_EXTENT_BYTES} and {MAX_EXTENT_BYTES}"
            )
        if self.extent_bytes % SLOT_ALIGN_BYTES:
            raise ConfigError(
                f"extent_bytes is {self.extent_bytes}; it must be a multiple of {SLOT_ALIGN_BYTES}"
            )
        if self.extent_count < 1:
            raise ConfigError(
                f"slab_bytes is {self.slab_bytes}; with extent_bytes={self.extent_bytes} the "
                f"smallest slab that holds one extent has {self.smallest_slab_bytes} bytes"
            )
        if self.extent_count * self.slots_per_extent > MAX_SLOTS:
            raise ConfigError(
                f"slab_bytes is {self.slab_bytes}; more than {MAX_SLOTS} slots of "
                f"{SLOT_ALIGN_BYTES} bytes can not be named"
            )

    @property
    def slots_per_extent(self) -> int:
        """Headers set aside per extent: as many as slots of the smallest size fit."""
        return self.extent_bytes // SLOT_ALIGN_BYTES

    @property
    def _extent_cost_bytes(self) -> int:
        return self.extent_bytes + (self.slots_per_extent + 1) * HEADER_BYTES

    @property
    def smallest_slab_bytes(self) -> int:
        return 3 * PAGE_BYTES + self._extent_cost_bytes + PAGE_BYTES

    @property
    def extent_count(self) -> int:
        # Three pages: the header page and the rounding up of the two tables.
        return max(0, self.slab_bytes - 3 * PAGE_BYTES) // self._extent_cost_bytes

    @property
    def slot_count(self) -> int:
        return self.extent_count * self.slots_per_extent

    @property
    def extent_table_offset(self) -> int:
        return PAGE_BYTES

    @property
    def slot_table_offset(self) -> int:
        return aligned(self.extent_table_offset + self.extent_count * HEADER_BYTES, PAGE_BYTES)

    @property
    def payload_offset(self) -> int:
        return aligned(self.slot_table_offset + self.slot_count * HEADER_BYTES, PAGE_BYTES)

    @property
    def used_bytes(self) -> int:
        """End of the last extent; at most slab_bytes."""
        return self.payload_offset + self.extent_count * self.extent_bytes

    def slots_in_extent(self, slot_bytes: int) -> int:
        """How many slots an extent has when it is cut into slots that hold slot_bytes."""
        return self.extent_bytes // aligned(slot_bytes)

    def extent_of(self, slot: SlotIndex) -> ExtentIndex:
        return ExtentIndex(slot // self.slots_per_extent)

    def slot_at(self, extent: ExtentIndex, index: int) -> SlotIndex:
        assert 0 <= index < self.slots_per_extent
        return SlotIndex(extent * self.slots_per_extent + index)

    def header_offset(self, slot: SlotIndex) -> int:
        """Of the slot's 64-byte header, from the start of the slab."""
        return self.slot_table_offset + slot * HEADER_BYTES

    def slot_offset(self, slot: SlotIndex, slot_bytes: int) -> int:
        """Of the slot's payload, from the start of the slab, in an extent cut for slot_bytes."""
        extent, index = divmod(slot, self.slots_per_extent)
        return self.payload_offset + extent * self.extent_bytes + index * aligned(slot_bytes)

    def holds(self, slot: SlotIndex, slot_bytes: int) -> bool:
        """Whether a slot of this size can exist: for what a peer or a client claims."""
        if not (0 <= slot < self.slot_count and 0 < slot_bytes <= self.extent_bytes):
            return False
        return slot % self.slots_per_extent < self.slots_in_extent(slot_bytes)
