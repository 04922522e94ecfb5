"""Two processes for test_onesided_read.py: one rewrites its slab without pause, one reads from it.

    owner    a slab with real headers; every write is not READY and next generation, payload,
             key, offset, bytes, READY (rule 3)
    reader   a LinkThread; believes a block only after its header (rule 2)

Where a block is, the reader learns by looking into the owner's headers, which stands in for the
directory: a hint that was true at some moment, and like a directory's it names only what had been
READY by then (with blocks that are still being written rule 2 alone lets wrong ones through). Every
payload is full of its own generation, so a block that is torn, or is another one, shows.
"""

import mmap
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvray.core.commands import NO_OFFSETS, PostRead, ReadKind
from kvray.core.header_runs import header_runs
from kvray.core.ids import ReadId, SlotIndex, SlotState
from kvray.core.layout import HEADER_BYTES, SLOT_HEADER_DTYPE, Geometry
from kvray.core.messages import NodeInfo
from kvray.node.peers import Ending, ReadEnded
from tests.link_node import EVENT_LIMIT_S, LinkNode

SLOT_BYTES = 256 << 10
SLOTS = 64
BATCH = 16
GEOMETRY = Geometry(slab_bytes=24 << 20, extent_bytes=SLOTS * SLOT_BYTES)

Words = npt.NDArray[np.uint64]


class Slab:
    """The file as one process sees it."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), GEOMETRY.slab_bytes)
        whole = np.frombuffer(mapping, np.uint8)
        self.address = int(whole.ctypes.data)
        table = whole[GEOMETRY.slot_table_offset :][: SLOTS * HEADER_BYTES]
        self.headers: npt.NDArray[Any] = table.view(SLOT_HEADER_DTYPE)
        self.offsets = [GEOMETRY.slot_offset(SlotIndex(slot), SLOT_BYTES) for slot in range(SLOTS)]
        self.payloads: list[Words] = [
            whole[offset : offset + SLOT_BYTES].view(np.uint64) for offset in self.offsets
        ]

    def write(self, slot: int, generation: int) -> None:
        header = self.headers[slot]
        header["state"] = SlotState.WRITING
        header["generation"] = generation
        self.payloads[slot][:] = generation
        header["key"] = np.void(generation.to_bytes(16, "little"))
        header["offset"] = self.offsets[slot]
        header["bytes"] = SLOT_BYTES
        header["state"] = SlotState.READY


def _node(slab: Slab, name: str, transports: str) -> LinkNode:
    return LinkNode(name, slab_address=slab.address, geometry=GEOMETRY, transports=transports)


def owner(pipe: Connection, path: Path, name: str, transports: str, *, pause_s: float) -> None:
    """Sends its NodeInfo, rewrites until it hears something, sends how often it has."""
    slab = Slab(path)
    for slot in range(SLOTS):
        slab.write(slot, slot + 1)
    node = _node(slab, name, transports)
    pipe.send(node.info)
    chosen = random.Random(1)
    generation = SLOTS
    while not pipe.poll(pause_s):
        generation += 1
        slab.write(chosen.randrange(SLOTS), generation)
    pipe.send(generation - SLOTS)
    node.thread.close()


@dataclass
class Counts:
    """accepted + stale are all blocks that were read. wrong: torn, or another block."""

    accepted: int = 0
    stale: int = 0
    wrong: int = 0
    wrong_accepted: int = 0
    wrong_if_header_came_first: int = 0
    failed: list[str] = field(default_factory=list)


def reader(
    pipe: Connection, path: Path, name: str, transports: str, *, duration_s: float, info: NodeInfo
) -> None:
    """Reads for a while, sends what it has counted."""
    hints = Slab(path).headers
    own_path = path.with_suffix(".reader")
    slab = Slab(own_path)
    node = _node(slab, name, transports)
    node.connect(info)
    pipe.send(_read_for(duration_s, node, slab, hints, info))
    node.thread.close()


def _read_for(
    duration_s: float, node: LinkNode, slab: Slab, hints: npt.NDArray[Any], info: NodeInfo
) -> Counts:
    counts = Counts()
    chosen = random.Random(2)
    offsets = np.array(slab.offsets, np.uint64)
    until = time.monotonic() + duration_s
    read_id = 1
    while time.monotonic() < until:
        slots, wanted = _hints(hints, chosen)
        reads = [
            _headers(read_id, info, slots),  # too early: what rule 2 forbids
            _payload(read_id + 1, info, offsets[slots], offsets[:BATCH], slots),
        ]
        read_id += 2
        ends = [_done(node, read) for read in reads]
        if any(end.ending is not Ending.DONE for end in ends):
            counts.failed += [end.reason for end in ends if end.reason]
            continue
        for index, (slot, generation) in enumerate(zip(slots, wanted, strict=True)):
            payload = slab.payloads[index]
            wrong = not bool((payload == generation).all())
            early, late = (_proves(end.headers[index], slot, generation) for end in ends)
            counts.accepted += late
            counts.stale += not late
            counts.wrong += wrong
            counts.wrong_accepted += late and wrong
            counts.wrong_if_header_came_first += early and wrong
    return counts


def _hints(headers: npt.NDArray[Any], chosen: random.Random) -> tuple[list[int], list[int]]:
    """Some slots, each with a generation that was READY when the state was looked at, second."""
    found: dict[int, int] = {}
    while len(found) < BATCH:
        slot = chosen.randrange(SLOTS)
        generation = int(headers[slot]["generation"])
        if headers[slot]["state"] == SlotState.READY:
            found[slot] = generation
    return list(found), list(found.values())


def _done(node: LinkNode, read: PostRead) -> ReadEnded:
    node.thread.submit(read)
    ended = node.events.get(timeout=EVENT_LIMIT_S)
    assert isinstance(ended, ReadEnded), ended
    assert ended.read_id == read.read_id
    return ended


def _proves(header: Any, slot: int, generation: int) -> bool:
    """As core.fetch does it."""
    return bool(
        header["state"] == SlotState.READY
        and header["generation"] == generation
        and header["key"].tobytes() == generation.to_bytes(16, "little")
        and header["offset"] == GEOMETRY.slot_offset(SlotIndex(slot), SLOT_BYTES)
        and header["bytes"] == SLOT_BYTES
    )


def _payload(
    read_id: int, info: NodeInfo, remote: Words, local: Words, slots: Sequence[int]
) -> PostRead:
    """Comes with its headers, as they are when it has come."""
    sizes = np.full(BATCH, SLOT_BYTES, np.uint64)
    return PostRead(
        ReadId(read_id),
        info.node_id,
        info.epoch,
        ReadKind.PAYLOAD,
        remote,
        local,
        sizes,
        header_runs(_header_offsets(slots)),
    )


def _header_offsets(slots: Sequence[int]) -> Words:
    return np.array([GEOMETRY.header_offset(SlotIndex(slot)) for slot in slots], np.uint64)


def _headers(read_id: int, info: NodeInfo, slots: Sequence[int]) -> PostRead:
    offsets = _header_offsets(slots)
    sizes = np.full(BATCH, HEADER_BYTES, np.uint64)
    return PostRead(
        ReadId(read_id), info.node_id, info.epoch, ReadKind.HEADERS, offsets, NO_OFFSETS, sizes
    )
