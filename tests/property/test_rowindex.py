"""Goal: a RowIndex is a dict from (hash, row) to row, however full its buckets have been.

Method: a hypothesis machine does the same to a RowIndex and to a dict. A few hashes share all of
its rows, so that buckets are full, are left and become free again.
"""

from random import Random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvray.core.rowindex import (
    BUCKET_PLACES,
    EMPTY,
    FIRST_ROW,
    MAX_FILL,
    MAX_ROW,
    MIN_BUCKETS,
    U32,
    U64,
    Bools,
    Indices,
    RowIndex,
)

HASHES = [0, 1, 2, 2**63, 2**64 - 1]
hashes = st.sampled_from(HASHES)
MOST = 4 * BUCKET_PLACES * len(HASHES)  # four full buckets for each hash


class RowIndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = RowIndex()
        self.hash_of: dict[int, int] = {}  # of each row that is in the index
        self.next_row = FIRST_ROW

    @precondition(lambda self: len(self.hash_of) < MOST)
    @rule(new=st.lists(hashes, max_size=3 * BUCKET_PLACES))
    def put(self, new: list[int]) -> None:
        rows = range(self.next_row, self.next_row + len(new))
        self.next_row = rows.stop
        if not self.index.has_room(len(new)):
            self.start_again(len(new))
        self.index.put(_hashes(new), _rows(list(rows)))
        self.hash_of |= dict(zip(rows, new, strict=True))

    @rule(dice=st.randoms(use_true_random=False), share=st.integers(1, 3))
    def remove(self, dice: Random, share: int) -> None:
        gone = dice.sample(sorted(self.hash_of), len(self.hash_of) // share)
        self.index.remove(_hashes([self.hash_of.pop(row) for row in gone]), _rows(gone))

    @rule(count=st.integers(0, BUCKET_PLACES))
    def replace(self, count: int) -> None:
        old = sorted(self.hash_of)[:count]
        new = list(range(self.next_row, self.next_row + len(old)))
        self.next_row += len(old)
        under = [self.hash_of.pop(row) for row in old]
        self.index.replace(_hashes(under), _rows(old), _rows(new))
        self.hash_of |= dict(zip(new, under, strict=True))

    @rule(room_for=st.integers(0, 2_000))
    def start_again(self, room_for: int) -> None:
        self.index.start_again(len(self.hash_of) + room_for)
        self.index.put(_hashes(list(self.hash_of.values())), _rows(list(self.hash_of)))

    @rule()
    def find_all_and_nothing_else(self) -> None:
        """Each row under its own hash, and under none of the others."""
        rows = _rows(sorted(self.hash_of))
        for under in HASHES:
            found = self.index.find(
                _hashes([under] * len(rows)), lambda asked, seen: rows[asked] == seen
            )
            expected = [row if self.hash_of[row] == under else EMPTY for row in rows.tolist()]
            # Hashes that share a bucket and a tag may lead to each other's rows: the key tells.
            strangers = (found != expected).nonzero()[0]
            assert all(found[at] == rows[at] for at in strangers)
            assert not any(expected[at] for at in strangers), "a row is not found"

    @invariant()
    def same(self) -> None:
        assert sorted(self.index.rows().tolist()) == sorted(self.hash_of)
        assert len(self.index) == len(self.hash_of)
        self.index.check()


def _hashes(values: list[int]) -> U64:
    return np.array(values, np.uint64)


def _rows(values: list[int]) -> U32:
    return np.array(values, np.uint32)


TestRowIndex = RowIndexMachine.TestCase
TestRowIndex.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_greatest_row_number_is_told_from_a_hash() -> None:
    index = RowIndex()
    index.put(_hashes(HASHES), _rows([MAX_ROW - n for n in range(len(HASHES))]))
    found = index.find(_hashes(HASHES), lambda asked, seen: seen == MAX_ROW - asked)
    assert found.tolist() == [MAX_ROW - n for n in range(len(HASHES))]


def test_rows_that_come_and_go_leave_nothing_in_buckets_that_were_never_full() -> None:
    index = RowIndex()
    dice = np.random.default_rng(5)
    for start in range(FIRST_ROW, 20_000, 100):
        new, rows = dice.integers(0, 2**63, 100).astype(np.uint64), np.arange(start, start + 100)
        assert index.has_room(100), "no place is lost"
        index.put(new, rows.astype(np.uint32))
        index.remove(new, rows.astype(np.uint32))
    assert index.has_room(int(0.9 * MAX_FILL * MIN_BUCKETS * BUCKET_PLACES))


def test_however_full_an_index_is_a_batch_takes_few_looks() -> None:
    """Goal: the time of a look-up, which is that of its worst key, does not grow with the fill."""
    index, dice = RowIndex(), np.random.default_rng(6)
    index.start_again(400_000)
    known = dice.integers(0, 2**63, 1_000_000).astype(np.uint64)
    stop = FIRST_ROW
    while index.has_room(1_000):
        index.put(known[stop : stop + 1_000], np.arange(stop, stop + 1_000, dtype=np.uint32))
        stop += 1_000
    looks = 0

    def same(asked: Indices, rows: U32) -> Bools:
        nonlocal looks
        looks += 1
        equal: Bools = known[rows] == known[wanted[asked]]
        return equal

    wanted = dice.integers(FIRST_ROW, stop, 4_096)
    assert np.array_equal(index.find(known[wanted], same), wanted)
    assert looks <= 6
