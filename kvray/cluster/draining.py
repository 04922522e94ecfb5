"""A node leaves without a loss: the others take over what it has, then it goes.

    its READY blocks ──listed elsewhere too──▶ whoever has a copy keeps it
                     └──only here────────────▶ a peer with free room fetches it
                            └── all peers are full: lost, and said so

In rounds, since what engines were storing when the draining began is READY a moment later. Nothing
here has to be undone if it breaks off: the node stores nothing more and answers as before, and
whoever drains it again goes on from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvray.actors import caller
from kvray.cluster.placement import gather
from kvray.core.codec import decode, encode, pack_keys, unpack_locations
from kvray.core.ids import BlockKey, Epoch, NodeId
from kvray.core.messages import MAX_CALL_BYTES, MAX_LOCATE_KEYS, Locate, LocateReply
from kvray.node.actor import MAX_TAKE_OVER_KEYS, TAKE_OVER_DEADLINE_S

MAX_ROUNDS = 16  # a round leaves at most what was being stored, or what was evicted meanwhile
FULL_PENALTY_BYTES = 1 << 50  # off what a peer seems to have free: more than any slab has
BATCH_BYTES = 64 << 20  # two reads of core.fetch: the peer's own requests wait no longer than that
ANSWER_DEADLINE_S = TAKE_OVER_DEADLINE_S + 5.0  # the call itself, on a busy machine

Ask = Callable[..., Any]  # (method, *arguments) of one actor, with a deadline


@dataclass(frozen=True, slots=True)
class Drained:
    """What became of the blocks of a node that was drained. lost: for which nobody had room."""

    node_id: str
    blocks: int
    fetched: int
    kept: int  # a copy was elsewhere already
    lost: int


@dataclass(slots=True)
class _Peer:
    """A node that takes over. free_bytes: a guess, to deal the blocks out by."""

    node_id: str
    store: Any
    free_bytes: int
    batches: list[list[BlockKey]] = field(default_factory=list)


class Drain:
    """One node's. store, directory: how to ask them; peers: handles, and their free bytes."""

    def __init__(
        self,
        node_id: str,
        epoch: int,
        *,
        store: Ask,
        directory: Ask,
        peers: Mapping[str, tuple[Any, int]],
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self._asker = (NodeId(node_id), Epoch(epoch))
        self._store = store
        self._directory = directory
        self._peers = [_Peer(name, handle, free) for name, (handle, free) in peers.items()]
        self._progress = progress
        self._sizes: dict[BlockKey, int] = {}  # of every block that it ever listed
        self._safe: set[BlockKey] = set()
        self._fetched = 0

    def run(self) -> Drained:
        for _ in range(MAX_ROUNDS):
            keys, sizes = self._store("drain", asked_by=caller())
            self._sizes |= zip(keys, sizes, strict=True)
            left = [key for key in keys if key not in self._safe]
            if not left or not self._round(left):
                break
        return Drained(
            node_id=self._asker[0],
            blocks=len(self._sizes),
            fetched=self._fetched,
            kept=len(self._safe) - self._fetched,
            lost=len(self._sizes) - len(self._safe),
        )

    def _round(self, left: Sequence[BlockKey]) -> bool:
        """Whether anything has become safe."""
        before = len(self._safe)
        holders = self._holders(left)
        self._deal_held(holders)
        self._run_batches(is_fetch=False)
        for batch in self._batches([key for key in left if key not in holders]):
            roomiest = max(self._peers, key=lambda p: p.free_bytes, default=None)
            if roomiest is not None:
                roomiest.batches.append(batch)
                roomiest.free_bytes -= sum(self._sizes[key] for key in batch)
        self._run_batches(is_fetch=True)
        return len(self._safe) > before

    def _holders(self, keys: Sequence[BlockKey]) -> dict[BlockKey, str]:
        """Who else has a block, as the directory believes."""
        known = {peer.node_id for peer in self._peers}
        found: dict[BlockKey, str] = {}
        for start in range(0, len(keys), MAX_LOCATE_KEYS):
            asked = keys[start : start + MAX_LOCATE_KEYS]
            data = self._directory("locate", encode(Locate(*self._asker, pack_keys(asked))))
            reply = decode(data, max_bytes=MAX_CALL_BYTES, expect=LocateReply)
            for index, node, _, size, _, _ in unpack_locations(reply.locations):
                key, name = asked[index], reply.nodes[node]
                if name in known and size == self._sizes[key]:
                    found.setdefault(key, name)
        return found

    def _deal_held(self, holders: Mapping[BlockKey, str]) -> None:
        for peer in self._peers:
            held = [key for key, name in holders.items() if name == peer.node_id]
            peer.batches += self._batches(held)

    def _batches(self, keys: Sequence[BlockKey]) -> list[list[BlockKey]]:
        batches: list[list[BlockKey]] = []
        batch_bytes = 0
        for key in keys:
            batch_bytes += self._sizes[key]
            if not batches or len(batches[-1]) == MAX_TAKE_OVER_KEYS or batch_bytes > BATCH_BYTES:
                batches.append([])
                batch_bytes = self._sizes[key]
            batches[-1].append(key)
        return batches

    def _run_batches(self, *, is_fetch: bool) -> None:
        """One batch for each peer at a time. A peer that does not take all of one is full, or has
        been slow: it gets no more in this round, and in the next ones less than others.
        """
        while any(peer.batches for peer in self._peers):
            asked = {p.node_id: p.batches.pop(0) for p in self._peers if p.batches}
            answers = gather(
                {
                    peer.node_id: peer.store.take_over.remote(
                        batch, [self._sizes[key] for key in batch]
                    )
                    for peer in self._peers
                    if (batch := asked.get(peer.node_id))
                },
                ANSWER_DEADLINE_S,
            )
            for peer in self._peers:
                if peer.node_id not in asked:
                    continue
                taken = answers[peer.node_id] or []
                self._safe.update(taken)
                if is_fetch:
                    self._fetched += len(taken)
                    if len(taken) < len(asked[peer.node_id]):
                        peer.batches.clear()  # full, or slow: dealt anew in the next round
                        peer.free_bytes -= FULL_PENALTY_BYTES
            if self._progress is not None:
                self._progress(f"{len(self._safe)} of {len(self._sizes)} blocks are safe")
