"""Goal: the states of a request say what it holds and waits for. Method: the table, whole."""

import pytest

pytest.importorskip("vllm")

from kvray.core.ids import BlockKey, SlabId
from kvray.engine.requests import MOVES, RequestEvent, RequestState, RequestView
from kvray.node.client import Ticket

pytestmark = [pytest.mark.engine]

S, E = RequestState, RequestEvent


def test_every_state_but_the_last_has_a_way_on_and_can_be_reached() -> None:
    assert set(MOVES) == set(S) - {S.FINISHED}
    reached = {S.OPEN}
    while more := {after for s in reached for after in MOVES.get(s, {}).values()} - reached:
        reached |= more
    assert reached == set(S)


@pytest.mark.parametrize("state", MOVES)
def test_what_bars_a_request_ends_its_waiting_but_not_its_load(state: RequestState) -> None:
    after = MOVES[state][E.BAR]
    assert after.is_loading == state.is_loading
    assert after.has_ticket == state.is_loading
    assert not after.may_store


@pytest.mark.parametrize("state", MOVES)
def test_a_request_that_finishes_is_over_once_no_rank_writes_for_it(state: RequestState) -> None:
    after = MOVES[state][E.FINISH]
    assert after is (S.LEFT if state.is_loading else S.FINISHED)
    assert MOVES[S.LEFT][E.LOAD_ENDED] is MOVES[S.LEFT][E.LOAD_FAILED] is S.FINISHED


def test_who_is_barred_stays_so() -> None:
    for event, after in MOVES[S.BARRED].items():
        assert after in (S.BARRED, S.FINISHED), event


def test_who_is_barred_under_a_load_is_barred_after_it() -> None:
    loading = MOVES[S.LOADING][E.BAR]
    assert MOVES[loading][E.LOAD_ENDED] is MOVES[loading][E.LOAD_FAILED] is S.BARRED


def test_after_a_failed_load_only_a_preemption_lets_it_ask_again() -> None:
    ways = [event for event, after in MOVES[S.MISSING].items() if after is S.OPEN]
    assert ways == [E.PREEMPT]
    assert MOVES[S.LOADING][E.LOAD_FAILED] is S.MISSING


@pytest.mark.parametrize(
    ("state", "event"),
    [(S.OPEN, E.LOAD), (S.EARLY, E.LOAD), (S.LOADING, E.COMPUTE), (S.ASKED, E.LOAD_ENDED)],
)
def test_what_can_not_be_is_a_bug(state: RequestState, event: RequestEvent) -> None:
    with pytest.raises(AssertionError, match=event.value):
        RequestView(state).move(event)


def test_a_ticket_that_its_state_does_not_know_of_is_a_bug() -> None:
    view = RequestView(S.OPEN, ticket=Ticket([BlockKey(bytes(16))], SlabId(bytes(16))))
    with pytest.raises(AssertionError):
        view.check()
