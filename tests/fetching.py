"""A FetchCore with everything around it played by the test: peers, slab, directory, link.

The world keeps its own book of who was told what, which slot is in which state and which read has
ended, and asserts the rules of core.fetch with each command, so that a story and a machine both
stand on it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from kvray.core.break_even import ALWAYS, Worth
from kvray.core.commands import (
    AbandonRead,
    Arrived,
    AskDirectory,
    Coming,
    CommitTargets,
    FetchCommand,
    Headers,
    Missed,
    PeerFailed,
    PostRead,
    QuarantineTargets,
    ReadKind,
    ReleaseTargets,
    ReserveTargets,
    Waiter,
)
from kvray.core.effects import Place
from kvray.core.fetch import FetchCore, FetchLimits, Source
from kvray.core.ids import (
    UNKNOWN_MAKER,
    BlockKey,
    ClientId,
    Epoch,
    ExtentIndex,
    Generation,
    Maker,
    NodeId,
    OpId,
    Origin,
    ReadId,
    SlabId,
    SlotIndex,
    SlotState,
)
from kvray.core.layout import HEADER_BYTES, SLOT_HEADER_DTYPE, Geometry, aligned
from kvray.core.messages import Grant, NodeInfo
from kvray.core.reasons import MissReason

MIB = 1024 * 1024
BLOCK_BYTES = 8_192


def key(n: int) -> BlockKey:
    return BlockKey(n.to_bytes(16, "big"))


def waiter(n: int, *, pid: int = 100) -> Waiter:
    return ClientId(pid, 1, 1), OpId(n)


def node_info(name: str, epoch: int = 1, *, slab_bytes: int = 4 * MIB) -> NodeInfo:
    return NodeInfo(
        node_id=NodeId(name),
        epoch=Epoch(epoch),
        link_name=f"{name}.{epoch}",
        link_metadata=b"",
        slab_id=SlabId(name.encode().ljust(16, b"-")),
        slab_address=1 << 40,
        slab_bytes=slab_bytes,
        extent_bytes=256 * 1024,
        host="here",
        kvray_version="0",
        format_version=1,
    )


class Target(Enum):
    """A slot that FetchCore was given, as the slab would say it."""

    WRITING = "writing"
    READY = "ready"
    QUARANTINE = "quarantine"
    FREE = "free"


@dataclass
class Read:
    """A posted read that has not ended."""

    post: PostRead
    places: tuple[Place, ...]  # what it writes into
    slots: list[SlotIndex]  # what it reads, at the peer
    is_abandoned: bool = False
    torn: set[SlotIndex] = field(default_factory=set)  # rewritten while it is read


@dataclass
class FetchWorld:
    core: FetchCore = field(default_factory=FetchCore)
    limits: FetchLimits = field(default_factory=FetchLimits)
    now_ms: int = 0
    free_slots: int = 1_000
    present: set[BlockKey] = field(default_factory=set)  # a reserve of these is PRESENT
    holds_reservations: bool = False  # reserve() by hand instead of at once
    peers: dict[NodeId, NodeInfo] = field(default_factory=dict)
    known: dict[tuple[NodeId, Epoch], NodeInfo] = field(default_factory=dict)  # of any time
    blocks: dict[tuple[NodeId, SlotIndex], tuple[BlockKey, Generation, int]] = field(
        default_factory=dict
    )
    makers: dict[tuple[NodeId, SlotIndex], Maker] = field(default_factory=dict)  # as blocks
    locates: dict[int, tuple[BlockKey, ...]] = field(default_factory=dict)
    reservations: dict[int, tuple[tuple[BlockKey, int, Maker], ...]] = field(default_factory=dict)
    reads: dict[ReadId, Read] = field(default_factory=dict)
    targets: dict[Place, Target] = field(default_factory=dict)
    waiting: dict[Waiter, set[BlockKey]] = field(default_factory=dict)
    deadlines: dict[Waiter, int] = field(default_factory=dict)
    arrived: list[tuple[Waiter, BlockKey]] = field(default_factory=list)
    missed: list[tuple[Waiter, BlockKey, MissReason]] = field(default_factory=list)
    coming: dict[Waiter, dict[BlockKey, Place]] = field(default_factory=dict)  # last told
    failed_peers: list[PeerFailed] = field(default_factory=list)
    lies: dict[str, int | bytes] = field(default_factory=dict)  # fields of every peer's headers
    content: dict[Place, BlockKey | None] = field(default_factory=dict)  # None: torn or nothing
    next_slot: int = 0

    @classmethod
    def with_peers(cls, *names: str, limits: FetchLimits | None = None) -> "FetchWorld":
        limits = limits or FetchLimits()
        world = cls(core=FetchCore(limits), limits=limits)
        world.roster(*(node_info(name) for name in names))
        return world

    # -- what a test does ------------------------------------------------------------------------

    def roster(self, *infos: NodeInfo) -> None:
        self.peers = {info.node_id: info for info in infos}
        self.known |= {(info.node_id, info.epoch): info for info in infos}
        self.do(self.core.on_roster(self.peers, now_ms=self.now_ms))

    def fill(
        self,
        name: str,
        slot: int,
        block: BlockKey,
        *,
        generation: int = 1,
        maker: Maker = UNKNOWN_MAKER,
    ) -> Source:
        """Put a block into a peer's slab; what the directory would say of it."""
        node_id = NodeId(name)
        self.blocks[node_id, SlotIndex(slot)] = (block, Generation(generation), BLOCK_BYTES)
        for read in self.reads.values():
            if read.post.node_id == node_id and slot in read.slots:
                read.torn.add(SlotIndex(slot))
        epoch = self.peers[node_id].epoch
        self.makers[node_id, SlotIndex(slot)] = maker
        return Source(node_id, epoch, SlotIndex(slot), Generation(generation), BLOCK_BYTES, maker)

    def write_into(self, block: BlockKey) -> None:
        """An engine of this node has committed the block itself."""
        self.present.add(block)
        self.do(self.core.on_present([block]))

    def want(
        self,
        who: Waiter,
        keys: Iterable[BlockKey],
        *,
        within_ms: int = 1_000,
        block_bytes: int = BLOCK_BYTES,
        worth: Worth = ALWAYS,
    ) -> None:
        keys = list(keys)
        self.waiting[who] = set(keys)
        self.deadlines[who] = self.now_ms + within_ms
        self.do(
            self.core.want(
                who,
                [(k, block_bytes) for k in keys],
                worth=worth,
                deadline_ms=self.deadlines[who],
            )
        )

    def forget(self, who: Waiter, keys: Iterable[BlockKey] | None = None) -> None:
        keys = None if keys is None else list(keys)
        self.core.forget(who, keys)
        if keys is None:
            self.waiting.pop(who, None)
        elif who in self.waiting:
            self.waiting[who] -= set(keys)
        self.do([])

    def locate(self, *found: Sequence[Source], locate_id: int | None = None) -> None:
        """Answer a call to the directory, the oldest if none is named."""
        locate_id = min(self.locates) if locate_id is None else locate_id
        keys = self.locates.pop(locate_id)
        assert len(found) == len(keys)
        self.do(self.core.on_located(locate_id, found, now_ms=self.now_ms))

    def reserve(self, batch_id: int) -> None:
        wants = self.reservations.pop(batch_id)
        grants = [self._grant(*want) for want in wants]
        self.do(self.core.on_reserved(batch_id, grants))

    def end_read(
        self, read_id: ReadId | None = None, *, ok: bool = True, with_headers: bool = False
    ) -> None:
        """A read ends, the oldest if none is named. Headers are what the peers' slabs say now;
        with a payload they come if with_headers.
        """
        read_id = min(self.reads) if read_id is None else read_id
        read = self.reads.pop(read_id)
        for place, slot in zip(read.places, read.slots, strict=read.post.kind is ReadKind.PAYLOAD):
            block = self.blocks.get((read.post.node_id, slot))
            is_whole = ok and block is not None and slot not in read.torn
            self.content[place] = block[0] if is_whole and block else None
        if ok and (with_headers or read.post.kind is ReadKind.HEADERS):
            headers = self._headers(read)
            self.do(self.core.on_headers(read_id, headers, now_ms=self.now_ms))
        else:
            self.do(self.core.on_read_done(read_id, ok=ok, now_ms=self.now_ms))

    def tick(self, after_ms: int = 0) -> None:
        self.now_ms += after_ms
        self.do(self.core.on_tick(self.now_ms))
        assert not self.overdue(), "not told by the deadline"
        next_ms = self.core.next_deadline_ms()
        assert next_ms is None or next_ms > self.now_ms, "something due was left"

    # -- what a test looks at --------------------------------------------------------------------

    def overdue(self) -> list[Waiter]:
        return [
            who for who, keys in self.waiting.items() if keys and self.deadlines[who] <= self.now_ms
        ]

    def posted(self, kind: ReadKind) -> list[PostRead]:
        return [read.post for read in self.reads.values() if read.post.kind is kind]

    def states(self) -> list[Target]:
        return list(self.targets.values())

    # -- doing what the core says ----------------------------------------------------------------

    def do(self, commands: list[FetchCommand]) -> None:
        while True:
            for command in commands:
                self._do(command)
            self._assert_limits()
            commands = self.core.advance(self.now_ms)
            if not commands:
                break
        self.core.check()

    def _do(self, command: FetchCommand) -> None:  # noqa: C901, PLR0912
        match command:
            case AskDirectory(locate_id, keys):
                assert len(set(keys)) == len(keys) <= self.limits.max_locate_keys
                self.locates[locate_id] = keys
            case ReserveTargets(batch_id, wants, makers):
                self.reservations[batch_id] = tuple(
                    (block, block_bytes, maker)
                    for (block, block_bytes), maker in zip(wants, makers, strict=True)
                )
                if not self.holds_reservations:
                    self.reserve(batch_id)
            case PostRead():
                self._post(command)
            case AbandonRead(read_id):
                self.reads[read_id].is_abandoned = True
            case CommitTargets(places):
                for place in places:
                    assert self.targets[place] is Target.WRITING
                    assert self.content[place] == place.key, "committed, and is something else"
                    self.targets[place] = Target.READY
            case QuarantineTargets(read_id, places):
                assert self.reads[read_id].is_abandoned
                for place in places:
                    assert self.targets[place] is Target.WRITING
                    self.targets[place] = Target.QUARANTINE
            case ReleaseTargets(places):
                self._release(places)
            case Coming(who, places):
                for place in places:
                    assert place.key in self.waiting.get(who, set()), (
                        "told of what it has not asked"
                    )
                    assert place in self.targets, "told a slot that was not given"
                    self.coming.setdefault(who, {})[place.key] = place
            case Arrived(who, keys):
                for k in keys:
                    self._settle(who, k)
                    self._assert_came_as_told(who, k)
                    self.arrived.append((who, k))
            case Missed(who, keys, reason):
                for k in keys:
                    self._settle(who, k)
                    self.missed.append((who, k, reason))
            case PeerFailed():
                self.failed_peers.append(command)

    def _settle(self, who: Waiter, block: BlockKey) -> None:
        assert block in self.waiting.get(who, set()), "told twice, or never asked"
        self.waiting[who].discard(block)

    def _assert_came_as_told(self, who: Waiter, block: BlockKey) -> None:
        """Where it was said last, unless an engine of this node has written it."""
        ready = [place for place, state in self.targets.items() if state is Target.READY]
        if block not in self.present:
            assert self.coming[who][block] in ready, "came to another slot than was told"

    def _post(self, post: PostRead) -> None:
        peer = self.peers[post.node_id]
        assert post.epoch == peer.epoch, "a read of an epoch that is gone"
        assert post.read_id not in self.reads
        assert 0 < len(post.remote_offsets) == len(post.bytes) <= self.limits.batch_blocks
        geometry = Geometry(peer.slab_bytes, peer.extent_bytes)
        slots = [
            _slot_of(geometry, post.kind, *piece)
            for piece in zip(post.remote_offsets.tolist(), post.bytes.tolist(), strict=True)
        ]
        places: tuple[Place, ...] = ()
        if post.kind is ReadKind.PAYLOAD:
            by_offset = {place.offset: place for place in self.targets}
            places = tuple(by_offset[offset] for offset in post.local_offsets.tolist())
            assert not self._written() & set(places), "two reads into one slot"
            assert all(self.targets[place] is Target.WRITING for place in places)
            assert int(post.bytes.sum()) <= self.limits.batch_bytes or len(post.bytes) == 1
            assert post.header_runs is not None
            assert slots == [
                _slot_of(geometry, ReadKind.HEADERS, offset, HEADER_BYTES)
                for offset in post.header_runs.offsets.tolist()
            ], "headers of other blocks"
        self.reads[post.read_id] = Read(post, places, slots)

    def _written(self) -> set[Place]:
        """Slots that somebody may still write into."""
        return {place for read in self.reads.values() for place in read.places}

    def _release(self, places: Iterable[Place]) -> None:
        for place in places:
            assert self.targets[place] in (Target.WRITING, Target.QUARANTINE)
            assert place not in self._written(), "released while somebody may still write into it"
            self.targets[place] = Target.FREE
            self.free_slots += 1

    def _assert_limits(self) -> None:
        writing = [place.key for place, state in self.targets.items() if state is Target.WRITING]
        assert len(set(writing)) == len(writing), "a block is fetched twice at a time"
        assert len(self.reads) <= self.limits.max_unended_reads
        for node_id in self.peers:
            posts = [read.post for read in self.reads.values()]
            of_peer = [
                p for p in posts if (p.node_id, p.epoch) == (node_id, self.peers[node_id].epoch)
            ]
            assert len(of_peer) <= self.limits.max_reads_per_peer

    def _grant(self, block: BlockKey, block_bytes: int, maker: Maker) -> Place | Grant:
        if block in self.present:
            return Grant.PRESENT
        if not self.free_slots:
            return Grant.FULL
        self.free_slots -= 1
        self.next_slot += 1
        place = Place(
            SlotIndex(self.next_slot),
            Generation(self.next_slot),
            self.next_slot * BLOCK_BYTES,
            block_bytes,
            block,
            Origin.COPY,
            maker,
        )
        self.targets[place] = Target.WRITING
        return place

    def _headers(self, read: Read) -> Headers:
        """What the peer's slab says now. A header of an epoch that is gone may say anything."""
        info = self.known[read.post.node_id, read.post.epoch]
        geometry = Geometry(info.slab_bytes, info.extent_bytes)
        rows = np.zeros(len(read.slots), SLOT_HEADER_DTYPE)
        for row, slot in zip(rows, read.slots, strict=True):
            if (info.node_id, slot) not in self.blocks:
                continue
            block, generation, block_bytes = self.blocks[info.node_id, slot]
            row["key"] = np.void(block)
            row["generation"] = generation
            row["offset"] = geometry.slot_offset(slot, block_bytes)
            row["bytes"] = block_bytes
            row["maker"] = self.makers.get((info.node_id, slot), UNKNOWN_MAKER)
            row["state"] = SlotState.READY
            for name, value in self.lies.items():
                row[name] = np.void(value) if isinstance(value, bytes) else value
        return rows


def _slot_of(geometry: Geometry, kind: ReadKind, offset: int, piece_bytes: int) -> SlotIndex:
    """Which slot a piece of a read is of: the way back through the layout."""
    if kind is ReadKind.HEADERS:
        slot = SlotIndex((offset - geometry.slot_table_offset) // HEADER_BYTES)
        assert geometry.header_offset(slot) == offset
        assert piece_bytes == HEADER_BYTES
        return slot
    extent, rest = divmod(offset - geometry.payload_offset, geometry.extent_bytes)
    slot = geometry.slot_at(ExtentIndex(extent), rest // aligned(piece_bytes))
    assert geometry.slot_offset(slot, piece_bytes) == offset
    return slot
