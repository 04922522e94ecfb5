"""A copy that fails costs a recompute: never a wrong answer, never a block that others believe.

Method: faults planted at the Executor of a real engine, the answers compared with those of before.
"""

from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engine(nodes: Nodes, shared_engine_factory: EngineFactory) -> Engine:
    return shared_engine_factory(tiny(), kv_transfer_config=nodes.transfer(0)).ready()


def test_a_rank_whose_copy_failed_is_never_committed(nodes: Nodes, engine: Engine) -> None:
    prompt = prompt_of(TOKENS, seed=1)
    before = set(nodes.keys(0))
    engine.call(in_engine.fail_copies)

    engine.generate(prompt)
    counters = engine.call(in_engine.settle)["counters"]

    assert counters["failed_stores"] > 0
    assert set(nodes.keys(0)) == before
    engine.call(in_engine.mend_copies)
    # The slots came back: the same chunks can be stored by the next request.
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == 0
    engine.call(in_engine.settle)
    assert len(set(nodes.keys(0)) - before) == TOKENS // 128


def test_a_slot_that_was_rewritten_under_the_copy_is_a_failed_load_and_is_recomputed(
    nodes: Nodes, engine: Engine
) -> None:
    prompt = prompt_of(TOKENS, seed=2)
    cold = engine.generate(prompt, max_tokens=6)
    before = engine.call(in_engine.settle)["counters"]
    assert engine.reset_prefix_cache()
    engine.call(in_engine.rewrite_every_header_under_loads)

    answer = engine.generate(prompt, max_tokens=6)

    engine.call(in_engine.mend_copies)
    after = engine.call(in_engine.settle)["counters"]
    assert after["failed_loads"] == before["failed_loads"] + 1
    assert (answer.cached_tokens, answer.tokens) == (0, cold.tokens)


def test_a_request_whose_load_failed_is_not_looked_up_again(nodes: Nodes, engine: Engine) -> None:
    prompt = prompt_of(TOKENS, seed=3)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()
    before = engine.call(in_engine.stats)["counters"]
    engine.call(in_engine.fail_copies)

    engine.generate(prompt)

    engine.call(in_engine.mend_copies)
    after = engine.call(in_engine.settle)["counters"]
    assert after["lookups"] == before["lookups"] + 1
    # The next request asks again, and hits.
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(TOKENS)
