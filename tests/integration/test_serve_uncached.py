"""Replicas of Ray Serve LLM that have no cache say so, once, and serve.

Goal: no NodeStore on the node, kvray not started at all, a model that this vLLM can not share: in
each case the deployment comes up, its requests are answered, and the replica's log has one warning
that says what is wrong and what to do. Method: real replicas; logs as Ray keeps them.
"""

import pytest
import ray

import kvray
from tests.models import tiny, tiny_gemma2
from tests.prompts import prompt_of
from tests.ray_nodes import running_nodes, wait_until

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.ray_llm,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

TOKENS = 700


def test_a_replica_without_kvray_serves_and_joins_when_kvray_is_started() -> None:
    from tests.serve_app import replica_logs, running_app  # needs Ray Serve

    with running_nodes(1) as nodes:
        nodes.cluster.stop()
        with running_app(nodes, tiny()) as app:
            assert app.post(prompt_of(TOKENS, seed=1))["usage"]["prompt_tokens"] == TOKENS
            said = replica_logs()
            assert said.count("this replica runs uncached") == 1
            assert "kvray.start() starts it" in said

            kvray.start(slab_bytes=256 << 20, extent_bytes=16 << 20)
            wait_until(
                lambda: len(nodes.status(0)["clients"]) >= 2, what="the hello of the replica"
            )
            app.ask(prompt_of(TOKENS, seed=2))
            wait_until(
                lambda: bool(nodes.status(0)["store"]["ready"] >= TOKENS // 128),
                what="the store of a prompt",
            )


def test_a_node_that_was_drained_and_a_model_that_can_not_be_shared() -> None:
    from tests.serve_app import replica_logs, running_app  # needs Ray Serve

    with running_nodes(2) as nodes:
        # One of two nodes has none: its replica says so, the other one shares.
        nodes.cluster.drain(nodes.node_ids[1])
        with running_app(nodes, tiny_gemma2(), replicas=2) as app:
            for seed in range(4):
                assert app.post(prompt_of(TOKENS, seed=seed))["usage"]["prompt_tokens"] == TOKENS
            said = replica_logs()
        assert said.count("this replica runs uncached") == 1
        assert f"its Ray node {nodes.node_ids[1]} has no NodeStore" in said
        assert said.count("this replica shares its KV") == 1

        # And what only the model tells is told by the engine of each replica.
        assert "this engine runs uncached: vLLM 0.29.0 can not report a failed load" in said
        assert ray.get(nodes.store(0).status.remote())["store"]["ready"] == 0
