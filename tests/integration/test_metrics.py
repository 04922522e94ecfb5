"""kvray's metrics as Prometheus gets them: scraped from the endpoint of a Ray node.

Goal: what the documentation lists is there, with the values that status says. Method: blocks are
stored, found, missed and evicted on a real cluster; engines are clients that report what one would.
"""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from kvray.config import NODE_NAME_CHARS
from kvray.core.durations import copy_counter
from kvray.core.reasons import MissReason
from kvray.node.meters import METRICS, Kind
from kvray.watch.grafana import dashboard
from tests.block_client import Client
from tests.engines import ROOT
from tests.ray_nodes import Nodes, running_nodes, wait_until

pytestmark = [pytest.mark.heavy]

SCRAPE_LIMIT_S = 60.0  # a period of kvray's, then one of Ray's reporter, beside other work
SAMPLE = re.compile(r"^(?:ray_)?(kvray_\w+?)\{(.*)\} ([0-9.e+]+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(1) as running:
        yield running


def scraped(nodes: Nodes) -> dict[tuple[str, str], float]:
    """(name, tag other than the node's) and value, of this node's endpoint."""
    (node,) = [node for node in ray.nodes() if node["NodeID"] == nodes.node_ids[0]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for name, labels, value in SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert tags["node"] == nodes.node_ids[0][:NODE_NAME_CHARS]
        (tag,) = [tags[tag] for tag in ("source", "reason", "direction") if tag in tags] or [""]
        key = name.removesuffix("_total"), tag
        found[key] = found.get(key, 0.0) + float(value)
    return found


def test_what_is_documented_is_scraped_and_agrees_with_status(nodes: Nodes) -> None:
    client = Client(nodes.cluster, nodes.node_ids[0])
    stored = client.store("a", "b", "c")
    assert client.hits(stored) == 3
    client.hits(client.keys("nobody has this"))
    client.client.report(
        {
            "hit_tokens_local": 384,
            "computed_tokens": 16,
            f"miss_tokens_{MissReason.TAIL}": 16,
            copy_counter("load", 4): 2,
            copy_counter("store", 0): 3,
        }
    )
    assert client.client.drain(5.0)
    expected = {
        ("kvray_stored_blocks", ""): 3.0,
        ("kvray_prompt_tokens", "local"): 384.0,
        ("kvray_prompt_tokens", "computed"): 16.0,
        ("kvray_computed_tokens", "tail"): 16.0,
        ("kvray_engines", ""): 1.0,
        ("kvray_copy_ms_count", "load"): 2.0,
        # Of the bucket for 5 ms and of each that is above it: eight, and the one without a bound.
        ("kvray_copy_ms_bucket", "load"): 2.0 * 10,
        ("kvray_copy_ms_count", "store"): 3.0,
    }
    wait_until(
        lambda: expected.items() <= scraped(nodes).items(),
        what="the metrics",
        limit_s=SCRAPE_LIMIT_S,
    )
    found = scraped(nodes)
    (node,) = nodes.cluster.status().nodes
    assert found["kvray_slab_bytes", ""] == node.slab_bytes
    assert found["kvray_slab_used_bytes", ""] == node.used_bytes
    lookups = node.details["lookups"]["lookups"]
    assert found["kvray_lookup_ms_count", ""] == lookups
    client.client.close()


def test_every_metric_is_in_the_documentation_with_its_unit() -> None:
    text = (ROOT / "docs" / "seeing.md").read_text()
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.kind.value} | {metric.unit} |" in text, metric


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    asked = re.findall(r"ray_(kvray_\w+)", str(dashboard()))
    kinds = {metric.name: metric.kind for metric in METRICS}
    assert set(asked)
    for name in asked:
        base = name.removesuffix("_total").removesuffix("_bucket")
        assert base in kinds, name
        assert name.endswith("_total") == (kinds[base] is Kind.COUNTER), name
        assert name.endswith("_bucket") == (kinds[base] is Kind.HISTOGRAM), name


def test_the_dashboard_that_is_shipped_is_the_one_that_is_made() -> None:
    shipped = Path(ROOT / "docs" / "grafana.json").read_text()
    assert json.loads(shipped) == dashboard(), "run `python -m kvray.watch.grafana`"
