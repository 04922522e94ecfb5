"""A block is fetched if that is quicker than computing it, as far as anybody has measured."""

import pytest

from kvray.core.break_even import (
    ALWAYS,
    FIRST_FRESH_MS,
    MAX_FRESH_MS,
    MAX_SAMPLES,
    MIN_RATE_MS,
    MIN_SAMPLES,
    OVERHEAD_FRESH_MS,
    RATE_SAMPLE_BYTES,
    Overhead,
    Rate,
    Worth,
    chain_pays,
    source_pays,
)
from kvray.core.fetch import FetchLimits
from kvray.core.peers import Peer
from kvray.core.reasons import MissReason
from tests.fetching import BLOCK_BYTES, FetchWorld, key, node_info, waiter
from tests.nodes import Cluster, Engine

A, B = key(1), key(2)
MB = 1_000_000


def measured(bytes_per_ms: int, *, at_ms: int = 0) -> Rate:
    rate = Rate(sample_bytes=1)
    rate.add(bytes_per_ms * MIN_RATE_MS, MIN_RATE_MS, now_ms=at_ms)
    return rate


# -- measuring -----------------------------------------------------------------------------------


def test_a_rate_is_known_when_enough_has_come() -> None:
    rate = Rate()
    rate.add(8 * MB, 2, now_ms=10)
    assert rate.bytes_per_ms(10) is None
    for now_ms in range(12, 32, 2):
        rate.add(8 * MB, 2, now_ms=now_ms)
    assert rate.bytes_per_ms(32) == 4 * MB


def test_short_reads_say_nothing_of_a_rate() -> None:
    rate = Rate()
    for now_ms in range(100):
        rate.add(RATE_SAMPLE_BYTES - 1, 1, now_ms=now_ms)
    assert rate.bytes_per_ms(100) is None


def test_a_rate_follows_a_link_that_becomes_slow() -> None:
    rate = Rate(sample_bytes=1)
    for now_ms in range(0, 5_000, 10):
        rate.add(10_000, 10, now_ms=now_ms)
    for now_ms in range(5_000, 10_000, 10):
        rate.add(1_000, 10, now_ms=now_ms)
    assert rate.bytes_per_ms(10_000) == pytest.approx(100, rel=0.2)


def test_an_old_rate_is_not_believed_and_does_not_weigh_on_the_next() -> None:
    rate = measured(1)
    assert rate.bytes_per_ms(MAX_FRESH_MS) is None
    rate.add(1_000 * MIN_RATE_MS, MIN_RATE_MS, now_ms=MAX_FRESH_MS)
    assert rate.bytes_per_ms(MAX_FRESH_MS) == 1_000


def believed_for_ms(rate: Rate, *, since_ms: int) -> int:
    return next(ms for ms in range(MAX_FRESH_MS + 1) if rate.bytes_per_ms(since_ms + ms) is None)


def test_a_link_that_is_slow_for_good_is_tried_ever_more_rarely() -> None:
    rate, now_ms, found = Rate(sample_bytes=1), 0, []
    for _ in range(8):
        rate.add(MIN_RATE_MS, MIN_RATE_MS, now_ms=now_ms)
        found.append(believed_for_ms(rate, since_ms=now_ms))
        now_ms += found[-1]
    assert found == [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000, 30_000]


def well_known(bytes_per_ms: int) -> tuple[Rate, int]:
    """And when it was last measured."""
    rate, now_ms = Rate(sample_bytes=1), 0
    for _ in range(8):
        rate.add(bytes_per_ms * MIN_RATE_MS, MIN_RATE_MS, now_ms=now_ms)
        now_ms += MAX_FRESH_MS
    assert believed_for_ms(rate, since_ms=now_ms - MAX_FRESH_MS) == MAX_FRESH_MS
    return rate, now_ms - MAX_FRESH_MS


@pytest.mark.parametrize("after_ms", [1, MAX_FRESH_MS])
def test_one_bad_moment_of_a_good_link_is_believed_for_a_second(after_ms: int) -> None:
    # The bug: what one read took that fell into a pause of the network kept a peer from being
    # asked for half a minute, since nothing was read that could have said otherwise.
    rate, now_ms = well_known(1_000)
    now_ms += after_ms
    rate.add(10_000, 900, now_ms=now_ms)
    assert believed_for_ms(rate, since_ms=now_ms) == FIRST_FRESH_MS


def test_what_was_known_of_a_link_that_failed_is_soon_measured_again() -> None:
    rate, now_ms = well_known(1)
    peer = Peer(node_info("peer"))
    peer.rate = rate
    peer.fail(now_ms)
    assert believed_for_ms(rate, since_ms=now_ms) == FIRST_FRESH_MS


def test_an_overhead_is_a_mean_of_enough_samples() -> None:
    overhead = Overhead()
    for _ in range(MIN_SAMPLES - 1):
        overhead.add(4, now_ms=0)
    assert overhead.mean_ms(0) == 0
    overhead.add(4, now_ms=0)
    assert overhead.mean_ms(0) == 4
    for _ in range(4 * MAX_SAMPLES):
        overhead.add(1, now_ms=0)
    assert overhead.mean_ms(0) == pytest.approx(1, abs=0.1)


def test_an_overhead_that_keeps_everything_from_being_asked_is_forgotten() -> None:
    # The bug: short chains were not asked for because of steps that had once been slow, and so
    # nothing ever showed that they were not any more.
    overhead = Overhead()
    for _ in range(MIN_SAMPLES):
        overhead.add(900, now_ms=0)
    assert overhead.mean_ms(OVERHEAD_FRESH_MS - 1) == 900
    assert overhead.mean_ms(OVERHEAD_FRESH_MS) == 0
    for _ in range(MIN_SAMPLES):
        overhead.add(1, now_ms=OVERHEAD_FRESH_MS)
    assert overhead.mean_ms(OVERHEAD_FRESH_MS) == 1


# -- weighing ------------------------------------------------------------------------------------


def test_a_chain_pays_if_its_bytes_come_sooner_than_it_is_computed() -> None:
    worth = Worth(block_us=1_000, chain_us=10_000)
    assert chain_pays(7_000, worth, [1_000.0, 10.0], overhead_ms=3)
    assert not chain_pays(7_001, worth, [1_000.0, 10.0], overhead_ms=3)


def test_a_chain_that_is_shorter_than_the_overhead_never_pays() -> None:
    worth = Worth(block_us=1_000, chain_us=2_000)
    assert not chain_pays(1, worth, [None], overhead_ms=3)
    assert not chain_pays(1, worth, [1e9], overhead_ms=3)


def test_what_nobody_has_measured_pays() -> None:
    assert chain_pays(10**12, ALWAYS, [1.0], overhead_ms=1_000)
    assert chain_pays(10**12, Worth(1, 1_000), [1.0, None], overhead_ms=1)
    assert source_pays(10**12, 10**12, Worth(1, 1), None)
    assert source_pays(10**12, 10**12, ALWAYS, 1.0)


def test_a_block_does_not_pay_over_a_slow_link_or_behind_a_long_queue() -> None:
    worth = Worth(block_us=2_000, chain_us=20_000)
    assert source_pays(2_000, 0, worth, 1_000.0)
    assert not source_pays(2_001, 0, worth, 1_000.0)
    assert source_pays(1_000, 19_000, worth, 1_000.0)
    assert not source_pays(1_000, 19_001, worth, 1_000.0)


def test_of_two_that_wait_for_a_block_the_one_that_computes_slower_counts() -> None:
    assert Worth(1, 20).or_more(Worth(2, 10)) == Worth(2, 20)
    assert Worth(1, 20).or_more(ALWAYS) == ALWAYS


# -- fetching ------------------------------------------------------------------------------------

LIMITS = FetchLimits(rate_sample_bytes=1)


def world_with_a_link_of(ms_per_block: int) -> FetchWorld:
    world = FetchWorld.with_peers("peer", limits=LIMITS)
    for number in range(-(-MIN_RATE_MS // ms_per_block)):
        world.want(waiter(1_000 + number), [key(1_000 + number)])
        world.locate([world.fill("peer", 20, key(1_000 + number), generation=number + 1)])
        world.tick(after_ms=ms_per_block)
        world.end_read()
        world.end_read()
    return world


def test_a_source_that_is_slower_than_computing_is_not_read_from() -> None:
    world = world_with_a_link_of(ms_per_block=5)

    world.want(waiter(1), [A], worth=Worth(block_us=4_900, chain_us=100_000))
    world.locate([world.fill("peer", 1, A)])

    assert world.missed == [(waiter(1), A, MissReason.BELOW_BREAK_EVEN)]


def test_a_source_that_is_quicker_than_computing_is_read_from() -> None:
    world = world_with_a_link_of(ms_per_block=5)

    world.want(waiter(1), [A], worth=Worth(block_us=5_100, chain_us=100_000))
    world.locate([world.fill("peer", 1, A)])
    world.end_read()
    world.end_read()

    assert (waiter(1), A) in world.arrived


def test_two_reads_at_a_time_count_as_one_time() -> None:
    # Method: two reads of one block each under way together for 20 ms: two blocks in 20 ms.
    world = FetchWorld.with_peers("peer", limits=FetchLimits(rate_sample_bytes=1, batch_blocks=1))
    world.want(waiter(1), [A, B])
    world.locate([world.fill("peer", 1, A)], [world.fill("peer", 2, B)])
    world.tick(after_ms=20)
    for _ in range(4):
        world.end_read()

    peer = world.core.snapshot()["peers"]["peer"]
    assert peer["bytes_per_ms"] == round(2 * BLOCK_BYTES / 20)


# -- looking up ----------------------------------------------------------------------------------


def test_a_lookup_that_is_quicker_computed_does_not_ask_the_directory_and_says_why() -> None:
    cluster = Cluster.of("here", "there", limits=LIMITS)
    node = cluster["here"]
    Engine(cluster["there"]).store(A, B)
    cluster.pass_ms(10)
    engine = Engine(node)
    for number in range(MIN_SAMPLES):  # a locate takes 50 ms here
        engine.lookup([key(100 + number)])
        cluster.now_ms += 50
        cluster.settle()

    assert engine.answer(engine.lookup([A, B], key_compute_us=20_000)) == "mm"
    assert node.core.snapshot()["lookups"]["misses"][MissReason.BELOW_BREAK_EVEN.value] == 2
    assert not node.calls

    op = engine.lookup([A, B], key_compute_us=30_000)
    cluster.settle()
    assert engine.answer(op) == "hh"


def test_what_is_under_way_already_is_waited_for_however_short() -> None:
    cluster = Cluster.of("here", "there", limits=LIMITS)
    Engine(cluster["there"]).store(A)
    cluster.pass_ms(10)
    engine, other = Engine(cluster["here"]), Engine(cluster["here"])
    for number in range(MIN_SAMPLES):
        engine.lookup([key(100 + number)])
        cluster.now_ms += 50
        cluster.settle()
    first = other.lookup([A])

    second = engine.lookup([A], key_compute_us=1)

    cluster.settle()
    assert (other.answer(first), engine.answer(second)) == ("h", "h")


def test_behind_a_block_that_is_not_fetched_nothing_of_a_prefix_is_waited_for() -> None:
    cluster = Cluster.of("here", "there", limits=LIMITS)
    engine, writer = Engine(cluster["here"]), Engine(cluster["here"])
    for number in range(MIN_SAMPLES):
        engine.lookup([key(100 + number)])
        cluster.now_ms += 50
        cluster.settle()
    writer.reserve(B)

    assert engine.answer(engine.lookup([A, B], key_compute_us=1)) == "mm"
    assert engine.answer(engine.lookup([A, B], key_compute_us=1, prefix=False)) == "mw"
