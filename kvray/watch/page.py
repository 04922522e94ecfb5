"""kvray's own page: a small actor beside the directory, which looks at the cluster and serves HTTP.

    Cluster.status() ──every second while somebody looks, else every five──▶ Feed
                                                                               │ GET /data
    GET /, /page.js, /page.css (no build step) ─────────▶ browser ◀────────────┘

Read-only: nothing that is asked here changes anything. Bound to the loopback interface unless told
otherwise, and then without a password: whoever reaches it sees node ids, host and model names.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from aiohttp import web
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvray.actors import RAY_NAMESPACE, ending_on_bug, log_to_stderr, page_name
from kvray.cluster import Cluster, connect
from kvray.cluster.placement import ACTOR_OPTIONS, actor_names
from kvray.errors import KVRayError, NodeLostError
from kvray.watch.feed import Feed, page_data

logger = logging.getLogger("kvray.watch")

LOOPBACK = "127.0.0.1"
WATCHED_PERIOD_S = 1.0
IDLE_PERIOD_S = 5.0  # history goes on while nobody looks
WATCHED_FOR_S = 10.0  # after the last question of a page, which asks every second
PER_NODE_S = 0.02  # between two looks: a large cluster is looked at less often
OPEN_DEADLINE_S = 30.0
CLOSE_S = 1.0  # for answers under way
STATIC = Path(__file__).with_name("static")
FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PageServer:
    """Serves one Feed. snapshot is called on the server's thread for each question."""

    def __init__(self, snapshot: Callable[[], dict[str, Any]], *, host: str, port: int) -> None:
        """port 0: any free one. Raises OSError if it can not be had."""
        self.asked_s = 0.0  # when somebody last looked, by time.monotonic
        self.url = ""
        self._snapshot = snapshot
        self._host = host
        self._loop = asyncio.new_event_loop()
        app = web.Application(middlewares=[self._guarded])
        for path in FILES:
            app.router.add_get(path, _file)
        app.router.add_get("/data", self._data)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_S)
        opened: Future[str] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(port, opened), name="kvray-page", daemon=True
        )
        self._thread.start()
        self.url = opened.result(OPEN_DEADLINE_S)

    def close(self) -> None:
        """Nobody is answered any more, and the port is free."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(OPEN_DEADLINE_S)

    def _run(self, port: int, opened: "Future[str]") -> None:
        try:
            opened.set_result(self._loop.run_until_complete(self._open(port)))
            self._loop.run_forever()
        except OSError as exc:
            opened.set_exception(exc)
        finally:
            self._loop.run_until_complete(self._runner.cleanup())
            self._loop.close()

    async def _open(self, port: int) -> str:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, port)
        await site.start()
        number = self._runner.addresses[0][1]
        return f"http://{self._host}:{number}/"

    async def _data(self, _request: web.Request) -> web.StreamResponse:
        self.asked_s = time.monotonic()
        return web.json_response(self._snapshot())

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A page of another site can not read this one by giving its own name our address."""
        name = request.host.rsplit(":", 1)[0]
        if self._host == LOOPBACK and name not in LOCAL_NAMES:
            raise web.HTTPForbidden(text=f"this page is for localhost, not for {name}")
        response = await handler(request)
        response.headers.update(HEADERS)
        return response


async def _file(request: web.Request) -> web.StreamResponse:
    path = STATIC / FILES[request.path]
    return web.Response(body=path.read_bytes(), content_type=TYPES[path.suffix], charset="utf-8")


class Page:
    """The actor. Ray restarts it without end; what it has seen is lost then."""

    def __init__(self, cluster_name: str, host: str, port: int) -> None:
        log_to_stderr()
        self._cluster_name = cluster_name
        self._feed = Feed()
        self._lock = threading.Lock()  # of the feed
        self._server = PageServer(self._snapshot, host=host, port=port)
        threading.Thread(target=self._watch, name="kvray-watch", daemon=True).start()
        logger.info("the page of cluster %s is at %s", cluster_name, self._server.url)

    def __repr__(self) -> str:
        return f"Page(cluster={self._cluster_name}, {self._server.url})"

    def url(self) -> str:
        return self._server.url

    def _snapshot(self) -> dict[str, Any]:
        with self._lock:
            return self._feed.snapshot()

    def _watch(self) -> None:
        with ending_on_bug("the page"):
            self._look_for_ever()

    def _look_for_ever(self) -> None:
        cluster: Cluster | None = None
        node_count = 0
        while True:
            begun_s = time.monotonic()
            try:
                cluster = cluster or connect(self._cluster_name)
                status = cluster.status()
            except KVRayError as exc:
                cluster = None
                with self._lock:
                    self._feed.silent(time.time(), str(exc))
            else:
                node_count = len(status.nodes)
                with self._lock:
                    self._feed.add(time.time(), page_data(status))
            self._pause(begun_s, node_count)

    def _pause(self, begun_s: float, node_count: int) -> None:
        """Until the next look is due; shorter as soon as somebody opens the page."""
        while True:
            now_s = time.monotonic()
            is_watched = now_s - self._server.asked_s < WATCHED_FOR_S
            period_s = WATCHED_PERIOD_S if is_watched else IDLE_PERIOD_S
            left_s = begun_s + max(period_s, PER_NODE_S * node_count) - now_s
            if left_s <= 0:
                return
            time.sleep(min(left_s, WATCHED_PERIOD_S))


def open_page(cluster: Cluster, *, host: str = LOOPBACK, port: int = 0) -> str:
    """Serve the page of this cluster from its head node, if nobody does yet; its address. Raises
    NodeLostError if it can not be opened there.
    """
    name = page_name(cluster.name)
    heads = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and "node:__internal_head__" in node["Resources"]
    ]
    strategy = NodeAffinitySchedulingStrategy(heads[0], soft=False) if heads else "DEFAULT"
    actor = (
        ray.remote(Page)
        .options(name=name, scheduling_strategy=strategy, **ACTOR_OPTIONS)
        .remote(cluster.name, host, port)
    )
    return _url_of(actor)


def page_url(cluster: Cluster) -> str | None:
    """Where it is; None if nobody serves it."""
    name = page_name(cluster.name)
    if name not in actor_names(name):
        return None
    return _url_of(ray.get_actor(name, namespace=RAY_NAMESPACE))


def _url_of(actor: Any) -> str:  # noqa: ANN401 (Ray's handle)
    try:
        url: str = ray.get(actor.url.remote(), timeout=OPEN_DEADLINE_S)
    except (ray.exceptions.RayError, TimeoutError) as exc:
        raise NodeLostError(
            f"kvray's page can not be opened: {exc}. Is the port taken? `--page-port 0` takes any"
        ) from exc
    return url
