"""N nodes with C blocks each hit what one pool of N x C would: the public trace, replayed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hit_rate import pooled_hits, read_trace, replay
from benchmarks.replay import Settings
from kvray.config import Config

TRACE = Path(__file__).parent.parent / "data" / "mooncake_conversation.jsonl.xz"
MIN_RATIO = 0.98

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def requests() -> list[list[int]]:
    return read_trace(TRACE)


@pytest.mark.parametrize(
    ("node_count", "capacity_blocks", "pooled_share"),
    [(4, 2_000, 0.178), (4, 8_000, 0.332), (16, 2_000, 0.332)],
)
def test_many_nodes_hit_like_one_pool(
    requests: list[list[int]], node_count: int, capacity_blocks: int, pooled_share: float
) -> None:
    pooled = pooled_hits(requests, node_count * capacity_blocks)
    assert pooled / sum(map(len, requests)) == pytest.approx(pooled_share, abs=0.0005)
    config = Config()
    settings = Settings(
        node_count,
        capacity_blocks,
        config.replacement,
        config.probation_fraction,
        config.reused_fraction,
        peers=True,
    )
    hits, local_hits = replay(requests, settings, seed=0, label="kvray")
    assert 0 < local_hits < hits
    assert hits >= MIN_RATIO * pooled


def test_the_script_ends_with_its_figures() -> None:
    script = [sys.executable, "benchmarks/hit_rate.py", str(TRACE), "--smoke", "--json"]
    done = subprocess.run(
        [*script, "--nodes", "2", "--capacity", "1600"],
        cwd=TRACE.parent.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["benchmark"] == "hit_rate"
    assert 0 < figures["silo"] < figures["kvray"]
    assert figures["ratio_to_pooled"] == pytest.approx(
        figures["kvray"] / figures["pooled"], rel=0.01
    )
    assert 0 < figures["local_share"] < 1
