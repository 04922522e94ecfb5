"""LoRA: each hit has the KV that the engine computes itself with the adapter that it has loaded.

Method: tests.oracle, two engines of one node. Adapters change under a running engine: their files
are what a newcomer loads, and not what an engine computes with that had loaded them before.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters import adapter
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.oracle import Lora, Oracle
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engines(nodes: Nodes, shared_engine_factory: EngineFactory) -> tuple[Engine, Engine]:
    a, b = (
        shared_engine_factory(
            tiny(),
            enable_lora=True,
            max_lora_rank=8,
            max_cpu_loras=8,
            kv_transfer_config=nodes.transfer(0),
        )
        for _ in range(2)
    )
    return a.ready(), b.ready()


@pytest.fixture(scope="module")
def oracles(engines: tuple[Engine, Engine]) -> tuple[Oracle, Oracle]:
    a, b = engines
    return Oracle(a), Oracle(b)


def load(oracle: Oracle, lora: Lora) -> None:
    """The engine has the adapter. Until then its requests go without kvray."""
    oracle.lora = lora
    oracle.ask(prompt_of(20, seed=99))


def test_an_adapter_shares_with_its_like_and_with_nobody_else(
    oracles: tuple[Oracle, Oracle], tmp_path: Path
) -> None:
    a, b = oracles
    for seed in (1, 2):
        adapter(tmp_path / f"style {seed}", tiny(), seed=seed)
    one, two = (("style", seed, tmp_path / f"style {seed}") for seed in (1, 2))
    prompt = prompt_of(TOKENS, seed=1)
    load(a, one)
    a.ask(prompt)

    b.lora = one
    assert b.check(prompt, hit_tokens=full_chunks(TOKENS)).loaded.blocks == TOKENS // CHUNK_TOKENS
    b.lora = two
    b.forget_device()
    b.check(prompt, hit_tokens=0)
    b.lora = None
    b.forget_device()
    b.check(prompt, hit_tokens=0)
    for oracle in oracles:
        oracle.at_rest()


def test_files_that_are_replaced_under_an_engine_hit_across_no_version(
    oracles: tuple[Oracle, Oracle], tmp_path: Path
) -> None:
    # Method: A has loaded version 1 and goes on with it; B comes later and loads version 2.
    a, b = oracles
    folder = tmp_path / "adapter"
    before, after = (prompt_of(TOKENS, seed=seed) for seed in (2, 3))
    adapter(folder, tiny(), seed=3)
    b.lora = ("replaced", 3, folder)
    load(a, b.lora)
    a.ask(before)
    adapter(folder, tiny(), seed=4)
    a.ask(after)

    for prompt in (before, after):
        b.check(prompt, hit_tokens=0)
        # And what B has computed is nothing for A, whose own blocks are still right.
        a.forget_device()
        a.check(prompt, hit_tokens=None)
        b.forget_device()
    for oracle in oracles:
        oracle.at_rest()
