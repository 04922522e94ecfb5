"""A NodeStore's metrics, through Ray: they come out of the Prometheus endpoint of its Ray node.

    core's counters ──snapshot, every PERIOD_S──▶ Meters ──what has grown──▶ ray.util.metrics

Names, units and tags are METRICS; docs/seeing.md has the same table. Tags are few: the node, and a
source, a reason or a direction. Nothing is measured for this: it is what the core counts anyway, so
metrics cost nothing where something is decided.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from kvray.config import NODE_NAME_CHARS
from kvray.core.durations import BOUNDS_MS, COPY_DIRECTIONS, VALUES_MS, copy_counts
from kvray.core.reasons import tokens_by_reason, tokens_by_source
from kvray.errors import NodeLostError

PERIOD_S = 5.0  # Ray's own reporter sends every 10 s
MAX_OBSERVED = 2_000  # of one bucket and period, since Ray takes them one by one; more are left out


VERDICTS = ("equal", "different", "without_verdict")  # see core.trust


class Kind(Enum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. tag: besides `node`."""

    name: str
    kind: Kind
    unit: str
    text: str
    tag: str = ""


METRICS = (
    Metric("kvray_prompt_tokens", Kind.COUNTER, "tokens", "prompt tokens by source", "source"),
    Metric("kvray_computed_tokens", Kind.COUNTER, "tokens", "computed ones by reason", "reason"),
    Metric("kvray_slab_bytes", Kind.GAUGE, "bytes", "size of the slab"),
    Metric("kvray_slab_used_bytes", Kind.GAUGE, "bytes", "slots of it that are occupied"),
    Metric("kvray_engines", Kind.GAUGE, "engines", "attached engines"),
    Metric("kvray_peers", Kind.GAUGE, "nodes", "peers that it is connected to"),
    Metric("kvray_fetched_bytes", Kind.COUNTER, "bytes", "payload fetched from peers and proven"),
    Metric("kvray_stored_blocks", Kind.COUNTER, "blocks", "blocks that engines have stored"),
    Metric("kvray_dropped_stores", Kind.COUNTER, "blocks", "stores dropped: no slot was free"),
    Metric("kvray_evicted_blocks", Kind.COUNTER, "blocks", "blocks evicted for others"),
    Metric("kvray_audits", Kind.COUNTER, "blocks", "computed once more, and compared", "verdict"),
    Metric("kvray_canaries", Kind.COUNTER, "comparisons", "of two makers' canaries", "verdict"),
    Metric("kvray_lookup_ms", Kind.HISTOGRAM, "ms", "from a look-up to its last answer"),
    Metric("kvray_locate_ms", Kind.HISTOGRAM, "ms", "a call to the directory"),
    Metric("kvray_read_ms", Kind.HISTOGRAM, "ms", "a read of a batch of blocks from a peer"),
    Metric("kvray_copy_ms", Kind.HISTOGRAM, "ms", "a copy between slab and device", "direction"),
)


class Meters:
    """One per NodeStore. publish() belongs to one thread."""

    def __init__(self, node_id: str) -> None:
        self._node = node_id[:NODE_NAME_CHARS]
        self._meters: dict[str, Any] = {metric.name: _make(metric) for metric in METRICS}
        self._said: dict[tuple[str, str], int] = {}

    def publish(self, status: Mapping[str, Any]) -> None:
        """status: NodeLoop.status() of a NodeStore that serves."""
        totals = [status["engine_totals"]]
        store, storing, fetch = status["store"], status["storing"], status["fetch"]
        for source, tokens in tokens_by_source(totals).items():
            self._count("kvray_prompt_tokens", tokens, source=source)
        for reason, tokens in tokens_by_reason(totals).items():
            self._count("kvray_computed_tokens", tokens, reason=reason)
        self._gauge("kvray_slab_bytes", status["slab_bytes"])
        self._gauge("kvray_slab_used_bytes", status["used_bytes"])
        engines = [client for client in status["clients"] if client["role"] == "engine"]
        self._gauge("kvray_engines", sum(client["state"] == "open" for client in engines))
        self._gauge("kvray_peers", status["peers_connected"])
        self._count("kvray_fetched_bytes", fetch["fetched_bytes"])
        self._count("kvray_stored_blocks", storing["committed"])
        self._count("kvray_dropped_stores", storing["dropped"])
        self._count("kvray_evicted_blocks", store["evicted"])
        self._count("kvray_audits", status["trust"]["audited_chunks"], verdict="all")
        self._count("kvray_audits", status["trust"]["audit_mismatch"], verdict="mismatch")
        for verdict in VERDICTS:
            self._count("kvray_canaries", status["trust"][f"canaries_{verdict}"], verdict=verdict)
        self._observe("kvray_lookup_ms", status["lookups"]["durations"])
        self._observe("kvray_locate_ms", fetch["locate_durations"])
        self._observe("kvray_read_ms", fetch["read_durations"])
        for direction in COPY_DIRECTIONS:
            counts = copy_counts(status["engine_totals"], direction)
            self._observe("kvray_copy_ms", counts, direction=direction)

    def _gauge(self, name: str, value: int) -> None:
        self._meters[name].set(value, tags={"node": self._node})

    def _count(self, name: str, value: int, **tag: str) -> None:
        grown = self._grown(name, "".join(tag.values()), value)
        if grown > 0:
            self._meters[name].inc(grown, tags={"node": self._node, **tag})

    def _observe(self, name: str, counts: list[int], **tag: str) -> None:
        for value_ms, count in zip(VALUES_MS, counts, strict=True):
            grown = self._grown(name, f"{''.join(tag.values())} {value_ms}", count)
            for _ in range(min(grown, MAX_OBSERVED)):
                self._meters[name].observe(value_ms, tags={"node": self._node, **tag})

    def _grown(self, name: str, part: str, value: int) -> int:
        grown = value - self._said.get((name, part), 0)
        self._said[name, part] = value
        return grown


class MeterThread(threading.Thread):
    """Publishes until end() is called. ask: NodeLoop.status, which may raise NodeLostError. A bug
    ends the metrics, with a traceback in the log, and nothing else.
    """

    def __init__(self, node_id: str, ask: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__(name="kvray-meters", daemon=True)
        self._node_id = node_id
        self._ask = ask
        self._ending = threading.Event()

    def run(self) -> None:
        meters: Meters | None = None
        while not self._ending.wait(PERIOD_S):
            try:
                status = self._ask()
            except NodeLostError:
                continue  # it does not serve just now
            if status["phase"] in ("linking", "serving") and "store" in status:
                meters = meters or Meters(self._node_id)
                meters.publish(status)

    def end(self) -> None:
        self._ending.set()


def _make(metric: Metric) -> Counter | Gauge | Histogram:
    text = f"{metric.text} ({metric.unit})"
    tags = ("node", metric.tag) if metric.tag else ("node",)
    match metric.kind:
        case Kind.GAUGE:
            return Gauge(metric.name, description=text, tag_keys=tags)
        case Kind.COUNTER:
            return Counter(metric.name, description=text, tag_keys=tags)
        case Kind.HISTOGRAM:
            bounds = [float(bound) + 0.5 for bound in BOUNDS_MS]  # none is 0, as Ray wants it
            return Histogram(metric.name, description=text, boundaries=bounds, tag_keys=tags)
