"""FetchCore: getting blocks from peers, each step with a deadline.

    want ─▶ LOCATING ─found─▶ QUEUED ─▶ RESERVING ─slot─▶ RESERVED ─▶ READING ─came─▶ VERIFYING
               │                │ ▲         │                │           │                │
               │                │ └─────────┼── next source ─┴───────────┴────────────────┤
               │                │           │                                     header fits
               └─ nobody has it, no source ─┴─▶ MISSED                          ARRIVED ◀─┘
                  left, no slot, nobody wants it any more

Whoever waits is told the slot when the block is RESERVED, before it is read, so that it can begin
with what has arrived while the rest is on its way. A block that is asked of the next source gets
another slot, which is told again.

A block is fetched once, however many wait for it. Payload and headers are two reads, the second
posted when the first has ended (rule 2); only a block whose header then names key, generation,
offset and bytes and says READY is committed. A read that is late is abandoned: its targets stay in
quarantine until it has really ended (core.reads).

Runs, hits and replies are core.lookups' matter: this file knows keys and waiters. From whom a
block is read is core.planner's to say.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from kvray.core.break_even import ALWAYS, Worth, chain_pays, source_pays
from kvray.core.commands import (
    CommitTargets,
    FetchCommand,
    Headers,
    PeerFailed,
    ReadKind,
    ReleaseTargets,
    ReserveTargets,
    Waiter,
)
from kvray.core.effects import Place
from kvray.core.ghosts import Why
from kvray.core.ids import BlockKey, NodeId, ReadId
from kvray.core.locates import Locates
from kvray.core.messages import Grant, NodeInfo
from kvray.core.peers import Peer, Source
from kvray.core.reads import (
    Fetch,
    FetchLimits,
    FetchState,
    Read,
    Reads,
    proofs,
    sources_of,
    targets_of,
)
from kvray.core.reasons import MissReason
from kvray.core.trusted import Trusted
from kvray.core.turns import Turns, settle
from kvray.core.waits import Waits

__all__ = ["FetchCore", "FetchLimits", "FetchState", "Source"]

MAX_SOURCES_TRIED = 4  # of one block: more than one deadline has time for

# Nothing has been asked of a peer yet: such a block is dropped when nobody waits for it any more.
_UNASKED = frozenset(
    {FetchState.LOCATING, FetchState.QUEUED, FetchState.RESERVING, FetchState.RESERVED}
)

# By ghosts.Why.
_GONE = (MissReason.NEVER_SEEN, MissReason.EVICTED, MissReason.PEER_GONE)
assert len(_GONE) == len(Why)
_PLACED = frozenset({FetchState.RESERVED, FetchState.READING, FetchState.VERIFYING})


class FetchCore:
    """All fetches of one NodeStore. Each event returns commands, to be done in order; when they
    are done the caller asks `advance` for more, until there are none. In between it may `forget`
    what a miss has made worthless, and nothing is reserved for that.

    Every key of a waiter is named in exactly one Arrived or Missed, at its deadline at the latest
    (on_tick), unless the waiter has forgotten it. Before that it may be named in Coming.
    """

    def __init__(self, limits: FetchLimits | None = None) -> None:
        self._limits = limits or FetchLimits()
        self._fetches: dict[BlockKey, Fetch] = {}  # every block that is neither ARRIVED nor MISSED
        self._waits = Waits()
        self._locates = Locates(self._limits)
        self._turns = Turns(self._limits)
        self._reads = Reads(self._limits)
        self._peers: dict[NodeId, Peer] = {}
        self._has_lost = False
        self._commands: list[FetchCommand] = []
        self._counters = dict.fromkeys(("fetched_blocks", "fetched_bytes", "stale_blocks"), 0)

    @property
    def has_peers(self) -> bool:
        return bool(self._peers)

    @property
    def has_lost_peers(self) -> bool:
        """Whether there are none now, and were some."""
        return self._has_lost and not self._peers

    @property
    def is_clogged(self) -> bool:
        """As many abandoned reads as there may be have not ended: nothing is fetched."""
        return self._reads.is_clogged

    @property
    def is_busy(self) -> bool:
        """Whether any block is under way, or a slot of one that was forgotten is to be given back;
        if not, there is nothing for `advance` to do.
        """
        return bool(self._fetches or self._commands)

    def __contains__(self, key: object) -> bool:
        """Whether this block is being fetched."""
        return key in self._fetches

    def wanted_by(self, waiter: Waiter) -> list[BlockKey]:
        """What this waiter waits for."""
        return self._waits.keys_of(waiter)

    def waiters(self) -> list[Waiter]:
        """All who wait for something."""
        return self._waits.waiters()

    # -- waiters ---------------------------------------------------------------------------------

    def pays(self, wanted_bytes: int, worth: Worth, now_ms: int) -> bool:
        """Whether blocks of so many bytes in all are worth a want; see core.break_even."""
        rates = (peer.rate.bytes_per_ms(now_ms) for peer in self._peers.values())
        steps = (self._locates.overhead, self._reads.headers_overhead)
        overhead_ms = sum(step.mean_ms(now_ms) for step in steps)
        return chain_pays(wanted_bytes, worth, rates, overhead_ms=overhead_ms)

    def want(
        self,
        waiter: Waiter,
        wants: Iterable[tuple[BlockKey, int]],
        *,
        worth: Worth = ALWAYS,
        trusted: Trusted | None = None,
        deadline_ms: int,
    ) -> list[FetchCommand]:
        """Fetch these (key, payload bytes), no key twice, until deadline_ms (absolute). trusted: by
        whom they must have been computed; None: by anybody.

        A block that is under way already is joined. What can not even be tried is Missed at once.
        """
        assert waiter not in self._waits, "one want a waiter"
        full = self.is_clogged
        for key, want_bytes in wants:
            fetch = self._fetches.get(key)
            if fetch is None:
                if full or len(self._fetches) >= self._limits.max_fetches:
                    self._waits.tell_missed(waiter, key, MissReason.OVERLOADED)
                    continue
                whose = None if trusted is None else (trusted,)
                self._fetches[key] = fetch = Fetch(key, want_bytes, worth=worth, trusted=whose)
                self._locates.add(fetch)
            elif fetch.bytes != want_bytes:
                self._waits.tell_missed(waiter, key, MissReason.OTHER_SIZE)
                continue
            else:
                fetch.worth = fetch.worth.or_more(worth)
                fetch.trust(trusted)
            self._waits.join(waiter, key, deadline_ms)
            if fetch.target is not None:
                self._waits.tell_coming(waiter, fetch.target)
        return self._take()

    def forget(self, waiter: Waiter, keys: Iterable[BlockKey] | None = None) -> None:
        """The waiter does not wait for these keys any more (None: for none); it hears nothing of
        them. Reads that have been posted go on. May be repeated.
        """
        leaving = self._waits.keys_of(waiter) if keys is None else keys
        for key in self._waits.leave(waiter, leaving):
            fetch = self._fetches[key]
            if fetch.state in _UNASKED:
                self._end(fetch, MissReason.NEVER_SEEN)

    def on_present(self, keys: Iterable[BlockKey]) -> list[FetchCommand]:
        """An engine of this node has committed these: whoever waits for them need not any more."""
        for key in keys:
            fetch = self._fetches.get(key)
            if fetch is not None and fetch.state in _UNASKED:
                self._end(fetch, None)
        return self._take()

    # -- what the steps report -------------------------------------------------------------------

    def on_located(
        self,
        locate_id: int,
        found: Sequence[Sequence[Source]],
        *,
        gone: bytes = b"",
        now_ms: int,
    ) -> list[FetchCommand]:
        """found: for each key of the AskDirectory its sources, preferred ones first. gone: for each
        key a ghosts.Why, or nothing. An answer that comes after its deadline is ignored.
        """
        fetches = self._locates.take_answered(locate_id, now_ms)
        rates = {peer: peer.rate.bytes_per_ms(now_ms) for peer in self._peers.values()}
        gone = gone if len(gone) == len(fetches) else bytes(len(fetches))
        for fetch, sources, why in zip(fetches, found if fetches else (), gone, strict=True):
            if fetch.state is FetchState.LOCATING:
                reason = _GONE[why]
                fetch.sources, fetch.reason = self._believable(fetch, sources, rates, reason)
                self._queue(fetch)
        return self._take()

    def on_locate_failed(self, locate_id: int) -> list[FetchCommand]:
        """The directory did not answer, or not in time."""
        self._fail_locate(self._locates.take(locate_id))
        return self._take()

    def on_reserved(self, batch_id: int, targets: Sequence[Place | Grant]) -> list[FetchCommand]:
        """targets: what StoreCore.reserve has answered, one a want of the ReserveTargets."""
        peer, fetches = self._turns.take_reserving(batch_id)
        is_lost = self._peers.get(peer.node_id) is not peer
        batch: list[Fetch] = []
        spare: list[Place] = []
        for fetch, target in zip(fetches, targets, strict=True):
            if fetch.state is not FetchState.RESERVING:  # dropped meanwhile
                if isinstance(target, Place):
                    spare.append(target)
            elif not isinstance(target, Place):
                self._end(fetch, None if target is Grant.PRESENT else MissReason.SLAB_FULL)
            elif is_lost:
                spare.append(target)
                self._try_next(fetch, MissReason.PEER_GONE)
            else:
                fetch.target = target
                batch.append(fetch)
                self._waits.come(target)
        if spare:
            self._commands.append(ReleaseTargets(tuple(spare)))
        if batch:
            self._turns.line_up(peer, batch)
        return self._take()

    def on_read_done(self, read_id: ReadId, *, ok: bool, now_ms: int) -> list[FetchCommand]:
        """A read of a payload has ended, or a read of headers has failed, or an abandoned read of
        either kind has ended at last.
        """
        if (freed := self._reads.end_abandoned(read_id)) is not None:
            self._commands.extend(freed)
            return self._take()
        read = self._reads.end(read_id, came=ok, now_ms=now_ms)
        if ok:
            assert read.kind is ReadKind.PAYLOAD, "headers that have come are for on_headers"
            for fetch in read.fetches:
                fetch.state = FetchState.VERIFYING
            self._commands.append(self._reads.post_headers(read, now_ms=now_ms))
        else:
            self._reads.counters["failed"] += 1
            self._commands.append(ReleaseTargets(read.targets))
            self._fail(read, f"a read of its {read.kind.value} failed", now_ms)
        return self._take()

    def on_headers(self, read_id: ReadId, headers: Headers, *, now_ms: int) -> list[FetchCommand]:
        """A read of HEADERS has come, or one of PAYLOAD with its headers. headers:
        SLOT_HEADER_DTYPE rows, one for each piece, read after the payload had come.
        """
        if (freed := self._reads.end_abandoned(read_id)) is not None:
            self._commands.extend(freed)
            return self._take()
        read = self._reads.end(read_id, came=True, now_ms=now_ms)
        read.peer.succeed()
        are_proven = proofs(read, headers)
        proven = list(compress(read.fetches, are_proven))
        stale = list(compress(read.fetches, ~are_proven))
        if proven:
            self._counters["fetched_blocks"] += len(proven)
            proven_bytes = sum(fetch.bytes for fetch in proven)
            self._counters["fetched_bytes"] += proven_bytes
            read.peer.fetched_bytes += proven_bytes
            self._commands.append(CommitTargets(targets_of(proven)))
            self._bring(proven)
        if stale:
            self._counters["stale_blocks"] += len(stale)
            self._commands.append(ReleaseTargets(targets_of(stale)))
        for fetch in stale:
            self._try_next(fetch, MissReason.EVICTED)
        return self._take()

    def on_roster(self, nodes: Mapping[NodeId, NodeInfo], *, now_ms: int) -> list[FetchCommand]:
        """The peers that may be read from, without this node. What is under way from any other
        (node, epoch) is given up.
        """
        for peer in list(self._peers.values()):
            info = nodes.get(peer.node_id)
            if info is not None and info.epoch == peer.epoch:
                continue
            del self._peers[peer.node_id]
            self._has_lost = True
            for read in self._reads.of_peer(peer):
                self._commands.extend(self._reads.abandon(read, now_ms=now_ms))
                for fetch in read.fetches:
                    self._try_next(fetch, MissReason.PEER_GONE)
            for fetch in self._take_turns(peer):
                self._try_next(fetch, MissReason.PEER_GONE)
        for node_id, info in nodes.items():
            if node_id not in self._peers:
                self._peers[node_id] = Peer(info, rate_sample_bytes=self._limits.rate_sample_bytes)
        return self._take()

    def on_tick(self, now_ms: int) -> list[FetchCommand]:
        """Give up what is due; see next_deadline_ms."""
        for fetches in self._locates.take_late(now_ms):
            self._fail_locate(fetches)
        for read in self._reads.take_late(now_ms):
            self._commands.extend(self._reads.abandon(read, now_ms=now_ms))
            self._fail(read, f"a read of its {read.kind.value} does not end", now_ms)
        for waiter in self._waits.take_due(now_ms):
            for key in self._waits.keys_of(waiter):
                self._waits.tell_missed(waiter, key, MissReason.DEADLINE)
            self.forget(waiter)
        return self._take()

    def next_deadline_ms(self) -> int | None:
        """When on_tick has something to do; None while nothing is under way."""
        deadlines = (self._waits, self._locates, self._reads)
        return min((at_ms for d in deadlines if (at_ms := d.next_ms()) is not None), default=None)

    # -- starting steps --------------------------------------------------------------------------

    def advance(self, now_ms: int) -> list[FetchCommand]:
        """Start what can be started. To be called again until it returns nothing: while it names
        misses it reserves nothing, since they may make other wants worthless.
        """
        self._commands.extend(self._locates.next_calls(now_ms))
        if self._turns.has_unplanned:
            peers = {
                node_id: peer
                for node_id, peer in self._peers.items()
                if self._reads.may_ask(peer, now_ms)
            }
            for fetch in self._turns.plan(peers, now_ms):
                self._end(fetch, MissReason.PEER_GONE)
        if not self._waits.has_missed:
            self._read(now_ms)
            self._reserve()
        return self._take()

    def _read(self, now_ms: int) -> None:
        """What has its slots and whose turn it is."""
        for peer in self._turns.peers_in_line():
            while self._turns.is_in_line(peer) and self._reads.has_room(peer):
                if batch := self._turns.take_next(peer):
                    for fetch in batch:
                        fetch.state = FetchState.READING
                    self._commands.append(self._reads.post_payload(peer, batch, now_ms=now_ms))

    def _reserve(self) -> None:
        for peer in self._turns.queued_peers():
            while self._turns.may_reserve(peer, has_room=self._reads.has_room(peer)):
                batch_id, batch = self._turns.reserve(peer)
                wants = tuple((fetch.key, fetch.bytes) for fetch in batch)
                makers = tuple(source.maker for source in sources_of(batch))
                self._commands.append(ReserveTargets(batch_id, wants, makers))

    # -- ending steps ----------------------------------------------------------------------------

    def _bring(self, proven: Iterable[Fetch]) -> None:
        """READING or VERIFYING, so in no queue and in no call: ARRIVED."""
        for fetch in proven:
            del self._fetches[fetch.key]
            settle(fetch)
            fetch.state = FetchState.ARRIVED
            self._waits.arrive(fetch.key)

    def _fail_locate(self, fetches: Iterable[Fetch]) -> None:
        for fetch in fetches:
            if fetch.state is FetchState.LOCATING:
                self._end(fetch, MissReason.DIRECTORY_SILENT)

    def _fail(self, read: Read, reason: str, now_ms: int) -> None:
        """A peer did not do what it should: ask others."""
        peer = read.peer
        if avoid_ms := peer.fail(now_ms):
            self._commands.append(PeerFailed(peer.node_id, peer.epoch, avoid_ms, reason))
        for fetch in (*read.fetches, *self._take_turns(peer)):
            self._try_next(fetch, MissReason.PEER_GONE)

    def _take_turns(self, peer: Peer) -> list[Fetch]:
        """What waits for its turn at a peer that is not to be asked; its slots are given away."""
        fetches = self._turns.take_all(peer)
        if targets := targets_of(fetches):
            self._commands.append(ReleaseTargets(targets))
        return fetches

    def _try_next(self, fetch: Fetch, reason: MissReason) -> None:
        """The block does not come from the peer that was chosen; its target is given away."""
        settle(fetch)
        fetch.target = None
        fetch.reason = reason
        self._queue(fetch)

    def _queue(self, fetch: Fetch) -> None:
        """To be planned; or its end, if it has no source or is not wanted any more."""
        if fetch.sources and self._waits.is_wanted(fetch.key):
            self._turns.add(fetch)
        else:
            self._end(fetch, fetch.reason)

    def _end(self, fetch: Fetch, reason: MissReason | None) -> None:
        """The block's way ends here: ARRIVED if reason is None. All who wait for it are told.

        A call to the directory and a batch that it is part of find out by its state.
        """
        del self._fetches[fetch.key]
        if fetch.state is FetchState.LOCATING:
            self._locates.discard(fetch)
        self._turns.discard(fetch)
        settle(fetch)
        if fetch.state is FetchState.RESERVED and fetch.target is not None:
            self._commands.append(ReleaseTargets((fetch.target,)))
        if reason is None:
            fetch.state = FetchState.ARRIVED
            self._waits.arrive(fetch.key)
        else:
            fetch.state = FetchState.MISSED
            self._waits.miss(fetch.key, reason)

    # -- private ---------------------------------------------------------------------------------

    def _believable(
        self,
        fetch: Fetch,
        sources: Sequence[Source],
        rates: Mapping[Peer, float | None],
        reason: MissReason,
    ) -> tuple[list[Source], MissReason]:
        """The sources that can be tried and pay, one a peer; and the reason if there are none:
        the given one, if nothing is wrong with any.
        """
        believable: dict[NodeId, Source] = {}
        for source in sources:
            peer = self._peers.get(source.node_id)
            if peer is None or peer.epoch != source.epoch:
                reason = MissReason.PEER_GONE
                continue
            if source.bytes != fetch.bytes:
                reason = MissReason.OTHER_SIZE
            elif not peer.can_hold(source):
                reason = MissReason.EVICTED  # nobody's block lies there
            elif not fetch.may_come_from(source):
                reason = MissReason.UNTRUSTED
            elif not source_pays(fetch.bytes, peer.outstanding_bytes, fetch.worth, rates[peer]):
                reason = MissReason.BELOW_BREAK_EVEN
            else:
                believable.setdefault(source.node_id, source)
        return list(believable.values())[:MAX_SOURCES_TRIED], reason

    def _take(self) -> list[FetchCommand]:
        """The commands of this event: first what to do, then who is to be told."""
        commands, self._commands = self._commands, []
        commands.extend(self._waits.take_told())
        return commands

    def snapshot(self) -> dict[str, Any]:
        """Plain data, for people."""
        states = [fetch.state for fetch in self._fetches.values()]
        return {
            "blocks": {state.value: states.count(state) for state in FetchState if state in states},
            "waits": self._waits.snapshot(),
            "turns": self._turns.snapshot(),
            "reads": self._reads.snapshot(),
            "locates": len(self._locates),
            "locate_durations": list(self._locates.durations.counts),
            "read_durations": list(self._reads.durations.counts),
            "peers": {
                peer.node_id: {
                    "epoch": peer.epoch,
                    "outstanding_bytes": peer.outstanding_bytes,
                    "abandoned_reads": self._reads.owed_by(peer),
                    "avoid_until_ms": peer.avoid_until_ms,
                    "bytes_per_ms": peer.rate.last_known(),
                    "fetched_bytes": peer.fetched_bytes,
                }
                for peer in self._peers.values()
            },
            "fetch_busy_ms": self._reads.counters["busy_ms"],
        } | self._counters

    def check(self) -> None:
        """Assert that every block under way is in exactly one place that brings it further, that
        those places hold nothing else, and that all counts are right.
        """
        self._waits.check(self._fetches)
        assert len(self._fetches) <= self._limits.max_fetches
        places = [*self._locates.check(), *self._turns.check(), *self._reads.check()]
        live = [fetch for fetch in places if self._fetches.get(fetch.key) is fetch]
        assert len(live) == len(self._fetches), "a block in no place, or in two"
        ended = (FetchState.ARRIVED, FetchState.MISSED)
        for fetch in places:
            is_live = self._fetches.get(fetch.key) is fetch
            assert is_live == (fetch.state not in ended), "lost, or ended and still there"
        outstanding_bytes = dict.fromkeys(self._peers.values(), 0)
        for fetch in live:
            assert self._waits.is_wanted(fetch.key) or fetch.state not in _UNASKED, "for nobody"
            assert (fetch.peer is None) == (fetch.source is None)
            has_target = fetch.state in _PLACED
            assert has_target == (fetch.target is not None)
            if fetch.peer in outstanding_bytes:
                outstanding_bytes[fetch.peer] += fetch.bytes
        for peer, peer_bytes in outstanding_bytes.items():
            assert peer.outstanding_bytes == peer_bytes, peer.node_id
