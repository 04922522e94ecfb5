"""From a cluster's settings to an open slab on this node; from a dead NodeStore to nothing left.

runtime folder ──▶ geometry: as set ─┬─ else as the slab that is there has it
                                     └─ else a share of what the host has
       ──▶ SlabOwner.open
"""

import os
import re
import time
from collections.abc import Collection
from pathlib import Path

from kvray.actors import alive_nodes
from kvray.config import (
    NODE_NAME_CHARS,
    Config,
    default_extent_bytes,
    default_slab_bytes,
)
from kvray.core.ids import NodeId
from kvray.core.layout import Geometry
from kvray.node.memory import RAY_MEMORY_USAGE_THRESHOLD, Progress, read_host_memory
from kvray.node.slab import SlabOwner
from kvray.node.slab_file import (
    SHM_DIRECTORY,
    SlabLock,
    SlabPaths,
    open_slab_file,
    read_header_page,
    remove_slab,
    runtime_directory,
    slab_paths,
    sweep,
)
from kvray.node.slab_opening import unreadable

# Ray ends an actor that does not hear its kill about 5 s later; then its memory is given back, and
# only then its lock.
LOCK_DEADLINE_S = 20.0
LOCK_PERIOD_S = 0.05

_MONITOR, _THRESHOLD = "memory_monitor_refresh_ms", "memory_usage_threshold"  # Ray's names


def open_slab(
    config: Config, node_id: NodeId, *, runtime: Path, on_progress: Progress
) -> SlabOwner:
    """Blocks for 0.5 s/GiB of a new slab. Raises ConfigError, SlabError or SlabBusyError."""
    threshold = memory_usage_threshold()
    paths = slab_paths(config.cluster_name, node_id, runtime=runtime)
    living = living_nodes()
    slab = SlabOwner.open(
        config.cluster_name,
        node_id,
        geometry_for(config, paths, threshold),
        lock_mode=config.lock,
        live_node_ids=living,
        memory_usage_threshold=threshold,
        on_progress=on_progress,
        runtime=runtime,
    )
    sweep_sockets(config.cluster_name, living, runtime=runtime)
    return slab


def geometry_for(config: Config, paths: SlabPaths, threshold: float) -> Geometry:
    """See the picture above. Raises ConfigError if what is set can not be cut.

    threshold: the share of the host's memory above which Ray kills workers.
    """
    found = _geometry_of(paths.slab)
    slab_bytes = config.slab_bytes
    if slab_bytes is None and found is not None:
        slab_bytes = found.slab_bytes  # a restart keeps what it has, however much is free now
    if slab_bytes is None:
        memory = read_host_memory(SHM_DIRECTORY)
        slab_bytes = default_slab_bytes(
            free_shm_bytes=memory.shm_free,
            available_memory_bytes=min(
                memory.available, int(memory.total * threshold) - memory.used
            ),
        )
    if config.extent_bytes is not None:
        return Geometry(slab_bytes, config.extent_bytes)
    if found is not None and found.slab_bytes == slab_bytes:
        return found
    return Geometry(slab_bytes, default_extent_bytes(slab_bytes))


def _geometry_of(path: Path) -> Geometry | None:
    """Of a slab that is there and can be read."""
    descriptor = open_slab_file(path)
    if descriptor is None:
        return None
    try:
        page = read_header_page(descriptor)
    finally:
        os.close(descriptor)
    if page is None or unreadable(page):
        return None
    return Geometry(int(page["slab_bytes"][0]), int(page["extent_bytes"][0]))


def memory_usage_threshold() -> float:
    """Above which share of the host's memory Ray kills workers; 1.0 if it does not."""
    ray_settings = {name: os.environ.get(f"RAY_{name}") for name in (_MONITOR, _THRESHOLD)}
    if ray_settings[_MONITOR] == "0":
        return 1.0
    return float(ray_settings[_THRESHOLD] or RAY_MEMORY_USAGE_THRESHOLD)


def living_nodes() -> list[NodeId]:
    """The nodes that Ray says are alive."""
    return [NodeId(node_id) for node_id in alive_nodes()]


def sweep_sockets(cluster_name: str, living: Collection[NodeId], *, runtime: Path) -> list[Path]:
    """Remove the sockets of this cluster's NodeStores that are gone with their nodes: an engine
    that is not told its node has to find one socket on its host. Returns what was removed.
    """
    removed = []
    living_names = {node_id[:NODE_NAME_CHARS] for node_id in living}
    for path in sorted(runtime.glob(f"{cluster_name}-*.sock")):
        name = path.stem.removeprefix(f"{cluster_name}-")
        if name in living_names or not re.fullmatch(rf"[0-9a-f]{{1,{NODE_NAME_CHARS}}}", name):
            continue
        # Nobody who still holds it is gone, whatever Ray says (of its cluster, or of another one).
        lock = SlabLock.acquire(slab_paths(cluster_name, name, runtime=runtime).lock)
        if lock is not None:
            path.unlink(missing_ok=True)
            lock.release()
            removed.append(path)
    return removed


def sweep_dead_nodes(config: Config) -> None:
    """At the end: what nodes that are gone have left on this host."""
    runtime, living = runtime_directory(config.runtime_dir), living_nodes()
    sweep(config.cluster_name, living, runtime=runtime)
    sweep_sockets(config.cluster_name, living, runtime=runtime)


def clean_up(settings: dict[str, object], node_id: str) -> list[str]:
    """Remove what a NodeStore of this node has left that could not do it itself. Runs as a Ray
    task on the node, when the actor has been killed. Returns the paths that are left.
    """
    config = Config.parse(settings)
    paths = slab_paths(config.cluster_name, node_id, runtime=runtime_directory(config.runtime_dir))
    end_s = time.monotonic() + LOCK_DEADLINE_S
    while (lock := SlabLock.acquire(paths.lock)) is None:
        if time.monotonic() > end_s:
            return left_behind(paths)  # somebody still works on it
        time.sleep(LOCK_PERIOD_S)
    try:
        remove_slab(paths.slab)
        paths.socket.unlink(missing_ok=True)
    finally:
        lock.release()
    return left_behind(paths)


def left_behind(paths: SlabPaths) -> list[str]:
    """The lock stays on purpose: one that is unlinked can be held twice."""
    return [str(path) for path in (paths.slab, paths.socket) if path.exists()]
