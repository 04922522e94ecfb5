"""The opening of a link, again and again until there is one. No thread, no clock.

    begin(epoch) ──▶ asked ──opened──▶ done, until the next epoch
                     ▲   │
                     │   ├──failed──▶ waits, longer and longer
                     └───┼──────────────┘
                         └──no answer for DEADLINE_MS──▶ this process starts anew

A NodeStore whose link can not be opened keeps its slab, and serves its own engines from it. It
could not give it back: a read of the link before may not have ended.
"""

import logging
from collections.abc import Callable

from kvray.actors import die
from kvray.core.ids import Epoch
from kvray.errors import LinkError

logger = logging.getLogger("kvray.node")

# The first agent takes 0.4 to 1.4 s, and seconds on a busy host. A call into NIXL that takes longer
# than this does not come back, and holds up its thread: only a new process gets on.
DEADLINE_MS = 30_000
# Between attempts. The last one, and the agent after it, are to take less than 2 s; an attempt that
# fails costs as much as one that does not, so no shorter one for ever.
FIRST_PAUSE_MS, LAST_PAUSE_MS = 250, 1_000


class LinkOpening:
    """One per NodeStore. ask: asks the link thread for a link, named after this epoch."""

    def __init__(self, ask: Callable[[Epoch], None]) -> None:
        self.problem: LinkError | None = None  # of the last attempt
        self._ask = ask
        self._epoch: Epoch | None = None  # taken, while the link for it is being made
        self._is_asked = False
        self._due_ms = 0  # of the answer, or of the next attempt
        self._pause_ms = FIRST_PAUSE_MS

    def next_ms(self) -> int | None:
        """When on_tick has something to do. None: there is a link."""
        return None if self._epoch is None else self._due_ms

    def begin(self, epoch: Epoch, now_ms: int) -> None:
        assert self._epoch is None, "another one is being opened"
        self._epoch = epoch
        self._pause_ms = FIRST_PAUSE_MS
        self._try(epoch, now_ms)

    def on_opened(self) -> Epoch:
        """Which epoch it belongs to."""
        epoch = self._epoch
        assert epoch is not None
        assert self._is_asked
        if self.problem is not None:
            logger.info("there is a link again")
        self._epoch = self.problem = None
        return epoch

    def on_failed(self, reason: str, now_ms: int) -> None:
        assert self._epoch is not None
        assert self._is_asked
        if reason != str(self.problem):
            logger.error("no link can be opened, so peers do without this node: %s", reason)
        self.problem = LinkError(reason)
        self._is_asked = False
        self._due_ms = now_ms + self._pause_ms
        self._pause_ms = min(2 * self._pause_ms, LAST_PAUSE_MS)

    def on_tick(self, now_ms: int) -> None:
        if self._epoch is None or now_ms < self._due_ms:
            return
        if self._is_asked:
            die(f"no answer from NIXL in {DEADLINE_MS // 1_000} s: this NodeStore starts anew")
        self._try(self._epoch, now_ms)

    def _try(self, epoch: Epoch, now_ms: int) -> None:
        self._is_asked = True
        self._due_ms = now_ms + DEADLINE_MS
        self._ask(epoch)
