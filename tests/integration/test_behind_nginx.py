"""Goal: one command starts two `vllm serve` with kvray behind nginx, shows that one answers from
the other's cache, and leaves nothing; one that stays ends with Ctrl-C; an engine that serves
without kvray is named.

Method: the commands of examples/behind_nginx as a user types them, on ports of the test's own.
"""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from behind_nginx.errors import SceneError
from behind_nginx.processes import Group, free_ports, is_listening
from behind_nginx.scene import Scene, kvray_nodes, transfer_config, wait_attached
from behind_nginx.servers import EngineSettings, serve_command, serve_environment, wait_serving

from tests.engines import ROOT
from tests.models import tiny
from tests.ray_nodes import wait_until

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not Path("/usr/sbin/nginx").exists(), reason="nginx is not installed: make system-nginx"
    ),
]

EXAMPLE = ROOT / "examples" / "behind_nginx"
RUN_LIMIT_S = 500.0  # a minute and a half on two cores, several times that beside other work
END_LIMIT_S = 60.0
SLAB_BYTES = 64 << 20


def posted(port: int, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=RUN_LIMIT_S) as answer:  # noqa: S310 (loopback)
        found: dict[str, object] = json.load(answer)
    return found


def test_one_command_shows_that_one_engine_answers_from_the_others_cache() -> None:
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--json", "--documents", "1", "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["documents"] == result["same_answers"] == 1
    assert result["peer_hit_tokens"] == result["prompt_tokens"] // 128 * 128 > 5_000
    assert result["cold_ttft_ms"] > result["peer_hit_ttft_ms"]
    assert not is_listening(port)


def test_what_stays_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, str(EXAMPLE), "start", "--port", str(port)]
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(command, stderr=said, start_new_session=True) as running,
    ):
        try:
            wait_until(
                lambda: is_listening(port) or running.poll() is not None,
                what="nginx",
                limit_s=RUN_LIMIT_S,
            )
            wait_until(
                lambda: "serving on" in (tmp_path / "said").read_text(),
                what="the word that it serves",
                limit_s=END_LIMIT_S,
            )
            prompt = {"model": "smollm2", "prompt": "Once upon", "max_tokens": 2}
            answers = [posted(port, prompt) for _ in range(2)]
            assert all(answer["choices"] for answer in answers)
            running.send_signal(signal.SIGINT)
            assert running.wait(END_LIMIT_S) == 0
        finally:
            running.terminate()
    assert not is_listening(port)
    assert "Traceback" not in (tmp_path / "said").read_text()


def test_an_engine_without_a_node_store_serves_and_is_named(tmp_path: Path) -> None:
    settings = EngineSettings(
        model=tiny(), name="tiny", max_model_len=1_024, kv_cache_bytes=32 << 20
    )
    (port,) = free_ports(1)
    with kvray_nodes(slab_bytes=SLAB_BYTES) as cluster:
        node_id = cluster.nodes()[0].node_id
        elsewhere = transfer_config(cluster, "0" * len(node_id))
        group = Group(
            "engine 0",
            [*serve_command(settings, port=port, transfer=elsewhere), "--skip-tokenizer-init"],
            log=tmp_path / "log",
            environment=serve_environment([0]),
        )
        try:
            wait_serving({port: group})
            scene = Scene(0, {port: group}, group, cluster, [node_id])
            with pytest.raises(SceneError, match="engine 0 serves, but uncached") as told:
                wait_attached(scene, limit_s=1.0)
            assert "there is no NodeStore on this node" in str(told.value)
            answer = posted(port, {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2})
            assert answer["choices"]
        finally:
            group.end()
