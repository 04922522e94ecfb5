"""How long a router takes to decide: a histogram, here and in Ray's metrics (kvray_route_ms).

A decision is from the names of a prompt's chunks to the order of the replicas, on the router's
event loop. To name the chunks takes as long as the prompt is, once a request, and is not counted.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Histogram

METRIC = "kvray_route_ms"
# Upper bounds, inclusive. Beyond the last one a request has waited for its router noticeably.
BOUNDS_MS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0)


class Decisions:
    """Of one router. counts: one for each of BOUNDS_MS, and one for what took longer."""

    def __init__(self, deployment: str, application: str) -> None:
        self.counts = [0] * (len(BOUNDS_MS) + 1)
        self._metric = Histogram(
            METRIC,
            description="To rank the replicas for one request (ms)",
            boundaries=list(BOUNDS_MS),
            tag_keys=("deployment", "application"),
        )
        self._metric.set_default_tags({"deployment": deployment, "application": application})

    @contextmanager
    def one(self) -> Iterator[None]:
        begun_s = time.perf_counter()
        yield
        took_ms = (time.perf_counter() - begun_s) * 1_000
        self.counts[bisect_left(BOUNDS_MS, took_ms)] += 1
        self._metric.observe(took_ms)


def percentile_ms(counts: list[int], percent: float) -> float:
    """The bound below which so many are; infinite for what took longer than the last one, 0 if
    there was none.
    """
    total = sum(counts)
    below = 0
    for bound_ms, count in zip((*BOUNDS_MS, float("inf")), counts, strict=True):
        below += count
        if below and below * 100 >= total * percent:
            return bound_ms
    return 0.0
