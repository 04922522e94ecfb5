"""What is interrupted in the middle of a copy costs a recompute, never a wrong block.

Method: tests.oracle, and copies that do not begin until the test says so (tests.held_copies), on an
engine whose device has room for little more than one request.
"""

import itertools
from collections.abc import Iterator

import pytest

from tests import held_copies, in_engine, kv_recorder
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.kv_recorder import Origin
from tests.models import tiny
from tests.oracle import Oracle
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy]

DEVICE_BLOCKS = 20  # one of them vLLM keeps for itself
TOKENS = 1_000
_seeds = itertools.count(1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engine(nodes: Nodes, shared_engine_factory: EngineFactory) -> Engine:
    engine = shared_engine_factory(
        tiny(),
        num_gpu_blocks_override=DEVICE_BLOCKS,
        max_model_len=2_048,
        kv_transfer_config=nodes.transfer(0),
    ).ready()
    engine.call(in_engine.count_preemptions)
    return engine


@pytest.fixture(scope="module")
def oracle(engine: Engine) -> Oracle:
    return Oracle(engine)


def stored(oracle: Oracle) -> list[int]:
    """A prompt that is in the slab and no longer on the device."""
    prompt = prompt_of(TOKENS, seed=next(_seeds))
    oracle.ask(prompt)
    oracle.forget_device()
    return prompt


def held_blocks(engine: Engine) -> int:
    return int(engine.call(kv_recorder.left_over)["lost_blocks"])


def test_a_request_that_is_aborted_while_it_loads_keeps_its_blocks_until_the_copy_has_ended(
    engine: Engine, oracle: Oracle
) -> None:
    prompt = stored(oracle)
    engine.call(held_copies.hold, "load")
    oracle.add(prompt, name="aborted while loading")
    engine.call(held_copies.step_until_held, 1)

    engine.call(held_copies.abort, "aborted while loading")

    assert held_blocks(engine) == TOKENS // CHUNK_TOKENS  # nobody else may have them yet
    neighbour = prompt_of(TOKENS, seed=next(_seeds))
    oracle.add(neighbour, name="beside the load", max_tokens=150)
    engine.call(kv_recorder.finish)
    engine.call(held_copies.let_go)
    oracle.at_rest()
    oracle.forget_device()
    oracle.ask(neighbour, name="alone", cache_salt="alone", max_tokens=150)
    beside = oracle.compare("beside the load", Origin.COMPUTED, "alone", Origin.COMPUTED)
    assert beside.blocks == (TOKENS + 149) // CHUNK_TOKENS
    oracle.assert_right(beside, same_bytes=True)
    oracle.forget_device()
    oracle.check(prompt, hit_tokens=full_chunks(TOKENS))
    oracle.at_rest()


def test_a_request_that_is_aborted_while_it_is_stored_is_stored_right_or_not_at_all(
    engine: Engine, oracle: Oracle
) -> None:
    # Goal: its blocks are free at once, and the next request that gets them waits for the copies.
    prompt = prompt_of(TOKENS, seed=next(_seeds))
    engine.call(held_copies.hold, "store")
    oracle.add(prompt, name="aborted while stored", max_tokens=100)
    engine.call(held_copies.step_until_held, 1)

    engine.call(held_copies.abort, "aborted while stored")
    oracle.add(prompt_of(1_900, seed=next(_seeds)), name="wants the blocks", max_tokens=100)
    engine.call(kv_recorder.finish)

    assert engine.call(held_copies.let_go) >= 1, "vLLM overwrote blocks that were being stored"
    oracle.at_rest()
    oracle.forget_device()
    oracle.check(prompt, hit_tokens=full_chunks(TOKENS))
    oracle.at_rest()


def test_requests_that_are_preempted_while_another_loads_come_back_right(
    engine: Engine, oracle: Oracle
) -> None:
    # Method: the load holds 7 of 19 blocks, and three requests of 4 blocks all others. Each grows
    # into a fifth block, so one of them must go; it comes back when the load has ended.
    prompt = stored(oracle)
    growing = {f"grows {n}": prompt_of(500, seed=next(_seeds)) for n in range(3)}
    oracle.ask(prompt, name="control", cache_salt="control")
    oracle.forget_device()
    before = engine.call(in_engine.preemptions)
    engine.call(held_copies.hold, "load")
    oracle.add(prompt, name="loads")
    engine.call(held_copies.step_until_held, 1)
    for name, one in growing.items():
        oracle.add(one, name=name, max_tokens=40)
    engine.call(held_copies.step_until_preempted, before + 1)

    engine.call(held_copies.let_go)
    told = oracle.finish()

    assert told["loads"].cached_tokens == full_chunks(TOKENS)
    oracle.assert_right(oracle.compare_hit("loads", "control"), same_bytes=True)
    for name in growing:
        # What comes back from the slab are the very blocks that the request had computed before.
        oracle.assert_right(oracle.compare_hit(name, name), same_bytes=True)
        assert (len(told[name].tokens), told[name].failed_loads) == (40, 0)
    oracle.at_rest()


def test_a_request_that_is_preempted_right_after_its_load_loads_again(
    engine: Engine, oracle: Oracle
) -> None:
    prompt = stored(oracle)
    oracle.ask(prompt, name="control 2", cache_salt="control 2", max_tokens=50)
    oracle.forget_device()
    oracle.add(prompt, name="twice", max_tokens=50)
    engine.call(held_copies.step_until_running, "twice")

    engine.reset_prefix_cache(reset_running_requests=True)
    told = oracle.finish()["twice"]

    assert (told.loads, told.failed_loads) == (2, 0)
    compared = oracle.compare_hit("twice", "control 2")
    assert compared.blocks == 2 * (TOKENS // CHUNK_TOKENS)
    oracle.assert_right(compared, same_bytes=True)
    oracle.at_rest()
