"""Replicas of Ray Serve LLM share, come and go.

Goal: what one replica has read is a hit in the other one, and a replica that ends leaves nothing
behind, neither at its NodeStore nor for those who ask meanwhile; one that comes finds what the
slab of its node has. Method: two Ray nodes, one replica on each, OpenAI's HTTP, round robin, so
that the next request meets the other replica.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, canary_pins, running_nodes, wait_until

if TYPE_CHECKING:
    from tests.serve_app import App

pytestmark = [pytest.mark.heavy, pytest.mark.ray_llm, pytest.mark.timeout(600)]

TOKENS = 700
CHUNKS = TOKENS // 128
PAUSE_S = 0.2  # between two requests: an engine that starts needs the cores too
LEAVE_LIMIT_S = 30.0  # Serve gives a replica 20 s to finish what it has


@contextmanager
def asked_all_the_time(app: "App") -> Iterator[list[int]]:
    """Requests, one after another, until the block ends; none may fail. How many were answered."""
    answered: list[int] = [0]
    failures: list[Exception] = []
    ends = threading.Event()

    def ask() -> None:
        while not ends.wait(PAUSE_S):
            try:
                app.post(prompt_of(200, seed=1_000 + answered[0] % 5))
            except Exception as exc:  # noqa: BLE001 (whatever it is, the test fails with it)
                failures.append(exc)
                return
            answered[0] += 1

    thread = threading.Thread(target=ask, name="asks all the time")
    thread.start()
    try:
        yield answered
    finally:
        ends.set()
        thread.join()
    assert not failures, failures


def test_replicas_share_and_give_back_what_they_had_when_they_go() -> None:
    from tests.serve_app import replica_logs, running_app  # needs Ray Serve

    with running_nodes(2) as nodes, running_app(nodes, tiny(), replicas=2) as app:
        # One is prefilled by a replica, and is a hit of the other.
        prompt = prompt_of(TOKENS, seed=1)
        cold = app.ask(prompt)
        wait_stored(nodes, cold.node, CHUNKS)
        peer = app.ask(prompt)
        assert (cold.node, peer.node) in ((0, 1), (1, 0))
        assert cold.sources["computed"] == TOKENS
        assert peer.sources["peer"] == full_chunks(TOKENS)
        assert peer.text == cold.text
        said = replica_logs()
        assert "Unsupported connector backend" not in said
        assert said.count("this replica shares its KV through the NodeStore") == 2

        # One replica goes, under load. Its node keeps the blocks, and nothing of the replica.
        pids = [app.engine_pids(index) for index in (0, 1)]
        assert all(pids)
        with asked_all_the_time(app) as answered:
            app.scale(1)
            wait_until(
                lambda: [] in [nodes.status(n)["clients"] for n in (0, 1)],
                what="the end of a replica's clients",
                limit_s=LEAVE_LIMIT_S,
            )
            before = answered[0]
            wait_until(lambda: answered[0] > before + 2, what="answers of the other replica")
        (gone,) = (n for n in (0, 1) if not nodes.status(n)["clients"])
        wait_until(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids[gone]),
            what="the end of its processes",
            limit_s=LEAVE_LIMIT_S,
        )
        nodes.wait_unpinned(gone)
        store = nodes.status(gone)["store"]
        assert store["ready"] >= CHUNKS
        assert_all_evictable(store)

        # One comes, on the same node, and hits what the slab of that node has.
        with asked_all_the_time(app):
            app.scale(2)
        assert app.engine_pids(gone).isdisjoint(pids[gone])
        again = [app.ask(prompt), app.ask(prompt)]
        (new,) = (answer for answer in again if answer.node == gone)
        assert new.sources["local"] == full_chunks(TOKENS)
        assert new.text == cold.text

        # What is there can be given back, all of it but the canaries of the engines.
        nodes.wait_unpinned(0)
        nodes.wait_unpinned(1)
        nodes.cluster.clear()
        for index in (0, 1):
            status = nodes.status(index)
            assert status["store"]["ready"] <= canary_pins(status)


def wait_stored(nodes: Nodes, index: int, chunks: int) -> None:
    wait_until(
        lambda: bool(nodes.status(index)["store"]["ready"] >= chunks), what="the store of a prompt"
    )


def assert_all_evictable(store: dict[str, Any]) -> None:
    assert not store["pins"], store
    assert all(row["busy"] == 0 for row in store["classes"]), store
