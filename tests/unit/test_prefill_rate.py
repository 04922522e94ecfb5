"""What an engine knows of its own speed: prefill, step by step."""

from kvray.engine.prefill_rate import MAX_KEPT_TOKENS, MIN_STEP_TOKENS, PrefillRate


def test_a_prompt_in_several_steps_gives_its_mean() -> None:
    rate = PrefillRate()
    for begin_s, tokens in ((0.0, 2_000), (1.0, 2_000), (2.0, 1_000)):
        rate.step_begins(tokens, begin_s)
        rate.step_ends(begin_s + 1.0)
    assert rate.us_per_token == 600.0
    assert rate.tokens_per_s == 1_667
    assert (rate.total_tokens, rate.total_us) == (5_000, 3_000_000)


def test_a_step_that_was_scheduled_ahead_counts_from_the_end_of_the_one_before() -> None:
    rate = PrefillRate()
    rate.step_begins(1_000, 0.0)
    rate.step_begins(1_000, 0.1)
    rate.step_ends(1.0)
    rate.step_ends(2.0)
    assert rate.us_per_token == 1_000.0


def test_decoding_and_empty_steps_say_nothing() -> None:
    rate = PrefillRate()
    rate.step_begins(MIN_STEP_TOKENS - 1, 0.0)
    rate.step_ends(1.0)
    rate.step_begins(0, 1.0)
    rate.step_ends(2.0)
    assert rate.us_per_token == 0.0
    assert rate.tokens_per_s == 0
    assert (rate.total_tokens, rate.total_us) == (0, 0)


def test_an_engine_that_has_become_slower_says_so_soon() -> None:
    rate = PrefillRate()
    now_s = 0.0
    for us_per_token in (100, 400):
        for _ in range(4 * MAX_KEPT_TOKENS // 1_024):
            rate.step_begins(1_024, now_s)
            now_s += 1_024 * us_per_token / 1e6
            rate.step_ends(now_s)
    assert 360 < rate.us_per_token <= 400
