"""How often something took how long: a histogram of whole milliseconds, of fixed size."""

from bisect import bisect_left
from collections.abc import Mapping

from kvray.core.direction import Direction

# Upper bounds, inclusive. 0 has a bucket of its own: most look-ups are answered within the event.
BOUNDS_MS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 5_000)
# What stands for all that fell into a bucket: its bound, and twice the last one for what is beyond.
VALUES_MS = (*BOUNDS_MS, 2 * BOUNDS_MS[-1])

# Of an engine's copies between device and slab. It reports them as counters, one for each bucket.
COPY_DIRECTIONS = tuple(direction.value for direction in Direction)


class Durations:
    """counts: one for each of BOUNDS_MS, and one for what took longer."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_MS) + 1)

    def add(self, duration_ms: int, count: int = 1) -> None:
        self.counts[bisect_left(BOUNDS_MS, duration_ms)] += count


def copy_counter(direction: str, duration_ms: int) -> str:
    """The name of the counter for a copy that took so long."""
    return f"{direction}_copies_{VALUES_MS[bisect_left(BOUNDS_MS, duration_ms)]}_ms"


def copy_counts(counters: Mapping[str, int], direction: str) -> list[int]:
    """Of an engine, or of several added up: as Durations.counts."""
    return [counters.get(f"{direction}_copies_{value_ms}_ms", 0) for value_ms in VALUES_MS]
