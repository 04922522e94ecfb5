"""Goal: whatever comes when, each job ends once, not before the last of it has moved, and nothing
of it passes the engine. Method: random stories of a whole executor's life against the pure order,
which checks itself after each event.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvray.core.copy_order import (
    MAX_PART_BYTES,
    MAX_PART_PIECES,
    MAX_PARTS_OUT,
    CopyOrder,
    CopyState,
    Part,
    part_cuts,
)
from kvray.core.direction import Direction

LOAD, STORE = Direction.LOAD, Direction.STORE


class Story:
    """A CopyOrder, and what an executor has seen of it."""

    def __init__(self) -> None:
        self.order = CopyOrder()
        self.pieces: dict[int, int] = {}
        self.cut: set[int] = set()
        self.on_stream: dict[Direction, list[Part]] = {LOAD: [], STORE: []}
        self.issued: dict[int, list[Part]] = {}
        self.moved: dict[int, int] = {}
        self.ends: dict[int, bool] = {}

    def submit(self, direction: Direction, cuts: list[int], *, has_come: bool) -> None:
        job_id = len(self.pieces)
        self.pieces[job_id] = cuts[-1]
        self.issued[job_id], self.moved[job_id] = [], 0
        self.order.submit(job_id, direction, cuts, has_come=has_come)

    def issue(self, *, fails: bool) -> None:
        for part in self.order.take_parts():
            self.on_stream[part.direction].append(part)
            self.issued[part.job_id].append(part)
            if fails:
                self.cut.add(part.job_id)
                self.order.failed(part)

    def fire(self, direction: Direction) -> None:
        if self.on_stream[direction]:
            part = self.on_stream[direction].pop(0)
            self.moved[part.job_id] += part.end - part.begin
            self.order.ended(part)

    def prove(self, *, ok: bool) -> None:
        for job_id in self.order.take_proofs():
            assert self.moved[job_id] == self.pieces[job_id], "asked before all has moved"
            if not ok:
                self.cut.add(job_id)
            self.order.proved(job_id, ok=ok)

    def settle(self) -> None:
        self.order.check()
        for job_id, ok in self.order.take_ended():
            assert job_id not in self.ends, "reported twice"
            assert not any(p.job_id == job_id for parts in self.on_stream.values() for p in parts)
            assert ok == (job_id not in self.cut)
            self.ends[job_id] = ok

    def finish(self) -> None:
        for job_id in self.order.arriving():
            self.order.arrived(job_id, self.pieces[job_id])
        while len(self.order):
            self.issue(fails=False)
            for direction in Direction:
                self.fire(direction)
            self.prove(ok=True)
            self.settle()
        assert self.ends.keys() == self.pieces.keys()
        assert not self.order.is_moving
        for job_id, parts in self.issued.items():
            begins = [0, *(part.end for part in parts)]
            assert [part.begin for part in parts] == begins[:-1], "a gap, or twice"
            assert [part.after_engine for part in parts] == [i == 0 for i in range(len(parts))]
            assert not self.ends[job_id] or begins[-1] == self.pieces[job_id]


Event = tuple[object, ...]
events = st.one_of(
    st.tuples(
        st.just("submit"),
        st.sampled_from(list(Direction)),
        st.lists(st.integers(1, 5), max_size=6),
        st.booleans(),
    ),
    st.tuples(st.just("come"), st.integers(0, 9), st.integers(0, 3)),
    st.tuples(st.just("cut"), st.integers(0, 9)),
    st.tuples(st.just("issue"), st.integers(0, 9)),
    st.tuples(st.just("fire"), st.sampled_from(list(Direction))),
    st.tuples(st.just("prove"), st.integers(0, 5)),
)


@settings(max_examples=300, deadline=None)
@given(story=st.lists(events, max_size=60))
def test_each_job_ends_once_and_not_before_all_of_it_has_moved(story: list[Event]) -> None:
    told = Story()
    for event in story:
        match event:
            case ("submit", Direction() as direction, list(sizes), bool(has_come)):
                cuts = np.cumsum(sizes).tolist() or [0]
                told.submit(direction, cuts, has_come=has_come)
            case ("come", int(which), int(more)):
                arriving = told.order.arriving()
                if arriving:
                    job_id = arriving[which % len(arriving)]
                    job = told.order._jobs[job_id]  # noqa: SLF001
                    told.order.arrived(job_id, min(job.come + more, job.piece_count))
            case ("cut", int(which)):
                arriving = told.order.arriving()
                if arriving:
                    told.cut.add(arriving[which % len(arriving)])
                    told.order.arrived(arriving[which % len(arriving)], None)
            case ("issue", int(luck)):
                told.issue(fails=luck == 0)
            case ("fire", Direction() as direction):
                told.fire(direction)
            case ("prove", int(luck)):
                told.prove(ok=luck > 0)
        told.settle()
    told.finish()


def test_a_job_whose_sources_are_coming_holds_up_nobody() -> None:
    order = CopyOrder()
    order.submit(1, LOAD, [4], has_come=False)
    order.submit(2, LOAD, [2], has_come=True)
    assert [part.job_id for part in order.take_parts()] == [2]
    order.arrived(1, 1)
    (part,) = order.take_parts()
    assert part == Part(1, LOAD, 0, 1, after_engine=True)
    assert order.state_of(1) is CopyState.ARRIVING


def test_loads_go_out_before_stores_and_each_in_the_order_of_submission() -> None:
    order = CopyOrder()
    for job_id, direction in enumerate([STORE, LOAD, STORE, LOAD]):
        order.submit(job_id, direction, [1], has_come=True)
    assert [part.job_id for part in order.take_parts()] == [1, 3, 0, 2]


def test_a_stream_is_never_given_more_than_it_needs_to_be_busy() -> None:
    """So a job that is cut, and waited for, ends soon."""
    order = CopyOrder()
    order.submit(1, STORE, [1, 2, 3, 4, 5, 6, 7, 8, 9], has_come=True)
    parts = order.take_parts()
    assert len(parts) == MAX_PARTS_OUT
    assert not order.take_parts()
    order.ended(parts[0])
    assert [part.begin for part in order.take_parts()] == [MAX_PARTS_OUT]


def test_a_job_that_failed_ends_after_what_went_out_of_it() -> None:
    order = CopyOrder()
    order.submit(1, LOAD, [1, 2], has_come=True)
    first, second = order.take_parts()
    order.failed(second)
    assert not order.take_ended()
    order.ended(first)
    assert not order.take_ended()
    order.ended(second)
    assert order.take_ended() == [(1, False)]


def test_a_part_that_ends_before_the_one_before_it_is_a_bug() -> None:
    order = CopyOrder()
    order.submit(1, LOAD, [1, 2], has_come=True)
    _, second = order.take_parts()
    with pytest.raises(AssertionError, match="ended before"):
        order.ended(second)


@pytest.mark.parametrize(
    ("count", "piece_bytes"), [(0, 1), (1, 1), (3, MAX_PART_BYTES), (1_000, 1 << 20), (40_000, 64)]
)
def test_parts_are_as_large_as_may_be_and_no_larger(count: int, piece_bytes: int) -> None:
    cuts = part_cuts(np.full(count, piece_bytes, np.uint64))
    sizes = np.diff((0, *cuts))
    assert cuts[-1] == count
    assert (sizes <= MAX_PART_PIECES).all()
    # A part ends with the piece that fills it.
    assert ((sizes - 1) * piece_bytes < MAX_PART_BYTES).all()
    assert len(cuts) <= count * piece_bytes / MAX_PART_BYTES + count / MAX_PART_PIECES + 2
