"""Spans of reads, where Ray's tracing is on.

Goal: a fetch between two nodes is a span that says who read how much of whom, and how it ended; and
nothing is loaded for it where tracing is off. Method: a Ray cluster that was started with a tracing
hook, whose processes write their spans to files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvray.config import NODE_NAME_CHARS
from tests.block_client import BLOCK_BYTES
from tests.engines import ROOT
from tests.processes import ProcessGroup
from tests.ray_nodes import wait_until
from tests.traced_fetch import BLOCKS

LIMIT_S = 120.0  # a Ray cluster of two nodes, beside other work

OFF = """
import sys
from kvray.core.ids import NodeId
from kvray.node.spans import open_spans
before = {name for name in sys.modules if name.startswith("opentelemetry")}
assert open_spans(NodeId("a" * 56)) is None
after = {name for name in sys.modules if name.startswith("opentelemetry")}
assert after == before, after - before
"""


@pytest.mark.heavy
def test_a_fetch_is_a_span(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    group = ProcessGroup(
        [sys.executable, "-m", "tests.traced_fetch", str(tmp_path)],
        environment={**os.environ, "PYTHONPATH": path},
        log=tmp_path / "log",
    )
    try:
        wait_until(lambda: group.exit_status() is not None, what="the fetch", limit_s=LIMIT_S)
        assert group.exit_status() == 0, group.log_tail()
    finally:
        group.end()
    spans = [
        json.loads(line)
        for file in tmp_path.glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    owner, reader = (tmp_path / "nodes").read_text().split()
    fetches = [span for span in spans if span["name"] == "kvray.fetch"]
    assert sum(span["attributes"]["kvray.blocks"] for span in fetches) == len(BLOCKS)
    assert sum(span["attributes"]["kvray.bytes"] for span in fetches) == len(BLOCKS) * BLOCK_BYTES
    for span in fetches:
        assert span["attributes"]["kvray.node"] == reader[:NODE_NAME_CHARS]
        assert span["attributes"]["kvray.peer"] == owner[:NODE_NAME_CHARS]
        assert span["attributes"]["kvray.outcome"] == "done"
        assert span["status"]["status_code"] == "UNSET"
        assert span["start_time"] < span["end_time"]


def test_nothing_is_loaded_where_tracing_is_off() -> None:
    subprocess.run([sys.executable, "-c", OFF], check=True)
