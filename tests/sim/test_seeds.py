"""The simulator as a test: some seeds each time, more with `slow`, and that a seed is a story.

Thousands of seeds: python -m tests.sim --seeds 2000.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.sim.profile import CHANCES, RATES
from tests.sim.run import Outcome, run_seed

# Counted when a fuse has burnt down, not when it is lit; and what each seed has.
_KINDS = {*RATES, *CHANCES, "clock_skew", "late_landing", "crash_mid_read", "store_full"}


def run_all(seeds: range) -> Counter[str]:
    """The faults that happened, if nothing went wrong."""
    faults = Counter[str]()
    for seed in seeds:
        outcome = run_seed(seed)
        assert not outcome.failure, told(outcome)
        faults += outcome.faults
    return faults


def told(outcome: Outcome) -> str:
    story = "\n".join(outcome.story[-40:])
    again = f"python -m tests.sim --first {outcome.seed} --seeds 1 --trace"
    return f"seed {outcome.seed}\n{story}\n{outcome.failure}\nplay it again: {again}"


@pytest.mark.parametrize("first", [0, 8, 16])
def test_some_seeds_are_clean(first: int) -> None:
    run_all(range(first, first + 8))


@pytest.mark.slow
@pytest.mark.timeout(900)  # one seed takes half a second to a second and a half, by the machine
def test_many_seeds_are_clean_and_every_fault_happens() -> None:
    faults = run_all(range(100, 400))
    assert not _KINDS - faults.keys()


def test_a_seed_is_a_story() -> None:
    """Also in another process, where hashes of strings are others."""
    script = "from tests.sim.run import run_seed; print(run_seed(7).digest)"
    outcome = run_seed(7)
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        assert int(done.stdout) == outcome.digest
