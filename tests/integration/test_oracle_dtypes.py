"""Each dtype of a model and of its cache that kvray takes: a hit has the KV of the engine itself.

Method: tests.oracle, one engine for each, which hits what it has stored. Each asks vLLM for async
scheduling, which vLLM switches off on CPUs: that no engine here schedules ahead is asserted, so
that a release that changes it is noticed.
"""

from collections.abc import Iterator

import pytest

from kvray.engine.arguments import SHOWN_CACHE_DTYPES
from tests import in_engine, kv_recorder
from tests.conftest import EngineFactory
from tests.models import tiny
from tests.oracle import Oracle
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"),
    [("float32", "auto"), *((name, name) for name in SHOWN_CACHE_DTYPES if name != "auto")],
)
def test_a_hit_is_what_the_engine_computes(
    nodes: Nodes, engine_factory: EngineFactory, dtype: str, kv_cache_dtype: str
) -> None:
    engine = engine_factory(
        tiny(),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=2_048,  # in float32 the pool holds half as many tokens
        async_scheduling=True,
        kv_transfer_config=nodes.transfer(0),
    )
    oracle = Oracle(engine)
    assert engine.call(kv_recorder.layer_dtypes) == [dtype]
    prompt = prompt_of(TOKENS, seed=1)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    oracle.forget_device()

    verdict = oracle.check(prompt, hit_tokens=full_chunks(TOKENS))

    assert verdict.loaded.blocks == TOKENS // CHUNK_TOKENS
    assert not engine.call(kv_recorder.schedules_ahead), "async scheduling on a CPU: show it, too"
    oracle.at_rest()
