"""What an engine computes is seen before anybody loads it, and again after its weights change.

Method: real engines on one node, by the three doors. A maker is what was seen: equal for
engines that compute the canary bit for bit alike, another one after one bit of one weight.
"""

from collections.abc import Iterator

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine, Mode
from tests.models import tiny, tiny_gemma2
from tests.prompts import prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.engine]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


@pytest.fixture(scope="module")
def engine(nodes: Nodes, shared_engine_factory: EngineFactory) -> Engine:
    return shared_engine_factory(tiny(), kv_transfer_config=nodes.transfer(0)).ready()


def test_an_engine_is_proven_before_its_first_request(engine: Engine) -> None:
    found = engine.call(in_engine.canary)

    assert found["state"] == "proven", found
    assert not engine.call(in_engine.is_cached_anywhere)  # nothing of it stays on the device


def test_its_canary_lies_in_the_slab_of_its_node_under_the_makers_name(
    nodes: Nodes, engine: Engine
) -> None:
    keys = engine.call(in_engine.canary_keys)

    assert len(keys) == 2
    wait_until(lambda: set(keys) <= {key.hex() for key in nodes.keys(0)}, what="the canary")
    nodes.cluster.clear()  # evicts whatever nobody has pinned
    assert set(keys) <= {key.hex() for key in nodes.keys(0)}


def test_two_engines_that_compute_alike_are_one_maker_by_whatever_door(
    nodes: Nodes, engine: Engine, engine_factory: EngineFactory
) -> None:
    attached = engine_factory(tiny(), environment={"RAY_ADDRESS": nodes.ray_cluster.address})
    process = engine_factory(tiny(), mode=Mode.MULTIPROCESS, kv_transfer_config=nodes.transfer(0))
    attached.call(in_engine.attach, nodes.settings(0))

    makers = [found.call(in_engine.canary)["maker"] for found in (engine, attached)]

    assert makers[0] == makers[1]
    assert process.call(in_engine.canary)["state"] == "proven"


def test_one_bit_of_one_weight_makes_another_maker(engine: Engine) -> None:
    before = engine.call(in_engine.canary)["maker"]

    engine.call(in_engine.change_one_weight, 3)
    after = engine.call(in_engine.canary)

    assert after["state"] == "proven"  # before any request meets the new weights
    assert after["maker"] != before
    engine.call(in_engine.change_one_weight, 3)  # the bit is what it was
    assert engine.call(in_engine.canary)["maker"] == before


def test_a_canary_beside_a_users_request_ends_and_so_does_the_request(engine: Engine) -> None:
    found = engine.call(in_engine.change_a_weight_under_a_request, prompt_of(3_000, seed=3))

    assert found["state"] == "proven"


def test_a_detach_takes_a_canary_along_that_has_not_ended(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    engine = engine_factory(
        tiny(),
        environment={"RAY_ADDRESS": nodes.ray_cluster.address},
        max_num_batched_tokens=512,  # the user's prompt takes many steps
    )
    engine.call(in_engine.attach, nodes.settings(0))
    left = engine.call(in_engine.leave_a_canary_beside_a_request, prompt_of(6_000, seed=4))
    assert left  # the canary's own

    engine.call(in_engine.detach)
    engine.call(in_engine.attach, nodes.settings(0))

    assert engine.call(in_engine.canary)["state"] == "proven"


def test_a_paused_engine_computes_its_canary_when_it_goes_on(engine: Engine) -> None:
    engine.call(in_engine.pause)
    engine.call(in_engine.change_one_weight, 2)
    engine.call(in_engine.step)
    assert engine.call(in_engine.canary)["state"] == "due"

    engine.call(in_engine.resume)
    engine.call(in_engine.step)

    assert engine.call(in_engine.canary)["state"] == "proven"


def test_an_engine_whose_prompts_are_too_short_for_a_canary_says_so(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    engine = engine_factory(tiny(), kv_transfer_config=nodes.transfer(0), max_model_len=256)

    found = engine.call(in_engine.canary)

    assert found["state"] == "refused"
    assert "max_model_len is 256" in found["why"]


def test_a_window_keeps_its_last_chunks_and_every_group_is_proven(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    engine = engine_factory(tiny_gemma2(), kv_transfer_config=nodes.transfer(0))

    uncached = engine.call(in_engine.stats)["uncached"]
    if uncached:
        assert "several cache groups" in uncached  # vLLM 0.29, said by name
        return
    assert engine.call(in_engine.canary)["state"] == "proven"
