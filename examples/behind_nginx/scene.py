"""The whole scene: Ray with two nodes, kvray on it, an engine on each, nginx in front.

    with kvray_nodes(slab_bytes=...) as cluster, behind_nginx(settings, cluster=cluster, ...) as s:
        ask http://127.0.0.1:{s.port}

Two pairs of engines may stand side by side, one with kvray and one without (cluster=None); who
compares them binds them to the same cores and lets one pair compute at a time.
"""

import importlib.util
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behind_nginx.balancer import find_nginx, start_nginx
from behind_nginx.errors import SceneError
from behind_nginx.processes import Group, free_ports, is_free
from behind_nginx.servers import (
    EngineSettings,
    cores_of,
    serve_command,
    serve_environment,
    wait_serving,
)

if TYPE_CHECKING:
    import kvray

ENGINES = 2
DEADLINE_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True)
class Scene:
    """port: nginx's. engines: by port, engine i on node i. cluster: None without kvray."""

    port: int
    engines: dict[int, Group]
    nginx: Group
    cluster: "kvray.Cluster | None"
    node_ids: list[str]

    def node_of(self, engine: str) -> str:
        """engine: its address, as nginx tells it. The id of its Ray node."""
        ports = [f"127.0.0.1:{port}" for port in self.engines]
        if engine not in ports:
            raise SceneError(f"expected an answer of one of {ports}, found one of {engine!r}")
        return self.node_ids[ports.index(engine)]

    def ended(self) -> list[str]:
        """The services that have ended, by name. None should."""
        return [group.name for group in (*self.engines.values(), self.nginx) if group.has_ended()]


def require_all(port: int | None) -> None:
    """Raises SceneError for the first thing that is missing, before anything is started."""
    find_nginx()
    for package, what in (("ray", "ray[default]==2.60.0"), ("vllm", "kvray[cpu]")):
        if importlib.util.find_spec(package) is None:
            raise SceneError(
                f"expected the package {package} in {sys.prefix}, found none. To install it: "
                f"make install, or pip install '{what}'"
            )
    if shutil.which("setpriv") is None:
        raise SceneError("expected the program setpriv, found none. It comes with util-linux")
    if port is not None and not is_free(port):
        raise SceneError(
            f"expected port {port} of 127.0.0.1 to be free, found somebody listening there "
            f"(ss -ltnp 'sport = :{port}' says who). End it, or choose another one: --port N"
        )


@contextmanager
def kvray_nodes(*, slab_bytes: int) -> "Iterator[kvray.Cluster]":
    """A Ray cluster of two nodes with kvray on it; all of it is gone afterwards."""
    import ray
    from ray.cluster_utils import Cluster

    import kvray

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        for _ in range(ENGINES - 1):
            nodes.add_node(num_cpus=2)
        nodes.wait_for_nodes()
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.WARNING)
        cluster = kvray.start(kvray.Config(slab_bytes=slab_bytes))
        try:
            cluster.wait_ready(ENGINES, deadline_s=DEADLINE_S)
            yield cluster
        finally:
            cluster.stop()
    finally:
        ray.shutdown()
        nodes.shutdown()


def transfer_config(cluster: "kvray.Cluster", node_id: str) -> dict[str, Any]:
    """The JSON of --kv-transfer-config. node_id: only since all nodes share one host here; an
    engine that is alone with one NodeStore finds it, and then "kv_connector_extra_config" is not
    needed.
    """
    settings = {**cluster.engine_settings(), "node_id": node_id}
    return {
        "kv_connector": "KVRayConnector",
        "kv_connector_module_path": "kvray.engine.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvray": settings},
    }


@contextmanager
def behind_nginx(
    settings: EngineSettings,
    *,
    cluster: "kvray.Cluster | None",
    port: int | None = None,
    name: str = "engine",
) -> Iterator[Scene]:
    """The engines and their balancer, serving; all of it is gone afterwards. port: nginx's; None
    takes a free one. name: of the engines, in errors and logs.
    """
    node_ids = [] if cluster is None else [node.node_id for node in cluster.nodes()]
    nginx_port, *ports = free_ports(1 + ENGINES)
    nginx_port = port or nginx_port
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="kvray-nginx-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        engines: dict[int, Group] = {}
        stack.callback(_end, engines)
        for index, engine_port in enumerate(ports):
            transfer = None if cluster is None else transfer_config(cluster, node_ids[index])
            engines[engine_port] = Group(
                f"{name} {index} (vllm serve, port {engine_port})",
                serve_command(settings, port=engine_port, transfer=transfer),
                log=folder / f"engine-{index}.log",
                environment={**settings.environment, **serve_environment(cores_of(index, ENGINES))},
            )
        wait_serving(engines)
        nginx = start_nginx(folder, port=nginx_port, engine_ports=ports)
        stack.callback(nginx.end)
        scene = Scene(nginx_port, engines, nginx, cluster, node_ids)
        if cluster is not None:
            wait_attached(scene)
        yield scene


def wait_attached(scene: Scene, *, limit_s: float = DEADLINE_S) -> None:
    """Until each NodeStore has its engine and its link to the others, so that no request pays for
    that. Raises SceneError naming an engine that serves, but without kvray, and what it said.
    """
    cluster = scene.cluster
    assert cluster is not None
    for group, node_id in zip(scene.engines.values(), scene.node_ids, strict=True):

        def is_attached(group: Group = group, node_id: str = node_id) -> bool:
            (node,) = (node for node in cluster.nodes() if node.node_id == node_id)
            clients = {client["pid"] for client in node.details["clients"]}
            return bool(clients & set(group.members()))

        if not _comes(is_attached, limit_s):
            said = group.log.read_text(errors="replace").splitlines()
            reasons = list(dict.fromkeys(line for line in said if "uncached" in line))
            raise SceneError(
                f"{group.name} serves, but uncached: it is not known to the NodeStore of node "
                f"{node_id[:8]}. `kvray doctor` says more; the engine said: {reasons}"
            )
    if not _comes(lambda: all(node.peer_count for node in cluster.nodes()), limit_s):
        raise SceneError("the NodeStores do not reach each other: `kvray doctor` says why")


def _comes(condition: Callable[[], bool], limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(POLL_S)
    return True


def _end(engines: dict[int, Group]) -> None:
    """All at once: each takes a few seconds."""
    for group in engines.values():
        group.ask_to_end()
    for group in engines.values():
        group.end()
