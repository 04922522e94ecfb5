"""Goal: what benchmarks/behind_nginx.py asks is what its page says: the rate, the slice of the
trace, whose turn is first, and what is summed over rounds.

Method: pure functions, numbers that can be counted by hand.
"""

import json
import math
from typing import Any

import pytest

from benchmarks import behind_nginx
from benchmarks.nginx_loads import (
    CHUNK_TOKENS,
    merged,
    order,
    paced_rate,
    prefix_repetition,
    random_prompts,
    repeated_share,
    slice_of,
    trace_lines,
)
from benchmarks.nginx_talks import ANSWER_TOKENS, TURN_TOKENS, Shape


def test_the_rate_is_half_of_what_is_sustained() -> None:
    assert paced_rate(0.5) == 0.25
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="requests per second"):
            paced_rate(wrong)


def test_the_slab_has_room_for_all_prefixes_and_the_pool_for_none_too_many() -> None:
    load = prefix_repetition(prefixes=8, prefix_tokens=3_000, requests_each=6, rounds=2)
    assert load.requests == 48
    assert load.slab_tokens >= 8 * 3_000 + 48 * CHUNK_TOKENS
    # Two of the longest requests, in whole chunks, are no room for a third prefix.
    assert 2 * -(-load.request_tokens // CHUNK_TOKENS) * CHUNK_TOKENS < 3 * 3_000
    arguments = dict(zip(load.arguments[::2], load.arguments[1::2], strict=True))
    assert arguments["--num-prompts"] == "48"
    assert arguments["--prefix-repetition-prefix-len"] == "3000"


def test_only_prompts_that_share_nothing_are_saturated_each_round() -> None:
    assert random_prompts(requests=4, tokens=100, rounds=3).saturates_each_round
    load = prefix_repetition(prefixes=2, prefix_tokens=9, requests_each=1, rounds=3)
    assert not load.saturates_each_round


def test_the_slice_is_the_first_requests_that_fit() -> None:
    lines = [[0, 1, 2, 3], [0], [], [0, 4], [5]]
    assert slice_of(lines, requests=2, max_blocks=2) == [[0], [0, 4]]
    with pytest.raises(ValueError, match="expected 4 requests of at most 2 blocks, found 3"):
        slice_of(lines, requests=4, max_blocks=2)


def test_what_repeats_is_what_an_earlier_request_began_with() -> None:
    assert repeated_share([]) == 0.0
    assert repeated_share([[0, 1], [0, 2]]) == 1 / 4
    assert repeated_share([[0, 1], [9, 1]]) == 0.0  # the same block after another one is another


def test_a_trace_has_whole_chunks_and_arrivals_at_the_rate_the_same_for_a_seed() -> None:
    rows = [[n, n + 1] for n in range(2_000)]
    lines = [json.loads(line) for line in trace_lines(rows, rate_per_s=4.0, seed=7)]
    assert lines[0]["timestamp"] == 0.0
    assert {line["input_length"] for line in lines} == {2 * CHUNK_TOKENS}
    assert lines[-1]["timestamp"] == pytest.approx(2_000 / 4.0, rel=0.1)
    again = trace_lines(rows, rate_per_s=4.0, seed=7)
    assert again == [json.dumps(line) for line in lines]
    assert again != trace_lines(rows, rate_per_s=4.0, seed=8)


def test_who_is_first_changes_from_round_to_round() -> None:
    assert order(0, ["none", "kvray"]) == ["none", "kvray"]
    assert order(1, ["none", "kvray"]) == ["kvray", "none"]
    assert order(2, ["none", "kvray"]) == ["none", "kvray"]


def test_rounds_are_merged_by_requests_and_time_and_failures_are_not_lost() -> None:
    runs = [
        {"ttfts": [0.1, 0.3], "completed": 2, "failed": 0, "duration": 4.0},
        {"ttfts": [0.2], "completed": 1, "failed": 1, "duration": 2.0},
    ]
    found = merged(runs)
    assert found["ttft_ms"] == pytest.approx([100, 300, 200])
    assert (found["completed"], found["failed"]) == (3, 1)
    assert found["requests_per_s"] == 0.5


def test_a_session_is_its_turns_and_their_answers() -> None:
    shape = Shape(sessions=1, turns=3, first_tokens=100)
    assert shape.session_tokens == 100 + 2 * TURN_TOKENS + 3 * ANSWER_TOKENS


def run_of(ttft_s: float, rate: float, *, failed: int = 0) -> dict[str, Any]:
    """What `vllm bench serve` saves, as far as it is read."""
    return {
        "ttfts": [ttft_s],
        "mean_ttft_ms": ttft_s * 1_000,
        "completed": 1,
        "failed": failed,
        "duration": 1.0 / rate,
        "request_throughput": rate,
        "tokens": {},
    }


def test_a_failed_request_and_a_gain_below_two_are_missed_bars() -> None:
    load = prefix_repetition(prefixes=1, prefix_tokens=9, requests_each=1, rounds=1)
    saturated = {"none": [run_of(9, 1.0)], "kvray": [run_of(9, 2.0, failed=1)]}
    paced = {"none": [run_of(3, 0.5)], "kvray": [run_of(2, 0.5)]}
    result = behind_nginx.summary(load, 0.5, saturated, paced)
    assert result["ttft_gain"] == 1.5
    assert [bar.holds for bar in behind_nginx.bars(result)] == [False, False]


def test_where_nothing_is_reused_the_median_of_the_rounds_counts() -> None:
    load = random_prompts(requests=1, tokens=9, rounds=3)
    none = [run_of(1.0, 1.0) for _ in range(3)]
    saturated = {"none": none, "kvray": [run_of(1.0, rate) for rate in (0.5, 0.98, 0.99)]}
    paced = {"none": none, "kvray": [run_of(s, 1.0) for s in (1.5, 1.02, 1.01)]}
    result = behind_nginx.summary(load, 0.5, saturated, paced)
    assert result["ttft_ratios"] == [1.5, 1.02, 1.01]
    assert [bar.holds for bar in behind_nginx.bars(result)] == [True, True, True]
    slow = paced | {"kvray": [run_of(s, 1.0) for s in (1.5, 1.04, 1.01)]}
    result = behind_nginx.summary(load, 0.5, saturated, slow)
    assert [bar.holds for bar in behind_nginx.bars(result)] == [True, False, True]
