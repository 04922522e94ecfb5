"""kvray on a Ray cluster: start it, find it, look at it, stop it.

    start() ──▶ the directory actor, on the head node ──▶ one NodeStore per Ray node, also of those
       │                                                  that join later (kvray.directory.actor)
       └──▶ waits until each of them serves ──▶ Cluster ◀── connect()

The only place that says how kvray's actors are placed. A second start() on the same cluster is
connect(). Ray is used as it is found: its address, its token authentication and its namespaces are
the caller's business and pass through untouched.
"""

import contextlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from kvray.actors import (
    RAY_NAMESPACE,
    alive_nodes,
    caller,
    directory_name,
    node_store_name,
    node_store_prefix,
    one_line,
    page_name,
    refuse_optimized,
    refuse_untested_ray,
)
from kvray.cluster.draining import Drain, Drained
from kvray.cluster.links import LinkMeasurement, Say, measure_links
from kvray.cluster.placement import actor_names, gather, make_directory, sweep
from kvray.cluster.status import (
    ClusterStatus,
    Location,
    NodeState,
    NodeStatus,
    node_status,
    progress_line,
    raise_failures,
)
from kvray.config import Config, EngineConfig
from kvray.core import arguments
from kvray.core.messages import MAX_ROSTER_NODES, MAX_WHERE_KEYS
from kvray.errors import ConfigError, NodeLostError

__all__ = [
    "Cluster",
    "ClusterStatus",
    "Drained",
    "LinkMeasurement",
    "Location",
    "NodeState",
    "NodeStatus",
    "connect",
    "start",
]

logger = logging.getLogger("kvray")

START_DEADLINE_S = 600.0  # clearing the pages of a new slab takes 0.5 s/GiB: enough for 1 TiB
STOP_DEADLINE_S = 30.0  # unmapping a terabyte takes seconds
SWEEP_DEADLINE_S = 30.0  # of what cleans up after a silent NodeStore, see node.opening.clean_up
CALL_DEADLINE_S = 10.0  # a Ray call takes a millisecond, an actor that is being restarted 2 s
LOOK_PERIOD_S = 0.05  # while somebody waits for a node: two Ray calls of a millisecond
WIPE_DEADLINE_S = 600.0  # memory is written at 5 GiB/s at least, also where engines compute: 3 TiB
NODE_DEADLINE_S = 2.0  # of a NodeStore's word on itself; one that is silent is shown without it
MAX_DEADLINE_S = 86_400.0  # of a caller: a day; longer is a mistake in units
STARTER_BYTES = 8  # of the nonce that tells whose start() has made a directory


def start(
    config: Config | None = None,
    *,
    deadline_s: float = START_DEADLINE_S,
    progress: Say | None = None,
    **settings: object,
) -> "Cluster":
    """Run kvray on this process's Ray cluster, and wait until each of its nodes serves.

    Without a Ray cluster ($RAY_ADDRESS, or one that `ray start` has left) a local one is started.
    settings: fields of Config, which they complete. If the cluster runs already, this is connect();
    settings that were given and differ from it are a ConfigError.

    Raises ConfigError if the slab does not fit a node, SlabError if a node can not make it; then
    nothing is left behind. NodeLostError if a node is not ready by the deadline.
    """
    refuse_optimized()
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config is a kvray.Config, or None; found {type(config).__name__}")
    arguments.a_duration(deadline_s, "deadline_s", at_most=MAX_DEADLINE_S)
    arguments.a_callback(progress, "progress")
    given = (config.to_dict() if config is not None else {}) | settings
    wanted = Config.parse(given)
    _join_ray()
    starter = secrets.token_hex(STARTER_BYTES)
    directory = make_directory(wanted, starter)
    cluster = Cluster(wanted.cluster_name, directory)
    running = cluster._origin(deadline_s)  # noqa: SLF001 (the same module)
    if running.starter != starter:
        _require_equal(given, wanted, running.config)
        cluster._await_nodes(None, deadline_s, progress, insists=False)  # noqa: SLF001
        return cluster
    try:
        cluster._await_nodes(None, deadline_s, progress, insists=True)  # noqa: SLF001
    except BaseException:
        cluster.stop()
        raise
    return cluster


def connect(cluster_name: str = "default") -> "Cluster":
    """The kvray that runs on this process's Ray cluster. Raises NodeLostError if none does."""
    refuse_optimized()
    name = Config.parse({"cluster_name": cluster_name}).cluster_name
    _join_ray()
    try:
        directory = ray.get_actor(directory_name(name), namespace=RAY_NAMESPACE)
    except ValueError as exc:
        raise NodeLostError(
            f"kvray cluster {name!r} does not run on this Ray cluster; kvray.start() starts it"
        ) from exc
    return Cluster(name, directory)


class Cluster:
    """A handle to kvray on a Ray cluster, as start() and connect() return it.

    It holds nothing that has to be given back; many processes may have one.
    """

    def __init__(self, name: str, directory: Any) -> None:  # noqa: ANN401 (Ray's handle)
        self.name = name
        self._directory = directory

    def __repr__(self) -> str:
        return f"Cluster({self.name!r})"

    def status(self) -> ClusterStatus:
        """How each node is, now. Raises NodeLostError if the directory does not answer."""
        seen = self._ask("status")
        alive = self._alive_hosts()
        listed = seen["nodes"]
        answers = self._ask_node_stores("status", list(alive))
        return ClusterStatus(
            cluster_name=self.name,
            term=seen["term"],
            roster_version=seen["roster_version"],
            split_models=tuple(seen["split_models"]),
            directory_listeners=tuple(map(tuple, seen["listeners"])),
            nodes=tuple(
                node_status(
                    node_id,
                    alive.get(node_id),
                    listed.get(node_id),
                    answers.get(node_id),
                    is_retired=node_id in seen["retired"],
                )
                for node_id in sorted({*alive, *listed})
            ),
        )

    def nodes(self) -> tuple[NodeStatus, ...]:
        """The nodes that serve."""
        return tuple(node for node in self.status().nodes if node.state is NodeState.READY)

    def where(self, *keys: bytes) -> list[list[Location]]:
        """For each key the nodes that the directory believes to have it. A hint, like all of it."""
        wanted = arguments.keys(keys, at_most=MAX_WHERE_KEYS)
        return [[Location(**place) for place in places] for places in self._ask("where", wanted)]

    def engine_settings(self) -> dict[str, object]:
        """EngineConfig's fields for an engine on the Ray node of this process."""
        node_id = ray.get_runtime_context().get_node_id()
        config = self._origin().config
        answer = self._ask_node_stores("status", [node_id]).get(node_id)
        return EngineConfig(
            cluster_name=self.name,
            node_id=node_id,
            runtime_dir=answer["runtime_dir"] if answer else config.runtime_dir,
            lookup_deadline_ms=config.lookup_deadline_ms,
        ).to_dict()

    def wait_ready(
        self,
        node_count: int | None = None,
        deadline_s: float = START_DEADLINE_S,
        progress: Say | None = None,
    ) -> None:
        """Return when node_count nodes serve; None: every node of the Ray cluster, of which there
        is at least one. progress is told what has changed, a line at a time.

        Raises ConfigError, SlabError or SlabBusyError if a node can not start (node_count given:
        only NodeLostError, at the deadline).
        """
        if node_count is not None:
            arguments.a_number(node_count, "node_count", 1, MAX_ROSTER_NODES)
        arguments.a_duration(deadline_s, "deadline_s", at_most=MAX_DEADLINE_S)
        arguments.a_callback(progress, "progress")
        self._await_nodes(node_count, deadline_s, progress, insists=node_count is None)

    def recent(self, node_id: str) -> list[tuple[int, str]]:
        """The last events of a node's core: how many ms ago, and what. Raises NodeLostError."""
        store = self._node_stores([arguments.a_node_id(node_id)]).get(node_id)
        if store is None:
            raise NodeLostError(f"node {node_id} has no NodeStore; see status()")
        events: list[tuple[int, str]] = self._ask_actor(
            store, f"the NodeStore of node {node_id}", "recent", deadline_s=NODE_DEADLINE_S
        )
        return events

    def measure_links(self, progress: Say | None = None) -> tuple[LinkMeasurement, ...]:
        """How long reads between each two nodes take, how fast and which way their bytes come;
        both ways, one after another, 40 MiB each. Of a large cluster a part (see cluster.links).
        """
        arguments.a_callback(progress, "progress")
        nodes = self.nodes()
        stores = self._node_stores([node.node_id for node in nodes])
        return measure_links(nodes, stores, progress)

    def clear(self, *, wipe: bool = False) -> int:
        """Evict every block that no request is using, on every node that answers.

        wipe: overwrite what they and earlier ones have left in the slabs, too (0.1 s/GiB), and
        raise NodeLostError if a node does not say that it has. Returns the bytes overwritten.
        """
        arguments.a_flag(wipe, "wipe")
        nodes = [node.node_id for node in self.nodes()]
        deadline_s = WIPE_DEADLINE_S if wipe else NODE_DEADLINE_S
        answers = self._ask_node_stores(
            "clear", nodes, deadline_s=deadline_s, wipe=wipe, asked_by=caller()
        )
        wiped = {node: found for node, found in answers.items() if found is not None}
        if wipe and (silent := set(nodes) - set(wiped)):
            raise NodeLostError(
                f"not all slabs were wiped: no answer from {', '.join(sorted(silent))}. Call "
                "it again, or stop(), which wipes them"
            )
        return sum(wiped.values())

    def drain(self, node_id: str, progress: Say | None = None) -> Drained:
        """Let the other nodes take over what only this one has, then end its NodeStore. Its
        engines go on uncached, and it gets no NodeStore again until the next start().

        Takes as long as its blocks take on the wire. What finds no free room elsewhere is lost, and
        counted in the answer. May be repeated, if it broke off. Raises NodeLostError if the node
        or the directory does not answer.
        """
        arguments.a_node_id(node_id)
        arguments.a_callback(progress, "progress")
        nodes = {node.node_id: node for node in self.nodes()}
        stores = self._node_stores(list(nodes))
        if node_id not in stores:
            raise NodeLostError(
                f"node {node_id} is no node that serves; found {', '.join(nodes) or 'none'}"
            )
        leaving = stores.pop(node_id)
        drain = Drain(
            node_id,
            nodes[node_id].epoch,
            store=partial(self._ask_actor, leaving, f"the NodeStore of node {node_id}"),
            directory=self._ask,
            peers={
                peer: (store, nodes[peer].slab_bytes - nodes[peer].used_bytes)
                for peer, store in stores.items()
                if not nodes[peer].details.get("is_draining")
            },
            progress=progress,
        )
        drained = drain.run()
        settings = self._origin().config.to_dict()
        self._ask("retire", node_id, asked_by=caller())
        left = self._end_stores({node_id: leaving}, settings, STOP_DEADLINE_S)
        if left:
            raise NodeLostError(f"node {node_id} was drained, but is left: {', '.join(left)}")
        return drained

    def stop(self, deadline_s: float = STOP_DEADLINE_S) -> None:
        """End kvray on this Ray cluster: no actor, no slab, no socket is left. Ray goes on.

        Engines go on uncached; what they had mapped is theirs until they let go. May be repeated.
        deadline_s: for the NodeStores to give everything back by themselves; to clean up after one
        that does not takes up to SWEEP_DEADLINE_S more. Raises NodeLostError that names what is
        left, if anything is.
        """
        arguments.a_duration(deadline_s, "deadline_s", at_most=MAX_DEADLINE_S)
        settings: dict[str, object] = {"cluster_name": self.name}
        with contextlib.suppress(NodeLostError):
            settings = self._origin().config.to_dict()
            patience_s = min(CALL_DEADLINE_S, deadline_s)
            self._ask("stop_supervising", deadline_s=patience_s, asked_by=caller())
        left = self._end_stores(self._node_stores(), settings, deadline_s)
        for name in (page_name(self.name), directory_name(self.name)):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name, namespace=RAY_NAMESPACE), no_restart=True)
        left += self._names_left()
        if left:
            raise NodeLostError(
                f"kvray cluster {self.name!r} was stopped, but this is left: {', '.join(left)}. "
                "Call stop() again, or remove it by hand"
            )

    # ---- the parts of the above

    def _alive_hosts(self) -> dict[str, str]:
        """The hosts of Ray's nodes that are alive, by node id."""
        return {node_id: node["NodeManagerHostname"] for node_id, node in alive_nodes().items()}

    def _origin(self, deadline_s: float = CALL_DEADLINE_S) -> "_Origin":
        starter, settings = self._ask("origin", deadline_s=deadline_s)
        return _Origin(starter, Config.parse(settings))

    def _ask(self, method: str, *args: object, **keywords: Any) -> Any:  # noqa: ANN401
        whom = f"the directory of kvray cluster {self.name!r}"
        return self._ask_actor(self._directory, whom, method, *args, **keywords)

    def _ask_actor(
        self,
        actor: Any,  # noqa: ANN401
        whom: str,
        method: str,
        *args: object,
        deadline_s: float = CALL_DEADLINE_S,
        **keywords: object,
    ) -> Any:  # noqa: ANN401
        try:
            return ray.get(getattr(actor, method).remote(*args, **keywords), timeout=deadline_s)
        except (RayActorError, GetTimeoutError) as exc:
            raise NodeLostError(
                f"{whom} does not answer: {_last_line(exc)}. Ray restarts it if it has died; "
                "kvray.start() starts it if it was stopped"
            ) from exc

    def _end_stores(
        self,
        stores: Mapping[str, Any],
        settings: dict[str, object],
        deadline_s: float,
    ) -> list[str]:
        """Stop NodeStores, kill their actors, and clean up after those that say nothing. Returns
        what is left.
        """
        who = caller()
        calls = {node: store.stop.remote(asked_by=who) for node, store in stores.items()}
        answers = gather(calls, deadline_s)
        for store in stores.values():
            ray.kill(store, no_restart=True)
        left = [path for paths in answers.values() for path in paths or ()]
        silent = [node_id for node_id in stores if answers[node_id] is None]
        return left + sweep(settings, silent, SWEEP_DEADLINE_S)

    def _node_stores(self, node_ids: Sequence[str] | None = None) -> dict[str, Any]:
        """Handles by node id. None: all there are."""
        prefix = node_store_prefix(self.name)
        if node_ids is None:
            node_ids = [name.removeprefix(prefix) for name in actor_names(prefix)]
        found = {}
        for node_id in node_ids:
            with contextlib.suppress(ValueError):  # gone, or not there yet
                found[node_id] = ray.get_actor(
                    node_store_name(self.name, node_id), namespace=RAY_NAMESPACE
                )
        return found

    def _ask_node_stores(
        self,
        method: str,
        node_ids: Sequence[str],
        *,
        deadline_s: float = NODE_DEADLINE_S,
        **keywords: object,
    ) -> dict[str, Any]:
        """Answers by node id; None from those that do not answer in time."""
        stores = self._node_stores(node_ids)
        return gather(
            {node: getattr(store, method).remote(**keywords) for node, store in stores.items()},
            deadline_s,
        )

    def _await_nodes(
        self, node_count: int | None, deadline_s: float, progress: Say | None, *, insists: bool
    ) -> None:
        end_s = time.monotonic() + deadline_s
        said: dict[str, str] = {}
        while True:
            status = self.status()
            for node in status.nodes:
                line = progress_line(node)
                if progress is not None and said.get(node.node_id) != line:
                    progress(line)
                said[node.node_id] = line
            if insists:
                raise_failures(status.nodes)
            ready_count = sum(node.is_settled(status.roster_version) for node in status.nodes)
            waiting = [node for node in status.nodes if node.may_settle(status.roster_version)]
            if node_count is not None and ready_count >= node_count:
                return
            if node_count is None and status.nodes and not waiting:
                return
            if time.monotonic() >= end_s:
                raise NodeLostError(
                    f"after {deadline_s:.0f} s {ready_count} of {node_count or len(status.nodes)} "
                    f"nodes of kvray cluster {self.name!r} are ready: {'; '.join(said.values())}"
                )
            time.sleep(LOOK_PERIOD_S)

    def _names_left(self) -> list[str]:
        """Actors end a moment after they were killed."""
        end_s = time.monotonic() + CALL_DEADLINE_S
        while True:
            names = actor_names(node_store_prefix(self.name))
            names += actor_names(directory_name(self.name))
            names += actor_names(page_name(self.name))
            if not names or time.monotonic() >= end_s:
                return [f"actor {name}" for name in names]
            time.sleep(LOOK_PERIOD_S)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Who made a directory, and with what."""

    starter: str
    config: Config


def _join_ray() -> None:
    """Be a driver of the Ray cluster that is there, or of a new local one."""
    refuse_untested_ray(ray.__version__)
    if ray.is_initialized():
        return
    try:
        # No address: $RAY_ADDRESS, else what `ray start` has noted on this host, else a new one.
        # Its dashboard alone takes longer to start than all the rest.
        ray.init(include_dashboard=False)
    except (ConnectionError, RuntimeError) as exc:
        raise NodeLostError(
            f"no Ray cluster can be reached or started: {one_line(exc)}. Check $RAY_ADDRESS, and "
            "that Ray and Python have the same versions there as here"
        ) from exc


def _require_equal(given: Mapping[str, object], wanted: Config, running: Config) -> None:
    """Raises ConfigError if a setting that somebody asked for is not what runs."""
    found, asked = running.to_dict(), wanted.to_dict()
    different = [
        f"{name} is {found[name]!r} there and {asked[name]!r} here"
        for name in given
        if found[name] != asked[name]
    ]
    if different:
        raise ConfigError(
            f"kvray cluster {running.cluster_name!r} runs already, with other settings: "
            f"{'; '.join(different)}. Leave them out to use it as it is, or stop it first "
            "(kvray.connect().stop())"
        )


def _last_line(exc: BaseException) -> str:
    """Ray's errors end with what matters, after a traceback of the other side."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[-1].strip()
