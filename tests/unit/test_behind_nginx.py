"""Goal: the example behind nginx says what is missing before it starts anything, listens on
loopback only, goes round, and ends what it has started.

Method: nginx's configuration as text, and by nginx itself where it is installed; a port that a
socket of the test holds; a $PATH without nginx.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from behind_nginx import servers
from behind_nginx.balancer import configuration, find_nginx, start_nginx
from behind_nginx.errors import SceneError
from behind_nginx.processes import Group, free_ports, is_free, is_listening
from behind_nginx.scene import require_all
from behind_nginx.servers import EngineSettings, cores_of, serve_command, serve_environment

from kvray.engine.arguments import CONNECTOR
from tests.engines import ROOT
from tests.ray_nodes import wait_until

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") is None,
    reason="nginx is not installed: make system-nginx",
)


class Named(BaseHTTPRequestHandler):
    """Answers with its port."""

    def do_GET(self) -> None:
        body = str(self.connection.getsockname()[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the test looks at the answers."""


def test_the_configuration_names_the_engines_in_turn_and_loopback_only() -> None:
    text = configuration(port=8_000, engine_ports=[8_001, 8_002])
    listens = [line.strip() for line in text.splitlines() if line.strip().startswith("listen")]
    assert listens == ["listen 127.0.0.1:8000;"]
    backends = [line.strip() for line in text.splitlines() if "server 127" in line]
    assert backends == ["server 127.0.0.1:8001;", "server 127.0.0.1:8002;"]
    assert "@" not in text
    assert "proxy_buffering off;" in text
    assert [word for word in text.split() if word.startswith("/")] == ["/"]  # of `location`


@needs_nginx
def test_nginx_goes_round_leaves_nothing_outside_of_its_folder_and_ends(tmp_path: Path) -> None:
    backends = [ThreadingHTTPServer(("127.0.0.1", 0), Named) for _ in range(2)]
    for backend in backends:
        Thread(target=backend.serve_forever, daemon=True).start()
    ports = [int(backend.server_address[1]) for backend in backends]
    (port,) = free_ports(1)
    group = start_nginx(tmp_path, port=port, engine_ports=ports)
    try:
        answers, headers = [], []
        for _ in range(4):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                answers.append(int(answer.read()))
                headers.append(answer.headers["X-Engine"])
        assert answers[0] != answers[1]
        assert answers == [*answers[:2], *answers[:2]]
        assert headers == [f"127.0.0.1:{found}" for found in answers]
        assert int((tmp_path / "nginx.pid").read_text()) in group.members()
        assert len((tmp_path / "access.log").read_text().splitlines()) == 4
    finally:
        group.end()
        for backend in backends:
            backend.shutdown()
            backend.server_close()
    assert not group.members()
    assert not is_listening(port)


@needs_nginx
def test_what_nginx_can_not_do_is_told_in_its_own_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(SceneError, match="Address already in use"):
            start_nginx(tmp_path, port=port, engine_ports=[1])


def test_without_nginx_it_says_what_to_install() -> None:
    with pytest.raises(SceneError, match=r"found none.*make system-nginx.*apt-get install"):
        find_nginx(path="/nonexistent")


@needs_nginx
def test_a_taken_port_is_named_before_anything_is_started() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        assert not is_free(port)
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "behind_nginx"), "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert f"expected port {port} of 127.0.0.1 to be free" in done.stderr
    assert "--port N" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("package", ["ray", "vllm"])
@needs_nginx
def test_a_missing_package_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as Python does for what can not be imported
    with pytest.raises(SceneError, match=f"expected the package {package} .*pip install"):
        require_all(None)


def test_the_command_is_vllm_serve_with_kvrays_plain_json() -> None:
    settings = EngineSettings(
        model=Path("/models/m"), name="m", max_model_len=4_096, kv_cache_bytes=1 << 28
    )
    plain = serve_command(settings, port=8_001, transfer=None)
    assert "--kv-transfer-config" not in plain
    ours = serve_command(settings, port=8_001, transfer=CONNECTOR)
    assert ours[: len(plain)] == plain
    assert json.loads(ours[-1]) == CONNECTOR


def test_each_engine_has_cores_of_its_own_named_to_vllm() -> None:
    cores = sorted(os.sched_getaffinity(0))
    dealt = [cores_of(index, 2) for index in (0, 1)]
    assert sorted({core for share in dealt for core in share}) == cores
    assert all(dealt)
    if len(cores) > 1:
        assert not set(dealt[0]) & set(dealt[1])
    assert serve_environment([1, 3])["VLLM_CPU_OMP_THREADS_BIND"] == "1,3"


def test_a_group_ends_with_what_it_has_started(tmp_path: Path) -> None:
    group = Group("sleepers", ["sh", "-c", "sleep 600 & sleep 600"], log=tmp_path / "log")
    wait_until(lambda: len(group.members()) == 3, what="a shell and what it has started")
    group.end()
    assert group.members() == []


def test_an_engine_that_ends_is_told_with_the_end_of_what_it_said(tmp_path: Path) -> None:
    group = Group(
        "engine 0", [sys.executable, "-c", "raise SystemExit('no such model')"],
        log=tmp_path / "log",
    )  # fmt: skip
    (port,) = free_ports(1)
    with pytest.raises(SceneError, match=r"engine 0 ended(.|\n)*no such model"):
        servers.wait_serving({port: group})
