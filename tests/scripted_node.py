"""A NodeStore's end of the local socket that says what a test wants: the real LocalServer, in a
thread with its selectors loop, and a script instead of a NodeCore.

    node.script[Lookup] = lambda lookup: None        # heard and not answered
    node.wait(Lookup)                                # sleeps until the next one has come
    node.say(LookupReply(...))                       # to the newest session
"""

import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from kvray.core.codec import pack_slots
from kvray.core.header_page import HEADER_PAGE_DTYPE
from kvray.core.ids import KEY_BYTES, Epoch, Generation, NodeId, SlabId, SlotIndex
from kvray.core.layout import FORMAT_VERSION, MAGIC, Geometry
from kvray.core.messages import (
    Ack,
    Grant,
    Hello,
    HelloReply,
    KeyState,
    LocalAnswer,
    LocalRequest,
    Lookup,
    LookupReply,
    Reserve,
    ReserveReply,
)
from kvray.node.server import LocalServer, MessageReceived, SessionClosed, SessionId, SessionOpened

M = TypeVar("M")
PATIENCE_S = 10.0  # for anything that must happen: a busy machine is slow, a bug is for ever
GEOMETRY = Geometry(slab_bytes=4 * 1024**2, extent_bytes=1024**2)
PAGE = 4_096


def place_of(slot: int, generation: int = 1) -> tuple[int, int, int]:
    """A place of GEOMETRY, cut into pages."""
    return slot, generation, GEOMETRY.slot_offset(SlotIndex(slot), PAGE)


def rows_of(*places: tuple[int, int, int]) -> bytes:
    return pack_slots((SlotIndex(s), Generation(g), offset) for s, g, offset in places)


def make_slab(slab_id: SlabId) -> int:
    """A descriptor of an empty slab that MappedSlab takes."""
    fd = os.memfd_create("slab")
    os.ftruncate(fd, GEOMETRY.slab_bytes)
    page = np.zeros(1, HEADER_PAGE_DTYPE)
    page["magic"], page["format"] = np.void(MAGIC), FORMAT_VERSION
    page["slab_id"] = np.void(slab_id)
    page["slab_bytes"], page["extent_bytes"] = GEOMETRY.slab_bytes, GEOMETRY.extent_bytes
    os.pwrite(fd, page.tobytes(), 0)
    return fd


def all_hits(lookup: Lookup) -> LookupReply:
    count = len(lookup.keys) // KEY_BYTES
    slots = rows_of(*(place_of(i % 256) for i in range(count)))
    return LookupReply(lookup.op, bytes([KeyState.HIT]) * count, slots)


def all_waits(lookup: Lookup) -> LookupReply:
    return LookupReply(lookup.op, bytes([KeyState.WAIT]) * (len(lookup.keys) // KEY_BYTES), b"")


def all_granted(reserve: Reserve) -> ReserveReply:
    count = len(reserve.keys) // KEY_BYTES
    slots = rows_of(*(place_of(i % 256, generation=10 + i) for i in range(count)))
    return ReserveReply(reserve.op, bytes([Grant.GRANTED]) * count, slots)


class ScriptedNode:
    """Answers like an empty-headed NodeStore until the script says otherwise."""

    def __init__(self, path: Path, *, slab_id: bytes = b"S" * 16, epoch: int = 1) -> None:
        self.slab_id, self.epoch = SlabId(slab_id), Epoch(epoch)
        self.slab_fd = make_slab(self.slab_id)
        # None: no answer. A list: several.
        self.script: dict[type[Any], Callable[[Any], Any]] = {
            Hello: self.welcome,
            Lookup: all_hits,
            Reserve: all_granted,
        }
        self.heard: list[LocalRequest] = []
        self.closed: list[SessionClosed] = []
        self.sessions: list[SessionId] = []
        self._unread: dict[type[Any], int] = {}
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0)
        self._stopping = False
        self.server = LocalServer(str(path))
        self._thread = threading.Thread(target=self._run, name="scripted-node")
        self._thread.start()
        self.call(lambda: None)  # from here on it has all its descriptors

    def welcome(self, hello: Hello) -> HelloReply:
        return HelloReply(
            hello.op,
            NodeId("node"),
            self.epoch,
            self.slab_id,
            GEOMETRY.slab_bytes,
            GEOMETRY.extent_bytes,
        )

    # ---- for the test's thread

    def wait(self, kind: type[M]) -> M:
        """The next message of this kind that this method has not returned yet."""
        with self._changed:
            start = self._unread.get(kind, 0)

            def found() -> list[tuple[int, Any]]:
                return [(i, m) for i, m in enumerate(self.heard) if i >= start and type(m) is kind]

            assert self._changed.wait_for(found, PATIENCE_S), f"no {kind.__name__} has come"
            index, message = found()[0]
            self._unread[kind] = index + 1
            result: M = message
            return result

    def wait_closed(self) -> SessionClosed:
        with self._changed:
            assert self._changed.wait_for(lambda: self.closed, PATIENCE_S), "no session has closed"
            return self.closed.pop(0)

    def all(self, kind: type[M]) -> list[M]:
        with self._changed:
            return [message for message in self.heard if isinstance(message, kind)]

    def say(self, message: LocalAnswer) -> None:
        """To the newest session."""
        self.call(lambda: self.server.send(self.sessions[-1], message))

    def hang_up(self) -> None:
        """The newest session's connection breaks; nothing is said."""

        def shut_down() -> None:
            self.server._sessions[self.sessions[-1]].sock.shutdown(socket.SHUT_RDWR)  # noqa: SLF001

        self.call(shut_down)

    def drop(self, reason: str) -> None:
        self.call(lambda: self.server.drop(self.sessions[-1], reason))

    def call(self, act: Callable[[], None]) -> None:
        """Do something on the server's thread; returns when it is done."""
        done = threading.Event()

        def call() -> None:
            act()
            done.set()

        self._calls.append(call)
        os.eventfd_write(self._wake_fd, 1)
        assert done.wait(PATIENCE_S)

    def stop(self) -> None:
        """Like a NodeStore that ends; its socket goes with it."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        os.close(self._wake_fd)
        os.close(self.slab_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # ---- its own thread

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_fd, selectors.EVENT_READ)
            self.server.register(selector)
            while not self._stopping:
                for key, mask in selector.select():
                    if key.data is self.server:
                        self._take(self.server.on_ready(key, mask))
                    else:
                        os.eventfd_read(self._wake_fd)
                        while self._calls:
                            self._calls.popleft()()
                    self.server.check()
                self._take(self.server.take_events())
            self.server.close()

    def _take(self, events: Sequence[SessionOpened | MessageReceived | SessionClosed]) -> None:
        for event in events:
            with self._changed:  # before the answer: whoever has it finds the question here
                match event:
                    case SessionOpened():
                        self.sessions.append(event.session_id)
                    case MessageReceived():
                        self.heard.append(event.message)
                    case SessionClosed():
                        self.closed.append(event)
                self._changed.notify_all()
            if isinstance(event, MessageReceived):
                self._answer(event.session_id, event.message)

    def _answer(self, session_id: SessionId, message: LocalRequest) -> None:
        act = self.script.get(type(message))
        answer = Ack(message.op) if act is None else act(message)
        answers: list[LocalAnswer | None] = answer if isinstance(answer, list) else [answer]
        for one in answers:
            if one is None:
                continue
            fd = self.slab_fd if isinstance(one, HelloReply) else None
            self.server.send(session_id, one, fd)
