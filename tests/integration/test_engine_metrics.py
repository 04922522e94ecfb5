"""What an engine counts, where people look for it: its NodeStore, and vLLM's own metrics.

Goal: copies and the tokens of prompts are shown with the values that the engine's own counters
have. Method: an engine as users have it stores a prompt, forgets it, and loads it again.
"""

from collections.abc import Iterator

import pytest

from kvray.core.durations import COPY_DIRECTIONS, copy_counts
from tests import in_engine
from tests.conftest import EngineFactory
from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


def test_copies_are_counted_by_direction_and_their_node_hears_of_them(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    engine = engine_factory(tiny(), kv_transfer_config=nodes.transfer(0))
    prompt = prompt_of(TOKENS, seed=1)
    engine.generate(prompt)
    stored = engine.call(in_engine.settle)["counters"]
    assert sum(copy_counts(stored, "store")) > 0
    assert sum(copy_counts(stored, "load")) == 0

    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(TOKENS)
    counters = engine.call(in_engine.settle)["counters"]
    assert sum(copy_counts(counters, "load")) == 1, "one request has loaded, on one rank"
    engine.close()  # what it has not said yet is its last word

    def heard() -> bool:
        totals = nodes.status(0)["engine_totals"]
        return all(
            copy_counts(totals, direction) == copy_counts(counters, direction)
            for direction in COPY_DIRECTIONS
        )

    wait_until(heard, what="the NodeStore to have heard of all copies")
