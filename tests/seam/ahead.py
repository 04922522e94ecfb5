"""A SeamEngine that computes, and schedules ahead: for async scheduling, which no CPU engine does.

    schedule n+1 ──▶ the workers compute n and copy ──▶ update_from_output of n

A token's KV is a digest of all tokens up to it, so what attention would read can be held to that,
before each token that is computed. Copies move real bytes, between arrays and the NodeStore's slab,
at a time of the test's choosing; vLLM may insist on one (a flush).
"""

import random
import zlib
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request

from kvray.engine.jobs import KVRayWorkerMetadata
from kvray.engine.pieces import GroupPages, TensorPages, build_pieces
from kvray.engine.raw_copy import copy_pieces
from tests.seam.engine import (
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    DEVICE_BLOCKS,
    PART_BYTES,
    RANKS,
    SeamEngine,
)

BLOCK_BYTES = PART_BYTES * BLOCK_TOKENS // CHUNK_TOKENS
WORDS = BLOCK_BYTES // BLOCK_TOKENS // 4  # of a token's KV
ANSWER = 7  # every token of every answer
BATCHES = 2  # that vLLM has under way at once
MOVE_SHARE = 0.1  # of the copies under way, in each step: most outlive several steps


class AheadEngine(SeamEngine):
    """depth: batches under way at once; 1 is what every other test engine does."""

    depth = BATCHES
    window: int | None = None  # attention reads so many tokens: the token itself, and those before

    def __post_init__(self) -> None:
        super().__post_init__()
        per_chunk = int(self.connector.connector_scheduler.config.blocks_per_chunk)
        shape = DEVICE_BLOCKS, BLOCK_TOKENS, WORDS
        self.devices = [np.zeros(shape, np.uint32) for _ in range(RANKS)]
        self.groups = [
            GroupPages((TensorPages(device.ctypes.data, BLOCK_BYTES, BLOCK_BYTES),), per_chunk)
            for device in self.devices
        ]
        self.batches: deque[Any] = deque()
        self.tables: dict[str, list[int]] = {}
        self.digests: dict[str, npt.NDArray[np.uint32]] = {}
        self.prompt_tokens: dict[str, int] = {}
        self.moving: dict[int, Any] = {}
        self.read_tokens = 0  # whose KV was held to its digest
        self.loaded_blocks = 0

    def add(self, name: str, tokens: list[int], *, answer_tokens: int = 1) -> Request:
        self.prompt_tokens[name] = len(tokens)
        self.digests[name] = digests_of([*tokens, *[ANSWER] * answer_tokens])
        return super().add(name, tokens, answer_tokens=answer_tokens)

    def turn(self, source: random.Random) -> None:
        """As vLLM's EngineCore with a queue of batches: schedules if there is room in it, and else
        hears what the oldest has computed.
        """
        if self.scheduler.has_requests() and len(self.batches) < self.depth:
            self.batches.append(self.scheduler.schedule())
            if len(self.batches) < self.depth:
                return
        if self.batches:
            output = self.batches.popleft()
            self.scheduler.update_from_output(output, self._execute(output, source))
            self.connector.lookups.check()

    def _execute(self, output: Any, source: random.Random) -> ModelRunnerOutput:
        meta = output.kv_connector_metadata
        moved = [self._move(job) for job in meta.jobs_to_flush or () if job in self.moving]
        starts = self._take_tables(output)
        counts = output.num_scheduled_tokens
        for name, count in counts.items():
            self._compute(name, starts[name], starts[name] + count)
        self._take_jobs(meta)
        self.moving |= meta.load_jobs | meta.store_jobs
        moved += [self._move(job) for job in list(self.moving) if source.random() < MOVE_SHARE]
        report = self._report(moved)
        ids = list(counts)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: i for i, name in enumerate(ids)},
            sampled_token_ids=[
                [ANSWER] if starts[name] + counts[name] >= self.prompt_tokens[name] else []
                for name in ids
            ],
            kv_connector_output=None if report.is_empty() else report,
        )

    def _take_tables(self, output: Any) -> dict[str, int]:
        """Where each request begins in this step."""
        starts = {}
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            blocks = list(cached.new_block_ids[i][0]) if cached.new_block_ids[i] else []
            known = [] if name in cached.resumed_req_ids else self.tables[name]
            self.tables[name] = [*known, *blocks]
            starts[name] = cached.num_computed_tokens[i]
        return starts

    def _compute(self, name: str, start: int, end: int) -> None:
        """Attention reads all before, and the KV of the new tokens is written."""
        first = 0 if self.window is None else max(0, start - self.window + 1)
        positions = np.arange(first, end)
        digests, table = self.digests[name][first:end, None], np.array(self.tables[name])
        places = table[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS
        read = start - first
        for device in self.devices:
            found = device[places]
            wrong = (found[:read] != digests[:read]).any(axis=1)
            assert not wrong.any(), f"{name} reads wrong KV at token {first + int(wrong.argmax())}"
            found[read:] = digests[read:]
            device[places] = found
        self.read_tokens += read

    def _move(self, job_id: int) -> int:
        job = self.moving.pop(job_id)
        is_load = self.copies[job_id].is_load
        slots, device = (job.src_spec, job.dst_spec) if is_load else (job.dst_spec, job.src_spec)
        if self.copies[job_id].failed:
            return job_id
        self.loaded_blocks += len(device.block_ids) if is_load else 0
        for rank, group in enumerate(self.groups):
            pieces = build_pieces(
                [group],
                block_ids=device.block_ids,
                group_sizes=device.group_sizes,
                block_indices=device.block_indices,
                slot_pointers=slots.offsets + np.uint64(self.store.slab.address),
                rank=rank,
            )
            ends = (pieces.slab, pieces.device) if is_load else (pieces.device, pieces.slab)
            copy_pieces(*ends, pieces.bytes)
        return job_id

    def _report(self, moved: list[int]) -> KVConnectorOutput:
        report = KVConnectorOutput()
        if not moved:
            return report
        ended = {job_id: self.copies.pop(job_id) for job_id in moved}
        report.kv_connector_worker_meta = KVRayWorkerMetadata(
            completed_jobs=dict.fromkeys(ended, RANKS),
            failed_jobs={job_id for job_id, copy in ended.items() if copy.failed},
        )
        report.finished_recving = {copy.req_id for copy in ended.values() if copy.is_load}
        assert not any(copy.failed for copy in ended.values() if copy.is_load), "a load failed"
        return report


def digests_of(tokens: list[int]) -> npt.NDArray[np.uint32]:
    """For each token of all up to it."""
    found, digest = [], 0
    for token in tokens:
        digest = zlib.crc32(token.to_bytes(4, "little"), digest)
        found.append(digest)
    return np.array(found, np.uint32)
