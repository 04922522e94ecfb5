"""How often something took how long: a histogram of whole milliseconds, of fixed size."""

from bisect import bisect_left

# Upper bounds, inclusive. 0 has a bucket of its own: most look-ups are answered within the event.
BOUNDS_MS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 5_000)


class Durations:
    """counts: one for each of BOUNDS_MS, and one for what took longer."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_MS) + 1)

    def add(self, duration_ms: int, count: int = 1) -> None:
        self.counts[bisect_left(BOUNDS_MS, duration_ms)] += count
