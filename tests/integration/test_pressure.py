"""Too little room costs hits, never an answer: a small slab, a small device pool, aborts.

Method: workloads larger than what they run in; every answer is compared with a control.
"""

from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

SLAB_BYTES = 26 << 20  # twenty-odd chunks of 1 MiB, and a canary of two
EXTENT_BYTES = 4 << 20


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(2, slab_bytes=SLAB_BYTES, extent_bytes=EXTENT_BYTES) as running:
        yield running


def test_a_slab_smaller_than_the_workload_evicts_and_serves(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    a = engine_factory(tiny(), kv_transfer_config=nodes.transfer(0))
    b = engine_factory(tiny(), kv_transfer_config=nodes.transfer(1))
    prompts = [prompt_of(1_000, seed=seed) for seed in range(6)]  # 42 chunks

    controls = [a.generate(prompt, max_tokens=4) for prompt in prompts]
    a.call(in_engine.settle)
    for prompt, control in zip(prompts, controls, strict=True):
        answer = b.generate(prompt, max_tokens=4)
        # Hit or not; at equal hit lengths the tokens are equal (bf16).
        if answer.cached_tokens == control.cached_tokens:
            assert answer.tokens == control.tokens
    counters = b.call(in_engine.settle)["counters"]

    assert counters["failed_loads"] == 0
    assert counters["hit_tokens_peer"] >= full_chunks(1_000)  # the last of A's prompts at least
    for index in (0, 1):
        assert nodes.status(index)["store"]["ready"] <= SLAB_BYTES >> 20


def test_preempted_requests_come_back_with_the_right_tokens(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    """In float32, where the tokens do not depend on how requests are batched or resumed."""
    roomy = engine_factory(tiny(), dtype="float32", max_model_len=1_024)
    cramped = engine_factory(
        tiny(),
        dtype="float32",
        max_model_len=1_024,
        num_gpu_blocks_override=20,  # three prompts of 6 blocks; each grows into a seventh
        kv_transfer_config=nodes.transfer(0),
    )
    prompts = [prompt_of(700, seed=100 + seed) for seed in range(3)]
    controls = [roomy.generate(prompt, max_tokens=90).tokens for prompt in prompts]
    cramped.call(in_engine.count_preemptions)

    answers = cramped.generate_many(prompts, max_tokens=90)

    assert cramped.call(in_engine.preemptions) > 0
    assert [answer.tokens for answer in answers] == controls
    assert cramped.call(in_engine.settle)["counters"]["failed_loads"] == 0


def test_an_abort_while_blocks_are_on_their_way_leaves_no_pin(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    a = engine_factory(tiny(), kv_transfer_config=nodes.transfer(0))
    b = engine_factory(tiny(), kv_transfer_config=nodes.transfer(1))
    prompt = prompt_of(1_000, seed=200)
    a.generate(prompt)
    a.call(in_engine.settle)
    nodes.wait_listed(nodes.keys(0))

    b.call(in_engine.abort_at_first_retry, prompt)

    b.call(in_engine.settle)
    nodes.wait_unpinned(1)
    assert b.generate(prompt).cached_tokens == full_chunks(1_000)
