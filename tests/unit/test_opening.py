"""Goal: a NodeStore finds its size by itself, keeps it, and what a dead one left can be removed.

Method: real slabs in /dev/shm, under a cluster name of the test's own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvray.config import Config, default_extent_bytes
from kvray.core.ids import NodeId
from kvray.core.layout import Geometry
from kvray.node import opening
from kvray.node.memory import read_host_memory
from kvray.node.opening import clean_up, geometry_for, memory_usage_threshold, sweep_sockets
from kvray.node.slab import SlabOwner
from kvray.node.slab_file import SHM_DIRECTORY, SlabLock, SlabPaths, slab_paths

CLUSTER = "test-opening"
NODE = NodeId("5eed" * 14)
SIZE = Geometry(4 << 20, 256 * 1024)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    tmp_path.chmod(0o700)
    return {"cluster_name": CLUSTER, "runtime_dir": str(tmp_path)}


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[SlabPaths]:
    paths = slab_paths(CLUSTER, NODE, runtime=tmp_path)
    yield paths
    paths.slab.unlink(missing_ok=True)


def open_slab(tmp_path: Path) -> SlabOwner:
    return SlabOwner.open(CLUSTER, NODE, SIZE, lock_mode="off", runtime=tmp_path)


def test_the_size_that_is_set_is_taken(settings: dict[str, object], paths: SlabPaths) -> None:
    config = Config.parse(settings | {"slab_bytes": "8 MiB", "extent_bytes": "1 MiB"})
    assert geometry_for(config, paths, 0.95) == Geometry(8 << 20, 1 << 20)
    config = Config.parse(settings | {"slab_bytes": "8 MiB"})
    assert geometry_for(config, paths, 0.95) == Geometry(8 << 20, default_extent_bytes(8 << 20))


def test_without_a_size_a_share_of_the_host_is_taken(
    settings: dict[str, object], paths: SlabPaths
) -> None:
    size = geometry_for(Config.parse(settings), paths, 0.95)
    memory = read_host_memory(SHM_DIRECTORY)
    assert 0 < size.slab_bytes < min(memory.shm_free, memory.available)


def test_without_a_size_a_restart_keeps_what_it_has(
    settings: dict[str, object], paths: SlabPaths, tmp_path: Path
) -> None:
    open_slab(tmp_path).close(unlink=False)
    assert geometry_for(Config.parse(settings), paths, 0.95) == SIZE
    resized = Config.parse(settings | {"slab_bytes": "8 MiB"})
    assert geometry_for(resized, paths, 0.95).slab_bytes == 8 << 20


def test_the_threshold_is_that_of_rays_memory_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_memory_monitor_refresh_ms", "RAY_memory_usage_threshold"):
        monkeypatch.delenv(name, raising=False)
    assert memory_usage_threshold() == 0.95
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.8")
    assert memory_usage_threshold() == 0.8
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    assert memory_usage_threshold() == 1.0


def test_what_a_dead_node_store_left_is_removed(
    settings: dict[str, object], paths: SlabPaths, tmp_path: Path
) -> None:
    open_slab(tmp_path).close(unlink=False)
    paths.socket.touch()
    assert clean_up(settings, NODE) == []
    assert not paths.slab.exists()
    assert not paths.socket.exists()
    assert clean_up(settings, NODE) == [], "twice does no harm"


def test_what_a_living_one_has_is_left_alone_and_named(
    settings: dict[str, object],
    paths: SlabPaths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "LOCK_DEADLINE_S", 0.1)
    slab = open_slab(tmp_path)
    try:
        assert clean_up(settings, NODE) == [str(paths.slab)]
        assert paths.slab.exists()
    finally:
        slab.close(unlink=True)


def test_only_sockets_of_nodes_that_are_gone_are_removed(tmp_path: Path) -> None:
    gone, outlived, living = (NodeId(letter * 56) for letter in "abc")
    paths = [slab_paths(CLUSTER, node, runtime=tmp_path) for node in (gone, outlived, living)]
    other = slab_paths(f"{CLUSTER}-2", gone, runtime=tmp_path)
    for each in (*paths, other):
        each.socket.touch()
    lock = SlabLock.acquire(paths[1].lock)  # an actor that has outlived its node
    assert lock is not None
    try:
        assert sweep_sockets(CLUSTER, [living], runtime=tmp_path) == [paths[0].socket]
    finally:
        lock.release()
    assert [each.socket.exists() for each in (*paths, other)] == [False, True, True, True]
