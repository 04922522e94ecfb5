"""An engine is proven when all rounds of its canary have been read, and not before.

Method: a canary that takes one round after the other, as its ranks would see them.
"""

import itertools

import pytest

from kvray.core.canary import MAX_TRIES, CanaryRounds, CanaryState, Proof, RankSaw, Round

FACTS = {"max_num_batched_tokens": 8_192}
MACHINE = {"isa": "AVX2"}
BLOCKS = ([1, 2],)


@pytest.fixture
def rounds() -> CanaryRounds:
    return CanaryRounds(FACTS)


def saw(digest: bytes = b"same", distance: float = 0.0) -> RankSaw:
    return RankSaw(digest, distance, layer_counts=(4,), machine=MACHINE)


def compute(rounds: CanaryRounds, *ranks: RankSaw) -> None:
    """One round, from DUE until it is read."""
    begin_and_end(rounds, is_whole=True)
    assert rounds.take_blocks() == (BLOCKS, [BLOCKS, BLOCKS])
    rounds.read(ranks)


def begin_and_end(rounds: CanaryRounds, *, is_whole: bool) -> None:
    rounds.begin("canary", ["beside"])
    rounds.request_ended("beside", BLOCKS, is_whole=False)
    assert not rounds.is_readable
    rounds.request_ended("canary", BLOCKS, is_whole=is_whole)


def prove(rounds: CanaryRounds, *ranks: RankSaw) -> Proof:
    compute(rounds, *ranks)
    assert rounds.state is CanaryState.DUE
    compute(rounds, *ranks)
    assert rounds.proof is not None
    return rounds.proof


def test_two_rounds_that_are_equal_to_the_bit_prove_an_engine_without_noise(
    rounds: CanaryRounds,
) -> None:
    proof = prove(rounds, saw())

    assert rounds.state is CanaryState.PROVEN
    assert (proof.alone, proof.batched, proof.layer_counts) == (0.0, 0.0, (4,))


def test_a_batch_that_rounds_otherwise_asks_for_a_third_round(rounds: CanaryRounds) -> None:
    compute(rounds, saw())
    compute(rounds, saw(distance=0.01))
    assert rounds.round is Round.ALONE
    assert rounds.state is CanaryState.DUE

    compute(rounds, saw(distance=0.002))

    assert rounds.proof is not None
    assert (rounds.proof.alone, rounds.proof.batched) == (0.002, 0.01)


def test_the_noise_of_the_worst_rank_counts(rounds: CanaryRounds) -> None:
    compute(rounds, saw(), saw())
    compute(rounds, saw(distance=0.001), saw(distance=0.03))
    compute(rounds, saw(), saw())

    assert rounds.proof is not None
    assert rounds.proof.batched == 0.03


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([saw(b"other"), saw()], id="the bytes of the first rank"),
        pytest.param([saw(), saw(b"other")], id="the bytes of another rank"),
        pytest.param([saw()], id="how many ranks there are"),
        pytest.param([saw(), RankSaw(b"same", 0.0, (4,), {"isa": "AMX"})], id="its machine"),
    ],
)
def test_a_maker_is_all_that_was_seen(rounds: CanaryRounds, other: list[RankSaw]) -> None:
    assert prove(rounds, saw(), saw()).maker != prove(CanaryRounds(FACTS), *other).maker


def test_engines_that_saw_the_same_are_one_maker_and_the_batch_limit_is_part_of_it(
    rounds: CanaryRounds,
) -> None:
    maker = prove(rounds, saw()).maker

    assert prove(CanaryRounds(FACTS), saw()).maker == maker
    assert prove(CanaryRounds({"max_num_batched_tokens": 64}), saw()).maker != maker


@pytest.mark.parametrize("rounds_before", [0, 1])
def test_what_is_aborted_is_tried_again_and_not_for_ever(
    rounds: CanaryRounds, rounds_before: int
) -> None:
    for _ in range(rounds_before):
        compute(rounds, saw())

    for _ in range(MAX_TRIES):
        assert rounds.state is CanaryState.DUE
        begin_and_end(rounds, is_whole=False)
        assert rounds.take_blocks() is None

    assert rounds.state is CanaryState.REFUSED
    assert "aborted" in rounds.why


def test_what_an_older_round_still_computes_counts_no_more(rounds: CanaryRounds) -> None:
    rounds.begin("old", [])
    rounds.weights_change()
    rounds.begin("canary", [])

    rounds.request_ended("old", ([3, 4],), is_whole=True)

    assert not rounds.is_readable
    rounds.request_ended("canary", BLOCKS, is_whole=True)
    assert rounds.take_blocks() == (BLOCKS, [BLOCKS])


@pytest.mark.parametrize("rounds_before", range(4))
def test_new_weights_begin_with_the_first_round(rounds: CanaryRounds, rounds_before: int) -> None:
    for distance in itertools.islice((0.0, 0.01, 0.0), rounds_before):
        compute(rounds, saw(b"old", distance))

    rounds.weights_change()

    assert rounds.proof is None
    assert rounds.round is Round.FIRST
    assert prove(rounds, saw(b"new")).maker == prove(CanaryRounds(FACTS), saw(b"new")).maker


def test_what_is_refused_stays_refused(rounds: CanaryRounds) -> None:
    rounds.refuse("max_model_len is 256")

    rounds.weights_change()

    assert rounds.state is CanaryState.REFUSED
    assert rounds.why == "max_model_len is 256"
