"""python -m tests.seam [--state NAME] [--event NAME] [--json]: each event in each state.

Ends with 1 if a request waits for longer than it may, or if anything is lost. --json: the last line
is one JSON object.
"""

import argparse
import json
import logging
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict

from rich.console import Console

from tests.seam.events import EVENTS
from tests.seam.pairs import Outcome, judge, seam
from tests.seam.states import STATES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.seam", description=__doc__)
    parser.add_argument("--state", default="", help="those whose name contains this")
    parser.add_argument("--event", default="", help="those whose name contains this")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    console = Console(stderr=options.json)
    logging.disable(logging.CRITICAL)  # a switch-off is logged with its story, and is wanted here
    states = [state for state in STATES if options.state in state.__name__]
    events = [event for event in EVENTS if options.event in event.__name__]
    begun_s = time.perf_counter()
    sums: Counter[str] = Counter(dict.fromkeys(Outcome.__slots__, 0))
    bad = 0
    with seam() as made:
        for state in states:
            for event in events:
                try:
                    outcome = judge(made, state, event)
                except Exception:  # noqa: BLE001 (vLLM's own asserts are what this looks for)
                    outcome = Outcome(1, 0, 0, 0, 0, 0)
                    console.print(traceback.format_exc(), markup=False, highlight=False)
                sums.update(asdict(outcome))
                if not outcome.is_good:
                    bad += 1
                    console.print(f"{state.__name__}, {event.__name__}: {outcome}")
    pairs = len(states) * len(events)
    took_s = time.perf_counter() - begun_s
    console.print(f"{pairs - bad} of {pairs} pairs are right, in {took_s:.0f} s")
    if options.json:
        # For machines, below what the console says.
        answer = {"states": len(states), "events": len(events), **sums}
        print(json.dumps(answer))  # noqa: T201
    return 1 if bad or not pairs else 0


if __name__ == "__main__":
    sys.exit(main())
