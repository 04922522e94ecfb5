"""python -m tests.sim --seeds N [--first S] [--jobs J] [--trace] [--json]

Runs N simulated clusters, one a seed, on all cores. Ends with 1 at the first seed that fails, after
its story and the command that plays it again. --json: the last line is one JSON object.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.sim.run import Outcome, run_seed

COUNTED = (
    "seeds",
    "events",
    "loads_ok",
    "fetched_blocks",
    "taken_over_blocks",
    "spared_blocks",
    "wanted_blocks",
)
STORY_EVENTS = 60  # of a failure; --trace shows all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--trace", action="store_true", help="say every event, in one process")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    begun_s = time.perf_counter()
    total, faults = Counter[str](), Counter[str]()
    failed: Outcome | None = None
    console = Console(stderr=options.json)
    with (
        _outcomes(seeds, jobs=options.jobs, trace=options.trace) as outcomes,
        _progress(console, len(seeds)) as advance,
    ):
        for outcome in outcomes:
            total += Counter(seeds=1)
            total += Counter({name: getattr(outcome, name) for name in COUNTED[1:]})
            faults += outcome.faults
            advance(total, time.perf_counter() - begun_s)
            if outcome.failure:
                failed = outcome
                break
    took_s = time.perf_counter() - begun_s
    if failed is not None:
        _tell(console, failed)
    _summarize(console, total, faults, took_s)
    if options.json:
        print(  # noqa: T201 (for machines, below what the console says)
            json.dumps(
                {
                    **{name: total[name] for name in COUNTED},
                    "events_per_s": round(total["events"] / took_s),
                    "faults": dict(sorted(faults.items())),
                }
            )
        )
    return 1 if failed is not None else 0


@contextmanager
def _outcomes(seeds: range, *, jobs: int, trace: bool) -> Iterator[Iterator[Outcome]]:
    """In whatever order they end."""
    if trace or jobs <= 1:
        yield (run_seed(seed, trace=trace) for seed in seeds)
        return
    with get_context("fork").Pool(jobs) as pool:
        yield pool.imap_unordered(run_seed, seeds)


@contextmanager
def _progress(console: Console, count: int) -> "Iterator[_Advance]":
    """A bar for people; a line now and then for logs."""
    if not console.is_terminal:
        yield _Advance(console, count, None)
        return
    columns = (
        TextColumn("seeds"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rates]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Advance(console, count, bar)


class _Advance:
    """Called after each seed."""

    def __init__(self, console: Console, count: int, bar: Progress | None) -> None:
        self._console = console
        self._count = count
        self._bar = bar
        self._task = bar.add_task("seeds", total=count, rates="") if bar is not None else None
        self._line_s = 10.0

    def __call__(self, total: Counter[str], took_s: float) -> None:
        rates = _rates(total, took_s)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, rates=rates)
        elif took_s >= self._line_s:
            self._line_s = took_s + 10.0
            self._console.print(f"{total['seeds']} of {self._count} seeds, {rates}", soft_wrap=True)


def _rates(total: Counter[str], took_s: float) -> str:
    return f"{total['seeds'] / took_s:.2f} seeds/s, {total['events'] / took_s:,.0f} events/s"


def _tell(console: Console, failed: Outcome) -> None:
    console.print(f"\nseed {failed.seed} fails after {failed.events:,} events:\n", soft_wrap=True)
    for line in failed.story[-STORY_EVENTS:]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(failed.failure, markup=False, highlight=False, soft_wrap=True)
    console.print("play it again:")
    command = f"python -m tests.sim --first {failed.seed} --seeds 1 --trace"
    console.print(command, markup=False, highlight=False, soft_wrap=True)


def _summarize(console: Console, total: Counter[str], faults: Counter[str], took_s: float) -> None:
    listed = ", ".join(f"{kind} {count:,}" for kind, count in sorted(faults.items()))
    console.print(
        f"{total['seeds']:,} seeds, {total['events']:,} events in {took_s:,.0f} s "
        f"({_rates(total, took_s)}), {total['loads_ok']:,} loads good, "
        f"{total['fetched_blocks']:,} blocks fetched from peers, "
        f"{total['taken_over_blocks']:,} taken over from leaving ones, "
        f"{total['spared_blocks']:,} spared, {total['wanted_blocks']:,} wanted at home",
        soft_wrap=True,
    )
    console.print(f"faults: {listed}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
