"""One life of a NodeStore: the shell of a NodeCore, from its start to its crash.

It does what the core says, in order, and may be killed between any two of those commands or in the
middle of one. While it is frozen, what comes waits; its slab may still be read by peers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvray.core.codec import decode, encode, unpack_slots
from kvray.core.commands import (
    AbandonRead,
    CallDirectory,
    CompareBlocks,
    Drop,
    NodeCommand,
    PostRead,
    Restart,
    Send,
    TakeEpoch,
    TookOver,
    WatchProcess,
    WriteClient,
)
from kvray.core.effects import MarkGeneration, WriteExtent, WriteHeader
from kvray.core.ids import BlockKey, ClientId, Epoch, Maker, ReadId
from kvray.core.messages import (
    MAX_MESSAGE_BYTES,
    Abandon,
    Ack,
    Bye,
    Commit,
    Hello,
    LocalRequest,
    Lookup,
    LookupReply,
    LookupUpdate,
    Unpin,
)
from kvray.core.reasons import MissReason
from tests.shells import Shell
from tests.sim.link import Transfer
from tests.sim.makers import AUDIT_RATE, Seen
from tests.sim.profile import ANNOUNCING_LIMITS, FETCH_LIMITS
from tests.sim.promises import Promises

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.session import Session

Event = Callable[[int], list[NodeCommand]]  # takes the node's now_ms

_EFFECTS = (WriteHeader, WriteExtent, MarkGeneration, WriteClient)
MAX_CALLS = 128  # as in node.control


class NodeProcess(Shell):
    """One life of a NodeStore."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine
        self.world = machine.world
        self.ended = False
        self.frozen = False
        self.reads_when_frozen = True  # whether its slab can be read meanwhile
        self.sessions: dict[int, Session] = {}
        self.clients: dict[int, ClientId] = {}  # by session, those that have said hello
        self.transfers: dict[ReadId, Transfer] = {}
        self.taking_over: dict[int, int] = {}  # calls that have not ended, and until when
        self._last_take_over = 0
        self.crash_after: int | None = None  # so many commands
        self._backlog: list[Event] = []
        self._timer_us: int | None = None
        slab = machine.slab
        self.watched_slab = slab
        self.seen = Seen()
        self.makers: dict[ClientId, Maker] = {}  # of who has said hello
        self.promises = Promises(slab)
        super().__init__(
            machine.name,
            slab,
            now_ms=machine.now_ms,
            wall_clock_offset_ms=machine.clock.wall_ms,
            limits=FETCH_LIMITS,
            announcing_limits=ANNOUNCING_LIMITS,
            requires_proof=True,
            audit_rate=AUDIT_RATE,
        )

    def begin(self) -> None:
        self.world.note(self.name, "starts", f"epoch {self.core.info.epoch}")
        self.event(self.core.start)

    def end(self) -> None:
        """kill -9: what it had in its hands is gone, its reads too."""
        self.ended = True
        seen = self.core.snapshot()
        self.world.story.fetched_blocks += seen["fetch"]["fetched_blocks"]
        untrusted = seen["lookups"]["misses"].get(MissReason.UNTRUSTED.value, 0)
        self.world.story.faults["untrusted"] += untrusted
        assert not seen["trust"]["audit_mismatch"], "an audit of who computes alike differs"
        self.world.story.faults["audited"] += seen["trust"]["audited_chunks"]
        not_worth_it = seen["lookups"]["misses"].get(MissReason.BELOW_BREAK_EVEN.value, 0)
        self.world.story.faults["not_worth_a_fetch"] += not_worth_it
        self.watched_slab.pins.clear()
        for transfer in list(self.transfers.values()):
            transfer.die()
        for session in list(self.sessions.values()):
            session.node_is_gone()

    # -- events ----------------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """It happens now, or when the process speaks again."""
        if self.ended:
            return
        if self.frozen:
            self._backlog.append(event)
            return
        self.promises.lapse(self.machine.now_ms)
        self.do(event(self.machine.now_ms))

    def freeze(self, duration_us: int, *, reads: bool) -> None:
        self.frozen, self.reads_when_frozen = True, reads
        self.world.schedule.after(duration_us, self.thaw)

    def thaw(self) -> None:
        if self.ended or not self.frozen:
            return
        self.frozen = False
        self.world.note(self.name, "speaks again", len(self._backlog))
        backlog, self._backlog = self._backlog, []
        for event in backlog:
            self.event(event)
        self._timer_us = None
        self._arm()

    def on_data(self, session: "Session", data: bytes) -> None:
        """A client's message."""
        message: LocalRequest = decode(data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalRequest)
        self.event(lambda now_ms: self._on_message(session, message, now_ms))

    def _on_message(
        self, session: "Session", message: LocalRequest, now_ms: int
    ) -> list[NodeCommand]:
        if session.session_id not in self.sessions:
            return []  # dropped meanwhile
        client_id = self.clients.get(session.session_id)
        if isinstance(message, Hello):
            self.promises.on_hello(message.client)
            self.makers[message.client] = message.maker
            self.clients[session.session_id] = message.client
        elif client_id is not None:
            if isinstance(message, Lookup):
                self.promises.on_lookup(client_id, message, now_ms)
            elif isinstance(message, Unpin):
                self.promises.drop((client_id, message.lookup_op))
            elif isinstance(message, (Commit, Abandon)):
                self.promises.on_copied(client_id, message)
            elif isinstance(message, Bye):
                self.promises.end_client(client_id)
        return self.core.on_message(session.session_id, message, now_ms)

    def on_closed(self, session: "Session") -> None:
        """A session has been closed by its client."""

        def closed(now_ms: int) -> list[NodeCommand]:
            if self.sessions.pop(session.session_id, None) is None:
                return []  # dropped meanwhile
            client_id = self.clients.pop(session.session_id, None)
            if client_id is not None and client_id not in self.clients.values():
                self.promises.on_closed(client_id, now_ms)
            return self.core.on_session_closed(session.session_id, now_ms)

        self.event(closed)

    def on_process_gone(self, pid: int, start_ticks: int) -> None:
        def gone(now_ms: int) -> list[NodeCommand]:
            if (pid, start_ticks) not in self.watched:
                return []
            self.watched.discard((pid, start_ticks))
            for client_id in self.world.clients_of(pid):
                self.promises.end_client(client_id)
            return self.core.on_process_gone(pid, start_ticks, now_ms)

        self.event(gone)

    def call_failed(self, call_id: int) -> None:
        """A call came to nothing, or the shell has given it up."""
        if self.calls.pop(call_id, None) is not None:
            self.event(lambda now_ms: self.core.on_directory_failed(call_id, now_ms))

    def take_over(self, wants: list[tuple[BlockKey, int]], *, within_ms: int) -> None:
        """Another node leaves these to this one."""

        def take(now_ms: int) -> list[NodeCommand]:
            self._last_take_over += 1
            self.taking_over[self._last_take_over] = deadline_ms = now_ms + within_ms
            return self.core.take_over(
                self._last_take_over, wants, deadline_ms=deadline_ms, now_ms=now_ms
            )

        self.event(take)

    # -- doing what the core says ----------------------------------------------------------------

    def do(self, commands: list[NodeCommand]) -> None:
        effects_are_over = False
        for command in commands:
            is_effect = isinstance(command, _EFFECTS)
            assert not (is_effect and effects_are_over), "an effect after what relies on it"
            effects_are_over = not is_effect
            if self.crash_after is not None and self._is_hit(command):
                return
            self._do(command)
            if self.ended:
                return
        self.core.check()
        now_ms = self.machine.now_ms
        due_ms = self.core.next_deadline_ms()
        if due_ms is None or due_ms > now_ms:
            self.promises.check(now_ms)
            assert all(now_ms < at_ms for at_ms in self.taking_over.values()), "takes for ever"
        self._arm()

    def _is_hit(self, command: NodeCommand) -> bool:
        """Whether the process is killed at this command."""
        assert self.crash_after is not None
        self.crash_after -= 1
        if self.crash_after >= 0:
            return False
        world = self.world
        if isinstance(command, WriteHeader):
            self.watched_slab.apply_torn(command, world.random)
        world.fault("crash_torn", self.name, type(command).__name__)
        self.machine.crash()
        return True

    def _do(self, command: NodeCommand) -> None:
        super()._do(command)
        world, schedule = self.world, self.world.schedule
        match command:
            case Send() | Drop():
                self._speak(command)
            case WatchProcess(pid, start_ticks):
                if (pid, start_ticks) in world.dead:
                    schedule.after(1, self.on_process_gone, pid, start_ticks)
            case CallDirectory(call_id, _, timeout_ms):
                assert len(self.calls) <= MAX_CALLS
                at_us = self.machine.clock.us(self.machine.now_ms + timeout_ms)
                schedule.at(at_us, self.call_failed, call_id)
                world.network.call(self, command)
            case PostRead():
                self.transfers[command.read_id] = Transfer(self, command)
                assert len(self.transfers) <= FETCH_LIMITS.max_unended_reads
            case AbandonRead(read_id):
                if (transfer := self.transfers.get(read_id)) is not None:
                    transfer.abandoned = True
            case TakeEpoch(epoch):
                self.linking.clear()
                delay_us = world.random.choice((1_000, 30_000, 400_000))
                schedule.after(delay_us, self._linked, epoch)
            case CompareBlocks(comparison_id):
                schedule.after(world.random.randrange(100, 50_000), self._compared, comparison_id)
            case TookOver(call_id, keys):
                del self.taking_over[call_id]
                assert all(self.store.find(key) for key in keys), "kept, but not here"
                world.story.taken_over_blocks += len(keys)
            case Restart():
                world.fault("clogged", self.name)
                schedule.after(1, self._restart)

    def _speak(self, command: Send | Drop) -> None:
        session = self.sessions.get(command.session_id)
        if isinstance(command, Send):
            self.sent.clear()
            message = command.message
            if isinstance(message, (LookupReply, LookupUpdate)):
                client_id = self.clients[command.session_id]
                self.promises.on_reply(client_id, message)
                for slot, _, _ in unpack_slots(message.slots):
                    maker = int(self.watched_slab.headers[slot]["maker"])
                    may = self.seen.may_load(self.makers[client_id], maker)
                    assert may, "a block is told of a maker that was not seen to be equal"
            elif isinstance(message, Ack):
                self.promises.on_ack(self.clients[command.session_id], message.op)
            if session is not None:
                session.to_client(encode(message), self.watched_slab)
            return
        assert "another session" in command.reason, command.reason
        self.clients.pop(command.session_id, None)
        if session is not None:
            del self.sessions[command.session_id]
            session.node_is_gone()

    def _compared(self, comparison_id: int) -> None:
        """The thread has read both, and says so; while this process is frozen, later."""
        if self.ended:
            return
        first = self.comparisons[comparison_id].pairs[0]
        done = self.compare(comparison_id)
        for verdict in set(done.verdicts):
            self.world.count(f"canaries_{verdict.value}")
        self.seen.note(first.mine.maker, first.other.maker, done.verdicts)
        self.event(
            lambda now_ms: self.core.on_compared(
                done.comparison_id, done.verdicts, pieces=done.pieces, now_ms=now_ms
            )
        )

    def _restart(self) -> None:
        if not self.ended:
            self.machine.crash(down_us=500_000)

    def _linked(self, epoch: Epoch) -> None:
        self.world.note(self.name, "has a link", epoch)
        self.event(lambda now_ms: self.core.on_linked(self._info(epoch), now_ms))

    # -- time ------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Have the timer ring when the core wants it."""
        due_ms = self.core.next_deadline_ms()
        if due_ms is None or self.ended:
            return
        at_us = max(self.machine.clock.us(due_ms), self.world.schedule.now_us)
        if self._timer_us is None or at_us < self._timer_us:
            self._timer_us = at_us
            self.world.schedule.at(at_us, self._on_timer, at_us)

    def _on_timer(self, at_us: int) -> None:
        if self.ended or self._timer_us != at_us or self.frozen:
            return
        self._timer_us = None
        due_ms = self.core.next_deadline_ms()
        if due_ms is not None and due_ms <= self.machine.now_ms:
            self.event(self.core.on_tick)
            if not self.ended:
                due_ms = self.core.next_deadline_ms()
                assert due_ms is None or due_ms > self.machine.now_ms, "something due was left"
        self._arm()

    # -- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        """Everything about this node: core, slab, and that the two agree."""
        self.core.check()
        if not self.frozen:
            self.watched_slab.check()
        ready = {(place.slot, place.generation, place.key) for place in self.store.entries()}
        slab = self.watched_slab
        found = {
            (slot, generation, slab.headers[slot]["key"].tobytes())
            for slot, (state, generation) in enumerate(slab.rows)
            if state == 2
        }
        assert ready == found, "the slab says something else than the core"
        counts = self.core.snapshot()["store"]
        states = {state.name: count for state, count in slab.states().items()}
        assert counts["ready"] == states.get("READY", 0)
        assert counts["writing"] == states.get("WRITING", 0)
        assert counts["quarantined"] == states.get("QUARANTINE", 0)
