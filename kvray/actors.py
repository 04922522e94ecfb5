"""What kvray's kinds of Ray actors have in common: their names, and how their process behaves.

    kvray:<cluster>:directory            one per cluster       (kvray.directory.actor)
    kvray:<cluster>:node:<node id>       one per Ray node      (kvray.node.actor)
    kvray:<cluster>:page                 at most one           (kvray.watch.page)

All in RAY_NAMESPACE, whatever namespace the caller's job is in. Knows none of them.
"""

import gc
import logging
import os
import pwd
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from kvray.errors import ConfigError

NOBODY = "somebody unnamed"  # of the audit log: a caller that says nothing

logger = logging.getLogger("kvray")
audit = logging.getLogger("kvray.audit")

RAY_NAMESPACE = "kvray"
TESTED_RAY = "2.60"  # kvray.serve uses an internal interface of it, which comes without promises
TURN_S = 0.0005  # about as long as a NodeStore needs for its longest answer to a look-up
BUG_EXIT_CODE = 70  # EX_SOFTWARE, see sysexits.h; Ray starts the actor again


def directory_name(cluster_name: str) -> str:
    return f"kvray:{cluster_name}:directory"


def page_name(cluster_name: str) -> str:
    return f"kvray:{cluster_name}:page"


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


def refuse_untested_ray(version: str) -> None:
    """Raises ConfigError for a release of Ray that kvray was not tested with. Asked where kvray is
    started or found: that all nodes and drivers of a cluster have the same Ray is seen to by Ray.
    """
    if version.split(".")[:2] != TESTED_RAY.split("."):
        raise ConfigError(
            f"kvray was tested with Ray {TESTED_RAY}; this process runs Ray {version}. Actors and "
            f"their placement change between releases: install 'ray[default]~={TESTED_RAY}.0' on "
            "every node and client, and start Ray anew"
        )


def one_line(exc: BaseException) -> str:
    """All that an error of Ray says. Where two versions differ, each has a line of its own."""
    return " ".join(str(exc).split()) or type(exc).__name__


def log_to_stderr() -> None:
    """Let info lines of kvray reach the log of this Ray worker; Ray forwards it to drivers."""
    if logger.handlers:
        return
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def note_who_asked(what: str, asked_by: str) -> None:
    """One line of the audit log, in the log of this Ray worker. asked_by: as caller() says. A Ray
    client can say what it likes, so the log tells of mistakes, not of malice.
    """
    audit.info("%s, asked by %s", what, asked_by)


def caller() -> str:
    """What an audit log says of this process."""
    user = os.geteuid()
    with suppress(KeyError):  # a container may have no name for it
        return f"{pwd.getpwuid(user).pw_name}@{socket.gethostname()}, process {os.getpid()}"
    return f"user {user}@{socket.gethostname()}, process {os.getpid()}"


def run_at_normal_priority() -> bool:
    """Undo the niceness (15) that Ray gives its workers: beside engines that compute, an answer to
    one of them and a heartbeat would wait for a core. False where that is not allowed (it takes
    CAP_SYS_NICE): then start Ray with RAY_worker_niceness=0. Before any thread is started.
    """
    try:
        for thread in os.listdir("/proc/self/task"):  # noqa: PTH208
            # A thread that has ended since is no reason to stop.
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread), 0)
    except PermissionError:
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        logger.warning(
            "this process runs at niceness %d and may not change it; engines that compute delay "
            "its answers. Start Ray with RAY_worker_niceness=0 in its environment",
            niceness,
        )
        return False
    return True


def take_short_turns() -> None:
    """Let the threads of this process (our loop, the link's, Ray's own) wait for one another for
    half a millisecond at most, and not for the 5 that are Python's default: an engine's step waits
    for an answer 2 ms in all.
    """
    sys.setswitchinterval(TURN_S)


def keep_what_is_loaded() -> None:
    """Let the garbage collector look no more at what is there by now. Ray and NIXL (1.3.2 with
    torch) are some 70,000 objects, which a full collection would go through while every other
    thread waits.
    """
    gc.freeze()


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
