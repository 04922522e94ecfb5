"""Whose turn it is, for FetchCore: located blocks, first without a peer, then in its queue.

add ─▶ unplanned ─plan─▶ queue of a peer ─take_batch─▶ reserved for and read
          ▲                    │
          └──── of_peer ───────┘     a peer failed or is gone: its queue is planned anew
"""

from collections.abc import Mapping

from kvray.core.ids import BlockKey, NodeId
from kvray.core.peers import Peer
from kvray.core.planner import plan
from kvray.core.reads import Fetch, FetchLimits, FetchState


class Turns:
    """Every QUEUED block. What a peer is to bring is counted in its outstanding_bytes from here on
    until the block has come, is lost or dropped: `settle` takes it off.
    """

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._unplanned: dict[BlockKey, Fetch] = {}
        self._queues: dict[Peer, dict[BlockKey, Fetch]] = {}  # none is empty

    @property
    def has_unplanned(self) -> bool:
        return bool(self._unplanned)

    def waiting_peers(self) -> list[Peer]:
        """Those with a queue."""
        return list(self._queues)

    def is_waiting(self, peer: Peer) -> bool:
        """Whether it has a queue."""
        return peer in self._queues

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

    def plan(self, peers: Mapping[NodeId, Peer]) -> list[Fetch]:
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

    def take_batch(self, peer: Peer) -> list[Fetch]:
        """The first blocks of a peer's queue, as many as one read may have: RESERVING."""
        batch: list[Fetch] = []
        batch_bytes = 0
        for fetch in self._queues[peer].values():
            batch_bytes += fetch.bytes
            if batch and batch_bytes > self._limits.batch_bytes:
                break
            batch.append(fetch)
            if len(batch) == self._limits.batch_blocks:
                break
        for fetch in batch:
            self._unqueue(peer, fetch)
            fetch.state = FetchState.RESERVING
        return batch

    def take_all(self, peer: Peer) -> list[Fetch]:
        """All of a peer's queue."""
        fetches = list(self._queues.pop(peer, {}).values())
        for fetch in fetches:
            if fetch.source is not None:
                fetch.sources.append(fetch.source)  # not tried, but last now
        return fetches

    def _unqueue(self, peer: Peer, fetch: Fetch) -> None:
        queue = self._queues[peer]
        del queue[fetch.key]
        if not queue:
            del self._queues[peer]

    def check(self) -> list[Fetch]:
        """Assert that each block is where it belongs. Returns every block here."""
        assert all(self._queues.values()), "an empty queue"
        for key, fetch in self._unplanned.items():
            assert fetch.key == key
            assert fetch.peer is None, "has a peer and is planned anew"
        for peer, queue in self._queues.items():
            for key, fetch in queue.items():
                assert fetch.key == key
                assert fetch.peer is peer, "in the queue of another peer"
        queued = [f for queue in self._queues.values() for f in queue.values()]
        assert all(f.state is FetchState.QUEUED for f in (*self._unplanned.values(), *queued))
        return [*self._unplanned.values(), *queued]


def settle(fetch: Fetch) -> None:
    """The peer does not owe this block any more."""
    if fetch.peer is not None:
        fetch.peer.outstanding_bytes -= fetch.bytes
        fetch.peer = fetch.source = None
