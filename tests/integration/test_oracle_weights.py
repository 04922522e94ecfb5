"""New weights: after a change of them a hit has the KV that the engine computes with the new ones.

Method: tests.oracle, whose control is computed with the weights of now. One weight changes, and
changes at the worst moments: before a load is asked for, while it is copied, and when it has been
reported and the scheduler has not yet taken it up.
"""

import itertools
from collections.abc import Iterator

import pytest

from tests import held_copies, kv_recorder
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.oracle import Oracle
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy]

TOKENS = 700
_layers = itertools.count()  # each test changes another layer: twice the same is no change


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engine(nodes: Nodes, shared_engine_factory: EngineFactory) -> Engine:
    return shared_engine_factory(tiny(), kv_transfer_config=nodes.transfer(0)).ready()


@pytest.fixture(scope="module")
def oracle(engine: Engine) -> Oracle:
    return Oracle(engine)


def change(engine: Engine) -> None:
    engine.call(kv_recorder.change_one_weight, next(_layers))


def stored(oracle: Oracle, seed: int) -> list[int]:
    """A prompt that is in the slab and no longer on the device."""
    prompt = prompt_of(TOKENS, seed=seed)
    oracle.ask(prompt)
    oracle.forget_device()
    return prompt


def test_blocks_of_the_old_weights_are_no_hit_and_those_of_the_new_ones_are(
    engine: Engine, oracle: Oracle
) -> None:
    prompt = stored(oracle, seed=1)
    change(engine)

    oracle.check(prompt, hit_tokens=0)
    oracle.forget_device()
    verdict = oracle.check(prompt, hit_tokens=full_chunks(TOKENS))

    assert verdict.loaded.blocks == TOKENS // CHUNK_TOKENS
    oracle.at_rest()


def test_a_load_that_is_copied_while_the_weights_change_does_not_count(
    engine: Engine, oracle: Oracle
) -> None:
    prompt = stored(oracle, seed=2)
    engine.call(held_copies.hold, "load")
    oracle.add(prompt, name="loads the old")
    engine.call(held_copies.step_until_held, 1)
    change(engine)
    engine.call(held_copies.let_go)

    told = oracle.finish()["loads the old"]

    assert (told.failed_loads, told.cached_tokens) == (1, 0)
    oracle.forget_device()
    oracle.check(prompt, hit_tokens=None)
    oracle.at_rest()


def test_a_load_that_was_reported_when_the_weights_change_is_stored_under_no_new_name(
    engine: Engine, oracle: Oracle
) -> None:
    # Goal: vLLM caches what was loaded one step later, on the device, as if it were new; the next
    # request finds it there, and must not store it.
    prompt = stored(oracle, seed=3)
    oracle.add(prompt, name="has loaded the old")
    engine.call(kv_recorder.step_until_loaded, "has loaded the old")
    change(engine)
    oracle.finish()
    oracle.ask(prompt)  # the device's hit
    oracle.forget_device()

    for _ in range(2):
        oracle.check(prompt, hit_tokens=None)
        oracle.forget_device()
    oracle.at_rest()
