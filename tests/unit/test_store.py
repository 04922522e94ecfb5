"""Goal: a slot is in one state, rewritten only when nobody reads or writes it, and never lost.

Method: stories on a StoreCore with a fake slab under it, which refuses a wrong write, and both of
whose sides are compared after every step. Extents: tests/unit/test_store_extents.py; restarts:
tests/unit/test_store_restart.py.
"""

import pytest

from kvray.core.effects import MarkGeneration, Place
from kvray.core.eviction import PROMOTE_HITS, Lru, Segmented
from kvray.core.ids import BlockKey, Generation, OpId, Origin, SlotIndex, SlotState
from kvray.core.layout import WRITER_NODE
from kvray.core.messages import Grant
from kvray.core.store import NODE, Holder, StoreLimits
from kvray.core.store_limits import GENERATION_BATCH
from tests.fake_slab import (
    ENGINE,
    EXTENT,
    OTHER_ENGINE,
    PAGE,
    StoreOnSlab,
    key_of,
    one_place,
    stale,
)

A, B, C, D, E, F = (key_of(number) for number in range(6))
QUARTER = EXTENT // 4  # four slots an extent


def four_slots(**options: object) -> StoreOnSlab:
    return StoreOnSlab(extent_count=1, **options)  # type: ignore[arg-type]  # passed on


def fill(store: StoreOnSlab, *keys: BlockKey, origin: Origin = Origin.ORIGINAL) -> list[Place]:
    return store.fill(keys, payload_bytes=QUARTER, origin=origin)


def reserve(store: StoreOnSlab, *keys: BlockKey) -> list[Grant | Place]:
    return store.reserve(store.op(), keys, payload_bytes=QUARTER)


def test_the_life_of_a_block() -> None:
    store = StoreOnSlab()
    writer, reader = store.op(), store.op(OTHER_ENGINE)
    place = one_place(store.reserve(writer, [A], payload_bytes=5_000))
    assert place.bytes == 5_000
    assert store.core.is_writing(A)
    assert store.core.find(A) is None, "nobody may read what is being written"
    assert store.pin(reader, [A]) == [None]

    assert store.core.commit(writer, place.slot, place.generation, store.now_ms)
    store.settle()
    assert not store.core.is_writing(A)
    assert store.core.find(A) is place
    assert store.pin(reader, [A, B]) == [place, None]
    assert not store.core.evict(A), "a reader is at it"
    store.unpin(reader)
    assert store.core.evict(A)
    store.settle()
    assert store.core.find(A) is None
    assert store.slab.state_of(place.slot) is SlotState.ABSENT


def test_a_rewritten_slot_has_another_generation() -> None:
    store = four_slots()
    before = fill(store, A)[0]
    store.core.evict(A)
    after = fill(store, A)[0]
    assert after.slot == before.slot
    assert after.generation > before.generation
    assert store.core.occupant(after.slot, before.generation) is None
    assert store.core.occupant(after.slot, after.generation) is after


def test_the_mark_is_raised_before_a_generation_is_used_and_once_a_batch() -> None:
    """The fake slab refuses a generation above its mark."""
    store = four_slots()
    marks = []
    for number in range(GENERATION_BATCH + 10):
        holder: Holder = (ENGINE, OpId(number))
        wants = [(A, QUARTER)]
        answers = store.core.reserve(holder, wants, writer=1, origin=Origin.ORIGINAL, now_ms=1)
        place = one_place(answers)
        store.core.abandon(holder, place.slot, place.generation)
        for effect in store.core.drain_effects():
            store.slab.apply(effect)
            if isinstance(effect, MarkGeneration):
                marks.append(effect.high_water)
    assert marks == [1 + GENERATION_BATCH, 1 + 2 * GENERATION_BATCH]


# -- room ------------------------------------------------------------------------------------------


def test_the_coldest_block_makes_room() -> None:
    store = four_slots()
    fill(store, A, B, C, D)
    store.core.touch([A], store.now_ms)
    fill(store, E)
    assert store.has(A, B, C, D, E) == [True, False, True, True, True]


def test_a_pinned_block_is_never_evicted() -> None:
    store = four_slots()
    fill(store, A, B, C, D)
    reader = store.op()
    store.pin(reader, [A, B, C, D])
    assert reserve(store, E) == [Grant.FULL]
    store.unpin(reader)
    one_place(reserve(store, E))
    assert store.has(A) == [True], "the head of the chain that was read goes last"
    assert store.has(D) == [False]


def test_the_search_for_room_steps_over_pinned_blocks_once_and_they_come_back_the_hottest() -> None:
    """The coldest of all are pinned; whether a search has met them or not, their last unpin makes
    them the last to go."""
    store = four_slots()
    fill(store, A, B, C, D)
    reader, met_by_no_search = store.op(), store.op()
    store.pin(reader, [A, B])
    one_place(reserve(store, E))
    assert store.has(A, B, C, D) == [True, True, False, True]
    assert store.core.snapshot()["policy"]["evictable"] == 1, "only D: A and B are out of the order"
    store.unpin(reader)
    assert store.core.snapshot()["policy"]["evictable"] == 3
    store.pin(met_by_no_search, [D])
    store.unpin(met_by_no_search)
    one_place(reserve(store, key_of(5)))
    one_place(reserve(store, key_of(6)))
    assert store.has(A, B, D) == [False, False, True]


def test_blocks_that_were_looked_at_are_pinned_all_or_none() -> None:
    store = four_slots(limits=StoreLimits(max_pins=2))
    fill(store, A, B, C)
    reader, greedy = store.op(), store.op()
    a, b, c, d = store.core.blocks_of([A, B, C, D])
    assert a is not None
    assert b is not None
    assert c is not None
    assert d is None
    assert not store.core.pin_blocks(greedy, [a, b, c], store.now_ms)
    assert store.core.snapshot()["pins"] == 0
    assert store.core.pin_blocks(reader, [a, b, a], store.now_ms), "a key may be asked for twice"
    store.settle()
    assert store.core.clear() == 1, "A and B are read"
    store.unpin(reader)
    assert store.core.clear() == 2


def test_a_block_with_two_readers_stays_until_both_have_left() -> None:
    store = four_slots()
    fill(store, A)
    first, second = store.op(), store.op()
    store.pin(first, [A])
    store.pin(second, [A])
    store.unpin(first)
    assert not store.core.evict(A)
    store.unpin(second)
    assert store.core.evict(A)


def test_pins_belong_to_an_operation_and_are_taken_once() -> None:
    """A lookup that is answered in parts pins more under its own name; a repeated one does not pin
    twice; a repeated unpin unpins nothing else."""
    store = four_slots()
    fill(store, A, B)
    reader, other = store.op(), store.op()
    store.pin(reader, [A, A])
    store.pin(reader, [A, B])
    store.pin(other, [A])
    assert store.core.snapshot()["pins"] == 3
    store.unpin(reader)
    store.unpin(reader)
    assert not store.core.evict(A), "the other reader is still there"
    assert store.core.evict(B)


def test_what_is_being_written_is_not_room() -> None:
    store = four_slots()
    assert [type(answer) for answer in reserve(store, A, B, C, D)] == [Place] * 4
    assert reserve(store, E) == [Grant.FULL]


def test_grants_before_a_full_answer_stay() -> None:
    store = four_slots()
    fill(store, A, B)
    reader = store.op()
    store.pin(reader, [A])
    keys = [key_of(number) for number in range(10, 15)]
    answers = reserve(store, *keys)
    assert [isinstance(answer, Place) for answer in answers] == [True] * 3 + [False] * 2
    assert answers[3:] == [Grant.FULL] * 2
    assert all(store.core.is_writing(key) for key in keys[:3])
    assert store.has(A, B) == [True, False]


def test_a_reservation_evicts_nothing_that_it_calls_present() -> None:
    """D is new, A and B are there: the room for D must come from C, however cold A and B are."""
    store = four_slots()
    fill(store, A, B, C)
    fill(store, E)
    answers = reserve(store, D, A, B, E, C)
    assert answers == [Grant.FULL, *[Grant.PRESENT] * 4]
    answers = reserve(store, D, A, B, E)
    assert isinstance(answers[0], Place)
    assert answers[1:] == [Grant.PRESENT] * 3
    assert store.has(A, B, C, E) == [True, True, False, True]


def test_a_key_that_somebody_writes_is_present() -> None:
    store = four_slots()
    first = reserve(store, A)
    assert isinstance(first[0], Place)
    assert reserve(store, A, B)[0] is Grant.PRESENT
    answers = reserve(store, C, C)
    assert isinstance(answers[0], Place)
    assert answers[1] is Grant.PRESENT


@pytest.mark.parametrize("payload_bytes", [0, -1, -PAGE, EXTENT + 1, 2**40])
def test_a_size_that_no_slot_can_have_is_full(payload_bytes: int) -> None:
    """The number comes from a client: not an assert."""
    store = StoreOnSlab()
    assert store.reserve(store.op(), [A, B], payload_bytes=payload_bytes) == [Grant.FULL] * 2
    one_place(reserve(store, A))


def test_a_block_of_another_size_is_a_miss() -> None:
    store = StoreOnSlab()
    small, large = store.fill([A], payload_bytes=100)[0], store.fill([B], payload_bytes=9_000)[0]
    pin = store.core.pin
    assert pin(store.op(), [A, B], slot_bytes=100, now_ms=1) == [small, None]
    assert pin(store.op(), [A, B], slot_bytes=[101, 9_000], now_ms=1) == [None, large]
    assert pin(store.op(), [A, B], slot_bytes=None, now_ms=1) == [small, large]
    assert store.core.snapshot()["pins"] == 4


def test_copies_go_before_originals_unless_many_readers_came() -> None:
    """A and B are copies of a peer's blocks, B has been read by several requests."""
    store = four_slots()
    fill(store, A, B, origin=Origin.COPY)
    fill(store, C, D)
    for _ in range(PROMOTE_HITS):
        reader = store.op()
        store.pin(reader, [B])
        store.unpin(reader)
    fill(store, E)
    fill(store, key_of(9))
    assert store.has(A, B, C, D) == [False, True, False, True]


def test_what_peers_want_stays_and_what_they_keep_goes() -> None:
    """A is wanted by a peer, C is spared, so C goes first, then B, and what is asked again is not
    told twice."""
    store = four_slots(policy=Segmented(0.0, 0.5))
    fill(store, A, B, C, D)
    assert store.core.take_doubtful(2) == [], "nothing had to go yet"
    store.core.read([A, E], store.now_ms)
    store.core.spare([C, E])
    fill(store, E)
    assert store.has(A, B, C, D, E) == [True, True, False, True, True]
    assert store.core.take_doubtful(2) == [B, D]
    assert store.core.take_doubtful(2) == []
    fill(store, F)
    assert store.has(A, B, C, D, E) == [True, False, False, True, True]


def test_what_is_pinned_is_not_doubtful() -> None:
    # A pinned block stays in the order of eviction until a search meets it.
    store = four_slots()
    fill(store, A, B, C, D)
    store.core.evict(A)
    store.settle()
    store.pin(store.op(OTHER_ENGINE), [B])

    assert store.core.take_doubtful(3) == [C, D]


def test_another_policy_can_be_plugged_in() -> None:
    store = four_slots(policy=Lru())
    fill(store, C)
    fill(store, A, origin=Origin.COPY)
    fill(store, B, D, E)
    assert store.has(C, A) == [False, True]


# -- ends of a reservation -------------------------------------------------------------------------


def test_commit_and_abandon_may_be_late_and_repeated() -> None:
    store = four_slots()
    mine, other = store.op(), store.op()
    place = one_place(store.reserve(mine, [A], payload_bytes=QUARTER))
    core = store.core
    assert not core.commit(other, place.slot, place.generation, 1), "not its reservation"
    assert not core.commit(mine, place.slot, stale(place.generation), 1)
    assert not core.commit(mine, SlotIndex(place.slot + 1), place.generation, 1)
    assert core.commit(mine, place.slot, place.generation, 1)
    assert not core.commit(mine, place.slot, place.generation, 1)
    assert not core.abandon(mine, place.slot, place.generation), "a READY block stays"
    store.settle()
    assert store.has(A) == [True]


def test_an_abandoned_slot_is_free_at_once() -> None:
    store = four_slots()
    holder = store.op()
    places = store.reserve(holder, [A, B, C, D], payload_bytes=QUARTER)
    first = places[0]
    assert isinstance(first, Place)
    assert store.core.abandon(holder, first.slot, first.generation)
    assert not store.core.commit(holder, first.slot, first.generation, 1)
    store.settle()
    again = one_place(reserve(store, A))
    assert again.slot == first.slot
    assert [place.key for place in store.core.abandon_reservation(holder)] == [B, C, D]
    assert store.core.abandon_reservation(holder) == []
    store.settle()
    assert [isinstance(answer, Place) for answer in reserve(store, B, C, D)] == [True] * 3


def test_a_slot_in_quarantine_is_not_free_until_its_writer_has_ended() -> None:
    """A read from a peer was abandoned: its bytes may still arrive."""
    store = four_slots()
    node: Holder = (NODE, OpId(1))
    fill(store, A, B, C)
    target = one_place(
        store.reserve(node, [D], payload_bytes=QUARTER, origin=Origin.COPY, writer=WRITER_NODE)
    )
    assert store.core.quarantine(target.slot, target.generation)
    assert not store.core.quarantine(target.slot, target.generation)
    assert not store.core.commit(node, target.slot, target.generation, 1), "too late"
    assert not store.core.is_writing(D), "nobody waits for it any more"
    assert store.core.quarantined_by(WRITER_NODE) == [(target.slot, target.generation)]
    store.settle()

    fresh = one_place(reserve(store, D))
    assert fresh.slot != target.slot
    assert store.has(A) == [False], "room came from a block, not from the quarantined slot"
    assert not store.core.release(target.slot, stale(target.generation))
    assert store.core.release(target.slot, target.generation)
    assert not store.core.release(target.slot, target.generation)
    store.settle()
    assert one_place(reserve(store, E)).slot == target.slot


def test_a_ready_block_can_not_be_quarantined_by_a_late_message() -> None:
    store = four_slots()
    place = fill(store, A)[0]
    assert not store.core.quarantine(place.slot, place.generation)
    assert not store.core.quarantine(SlotIndex(3), Generation(1))
    assert store.has(A) == [True]


def test_a_client_that_vanishes_leaves_no_pin_and_no_free_slot_behind() -> None:
    """Its workers may still copy into the reserved slots, so these wait for the processes."""
    store = four_slots()
    fill(store, A, B)
    theirs, ours = store.op(OTHER_ENGINE), store.op(ENGINE)
    store.pin(theirs, [A])
    store.pin(ours, [B])
    held = one_place(store.reserve(store.op(OTHER_ENGINE), [C], payload_bytes=QUARTER, writer=5))
    kept = one_place(store.reserve(ours, [D], payload_bytes=QUARTER, writer=1))

    assert list(store.core.reservations_of(OTHER_ENGINE).values()) == [[held]]
    assert store.core.client_gone(OTHER_ENGINE) == [held]
    assert store.core.client_gone(OTHER_ENGINE) == []
    store.settle()
    assert store.core.quarantined_by(5) == [(held.slot, held.generation)]
    assert store.core.evict(A)
    assert not store.core.evict(B)
    assert store.core.commit(ours, kept.slot, kept.generation, 1)
    store.settle()


def test_a_client_that_comes_back_gets_its_slot_back() -> None:
    """Only its own, only as it was, and only if nobody has stored the key elsewhere meanwhile."""
    store = four_slots()
    place = one_place(store.reserve(store.op(OTHER_ENGINE), [A], payload_bytes=QUARTER, writer=5))
    store.core.client_gone(OTHER_ENGINE)
    back = store.op(OTHER_ENGINE)
    restore = store.core.restore_writing
    assert not restore(back, place.slot, stale(place.generation))
    assert not restore(back, place.slot, place.generation, writer=6)
    assert restore(back, place.slot, place.generation, writer=5)
    assert not restore(back, place.slot, place.generation, writer=5)
    store.settle()
    assert store.core.is_writing(A)
    assert store.core.commit(back, place.slot, place.generation, 1)
    store.settle()

    second = one_place(store.reserve(back, [B], payload_bytes=QUARTER, writer=5))
    store.core.client_gone(OTHER_ENGINE)
    fill(store, B)
    assert not restore(back, second.slot, second.generation, writer=5)
    assert store.core.quarantined_by(5) == [(second.slot, second.generation)]
    store.settle()


# -- limits ----------------------------------------------------------------------------------------


def test_beyond_the_limit_of_pins_a_key_is_a_miss() -> None:
    store = four_slots(limits=StoreLimits(max_pins=3))
    a, b, c, _ = fill(store, A, B, C, D)
    reader = store.op()
    assert store.pin(reader, [A, B]) == [a, b]
    other = store.op()
    assert store.pin(other, [A, B]) == [a, None]
    assert store.pin(reader, [A, B, C]) == [a, b, None], "what it has pinned it keeps"
    store.unpin(other)
    assert store.pin(reader, [C]) == [c]


def test_beyond_the_limit_of_reservations_the_store_is_full() -> None:
    store = four_slots(limits=StoreLimits(max_reservations=2))
    holder = store.op()
    answers = store.reserve(holder, [A, B, C], payload_bytes=QUARTER)
    assert answers[2] is Grant.FULL
    assert reserve(store, C) == [Grant.FULL]
    store.core.abandon_reservation(holder)
    one_place(reserve(store, C))


def test_clear_leaves_only_what_is_in_use() -> None:
    store = four_slots()
    fill(store, A, B)
    reader = store.op()
    store.pin(reader, [A])
    reserve(store, C)
    assert store.core.clear() == 1
    store.settle()
    assert store.has(A, B) == [True, False]
    assert store.core.is_writing(C)
