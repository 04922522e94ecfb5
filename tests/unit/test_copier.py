"""Goal: whatever happens, a job is reported once, and not before its last byte has arrived.
Method: real memory and real threads.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from kvray.core.direction import Direction
from kvray.engine.copier import (
    MAX_PART_BYTES,
    MIN_SPLIT_BYTES,
    CopyEnd,
    CpuExecutor,
    Executor,
)
from kvray.engine.raw_copy import Pointers
from tests.host_device import EXECUTORS, an_executor

LIMIT_S = 30.0  # for what takes milliseconds
PAGE_BYTES = 64


def pointers(*addresses: int) -> Pointers:
    return np.array(addresses, dtype=np.uint64)


def noise(count_bytes: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, count_bytes, dtype=np.uint8)


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with an_executor(request.param) as executor:
        yield executor
    Copy.kept.clear()


STORE, LOAD = Direction.STORE, Direction.LOAD


class Copy:
    """A job of some pages, and whether it has arrived."""

    kept: ClassVar[list["Copy"]] = []  # while threads know nothing but its addresses

    def __init__(self, page_count: int = 3, page_bytes: int = PAGE_BYTES) -> None:
        self.kept.append(self)
        self.source = noise(page_count * page_bytes, seed=page_count)
        self.target = np.zeros_like(self.source)
        begins = np.arange(page_count)[::-1] * page_bytes
        self.columns = (
            (self.source.ctypes.data + begins).astype(np.uint64),
            (self.target.ctypes.data + begins).astype(np.uint64),
            np.full(page_count, page_bytes, np.uint64),
        )

    @property
    def has_arrived(self) -> bool:
        return bool((self.source == self.target).all())


def ended(executor: Executor, *job_ids: int) -> dict[int, CopyEnd]:
    executor.wait(job_ids)
    ends = executor.finished()
    assert len({end.job_id for end in ends}) == len(ends)
    return {end.job_id: end for end in ends}


@pytest.mark.parametrize(
    "total_bytes", [64, MIN_SPLIT_BYTES + 4096, MAX_PART_BYTES + MAX_PART_BYTES // 2]
)
def test_a_job_is_reported_once_with_its_bytes(executor: Executor, total_bytes: int) -> None:
    page_bytes = 64 if total_bytes == 64 else 4096
    copy = Copy(total_bytes // page_bytes, page_bytes)
    executor.submit(7, *copy.columns, direction=STORE)
    (end,) = ended(executor, 7).values()
    assert (end.job_id, end.ok, end.bytes) == (7, True, total_bytes)
    assert end.seconds > 0
    assert copy.has_arrived
    assert executor.finished() == []


def test_many_jobs_at_once_all_end(executor: Executor) -> None:
    copies = {job_id: Copy(1 + job_id % 50) for job_id in range(200)}
    for job_id, copy in copies.items():
        executor.submit(job_id, *copy.columns, direction=STORE)
    ends = ended(executor, *copies)
    assert ends.keys() == copies.keys()
    assert all(end.ok for end in ends.values())
    assert all(copy.has_arrived for copy in copies.values())


def test_waiting_for_one_job_does_not_take_its_report(executor: Executor) -> None:
    executor.submit(1, *Copy().columns, direction=STORE)
    executor.wait([1])
    executor.wait([1, 99])  # 99 was never submitted: nothing to wait for
    assert [end.job_id for end in executor.finished()] == [1]


def test_a_job_without_pieces_ends_too(executor: Executor) -> None:
    nothing = pointers()
    executor.submit(3, nothing, nothing, nothing, direction=STORE)
    assert ended(executor, 3)[3][1:3] == (True, 0)


@pytest.mark.parametrize("page_count", [1, 2 * MIN_SPLIT_BYTES // 4096])
def test_verify_sees_all_bytes_before_the_job_is_reported(
    executor: Executor, page_count: int
) -> None:
    copy = Copy(page_count, 4096)
    seen: list[tuple[bool, list[CopyEnd]]] = []

    def verify() -> bool:
        seen.append((copy.has_arrived, executor.finished()))
        return True

    executor.submit(1, *copy.columns, verify=verify, direction=STORE)
    assert ended(executor, 1)[1].ok
    assert seen == [(True, [])]


def raise_something() -> bool:
    raise ValueError("a header that can not be read")


@pytest.mark.parametrize("verify", [lambda: False, raise_something])
def test_a_failed_verify_is_a_failed_job_and_the_next_one_is_not(
    executor: Executor, verify: Callable[[], bool]
) -> None:
    executor.submit(1, *Copy().columns, verify=verify, direction=STORE)
    executor.submit(2, *Copy().columns, verify=lambda: True, direction=STORE)
    ends = ended(executor, 1, 2)
    assert ends[1][1:3] == (False, 0)
    assert ends[2].ok


def test_a_copy_that_can_not_be_done_is_a_failed_job(executor: Executor) -> None:
    """verify is not asked, and the threads go on."""
    asked: list[int] = []
    impossible = np.array([-8], np.int64)
    copy = Copy(1)
    executor.submit(
        1,
        copy.columns[0],
        copy.columns[1],
        impossible,  # type: ignore[arg-type]
        direction=STORE,
        verify=lambda: not asked.append(1),  # type: ignore[func-returns-value]
    )
    executor.submit(2, *copy.columns, direction=STORE)
    ends = ended(executor, 1, 2)
    assert not ends[1].ok
    assert not asked
    assert ends[2].ok


def test_a_job_of_which_one_part_can_not_be_copied_is_a_failed_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if its other parts end later, and well."""
    monkeypatch.setattr("kvray.engine.copier.MAX_PART_BYTES", 16 * PAGE_BYTES)
    executor = CpuExecutor(1)
    copy = Copy(64)
    sizes = copy.columns[2].astype(np.int64)
    sizes[0] = -8
    executor.submit(1, copy.columns[0], copy.columns[1], sizes, direction=STORE)  # type: ignore[arg-type]
    assert ended(executor, 1)[1][1:3] == (False, 0)
    assert (copy.target[: 32 * PAGE_BYTES] == copy.source[: 32 * PAGE_BYTES]).all()
    executor.close()


def test_what_the_pointers_point_into_is_kept_until_then_and_no_longer() -> None:
    class Slab:
        pass

    executor = CpuExecutor(1)
    may_end = threading.Event()
    slab = Slab()
    kept = weakref.ref(slab)
    executor.submit(
        1, *Copy().columns, verify=lambda: may_end.wait(LIMIT_S), keep_alive=slab, direction=STORE
    )
    del slab
    assert kept() is not None
    may_end.set()
    executor.wait([1])
    executor.close()
    assert kept() is None


def test_a_load_does_not_wait_behind_stores() -> None:
    executor = CpuExecutor(1)
    may_go_on = threading.Event()
    has_begun = threading.Event()

    def hold_up() -> bool:
        has_begun.set()
        return may_go_on.wait(LIMIT_S)

    executor.submit(1, *Copy().columns, verify=hold_up, direction=STORE)
    assert has_begun.wait(LIMIT_S)
    for store in (2, 3):
        executor.submit(store, *Copy().columns, direction=STORE)
    for load in (4, 5):
        executor.submit(load, *Copy().columns, direction=LOAD)
    may_go_on.set()
    executor.wait([1, 2, 3, 4, 5])
    assert [end.job_id for end in executor.finished()] == [1, 4, 5, 2, 3]
    executor.close()


def test_wait_any_returns_for_the_first_end_and_not_without_one(executor: Executor) -> None:
    assert not executor.wait_any(LIMIT_S), "nothing is under way: nothing to wait for"
    may_end = threading.Event()
    executor.submit(1, *Copy().columns, verify=lambda: may_end.wait(LIMIT_S), direction=STORE)
    assert not executor.wait_any(0.001)
    may_end.set()
    assert executor.wait_any(LIMIT_S)
    assert executor.wait_any(LIMIT_S), "not told yet"
    assert len(executor.finished()) == 1
    assert not executor.wait_any(LIMIT_S)


def test_close_ends_what_was_submitted_and_takes_nothing_more() -> None:
    executor = CpuExecutor(2)
    copies = [Copy(20) for _ in range(50)]
    for job_id, copy in enumerate(copies):
        executor.submit(job_id, *copy.columns, direction=STORE)
    executor.close()
    executor.close()
    assert [end.ok for end in executor.finished()] == [True] * 50
    assert all(copy.has_arrived for copy in copies)

    late = Copy()
    executor.submit(99, *late.columns, direction=STORE)

    assert executor.finished() == [CopyEnd(99, ok=False, bytes=0, seconds=0.0)]
    assert not late.has_arrived
    assert copier_threads() == []


def test_a_process_that_may_use_one_core_gets_one_thread() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        executor = CpuExecutor()
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(copier_threads()) == 1
    executor.close()
    assert copier_threads() == []


def copier_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("kvray-copier")]


def test_copying_needs_neither_torch_nor_vllm() -> None:
    import kvray.engine.copier as module

    names = {value.__name__ for value in vars(module).values() if type(value) is type(module)}
    assert names <= {"logging", "os", "threading", "time", "numpy", "numpy.typing"}
