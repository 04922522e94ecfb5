"""Goal: the policy names the block whose loss costs least. Method: small orders, read off whole."""

import pytest

from kvray.core.eviction import Lru, LruWithProbation, Policy
from kvray.core.ids import Origin, SlotIndex

SIZE = 4_096
A, B, C, D, E = (SlotIndex(number) for number in range(5))


def order(policy: Policy, *, slot_count: int = 10) -> list[SlotIndex]:
    return list(policy.coldest(SIZE, slot_count=slot_count))


def admit(policy: Policy, *slots: SlotIndex, origin: Origin = Origin.ORIGINAL) -> None:
    for slot in slots:
        policy.admit(SIZE, slot, origin)


def pinned_once(policy: Policy, slot: SlotIndex) -> None:
    policy.hold(SIZE, slot)
    policy.hit(SIZE, slot)
    policy.free(SIZE, slot)


@pytest.fixture(params=[Lru, lambda: LruWithProbation(0.1)], ids=["lru", "probation"])
def policy(request: pytest.FixtureRequest) -> Policy:
    made: Policy = request.param()
    return made


def test_the_least_recently_used_goes_first(policy: Policy) -> None:
    admit(policy, A, B, C)
    policy.touch(SIZE, A)
    assert order(policy) == [B, C, A]
    policy.hit(SIZE, B)
    assert order(policy) == [C, A, B]


def test_a_held_block_is_not_in_the_order_and_comes_back_hottest(policy: Policy) -> None:
    admit(policy, A, B, C)
    policy.hold(SIZE, A)
    policy.touch(SIZE, A)  # a peer reads it meanwhile
    assert order(policy) == [B, C]
    policy.free(SIZE, A)
    assert order(policy) == [B, C, A]


def test_a_block_that_is_gone_is_forgotten(policy: Policy) -> None:
    admit(policy, A, B)
    admit(policy, C, origin=Origin.COPY)
    for slot in (A, C):
        policy.forget(SIZE, slot)
    assert order(policy) == [B]
    policy.check({B})
    assert policy.snapshot()["evictable"] == 1


def test_a_policy_that_remembers_a_block_that_is_gone_fails_its_check(policy: Policy) -> None:
    admit(policy, A, B)
    with pytest.raises(AssertionError, match="not READY"):
        policy.check({B})


def test_each_slot_size_has_its_own_order(policy: Policy) -> None:
    policy.admit(SIZE, A, Origin.ORIGINAL)
    policy.admit(2 * SIZE, B, Origin.ORIGINAL)
    assert order(policy) == [A]
    assert list(policy.coldest(2 * SIZE, slot_count=10)) == [B]


def test_plain_lru_does_not_care_for_the_origin() -> None:
    policy = Lru()
    admit(policy, A)
    admit(policy, B, origin=Origin.COPY)
    admit(policy, C)
    assert order(policy, slot_count=1) == [A, B, C]


def test_copies_beyond_their_fraction_go_before_any_original() -> None:
    """Two of four slots are copies, one is allowed: the older copy goes first, then the originals,
    and the copy within the fraction goes last."""
    policy = LruWithProbation(0.25)
    admit(policy, A, B)
    admit(policy, C, D, origin=Origin.COPY)
    assert order(policy, slot_count=4) == [C, A, B, D]


def test_copies_within_their_fraction_outlive_originals() -> None:
    policy = LruWithProbation(0.5)
    admit(policy, A, B)
    admit(policy, C, D, origin=Origin.COPY)
    assert order(policy, slot_count=4) == [A, B, C, D]


def test_a_held_copy_counts_into_the_fraction() -> None:
    policy = LruWithProbation(0.25)
    admit(policy, A)
    admit(policy, C, D, origin=Origin.COPY)
    policy.hold(SIZE, C)
    assert order(policy, slot_count=4) == [D, A]


def test_a_copy_is_promoted_by_its_second_reader_only() -> None:
    """The first pin is the reader for whom it was fetched."""
    policy = LruWithProbation(0.0)
    admit(policy, A)
    admit(policy, C, origin=Origin.COPY)
    pinned_once(policy, C)
    assert order(policy) == [C, A]
    assert policy.snapshot()["probation"] == 1
    pinned_once(policy, C)
    assert order(policy) == [A, C]
    assert policy.snapshot()["probation"] == 0
    policy.check({A, C})


def test_reads_by_peers_do_not_promote_a_copy() -> None:
    policy = LruWithProbation(0.0)
    admit(policy, A)
    admit(policy, C, D, origin=Origin.COPY)
    for _ in range(3):
        policy.touch(SIZE, C)
    assert order(policy) == [D, C, A]


def test_a_slot_that_held_a_copy_starts_anew_with_its_next_block() -> None:
    policy = LruWithProbation(0.0)
    admit(policy, A)
    admit(policy, C, origin=Origin.COPY)
    pinned_once(policy, C)
    policy.forget(SIZE, C)
    admit(policy, C, origin=Origin.COPY)
    pinned_once(policy, C)
    assert order(policy) == [C, A]
