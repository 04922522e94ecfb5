"""How often to poll: as often as somebody waits for it, and hardly when nobody does (rule 6).

quick    a read of ours is awaited, or something has stirred within BUSY_WINDOW: after 50 us,
         then twice as long each time, up to 1 ms
idle     every IDLE_POLL
"""

QUICKEST_US = 50  # a small read over cma has ended by then
SLOWEST_QUICK_US = 1_000  # costs a few percent of a core while it lasts
# A peer that reads over TCP renews its hint every 25 ms; one that wants to connect needs several
# answers, each to the one before.
BUSY_WINDOW_US = 100_000
# A wake-up costs about 120 us of CPU, whatever is done in it: 0.06 % of a core. It is also how long
# a peer waits at most until we notice it, if its knock (NodeStore.wake, a Ray call of 2 to 5 ms) is
# lost; our own commands do not wait for it.
IDLE_POLL_US = 200_000


class PollPace:
    def __init__(self) -> None:
        self._wait_us = QUICKEST_US
        self._busy_until_us = 0

    def stir(self, now_us: int) -> None:
        """Something has happened, more may come."""
        self._busy_until_us = now_us + BUSY_WINDOW_US
        self._wait_us = QUICKEST_US

    def next_wait_us(self, now_us: int, *, awaited: bool) -> int:
        """How long to wait before the next poll. awaited: a read of ours is in flight."""
        if not awaited and now_us >= self._busy_until_us:
            self._wait_us = QUICKEST_US
            return IDLE_POLL_US
        wait_us = self._wait_us
        self._wait_us = min(2 * wait_us, SLOWEST_QUICK_US)
        return wait_us
