"""kvray's page over raw TCP: whatever a browser or another says, the next question is answered."""

import contextlib
import http.client
import socket
import urllib.parse
from random import Random

from kvray.watch.feed import Feed, page_data
from kvray.watch.page import LOOPBACK, PageServer
from tests.fuzz.outcome import Outcome, mutant, rounds
from tests.statuses import cluster, engine, node

LIMIT_S = 5.0  # for an answer
CHECKED_EVERY = 50  # cases
REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /data?token=x HTTP/1.1\r\nHost: 127.0.0.1:80\r\nCookie: kvray-token=y\r\n\r\n",
    b"GET /page.js HTTP/1.0\r\nHost: [::1]\r\nConnection: keep-alive\r\n\r\n",
    b"POST /data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nabcd",
    (
        b"PUT /%2e%2e/page.py HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
)


def run(random: Random, seconds: float) -> Outcome:
    outcome = Outcome()
    feed = Feed()
    feed.add(1.0, page_data(cluster(node("a", engine()), node("b"))))
    server = PageServer(feed.snapshot, host=LOOPBACK, port=0)
    port = urllib.parse.urlsplit(server.url).port or 0
    half_said: list[socket.socket] = []
    try:
        for number in rounds(outcome, seconds):
            sock = socket.create_connection((LOOPBACK, port), LIMIT_S)
            with contextlib.suppress(OSError):  # it has hung up already
                sock.sendall(mutant(random, REQUESTS))
            half_said.append(sock)
            while len(half_said) > 32:
                half_said.pop(0).close()
            if number % CHECKED_EVERY == 0:
                _check(port, outcome)
        _check(port, outcome)
    finally:
        for sock in half_said:
            sock.close()
        server.close()
    return outcome


def _check(port: int, outcome: Outcome) -> None:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/data")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as exc:
            outcome.fail(f"the page does not answer: {exc}")
        else:
            if status != http.HTTPStatus.OK:
                outcome.fail(f"the page answers {status}")
