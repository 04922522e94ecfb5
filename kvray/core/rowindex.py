"""RowIndex: from a hash to a row number, many at a time.

Open addressing in one array of 32-bit numbers; the rows themselves, with their keys, are somebody
else's. All verbs take arrays, so that a batch of thousands costs a few dozen numpy calls.

    table[at]   EMPTY: never used    DELETED: was used, look further    else: a row number

The probes of one hash step by 1, 2, 3, ...: over a table of 2^n places they come to every one of
them. Rows 0 and 1 are never anybody's: their numbers mean EMPTY and DELETED here.
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

MIN_PLACES = 1_024
# At 0.6 the average miss needs three probes, and the worst of a batch of 4,096 about twenty.
MAX_FILL = 0.6
# After a rebuild. Doubling takes it to half of that: 9 to 18 bytes a row, 7 just before the next.
MAX_FILL_REBUILT = 0.45


class RowIndex:
    """Where hashes lead. The caller keeps hash and row of each other consistent: a row is put in
    once, under one hash, and taken out or replaced under the same.
    """

    def __init__(self) -> None:
        self._table: U32 = np.zeros(MIN_PLACES, np.uint32)
        self._row_count = 0
        self._used_count = 0  # places that are not EMPTY

    @property
    def size_bytes(self) -> int:
        return int(self._table.nbytes)

    def __len__(self) -> int:
        return self._row_count

    def has_room(self, count: int) -> bool:
        """Whether so many rows can be put in; if not, `rebuild` first."""
        return self._used_count + count <= MAX_FILL * len(self._table)

    def find(self, hashes: U64, same: Callable[[Indices, U32], Bools]) -> U32:
        """The row of each hash for which same(index into hashes, row) holds; EMPTY if none.

        same is called with rows that have been deleted, too, as row DELETED: it may say anything.
        """
        found: U32 = np.zeros(len(hashes), np.uint32)
        todo, at = self._begin(hashes)
        step = 0
        while todo.size:
            rows = self._table[at]
            hit = same(todo, rows)
            hit &= rows > DELETED
            found[todo[hit]] = rows[hit]
            todo, at, step = self._step(~hit & (rows != EMPTY), todo, at, step)
        return found

    def put(self, hashes: U64, rows: U32) -> None:
        """Rows that are not in the index yet, all different."""
        assert self.has_room(len(rows)), "rebuild first"
        todo, at = self._begin(hashes)
        step = 0
        while todo.size:
            before = self._table[at]
            free = before <= DELETED
            # Several may write to one place: one of them stays there, the others go on.
            self._table[at[free]] = rows[todo[free]]
            done = free & (self._table[at] == rows[todo])
            self._used_count += int(np.count_nonzero(done & (before == EMPTY)))
            todo, at, step = self._step(~done, todo, at, step)
        self._row_count += len(rows)

    def replace(self, hashes: U64, rows: U32, new_rows: U32) -> None:
        """Put new_rows where rows are."""
        self._table[self._places(hashes, rows)] = new_rows

    def remove(self, hashes: U64, rows: U32) -> None:
        self._table[self._places(hashes, rows)] = DELETED
        self._row_count -= len(rows)

    def rebuild(self, hashes: U64, rows: U32, *, room_for: int) -> None:
        """Start again with all rows of the index, and room for more; nothing is left of DELETED.

        Takes about 0.15 us a row.
        """
        assert len(rows) == self._row_count
        places = MIN_PLACES
        while (len(rows) + room_for) > MAX_FILL_REBUILT * places:
            places *= 2
        self._table = np.zeros(places, np.uint32)
        self._row_count = self._used_count = 0
        self.put(hashes, rows)

    def rows(self) -> U32:
        """All rows, in no order."""
        return self._table[self._table > DELETED]

    def _begin(self, hashes: U64) -> tuple[Indices, Indices]:
        # The upper bits of the product depend on all bits of the hash.
        shift = np.uint64(65 - len(self._table).bit_length())
        return np.arange(len(hashes)), ((hashes * SPREAD) >> shift).astype(np.intp)

    def _step(
        self, go_on: Bools, todo: Indices, at: Indices, step: int
    ) -> tuple[Indices, Indices, int]:
        """Each probe that goes on, at its next place."""
        step += 1
        assert step <= len(self._table), "a probe has seen the whole table"
        return todo[go_on], (at[go_on] + step) & (len(self._table) - 1), step

    def _places(self, hashes: U64, rows: U32) -> Indices:
        """Where these rows are; they must be there."""
        places: Indices = np.empty(len(rows), np.intp)
        todo, at = self._begin(hashes)
        step = 0
        while todo.size:
            seen = self._table[at]
            hit = seen == rows[todo]
            assert not (seen == EMPTY).any(), "a row is not in the index"
            places[todo[hit]] = at[hit]
            todo, at, step = self._step(~hit, todo, at, step)
        return places

    def check(self) -> None:
        rows = self.rows()
        assert len(rows) == self._row_count == len(np.unique(rows)), "rows are counted wrong"
        assert int(np.count_nonzero(self._table)) == self._used_count, "places are counted wrong"
        assert self._used_count < len(self._table), "a miss would not end"
