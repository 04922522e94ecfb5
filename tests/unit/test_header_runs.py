"""Which bytes are read for some headers: each header once at least, in few segments, and where it
then lies.
"""

import numpy as np
import pytest

from kvray.core.header_runs import HEADER_GAP_BYTES, HeaderRuns, header_runs
from kvray.core.layout import HEADER_BYTES, PAGE_BYTES
from kvray.node.scratch import ROWS_PER_PAGE, HeaderScratch, Span

GAP_HEADERS = HEADER_GAP_BYTES // HEADER_BYTES


def runs_of(*slots: int, gap_bytes: int = HEADER_GAP_BYTES) -> HeaderRuns:
    """Of the headers of these slots, in a table that starts at 4096."""
    offsets = np.array([4096 + slot * HEADER_BYTES for slot in slots], np.uint64)
    return header_runs(offsets, gap_bytes=gap_bytes)


def slots_read(runs: HeaderRuns) -> list[int]:
    """The slot of each row, segments laid end to end."""
    return [
        (int(offset) - 4096) // HEADER_BYTES + row
        for offset, size in zip(runs.remote_offsets, runs.bytes, strict=True)
        for row in range(int(size) // HEADER_BYTES)
    ]


def test_neighbours_are_one_segment_in_whatever_order_they_are_wanted() -> None:
    runs = runs_of(7, 5, 6, 8)
    assert runs.remote_offsets.tolist() == [4096 + 5 * HEADER_BYTES]
    assert runs.bytes.tolist() == [4 * HEADER_BYTES]
    assert runs.rows.tolist() == [2, 0, 1, 3]


def test_a_gap_is_read_along_up_to_its_limit_and_not_beyond() -> None:
    assert len(runs_of(0, GAP_HEADERS + 1).bytes) == 1
    apart = runs_of(GAP_HEADERS + 2, 0)
    assert apart.bytes.tolist() == [HEADER_BYTES, HEADER_BYTES]
    assert apart.rows.tolist() == [1, 0], "what lies between them is not in the scratch either"


def test_without_gaps_nothing_is_read_that_nobody_wants() -> None:
    runs = runs_of(9, 3, 4, 11, gap_bytes=0)
    assert slots_read(runs) == [3, 4, 9, 11]


def test_the_same_header_wanted_twice_is_read_once() -> None:
    # A directory may say anything: two keys at one slot, of which at most one will be proven.
    runs = runs_of(4, 2, 4)
    assert runs.row_count == 3
    assert runs.rows.tolist() == [2, 0, 2]


@pytest.mark.parametrize("gap_bytes", [0, 1024, HEADER_GAP_BYTES])
def test_every_header_lies_where_its_row_says(gap_bytes: int) -> None:
    random = np.random.default_rng(gap_bytes)
    for count in (1, 2, 17, 256):
        slots = random.choice(32_768, count, replace=False).tolist()
        runs = runs_of(*slots, gap_bytes=gap_bytes)
        read = slots_read(runs)
        assert [read[row] for row in runs.rows.tolist()] == slots
        assert runs.row_count == len(read)
        assert len(set(read)) == len(read), "read twice"
        assert len(read) <= count + (count - 1) * gap_bytes // HEADER_BYTES


def test_spans_of_the_scratch_do_not_overlap_and_come_free_again() -> None:
    # Method: take and give back at random; the scratch's own check sees what overlaps.
    random = np.random.default_rng(1)
    scratch = HeaderScratch(16)
    taken: list[Span] = []
    refused = 0
    for _ in range(500):
        if taken and random.random() < 0.5:
            scratch.give_back(taken.pop(random.integers(len(taken))))
        else:
            row_count = int(random.integers(1, 5 * ROWS_PER_PAGE))
            span = scratch.take(row_count)
            if span is None:
                refused += 1
            else:
                assert span.page_count * ROWS_PER_PAGE >= row_count
                assert scratch.address_of(span) == scratch.address + span.first_page * PAGE_BYTES
                taken.append(span)
        scratch.check(taken)
    assert refused
    for span in taken:
        scratch.give_back(span)
    assert scratch.take(16 * ROWS_PER_PAGE) is not None, "the whole of it is one span again"
