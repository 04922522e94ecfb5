"""A measurement of a link, read by read: what is timed, what it ends with, and that it ends.

No link is here: the test answers each read itself, and the counters are made up.
"""

from concurrent.futures import Future

import pytest

from kvray.core.ids import Epoch, NodeId
from kvray.core.way import Counters, Outcome
from kvray.node.link_measures import MeasureEnded, MeasureRead
from kvray.node.measuring import (
    COUNTER_LAG_S,
    DEADLINE_MS,
    LATENCY_BYTES,
    LATENCY_READS,
    RATE_BYTES,
    RATE_READS,
    LinkMeter,
    Measured,
    with_way,
)

PEER, EPOCH = NodeId("peer"), Epoch(3)
ALL_BYTES = RATE_READS * RATE_BYTES


class Metered:
    """A LinkMeter whose reads the test ends."""

    def __init__(self) -> None:
        self.reads: list[MeasureRead] = []
        self.meter = LinkMeter(self.reads.append)
        self.done: Future[Measured] = Future()
        self.now_ms = 1_000

    def begin(self, epoch: Epoch | None = EPOCH) -> None:
        self.meter.begin(PEER, epoch, self.done, self.now_ms)

    def end(self, took_us: int, outcome: Outcome = Outcome.MEASURED, reason: str = "") -> None:
        read = self.reads[-1]
        self.now_ms += took_us // 1_000
        self.meter.on_ended(MeasureEnded(read.measure_id, outcome, took_us, reason), self.now_ms)

    def end_small(self, took_us: int = 100) -> None:
        """All of them, the one that is not counted too."""
        for _ in range(1 + LATENCY_READS):
            self.end(took_us)


def test_a_link_is_measured_by_small_reads_and_large_ones_one_at_a_time() -> None:
    it = Metered()
    it.begin()
    it.end(900_000)  # makes the connection
    for took_us in range(LATENCY_READS):
        assert it.reads[-1].bytes == LATENCY_BYTES
        it.end(100 + took_us)
    for took_us in (9_000, 8_000, 2_000, 3_000, 4_000):
        assert not it.done.done()
        assert it.reads[-1].bytes == RATE_BYTES
        it.end(took_us)
    found = it.done.result(0)
    assert found.outcome is Outcome.MEASURED
    assert found.latency_us == 100 + LATENCY_READS // 2, "the median, without the first read"
    assert found.bytes_per_us == RATE_BYTES / 4_000
    assert found.read_bytes == ALL_BYTES
    assert len(it.reads) == 1 + LATENCY_READS + RATE_READS
    assert {(read.node_id, read.epoch) for read in it.reads} == {(PEER, EPOCH)}
    assert len({read.measure_id for read in it.reads}) == len(it.reads)


@pytest.mark.parametrize("outcome", [Outcome.LATE, Outcome.FAILED, Outcome.SKIPPED])
def test_a_read_that_does_not_come_ends_the_measurement_with_its_reason(outcome: Outcome) -> None:
    it = Metered()
    it.begin()
    it.end(100)
    it.end(100, outcome, "a reason")
    assert it.done.result(0) == Measured(outcome, "a reason")
    it.done = Future()
    it.begin()
    it.end_small()
    assert not it.done.done(), "the next one goes on as if nothing had been"


def test_no_read_may_last_beyond_the_deadline_of_all() -> None:
    it = Metered()
    it.begin()
    assert it.reads[-1].limit_us == DEADLINE_MS * 1_000
    it.end(3_000_000)
    assert it.reads[-1].limit_us == DEADLINE_MS * 1_000 - 3_000_000


def test_a_slow_link_is_measured_by_what_has_come_if_that_is_enough_to_judge() -> None:
    it = Metered()
    it.begin()
    it.end_small()
    it.end(2_000_000)
    it.end(2_000_000)
    it.end(900_000, Outcome.LATE, "no answer in 900 ms")
    found = it.done.result(0)
    assert found.outcome is Outcome.MEASURED
    assert found.read_bytes == 2 * RATE_BYTES
    assert found.bytes_per_us == RATE_BYTES / 2_000_000


def test_a_link_that_is_too_slow_says_how_much_came() -> None:
    it = Metered()
    it.begin()
    it.end_small()
    it.end(6_000_000)
    found = it.done.result(0)
    assert found.outcome is Outcome.LATE
    assert str(RATE_BYTES) in found.reason


def test_a_peer_that_is_not_there_and_a_second_measurement_are_answered_at_once() -> None:
    it = Metered()
    it.begin(None)
    assert it.done.result(0).outcome is Outcome.NOT_CONNECTED
    assert not it.reads
    it.done = Future()
    it.begin()
    first, it.done = it.done, Future()
    it.begin()
    assert it.done.result(0).outcome is Outcome.SKIPPED
    assert not first.done()
    assert len(it.reads) == 1


# -- and which way the bytes came ---------------------------------------------------------------

FOUND = Measured(Outcome.MEASURED, latency_us=90, bytes_per_us=2_500.0, read_bytes=ALL_BYTES)


def counters(*eth0: int) -> list[Counters]:
    return [Counters({"eth0": count}, {}) for count in eth0]


def test_the_way_is_that_of_the_counters_around_the_measurement() -> None:
    looks = iter(counters(5, 5 + ALL_BYTES))
    found = with_way(lambda: FOUND, lambda: next(looks), is_far=True)
    assert (found["way"], found["devices"]) == ("tcp", ["eth0"])
    assert (found["latency_us"], found["gb_per_s"]) == (90, 2.5)


def test_counters_that_come_late_are_waited_for_if_the_peer_is_far() -> None:
    slept: list[float] = []
    looks = iter(counters(5, 5, 5, 5 + ALL_BYTES))
    found = with_way(lambda: FOUND, lambda: next(looks), is_far=True, sleep=slept.append)
    assert found["way"] == "tcp"
    assert len(slept) == 2


@pytest.mark.parametrize(
    ("is_far", "way", "waits"), [(False, "cma", False), (True, "unclear", True)]
)
def test_bytes_that_nothing_has_counted_came_by_no_network_or_nobody_knows_how(
    is_far: bool,  # noqa: FBT001 (a parameter of the test)
    way: str,
    waits: bool,  # noqa: FBT001 (the same)
) -> None:
    slept: list[float] = []
    (same,) = counters(5)
    found = with_way(lambda: FOUND, lambda: same, is_far=is_far, sleep=slept.append)
    assert (found["way"], found["devices"]) == (way, [])
    assert sum(slept) == pytest.approx(COUNTER_LAG_S if waits else 0)


def test_what_was_not_measured_has_no_way() -> None:
    (same,) = counters(5)
    late = Measured(Outcome.LATE, "no answer")
    found = with_way(lambda: late, lambda: same, is_far=True)
    assert (found["outcome"], found["reason"], found["way"]) == ("late", "no answer", "")
