"""The simulator of benchmarks/routing.py, on requests that one can work out by hand."""

import pytest

from benchmarks.routing import Case, arrivals, play, with_hot_set
from benchmarks.routing_policies import Affinity, KVRay, RoundRobin, TwoChoices
from benchmarks.routing_world import Policy, Replica, Request, Speeds, World

SPEEDS = Speeds(prefill_ms=100, copy_ms=1, link_ms=10)
A = tuple(range(10))


def ttft_ms(*requests: tuple[float, tuple[int, ...]], replicas: int, slab: int) -> list[float]:
    made = [Request(i, at_ms, blocks) for i, (at_ms, blocks) in enumerate(requests)]
    world = World(replicas, device_blocks=50, slab_blocks=slab, speeds=SPEEDS)
    world.run(made, RoundRobin())
    world.check(made)
    return [r.first_token_ms - r.arrival_ms for r in made]


def test_an_idle_replica_takes_the_prefill() -> None:
    assert ttft_ms((0, A), replicas=1, slab=0) == [1_000]


def test_a_second_request_waits_for_the_first() -> None:
    assert ttft_ms((0, A), (0, (50, 51)), replicas=1, slab=0) == [1_000, 1_200]


def test_a_device_hit_computes_the_last_block_only() -> None:
    assert ttft_ms((0, A), (5_000, A), replicas=1, slab=0) == [1_000, 100]


def test_with_kvray_the_other_replica_reads_instead_of_computing() -> None:
    assert ttft_ms((0, A), (5_000, A), replicas=2, slab=0) == [1_000, 1_000]
    assert ttft_ms((0, A), (5_000, A), replicas=2, slab=50) == [1_000, 10 * 10 + 100]


def test_what_was_computed_while_a_request_waited_is_loaded_when_its_turn_comes() -> None:
    """The third waits behind the second, and by then the first is done."""
    found = ttft_ms((0, (8, 9, *A)), (0, (50,) * 1), (1, (8, 9, *A)), replicas=2, slab=50)
    assert found[0] == 1_200
    behind = ttft_ms((0, A), (0, tuple(range(60, 75))), (1, A), (2, A), replicas=2, slab=50)
    assert behind[3] == pytest.approx(1_500 - 2 + 100 + 100)


@pytest.mark.parametrize("slab_blocks", [0, 60])
@pytest.mark.parametrize("name", ["round-robin", "pow2", "affinity", "kvray"])
def test_nobody_is_lost(name: str, slab_blocks: int) -> None:
    """play() checks the world after each run."""
    prompts = with_hot_set([tuple(range(i, i + 5)) for i in range(300)], seed=1)
    every: dict[str, Policy] = {
        "round-robin": RoundRobin(),
        "pow2": TwoChoices(0),
        "affinity": Affinity(0, 3),
        "kvray": KVRay(3, device_blocks=50, slab_blocks=slab_blocks, speeds=SPEEDS),
    }
    policy = every[name]
    case = Case("case", prompts, SPEEDS, ())
    mean_ms, _, _ = play(case, policy, 3, slab_blocks=slab_blocks, gap_ms=300, seed=2)
    assert mean_ms >= SPEEDS.prefill_ms


def test_affinity_follows_the_longest_match_and_else_whom_was_given_least() -> None:
    replicas: list[Replica] = World(3, device_blocks=9, slab_blocks=0, speeds=SPEEDS).replicas
    affinity = Affinity(0, 3)
    first = affinity.choose(Request(0, 0, A), replicas)
    second = affinity.choose(Request(1, 0, (90, 91)), replicas)
    assert second != first
    assert affinity.choose(Request(2, 0, (*A, 11)), replicas) == first
    assert affinity.choose(Request(3, 0, (77,)), replicas) not in (first, second)


def test_arrivals_are_seeded_and_in_order() -> None:
    made = arrivals([A] * 500, gap_ms=10, seed=3)
    assert [r.arrival_ms for r in made] == sorted(r.arrival_ms for r in made)
    assert made == arrivals([A] * 500, gap_ms=10, seed=3)
    assert 8 < made[-1].arrival_ms / 500 < 12
