"""Two ranks, one slot: each rank has its part of a chunk, and a chunk is whole or not there."""

from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine, Mode
from tests.models import tiny
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 300  # tensor parallel prefill is slow on two cores


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engine(nodes: Nodes, shared_engine_factory: EngineFactory) -> Engine:
    return shared_engine_factory(
        tiny(),
        mode=Mode.MULTIPROCESS,
        tensor_parallel_size=2,
        kv_transfer_config=nodes.transfer(0),
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the fault that is planted by function
        },
    ).ready()


def test_both_ranks_parts_make_one_block_that_hits(nodes: Nodes, engine: Engine) -> None:
    prompt = prompt_of(TOKENS, seed=1)
    engine.generate(prompt, max_tokens=4)
    stats = engine.call(in_engine.settle)
    assert stats["counters"]["stored_chunks"] == TOKENS // CHUNK_TOKENS
    assert stats["slot_bytes"] == {"0": 2 * (512 << 10)}  # each rank has half of the KV heads
    control = engine.generate(prompt, max_tokens=4)

    assert engine.reset_prefix_cache()
    answer = engine.generate(prompt, max_tokens=4)

    assert answer.cached_tokens == control.cached_tokens == full_chunks(TOKENS)
    assert answer.tokens == control.tokens
    assert engine.call(in_engine.stats)["counters"]["failed_loads"] == 0


def test_if_one_of_two_ranks_fails_the_chunk_is_not_committed(nodes: Nodes, engine: Engine) -> None:
    before = set(nodes.keys(0))
    engine.call(in_engine.on_rank, 1, "fail_copies")

    engine.generate(prompt_of(TOKENS, seed=2))
    counters = engine.call(in_engine.settle)["counters"]

    engine.call(in_engine.on_rank, 1, "mend_copies")
    assert counters["failed_stores"] > 0
    assert set(nodes.keys(0)) == before
