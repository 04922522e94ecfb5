"""Memory that slot headers of peers are read into, until they have been copied out.

    take(row_count) ──▶ a read fills it ──▶ rows() ──▶ give_back
                        │                            ▲
                        └── abandoned: it stays ─────┘ only when the read has ended

A read that is late may write at any time, so its rows are nobody else's until its end is known
(rule 3). It is a fixed number of pages; who finds none is refused, and misses.
"""

import mmap
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvray.core.commands import Headers
from kvray.core.layout import HEADER_BYTES, PAGE_BYTES, SLOT_HEADER_DTYPE

ROWS_PER_PAGE = PAGE_BYTES // HEADER_BYTES
# 16 MiB, touched as far as it is used: four reads of 256 headers that are scattered as widely as is
# still read in runs (core.header_runs), or a thousand of 256 neighbours. Reads that do not end keep
# theirs, so this is also what a silent network can take.
PAGE_COUNT = 4_096


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Pages that follow one another, of one read."""

    first_page: int
    page_count: int

    @property
    def stop(self) -> int:
        return self.first_page + self.page_count


class HeaderScratch:
    """Page-aligned and zeroed. One thread makes all calls."""

    def __init__(self, page_count: int = PAGE_COUNT) -> None:
        self.page_count = page_count
        self.length_bytes = page_count * PAGE_BYTES
        self._rows: Headers = np.frombuffer(mmap.mmap(-1, self.length_bytes), SLOT_HEADER_DTYPE)
        self.address = int(self._rows.ctypes.data)
        self._taken: list[Span] = []  # ascending; as many as there are reads of headers

    @property
    def free_count(self) -> int:
        """Pages."""
        return self.page_count - sum(span.page_count for span in self._taken)

    def take(self, row_count: int) -> Span | None:
        """Pages for so many rows, the first that fit; None if there are none."""
        page_count = -(-row_count // ROWS_PER_PAGE)
        first_page = 0
        for span in self._taken:
            if span.first_page - first_page >= page_count:
                break
            first_page = span.stop
        if first_page + page_count > self.page_count:
            return None
        taken = Span(first_page, page_count)
        insort(self._taken, taken)
        return taken

    def address_of(self, span: Span) -> int:
        """Of its first row; the others follow."""
        return self.address + span.first_page * PAGE_BYTES

    def rows(self, span: Span, indices: npt.NDArray[np.uint64]) -> Headers:
        """A copy of these rows of it."""
        copied: Headers = self._rows[indices + np.uint64(span.first_page * ROWS_PER_PAGE)]
        return copied

    def give_back(self, span: Span) -> None:
        """The read that had it has ended."""
        self._taken.remove(span)

    def check(self, spans: Iterable[Span]) -> None:
        """Assert that exactly these are taken, and that no page is in two of them."""
        assert sorted(spans) == self._taken
        stops = [0, *(span.stop for span in self._taken)]
        starts = [*(span.first_page for span in self._taken), self.page_count]
        assert all(stop <= start for stop, start in zip(stops, starts, strict=True))
