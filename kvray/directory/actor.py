"""The directory actor: who holds what, who is alive, and a NodeStore on every Ray node.

    calls          ──lock──▶ DirectoryCore      hello, announce, locate, where, status
    tick thread    ──lock──▶ DirectoryCore      suspects and buries who is silent
    supervisor     ──Ray───▶ one NodeStore per node that Ray says is alive

A shell: what a message means is decided in core.directory, and where a NodeStore is placed by the
function that whoever starts the cluster hands in (see kvray.cluster). Named, detached, restarted
by Ray without end; it comes back empty, with a greater term, and the NodeStores fill it again.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ray.exceptions import RayError
from ray.util import list_named_actors

from kvray.actors import (
    NOBODY,
    RAY_NAMESPACE,
    alive_nodes,
    ending_on_bug,
    keep_what_is_loaded,
    log_to_stderr,
    node_store_name,
    note_who_asked,
    refuse_optimized,
    run_at_normal_priority,
    take_short_turns,
)
from kvray.config import Config
from kvray.core import arguments
from kvray.core.codec import decode, encode
from kvray.core.directory import TICK_MS, DirectoryCore
from kvray.core.ids import Term
from kvray.core.messages import (
    MAX_CALL_BYTES,
    MAX_WHERE_KEYS,
    Announce,
    Locate,
    NodeHello,
)
from kvray.network import listeners

logger = logging.getLogger("kvray.directory")

NODES_PERIOD_S = 1.0  # a new node waits so long for its NodeStore; ray.nodes() is 0.4 to 0.8 ms
NAMES_PERIOD_S = 5.0  # how soon a NodeStore that somebody killed for good is missed

Place = Callable[[dict[str, object], str], None]  # (Config.to_dict(), Ray node id)


class Directory:
    """One per cluster. Ray calls its methods one after another, in each caller's order.

    settings: Config.to_dict(). place: makes the NodeStore of one Ray node if there is none; it
    travels by name, so it must be a function of a module. starter: says whose start() made us.
    """

    def __init__(self, settings: dict[str, object], place: Place, starter: str) -> None:
        refuse_optimized()
        log_to_stderr()
        run_at_normal_priority()
        take_short_turns()
        keep_what_is_loaded()
        self._config = Config.parse(settings)
        self._starter = starter
        # Nobody remembers the term before; the wall clock in ms is greater than it, since a
        # restart takes longer than a millisecond.
        term = Term(int(time.time() * 1000))
        self._core = DirectoryCore(term)
        self._lock = threading.Lock()  # of the core
        self._stopping = threading.Event()
        self._supervisor = Supervisor(self._config, place, self._on_node_dead, self._stopping)
        self._supervisor.start()
        threading.Thread(target=self._tick, name="kvray-tick", daemon=True).start()
        logger.info("directory of cluster %s: term %d", self._config.cluster_name, term)

    def __repr__(self) -> str:
        return f"Directory(cluster={self._config.cluster_name})"

    @contextmanager
    def _deciding(self) -> Iterator[DirectoryCore]:
        with self._lock, ending_on_bug("the directory"):
            yield self._core

    # ---- for NodeStores

    def hello(self, data: bytes) -> bytes:
        message = decode(arguments.a_message(data), max_bytes=MAX_CALL_BYTES, expect=NodeHello)
        wall_clock_ms = int(time.time() * 1_000)
        arguments.a_time(message.info.epoch, "an epoch", now_ms=wall_clock_ms)
        arguments.a_time(message.wall_clock_ms, "a wall clock", now_ms=wall_clock_ms)
        with self._deciding() as core:
            return encode(core.on_hello(message, now_ms=_now_ms()))

    def announce(self, data: bytes) -> bytes:
        message = decode(arguments.a_message(data), max_bytes=MAX_CALL_BYTES, expect=Announce)
        with self._deciding() as core:
            return encode(core.on_announce(message, now_ms=_now_ms()))

    def locate(self, data: bytes) -> bytes:
        message = decode(arguments.a_message(data), max_bytes=MAX_CALL_BYTES, expect=Locate)
        with self._deciding() as core:
            return encode(core.on_locate(message, now_ms=_now_ms()))

    def bye(self, node_id: str, epoch: int) -> None:
        leaver, its_epoch = arguments.a_node_id(node_id), arguments.an_epoch(epoch)
        with self._deciding() as core:
            core.on_bye(leaver, its_epoch)

    # ---- for people and kvray.cluster

    def origin(self) -> tuple[str, dict[str, object]]:
        """Whose start() made us, and with which settings."""
        return self._starter, self._config.to_dict()

    def pid(self) -> int:
        return os.getpid()

    def where(self, keys: Sequence[bytes]) -> list[list[dict[str, Any]]]:
        """For each key its locations, as plain data."""
        wanted = arguments.keys(keys, at_most=MAX_WHERE_KEYS)
        with self._deciding() as core:
            found = core.where(wanted)
        return [[asdict(location) for location in locations] for locations in found]

    def status(self) -> dict[str, Any]:
        """What the core knows of its nodes and entries, as plain data."""
        with self._deciding() as core:
            known = core.snapshot() | {"retired": self._supervisor.retired()}
        return known | {"listeners": [[one.address, one.port] for one in listeners()]}

    def retire(self, node_id: str, *, asked_by: str = NOBODY) -> None:
        """No NodeStore is made on this Ray node any more. A directory that is restarted forgets
        it, and the node gets an empty one again.
        """
        node = arguments.a_node_id(node_id)
        note_who_asked(f"retire node {node}", arguments.a_text(asked_by, "asked_by"))
        self._supervisor.retire(node)

    def stop_supervising(self, *, asked_by: str = NOBODY) -> None:
        """No NodeStore is made after this returns; what is there stays."""
        note_who_asked("stop", arguments.a_text(asked_by, "asked_by"))
        self._stopping.set()
        self._supervisor.join()

    # ---- threads

    def _tick(self) -> None:
        while not self._stopping.wait(TICK_MS / 1_000):
            with self._deciding() as core:
                core.on_tick(_now_ms())
                events = core.drain_events()
            for event in events:
                logger.info(
                    "node %s, epoch %d, is %s after %d ms of silence",
                    event.node_id,
                    event.epoch,
                    event.state.value,
                    event.silent_ms,
                )

    def _on_node_dead(self, node_id: str) -> None:
        """Ray's death notice; our own heartbeat has usually been faster."""
        with self._deciding() as core:
            for info in [info for info in core.roster() if info.node_id == node_id]:
                core.on_node_dead(info.node_id, info.epoch)


class Supervisor(threading.Thread):
    """Sees to it that each Ray node that is alive has a NodeStore. A node that joins gets one.

    Ray restarts a NodeStore that dies. What it does not bring back (one that was killed for good)
    is missing from the list of names after a while and made again.
    """

    def __init__(
        self,
        config: Config,
        place: Place,
        on_node_dead: Callable[[str], None],
        stopping: threading.Event,
    ) -> None:
        super().__init__(name="kvray-supervisor", daemon=True)
        self._config = config
        self._place = place
        self._on_node_dead = on_node_dead
        self._stopping = stopping
        self._placed: set[str] = set()  # Ray nodes that are alive and have been given one
        self._retired: set[str] = set()  # drained: they get none any more
        self._names_due_s = 0.0

    def retire(self, node_id: str) -> None:
        """May be called from any thread."""
        self._retired.add(node_id)

    def retired(self) -> list[str]:
        return sorted(self._retired)

    def run(self) -> None:
        with ending_on_bug("the directory's supervisor"):
            while not self._stopping.is_set():
                try:
                    self._look()
                except RayError as exc:
                    # Ray's own control store is away for a moment; the nodes stay as they are.
                    logger.warning("supervision waits for Ray: %s", exc)
                self._stopping.wait(NODES_PERIOD_S)

    def _look(self) -> None:
        alive = set(alive_nodes())
        for node_id in self._placed - alive:
            self._placed.discard(node_id)
            self._on_node_dead(node_id)
            logger.info("Ray node %s is gone", node_id)
        if time.monotonic() >= self._names_due_s:
            self._forget_killed()
            self._names_due_s = time.monotonic() + NAMES_PERIOD_S
        self._retired &= alive
        for node_id in sorted(alive - self._placed - self._retired):
            if self._stopping.is_set():
                return
            self._place(self._config.to_dict(), node_id)
            self._placed.add(node_id)
            logger.info("Ray node %s has a NodeStore", node_id)

    def _forget_killed(self) -> None:
        names = {
            actor["name"]
            for actor in list_named_actors(all_namespaces=True)
            if actor["namespace"] == RAY_NAMESPACE
        }
        for node_id in list(self._placed):
            if node_store_name(self._config.cluster_name, node_id) not in names:
                self._placed.discard(node_id)
                if node_id in self._retired:
                    continue
                logger.warning("the NodeStore of Ray node %s was killed", node_id)


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
