"""A node leaves, and its peers keep what it had: in NodeCore, what one take_over call does."""

from collections.abc import Sequence

from kvray.core.ids import BlockKey
from kvray.core.messages import Grant
from tests.nodes import Cluster, Engine, Node
from tests.shells import BLOCK_BYTES, key

A, B, C, D, E = (key(n) for n in range(1, 6))


def take_over(node: Node, keys: Sequence[BlockKey], *, within_ms: int = 1_000) -> None:
    now_ms = node.cluster.now_ms
    wants = [(k, BLOCK_BYTES) for k in keys]
    node.do(node.core.take_over(1, wants, deadline_ms=now_ms + within_ms, now_ms=now_ms))


def leaving_and_staying(*stored: BlockKey) -> tuple[Cluster, Engine, Engine]:
    cluster = Cluster.of("a", "b")
    leaving, staying = Engine(cluster["a"]), Engine(cluster["b"])
    leaving.store(*stored)
    cluster.pass_ms(300)
    leaving.node.do(leaving.node.core.drain(cluster.now_ms))
    return cluster, leaving, staying


def test_what_only_the_leaving_node_had_is_hit_after_it_has_gone() -> None:
    cluster, leaving, staying = leaving_and_staying(A, B)
    take_over(staying.node, [A, B, C])
    cluster.settle()
    assert staying.node.taken_over == {1: (A, B)}, "nobody has C"
    cluster.kill(leaving.node.name)

    assert staying.answer(staying.lookup([A, B])) == "hh"


def test_a_leaving_node_stores_nothing_more_and_still_answers() -> None:
    _, leaving, _ = leaving_and_staying(A)

    assert leaving.reserve(A, B) == bytes([Grant.PRESENT, Grant.FULL])
    assert leaving.answer(leaving.lookup([A])) == "h"


def test_a_copy_that_is_kept_does_not_go_before_others() -> None:
    """Of more copies than probation has room for, the oldest is the first to go."""
    cluster, _, staying = leaving_and_staying(A, B, C, D, E)
    op = staying.lookup([A, B, C, D, E])
    cluster.settle()
    staying.unpin(op)
    take_over(staying.node, [E])  # unpinned first, so that A, the head of the chain, is hottest
    assert staying.node.taken_over == {1: (E,)}
    for n in range(100, 127):  # all slots are taken then
        staying.store(key(n))
    staying.store(key(200))

    op = staying.lookup([A, B, C, D, E], prefix=False, fetch=False)
    assert staying.answer(op) == "hhhmh"


def test_nothing_is_evicted_for_what_is_taken_over() -> None:
    cluster, _, staying = leaving_and_staying(A, B)
    own = [key(n) for n in range(100, 131)]
    for k in own:
        staying.store(k)
    take_over(staying.node, [A, B])
    cluster.settle()

    assert staying.node.taken_over == {1: (A,)}, "one slot was free"
    op = staying.lookup(own, prefix=False, fetch=False)
    assert staying.answer(op) == "h" * len(own)


def test_a_peer_that_is_gone_ends_a_take_over_by_its_deadline() -> None:
    cluster, leaving, staying = leaving_and_staying(A)
    cluster.link_is_up = False
    take_over(staying.node, [A], within_ms=400)
    cluster.pass_ms(399)
    assert staying.node.taken_over == {}
    cluster.pass_ms(1)

    assert staying.node.taken_over == {1: ()}
    assert leaving.node.core.snapshot()["is_draining"]


def test_what_is_evicted_again_before_the_end_does_not_count_as_taken() -> None:
    """Found by the simulator: the leaving node would have gone with the only block."""
    cluster, _, staying = leaving_and_staying(A, B)
    cluster.settle()
    staying.store(C)
    cluster.link_is_up = False
    take_over(staying.node, [C, A], within_ms=400)
    staying.node.do(staying.node.core.clear(cluster.now_ms))
    cluster.pass_ms(400)

    assert staying.node.taken_over == {1: ()}


def test_what_an_engine_of_the_staying_node_is_writing_is_left_to_it() -> None:
    """Found by the simulator: a block that was written and fetched at once."""
    cluster, _, staying = leaving_and_staying(A)
    staying.reserve(A)
    take_over(staying.node, [A])
    assert staying.node.taken_over == {1: ()}
    staying.write(A)
    staying.commit(A)
    take_over(staying.node, [A])

    assert staying.node.taken_over == {1: (A,)}
    assert cluster["b"].core.snapshot()["fetch"]["fetched_blocks"] == 0


def test_a_lookup_and_a_take_over_of_the_same_block_share_the_fetch() -> None:
    cluster, _, staying = leaving_and_staying(A)
    op = staying.lookup([A])
    take_over(staying.node, [A])
    cluster.settle()

    assert staying.answer(op) == "h"
    assert staying.node.taken_over == {1: (A,)}
    assert staying.node.core.snapshot()["fetch"]["fetched_blocks"] == 1
