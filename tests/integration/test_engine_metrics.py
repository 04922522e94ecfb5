"""What an engine counts, where people look for it: its NodeStore, and vLLM's own metrics.

Goal: copies and the tokens of prompts are shown with the values that the engine's own counters
have. Method: an engine as users have it stores a prompt, forgets it, and loads it again.
"""

from collections.abc import Iterator

import pytest

from kvray.core.durations import COPY_DIRECTIONS, copy_counts
from kvray.core.reasons import tokens_by_reason, tokens_by_source
from kvray.engine.metrics import COMPUTED_TOKENS, PROMPT_TOKENS, definitions
from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import ROOT, Mode
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


def test_vllm_shows_where_tokens_came_from_in_its_metrics_and_in_its_log(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    """In the engine's frontend, where vLLM has its metrics: another process than EngineCore."""
    engine = engine_factory(
        tiny(), mode=Mode.MULTIPROCESS, kv_transfer_config=nodes.transfer(0, model_tag="metrics")
    )
    prompt = prompt_of(TOKENS, seed=2)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(TOKENS)

    counters = engine.call(in_engine.settle)["counters"]
    sources, reasons = tokens_by_source([counters]), tokens_by_reason([counters])
    assert sources["local"] == full_chunks(TOKENS)
    assert set(reasons) == {"never_seen", "tail"}
    assert engine.call(in_engine.vllm_metrics) == {
        PROMPT_TOKENS: {source: count for source, count in sources.items() if count},
        COMPUTED_TOKENS: reasons,
    }
    engine.call(in_engine.log_stats)
    wait_until(
        lambda: f"{PROMPT_TOKENS}:('local',)={sources['local']}" in engine.group.log.read_text(),
        what="vLLM's line of transfer metrics",
    )


def test_an_attached_engine_says_nothing_to_vllm_and_keeps_nothing_for_it(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    """vLLM's loggers would end with an assertion, and numbers that nobody takes add up for ever."""
    engine = engine_factory(tiny(), environment={"RAY_ADDRESS": nodes.ray_cluster.address})
    engine.call(in_engine.attach, nodes.settings(0))
    prompt = prompt_of(TOKENS, seed=3)
    engine.generate(prompt)
    assert engine.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128
    assert engine.call(in_engine.vllm_metrics) == {}
    assert engine.call(in_engine.unsaid_stats) == []


def test_vllms_metrics_of_kvray_are_in_the_documentation() -> None:
    text = (ROOT / "docs" / "seeing.md").read_text()
    for name, definition in definitions().items():
        (label,) = definition.labelnames
        assert f"| `{name}` | counter | tokens | `{label}` |" in text
