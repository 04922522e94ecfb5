"""longest_wait_ms of an engine: from the first RETRY of a request to its hits or misses.

Method: an OffloadingManager with a clock of its own and a client whose tickets the test settles.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key

from kvray.config import EngineConfig
from kvray.core.ids import SlabId
from kvray.core.messages import KeyState
from kvray.core.reasons import MissReason
from kvray.engine import holds, lookups
from kvray.engine.jobs import SlotSpec
from kvray.engine.lookups import Lookups
from kvray.engine.requests import FRESH_MISS_S, Run
from kvray.node.client import Ticket

pytestmark = [pytest.mark.engine]

KEYS = [make_offload_key(bytes([n]) * 32, 0) for n in range(2)]


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@dataclass
class TicketClient:
    """Of NodeClient only what a look-up needs."""

    tickets: list[Ticket] = field(default_factory=list)
    session: str = "open"
    due: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    looks: int = 0
    is_overdue: bool = False
    may_answer_soon: bool = True

    def lookup(self, keys: Any, **_settings: Any) -> Ticket | None:
        if self.is_overdue:
            return None
        self.tickets.append(Ticket(keys, SlabId(bytes(16))))
        return self.tickets[-1]

    def unpin(self, ticket: Ticket) -> None:
        ticket.release()

    def listen(self, enough: Callable[[], bool], *, limit_s: float) -> None:
        """Until this is enough; each look takes a millisecond. What is said is due at its look."""
        assert not enough(), "nothing is waited for"
        for look in range(round(limit_s * 1_000)):
            for say in self.due.pop(look, []):
                say()
            self.looks += 1
            if enough():
                return


@dataclass
class Engine:
    clock: Clock
    client: TicketClient
    lookups: Lookups

    def begin(self, name: str) -> Ticket:
        self.lookups.on_new_request(ReqContext(req_id=name))
        self.lookups.begin(name, [Run(0, KEYS, is_prefix=True)])
        return self.client.tickets[-1]

    def ask(self, name: str, *, after_ms: int = 0) -> LookupResult:
        self.clock.now_s += after_ms / 1_000
        return self.lookups.lookup(KEYS[0], ReqContext(req_id=name))

    @property
    def longest_ms(self) -> int:
        return self.lookups.counters["longest_wait_ms"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    clock, client = Clock(), TicketClient()
    monkeypatch.setattr(lookups, "time", clock)
    monkeypatch.setattr(holds, "time", clock)
    made = Lookups(
        config=EngineConfig(lookup_deadline_ms=1_000, load_early=True), tokens_per_chunk={0: 128}
    )
    client_for_it: Any = client
    made.open(client_for_it, {})
    made.slot_bytes = {0: 4_096}
    return Engine(clock, client, made)


def test_a_request_that_is_told_at_once_was_not_held(engine: Engine) -> None:
    engine.begin("a").states[:] = bytes([KeyState.MISS] * 2)
    assert engine.ask("a", after_ms=300) is LookupResult.MISS
    assert engine.longest_ms == 0


def test_the_wait_is_from_the_first_retry_to_the_answer(engine: Engine) -> None:
    ticket = engine.begin("a")
    assert engine.ask("a", after_ms=100) is LookupResult.RETRY
    assert engine.ask("a", after_ms=200) is LookupResult.RETRY
    ticket.states[:] = bytes([KeyState.HIT] * 2)
    assert engine.ask("a", after_ms=50) is LookupResult.HIT
    assert engine.longest_ms == 250
    # What it waits for afterwards, room on the device, is not for kvray.
    assert engine.ask("a", after_ms=500) is LookupResult.HIT
    assert engine.longest_ms == 250


def test_a_deadline_ends_the_wait(engine: Engine) -> None:
    engine.begin("a")
    assert engine.ask("a") is LookupResult.RETRY
    assert engine.ask("a", after_ms=1_000) is LookupResult.MISS
    assert engine.ask("a", after_ms=1_000) is LookupResult.MISS
    assert engine.longest_ms == 1_000


def test_the_longest_of_several_is_kept(engine: Engine) -> None:
    for name, held_ms in (("a", 300), ("b", 20)):
        ticket = engine.begin(name)
        assert engine.ask(name) is LookupResult.RETRY
        ticket.states[:] = bytes([KeyState.MISS] * 2)
        assert engine.ask(name, after_ms=held_ms) is LookupResult.MISS
    assert engine.longest_ms == 300


# ── what is coming ───────────────────────────────────────────────────────────────────────────────


def answers(engine: Engine, name: str) -> list[LookupResult]:
    return [engine.lookups.lookup(key, ReqContext(req_id=name)) for key in KEYS]


def load_of(engine: Engine, name: str) -> SlotSpec:
    spec = engine.lookups.prepare_load(KEYS, ReqContext(req_id=name))
    assert isinstance(spec, SlotSpec)
    return spec


def is_coming(ticket: Ticket) -> None:
    for index in range(len(KEYS)):
        ticket.change(index, KeyState.COMING, (index, 7, 4_096 * index))


def test_a_load_may_begin_when_the_first_block_has_come_and_the_rest_is_coming(
    engine: Engine,
) -> None:
    is_coming(ticket := engine.begin("a"))
    assert answers(engine, "a") == [LookupResult.RETRY] * 2

    ticket.change(0, KeyState.HIT, (0, 7, 0))
    assert answers(engine, "a") == [LookupResult.HIT] * 2
    engine.clock.now_s += 0.3
    load = load_of(engine, "a")
    assert load.places() == [(0, 7, 0), (1, 7, 4_096)]
    assert load.wait_ms == 700, "until the request's one deadline"
    assert engine.lookups.counters["early_loads"] == 1


def test_a_load_of_what_is_there_waits_for_nothing(engine: Engine) -> None:
    is_coming(ticket := engine.begin("a"))
    for index in range(len(KEYS)):
        ticket.change(index, KeyState.HIT, (index, 7, 4_096 * index))
    assert answers(engine, "a") == [LookupResult.HIT] * 2
    assert load_of(engine, "a").wait_ms == 0
    assert engine.lookups.counters["early_loads"] == 0


def test_what_was_coming_and_is_lost_before_the_load_is_not_loaded(engine: Engine) -> None:
    """Its place is known, but nobody says any more that it will be there."""
    is_coming(ticket := engine.begin("a"))
    ticket.change(0, KeyState.HIT, (0, 7, 0))
    assert answers(engine, "a") == [LookupResult.HIT] * 2

    ticket.lose()
    assert len(load_of(engine, "a")) == 0


def test_after_the_deadline_nothing_is_coming(engine: Engine) -> None:
    is_coming(engine.begin("a"))
    assert answers(engine, "a") == [LookupResult.RETRY] * 2
    engine.clock.now_s += 1.0
    assert answers(engine, "a") == [LookupResult.MISS] * 2


def test_who_wants_whole_chains_waits_for_them(engine: Engine) -> None:
    engine.lookups._config = EngineConfig(load_early=False)  # noqa: SLF001 (before any request)
    is_coming(ticket := engine.begin("a"))
    ticket.change(0, KeyState.HIT, (0, 7, 0))
    assert answers(engine, "a") == [LookupResult.HIT, LookupResult.RETRY]


# -- resting ---------------------------------------------------------------------------------------


def test_an_engine_rests_until_the_first_of_its_requests_can_go_on(engine: Engine) -> None:
    engine.begin("a")
    second = engine.begin("b")
    engine.client.due[3] = [second.miss]

    engine.lookups.rest(["a", "b"], lambda: False)

    assert engine.client.looks == 4
    assert engine.ask("b") is LookupResult.MISS
    assert engine.ask("a") is LookupResult.RETRY


def test_an_engine_that_is_wanted_rests_no_longer(engine: Engine) -> None:
    engine.begin("a")
    wanted = iter([False, False, True])
    engine.lookups.rest(["a"], lambda: next(wanted))
    assert engine.client.looks == 2


def test_an_engine_rests_no_longer_than_a_request_may_wait(engine: Engine) -> None:
    engine.begin("a")
    engine.ask("a", after_ms=990)
    engine.lookups.rest(["a"], lambda: False)
    assert engine.client.looks == 10


@pytest.mark.parametrize("other", ["has its answer", "is not kvray's", "is being loaded"])
def test_an_engine_that_has_something_to_do_does_not_rest(engine: Engine, other: str) -> None:
    engine.begin("a")
    if other == "has its answer":
        engine.begin("b").miss()
    elif other == "is being loaded":
        engine.begin("b")
        engine.lookups.prepare_load(KEYS, ReqContext(req_id="b"))
    engine.lookups.rest(["a", "b"], lambda: False)
    assert not engine.client.looks


def test_what_was_rested_counts_as_waited(engine: Engine) -> None:
    ticket = engine.begin("a")
    engine.client.due[0] = [ticket.miss]
    engine.lookups.rest(["a"], lambda: False)
    assert engine.ask("a", after_ms=70) is LookupResult.MISS
    assert engine.longest_ms == 70


# -- the NodeStore can not be asked in this step ------------------------------------------------


def test_what_can_not_be_asked_about_in_a_step_is_asked_about_in_the_next(engine: Engine) -> None:
    runs = [Run(0, KEYS, is_prefix=True)]
    engine.client.is_overdue = True
    engine.lookups.on_new_request(ReqContext(req_id="a"))
    engine.lookups.begin("a", runs)
    assert engine.ask("a") is LookupResult.RETRY
    engine.client.is_overdue = False

    engine.clock.now_s += 0.002
    engine.lookups.begin("a", runs)

    (ticket,) = engine.client.tickets
    assert engine.ask("a") is LookupResult.RETRY
    ticket.states[:] = bytes([KeyState.HIT] * 2)
    assert engine.ask("a", after_ms=3) is LookupResult.HIT
    assert engine.longest_ms == 5


def test_a_long_step_of_others_meanwhile_is_no_wait_for_kvray(engine: Engine) -> None:
    runs = [Run(0, KEYS, is_prefix=True)]
    engine.client.is_overdue = True
    engine.lookups.on_new_request(ReqContext(req_id="a"))
    engine.lookups.begin("a", runs)
    engine.client.is_overdue = False
    engine.clock.now_s += 7.0
    engine.lookups.begin("a", runs)
    assert engine.ask("a", after_ms=900) is LookupResult.RETRY
    assert engine.ask("a", after_ms=200) is LookupResult.MISS


def test_what_can_not_be_asked_about_for_long_is_computed(engine: Engine) -> None:
    """Goal: one deadline for all that kvray does for a request, the steps before it asks too."""
    runs = [Run(0, KEYS, is_prefix=True)]
    engine.client.is_overdue = True
    engine.lookups.on_new_request(ReqContext(req_id="a"))
    for waited_ms in (0, 400, 599):
        engine.clock.now_s += waited_ms / 1_000
        engine.lookups.begin("a", runs)
        assert engine.ask("a") is LookupResult.RETRY
    engine.clock.now_s += 0.002
    engine.lookups.begin("a", runs)
    assert engine.ask("a") is LookupResult.MISS
    assert engine.longest_ms == 1_001


def test_where_no_node_store_will_answer_soon_nothing_waits(engine: Engine) -> None:
    engine.client.is_overdue = True
    engine.client.may_answer_soon = False
    engine.lookups.on_new_request(ReqContext(req_id="a"))
    engine.lookups.begin("a", [Run(0, KEYS, is_prefix=True)])
    assert engine.ask("a") is LookupResult.MISS


# -- an answer from before the scheduler asked ---------------------------------------------------


@pytest.mark.parametrize(("waited_s", "asks"), [(FRESH_MISS_S * 0.9, 1), (FRESH_MISS_S * 1.1, 2)])
def test_an_early_miss_is_believed_while_it_is_fresh(
    engine: Engine, waited_s: float, asks: int
) -> None:
    """Goal: a new prompt is asked about once if nothing keeps the scheduler from it: a second
    question would cost it a step without work.
    """
    lookups, runs = engine.lookups, [Run(0, KEYS, is_prefix=True)]
    lookups.on_new_request(ReqContext(req_id="a"))
    lookups.begin("a", runs, early=True)
    engine.client.tickets[0].miss()

    engine.clock.now_s += waited_s
    lookups.begin("a", runs)

    assert len(engine.client.tickets) == asks
    assert engine.ask("a") is (LookupResult.MISS if asks == 1 else LookupResult.RETRY)


@pytest.mark.parametrize(("waited_s", "looks"), [(0.0, 4), (FRESH_MISS_S * 1.1, 0)])
def test_an_engine_rests_for_an_early_answer_while_its_miss_is_fresh(
    engine: Engine, waited_s: float, looks: int
) -> None:
    """Goal: what a fresh answer still waits for is waited for before the step. One with an old miss
    will be asked for again, so it is not.
    """
    lookups = engine.lookups
    lookups.on_new_request(ReqContext(req_id="a"))
    lookups.begin("a", [Run(0, KEYS, is_prefix=True)], early=True)
    (ticket,) = engine.client.tickets
    ticket.states[1] = KeyState.MISS
    engine.client.due[3] = [ticket.miss]
    engine.clock.now_s += waited_s
    lookups.rest(["a"], lambda: False)
    assert engine.client.looks == looks


# -- why its prompt is computed -----------------------------------------------------------------


def test_what_an_early_answer_said_is_the_reason_if_nobody_answers_again(engine: Engine) -> None:
    lookups, client = engine.lookups, engine.client
    runs = [Run(0, KEYS, is_prefix=True)]
    lookups.on_new_request(ReqContext(req_id="a"))
    lookups.begin("a", runs, early=True)
    (ticket,) = client.tickets
    ticket.answered = True
    ticket.states[:] = bytes([KeyState.MISS] * 2)
    ticket.causes = {0: MissReason.NEVER_SEEN}
    client.is_overdue = True
    engine.clock.now_s += FRESH_MISS_S * 1.01

    for _ in range(holds.MAX_UNASKED_STEPS + 1):
        lookups.begin("a", runs)

    lookups.admitted("a", prompt_tokens=300, external_tokens=0)
    assert lookups.counters["miss_tokens_never_seen"] == 256
    assert lookups.counters["miss_tokens_tail"] == 44


def test_a_request_that_was_never_answered_says_so(engine: Engine) -> None:
    engine.client.is_overdue = True
    engine.lookups.on_new_request(ReqContext(req_id="a"))
    for _ in range(holds.MAX_UNASKED_STEPS + 1):
        engine.lookups.begin("a", [Run(0, KEYS, is_prefix=True)])
    assert engine.ask("a") is LookupResult.MISS
    engine.lookups.admitted("a", prompt_tokens=256, external_tokens=0)
    assert engine.lookups.counters["miss_tokens_node_store_slow"] == 256


def test_what_is_computed_behind_a_hit_has_the_reason_of_its_first_miss(engine: Engine) -> None:
    """It is being loaded when it is counted, and nothing of it was barred."""
    ticket = engine.begin("a")
    ticket.answered = True
    ticket.states[:] = bytes([KeyState.HIT, KeyState.MISS])
    ticket.causes = {1: MissReason.AUDITED}
    assert engine.ask("a") is LookupResult.HIT
    engine.lookups.prepare_load([KEYS[0]], ReqContext(req_id="a"))

    engine.lookups.admitted("a", prompt_tokens=300, external_tokens=128)

    assert engine.lookups.counters["miss_tokens_audited"] == 128
    assert engine.lookups.counters["miss_tokens_tail"] == 44
