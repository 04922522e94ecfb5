"""Goal: the policy names the block whose loss costs least. Method: small orders, read off whole."""

import pytest

from kvray.core.eviction import PROMOTE_HITS, Lru, Policy, Segmented
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


@pytest.fixture(params=[Lru, lambda: Segmented(0.1, 0.3)], ids=["lru", "segmented"])
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
    policy = Segmented(0.25, 0.0)
    admit(policy, A, B)
    admit(policy, C, D, origin=Origin.COPY)
    assert order(policy, slot_count=4) == [C, A, B, D]


def test_copies_within_their_fraction_outlive_originals() -> None:
    policy = Segmented(0.5, 0.0)
    admit(policy, A, B)
    admit(policy, C, D, origin=Origin.COPY)
    assert order(policy, slot_count=4) == [A, B, C, D]


def test_a_held_copy_counts_into_the_fraction() -> None:
    policy = Segmented(0.25, 0.0)
    admit(policy, A)
    admit(policy, C, D, origin=Origin.COPY)
    policy.hold(SIZE, C)
    assert order(policy, slot_count=4) == [D, A]


def test_a_copy_is_promoted_by_its_third_reader_only() -> None:
    """The first pin is the reader for whom it was fetched."""
    policy = Segmented(0.0, 0.0)
    admit(policy, A)
    admit(policy, C, origin=Origin.COPY)
    for _ in range(PROMOTE_HITS - 1):
        pinned_once(policy, C)
        assert order(policy) == [C, A]
        assert policy.snapshot()["probation"] == 1
    pinned_once(policy, C)
    assert order(policy) == [A, C]
    assert policy.snapshot()["probation"] == 0
    policy.check({A, C})


def test_a_copy_that_is_computed_again_is_still_a_copy() -> None:
    policy = Segmented(0.0, 0.0)
    admit(policy, A)
    admit(policy, C, D, origin=Origin.COPY)
    for _ in range(3):
        policy.touch(SIZE, C)
    assert order(policy) == [D, C, A]


def test_a_slot_that_held_a_copy_starts_anew_with_its_next_block() -> None:
    policy = Segmented(0.0, 0.0)
    admit(policy, A)
    admit(policy, C, origin=Origin.COPY)
    pinned_once(policy, C)
    policy.forget(SIZE, C)
    admit(policy, C, origin=Origin.COPY)
    pinned_once(policy, C)
    assert order(policy) == [C, A]


def test_what_was_used_again_outlives_what_is_newer() -> None:
    """By a reader here, and by a peer."""
    policy = Segmented(0.0, 0.5)
    admit(policy, A, B, C, D)
    pinned_once(policy, A)
    policy.read(SIZE, B)
    policy.touch(SIZE, C)
    assert order(policy) == [D, C, A, B]


def test_reuse_beyond_its_fraction_is_new_once_more() -> None:
    """One of four may be reused. When one has to go, the one that was used before it gets the time
    of a new block."""
    policy = Segmented(0.0, 0.25)
    admit(policy, A, B, C, D)
    pinned_once(policy, A)
    pinned_once(policy, B)
    policy.forget(SIZE, C)
    admit(policy, E)
    assert order(policy) == [D, A, E, B]
    assert policy.snapshot()["reused"] == 1


def test_what_another_node_keeps_goes_before_what_only_this_one_has() -> None:
    policy = Segmented(0.0, 0.5)
    admit(policy, A, B, C, D)
    pinned_once(policy, D)
    for slot in (C, D):
        policy.spare(SIZE, slot)
    assert order(policy) == [C, D, A, B]
    assert list(policy.doubtful(SIZE)) == [A, B], "of the others it is known"


@pytest.mark.parametrize("use", ["pin", "read", "touch", "keep"])
def test_a_block_that_is_used_is_not_spared(use: str) -> None:
    policy = Segmented(0.0, 0.5)
    admit(policy, A, B)
    policy.spare(SIZE, B)
    assert order(policy) == [B, A]
    if use == "pin":
        pinned_once(policy, B)
    elif use == "read":
        policy.read(SIZE, B)
    elif use == "touch":
        policy.touch(SIZE, B)
    else:
        policy.keep(SIZE, B)  # its home leaves
    assert order(policy) == [A, B]


def test_a_held_block_is_not_spared() -> None:
    policy = Segmented(0.0, 0.5)
    admit(policy, A, B)
    policy.spare(SIZE, B)
    policy.hold(SIZE, B)
    assert order(policy) == [A]
    policy.spare(SIZE, B)
    policy.free(SIZE, B)
    assert order(policy) == [A, B]


def test_a_copy_that_peers_read_is_no_guest_any_more() -> None:
    """They are told of the home of a block: its original is gone."""
    policy = Segmented(0.0, 0.5)
    admit(policy, A)
    admit(policy, C, D, origin=Origin.COPY)
    policy.read(SIZE, C)
    assert order(policy) == [D, A, C]


def test_a_hot_set_survives_a_scan_and_not_with_lru() -> None:
    """Ten of a hundred slots are used twice, then come 10,000 blocks that nobody asks for again."""
    slot_count = 100
    hot = {SlotIndex(number) for number in range(10)}
    left: dict[str, set[SlotIndex]] = {}
    for name, policy in (("segmented", Segmented(0.01, 0.10)), ("lru", Lru())):
        admit(policy, *map(SlotIndex, range(slot_count)))
        for slot in hot:
            pinned_once(policy, slot)
        survivors = set(hot)
        for _ in range(10_000):
            coldest = next(policy.coldest(SIZE, slot_count=slot_count))
            policy.forget(SIZE, coldest)
            survivors.discard(coldest)
            admit(policy, coldest)
        left[name] = survivors
    assert left == {"segmented": hot, "lru": set()}
