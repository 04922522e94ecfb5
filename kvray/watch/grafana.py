"""A Grafana dashboard of kvray's metrics, for the Grafana that Ray's dashboard embeds.

    python -m kvray.watch.grafana > docs/grafana.json     # then import the file, or provision it

Ray puts `ray_` before the names of metrics, and Prometheus `_total` behind those of counters.
"""

import json
import sys
from typing import Any

COLUMNS, WIDTH, HEIGHT = 2, 12, 8  # of Grafana's 24 columns

PANELS = (
    (
        "Prompt tokens by source",
        "tokens/s",
        "sum by (source) (rate(ray_kvray_prompt_tokens_total[1m]))",
        "{{source}}",
    ),
    (
        "Computed tokens by reason",
        "tokens/s",
        "sum by (reason) (rate(ray_kvray_computed_tokens_total[1m]))",
        "{{reason}}",
    ),
    (
        "Slab in use",
        "percentunit",
        "ray_kvray_slab_used_bytes / ray_kvray_slab_bytes",
        "{{node}}",
    ),
    (
        "Fetched from peers",
        "Bps",
        "sum by (node) (rate(ray_kvray_fetched_bytes_total[1m]))",
        "{{node}}",
    ),
    (
        "Blocks stored and evicted, stores dropped",
        "blocks/s",
        "sum(rate(ray_kvray_stored_blocks_total[1m]))",
        "stored",
        "sum(rate(ray_kvray_evicted_blocks_total[1m]))",
        "evicted",
        "sum(rate(ray_kvray_dropped_stores_total[1m]))",
        "dropped",
    ),
    (
        "Look-ups, locates and reads: 99th percentile",
        "ms",
        "histogram_quantile(0.99, sum by (le) (rate(ray_kvray_lookup_ms_bucket[5m])))",
        "look-up",
        "histogram_quantile(0.99, sum by (le) (rate(ray_kvray_locate_ms_bucket[5m])))",
        "locate",
        "histogram_quantile(0.99, sum by (le) (rate(ray_kvray_read_ms_bucket[5m])))",
        "read",
    ),
    (
        "Copies between slab and device: 99th percentile",
        "ms",
        "histogram_quantile(0.99, sum by (le, direction) (rate(ray_kvray_copy_ms_bucket[5m])))",
        "{{direction}}",
    ),
    ("Attached engines", "short", "sum by (node) (ray_kvray_engines)", "{{node}}"),
    ("Connected peers", "short", "sum by (node) (ray_kvray_peers)", "{{node}}"),
)


def dashboard() -> dict[str, Any]:
    """As Grafana's JSON model has it."""
    return {
        "title": "kvray",
        "uid": "kvray",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "tags": ["kvray", "ray"],
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(index, *panel) for index, panel in enumerate(PANELS)],
    }


def _panel(index: int, title: str, unit: str, *queries: str) -> dict[str, Any]:
    """queries: expression and legend in turn."""
    row, column = divmod(index, COLUMNS)
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": index + 1,
        "title": title,
        "type": "timeseries",
        "datasource": source,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": source, "expr": expr, "legendFormat": legend}
            for n, (expr, legend) in enumerate(zip(queries[::2], queries[1::2], strict=True))
        ],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=2) + "\n")
