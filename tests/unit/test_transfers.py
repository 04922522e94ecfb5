"""Goal: a worker copies what vLLM's own job says, on a CPU and with the code for GPUs, and a load
that failed is named. Method: vLLM's classes of jobs, a real client on a real socket, a real slab,
and no engine. The GPU is the host's: see tests/gpu/host_cuda.c.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from kvray.core.direction import Direction
from kvray.core.effects import Place
from kvray.core.messages import Bye
from kvray.engine.canary_rank import RankCanary
from kvray.engine.jobs import SlotSpec
from kvray.engine.pieces import group_pages
from kvray.engine.transfers import Transfers
from kvray.engine.workplace import Copies
from kvray.node.client import WorkerClient
from tests.gpu.caches import Caches, CacheShape
from tests.gpu.rig import LIMIT_S, ON_THE_HOST, NodeSlab, Where, host_cuda, open_executor
from tests.scripted_node import GEOMETRY, PATIENCE_S, ScriptedNode

pytestmark = pytest.mark.engine

SHAPE = CacheShape("small", 4, 2, 64, tokens_per_block=16, blocks_per_chunk=4)
BLOCKS = 32
STORED, LOADED = range(2, 10), range(20, 28)  # two chunks


class Worker:
    """Transfers with its caches, its client and the slab of its node."""

    def __init__(
        self, slab: NodeSlab, node: ScriptedNode, client: WorkerClient, copies: Copies
    ) -> None:
        self.slab = slab
        self.node = node
        self.cache = Caches(SHAPE, "bf16", BLOCKS, "cpu")
        self.groups = group_pages(self.cache.canonical(), blocks_per_chunk=4)
        self.copies = copies
        self.transfers = Transfers(
            groups=self.groups,
            rank=0,
            client=client,
            copies=copies,
            canary=RankCanary(self.cache.canonical(), rank=0),
        )
        session = client.wait_session(PATIENCE_S)
        assert session is not None
        copies.meet(session)
        assert copies.device is None or copies.device.pins.wait(LIMIT_S)
        self.random = torch.Generator()
        self.transfers.begin_step(void_before=0, computes=False)

    def reserve(self) -> list[Place]:
        return self.slab.reserve([self.groups[0].part_bytes] * 2)

    def slots(self, places: list[Place]) -> SlotSpec:
        return SlotSpec.of(
            self.slab.owner.slab_id,
            [place.key for place in places],
            [(place.slot, place.generation, place.offset) for place in places],
            [place.bytes for place in places],
        )

    def content(self, place: Place) -> bytes:
        slab = self.slab.map()
        return ctypes.string_at(slab.address + place.offset, place.bytes)

    def ended(self, job_id: int) -> set[int]:
        """Waits for it; which jobs have failed."""
        results = self.transfers.get_finished()
        while not results:
            results = self.transfers.get_finished()
        assert [(result.job_id, result.success) for result in results] == [(job_id, True)]
        return self.transfers.take_failed_jobs()


def blocks(ids: range) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(list(ids), group_sizes=(len(ids),), block_indices=(0,))


@pytest.fixture(params=ON_THE_HOST[:2], ids=str)
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    where: Where = request.param
    if where.is_cuda and host_cuda() is None:
        pytest.skip("no C compiler for the host's CUDA driver")
    slab = NodeSlab(GEOMETRY)
    with TemporaryDirectory(prefix="kvray-") as folder:  # a socket's path must be short
        path = Path(folder) / "node.sock"
        with ScriptedNode(path) as node, open_executor(where) as (executor, device):
            os.close(node.slab_fd)
            node.slab_fd, node.slab_id = os.dup(slab.owner.fd), slab.owner.slab_id
            client = WorkerClient(find_socket=lambda: str(path), engine_nonce=1, label="rank 0")
            client.start()
            yield Worker(slab, node, client, Copies(executor, device))
            client.close()
    slab.close()


def test_a_job_of_vllm_moves_its_blocks(worker: Worker) -> None:
    cache, transfers = worker.cache, worker.transfers
    cache.randomize(worker.random)
    before = [cache.pages(layer).clone() for layer in range(SHAPE.layers)]
    places = worker.reserve()
    assert transfers.submit_store(1, blocks(STORED), worker.slots(places))
    transfers.wait({1})
    assert worker.ended(1) == set()
    worker.slab.commit(places)
    cache.randomize(worker.random)
    wanted = [cache.pages(layer).clone() for layer in range(SHAPE.layers)]
    assert transfers.submit_load(2, worker.slots(places), blocks(LOADED))
    assert worker.ended(2) == set()
    for layer in range(SHAPE.layers):
        wanted[layer][LOADED.start : LOADED.stop] = before[layer][STORED.start : STORED.stop]
        assert torch.equal(cache.pages(layer), wanted[layer])
    assert transfers.take_failed_blocks() == set()
    assert transfers.switch.off is None
    assert sum(transfers.take_copies().values()) == 2


def test_a_canary_lies_in_its_slots_as_a_store_of_its_blocks_would(worker: Worker) -> None:
    cache, transfers = worker.cache, worker.transfers
    cache.randomize(worker.random)
    stored, written = worker.reserve(), worker.reserve()
    assert transfers.submit_store(1, blocks(STORED), worker.slots(stored))
    transfers.wait({1})
    assert worker.ended(1) == set()
    chunks = [[list(STORED[:4]), list(STORED[4:])]]

    first = transfers.canary.take(chunks, ["bfloat16"], keep=True).saw
    again = transfers.canary.take(chunks, ["bfloat16"], keep=False).saw
    cache.randomize(worker.random)
    other = transfers.canary.take(chunks, ["bfloat16"], keep=False).saw

    assert transfers.write_canary(worker.slots(written), [0, 1])
    for place, twin in zip(stored, written, strict=True):
        assert worker.content(place) == worker.content(twin)
    assert again.digest == first.digest
    assert again.distance == 0.0
    assert other.digest != first.digest
    assert other.distance > 0.5  # nothing of it is alike


def test_a_load_of_slots_that_were_given_away_is_named(worker: Worker) -> None:
    places = worker.reserve()
    worker.slab.commit(places)
    worker.slab.evict(places)
    assert worker.transfers.submit_load(3, worker.slots(places), blocks(LOADED))
    assert worker.ended(3) == {3}
    assert worker.transfers.take_failed_blocks() == set(LOADED)


HOLES = {  # what vLLM's connector makes of chunks whose head has left the window
    "a chunk without its head": ([13, *range(14, 18)], 1),
    "as many blocks as one chunk, of two": ([14, 15, 16, 17], 2),
    "a block id of nobody": ([0, *range(3, 10)], 0),
}


@pytest.mark.parametrize("hole", HOLES)
def test_a_store_with_a_hole_fails_and_the_next_one_does_not(worker: Worker, hole: str) -> None:
    """Its slots would become READY as a whole, with what their last owner has left in them."""
    ids, first = HOLES[hole]
    places = worker.reserve()
    job = GPULoadStoreSpec(ids, group_sizes=(len(ids),), block_indices=(first,))
    assert worker.transfers.submit_store(1, job, worker.slots(places))
    assert worker.ended(1) == {1}
    assert worker.transfers.switch.off is None
    assert worker.transfers.submit_store(2, blocks(STORED), worker.slots(places))
    worker.transfers.wait({2})
    assert worker.ended(2) == set()


def test_a_load_of_more_chunks_than_slots_fails_and_the_next_one_does_not(worker: Worker) -> None:
    places = worker.reserve()
    worker.slab.commit(places)
    job = GPULoadStoreSpec(list(range(20, 32)), group_sizes=(12,), block_indices=(0,))
    assert worker.transfers.submit_load(1, worker.slots(places), job)
    assert worker.ended(1) == {1}
    assert worker.transfers.submit_load(2, worker.slots(places), blocks(LOADED))
    assert worker.ended(2) == set()


def test_a_job_for_a_slab_that_is_not_mapped_fails_at_once(worker: Worker) -> None:
    assert worker.transfers.submit_load(4, SlotSpec.void(), blocks(LOADED))
    assert worker.ended(4) == {4}


def test_ranks_of_one_shape_shake_hands_alike(worker: Worker) -> None:
    page_bytes = SHAPE.page_elements * 2
    assert worker.transfers.handshake().part_bytes == (page_bytes * SHAPE.layers * 4,)
    assert np.prod(worker.cache.layer(0).shape) == page_bytes // 2 * BLOCKS


def test_a_worker_that_has_copied_everything_says_bye(worker: Worker) -> None:
    worker.transfers.shutdown()
    worker.node.wait(Bye)


def test_a_worker_whose_copies_do_not_end_says_no_bye(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NodeStore that hears one frees what is still being written into (rule 3)."""
    monkeypatch.setattr("kvray.engine.copier.CLOSE_LIMIT_S", 0.05)
    monkeypatch.setattr("kvray.engine.streams.CLOSE_LIMIT_S", 0.05)
    goes_on, nothing = threading.Event(), np.empty(0, np.uint64)
    executor = worker.copies.executor
    executor.submit(9, *(nothing,) * 3, direction=Direction.STORE, verify=goes_on.wait)
    try:
        worker.transfers.shutdown()
        worker.node.wait_closed()
        assert not worker.node.all(Bye)
    finally:
        goes_on.set()
        executor.wait({9})
