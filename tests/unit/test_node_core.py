"""What a NodeStore decides about its own engines: sessions, look-ups, who writes what."""

from kvray.core.clients import SESSION_GRACE_MS
from kvray.core.codec import pack_keys, pack_slots
from kvray.core.ids import OpId, SlotState
from kvray.core.layout import MAX_CLIENTS
from kvray.core.messages import Abandon, Ack, Commit, Grant, Lookup
from tests.nodes import Cluster, Engine, Node, worker_of
from tests.shells import BLOCK_BYTES, Slab, key

A, B, C, D = (key(n) for n in range(1, 5))


def alone() -> Node:
    """A node without peers."""
    return Cluster.of("node")["node"]


# -- look-ups -----------------------------------------------------------------------------------


def test_what_was_stored_is_hit_and_what_was_not_is_missed() -> None:
    engine = Engine(alone())
    engine.store(A, B)

    assert engine.answer(engine.lookup([A, B, C])) == "hhm"


def test_behind_the_first_miss_of_a_prefix_run_nothing_counts() -> None:
    engine = Engine(alone())
    engine.store(A, C)

    assert engine.answer(engine.lookup([A, B, C])) == "hmm"
    assert engine.answer(engine.lookup([A, B, C], prefix=False)) == "hmh"
    assert engine.answer(engine.lookup([B, C], [A, C])) == "mmhh"


def test_hits_are_pinned_and_what_lies_behind_a_miss_is_not() -> None:
    node = alone()
    engine = Engine(node)
    engine.store(A, B, C, D)
    engine.lookup([A, B, key(9), C])
    engine.lookup([A, D], prefix=False, block_bytes=BLOCK_BYTES)

    node.do(node.core.clear(0))

    assert engine.answer(engine.lookup([A, B, C, D], prefix=False)) == "hhmh"


def test_unpin_lets_go_and_may_be_repeated_and_may_name_what_nobody_knows() -> None:
    node = alone()
    engine = Engine(node)
    engine.store(A)
    op = engine.lookup([A])
    for _ in range(2):
        engine.unpin(op)
    engine.unpin(OpId(999))

    node.do(node.core.clear(0))

    assert engine.answer(engine.lookup([A])) == "m"


def test_an_op_that_is_used_again_does_not_keep_its_first_pins() -> None:
    node = alone()
    engine = Engine(node)
    engine.store(A, B)
    op = engine.lookup([A])
    engine.lookup([B], op=op)
    node.do(node.core.clear(0))
    engine.unpin(op)

    assert engine.answer(engine.lookup([A, B], prefix=False)) == "mh"


def test_whoever_asks_for_a_block_being_written_waits_for_its_commit() -> None:
    node = alone()
    writer, reader = Engine(node), Engine(node)
    writer.reserve(A, B)
    op = reader.lookup([A, B])
    assert reader.answer(op) == "ww"

    writer.write(A, B)
    writer.commit(A, B)

    assert reader.answer(op) == "hh"
    assert node.core.snapshot()["lookups"]["hits_awaited"] == 2
    updates = [a for a in node.sent[reader.session_id] if type(a).__name__ == "LookupUpdate"]
    assert len(updates) == 1, "what settles together is told together"


def test_whoever_waits_for_a_block_that_is_abandoned_hears_a_miss_and_so_does_the_rest() -> None:
    node = alone()
    writer, reader = Engine(node), Engine(node)
    writer.reserve(A, B)
    op = reader.lookup([A, B])
    other = reader.lookup([A, B], prefix=False)
    writer.abandon(A)

    assert reader.answer(op) == "mm"
    assert reader.answer(other) == "mw"


def test_every_wait_ends_at_its_deadline() -> None:
    node = alone()
    writer, reader = Engine(node), Engine(node)
    writer.reserve(A)
    op = reader.lookup([A], within_ms=70)
    node.cluster.pass_ms(69)
    assert reader.answer(op) == "w"
    node.cluster.pass_ms(1)
    assert reader.answer(op) == "m"

    writer.write(A)
    writer.commit(A)

    assert reader.answer(op) == "m"


def test_a_block_of_another_size_is_no_hit() -> None:
    node = alone()
    engine = Engine(node)
    engine.store(A)
    assert engine.answer(engine.lookup([A], block_bytes=BLOCK_BYTES * 2)) == "m"

    engine.reserve(B)
    op = engine.lookup([B], block_bytes=BLOCK_BYTES * 2)
    engine.write(B)
    engine.commit(B)

    assert engine.answer(op) == "m"


def test_a_key_named_twice_is_waited_for_once() -> None:
    node = alone()
    engine = Engine(node)
    engine.reserve(A)
    op = engine.lookup([A, A], prefix=False)
    assert engine.answer(op) == "wm"
    engine.write(A)
    engine.commit(A)

    assert engine.answer(op) == "hm"


def test_an_engine_that_wants_only_what_is_here_does_not_wait() -> None:
    node = alone()
    engine = Engine(node)
    engine.store(A)
    engine.reserve(B)

    assert engine.answer(engine.lookup([A, B], fetch=False)) == "hm"


def test_a_block_larger_than_an_extent_is_refused_with_the_numbers() -> None:
    node = alone()
    engine = Engine(node)
    engine.lookup([A], block_bytes=1 << 20)
    (refusal,) = engine.refusals()

    assert "1048576" in refusal
    assert "65536" in refusal
    assert engine.session_id not in node.dropped


# -- writing ------------------------------------------------------------------------------------


def test_what_is_here_or_being_written_need_not_be_stored() -> None:
    engine = Engine(alone())
    engine.store(A)
    engine.reserve(B)

    assert list(engine.reserve(A, B, C)) == [Grant.PRESENT, Grant.PRESENT, Grant.GRANTED]


def test_a_store_that_finds_no_slot_is_dropped() -> None:
    node = Cluster.of("node")["node"]
    engine = Engine(node)
    slot_count = 2 * 16
    grants = engine.reserve(*(key(n) for n in range(slot_count + 3)))

    assert list(grants) == [Grant.GRANTED] * slot_count + [Grant.FULL] * 3
    assert node.core.snapshot()["storing"]["dropped"] == 3


def test_commits_and_abandons_may_be_repeated_and_may_be_late() -> None:
    node = alone()
    engine = Engine(node)
    engine.reserve(A, B)
    slots = [engine.reserved[A], engine.reserved[B]]
    engine.write(A, B)
    for _ in range(2):
        engine.say(Commit(OpId(50), node.slab.slab_id, pack_slots(slots[:1])))
        engine.say(Abandon(OpId(51), node.slab.slab_id, pack_slots(slots[1:])))
    engine.say(Commit(OpId(52), node.slab.slab_id, pack_slots(slots[1:])))
    engine.say(Abandon(OpId(53), node.slab.slab_id, pack_slots(slots[:1])))

    assert engine.answer(engine.lookup([A, B])) == "hm"


def test_a_commit_into_another_slab_is_ignored_and_acknowledged() -> None:
    node = alone()
    engine = Engine(node)
    engine.reserve(A)
    other = Slab("other").slab_id

    (answer,) = engine.say(Commit(OpId(50), other, pack_slots([engine.reserved[A]])))

    assert answer == Ack(OpId(50))
    assert node.slab.states() == {SlotState.WRITING: 1}


def test_nobody_commits_what_another_has_reserved() -> None:
    node = alone()
    engine, other = Engine(node), Engine(node)
    engine.reserve(A)
    other.say(Commit(OpId(50), node.slab.slab_id, pack_slots([engine.reserved[A]])))

    assert node.slab.states() == {SlotState.WRITING: 1}


def test_a_reservation_whose_answer_came_too_late_is_cancelled_as_a_whole() -> None:
    node = alone()
    engine = Engine(node)
    engine.reserve(A)
    engine.reserve(B, C)
    engine.say(Abandon(OpId(50), node.slab.slab_id, b"", engine.last_reserve))

    assert node.slab.states() == {SlotState.WRITING: 1}
    assert list(engine.reserve(A, B)) == [Grant.PRESENT, Grant.GRANTED]


def test_of_a_chain_that_was_stored_the_head_goes_last() -> None:
    engine = Engine(alone())
    chain = [key(n) for n in range(100, 132)]
    engine.store(*chain)
    engine.reserve(A)

    assert engine.answer(engine.lookup(chain)) == "h" * 31 + "m"


# -- sessions and processes -----------------------------------------------------------------------


def test_who_has_not_said_hello_is_dropped() -> None:
    node = alone()
    node.hear(77, Lookup(OpId(1), pack_keys([A]), [1], [True], [BLOCK_BYTES], 100))

    assert "before Hello" in node.dropped[77]


def test_a_worker_only_maps_the_slab() -> None:
    node = alone()
    worker_of(Engine(node))
    session_id = node.cluster.next_session - 1
    node.hear(session_id, Lookup(OpId(1), pack_keys([A]), [1], [True], [BLOCK_BYTES], 100))

    assert "worker" in node.dropped[session_id]


def test_a_session_is_of_one_client_only() -> None:
    node = alone()
    engine = Engine(node)
    other = Engine(node)
    node.cluster.next_session = engine.session_id  # the next hello comes on the first session

    assert other.hello() is None
    assert "another client" in node.dropped[engine.session_id]


def test_one_client_too_many_is_dropped_and_the_others_go_on() -> None:
    node = alone()
    engines = [Engine(node) for _ in range(MAX_CLIENTS)]
    one_too_many = Engine(node)
    assert f"{MAX_CLIENTS} clients" in node.dropped[one_too_many.session_id]
    engines[0].store(A)

    engines[1].die()

    assert one_too_many.hello() is not None
    assert one_too_many.answer(one_too_many.lookup([A])) == "h"


def test_a_closed_session_ends_no_pin_and_no_reservation() -> None:
    node = alone()
    engine = Engine(node)
    engine.store(A)
    op = engine.lookup([A])
    engine.reserve(B)
    engine.lose_session()
    node.do(node.core.clear(0))
    assert node.slab.states() == {SlotState.READY: 1, SlotState.WRITING: 1}

    engine.hello([engine.reserved[B]])
    engine.write(B)
    engine.commit(B)

    assert engine.answer(engine.lookup([A, B])) == "hh"
    engine.unpin(op)


def test_a_hello_in_a_second_session_replaces_the_first() -> None:
    node = alone()
    engine = Engine(node)
    first = engine.session_id
    engine.store(A)
    op = engine.lookup([A])
    engine.hello()
    assert "another session" in node.dropped[first]

    node.do(node.core.on_session_closed(first, node.cluster.now_ms))  # its end changes nothing
    node.do(node.core.clear(0))

    assert engine.answer(engine.lookup([A])) == "h"
    engine.unpin(op)


def test_nothing_is_told_to_a_session_that_is_closed() -> None:
    node = alone()
    writer, reader = Engine(node), Engine(node)
    writer.reserve(A)
    reader.lookup([A])
    reader.lose_session()
    writer.write(A)
    writer.commit(A)

    assert reader.answer(OpId(reader.ops)) == "w"
    node.core.check()


def test_a_client_without_a_session_for_long_loses_its_pins_and_may_come_back() -> None:
    node = alone()
    engine = Engine(node)
    engine.store(A)
    engine.lookup([A])
    engine.reserve(B, C)
    engine.lose_session()
    node.cluster.pass_ms(SESSION_GRACE_MS)
    assert node.slab.states() == {SlotState.READY: 1, SlotState.QUARANTINE: 2}
    node.do(node.core.clear(0))
    assert node.slab.states() == {SlotState.QUARANTINE: 2}

    engine.hello([engine.reserved[B]])
    assert node.slab.states() == {SlotState.WRITING: 1}
    engine.write(B)
    engine.commit(B)

    assert engine.answer(engine.lookup([B])) == "h"


def test_the_slots_of_a_dead_engine_wait_for_each_of_its_workers() -> None:
    node = alone()
    engine, other = Engine(node), Engine(node)
    first, second, stranger = worker_of(engine), worker_of(engine), worker_of(other)
    engine.store(A)
    engine.lookup([A])
    engine.reserve(B)
    node.process_gone(first)
    engine.die()
    node.process_gone(stranger)
    assert node.slab.states() == {SlotState.READY: 1, SlotState.QUARANTINE: 1}
    assert list(other.reserve(B)) == [Grant.GRANTED], "in another slot"

    node.process_gone(second)

    assert node.slab.states() == {SlotState.READY: 1, SlotState.WRITING: 1}
    node.do(node.core.clear(0))
    assert node.slab.states() == {SlotState.WRITING: 1}
    assert {entry.client for entry in node.slab.clients.values()} == {other.client_id}


def test_the_slots_of_an_engine_without_workers_are_free_when_it_is_gone() -> None:
    node = alone()
    engine = Engine(node)
    engine.reserve(A)
    engine.die()

    assert node.slab.states() == {}
    assert node.slab.clients == {}


def test_whoever_waits_for_what_a_dead_engine_was_writing_hears_a_miss() -> None:
    node = alone()
    writer, reader = Engine(node), Engine(node)
    worker_of(writer)
    writer.reserve(A)
    op = reader.lookup([A])
    writer.die()

    assert reader.answer(op) == "m"
    assert node.core.snapshot()["lookups"]["misses"]["writer_failed"] == 1


def test_all_clients_of_a_process_go_with_it() -> None:
    node = alone()
    first = Engine(node, pid=500)
    Engine(node, pid=500)
    first.die()

    assert node.slab.clients == {}


def test_bye_lets_go_of_everything_and_is_acknowledged() -> None:
    node = alone()
    engine = Engine(node)
    engine.store(A)
    engine.lookup([A])
    engine.bye()
    assert node.sent[engine.session_id][-1] == Ack(OpId(engine.ops))
    assert node.slab.clients == {}

    node.do(node.core.clear(0))

    assert node.slab.states() == {}


def test_a_bye_while_workers_may_still_write_keeps_the_slots_in_quarantine() -> None:
    node = alone()
    engine = Engine(node)
    worker = worker_of(engine)
    engine.reserve(A)
    engine.bye()
    assert node.slab.states() == {SlotState.QUARANTINE: 1}

    node.process_gone(worker)

    assert node.slab.states() == {}


def test_each_process_is_watched() -> None:
    node = alone()
    engine = Engine(node)
    worker = worker_of(engine)

    assert {(engine.client_id.pid, 1), (worker.pid, 1)} <= node.watched


def test_reports_of_an_engine_add_up() -> None:
    node = alone()
    engine = Engine(node)
    engine.report(hit_tokens=5, misses=1)
    engine.report(hit_tokens=2)

    (client,) = node.core.snapshot()["clients"]
    assert client["counters"] == {"hit_tokens": 7, "misses": 1}
    assert client["label"] == "a label"
    assert client["model"] == "a model"
    engine.bye()
    assert node.core.snapshot()["engine_totals"] == {"hit_tokens": 7, "misses": 1}


def test_an_engine_may_say_anew_who_it_is() -> None:
    node = alone()
    engine = Engine(node, maker=0)
    engine.introduce(namespace=b"o" * 16, maker=7)

    (client,) = node.core.snapshot()["clients"]
    assert (client["namespace"], client["maker"]) == ((b"o" * 16).hex(), f"{7:016x}")
    engine.hello()
    (client,) = node.core.snapshot()["clients"]
    assert client["maker"] == f"{7:016x}", "said again with each hello"


# -- restart ------------------------------------------------------------------------------------


def test_after_a_kill_committed_blocks_are_there_and_listed_slots_are_given_back() -> None:
    cluster = Cluster.of("node")
    engine = Engine(cluster["node"])
    engine.store(A)
    engine.reserve(B, C)
    engine.write(B)
    slab = cluster.kill("node")
    node = cluster.start("node", slab)
    assert slab.states() == {SlotState.READY: 1, SlotState.QUARANTINE: 2}
    assert (engine.client_id.pid, 1) in node.watched

    engine.hello([engine.reserved[B]], node=node)  # C was never told to a worker
    assert slab.states() == {SlotState.READY: 1, SlotState.WRITING: 1}
    engine.commit(B)

    assert engine.answer(engine.lookup([A, B])) == "hh"


def test_after_a_kill_the_slots_of_an_engine_that_died_too_wait_for_its_workers() -> None:
    cluster = Cluster.of("node")
    engine = Engine(cluster["node"])
    worker = worker_of(engine)
    engine.reserve(A)
    slab = cluster.kill("node")
    node = cluster.start("node", slab)
    node.process_gone(engine.client_id)
    assert slab.states() == {SlotState.QUARANTINE: 1}

    node.process_gone(worker)

    assert slab.states() == {}
    assert slab.clients == {}


def test_an_abandon_that_names_nothing_abandons_nothing() -> None:
    cluster = Cluster.of("node")
    engine = Engine(cluster["node"])
    engine.reserve(A)
    slab = cluster.kill("node")
    node = cluster.start("node", slab)
    engine.hello([engine.reserved[A]], node=node)
    engine.say(Abandon(OpId(50), slab.slab_id, b""))

    assert slab.states() == {SlotState.WRITING: 1}


def test_a_hello_that_speaks_of_another_slab_neither_restores_nor_frees() -> None:
    cluster = Cluster.of("node")
    engine = Engine(cluster["node"])
    engine.reserve(A)
    slab = cluster.kill("node")
    node = cluster.start("node", slab)
    engine.hello([engine.reserved[A]], node=node, slab_id=Slab("other").slab_id)
    assert slab.states() == {SlotState.QUARANTINE: 1}

    engine.die()

    assert slab.states() == {}


def test_what_a_hello_in_the_same_epoch_does_not_list_is_waited_for_no_more() -> None:
    """Goal: a commit or abandon that never comes (a full outbox) holds up nobody who wants the key,
    once its engine has said hello again.
    """
    node = alone()
    engine, other = Engine(node), Engine(node)
    engine.reserve(A, B)
    ops = [other.lookup([key]) for key in (A, B)]
    assert [other.answer(op) for op in ops] == ["w", "w"]

    engine.lose_session()
    engine.hello([engine.reserved[A]])

    assert [other.answer(op) for op in ops] == ["w", "m"]
    assert node.slab.states() == {SlotState.WRITING: 1}
    engine.write(A)
    engine.commit(A)
    assert [other.answer(op) for op in ops] == ["h", "m"]


def test_a_reservation_that_a_hello_has_restored_is_abandoned_by_its_slots() -> None:
    """Goal: the NodeStore was killed while an engine waited for the second page of a reservation,
    and heard a hello that lists the first page before the engine gave it up.
    """
    cluster = Cluster.of("node")
    engine = Engine(cluster["node"])
    engine.reserve(A)
    node = cluster.start("node", cluster.kill("node"))
    engine.hello([engine.reserved[A]], node=node)

    engine.say(Abandon(OpId(50), node.slab.slab_id, b"", reserve_op=engine.last_reserve))
    assert node.slab.states() == {SlotState.WRITING: 1}
    engine.abandon(A)
    assert node.slab.states() == {}


def test_a_listed_slot_whose_key_has_come_back_elsewhere_waits_for_the_engines_word() -> None:
    cluster = Cluster.of("node")
    engine = Engine(cluster["node"])
    engine.reserve(A)
    slab = cluster.kill("node")
    node = cluster.start("node", slab)
    other = Engine(node)
    other.store(A)
    engine.hello([engine.reserved[A]], node=node)
    assert slab.states() == {SlotState.READY: 1, SlotState.QUARANTINE: 1}

    engine.commit(A)

    assert slab.states() == {SlotState.READY: 1}


def test_targets_of_a_killed_nodes_fetches_are_free_at_its_start() -> None:
    cluster = Cluster.of("a", "b")
    Engine(cluster["a"]).store(A)
    cluster.pass_ms(300)
    cluster.link_is_up = False
    Engine(cluster["b"]).lookup([A])
    cluster.settle()
    slab = cluster.kill("b")
    assert slab.states() == {SlotState.WRITING: 1}

    cluster.start("b", slab)

    assert slab.states() == {}
