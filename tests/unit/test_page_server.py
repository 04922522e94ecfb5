"""The page over real HTTP: what it serves, what it refuses, and that nothing can be changed."""

import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from kvray.watch.feed import Feed, page_data
from kvray.watch.page import LOOPBACK, PageServer
from tests.statuses import cluster, engine, node


@contextlib.contextmanager
def serving(host: str, token: str = "") -> Iterator[PageServer]:
    feed = Feed()
    feed.add(1.0, page_data(cluster(node("a", engine()), node("b"))))
    server = PageServer(feed.snapshot, host=host, port=0, token=token)
    yield server
    server.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    with serving(LOOPBACK) as server:
        yield server


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: str


def ask(
    server: PageServer,
    path: str,
    *,
    method: str = "GET",
    host: str | None = None,
    cookie: str | None = None,
) -> Answer:
    address = urllib.parse.urlsplit(server.url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port or 0, timeout=10)
    headers = {"Host": host, "Cookie": cookie}
    with contextlib.closing(connection):
        connection.request(method, path, headers={k: v for k, v in headers.items() if v})
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read().decode())


def test_the_page_its_script_and_its_style_are_served_without_a_build(server: PageServer) -> None:
    page = ask(server, "/").body
    assert 'src="page.js"' in page
    assert 'href="page.css"' in page
    for path, kind in (("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer = ask(server, path)
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_data_is_what_the_feed_says(server: PageServer) -> None:
    assert server.asked_s == 0.0
    found = json.loads(ask(server, "/data").body)
    assert [row["node"] for row in found["latest"]["nodes"]] == ["a" * 56, "b" * 56]
    assert found["latest"]["nodes"][0]["models"] == ["llama"]
    assert server.asked_s > 0, "somebody looks"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(server: PageServer, method: str) -> None:
    assert ask(server, "/data", method=method).status == 405


def test_another_sites_name_for_our_address_is_refused(server: PageServer) -> None:
    assert ask(server, "/data", host="evil.example").status == 403
    assert ask(server, "/data", host="localhost:1").status == 200


def test_there_is_nothing_else(server: PageServer) -> None:
    for path in ("/../page.py", "/static/page.js", "/page.py"):
        assert ask(server, path).status == 404


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.9.9.9:1", "[::1]"])
def test_every_name_of_loopback_is_served(server: PageServer, host: str) -> None:
    assert ask(server, "/data", host=host).status == 200


@pytest.mark.parametrize("bound", ["localhost", "127.0.0.2"])
def test_another_sites_name_is_refused_by_whatever_name_of_loopback_it_is_bound(bound: str) -> None:
    with serving(bound) as server:
        assert ask(server, "/data", host="evil.example").status == 403
        assert ask(server, "/data", host="127.evil.example").status == 403
        assert ask(server, "/data").status == 200


@pytest.mark.parametrize(("path", "host", "status"), [("/no", None, 404), ("/", "evil", 403)])
def test_an_error_has_the_headers_too_and_repeats_nothing(
    server: PageServer, path: str, host: str | None, status: int
) -> None:
    answer = ask(server, path, host=host)

    assert answer.status == status
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "evil" not in answer.body


def test_on_another_address_one_needs_the_token_that_is_in_the_address() -> None:
    with serving("0.0.0.0") as server:  # noqa: S104 (for a moment)
        token = urllib.parse.urlsplit(server.url).query.partition("=")[2]
        assert len(token) > 20
        assert ask(server, "/data").status == 401
        assert ask(server, "/data?token=wrong").status == 401
        assert token not in server.place

        first = ask(server, f"/?token={token}")
        cookie = first.headers["Set-Cookie"].partition(";")[0]

        assert (first.status, first.headers["Location"]) == (303, "/")
        assert "HttpOnly" in first.headers["Set-Cookie"]
        assert "SameSite=Strict" in first.headers["Set-Cookie"]
        assert ask(server, "/data", cookie=cookie).status == 200


def test_a_token_that_was_set_is_wanted_on_loopback_too() -> None:
    with serving(LOOPBACK, token="chosen") as server:  # noqa: S106 (no secret)
        assert server.url.endswith("?token=chosen")
        assert ask(server, "/data").status == 401
        assert ask(server, "/data", cookie="kvray-token=chosen").status == 200
