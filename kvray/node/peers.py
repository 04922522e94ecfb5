"""The link thread: everything that a NodeStore reads from its peers, and what they read of it.

    NodeStore's loop ──submit(command)──▶ queue ──▶ LinkThread ──▶ LinkLoop ──▶ Link
           ▲                                                          │
           └────────── on_event: append, ring ◀───── LinkEvent ───────┘

A thread of its own, because a read over cma blocks for as long as the copy takes, and because peers
get on only while somebody polls for them (see link.nixl).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from kvray.node.link_loop import (
    ConnectFailed,
    Ending,
    LinkCommand,
    LinkEvent,
    LinkFailed,
    LinkLoop,
    LinkOpened,
    MakeLink,
    OpenLink,
    PeerConnected,
    ReadEnded,
    Wake,
)
from kvray.node.link_measures import MeasureEnded, MeasureRead
from kvray.node.scratch import PAGE_COUNT, HeaderScratch

__all__ = [
    "ConnectFailed",
    "Ending",
    "LinkCommand",
    "LinkEvent",
    "LinkFailed",
    "LinkOpened",
    "LinkThread",
    "MakeLink",
    "MeasureEnded",
    "MeasureRead",
    "PeerConnected",
    "ReadEnded",
]

logger = logging.getLogger(__name__)

MAX_COMMANDS = 65_536  # waiting to be done: core.fetch stops far below, so more is a bug
CLOSE_LIMIT_S = 5.0  # a step blocks for the largest copy, 32 MiB, or while an agent is made


class LinkThread:
    """A LinkLoop in a thread of its own. All methods may be called by any one other thread.

    on_event is called on the link thread: it appends to a queue and rings, and never blocks. What
    is asked before a link has been opened is refused.
    """

    def __init__(
        self,
        *,
        slab_address: int,
        slab_bytes: int,
        on_event: Callable[[LinkEvent], None],
        scratch_pages: int = PAGE_COUNT,
    ) -> None:
        self._on_event = on_event
        self._scratch = HeaderScratch(scratch_pages)
        self._loop = LinkLoop(
            slab_address=slab_address,
            slab_bytes=slab_bytes,
            on_event=on_event,
            scratch=self._scratch,
        )
        self._commands: deque[LinkCommand] = deque()
        self._bell = _Bell()
        self._closing = False
        # A daemon: should a call into NIXL never return, the process can end all the same.
        self._thread = threading.Thread(target=self._run, name="kvray-link", daemon=True)
        self._thread.start()

    def open(self, make_link: MakeLink) -> None:
        """Answered by LinkOpened or LinkFailed. Again for a new epoch: peers are forgotten then,
        reads in flight go on with the old link until they end.
        """
        self.submit(OpenLink(make_link))

    def submit(self, command: LinkCommand) -> None:
        """Done in the order of submission, at once, whatever the pace of polling."""
        assert len(self._commands) < MAX_COMMANDS
        self._commands.append(command)
        self._bell.ring()

    def wake(self) -> None:
        """A peer is about to connect to us or to read from us: poll quickly for a while."""
        self.submit(Wake())

    def close(self, *, limit_s: float = CLOSE_LIMIT_S) -> int:
        """Ends thread and link. What has not been begun is dropped, and no event comes any more.

        Returns how many reads have not ended: if that is not 0, the slab must stay mapped until
        the process ends.
        """
        self._closing = True
        self._bell.ring()
        self._thread.join(limit_s)
        in_flight = self._loop.in_flight
        if self._thread.is_alive():
            logger.error("the link thread does not end; a call into the link hangs")
            in_flight = max(1, in_flight)
        if in_flight:
            _kept.append(self._scratch)
        return in_flight

    def snapshot(self) -> dict[str, int | str]:
        return self._loop.snapshot()

    def _run(self) -> None:
        try:
            self._steps()
        except Exception as exc:
            # The outermost loop of this thread. The NodeStore takes the event as its own end.
            logger.exception("the link thread has ended")
            self._on_event(LinkFailed(f"{type(exc).__name__}: {exc}", fatal=True))

    def _steps(self) -> None:
        loop = self._loop
        while not self._closing:
            if self._commands:
                loop.do(self._commands.popleft(), _now_us())
            loop.poll(_now_us())
            loop.settle(_now_us())
            if not self._commands:
                self._bell.wait(loop.next_wait_us(_now_us()) / 1e6)
        loop.close()


class _Bell:
    """Wakes one thread, now or at its next wait. A lock that is held unless it has been rung.

    Waiting for a lock is the cheapest timed wait there is, and what idling costs is its wake-ups.
    Not SimpleQueue.get(timeout): a short one may never return, since CPython (3.11, 3.12) takes
    what is left of a timeout that has just passed, a negative number, for no timeout.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # it has been rung already
            self._lock.release()

    def wait(self, limit_s: float) -> None:
        self._lock.acquire(timeout=limit_s)


_kept: list[HeaderScratch] = []  # reads may still write into these; they end with the process


def _now_us() -> int:
    return time.monotonic_ns() // 1_000
