"""How long look-ups, locates, reads and copies took, as the metrics show it: counted once each."""

from kvray.core.clients import MAX_COUNTER_NAMES
from kvray.core.durations import (
    BOUNDS_MS,
    COPY_DIRECTIONS,
    VALUES_MS,
    Durations,
    copy_counter,
    copy_counts,
)
from kvray.core.reasons import MissReason
from tests.nodes import Cluster, Engine
from tests.shells import key

A, B = key(1), key(2)


def test_a_duration_falls_into_the_first_bucket_that_holds_it() -> None:
    durations = Durations()
    for duration_ms in (0, 1, 3, 5, 6, 10**9):
        durations.add(duration_ms)
    counts = dict(zip((*BOUNDS_MS, None), durations.counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {
        0: 1,
        1: 1,
        5: 2,
        10: 1,
        None: 1,
    }


def test_copies_are_counted_in_the_same_buckets_and_each_has_a_counter_of_its_own() -> None:
    durations, counters = Durations(), dict[str, int]()
    for duration_ms in (*BOUNDS_MS, 7, 10**9):
        durations.add(duration_ms)
        name = copy_counter("load", duration_ms)
        counters[name] = counters.get(name, 0) + 1
    assert copy_counts(counters, "load") == durations.counts
    assert copy_counts(counters, "store") == [0] * len(VALUES_MS)


def test_a_node_keeps_all_that_an_engine_can_count() -> None:
    """Else the reasons or durations that an engine meets last would be missing."""
    own = 16  # blocks stored, requests looked up and the like, with room for some more
    assert own + len(MissReason) + len(COPY_DIRECTIONS) * len(VALUES_MS) <= MAX_COUNTER_NAMES


def test_each_lookup_locate_and_read_is_counted_once() -> None:
    cluster = Cluster.of("a", "b")
    here, there = Engine(cluster["a"]), Engine(cluster["b"])
    here.store(A)
    cluster.pass_ms(300)
    there.lookup([B], fetch=False)  # answered at once
    there.lookup([A])
    cluster.now_ms += 7
    cluster.settle()

    found = there.node.core.snapshot()
    assert found["lookups"]["durations"][0] == 1
    assert sum(found["lookups"]["durations"]) == found["lookups"]["lookups"] == 2
    assert sum(found["fetch"]["locate_durations"]) == 1
    assert sum(found["fetch"]["read_durations"]) == 1


def test_a_lookup_that_is_given_up_by_its_engine_is_not_counted() -> None:
    cluster = Cluster.of("a", "b")
    here, there = Engine(cluster["a"]), Engine(cluster["b"])
    here.store(A)
    cluster.pass_ms(300)
    there.unpin(there.lookup([A]))
    cluster.settle()
    assert sum(there.node.core.snapshot()["lookups"]["durations"]) == 0
