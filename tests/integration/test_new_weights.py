"""New weights never meet old KV, on this engine or on another, whatever is under way.

Method: an engine with loads and stores in flight (held back at the Executor) is reset, or told of
new weights; what was stored before must not be hit by it afterwards, and what was being stored must
not appear.
"""

from collections.abc import Iterator

import pytest

from kvray.core.ids import BlockKey
from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700
_canaries: set[BlockKey] = set()  # that were seen


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture
def engine(nodes: Nodes, engine_factory: EngineFactory) -> Engine:
    return engine_factory(tiny(), kv_transfer_config=nodes.transfer(0)).ready()


def stored(nodes: Nodes, engine: Engine) -> set[BlockKey]:
    """The keys of all blocks but the engine's canaries: another one comes with each change."""
    _canaries.update(BlockKey(bytes.fromhex(key)) for key in engine.call(in_engine.canary_keys))
    return set(nodes.keys(0)) - _canaries


def test_a_reset_of_the_connector_renames_this_engines_blocks_and_wipes_nobody(
    nodes: Nodes, engine: Engine
) -> None:
    prompt = prompt_of(TOKENS, seed=1)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    held = set(nodes.keys(0))

    assert engine.reset_prefix_cache(reset_connector=True)

    assert engine.generate(prompt).cached_tokens == 0
    assert held <= set(nodes.keys(0))  # other engines of this model keep theirs
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(TOKENS)  # under the new name


def test_a_store_under_way_at_a_reset_is_never_committed(nodes: Nodes, engine: Engine) -> None:
    prompt = prompt_of(TOKENS, seed=2)
    before = stored(nodes, engine)
    engine.generate(prompt)  # its last chunks wait for the next step to be copied

    assert engine.call(in_engine.stats)["pending"] > 0
    assert engine.reset_prefix_cache(reset_connector=True)

    counters = engine.call(in_engine.settle)["counters"]
    assert counters["stored_chunks"] == 0
    assert stored(nodes, engine) == before


def test_a_load_under_way_when_the_weights_change_ends_as_failed(
    nodes: Nodes, engine: Engine
) -> None:
    prompt = prompt_of(TOKENS, seed=3)
    engine.generate(prompt, max_tokens=4)
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()

    answer = engine.call(in_engine.reload_weights_under_a_load, prompt)

    assert answer["cached_tokens"] == 0
    counters = engine.call(in_engine.stats)["counters"]
    assert counters["failed_loads"] == 1


def test_nothing_is_stored_while_the_device_may_still_hold_old_blocks(
    nodes: Nodes, engine: Engine
) -> None:
    prompt = prompt_of(TOKENS, seed=4)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    before = stored(nodes, engine)

    engine.collective_rpc("reload_weights", None, str(tiny(seed=1)))

    engine.generate(prompt)  # the device's own cache hits: KV of the old weights
    engine.call(in_engine.settle)
    assert stored(nodes, engine) == before
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == 0
    engine.call(in_engine.settle)
    assert len(stored(nodes, engine) - before) == TOKENS // 128


def test_weights_that_came_later_have_the_name_of_those_that_were_there_from_the_start(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    """And the very same weights loaded again have their old name back."""
    plain, changed = (engine_factory(tiny(), kv_transfer_config=nodes.transfer(0)) for _ in "ab")
    other = engine_factory(tiny(seed=2), kv_transfer_config=nodes.transfer(0))
    prompt = prompt_of(TOKENS, seed=6)
    plain.generate(prompt)
    plain.call(in_engine.settle)
    expected = other.generate(prompt, max_tokens=8)
    other.call(in_engine.settle)
    assert expected.cached_tokens == 0

    changed.collective_rpc("reload_weights", None, str(tiny(seed=2)))
    hit = changed.generate(prompt, max_tokens=8)
    assert (hit.cached_tokens, hit.tokens) == (full_chunks(TOKENS), expected.tokens)

    changed.collective_rpc("reload_weights", None, str(tiny()))
    assert changed.reset_prefix_cache()
    assert changed.generate(prompt).cached_tokens == full_chunks(TOKENS)
    assert changed.call(in_engine.fields) == plain.call(in_engine.fields)


def test_a_change_that_nobody_saw_shares_with_nobody(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    """A call that may have changed packed weights, and loads nothing: there is nothing to name."""
    a, b = (engine_factory(tiny(), kv_transfer_config=nodes.transfer(0)) for _ in range(2))
    prompt = prompt_of(TOKENS, seed=7)
    a.call(in_engine.change_weights_unseen)
    a.generate(prompt)
    assert a.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128

    assert b.generate(prompt).cached_tokens == 0


def test_engines_that_were_told_the_same_version_share_again(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    a, b = (engine_factory(tiny(), kv_transfer_config=nodes.transfer(0)) for _ in range(2))
    prompt = prompt_of(TOKENS, seed=5)
    for engine in (a, b):
        engine.collective_rpc("reload_weights")
        engine.call(in_engine.name_weights, "step 7")
    a.generate(prompt)
    a.call(in_engine.settle)

    assert b.generate(prompt).cached_tokens == full_chunks(TOKENS)
