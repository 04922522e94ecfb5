"""Async scheduling: what attention reads is what was computed, though vLLM schedules ahead.

Method: vLLM's AsyncScheduler, which has scheduled the next step before it hears of this one, over
random requests that share documents, on a device with too little room: copies end late, requests
are aborted and preempted, the device's cache is emptied. The same with the plain Scheduler. Every
token that is computed first has the KV of all tokens before it compared (see ahead).
"""

import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvray.engine.arguments import transfer_settings
from tests.seam import engine as seam_engine
from tests.seam.ahead import BLOCK_BYTES, AheadEngine
from tests.seam.engine import CHUNK_TOKENS, vllm_config
from tests.seam.store import SeamStore

pytestmark = [pytest.mark.engine]

REQUESTS = 60
WINDOW_TOKENS = 256
MAX_TURNS = 20_000
PATIENT = {"step_budget_ms": 1_000, "lookup_deadline_ms": 20_000}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def store() -> Iterator[SeamStore]:
    with tempfile.TemporaryDirectory(prefix="kvray-ahead-") as runtime:  # pytest's are too long
        made = SeamStore(Path(runtime))
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [None, WINDOW_TOKENS], ids=["full", "window"])
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "in step"])
def test_attention_reads_what_was_computed(
    config: Any,
    store: SeamStore,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    *,
    window: int | None,
    ahead: bool,
) -> None:
    if window is not None:
        windowed = partial(SlidingWindowSpec, sliding_window=window)
        monkeypatch.setattr(seam_engine, "FullAttentionSpec", windowed)
        monkeypatch.setattr(seam_engine, "PART_BYTES", BLOCK_BYTES)  # a chunk is one block
    monkeypatch.setattr(config.scheduler_config, "async_scheduling", ahead)
    if ahead:
        monkeypatch.setattr(seam_engine, "Scheduler", AsyncScheduler)
    config.kv_transfer_config = KVTransferConfig(**transfer_settings(PATIENT | store.settings()))
    monkeypatch.setattr(AheadEngine, "window", window)
    engine = AheadEngine(config, store)
    engine.depth = 2 if ahead else 1
    assert engine.scheduler.defer_block_free is ahead
    try:
        run(engine, random.Random(seed))
        assert engine.unfinished() == []
        assert engine.lost_device_blocks() == 0
        assert engine.loaded_blocks > 0
        assert engine.read_tokens > REQUESTS * CHUNK_TOKENS
        assert engine.connector.lookups.counters["failed_loads"] == 0
    finally:
        engine.close()


def run(engine: AheadEngine, source: random.Random) -> None:
    documents = [
        [source.randrange(1, 30_000) for _ in range(source.randrange(2, 7) * CHUNK_TOKENS)]
        for _ in range(4)
    ]
    left, alive = REQUESTS, []
    for _ in range(MAX_TURNS):
        if left and source.random() < 0.2:
            left -= 1
            tail = [source.randrange(1, 30_000) for _ in range(source.randrange(1, 200))]
            answer_tokens = source.randrange(1, 100)
            engine.add(f"r{left}", source.choice(documents) + tail, answer_tokens=answer_tokens)
            alive.append(f"r{left}")
        if alive and source.random() < 0.02:
            engine.abort(alive.pop(source.randrange(len(alive))))
        if source.random() < 0.05:
            engine.reset_device_cache()  # refused where a block is in use
        engine.turn(source)
        if not left and not engine.scheduler.has_requests() and not engine.batches:
            if not engine.connector.pending():
                return
            engine.batches.append(engine.scheduler.schedule())  # what is stored ends in a step
    pytest.fail(f"requests do not end: {engine.unfinished()}")
