"""What a node and the directory say to each other, when calls and answers go astray."""

import msgspec
import pytest

from kvray.core.ids import NodeId
from kvray.core.messages import Announce, AnnounceReply, NodeHello, RosterNews
from kvray.core.roster import (
    LARGE_CLUSTER_NODES,
    LARGE_CLUSTER_PERIOD_MS,
    QUIET_AFTER_MS,
    QUIET_PERIOD_MS,
)
from tests.nodes import Cluster, Engine, Node
from tests.shells import Slab, key


def the_announce(cluster: Cluster) -> tuple[int, Announce]:
    """The one announce that node a waits for."""
    ((call_id, call),) = cluster["a"].calls.items()
    assert isinstance(call.message, Announce)
    return call_id, call.message


def test_with_the_first_question_of_an_engine_a_rare_heartbeat_becomes_a_frequent_one() -> None:
    cluster = Cluster.of("a")
    node, engine = cluster["a"], Engine(cluster["a"])
    for _ in range(QUIET_AFTER_MS // 300):
        cluster.now_ms += 300
        node.tick()
        call_id, _ = the_announce(cluster)
        node.answer_call(call_id)
    cluster.now_ms += QUIET_PERIOD_MS
    node.tick()
    call_id, quiet = the_announce(cluster)
    assert not quiet.in_use
    node.answer_call(call_id)
    cluster.now_ms += 300
    node.tick()
    assert not node.calls, "nobody has used anything: the next one is in a second"

    engine.lookup([key(1)])

    cluster.now_ms += 300
    node.tick()
    call_id, announce = the_announce(cluster)
    assert announce.in_use
    node.answer_call(call_id)
    cluster.now_ms += 300
    node.tick()
    call_id, announce = the_announce(cluster)
    assert not announce.in_use


def test_an_engine_that_asks_all_the_time_makes_no_heartbeat_more_frequent_than_was_said() -> None:
    """Or a thousand nodes at work would be a directory's load of three thousand calls a second."""
    cluster = Cluster.of("a")
    node, engine = cluster["a"], Engine(cluster["a"])
    assert cluster.directory is not None
    for number in 2 * list(range(LARGE_CLUSTER_NODES)):  # twice: they have the time they are told
        info = msgspec.structs.replace(node.core.info, node_id=NodeId(f"other-{number}"))
        cluster.directory.on_hello(NodeHello(info, 0), cluster.now_ms)
    cluster.pass_ms(1_000)

    def announces() -> int:
        count: int = node.core.snapshot()["announcing"]["announces"]
        return count

    before = announces()
    for number in range(100):
        engine.lookup([key(number)])
        cluster.pass_ms(4 * LARGE_CLUSTER_PERIOD_MS // 100)
    assert announces() - before == 4


def test_an_answer_that_comes_twice_acknowledges_one_announce_only() -> None:
    cluster = Cluster.of("a")
    node, engine = cluster["a"], Engine(cluster["a"])
    engine.store(key(1))
    cluster.now_ms += 5
    node.tick()
    first_id, first = the_announce(cluster)
    answer = cluster.ask(first)
    assert answer is not None
    node.answer_call(first_id)
    engine.store(key(2))
    cluster.now_ms += 5
    node.tick()
    second_id, second = the_announce(cluster)
    assert second.sequence == first.sequence + 1

    node.do(node.core.on_directory_reply(first_id, answer, cluster.now_ms))

    # The second one has not been heard, so it is said again, word for word.
    del node.calls[second_id]
    cluster.now_ms += 1_000
    node.tick()
    assert the_announce(cluster)[1] == second


@pytest.mark.parametrize("arrives", [False, True])
def test_an_announce_that_fails_is_said_again_word_for_word(arrives: bool) -> None:  # noqa: FBT001
    """Goal: what was drained from the store is told once more, whether the directory has heard it
    or not; no number is left out, or the directory would ask for the whole set.
    """
    cluster = Cluster.of("a", "b")
    node, engine = cluster["a"], Engine(cluster["a"])
    cluster.pass_ms(2_000)
    assert cluster.directory is not None
    gaps = cluster.directory.snapshot()["counts"]["gaps"]
    engine.store(key(1))
    cluster.now_ms += 5
    node.tick()
    call_id, said = the_announce(cluster)
    assert said.adds
    if arrives:
        cluster.ask(said)  # and its answer is lost
    del node.calls[call_id]
    node.do(node.core.on_directory_failed(call_id, cluster.now_ms))
    engine.store(key(2))

    cluster.now_ms += 1_000
    node.tick()
    call_id, again = the_announce(cluster)
    assert again == said
    node.answer_call(call_id)
    cluster.pass_ms(1_000)
    assert all(cluster.directory.where([key(1), key(2)]))
    assert cluster.directory.snapshot()["counts"]["gaps"] == gaps


def peers_of(node: Node) -> int:
    count: int = node.core.snapshot()["announcing"]["peers"]
    return count


def test_a_node_hears_who_comes_and_who_goes_and_of_nobody_else() -> None:
    """Goal: the news of a roster of thousands are as long as what has changed on it."""
    cluster = Cluster.of("a", "b", "c")
    node = cluster["a"]
    assert peers_of(node) == 2

    cluster.kill("c")
    cluster.pass_ms(5_000)
    assert peers_of(node) == 1
    cluster.start("d", Slab("d"))
    cluster.pass_ms(2_000)
    assert peers_of(node) == 2
    assert cluster.directory is not None
    version = node.core.snapshot()["announcing"]["roster_version"]
    assert cluster.directory.snapshot()["roster_version"] == version
    node.core.check()


def test_news_that_begin_elsewhere_are_no_news() -> None:
    """Goal: whatever a directory says of a roster that this node does not know, it asks for all."""
    cluster = Cluster.of("a", "b")
    node = cluster["a"]
    cluster.now_ms += 1_000
    node.tick()
    call_id, announce = the_announce(cluster)
    reply = cluster.ask(announce)
    assert isinstance(reply, AnnounceReply)
    del node.calls[call_id]
    strange = RosterNews(announce.roster_version + 7, [], [NodeId("b")])
    reply = msgspec.structs.replace(reply, roster_version=announce.roster_version + 8, news=strange)
    node.do(node.core.on_directory_reply(call_id, reply, cluster.now_ms))
    assert peers_of(node) == 1, "believed"

    cluster.now_ms += 1_000
    node.tick()
    call_id, announce = the_announce(cluster)
    assert announce.roster_version == 0
    node.answer_call(call_id)
    assert peers_of(node) == 1
    assert node.core.snapshot()["announcing"]["roster_version"] > 0
