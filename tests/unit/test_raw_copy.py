"""Goal: pieces of any size arrive at any address, and a whole job moves in one call with the GIL
free. Method: real memory, compared byte by byte; a second thread that says when it could run.
"""

import mmap
import sys
import threading
import time
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvray.engine import raw_copy
from kvray.engine.raw_copy import Shape, copy_pieces, find_runs

LIMIT_S = 30.0  # for what takes milliseconds
COPIES_AT_MOST = 200  # of 2 ms; the kernel may be late to wake the other thread


def noise(count_bytes: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, count_bytes, dtype=np.uint8)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([64, 64, 64, 128, 4096]),
            st.sampled_from([64, 64, 64, -64, 256]),
            st.sampled_from([64, 64, 64, 64, 32]),
        ),
        max_size=60,
    )
)
def test_every_piece_is_in_exactly_one_run(steps: list[tuple[int, int, int]]) -> None:
    table = np.cumsum(np.array([(0, 0, 0), *steps]), axis=0)
    sources, targets = table[:, 0] + 10**6, table[:, 1] + 10**9
    sizes = np.array([64] + [size for _, _, size in steps])
    pieces = sorted(zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True))

    found = find_runs(*(column.astype(np.uint64) for column in (sources, targets, sizes)))

    expanded = sorted(
        (
            source + i * runs.shape.source_step,
            target + i * runs.shape.target_step,
            runs.shape.piece_bytes,
        )
        for runs in found
        for source, target in zip(runs.sources, runs.targets, strict=True)
        for i in range(runs.shape.piece_count)
    )
    assert expanded == pieces


def test_the_layers_of_blocks_anywhere_are_one_shape() -> None:
    """Otherwise a job would be one call for each block, which is what must not be."""
    block_ids, slots = np.array([9, 3, 4, 11]), np.array([2, 0, 3, 1])
    layers = np.arange(8) * 10**6
    device = (5_000 + block_ids[:, None] * 4096 + layers).astype(np.uint64).ravel()
    slab = (10**9 + slots[:, None] * 8 * 4096 + np.arange(8) * 4096).astype(np.uint64).ravel()
    (runs,) = find_runs(device, slab, np.full(32, 4096, np.uint64))
    assert runs.shape == Shape(8, 10**6, 4096, 4096)
    assert len(runs.sources) == 4


@pytest.mark.parametrize("piece_bytes", [1, 7, 8, 63, 100, 512, 1000, 4096, 4100, 98_304])
@pytest.mark.parametrize("piece_count", [1, 2, 40, 1_100])
def test_pieces_of_any_size_at_any_address(piece_bytes: int, piece_count: int) -> None:
    """1,100 are more than one call takes; their targets are in random order."""
    if piece_bytes * piece_count > 2**25:
        piece_count = 2**25 // piece_bytes
    step = piece_bytes + 5
    source, target = noise(step * piece_count + 3), np.zeros(step * piece_count + 1, np.uint8)
    order = np.random.default_rng(1).permutation(piece_count)
    copy_pieces(
        (source.ctypes.data + 3 + np.arange(piece_count) * step).astype(np.uint64),
        (target.ctypes.data + 1 + order * step).astype(np.uint64),
        np.full(piece_count, piece_bytes, np.uint64),
    )
    expected = np.zeros((piece_count, step), np.uint8)
    expected[order] = source[3:].reshape(piece_count, step)
    expected[:, piece_bytes:] = 0
    assert (target[1:].reshape(piece_count, step) == expected).all()


def test_pieces_further_apart_than_one_call_reaches() -> None:
    """2 GiB is the end of an offset in a dtype. Most of the memory here is never touched."""
    reserved = mmap.mmap(
        -1,
        7 << 30,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000,  # MAP_NORESERVE
    )
    wide = np.frombuffer(reserved, np.uint8)
    places = [(1 << 30) * gib + 4096 * i for gib in range(6) for i in (3, 1, 2)]
    target = np.zeros((len(places), 4096), np.uint8)
    for index, place in enumerate(places):
        wide[place : place + 4096] = index + 1
    sources = (wide.ctypes.data + np.array(places)).astype(np.uint64)
    targets = (target.ctypes.data + np.arange(len(places))[::-1] * 4096).astype(np.uint64)

    copy_pieces(sources, targets, np.full(len(places), 4096, np.uint64))

    assert (target[::-1] == np.arange(1, len(places) + 1)[:, None]).all()

    copy_pieces(targets, sources[::-1].copy(), np.full(len(places), 4096, np.uint64))

    assert [int(wide[place + 4095]) for place in places] == list(range(len(places), 0, -1))


def test_targets_between_the_sources() -> None:
    """A cache's allocations may lie on both sides of the slab: extents overlap, pieces do not. And
    nothing is copied aside for it, which would be everything between them, hundreds of times.
    """
    memory = noise(64 * 4096).reshape(64, 4096)
    before = memory.copy()
    even, odd = np.arange(0, 64, 2), np.arange(1, 64, 2)
    order = np.random.default_rng(2).permutation(32)
    tracemalloc.start()
    copy_pieces(
        (memory.ctypes.data + even * 4096).astype(np.uint64),
        (memory.ctypes.data + odd[order] * 4096).astype(np.uint64),
        np.full(32, 4096, np.uint64),
    )
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1024**2
    assert (memory[even] == before[even]).all()
    assert (memory[odd[order]] == before[even]).all()


def test_all_blocks_of_a_job_move_in_one_call_that_lets_go_of_the_gil(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each return from a copy has to get the GIL back: 5 ms beside a thread that keeps it."""

    def one_run_only(*_: object) -> None:
        raise AssertionError("a call for each block")

    monkeypatch.setattr(raw_copy, "_copy_run", one_run_only)
    blocks, layers, page = 40, 8, 131_072
    source, target = noise(blocks * layers * page), noise(blocks * layers * page, seed=1)
    order = np.random.default_rng(3).permutation(blocks)
    layer = np.arange(layers)
    sources = source.ctypes.data + order[:, None] * page + layer * blocks * page
    targets = target.ctypes.data + np.arange(blocks)[:, None] * layers * page + layer * page
    columns = (
        sources.astype(np.uint64).ravel(),
        targets.astype(np.uint64).ravel(),
        np.full(blocks * layers, page, np.uint64),
    )
    copy_pieces(*columns)  # what is tried once in a process is tried
    stop, steps = threading.Event(), 0

    def step_whenever_possible() -> None:
        nonlocal steps
        while not stop.is_set():
            steps += 1
            time.sleep(0)  # gives the GIL back, which nobody takes by force: see below

    interval, meanwhile = sys.getswitchinterval(), 0
    stepper = threading.Thread(target=step_whenever_possible)
    try:
        sys.setswitchinterval(LIMIT_S)
        stepper.start()
        for _ in range(COPIES_AT_MOST):
            before = steps
            copy_pieces(*columns)
            meanwhile = steps - before
            if meanwhile:
                break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        stepper.join()
    assert meanwhile, "no other thread could make a step while the bytes moved"
    moved = target.reshape(blocks, layers, page)
    assert (moved == source.reshape(layers, blocks, page)[:, order].transpose(1, 0, 2)).all()
