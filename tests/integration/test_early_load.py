"""A long prefix begins to load on B while its tail is still on its way from A, and B answers as if
it had been there.

Method: a prompt of several fetch batches. B forgets it again and again, in the device and in its
node's slab; each fetch is a chance to begin early. How many do is a matter of the machine's load;
that one of so many does, and that all give the same answer, is not.
"""

from collections.abc import Iterator

import pytest
import ray

from kvray.core.planner import FETCH_BATCH_BYTES
from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine, Mode
from tests.models import tiny
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 6_000
CHUNK_BYTES = 1 << 20  # of the tiny model
FETCHES = 20
MAX_HELD_STEPS = 3  # the first one, and where the NodeStore takes longer than an engine listens


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(2) as running:
        yield running


@pytest.fixture(scope="module")
def engines(nodes: Nodes, shared_engine_factory: EngineFactory) -> tuple[Engine, Engine, Engine]:
    a, early, late = (
        shared_engine_factory(
            tiny(), kv_transfer_config=nodes.transfer(index, load_early=load_early)
        )
        for index, load_early in ((0, True), (1, True), (1, False))
    )
    return a.ready(), early.ready(), late.ready()


def forget(engine: Engine, nodes: Nodes) -> None:
    """B's device and B's slab are empty."""
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()
    nodes.wait_unpinned(1)
    ray.get(nodes.store(1).clear.remote())
    canary = {bytes.fromhex(key) for key in engine.call(in_engine.canary_keys)}
    assert set(nodes.keys(1)) <= canary


def test_a_load_begins_before_its_tail_has_come(
    nodes: Nodes, engines: tuple[Engine, Engine, Engine]
) -> None:
    a, early, late = engines
    assert TOKENS // CHUNK_TOKENS * CHUNK_BYTES > FETCH_BATCH_BYTES, "else all comes at once"
    prompt = prompt_of(TOKENS, seed=31)
    a.generate(prompt, max_tokens=4)
    a.call(in_engine.settle)
    nodes.wait_listed(nodes.keys(0))
    control = a.generate(prompt, max_tokens=4)

    early_loads = 0
    for _ in range(FETCHES):
        answer = early.generate(prompt, max_tokens=4)
        assert (answer.cached_tokens, answer.tokens) == (full_chunks(TOKENS), control.tokens)
        counters = early.call(in_engine.stats)["counters"]
        assert counters["failed_loads"] == 0
        early_loads = counters["early_loads"]
        if early_loads:
            break
        forget(early, nodes)
    assert early_loads, f"none of {FETCHES} loads began before all was there"

    forget(early, nodes)
    assert late.generate(prompt, max_tokens=4).tokens == control.tokens
    counters = late.call(in_engine.stats)["counters"]
    assert counters["hit_tokens_peer"] == full_chunks(TOKENS)
    assert counters["early_loads"] == 0, "told to wait until all is there"


def test_an_engine_that_waits_for_a_peer_takes_no_steps_meanwhile(
    nodes: Nodes, engines: tuple[Engine, Engine, Engine]
) -> None:
    # Each step without work would keep a core from the NodeStore, which copies what is waited for.
    a, _, late = engines
    prompt = prompt_of(TOKENS, seed=32)
    a.generate(prompt, max_tokens=1)
    a.call(in_engine.settle)
    nodes.wait_listed(nodes.keys(0))

    held_steps = []
    for change in (None, in_engine.never_rest):
        if change is not None:
            late.call(change)
        forget(late, nodes)
        before = late.call(in_engine.stats)["counters"]["hit_tokens_peer"]
        held_steps.append(late.call(in_engine.count_held_steps, prompt))
        hit = late.call(in_engine.stats)["counters"]["hit_tokens_peer"] - before
        assert hit == full_chunks(TOKENS)
    assert held_steps[0] <= MAX_HELD_STEPS < held_steps[1], held_steps


def test_an_engine_in_a_process_of_its_own_listens_too(
    nodes: Nodes, engines: tuple[Engine, Engine, Engine], engine_factory: EngineFactory
) -> None:
    a, _, _ = engines
    other = engine_factory(
        tiny(),
        mode=Mode.MULTIPROCESS,
        kv_transfer_config=nodes.transfer(1),
    )
    prompt = prompt_of(TOKENS, seed=33)
    control = a.generate(prompt, max_tokens=4)
    a.call(in_engine.settle)
    nodes.wait_listed(nodes.keys(0))

    answer = other.ready().generate(prompt, max_tokens=4)

    counters = other.call(in_engine.stats)["counters"]
    assert (counters["hit_tokens_peer"], answer.tokens) == (full_chunks(TOKENS), control.tokens)
    assert counters["rests"] >= 1
