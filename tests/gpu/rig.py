"""A worker without vLLM: caches on a device, a real slab, kvray's copier between them.

    Rig.store   caches ──▶ reserved slots ──▶ READY, as EngineCore and NodeStore would have it
    Rig.load    READY slots ──▶ other blocks of the caches, headers compared before and after

What stands on the device is made by torch on its current stream, which is the engine's here: a copy
that does not wait for it copies what was there before.
"""

import itertools
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvray.core.copy_ways import Way, choose_way
from kvray.core.direction import Direction
from kvray.core.effects import Place
from kvray.core.ids import BlockKey, ClientId, NodeId, OpId, Origin
from kvray.core.layout import Geometry, aligned
from kvray.core.store import Holder, StoreCore
from kvray.engine.arrivals import Arrivals
from kvray.engine.copier import CopyEnd, CpuExecutor, Executor
from kvray.engine.cuda import CudaDevice
from kvray.engine.cuda_driver import Driver, the_driver
from kvray.engine.pieces import GroupPages, Pieces, build_pieces, group_pages
from kvray.engine.streams import StreamExecutor
from kvray.node.mapped import MappedSlab
from kvray.node.slab import SlabOwner
from tests.gpu.caches import Caches, CacheShape

LIMIT_S = 60.0  # for what takes milliseconds
NODE = NodeId("0123456789abcdef" + "0" * 40)
ORDINAL = 0


# ── where the caches are, and who copies ─────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Where:
    """device: torch's name. version, lockable_bytes: of the host's CUDA. way: which one is forced
    where it can be. takes: the ways that a job of Llama-8B then goes; empty where that is open.
    """

    name: str
    device: str = "cpu"
    is_cuda: bool = True
    version: int = 0
    lockable_bytes: int | None = None
    way: Way | None = None
    takes: frozenset[Way] = frozenset()

    def __str__(self) -> str:
        return self.name


def _only(*ways: Way) -> frozenset[Way]:
    return frozenset(ways)


# host_cuda.c in the versions that differ for kvray. The last may lock one piece of the slab only.
ON_THE_HOST = (
    Where("threads", is_cuda=False),
    Where("CUDA 13 on the host", version=13_000, takes=_only(Way.BATCH)),
    Where("CUDA 12.8 on the host", version=12_080, takes=_only(Way.BATCH)),
    Where("CUDA 12.4 on the host", version=12_040, takes=_only(Way.SINGLE)),
    Where("nothing locked on the host", version=13_000, lockable_bytes=0, takes=_only(Way.SINGLE)),
)
ON_A_GPU = (
    Where("GPU", "cuda"),
    Where("GPU, batched copies", "cuda", way=Way.BATCH, takes=_only(Way.BATCH)),
    Where("GPU, gather kernel", "cuda", way=Way.GATHER, takes=_only(Way.GATHER)),
    Where("GPU, a call for each piece", "cuda", way=Way.SINGLE, takes=_only(Way.SINGLE)),
)


def why_no_gpu() -> str | None:
    """None if there is one to test with."""
    if the_driver() is None:
        return "no CUDA driver (libcuda.so.1) that can be used is on this machine"
    if not torch.cuda.is_available():
        return f"this torch ({torch.__version__}) finds no GPU that it can use"
    return None


_FOLDER = tempfile.TemporaryDirectory(prefix="kvray-host-cuda-")  # goes with the process


@cache
def host_cuda() -> Path | None:
    """The driver of host_cuda.c, compiled once a process; None without a compiler."""
    library = Path(_FOLDER.name) / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    headers = [
        f"-I{path}" for path in Path(sys.prefix).glob("lib/*/site-packages/nvidia/*/include")
    ]
    source = str(Path(__file__).with_name("host_cuda.c"))
    try:
        subprocess.run([*command, *headers, source, "-o", str(library)], check=True)
    except FileNotFoundError:
        return None
    return library


@contextmanager
def open_executor(where: Where) -> Iterator[tuple[Executor, CudaDevice | None]]:
    """And the CUDA device under it, if there is one."""
    if not where.is_cuda:
        threads = CpuExecutor()
        try:
            yield threads, None
        finally:
            threads.close()
        return
    with ExitStack() as stack:
        driver = _driver(where, stack)
        device = CudaDevice(
            driver,
            ORDINAL,
            engine_stream=_engine_stream if where.device == "cuda" else lambda: 0,
            choose=_forced(where.way),
        )
        executor = StreamExecutor(device)
        try:
            yield executor, device
        finally:
            executor.close()
            device.let_go()


def _driver(where: Where, stack: ExitStack) -> Driver:
    if where.device == "cuda":
        torch.cuda.init()  # its context is current on this thread, as on a worker's
        torch.zeros(1, device="cuda")
        driver = the_driver()
        assert driver is not None
        return driver
    library = host_cuda()
    assert library is not None, "no C compiler: see why_not"
    os.environ["HOST_CUDA_VERSION"] = str(where.version)
    os.environ.pop("HOST_CUDA_LOCKABLE", None)
    if where.lockable_bytes is not None:
        os.environ["HOST_CUDA_LOCKABLE"] = str(where.lockable_bytes)
    driver = Driver(str(library))
    stack.callback(driver.release_context, ORDINAL)
    stack.enter_context(driver.in_context(driver.retain_context(ORDINAL)))
    return driver


def _engine_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _forced(way: Way | None) -> Any:
    """The choice of a worker, or this way wherever the device has it."""
    if way is None:
        return choose_way

    def choose(**part: Any) -> Way:
        if way is Way.GATHER and part["is_locked"] and part["abilities"].gathers:
            return way
        return Way.SINGLE if way is Way.SINGLE else choose_way(**part, gather_below_bytes=_NEVER)

    return choose


_NEVER = dict.fromkeys(Direction, 0)


# ── the slab ─────────────────────────────────────────────────────────────────────────────────────


class NodeSlab:
    """A slab in /dev/shm with its bookkeeping: the part of a NodeStore that a worker meets."""

    def __init__(self, geometry: Geometry) -> None:
        self._runtime = tempfile.TemporaryDirectory(prefix="kvray-")
        cluster = f"gpu-{os.getpid()}-{secrets.token_hex(4)}"
        self.owner = SlabOwner.open(
            cluster, NODE, geometry, lock_mode="off", runtime=Path(self._runtime.name)
        )
        self.core = StoreCore(geometry, generation_mark=self.owner.generation_mark)
        self._ops = itertools.count(1)
        self._holders: dict[Place, Holder] = {}
        self._client = ClientId(pid=os.getpid(), start_ticks=1, nonce=1)

    def map(self) -> MappedSlab:
        """As a worker that was handed the descriptor."""
        geometry = self.owner.geometry
        descriptor = os.dup(self.owner.fd)
        try:
            return MappedSlab.from_fd(
                descriptor, geometry.slab_bytes, geometry.extent_bytes, self.owner.slab_id
            )
        finally:
            os.close(descriptor)

    def reserve(self, slot_bytes: Sequence[int]) -> list[Place]:
        """A slot for each, for new blocks."""
        places = []
        for size in slot_bytes:
            number = next(self._ops)
            holder = (self._client, OpId(number))
            key = BlockKey(number.to_bytes(16, "little"))
            (place,) = self.core.reserve(
                holder, [(key, size)], writer=0, origin=Origin.ORIGINAL, now_ms=number
            )
            assert isinstance(place, Place), f"no room: {place}"
            self._holders[place] = holder
            places.append(place)
        self._write()
        return places

    def commit(self, places: Sequence[Place]) -> None:
        for place in places:
            holder = self._holders.pop(place)
            assert self.core.commit(holder, place.slot, place.generation, next(self._ops))
        self._write()

    def evict(self, places: Sequence[Place]) -> None:
        for place in places:
            assert self.core.evict(place.key)
        self._write()

    def _write(self) -> None:
        self.owner.apply_all(self.core.drain_effects())

    def close(self) -> None:
        self.owner.close(unlink=True)
        self._runtime.cleanup()


@dataclass(frozen=True, slots=True)
class Told:
    """What a load is told of its slots: see engine.arrivals.SlotsTold."""

    slots: npt.NDArray[np.uint32]
    generations: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    slot_bytes: npt.NDArray[np.uint64]
    keys: bytes

    @classmethod
    def of(cls, places: Sequence[Place]) -> "Told":
        return cls(
            np.array([place.slot for place in places], np.uint32),
            np.array([place.generation for place in places], np.uint64),
            np.array([place.offset for place in places], np.uint64),
            np.array([place.bytes for place in places], np.uint64),
            b"".join(place.key for place in places),
        )

    def keys_from(self, index: int) -> bytes:
        return self.keys[16 * index :]

    def __len__(self) -> int:
        return len(self.slots)


# ── the worker ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Blocks:
    """Of one request, on every rank: for each group its block ids, and the index of the first."""

    ids: tuple[npt.NDArray[np.int32], ...]
    indices: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        return [len(ids) for ids in self.ids]


@dataclass(slots=True)
class Rig:
    """ranks: the workers of one engine; all of them have one executor here."""

    slab: NodeSlab
    mapped: MappedSlab
    caches: list[Caches]
    executor: Executor
    groups: list[list[GroupPages]] = field(init=False)
    _jobs: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.groups = [
            group_pages(cache.canonical(), blocks_per_chunk=cache.shape.blocks_per_chunk)
            for cache in self.caches
        ]

    def slot_bytes(self, blocks: Blocks) -> list[int]:
        """Of each chunk of these blocks, with the parts of all ranks."""
        return [
            group.part_bytes * len(self.caches)
            for group, size, index in zip(self.groups[0], blocks.sizes, blocks.indices, strict=True)
            if size
            for _ in range(group.chunk_count(index, size))
        ]

    def pieces(self, rank: int, blocks: Blocks, places: Sequence[Place]) -> Pieces:
        offsets = np.array([place.offset for place in places], np.uint64)
        return build_pieces(
            self.groups[rank],
            block_ids=np.concatenate(blocks.ids),
            group_sizes=blocks.sizes,
            block_indices=blocks.indices,
            slot_pointers=offsets + np.uint64(self.mapped.address),
            rank=rank,
        )

    def begin_store(self, blocks: Blocks, places: Sequence[Place]) -> list[int]:
        """The job of each rank."""
        jobs = []
        for rank in range(len(self.caches)):
            pieces = self.pieces(rank, blocks, places)
            jobs.append(next(self._jobs))
            self.executor.submit(
                jobs[-1],
                pieces.device,
                pieces.slab,
                pieces.bytes,
                direction=Direction.STORE,
                keep_alive=self.mapped,
            )
        return jobs

    def begin_load(
        self, blocks: Blocks, places: Sequence[Place], *, until_s: float = 0.0
    ) -> list[int]:
        """until_s: by time.monotonic(); what is not READY then is a failed load."""
        jobs = []
        for rank in range(len(self.caches)):
            pieces = self.pieces(rank, blocks, places)
            arrivals = Arrivals(self.mapped, Told.of(places), pieces.slot_ends, until_s=until_s)
            jobs.append(next(self._jobs))
            self.executor.submit(
                jobs[-1],
                pieces.slab,
                pieces.device,
                pieces.bytes,
                direction=Direction.LOAD,
                arrived=arrivals.pieces,
                verify=arrivals.all_match,
                keep_alive=self.mapped,
            )
        return jobs

    def ends(self, jobs: Sequence[int]) -> list[CopyEnd]:
        """Waits for them as a worker does: by asking again."""
        found: list[CopyEnd] = []
        while len(found) < len(jobs):
            assert self.executor.wait_any(LIMIT_S), "a copy does not end"
            found += self.executor.finished()
        assert sorted(end.job_id for end in found) == sorted(jobs)
        return found

    def store(self, blocks: Blocks) -> list[Place]:
        places = self.slab.reserve(self.slot_bytes(blocks))
        assert all(end.ok for end in self.ends(self.begin_store(blocks, places)))
        self.slab.commit(places)
        return places

    def load(self, blocks: Blocks, places: Sequence[Place]) -> None:
        assert all(end.ok for end in self.ends(self.begin_load(blocks, places)))


def geometry_for(slot_bytes: int, slots: int) -> Geometry:
    """A slab with room for them, four slots an extent."""
    extent_bytes = max(aligned(slot_bytes) * 4, 64 * 1024)
    extents = -(-slots // 4) + 2
    headers = (extent_bytes // 4_096 + 1) * 64
    return Geometry((extent_bytes + headers) * extents + 64 * 1024, extent_bytes)


@contextmanager
def open_rig(
    where: Where, shape: CacheShape, dtype: str, *, blocks: int, ranks: int = 1, slots: int = 0
) -> Iterator[Rig]:
    """slots: how many chunks the slab has room for; 0: as many as there are blocks. It is locked
    when this begins, as far as the driver allows it.
    """
    slots = slots or -(-blocks // shape.blocks_per_chunk) + 2
    caches = [Caches(shape, dtype, blocks, where.device) for _ in range(ranks)]
    part_bytes = max(
        group.part_bytes
        for group in group_pages(caches[0].canonical(), blocks_per_chunk=shape.blocks_per_chunk)
    )
    slab = NodeSlab(geometry_for(part_bytes * ranks, slots))
    try:
        with open_executor(where) as (executor, device):
            mapped = slab.map()
            if device is not None and where.way is not Way.SINGLE:
                device.pins.begin(mapped)
                assert device.pins.wait(LIMIT_S)
            yield Rig(slab, mapped, caches, executor)
    finally:
        slab.close()
