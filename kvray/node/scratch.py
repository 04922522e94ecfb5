"""Memory that slot headers of peers are read into, until they have been copied out.

    take(rows) ──▶ a read fills it ──▶ rows() ──▶ give_back
                        │                            ▲
                        └── abandoned: it stays ─────┘ only when the read has ended

A read that is late may write at any time, so its rows are nobody else's until its end is known
(rule 3). It is a fixed number of regions; who finds none is refused, and misses.
"""

import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvray.core.commands import Headers
from kvray.core.layout import HEADER_BYTES, PAGE_BYTES, SLOT_HEADER_DTYPE

ROWS_PER_REGION = PAGE_BYTES // HEADER_BYTES
# 16 batches of 32 MiB in slots of 32 KiB, or one in the smallest slots there are, at a time. Reads
# that do not end keep theirs, so this is also what a silent network can take.
REGION_COUNT = 256


class HeaderScratch:
    """Page-aligned and zeroed. One thread makes all calls."""

    def __init__(self, region_count: int = REGION_COUNT) -> None:
        self.region_count = region_count
        self.length_bytes = region_count * PAGE_BYTES
        self._rows: Headers = np.frombuffer(mmap.mmap(-1, self.length_bytes), SLOT_HEADER_DTYPE)
        self.address = int(self._rows.ctypes.data)
        self._free = list(range(region_count))

    @property
    def free_count(self) -> int:
        return len(self._free)

    def take(self, row_count: int) -> tuple[int, ...] | None:
        """Regions for so many rows, or None if there are not enough free ones."""
        count = -(-row_count // ROWS_PER_REGION)
        if count > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(count))

    def addresses(self, regions: Sequence[int], row_count: int) -> npt.NDArray[np.uint64]:
        """Of each of the first row_count rows."""
        index = self._row_indices(regions, row_count)
        return np.uint64(self.address) + index * np.uint64(HEADER_BYTES)

    def rows(self, regions: Sequence[int], row_count: int) -> Headers:
        """A copy of the first row_count rows."""
        copied: Headers = self._rows[self._row_indices(regions, row_count)]
        return copied

    def give_back(self, regions: Sequence[int]) -> None:
        """The read that had them has ended."""
        self._free.extend(regions)

    def _row_indices(self, regions: Sequence[int], row_count: int) -> npt.NDArray[np.uint64]:
        starts = np.array(regions, np.uint64) * np.uint64(ROWS_PER_REGION)
        within = np.arange(ROWS_PER_REGION, dtype=np.uint64)
        return (starts[:, None] + within).ravel()[:row_count]

    def check(self, taken: Sequence[int]) -> None:
        """Assert that each region is either free or among those that reads have taken."""
        assert sorted([*self._free, *taken]) == list(range(self.region_count))
