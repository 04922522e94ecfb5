"""NodeCore: everything that a NodeStore decides.

    engines ──messages──▶ sessions, lookups, storing ──┐
    peers ──reads, headers──▶ fetches ─────────────────┼──▶ one StoreCore, one slab
    directory ──replies──▶ announcing, locates ────────┘

The door: each event comes in by one method, and the NodeCommands it returns are what is to be
done. What belongs to what is decided in core.clients (who is there), core.storing (who writes),
core.lookups (who asks), core.fetch (what comes from peers), core.announcing (what the directory
hears) and core.store (what is where); here they are put together, and effects are put before
whatever relies on them.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any

from kvray.core.announcing import Announcing, AnnouncingLimits, AnnouncingState
from kvray.core.audit import Audits
from kvray.core.clients import Client, Clients, ClientState
from kvray.core.commands import (
    ConnectPeer,
    DisconnectPeer,
    Drop,
    Headers,
    Log,
    NodeCommand,
    Restart,
    Send,
    TakeEpoch,
    Verdict,
    WatchProcess,
)
from kvray.core.fetch import FetchCore, FetchLimits
from kvray.core.fetching import Fetching
from kvray.core.header_page import ClientRow
from kvray.core.ids import BlockKey, Epoch, NodeId, ReadId
from kvray.core.lookups import Lookups
from kvray.core.messages import (
    Abandon,
    Ack,
    AnnounceReply,
    Bye,
    Commit,
    Hello,
    HelloReply,
    Introduce,
    LocalAnswer,
    LocalRequest,
    LocateReply,
    Lookup,
    NodeHelloReply,
    NodeInfo,
    Refused,
    Report,
    Reserve,
    Unpin,
)
from kvray.core.reasons import MissReason
from kvray.core.store import StoreCore
from kvray.core.storing import Storing
from kvray.core.takeover import TakeOvers
from kvray.core.trust import TrustCore

# Reads that were abandoned a second after they were posted, and have not ended so much later,
# will not end. Nothing is fetched then, so the restart costs only its one to three seconds.
CLOGGED_MS = 30_000


class NodeCore:
    """One NodeStore. One thread calls it; see core.commands for what it answers.

    store has adopted the slab already. info: without a link yet. clients: the rows of the slab's
    table of clients. wall_clock_offset_ms: add it to now_ms and it is the time of day.
    """

    def __init__(
        self,
        info: NodeInfo,
        store: StoreCore,
        *,
        clients: Sequence[ClientRow] = (),
        wall_clock_offset_ms: int,
        now_ms: int,
        fetch_limits: FetchLimits | None = None,
        announcing_limits: AnnouncingLimits | None = None,
        requires_proof: bool | None = None,
        audit_rate: float = 0.0,
    ) -> None:
        self._store = store
        self._out: list[NodeCommand] = []
        self._clients = Clients(clients)
        self._audits = Audits(audit_rate)
        self._storing = Storing(store, self._clients, self._audits, slab_id=info.slab_id)
        self._fetch = FetchCore(fetch_limits)
        self._lookups = Lookups(store, self._fetch, self._audits)
        self._takeovers = TakeOvers(store, self._fetch)
        self._trust = TrustCore(store, self._fetch, requires_proof=requires_proof)
        call_ids = count(1)
        self._fetching = Fetching(
            self._fetch,
            self._storing,
            self._lookups,
            self._takeovers,
            self._trust,
            asker=info,
            call_ids=call_ids,
            locate_timeout_ms=(fetch_limits or FetchLimits()).locate_deadline_ms,
            out=self._out,
        )
        self._announcing = Announcing(
            info,
            store,
            call_ids=call_ids,
            wall_clock_offset_ms=wall_clock_offset_ms,
            now_ms=now_ms,
            limits=announcing_limits,
        )
        self._connected: dict[NodeId, Epoch] = {}
        self._clogged_since_ms: int | None = None

    @property
    def info(self) -> NodeInfo:
        return self._announcing.info

    @property
    def is_linked(self) -> bool:
        """Whether there is a link of this epoch. Without one only own engines are served."""
        return self._announcing.state is not AnnouncingState.LINKING

    def next_deadline_ms(self) -> int | None:
        """When on_tick is due. None: not before something else happens."""
        clogged_ms = None if self._clogged_since_ms is None else self._clogged_since_ms + CLOGGED_MS
        deadlines = (
            self._announcing.next_deadline_ms(),
            self._fetch.next_deadline_ms(),
            self._lookups.next_deadline_ms(),
            self._clients.next_deadline_ms(),
            self._trust.next_deadline_ms(),
            clogged_ms,
        )
        return min((at_ms for at_ms in deadlines if at_ms is not None), default=None)

    # -- processes and sessions ------------------------------------------------------------------

    def start(self, now_ms: int) -> list[NodeCommand]:
        """The first event. Engines are served from now on, peers when there is a link."""
        self._storing.release_adopted()
        processes = {(c.client_id.pid, c.client_id.start_ticks) for c in self._clients}
        self._out += [WatchProcess(pid, start_ticks) for pid, start_ticks in sorted(processes)]
        self._out.append(TakeEpoch(self.info.epoch))
        return self.on_tick(now_ms)

    def on_message(self, session_id: int, message: LocalRequest, now_ms: int) -> list[NodeCommand]:
        """What a client says. The shell has decoded it, and in a Hello it has compared pid and
        start time with those of the process behind the socket.
        """
        if isinstance(message, Hello):
            self._on_hello(session_id, message, now_ms)
            return self._finish(now_ms)
        client = self._clients.of_session(session_id)
        if client is None:
            self._out.append(Drop(session_id, f"{type(message).__name__} came before Hello"))
        elif not client.is_engine and not isinstance(message, (Report, Bye)):
            self._out.append(Drop(session_id, f"a worker may not say {type(message).__name__}"))
        else:
            self._on_request(client, session_id, message, now_ms)
        return self._finish(now_ms)

    def on_session_closed(self, session_id: int, now_ms: int) -> list[NodeCommand]:
        """Whoever closed it. The client keeps its pins and slots for now."""
        client = self._clients.close(session_id, now_ms)
        if client is not None:
            self._lookups.end_session(client.client_id)
        return self._finish(now_ms)

    def on_process_gone(self, pid: int, start_ticks: int, now_ms: int) -> list[NodeCommand]:
        """Seen by its pidfd: all its threads have ended."""
        for client in self._clients.of_process(pid, start_ticks):
            if client.state is not ClientState.GONE:
                self._leave(client, "is gone", now_ms)
        return self._finish(now_ms)

    def _on_hello(self, session_id: int, hello: Hello, now_ms: int) -> None:
        admission = self._clients.admit(session_id, hello)
        if isinstance(admission, str):
            self._out.append(Drop(session_id, admission))
            return
        client = admission.client
        if admission.replaced is not None:
            reason = "the client has said hello in another session"
            self._out.append(Drop(admission.replaced, reason))
            self._lookups.end_session(client.client_id)
        if admission.write is not None:
            self._storing.write_client(admission.write)
        self._lookups.on_given_up(self._storing.restore(client, hello), now_ms)
        info = self.info
        reply = HelloReply(
            hello.op, info.node_id, info.epoch, info.slab_id, info.slab_bytes, info.extent_bytes
        )
        self._out.append(WatchProcess(client.client_id.pid, client.client_id.start_ticks))
        self._out.append(Send(session_id, reply, with_fd=True))
        self._note_engines()

    def _note_engines(self) -> None:
        """Somebody has come or gone, or is another: the directory hears of it."""
        engines = self._clients.engine_uses()
        self._trust.set_own(self._clients.introduced())
        if engines != self._announcing.engines:
            self._announcing.engines = engines
            self._storing.has_changes = True  # to be announced, as a block is

    def _on_request(
        self, client: Client, session_id: int, message: LocalRequest, now_ms: int
    ) -> None:
        if isinstance(message, Lookup):
            reply = self._on_lookup(client, session_id, message, now_ms)
            if reply is not None:
                self._out.append(Send(session_id, reply))
            return
        answer: LocalAnswer = Ack(message.op)
        match message:
            case Unpin():
                self._lookups.unpin((client.client_id, message.lookup_op))
            case Reserve():
                trusted = self._trust.of(client.namespace, client.maker)
                answer = self._too_large(message) or self._storing.reserve(
                    client, message, trusted, now_ms
                )
            case Commit():
                keys = self._storing.commit(client, message, now_ms)
                for key, name in self._audits.end(keys):
                    own = client.namespace, client.maker
                    self._trust.audit(own, key, name, now_ms)
                self._lookups.on_committed(keys, now_ms)
                self._fetching.on_present(keys, now_ms)
            case Abandon():
                keys = self._storing.abandon(client, message)
                self._audits.end(keys)
                self._lookups.on_given_up(keys, now_ms)
            case Introduce():
                self._clients.introduce(client, message)
                self._note_engines()
            case Report():
                self._clients.report(client, message.counters)
            case Bye():
                self._leave(client, "has said bye", now_ms)
            case Hello():
                raise AssertionError("has been seen to")
        self._out.append(Send(session_id, answer))

    def _on_lookup(
        self, client: Client, session_id: int, message: Lookup, now_ms: int
    ) -> LocalAnswer | None:
        """None: it waits, and its reply is among what the lookups tell at the end of the event."""
        if (refused := self._too_large(message)) is not None:
            return refused
        self._announcing.note_use(now_ms)
        trusted = self._trust.of(client.namespace, client.maker)
        if trusted is None:
            return self._lookups.refuse(message, MissReason.UNPROVEN)
        no_fetch: MissReason | None = None
        if not self._announcing.is_reachable(now_ms):
            no_fetch = MissReason.DIRECTORY_SILENT
        elif not self._fetch.has_peers:
            # Nobody is asked, so nobody knows whether those who have left had it.
            has_lost = self._fetch.has_lost_peers
            no_fetch = MissReason.PEER_GONE if has_lost else MissReason.NEVER_SEEN
        reply, commands = self._lookups.begin(
            client.client_id,
            session_id,
            message,
            trusted=trusted,
            no_fetch=no_fetch,
            is_stranger=client.model in self._announcing.split,
            now_ms=now_ms,
        )
        self._fetching.do(commands, now_ms)
        return reply

    def _too_large(self, message: Lookup | Reserve) -> Refused | None:
        largest = max(message.run_slot_bytes) if message.run_slot_bytes else 0
        limit = self.info.extent_bytes
        if largest <= limit:
            return None
        return Refused(
            message.op,
            f"a block has {largest} bytes and an extent of this slab only {limit}: "
            f"start kvray with a larger extent_bytes",
        )

    def _leave(self, client: Client, why: str, now_ms: int) -> None:
        """The client does nothing more. Its slots wait for its workers."""
        self._clients.leave(client)
        self._note_engines()
        self._give_up(client, why, now_ms)
        self._storing.release_gone()

    def _give_up(self, client: Client, why: str, now_ms: int) -> None:
        self._lookups.end_session(client.client_id)
        keys = self._storing.quarantine(client)
        self._audits.end(keys)
        if keys:
            text = f"{client.label or 'a client'} (pid {client.client_id.pid}) {why}"
            self._out.append(Log(f"{text}: {len(keys)} slots in quarantine", warning=True))
        self._lookups.on_given_up(keys, now_ms)

    # -- peers -----------------------------------------------------------------------------------

    def on_read_done(self, read_id: ReadId, *, ok: bool, now_ms: int) -> list[NodeCommand]:
        """A PAYLOAD read has ended, or a read of HEADERS has failed or could not be posted, or an
        abandoned read of either kind has ended at last.
        """
        self._fetching.on_read_done(read_id, ok=ok, now_ms=now_ms)
        return self._finish(now_ms)

    def on_headers(self, read_id: ReadId, headers: Headers, now_ms: int) -> list[NodeCommand]:
        """A read of HEADERS has come, or one of PAYLOAD with its headers: SLOT_HEADER_DTYPE rows,
        not changed by anybody afterwards.
        """
        self._fetching.on_headers(read_id, headers, now_ms)
        return self._finish(now_ms)

    def on_compared(
        self,
        comparison_id: int,
        verdicts: Sequence[Verdict],
        *,
        pieces: Sequence[int] = (),
        now_ms: int,
    ) -> list[NodeCommand]:
        """The end of CompareBlocks. pieces: the indices of some that differ."""
        self._trust.on_compared(comparison_id, verdicts, pieces=pieces, now_ms=now_ms)
        return self._finish(now_ms)

    # -- directory -------------------------------------------------------------------------------

    def on_directory_reply(
        self, call_id: int, reply: NodeHelloReply | AnnounceReply | LocateReply, now_ms: int
    ) -> list[NodeCommand]:
        """Also when it comes late, or for a call that nobody knows any more."""
        is_locate = self._fetching.on_call_ended(call_id, reply, now_ms)
        if not is_locate and not isinstance(reply, LocateReply):
            commands = self._announcing.on_reply(call_id, reply, now_ms)
            self._trust.hear(self._announcing.makers)
            self._follow_roster(now_ms)
            self._out += commands
        return self._finish(now_ms)

    def on_directory_failed(self, call_id: int, now_ms: int) -> list[NodeCommand]:
        """The directory is not there, or what came back is no answer."""
        if not self._fetching.on_call_ended(call_id, None, now_ms):
            self._announcing.on_failed(call_id, now_ms)
        return self._finish(now_ms)

    def on_linked(self, info: NodeInfo, now_ms: int) -> list[NodeCommand]:
        """What TakeEpoch asks for is done."""
        self._announcing.on_linked(info, now_ms)
        self._fetching.asker = info
        return self.on_tick(now_ms)

    def _follow_roster(self, now_ms: int) -> None:
        """Connect to those who have come and forget those who have left. Their reads are abandoned
        before they are disconnected.
        """
        if not self._announcing.roster_changed:
            return
        self._announcing.roster_changed = False
        roster = self._announcing.roster
        self._fetching.on_roster(roster, now_ms)
        for node_id, epoch in list(self._connected.items()):
            if node_id not in roster or roster[node_id].epoch != epoch:
                del self._connected[node_id]
                self._out.append(DisconnectPeer(node_id, epoch))
        for node_id, info in roster.items():
            if node_id not in self._connected:
                self._connected[node_id] = info.epoch
                self._out.append(ConnectPeer(info))

    # -- time, and people ------------------------------------------------------------------------

    def on_tick(self, now_ms: int) -> list[NodeCommand]:
        """At next_deadline_ms, or whenever it suits: it does what is due."""
        self._fetching.on_tick(now_ms)
        self._lookups.on_tick(now_ms)
        for client in self._clients.take_lapsed(now_ms):
            self._give_up(client, "has had no session for long", now_ms)
            self._note_engines()
        if self._clogged_since_ms is not None and now_ms >= self._clogged_since_ms + CLOGGED_MS:
            self._clogged_since_ms = now_ms
            self._out.append(Restart("abandoned reads do not end, and nothing can be fetched"))
        self._out += self._announcing.on_tick(now_ms)
        self._follow_roster(now_ms)
        return self._finish(now_ms)

    def clear(self, now_ms: int) -> list[NodeCommand]:
        """Evict every block that nobody has pinned."""
        self._store.clear()
        self._storing.has_changes = True
        return self._finish(now_ms)

    def drain(self, now_ms: int) -> list[NodeCommand]:
        """The node is about to leave: engines store nothing more. What it has can be read."""
        self._storing.is_draining = True
        return self._finish(now_ms)

    def take_over(
        self,
        call_id: int,
        wants: Sequence[tuple[BlockKey, int]],
        *,
        deadline_ms: int,
        now_ms: int,
    ) -> list[NodeCommand]:
        """Get these (key, payload bytes), no key twice, from a node that is about to leave, into
        room that is free. Ends in TookOver, at deadline_ms (absolute) at the latest.
        """
        self._fetching.do(self._takeovers.take(call_id, wants, deadline_ms=deadline_ms), now_ms)
        return self._finish(now_ms)

    def snapshot(self) -> dict[str, Any]:
        """Plain data, for people."""
        return {
            "node_id": self.info.node_id,
            "epoch": self.info.epoch,
            "slab_id": self.info.slab_id.hex(),
            "host": self.info.host,
            "store": self._store.snapshot(),
            "storing": dict(self._storing.counters),
            "lookups": self._lookups.snapshot(),
            "fetch": self._fetch.snapshot(),
            "taken_over": self._takeovers.kept_count,
            "trust": self._trust.snapshot(),
            "is_draining": self._storing.is_draining,
            "announcing": self._announcing.snapshot(),
            "clients": self._clients.snapshot(),
            "engine_totals": dict(self._clients.totals),
        }

    def check(self) -> None:
        """Assert all invariants, each part's and those between them, both ways."""
        self._store.check()
        self._clients.check()
        self._storing.check()
        self._fetch.check()
        self._fetching.check()
        self._lookups.check()
        self._takeovers.check()
        self._trust.check()
        self._audits.check()
        waiting = {
            *self._lookups.fetching(),
            *self._takeovers.waiters(),
            *self._trust.waiters(),
        }
        assert waiting == set(self._fetch.waiters()), "something is brought to nobody"
        self._announcing.check()
        assert not self._out, "not done"
        assert self._connected == {n: i.epoch for n, i in self._announcing.roster.items()}
        assert self._fetch.is_clogged == (self._clogged_since_ms is not None)

    def _finish(self, now_ms: int) -> list[NodeCommand]:
        """The end of every event: start what can be started, tell whom there is to tell, and put
        what the slab must say before it.
        """
        if self._fetch.is_busy:
            self._fetching.advance(now_ms)
        while self._trust.is_due(now_ms):
            may_fetch = self._fetch.has_peers and self._announcing.is_reachable(now_ms)
            self._fetching.do(self._trust.advance(now_ms, may_fetch=may_fetch), now_ms)
            self._fetching.advance(now_ms)
        self._out += self._trust.take_commands()
        self._out += self._lookups.take_told()
        self._out += self._takeovers.take_done()
        if self._storing.has_changes:
            self._storing.has_changes = False
            self._announcing.note_change(now_ms)
        if not self._fetch.is_clogged:
            self._clogged_since_ms = None
        elif self._clogged_since_ms is None:
            self._clogged_since_ms = now_ms
        out: list[NodeCommand] = [*self._storing.drain_effects(), *self._out]
        self._out.clear()
        return out
