"""In each worker: copies between the paged cache and the slab. An OffloadingWorker of vLLM.

    store   device blocks ──▶ this rank's part of each slot; EngineCore commits when all ranks have
    load    this rank's part of each slot ──▶ device blocks, slot by slot when its header says that
            the block has come; then the headers are compared with what this rank was told to load
            (rule 2 at home): another content is a failed load

vLLM wants to hear that every job succeeded; failures are kept aside here and travel in kvray's own
metadata.
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from kvray.core.direction import Direction
from kvray.core.durations import copy_counter
from kvray.engine.arrivals import Arrivals
from kvray.engine.canary_rank import RankCanary
from kvray.engine.copier import Executor
from kvray.engine.guard import Switch, guarded, nothing
from kvray.engine.jobs import RankHandshake, SlotSpec
from kvray.engine.pieces import GroupPages, are_whole_chunks, build_pieces, fits
from kvray.engine.workplace import Copies
from kvray.node.client import WorkerClient
from kvray.node.process import boot_id

logger = logging.getLogger("kvray.engine")

IDLE_WAIT_S = 0.002  # a step without work takes about 1 ms; a copy of 100 MB about 10 ms


def host_name() -> str:
    """Equal for two processes exactly if they share this boot of this machine."""
    return f"{socket.gethostname()}/{boot_id().hex()}"


class Transfers(OffloadingWorker):
    """One per worker. Called on the worker's own thread only."""

    def __init__(
        self,
        *,
        groups: Sequence[GroupPages],
        rank: int,
        client: WorkerClient,
        copies: Copies,
        canary: RankCanary,
    ) -> None:
        self.switch = Switch()
        self._groups = list(groups)
        self._rank = rank
        self._client = client
        self.canary = canary
        self._copies_of_device = copies
        self._executor: Executor = copies.executor
        self._void_before = 0
        self._computes = False
        self._loads: dict[int, tuple[GPULoadStoreSpec, SlotSpec]] = {}
        self._refused: list[int] = []  # jobs that could not even begin
        self.failed_since_report: set[int] = set()
        self._failed_blocks: set[int] = set()
        self._copies: Counter[str] = Counter()

    def handshake(self) -> RankHandshake:
        return RankHandshake(
            rank=self._rank,
            part_bytes=tuple(group.part_bytes for group in self._groups),
            host=host_name(),
        )

    def begin_step(self, *, void_before: int, computes: bool) -> None:
        """void_before: loads with smaller job ids have met new weights and end as failed.
        computes: whether this step runs the model; if not, get_finished may wait a little.
        """
        self._void_before = max(self._void_before, void_before)
        self._computes = computes

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        self._begin(job_id, src_spec, dst_spec, is_load=False)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._loads[job_id] = (dst_spec, src_spec)
        self._begin(job_id, dst_spec, src_spec, is_load=True)
        return True

    def _begin(self, job_id: int, device: Any, slots: Any, *, is_load: bool) -> None:
        if not self._try_begin(job_id, device, slots, is_load):
            self._refused.append(job_id)

    @guarded(lambda *_: False)
    def _try_begin(self, job_id: int, device: Any, slots: Any, is_load: bool) -> bool:  # noqa: FBT001
        session = self._client.session_for(slots.slab_id) if len(slots) else None
        if session is None:
            return False
        slab = session.slab
        assert slab is not None, "a worker's client maps the slab"
        if not slab.contains(slots.offsets, slots.slot_bytes):
            return False
        blocks = {"group_sizes": device.group_sizes, "block_indices": device.block_indices}
        if is_load:
            is_sound = fits(self._groups, **blocks, slot_count=len(slots))
        else:
            is_sound = are_whole_chunks(
                self._groups, block_ids=device.block_ids, **blocks, slot_count=len(slots)
            )
        if not is_sound:
            logger.warning(
                "kvray: a %s of %d device blocks into %d slots does not fill its slots; it fails",
                "load" if is_load else "store",
                len(device.block_ids),
                len(slots),
            )
            return False
        pieces = build_pieces(
            self._groups,
            block_ids=device.block_ids,
            **blocks,
            slot_pointers=slots.offsets + np.uint64(slab.address),
            rank=self._rank,
        )
        if is_load:
            until_s = time.monotonic() + slots.wait_ms / 1_000
            arrivals = Arrivals(slab, slots, pieces.slot_ends, until_s=until_s)
            self._executor.submit(
                job_id,
                pieces.slab,
                pieces.device,
                pieces.bytes,
                direction=Direction.LOAD,
                arrived=arrivals.pieces,
                verify=arrivals.all_match,
                keep_alive=slab,
            )
        else:
            self._executor.submit(
                job_id,
                pieces.device,
                pieces.slab,
                pieces.bytes,
                direction=Direction.STORE,
                keep_alive=slab,
            )
        return True

    def get_finished(self) -> list[TransferResult]:
        results = [self._ended(job_id, ok=False) for job_id in self._refused]
        self._refused.clear()
        if self._loads and not results and not self._computes:
            # Nothing else to do in this step: the copy's own thread gets the core (and the GIL).
            self._executor.wait_any(IDLE_WAIT_S)
        results += [
            self._ended(end.job_id, ok=end.ok, copied_bytes=end.bytes, seconds=end.seconds)
            for end in self._executor.finished()
        ]
        return results

    def _ended(
        self, job_id: int, *, ok: bool, copied_bytes: int = 0, seconds: float = 0.0
    ) -> TransferResult:
        load = self._loads.pop(job_id, None)
        if load is not None and (not ok or job_id < self._void_before):
            self._failed_blocks.update(load[0].block_ids.tolist())
            ok = False
        if ok:
            direction = "store" if load is None else "load"
            self._copies[copy_counter(direction, round(seconds * 1_000))] += 1
        else:
            self.failed_since_report.add(job_id)
        return TransferResult(
            job_id, success=True, transfer_size=copied_bytes, transfer_time=seconds
        )

    @guarded(lambda *_: False)
    def write_canary(self, spec: SlotSpec, chunks: Sequence[int]) -> bool:
        """Whether this rank's part of these chunks of the canary is in these slots now."""
        session = self._client.session_for(spec.slab_id)
        if session is None or session.slab is None:
            return False
        return self.canary.write(session.slab, spec, chunks)

    def wait(self, job_ids: set[int]) -> None:
        """Returns when none of these copies is under way. The one wait of the engine for kvray
        (rule 5): vLLM overwrites the device blocks right after it.
        """
        self._executor.wait(job_ids)

    def take_failed_jobs(self) -> set[int]:
        failed, self.failed_since_report = self.failed_since_report, set()
        return failed

    def take_copies(self) -> Counter[str]:
        """How often a copy that was good took how long, since the last call."""
        copies, self._copies = self._copies, Counter()
        return copies

    def take_failed_blocks(self) -> set[int]:
        """Device blocks that failed loads should have filled, since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    @guarded(nothing, also_off=True)
    def shutdown(self) -> None:
        """Bye says that this process writes nothing more (rule 3). Where that is not so, nothing is
        said: what it writes into is free when the NodeStore sees this process gone.
        """
        has_ended = self._copies_of_device.close()
        self._client.close(says_bye=has_ended)
