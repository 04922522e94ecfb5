"""An engine that has nothing to do costs the same with kvray as without.

Method: CPU time of all processes of two multiprocess engines over the same quiet seconds, after
both have answered; the quietest of several looks, since what else runs makes each wake-up dearer.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine, Mode
from tests.models import tiny
from tests.prompts import prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.slow]

ALLOWED_POINTS = 0.005  # of a core
LOOKS = 3
LOOK_S = 10.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(2) as running:
        yield running


def cpu_s(engine: Engine) -> float:
    """Of all threads of all processes of an engine."""
    threads = (task for pid in engine.processes() for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((task / "schedstat").read_text().split()[0]) for task in threads) / 1e9


def test_an_idle_engine_with_kvray_costs_at_most_half_a_point_more(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    plain = engine_factory(tiny(), mode=Mode.MULTIPROCESS)
    ours = engine_factory(tiny(), mode=Mode.MULTIPROCESS, kv_transfer_config=nodes.transfer(0))
    for engine in (plain, ours):
        engine.generate(prompt_of(700, seed=1))
    ours.call(in_engine.settle)
    shares: dict[str, list[float]] = {"plain": [], "kvray": []}
    for _ in range(LOOKS):
        before = cpu_s(plain), cpu_s(ours)
        begun = time.monotonic()
        time.sleep(LOOK_S)  # the thing that is measured
        passed_s = time.monotonic() - begun
        shares["plain"].append((cpu_s(plain) - before[0]) / passed_s)
        shares["kvray"].append((cpu_s(ours) - before[1]) / passed_s)
    assert min(shares["kvray"]) - min(shares["plain"]) <= ALLOWED_POINTS, shares
