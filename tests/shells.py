"""The shell of a NodeCore, played by a test: a slab of a few arrays, and commands done in order.

What a core asks for is noted here and held to what core.commands promises. When a call or a read
ends is for whoever plays the rest of the world: tests.nodes by hand, tests.sim by dice.
"""

import numpy as np

from kvray.core.announcing import AnnouncingLimits
from kvray.core.codec import encode
from kvray.core.commands import (
    AbandonRead,
    CallDirectory,
    CompareBlocks,
    ConnectPeer,
    DisconnectPeer,
    Drop,
    Headers,
    Log,
    NodeCommand,
    PostRead,
    Restart,
    Send,
    TakeEpoch,
    TookOver,
    WatchProcess,
    WriteClient,
)
from kvray.core.effects import Effect, MarkGeneration, WriteExtent, WriteHeader
from kvray.core.fetch import FetchLimits
from kvray.core.header_page import ClientRow
from kvray.core.ids import (
    BlockKey,
    Epoch,
    Generation,
    NodeId,
    ReadId,
    SlabId,
    SlotIndex,
    SlotState,
)
from kvray.core.layout import EXTENT_DTYPE, FORMAT_VERSION, SLOT_HEADER_DTYPE, Geometry
from kvray.core.messages import HelloReply, LocalAnswer, NodeInfo
from kvray.core.node import NodeCore
from kvray.core.store import StoreCore
from kvray.node.comparing import Compared, compare

BLOCK_BYTES = 4_096
Slot = tuple[SlotIndex, Generation, int]  # slot, generation, offset


def key(n: int) -> BlockKey:
    return BlockKey(n.to_bytes(16, "big"))


def stamp(block: BlockKey, block_bytes: int = BLOCK_BYTES) -> bytes:
    """What a block of this key holds."""
    return block * (block_bytes // len(block))


class Slab:
    """The file: it outlives its node."""

    def __init__(
        self, name: str, *, slot_count: int = 32, format_version: int = FORMAT_VERSION
    ) -> None:
        self.format_version = format_version
        extent_bytes = 64 * 1024
        needed_bytes = Geometry(1 << 22, extent_bytes).smallest_slab_bytes
        slab_bytes = needed_bytes + (slot_count // 16 - 1) * (extent_bytes + 2_048)
        self.geometry = Geometry(slab_bytes, extent_bytes)
        self.slab_id = SlabId(name.encode().ljust(16, b"."))
        self.memory = bytearray(slab_bytes)
        self.headers: Headers = np.zeros(self.geometry.slot_count, SLOT_HEADER_DTYPE)
        self.extents: Headers = np.zeros(self.geometry.extent_count, EXTENT_DTYPE)
        self.clients: dict[int, WriteClient] = {}
        self.generation_mark = 0
        self.epoch = 0

    def apply(self, effect: Effect | WriteClient) -> None:
        if isinstance(effect, WriteHeader):
            writers = {*self.clients, 0xFFFF}
            assert effect.writer in writers or effect.state is SlotState.ABSENT, "writer unknown"
            row = self.headers[effect.slot]
            assert effect.state is not SlotState.READY or row["generation"] == effect.generation
            row["generation"] = effect.generation
            row["key"] = np.void(effect.key)
            row["offset"] = effect.offset
            row["bytes"] = effect.bytes
            row["state"] = effect.state
            row["origin"] = effect.origin
            row["writer"] = effect.writer
            row["extent_generation"] = effect.extent_generation
            row["maker"] = effect.maker
        elif isinstance(effect, WriteExtent):
            self.extents[effect.extent]["extent_generation"] = effect.extent_generation
            self.extents[effect.extent]["slot_bytes"] = effect.slot_bytes
        elif isinstance(effect, MarkGeneration):
            self.generation_mark = effect.high_water
        elif effect.client is None:
            of_row = (self.headers["writer"] == effect.row) & (self.headers["state"] != 0)
            held = self.headers["state"][of_row]
            assert set(held.tolist()) <= {SlotState.READY}, "its slots are still being written"
            del self.clients[effect.row]
        else:
            assert effect.row not in self.clients
            self.clients[effect.row] = effect

    def state(self, slot: SlotIndex) -> SlotState:
        return SlotState(int(self.headers[slot]["state"]))

    def states(self) -> dict[SlotState, int]:
        return {
            state: count
            for state in SlotState
            if state and (count := int((self.headers["state"] == state).sum()))
        }

    def block(self, offset: int, block_bytes: int = BLOCK_BYTES) -> bytes:
        return bytes(self.memory[offset : offset + block_bytes])


class Shell:
    """One life of a NodeStore: a NodeCore, the slab that it has found, and what it has asked for.

    The epoch is taken here; the first event, NodeCore.start, is the caller's.
    """

    def __init__(
        self,
        name: str,
        slab: Slab,
        *,
        now_ms: int,
        wall_clock_offset_ms: int,
        limits: FetchLimits | None = None,
        announcing_limits: AnnouncingLimits | None = None,
        requires_proof: bool | None = None,
        audit_rate: float = 0.0,
    ) -> None:
        self.name = name
        self.slab = slab
        slab.epoch = max(slab.epoch + 1, now_ms + wall_clock_offset_ms)
        self.store = StoreCore(slab.geometry, generation_mark=slab.generation_mark)
        self.store.adopt(slab.extents.copy(), slab.headers.copy(), now_ms=now_ms)
        rows = [
            ClientRow(row, entry.client, entry.role, entry.engine_nonce)
            for row, entry in slab.clients.items()
            if entry.client is not None
        ]
        self.sent: dict[int, list[LocalAnswer]] = {}
        self.dropped: dict[int, str] = {}
        self.watched: set[tuple[int, int]] = set()
        self.calls: dict[int, CallDirectory] = {}
        self.reads: dict[ReadId, PostRead] = {}
        self.abandoned: set[ReadId] = set()
        self.connected: dict[NodeId, NodeInfo] = {}
        self.taken_over: dict[int, tuple[BlockKey, ...]] = {}
        self.comparisons: dict[int, CompareBlocks] = {}
        self.lines: list[Log] = []
        self.restarts: list[str] = []
        self.linking: list[Epoch] = []
        self.is_named = False  # after its first epoch, which is taken here already
        self.core = NodeCore(
            self._info(Epoch(slab.epoch)),
            self.store,
            clients=rows,
            wall_clock_offset_ms=wall_clock_offset_ms,
            now_ms=now_ms,
            fetch_limits=limits,
            announcing_limits=announcing_limits,
            requires_proof=requires_proof,
            audit_rate=audit_rate,
        )

    def compare(self, comparison_id: int) -> Compared:
        """What the thread of a NodeStore does, at this moment."""
        whole = np.frombuffer(self.slab.memory, np.uint8)
        return compare(whole, self.slab.headers, self.comparisons.pop(comparison_id))

    def _info(self, epoch: Epoch) -> NodeInfo:
        geometry = self.slab.geometry
        return NodeInfo(
            node_id=NodeId(self.name),
            epoch=epoch,
            link_name=f"{self.name}.{epoch}",
            link_metadata=b"",
            slab_id=self.slab.slab_id,
            slab_address=0,
            slab_bytes=geometry.slab_bytes,
            extent_bytes=geometry.extent_bytes,
            host="here",
            kvray_version="0",
            format_version=self.slab.format_version,
        )

    def _do(self, command: NodeCommand) -> None:  # noqa: C901, PLR0912
        match command:
            case WriteHeader() | WriteExtent() | MarkGeneration() | WriteClient():
                self.slab.apply(command)
            case Send(session_id, message, with_fd):
                assert with_fd == isinstance(message, HelloReply)
                encode(message)  # asserts that the other side would take it
                self.sent.setdefault(session_id, []).append(message)
            case Drop(session_id, reason):
                self.dropped[session_id] = reason
            case WatchProcess(pid, start_ticks):
                self.watched.add((pid, start_ticks))
            case CallDirectory(call_id):
                encode(command.message)
                assert call_id not in self.calls
                self.calls[call_id] = command
            case ConnectPeer(info):
                assert info.node_id not in self.connected
                self.connected[info.node_id] = info
            case DisconnectPeer(node_id, epoch):
                assert self.connected.pop(node_id).epoch == epoch
                left = {
                    r for r, p in self.reads.items() if (p.node_id, p.epoch) == (node_id, epoch)
                }
                assert left <= self.abandoned, "a read of a peer that is disconnected"
            case TakeEpoch(epoch):
                assert not self.connected
                assert epoch > self.slab.epoch or not self.is_named, (
                    "an epoch that was taken before"
                )
                self.is_named = True
                self.linking.append(epoch)
                self.slab.epoch = epoch
            case PostRead(read_id, node_id, epoch):
                assert self.connected[node_id].epoch == epoch
                for offset in command.local_offsets.tolist():
                    row = self.slab.headers[self.slab.headers["offset"] == offset]
                    assert SlotState.WRITING in row["state"], (
                        "reads into a slot that is not its own"
                    )
                self.reads[read_id] = command
            case AbandonRead(read_id):
                assert read_id in self.reads
                self.abandoned.add(read_id)
            case CompareBlocks(comparison_id):
                assert comparison_id not in self.comparisons
                self.comparisons[comparison_id] = command
            case TookOver(call_id, keys):
                self.taken_over[call_id] = keys
            case Log():
                self.lines.append(command)
            case Restart(reason):
                self.restarts.append(reason)
