"""A NodeStore that serves: NodeCore, and everything around it that does what it says.

    socket, pidfds, inbox ──events──▶ NodeCore ──commands, in order──┬─▶ slab: effects
                                                                     ├─▶ socket: answers
                                                                     ├─▶ link thread: reads
                                                                     ├─▶ control thread: Ray calls
                                                                     └─▶ comparing: two blocks

One thread, one selector, and no wait but the selector's.
"""

import logging
import os
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from kvray.actors import die
from kvray.core.codec import decode
from kvray.core.commands import (
    AbandonRead,
    CallDirectory,
    CompareBlocks,
    ConnectPeer,
    DisconnectPeer,
    Drop,
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
from kvray.core.deadlines import Deadlines
from kvray.core.effects import MarkGeneration, WriteExtent, WriteHeader
from kvray.core.ids import BlockKey, Epoch, NodeId
from kvray.core.messages import (
    MAX_CALL_BYTES,
    AnnounceReply,
    LocateReply,
    NodeHelloReply,
    NodeInfo,
)
from kvray.core.node import NodeCore
from kvray.core.store import StoreCore
from kvray.errors import LinkError, RemoteProtocolError
from kvray.node.comparing import Compared, Comparing
from kvray.node.control import Control, DirectoryAnswered, DirectoryFailed
from kvray.node.inbox import Event, Inbox, Question
from kvray.node.link_opening import LinkOpening
from kvray.node.measuring import LinkMeter, Measured
from kvray.node.peers import (
    ConnectFailed,
    Ending,
    LinkFailed,
    LinkOpened,
    LinkThread,
    MeasureEnded,
    MeasureRead,
    PeerConnected,
    ReadEnded,
)
from kvray.node.process import open_pidfd
from kvray.node.server import LocalServer, MessageReceived, ServerEvent, SessionClosed, SessionId
from kvray.node.slab import SlabOwner
from kvray.node.spans import Spans

logger = logging.getLogger("kvray.node")

# A peer that was woken polls quickly for 100 ms (node.pace). Less than that, so that it stays
# awake while a request's reads go on, one batch after another.
WAKE_PERIOD_MS = 80
RECENT_EVENTS = 512  # for `kvray trace`: names and times, for a screen or ten

_EFFECTS = (WriteHeader, WriteExtent, MarkGeneration)
_DirectoryReply = NodeHelloReply | AnnounceReply | LocateReply


@dataclass(frozen=True, slots=True)
class _Watched:
    """The process behind a pidfd in the selector."""

    pid: int
    start_ticks: int
    pidfd: int


class Serving:
    """Made when the slab is open. run() returns when stopping is said; close() ends it. Engines are
    served while there is no link: loading NIXL takes a second or two, and a new one may fail.

    open_link: asks the link thread for a new agent, named after an epoch. born_ms: when the epoch
    of info was taken, which is what the directory judges it by. spans: where reads are traced.
    """

    def __init__(
        self,
        *,
        info: NodeInfo,
        slab: SlabOwner,
        store: StoreCore,
        link: LinkThread,
        control: Control,
        server: LocalServer,
        inbox: Inbox,
        open_link: Callable[[Epoch], None],
        born_ms: int,
        wall_clock_offset_ms: int,
        spans: Spans | None = None,
        audit_rate: float = 0.0,
    ) -> None:
        self._slab = slab
        self._spans = spans
        self._store = store
        self._link = link
        self._control = control
        self._server = server
        self._inbox = inbox
        self._opening = LinkOpening(open_link)
        self._selector = selectors.DefaultSelector()
        self._selector.register(inbox, selectors.EVENT_READ, inbox)
        server.register(self._selector)
        self._watched: dict[tuple[int, int], _Watched] = {}
        self._gone: deque[tuple[int, int]] = deque()  # processes; the core does not know it yet
        self._calls: Deadlines[int] = Deadlines()
        self._woken_ms: dict[NodeId, int] = {}
        self._peers: dict[NodeId, Epoch] = {}  # that there are to read from, connected or not
        self._connecting: dict[NodeId, Epoch] = {}
        self._connected: dict[NodeId, Epoch] = {}
        self._recent: deque[tuple[int, str]] = deque(maxlen=RECENT_EVENTS)
        whole = np.frombuffer(slab.memory, np.uint8)
        self._comparing = Comparing(whole, slab.headers, inbox.append)
        self._comparing.start()
        self._meter = LinkMeter(self._measure_read)
        self._take_overs = 0
        self._taking_over: dict[int, Future[list[bytes]]] = {}
        self._doers: dict[type, Callable[[Any], None]] = {
            WriteClient: self._write_client,
            Send: self._send,
            Drop: self._drop,
            WatchProcess: self._watch,
            CallDirectory: self._call,
            ConnectPeer: self._connect,
            DisconnectPeer: self._disconnect,
            TakeEpoch: self._take_epoch,
            PostRead: self._post_read,
            AbandonRead: self._abandon_read,
            TookOver: self._took_over,
            CompareBlocks: self._compare,
            Log: self._log,
            Restart: self._restart,
        }
        self._core = NodeCore(
            info,
            store,
            clients=slab.clients(),
            wall_clock_offset_ms=wall_clock_offset_ms,
            now_ms=born_ms,
            audit_rate=audit_rate,
        )

    @property
    def epoch(self) -> Epoch:
        return self._core.info.epoch

    @property
    def is_linked(self) -> bool:
        """Whether peers can be read from, and can read."""
        return self._core.is_linked

    @property
    def link_problem(self) -> LinkError | None:
        """Why there is no link yet, if the last attempt to open one has failed."""
        return self._opening.problem

    def run(self, is_stopping: Callable[[], bool]) -> None:
        """The loop. is_stopping is asked whenever the inbox has been rung."""
        self._do(self._core.start(clock_ms()))
        timeout_s = self._settle()
        while not is_stopping():
            for key, mask in self._selector.select(timeout_s):
                if key.data is self._server:
                    self._on_server_events(self._server.on_ready(key, mask))
                elif key.data is self._inbox:
                    for event in self._inbox.take():
                        self._on_event(event)
                else:
                    self._end_watch(key.data)
            timeout_s = self._settle()

    def _settle(self) -> float | None:
        """What is due, and what doing one thing has brought about elsewhere. How long there is
        nothing to do after that, in seconds.
        """
        self._follow_up()
        due_ms, now_ms = self._due_ms(), clock_ms()
        if due_ms is not None and due_ms <= now_ms:
            self._do_due(now_ms)
            self._follow_up()
            due_ms, now_ms = self._due_ms(), clock_ms()
        return None if due_ms is None else max(0, due_ms - now_ms) / 1_000

    def _due_ms(self) -> int | None:
        deadlines = (self._core.next_deadline_ms(), self._calls.next_ms(), self._opening.next_ms())
        return min((at_ms for at_ms in deadlines if at_ms is not None), default=None)

    def _do_due(self, now_ms: int) -> None:
        self._opening.on_tick(now_ms)
        for call_id in self._calls.take_due(now_ms):
            self._do(self._core.on_directory_failed(call_id, now_ms))
        due_ms = self._core.next_deadline_ms()
        if due_ms is not None and due_ms <= now_ms:
            self._do(self._core.on_tick(now_ms))

    def _follow_up(self) -> None:
        """Sends and drops may have closed sessions, and to say so may close others."""
        while True:
            if events := self._server.take_events():
                self._on_server_events(events)
            elif self._gone:
                pid, start_ticks = self._gone.popleft()
                self._do(self._core.on_process_gone(pid, start_ticks, clock_ms()))
            else:
                return

    def close(self) -> None:
        """Nobody is answered any more. Slab, link and control are the caller's."""
        self._comparing.close()
        self._server.close()
        for watched in self._watched.values():
            self._selector.unregister(watched.pidfd)
            os.close(watched.pidfd)
        self._selector.close()

    # ---- what comes in

    def _on_server_events(self, events: Sequence[ServerEvent]) -> None:
        for event in events:
            if isinstance(event, MessageReceived):
                now_ms = clock_ms()
                self._recent.append((now_ms, type(event.message).__name__))
                self._do(self._core.on_message(event.session_id, event.message, now_ms))
            elif isinstance(event, SessionClosed):
                self._do(self._core.on_session_closed(event.session_id, clock_ms()))

    def _end_watch(self, watched: _Watched) -> None:
        self._selector.unregister(watched.pidfd)
        os.close(watched.pidfd)
        del self._watched[watched.pid, watched.start_ticks]
        self._gone.append((watched.pid, watched.start_ticks))

    def _on_event(self, event: Event) -> None:
        now_ms = clock_ms()
        self._recent.append((now_ms, type(event).__name__))
        match event:
            case ReadEnded():
                self._on_read_ended(event, now_ms)
            case MeasureEnded():
                self._meter.on_ended(event, now_ms)
            case DirectoryAnswered(call_id, data):
                self._calls.discard(call_id)
                self._on_reply(call_id, data, now_ms)
            case DirectoryFailed(call_id, reason):
                self._calls.discard(call_id)
                logger.debug("a call to the directory failed: %s", reason)
                self._do(self._core.on_directory_failed(call_id, now_ms))
            case PeerConnected() | ConnectFailed():
                self._on_connecting_ended(event)
            case LinkOpened():
                self._on_link_opened(event)
            case Compared(comparison_id, verdicts, pieces):
                self._do(
                    self._core.on_compared(comparison_id, verdicts, pieces=pieces, now_ms=now_ms)
                )
            case LinkFailed(reason, fatal):
                if fatal:
                    die(f"the link has failed, and this NodeStore starts anew: {reason}")
                self._opening.on_failed(reason, now_ms)
            case Question(answer_it, answer):
                answer.set_result(answer_it())  # what it raises is a bug, and ends this process

    def _on_read_ended(self, event: ReadEnded, now_ms: int) -> None:
        if event.ending is not Ending.DONE:
            logger.debug("a read ended as %s: %s", event.ending.value, event.reason)
        if self._spans is not None:
            self._spans.end(event.read_id, event.ending.value, event.reason)
        if len(event.headers):
            self._do(self._core.on_headers(event.read_id, event.headers, now_ms))
        else:
            ok = event.ending is Ending.DONE
            self._do(self._core.on_read_done(event.read_id, ok=ok, now_ms=now_ms))

    def _on_connecting_ended(self, event: PeerConnected | ConnectFailed) -> None:
        node_id, epoch = event.node_id, event.epoch
        is_wanted = self._end_connecting(node_id, epoch)
        if isinstance(event, ConnectFailed):
            text = "node %s epoch %d can not be reached: %s"
            logger.warning(text, node_id, epoch, event.reason)
        elif is_wanted:
            self._connected[node_id] = epoch
            logger.info("connected to node %s epoch %d in %d ms", node_id, epoch, event.took_ms)

    def _end_connecting(self, node_id: NodeId, epoch: Epoch) -> bool:
        """Whether the peer is still wanted, in this epoch."""
        if self._connecting.get(node_id) != epoch:
            return False
        del self._connecting[node_id]
        return True

    def _on_reply(self, call_id: int, data: bytes, now_ms: int) -> None:
        try:
            reply = decode(data, max_bytes=MAX_CALL_BYTES, expect=_DirectoryReply)
        except RemoteProtocolError as exc:
            logger.warning("the directory's answer can not be used: %s", exc)
            self._do(self._core.on_directory_failed(call_id, now_ms))
            return
        self._do(self._core.on_directory_reply(call_id, reply, now_ms))

    def _on_link_opened(self, opened: LinkOpened) -> None:
        info = msgspec.structs.replace(
            self._core.info,
            epoch=self._opening.on_opened(),
            link_name=opened.name,
            link_metadata=opened.metadata,
        )
        self._do(self._core.on_linked(info, clock_ms()))

    # ---- what NodeCore wants done

    def _do(self, commands: Sequence[NodeCommand]) -> None:
        """In order. A run of effects is written in one go, before what comes after it."""
        effects = []
        for command in commands:
            if isinstance(command, _EFFECTS):
                effects.append(command)
                continue
            if effects:
                self._slab.apply_all(effects)
                effects = []
            self._doers[type(command)](command)
        if effects:
            self._slab.apply_all(effects)

    def _write_client(self, write: WriteClient) -> None:
        self._slab.write_client(
            write.row, write.client, role=write.role, engine_nonce=write.engine_nonce
        )

    def _send(self, send: Send) -> None:
        fd = self._slab.fd if send.with_fd else None
        self._server.send(SessionId(send.session_id), send.message, fd)

    def _drop(self, drop: Drop) -> None:
        self._server.drop(SessionId(drop.session_id), drop.reason)

    def _watch(self, watch: WatchProcess) -> None:
        if (watch.pid, watch.start_ticks) in self._watched:
            return
        pidfd = open_pidfd(watch.pid, watch.start_ticks)
        if pidfd is None:
            self._gone.append((watch.pid, watch.start_ticks))
            return
        watched = _Watched(watch.pid, watch.start_ticks, pidfd)
        self._watched[watch.pid, watch.start_ticks] = watched
        self._selector.register(pidfd, selectors.EVENT_READ, watched)

    def _call(self, call: CallDirectory) -> None:
        self._calls.set(call.call_id, clock_ms() + call.timeout_ms)
        self._control.call(call.call_id, call.message)

    def _connect(self, connect: ConnectPeer) -> None:
        info = connect.info
        self._connected.pop(info.node_id, None)
        self._peers[info.node_id] = self._connecting[info.node_id] = info.epoch
        self._wake(info.node_id)
        self._link.submit(connect)

    def _disconnect(self, disconnect: DisconnectPeer) -> None:
        for epochs in (self._peers, self._connecting, self._connected):
            if epochs.get(disconnect.node_id) == disconnect.epoch:
                del epochs[disconnect.node_id]
        self._woken_ms.pop(disconnect.node_id, None)
        self._control.forget(disconnect.node_id)
        self._link.submit(disconnect)

    def _post_read(self, post: PostRead) -> None:
        self._wake(post.node_id)
        if self._spans is not None:
            self._spans.begin(post)
        self._link.submit(post)

    def _wake(self, node_id: NodeId) -> None:
        """A peer polls its link slowly while it is idle, and reads from it wait for that."""
        now_ms = clock_ms()
        if now_ms - self._woken_ms.get(node_id, -WAKE_PERIOD_MS) >= WAKE_PERIOD_MS:
            self._woken_ms[node_id] = now_ms
            self._control.wake(node_id)

    def _measure_read(self, read: MeasureRead) -> None:
        self._wake(read.node_id)
        self._link.submit(read)

    def _abandon_read(self, abandon: AbandonRead) -> None:
        if self._spans is not None:
            self._spans.end(abandon.read_id, "abandoned")
        self._link.submit(abandon)

    def _take_epoch(self, new: TakeEpoch) -> None:
        self._opening.begin(self._slab.take_epoch(new.epoch), clock_ms())

    def _took_over(self, took: TookOver) -> None:
        self._taking_over.pop(took.call_id).set_result(list(took.keys))

    def _compare(self, asked: CompareBlocks) -> None:
        self._comparing.submit(asked)

    def _log(self, log: Log) -> None:
        self._recent.append((clock_ms(), log.text))
        logger.log(logging.WARNING if log.warning else logging.INFO, "%s", log.text)

    def _restart(self, restart: Restart) -> None:
        die(f"this NodeStore starts anew: {restart.reason}")

    # ---- questions, on this thread (see Inbox)

    def block_bytes(self, key: BlockKey) -> bytes | None:
        """A copy of the payload of a READY block."""
        place = self._store.find(key)
        if place is None:
            return None
        return bytes(self._slab.memory[place.offset : place.offset + place.bytes])

    def block_keys(self) -> list[bytes]:
        """Of all READY blocks."""
        return [place.key for place in self._store.entries()]

    def drain(self) -> tuple[list[bytes], list[int]]:
        """Keys and payload bytes of all READY blocks, after which engines add none."""
        self._do(self._core.drain(clock_ms()))
        places = list(self._store.entries())
        return [place.key for place in places], [place.bytes for place in places]

    def take_over(
        self, wants: Sequence[tuple[BlockKey, int]], deadline_ms: int, done: "Future[list[bytes]]"
    ) -> None:
        """done: will have the keys that are here then."""
        self._take_overs += 1
        self._taking_over[self._take_overs] = done
        now_ms = clock_ms()
        self._do(
            self._core.take_over(self._take_overs, wants, deadline_ms=deadline_ms, now_ms=now_ms)
        )

    def measure(self, node_id: NodeId, done: "Future[Measured]") -> None:
        """done: will have how good the link to this node is."""
        self._meter.begin(node_id, self._peers.get(node_id), done, clock_ms())

    def clear(self) -> None:
        self._do(self._core.clear(clock_ms()))

    def payload(self) -> tuple[int, int]:
        """Where it begins and ends in the slab."""
        geometry = self._slab.geometry
        return geometry.payload_offset, geometry.slab_bytes

    def wipe(self, begin: int, end: int) -> int:
        """Zero what no block lies in, between these offsets of the slab; how many bytes."""
        return self._slab.zero(self._store.unoccupied(begin, end))

    def recent(self) -> list[tuple[int, str]]:
        """The last events, each with how many ms ago it was, the oldest first."""
        now_ms = clock_ms()
        return [(now_ms - at_ms, what) for at_ms, what in self._recent]

    def check(self) -> None:
        self._core.check()
        self._slab.check()
        self._server.check()

    def status(self) -> dict[str, Any]:
        core = self._core.snapshot()
        classes = core["store"]["classes"]
        return core | {
            "slab_bytes": self._slab.geometry.slab_bytes,
            "used_bytes": sum(row["occupied"] * row["slot_bytes"] for row in classes),
            "block_count": core["store"]["ready"],
            "client_count": len(core["clients"]),
            "roster_version": core["announcing"]["roster_version"],
            "peers_connecting": len(self._connecting),
            "peers_connected": len(self._connected),
            "slab": self._slab.snapshot(),
            "link": self._link.snapshot(),
            "server": self._server.snapshot(),
        }


def clock_ms() -> int:
    return time.monotonic_ns() // 1_000_000
