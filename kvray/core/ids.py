"""The names of things. Each id is a type of its own, so that two of them can not be swapped.

A node is (NodeId, Epoch): every start of a NodeStore is a new epoch, the highest seen wins.
A slot's content is a Generation: 64 bits from one counter per slab, never used twice.
A client is (pid, start time, nonce), not a connection.
"""

from enum import IntEnum
from typing import NewType

import msgspec

NodeId = NewType("NodeId", str)  # Ray's node id, hex
Epoch = NewType("Epoch", int)  # of a NodeStore; greater at every start
Term = NewType("Term", int)  # of the directory; greater at every start
SlabId = NewType("SlabId", bytes)  # 16 random bytes, made with the slab file
SlotIndex = NewType("SlotIndex", int)  # extent_index * slots_per_extent + index inside the extent
ExtentIndex = NewType("ExtentIndex", int)
Generation = NewType("Generation", int)
BlockKey = NewType("BlockKey", bytes)  # KEY_BYTES bytes, see core.keys
Namespace = NewType("Namespace", bytes)  # NAMESPACE_BYTES bytes, see core.keys
Maker = NewType("Maker", int)  # who computed a block, in 64 bits: see `maker_class`
OpId = NewType("OpId", int)  # one operation of one client; unique within the client's nonce
ReadId = NewType("ReadId", int)  # one transfer; unique within a NodeStore's life

KEY_BYTES = 16
NAMESPACE_BYTES = 16
SLAB_ID_BYTES = 16
UNKNOWN_MAKER = Maker(0)  # of an engine that has not computed its canary, and of no block of it


def maker_class(maker: Maker) -> int:
    """What computes as this maker does: build, hardware, backend, layout, threads, as a digest of
    32 bits. The other 32 are a digest of the bytes that it computed for its canary. So two engines
    of one class that computed the same, bit for bit, are one maker, and need no comparison.
    """
    return maker >> 32


class ClientId(msgspec.Struct, frozen=True, array_like=True):
    """One process that uses a NodeStore: an EngineCore, or one of its workers.

    pid and start_ticks (field 22 of /proc/PID/stat) name the process for ever, since a pid is
    reused but not with the same start; nonce tells several engines in one process apart.
    """

    pid: int
    start_ticks: int
    nonce: int


class Role(IntEnum):
    """What a client is. An ENGINE asks and commits; a WORKER only maps the slab and copies."""

    ENGINE = 1
    WORKER = 2


class Origin(IntEnum):
    """Where a block in a slab came from. COPY: fetched from a peer; lives in the probation part."""

    ORIGINAL = 0
    COPY = 1


class SlotState(IntEnum):
    """The life of a slot, as its header in the slab says it.

    ABSENT ──reserve──▶ WRITING ──commit──▶ READY ──evict──▶ ABSENT
                           │
                           ├──abandon, every writer has reported──▶ ABSENT
                           └──its writer may still be at work──▶ QUARANTINE ──gone──▶ ABSENT
    """

    ABSENT = 0
    WRITING = 1
    READY = 2
    QUARANTINE = 3
