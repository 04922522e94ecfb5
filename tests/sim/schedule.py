"""What happens next. Virtual time, in whole microseconds, and nothing else moves it."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Action = Callable[..., None]


class Schedule:
    """Events that are due at the same moment happen in the order in which they were set."""

    def __init__(self) -> None:
        self.now_us = 0
        self.event_count = 0
        self._heap: list[tuple[int, int, Action, tuple[Any, ...]]] = []
        self._set_count = 0

    def after(self, delay_us: int, action: Action, *args: Any) -> None:
        self.at(self.now_us + delay_us, action, *args)

    def at(self, at_us: int, action: Action, *args: Any) -> None:
        self._set_count += 1
        heappush(self._heap, (max(at_us, self.now_us), self._set_count, action, args))

    def run(self, until_us: int) -> int:
        """Let the next event happen if it is due by then; else time ends there. How many did."""
        if not self._heap or self._heap[0][0] > until_us:
            self.now_us = until_us
            return 0
        self.now_us, _, action, args = heappop(self._heap)
        self.event_count += 1
        action(*args)
        return 1
