"""What has happened: the last events for people, a digest of all of them, and the faults."""

from collections import Counter, deque
from typing import Any
from zlib import crc32

KEPT_EVENTS = 400  # of the story of a failure; more scroll away


class Story:
    """trace: say every event at once."""

    def __init__(self, *, trace: bool = False) -> None:
        self.digest = 0
        self.faults: Counter[str] = Counter()
        self.loads_ok = 0
        self.fetched_blocks = 0
        self.taken_over_blocks = 0
        self.spared_blocks = 0  # told to a node, of blocks that another one keeps
        self.wanted_blocks = 0  # told to their home, of what others have asked for
        self._trace = trace
        self._events: deque[tuple[int, str, str, tuple[Any, ...]]] = deque(maxlen=KEPT_EVENTS)

    def note(self, at_us: int, who: str, what: str, *details: Any) -> None:
        event = (at_us, who, what, details)
        self.digest = crc32(repr(event).encode(), self.digest)
        self._events.append(event)
        if self._trace:
            print(_line(event))  # noqa: T201 (asked for, by --trace)

    def fault(self, at_us: int, kind: str, *details: Any) -> None:
        self.faults[kind] += 1
        self.note(at_us, "fault", kind, *details)

    def lines(self, count: int = KEPT_EVENTS) -> list[str]:
        return [_line(event) for event in list(self._events)[-count:]]


def _line(event: tuple[int, str, str, tuple[Any, ...]]) -> str:
    at_us, who, what, details = event
    return f"{at_us / 1e6:11.6f} s  {who:<10} {what} {' '.join(map(str, details))}".rstrip()
