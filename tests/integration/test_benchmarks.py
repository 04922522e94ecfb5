"""Each benchmark runs, small, and ends with the line that scripts read.

Whether the figures are good is no matter of a test: `python benchmarks/NAME.py` says that.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import ROOT

pytestmark = [pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(400)]

RUN_LIMIT_S = 360.0  # a smoke takes a minute, six times that beside other work

KEYS = {
    "ttft": {
        "cold_ms",
        "device_hit_ms",
        "local_hit_ms",
        "peer_hit_ms",
        "peer_over_device",
        "local_over_device",
        "cold_over_peer",
        "prompt_tokens",
        "kv_bytes_per_token",
    },
    "overhead": {"ttft_ratio", "throughput_ratio", "stored_bytes"},
    "idle": {"processes", "baseline"},
    "long_doc_qa": {"modes", "ttft_gain", "total_gain"},
    "multi_turn": {"modes", "p2p_over_none", "p2p_over_silo"},
    "transfer": {"rows"},
    "routing": {"mean_ms", "decision_ms", "prefill_tokens_per_s", "link_gb_per_s"},
    "behind_nginx": {"modes", "ttft_gain", "request_rate_per_s", "throughput_ratios"},
    "watching": {"status_ms", "lookup_us", "watched_over_unwatched"},
    "descriptors": {"jobs"},
    "engines/audit": {
        "requests",
        "hit_tokens",
        "trusted_after_s",
        "audited_chunks",
        "mismatch_before_first_load",
        "wrong_answers",
        "ttft_ratio",
        "extra_prefill_share",
    },
    "gpu": {"bars", "not_run", "pair, ms"},
    "lookup": {
        "lookup_us",
        "held",
        "local_client_operations",
        "engine_hello_bye_ms",
        "locate_over_bare",
        "directory_keys_per_s",
        "bytes_per_entry",
        "heartbeat_cpu_percent",
    },
}


@pytest.mark.parametrize("name", KEYS)
def test_a_smoke_ends_with_its_figures(name: str) -> None:
    assert KEYS[name] <= smoke(name).keys()


@pytest.mark.ray_llm
def test_a_smoke_in_ray_serve_ends_with_its_figures() -> None:
    """Two replicas start twice."""
    result = smoke("serve_routing")
    assert {row["scene"] for row in result["rows"]} == {"documents", "hot"}
    assert not any(row["failed"] for row in result["rows"])
    assert result["decision_ms_at_most"]["n"] >= result["n"]


def smoke(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke", "--json"],
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == Path(name).name
    assert result["n"] >= 1
    assert result["machine"]["cores"] >= 1
    return result


def test_the_report_writes_a_page_of_what_the_scripts_said(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--smoke", "--json"]
    chosen = ["--only", "transfer", "--only", "hit_rate-4x2000", "--output", str(tmp_path)]
    done = subprocess.run(
        [*script, *chosen], capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "RESULTS.md").read_text()
    assert "slot bytes" in page
    for plot in ("transfer", "hit_rate-4x2000"):
        assert f"(plots/{plot}.png)" in page
        assert (tmp_path / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
