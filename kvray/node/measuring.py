"""How good the link to a peer is: one measurement, read by read, and which way the bytes came.

    begin ──▶ one small read, not counted ──▶ LATENCY_READS small ones ──▶ RATE_READS large ones
                 └── late, failed, refused ──▶ Measured, with the reason ◀── DEADLINE_MS

One read at a time, and each goes through the link thread's queue behind whatever an engine waits
for. Times are of this node's own clock only, from the post of a read to its end, so no clock of
another host matters.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import median
from typing import Any

from kvray.core.ids import Epoch, NodeId
from kvray.core.layout import HEADER_BYTES
from kvray.core.way import MIN_JUDGED_BYTES, Carried, Counters, Outcome, Way, carried
from kvray.node.link_measures import MeasureEnded, MeasureRead

LATENCY_BYTES = HEADER_BYTES
LATENCY_READS = 21  # the median of them is one that was measured
RATE_BYTES = 8 << 20  # half of the largest batch; over cma the link thread copies it in 2 ms
RATE_READS = 5
# All of it takes 0.1 s over 10 GbE, and 2 s over 200 Mbit/s.
DEADLINE_MS = 5_000
# Some drivers bring the counters of an interface up to date once a second. Looked at again only
# where the peer is on another machine and no counter has grown.
COUNTER_LAG_S = 2.0
COUNTER_LOOK_S = 0.1

Submit = Callable[[MeasureRead], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """latency_us, bytes_per_us: medians, 0 if it was not measured. reason: why not; for people."""

    outcome: Outcome
    reason: str = ""
    latency_us: int = 0
    bytes_per_us: float = 0.0
    read_bytes: int = 0


class LinkMeter:
    """One measurement at a time. submit: of a read, which ends in one MeasureEnded."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._under_way: _UnderWay | None = None
        self._last_id = 0

    def begin(
        self, node_id: NodeId, epoch: Epoch | None, done: "Future[Measured]", now_ms: int
    ) -> None:
        """done: will have it, after DEADLINE_MS at the latest. epoch: None if there is no peer."""
        if epoch is None:
            reason = "it is not on this node's roster"
            done.set_result(Measured(Outcome.NOT_CONNECTED, reason))
        elif self._under_way is not None:
            reason = "another measurement of this node is under way; ask again"
            done.set_result(Measured(Outcome.SKIPPED, reason))
        else:
            self._under_way = _UnderWay(node_id, epoch, done, now_ms + DEADLINE_MS)
            self._read(self._under_way, now_ms)

    def on_ended(self, ended: MeasureEnded, now_ms: int) -> None:
        measuring = self._under_way
        assert measuring is not None
        assert ended.measure_id == self._last_id
        problem = measuring.take(ended)
        if measuring.is_whole or problem or now_ms >= measuring.due_ms:
            self._under_way = None
            measuring.done.set_result(measuring.result(problem))
        else:
            self._read(measuring, now_ms)

    def _read(self, measuring: "_UnderWay", now_ms: int) -> None:
        self._last_id += 1
        self._submit(
            MeasureRead(
                self._last_id,
                measuring.node_id,
                measuring.epoch,
                LATENCY_BYTES if measuring.is_small_next else RATE_BYTES,
                (measuring.due_ms - now_ms) * 1_000,
            )
        )


class _UnderWay:
    """What has been read of one peer so far."""

    def __init__(
        self, node_id: NodeId, epoch: Epoch, done: "Future[Measured]", due_ms: int
    ) -> None:
        self.node_id = node_id
        self.epoch = epoch
        self.done = done
        self.due_ms = due_ms
        self._warm = False  # the first read may have to make the connection, and to wake the peer
        self._latencies_us: list[int] = []
        self._rates: list[float] = []

    @property
    def is_small_next(self) -> bool:
        return len(self._latencies_us) < LATENCY_READS

    @property
    def is_whole(self) -> bool:
        return len(self._rates) == RATE_READS

    def take(self, ended: MeasureEnded) -> Measured | None:
        """One if it is the end of the measurement."""
        if ended.outcome is not Outcome.MEASURED:
            return Measured(ended.outcome, ended.reason)
        if not self._warm:
            self._warm = True
        elif self.is_small_next:
            self._latencies_us.append(ended.took_us)
        else:
            self._rates.append(RATE_BYTES / max(1, ended.took_us))
        return None

    def result(self, problem: Measured | None) -> Measured:
        """A slow link is measured by as many reads as have come, if they are enough to judge."""
        read_bytes = len(self._rates) * RATE_BYTES
        is_slow = problem is None or problem.outcome is Outcome.LATE
        if is_slow and read_bytes >= MIN_JUDGED_BYTES:
            return Measured(
                Outcome.MEASURED,
                latency_us=round(median(self._latencies_us)),
                bytes_per_us=median(self._rates),
                read_bytes=read_bytes,
            )
        late = f"{read_bytes} bytes came in {DEADLINE_MS} ms, {MIN_JUDGED_BYTES} are needed"
        return problem or Measured(Outcome.LATE, late)


def with_way(
    measure: Callable[[], Measured],
    counters: Callable[[], Counters],
    *,
    is_far: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """A measurement, and which way its bytes have come by the counters around it. Plain data.

    is_far: the peer is on another machine, so that its bytes must have passed some counter.
    """
    before = counters()
    found = measure()
    seen: Carried | None = None
    if found.outcome is Outcome.MEASURED:
        seen = carried(before, counters(), found.read_bytes)
        looks = round(COUNTER_LAG_S / COUNTER_LOOK_S) if is_far else 0
        while seen.way is Way.CMA and looks:
            looks -= 1
            sleep(COUNTER_LOOK_S)
            seen = carried(before, counters(), found.read_bytes)
        if seen.way is Way.CMA and is_far:
            seen = Carried(Way.UNCLEAR)
    return {
        "outcome": found.outcome.value,
        "reason": found.reason,
        "way": seen.way.value if seen else "",
        "devices": list(seen.devices) if seen else [],
        "latency_us": found.latency_us,
        "gb_per_s": found.bytes_per_us / 1_000,
        "read_bytes": found.read_bytes,
    }
