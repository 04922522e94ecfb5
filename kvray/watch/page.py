"""kvray's own page: a small actor beside the directory, which looks at the cluster and serves HTTP.

    Cluster.status() ──every second while somebody looks, else every five──▶ Feed
                                                                               │ GET /data
    GET /, /page.js, /page.css (no build step) ─────────▶ browser ◀────────────┘

Read-only: nothing that is asked here changes anything. Bound to the loopback interface unless told
otherwise, and then only for those who have its token: it shows node ids, host and model names. The
token comes once in the address, and then as a cookie; it is as secret as the connection, which is
not encrypted.
"""

import asyncio
import hmac
import ipaddress
import logging
import secrets
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

# aiohttp writes a traceback for each request that is none: anybody could fill the log with them.
_wrong_requests = logging.getLogger("kvray.watch.wrong_requests")
_wrong_requests.setLevel(logging.CRITICAL + 1)

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
    "connect-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
QUERY_NAME = "token"  # in the first address
COOKIE = "kvray-token"
TOKEN_BYTES = 16  # of one that is made here

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PageServer:
    """Serves one Feed. snapshot is called on the server's thread for each question."""

    def __init__(
        self, snapshot: Callable[[], dict[str, Any]], *, host: str, port: int, token: str = ""
    ) -> None:
        """port 0: any free one. token: who has it may look; without one anybody on loopback, and
        elsewhere those who have the one in `url`. Raises OSError if the port cannot be had.
        """
        self._token = token or ("" if _is_loopback(host) else secrets.token_urlsafe(TOKEN_BYTES))
        self.asked_s = 0.0  # when somebody last looked, by time.monotonic
        self.url = ""
        self._snapshot = snapshot
        self._host = host
        self._loop = asyncio.new_event_loop()
        app = web.Application(middlewares=[self._guarded])
        for path in FILES:
            app.router.add_get(path, _file)
        app.router.add_get("/data", self._data)
        app.on_response_prepare.append(_add_headers)
        self._runner = web.AppRunner(
            app, access_log=None, logger=_wrong_requests, shutdown_timeout=CLOSE_S
        )
        opened: Future[str] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(port, opened), name="kvray-page", daemon=True
        )
        self._thread.start()
        self.url = opened.result(OPEN_DEADLINE_S)

    @property
    def place(self) -> str:
        """Its address without the token, for logs."""
        return self.url.partition("?")[0]

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
            self._loop.run_until_complete(self._cleanup())
            self._loop.close()

    async def _cleanup(self) -> None:
        await self._runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:  # of clients that have said half a request
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _open(self, port: int) -> str:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, port)
        await site.start()
        number = self._runner.addresses[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{number}/" + (f"?{QUERY_NAME}={self._token}" if self._token else "")

    async def _data(self, _request: web.Request) -> web.StreamResponse:
        self.asked_s = time.monotonic()
        return web.json_response(self._snapshot())

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A page of another site can not read this one by giving its own name our address."""
        if _is_loopback(self._host) and not _is_loopback(_host_name(request.host)):
            raise web.HTTPForbidden(text="this page is for the names of localhost only")
        if self._token:
            given = request.query.get(QUERY_NAME, "")
            if given and self._is_token(given):
                answer = web.HTTPSeeOther(request.path)
                answer.set_cookie(COOKIE, given, httponly=True, samesite="Strict")
                raise answer
            if not self._is_token(request.cookies.get(COOKIE, "")):
                raise web.HTTPUnauthorized(
                    text="this page wants its token: `kvray status --json` has the whole address"
                )
        try:
            return await handler(request)
        except web.HTTPException:
            raise
        except Exception:
            logger.exception("a question of the page was not answered")
            raise

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """Errors have them too."""
    response.headers.update(HEADERS)


def _host_name(host: str) -> str:
    """Of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _file(request: web.Request) -> web.StreamResponse:
    path = STATIC / FILES[request.path]
    return web.Response(body=path.read_bytes(), content_type=TYPES[path.suffix], charset="utf-8")


class Page:
    """The actor. Ray restarts it without end; what it has seen is lost then."""

    def __init__(self, cluster_name: str, host: str, port: int, token: str) -> None:
        log_to_stderr()
        self._cluster_name = cluster_name
        self._feed = Feed()
        self._lock = threading.Lock()  # of the feed
        self._server = PageServer(self._snapshot, host=host, port=port, token=token)
        threading.Thread(target=self._watch, name="kvray-watch", daemon=True).start()
        logger.info("the page of cluster %s is at %s", cluster_name, self._server.place)

    def __repr__(self) -> str:
        return f"Page(cluster={self._cluster_name}, {self._server.place})"

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


def open_page(cluster: Cluster, *, host: str = LOOPBACK, port: int = 0, token: str = "") -> str:
    """Serve the page of this cluster from its head node, if nobody does yet; its address, with its
    token if it has one. Raises NodeLostError if it cannot be opened there.
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
        .remote(cluster.name, host, port, token)
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
