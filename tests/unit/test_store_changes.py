"""Goal: the directory hears of every READY block and of every one that has gone, and not more.

Method: stories on a store; what is drained is what the next announce would say.
"""

from tests.fake_slab import StoreOnSlab, key_of

A, B, C, D = (key_of(number) for number in range(4))


def test_the_directory_hears_of_blocks_that_came_and_went() -> None:
    store = StoreOnSlab()
    places = store.fill([A, B])
    store.reserve(store.op(), [C])
    assert store.core.drain_changes(10) == (places, []), "C is not READY yet"
    assert store.core.drain_changes(10) == ([], [])
    store.core.evict(A)
    assert store.core.drain_changes(10) == ([], [A])


def test_a_block_that_came_and_went_unheard_is_not_mentioned() -> None:
    store = StoreOnSlab()
    store.fill([A])
    store.core.evict(A)
    assert store.core.drain_changes(10) == ([], [])


def test_a_block_that_moved_is_an_add() -> None:
    store = StoreOnSlab()
    before = store.fill([A])
    assert store.core.drain_changes(10) == (before, [])
    store.core.evict(A)
    moved = store.fill([A])
    assert store.core.drain_changes(10) == (moved, []), "it replaces what is known of A"


def test_a_block_that_moved_and_went_unheard_is_a_remove() -> None:
    """The directory still knows the place before last."""
    store = StoreOnSlab()
    store.fill([A])
    store.core.drain_changes(10)
    for _ in range(2):
        store.core.evict(A)
        store.fill([A])
    store.core.evict(A)
    assert store.core.drain_changes(10) == ([], [A])


def test_once_a_move_was_heard_the_next_end_is_a_plain_remove_and_a_new_life_can_cancel() -> None:
    store = StoreOnSlab()
    store.fill([A])
    store.core.drain_changes(10)
    store.core.evict(A)
    store.fill([A])
    store.core.drain_changes(10)
    store.core.evict(A)
    assert store.core.drain_changes(10) == ([], [A])
    store.fill([A])
    store.core.evict(A)
    assert store.core.drain_changes(10) == ([], []), "what replaced has been forgotten"


def test_removes_are_said_first_and_nothing_is_lost_between_two_drains() -> None:
    store = StoreOnSlab()
    store.fill([A, B])
    store.core.drain_changes(10)
    c, d = store.fill([C, D])
    store.core.evict(A)
    store.core.evict(B)
    assert store.core.drain_changes(1) == ([], [A])
    assert store.core.drain_changes(2) == ([c], [B])
    assert store.core.drain_changes(2) == ([d], [])
    assert store.core.drain_changes(2) == ([], [])
