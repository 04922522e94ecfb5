"""kvray inside an engine's processes brings neither Ray nor NIXL, and no step waits for Ray.

Method: the shared objects mapped into EngineCore and worker of a real engine, with kvray and
without; the imports that kvray's modules ask for; and, in an engine that shares a process with
Ray, every call into Ray counted while it generates.
"""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine, Mode
from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

FOREIGN = ("/ray/_raylet", "/nixl", "libucp", "libuct")  # parts of paths of shared objects


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


def foreign_objects(engine: Engine) -> list[str]:
    """Ray's and NIXL's shared objects in EngineCore and worker, one entry for each process."""
    client = engine.call(in_engine.own_pid)
    maps = [in_engine.mapped_objects(pid) for pid in engine.processes() if pid != client]
    inside = [objects for objects in maps if any("libtorch" in path for path in objects)]
    assert len(inside) >= 2  # EngineCore and its worker
    return sorted(
        path for objects in inside for path in objects if any(part in path for part in FOREIGN)
    )


def test_kvray_brings_neither_ray_nor_nixl_into_engine_core_and_worker(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    """vLLM itself imports Ray where it is installed, so the control is an engine without kvray."""
    plain = engine_factory(tiny(), mode=Mode.MULTIPROCESS)
    engine = engine_factory(tiny(), mode=Mode.MULTIPROCESS, kv_transfer_config=nodes.transfer(0))
    prompt = prompt_of(700, seed=1)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(700)
    plain.generate(prompt)

    assert foreign_objects(engine) == foreign_objects(plain)


def test_what_engines_load_of_kvray_imports_neither_ray_nor_nixl() -> None:
    """The same by name, and free of what vLLM does: every import that a module of kvray asks for
    while the connector is loaded is seen by a hook."""
    found = subprocess.run(
        [sys.executable, "-c", IMPORT_SCRIPT], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"


IMPORT_SCRIPT = """
import builtins, sys
import vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector
asked = []
original = builtins.__import__
def seen(name, globals=None, *rest):
    if (globals or {}).get("__name__", "").startswith("kvray"):
        asked.append(name.split(".")[0])
    return original(name, globals, *rest)
builtins.__import__ = seen
import kvray.engine.connector, kvray.engine.attach, kvray.engine.inject
assert "kvray" in asked and "numpy" in asked, asked
print([name for name in asked if name in ("ray", "nixl")])
"""


def test_no_step_calls_ray(nodes: Nodes, engine_factory: EngineFactory) -> None:
    engine = engine_factory(tiny(), environment={"RAY_ADDRESS": nodes.ray_cluster.address})
    engine.call(in_engine.attach, nodes.settings(0))
    prompt = prompt_of(700, seed=2)

    cold = engine.call(in_engine.count_ray_calls, prompt)
    assert engine.reset_prefix_cache()
    hit = engine.call(in_engine.count_ray_calls, prompt)

    assert (cold["on the step"], hit["on the step"]) == (0, 0)
    assert engine.call(in_engine.stats)["counters"]["hit_tokens_local"] == full_chunks(700)
