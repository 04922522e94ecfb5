"""Asking the directory, for FetchCore: few calls at a time, each for many keys.

add ─▶ waits for a call ─▶ asked ─▶ answered, failed or late
"""

from kvray.core.break_even import Overhead
from kvray.core.commands import AskDirectory
from kvray.core.deadlines import Deadlines
from kvray.core.durations import Durations
from kvray.core.ids import BlockKey
from kvray.core.reads import Fetch, FetchLimits, FetchState


class Locates:
    """Every LOCATING block. One that is dropped while it is asked about stays in its call, and
    is recognised by its state.
    """

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._waiting: dict[BlockKey, Fetch] = {}
        self._asked: dict[int, list[Fetch]] = {}
        self._asked_ms: dict[int, int] = {}  # since when; as _asked
        self.overhead = Overhead()
        self.durations = Durations()  # of calls that were answered
        self._deadlines: Deadlines[int] = Deadlines()
        self._last_id = 0

    def __len__(self) -> int:
        """Calls under way."""
        return len(self._asked)

    def add(self, fetch: Fetch) -> None:
        self._waiting[fetch.key] = fetch

    def discard(self, fetch: Fetch) -> None:
        """It is dropped. An older block of this key may be so while a new one waits."""
        if self._waiting.get(fetch.key) is fetch:
            del self._waiting[fetch.key]

    def next_calls(self, now_ms: int) -> list[AskDirectory]:
        """As many as may be under way. Keys that find no call share the next one."""
        calls: list[AskDirectory] = []
        while self._waiting and len(self._asked) < self._limits.max_locates:
            keys = tuple(self._waiting)[: self._limits.max_locate_keys]
            self._last_id += 1
            self._asked[self._last_id] = [self._waiting.pop(key) for key in keys]
            self._asked_ms[self._last_id] = now_ms
            self._deadlines.set(self._last_id, now_ms + self._limits.locate_deadline_ms)
            calls.append(AskDirectory(self._last_id, keys))
        return calls

    def take_answered(self, locate_id: int, now_ms: int) -> list[Fetch]:
        """The directory has answered; the blocks in order. Empty if the call was over before."""
        asked_ms = self._asked_ms.get(locate_id)
        if asked_ms is not None:
            self.overhead.add(now_ms - asked_ms, now_ms=now_ms)
            self.durations.add(now_ms - asked_ms)
        return self.take(locate_id)

    def take(self, locate_id: int) -> list[Fetch]:
        """The call is over; its blocks in order. Empty if it was over before."""
        self._deadlines.discard(locate_id)
        self._asked_ms.pop(locate_id, None)
        return self._asked.pop(locate_id, [])

    def take_late(self, now_ms: int) -> list[list[Fetch]]:
        """The blocks of the calls whose deadline has come."""
        return [self.take(locate_id) for locate_id in self._deadlines.take_due(now_ms)]

    def next_ms(self) -> int | None:
        return self._deadlines.next_ms()

    def check(self) -> list[Fetch]:
        """Assert that calls and deadlines agree. Returns every block here, dropped ones too."""
        self._deadlines.check()
        assert len(self._deadlines) == len(self._asked) <= self._limits.max_locates
        assert self._asked_ms.keys() == self._asked.keys()
        assert all(locate_id in self._deadlines for locate_id in self._asked), "asks for ever"
        assert all(fetch.state is FetchState.LOCATING for fetch in self._waiting.values())
        assert all(fetch.key == key for key, fetch in self._waiting.items())
        return [*self._waiting.values(), *(f for asked in self._asked.values() for f in asked)]
