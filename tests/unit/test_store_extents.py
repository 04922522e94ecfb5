"""Goal: models with different chunk sizes share one slab, and none can starve or thrash another.

Method: stories on small slabs; a write of an extent's descriptor is counted, since each one that
takes from another class costs that class an extent of blocks. The rule: kvray/core/extents.py.
"""

import pytest

from kvray.core.effects import Place, WriteExtent, WriteHeader
from kvray.core.ids import BlockKey, ExtentIndex, Origin, SlotState
from kvray.core.messages import Grant
from kvray.core.store import StoreLimits
from tests.fake_slab import EXTENT, PAGE, FakeSlab, StoreOnSlab, geometry_of, key_of

QUARTER = EXTENT // 4  # 4 slots an extent
EIGHTH = EXTENT // 8  # 8 slots an extent
REST_MS = StoreLimits().recut_rest_ms


class Stream:
    """Keys that never come twice: the pressure of a model whose working set is too large."""

    def __init__(self, store: StoreOnSlab, payload_bytes: int, *, first: int) -> None:
        self.store = store
        self.payload_bytes = payload_bytes
        self.next = first

    def put(self, count: int) -> int:
        """How many of so many new blocks found room."""
        keys = [key_of(self.next + number) for number in range(count)]
        self.next += count
        holder = self.store.op()
        answers = self.store.reserve(holder, keys, payload_bytes=self.payload_bytes)
        places = [answer for answer in answers if isinstance(answer, Place)]
        for place in places:
            self.store.core.commit(holder, place.slot, place.generation, self.store.now_ms)
        self.store.settle()
        return len(places)

    def pin(self, key: BlockKey) -> None:
        self.store.pin(self.store.op(), [key])


def extents_of(store: StoreOnSlab) -> dict[int, int]:
    return {row["slot_bytes"]: row["extents"] for row in store.core.snapshot()["classes"]}


def streams(store: StoreOnSlab) -> tuple[Stream, Stream]:
    return Stream(store, QUARTER, first=0), Stream(store, EIGHTH, first=5_000)


def test_sizes_on_the_same_pages_share_a_class() -> None:
    store = StoreOnSlab(extent_count=1)
    store.fill([key_of(1)], payload_bytes=PAGE - 10)
    store.fill([key_of(2)], payload_bytes=PAGE)
    assert store.slab.extent_writes == 1


def test_an_extent_that_was_never_cut_is_used_before_anything_is_evicted() -> None:
    store = StoreOnSlab(extent_count=3)
    wide, narrow = streams(store)
    assert wide.put(4) + narrow.put(8) + wide.put(4) == 16
    assert store.slab.evicted == []
    assert extents_of(store) == {QUARTER: 2, EIGHTH: 1}


def test_an_extent_whose_last_block_is_gone_serves_any_size() -> None:
    store = StoreOnSlab(extent_count=1)
    wide, narrow = streams(store)
    wide.put(2)
    assert narrow.put(1) == 0, "it has blocks, and was cut just now"
    store.core.clear()
    assert narrow.put(8) == 8
    assert extents_of(store) == {EIGHTH: 1}


def test_a_half_full_extent_is_filled_before_a_spare_one() -> None:
    """So that spare extents stay spare, for others."""
    store = StoreOnSlab(extent_count=2)
    wide, narrow = streams(store)
    wide.put(8)
    for number in (0, 1, 2, 3, 4):
        store.core.evict(key_of(number))
    store.settle()
    wide.put(1)
    assert narrow.put(8) == 8
    assert store.has(*map(key_of, range(5, 9))) == [True] * 4


def test_the_header_of_the_new_size_comes_after_the_descriptor_and_that_after_all_evictions() -> (
    None
):
    """The order in which a reader, and a restart, may see them."""
    store = StoreOnSlab(extent_count=2)
    wide, _ = streams(store)
    wide.put(8)
    store.core.reserve(
        store.op(), [(key_of(9_000), PAGE)], writer=1, origin=Origin.ORIGINAL, now_ms=store.now_ms
    )
    effects = store.core.drain_effects()
    kinds = [e.state if isinstance(e, WriteHeader) else type(e) for e in effects]
    assert kinds == [*[SlotState.ABSENT] * 4, WriteExtent, SlotState.WRITING]


def test_a_class_below_its_share_takes_from_one_above() -> None:
    store = StoreOnSlab(extent_count=4)
    wide, narrow = streams(store)
    wide.put(16)
    assert extents_of(store) == {QUARTER: 4}
    assert narrow.put(32) == 16
    assert extents_of(store) == {QUARTER: 2, EIGHTH: 2}
    assert wide.put(16) == 8, "what it still has serves it"
    assert extents_of(store) == {QUARTER: 2, EIGHTH: 2}


def test_two_classes_under_pressure_settle_at_their_shares_and_cut_nothing_any_more() -> None:
    """Both write without end, in bursts larger than what they have."""
    store = StoreOnSlab(extent_count=5)
    wide, narrow = streams(store)
    for _ in range(4):
        wide.put(16)
        narrow.put(40)
    settled = store.slab.extent_writes
    for _ in range(50):
        store.now_ms += REST_MS // 3
        assert wide.put(16) >= 8
        assert narrow.put(40) >= 16
    assert store.slab.extent_writes == settled
    assert sorted(extents_of(store).values()) == [2, 3]


def test_a_class_without_pressure_keeps_what_it_has_below_its_share() -> None:
    store = StoreOnSlab(extent_count=4)
    wide, narrow = streams(store)
    narrow.put(8)
    for _ in range(20):
        wide.put(16)
    assert extents_of(store) == {QUARTER: 3, EIGHTH: 1}
    assert all(store.has(*map(key_of, range(5_000, 5_008))))


def test_the_extent_that_loses_the_fewest_warm_blocks_is_taken() -> None:
    store = StoreOnSlab(extent_count=2)
    wide, narrow = streams(store)
    wide.put(8)
    first, second = [key_of(n) for n in range(4)], [key_of(n) for n in range(4, 8)]
    store.core.touch(first, store.now_ms)
    narrow.put(1)
    assert store.has(*first, *second) == [True] * 4 + [False] * 4


def test_a_block_that_is_coldest_of_all_does_not_take_its_warm_neighbours_along() -> None:
    """Twenty extents of sixteen. The first one holds the coldest block and fifteen warm ones, the
    second one only cold ones."""
    store = StoreOnSlab(extent_count=20)
    pages = Stream(store, PAGE, first=0)
    wide = Stream(store, QUARTER, first=5_000)
    pages.put(20 * 16)
    warm = [key_of(number) for number in range(1, 16)]
    store.core.touch(warm, store.now_ms)
    assert wide.put(1) == 1
    assert all(store.has(*warm))
    assert not any(store.has(*map(key_of, range(16, 32))))


def test_an_extent_in_use_is_not_taken() -> None:
    """A reader in each of two extents, a writer in the third, a quarantined slot in the fourth."""
    store = StoreOnSlab(extent_count=5)
    wide, narrow = streams(store)
    wide.put(20)
    wide.pin(key_of(0))
    wide.pin(key_of(4))
    store.core.evict(key_of(9))
    writing = store.reserve(store.op(), [key_of(400)], payload_bytes=QUARTER)
    assert isinstance(writing[0], Place)
    store.core.evict(key_of(13))
    store.settle()
    lost = store.reserve(store.op(), [key_of(401)], payload_bytes=QUARTER)
    assert isinstance(lost[0], Place)
    store.core.quarantine(lost[0].slot, lost[0].generation)
    store.settle()

    assert narrow.put(8) == 8
    assert narrow.put(8) == 8, "it evicts its own: there is no other extent to be had"
    assert extents_of(store) == {QUARTER: 4, EIGHTH: 1}
    assert store.has(key_of(0), key_of(4)) == [True, True]
    assert not any(store.has(*map(key_of, range(16, 20)))), "only the idle extent went"


def test_a_class_that_nobody_uses_any_more_loses_its_share() -> None:
    """Its model is gone. What is left of it is colder than anything of the other class."""
    store = StoreOnSlab(extent_count=4)
    wide, narrow = streams(store)
    wide.put(8)
    narrow.put(16)
    store.now_ms += REST_MS
    for _ in range(4):
        store.now_ms += 1
        narrow.put(16)
    assert extents_of(store) == {EIGHTH: 4}


def test_a_class_between_two_uses_is_not_idle_however_much_the_other_one_writes() -> None:
    """The writer turns its own blocks over many times meanwhile, so that all are younger."""
    store = StoreOnSlab(extent_count=4)
    wide, narrow = streams(store)
    wide.put(8)
    narrow.put(16)
    for _ in range(9):
        store.now_ms += REST_MS // 10
        narrow.put(16)
    assert extents_of(store) == {QUARTER: 2, EIGHTH: 2}


def test_a_class_that_is_read_keeps_its_share() -> None:
    store = StoreOnSlab(extent_count=4)
    wide, narrow = streams(store)
    wide.put(8)
    narrow.put(16)
    for _ in range(10):
        store.now_ms += REST_MS // 2
        wide.pin(key_of(0))
        narrow.put(16)
    assert extents_of(store) == {QUARTER: 2, EIGHTH: 2}


def test_an_idle_class_loses_nothing_to_a_class_whose_own_coldest_block_is_older() -> None:
    """LRU across the classes: the asking class gives its own up first."""
    store = StoreOnSlab(extent_count=4)
    wide, narrow = streams(store)
    narrow.put(16)
    store.now_ms += 10
    wide.put(8)
    store.now_ms += REST_MS
    narrow.put(8)
    assert extents_of(store) == {QUARTER: 2, EIGHTH: 2}
    assert all(store.has(*map(key_of, range(8))))


def test_more_classes_than_extents_take_turns_and_a_turn_has_a_least_length() -> None:
    store = StoreOnSlab(extent_count=1)
    wide, narrow = streams(store)
    turns = []
    for _ in range(100):
        store.now_ms += REST_MS // 20
        turns.append((wide.put(4) == 4, narrow.put(8) == 8))
    assert store.slab.extent_writes <= 6, "five rests have passed"
    assert sum(w for w, _ in turns) >= 20
    assert sum(n for _, n in turns) >= 20


def test_a_store_of_one_full_class_answers_full_and_not_with_an_eviction() -> None:
    store = StoreOnSlab(extent_count=1)
    wide, narrow = streams(store)
    wide.put(4)
    answers = store.reserve(store.op(), [key_of(900)], payload_bytes=EIGHTH)
    assert answers == [Grant.FULL]
    assert store.slab.evicted == []
    store.now_ms += REST_MS
    assert narrow.put(1) == 1


def test_the_fake_slab_refuses_to_cut_an_extent_in_use() -> None:
    """The test of the test: what all of the above relies on."""
    store = StoreOnSlab(slab=FakeSlab(geometry_of(1)))
    store.fill([key_of(0)])
    cut = WriteExtent(ExtentIndex(0), store.slab.mark - 1, QUARTER)
    with pytest.raises(AssertionError, match="not ABSENT"):
        store.slab.apply(cut)
