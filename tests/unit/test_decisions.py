"""What a router says of how long it takes to decide."""

import time

from kvray.serve.decisions import BOUNDS_MS, Decisions, percentile_ms


def test_a_percentile_is_the_bound_below_which_so_many_are() -> None:
    counts = [0] * (len(BOUNDS_MS) + 1)
    assert percentile_ms(counts, 99) == 0.0, "nothing was decided"
    counts[1] = 98
    counts[3] = 1
    counts[5] = 1
    assert [percentile_ms(counts, percent) for percent in (50, 98, 99, 100)] == [
        BOUNDS_MS[1],
        BOUNDS_MS[1],
        BOUNDS_MS[3],
        BOUNDS_MS[5],
    ]
    counts[-1] = 100
    assert percentile_ms(counts, 99) == float("inf")


def test_each_decision_counts_once_where_its_time_belongs() -> None:
    decisions = Decisions("deployment", "application")
    end_s = time.perf_counter() + 2 * BOUNDS_MS[-1] / 1_000
    with decisions.one():
        while time.perf_counter() < end_s:
            pass
    with decisions.one():
        pass
    assert sum(decisions.counts) == 2
    assert decisions.counts[-1] == 1
