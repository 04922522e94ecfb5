"""What a job copies: arrays of (device pointer, slab pointer, bytes), a row for each piece.

    block ids, slots ──build_pieces──▶ Pieces ──an Executor (copier)──▶ bytes that have moved

Nothing here knows how copies are done, so all executors get the same rows. A rank's part of a slot,
with its layers in the order of its cache group:

    slot + rank * part_bytes
    ├── layer 0: block 0 │ block 1 │ ...   blocks_per_chunk pages
    ├── layer 1: block 0 │ block 1 │ ...
    └── ...

What vLLM's connector hands over is a list of such layers for each cache group, whatever its layout:

    layer-major  a layer's blocks lie side by side, at page_bytes from each other
    block-major  all layers of a block lie side by side; vLLM hands it over as one layer (packed)
    MLA          as layer-major; a page has no heads
    hybrid       several groups, which may share their memory (block ids tell whose a page is), and
                 whose pages may be shorter than the place they have

Neighbours on both sides become one piece: blocks of consecutive ids within a chunk, and layers that
follow each other where a chunk is one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvray.engine.raw_copy import Pointers


@dataclass(frozen=True, slots=True)
class TensorPages:
    """Where one layer of a cache group keeps its blocks: block i at address + i * stride."""

    address: int
    block_stride_bytes: int
    page_bytes: int  # what a block has in it; without padding


@dataclass(frozen=True, slots=True)
class GroupPages:
    """One cache group on this rank. pages: its layers, in the order they have in a slot."""

    pages: tuple[TensorPages, ...]
    blocks_per_chunk: int

    @property
    def part_bytes(self) -> int:
        """What this rank has of one chunk."""
        return sum(page.page_bytes for page in self.pages) * self.blocks_per_chunk

    def chunk_count(self, block_index: int, block_count: int) -> int:
        """How many chunks, and so slots, these blocks of a request touch, block_index being the
        first.
        """
        return -(-(block_index % self.blocks_per_chunk + block_count) // self.blocks_per_chunk)

    def joined(self) -> "GroupPages":
        """The same bytes at the same places, with layers that follow each other as one: possible
        where a chunk is one block, for otherwise the blocks of a layer lie between them in a slot.
        """
        if self.blocks_per_chunk > 1:
            return self
        pages = list(self.pages[:1])
        for page in self.pages[1:]:
            last = pages[-1]
            if (
                page.address == last.address + last.page_bytes
                and page.block_stride_bytes == last.block_stride_bytes
            ):
                page_bytes = last.page_bytes + page.page_bytes
                pages[-1] = TensorPages(last.address, last.block_stride_bytes, page_bytes)
            else:
                pages.append(page)
        return GroupPages(tuple(pages), 1)


class Pieces(NamedTuple):
    """A job. slot_ends: for each slot, in the order of the job, the end of its rows."""

    device: Pointers
    slab: Pointers
    bytes: Pointers
    slot_ends: npt.NDArray[np.int64]


def group_pages(kv_caches: Any, *, blocks_per_chunk: int) -> list[GroupPages]:
    """What the copier must know of vLLM's CanonicalKVCaches: per cache group, in the order of its
    layers, where a block's page lies (address, stride and bytes).
    """
    groups = []
    for refs in kv_caches.group_data_refs:
        pages = []
        for ref in refs:
            tensor = kv_caches.tensors[ref.tensor_idx].tensor
            pages.append(
                TensorPages(
                    address=tensor.data_ptr(),
                    block_stride_bytes=tensor.stride(0) * tensor.element_size(),
                    page_bytes=ref.page_size_bytes,
                )
            )
        groups.append(GroupPages(pages=tuple(pages), blocks_per_chunk=blocks_per_chunk).joined())
    return groups


def build_pieces(
    groups: Sequence[GroupPages],
    *,
    block_ids: npt.NDArray[Any],
    group_sizes: Sequence[int],
    block_indices: Sequence[int],
    slot_pointers: Pointers,
    rank: int = 0,
) -> Pieces:
    """The rows of a job, slot by slot.

    block_ids, group_sizes, block_indices: as in vLLM's GPULoadStoreSpec; the first block of a
    group may lie inside its first chunk. slot_pointers: for each chunk of each group, in that
    order, the address of its slot; or, with rank=0, of this rank's part of it.
    """
    assert len(groups) == len(group_sizes) == len(block_indices)
    assert sum(group_sizes) == len(block_ids)
    spans = []
    first_block = first_slot = 0
    for group, block_count, block_index in zip(groups, group_sizes, block_indices, strict=True):
        if not block_count:
            continue
        slot_count = group.chunk_count(block_index, block_count)
        slots = slot_pointers[first_slot : first_slot + slot_count].astype(np.uint64)
        assert len(slots) == slot_count, f"{slot_count} slots wanted, {len(slots)} left"
        spans.append(
            _Spans.of(
                group,
                block_ids[first_block : first_block + block_count],
                skipped_blocks=block_index % group.blocks_per_chunk,
                part_pointers=slots + np.uint64(rank * group.part_bytes),
            )
        )
        first_block += block_count
        first_slot += slot_count
    assert first_slot == len(slot_pointers), f"{first_slot} slots of {len(slot_pointers)} used"
    # One allocation, written once: fresh memory costs a page fault each 4 KiB, more than the sums.
    rows = np.empty((3, sum(span.row_count for span in spans)), dtype=np.uint64)
    ends = []
    begin = 0
    for span in spans:
        end = begin + span.row_count
        span.write(*rows[:, begin:end])
        ends.append(begin + span.slot_ends())
        begin = end
    slot_ends = np.concatenate(ends) if ends else np.empty(0, dtype=np.int64)
    return Pieces(rows[0], rows[1], rows[2], slot_ends)


def fits(
    groups: Sequence[GroupPages],
    *,
    group_sizes: Sequence[int],
    block_indices: Sequence[int],
    slot_count: int,
) -> bool:
    """Whether these blocks touch as many chunks as there are slots."""
    spans = zip(groups, group_sizes, block_indices, strict=True)
    return slot_count == sum(
        group.chunk_count(block_index, block_count) if block_count else 0
        for group, block_count, block_index in spans
    )


def are_whole_chunks(
    groups: Sequence[GroupPages],
    *,
    block_ids: npt.NDArray[Any],
    group_sizes: Sequence[int],
    block_indices: Sequence[int],
    slot_count: int,
) -> bool:
    """Whether each of these slots is filled from its first byte to its last: what a store must be,
    for its slots become READY as a whole. vLLM leaves out blocks that have left a window (id 0).
    """
    spans = zip(groups, group_sizes, block_indices, strict=True)
    return (
        bool(np.all(block_ids))
        and all(
            block_index % group.blocks_per_chunk == 0 and block_count % group.blocks_per_chunk == 0
            for group, block_count, block_index in spans
        )
        and fits(
            groups, group_sizes=group_sizes, block_indices=block_indices, slot_count=slot_count
        )
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """Blocks of one group that lie side by side, in all of its layers and in their slots. Arrays of
    equal length: the first block's id, how many blocks, the chunk, the place in the chunk.
    """

    group: GroupPages
    first: Pointers
    count: Pointers
    chunk: npt.NDArray[np.int64]
    place: Pointers
    part_pointers: Pointers

    @classmethod
    def of(
        cls,
        group: GroupPages,
        block_ids: npt.NDArray[Any],
        *,
        skipped_blocks: int,
        part_pointers: Pointers,
    ) -> "_Spans":
        positions = np.arange(skipped_blocks, skipped_blocks + len(block_ids))
        chunk, place = np.divmod(positions, group.blocks_per_chunk)
        first, count = block_ids, np.ones(len(block_ids), dtype=np.uint64)
        is_dense = all(page.page_bytes == page.block_stride_bytes for page in group.pages)
        if group.blocks_per_chunk > 1 and is_dense:
            follows = (block_ids[1:] == block_ids[:-1] + 1) & (chunk[1:] == chunk[:-1])
            starts = np.flatnonzero(np.concatenate(([True], ~follows)))
            first, chunk, place = block_ids[starts], chunk[starts], place[starts]
            count = np.diff(starts, append=len(block_ids)).astype(np.uint64)
        return cls(
            group, first.astype(np.uint64), count, chunk, place.astype(np.uint64), part_pointers
        )

    @property
    def row_count(self) -> int:
        return len(self.first) * len(self.group.pages)

    def write(self, device: Pointers, slab: Pointers, piece_bytes: Pointers) -> None:
        """Rows are spans, columns are layers: so neighbours are the layers of one block, which lie
        at equal steps where vLLM keeps all layers in one storage.
        """
        shape = len(self.first), len(self.group.pages)
        device, slab, piece_bytes = (part.reshape(shape) for part in (device, slab, piece_bytes))
        addresses, strides, pages = (
            np.array(column, dtype=np.uint64)
            for column in zip(
                *((p.address, p.block_stride_bytes, p.page_bytes) for p in self.group.pages),
                strict=True,
            )
        )
        layer_bytes = pages * np.uint64(self.group.blocks_per_chunk)
        layer_offsets = np.cumsum(layer_bytes) - layer_bytes
        parts = self.part_pointers[self.chunk]
        if (strides == strides[0]).all():
            np.add.outer(self.first * strides[0], addresses, out=device)
        else:
            np.multiply.outer(self.first, strides, out=device)
            device += addresses
        if (pages == pages[0]).all():
            np.add.outer(parts + self.place * pages[0], layer_offsets, out=slab)
            piece_bytes[:] = (self.count * pages[0])[:, None]
        else:
            np.multiply.outer(self.place, pages, out=slab)
            slab += layer_offsets
            slab += parts[:, None]
            np.multiply.outer(self.count, pages, out=piece_bytes)

    def slot_ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(np.bincount(self.chunk) * len(self.group.pages))
