"""One element of any parameter is another name, at each of the doors.

Method: every tensor of a checkpoint in turn with one bit that is another, loaded by vLLM's own
loader with kvray's plugin (a second each); then one such checkpoint at each door, with whole
engines, where what one has stored the other must not hit.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engine_process import ENABLE_VARIABLE
from tests.engines import Engine
from tests.loading import Case, flip, load_all, tensor_names
from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700
CHANGED = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


def test_each_parameter_of_a_model_in_turn(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(), tmp_path / "model")
    names = tensor_names(folder)

    seen = load_all([Case(str(folder)), *(Case(str(folder), flip=name) for name in names)])

    assert not [one.error for one in seen if one.error]
    assert len(names) == 75
    assert len({one.digest for one in seen} - {None}) == 1 + len(names)


@pytest.mark.parametrize("door", ["connector", "enable", "attach"])
def test_one_bit_at_each_door(
    nodes: Nodes, engine_factory: EngineFactory, tmp_path: Path, door: str
) -> None:
    copy, changed = (Path(shutil.copytree(tiny(), tmp_path / name)) for name in ("copy", "changed"))
    flip(changed, CHANGED)
    prompt = prompt_of(TOKENS, seed=["connector", "enable", "attach"].index(door))
    plain = engine_by(door, engine_factory, nodes, tiny())
    same = engine_by(door, engine_factory, nodes, copy)
    other = engine_by(door, engine_factory, nodes, changed)

    plain.generate(prompt)
    assert plain.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128

    assert other.generate(prompt).cached_tokens == 0
    assert same.generate(prompt).cached_tokens == full_chunks(TOKENS)
    ours, theirs = (engine.call(in_engine.fields) for engine in (plain, other))
    assert {name for name in ours if ours[name] != theirs[name]} == {"weights"}


def engine_by(door: str, engine_factory: EngineFactory, nodes: Nodes, model: Path) -> Engine:
    if door == "connector":
        return engine_factory(model, kv_transfer_config=nodes.transfer(0)).ready()
    environment = {"RAY_ADDRESS": nodes.ray_cluster.address}
    if door == "attach":
        engine = engine_factory(model, environment=environment).ready()
        engine.call(in_engine.attach, nodes.settings(0))
        return engine
    environment[ENABLE_VARIABLE] = json.dumps(nodes.settings(0))
    return engine_factory(model, environment=environment).ready()
