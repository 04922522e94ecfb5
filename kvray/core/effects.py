"""What StoreCore wants written into the slab, and the place of a block.

The shell applies effects in the order in which they were made, before any answer leaves that was
given after them. They are msgspec structs and not dataclasses because a reserve of 512 keys makes
1,024 of them: 45 ns each instead of 510.

Two promises make a kill between any two stores of the slab harmless, whatever order the shell
writes the fields of one header in:

    a header that becomes READY, or stops being READY, changes in nothing but its state;
    every other field changes only while the header says ABSENT.

The exception is garbage that a restart has found: it is blanked (generation 0). It did not fit
before, and does not fit half blanked.
"""

import msgspec

from kvray.core.ids import (
    UNKNOWN_MAKER,
    BlockKey,
    ExtentIndex,
    Generation,
    Maker,
    Origin,
    SlotIndex,
    SlotState,
)


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where one block is. Made once, when its slot is reserved, and handed out ever after."""

    slot: SlotIndex
    generation: Generation
    offset: int  # of the payload, from the start of the slab
    bytes: int  # of the payload; the slot may be larger, up to the next page
    key: BlockKey
    origin: Origin
    maker: Maker = UNKNOWN_MAKER


class WriteHeader(msgspec.Struct, frozen=True, gc=False):
    """Write the header of one slot. Never the same generation in a second block."""

    slot: SlotIndex
    generation: Generation
    key: BlockKey
    offset: int
    bytes: int
    state: SlotState
    origin: Origin
    writer: int  # row of the client table, or layout.WRITER_NODE
    extent_generation: int
    maker: Maker = UNKNOWN_MAKER


class WriteExtent(msgspec.Struct, frozen=True, gc=False):
    """Cut an extent anew. Every header of it is ABSENT when this is made."""

    extent: ExtentIndex
    extent_generation: int
    slot_bytes: int  # of its slots from now on; a multiple of layout.SLOT_ALIGN_BYTES


class MarkGeneration(msgspec.Struct, frozen=True, gc=False):
    """Raise the mark in the header page: generations below high_water may have been used."""

    high_water: int


Effect = WriteHeader | WriteExtent | MarkGeneration
