"""A NodeStore without Ray: real slab, socket, loop and link thread, and a directory that is here.

test thread ──bury──▶ DirectoryCore ◀── HereControl ◀──calls── Serving ──▶ LinkThread ──▶ Link
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvray.core.codec import encode
from kvray.core.directory import DirectoryCore
from kvray.core.ids import Epoch, NodeId, Term
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import (
    Announce,
    AnnounceReply,
    Locate,
    LocateReply,
    NodeHello,
    NodeHelloReply,
    NodeInfo,
)
from kvray.core.roster import NodeState
from kvray.core.store import StoreCore
from kvray.link.base import Link
from kvray.node.control import Control, DirectoryAnswered, _Call, _Wake
from kvray.node.inbox import Inbox
from kvray.node.peers import LinkThread
from kvray.node.server import LocalServer
from kvray.node.serving import Serving, clock_ms
from kvray.node.slab import SlabOwner
from tests.slabs import NODE, Host

MakeLink = Callable[[Epoch], Link]


class Here:
    """A directory in this process; any thread may ask it."""

    def __init__(self) -> None:
        self._core = DirectoryCore(Term(1))
        self._lock = threading.Lock()

    def answer(
        self, message: NodeHello | Announce | Locate
    ) -> NodeHelloReply | AnnounceReply | LocateReply:
        with self._lock:
            if isinstance(message, NodeHello):
                return self._core.on_hello(message, clock_ms())
            if isinstance(message, Announce):
                return self._core.on_announce(message, clock_ms())
            return self._core.on_locate(message, clock_ms())

    def lists(self, node_id: NodeId) -> bool:
        with self._lock:
            return self._core.state_of(node_id) is NodeState.ALIVE

    def bury(self, node_id: NodeId, epoch: Epoch) -> None:
        with self._lock:
            self._core.on_node_dead(node_id, epoch)


class HereControl(Control):
    """Asks a directory that is here, on the thread on which it would ask Ray."""

    def __init__(self, directory: Here, inbox: Inbox) -> None:
        super().__init__("test", inbox.append)
        self._here = directory

    def _call(self, call: _Call) -> None:
        answer = encode(self._here.answer(call.message))
        self._unended.discard(call.call_id)
        self._deliver(DirectoryAnswered(call.call_id, answer))

    def _wake(self, wake: _Wake) -> None:
        """There is nobody to knock at."""


class ServedNode:
    """See the module's docstring. make_link is called on the link thread."""

    def __init__(self, slab: SlabOwner, make_link: MakeLink) -> None:
        self.directory = Here()
        self.slab = slab
        self.inbox = Inbox()
        geometry = slab.geometry
        self.link = LinkThread(
            slab_address=slab.address, slab_bytes=geometry.slab_bytes, on_event=self.inbox.append
        )
        self.control = HereControl(self.directory, self.inbox)
        self._stopping = threading.Event()
        born_ms, wall_ms = clock_ms(), int(time.time() * 1_000)
        store = StoreCore(geometry, generation_mark=slab.generation_mark)
        store.adopt(slab.extents, slab.headers, now_ms=born_ms)
        self.serving = Serving(
            info=NodeInfo(
                node_id=NODE,
                epoch=slab.next_epoch(wall_clock_ms=wall_ms),
                link_name="",
                link_metadata=b"",
                slab_id=slab.slab_id,
                slab_address=slab.address,
                slab_bytes=geometry.slab_bytes,
                extent_bytes=geometry.extent_bytes,
                host="here",
                kvray_version="0",
                format_version=FORMAT_VERSION,
            ),
            slab=slab,
            store=store,
            link=self.link,
            control=self.control,
            server=LocalServer(str(slab.paths.socket)),
            inbox=self.inbox,
            open_link=lambda epoch: self.link.open(lambda: make_link(epoch)),
            born_ms=born_ms,
            wall_clock_offset_ms=wall_ms - born_ms,
        )
        self._thread = threading.Thread(
            target=self.serving.run, args=(self._stopping.is_set,), name="served-node"
        )

    @property
    def is_serving_peers(self) -> bool:
        """Linked, and on the directory's roster again."""
        return self.serving.is_linked and self.directory.lists(NODE)

    def start(self) -> None:
        self.control.start()
        self._thread.start()

    def bury(self) -> None:
        self.directory.bury(NODE, self.serving.epoch)

    def stop(self) -> int:
        """How many reads have not ended."""
        self._stopping.set()
        self.inbox.ring()
        self._thread.join()
        self.serving.close()
        self.control.close()
        in_flight = self.link.close()
        os.close(self.inbox.fileno())  # nobody rings any more
        return in_flight


@contextmanager
def served_node(runtime: Path, make_link: MakeLink) -> Iterator[ServedNode]:
    host = Host(runtime)
    slab = host.open()
    try:
        node = ServedNode(slab, make_link)
        node.start()
        try:
            yield node
        finally:
            node.stop()
    finally:
        slab.close(unlink=True)
