"""How long look-ups, locates and reads took, as the metrics show it: counted once each."""

from kvray.core.durations import BOUNDS_MS, Durations
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
