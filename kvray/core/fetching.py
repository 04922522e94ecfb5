"""Fetches at work: what FetchCore says, done with the slab, the lookups and the directory.

FetchCore knows neither slots nor sessions nor messages. This is the wiring between it and those
who do; what can only be done outside (reads, calls) comes out as NodeCommands.
"""

from collections.abc import Iterator, Mapping, Sequence

from kvray.core.codec import pack_keys, unpack_locations
from kvray.core.commands import (
    AbandonRead,
    Arrived,
    AskDirectory,
    CallDirectory,
    Coming,
    CommitTargets,
    FetchCommand,
    Headers,
    Log,
    Missed,
    NodeCommand,
    PeerFailed,
    PostRead,
    QuarantineTargets,
    ReleaseTargets,
    ReserveTargets,
)
from kvray.core.effects import Place
from kvray.core.fetch import FetchCore, Source
from kvray.core.ids import BlockKey, Maker, NodeId, ReadId
from kvray.core.lookups import Lookups
from kvray.core.messages import Grant, Locate, LocateReply, NodeInfo
from kvray.core.store import NODE, TRUST
from kvray.core.storing import Storing
from kvray.core.takeover import TakeOvers
from kvray.core.trust import TrustCore

# Calls to the directory that have not ended. FetchCore gives up on a locate after its deadline and
# makes the next one, so these are more than it waits for; the oldest is forgotten then.
MAX_LOCATE_CALLS = 64


class Fetching:
    """One per NodeStore. Puts what is to be done outside into `out`."""

    def __init__(
        self,
        fetch: FetchCore,
        storing: Storing,
        lookups: Lookups,
        takeovers: TakeOvers,
        trust: TrustCore,
        *,
        asker: NodeInfo,
        call_ids: Iterator[int],
        locate_timeout_ms: int,
        out: list[NodeCommand],
    ) -> None:
        """asker: this node. call_ids: shared with whoever else calls the directory."""
        self.asker = asker
        self._fetch = fetch
        self._storing = storing
        self._lookups = lookups
        self._takeovers = takeovers
        self._trust = trust
        self._call_ids = call_ids
        self._locate_timeout_ms = locate_timeout_ms
        self._out = out
        self._locates: dict[int, tuple[int, int]] = {}  # by call: FetchCore's id, count of keys

    # -- events ----------------------------------------------------------------------------------

    def on_present(self, keys: Sequence[BlockKey], now_ms: int) -> None:
        """An engine has committed these."""
        if not self._fetch.is_busy:
            return
        self.do(self._fetch.on_present(keys), now_ms)

    def on_read_done(self, read_id: ReadId, *, ok: bool, now_ms: int) -> None:
        self.do(self._fetch.on_read_done(read_id, ok=ok, now_ms=now_ms), now_ms)

    def on_headers(self, read_id: ReadId, headers: Headers, now_ms: int) -> None:
        self.do(self._fetch.on_headers(read_id, headers, now_ms=now_ms), now_ms)

    def on_roster(self, roster: Mapping[NodeId, NodeInfo], now_ms: int) -> None:
        self.do(self._fetch.on_roster(roster, now_ms=now_ms), now_ms)

    def on_tick(self, now_ms: int) -> None:
        self.do(self._fetch.on_tick(now_ms), now_ms)

    def on_call_ended(self, call_id: int, reply: object, now_ms: int) -> bool:
        """A call to the directory has ended; reply is None if it failed. False: not one of ours.

        What the directory says of keys that were not asked for is left out.
        """
        asked = self._locates.pop(call_id, None)
        if asked is None:
            return False
        locate_id, key_count = asked
        if not isinstance(reply, LocateReply):
            self.do(self._fetch.on_locate_failed(locate_id), now_ms)
            return True
        found: list[list[Source]] = [[] for _ in range(key_count)]
        nodes, epochs = reply.nodes, reply.epochs
        for key_index, node, slot, block_bytes, generation, maker in unpack_locations(
            reply.locations
        ):
            if key_index < key_count:
                source = Source(nodes[node], epochs[node], slot, generation, block_bytes, maker)
                found[key_index].append(source)
        self.do(self._fetch.on_located(locate_id, found, gone=reply.gone, now_ms=now_ms), now_ms)
        return True

    # -- doing -----------------------------------------------------------------------------------

    def advance(self, now_ms: int) -> None:
        """At the end of every event: start what can be started."""
        while commands := self._fetch.advance(now_ms):
            self.do(commands, now_ms)

    def do(self, commands: Sequence[FetchCommand], now_ms: int) -> None:
        """In order: what has arrived is pinned before anything is evicted for what comes next."""
        for command in commands:
            match command:
                case PostRead() | AbandonRead():
                    self._out.append(command)
                case Coming() | Arrived() | Missed():
                    self._tell(command, now_ms)
                case AskDirectory():
                    self._out.append(self._call(command))
                case ReserveTargets(batch_id, wants, makers):
                    targets = self._reserve(wants, makers, now_ms)
                    self.do(self._fetch.on_reserved(batch_id, targets), now_ms)
                case CommitTargets(places):
                    self._storing.commit_targets(places, now_ms)
                case ReleaseTargets(places):
                    self._storing.release_targets(places)
                case QuarantineTargets(_, places):
                    self._storing.quarantine_targets(places)
                case PeerFailed(node_id, epoch, avoid_ms, reason):
                    text = f"{node_id} epoch {epoch}: {reason}; avoided for {avoid_ms} ms"
                    self._out.append(Log(text, warning=True))

    def _tell(self, told: Coming | Arrived | Missed, now_ms: int) -> None:
        """Take-overs and comparisons load nothing, so they need not know what is coming."""
        if told.waiter[0] == NODE:
            if not isinstance(told, Coming):
                self._takeovers.on_settled(told)
        elif told.waiter[0] == TRUST:
            if not isinstance(told, Coming):
                self._trust.on_settled(told, now_ms)
        elif isinstance(told, Coming):
            self._lookups.on_coming(told)
        elif isinstance(told, Arrived):
            self._lookups.on_arrived(told, now_ms)
        else:
            self._lookups.on_missed(told, now_ms)

    def _reserve(
        self, wants: Sequence[tuple[BlockKey, int]], makers: Sequence[Maker], now_ms: int
    ) -> list[Grant | Place]:
        """Nothing is evicted for what is taken over. Those come in batches of their own, mostly,
        and a mixed batch is treated as one of them: its lookups have a miss more at worst.
        """
        evicts = not any(self._takeovers.wants(key) for key, _ in wants)
        return self._storing.reserve_targets(wants, makers, now_ms, evicts=evicts)

    def _call(self, ask: AskDirectory) -> CallDirectory:
        call_id = next(self._call_ids)
        self._locates[call_id] = (ask.locate_id, len(ask.keys))
        if len(self._locates) > MAX_LOCATE_CALLS:
            del self._locates[next(iter(self._locates))]
        message = Locate(self.asker.node_id, self.asker.epoch, pack_keys(ask.keys))
        return CallDirectory(call_id, message, self._locate_timeout_ms)

    def check(self) -> None:
        assert len(self._locates) <= MAX_LOCATE_CALLS
