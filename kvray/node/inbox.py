"""What other threads have for the loop: appended by any, taken by one, rung through an eventfd."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvray.node.comparing import Compared
from kvray.node.control import DirectoryAnswered, DirectoryFailed
from kvray.node.peers import LinkEvent


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """Something to be worked out on the loop's thread, since the cores are not for two."""

    answer_it: Callable[[], Any]
    answer: "Future[Any]"


Event = LinkEvent | DirectoryAnswered | DirectoryFailed | Compared | Question


class Inbox:
    """append never blocks. Not bounded here: each sender has limits of its own on what it has
    under way (reads, calls, Ray's concurrency), and each of those comes back once.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Readable while there is something to take."""
        return self._bell

    def append(self, event: Event) -> None:
        self._events.append(event)
        self.ring()

    def ring(self) -> None:
        """Wake the loop without an event."""
        os.eventfd_write(self._bell, 1)

    def take(self) -> list[Event]:
        """All there is. The bell first: what comes after it rings again."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken
