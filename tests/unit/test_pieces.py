"""Goal: every byte of a job is described once, at the place where it belongs, in as few pieces as
there are runs of neighbours. Method: random layouts against a copy in plain Python.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvray.engine.pieces import GroupPages, Pieces, TensorPages, build_pieces, group_pages
from kvray.engine.raw_copy import Pointers, copy_pieces


def pointers(*addresses: int) -> Pointers:
    return np.array(addresses, dtype=np.uint64)


def noise(count_bytes: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, count_bytes, dtype=np.uint8)


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
            GroupPages(tuple(layer.pages() for layer in layers), self.blocks_per_chunk).joined()
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

    def pieces(self, slab: npt.NDArray[np.uint8]) -> Pieces:
        return build_pieces(
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
        layout = draw(st.sampled_from(["layer-major", "block-major", "apart"]))
        if layout == "layer-major":  # all layers in one storage, as vLLM has it
            memory = noise(layer_count * block_count * stride, seed=len(groups))
            layers = [
                Layer(memory, i * block_count * stride, stride, page) for i in range(layer_count)
            ]
        elif layout == "block-major":
            row = layer_count * page
            memory = noise(block_count * row, seed=len(groups))
            layers = [Layer(memory, i * page, row, page) for i in range(layer_count)]
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
    # In any order, or side by side as a fresh device hands them out.
    ids = st.one_of(st.permutations(range(block_count)), st.just(list(range(block_count))))
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
    device, slab_pointers, piece_bytes, _ = job.pieces(slab)

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
    _, slab_pointers, _, ends = job.pieces(slab)
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
    device, slab, piece_bytes, ends = build_pieces(
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
    assert ends.tolist() == [2, 6]


def test_a_job_of_nothing_is_nothing() -> None:
    group = GroupPages((TensorPages(0, 64, 64),), 1)
    built = build_pieces(
        [group, group],
        block_ids=np.array([], dtype=np.int32),
        group_sizes=[0, 0],
        block_indices=[0, 3],
        slot_pointers=pointers(),
    )
    assert [len(column) for column in built] == [0, 0, 0, 0]
    copy_pieces(*built[:3])


@pytest.mark.parametrize("slot_count", [1, 3])
def test_a_slot_too_many_or_too_few_is_a_bug(slot_count: int) -> None:
    group = GroupPages((TensorPages(0, 64, 64),), 2)
    with pytest.raises((AssertionError, IndexError)):
        build_pieces(
            [group],
            block_ids=np.array([1, 2, 3]),
            group_sizes=[3],
            block_indices=[0],
            slot_pointers=pointers(*range(slot_count)),
        )


def test_blocks_side_by_side_are_one_piece_within_their_chunk() -> None:
    """Blocks 4 to 8 follow each other, and a chunk ends behind 5: a slot's pieces stay its own."""
    group = GroupPages((TensorPages(1_000, 10, 10), TensorPages(9_000, 10, 10)), 4)
    pieces = build_pieces(
        [group],
        block_ids=np.array([2, 4, 5, 6, 7, 8]),
        group_sizes=[6],
        block_indices=[1],
        slot_pointers=pointers(50_000, 60_000),
    )
    assert pieces.device.tolist() == [1_020, 9_020, 1_040, 9_040, 1_060, 9_060]
    assert pieces.slab.tolist() == [50_010, 50_050, 50_020, 50_060, 60_000, 60_040]
    assert pieces.bytes.tolist() == [10, 10, 20, 20, 30, 30]
    assert pieces.slot_ends.tolist() == [4, 6]


def test_layers_side_by_side_are_one_piece_where_a_chunk_is_a_block() -> None:
    layers = tuple(TensorPages(1_000 + 10 * i, 40, 10) for i in range(4))
    (joined,) = GroupPages(layers, 1).joined().pages
    assert joined == TensorPages(1_000, 40, 40)
    assert GroupPages(layers, 2).joined().pages == layers
    apart = (*layers[:2], TensorPages(2_000, 40, 10), TensorPages(2_010, 50, 10))
    assert [page.page_bytes for page in GroupPages(apart, 1).joined().pages] == [20, 10, 10]


def test_padded_blocks_are_never_one_piece() -> None:
    """Between them is what belongs to nobody, or to another group."""
    group = GroupPages((TensorPages(0, 16, 10),), 4)
    pieces = build_pieces(
        [group],
        block_ids=np.array([1, 2, 3]),
        group_sizes=[3],
        block_indices=[0],
        slot_pointers=pointers(500),
    )
    assert pieces.bytes.tolist() == [10, 10, 10]


def test_where_vllm_keeps_its_blocks_is_read_from_its_tensors() -> None:
    class Tensor:
        def data_ptr(self) -> int:
            return 4_096

        def stride(self, _dimension: int) -> int:
            return 128

        def element_size(self) -> int:
            return 2

    refs = [SimpleNamespace(tensor_idx=0, page_size_bytes=200)]
    caches = SimpleNamespace(tensors=[SimpleNamespace(tensor=Tensor())], group_data_refs=[refs])
    (group,) = group_pages(caches, blocks_per_chunk=8)
    assert group == GroupPages((TensorPages(4_096, 256, 200),), 8)
