"""python -m tests.mutants [--only NAME] [--jobs J] [--json]: plants each bug, and none survives.

Ends with 1 if a check did not see its bug, or if a bug could not be planted. --json: the last line
is one JSON object.
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

from tests.mutants.bugs import BUGS, Mutant
from tests.mutants.plant import ANCHOR_LOST

CHECK_LIMIT_S = 240.0  # the slowest takes a third of it; a bug that makes a check hang is caught


@dataclass(frozen=True, slots=True)
class Verdict:
    """why: the line that gave the bug away, or what went wrong."""

    mutant: Mutant
    caught: bool
    why: str
    took_s: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", help="those whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    chosen = [mutant for mutant in BUGS if (options.only or "") in mutant.name]
    console = Console(stderr=options.json)
    begun_s = time.perf_counter()
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for verdict in pool.map(judge, chosen):
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
    begun_s = time.perf_counter()
    command = [sys.executable, "-m", "tests.mutants.plant", mutant.name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Verdict(mutant, caught=True, why="its check hangs", took_s=CHECK_LIMIT_S)
    took_s = time.perf_counter() - begun_s
    if done.returncode == ANCHOR_LOST:
        return Verdict(mutant, caught=False, why=f"not planted: {done.stderr}", took_s=took_s)
    # 1 is the verdict of the simulator and of pytest; anything else is no verdict.
    caught = done.returncode == 1 and any(sign in done.stdout for sign in ("fails after", "failed"))
    lines = [line.strip() for line in done.stdout.splitlines()]
    telling = [line for line in lines if "fails after" in line]  # which seed
    telling += [line for line in lines if "Error" in line][-1:]
    why = " ".join(telling) or done.stderr[-500:]
    return Verdict(mutant, caught=caught, why=why if caught else f"SURVIVES {why}", took_s=took_s)


def _tell(console: Console, verdict: Verdict) -> None:
    sign = "caught" if verdict.caught else "NOT CAUGHT"
    check = " ".join(verdict.mutant.check)
    console.print(
        f"{sign}  {verdict.mutant.name}\n    by {check}, {verdict.took_s:.0f} s\n    {verdict.why}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
