"""Why a key is a miss, as its engine is told: two NodeCores and a directory.

Goal: each reason that a NodeStore can give is made to happen, and the first miss of a look-up has
it, whether it is told at once or later.
"""

import pytest

from kvray.core.break_even import MIN_SAMPLES
from kvray.core.ghosts import Ghosts, Why, halves
from kvray.core.ids import BlockKey
from kvray.core.reasons import MissReason, tokens_by_reason, tokens_by_source
from tests.nodes import Cluster, Engine
from tests.shells import key

A, B, C = (key(n) for n in range(1, 4))


def pair() -> tuple[Cluster, Engine, Engine]:
    """Nodes a and b with an engine each; a has stored A, B, C, and the directory knows."""
    cluster = Cluster.of("a", "b")
    here, there = Engine(cluster["a"]), Engine(cluster["b"])
    here.store(A, B, C)
    cluster.pass_ms(300)
    return cluster, here, there


def cause(cluster: Cluster, engine: Engine, *keys: BlockKey) -> MissReason:
    op = engine.lookup(list(keys))
    cluster.settle()
    return engine.cause(op)


def test_what_nobody_ever_had() -> None:
    cluster, here, there = pair()
    assert cause(cluster, there, A, key(9), C) is MissReason.NEVER_SEEN
    assert cause(cluster, here, key(9)) is MissReason.NEVER_SEEN


def test_what_was_here_and_was_evicted() -> None:
    cluster, here, _ = pair()
    here.node.do(here.node.core.clear(cluster.now_ms))
    assert cause(cluster, here, A) is MissReason.EVICTED, "before the directory has heard"
    cluster.pass_ms(1_000)
    assert cause(cluster, here, A) is MissReason.EVICTED, "and after"


def test_what_was_evicted_on_the_only_node_there_is() -> None:
    cluster = Cluster.of("a")
    engine = Engine(cluster["a"])
    engine.store(A)
    cluster.pass_ms(300)
    engine.node.do(engine.node.core.clear(cluster.now_ms))
    assert cause(cluster, engine, A) is MissReason.EVICTED
    assert cause(cluster, engine, B) is MissReason.NEVER_SEEN


def test_what_a_peer_had_and_has_evicted() -> None:
    cluster, here, there = pair()
    here.node.do(here.node.core.clear(cluster.now_ms))
    cluster.pass_ms(1_000)
    assert cause(cluster, there, A) is MissReason.EVICTED
    assert cause(cluster, there, key(9)) is MissReason.NEVER_SEEN


def test_what_a_peer_had_that_is_gone() -> None:
    cluster = Cluster.of("a", "b", "c")
    here, there = Engine(cluster["a"]), Engine(cluster["b"])
    here.store(A)
    cluster.pass_ms(300)
    cluster.kill("a")
    cluster.pass_ms(10_000)  # buried, and its entries are swept
    assert cause(cluster, there, A) is MissReason.PEER_GONE
    assert cause(cluster, there, B) is MissReason.NEVER_SEEN


def test_what_the_only_peer_may_have_had_that_is_gone() -> None:
    cluster, _, there = pair()
    there.store(key(5))
    cluster.kill("a")
    cluster.pass_ms(10_000)
    assert cause(cluster, there, A) is MissReason.PEER_GONE
    there.node.do(there.node.core.clear(cluster.now_ms))
    assert cause(cluster, there, key(5)) is MissReason.EVICTED


def test_a_peer_that_does_not_answer_in_time() -> None:
    cluster, _, there = pair()
    cluster.link_is_up = False
    op = there.lookup([A, B], within_ms=50)
    cluster.pass_ms(60)
    assert there.cause(op) is MissReason.DEADLINE


def test_a_slab_without_a_free_slot() -> None:
    cluster, _, there = pair()
    there.reserve(*(key(n) for n in range(100, 132)))
    assert cause(cluster, there, A) is MissReason.SLAB_FULL


def test_what_is_quicker_to_compute() -> None:
    cluster, _, there = pair()
    for number in range(MIN_SAMPLES):  # a locate takes 50 ms here
        there.lookup([key(100 + number)])
        cluster.now_ms += 50
        cluster.settle()
    op = there.lookup([A], key_compute_us=1)
    cluster.settle()
    assert there.cause(op) is MissReason.BELOW_BREAK_EVEN


def test_a_directory_that_does_not_answer() -> None:
    cluster, _, there = pair()
    cluster.directory = None
    cluster.pass_ms(5_000)
    assert cause(cluster, there, A) is MissReason.DIRECTORY_SILENT


def test_each_run_has_a_cause_of_its_own_and_the_first_counts() -> None:
    cluster, here, _ = pair()
    op = here.lookup([A, key(9)], [key(8), B])
    cluster.settle()
    assert here.cause(op) is MissReason.NEVER_SEEN
    assert sorted(here.causes[op]) == [1, 2]


def test_what_another_engine_of_the_model_may_have_under_other_names() -> None:
    cluster = Cluster.of("a", "b")
    here = Engine(cluster["a"], namespace=b"1" * 16)
    there = Engine(cluster["b"], namespace=b"2" * 16)
    other = Engine(cluster["b"], model="another model")
    here.store(A)
    cluster.pass_ms(2_000)
    assert cause(cluster, there, B) is MissReason.NAMESPACE_DIFFERS
    assert cause(cluster, other, B) is MissReason.NEVER_SEEN

    here.bye()
    cluster.pass_ms(2_000)
    assert cause(cluster, there, B) is MissReason.NEVER_SEEN, "nobody else is there any more"


def test_two_engines_of_one_node_that_share_nothing_with_each_other() -> None:
    cluster = Cluster.of("a")
    one, _ = (Engine(cluster["a"], namespace=names * 16) for names in (b"1", b"2"))
    cluster.pass_ms(2_000)
    assert cause(cluster, one, A) is MissReason.NAMESPACE_DIFFERS


def test_a_directory_that_was_restarted_hears_of_the_engines_again() -> None:
    cluster = Cluster.of("a", "b")
    one = Engine(cluster["a"], namespace=b"1" * 16)
    Engine(cluster["b"], namespace=b"2" * 16)
    cluster.pass_ms(2_000)
    cluster.restart_directory()
    cluster.pass_ms(5_000)
    assert cause(cluster, one, A) is MissReason.NAMESPACE_DIFFERS


# -- what is remembered -------------------------------------------------------------------------


@pytest.mark.parametrize("why", [Why.EVICTED, Why.PEER_GONE])
def test_a_ghost_is_known_until_another_takes_its_place(why: Why) -> None:
    size = 8
    ghosts = Ghosts(size)
    keys = [key(n) for n in range(1, 40)]
    for number, newest in enumerate(keys):
        ghosts.note(*halves(newest), why)
        codes = ghosts.why(*halves(b"".join(keys))).tolist()
        assert codes[number] == why, "the newest is always known"
        assert not any(codes[number + 1 :]), "what was never noted is unknown"
        assert codes.count(why) <= size


# -- tokens -------------------------------------------------------------------------------------


def test_engines_counters_are_summed_by_source_and_by_reason() -> None:
    counters = [
        {"hit_tokens_device": 1, "hit_tokens_peer": 2, "computed_tokens": 30, "lookups": 9},
        {"hit_tokens_local": 3, "computed_tokens": 40, "miss_tokens_evicted": 40},
    ]
    assert tokens_by_source(counters) == {"device": 1, "local": 3, "peer": 2, "computed": 70}
    assert tokens_by_reason(counters) == {"evicted": 40}
