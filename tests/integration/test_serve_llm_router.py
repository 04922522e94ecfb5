"""KVRayRouter before real replicas of Ray Serve LLM, and what deploying anew and autoscaling leave.

Goal: a document goes back to the replica whose device has it, a hot one spreads over both and the
other one fetches it; a deployment that is replaced, and one that Serve's autoscaler makes larger
and smaller again, lose no request, and leave no pin, no client and no process. Method: two Ray
nodes, one replica on each, OpenAI's HTTP; NodeStores say where each token came from.
"""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvray.core.speeds import SpeedsSeen
from tests.integration.test_serve_llm import asked_all_the_time, assert_all_evictable
from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

if TYPE_CHECKING:
    from tests.serve_app import App

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.ray_llm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

ROUTED: dict[str, Any] = {
    "request_router_config": {"request_router_class": "kvray.serve.router:KVRayRouter"}
}
DOCUMENT_TOKENS, QUESTION_TOKENS = 1_600, 40  # a router's chunk has 512 tokens
TINY_BYTES_PER_TOKEN = 8_192  # of the tiny model's KV
PROMPT_TOKENS = DOCUMENT_TOKENS + QUESTION_TOKENS
DOCUMENTS = 4
ROUNDS = 3
ASKERS, HOT_QUESTIONS = 6, 4
LEAVE_LIMIT_S = 60.0  # Serve gives a replica 20 s to finish what it has, and looks now and then
SCALE_LIMIT_S = 180.0  # as long as two replicas may take to start


def document(seed: int) -> list[int]:
    return prompt_of(DOCUMENT_TOKENS, seed=seed)


def question(seed: int) -> list[int]:
    return prompt_of(QUESTION_TOKENS, seed=1_000 + seed)


def test_documents_go_back_to_their_reader_and_a_hot_one_spreads() -> None:
    from tests.serve_app import replica_logs, running_app  # needs Ray Serve

    with (
        running_nodes(2) as nodes,
        running_app(nodes, tiny(), replicas=2, deployment=ROUTED) as app,
    ):
        app.ask(question(0))  # the router is made with the first request
        wait_until(
            lambda: "this router ranks by cost: 2 nodes serve" in replica_logs(),
            what="the router's first look",
        )
        readers = [app.ask(document(seed) + question(seed)).node for seed in range(DOCUMENTS)]
        assert set(readers) == {0, 1}
        for number in range(DOCUMENTS, ROUNDS * DOCUMENTS):
            seed = number % DOCUMENTS
            answer = app.ask(document(seed) + question(number))
            assert answer.node == readers[seed]
            assert answer.sources["device"] == full_chunks(DOCUMENT_TOKENS), answer

        # Many want the same one at once: both answer, and the other one has not computed it.
        before = app.tokens()
        ask_at_once(app, document(0))
        asked_tokens = ASKERS * HOT_QUESTIONS * PROMPT_TOKENS
        wait_until(
            lambda: sum(sum(node.values()) for node in grown_since(app, before)) >= asked_tokens,
            what="the engines' word on where their tokens came from",
        )
        grown = grown_since(app, before)
        reader, other = grown[readers[0]], grown[1 - readers[0]]
        for node in (reader, other):
            requests = sum(node.values()) // PROMPT_TOKENS
            assert requests >= 2, grown
            assert node["computed"] == requests * (PROMPT_TOKENS - full_chunks(DOCUMENT_TOKENS))
        assert other["peer"] >= full_chunks(DOCUMENT_TOKENS), grown
        assert reader["device"] == sum(reader.values()) - reader["computed"], grown

        # What the router weighs was measured by that.
        said = {nodes.node_ids[index]: nodes.status(index) for index in (0, 1)}
        speeds = SpeedsSeen().look(said)
        assert speeds.prefill_us_per_token is not None
        assert speeds.bytes_per_token == TINY_BYTES_PER_TOKEN
        assert (nodes.node_ids[1 - readers[0]], nodes.node_ids[readers[0]]) in speeds.links


def test_what_is_deployed_anew_leaves_nothing_of_what_it_replaces() -> None:
    from tests.serve_app import deploy, running_app  # needs Ray Serve

    fixed = ROUTED | {"num_replicas": 2, "autoscaling_config": None}
    with running_nodes(2) as nodes, running_app(nodes, tiny(), deployment=fixed) as app:
        app.post(document(0))
        pids = app.engine_pids(0) | app.engine_pids(1)
        with asked_all_the_time(app) as answered:
            deploy(tiny(), fixed, engine={"max_num_seqs": 32})
            before = answered[0]
            wait_until(lambda: answered[0] > before + 2, what="answers of the new replicas")
            wait_until(
                lambda: not pids & (app.engine_pids(0) | app.engine_pids(1)),
                what="the end of the old replicas' clients",
                limit_s=LEAVE_LIMIT_S,
            )
        assert all(app.engine_pids(index) for index in (0, 1))
        assert_nothing_is_held(nodes, pids)


def test_the_autoscaler_adds_a_replica_and_takes_it_away() -> None:
    from tests.serve_app import running_app  # needs Ray Serve

    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 3.0,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2.0,
    }
    deployment = ROUTED | {"num_replicas": None, "autoscaling_config": scaling}
    with running_nodes(2) as nodes, running_app(nodes, tiny(), deployment=deployment) as app:
        assert app.running() == 1
        (first,) = (index for index in (0, 1) if app.engine_pids(index))
        with busy(app):
            wait_until(lambda: app.running() == 2, what="a second replica", limit_s=SCALE_LIMIT_S)
            wait_until(
                lambda: app.tokens()[1 - first]["computed"] > 0,
                what="answers of the second replica",
                limit_s=LEAVE_LIMIT_S,
            )
            pids = app.engine_pids(0) | app.engine_pids(1)
        wait_until(lambda: app.running() == 1, what="one replica again", limit_s=LEAVE_LIMIT_S)
        with asked_all_the_time(app) as answered:
            wait_until(
                lambda: len(engine_nodes(app)) == 1,
                what="the end of a replica's clients",
                limit_s=LEAVE_LIMIT_S,
            )
            before = answered[0]
            wait_until(lambda: answered[0] > before + 2, what="answers of who stays")
        (stays,) = engine_nodes(app)
        assert_nothing_is_held(nodes, pids - app.engine_pids(stays))


class busy:  # noqa: N801 (a context manager)
    """Several requests at any time, none of which may fail."""

    def __init__(self, app: "App") -> None:
        self._app = app
        self._ends = threading.Event()
        self._failures: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._ask, args=(asker,)) for asker in range(ASKERS)
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()
        assert not self._failures, self._failures

    def _ask(self, asker: int) -> None:
        number = 0
        while not self._ends.is_set():
            number += 1
            try:
                self._app.post(document(asker) + question(100 * asker + number))
            except Exception as exc:  # noqa: BLE001 (whatever it is, the test fails with it)
                self._failures.append(exc)
                return


def grown_since(app: "App", before: list[dict[str, int]]) -> list[dict[str, int]]:
    """Of each node: tokens by source."""
    return [
        {source: now[source] - then[source] for source in now}
        for now, then in zip(app.tokens(), before, strict=True)
    ]


def ask_at_once(app: "App", text: list[int]) -> None:
    failures: list[Exception] = []

    def ask(asker: int) -> None:
        try:
            for number in range(HOT_QUESTIONS):
                app.post(text + question(100 * (asker + 1) + number))
        except Exception as exc:  # noqa: BLE001 (whatever it is, the test fails with it)
            failures.append(exc)

    threads = [threading.Thread(target=ask, args=(asker,)) for asker in range(ASKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def engine_nodes(app: "App") -> list[int]:
    """Nodes whose NodeStore has clients."""
    return [index for index in (0, 1) if app.engine_pids(index)]


def assert_nothing_is_held(nodes: Nodes, gone: set[int]) -> None:
    """gone: processes of replicas that were replaced or taken away."""
    wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in gone),
        what="the end of the old processes",
        limit_s=LEAVE_LIMIT_S,
    )
    for index in (0, 1):
        nodes.wait_unpinned(index)
        assert_all_evictable(nodes.status(index)["store"])
    nodes.cluster.clear()
    assert [node.used_bytes for node in nodes.cluster.nodes()] == [0, 0]
