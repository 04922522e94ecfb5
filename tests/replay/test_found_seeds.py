"""Seeds that have found something, each with what it was.

A seed means another story once the simulator changes, so each bug of kvray also has a scripted
test in tests/unit; the seeds stay for the states they once led to.
"""

import pytest

from tests.sim.run import run_seed

# (seed, what it found). Those above 150 have found a bug of kvray; the others were the first
# of many to find a planted one (tests.mutants).
FOUND = [
    (1874, "an audit counted a mismatch of a maker that was known to be different"),
    (758, "in a full slab one canary went for the other, and makers never met"),
    (161, "a block that was evicted again counted as taken over from a leaving node"),
    (166, "a take-over fetched what a local engine was writing"),
    (25, "a wait went on when its session had ended"),
    (44, "slots of a dead engine were free though its worker lived"),
    (123, "a late commit of another generation made a slot READY that was not its own"),
]


@pytest.mark.parametrize(("seed", "found"), FOUND)
def test_a_seed_that_found_something_is_clean(seed: int, found: str) -> None:
    outcome = run_seed(seed)
    assert not outcome.failure, f"{found}\n{outcome.failure}"
