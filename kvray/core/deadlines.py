"""What is due when. A heap whose entries may be taken back.

Time is an argument, as everywhere in core. Items that are due at the same time come out in the
order in which they were set, so that a run can be repeated.
"""

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

SPARE_ENTRIES = 64  # dead entries that are not worth a clean-up


class Deadlines(Generic[T]):
    """At most one deadline an item. Verbs are O(log n); dead entries at most double the heap."""

    __slots__ = ("_count", "_heap", "_live")

    def __init__(self) -> None:
        self._live: dict[T, tuple[int, int]] = {}  # at_ms, and which set() it was
        self._heap: list[tuple[int, int, T]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, item: object) -> bool:
        return item in self._live

    def set(self, item: T, at_ms: int) -> None:
        """Replaces the item's deadline, if it has one."""
        self._count += 1
        self._live[item] = (at_ms, self._count)
        heappush(self._heap, (at_ms, self._count, item))
        self._tidy()

    def discard(self, item: T) -> None:
        if self._live.pop(item, None) is not None:
            self._tidy()

    def take_due(self, now_ms: int) -> list[T]:
        """Those whose time has come (at_ms <= now_ms), which have no deadline any more then."""
        due: list[T] = []
        while (at_ms := self.next_ms()) is not None and at_ms <= now_ms:
            _, _, item = heappop(self._heap)
            del self._live[item]
            due.append(item)
        return due

    def next_ms(self) -> int | None:
        """The earliest deadline; None if there is none."""
        while self._heap:
            at_ms, count, item = self._heap[0]
            if self._live.get(item) == (at_ms, count):
                return at_ms
            heappop(self._heap)
        return None

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._live) + SPARE_ENTRIES:
            self._heap = [(at_ms, count, item) for item, (at_ms, count) in self._live.items()]
            heapify(self._heap)

    def check(self) -> None:
        """Assert that heap and items agree, both ways."""
        live = {(at_ms, count, item) for item, (at_ms, count) in self._live.items()}
        assert live <= set(self._heap), "an item that never becomes due"
        assert len(self._heap) <= 2 * len(self._live) + SPARE_ENTRIES
