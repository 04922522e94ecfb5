"""A request goes where its prompt costs least: what lies where, who is how busy, links, prefill."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvray.core.routing import LOAD_OVERHEAD_MS, Held, Ranking, Rates, Recent, cost_of

CHUNK_TOKENS = 100
# A chunk: 100 ms to compute, 10 ms over a link, 1 ms from the own slab.
RATES = Rates(prefill_ms=1.0, copy_ms=0.01, link_ms=0.1)
SLOW_LINK = Rates(prefill_ms=1.0, copy_ms=0.01, link_ms=1.5)
DOCUMENT = tuple(f"d{i}" for i in range(10))


class World:
    """A ranking, with a request sent wherever it says."""

    def __init__(
        self, *nodes: str, rates: Rates = RATES, device: int = 100, slab: int = 100
    ) -> None:
        self.ranking = Ranking(rates, device_chunks=device, slab_chunks=slab)
        self.ranking.set_replicas({f"r{i}": node for i, node in enumerate(nodes)})

    def costs(self, chunks: tuple[str, ...], now_ms: float) -> dict[str, float]:
        ranked = self.ranking.rank(
            chunks, (len(chunks) + 1) * CHUNK_TOKENS, chunk_tokens=CHUNK_TOKENS, now_ms=now_ms
        )
        return {cost.replica: cost.total_ms for cost in ranked}

    def send(self, chunks: tuple[str, ...], now_ms: float, *, to: str = "") -> str:
        ranked = self.ranking.rank(
            chunks, (len(chunks) + 1) * CHUNK_TOKENS, chunk_tokens=CHUNK_TOKENS, now_ms=now_ms
        )
        chosen = next(cost for cost in ranked if to in ("", cost.replica))
        self.ranking.routed(chosen, chunks, now_ms=now_ms)
        self.ranking.check()
        return chosen.replica


def test_each_token_costs_what_it_takes_from_where_it_is() -> None:
    cost = cost_of("r", 1_000, Held(400, 300, [(150, 0.1), (50, 0.1)]), queue_ms=0, rates=RATES)
    assert cost.load_ms == pytest.approx(300 * 0.01 + 200 * 0.1 + LOAD_OVERHEAD_MS)
    assert cost.compute_ms == pytest.approx(100)
    assert cost.total_ms == pytest.approx(123 + LOAD_OVERHEAD_MS)


def test_loads_run_while_the_queue_is_computed() -> None:
    held = Held(0, 0, [(900, 0.1)])
    assert cost_of("r", 1_000, held, queue_ms=500, rates=RATES).total_ms == pytest.approx(600)


def test_a_peer_behind_a_slow_link_is_no_help() -> None:
    cost = cost_of("r", 1_000, Held(0, 0, [(900, 1.5)]), queue_ms=0, rates=SLOW_LINK)
    assert cost.total_ms == pytest.approx(1_000)


def test_a_prompt_goes_back_to_whom_has_it_on_the_device() -> None:
    world = World("a", "b", "c")
    first = world.send(DOCUMENT, 0)
    assert world.send(DOCUMENT, 5_000) == first


def test_device_own_slab_and_peer_are_told_apart() -> None:
    world = World("a", "a", "b")
    world.send(DOCUMENT, 0, to="r0")
    costs = world.costs(DOCUMENT, 5_000)
    assert costs == pytest.approx(
        {"r0": 100, "r1": 110 + LOAD_OVERHEAD_MS, "r2": 200 + LOAD_OVERHEAD_MS}
    )


def test_without_kvray_what_the_device_lacks_is_computed() -> None:
    world = World("a", "a", slab=0)
    world.send(DOCUMENT, 0, to="r0")
    assert world.costs(DOCUMENT, 5_000) == pytest.approx({"r0": 100, "r1": 1_100})


def test_a_hot_prefix_spreads_when_waiting_costs_more_than_a_link() -> None:
    """The first ones stay with their device, then others take their part."""
    world = World("a", "b", "c", "d")
    world.send(DOCUMENT, 0)
    chosen = [world.send(DOCUMENT, 5_000) for _ in range(40)]
    assert len(set(chosen[:1])) == 1
    assert all(9 <= chosen.count(f"r{i}") <= 11 for i in range(4))


def test_without_kvray_it_spreads_later() -> None:
    """Each further replica costs a whole prefill, so the first one is asked for longer."""
    world = World("a", "b", slab=0)
    first = world.send(DOCUMENT, 0)
    chosen = [world.send(DOCUMENT, 5_000) for _ in range(12)]
    assert chosen[:10] == [first] * 10
    assert set(chosen[10:]) != {first}


def test_what_is_still_being_computed_can_not_be_fetched() -> None:
    world = World("a", "b")
    world.send(DOCUMENT, 0, to="r0")
    assert world.costs(DOCUMENT, 1) == pytest.approx({"r0": 1_099 + 100, "r1": 1_100})


def test_what_was_computed_sooner_than_thought_can_be_fetched_at_once() -> None:
    world = World("a", "b")
    world.send(DOCUMENT, 0, to="r0")
    world.ranking.completed("r0", DOCUMENT, now_ms=1)
    assert world.costs(DOCUMENT, 1) == pytest.approx({"r0": 100, "r1": 200 + LOAD_OVERHEAD_MS})


def test_each_link_is_as_quick_as_it_was_measured() -> None:
    """Two peers have halves of a prompt; one is behind a slow link, one was not measured yet."""
    rates = Rates(1.0, 0.01, 0.1, {("c", "a"): 0.5, ("d", "a"): 1.5})
    world = World("a", "b", "c", "d", rates=rates)
    world.send(DOCUMENT[:5], 0, to="r0")
    world.send(DOCUMENT, 5_000, to="r1")
    costs = world.costs(DOCUMENT, 10_000)
    assert costs == pytest.approx(
        {
            "r0": 100 + 500 * 0.1 + LOAD_OVERHEAD_MS,
            "r1": 100,
            "r2": 100 + 500 * 0.5 + 500 * 0.1 + LOAD_OVERHEAD_MS,
            # Computing takes less than the link to a.
            "r3": 100 + 500 + 500 * 0.1 + LOAD_OVERHEAD_MS,
        }
    )


def test_equal_costs_go_round() -> None:
    world = World("a", "b", "c")
    chosen = [world.send((), 10_000 * i) for i in range(6)]
    assert sorted(chosen) == ["r0", "r0", "r1", "r1", "r2", "r2"]


def test_of_equal_costs_the_one_with_fewer_unanswered_requests_is_chosen() -> None:
    """Estimates of their queues have run out, and yet one of them has more to do."""
    world = World("a", "b")
    for _ in range(2):
        world.send((), 0, to="r0")
    world.send((), 1, to="r1")
    assert world.send((), 10_000) == "r1"


def test_a_request_that_went_elsewhere_leaves_no_queue() -> None:
    world = World("a", "b")
    (best, *_) = world.ranking.rank(DOCUMENT, 1_100, chunk_tokens=CHUNK_TOKENS, now_ms=0)
    world.ranking.routed(best, DOCUMENT, now_ms=0)
    assert world.costs((), 0)[best.replica] == pytest.approx(1_200)
    world.ranking.withdrawn(best, now_ms=0)
    assert world.costs((), 0)[best.replica] == pytest.approx(100)


def test_a_queue_drains_by_itself_and_ends_with_the_last_answer() -> None:
    world = World("a", "b")
    world.send(DOCUMENT, 0, to="r0")
    assert world.costs((), 600)["r0"] == pytest.approx(500 + 100)
    world.ranking.completed("r0", DOCUMENT, now_ms=600)
    assert world.costs((), 600)["r0"] == pytest.approx(100)


def test_who_left_is_forgotten_and_his_node_with_him() -> None:
    world = World("a", "b")
    world.send(DOCUMENT, 0, to="r0")
    world.ranking.set_replicas({"r1": "b", "r9": "c"})
    world.ranking.completed("r0", DOCUMENT, now_ms=1)
    assert world.costs(DOCUMENT, 5_000) == pytest.approx({"r1": 1_100, "r9": 1_100})
    world.ranking.check()


def test_a_slab_that_can_not_be_reached_counts_for_nobody() -> None:
    world = World("a", "b", "c")
    world.send(DOCUMENT, 0, to="r0")
    world.send(("x",), 0, to="r1")
    world.ranking.set_replicas({"r0": "a", "r1": "b", "r2": "c"}, serving={"b", "c"})
    assert world.costs(DOCUMENT, 5_000) == pytest.approx({"r0": 100, "r1": 1_100, "r2": 1_100})
    assert world.costs(("x",), 5_000) == pytest.approx(
        {"r0": 200, "r1": 100, "r2": 110 + LOAD_OVERHEAD_MS}
    )


def test_a_cache_forgets_the_tail_of_the_oldest_first() -> None:
    recent = Recent(12)
    recent.use(DOCUMENT)
    assert recent.use(("x", "y", "z")) == ["d9"]
    assert recent.prefix(DOCUMENT) == 9


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.floats(0, 500)), max_size=60))
def test_tables_stay_bounded_and_no_cost_is_negative(
    requests: list[tuple[int, int, float]],
) -> None:
    world = World("a", "b", "b", device=8, slab=16)
    now_ms = 0.0
    for document, length, gap_ms in requests:
        now_ms += gap_ms
        chunks = tuple(f"{document}.{i}" for i in range(length))
        assert all(cost >= 0 for cost in world.costs(chunks, now_ms).values())
        world.send(chunks, now_ms)  # checks
