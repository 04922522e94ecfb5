"""RowArray: numbered rows of one kind in one growing array.

A row that is not in use is all zeros and is given out again before the array grows. Rows 0 and 1
are nobody's (core.rowindex uses their numbers); row 0 ends chains.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvray.core.rowindex import FIRST_ROW, MAX_ROW, U32

Rows = NDArray[np.void]

MIN_ROWS = 1_024
GROWTH = 1.125  # the slack is the largest part of what memory is wasted
PIECE_ROWS = 8_192  # of `pieces`: 400 KB, which is in the CPU's caches
MAX_FREE_PIECES = 1_024  # freed rows are kept as they came; an array object costs 112 bytes


class RowArray:
    """`data[row]` is the content. The array moves when it grows: keep no view of it."""

    def __init__(self, dtype: np.dtype[np.void], *, used_field: str, max_rows: int) -> None:
        """used_field: the field that is not 0 in any row in use."""
        assert 0 < max_rows <= MAX_ROW - FIRST_ROW
        self.data: Rows = np.zeros(min(MIN_ROWS, max_rows) + FIRST_ROW, dtype)
        self.end = FIRST_ROW  # rows from here on were never used
        self._used_field: Final = used_field
        self._max_rows: Final = max_rows
        self._free: list[U32] = []
        self._free_count = 0

    def __len__(self) -> int:
        """Rows in use."""
        return self.end - FIRST_ROW - self._free_count

    @property
    def room(self) -> int:
        return self._max_rows - len(self)

    @property
    def size_bytes(self) -> int:
        return int(self.data.nbytes) + sum(rows.nbytes for rows in self._free)

    def allocate(self, count: int) -> U32:
        """Numbers of rows for the caller to fill at once; at most `room`."""
        assert count <= self.room
        pieces: list[U32] = []
        while count and self._free:
            rows = self._free.pop()
            if len(rows) > count:
                self._free.append(rows[:-count])
                rows = rows[-count:]
            pieces.append(rows)
            self._free_count -= len(rows)
            count -= len(rows)
        if count:
            stop = self.end + count
            if stop > len(self.data):
                most = self._max_rows + FIRST_ROW
                # In place (realloc): no second copy of gigabytes.
                self.data.resize(min(most, max(stop, int(stop * GROWTH))), refcheck=False)
            pieces.append(np.arange(self.end, stop, dtype=np.uint32))
            self.end = stop
        return np.concatenate(pieces) if len(pieces) != 1 else pieces[0]

    def free(self, rows: U32) -> None:
        """Clear rows and take them back."""
        self.data[rows] = 0
        if len(rows):
            self._free.append(rows)
            self._free_count += len(rows)
        if len(self._free) > MAX_FREE_PIECES:
            self._free = [np.concatenate(self._free)]

    def used(self) -> U32:
        """Numbers of all rows in use, in order."""
        return np.flatnonzero(self.data[self._used_field][: self.end]).astype(np.uint32)

    def pieces(self) -> Iterator[tuple[U32, Rows]]:
        """Numbers and content of all rows in use, in order, PIECE_ROWS or fewer at a time."""
        for start in range(FIRST_ROW, self.end, PIECE_ROWS):
            content: Rows = self.data[start : min(start + PIECE_ROWS, self.end)]
            used = np.flatnonzero(content[self._used_field])
            yield (used + start).astype(np.uint32), content.take(used)

    def check(self) -> None:
        used = self.used()
        free = np.concatenate([*self._free, np.zeros(0, np.uint32)])
        assert len(used) == len(self) <= self._max_rows, "rows are counted wrong"
        assert len(free) == self._free_count, "free rows are counted wrong"
        everything = np.sort(np.concatenate([used, free]))
        assert np.array_equal(everything, np.arange(FIRST_ROW, self.end)), "free and used, or lost"
        for name in self.data.dtype.names or ():
            column = self.data[name]
            unused = (column[:FIRST_ROW], column[free], column[self.end :])
            assert not any(values.any() for values in unused), "an unused row has content"
