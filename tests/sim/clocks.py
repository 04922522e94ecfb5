"""The clocks of one host: a monotonic one that runs too fast or slow, a wall clock that lies."""


class Clock:
    """rate_ppm: how much too fast. wall_ms: what the wall clock shows at 0 of the monotonic."""

    def __init__(self, *, begin_ms: int, rate_ppm: int, wall_ms: int) -> None:
        self._begin_ms = begin_ms
        self._rate = 1_000_000 + rate_ppm
        self.wall_ms = wall_ms

    def ms(self, now_us: int) -> int:
        """The monotonic clock at this moment of the world."""
        return self._begin_ms + now_us * self._rate // 1_000_000_000

    def us(self, at_ms: int) -> int:
        """The first moment of the world at which the monotonic clock shows at_ms."""
        return -(-(at_ms - self._begin_ms) * 1_000_000_000 // self._rate)
