"""RowIndex: from a hash to a row number, many at a time.

Open addressing in buckets of eight 32-bit places; the rows themselves, with their keys, are
somebody else's. All verbs take arrays, so that a batch of thousands costs a few dozen numpy calls.

    place   EMPTY: never used    DELETED: was used    else: 6 bits of the hash, 26 of a row number

A hash leads to one bucket, and from a full one to the next. So a look-up ends at the first bucket
with an EMPTY place, which has never been full since the last `start_again`: what is removed from it
leaves EMPTY, and what is removed from a full one leaves DELETED.

Why buckets: numpy takes 32 bytes as fast as 4, and looks at eight places in one call; one at a time
a batch needs as many rounds as its worst key has probes. Why bits of the hash: 63 of 64 other rows
in a bucket are told apart without a look at their keys, which is a cache miss each.

Rows 0 and 1 are never anybody's: their numbers mean EMPTY and DELETED here.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]

EMPTY: Final = 0
DELETED: Final = 1
FIRST_ROW: Final = 2
SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads numbers in a row

ROW_BITS: Final = 26
MAX_ROW: Final = 2**ROW_BITS - 1
_TAG_SHIFT: Final = np.uint64(8)
_TAG_MASK: Final = np.uint32(~MAX_ROW & 0xFFFFFFFF)
BUCKET_BITS: Final = 3
BUCKET_PLACES: Final = 2**BUCKET_BITS
MIN_BUCKETS: Final = 128
# One bucket in eight is full then, and the worst of a batch of 4,096 looks at four. Each look more
# is a dozen numpy calls for the whole batch: at 0.8 the worst looks at fourteen.
MAX_FILL: Final = 0.6
# After `start_again`. Doubling takes it to half of that: 6.7 to 16 bytes a row.
MAX_FILL_AT_START: Final = 0.5


class RowIndex:
    """Where hashes lead. The caller keeps hash and row of each other consistent: a row is put in
    once, under one hash, and taken out or replaced under the same.
    """

    def __init__(self) -> None:
        self._table: U32 = np.zeros((0, BUCKET_PLACES), np.uint32)
        self._make_table(MIN_BUCKETS)
        self._row_count = 0
        self._used_count = 0  # places that are not EMPTY

    @property
    def size_bytes(self) -> int:
        return int(self._table.nbytes)

    def __len__(self) -> int:
        return self._row_count

    def has_room(self, count: int) -> bool:
        """Whether so many rows can be put in; if not, `start_again` first."""
        return self._used_count + count <= MAX_FILL * self._table.size

    def find(self, hashes: U64, same: Callable[[Indices, U32], Bools]) -> U32:
        """The row of each hash for which same(index into hashes, row) holds; EMPTY if none.

        same is called with rows 0 and 1, too: there it may say anything.
        """
        found: U32 = np.zeros(len(hashes), np.uint32)
        todo, buckets, tags = self._begin(hashes)
        step = 0
        while todo.size:
            content = self._table.take(buckets, axis=0)
            # Without its tag, a place of this hash is a row number, and any other is greater.
            rows = (content ^ tags[:, np.newaxis]).ravel()
            places = (rows <= MAX_ROW).nonzero()[0]
            rows = rows[places]
            of = todo[places >> BUCKET_BITS]
            hit = same(of, rows)
            hit &= rows > DELETED
            rows = rows[hit]
            if len(rows) == len(hashes):  # all of them at the first look, in their order
                return rows
            found[of[hit]] = rows
            go_on = (found[todo] == EMPTY).nonzero()[0]
            if not go_on.size:
                break
            go_on = go_on[~_any_of_bucket(content.take(go_on, axis=0) == EMPTY)]
            todo, tags = todo[go_on], tags[go_on]
            buckets, step = self._next(buckets[go_on], step)
        return found

    def put(self, hashes: U64, rows: U32) -> None:
        """Rows that are not in the index yet, all different."""
        assert self.has_room(len(rows)), "start again first"
        todo, buckets, tags = self._begin(hashes)
        places: U32 = tags | rows
        table = self._table.reshape(-1)
        while todo.size:
            free = self._table.take(buckets, axis=0) <= DELETED
            has_free = _any_of_bucket(free)
            at = buckets * BUCKET_PLACES + free.argmax(axis=1)
            before = table[at]
            # Several may write to one place: one of them stays there, the others look again.
            table[at[has_free]] = places[has_free]
            done = has_free & (table[at] == places)
            self._used_count += int(np.count_nonzero(done & (before == EMPTY)))
            buckets += ~has_free
            buckets &= len(self._table) - 1
            go_on = ~done
            todo, buckets, places = todo[go_on], buckets[go_on], places[go_on]
        self._row_count += len(rows)

    def replace(self, hashes: U64, rows: U32, new_rows: U32) -> None:
        """Put new_rows where rows are."""
        places, _ = self._places(hashes, rows)
        _, _, tags = self._begin(hashes)
        self._table.reshape(-1)[places] = tags | new_rows

    def remove(self, hashes: U64, rows: U32) -> None:
        places, was_full = self._places(hashes, rows)
        self._table.reshape(-1)[places] = np.where(was_full, DELETED, EMPTY)
        self._used_count -= len(rows) - int(np.count_nonzero(was_full))
        self._row_count -= len(rows)

    def start_again(self, count: int) -> None:
        """An empty index with room for so many rows, which the caller puts in piece by piece."""
        buckets = MIN_BUCKETS
        while count > MAX_FILL_AT_START * buckets * BUCKET_PLACES:
            buckets *= 2
        if buckets == len(self._table):
            self._table[:] = EMPTY
        else:
            self._table = np.zeros((0, BUCKET_PLACES), np.uint32)  # never both in memory
            self._make_table(buckets)
        self._row_count = self._used_count = 0

    def _make_table(self, buckets: int) -> None:
        self._table = np.zeros((buckets, BUCKET_PLACES), np.uint32)
        self._shift = np.uint64(65 - buckets.bit_length())

    def rows(self) -> U32:
        """All rows, in no order."""
        rows: U32 = self._table[self._table > DELETED] & np.uint32(MAX_ROW)
        return rows

    def _begin(self, hashes: U64) -> tuple[Indices, Indices, U32]:
        """For each hash its index, its bucket and its tag (6 bits, above those of a row)."""
        # The upper bits of the product depend on all bits of the hash. A table for MAX_ROW rows
        # has 2^24 buckets: 24 bits, and the tag is made of bits 34 to 39.
        mixed = hashes * SPREAD
        buckets = (mixed >> self._shift).view(np.intp)
        tags: U32 = (mixed >> _TAG_SHIFT).astype(np.uint32) & _TAG_MASK
        return np.arange(len(hashes)), buckets, tags

    def _next(self, buckets: Indices, step: int) -> tuple[Indices, int]:
        assert step < len(self._table), "a look-up has seen the whole table"
        return (buckets + 1) & (len(self._table) - 1), step + 1

    def _places(self, hashes: U64, rows: U32) -> tuple[Indices, Bools]:
        """Where these rows are, which must be there, and whether their buckets have no EMPTY."""
        found: Indices = np.zeros(len(rows), np.intp)
        was_full: Bools = np.zeros(len(rows), np.bool_)
        todo, buckets, tags = self._begin(hashes)
        wanted = tags | rows
        step = 0
        while todo.size:
            content = self._table.take(buckets, axis=0)
            hit = content == wanted[:, np.newaxis]
            full = ~_any_of_bucket(content == EMPTY)
            at = np.flatnonzero(hit.ravel())
            of = at >> BUCKET_BITS
            found[todo[of]] = buckets[of] * BUCKET_PLACES + at % BUCKET_PLACES
            was_full[todo[of]] = full[of]
            go_on = np.flatnonzero(~_any_of_bucket(hit))
            assert full[go_on].all(), "a row is not in the index"
            todo, wanted = todo[go_on], wanted[go_on]
            buckets, step = self._next(buckets[go_on], step)
        return found, was_full

    def check(self) -> None:
        rows = self.rows()
        assert len(rows) == self._row_count == len(np.unique(rows)), "rows are counted wrong"
        assert int(np.count_nonzero(self._table)) == self._used_count, "places are counted wrong"
        assert self._used_count < self._table.size, "a miss would not end"


def _any_of_bucket(places: Bools) -> Bools:
    """any(axis=1), ten times as fast: eight bools are one number."""
    found: Bools = np.ascontiguousarray(places).view(np.uint64).reshape(-1) != 0
    return found
