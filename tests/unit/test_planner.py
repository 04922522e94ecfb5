"""From whom to read what: few large batches, equal holders share the work."""

from kvray.core.ids import NodeId
from kvray.core.planner import Batch, plan

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def cut(*holders: str, size: int = 10, batch_bytes: int = 1_000, **loads: int) -> list[str]:
    """Each batch as text: its node and its blocks."""
    batches = plan(
        [size] * len(holders),
        [[NodeId(name) for name in names] for names in holders],
        {NodeId(name): load for name, load in loads.items()},
        batch_bytes=batch_bytes,
    )
    for batch in batches:
        assert batch.bytes == size * len(batch.indices)
    return [f"{b.node_id}:{','.join(str(i) for i in b.indices)}" for b in batches]


def test_a_run_on_one_node_is_one_batch() -> None:
    assert cut("a", "a", "a") == ["a:0,1,2"]


def test_the_node_that_serves_the_longest_run_is_taken() -> None:
    assert cut("ab", "ab", "b", "b") == ["b:0,1,2,3"]
    assert cut("a", "ab", "ab", "b") == ["a:0,1,2", "b:3"]


def test_equal_nodes_share_the_work_batch_by_batch() -> None:
    assert cut(*["ab"] * 6, batch_bytes=20) == ["a:0,1", "b:2,3", "a:4,5"]


def test_of_equal_nodes_the_one_with_less_outstanding_is_taken() -> None:
    assert cut("ab", "ab", a=30, b=20) == ["b:0,1"]


def test_of_equally_loaded_nodes_the_preferred_one_is_taken() -> None:
    assert cut("ba", "ba", a=5, b=5) == ["b:0,1"]


def test_scattered_blocks_of_a_node_travel_together() -> None:
    assert cut("a", "b", "a", "b") == ["a:0,2", "b:1,3"]


def test_what_nobody_holds_is_in_no_batch() -> None:
    assert cut("a", "", "a") == ["a:0,2"]
    assert cut("", "") == []
    assert cut() == []


def test_a_batch_ends_at_its_bytes_and_at_its_blocks() -> None:
    assert cut("a", "a", "a", batch_bytes=25) == ["a:0,1", "a:2"]
    batches = plan([1] * 5, [[A]] * 5, {}, batch_blocks=2)
    assert [batch.indices for batch in batches] == [(0, 1), (2, 3), (4,)]


def test_a_block_larger_than_a_batch_goes_alone() -> None:
    assert plan([5, 100, 5], [[A], [A], [A]], {}, batch_bytes=50) == [
        Batch(A, (0,), 5),
        Batch(A, (1,), 100),
        Batch(A, (2,), 5),
    ]


def test_the_outstanding_bytes_of_the_caller_stay_as_they_are() -> None:
    loads = {A: 1, C: 2}

    plan([10, 10], [[A], [B, C]], loads)

    assert loads == {A: 1, C: 2}


def test_a_node_that_is_twice_as_fast_is_given_twice_as_much() -> None:
    batches = plan([10] * 60, [[A, B]] * 60, {}, slowness={A: 1.0, B: 2.0}, batch_bytes=20)

    given = {node_id: sum(b.bytes for b in batches if b.node_id == node_id) for node_id in (A, B)}
    assert given == {A: 400, B: 200}


def test_a_slow_node_with_nothing_to_do_is_left_out_of_a_short_chain() -> None:
    batches = plan([10] * 4, [[A, B]] * 4, {}, slowness={A: 1.0, B: 10.0}, batch_bytes=10)

    assert {batch.node_id for batch in batches} == {A}
