"""Goal: faults of real processes under load: no request fails, no answer is wrong, no block is
lost, and what was gone for a while is back in time.

Method: the faults of benchmarks/faults.py in one world of nodes and engines. The link that is cut
has a world of its own: test_link_cut.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import fault_cases, fault_kills, fault_long
from benchmarks.fault_load import Controls, make_controls
from benchmarks.fault_world import World, running_world
from tests.engines import Mode
from tests.faults import require

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

SHORT_S = 60.0  # of faults at random, and of none


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def controls(folder: Path) -> Controls:
    return make_controls(folder)


@pytest.fixture(scope="module")
def shared_world(folder: Path, controls: Controls) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_worker_niceness", "0")  # as in ray_cluster.yaml
        with running_world(folder, controls) as world:
            yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    yield shared_world
    shared_world.clear()


def test_a_dead_node_is_off_the_roster_and_holds_nobody_up(world: World) -> None:
    """Not the last one: until Ray believes it too, 14 s later, kvray can not clean up after it."""
    require(lambda: fault_cases.node_kill(world))


def test_a_killed_node_store_has_its_blocks_and_both_kinds_of_hits_again(world: World) -> None:
    require(lambda: fault_cases.store_kill(world))


def test_a_killed_engine_leaves_no_pin_and_no_reservation(world: World) -> None:
    require(lambda: fault_kills.engine_kill(world, mode=Mode.IN_PROCESS))


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_store_and_of_a_read_serves_no_torn_block(world: World) -> None:
    require(lambda: fault_kills.store_kill_mid_write(world))


@pytest.mark.slow
def test_a_killed_directory_of_a_large_cache_is_whole_again(world: World) -> None:
    require(lambda: fault_kills.directory_kill(world))


@pytest.mark.slow
def test_a_killed_engine_of_several_processes_leaves_nothing_either(world: World) -> None:
    require(lambda: fault_kills.engine_kill(world))


@pytest.mark.slow
def test_a_drained_node_leaves_its_blocks_behind(world: World) -> None:
    require(lambda: fault_long.drain(world))


@pytest.mark.slow
def test_a_frozen_node_is_buried_and_comes_back_as_another(world: World) -> None:
    require(lambda: fault_cases.node_freeze(world))


@pytest.mark.slow
def test_nobody_is_buried_because_the_machine_computes(world: World) -> None:
    require(lambda: fault_long.nothing(world, SHORT_S))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_faults_at_random_lose_nothing(world: World) -> None:
    require(lambda: fault_long.at_random(world, SHORT_S))
