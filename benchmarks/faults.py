"""Real faults against real processes under load: what is lost, for how long, and is it as promised.

    python benchmarks/faults.py [--only NAME ...] [--seconds N] [--json]

A Ray cluster of two or three nodes on this machine, an engine on each of two, a steady stream of
requests whose documents repeat. `--json` ends with one line: a list with one object per fault.
Exit code 1 if one of them does not hold.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# As in ray_cluster.yaml: here the engines compute on all cores that there are.
os.environ.setdefault("RAY_worker_niceness", "0")

from rich.console import Console
from rich.table import Table

from benchmarks import fault_cases, fault_kills, fault_link, fault_long
from benchmarks.fault_load import make_controls
from benchmarks.fault_report import Report
from benchmarks.fault_world import World, running_world

console = Console(stderr=True)

# In this order, so that one world serves them all. The last two take --seconds.
CASES: dict[str, Callable[[World], Report]] = {
    "store_kill": fault_cases.store_kill,
    "store_kill_mid_write": fault_kills.store_kill_mid_write,
    "directory_kill": fault_kills.directory_kill,
    "engine_kill": fault_kills.engine_kill,
    "drain": fault_long.drain,
    "node_freeze": fault_cases.node_freeze,
    "node_kill": fault_cases.node_kill,
}


LONG_CASES: dict[str, Callable[[World, float], Report]] = {
    "random": fault_long.at_random,
    "none": fault_long.nothing,
}
LINK_CUT = "link_cut"  # in a world of its own
NAMES = [*CASES, *LONG_CASES, LINK_CUT]


def run(names: list[str], seconds: float, say: Callable[[str], None]) -> list[Report]:
    reports: list[Report] = []

    def timed(name: str, case: Callable[[], Report]) -> None:
        say(name)
        begun_s = time.monotonic()
        report = case()
        report.notes["took_s"] = round(time.monotonic() - begun_s, 1)
        console.print(_line(report))
        reports.append(report)

    with tempfile.TemporaryDirectory(prefix="kvray-faults-") as folder:
        say("computing the answers of an engine without kvray")
        controls = make_controls(Path(folder))
        shared = [name for name in names if name != LINK_CUT]
        if shared:
            say("starting a Ray cluster and two engines")
            with running_world(Path(folder), controls) as world:
                for name in shared:
                    long = LONG_CASES.get(name)
                    timed(
                        name, partial(long, world, seconds) if long else partial(CASES[name], world)
                    )
                    world.clear()
        if LINK_CUT in names:
            timed(LINK_CUT, partial(fault_link.link_cut, Path(folder), controls))
    return reports


def _line(report: Report) -> str:
    if report.skipped is not None:
        return f"{report.name}: skipped, {report.skipped}"
    verdict = (
        "holds"
        if report.holds
        else "[red]does not hold[/]: " + "; ".join(report.broken + report.late)
    )
    return f"{report.name}: {verdict} {report.notes}"


def show(reports: list[Report]) -> None:
    columns = {
        "requests": "asked",
        "failed": "failed",
        "wrong": "wrong",
        "blocks_before": "before",
        "blocks_after": "after",
        "detect_ms": "found",
        "local_hits_again_ms": "local",
        "peer_hits_again_ms": "peer",
        "worst_extra_wait_ms": "wait",
        "holds": "holds",
    }
    table = Table(title="faults: blocks before and after, milliseconds", box=None)
    table.add_column("name", no_wrap=True, min_width=20)
    for title in columns.values():
        table.add_column(title, justify="right")
    for report in reports:
        values = report.to_dict()
        table.add_row(report.name, *("" if values[c] is None else str(values[c]) for c in columns))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=NAMES, help="may be repeated")
    parser.add_argument("--seconds", type=float, default=300.0, help="of random and of none")
    parser.add_argument("--trace", type=Path, help="a file for one line of JSON per request")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    names = [name for name in NAMES if name in (arguments.only or NAMES)]
    with console.status("") as status:
        reports = run(names, arguments.seconds, status.update)
    show(reports)
    if arguments.trace is not None:
        lines = [json.dumps({"fault": r.name} | line) + "\n" for r in reports for line in r.trace]
        arguments.trace.write_text("".join(lines))
    if arguments.json:
        print(json.dumps([report.to_dict() for report in reports]))
    return 0 if all(report.holds is not False for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
