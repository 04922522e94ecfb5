"""The NodeStore's end of the local socket: who is connected, what they said, what waits for them.

    accept ──uid is ours──▶ GREETING ──Hello of the process behind the socket──▶ OPEN ──▶ closed
       │                        │                                                 │
       └────────────────────────┴──── Refused(fatal) with the reason ◀────────────┘

Driven by the one selectors loop of the NodeStore's thread; it never blocks, has no thread and no
clock of its own, and an idle server costs nothing:

    for key, mask in selector.select(timeout_s):
        if key.data is server:
            for event in server.on_ready(key, mask): ...
    for event in server.take_events(): ...       # closings that sends and drops have caused

Each opened session ends in exactly one SessionClosed, whoever ended it, and nothing of it comes
after that. What a client may ask is checked here only as far as the codec goes; what it means is
NodeCore's. A client that breaks the protocol or does not read is dropped, alone.
"""

import contextlib
import errno
import logging
import os
import selectors
import socket
import stat
import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NewType

import msgspec

from kvray.core.codec import decode, encode
from kvray.core.ids import OpId
from kvray.core.layout import MAX_CLIENTS
from kvray.core.messages import MAX_MESSAGE_BYTES, Hello, LocalAnswer, LocalRequest, Refused
from kvray.errors import ConfigError, RemoteProtocolError, SlabBusyError
from kvray.node import process, wire
from kvray.ownership import peer_of

logger = logging.getLogger("kvray.node")

SessionId = NewType("SessionId", int)  # one connection; never reused in a NodeStore's life

NO_OP = OpId(0)  # of a Refused that answers no request
MAX_SESSIONS = MAX_CLIENTS  # each needs a row of the slab's client table
BACKLOG = 128  # more than MAX_SESSIONS: a whole node's clients come back at once after a restart
HELLO_DEADLINE_S = 5.0  # a client says hello as its first act; older silent ones make room
MAX_QUEUED_MESSAGES = 512  # besides the socket's own buffer; a client that is so far behind
MAX_QUEUED_BYTES = 4 * 1024**2  # (seconds of traffic) hangs, and is better off with a new hello
MAX_PATH_BYTES = 107  # sun_path, less its terminating zero
MAX_REASON_CHARS = 512  # told and logged: a reason may quote what a client has sent
MAX_WARNED = 256  # (pid, reason) pairs remembered, so that a loop does not fill the log


class SessionOpened(msgspec.Struct, frozen=True):
    """A client of ours has said hello; its Hello follows as MessageReceived."""

    session_id: SessionId
    pid: int
    uid: int


class MessageReceived(msgspec.Struct, frozen=True, gc=False):
    """A struct for its price: one is made for each message."""

    session_id: SessionId
    message: LocalRequest


class SessionClosed(msgspec.Struct, frozen=True):
    session_id: SessionId
    reason: str


ServerEvent = SessionOpened | MessageReceived | SessionClosed


class _Stage(Enum):
    """See the picture in the module's docstring."""

    GREETING = "greeting"
    OPEN = "open"


@dataclass(slots=True)
class _Session:
    session_id: SessionId
    sock: socket.socket
    pid: int
    uid: int
    accepted_s: float
    stage: _Stage = _Stage.GREETING
    queue: deque[tuple[bytes, int | None]] = field(default_factory=deque)  # fds in it are ours
    queued_bytes: int = 0


class LocalServer:
    """One per NodeStore. All methods belong to the thread of its selector.

    Raises ConfigError if the path can not be a socket's, SlabBusyError if somebody listens there
    already. The directory of `path` must exist and be ours alone; the slab's lock, held by the
    caller, keeps two NodeStores from starting on one path at the same moment.
    """

    def __init__(
        self, path: str, *, uid: int | None = None, max_sessions: int = MAX_SESSIONS
    ) -> None:
        self._path = Path(path)
        self._uid = os.getuid() if uid is None else uid
        self._max_sessions = max_sessions
        self._sessions: dict[SessionId, _Session] = {}
        self._by_fd: dict[int, _Session] = {}
        self._events: list[ServerEvent] = []
        self._next_id = 1
        self._buffer = wire.make_buffer()
        self._warned: set[tuple[int, str]] = set()
        self._selector: selectors.BaseSelector | None = None
        self._listener = _listen(path)
        self._inode = self._path.stat().st_ino
        # Given up for a moment when descriptors run out, so that a caller can be turned away
        # instead of waking the loop for ever.
        self._reserve_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def register(self, selector: selectors.BaseSelector) -> None:
        """Listen from now on. Everything of ours is registered with data=self."""
        assert self._selector is None
        self._selector = selector
        selector.register(self._listener, selectors.EVENT_READ, self)

    def on_ready(self, key: selectors.SelectorKey, mask: int) -> list[ServerEvent]:
        """Do what the selector says is possible: one accept, or one message of a session, so that
        a talkative client does not hold up the others. Returns all events since the last call.
        """
        if key.fd == self._listener.fileno():
            self._accept()
        elif (session := self._by_fd.get(key.fd)) is not None:
            if mask & selectors.EVENT_WRITE:
                self._flush(session)
            if mask & selectors.EVENT_READ and session.session_id in self._sessions:
                self._receive(session)
        return self.take_events()

    def take_events(self) -> list[ServerEvent]:
        events, self._events = self._events, []
        return events

    def send(self, session_id: SessionId, message: LocalAnswer, fd: int | None = None) -> None:
        """Send or queue. A session that is gone by now is no error; one whose queue is full is
        dropped. fd stays the caller's.
        """
        session = self._sessions.get(session_id)
        if session is None:
            return
        data = encode(message)
        if session.queue:
            self._queue(session, data, fd)
            return
        try:
            wire.send(session.sock, data, fd)
        except BlockingIOError:
            self._queue(session, data, fd)
        except OSError as exc:
            self._close(session, f"the client is gone ({exc.strerror})")

    def drop(self, session_id: SessionId, reason: str) -> None:
        """End a session for a fault of its client; it is told the reason if it still reads."""
        session = self._sessions.get(session_id)
        if session is not None:
            self._refuse(session, reason)

    def close(self) -> None:
        """End every session and leave nothing behind, the socket's file included. Idempotent."""
        if self._listener.fileno() < 0:
            return
        for session in list(self._sessions.values()):
            self._close(session, "the NodeStore stops")
        if self._selector is not None:
            self._selector.unregister(self._listener)
            self._selector = None
        self._listener.close()
        os.close(self._reserve_fd)
        # A successor may have put its own socket there: then it is not ours to remove.
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    # ---- a session's life

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # otherwise the caller went away again before we came
        wire.prepare(sock)
        pid, uid = peer_of(sock)
        session = _Session(SessionId(self._next_id), sock, pid, uid, time.monotonic())
        self._next_id += 1
        self._sessions[session.session_id] = session
        self._by_fd[sock.fileno()] = session
        assert self._selector is not None
        self._selector.register(sock, selectors.EVENT_READ, self)
        if uid != self._uid:
            self._refuse(session, f"user {uid} may not use the NodeStore of user {self._uid}")
        elif len(self._sessions) > self._max_sessions and not self._make_room(session):
            self._refuse(session, f"{self._max_sessions} clients are connected; more can not be")

    def _turn_away(self) -> None:
        self._warn(0, "a client was turned away: this process has no descriptor left")
        os.close(self._reserve_fd)
        with contextlib.suppress(OSError):  # it went away by itself, or another thread was faster
            self._listener.accept()[0].close()
        self._reserve_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _make_room(self, newcomer: _Session) -> bool:
        """Sessions are in order of arrival; whoever connected and never spoke goes first."""
        for session in self._sessions.values():
            if session.accepted_s > newcomer.accepted_s - HELLO_DEADLINE_S:
                return False
            if session.stage is _Stage.GREETING:
                self._refuse(session, f"no hello within {HELLO_DEADLINE_S:.0f} s")
                return True
        return False

    def _receive(self, session: _Session) -> None:
        try:
            packet = wire.receive(session.sock, self._buffer)
            if packet is None:
                self._close(session, "the client closed the connection")
                return
            message = decode(packet.data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalRequest)
        except BlockingIOError:
            return
        except RemoteProtocolError as exc:
            self._refuse(session, str(exc))
            return
        except OSError as exc:
            self._close(session, f"the client is gone ({exc.strerror})")
            return
        if isinstance(message, Hello):
            if (reason := _refusal(session, message)) is not None:
                self._refuse(session, reason, op=message.op)
                return
            if session.stage is _Stage.GREETING:
                session.stage = _Stage.OPEN
                self._events.append(SessionOpened(session.session_id, session.pid, session.uid))
        elif session.stage is _Stage.GREETING:
            self._refuse(session, f"{type(message).__name__} came before Hello")
            return
        self._events.append(MessageReceived(session.session_id, message))

    def _queue(self, session: _Session, data: bytes, fd: int | None) -> None:
        if (
            len(session.queue) >= MAX_QUEUED_MESSAGES
            or session.queued_bytes + len(data) > MAX_QUEUED_BYTES
        ):
            self._refuse(session, f"{len(session.queue)} answers wait and are not read")
            return
        session.queue.append((data, None if fd is None else os.dup(fd)))
        session.queued_bytes += len(data)
        if len(session.queue) == 1:
            self._watch(session, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _flush(self, session: _Session) -> None:
        while session.queue:
            data, fd = session.queue[0]
            try:
                wire.send(session.sock, data, fd)
            except BlockingIOError:
                return
            except OSError as exc:
                self._close(session, f"the client is gone ({exc.strerror})")
                return
            session.queue.popleft()
            session.queued_bytes -= len(data)
            if fd is not None:
                os.close(fd)
        self._watch(session, selectors.EVENT_READ)

    def _watch(self, session: _Session, mask: int) -> None:
        assert self._selector is not None
        self._selector.modify(session.sock, mask, self)

    def _refuse(self, session: _Session, reason: str, *, op: OpId = NO_OP) -> None:
        """Drop a session and say why, to it and, once per process and reason, to people."""
        reason = reason[:MAX_REASON_CHARS]
        self._warn(session.pid, reason)
        if not session.queue:  # behind a full queue nothing can be said
            with contextlib.suppress(OSError):  # it does not read: the end says enough
                wire.send(session.sock, encode(Refused(op=op, reason=reason, fatal=True)))
        self._close(session, reason)

    def _close(self, session: _Session, reason: str) -> None:
        assert self._selector is not None
        self._selector.unregister(session.sock)
        del self._sessions[session.session_id]
        del self._by_fd[session.sock.fileno()]
        # A close with unread messages would reset the connection, and the client would see that
        # before our last words. So: no more of them, read out what is there, then close.
        try:
            session.sock.shutdown(socket.SHUT_RD)
            while session.sock.recv(1):
                pass
        except OSError:
            pass  # the client was faster
        session.sock.close()
        for _, fd in session.queue:
            if fd is not None:
                os.close(fd)
        if session.stage is _Stage.OPEN:
            self._events.append(SessionClosed(session.session_id, reason))

    def _warn(self, pid: int, reason: str) -> None:
        if (pid, reason) in self._warned:
            return
        if len(self._warned) >= MAX_WARNED:
            self._warned.clear()
        self._warned.add((pid, reason))
        logger.warning("dropped the client with pid %d: %s", pid, reason)

    # ---- for people and tests

    def snapshot(self) -> dict[str, Any]:
        return {
            "path": str(self._path),
            "max_sessions": self._max_sessions,
            "sessions": [
                {
                    "session_id": int(session.session_id),
                    "pid": session.pid,
                    "stage": session.stage.value,
                    "queued_messages": len(session.queue),
                    "queued_bytes": session.queued_bytes,
                }
                for session in self._sessions.values()
            ],
        }

    def check(self) -> None:
        assert len(self._sessions) == len(self._by_fd) <= self._max_sessions
        for session in self._sessions.values():
            assert self._by_fd[session.sock.fileno()] is session
            assert session.queued_bytes == sum(len(data) for data, _ in session.queue)
            assert len(session.queue) <= MAX_QUEUED_MESSAGES
            assert session.queued_bytes <= MAX_QUEUED_BYTES
            if self._selector is not None:
                mask = self._selector.get_key(session.sock).events
                assert bool(mask & selectors.EVENT_WRITE) == bool(session.queue)


def _refusal(session: _Session, hello: Hello) -> str | None:
    """Why this Hello is not of the process behind the socket; None if it is.

    A client's processes are watched by pid (rule 3), so one that can not be named is not served.
    """
    if session.pid == 0:
        return "this process is in another pid namespace and can not be watched; it runs uncached"
    if hello.client.pid != session.pid:
        return (
            f"hello says pid {hello.client.pid}, the socket says {session.pid} (another pid "
            f"namespace, or a forked child); it runs uncached"
        )
    start_ticks = process.start_ticks(session.pid)
    if start_ticks is None:
        return f"the start time of pid {session.pid} can not be read; it runs uncached"
    if hello.client.start_ticks != start_ticks:
        return (
            f"hello says that pid {session.pid} started at tick {hello.client.start_ticks}, "
            f"its kernel says {start_ticks}; it runs uncached"
        )
    return None


def _listen(path: str) -> socket.socket:
    """A listening socket at path, for its owner only."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path!r} has {len(os.fsencode(path))} bytes; "
            f"the kernel takes at most {MAX_PATH_BYTES}"
        )
    listener = wire.make_socket()
    try:
        try:
            listener.bind(path)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise ConfigError(f"no socket can be made at {path!r}: {exc.strerror}") from exc
            _remove_stale(path)
            listener.bind(path)
        Path(path).chmod(0o600)  # before listen: until then nobody can connect
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a NodeStore that was killed, and nothing else."""
    if not stat.S_ISSOCK(Path(path).lstat().st_mode):
        raise ConfigError(f"{path!r} exists and is not a socket; remove it or choose another path")
    with wire.make_socket() as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except OSError:
            pass  # EAGAIN: its backlog is full; EPROTOTYPE: another kind of socket. Both listen.
    raise SlabBusyError(f"a NodeStore listens on {path!r} already")
