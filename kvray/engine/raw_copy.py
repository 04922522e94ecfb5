"""Copies many pieces of raw memory in few calls, with the GIL free while bytes move.

    pieces (source, target, bytes)
      ──▶ runs      neighbours with equal steps on both sides: the layers of one block
      ──▶ shapes    runs that look alike: the blocks of one job
      ──▶ calls     one numpy assignment moves all runs of a shape

Why not a loop of memcpy: every return from a copy has to get the GIL back, and beside a thread
that never gives it up (vLLM's step, while a request waits for its load) that takes 5 ms each time,
1.1 s for the 368 pieces of 46 blocks. So the number of calls counts, and not only that of bytes.

How one call moves runs that lie anywhere: a structured dtype has a field for each run, at the
offset of the run; source and target have the same fields at different offsets, and assigning one
to the other moves field by field, in C. numpy lets go of the GIL for assignments of more than 500
items, so the items are slices of a piece. Field offsets are C ints: runs that lie further apart
than 2 GiB take another call.

What a call can not take (an odd size, one run only, source and target interleaved) is copied run
by run, which is as fast on an idle interpreter.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

logger = logging.getLogger("kvray.engine")

Pointers = npt.NDArray[np.uint64]  # addresses, or counts of bytes

MIN_RUN_PIECES = 3  # two pieces have always equal steps; that says nothing
MAX_SHAPES = 4  # of runs in one job; what does not look like the others is copied piece by piece
MAX_FIELDS = 1_024  # of one call: 0.25 ms to describe, with the GIL held; 100 MB and more to copy
MIN_ITEMS = 512  # more than 500, so that numpy lets go of the GIL
MAX_SPAN_BYTES = 2**31 - 1  # of the offsets in one dtype
_BUCKET_SHIFT = 30  # runs of one bucket lie within 1 GiB, and so within MAX_SPAN_BYTES


class Shape(NamedTuple):
    """What runs have in common. piece_count pieces of piece_bytes, with these steps."""

    piece_count: int
    source_step: int
    target_step: int
    piece_bytes: int

    @property
    def bytes(self) -> int:
        return self.piece_count * self.piece_bytes


@dataclass(frozen=True, slots=True)
class Runs:
    """All runs of one shape: where each begins. Lists of equal length."""

    shape: Shape
    sources: list[int]
    targets: list[int]


def copy_pieces(sources: Pointers, targets: Pointers, piece_bytes: Pointers) -> None:
    """Copy piece i from sources[i] to targets[i]; returns when all bytes are there.

    The caller vouches for the addresses, for no piece of a target being a part of any source, and
    for the memory to stay while this runs.
    """
    for runs in find_runs(sources, targets, piece_bytes):
        for part in _parts(runs):
            if len(part.sources) == 1 or not _copy_together(part):
                for source, target in zip(part.sources, part.targets, strict=True):
                    _copy_run(part.shape, source, target)


def find_runs(sources: Pointers, targets: Pointers, piece_bytes: Pointers) -> list[Runs]:
    """Every piece is in exactly one run. The order of pieces is not kept.

    A loop over plain integers on purpose: numpy lets go of the GIL in each operation on more than
    500 items, and this would make twenty of them. 0.2 us for a piece, which is 5 us to copy.
    """
    source, target, size = sources.tolist(), targets.tolist(), piece_bytes.tolist()
    by_shape: dict[Shape, Runs] = {}
    first, count = 0, len(source)
    while first < count:
        shape = Shape(1, 0, 0, size[first])
        last = first + 1  # of the longest run from first on
        if last < count and size[last] == size[first]:
            source_step = source[last] - source[first]
            target_step = target[last] - target[first]
            while (
                last + 1 < count
                and source[last + 1] - source[last] == source_step
                and target[last + 1] - target[last] == target_step
                and size[last + 1] == size[last]
            ):
                last += 1
            piece_count = last - first + 1
            if piece_count >= MIN_RUN_PIECES:
                shape = Shape(piece_count, source_step, target_step, size[first])
        runs = by_shape.get(shape)
        if runs is None:
            runs = by_shape[shape] = Runs(shape, [], [])
        runs.sources.append(source[first])
        runs.targets.append(target[first])
        first += shape.piece_count
    found = sorted(
        by_shape.values(), key=lambda runs: runs.shape.bytes * len(runs.sources), reverse=True
    )
    return found[:MAX_SHAPES] + _single_pieces(found[MAX_SHAPES:])


def _single_pieces(rest: list[Runs]) -> list[Runs]:
    """Rare shapes piece by piece, so that they make few calls again: one per size of a piece."""
    by_bytes: dict[int, Runs] = {}
    for runs in rest:
        shape = runs.shape
        single = Shape(1, 0, 0, shape.piece_bytes)
        pieces = by_bytes.setdefault(shape.piece_bytes, Runs(single, [], []))
        for source, target in zip(runs.sources, runs.targets, strict=True):
            for index in range(shape.piece_count):
                pieces.sources.append(source + index * shape.source_step)
                pieces.targets.append(target + index * shape.target_step)
    return list(by_bytes.values())


def _parts(runs: Runs) -> Iterator[Runs]:
    """Cut into what one call can take: near enough to each other, and not too many."""
    limit = MAX_SPAN_BYTES - runs.shape.piece_bytes
    if _span(runs.sources) < limit and _span(runs.targets) < limit:
        near = [runs]
    else:
        buckets: dict[tuple[int, int], Runs] = {}
        for source, target in zip(runs.sources, runs.targets, strict=True):
            bucket = source >> _BUCKET_SHIFT, target >> _BUCKET_SHIFT
            part = buckets.setdefault(bucket, Runs(runs.shape, [], []))
            part.sources.append(source)
            part.targets.append(target)
        near = list(buckets.values())
    for part in near:
        for begin in range(0, len(part.sources), MAX_FIELDS):
            chosen = slice(begin, begin + MAX_FIELDS)
            yield Runs(part.shape, part.sources[chosen], part.targets[chosen])


def _span(addresses: list[int]) -> int:
    return max(addresses) - min(addresses)


def _copy_together(runs: Runs) -> bool:
    """One assignment for all runs; False if they can not be described so."""
    shape = runs.shape
    slices = _slices(shape)
    if slices == 0 or _extents_overlap(runs) or not _fields_copy_right():
        return False
    slice_bytes = shape.piece_bytes // slices
    source = _together(runs.sources, shape.piece_count, shape.source_step, slices, slice_bytes)
    target = _together(runs.targets, shape.piece_count, shape.target_step, slices, slice_bytes)
    target[...] = source
    return True


def _extents_overlap(runs: Runs) -> bool:
    """numpy looks at the whole extents, and would copy the source aside if they overlapped. Its own
    may_share_memory lets go of the GIL to tell.
    """
    shape = runs.shape
    (source_begin, source_end), (target_begin, target_end) = (
        (
            min(begins) + min(0, step * (shape.piece_count - 1)),
            # An item is as long as from the first run to the last, and the last item is in the
            # last slice of the last piece of the first run: so the end is that of the last run.
            max(begins) + max(0, step * (shape.piece_count - 1)) + shape.piece_bytes,
        )
        for begins, step in ((runs.sources, shape.source_step), (runs.targets, shape.target_step))
    )
    return source_begin < target_end and target_begin < source_end


def _slices(shape: Shape) -> int:
    """In how many equal slices to see each piece, so that numpy lets go of the GIL; 0: it can not
    be divided so. As few as possible, for long slices move faster.
    """
    slices = 1
    while shape.piece_count * slices < MIN_ITEMS:
        slices *= 2
    return 0 if shape.piece_bytes % slices else slices


def _together(
    begins: list[int], piece_count: int, step: int, slices: int, slice_bytes: int
) -> npt.NDArray[np.void]:
    """shape (piece_count, slices), an item being that slice of that piece of every run."""
    base = min(begins)
    fields = np.dtype(
        {
            "names": _field_names(len(begins)),
            "formats": [np.dtype((np.void, slice_bytes))] * len(begins),
            "offsets": [begin - base for begin in begins],
            "itemsize": max(begins) - base + slice_bytes,
        }
    )
    raw = _view(base, (piece_count, slices), (step, slice_bytes), f"|V{fields.itemsize}")
    return raw.view(fields)


@cache
def _field_names(count: int) -> list[str]:
    return [f"f{index}" for index in range(count)]


def _copy_run(shape: Shape, source: int, target: int) -> None:
    """One strided copy. numpy lets go of the GIL for it if it is large enough to matter."""
    steps = shape.source_step, shape.target_step
    word = 1 if any(n % 8 for n in (source, target, shape.piece_bytes, *steps)) else 8
    typestr = f"{'|' if word == 1 else '<'}u{word}"
    size = shape.piece_count, shape.piece_bytes // word
    np.copyto(
        _view(target, size, (shape.target_step, word), typestr),
        _view(source, size, (shape.source_step, word), typestr),
    )


class _Raw:
    """Memory that numpy takes at its word, see the array interface protocol."""

    __slots__ = ("__array_interface__",)

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _view(
    address: int, shape: tuple[int, int], strides: tuple[int, int], typestr: str
) -> npt.NDArray[Any]:
    return np.asarray(
        _Raw(
            {
                "version": 3,
                "data": (address, False),
                "shape": shape,
                "strides": strides,
                "typestr": typestr,
            }
        )
    )


@cache
def _fields_copy_right() -> bool:
    """Whether this numpy copies fields as told, tried once on a few pages. Some day one might not;
    then everything goes run by run.
    """
    try:
        pages = np.arange(6 * MIN_ITEMS, dtype=np.uint64).reshape(6, MIN_ITEMS)
        copy = np.zeros((4, MIN_ITEMS), dtype=np.uint64)
        picked, places = [4, 0, 3], [1, 3, 0]
        page_bytes = pages.itemsize * MIN_ITEMS
        source, target = (
            _together([array.ctypes.data + page_bytes * i for i in of], 1, 0, MIN_ITEMS, 8)
            for array, of in ((pages, picked), (copy, places))
        )
        target[...] = source
        right = bool((copy[places] == pages[picked]).all()) and not copy[2].any()
    except (TypeError, ValueError) as exc:
        logger.warning("numpy %s does not describe memory as kvray needs: %s", np.__version__, exc)
        return False
    if not right:
        logger.warning("numpy %s copies structured arrays otherwise; using runs", np.__version__)
    return right
