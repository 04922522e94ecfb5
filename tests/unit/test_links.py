"""Which links of a cluster are measured, in which order, and that it ends."""

from collections import Counter

import pytest

from kvray.cluster import NodeStatus
from kvray.cluster.links import MAX_PAIRS, measure_links, pairs_of
from kvray.core.way import Outcome
from tests.statuses import node


def nodes(count: int) -> list[NodeStatus]:
    return [node(f"{number:x}") for number in range(count)]


@pytest.mark.parametrize("count", range(9))
def test_each_pair_of_a_small_cluster_is_measured_once(count: int) -> None:
    pairs = [frozenset((a.node_id, b.node_id)) for a, b in pairs_of(nodes(count))]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    assert all(len(pair) == 2 for pair in pairs)


@pytest.mark.parametrize("count", [13, 64, 100])
def test_of_a_large_cluster_no_node_is_measured_much_more_often_than_another(count: int) -> None:
    pairs = pairs_of(nodes(count))
    assert len(pairs) == MAX_PAIRS
    seen = Counter(end.node_id for pair in pairs for end in pair)
    assert max(seen.values()) - min([*seen.values()], default=0) <= 2
    if count <= MAX_PAIRS:
        assert len(seen) == count


def test_what_has_not_begun_by_the_deadline_is_said_to_be_skipped() -> None:
    # Method: no node has a NodeStore, so each measurement is one look at the clock and nothing.
    ticks = iter(range(100))
    said: list[str] = []
    found = measure_links(
        nodes(3), {}, said.append, deadline_s=4.0, clock_s=lambda: float(next(ticks))
    )
    assert [link.outcome for link in found] == [Outcome.SKIPPED] * 6
    assert [link.reason for link in found[:3]] == ["it has no NodeStore"] * 3
    assert [link.reason for link in found[3:]] == ["the 4 s for all links were used up"] * 3
    assert [(link.node_id[0], link.peer_id[0]) for link in found[:2]] == [("0", "1"), ("1", "0")]
    assert said[0] == "measuring link 1 of 3: 00000000 reads from 11111111"
