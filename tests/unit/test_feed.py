"""What the page is told: history, traffic and events out of one status after another."""

import pytest

from kvray.cluster import NodeState, NodeStatus
from kvray.watch.feed import EVENTS, POINT_S, POINTS, Feed, page_data
from tests.statuses import cluster, node


def tokens(**counts: int) -> dict[str, int]:
    return {f"hit_tokens_{source}": count for source, count in counts.items()}


def test_before_the_first_status_there_is_nothing_to_show() -> None:
    seen = Feed().snapshot()
    assert seen["latest"] is None
    assert not seen["history"]
    assert not seen["events"]


def test_what_has_grown_since_the_last_status_is_in_the_history() -> None:
    feed = Feed()
    for number, count in enumerate((100, 140, 200)):
        totals = tokens(peer=count) | {"computed_tokens": 10 * count}
        feed.add(1_000.0 + number, page_data(cluster(node("a", totals=totals))))
    (point,) = feed.snapshot()["history"]
    assert (point["peer"], point["computed"]) == (100, 1_000)
    feed.check()


def test_a_node_that_was_restarted_counts_from_nothing_and_one_that_is_silent_does_not() -> None:
    feed = Feed()
    feed.add(1.0, page_data(cluster(node("a", totals=tokens(local=500)))))
    feed.add(2.0, page_data(cluster(node("a", totals=tokens(local=30)))))
    feed.add(3.0, page_data(cluster(node("a", state=NodeState.LOST))))
    feed.add(4.0, page_data(cluster(node("a", totals=tokens(local=35)))))
    assert sum(point["local"] for point in feed.snapshot()["history"]) == 35


def test_traffic_is_what_came_from_each_peer_since_the_last_status() -> None:
    feed = Feed()
    for at_s, count_bytes in ((1.0, 10**6), (3.0, 5 * 10**6)):
        nodes = node("a", from_peers={"b" * 56: count_bytes}), node("b")
        feed.add(at_s, page_data(cluster(*nodes)))
    (pair,) = feed.snapshot()["traffic"]
    assert pair == {"to": "a" * 56, "from": "b" * 56, "bytes_per_s": 2e6}
    feed.add(4.0, page_data(cluster(node("a", from_peers={"b" * 56: 5 * 10**6}), node("b"))))
    assert not feed.snapshot()["traffic"]


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (node("a"), node("a", state=NodeState.SUSPECT), "is silent"),
        (node("a"), node("a", state=NodeState.LOST), "is gone"),
        (node("a"), node("a", state=NodeState.DRAINED), "was drained"),
        (node("a"), node("a", epoch=8), "is back in epoch 8"),
        (node("a"), node("a", state=NodeState.FAILED, problem="no room"), "can not start: no room"),
    ],
)
def test_what_happens_to_a_node_is_told_once(
    before: NodeStatus, after: NodeStatus, text: str
) -> None:
    feed = Feed()
    for number, one in enumerate((before, before, after, after)):
        feed.add(float(number), page_data(cluster(one)))
    assert [event["text"] for event in feed.snapshot()["events"]] == ["serves", text]


def test_a_restart_of_the_directory_and_its_silence_are_told() -> None:
    feed = Feed()
    feed.add(1.0, page_data(cluster(node("a"))))
    feed.silent(2.0, "the directory does not answer")
    feed.silent(3.0, "the directory does not answer")
    assert feed.snapshot()["silence"]
    feed.add(4.0, page_data(cluster(node("a"), term=2)))
    assert not feed.snapshot()["silence"]
    texts = [event["text"] for event in feed.snapshot()["events"]]
    assert texts == ["serves", "the directory does not answer", "the directory was restarted"]


def test_an_hour_is_kept_and_no_more() -> None:
    feed = Feed()
    for number in range(2 * POINTS + 3):
        state = NodeState.SUSPECT if number % 2 else NodeState.READY
        feed.add(number * POINT_S, page_data(cluster(node("a", state=state))))
        feed.check()
    seen = feed.snapshot()
    assert len(seen["history"]) == POINTS
    assert seen["history"][-1]["at_s"] - seen["history"][0]["at_s"] >= 3_595
    assert len(seen["events"]) == EVENTS
