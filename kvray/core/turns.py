"""Whose turn it is, for FetchCore: located blocks, until they are read.

add ─▶ unplanned ─plan─▶ queue of a peer ─reserve─▶ RESERVING ─line_up─▶ in line ─take_next─▶ read
          ▲                    │                                            │
          └──── take_all ──────┴────────────────────────────────────────────┘
                a peer failed or is gone: what waits for it is planned anew

Slots are reserved a few batches ahead of the reads, so that whoever waits can be told early where
the whole of a chain will be, and begins to load its head while its tail is on its way.
"""

from collections import deque
from collections.abc import Mapping

from kvray.core.ids import BlockKey, NodeId
from kvray.core.peers import Peer
from kvray.core.planner import plan
from kvray.core.reads import Fetch, FetchLimits, FetchState


class Turns:
    """Every QUEUED, RESERVING and RESERVED block. What a peer is to bring is counted in its
    outstanding_bytes from here on until the block has come, is lost or dropped: `settle` takes it
    off.
    """

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._unplanned: dict[BlockKey, Fetch] = {}
        self._queues: dict[Peer, dict[BlockKey, Fetch]] = {}  # none is empty
        self._reserving: dict[int, tuple[Peer, list[Fetch]]] = {}  # by batch id
        self._lines: dict[Peer, deque[list[Fetch]]] = {}  # batches with slots; none is empty
        self._ahead: dict[Peer, int] = {}  # batches of a peer in the two above; none is 0
        self._last_batch_id = 0

    @property
    def has_unplanned(self) -> bool:
        return bool(self._unplanned)

    def queued_peers(self) -> list[Peer]:
        """Those with a queue."""
        return list(self._queues)

    def peers_in_line(self) -> list[Peer]:
        """Those with batches that could be read now."""
        return list(self._lines)

    def is_in_line(self, peer: Peer) -> bool:
        """Whether it has such a batch."""
        return peer in self._lines

    def may_reserve(self, peer: Peer, *, has_room: bool) -> bool:
        """Whether slots may be reserved for a batch of its queue, if it has one. has_room: a read
        of this peer could begin now, so that other peers' batches ahead never hold it up.
        """
        ahead = self._ahead.get(peer, 0)
        return peer in self._queues and (
            (not ahead and has_room)
            or (
                ahead < self._limits.max_batches_ahead_per_peer
                and sum(self._ahead.values()) < self._limits.max_batches_ahead
                and self._count_blocks_ahead() < self._limits.max_blocks_ahead
            )
        )

    def add(self, fetch: Fetch) -> None:
        """Its sources are hints of peers that the next plan may know."""
        fetch.state = FetchState.QUEUED
        self._unplanned[fetch.key] = fetch

    def discard(self, fetch: Fetch) -> None:
        """Out of its queue, if it is in one."""
        if fetch.peer is None:
            self._unplanned.pop(fetch.key, None)
        elif fetch.key in self._queues.get(fetch.peer, ()):
            self._unqueue(fetch.peer, fetch)

    def plan(self, peers: Mapping[NodeId, Peer], now_ms: int) -> list[Fetch]:
        """Put each unplanned block into the queue of one of these peers. Returns those without a
        source among them, which are nowhere then.
        """
        fetches = list(self._unplanned.values())
        self._unplanned.clear()
        holders = [
            [
                source.node_id
                for source in fetch.sources
                if source.node_id in peers and peers[source.node_id].epoch == source.epoch
            ]
            for fetch in fetches
        ]
        batches = plan(
            [fetch.bytes for fetch in fetches],
            holders,
            {node_id: peer.outstanding_bytes for node_id, peer in peers.items()},
            slowness=_slowness(peers, now_ms),
            batch_bytes=self._limits.batch_bytes,
            batch_blocks=self._limits.batch_blocks,
        )
        for batch in batches:
            peer = peers[batch.node_id]
            peer.outstanding_bytes += batch.bytes
            queue = self._queues.setdefault(peer, {})
            for index in batch.indices:
                fetch = fetches[index]
                fetch.peer = peer
                fetch.source = next(s for s in fetch.sources if s.node_id == batch.node_id)
                fetch.sources.remove(fetch.source)
                queue[fetch.key] = fetch
        return [fetch for fetch, node_ids in zip(fetches, holders, strict=True) if not node_ids]

    def reserve(self, peer: Peer) -> tuple[int, list[Fetch]]:
        """The first blocks of a peer's queue, as many as one read may have: RESERVING. With the
        id of the batch.

        If more follow, the first of a peer that brings nothing yet are fewer: they come soon, and
        what they prove lets the load of the whole chain begin.
        """
        queue = self._queues[peer]
        batch = self._head(queue, self._limits.batch_bytes)
        is_first = not peer.under_way and peer not in self._ahead
        if is_first and len(batch) < len(queue):
            first_bytes = min(self._limits.first_batch_bytes, self._limits.batch_bytes)
            batch = self._head(queue, first_bytes)
        for fetch in batch:
            self._unqueue(peer, fetch)
            fetch.state = FetchState.RESERVING
        self._last_batch_id += 1
        self._reserving[self._last_batch_id] = (peer, batch)
        self._ahead[peer] = self._ahead.get(peer, 0) + 1
        return self._last_batch_id, batch

    def take_reserving(self, batch_id: int) -> tuple[Peer, list[Fetch]]:
        """Its slots have been given, or not. Some of it may have been dropped meanwhile."""
        peer, batch = self._reserving.pop(batch_id)
        self._leave_ahead(peer, 1)
        return peer, batch

    def line_up(self, peer: Peer, batch: list[Fetch]) -> None:
        """These have a target and wait for their read: RESERVED."""
        for fetch in batch:
            fetch.state = FetchState.RESERVED
        self._lines.setdefault(peer, deque()).append(batch)
        self._ahead[peer] = self._ahead.get(peer, 0) + 1

    def take_next(self, peer: Peer) -> list[Fetch]:
        """The next batch of a peer's line, without what has been dropped meanwhile."""
        line = self._lines[peer]
        batch = line.popleft()
        if not line:
            del self._lines[peer]
        self._leave_ahead(peer, 1)
        return [fetch for fetch in batch if fetch.state is FetchState.RESERVED]

    def take_all(self, peer: Peer) -> list[Fetch]:
        """All that waits in a peer's line (with a target) and in its queue."""
        line = self._lines.pop(peer, ())
        self._leave_ahead(peer, len(line))
        fetches = [fetch for batch in line for fetch in batch if fetch.state is FetchState.RESERVED]
        fetches += self._queues.pop(peer, {}).values()
        for fetch in fetches:
            if fetch.source is not None:
                fetch.sources.append(fetch.source)  # not tried, but last now
        return fetches

    def _head(self, queue: Mapping[BlockKey, Fetch], batch_bytes: int) -> list[Fetch]:
        """As many of the first blocks as fit, at least one."""
        batch: list[Fetch] = []
        left_bytes = batch_bytes
        for fetch in queue.values():
            left_bytes -= fetch.bytes
            if batch and (left_bytes < 0 or len(batch) == self._limits.batch_blocks):
                break
            batch.append(fetch)
        return batch

    def _count_blocks_ahead(self) -> int:
        in_line = sum(len(batch) for line in self._lines.values() for batch in line)
        return in_line + sum(len(batch) for _, batch in self._reserving.values())

    def _leave_ahead(self, peer: Peer, count: int) -> None:
        left = self._ahead.pop(peer, 0) - count
        if left:
            self._ahead[peer] = left

    def _unqueue(self, peer: Peer, fetch: Fetch) -> None:
        queue = self._queues[peer]
        del queue[fetch.key]
        if not queue:
            del self._queues[peer]

    def check(self) -> list[Fetch]:
        """Assert that each block is where it belongs. Returns every block here; among those with
        a batch may be some that were dropped.
        """
        assert all(self._queues.values()), "an empty queue"
        assert all(self._lines.values()), "an empty line"
        ahead = [peer for peer, _ in self._reserving.values()]
        ahead += [peer for peer, line in self._lines.items() for _ in line]
        assert self._ahead == {peer: ahead.count(peer) for peer in ahead}
        assert max(self._ahead.values(), default=0) <= self._limits.max_batches_ahead_per_peer
        assert len(ahead) <= self._limits.max_batches_ahead + len(self._ahead)
        for key, fetch in self._unplanned.items():
            assert fetch.key == key
            assert fetch.peer is None, "has a peer and is planned anew"
        for peer, queue in self._queues.items():
            for key, fetch in queue.items():
                assert fetch.key == key
                assert fetch.peer is peer, "in the queue of another peer"
        queued = [f for queue in self._queues.values() for f in queue.values()]
        assert all(f.state is FetchState.QUEUED for f in (*self._unplanned.values(), *queued))
        in_line = [fetch for line in self._lines.values() for batch in line for fetch in batch]
        reserving = [fetch for _, batch in self._reserving.values() for fetch in batch]
        return [*self._unplanned.values(), *queued, *reserving, *in_line]

    def snapshot(self) -> dict[str, int]:
        """Batches whose slots are being reserved, and those whose slots are."""
        return {
            "reserving": len(self._reserving),
            "reserved": sum(len(line) for line in self._lines.values()),
        }


def _slowness(peers: Mapping[NodeId, Peer], now_ms: int) -> dict[NodeId, float]:
    """ms a byte. A peer that has not been measured is taken for as fast as the fastest."""
    rates = {node_id: peer.rate.bytes_per_ms(now_ms) for node_id, peer in peers.items()}
    fastest = max((rate for rate in rates.values() if rate), default=1.0)
    return {node_id: 1.0 / (rate or fastest) for node_id, rate in rates.items()}


def settle(fetch: Fetch) -> None:
    """The peer does not owe this block any more."""
    if fetch.peer is not None:
        fetch.peer.outstanding_bytes -= fetch.bytes
        fetch.peer = fetch.source = None
