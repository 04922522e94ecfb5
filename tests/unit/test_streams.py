"""Goal: on streams the same bytes arrive as on threads, none of them before the engine has done
what it had begun, and a device that fails costs misses only. Method: the streams of the host, on
which bytes really move, and an engine's stream that the test holds up.
"""

import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvray.core.direction import Direction
from kvray.engine.copier import CopyEnd, Executor
from kvray.engine.streams import StreamExecutor
from tests.host_device import EXECUTORS, LIMIT_S, HostDevice, an_executor

LOAD, STORE = Direction.LOAD, Direction.STORE


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice()
    yield device
    device.engine.close()


@pytest.fixture
def executor(device: HostDevice) -> Iterator[StreamExecutor]:
    executor = StreamExecutor(device)
    yield executor
    executor.close()


class Copy:
    def __init__(self, page_count: int = 4, page_bytes: int = 4_096, seed: int = 0) -> None:
        noise = np.random.default_rng(seed)
        self.source = noise.integers(1, 256, page_count * page_bytes, dtype=np.uint8)
        self.target = np.zeros_like(self.source)
        begins = np.arange(page_count, dtype=np.uint64) * np.uint64(page_bytes)
        self.columns = (
            np.uint64(self.source.ctypes.data) + begins,
            np.uint64(self.target.ctypes.data) + noise.permutation(begins),
            np.full(page_count, page_bytes, np.uint64),
        )

    def content(self) -> bytes:
        return self.target.tobytes()


def ends_of(executor: Executor, *job_ids: int) -> list[CopyEnd]:
    executor.wait(job_ids)
    return sorted(executor.finished())


def hold(device: HostDevice) -> Callable[[], None]:
    """The engine computes until the answer is called."""
    done = threading.Event()

    def compute() -> None:
        done.wait(LIMIT_S)

    device.engine.put(compute)
    return done.set


@pytest.mark.parametrize("direction", list(Direction))
def test_nothing_moves_before_the_engine_has_done_what_it_had_begun(
    device: HostDevice, executor: StreamExecutor, direction: Direction
) -> None:
    """What a store reads is being computed; where a load writes, vLLM is still clearing."""
    copy = Copy()
    let_go = hold(device)
    device.engine.put(lambda: copy.source.fill(7))
    executor.submit(1, *copy.columns, direction=direction)
    assert not executor.wait_any(0.02)
    assert not copy.target.any()
    let_go()
    assert [end.ok for end in ends_of(executor, 1)] == [True]
    assert (copy.target == 7).all()


def test_what_the_engine_begins_later_is_not_waited_for(
    device: HostDevice, executor: StreamExecutor
) -> None:
    copy = Copy()
    executor.submit(1, *copy.columns, direction=LOAD)
    let_go = hold(device)
    assert [end.ok for end in ends_of(executor, 1)] == [True]
    let_go()


def test_a_job_of_several_parts_arrives_whole(
    executor: StreamExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvray.core.copy_order.MAX_PART_PIECES", 3)
    copies = [Copy(50, seed=seed) for seed in range(4)]
    for job_id, copy in enumerate(copies):
        executor.submit(job_id, *copy.columns, direction=list(Direction)[job_id % 2])
    ends = ends_of(executor, *range(4))
    assert [end.ok for end in ends] == [True] * 4
    for copy in copies:
        assert sorted(copy.target.reshape(50, -1).tolist()) == sorted(
            copy.source.reshape(50, -1).tolist()
        )


@pytest.mark.parametrize("call", ["wait_for", "copy"])
def test_a_job_that_can_not_be_put_on_its_stream_fails_and_no_other(
    device: HostDevice,
    executor: StreamExecutor,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Above all: what is left of it must not pass a wait that was never put there."""
    monkeypatch.setattr("kvray.core.copy_order.MAX_PART_PIECES", 1)
    device.refuses[call] = RuntimeError("no room on the stream")
    failing, good = Copy(), Copy()
    executor.submit(1, *failing.columns, direction=LOAD)
    executor.submit(2, *good.columns, direction=LOAD)
    ends = ends_of(executor, 1, 2)
    assert [end.ok for end in ends] == [False, True]
    assert not failing.target.any()
    assert good.target.all()
    assert "no room on the stream" in caplog.text


def test_a_mark_that_can_not_be_made_fails_its_job_at_once(
    device: HostDevice, executor: StreamExecutor
) -> None:
    device.refuses["engine_mark"] = RuntimeError("out of events")
    executor.submit(1, *Copy().columns, direction=STORE)
    assert executor.finished() == [CopyEnd(1, ok=False, bytes=0, seconds=0.0)]


@pytest.mark.parametrize("call", ["enter", "wait_for", "copy", "mark", "has_fired"])
def test_a_device_that_is_lost_fails_all_jobs_and_nobody_waits_for_ever(
    call: str, caplog: pytest.LogCaptureFixture
) -> None:
    device, copies = HostDevice(), [Copy() for _ in range(3)]
    device.lost_at = call
    with caplog.at_level(logging.ERROR):
        executor = StreamExecutor(device)
        executor.submit(1, *copies[0].columns, direction=LOAD)
        executor.submit(2, *copies[1].columns, direction=STORE, arrived=lambda: 0)
        executor.wait([1, 2])
    assert sorted(end.job_id for end in executor.finished()) == [1, 2]
    executor.submit(3, *copies[2].columns, direction=LOAD)
    assert [end.ok for end in ends_of(executor, 3)] == [False]
    executor.close()
    device.engine.close()
    assert "fallen off the bus" in caplog.text


def test_an_executor_without_work_asks_the_device_nothing(device: HostDevice) -> None:
    executor = StreamExecutor(device)
    copy = Copy()
    executor.submit(1, *copy.columns, direction=LOAD)
    ends_of(executor, 1)
    device.refuses["has_fired"] = AssertionError("asked while nothing is under way")
    assert not executor.wait_any(0.02)
    executor.close()
    assert device.refuses, "it was asked"


jobs = st.lists(
    st.tuples(
        st.sampled_from(list(Direction)),
        st.integers(0, 40),  # pages
        st.sampled_from([8, 100, 4_096]),
        st.sampled_from(["all there", "coming", "never", "not what it was"]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(jobs=jobs)
def test_streams_and_threads_come_to_the_same(jobs: list[tuple[Direction, int, int, str]]) -> None:
    found = []
    for kind in EXECUTORS:
        copies = [Copy(pages, size, seed) for seed, (_, pages, size, _) in enumerate(jobs)]
        with an_executor(kind) as executor:
            for job_id, (copy, job) in enumerate(zip(copies, jobs, strict=True)):
                submit(executor, job_id, copy, job)
            waited = [i for i, job in enumerate(jobs) if job[3] != "coming"]
            executor.wait(waited)
            ends = executor.finished()
            while len(ends) < len(jobs):
                assert executor.wait_any(LIMIT_S)
                ends += executor.finished()
        ok = {end.job_id: (end.ok, end.bytes) for end in ends}
        good = [copy.content() for i, copy in enumerate(copies) if ok[i][0]]
        found.append((ok, good))
    assert found[0] == found[1] == found[2]


def submit(
    executor: Executor, job_id: int, copy: Copy, job: tuple[Direction, int, int, str]
) -> None:
    direction, pages, _, how = job
    come = iter(range(pages + 1))
    executor.submit(
        job_id,
        *copy.columns,
        direction=direction,
        arrived={"coming": lambda: next(come), "never": lambda: None}.get(how),
        verify=lambda: how != "not what it was",
        keep_alive=copy,
    )
