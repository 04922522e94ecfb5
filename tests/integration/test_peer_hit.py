"""The whole way of a block on the real parts: engine A computes it, engine B does not.

Goal: what B reuses has the bytes that A computed, and B answers as A does at the same number of
cached tokens. Method: two Ray nodes, one engine each, the blocks of both slabs compared.
"""

from collections.abc import Iterator

import pytest

from kvray.core.ids import BlockKey
from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 1_000


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


def stored(engine: Engine, nodes: Nodes, index: int) -> set[BlockKey]:
    """Settle an engine, and wait until the directory knows all that its node holds."""
    engine.call(in_engine.settle)
    keys = nodes.keys(index)
    nodes.wait_listed(keys)
    return set(keys)


def test_b_fetches_the_chunks_that_a_computed_and_answers_the_same(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, b = engines
    prompt = prompt_of(TOKENS, seed=1)
    before = set(nodes.keys(0))
    a.generate(prompt, max_tokens=8)
    computed = stored(a, nodes, 0) - before
    assert len(computed) == TOKENS // CHUNK_TOKENS

    control = a.generate(prompt, max_tokens=8)
    answer = b.generate(prompt, max_tokens=8)

    assert answer.cached_tokens == control.cached_tokens == full_chunks(TOKENS)
    assert answer.tokens == control.tokens
    counters = b.call(in_engine.settle)["counters"]
    assert counters["hit_tokens_peer"] >= full_chunks(TOKENS)
    assert counters["failed_loads"] == 0
    for key in computed:
        block = nodes.block(0, key)
        assert block is not None
        assert nodes.block(1, key) == block


def test_what_was_fetched_once_is_a_local_hit_afterwards(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, b = engines
    prompt = prompt_of(TOKENS, seed=2)
    a.generate(prompt)
    stored(a, nodes, 0)
    b.generate(prompt)
    before = b.call(in_engine.settle)["counters"]

    assert b.reset_prefix_cache()
    again = b.generate(prompt)

    assert again.cached_tokens == full_chunks(TOKENS)
    after = b.call(in_engine.settle)["counters"]
    assert after["hit_tokens_local"] - before["hit_tokens_local"] == full_chunks(TOKENS)
    assert after["hit_tokens_peer"] == before["hit_tokens_peer"]


def test_a_longer_prompt_reuses_the_shared_part_and_computes_the_rest(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, b = engines
    shared = prompt_of(TOKENS, seed=3)
    a.generate(shared)
    stored(a, nodes, 0)

    answer = b.generate(shared + prompt_of(500, seed=4), max_tokens=4)

    assert answer.cached_tokens == full_chunks(TOKENS)


def test_an_answer_is_cached_like_a_prompt_for_the_next_turn(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, b = engines
    prompt = prompt_of(200, seed=5)
    first = a.generate(prompt, max_tokens=200)
    stored(a, nodes, 0)

    turn = b.generate([*prompt, *first.tokens, *prompt_of(50, seed=6)])

    # The last answered token has no KV: nobody computed with it.
    assert turn.cached_tokens == full_chunks(len(prompt) + len(first.tokens) - 1)


def test_requests_with_another_salt_share_nothing(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, b = engines
    prompt = prompt_of(TOKENS, seed=7)
    a.generate(prompt, cache_salt="tenant one")
    stored(a, nodes, 0)

    assert b.generate(prompt, cache_salt="tenant two").cached_tokens == 0
    assert b.generate(prompt).cached_tokens == 0
    assert b.generate(prompt, cache_salt="tenant one").cached_tokens == full_chunks(TOKENS)


def test_a_prompt_shorter_than_a_chunk_is_nothing_to_kvray(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, _ = engines
    before = set(nodes.keys(0)), a.call(in_engine.stats)["counters"]["lookups"]

    assert a.generate(prompt_of(CHUNK_TOKENS - 2, seed=8)).cached_tokens == 0

    a.call(in_engine.settle)
    assert (set(nodes.keys(0)), a.call(in_engine.stats)["counters"]["lookups"]) == before


def test_many_requests_at_once_for_one_document_fetch_it_once(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, b = engines
    document = prompt_of(TOKENS, seed=9)
    a.generate(document)
    stored(a, nodes, 0)
    before = nodes.status(1)["fetch"]["fetched_blocks"]

    answers = b.generate_many([document + prompt_of(10, seed=20 + i) for i in range(4)])

    assert {answer.cached_tokens for answer in answers} == {full_chunks(TOKENS)}
    fetched = nodes.status(1)["fetch"]["fetched_blocks"] - before
    assert fetched == full_chunks(TOKENS) // CHUNK_TOKENS


def test_what_peers_have_comes_while_a_request_waits_for_its_turn(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    # Method: the request arrives, and no step is run until its blocks are here.
    a, b = engines
    prompt = prompt_of(TOKENS, seed=21)
    before = set(nodes.keys(0))
    a.generate(prompt)
    computed = stored(a, nodes, 0) - before

    b.call(in_engine.add_request, "waiting", prompt)
    wait_until(lambda: computed <= set(nodes.keys(1)), what="the blocks, before any step")

    assert b.call(in_engine.finish_requests) == {"waiting": full_chunks(TOKENS)}


def test_an_early_answer_that_has_become_old_is_asked_for_again(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    # Goal: what somebody has stored while a request waited is a hit for it.
    a, b = engines
    prompt = prompt_of(TOKENS, seed=22)
    b.call(in_engine.add_request, "waiting", prompt)
    a.generate(prompt)
    stored(a, nodes, 0)

    assert b.call(in_engine.finish_requests) == {"waiting": full_chunks(TOKENS)}


def test_an_engine_knows_how_fast_it_computes(engines: tuple[Engine, Engine]) -> None:
    a, _ = engines
    a.generate(prompt_of(TOKENS, seed=23))
    assert a.call(in_engine.stats)["prefill_tokens_per_s"] > 0
