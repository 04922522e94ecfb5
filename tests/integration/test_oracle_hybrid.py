"""A hybrid, windows in every other layer: each hit has the KV that the engine computes itself.

Method: tests.oracle. Two cache groups share the device's memory, and only a block's id tells whose
it is. vLLM 0.29 can not report a failed load of such a model, so kvray serves it uncached there.
"""

import random
from collections.abc import Iterator

import pytest

from kvray.engine import versions
from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny_gemma2
from tests.oracle import Oracle
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

WINDOW_TOKENS = 512


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engines(nodes: Nodes, shared_engine_factory: EngineFactory) -> tuple[Engine, Engine]:
    a, b = (
        shared_engine_factory(
            tiny_gemma2(),
            kv_cache_memory_bytes=32 << 20,
            kv_transfer_config=nodes.transfer(0),
        )
        for _ in range(2)
    )
    return a.ready(), b.ready()


@pytest.fixture(scope="module")
def oracle(engines: tuple[Engine, Engine]) -> Oracle:
    return Oracle(engines[1])


@pytest.fixture
def cached() -> None:
    if not versions.reports_failed_requests():
        pytest.skip("this release serves it uncached: the last test of this file")


def store(engine: Engine, prompt: list[int], *, max_tokens: int = 1) -> list[int]:
    answer = engine.generate(prompt, max_tokens=max_tokens).tokens
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()
    return answer


@pytest.mark.usefixtures("cached")
def test_prompts_shorter_and_longer_than_the_window(
    engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    source = random.Random(3)
    lengths = [CHUNK_TOKENS + 1, WINDOW_TOKENS + 1, 3 * WINDOW_TOKENS + 1]
    lengths += [source.randint(CHUNK_TOKENS + 1, 4 * WINDOW_TOKENS - 1) for _ in range(20)]
    for number, length in enumerate(lengths):
        prompt = prompt_of(length, seed=number)
        store(engines[0], prompt)

        verdict = oracle.check(prompt, hit_tokens=full_chunks(length), max_tokens=2)

        # All of the full group, and of the windows what a token behind the hit can see.
        windows = min(length // CHUNK_TOKENS, WINDOW_TOKENS // CHUNK_TOKENS)
        assert verdict.loaded.blocks == length // CHUNK_TOKENS + windows
    oracle.at_rest()


@pytest.mark.usefixtures("cached")
def test_a_conversation_that_outgrows_the_window(
    engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    talk = prompt_of(450, seed=100)
    for turn in range(3):
        answer = store(engines[0], talk, max_tokens=150)
        talk = [*talk, *answer, *prompt_of(40, seed=101 + turn)]

        verdict = oracle.check(talk, hit_tokens=None, same_bytes=False)

        assert verdict.loaded.blocks
    oracle.at_rest()


def test_a_release_that_can_not_report_a_failed_load_runs_it_uncached(
    engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    if versions.reports_failed_requests():
        pytest.skip("this release can")
    prompt = prompt_of(2 * WINDOW_TOKENS, seed=1)
    store(engines[0], prompt)

    verdict = oracle.check(prompt, hit_tokens=0)

    assert verdict.loaded.blocks == 0
    assert engines[0].call(in_engine.stats)["counters"]["stored_chunks"] == 0
    oracle.at_rest()
