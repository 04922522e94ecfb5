"""Goal: device to slab to device, every byte is back and no other byte has changed: for each shape
of cache that vLLM has, each type, each way of copying. Method: fresh random bytes everywhere,
stored from some blocks, loaded into others of a cache that was filled anew meanwhile.
"""

import importlib.util

import numpy as np
import pytest
import torch

from kvray.core.copy_ways import Way
from kvray.engine.cuda_driver import the_driver
from tests.gpu.caches import LLAMA_8B, SHAPES, CacheShape
from tests.gpu.rig import ON_A_GPU, ON_THE_HOST, Blocks, Rig, Where, host_cuda, open_rig, why_no_gpu

BLOCK_COUNT = 16
WHERES = ON_THE_HOST if why_no_gpu() else ON_A_GPU
# The versions of the host's CUDA differ in how bytes move, and in nothing else.
MAIN = [where for where in WHERES if where not in ON_THE_HOST[2:]]


@pytest.fixture(params=WHERES, ids=str)
def where(request: pytest.FixtureRequest) -> Where:
    found: Where = request.param
    if found.is_cuda and found.device == "cpu" and host_cuda() is None:
        pytest.skip("no C compiler for the host's CUDA driver")
    if found.way is Way.GATHER and importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed")
    driver = the_driver()
    if found.way is Way.BATCH and driver is not None and not driver.has_batches:
        pytest.skip(f"driver {driver.version} has no batched copies: 12.8 and newer have")
    return found


@pytest.fixture
def random(where: Where) -> torch.Generator:
    generator = torch.Generator(device=where.device)
    generator.seed()
    print("seed", generator.initial_seed())  # noqa: T201 (shown with a failure)
    return generator


def some_blocks(shape: CacheShape, seed: int, *, index: int = 0) -> Blocks:
    """For each group other ids: some side by side, some not, in an order of their own."""
    ids = np.random.default_rng(seed).permutation(BLOCK_COUNT).astype(np.int32)
    count = min(9, BLOCK_COUNT // shape.groups)
    groups = [np.sort(ids[i * count : (i + 1) * count]) for i in range(shape.groups)]
    groups[0][:3] = groups[0][:3][::-1]
    return Blocks(tuple(groups), (index,) * shape.groups)


def expect_moved(
    rig: Rig, before: list[torch.Tensor], old: Blocks, new: Blocks
) -> list[torch.Tensor]:
    """What each rank's cache is to hold: all as it is now, but for the loaded blocks."""
    wanted = []
    for cache, stored in zip(rig.caches, before, strict=True):
        now = cache.storage.clone()
        from_ids, to_ids = (
            torch.from_numpy(np.concatenate(blocks.ids)).to(now.device).long()
            for blocks in (old, new)
        )
        for layer in range(cache.shape.layers):
            pages = cache.pages(layer)
            places = (pages.shape, pages.stride(), pages.storage_offset())
            now.as_strided(*places)[to_ids] = stored.as_strided(*places)[from_ids]
        wanted.append(now)
    return wanted


def assert_round_trip(rig: Rig, random: torch.Generator, old: Blocks, new: Blocks) -> None:
    for cache in rig.caches:
        cache.randomize(random)
    before = [cache.storage.clone() for cache in rig.caches]
    places = rig.store(old)
    for cache, stored in zip(rig.caches, before, strict=True):
        assert torch.equal(cache.storage, stored), "a store has written into the cache"
        cache.randomize(random)  # the poison
    wanted = expect_moved(rig, before, old, new)
    rig.load(new, places)
    for cache, expected in zip(rig.caches, wanted, strict=True):
        assert torch.equal(cache.storage, expected)
    rig.slab.evict(places)


# Every shape and type everywhere, but for the host's CUDA in its other versions: one of each kind.
FEW = ("Llama-8B", "padded")
CASES = [
    (where, shape, dtype)
    for where in WHERES
    for shape in SHAPES
    for dtype in ("bf16", "fp8")
    if where in MAIN or (shape.name in FEW and dtype == "bf16")
]


@pytest.mark.parametrize(
    ("where", "shape", "dtype"),
    CASES,
    indirect=["where"],
    ids=[f"{where}-{shape.name}-{dtype}" for where, shape, dtype in CASES],
)
def test_every_byte_comes_back_and_no_other_changes(
    where: Where, shape: CacheShape, dtype: str, random: torch.Generator
) -> None:
    with open_rig(where, shape, dtype, blocks=BLOCK_COUNT) as rig:
        for seed, index in ((1, 0), (2, 3)):  # from the begin of a chunk, and from its middle
            old, new = (some_blocks(shape, 10 * seed + i, index=index) for i in (0, 1))
            assert_round_trip(rig, random, old, new)


@pytest.mark.parametrize("where", MAIN, indirect=True, ids=str)
def test_ranks_keep_their_parts_of_a_slot_apart(where: Where, random: torch.Generator) -> None:
    with open_rig(where, LLAMA_8B, "bf16", blocks=BLOCK_COUNT, ranks=2) as rig:
        assert_round_trip(rig, random, some_blocks(LLAMA_8B, 1), some_blocks(LLAMA_8B, 2))


@pytest.mark.parametrize("where", MAIN, indirect=True, ids=str)
def test_a_model_sees_what_was_loaded(where: Where, random: torch.Generator) -> None:
    """Through the view that attention reads, not through bytes."""
    with open_rig(where, LLAMA_8B, "bf16", blocks=BLOCK_COUNT) as rig:
        (cache,) = rig.caches
        cache.layer(5)[3].copy_(torch.full_like(cache.layer(5)[3], 1.5))
        places = rig.store(Blocks((np.array([3], np.int32),), (0,)))
        cache.randomize(random)
        rig.load(Blocks((np.array([7], np.int32),), (0,)), places)
        assert (cache.layer(5)[7] == 1.5).all()


@pytest.mark.parametrize("where", MAIN, indirect=True, ids=str)
def test_a_store_reads_what_the_engine_was_still_writing(
    where: Where, random: torch.Generator
) -> None:
    """On a GPU the fill is queued when the store is submitted; a copy that does not wait for the
    engine's stream brings back older bytes.
    """
    with open_rig(where, LLAMA_8B, "bf16", blocks=BLOCK_COUNT) as rig:
        (cache,) = rig.caches
        blocks = Blocks((np.arange(8, dtype=np.int32),), (0,))
        for round_ in range(10):
            places = rig.slab.reserve(rig.slot_bytes(blocks))
            keep_busy(where)
            cache.storage.fill_(round_ + 1)
            jobs = rig.begin_store(blocks, places)
            assert all(end.ok for end in rig.ends(jobs))
            offset, size = places[0].offset, places[0].bytes
            stored = np.frombuffer(rig.slab.owner.memory[offset : offset + size], np.uint8)
            assert (stored == round_ + 1).all()
            rig.slab.commit(places)
            rig.slab.evict(places)


def keep_busy(where: Where) -> None:
    """The engine's stream, for some milliseconds; a host has none."""
    if where.device == "cuda":
        matrix = torch.ones(4_096, 4_096, device="cuda")
        for _ in range(20):
            matrix = matrix @ matrix * 1e-4


@pytest.mark.parametrize("where", MAIN, indirect=True, ids=str)
def test_a_slot_that_was_rewritten_under_a_load_is_a_failed_load(
    where: Where, random: torch.Generator
) -> None:
    with open_rig(where, LLAMA_8B, "bf16", blocks=BLOCK_COUNT) as rig:
        blocks = some_blocks(LLAMA_8B, 1)
        places = rig.store(blocks)
        rig.slab.evict(places)
        assert [end.ok for end in rig.ends(rig.begin_load(blocks, places))] == [False]


def test_each_way_was_taken_where_it_was_meant_to_be(where: Where) -> None:
    """Else the tests above would show one of them only."""
    if not where.takes:
        pytest.skip("which way it goes is the worker's own choice here")
    with open_rig(where, LLAMA_8B, "bf16", blocks=BLOCK_COUNT) as rig:
        places = rig.store(some_blocks(LLAMA_8B, 1))
        rig.load(some_blocks(LLAMA_8B, 2), places)
        device = rig.executor._device  # type: ignore[attr-defined]  # noqa: SLF001
        assert {way for way, parts in device.used.items() if parts} == where.takes
