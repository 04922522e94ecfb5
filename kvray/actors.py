"""What kvray's two kinds of Ray actors have in common: their names, and how their process behaves.

    kvray:<cluster>:directory            one per cluster       (kvray.directory.actor)
    kvray:<cluster>:node:<node id>       one per Ray node      (kvray.node.actor)

All in RAY_NAMESPACE, whatever namespace the caller's job is in. Knows neither of the two.
"""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from kvray.errors import ConfigError

logger = logging.getLogger("kvray")

RAY_NAMESPACE = "kvray"
BUG_EXIT_CODE = 70  # EX_SOFTWARE, see sysexits.h; Ray starts the actor again


def directory_name(cluster_name: str) -> str:
    return f"kvray:{cluster_name}:directory"


def node_store_name(cluster_name: str, node_id: str) -> str:
    return f"{node_store_prefix(cluster_name)}{node_id}"


def node_store_prefix(cluster_name: str) -> str:
    """What the names of all NodeStores of a cluster begin with, and no others do."""
    return f"kvray:{cluster_name}:node:"


def refuse_optimized() -> None:
    """Raises ConfigError under `python -O`, which takes the asserts away."""
    if sys.flags.optimize:
        raise ConfigError(
            "kvray does not run under python -O (or PYTHONOPTIMIZE): an assert is how one of its "
            "actors finds out that it has a bug, and ends instead of going on"
        )


def log_to_stderr() -> None:
    """Let info lines of kvray reach the log of this Ray worker; Ray forwards it to drivers."""
    if logger.handlers:
        return
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextmanager
def ending_on_bug(what: str) -> Iterator[None]:
    """Whatever is raised inside is a bug: this process ends, and Ray starts it anew."""
    try:
        yield
    except Exception:  # noqa: BLE001 (the outermost loop: log and die into a new epoch)
        die(f"a bug in {what}, which starts anew:\n{traceback.format_exc()}")


def die(reason: str) -> NoReturn:
    """End this process at once, without cleaning up: the slab is made for it."""
    logger.critical("%s", reason)
    logging.shutdown()
    os._exit(BUG_EXIT_CODE)


def alive_nodes() -> dict[str, dict[str, Any]]:
    """What Ray says of each node of its cluster that is alive, by node id. 0.4 ms."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()
    return {node["NodeID"]: node for node in nodes if node["Alive"]}
