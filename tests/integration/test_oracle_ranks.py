"""Two ranks: each rank's part of a hit is what that rank computes itself.

Method: tests.oracle, which reads the caches of both workers. Prompts are short: tensor parallel
prefill is slow on two cores.
"""

from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.oracle import Oracle
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engine(nodes: Nodes, shared_engine_factory: EngineFactory) -> Engine:
    return shared_engine_factory(
        tiny(),
        tensor_parallel_size=2,
        kv_cache_memory_bytes=32 << 20,
        max_model_len=2_048,
        kv_transfer_config=nodes.transfer(0),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ).ready()


@pytest.fixture(scope="module")
def oracle(engine: Engine) -> Oracle:
    return Oracle(engine)


@pytest.mark.parametrize("tokens", [130, 300, 500])
def test_a_hit_has_the_right_part_on_each_rank(engine: Engine, oracle: Oracle, tokens: int) -> None:
    prompt = prompt_of(tokens, seed=tokens)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    oracle.forget_device()

    verdict = oracle.check(prompt, hit_tokens=full_chunks(tokens))

    assert verdict.loaded.blocks == tokens // CHUNK_TOKENS
    oracle.at_rest()
