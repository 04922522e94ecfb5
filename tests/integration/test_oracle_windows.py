"""A model with nothing but a sliding window: each hit has the KV that the engine computes itself.

A request has device blocks for its window only, so what an engine holds of a chunk may have a hole
in front. Method: tests.oracle, device blocks of 32 tokens, prompts of 1 to 4 windows. A chunk comes
into the slab in three ways: as it is computed; from the device, by a request that had found it
there (then blocks before the window are not there any more); token by token, as an answer.
"""

import random
from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import WINDOW_TOKENS, tiny_window
from tests.oracle import Oracle
from tests.prompts import prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy]

BLOCK_TOKENS = 32


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engines(nodes: Nodes, shared_engine_factory: EngineFactory) -> tuple[Engine, Engine]:
    a, b = (
        shared_engine_factory(
            tiny_window(),
            block_size=BLOCK_TOKENS,
            kv_cache_memory_bytes=16 << 20,  # 8,192 tokens
            kv_transfer_config=nodes.transfer(0),
        )
        for _ in range(2)
    )
    return a.ready(), b.ready()


@pytest.fixture(scope="module")
def oracle(engines: tuple[Engine, Engine]) -> Oracle:
    return Oracle(engines[1])


def store_computed(engine: Engine, prompt: list[int]) -> None:
    engine.generate(prompt)
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()


def store_from_the_device(engine: Engine, prompt: list[int]) -> None:
    """The chunks are computed while the slab takes none, and offered by the next request."""
    engine.call(in_engine.fail_copies)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    engine.call(in_engine.mend_copies)
    store_computed(engine, prompt)


def hits_of(engine: Engine, prompt: list[int]) -> int:
    """What kvray answers: all chunks before the last token, for which vLLM looks at the window."""
    chunk_tokens = engine.call(in_engine.chunk_tokens)
    return int((len(prompt) - 1) // chunk_tokens * chunk_tokens)


def test_a_chunk_whose_head_has_left_the_window_is_no_hit_or_a_right_one(
    engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    # Goal: the case of the review. A's request of 700 tokens finds 672 on its device and has
    # blocks from index 13 on; a chunk of four blocks begins at 12.
    prompt = prompt_of(700, seed=1)
    store_from_the_device(engines[0], prompt)

    verdict = oracle.check(prompt, hit_tokens=hits_of(engines[1], prompt))

    assert verdict.loaded.blocks == WINDOW_TOKENS // BLOCK_TOKENS
    oracle.at_rest()


@pytest.mark.parametrize(
    "count",
    [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_prompts_of_one_to_four_windows(
    engines: tuple[Engine, Engine], oracle: Oracle, count: int
) -> None:
    source = random.Random(count)
    blocks = 0
    for number in range(count):
        length = source.randint(WINDOW_TOKENS, 4 * WINDOW_TOKENS)
        prompt = prompt_of(length, seed=1_000 * count + number)
        source.choice([store_computed, store_from_the_device])(engines[0], prompt)

        # Of a prompt that is whole blocks vLLM 0.29 asks for the last one, too.
        is_whole = len(prompt) % BLOCK_TOKENS == 0
        hit_tokens = hits_of(engines[1], prompt)
        verdict = oracle.check(prompt, hit_tokens=None if is_whole else hit_tokens, max_tokens=1)

        assert hit_tokens <= verdict.hit.cached_tokens < len(prompt)
        blocks += verdict.loaded.blocks
    assert blocks >= count * WINDOW_TOKENS // BLOCK_TOKENS - count
    oracle.at_rest()


def test_a_conversation_that_outgrows_the_window(
    engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    # Of a window group vLLM stores what ends a prompt, and not each chunk that is decoded.
    talk = prompt_of(200, seed=2)
    for turn in range(4):
        answer = engines[0].generate(talk, max_tokens=150).tokens
        engines[0].call(in_engine.settle)
        talk = [*talk, *answer, *prompt_of(40, seed=3 + turn)]

        verdict = oracle.check(talk, hit_tokens=None, same_bytes=False)

        assert verdict.loaded.blocks
    oracle.at_rest()
