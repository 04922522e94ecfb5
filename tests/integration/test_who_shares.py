"""Only engines whose bytes are equal share: not another model, other weights, another adapter.

Method: one node, engines that differ in one thing, the same prompt to each. All engines are on one
node, so a wrong hit would be the cheapest kind.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import in_engine
from tests.adapters import adapter
from tests.conftest import EngineFactory
from tests.models import tiny, tiny_gemma2
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


def test_two_models_use_one_slab_and_share_nothing(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    llama = engine_factory(tiny(), kv_transfer_config=nodes.transfer(0))
    other_weights = engine_factory(tiny(seed=1), kv_transfer_config=nodes.transfer(0))
    prompt = prompt_of(TOKENS, seed=1)

    llama.generate(prompt)
    assert llama.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128

    # The same config in another folder, with other weights: the same block hashes, other bytes.
    assert other_weights.generate(prompt).cached_tokens == 0
    assert other_weights.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128

    for engine in (llama, other_weights):
        assert engine.reset_prefix_cache()
        assert engine.generate(prompt).cached_tokens == full_chunks(TOKENS)


def test_adapters_are_named_by_what_was_loaded_and_not_by_what_lies_there_now(
    nodes: Nodes, engine_factory: EngineFactory, tmp_path: Path
) -> None:
    """The first request with an adapter loads it, so it goes without kvray. vLLM tells adapters
    apart by name and path only, and each of these has the same.
    """
    options = {"kv_transfer_config": nodes.transfer(0), "enable_lora": True, "max_lora_rank": 8}
    a, b = (engine_factory(tiny(), **options) for _ in range(2))
    prompt, other_prompt = (prompt_of(TOKENS, seed=seed) for seed in (2, 8))
    folder = tmp_path / "adapter"
    lora = ("style", 1, folder)
    adapter(folder, tiny(), seed=1)
    first = a.generate(prompt, max_tokens=8, lora=lora)
    assert b.generate(prompt, max_tokens=8, lora=lora).tokens == first.tokens
    for engine in (a, b):
        assert engine.call(in_engine.settle)["counters"]["stored_chunks"] == 0
    a.generate(prompt, lora=lora)  # the device has it, and now it has a name
    assert a.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128
    assert b.reset_prefix_cache()
    same = b.generate(prompt, max_tokens=8, lora=lora)
    assert (same.cached_tokens, same.tokens) == (full_chunks(TOKENS), first.tokens)
    assert b.generate(other_prompt).cached_tokens == 0  # and without an adapter: nothing

    # Another version is written to the same place. Both engines still have the first one.
    adapter(folder, tiny(), seed=2)
    a.generate(other_prompt, lora=lora)
    a.call(in_engine.settle)
    c = engine_factory(tiny(), **options)
    second = c.generate(prompt, max_tokens=8, lora=lora)
    assert second.tokens != first.tokens
    assert c.reset_prefix_cache()
    for text in (prompt, other_prompt):
        assert c.generate(text, lora=lora).cached_tokens == 0
    c.call(in_engine.settle)

    # Loaded in place: the device still has blocks of the first one, under the same hash.
    before = a.call(in_engine.stats)["counters"]["stored_chunks"]
    a.call(in_engine.load_adapter_again, *map(str, lora))
    a.generate(prompt, lora=lora)
    assert a.call(in_engine.settle)["counters"]["stored_chunks"] == before
    assert a.reset_prefix_cache()
    again = a.generate(prompt, max_tokens=8, lora=lora)
    assert (again.cached_tokens, again.tokens) == (full_chunks(TOKENS), second.tokens)


def test_another_hash_seed_or_tag_is_another_namespace(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    plain = engine_factory(tiny(), kv_transfer_config=nodes.transfer(0))
    tagged = engine_factory(tiny(), kv_transfer_config=nodes.transfer(0, model_tag="v2"))
    prompt = prompt_of(TOKENS, seed=3)
    plain.generate(prompt)
    plain.call(in_engine.settle)

    assert tagged.generate(prompt).cached_tokens == 0

    ours, theirs = plain.call(in_engine.fields), tagged.call(in_engine.fields)
    assert {name for name in ours if ours[name] != theirs[name]} == {"model_tag"}


def test_weights_that_kvray_did_not_see_are_shared_by_their_tag_or_with_nobody(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    """VLLM_PLUGINS names others only, so kvray comes when the model is loaded already."""
    unseen = {"environment": {"VLLM_PLUGINS": "lora_filesystem_resolver"}}
    plain = engine_factory(tiny(), kv_transfer_config=nodes.transfer(0), **unseen)
    a, b = (
        engine_factory(tiny(), kv_transfer_config=nodes.transfer(0, model_tag="v3"), **unseen)
        for _ in range(2)
    )
    prompt = prompt_of(TOKENS, seed=9)
    for engine in (plain, a):
        assert engine.generate(prompt).cached_tokens == 0
        assert engine.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128
    assert "have no digest" in plain.group.log.read_text()

    assert b.generate(prompt).cached_tokens == full_chunks(TOKENS)


def test_a_hybrid_model_with_a_sliding_window_is_cached(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    a = engine_factory(tiny_gemma2(), kv_transfer_config=nodes.transfer(0))
    b = engine_factory(tiny_gemma2(), kv_transfer_config=nodes.transfer(0))
    prompt = prompt_of(1_500, seed=4)
    a.generate(prompt, max_tokens=4)
    counters = a.call(in_engine.settle)
    if counters["uncached"]:
        assert "several cache groups" in counters["uncached"]  # vLLM 0.29, said by name
        assert b.generate(prompt, max_tokens=4).cached_tokens == 0
        return

    answer = b.generate(prompt, max_tokens=4)
    control = a.generate(prompt, max_tokens=4)

    assert answer.cached_tokens == control.cached_tokens > 0
    assert answer.tokens == control.tokens
    assert b.call(in_engine.settle)["counters"]["failed_loads"] == 0
