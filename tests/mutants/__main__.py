"""python -m tests.mutants [--only NAME] [--jobs J] [--simulator-only] [--json]

Plants each bug, and none survives. Ends with 1 if a check did not see its bug, or if a bug could
not be planted. --simulator-only: instead of a bug's own check, up to 200 seeds of the simulator,
which can not see all of them. --json: the last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console

from tests.mutants.bugs import BUGS
from tests.mutants.mutant import Mutant, simulated
from tests.mutants.plant import ANCHOR_LOST

CHECK_LIMIT_S = 240.0  # the slowest takes a third of it; a bug that makes a check hang is caught
SIMULATOR_SEEDS = 200
SIMULATOR_LIMIT_S = 900.0  # all of them take 300 s; what makes a seed hang is not told apart


@dataclass(frozen=True, slots=True)
class Verdict:
    """why: the line that gave the bug away, or what went wrong."""

    mutant: Mutant
    check: tuple[str, ...]
    caught: bool
    why: str
    took_s: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", help="those whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--simulator-only", action="store_true", help="no other check")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    chosen = [mutant for mutant in BUGS if (options.only or "") in mutant.name]
    console = Console(stderr=options.json)
    begun_s = time.perf_counter()
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for verdict in pool.map(simulate if options.simulator_only else judge, chosen):
            verdicts.append(verdict)
            _tell(console, verdict)
    caught = sum(verdict.caught for verdict in verdicts)
    took_s = time.perf_counter() - begun_s
    console.print(f"{caught} of {len(verdicts)} bugs caught in {took_s:.0f} s", highlight=False)
    if options.json:
        # For machines, below what the console says.
        print(json.dumps({"mutants": len(verdicts), "caught": caught}))  # noqa: T201
    return 0 if verdicts and caught == len(verdicts) else 1


def judge(mutant: Mutant) -> Verdict:
    """Plant it in a process of its own and run its check there."""
    try:
        return _run(mutant, mutant.check, CHECK_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Verdict(mutant, mutant.check, caught=True, why="it hangs", took_s=CHECK_LIMIT_S)


def simulate(mutant: Mutant) -> Verdict:
    """The same with seeds of the simulator."""
    check = simulated(SIMULATOR_SEEDS)
    try:
        return _run(mutant, check, SIMULATOR_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Verdict(mutant, check, caught=False, why="too slow", took_s=SIMULATOR_LIMIT_S)


def _run(mutant: Mutant, check: tuple[str, ...], limit_s: float) -> Verdict:
    begun_s = time.perf_counter()
    command = [sys.executable, "-m", "tests.mutants.plant", mutant.name, *check]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    took_s = time.perf_counter() - begun_s
    if done.returncode == ANCHOR_LOST:
        why = f"not planted: {done.stderr}"
        return Verdict(mutant, check, caught=False, why=why, took_s=took_s)
    # 1 is the verdict of the simulator and of pytest; anything else is no verdict.
    caught = done.returncode == 1 and any(sign in done.stdout for sign in ("fails after", "failed"))
    lines = [line.strip() for line in done.stdout.splitlines()]
    telling = [line for line in lines if "fails after" in line]  # which seed
    telling += [line for line in lines if "Error" in line][-1:]
    why = " ".join(telling) or done.stderr[-500:]
    why = why if caught else f"SURVIVES {why}"
    return Verdict(mutant, check, caught=caught, why=why, took_s=took_s)


def _tell(console: Console, verdict: Verdict) -> None:
    sign = "caught" if verdict.caught else "NOT CAUGHT"
    check = " ".join(verdict.check)
    console.print(
        f"{sign}  {verdict.mutant.name}\n    by {check}, {verdict.took_s:.0f} s\n    {verdict.why}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
