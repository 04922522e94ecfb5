"""Which bytes of a peer's slot table to read for some headers, in as few segments as pay.

    headers wanted    a b . . c . . . . . . . . . . d        (64 bytes each, by their place)
    segments          [a b . . c]                   [d]
    scratch            a b . . c d                           rows: 0 1 4 5

Headers lie in one table, 64 bytes apart: those of one prompt next to each other, those of many
scattered over it. A segment has a price of its own, so bytes that nobody wants are read along if
they are few.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvray.core.layout import HEADER_BYTES

Offsets = npt.NDArray[np.uint64]  # in bytes, from the start of a slab

# A segment costs as much as some 20 KiB of payload: 3 us over cma at 7 GB/s, 12 over TCP at 1.6
# GB/s. Of 256 headers scattered over 2 MiB of table, read over cma: 1.31 ms without gaps,
# 0.64 with 8 KiB, 0.44 with 16, 0.39 with 32; but what is read along needs scratch memory.
HEADER_GAP_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class HeaderRuns:
    """offsets: of the headers that are wanted. remote_offsets, bytes: the segments, in the order of
    the table. rows: in which row of them, laid end to end, each header comes to lie.
    """

    offsets: Offsets
    remote_offsets: Offsets
    bytes: Offsets
    rows: npt.NDArray[np.uint64]

    @property
    def row_count(self) -> int:
        """Of all rows, wanted or not."""
        return int(self.bytes.sum()) // HEADER_BYTES


def header_runs(offsets: Offsets, *, gap_bytes: int = HEADER_GAP_BYTES) -> HeaderRuns:
    """offsets: of at least one header, in any order, multiples of HEADER_BYTES apart. Two headers
    are in one run if at most gap_bytes lie between them; the same one may be wanted twice.
    """
    order = offsets.argsort()
    ascending = offsets[order]
    steps = ascending[1:] - ascending[:-1]
    is_apart = steps > HEADER_BYTES + gap_bytes
    steps[is_apart] = HEADER_BYTES  # the scratch has no gap between two runs
    ascending_rows = np.zeros(len(offsets), np.uint64)
    np.cumsum(steps // HEADER_BYTES, out=ascending_rows[1:])
    firsts = np.flatnonzero(np.concatenate(([True], is_apart)))
    ends = np.append(ascending_rows[firsts[1:]], ascending_rows[-1] + 1)
    rows = np.empty(len(offsets), np.uint64)
    rows[order] = ascending_rows
    return HeaderRuns(
        offsets=offsets,
        remote_offsets=ascending[firsts],
        bytes=(ends - ascending_rows[firsts]) * np.uint64(HEADER_BYTES),
        rows=rows,
    )
