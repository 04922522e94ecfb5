"""One fault under load: the stream of requests and the look at the directory around it.

with scene(world, report) as it:
    it.warm()                      load runs, both engines have hits of both kinds
    it.inject(lambda: ...)         the moment from which everything is counted
    it.wait_hits(...)              until what was lost is back
(the stream is stopped, the figures of requests are in the report)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.fault_load import THINK_S, TURNS, Kind, Load, Outcome, counted
from benchmarks.fault_report import MIN_REQUESTS, Report
from benchmarks.fault_watch import Watch
from benchmarks.fault_world import World

BEFORE_REQUESTS = 10  # of the running stream, before the fault
AFTER_REQUESTS = 20  # at least, after it
HITS_LIMIT_S = 15.0  # > every bound: then it has not come back
REQUESTS_LIMIT_S = 60.0
POLL_S = 0.02


@dataclass
class Scene:
    world: World
    report: Report
    load: Load
    watch: Watch
    fault_s: float = 0.0

    def warm(self) -> None:
        """Stock on both sides, then the mixed stream."""
        self.load.warm()
        self.load.start()
        self.wait_requests(len(self.load.snapshot()) + BEFORE_REQUESTS)

    def inject(self, fault: Callable[[], None]) -> None:
        self.fault_s = time.monotonic()
        fault()

    def wait_requests(self, count: int) -> None:
        end_s = time.monotonic() + REQUESTS_LIMIT_S
        while len(counted(self.load.snapshot())) < count and time.monotonic() < end_s:
            time.sleep(POLL_S)

    def wait_after(self, count: int = AFTER_REQUESTS) -> None:
        """So many requests since the fault, and enough in all."""
        before = len(self.load.snapshot()) - len(self.load.since(self.fault_s))
        self.wait_requests(max(before + count, MIN_REQUESTS))

    def first_hit(
        self, kind: Kind, *, engine: int | None = None, since_s: float | None = None
    ) -> int | None:
        """Milliseconds from the fault (or since_s) to the end of the first request that began
        after it and hit: in its own node's slab, or in the other's for the first time.
        """
        origin_s = self.fault_s if since_s is None else since_s
        ended = [
            outcome.ended_s
            for outcome in self.load.since(origin_s)
            if engine in (None, outcome.engine) and _is_hit(outcome, kind)
        ]
        return int((min(ended) - origin_s) * 1_000) if ended else None

    def wait_hits(
        self, wanted: list[tuple[Kind, int]], *, since_s: float | None = None
    ) -> list[int | None]:
        """first_hit of each (kind, engine), waited for."""
        end_s = time.monotonic() + HITS_LIMIT_S
        while True:
            found = [self.first_hit(kind, engine=e, since_s=since_s) for kind, e in wanted]
            if None not in found or time.monotonic() > end_s:
                return found
            time.sleep(POLL_S)

    def wait_hits_again(self, node: int, *, since_s: float | None = None) -> None:
        """Fills local_hits_again_ms (of the node's own engine) and peer_hits_again_ms (the later
        of both directions).
        """
        local, *peers = self.wait_hits(
            [(Kind.LOCAL, node), (Kind.PEER, 0), (Kind.PEER, 1)], since_s=since_s
        )
        self.report.local_hits_again_ms = local
        both = [ms for ms in peers if ms is not None]
        self.report.peer_hits_again_ms = max(both) if len(both) == len(peers) else None


def _is_hit(outcome: Outcome, kind: Kind) -> bool:
    if outcome.kind is not kind:
        return False
    return outcome.local > 0 if kind is Kind.LOCAL else outcome.peer > 0


def trace_line(outcome: Outcome, fault_s: float) -> dict[str, Any]:
    """Times in ms since the fault."""
    fields = asdict(outcome)
    began_s, ended_s = fields.pop("began_s"), fields.pop("ended_s")
    return {
        "began_ms": round((began_s - fault_s) * 1_000),
        "ended_ms": round((ended_s - fault_s) * 1_000),
        **fields,
        "kind": outcome.kind.value,
    }


@contextmanager
def scene(
    world: World, report: Report, *, turns: Sequence[Kind] = TURNS, think_s: float = THINK_S
) -> Iterator[Scene]:
    """Afterwards nothing is under way, and the report has the requests' figures and is judged."""
    load = world.load(turns=turns, think_s=think_s)
    with Watch(world.nodes.cluster.name) as watch:
        it = Scene(world, report, load, watch)
        try:
            yield it
        finally:
            load.stop()
    outcomes = counted(load.snapshot())
    report.requests = len(outcomes)
    report.failed = sum(outcome.failed for outcome in outcomes)
    report.wrong = sum(outcome.wrong for outcome in outcomes)
    after = [outcome.wait_ms for outcome in outcomes if outcome.ended_s >= it.fault_s]
    report.worst_extra_wait_ms = max(after, default=0)
    report.trace = [trace_line(outcome, it.fault_s) for outcome in load.snapshot()]
    report.notes |= {
        "hits_local": sum(outcome.local > 0 for outcome in outcomes),
        "hits_peer": sum(outcome.peer > 0 for outcome in outcomes),
        "computed": sum(not outcome.cached_tokens for outcome in outcomes),
        "buried": watch.burials(it.fault_s),
    }
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    if problems:
        report.notes["problems"] = problems[:3]
    report.judge()
