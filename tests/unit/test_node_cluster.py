"""Two NodeCores and a directory: a block comes from a peer, and what goes wrong costs a miss."""

import pytest

from kvray.core.commands import ReadKind
from kvray.core.fetch import FetchLimits
from kvray.core.ids import SlotState
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import Announce, Locate
from kvray.core.node import CLOGGED_MS
from kvray.core.reasons import MissReason
from kvray.core.roster import QUIET_AFTER_MS, QUIET_PERIOD_MS
from tests.nodes import Cluster, Engine
from tests.shells import BLOCK_BYTES, Slab, key, stamp

A, B, C, D = (key(n) for n in range(1, 5))
ALL = [A, B, C, D]


def cluster_with(*stored: bytes) -> tuple[Cluster, Engine, Engine]:
    """Nodes a and b with an engine each; a has stored these, and the directory knows."""
    cluster = Cluster.of("a", "b")
    here, there = Engine(cluster["a"]), Engine(cluster["b"])
    here.store(*(key(int.from_bytes(k, "big")) for k in stored))
    cluster.pass_ms(300)
    return cluster, here, there


def misses(engine: Engine) -> dict[str, int]:
    found: dict[str, int] = engine.node.core.snapshot()["lookups"]["misses"]
    return found


# -- a block's way ------------------------------------------------------------------------------


def test_what_one_engine_has_computed_is_a_hit_on_another_node() -> None:
    cluster, _, there = cluster_with(*ALL)
    op = there.lookup(ALL)
    assert there.answer(op) == "wwww"
    cluster.settle()

    assert there.answer(op) == "hhhh"
    for _, _, offset in there.places[op].values():
        assert cluster["a"].slab.block(offset) == cluster["b"].slab.block(offset)
    snapshot = there.node.core.snapshot()
    assert snapshot["lookups"]["hits_fetched"] == 4
    assert snapshot["fetch"]["fetched_bytes"] == 4 * BLOCK_BYTES


def test_a_block_keeps_its_maker_from_node_to_node_and_through_a_restart() -> None:
    maker = 2**64 - 5
    cluster = Cluster.of("a", "b", "c")
    Engine(cluster["a"], maker=maker).store(A)
    cluster.pass_ms(300)
    Engine(cluster["b"], maker=maker).lookup([A])
    cluster.settle()
    cluster.start("b", cluster.kill("b"))
    cluster.kill("a")
    cluster.pass_ms(10_000)  # a is buried: what c gets now is a copy of a copy

    last = Engine(cluster["c"], maker=maker)
    op = last.lookup([A])
    cluster.settle()

    assert last.answer(op) == "h"
    ((slot, _, _),) = last.places[op].values()
    assert cluster["c"].slab.headers[slot]["maker"] == maker


def test_only_the_prefix_that_somebody_has_is_fetched() -> None:
    cluster, _, there = cluster_with(A, C, D)
    op = there.lookup(ALL)
    cluster.settle()

    assert there.answer(op) == "hmmm"
    assert there.node.core.snapshot()["fetch"]["fetched_blocks"] == 1
    assert misses(there) == {"never_seen": 1, "behind": 2}


def test_a_chain_may_be_here_in_part_being_written_in_part_and_away_in_part() -> None:
    cluster, _, there = cluster_with(C, D)
    there.store(A)
    writer = Engine(there.node)
    writer.reserve(B)
    op = there.lookup(ALL)
    assert there.answer(op) == "hwww"
    cluster.settle()
    assert there.answer(op) == "hwhh"
    writer.write(B)
    writer.commit(B)

    assert there.answer(op) == "hhhh"


def test_when_the_local_writer_gives_up_nothing_behind_it_is_fetched() -> None:
    cluster, _, there = cluster_with(B, C)
    writer = Engine(there.node)
    writer.reserve(A)
    op = there.lookup([A, B, C])
    writer.abandon(A)
    assert there.answer(op) == "mmm"
    cluster.settle()

    assert there.node.core.snapshot()["fetch"]["reads"]["reads_count"] == 0


def test_a_fetched_copy_is_announced_and_can_be_fetched_from_there() -> None:
    cluster, _, there = cluster_with(A)
    cluster.start("c", Slab("c"))
    cluster.pass_ms(300)
    there.lookup([A])
    cluster.pass_ms(300)
    cluster.kill("a")
    third = Engine(cluster["c"])
    op = third.lookup([A])
    cluster.pass_ms(2_000)

    assert third.answer(op) == "h"


def test_two_requests_that_want_the_same_blocks_share_the_fetch() -> None:
    cluster, _, there = cluster_with(A, B)
    other = Engine(there.node)
    ops = [(there, there.lookup([A, B])), (other, other.lookup([A, B]))]
    cluster.settle()

    assert [engine.answer(op) for engine, op in ops] == ["hh", "hh"]
    assert there.node.core.snapshot()["fetch"]["fetched_blocks"] == 2


def test_unpin_ends_the_waiting_and_a_fetch_that_nobody_asked_a_peer_for() -> None:
    cluster, _, there = cluster_with(A)
    op = there.lookup([A])
    there.unpin(op)
    cluster.settle()

    assert there.answer(op) == "w", "nothing more is said of it"
    assert there.node.core.snapshot()["fetch"]["reads"]["reads_count"] == 0


def test_what_settles_at_once_is_told_in_the_reply() -> None:
    cluster, _, there = cluster_with(A)
    cluster.directory = None
    cluster.pass_ms(3_000)

    assert there.answer(there.lookup([A])) == "m"
    assert len(there.node.sent[there.session_id]) == 2, "hello and lookup"


def test_an_engine_may_store_what_is_just_being_located() -> None:
    cluster, _, there = cluster_with(A)
    op = there.lookup([A])
    there.store(A)
    assert there.answer(op) == "h"
    cluster.settle()

    assert there.node.core.snapshot()["fetch"]["reads"]["reads_count"] == 0


def test_an_engine_that_is_writing_what_is_found_meanwhile_is_waited_for() -> None:
    cluster, _, there = cluster_with(A)
    op = there.lookup([A])
    there.reserve(A)
    cluster.settle()
    assert there.answer(op) == "w"
    there.write(A)
    there.commit(A)

    assert there.answer(op) == "h"


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_block_that_is_rewritten_while_it_is_read_does_not_count() -> None:
    cluster, here, there = cluster_with(A)
    cluster.link_is_up = False
    op = there.lookup([A])
    cluster.settle()
    (read_id,) = there.node.reads
    there.node.end_read(read_id)
    here.node.do(here.node.core.clear(cluster.now_ms))
    here.store(B)  # in A's slot
    cluster.link_is_up = True
    cluster.settle()

    assert there.answer(op) == "m"
    assert misses(there) == {"evicted": 1}
    assert there.node.slab.states() == {}


def test_a_silent_link_costs_a_miss_and_its_target_stays_in_quarantine_until_it_ends() -> None:
    cluster, _, there = cluster_with(A)
    cluster.link_is_up = False
    op = there.lookup([A], within_ms=3_000)
    cluster.pass_ms(1_000)
    assert there.answer(op) == "m"
    assert misses(there) == {"peer_gone": 1}
    assert there.node.slab.states() == {SlotState.QUARANTINE: 1}
    assert [line.warning for line in there.node.lines[-1:]] == [True]

    cluster.link_is_up = True
    cluster.settle()

    assert there.node.slab.states() == {}


def test_a_lookup_is_answered_at_its_own_deadline_whatever_the_link_does() -> None:
    cluster, _, there = cluster_with(A)
    cluster.link_is_up = False
    op = there.lookup([A], within_ms=50)
    cluster.pass_ms(50)
    assert there.answer(op) == "m"
    cluster.link_is_up = True
    cluster.settle()

    assert there.answer(there.lookup([A])) == "h", "it came all the same"


def test_when_fetches_find_no_slot_they_are_misses() -> None:
    cluster, _, there = cluster_with(A)
    slot_count = 32
    there.reserve(*(key(n) for n in range(100, 100 + slot_count)))
    op = there.lookup([A])
    cluster.settle()

    assert there.answer(op) == "m"
    assert misses(there) == {"slab_full": 1}


def test_reads_that_never_end_stop_the_fetching_and_in_the_end_the_node_restarts() -> None:
    limits = FetchLimits(max_reads_per_peer=2, max_unended_reads=2, batch_blocks=1)
    cluster = Cluster.of("a", "b", limits=limits)
    here, there = Engine(cluster["a"]), Engine(cluster["b"])
    here.store(*ALL)
    cluster.pass_ms(300)
    cluster.link_is_up = False
    there.lookup(ALL)
    cluster.pass_ms(1_500)
    assert there.answer(there.lookup([D])) == "m"
    assert misses(there)["overloaded"] == 1
    cluster.pass_ms(CLOGGED_MS - 1_000)
    assert there.node.restarts == []
    cluster.pass_ms(1_000)

    assert len(there.node.restarts) == 1


# -- the directory ------------------------------------------------------------------------------


def announced(cluster: Cluster, *keys: bytes) -> list[list[str]]:
    """For each key where the directory says it is."""
    assert cluster.directory is not None
    found = cluster.directory.where([key(int.from_bytes(k, "big")) for k in keys])
    return [sorted(location.node_id for location in locations) for locations in found]


def test_changes_are_announced_within_a_few_ms_and_together() -> None:
    cluster, here, _ = cluster_with()
    before = here.node.core.snapshot()["announcing"]["announces"]
    here.store(A, B)
    here.store(C)
    cluster.pass_ms(5)

    assert announced(cluster, A, B, C) == [["a"]] * 3
    assert here.node.core.snapshot()["announcing"]["announces"] == before + 1


def test_an_eviction_is_announced() -> None:
    cluster, here, _ = cluster_with(A)
    here.node.do(here.node.core.clear(cluster.now_ms))
    cluster.pass_ms(5)
    assert announced(cluster, A) == [[]]

    here.store(*(key(n) for n in range(100, 132)))
    cluster.pass_ms(5)
    here.reserve(B)  # one of them has to go for it
    cluster.pass_ms(5)

    assert sum(len(at) for at in announced(cluster, *(key(n) for n in range(100, 132)))) == 31


def test_more_changes_than_one_announce_holds_are_announced_one_after_another() -> None:
    cluster = Cluster.of("a", slot_count=16 * 160)
    engine = Engine(cluster["a"])
    for start in range(0, 2_500, 500):
        engine.store(*(key(n) for n in range(start, start + 500)))
    cluster.pass_ms(5)

    assert cluster.directory is not None
    assert cluster.directory.snapshot()["entries"] == 2_500


def test_an_idle_node_only_sends_heartbeats() -> None:
    cluster, here, _ = cluster_with(A)
    core = here.node.core

    def announces(during_ms: int) -> int:
        before: int = core.snapshot()["announcing"]["announces"]
        cluster.pass_ms(during_ms)
        after: int = core.snapshot()["announcing"]["announces"]
        return after - before

    assert announces(3_000) in (10, 11), "one each 300 ms, and the first after less"
    cluster.pass_ms(QUIET_AFTER_MS)
    assert announces(10 * QUIET_PERIOD_MS) == 10
    due_ms = core.next_deadline_ms()
    assert due_ms is not None
    assert 100 <= due_ms - cluster.now_ms <= QUIET_PERIOD_MS, "sleeps until then"


def test_a_directory_that_restarts_learns_everything_again() -> None:
    cluster, here, there = cluster_with(A, B)
    cluster.restart_directory()
    cluster.pass_ms(1_000)

    assert announced(cluster, A, B) == [["a"], ["a"]]
    op = there.lookup([A, B])
    cluster.settle()
    assert there.answer(op) == "hh"
    assert here.node.linking == []


def test_a_call_that_is_lost_is_made_again_and_loses_no_change() -> None:
    cluster, here, _ = cluster_with()
    here.store(A)
    cluster.now_ms += 5
    here.node.tick()
    (lost,) = here.node.calls.values()
    here.node.calls.clear()
    here.store(B)
    cluster.pass_ms(1_100)

    assert isinstance(lost.message, Announce)
    assert announced(cluster, A, B) == [["a"], ["a"]]
    assert cluster["a"].core.snapshot()["announcing"]["repeated_calls"] == 1


def test_a_late_answer_counts_as_an_answer() -> None:
    cluster, here, _ = cluster_with()
    cluster.now_ms += 500
    here.node.tick()
    (late,) = here.node.calls.values()
    reply = cluster.ask(late.message)
    assert reply is not None
    here.node.calls.clear()
    cluster.now_ms += 1_100
    here.node.tick()  # it is said again, and has not been answered either
    here.node.calls.clear()

    here.node.do(here.node.core.on_directory_reply(late.call_id, reply, cluster.now_ms))

    assert here.node.core.snapshot()["announcing"]["heard_ms"] == cluster.now_ms


def test_without_a_directory_a_node_serves_what_it_has_and_nobody_waits() -> None:
    cluster, _, there = cluster_with(A)
    there.store(B)
    cluster.directory = None
    op = there.lookup([A])
    cluster.settle()
    assert there.answer(op) == "m"
    assert misses(there) == {"directory_silent": 1}
    cluster.pass_ms(3_000)

    assert there.answer(there.lookup([B])) == "h"
    assert there.answer(there.lookup([A])) == "m"
    assert not any(isinstance(c.message, Locate) for c in there.node.calls.values())


def test_a_directory_that_does_not_answer_at_all_costs_a_locate_its_deadline() -> None:
    cluster, _, there = cluster_with(A)
    op = there.lookup([A], within_ms=5_000)
    there.node.calls.clear()
    cluster.now_ms += FetchLimits().locate_deadline_ms
    there.node.tick()

    assert there.answer(op) == "m"


def test_a_buried_node_comes_back_in_a_greater_epoch_and_its_blocks_with_it() -> None:
    cluster, here, there = cluster_with(A)
    assert cluster.directory is not None
    epoch = here.node.core.info.epoch
    cluster.directory.on_node_dead(here.node.core.info.node_id, epoch)
    cluster.pass_ms(1_000)

    assert here.node.core.info.epoch > epoch
    assert announced(cluster, A) == [["a"]]
    assert here.node.connected.keys() == {"b"}
    op = there.lookup([A])
    cluster.settle()
    assert there.answer(op) == "h"


def test_however_long_a_link_takes_to_open_the_first_one_is_good() -> None:
    """A second epoch would need a second agent, while everybody waits for this node."""
    cluster, _, _ = cluster_with(A)
    slab = cluster.kill("a")
    node = cluster.start("a", slab)
    epoch = node.core.info.epoch
    cluster.now_ms += 2_600  # NIXL beside engines that compute
    cluster.pass_ms(1_000)
    assert node.core.info.epoch == epoch
    assert announced(cluster, A) == [["a"]]

    assert cluster.directory is not None
    cluster.directory.on_node_dead(node.core.info.node_id, epoch)
    cluster.now_ms += 300
    node.tick()
    for call_id in list(node.calls):
        node.answer_call(call_id)
    (greater,) = node.linking
    cluster.now_ms += 2_600
    cluster.pass_ms(1_000)
    assert greater > epoch
    assert node.core.info.epoch == greater
    assert announced(cluster, A) == [["a"]]


def test_before_it_takes_another_epoch_a_node_has_given_up_all_reads() -> None:
    cluster, _, there = cluster_with(A)
    cluster.link_is_up = False
    op = there.lookup([A], within_ms=5_000)
    cluster.settle()
    assert cluster.directory is not None
    info = there.node.core.info
    cluster.directory.on_node_dead(info.node_id, info.epoch)
    cluster.now_ms += 200
    there.node.tick()
    for call_id in list(there.node.calls):
        there.node.answer_call(call_id)

    assert there.answer(op) == "m"
    assert there.node.linking
    assert there.node.abandoned == set(there.node.reads)


def test_a_node_that_starts_with_too_low_an_epoch_takes_the_one_it_is_told() -> None:
    cluster, here, _ = cluster_with(A)
    epoch = here.node.core.info.epoch
    slab = cluster.kill("a")
    slab.epoch = 0
    cluster.now_ms -= 500  # the clock of a machine that was set back
    node = cluster.start("a", slab)
    cluster.now_ms += 500
    cluster.pass_ms(1_000)

    assert node.core.info.epoch > epoch
    assert announced(cluster, A) == [["a"]]


def test_engines_are_served_before_there_is_a_link() -> None:
    """Loading NIXL takes a second or two; the directory hears of a node when peers can read."""
    cluster, here, _ = cluster_with()
    here.store(A)
    node = cluster.start("a", cluster.kill("a"))
    here.hello(node=node)
    op = here.lookup([A, B])

    assert here.answer(op) == "hm"
    assert node.calls == {}
    node.open_links()
    cluster.pass_ms(500)
    assert announced(cluster, A) == [["a"]]


def test_a_node_whose_slab_has_another_format_is_not_read_from() -> None:
    """Should one speak our messages: its slot headers lie elsewhere."""
    cluster, _, there = cluster_with()
    other = cluster.start("c", Slab("c", format_version=FORMAT_VERSION + 1))
    Engine(other).store(A)
    cluster.pass_ms(500)
    assert announced(cluster, A) == [["c"]]
    op = there.lookup([A])
    cluster.settle()

    assert there.answer(op) == "m"
    assert "c" not in there.node.connected


def test_a_killed_node_that_comes_back_keeps_its_blocks_for_its_peers() -> None:
    cluster, _, there = cluster_with(A)
    slab = cluster.kill("a")
    cluster.pass_ms(300)
    cluster.start("a", slab)
    cluster.pass_ms(1_000)
    op = there.lookup([A])
    cluster.settle()

    assert there.answer(op) == "h"


def test_peers_are_connected_before_the_first_read_and_disconnected_when_they_are_buried() -> None:
    cluster, _, there = cluster_with()
    assert there.node.connected.keys() == {"a"}
    cluster.kill("a")
    cluster.pass_ms(3_000)

    assert there.node.connected == {}


def test_a_set_larger_than_one_announce_comes_in_parts_and_changes_meanwhile_count() -> None:
    cluster = Cluster.of("a", slot_count=16 * 160)
    engine = Engine(cluster["a"])
    keys = [key(n) for n in range(2_500)]
    for start in range(0, len(keys), 500):
        engine.store(*keys[start : start + 500])
    cluster.pass_ms(300)
    cluster.restart_directory()
    node = cluster["a"]
    while node.core.snapshot()["announcing"]["resync_left"] != 452:
        cluster.now_ms += 1
        node.tick()
        for call_id in list(node.calls):
            node.answer_call(call_id)
    gone, kept = keys[0], keys[-1]  # of the part that is out, of the part that is not
    op = engine.lookup(keys[1:-1:2][:1_000], prefix=False)
    node.do(node.core.clear(cluster.now_ms))
    engine.store(kept)
    cluster.pass_ms(300)

    assert announced(cluster, gone, kept) == [[], ["a"]]
    assert cluster.directory is not None
    assert cluster.directory.snapshot()["entries"] == 1 + len(engine.places[op])


def test_a_block_that_comes_and_goes_while_the_set_is_told_leaves_nothing_behind() -> None:
    """Its add and its remove cancel, so the set must not have told of it either."""
    cluster, _, _ = cluster_with()
    node, engine = cluster["a"], Engine(cluster["a"])
    engine.reserve(A)  # in a slot when the set is begun, READY only later
    engine.write(A)
    cluster.restart_directory()
    while not cluster.directory or not cluster.directory.snapshot()["nodes"]:
        cluster.now_ms += 1
        node.tick()
        for call_id in list(node.calls):
            node.answer_call(call_id)
    node.tick()
    (heartbeat,) = node.calls
    node.answer_call(heartbeat)  # RESYNC
    engine.commit(A)
    node.tick()  # the set goes out
    node.do(node.core.clear(cluster.now_ms))
    cluster.pass_ms(300)

    assert announced(cluster, A) == [[]]


def test_a_block_that_was_told_with_the_whole_set_is_told_when_it_is_evicted() -> None:
    cluster, _, _ = cluster_with()
    Engine(cluster["a"]).store(A)
    node = cluster.start("a", cluster.kill("a"))
    node.open_links()
    for _ in range(3):  # hello, a heartbeat that is answered with RESYNC, the set
        (call_id,) = node.calls
        node.answer_call(call_id)
        node.tick()
    assert announced(cluster, A) == [["a"]]
    node.do(node.core.clear(cluster.now_ms))
    cluster.pass_ms(300)

    assert announced(cluster, A) == [[]]


@pytest.mark.parametrize("kind", list(ReadKind))
def test_a_read_that_fails_is_a_miss_at_once(kind: ReadKind) -> None:
    cluster, _, there = cluster_with(A)
    cluster.link_is_up = False
    op = there.lookup([A])
    cluster.settle()
    if kind is ReadKind.HEADERS:
        there.node.end_read(min(there.node.reads))
    there.node.end_read(min(there.node.reads), ok=False)

    assert there.answer(op) == "m"
    assert there.node.slab.states() == {}
    assert misses(there) == {MissReason.PEER_GONE.value: 1}


def test_the_world_of_these_tests_would_notice_wrong_bytes() -> None:
    cluster, here, there = cluster_with(A)
    op = here.lookup([A])
    ((_, _, offset),) = here.places[op].values()
    cluster["a"].slab.memory[offset : offset + BLOCK_BYTES] = stamp(B)
    there.lookup([A])
    cluster.settle()

    with pytest.raises(AssertionError, match="other bytes"):
        there.listen()
