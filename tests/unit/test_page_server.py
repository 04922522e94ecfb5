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


@pytest.fixture
def server() -> Iterator[PageServer]:
    feed = Feed()
    feed.add(1.0, page_data(cluster(node("a", engine()), node("b"))))
    server = PageServer(feed.snapshot, host=LOOPBACK, port=0)
    yield server
    server.close()


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: str


def ask(server: PageServer, path: str, *, method: str = "GET", host: str | None = None) -> Answer:
    address = urllib.parse.urlsplit(server.url)
    assert address.hostname == LOOPBACK
    connection = http.client.HTTPConnection(LOOPBACK, address.port or 0, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, headers={"Host": host} if host else {})
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
