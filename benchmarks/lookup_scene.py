"""One Ray node of its own on this machine, for what the look-up benchmarks measure."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray

import kvray

READY_LIMIT_S = 60.0


@contextmanager
def own_ray() -> Iterator[None]:
    """A Ray of one node that nobody else uses."""
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, logging_level=logging.WARNING,
        log_to_driver=False,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def own_cluster(*, slab_bytes: int, extent_bytes: int) -> Iterator[kvray.Cluster]:
    """kvray on such a node, with its one NodeStore ready."""
    with own_ray():
        cluster = kvray.start(slab_bytes=slab_bytes, extent_bytes=extent_bytes)
        try:
            cluster.wait_ready(1, deadline_s=READY_LIMIT_S)
            yield cluster
        finally:
            cluster.stop()


def own_node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())
