"""Goal: a restart loses no committed block, believes nothing else, and frees no slot too early.

Method: a store on a fake slab is killed (its memory is dropped) and a new one adopts what the
effects have written; or a header is damaged by hand before.
"""

from typing import Any

import numpy as np
import pytest

from kvray.core.effects import Place
from kvray.core.ids import Origin, SlotState
from kvray.core.layout import WRITER_NODE
from kvray.core.messages import Grant
from tests.fake_slab import EXTENT, PAGE, FakeSlab, StoreOnSlab, geometry_of, key_of, one_place

A, B, C, D, E = (key_of(number) for number in range(5))
QUARTER = EXTENT // 4


def test_an_empty_slab_is_an_empty_store() -> None:
    store = StoreOnSlab(extent_count=2).restarted()
    assert store.slab.headers.tobytes() == bytes(store.slab.headers.nbytes)
    assert len(store.fill([A, B])) == 2


def test_every_committed_block_is_kept_and_the_directory_will_hear_of_it() -> None:
    store = StoreOnSlab()
    places = store.fill([A, B], payload_bytes=5_000)
    places += store.fill([C], payload_bytes=100, origin=Origin.COPY)
    after = store.restarted()
    assert [after.core.find(place.key) for place in places] == places
    assert after.core.drain_changes(10) == (places, [])


def test_pins_are_lost_and_nothing_leaks_by_it() -> None:
    store = StoreOnSlab()
    store.fill([A])
    store.pin(store.op(), [A])
    after = store.restarted()
    assert after.core.evict(A)


def test_no_generation_is_used_again() -> None:
    """The fake slab refuses it; here the mark is what the new epoch starts from."""
    store = StoreOnSlab()
    before = store.fill([A])[0]
    mark = store.slab.mark
    after = store.restarted().restarted()
    assert one_place(after.reserve(after.op(), [B])).generation >= mark > before.generation


def test_the_older_block_is_the_colder_one_after_a_restart() -> None:
    """Not the one in the lower slot: E is the youngest and has taken A's."""
    store = StoreOnSlab(extent_count=1)
    first, *_ = store.fill([A, B, C, D], payload_bytes=QUARTER)
    assert store.fill([E], payload_bytes=QUARTER)[0].slot == first.slot
    after = store.restarted()
    after.fill([A], payload_bytes=QUARTER)
    assert after.has(A, B, C, D, E) == [True, False, True, True, True]


def test_a_slot_that_was_being_written_waits_in_quarantine_for_its_writer() -> None:
    """Two engines and a fetch were at work. One engine says hello and lists its slot, the other
    engine's processes are gone, and so is the NodeStore that fetched."""
    store = StoreOnSlab(extent_count=1)
    ours = one_place(store.reserve(store.op(), [A], payload_bytes=QUARTER, writer=1))
    theirs = one_place(store.reserve(store.op(), [B], payload_bytes=QUARTER, writer=2))
    fetched = one_place(store.reserve(store.op(), [C], payload_bytes=QUARTER, writer=WRITER_NODE))
    after = store.restarted()
    core = after.core
    assert core.quarantined_by(1) == [(ours.slot, ours.generation)]
    assert core.quarantined_by(2) == [(theirs.slot, theirs.generation)]
    assert core.quarantined_by(WRITER_NODE) == [(fetched.slot, fetched.generation)]
    assert not core.is_writing(A)
    answers = after.reserve(after.op(), [D, E], payload_bytes=QUARTER)
    assert [isinstance(answer, Place) for answer in answers] == [True, False]

    back = after.op()
    assert core.restore_writing(back, ours.slot, ours.generation, writer=1)
    assert core.commit(back, ours.slot, ours.generation, after.now_ms)
    for place in (theirs, fetched):
        assert core.release(place.slot, place.generation)
    after.settle()
    assert core.find(A) == ours
    assert len(after.fill([B, C], payload_bytes=QUARTER)) == 2


def test_quarantine_outlives_a_second_restart() -> None:
    store = StoreOnSlab()
    place = one_place(store.reserve(store.op(), [A], writer=3))
    after = store.restarted().restarted()
    assert after.core.quarantined_by(3) == [(place.slot, place.generation)]
    assert not after.core.restore_writing(after.op(), place.slot, place.generation, writer=4)


def test_restored_slots_are_one_reservation_of_the_operation_that_said_hello() -> None:
    store = StoreOnSlab()
    holder = store.op()
    answers = store.reserve(holder, [A, B])
    after = store.restarted()
    back = after.op()
    for place in answers:
        assert isinstance(place, Place)
        assert after.core.restore_writing(back, place.slot, place.generation)
    after.settle()
    assert [place.key for place in after.core.abandon_reservation(back)] == [A, B]
    after.settle()


def test_slots_between_kept_ones_are_free_again() -> None:
    store = StoreOnSlab(extent_count=1)
    store.fill([A, B, C, D], payload_bytes=QUARTER)
    store.core.evict(B)
    store.core.evict(D)
    store.settle()
    after = store.restarted()
    assert len(after.fill([B, E], payload_bytes=QUARTER)) == 2
    assert after.has(A, B, C, E) == [True] * 4
    assert after.slab.extent_writes == 1, "the cut was kept"


def test_an_extent_without_blocks_keeps_its_cut_and_is_spare() -> None:
    store = StoreOnSlab(extent_count=1)
    store.fill([A], payload_bytes=QUARTER)
    store.core.clear()
    store.settle()
    after = store.restarted()
    after.fill([A], payload_bytes=QUARTER)
    assert after.slab.extent_writes == 1
    after.core.clear()
    after.settle()
    last = after.restarted()
    last.fill([B], payload_bytes=PAGE)
    assert last.slab.extent_writes == 2


def test_of_two_ready_blocks_with_one_key_the_younger_is_kept() -> None:
    """No order of effects leads there; a slab that says so is served all the same."""
    store = StoreOnSlab()
    store.fill([A])
    young = store.fill([B])[0]
    store.slab.headers["key"][young.slot] = np.void(A)
    after = store.restarted()
    found = after.core.find(A)
    assert found is not None
    assert (found.slot, found.generation) == (young.slot, young.generation)
    assert after.core.find(B) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation", 0),
        ("generation", 2**64 - 1),  # above the mark: can not have been written by us
        ("generation", 1),  # not younger than its extent's cut
        ("offset", 0),
        ("offset", 2**64 - PAGE),
        ("bytes", 0),
        ("bytes", PAGE + 1),  # of another class than its extent
        ("bytes", 2**32 - 1),
        ("state", 4),
        ("state", 2**32 - 1),
        ("origin", 2),
        ("extent_generation", 0),
        ("extent_generation", 77),
    ],
)
def test_a_damaged_header_is_not_believed(field: str, value: int) -> None:
    store = StoreOnSlab()
    _, victim, _ = store.fill([A, B, C])
    store.slab.headers[field][victim.slot] = value
    after = store.restarted()
    assert after.has(A, B, C) == [True, False, True]
    assert after.slab.state_of(victim.slot) is SlotState.ABSENT
    assert one_place(after.reserve(after.op(), [B])).slot == victim.slot


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slot_bytes", 0),
        ("slot_bytes", PAGE + 1),
        ("slot_bytes", 2 * EXTENT),
        ("slot_bytes", 2 * PAGE),  # another cut than the headers were written for
        ("extent_generation", 0),
        ("extent_generation", 2**63),
        ("extent_generation", 3),
    ],
)
def test_the_headers_of_a_damaged_extent_are_not_believed(field: str, value: int) -> None:
    store = StoreOnSlab()
    store.fill([A, B], payload_bytes=PAGE)
    store.fill([C], payload_bytes=QUARTER)
    store.slab.extents[field][0] = value
    after = store.restarted()
    assert after.has(A, B, C) == [False, False, True]
    assert after.slab.slots_in(SlotState.READY) == [16]
    assert len(after.fill([A, B], payload_bytes=PAGE)) == 2


def test_a_header_beyond_the_slots_of_its_extent_is_not_believed() -> None:
    """A leftover of a finer cut at an index that the present cut does not have."""
    store = StoreOnSlab(extent_count=1)
    place = store.fill([A], payload_bytes=QUARTER)[0]
    row: Any = store.slab.headers[place.slot].copy()
    row["offset"] += 5 * QUARTER
    row["generation"] += 1
    store.slab.headers[5] = row
    after = store.restarted()
    assert after.slab.slots_in(SlotState.READY) == [place.slot]


def test_a_reservation_whose_header_was_half_written_is_free() -> None:
    """The kill came before the answer, so nobody was told of the slot: it needs no quarantine."""
    store = StoreOnSlab(extent_count=1)
    place = one_place(store.reserve(store.op(), [A]))
    store.slab.headers["extent_generation"][place.slot] = 0
    after = store.restarted()
    assert after.core.quarantined_by(1) == []
    assert after.slab.state_of(place.slot) is SlotState.ABSENT


def test_a_slab_that_never_raised_its_mark_holds_nothing() -> None:
    """Its header page was lost with the mark: every generation could come twice."""
    slab = FakeSlab(geometry_of(2))
    store = StoreOnSlab(slab=slab)
    store.fill([A])
    slab.mark = 0
    after = store.restarted()
    assert after.has(A) == [False]
    assert slab.slots_in(SlotState.READY) == []


def test_adopting_a_full_store_leaves_it_full() -> None:
    store = StoreOnSlab(extent_count=1)
    store.fill([A, B, C, D], payload_bytes=QUARTER)
    after = store.restarted()
    reader = after.op()
    after.pin(reader, [A, B, C, D])
    assert after.reserve(after.op(), [E], payload_bytes=QUARTER) == [Grant.FULL]
    after.unpin(reader)
    one_place(after.reserve(after.op(), [E], payload_bytes=QUARTER))
