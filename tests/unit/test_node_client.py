"""The engine's end of the local socket against the real LocalServer with a script behind it.

Method: the test's own thread is the engine's. The node's answers are held back, altered or sent
late by the script; what the engine sees, and what the node hears, is the story.
"""

import ctypes
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvray.core.codec import unpack_slots
from kvray.core.ids import (
    KEY_BYTES,
    BlockKey,
    Epoch,
    Maker,
    Namespace,
    NodeId,
    OpId,
    Role,
    SlabId,
)
from kvray.core.messages import (
    MAX_KEYS_PER_MESSAGE,
    MAX_NOISE,
    MAX_WRITING_LISTED,
    Abandon,
    Ack,
    Bye,
    ChunkShape,
    Commit,
    Grant,
    Hello,
    HelloReply,
    Introduce,
    KeyState,
    Lookup,
    LookupReply,
    LookupUpdate,
    NoiseLevels,
    Refused,
    Report,
    Reserve,
    ReserveReply,
    Unpin,
)
from kvray.node import connector
from kvray.node.client import ClientState, NodeClient, Reservation, Ticket, WorkerClient
from kvray.node.patience import HICCUP_S
from tests.scripted_node import (
    GEOMETRY,
    PAGE,
    PATIENCE_S,
    ScriptedNode,
    all_granted,
    all_waits,
    place_of,
    rows_of,
)

NONCE = 4711
NAMESPACE = Namespace(b"n" * 16)
HIT, MISS, WAIT, COMING = KeyState.HIT, KeyState.MISS, KeyState.WAIT, KeyState.COMING
AMPLE_S = 5.0  # a budget that only a bug spends
REPLY = (NodeId("n"), Epoch(1), SlabId(b"S" * 16), GEOMETRY.slab_bytes, GEOMETRY.extent_bytes)
SHORT_S = 0.01  # one that a silent node spends


def key_of(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(KEY_BYTES, "big"))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread of the client does some time soon."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.001)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Engine:
    """A NodeClient and what an engine would do with it."""

    def __init__(self, path: Path, *, budget_s: float = AMPLE_S, **options: Any) -> None:
        self.sessions: list[Any] = []
        self.client = NodeClient(
            find_socket=lambda: str(path) if path.exists() else None,
            engine_nonce=NONCE,
            namespace=NAMESPACE,
            label="test",
            budget_s=budget_s,
            on_session=self.sessions.append,
            retry_first_s=0.01,
            retry_last_s=0.05,
            **options,
        )

    def start(self) -> "Engine":
        self.client.start()
        self.until(ClientState.CONNECTED)
        return self

    def until(self, state: ClientState) -> None:
        until(lambda: self.client.state is state)

    def lookup(self, *numbers: int, **options: Any) -> Ticket | None:
        """One prefix run, in a new step."""
        self.client.begin_step()
        return self.lookup_more(*numbers, **options)

    def lookup_more(self, *numbers: int, **options: Any) -> Ticket | None:
        """The same in the step that is on."""
        return self.client.lookup(
            [key_of(number) for number in numbers],
            run_lengths=[len(numbers)] if numbers else [],
            run_is_prefix=[True] if numbers else [],
            run_slot_bytes=[PAGE] if numbers else [],
            deadline_ms=1_000,
            **options,
        )

    def asked(self, *numbers: int) -> Ticket:
        ticket = self.lookup(*numbers)
        assert ticket is not None
        return ticket

    def reserve(self, *numbers: int) -> Reservation | None:
        self.client.begin_step()
        return self.client.reserve(
            [key_of(number) for number in numbers],
            run_lengths=[len(numbers)],
            run_slot_bytes=[PAGE],
        )

    def granted(self, *numbers: int) -> Reservation:
        reservation = self.reserve(*numbers)
        assert reservation is not None
        return reservation


EngineFactory = Callable[..., Engine]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def node(path: Path) -> Iterator[ScriptedNode]:
    with ScriptedNode(path) as node:
        yield node


@pytest.fixture
def make_engine(path: Path) -> Iterator[EngineFactory]:
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engines.append(Engine(path, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.client.close(0.1)


@pytest.fixture
def engine(node: ScriptedNode, make_engine: EngineFactory) -> Engine:
    """Connected, with a budget that does not run out."""
    return make_engine().start()


# -- hello ---------------------------------------------------------------------------------------


def test_an_engine_says_who_it_is_and_learns_where_it_is(
    node: ScriptedNode, engine: Engine
) -> None:
    hello = node.wait(Hello)
    assert (hello.client.pid, hello.client.nonce) == (os.getpid(), NONCE)
    assert (hello.role, hello.engine_nonce) == (Role.ENGINE, NONCE)
    assert (hello.namespace, hello.label) == (NAMESPACE, "test")
    assert (hello.slab_id, hello.writing) == (b"", b"")
    session = engine.client.session
    assert session is not None
    assert engine.sessions == [session]
    assert (session.node_id, session.epoch, session.slab_id) == ("node", 1, node.slab_id)
    assert session.geometry == GEOMETRY


def test_a_model_of_a_strange_path_is_said_without_what_is_strange(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    make_engine(model="llama\x1b[2J\n\u202e").start()

    assert node.wait(Hello).model == "llama?[2J??"


def test_an_engine_without_a_node_serves_uncached_and_joins_when_one_appears(
    path: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine()
    engine.client.start()
    assert engine.client.state is ClientState.ABSENT
    assert engine.lookup(1, 2, 3) is None
    assert engine.reserve(1) is None
    until(lambda: engine.client.reason == "there is no NodeStore on this node")
    with ScriptedNode(path):
        engine.until(ClientState.CONNECTED)
        assert engine.client.reason == ""
        assert engine.asked(1).settled


def test_a_node_that_refuses_is_named_with_its_reason(
    node: ScriptedNode, make_engine: EngineFactory, caplog: pytest.LogCaptureFixture
) -> None:
    node.script[Hello] = lambda hello: Refused(hello.op, "not in this namespace", fatal=True)
    engine = make_engine()
    engine.client.start()
    until(lambda: "not in this namespace" in engine.client.reason)
    assert engine.client.state is ClientState.ABSENT
    assert engine.lookup(1) is None
    assert [record.getMessage() for record in caplog.records] == [
        "running uncached: the NodeStore refused us: not in this namespace"
    ]
    threading.Event().wait(0.2)
    assert len(node.all(Hello)) == 1, "it asked again, though only people can change the answer"


@pytest.mark.parametrize(
    "answer",
    [
        lambda hello: Ack(hello.op),
        lambda hello: HelloReply(OpId(hello.op + 1), *REPLY),
    ],
)
def test_a_hello_answered_with_nonsense_is_no_session_and_leaves_no_descriptor(
    node: ScriptedNode, make_engine: EngineFactory, answer: Callable[[Hello], Any]
) -> None:
    before = open_fds()
    node.script[Hello] = answer
    engine = make_engine()
    engine.client.start()
    until(lambda: "is no answer to Hello" in engine.client.reason)
    assert engine.client.session is None
    engine.client.close()
    node.wait_closed()
    assert open_fds() == before


def test_a_slab_that_does_not_come_with_the_reply_is_no_session(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    def without_slab(hello: Hello) -> None:
        node.server.send(node.sessions[-1], node.welcome(hello))

    node.script[Hello] = without_slab
    engine = make_engine()
    engine.client.start()
    until(lambda: "descriptor did not come" in engine.client.reason)


# -- introductions -------------------------------------------------------------------------------


def test_an_engine_introduces_itself_and_each_later_hello_says_the_same(
    node: ScriptedNode, engine: Engine
) -> None:
    node.wait(Hello)
    assert engine.client.is_introduced, "its hello has said all there was to say"
    shapes, noise = [ChunkShape(PAGE, PAGE // 4, "bfloat16")], NoiseLevels(0.0, 0.01)
    engine.client.introduce(
        Namespace(b"o" * 16), fields={"a": "b"}, maker=Maker(7), chunks=shapes, noise=noise
    )
    said = node.wait(Introduce)
    assert (said.namespace, said.fields, said.maker) == (b"o" * 16, {"a": "b"}, 7)
    assert (said.chunks, said.noise) == (shapes, noise)
    until(lambda: engine.client.is_introduced)
    node.hang_up()
    hello = node.wait(Hello)
    assert (hello.namespace, hello.fields, hello.maker) == (b"o" * 16, {"a": "b"}, 7)
    assert (hello.chunks, hello.noise) == (shapes, noise)
    engine.until(ClientState.CONNECTED)


def test_nothing_is_looked_up_or_reserved_until_the_node_knows_who_asks(
    node: ScriptedNode, engine: Engine
) -> None:
    """Or blocks of new weights would be stored under the maker of the old ones."""
    node.script[Introduce] = lambda introduce: None
    engine.client.introduce(NAMESPACE, fields={}, maker=Maker(7))
    node.wait(Introduce)
    assert not engine.client.is_introduced
    assert engine.lookup(1) is None
    assert engine.reserve(1) is None
    engine.client.introduce(NAMESPACE, fields={}, maker=Maker(8))
    second = node.wait(Introduce)
    node.say(Ack(OpId(second.op - 1)))
    node.hang_up()
    node.script.pop(Introduce)
    said = node.wait(Introduce)
    assert said == second, "the first one has been overtaken, and is not said again"
    until(lambda: engine.client.is_introduced)
    assert engine.lookup(1) is not None
    assert not [lookup for lookup in node.all(Lookup) if lookup.op < second.op]


def test_noise_that_is_no_number_is_said_as_the_most_there_can_be(
    node: ScriptedNode, engine: Engine
) -> None:
    noise = NoiseLevels(float("nan"), 3.0)
    engine.client.introduce(NAMESPACE, fields={}, noise=noise)
    assert node.wait(Introduce).noise == NoiseLevels(MAX_NOISE, MAX_NOISE)


# -- lookup --------------------------------------------------------------------------------------


def test_hits_waits_and_misses_are_told_apart(node: ScriptedNode, engine: Engine) -> None:
    states = bytes([HIT, HIT, WAIT, MISS])
    node.script[Lookup] = lambda lookup: LookupReply(
        lookup.op, states, rows_of(place_of(3, 30), place_of(4, 40))
    )
    ticket = engine.asked(1, 2, 3, 4)
    heard = node.wait(Lookup)
    assert heard.keys == b"".join(ticket.keys)
    assert (heard.run_lengths, heard.run_is_prefix) == ([4], [True])
    assert (heard.run_slot_bytes, heard.deadline_ms, heard.fetch) == ([PAGE], 1_000, True)
    assert (bytes(ticket.states), ticket.answered, ticket.settled) == (states, True, False)
    assert ticket.slab_id == node.slab_id
    assert [ticket.place(i) for i in range(4)] == [place_of(3, 30), place_of(4, 40), None, None]
    assert not any(ticket.from_peer(i) for i in range(4))
    engine.client.check()


def test_what_was_waited_for_arrives_while_the_engine_does_other_things(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = all_waits
    ticket = engine.asked(1, 2, 3)
    op = node.wait(Lookup).op
    node.say(LookupUpdate(op, [2, 0], bytes([MISS, HIT]), rows_of(place_of(7))))
    until(lambda: ticket.states.count(WAIT) == 1)
    assert bytes(ticket.states) == bytes([HIT, WAIT, MISS])
    assert ticket.place(0) == place_of(7)
    assert ticket.from_peer(0)
    assert not ticket.settled
    node.say(LookupUpdate(op, [1], bytes([HIT]), rows_of(place_of(8))))
    until(lambda: ticket.settled)
    assert ticket.place(1) == place_of(8)
    assert engine.client.snapshot()["open_lookups"] == 0


def test_a_ticket_is_arriving_when_all_places_are_known_and_a_first_block_has_come(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = lambda lookup: LookupReply(
        lookup.op, bytes([HIT, COMING, WAIT]), rows_of(place_of(1), place_of(2))
    )
    ticket = engine.asked(1, 2, 3)
    op = node.wait(Lookup).op
    assert ticket.place(1) == place_of(2)
    assert ticket.from_peer(1)
    assert not ticket.settled
    node.say(LookupUpdate(op, [2], bytes([COMING]), rows_of(place_of(3))))
    until(lambda: ticket.states.count(COMING) == 2)
    assert not ticket.arriving, "what was here all along proves nothing of the peer"

    node.say(LookupUpdate(op, [1], bytes([HIT]), rows_of(place_of(2))))
    until(lambda: ticket.arriving)
    assert not ticket.settled

    node.say(LookupUpdate(op, [2], bytes([HIT]), rows_of(place_of(3))))
    until(lambda: ticket.settled)
    assert not ticket.arriving
    assert engine.client.snapshot()["open_lookups"] == 0


def test_what_is_coming_may_come_to_another_place_or_not_at_all(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = lambda lookup: LookupReply(
        lookup.op, bytes([COMING, COMING]), rows_of(place_of(1), place_of(2))
    )
    ticket = engine.asked(1, 2)
    op = node.wait(Lookup).op
    node.say(LookupUpdate(op, [0, 1], bytes([COMING, MISS]), rows_of(place_of(7))))
    until(lambda: MISS in ticket.states)

    assert ticket.place(0) == place_of(7)
    assert ticket.place(1) is None


def test_what_is_coming_when_the_connection_ends_is_a_miss(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = lambda lookup: LookupReply(
        lookup.op, bytes([HIT, COMING]), rows_of(place_of(1), place_of(2))
    )
    ticket = engine.asked(1, 2)
    until(lambda: COMING in ticket.states)
    node.hang_up()
    until(lambda: ticket.lost)

    assert bytes(ticket.states) == bytes([HIT, MISS])


def test_a_local_lookup_says_that_nothing_may_be_fetched(
    node: ScriptedNode, engine: Engine
) -> None:
    engine.lookup(1, fetch=False)
    assert not node.wait(Lookup).fetch


def test_a_lookup_of_nothing_asks_nothing(node: ScriptedNode, engine: Engine) -> None:
    ticket = engine.asked()
    assert ticket.answered
    assert ticket.settled
    assert node.all(Lookup) == []


def test_a_refused_lookup_is_a_miss_and_the_next_one_is_asked(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = lambda lookup: Refused(lookup.op, "too many lookups")
    ticket = engine.asked(1, 2)
    assert bytes(ticket.states) == bytes([MISS, MISS])
    assert engine.client.state is ClientState.CONNECTED
    node.script[Reserve] = lambda reserve: Refused(reserve.op, "too many reserves")
    assert engine.reserve(1) is None


def test_a_chain_longer_than_a_message_is_asked_page_by_page(
    node: ScriptedNode, engine: Engine
) -> None:
    """Two runs over three pages; the first run is cut once, the second one too."""
    count = 2 * MAX_KEYS_PER_MESSAGE + 100
    first = MAX_KEYS_PER_MESSAGE + 10
    keys = [key_of(i) for i in range(count)]
    engine.client.begin_step()
    ticket = engine.client.lookup(
        keys,
        run_lengths=[first, 0, count - first],
        run_is_prefix=[True, True, False],
        run_slot_bytes=[PAGE, PAGE, 2 * PAGE],
        deadline_ms=1_000,
        may_audit=True,
    )
    assert ticket is not None
    pages = node.all(Lookup)
    assert b"".join(page.keys for page in pages) == b"".join(keys)
    rest = MAX_KEYS_PER_MESSAGE - 10
    assert [page.run_lengths for page in pages] == [[MAX_KEYS_PER_MESSAGE], [10, rest], [100]]
    assert [page.run_is_prefix for page in pages] == [[True], [True, False], [False]]
    assert [page.run_slot_bytes for page in pages] == [[PAGE], [PAGE, 2 * PAGE], [2 * PAGE]]
    may_audit = [page.may_audit for page in pages]
    assert may_audit == [False, False, True], "a miss would be one for all pages behind it"
    assert ticket.states.count(HIT) == count
    assert ticket.place(count - 1) == place_of(99)
    engine.client.unpin(ticket)
    assert [node.wait(Unpin).lookup_op for _ in pages] == [page.op for page in pages]


def test_a_run_that_is_no_prefix_is_asked_on_behind_a_miss(
    node: ScriptedNode, engine: Engine
) -> None:
    count = MAX_KEYS_PER_MESSAGE + 3
    node.script[Lookup] = lambda lookup: LookupReply(
        lookup.op, bytes([MISS]) * (len(lookup.keys) // KEY_BYTES), b""
    )
    engine.client.begin_step()
    engine.client.lookup(
        [key_of(i) for i in range(count)],
        run_lengths=[count],
        run_is_prefix=[False],
        run_slot_bytes=[PAGE],
        deadline_ms=1_000,
    )
    assert [page.run_lengths for page in node.all(Lookup)] == [[MAX_KEYS_PER_MESSAGE], [3]]


def test_pages_that_a_silent_node_was_not_asked_about_are_misses(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    engine = make_engine(budget_s=SHORT_S).start()
    node.script[Lookup] = lambda lookup: None
    ticket = engine.asked(*range(MAX_KEYS_PER_MESSAGE + 3))
    assert ticket.states.count(WAIT) == MAX_KEYS_PER_MESSAGE
    assert bytes(ticket.states[-3:]) == bytes([MISS] * 3)
    node.say(all_waits(node.wait(Lookup)))
    until(lambda: ticket.answered)


def test_a_prefix_that_breaks_in_one_page_is_not_asked_on_in_the_next(
    node: ScriptedNode, engine: Engine
) -> None:
    """What lies behind a miss of a prefix would be fetched for nothing. Another run is asked."""
    count = MAX_KEYS_PER_MESSAGE
    broken = bytes([HIT]) + bytes([MISS]) * (count - 1)
    replies = iter([(broken, rows_of(place_of(1))), (bytes([WAIT]) * 7, b"")])
    node.script[Lookup] = lambda lookup: LookupReply(lookup.op, *next(replies))
    engine.client.begin_step()
    ticket = engine.client.lookup(
        [key_of(i) for i in range(3 * count + 7)],
        run_lengths=[3 * count, 7],
        run_is_prefix=[True, True],
        run_slot_bytes=[PAGE, PAGE],
        deadline_ms=1_000,
    )
    assert ticket is not None
    assert [page.run_lengths for page in node.all(Lookup)] == [[count], [7]]
    assert ticket.states.count(MISS) == 3 * count - 1
    assert bytes(ticket.states[-7:]) == bytes([WAIT]) * 7
    update = LookupUpdate(node.all(Lookup)[1].op, [6], bytes([HIT]), rows_of(place_of(2)))
    node.say(update)
    until(lambda: ticket.place(3 * count + 6) == place_of(2))


# -- unpin ---------------------------------------------------------------------------------------


def test_a_ticket_is_given_back_once_and_waits_for_nothing_more(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = all_waits
    ticket = engine.asked(1, 2)
    engine.client.unpin(ticket)
    engine.client.unpin(ticket)
    assert ticket.settled
    op = node.wait(Lookup).op
    assert node.wait(Unpin).lookup_op == op
    node.say(LookupUpdate(op, [0], bytes([HIT]), rows_of(place_of(1))))  # crossed the unpin
    assert engine.client.drain(PATIENCE_S)
    assert len(node.all(Unpin)) == 1
    assert ticket.place(0) is None
    assert engine.client.state is ClientState.CONNECTED


def test_a_lookup_that_missed_everything_has_nothing_to_give_back(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = lambda lookup: LookupReply(lookup.op, bytes([MISS, MISS]), b"")
    engine.client.unpin(engine.asked(1, 2))
    engine.client.report({"marker": 1})
    node.wait(Report)
    assert node.all(Unpin) == []


# -- the budget and silence ----------------------------------------------------------------------


def test_a_silent_node_costs_one_budget_and_is_asked_again_once_it_was_heard(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    engine = make_engine(budget_s=SHORT_S).start()
    node.script[Lookup] = lambda lookup: None
    begun = time.perf_counter()
    late = engine.asked(1, 2)
    assert time.perf_counter() - begun >= SHORT_S
    assert engine.client.state is ClientState.SILENT
    assert (late.answered, late.settled) == (False, False)
    assert engine.lookup(3) is None
    assert engine.reserve(3) is None
    assert len(node.all(Lookup)) == 1, "a silent node is not asked"
    # Anything that is heard will do: here the answer itself, late, which the ticket still takes.
    states = bytes([HIT, WAIT])
    node.say(LookupReply(node.wait(Lookup).op, states, rows_of(place_of(5))))
    engine.until(ClientState.CONNECTED)
    assert bytes(late.states) == states
    assert late.place(0) == place_of(5)
    assert engine.client.counters["late_answers"] == 1
    node.script[Lookup] = lambda lookup: LookupReply(lookup.op, bytes([MISS]), b"")
    until(lambda: (ticket := engine.lookup(3)) is not None and ticket.settled)


def test_a_node_that_is_silent_for_long_is_not_waited_for_from_step_to_step(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    """Goal: a hiccup of a busy host is tried again, a frozen NodeStore holds no request."""
    engine = make_engine(budget_s=SHORT_S).start()
    node.script[Lookup] = lambda lookup: None
    begun_s = time.perf_counter()
    engine.asked(1)
    assert engine.client.may_answer_soon or time.perf_counter() - begun_s > HICCUP_S
    until(lambda: not engine.client.may_answer_soon)
    assert engine.client.state is ClientState.SILENT
    engine.client.report({"tokens": 1})
    engine.until(ClientState.CONNECTED)
    assert engine.client.may_answer_soon


def test_an_acknowledgement_is_a_sign_of_life_too(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    engine = make_engine(budget_s=SHORT_S).start()
    node.script[Lookup] = lambda lookup: None
    engine.asked(1)
    assert engine.client.state is ClientState.SILENT
    engine.client.report({"tokens": 1})
    engine.until(ClientState.CONNECTED)


def test_a_late_answer_to_a_lookup_that_was_given_back_changes_nothing(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    engine = make_engine(budget_s=SHORT_S).start()
    node.script[Lookup] = lambda lookup: None
    ticket = engine.asked(1)
    engine.client.unpin(ticket)
    op = node.wait(Lookup).op
    assert node.wait(Unpin).lookup_op == op, "the node lets go of whatever it had pinned"
    node.say(LookupReply(op, bytes([HIT]), rows_of(place_of(1))))
    until(lambda: engine.client.counters["late_answers"] == 1)
    assert bytes(ticket.states) == bytes([MISS])
    assert ticket.place(0) is None


def test_a_late_reservation_is_recognised_and_undone(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    engine = make_engine(budget_s=SHORT_S).start()
    node.script[Reserve] = lambda reserve: None
    assert engine.reserve(1, 2) is None
    assert engine.client.state is ClientState.SILENT
    reserve = node.wait(Reserve)
    node.say(all_granted(reserve))
    until(lambda: engine.client.counters["late_answers"] == 1)
    undone = node.wait(Abandon)
    assert (undone.reserve_op, undone.slots) == (reserve.op, b"")
    assert undone.slab_id == node.slab_id
    assert engine.client.snapshot()["writing"] == 0
    engine.until(ClientState.CONNECTED)


def test_the_pages_of_a_reservation_that_fails_half_way_are_all_undone(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    engine = make_engine().start()

    def grant_one_page(reserve: Reserve) -> ReserveReply | Refused:
        full = len(node.all(Reserve)) > 1
        return Refused(reserve.op, "full") if full else all_granted(reserve)

    node.script[Reserve] = grant_one_page
    assert engine.reserve(*range(MAX_KEYS_PER_MESSAGE + 1)) is None
    asked = [reserve.op for reserve in node.all(Reserve)]
    assert [node.wait(Abandon).reserve_op for _ in asked] == asked
    # If a hello has listed the first page meanwhile, it is not that reservation's any more.
    rows = unpack_slots(node.wait(Abandon).slots)
    assert rows == [place_of(i % 256, generation=10 + i) for i in range(MAX_KEYS_PER_MESSAGE)]
    assert engine.client.snapshot()["writing"] == 0


def test_the_budget_is_one_for_all_questions_of_a_step(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    engine = make_engine().start()
    engine.client.begin_step()
    engine.client._patience.left_s = 0.0001  # noqa: SLF001 (as other questions would have left it)
    assert engine.lookup_more(1) is None
    assert node.all(Lookup) == []
    assert engine.client.counters["budget_spent"] == 1
    assert engine.client.state is ClientState.CONNECTED, "that was not the node's fault"
    assert engine.lookup(1) is not None, "the next step has a budget of its own"


def test_questions_use_the_budget_up(node: ScriptedNode, make_engine: EngineFactory) -> None:
    engine = make_engine(budget_s=0.05).start()
    engine.client.begin_step()
    begun = time.perf_counter()
    while engine.lookup_more(1) is not None:
        assert time.perf_counter() - begun < PATIENCE_S
    counters = engine.client.counters
    assert counters["budget_spent"] + counters["overdue_answers"] == 1


def test_a_question_takes_its_time_off_the_budget(node: ScriptedNode, engine: Engine) -> None:
    engine.client.begin_step()
    lefts = []
    for number in range(3):
        assert engine.lookup_more(number) is not None
        lefts.append(engine.client._patience.left_s)  # noqa: SLF001
    assert AMPLE_S > lefts[0] > lefts[1] > lefts[2] > 0


# -- reserve, commit, abandon --------------------------------------------------------------------


def test_a_chunk_is_reserved_written_and_committed(node: ScriptedNode, engine: Engine) -> None:
    grants = bytes([Grant.GRANTED, Grant.PRESENT, Grant.FULL, Grant.GRANTED])
    rows = rows_of(place_of(1, 11), place_of(2, 12))
    node.script[Reserve] = lambda reserve: ReserveReply(reserve.op, grants, rows)
    reservation = engine.granted(1, 2, 3, 4)
    assert reservation.op == node.wait(Reserve).op
    assert reservation.grants == grants
    assert reservation.places == {0: place_of(1, 11), 3: place_of(2, 12)}
    assert engine.client.snapshot()["writing"] == 2
    engine.client.commit(reservation.slab_id, [reservation.places[0]])
    engine.client.abandon(reservation.slab_id, [reservation.places[3]])
    commit, abandon = node.wait(Commit), node.wait(Abandon)
    assert commit.slab_id == abandon.slab_id == node.slab_id
    assert unpack_slots(commit.slots) == [place_of(1, 11)]
    assert unpack_slots(abandon.slots) == [place_of(2, 12)]
    assert engine.client.drain(PATIENCE_S)
    until(lambda: engine.client.snapshot()["writing"] == 0)


def test_more_slots_than_a_message_holds_are_committed_in_several(
    node: ScriptedNode, engine: Engine
) -> None:
    count = MAX_KEYS_PER_MESSAGE + 5
    places = [place_of(i % 256, generation=i) for i in range(count)]
    engine.client.commit(node.slab_id, places)
    engine.client.abandon(node.slab_id, [])  # an empty Abandon would cancel a whole reservation
    assert engine.client.drain(PATIENCE_S)
    commits = node.all(Commit)
    assert [place for commit in commits for place in unpack_slots(commit.slots)] == places
    assert node.all(Abandon) == []


def test_a_commit_is_repeated_after_a_reconnect_until_it_is_acknowledged(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Commit] = lambda commit: None
    first, second = engine.granted(1), engine.granted(2)
    engine.client.commit(first.slab_id, list(first.places.values()))
    engine.client.commit(second.slab_id, list(second.places.values()))
    said = [node.wait(Commit), node.wait(Commit)]
    assert not engine.client.drain(0)
    node.say(Ack(said[0].op))
    until(lambda: engine.client.snapshot()["unacknowledged"] == 1)
    node.script[Commit] = lambda commit: Ack(commit.op)
    node.hang_up()
    assert node.wait(Commit) == said[1]
    assert engine.client.drain(PATIENCE_S)
    assert len(node.all(Commit)) == 3


def test_a_report_is_never_said_twice(node: ScriptedNode, engine: Engine) -> None:
    """It is a difference to the last one: twice would be wrong, lost is only a pity."""
    node.script[Report] = lambda report: None
    engine.client.report({"tokens": 5})
    assert node.wait(Report).counters == {"tokens": 5}
    node.hang_up()
    until(lambda: len(engine.sessions) == 2)
    assert engine.client.drain(PATIENCE_S)
    assert len(node.all(Report)) == 1


def test_the_outbox_is_bounded_and_drops_the_oldest(path: Path, make_engine: EngineFactory) -> None:
    engine = make_engine(outbox_limit=3)
    with ScriptedNode(path) as node:
        engine.start()
        slab_id = node.slab_id
    engine.until(ClientState.ABSENT)
    for slot in range(5):
        engine.client.commit(slab_id, [place_of(slot)])
    assert engine.client.counters["outbox_dropped"] == 2
    assert engine.client.snapshot()["unacknowledged"] == 3
    with ScriptedNode(path) as node:
        assert engine.client.drain(PATIENCE_S)
        assert [unpack_slots(commit.slots) for commit in node.all(Commit)] == [
            [place_of(slot)] for slot in (2, 3, 4)
        ]


def test_an_engine_that_could_not_say_a_commit_says_hello_without_its_slot(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    """Goal: a slot of which nothing is ever said keeps its key from everybody else."""
    engine = make_engine(outbox_limit=2).start()
    node.script[Commit] = lambda commit: None
    node.script[Reserve] = lambda reserve: ReserveReply(
        reserve.op, bytes([Grant.GRANTED]), rows_of(place_of(len(node.all(Reserve))))
    )
    kept, said = engine.granted(1), engine.granted(2)
    node.wait(Hello)
    engine.client.commit(said.slab_id, list(said.places.values()))
    for _ in range(2):
        engine.client.report({"tokens": 1})
    listed = [place[:2] for place in unpack_slots(node.wait(Hello).writing)]
    assert listed == [place[:2] for place in kept.places.values()]


def test_a_node_that_does_not_read_does_not_hold_up_the_engine(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    """The node is frozen. Commits collect in socket and outbox; all of them arrive afterwards."""
    engine = make_engine(budget_s=SHORT_S).start()
    frozen, thaw = threading.Event(), threading.Event()

    def freeze(report: Report) -> Ack:
        frozen.set()
        thaw.wait(PATIENCE_S)
        return Ack(report.op)

    node.script[Report] = freeze
    engine.client.report({"tokens": 1})
    assert frozen.wait(PATIENCE_S)
    places = [place_of(i % 256, generation=i) for i in range(60 * MAX_KEYS_PER_MESSAGE)]
    begun = time.perf_counter()
    engine.client.commit(node.slab_id, places)  # 1.2 MB: more than the kernel takes
    assert time.perf_counter() - begun < PATIENCE_S / 2
    assert not engine.client.drain(0.05)
    engine.lookup(1)
    assert engine.client.state is ClientState.SILENT
    thaw.set()
    assert engine.client.drain(PATIENCE_S)
    committed = [place for commit in node.all(Commit) for place in unpack_slots(commit.slots)]
    assert committed == places
    engine.until(ClientState.CONNECTED)


# -- the node goes and comes back ----------------------------------------------------------------


def test_after_a_restart_the_engine_lists_what_it_may_still_write_into(
    path: Path, make_engine: EngineFactory
) -> None:
    """Granted and neither committed nor abandoned: being written. Committed but not acknowledged:
    still ours, else the repeated commit would find the slot freed."""
    engine = make_engine()
    with ScriptedNode(path) as node:
        slab_id = node.slab_id
        node.script[Reserve] = lambda reserve: ReserveReply(
            reserve.op, bytes(1), rows_of(place_of(int.from_bytes(reserve.keys, "big"), 100))
        )
        engine.start()
        for number in (1, 2, 3, 4):
            engine.granted(number)
        engine.client.abandon(slab_id, [place_of(2, 100)])
        engine.client.commit(slab_id, [place_of(4, 100)])
        assert engine.client.drain(PATIENCE_S)
        node.script[Commit] = lambda commit: None
        engine.client.commit(slab_id, [place_of(3, 100)])
        node.wait(Commit)
    assert engine.lookup(1) is None
    with ScriptedNode(path, epoch=2) as node:
        hello = node.wait(Hello)
        assert hello.slab_id == slab_id
        assert unpack_slots(hello.writing) == [(1, 100, 0), (3, 100, 0)]
        assert unpack_slots(node.wait(Commit).slots) == [place_of(3, 100)]
        engine.until(ClientState.CONNECTED)
        session = engine.client.session
        assert session is not None
        assert session.epoch == 2


def test_slots_of_another_slab_are_not_listed(path: Path, make_engine: EngineFactory) -> None:
    engine = make_engine()
    with ScriptedNode(path, slab_id=b"A" * 16) as node:
        node.script[Reserve] = lambda reserve: ReserveReply(
            reserve.op, bytes(1), rows_of(place_of(77, 77))
        )
        engine.start()
        engine.granted(1)
    with ScriptedNode(path, slab_id=b"B" * 16) as node:
        assert len(node.wait(Hello).writing) == 20  # we know of no other slab yet
        engine.until(ClientState.CONNECTED)
        engine.granted(2, 3)
        node.hang_up()
        hello = node.wait(Hello)
        assert hello.slab_id == b"B" * 16
        assert [slot for slot, _, _ in unpack_slots(hello.writing)] == [0, 1]


def test_an_engine_that_can_not_list_all_it_writes_into_does_not_say_hello(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    """A slot that a hello leaves out may be given away. So: uncached until there are fewer."""
    engine = make_engine().start()
    replies = iter(range(10**6))
    node.script[Reserve] = lambda reserve: ReserveReply(
        reserve.op,
        bytes(len(reserve.keys) // KEY_BYTES),
        rows_of(*(place_of(1, next(replies)) for _ in range(len(reserve.keys) // KEY_BYTES))),
    )
    reservation = engine.granted(*range(MAX_WRITING_LISTED + 1))
    node.wait(Hello)
    node.hang_up()
    until(lambda: "slots are being written" in engine.client.reason)
    assert len(node.all(Hello)) == 1
    engine.client.abandon(reservation.slab_id, list(reservation.places.values())[:1])
    assert len(node.wait(Hello).writing) == 20 * MAX_WRITING_LISTED


def test_a_lost_connection_turns_waits_into_misses_and_keeps_hits(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = lambda lookup: LookupReply(
        lookup.op, bytes([HIT, WAIT]), rows_of(place_of(1))
    )
    ticket = engine.asked(1, 2)
    node.hang_up()
    until(lambda: ticket.lost)
    assert bytes(ticket.states) == bytes([HIT, MISS])
    assert ticket.place(0) == place_of(1)
    engine.client.unpin(ticket)  # by its op, on whatever connection there is then
    assert node.wait(Unpin).lookup_op == node.wait(Lookup).op


def test_a_node_that_dies_while_it_is_asked_is_a_miss(node: ScriptedNode, engine: Engine) -> None:
    node.script[Lookup] = lambda lookup: node.server.drop(node.sessions[-1], "dying")
    ticket = engine.asked(1, 2)
    assert ticket.lost
    assert bytes(ticket.states) == bytes([MISS, MISS])


def test_a_node_that_dies_while_it_reserves_has_reserved_nothing(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Reserve] = lambda reserve: node.server.drop(node.sessions[-1], "dying")
    assert engine.reserve(1) is None
    assert engine.client.snapshot()["writing"] == 0


def test_a_client_that_is_dropped_hears_why(node: ScriptedNode, engine: Engine) -> None:
    node.drop("enough of you")
    engine.until(ClientState.ABSENT)
    until(lambda: engine.client.reason == "enough of you")


def test_the_reason_is_heard_even_if_a_send_finds_the_connection_broken_first(
    node: ScriptedNode, engine: Engine
) -> None:
    connection = engine.client._connection  # noqa: SLF001
    assert connection is not None
    with connection.reading:  # the engine's thread is in the middle of a question
        node.drop("enough of you")
        engine.client.report({"tokens": 1})
        until(connection.has_ended)
    until(lambda: engine.client.reason == "enough of you")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            lambda lookup: LookupReply(lookup.op, bytes([MISS]), b""),
            "1 states answer a lookup of 2",
        ),
        (
            lambda lookup: LookupReply(lookup.op, bytes([HIT, MISS]), rows_of((1, 1, 0))),
            "does not lie in the payload",
        ),
        (
            lambda lookup: LookupReply(lookup.op, bytes([HIT, MISS]), rows_of((1, 1, 2**63 - 1))),
            "does not lie in the payload",
        ),
        (
            lambda lookup: LookupReply(lookup.op, bytes([HIT, MISS]), rows_of((1, 1, 2**64 - 1))),
            "does not lie in the payload",
        ),
        (
            lambda lookup: LookupReply(
                lookup.op, bytes([HIT, MISS]), rows_of((1, 1, GEOMETRY.used_bytes - PAGE + 1))
            ),
            "does not lie in the payload",
        ),
        (
            lambda lookup: [
                LookupReply(lookup.op, bytes([WAIT, MISS]), b""),
                LookupUpdate(lookup.op, [1], bytes([MISS]), b""),
            ],
            "settles key 1, which is not waited for",
        ),
        (
            lambda lookup: [
                LookupReply(lookup.op, bytes([WAIT, MISS]), b""),
                LookupUpdate(lookup.op, [2], bytes([MISS]), b""),
            ],
            "settles key 2",
        ),
        (lambda lookup: LookupUpdate(lookup.op, [0], bytes([MISS]), b""), "before"),
    ],
)
def test_a_node_that_says_what_can_not_be_is_not_believed(
    node: ScriptedNode, engine: Engine, answer: Callable[[Lookup], Any], why: str
) -> None:
    node.script[Lookup] = answer
    ticket = engine.asked(1, 2)
    until(lambda: ticket.lost)
    engine.until(ClientState.ABSENT)
    assert bytes(ticket.states) == bytes([MISS, MISS])
    assert ticket.place(0) is None
    until(lambda: why in engine.client.reason)


def test_reconnects_leave_no_descriptor_behind(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    engine = make_engine(map_slab=True).start()
    before = open_fds()
    for count in range(2, 12):
        node.hang_up()
        until(lambda count=count: len(engine.sessions) == count)  # type: ignore[misc]
    until(lambda: open_fds() == before)
    engine.client.close()
    node.wait(Bye)
    assert open_fds() < before


# -- the end -------------------------------------------------------------------------------------


def test_an_engine_says_bye_after_everything_else(node: ScriptedNode, engine: Engine) -> None:
    for slot in range(20):
        engine.client.commit(node.slab_id, [place_of(slot)])
    names = {thread.name for thread in threading.enumerate()}
    assert {"kvray-client", "kvray-outbox"} <= names
    engine.client.close(PATIENCE_S)
    assert [type(message) for message in node.heard] == [Hello, *[Commit] * 20, Bye]
    assert node.wait_closed().reason == "the client closed the connection"
    assert not {"kvray-client", "kvray-outbox"} & {t.name for t in threading.enumerate()}
    assert engine.client.state is ClientState.CLOSED
    assert engine.lookup(1) is None
    assert engine.reserve(1) is None
    engine.client.commit(node.slab_id, [place_of(1)])
    engine.client.close()


def test_a_close_does_not_wait_longer_than_it_was_given(node: ScriptedNode, engine: Engine) -> None:
    node.script[Commit] = lambda commit: None
    engine.client.commit(node.slab_id, [place_of(1)])
    ticket = engine.asked(1)
    begun = time.perf_counter()
    engine.client.close(0.1)
    assert time.perf_counter() - begun < 2.0
    assert ticket.place(0) == place_of(0)
    node.wait_closed()


def test_a_node_that_ends_at_bye_is_not_waited_for(node: ScriptedNode, engine: Engine) -> None:
    node.script[Bye] = lambda bye: node.server.drop(node.sessions[-1], "so be it")
    begun = time.perf_counter()
    engine.client.close(2 * PATIENCE_S)
    assert time.perf_counter() - begun < PATIENCE_S


def test_a_client_that_was_never_started_or_connected_closes_at_once(
    make_engine: EngineFactory,
) -> None:
    make_engine().client.close(PATIENCE_S)
    engine = make_engine()
    engine.client.start()
    begun = time.perf_counter()
    engine.client.close(PATIENCE_S)
    assert time.perf_counter() - begun < PATIENCE_S / 2


def test_a_close_during_a_hello_that_is_not_answered_does_not_wait_for_it(
    node: ScriptedNode, make_engine: EngineFactory
) -> None:
    node.script[Hello] = lambda hello: None
    engine = make_engine()
    engine.client.start()
    node.wait(Hello)
    engine.client.close(0.5)
    assert "kvray-client" not in {thread.name for thread in threading.enumerate()}


def activity(*names: str) -> list[str]:
    """What changes whenever a thread of this name runs: its switches and its CPU time."""
    threads = [thread for thread in threading.enumerate() if thread.name in names]
    assert len(threads) == len(names)
    found: list[str] = []
    for thread in threads:
        folder = Path(f"/proc/self/task/{thread.native_id}")
        status = (folder / "status").read_text().splitlines()
        found += [line for line in status if "ctxt_switches" in line]
        found += (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
    return found


def asleep(*names: str) -> bool:
    before = activity(*names)
    threading.Event().wait(0.2)
    return activity(*names) == before


def test_a_connected_client_sleeps(node: ScriptedNode, engine: Engine) -> None:
    """Its threads are not scheduled once while nothing happens (rule 6)."""
    engine.asked(1)
    assert engine.client.drain(PATIENCE_S)
    until(lambda: asleep("kvray-client", "kvray-outbox"))


def test_an_answer_wakes_nobody_but_the_thread_that_waits_for_it(
    node: ScriptedNode, engine: Engine
) -> None:
    """Every answer that also woke the connector's thread would cost a fight for the GIL."""
    until(lambda: asleep("kvray-client"))
    before = activity("kvray-client")
    for number in range(50):
        engine.asked(number)
    assert activity("kvray-client") == before


def test_an_engine_that_listens_hears_of_its_blocks_at_once_and_by_itself(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = all_waits
    ticket = engine.asked(1, 2)
    op = node.wait(Lookup).op
    until(lambda: asleep("kvray-client"))
    before = activity("kvray-client")
    looks = 0

    def enough() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:  # it listens
            node.say(LookupUpdate(op, [0], bytes([HIT]), rows_of(place_of(7))))
            node.say(LookupUpdate(op, [1], bytes([HIT]), rows_of(place_of(8))))
        return ticket.settled

    engine.client.listen(enough, limit_s=AMPLE_S)
    assert [ticket.place(i) for i in range(2)] == [place_of(7), place_of(8)]
    assert activity("kvray-client") == before


def test_an_engine_that_listens_sees_within_a_moment_that_it_is_wanted(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = all_waits
    ticket = engine.asked(1)
    looks = iter([False] * 5 + [True])
    engine.client.listen(lambda: next(looks), limit_s=AMPLE_S)
    assert next(looks, None) is None, "asked once more than it had to be"
    assert not ticket.settled


def test_listening_ends_with_the_connection_and_at_its_limit(
    node: ScriptedNode, engine: Engine
) -> None:
    node.script[Lookup] = all_waits
    ticket = engine.asked(1)
    engine.client.listen(lambda: False, limit_s=SHORT_S)  # comes back: nothing was said
    assert not ticket.settled
    node.stop()
    engine.client.listen(lambda: False, limit_s=3_600.0)
    until(lambda: ticket.lost)
    engine.client.listen(lambda: False, limit_s=3_600.0)  # there is nobody to listen to


def test_a_client_that_is_woken_while_it_waits_for_a_hello_goes_on_sleeping(
    node: ScriptedNode, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "HELLO_DEADLINE_S", 60.0)
    node.script[Hello] = lambda hello: None
    worker = WorkerClient(find_socket=lambda: str(path), engine_nonce=NONCE, label="rank 0")
    worker.start()
    node.wait(Hello)
    assert worker.session_for(node.slab_id) is None  # wakes it
    until(lambda: asleep("kvray-worker"))
    assert len(node.all(Hello)) == 1, "it sleeps for the same answer"
    worker.close()


# -- all at once ---------------------------------------------------------------------------------


def test_ids_are_not_reused(node: ScriptedNode, engine: Engine) -> None:
    for _ in range(3):
        engine.client.unpin(engine.asked(1))
        engine.granted(2)
    assert engine.client.drain(PATIENCE_S)
    ops = [message.op for message in node.heard]
    assert len(set(ops)) == len(ops)
    assert OpId(0) not in ops


@pytest.mark.parametrize("seed", range(3))
def test_whatever_breaks_when_each_commit_is_heard_and_each_ticket_settles(
    path: Path, make_engine: EngineFactory, seed: int
) -> None:
    """A node that waits, misses, updates, stays silent and breaks the connection at random."""
    dice = random.Random(seed)
    engine = make_engine(budget_s=0.003)
    tickets: list[Ticket] = []
    committed: set[int] = set()
    with ScriptedNode(path) as node:

        def answer(lookup: Lookup) -> Any:
            states = bytes(dice.choices([HIT, MISS, WAIT], k=len(lookup.keys) // KEY_BYTES))
            rows = rows_of(*(place_of(i) for i in range(states.count(HIT))))
            reply = LookupReply(lookup.op, states, rows)
            waiting = [i for i, state in enumerate(states) if state == WAIT]
            updates = [LookupUpdate(lookup.op, [i], bytes([MISS]), b"") for i in waiting]
            match dice.randrange(20):
                case 0:
                    node.server._sessions[node.sessions[-1]].sock.shutdown(2)  # noqa: SLF001
                case 1:
                    threading.Event().wait(0.005)
                case 2:
                    return Refused(lookup.op, "dice")
            return [reply, *updates]

        node.script[Lookup] = answer
        engine.start()
        for number in range(400):
            ticket = engine.lookup(*range(number, number + dice.randrange(1, 40)))
            if ticket is not None:
                tickets.append(ticket)
            engine.client.commit(node.slab_id, [place_of(1, number)])
            committed.add(number)
            if tickets and dice.random() < 0.5:
                engine.client.unpin(tickets.pop(dice.randrange(len(tickets))))
            engine.client.check()
            if engine.client.state is not ClientState.CONNECTED and dice.random() < 0.2:
                until(lambda: engine.client.state is ClientState.CONNECTED)
        until(lambda: all(ticket.settled for ticket in tickets))
        until(lambda: engine.client.drain(0.01))
        assert engine.client.snapshot()["open_lookups"] == 0
        heard = {place[1] for commit in node.all(Commit) for place in unpack_slots(commit.slots)}
        assert heard == committed
        assert len(engine.sessions) > 1, "no connection broke: another seed"


# -- workers -------------------------------------------------------------------------------------


@pytest.fixture
def worker(path: Path) -> Iterator[WorkerClient]:
    worker = WorkerClient(
        find_socket=lambda: str(path) if path.exists() else None,
        engine_nonce=NONCE,
        label="rank 0",
        retry_first_s=0.01,
        retry_last_s=0.05,
    )
    worker.start()
    yield worker
    worker.close()


def test_a_worker_gets_the_slab_that_the_node_has(node: ScriptedNode, worker: WorkerClient) -> None:
    session = worker.wait_session(PATIENCE_S)
    assert session is not None
    assert session.slab is not None
    assert worker.session_for(node.slab_id) is session
    hello = node.wait(Hello)
    assert (hello.role, hello.engine_nonce, hello.label) == (Role.WORKER, NONCE, "rank 0")
    assert hello.client.nonce != NONCE, "it may live in its engine's process"
    place = place_of(3)
    os.pwrite(node.slab_fd, b"a block", place[2])
    assert ctypes.string_at(session.slab.address + place[2], 7) == b"a block"


def test_a_worker_keeps_its_mapping_when_the_node_restarts_on_the_same_slab(
    path: Path, worker: WorkerClient
) -> None:
    with ScriptedNode(path) as node:
        before = worker.wait_session(PATIENCE_S)
        assert before is not None
    until(lambda: not worker.connected)
    assert worker.session_for(node.slab_id) is before, "what it maps is still good"
    with ScriptedNode(path, epoch=2):
        until(lambda: worker.connected)
        after = worker.session_for(node.slab_id)
        assert after is not None
        assert after.epoch == 2
        assert after.slab is before.slab


def test_a_worker_takes_a_new_slab_and_the_old_one_lasts_as_long_as_a_copy_needs_it(
    path: Path, worker: WorkerClient
) -> None:
    with ScriptedNode(path, slab_id=b"A" * 16) as node:
        before = worker.wait_session(PATIENCE_S)
        assert before is not None
        os.pwrite(node.slab_fd, b"old", place_of(0)[2])
    with ScriptedNode(path, slab_id=b"B" * 16):
        until(lambda: worker.session_for(SlabId(b"B" * 16)) is not None)
        assert worker.session_for(SlabId(b"A" * 16)) is None
        gc.collect()
        assert before.slab is not None
        assert ctypes.string_at(before.slab.address + place_of(0)[2], 3) == b"old"


def test_a_job_for_a_slab_that_a_worker_lacks_makes_it_look_at_once(path: Path) -> None:
    """It would look again in a minute; the engine has been told of the node already."""
    worker = WorkerClient(
        find_socket=lambda: str(path) if path.exists() else None,
        engine_nonce=NONCE,
        label="rank 0",
        retry_first_s=60.0,
        retry_last_s=60.0,
    )
    worker.start()
    until(lambda: worker.reason == "there is no NodeStore on this node")
    with ScriptedNode(path) as node:
        assert worker.session_for(node.slab_id) is None
        assert worker.wait_session(PATIENCE_S) is not None
        worker.close()
        node.wait(Bye)


def test_a_slab_that_is_not_what_was_announced_is_not_mapped(
    node: ScriptedNode, worker: WorkerClient
) -> None:
    assert worker.wait_session(PATIENCE_S) is not None
    node.slab_id = SlabId(b"X" * 16)  # the file still says what it is
    node.hang_up()
    until(lambda: "was announced" in worker.reason)
