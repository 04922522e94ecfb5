"""The reads of FetchCore: under way, abandoned; and the limit on all of them.

    post PAYLOAD ─▶ end ─▶ post HEADERS ─▶ end
          │   └─── with its headers ────────▶ end
          └────── late ──┬───────┘
                         ▼
                      abandoned ─▶ end, however late: the targets are free only now

An abandoned read is one that has not ended. Each read, abandoned or not, counts against the limit
until it has ended, so quarantine is bounded by it. What becomes of a block is core.fetch's to say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvray.core.break_even import ALWAYS, RATE_SAMPLE_BYTES, Overhead, Worth
from kvray.core.commands import (
    NO_OFFSETS,
    AbandonRead,
    Headers,
    PostRead,
    QuarantineTargets,
    ReadKind,
    ReleaseTargets,
)
from kvray.core.deadlines import Deadlines
from kvray.core.durations import Durations
from kvray.core.effects import Place
from kvray.core.header_runs import Offsets, header_runs
from kvray.core.ids import BlockKey, Epoch, NodeId, ReadId, SlotState
from kvray.core.layout import HEADER_BYTES
from kvray.core.messages import MAX_LOCATE_KEYS
from kvray.core.peers import Peer, Source
from kvray.core.planner import FETCH_BATCH_BYTES, MAX_BATCH_BLOCKS
from kvray.core.reasons import MissReason
from kvray.core.trusted import Trusted

Bools = npt.NDArray[np.bool_]

_READY = int(SlotState.READY)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Every limit of a FetchCore."""

    # Blocks between want and their end: 32 full lookups, about 25 MB of objects.
    max_fetches: int = 32_768
    # Reads that are under way, or abandoned and not ended. Each holds at most batch_bytes of
    # slots, so this is also the most that can lie in quarantine: 1 GiB.
    max_unended_reads: int = 32
    # The payload of one batch comes while the headers of the one before are proven. Abandoned ones
    # count, so that one silent peer can not use up max_unended_reads.
    max_reads_per_peer: int = 2
    # Batches whose slots are reserved before their reads can begin: 256 MiB of a peer, 512 MiB in
    # all (and one a peer on top, so that none is held up by the others). They are lost to others
    # until they have come. The load of a longer chain begins later, which still hides all of it.
    # Few blocks: one is 4 us when others go for it, of the thread that answers engines.
    max_batches_ahead_per_peer: int = 8
    max_batches_ahead: int = 16
    max_blocks_ahead: int = 512
    # Calls to the directory at a time; keys that come meanwhile share the next one.
    max_locates: int = 8
    max_locate_keys: int = MAX_LOCATE_KEYS
    locate_deadline_ms: int = 300  # a call takes 1 ms, its p99 on a busy machine is 10
    payload_deadline_ms: int = 1_000  # 32 MiB at 0.4 GB/s (TCP, the slowest seen) are 80 ms
    headers_deadline_ms: int = 300  # 4 MiB at most, with what lies between them
    rate_sample_bytes: int = RATE_SAMPLE_BYTES
    batch_bytes: int = FETCH_BATCH_BYTES
    # The first of several batches of a peer that brings nothing yet: 2 ms at 4 GB/s, and vLLM
    # needs about as long to begin a load.
    first_batch_bytes: int = FETCH_BATCH_BYTES // 4
    batch_blocks: int = MAX_BATCH_BLOCKS


class FetchState(Enum):
    """How far a block is; see the picture in core.fetch."""

    LOCATING = "locating"
    QUEUED = "queued"
    RESERVING = "reserving"
    RESERVED = "reserved"
    READING = "reading"
    VERIFYING = "verifying"
    ARRIVED = "arrived"
    MISSED = "missed"


class Fetch(msgspec.Struct, eq=False):
    """One block under way."""

    key: BlockKey
    bytes: int
    state: FetchState = FetchState.LOCATING
    sources: list[Source] = []  # not tried yet
    peer: Peer | None = None  # chosen; from QUEUED on
    source: Source | None = None  # the block at this peer
    target: Place | None = None  # from RESERVED on
    reason: MissReason = MissReason.NEVER_SEEN  # why the last source did not bring it
    worth: Worth = ALWAYS
    # By whom a source must have been computed, one of these being enough. None: by anybody.
    trusted: tuple[Trusted, ...] | None = None

    def may_come_from(self, source: Source) -> bool:
        """Whether anybody who waits for the block would take it."""
        trusted = self.trusted
        return trusted is None or any(who.accepts(source.maker) for who in trusted)

    def trust(self, who: Trusted | None) -> None:
        """One more waits for it."""
        if who is None:
            self.trusted = None
        elif self.trusted is not None and who not in self.trusted:
            self.trusted = (*self.trusted, who)


class Read(msgspec.Struct, eq=False):
    """One read that is waited for."""

    read_id: ReadId
    kind: ReadKind
    peer: Peer
    fetches: list[Fetch]
    payload_offsets: Offsets  # at the peer, whatever the kind
    posted_ms: int

    @property
    def targets(self) -> tuple[Place, ...]:
        return targets_of(self.fetches)


class _Abandoned(msgspec.Struct, eq=False):
    """A read that nobody waits for and that has not ended."""

    peer: Peer
    places: tuple[Place, ...]  # what it may still write into; none if it reads headers


class Reads:
    """All reads of one FetchCore, with their deadlines."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._reads: dict[ReadId, Read] = {}
        self._abandoned: dict[ReadId, _Abandoned] = {}
        # How many of these each epoch of a node owes us. Not in Peer: a peer that has left the
        # roster may come back to it in the same epoch.
        self._owed: dict[tuple[NodeId, Epoch], int] = {}
        self._deadlines: Deadlines[ReadId] = Deadlines()
        self._last_id = 0
        self._busy_since_ms = 0
        self.headers_overhead = Overhead()
        self.durations = Durations()  # of payloads that have come, with their headers if along
        self.counters = dict.fromkeys(("reads", "failed", "abandoned", "busy_ms"), 0)

    @property
    def is_clogged(self) -> bool:
        """As many abandoned reads as there may be have not ended: nothing can be read."""
        return len(self._abandoned) >= self._limits.max_unended_reads

    def has_room(self, peer: Peer) -> bool:
        """Whether one more read of this peer may begin."""
        unended = len(self._reads) + len(self._abandoned)
        return (
            unended < self._limits.max_unended_reads
            and peer.under_way + self.owed_by(peer) < self._limits.max_reads_per_peer
        )

    def may_ask(self, peer: Peer, now_ms: int) -> bool:
        """Whether there will be room for this peer when its reads under way have ended."""
        return (
            now_ms >= peer.avoid_until_ms and self.owed_by(peer) < self._limits.max_reads_per_peer
        )

    def owed_by(self, peer: Peer) -> int:
        """Reads of this peer that were abandoned and have not ended."""
        return self._owed.get((peer.node_id, peer.epoch), 0)

    # -- a read's life ---------------------------------------------------------------------------

    def post_payload(self, peer: Peer, fetches: list[Fetch], *, now_ms: int) -> PostRead:
        """Read these blocks, each with a source at this peer, into their targets."""
        assert self.has_room(peer)
        offsets = peer.payload_offsets(sources_of(fetches))
        read = self._post(ReadKind.PAYLOAD, peer, fetches, offsets, now_ms)
        return PostRead(
            read.read_id,
            peer.node_id,
            peer.epoch,
            ReadKind.PAYLOAD,
            offsets,
            np.array([place.offset for place in read.targets], np.uint64),
            np.array([fetch.bytes for fetch in fetches], np.uint64),
            header_runs(peer.header_offsets(sources_of(fetches))),
        )

    def post_headers(self, payload: Read, *, now_ms: int) -> PostRead:
        """Read the headers of what has come."""
        peer, fetches = payload.peer, payload.fetches
        read = self._post(ReadKind.HEADERS, peer, fetches, payload.payload_offsets, now_ms)
        return PostRead(
            read.read_id,
            peer.node_id,
            peer.epoch,
            ReadKind.HEADERS,
            peer.header_offsets(sources_of(fetches)),
            NO_OFFSETS,
            np.full(len(fetches), HEADER_BYTES, np.uint64),
        )

    def end(self, read_id: ReadId, *, came: bool, now_ms: int) -> Read:
        """The read is over, for better or worse, or nobody waits for it any more."""
        read = self._reads.pop(read_id)
        self._deadlines.discard(read_id)
        read.peer.under_way -= 1
        if read.kind is ReadKind.PAYLOAD:
            read_bytes = sum(fetch.bytes for fetch in read.fetches) if came else 0
            if came:
                self.durations.add(now_ms - read.posted_ms)
            read.peer.end_payload(read_bytes, read.posted_ms, now_ms=now_ms)
        elif came:
            self.headers_overhead.add(now_ms - read.posted_ms, now_ms=now_ms)
        if not self._reads:
            self.counters["busy_ms"] += now_ms - self._busy_since_ms
        return read

    def abandon(
        self, read: Read, *, now_ms: int
    ) -> Iterator[AbandonRead | QuarantineTargets | ReleaseTargets]:
        """Wait no more for this read. Only its end frees what it may still write into."""
        self.end(read.read_id, came=False, now_ms=now_ms)
        self.counters["abandoned"] += 1
        self._owed[read.peer.node_id, read.peer.epoch] = self.owed_by(read.peer) + 1
        yield AbandonRead(read.read_id)
        if read.kind is ReadKind.PAYLOAD:
            self._abandoned[read.read_id] = _Abandoned(read.peer, read.targets)
            yield QuarantineTargets(read.read_id, read.targets)
        else:
            # The payload has ended, so nobody writes into the targets any more.
            self._abandoned[read.read_id] = _Abandoned(read.peer, ())
            yield ReleaseTargets(read.targets)

    def end_abandoned(self, read_id: ReadId) -> list[ReleaseTargets] | None:
        """None if it is not an abandoned read; else what its end sets free."""
        abandoned = self._abandoned.pop(read_id, None)
        if abandoned is None:
            return None
        peer = abandoned.peer
        self._owed[peer.node_id, peer.epoch] -= 1
        if not self._owed[peer.node_id, peer.epoch]:
            del self._owed[peer.node_id, peer.epoch]
        return [ReleaseTargets(abandoned.places)] if abandoned.places else []

    def take_late(self, now_ms: int) -> list[Read]:
        """Those whose deadline has come. The caller abandons them."""
        return [self._reads[read_id] for read_id in self._deadlines.take_due(now_ms)]

    def of_peer(self, peer: Peer) -> list[Read]:
        return [read for read in self._reads.values() if read.peer is peer]

    def next_ms(self) -> int | None:
        return self._deadlines.next_ms()

    def _post(
        self, kind: ReadKind, peer: Peer, fetches: list[Fetch], offsets: Offsets, now_ms: int
    ) -> Read:
        if not self._reads:
            self._busy_since_ms = now_ms
        self._last_id += 1
        read = Read(ReadId(self._last_id), kind, peer, fetches, offsets, now_ms)
        self._reads[read.read_id] = read
        deadline_ms = (
            self._limits.payload_deadline_ms
            if kind is ReadKind.PAYLOAD
            else self._limits.headers_deadline_ms
        )
        self._deadlines.set(read.read_id, now_ms + deadline_ms)
        peer.under_way += 1
        self.counters["reads"] += 1
        return read

    # -- for people and tests --------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        return {
            "under_way": len(self._reads),
            "abandoned": len(self._abandoned),
            "quarantined_bytes": sum(
                place.bytes for read in self._abandoned.values() for place in read.places
            ),
        } | {f"{name}_count": count for name, count in self.counters.items() if name != "busy_ms"}

    def check(self) -> list[Fetch]:
        """Assert that reads, deadlines, peers and limits agree. Returns every block in a read."""
        assert len(self._deadlines) == len(self._reads), "a read without end, or an end of none"
        assert all(read_id in self._deadlines for read_id in self._reads)
        self._deadlines.check()
        assert not self._reads.keys() & self._abandoned.keys(), "waited for and abandoned"
        unended = len(self._reads) + len(self._abandoned)
        assert unended <= self._limits.max_unended_reads, "more unended reads than there may be"
        under_way: dict[Peer, int] = {}
        for read in self._reads.values():
            under_way[read.peer] = under_way.get(read.peer, 0) + 1
        for peer, count in under_way.items():
            assert peer.under_way == count
            assert count + self.owed_by(peer) <= self._limits.max_reads_per_peer
        owed: dict[tuple[NodeId, Epoch], int] = {}
        for lost in self._abandoned.values():
            name = (lost.peer.node_id, lost.peer.epoch)
            owed[name] = owed.get(name, 0) + 1
        assert owed == self._owed
        written = [place for read in self._reads.values() for place in read.targets]
        written += [place for lost in self._abandoned.values() for place in lost.places]
        slots = [place.slot for place in written]
        assert len(set(slots)) == len(slots), "two reads write into one slot"
        for read in self._reads.values():
            state = FetchState.READING if read.kind is ReadKind.PAYLOAD else FetchState.VERIFYING
            for fetch in read.fetches:
                assert fetch.state is state
                assert fetch.peer is read.peer
                assert fetch.target is not None, "a read without a target"
        return [fetch for read in self._reads.values() for fetch in read.fetches]


def targets_of(fetches: Sequence[Fetch]) -> tuple[Place, ...]:
    return tuple(fetch.target for fetch in fetches if fetch.target is not None)


def sources_of(fetches: Sequence[Fetch]) -> list[Source]:
    return [fetch.source for fetch in fetches if fetch.source is not None]


def proofs(read: Read, headers: Headers) -> Bools:
    """For each block of a read whether its header says that the payload was whole and its own
    (rule 2). headers: SLOT_HEADER_DTYPE rows, read after the payload had come.
    """
    fetches, sources = read.fetches, sources_of(read.fetches)
    assert len(headers) == len(sources) == len(fetches)
    keys = np.frombuffer(b"".join([fetch.key for fetch in fetches]), headers.dtype["key"])
    generations = np.array([source.generation for source in sources], np.uint64)
    makers = np.array([source.maker for source in sources], np.uint64)
    sizes_bytes = np.array([fetch.bytes for fetch in fetches], np.uint64)
    proven: Bools = headers["key"] == keys
    proven &= headers["generation"] == generations
    proven &= headers["offset"] == read.payload_offsets
    proven &= headers["bytes"] == sizes_bytes
    proven &= headers["maker"] == makers
    proven &= headers["state"] == _READY
    return proven
