"""How a process of an engine finds its NodeStore, says hello, and stays with it. One thread.

    ┌─▶ find the socket ─▶ connect ─▶ Hello ─▶ HelloReply with the slab ─▶ listen until lost ─┐
    └───────────── wait: 50 ms, growing to 5 s; 30 s after a refusal; or until woken ◀────────┘

The thread sleeps in the kernel all the time that nothing happens. NodeClient (questions, answers,
outbox) and WorkerClient (only wants the slab) are built on it.
"""

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvray.core.codec import decode, encode
from kvray.core.ids import Epoch, NodeId, SlabId
from kvray.core.layout import Geometry
from kvray.core.messages import MAX_MESSAGE_BYTES, Hello, HelloReply, LocalAnswer, Refused
from kvray.errors import ConfigError, KVRayError, RemoteProtocolError
from kvray.node import wire
from kvray.node.mapped import MappedSlab
from kvray.ownership import check_own_peer

logger = logging.getLogger("kvray.node")

RETRY_FIRST_S = 0.05  # a NodeStore that Ray restarts needs 1 to 3 s; a vain knock takes 10 us
RETRY_LAST_S = 5.0  # what an engine waits at most when its NodeStore appears long after it
RETRY_GROWTH = 1.03  # so a client comes back that much later than it could have, at most
RETRY_REFUSED_S = 30.0  # another version, another pid namespace: only people change that
STABLE_S = 5.0  # a connection that ended sooner does not reset the wait: no tight loop of drops
HELLO_DEADLINE_S = 2.0  # a NodeStore answers in ms, and does not listen before it can


@dataclass(frozen=True, slots=True)
class Session:
    """What a NodeStore said in its HelloReply. slab: mapped in this process; the same object as
    before if it is the same slab, so that copies under way go on across a reconnect.
    """

    node_id: NodeId
    epoch: Epoch
    slab_id: SlabId
    geometry: Geometry
    slab: MappedSlab | None


class Connection:
    """One greeted socket. Whoever receives holds `reading`, whoever sends but does not receive
    holds `sending`; the connector's thread closes it under both, after `end` by anybody.
    """

    def __init__(self, sock: socket.socket, session: Session, *, wake_fd: int) -> None:
        self.sock = sock
        self.session = session
        self.reading = threading.Lock()
        self.sending = threading.Lock()
        self._ended = False
        self.refused = False  # the NodeStore does not want us: no use to come back soon
        self.reason = ""
        self._fd = sock.fileno()
        self._wake_fd = wake_fd
        self._buffer = wire.make_buffer()
        self._arrivals = select.epoll()  # the connector's thread sleeps in it
        self._arrivals.register(self._fd, select.EPOLLIN)
        self._arrivals.register(wake_fd, select.EPOLLIN)
        self._answer = select.poll()  # a caller that waits for its answer sleeps in it
        self._answer.register(self._fd, select.POLLIN)
        self._room = select.poll()  # the outbox sleeps in it
        self._room.register(self._fd, select.POLLOUT)

    def wait_arrival(self) -> None:
        """Sleep until a message, the end of the connection or the wake descriptor."""
        for fd, _ in self._arrivals.poll():
            if fd == self._wake_fd:
                os.eventfd_read(fd)

    def wait_answer(self, timeout_s: float) -> None:
        """Sleep until a message, the end or the timeout; poll rounds it up to a whole ms."""
        self._answer.poll(timeout_s * 1_000)

    def wait_room(self) -> None:
        """Sleep until the socket takes another message, or has ended."""
        self._room.poll()

    def divert(self) -> None:
        """From now on a message wakes wait_answer alone. A thread that receives and hands over
        costs an answer 5 to 40 us more (two wake-ups, a fight for the GIL) than a caller that
        reads by itself; this costs two system calls of 0.3 us.
        """
        self._arrivals.modify(self._fd, 0)

    def restore(self) -> None:
        self._arrivals.modify(self._fd, select.EPOLLIN)

    def hear(self, on_message: Callable[["Connection", LocalAnswer], None]) -> None:
        """Take one message if there is one. Any fault of the other side ends the connection."""
        assert self.reading.locked()
        try:
            packet = wire.receive(self.sock, self._buffer)
            if packet is None:
                self.end("the NodeStore closed the connection")
                return
            message = decode(packet.data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalAnswer)
            if isinstance(message, Refused) and message.fatal:
                self.end(message.reason, refused=True)
                return
            on_message(self, message)
        except BlockingIOError:
            pass
        except RemoteProtocolError as exc:
            self.end(f"the NodeStore broke the protocol: {exc}", refused=True)
        except OSError as exc:
            self.end(f"the connection broke: {exc.strerror}")

    def has_ended(self) -> bool:
        return self._ended

    def end(self, reason: str, *, refused: bool = False) -> None:
        """Wake everybody who sleeps on it. What has arrived can still be read."""
        if refused or not self._ended:
            self.reason = reason
        self.refused |= refused
        self._ended = True
        with contextlib.suppress(OSError):  # the other side was faster
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hear the last words, which say why we could not send any more; then let go."""
        assert self._ended, "others may still sleep on its number"
        with self.reading, self.sending:
            try:
                while not self.refused and (packet := wire.receive(self.sock, self._buffer)):
                    word = decode(packet.data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalAnswer)
                    if isinstance(word, Refused) and word.fatal:
                        self.end(word.reason, refused=True)
            except (OSError, RemoteProtocolError):
                pass  # it is over, whatever it was
            self._arrivals.close()
            self.sock.close()


class Connector:
    """The thread and its callbacks, which all run on it (`on_message` also on a caller of hear).

    hello: the next Hello, given the last session; or why none can be said now.
    on_open, on_lost: around the life of a connection; on_lost is called with `reading` held.
    map_slab=False closes the slab's descriptor and leaves Session.slab empty.
    """

    def __init__(
        self,
        *,
        name: str,
        find_socket: Callable[[], str | None],
        hello: Callable[[Session | None], Hello | str],
        on_open: Callable[[Connection], None],
        on_message: Callable[[Connection, LocalAnswer], None],
        on_lost: Callable[[], None],
        map_slab: bool,
        retry_first_s: float,
        retry_last_s: float,
    ) -> None:
        self.last: Session | None = None
        self.reason = "not started"  # why there is no connection; for people
        self._reported = ""  # the reason that was told last
        self._find_socket = find_socket
        self._hello = hello
        self._on_open = on_open
        self._on_message = on_message
        self._on_lost = on_lost
        self._map_slab = map_slab
        self._retry_first_s = retry_first_s
        self._retry_last_s = retry_last_s
        self._closing = False
        self._reported = ""  # the last reason that was logged
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wakes = select.poll()
        self._wakes.register(self._wake_fd, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Try to connect now instead of at the end of the wait."""
        if not self._closing:
            os.eventfd_write(self._wake_fd, 1)

    def close(self, deadline_s: float) -> bool:
        """End the thread; whether it has ended in time. Call once."""
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join(deadline_s)
        if self._thread.is_alive():
            return False
        os.close(self._wake_fd)
        return True

    # ---- the thread

    def _run(self) -> None:
        wait_s = self._retry_first_s
        while not self._closing:
            refused = False
            try:
                connection = self._greet()
            except (OSError, KVRayError) as exc:
                self._tell(str(exc))
                refused = not isinstance(exc, OSError)
            else:
                if connection is not None:
                    begun_s = time.monotonic()
                    self._stay(connection)
                    self._tell(connection.reason)
                    refused = connection.refused
                    if time.monotonic() - begun_s >= STABLE_S:
                        wait_s = self._retry_first_s
            self._wait(RETRY_REFUSED_S if refused else wait_s)
            wait_s = min(self._retry_last_s, wait_s * RETRY_GROWTH)

    def _greet(self) -> Connection | None:
        """One attempt. None, an OSError: not now. A KVRayError: not with this NodeStore."""
        path = self._find_socket()
        if path is None:
            self._tell("there is no NodeStore on this node")
            return None
        hello = self._hello(self.last)
        if isinstance(hello, str):
            self._tell(hello)
            return None
        sock = wire.make_socket()
        try:
            sock.connect(path)
            check_own_peer(sock, path)
            wire.send(sock, encode(hello))
            reply = self._await_reply(sock)
            if reply is None:
                sock.close()
                return None
            self.last = self._session(reply, hello)
            return Connection(sock, self.last, wake_fd=self._wake_fd)
        except BaseException:
            sock.close()
            raise

    def _await_reply(self, sock: socket.socket) -> wire.Packet | None:
        """None if this client is closed meanwhile."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        deadline_s = time.monotonic() + HELLO_DEADLINE_S
        while not self._closing:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"the NodeStore did not answer in {HELLO_DEADLINE_S:.0f} s")
            ready = [fd for fd, _ in poll.poll(left_s * 1_000)]
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if sock.fileno() in ready:
                packet = wire.receive(sock, wire.make_buffer(), takes_fd=True)
                if packet is None:
                    raise ConnectionResetError("the NodeStore closed the connection at hello")
                return packet
        return None

    def _session(self, packet: wire.Packet, hello: Hello) -> Session:
        """Raises RemoteProtocolError for a refusal or nonsense, SlabError if it is not mapped."""
        try:
            reply = decode(packet.data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalAnswer)
            if isinstance(reply, Refused):
                raise RemoteProtocolError(f"the NodeStore refused us: {reply.reason}")
            if not isinstance(reply, HelloReply) or reply.op != hello.op:
                raise RemoteProtocolError(f"{type(reply).__name__} is no answer to Hello")
            if packet.fd is None:
                raise RemoteProtocolError("the slab's descriptor did not come with HelloReply")
            slab = None
            if self._map_slab:
                if (last := self.last) is not None and last.slab_id == reply.slab_id:
                    slab = last.slab
                if slab is None:
                    slab = MappedSlab.from_fd(
                        packet.fd, reply.slab_bytes, reply.extent_bytes, reply.slab_id
                    )
            geometry = _geometry(reply)
        finally:
            if packet.fd is not None:
                os.close(packet.fd)
        return Session(reply.node_id, reply.epoch, reply.slab_id, geometry, slab)

    def _stay(self, connection: Connection) -> None:
        session = connection.session
        self.reason = self._reported = ""
        logger.info("connected to the NodeStore of %s, epoch %d", session.node_id, session.epoch)
        self._on_open(connection)
        try:
            while not connection.has_ended():
                if not self._closing:  # else the hello, answered just then, has taken the wake-up
                    connection.wait_arrival()
                if self._closing:
                    connection.end("this client is closed")
                with connection.reading:
                    if not connection.has_ended():
                        connection.hear(self._on_message)
        finally:  # also if a bug ends this thread: nobody may wait for it
            if not connection.has_ended():
                connection.end("the client's thread died")
            with connection.reading:
                self._on_lost()
            connection.close()

    def _wait(self, wait_s: float) -> None:
        if not self._closing and self._wakes.poll(wait_s * 1_000):
            os.eventfd_read(self._wake_fd)

    def _tell(self, reason: str) -> None:
        """Say once why this process goes on without kvray."""
        if reason != self._reported and not self._closing:
            self._reported = reason
            logger.warning("running uncached: %s", reason)
        self.reason = reason


def _geometry(reply: HelloReply) -> Geometry:
    try:
        return Geometry(slab_bytes=reply.slab_bytes, extent_bytes=reply.extent_bytes)
    except ConfigError as exc:
        raise RemoteProtocolError(f"the NodeStore announced an impossible slab: {exc}") from exc
