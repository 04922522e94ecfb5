"""kvray inside an engine's processes brings neither Ray nor NIXL, and no step waits for Ray.

Method: the shared objects mapped into EngineCore and worker of a real engine with kvray attached;
and, in an engine that shares a process with Ray, every call into Ray counted while it generates.
"""

from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Mode
from tests.models import tiny
from tests.ray_nodes import Nodes, running_nodes
from tests.prompts import full_chunks, prompt_of

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

FOREIGN = ("/ray/_raylet", "/nixl", "libucp", "libuct")  # parts of paths of shared objects


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


def test_engine_core_and_worker_load_neither_ray_nor_nixl(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    engine = engine_factory(tiny(), mode=Mode.MULTIPROCESS, kv_transfer_config=nodes.transfer(0))
    prompt = prompt_of(700, seed=1)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(700)

    client = engine.call(in_engine.own_pid)
    inside = [pid for pid in engine.processes() if pid != client]
    with_torch = [p for p in inside if any("libtorch" in m for m in in_engine.imported_modules(p))]
    assert len(with_torch) >= 2  # EngineCore and its worker
    for pid in with_torch:
        loaded = in_engine.imported_modules(pid)
        assert [m for m in loaded if any(part in m for part in FOREIGN)] == []


def test_no_step_calls_ray(nodes: Nodes, engine_factory: EngineFactory) -> None:
    engine = engine_factory(tiny(), environment={"RAY_ADDRESS": nodes.ray_cluster.address})
    engine.call(in_engine.attach, nodes.settings(0))
    prompt = prompt_of(700, seed=2)

    cold = engine.call(in_engine.count_ray_calls, prompt)
    assert engine.reset_prefix_cache()
    hit = engine.call(in_engine.count_ray_calls, prompt)

    assert (cold["on the step"], hit["on the step"]) == (0, 0)
    assert engine.call(in_engine.stats)["counters"]["hit_tokens_local"] == full_chunks(700)
