"""`kvray` as it is typed: a cluster from nothing to nothing, each command a process of its own.

Method: a temporary folder of Ray's and of kvray's, so that no other cluster of this machine is
found. Nothing that was begun may be left.
"""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

import kvray
from kvray.config import SHM_FOLDER
from kvray.watch.bench import run_benchmarks
from tests.engines import ROOT
from tests.ray_nodes import wait_until

pytestmark = [pytest.mark.heavy]

CLUSTER = "typed"
COMMAND_LIMIT_S = 120.0  # `start` begins Ray and two actors, on a busy machine
SLAB = ("--slab-bytes", "16 MiB", "--set", "extent_bytes=1 MiB")


class Terminal:
    """Types commands; each is a process that knows of no Ray but this one."""

    def __init__(self, folder: Path) -> None:
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "RAY_TMPDIR": str(folder / "ray"),
            "KVRAY_RUNTIME_DIR": str(folder / "run"),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        (folder / "ray").mkdir()

    def type(self, *words: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [sys.executable, "-m", "kvray.watch", *words],
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            env=self._environment,
            check=False,
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def ask(self, *words: str, code: int = 0) -> Any:
        """With --json: what stdout holds, which is one document."""
        return json.loads(self.type(*words, "--cluster", CLUSTER, "--json", code=code).stdout)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with tempfile.TemporaryDirectory(prefix="kvray-", dir="/tmp") as folder:  # short: sockets
        terminal = Terminal(Path(folder))
        yield terminal
        terminal.type("stop", "--cluster", CLUSTER, code=1)  # nothing is there: the test has ended


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """On stderr, which is wrapped to the width of the terminal."""
    return " ".join(done.stderr.split())


def get_json(url: str) -> Any:
    """Of kvray's page, once it has seen a status."""
    found: Any = {"latest": None}

    def has_seen() -> bool:
        nonlocal found
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 (our own page)
            found = json.load(answer)
        return found["latest"] is not None

    wait_until(has_seen, what="a first status on the page")
    return found


def test_from_nothing_to_nothing(terminal: Terminal) -> None:
    before = {p.name for p in Path(SHM_FOLDER).glob("kvray-*")}
    assert "`kvray start` begins one" in said(terminal.type("status", code=1))

    begun = terminal.ask("start", *SLAB)
    assert begun["began_ray"]
    (node,) = begun["nodes"]
    assert (node["state"], node["slab_bytes"], node["models"]) == ("ready", 16 << 20, [])

    assert not terminal.ask("start", *SLAB)["began_ray"], "a second start finds the first"
    status = terminal.ask("status")
    assert status["nodes"] == begun["nodes"]
    assert status["hit_tokens"] == {"device": 0, "local": 0, "peer": 0, "computed": 0}
    assert node["node"][:8] in terminal.type("top", "--rounds", "1", "--cluster", CLUSTER).stdout
    assert status["page_url"] == begun["page_url"]
    page = get_json(status["page_url"] + "data")
    assert [row["node"] for row in page["latest"]["nodes"]] == [node["node"]]
    assert terminal.ask("clear")["blocks_after"] == 0
    events = terminal.ask("trace", node["node"][:8], "--last", "512")
    assert any("joined the directory" in event["event"] for event in events)
    assert all(event["ago_ms"] >= 0 for event in events)
    wrong = terminal.type("where", "--tokens", "1,2", "--cluster", CLUSTER, code=1)
    assert "no engine" in said(wrong)

    doctor = terminal.ask("doctor")
    assert doctor["ok"]
    assert "kvray.attach" in doctor["verdict"]
    assert doctor["links"] == [], "there is one node"
    assert {port["process"].split("-")[0] for port in doctor["ports"]} >= {
        "directory",
        "node_store",
    }
    assert all(port["expected"] for port in doctor["ports"])
    # Ray's own port of an actor is on all addresses, and asks for its token.
    where = {ip_address(port["address"]) for port in doctor["ports"]}
    assert all(address.is_loopback or address.is_unspecified for address in where), where
    assert "kvray.attach" in terminal.type("doctor", "--cluster", CLUSTER).stdout
    (rdma,) = [f for f in terminal.ask("doctor", "--rdma")["findings"] if f["check"] == "rdma"]
    assert "nothing could be checked" in rdma["text"]

    wrong = terminal.type("start", "--set", "slab_byte=1", "--cluster", CLUSTER, code=1)
    assert "slab_bytes" in said(wrong), "the right name is suggested"
    wrong = terminal.type("drain", "feedfeed", "--cluster", CLUSTER, code=1)
    assert node["node"] in wrong.stderr.replace("\n", "")

    assert terminal.ask("stop") == {"cluster": CLUSTER, "stopped": True, "ended_ray": True}
    assert {p.name for p in Path(SHM_FOLDER).glob("kvray-*")} == before
    assert "no Ray cluster" in said(terminal.type("doctor", "--cluster", CLUSTER, code=1))


def test_bench_runs_a_benchmark_and_writes_a_page(terminal: Terminal, tmp_path: Path) -> None:
    words = ("bench", "--only", "hit_rate-4x2000", "--smoke", "--output", str(tmp_path), "--json")
    page = Path(json.loads(terminal.type(*words).stdout)["page"])
    assert page == tmp_path / "RESULTS.md"
    assert "hit_rate-4x2000" in page.read_text()
    wrong = terminal.type("bench", "--only", "speed", "--output", str(tmp_path), code=1)
    assert "not a benchmark: speed" in said(wrong)


def test_bench_without_a_checkout_says_where_the_benchmarks_are(tmp_path: Path) -> None:
    with pytest.raises(kvray.ConfigError, match="Clone the repository"):
        run_benchmarks(tmp_path, [], smoke=True, report=tmp_path / "benchmarks" / "report.py")


def test_what_is_not_understood_is_exit_code_2(terminal: Terminal) -> None:
    assert "No such command" in terminal.type("statsu", code=2).stderr
    assert "drain" in terminal.type("--help").stdout
