"""Full attention, over two nodes: each hit has the KV that the engine computes itself.

Method: tests.oracle. Engine A computes, engine B on another node asks, for prompts of many shapes.
"""

import random
from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.oracle import Oracle
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(2) as running:
        yield running


@pytest.fixture(scope="module")
def engines(nodes: Nodes, shared_engine_factory: EngineFactory) -> tuple[Engine, Engine]:
    a, b = (
        shared_engine_factory(tiny(), kv_transfer_config=nodes.transfer(index)) for index in (0, 1)
    )
    return a.ready(), b.ready()


@pytest.fixture(scope="module")
def oracle(engines: tuple[Engine, Engine]) -> Oracle:
    return Oracle(engines[1])


def store(
    nodes: Nodes,
    engine: Engine,
    prompt: list[int],
    *,
    max_tokens: int = 1,
    cache_salt: str | None = None,
) -> list[int]:
    """The engine of node 0 computes a prompt, and everybody may know. Its answer."""
    answer = engine.generate(prompt, max_tokens=max_tokens, cache_salt=cache_salt)
    engine.call(in_engine.settle)
    nodes.wait_listed(nodes.keys(0))
    return answer.tokens


@pytest.mark.parametrize("chunks", [1, 2, 5, 11])
@pytest.mark.parametrize("tail", [1, 60, CHUNK_TOKENS - 1])
def test_a_prompt_of_whole_chunks_and_a_tail(
    nodes: Nodes, engines: tuple[Engine, Engine], oracle: Oracle, chunks: int, tail: int
) -> None:
    prompt = prompt_of(chunks * CHUNK_TOKENS + tail, seed=100 * chunks + tail)
    store(nodes, engines[0], prompt)

    verdict = oracle.check(prompt, hit_tokens=chunks * CHUNK_TOKENS)

    assert verdict.loaded.blocks == chunks
    oracle.at_rest()


def test_a_prompt_of_nothing_but_whole_chunks_computes_its_last_token_only(
    nodes: Nodes, engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    prompt = prompt_of(4 * CHUNK_TOKENS, seed=1)
    store(nodes, engines[0], prompt)

    verdict = oracle.check(prompt, hit_tokens=4 * CHUNK_TOKENS)

    assert verdict.loaded.blocks == 4
    oracle.at_rest()


def test_a_prompt_longer_than_a_step_is_cut_as_its_control_is(
    nodes: Nodes, engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    prompt = prompt_of(5_000, seed=2)  # a step takes 4,096 tokens here
    store(nodes, engines[0], prompt)

    verdict = oracle.check(prompt, hit_tokens=full_chunks(5_000))

    assert verdict.loaded.blocks == full_chunks(5_000) // CHUNK_TOKENS
    oracle.at_rest()


def test_a_longer_prompt_has_the_shared_part_and_computes_the_rest_rightly(
    nodes: Nodes, engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    # Goal: what is computed behind a hit rests on it, and is right within the noise. The shared
    # part is cut otherwise than in the control, so it is compared within the noise, too.
    shared = prompt_of(900, seed=3)
    store(nodes, engines[0], shared)

    verdict = oracle.check(
        shared + prompt_of(500, seed=4), hit_tokens=full_chunks(900), same_bytes=False
    )

    assert (verdict.loaded.blocks, verdict.after.blocks) == (7, 3)
    oracle.at_rest()


def test_each_turn_of_a_conversation_has_the_kv_of_all_turns_before(
    nodes: Nodes, engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    # Method: A answers every turn. An answer's KV was computed token by token.
    talk = prompt_of(200, seed=5)
    for turn in range(3):
        answer = store(nodes, engines[0], talk, max_tokens=150)
        known = len(talk) + len(answer) - 1  # nobody computed with the last token
        talk = [*talk, *answer, *prompt_of(40, seed=6 + turn)]

        verdict = oracle.check(talk, hit_tokens=full_chunks(known), same_bytes=False)

        assert verdict.loaded.blocks == known // CHUNK_TOKENS
    oracle.at_rest()


def test_a_salt_shares_with_its_own(
    nodes: Nodes, engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    prompt = prompt_of(700, seed=10)
    store(nodes, engines[0], prompt, cache_salt="tenant one")

    oracle.check(prompt, hit_tokens=full_chunks(700), cache_salt="tenant one")
    oracle.check(prompt, hit_tokens=0, cache_salt="tenant two")
    oracle.check(prompt, hit_tokens=0)
    oracle.at_rest()


def test_prompts_of_one_batch_are_each_right(
    nodes: Nodes, engines: tuple[Engine, Engine], oracle: Oracle
) -> None:
    # Method: both the stored blocks and the controls are computed alone; the hits come together.
    source = random.Random(11)
    prompts = [prompt_of(source.randrange(130, 900), seed=20 + i) for i in range(6)]
    for i, prompt in enumerate(prompts):
        store(nodes, engines[0], prompt)
        oracle.ask(prompt, name=f"control{i}", cache_salt=f"control{i}")
    oracle.forget_device()

    for i, prompt in enumerate(prompts):
        oracle.add(prompt, name=f"hit{i}")
    told = oracle.finish()

    for i, prompt in enumerate(prompts):
        assert told[f"hit{i}"].cached_tokens == full_chunks(len(prompt))
        compared = oracle.compare_hit(f"hit{i}", f"control{i}")
        assert compared.blocks == len(prompt) // CHUNK_TOKENS
        oracle.assert_right(compared, same_bytes=True)
    oracle.at_rest()
