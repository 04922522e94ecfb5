"""Goal: every byte of a job arrives where it belongs and no other byte changes; whatever happens,
a job is reported once. Method: random layouts against a copy in plain Python, real memory, real
threads.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvray.engine.copier import (
    MAX_PART_BYTES,
    MIN_SPLIT_BYTES,
    CopyEnd,
    CpuExecutor,
    GroupPages,
    TensorPages,
    build_transfers,
    slot_ends,
)
from kvray.engine.raw_copy import Pointers, copy_pieces

LIMIT_S = 30.0  # for what takes milliseconds
PAGE_BYTES = 64


def pointers(*addresses: int) -> Pointers:
    return np.array(addresses, dtype=np.uint64)


def noise(count_bytes: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, count_bytes, dtype=np.uint8)


# ── which bytes ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class Layer:
    """A layer's cache: blocks with padding between, inside an array that is larger."""

    memory: npt.NDArray[np.uint8]
    begin: int
    stride_bytes: int
    page_bytes: int

    def pages(self) -> TensorPages:
        return TensorPages(
            address=self.memory.ctypes.data + self.begin,
            block_stride_bytes=self.stride_bytes,
            page_bytes=self.page_bytes,
        )

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        begin = self.begin + index * self.stride_bytes
        return self.memory[begin : begin + self.page_bytes]


@dataclass
class Job:
    """A job of vLLM and the caches that it is about."""

    groups: list[list[Layer]]
    blocks_per_chunk: int
    rank: int
    rank_count: int
    block_ids: list[list[int]]
    block_indices: list[int]
    slots: list[int] = field(default_factory=list)  # offsets in the slab
    slab_bytes: int = 0

    def pages(self) -> list[GroupPages]:
        return [
            GroupPages(tuple(layer.pages() for layer in layers), self.blocks_per_chunk)
            for layers in self.groups
        ]

    def lay_out(self, seed: int) -> None:
        """Slots somewhere, each as large as all ranks' parts of its group."""
        sizes = []
        for group, ids, index in zip(self.pages(), self.block_ids, self.block_indices, strict=True):
            chunks = {(index + i) // self.blocks_per_chunk for i in range(len(ids))}
            sizes += [group.part_bytes * self.rank_count] * len(chunks)
        places = np.random.default_rng(seed).permutation(len(sizes)).tolist()
        step = max(sizes, default=0) + 48
        self.slots = [place * step for place in places]
        self.slab_bytes = step * len(sizes)

    def transfers(self, slab: npt.NDArray[np.uint8]) -> tuple[Pointers, Pointers, Pointers]:
        return build_transfers(
            self.pages(),
            block_ids=np.array([i for ids in self.block_ids for i in ids], dtype=np.int64),
            group_sizes=[len(ids) for ids in self.block_ids],
            block_indices=self.block_indices,
            slot_pointers=pointers(*(slab.ctypes.data + slot for slot in self.slots)),
            rank=self.rank,
        )

    def expected_slab(self, slab: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Byte by byte as the docstring of the copier draws it."""
        after = slab.copy()
        slots = iter(self.slots)
        for layers, ids, index in zip(self.groups, self.block_ids, self.block_indices, strict=True):
            part_bytes = sum(layer.page_bytes for layer in layers) * self.blocks_per_chunk
            chunk = slot = -1
            for position, block in enumerate(ids, start=index):
                if position // self.blocks_per_chunk != chunk:
                    chunk, slot = position // self.blocks_per_chunk, next(slots)
                begin = slot + self.rank * part_bytes
                for layer in layers:
                    place = begin + position % self.blocks_per_chunk * layer.page_bytes
                    after[place : place + layer.page_bytes] = layer.block(block)
                    begin += self.blocks_per_chunk * layer.page_bytes
        return after


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    block_count = draw(st.integers(4, 12))
    layer_count = draw(st.integers(1, 6))
    groups: list[list[Layer]] = []
    for _ in range(draw(st.integers(1, 3))):
        page = draw(st.sampled_from([8, 24, 64, 512, 1024])) + draw(st.sampled_from([0, 0, 0, 1]))
        stride = page + draw(st.sampled_from([0, 8, 24]))
        if draw(st.booleans()):  # vLLM's layout: all layers in one storage
            memory = noise(layer_count * block_count * stride, seed=len(groups))
            layers = [
                Layer(memory, i * block_count * stride, stride, page) for i in range(layer_count)
            ]
        else:
            layers = [
                Layer(
                    noise(block_count * stride + 8 * i, seed=i), 8 * i, stride, page + 8 * (i % 2)
                )
                for i in range(layer_count)
            ]
            for layer in layers:
                layer.memory.resize(layer.begin + block_count * (stride + 8), refcheck=False)
                layer.stride_bytes = stride + 8
        groups.append(layers)
    ids = st.permutations(range(block_count))
    rank_count = draw(st.integers(1, 3))
    job = Job(
        groups=groups,
        blocks_per_chunk=draw(st.integers(1, 4)),
        rank=draw(st.integers(0, rank_count - 1)),
        rank_count=rank_count,
        block_ids=[draw(ids)[: draw(st.integers(0, block_count))] for _ in groups],
        block_indices=[draw(st.integers(0, 9)) for _ in groups],
    )
    job.lay_out(draw(st.integers(0, 99)))
    return job


@settings(max_examples=150, deadline=None)
@given(job=jobs())
def test_a_store_puts_each_page_where_the_layout_says_and_a_load_brings_it_back(job: Job) -> None:
    slab = noise(job.slab_bytes, seed=7)
    expected = job.expected_slab(slab)
    device, slab_pointers, piece_bytes = job.transfers(slab)

    copy_pieces(device, slab_pointers, piece_bytes)

    assert (slab == expected).all()

    before = [[layer.memory.copy() for layer in layers] for layers in job.groups]
    for layers, ids in zip(job.groups, job.block_ids, strict=True):
        for layer in layers:
            for block in ids:
                layer.block(block)[:] = 0

    copy_pieces(slab_pointers, device, piece_bytes)

    for layers, memories in zip(job.groups, before, strict=True):
        for layer, memory in zip(layers, memories, strict=True):
            assert (layer.memory == memory).all()


@settings(max_examples=150, deadline=None)
@given(job=jobs())
def test_the_pieces_of_a_slot_are_those_up_to_its_end(job: Job) -> None:
    slab = noise(job.slab_bytes + 1, seed=7)
    _, slab_pointers, _ = job.transfers(slab)
    ends = slot_ends(
        job.pages(),
        group_sizes=[len(ids) for ids in job.block_ids],
        block_indices=job.block_indices,
    )
    assert len(ends) == len(job.slots)
    assert not len(ends) or ends[-1] == len(slab_pointers)
    by_place = sorted(job.slots)
    for slot, begin, end in zip(job.slots, [0, *ends][: len(ends)], ends, strict=True):
        offsets = slab_pointers[begin:end] - np.uint64(slab.ctypes.data)
        behind = [place for place in by_place if place > slot]
        assert len(offsets), "a slot without a piece"
        assert (offsets >= slot).all()
        assert not behind or (offsets < behind[0]).all()


def test_a_part_is_layers_side_by_side_and_a_slot_is_ranks_side_by_side() -> None:
    """The same as above with numbers that a person can check."""
    group = GroupPages((TensorPages(1_000, 100, 10), TensorPages(9_000, 100, 20)), 2)
    assert group.part_bytes == 60
    device, slab, piece_bytes = build_transfers(
        [group],
        block_ids=np.array([5, 2, 7]),
        group_sizes=[3],
        block_indices=[3],  # begins in the second half of its first chunk
        slot_pointers=pointers(50_000, 60_000),
        rank=1,
    )
    assert device.tolist() == [1_500, 9_500, 1_200, 9_200, 1_700, 9_700]
    assert slab.tolist() == [50_070, 50_100, 60_060, 60_080, 60_070, 60_100]
    assert piece_bytes.tolist() == [10, 20] * 3


def test_a_job_of_nothing_is_nothing() -> None:
    group = GroupPages((TensorPages(0, 64, 64),), 1)
    built = build_transfers(
        [group, group],
        block_ids=np.array([], dtype=np.int32),
        group_sizes=[0, 0],
        block_indices=[0, 3],
        slot_pointers=pointers(),
    )
    assert [len(column) for column in built] == [0, 0, 0]
    copy_pieces(*built)


@pytest.mark.parametrize("slot_count", [1, 3])
def test_a_slot_too_many_or_too_few_is_a_bug(slot_count: int) -> None:
    group = GroupPages((TensorPages(0, 64, 64),), 2)
    with pytest.raises((AssertionError, IndexError)):
        build_transfers(
            [group],
            block_ids=np.array([1, 2, 3]),
            group_sizes=[3],
            block_indices=[0],
            slot_pointers=pointers(*range(slot_count)),
        )


# ── who copies them ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def executor(request: pytest.FixtureRequest) -> Iterator[CpuExecutor]:
    executor = CpuExecutor(request.param)
    yield executor
    executor.close()


class Copy:
    """A job of some pages, and whether it has arrived."""

    def __init__(self, page_count: int = 3, page_bytes: int = PAGE_BYTES) -> None:
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


def ended(executor: CpuExecutor, *job_ids: int) -> dict[int, CopyEnd]:
    executor.wait(job_ids)
    ends = executor.finished()
    assert len({end.job_id for end in ends}) == len(ends)
    return {end.job_id: end for end in ends}


@pytest.mark.parametrize(
    "total_bytes", [64, MIN_SPLIT_BYTES + 4096, MAX_PART_BYTES + MAX_PART_BYTES // 2]
)
def test_a_job_is_reported_once_with_its_bytes(executor: CpuExecutor, total_bytes: int) -> None:
    page_bytes = 64 if total_bytes == 64 else 4096
    copy = Copy(total_bytes // page_bytes, page_bytes)
    executor.submit(7, *copy.columns)
    (end,) = ended(executor, 7).values()
    assert (end.job_id, end.ok, end.bytes) == (7, True, total_bytes)
    assert end.seconds > 0
    assert copy.has_arrived
    assert executor.finished() == []


def test_many_jobs_at_once_all_end(executor: CpuExecutor) -> None:
    copies = {job_id: Copy(1 + job_id % 50) for job_id in range(200)}
    for job_id, copy in copies.items():
        executor.submit(job_id, *copy.columns)
    ends = ended(executor, *copies)
    assert ends.keys() == copies.keys()
    assert all(end.ok for end in ends.values())
    assert all(copy.has_arrived for copy in copies.values())


def test_waiting_for_one_job_does_not_take_its_report(executor: CpuExecutor) -> None:
    executor.submit(1, *Copy().columns)
    executor.wait([1])
    executor.wait([1, 99])  # 99 was never submitted: nothing to wait for
    assert [end.job_id for end in executor.finished()] == [1]


def test_a_job_without_pieces_ends_too(executor: CpuExecutor) -> None:
    nothing = pointers()
    executor.submit(3, nothing, nothing, nothing)
    assert ended(executor, 3)[3][1:3] == (True, 0)


@pytest.mark.parametrize("page_count", [1, 2 * MIN_SPLIT_BYTES // 4096])
def test_verify_sees_all_bytes_before_the_job_is_reported(
    executor: CpuExecutor, page_count: int
) -> None:
    copy = Copy(page_count, 4096)
    seen: list[tuple[bool, list[CopyEnd]]] = []

    def verify() -> bool:
        seen.append((copy.has_arrived, executor.finished()))
        return True

    executor.submit(1, *copy.columns, verify=verify)
    assert ended(executor, 1)[1].ok
    assert seen == [(True, [])]


def raise_something() -> bool:
    raise ValueError("a header that can not be read")


@pytest.mark.parametrize("verify", [lambda: False, raise_something])
def test_a_failed_verify_is_a_failed_job_and_the_next_one_is_not(
    executor: CpuExecutor, verify: Callable[[], bool]
) -> None:
    executor.submit(1, *Copy().columns, verify=verify)
    executor.submit(2, *Copy().columns, verify=lambda: True)
    ends = ended(executor, 1, 2)
    assert ends[1][1:3] == (False, 0)
    assert ends[2].ok


def test_a_copy_that_can_not_be_done_is_a_failed_job(executor: CpuExecutor) -> None:
    """verify is not asked, and the threads go on."""
    asked: list[int] = []
    impossible = np.array([-8], np.int64)
    copy = Copy(1)
    executor.submit(
        1,
        copy.columns[0],
        copy.columns[1],
        impossible,  # type: ignore[arg-type]
        verify=lambda: not asked.append(1),  # type: ignore[func-returns-value]
    )
    executor.submit(2, *copy.columns)
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
    executor.submit(1, copy.columns[0], copy.columns[1], sizes)  # type: ignore[arg-type]
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
    executor.submit(1, *Copy().columns, verify=lambda: may_end.wait(LIMIT_S), keep_alive=slab)
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

    executor.submit(1, *Copy().columns, verify=hold_up)
    assert has_begun.wait(LIMIT_S)
    for store in (2, 3):
        executor.submit(store, *Copy().columns)
    for load in (4, 5):
        executor.submit(load, *Copy().columns, urgent=True)
    may_go_on.set()
    executor.wait([1, 2, 3, 4, 5])
    assert [end.job_id for end in executor.finished()] == [1, 4, 5, 2, 3]
    executor.close()


def test_wait_any_returns_for_the_first_end_and_not_without_one(executor: CpuExecutor) -> None:
    assert not executor.wait_any(LIMIT_S), "nothing is under way: nothing to wait for"
    may_end = threading.Event()
    executor.submit(1, *Copy().columns, verify=lambda: may_end.wait(LIMIT_S))
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
        executor.submit(job_id, *copy.columns)
    executor.close()
    executor.close()
    assert [end.ok for end in executor.finished()] == [True] * 50
    assert all(copy.has_arrived for copy in copies)

    late = Copy()
    executor.submit(99, *late.columns)

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
