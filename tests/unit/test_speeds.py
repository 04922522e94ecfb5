"""Prefill and links as engines and nodes have measured them, look by look."""

from typing import Any

import pytest

from kvray.core.speeds import MAX_KEPT_TOKENS, Speeds, SpeedsSeen


def engine(pid: int, *, model: str = "llama", **counters: int) -> dict[str, Any]:
    return {"role": "engine", "pid": pid, "model": model, "counters": counters}


def node(*engines: dict[str, Any], epoch: int = 1, **links: float | None) -> dict[str, Any]:
    worker = {"role": "worker", "pid": 9, "model": "llama", "counters": {}}
    peers = {owner: {"bytes_per_ms": rate} for owner, rate in links.items()}
    return {"epoch": epoch, "clients": [*engines, worker], "fetch": {"peers": peers}}


def test_nothing_is_known_before_somebody_has_measured_it() -> None:
    seen = SpeedsSeen()
    assert seen.look({}) == Speeds()
    assert seen.look({"a": {}}) == Speeds(), "a node that has said nothing yet"
    few = node(engine(1, prefill_tokens=1_000, prefill_us=500), b=None)
    assert seen.look({"a": few}) == Speeds(), "too few tokens, and a link that brought nothing"


def test_all_engines_count_by_what_they_have_computed() -> None:
    seen = SpeedsSeen()
    nodes = {
        "a": node(engine(1, prefill_tokens=3_000, prefill_us=300_000), b=5_000.0),
        "b": node(engine(2, prefill_tokens=1_000, prefill_us=500_000), a=4_000.0),
    }
    speeds = seen.look(nodes)
    assert speeds.prefill_us_per_token == pytest.approx(200)
    assert speeds.links == {("a", "b"): 5_000.0, ("b", "a"): 4_000.0}
    assert seen.look(nodes) == speeds, "nothing new is nothing new"


def test_a_token_has_so_many_bytes_as_were_stored_of_it() -> None:
    stored = engine(1, stored_tokens=1_280, stored_bytes=1_280 * 8_192)
    assert SpeedsSeen().look({"a": node(stored)}).bytes_per_token == pytest.approx(8_192)


def test_what_was_long_ago_fades() -> None:
    seen = SpeedsSeen()
    tokens = MAX_KEPT_TOKENS
    seen.look({"a": node(engine(1, prefill_tokens=tokens, prefill_us=100 * tokens))})
    speeds = Speeds()
    for part in range(1, 9):
        slower = engine(
            1,
            prefill_tokens=tokens + part * tokens // 4,
            prefill_us=100 * tokens + part * tokens // 4 * 400,
        )
        speeds = seen.look({"a": node(slower)})
    assert speeds.prefill_us_per_token is not None
    assert 340 < speeds.prefill_us_per_token <= 400


def test_an_engine_or_a_node_that_starts_anew_counts_from_the_beginning() -> None:
    """And one that leaves takes nothing back: what it has measured was measured."""
    seen = SpeedsSeen()
    seen.look({"a": node(engine(1, prefill_tokens=10_000, prefill_us=1_000_000))})
    again = seen.look({"a": node(engine(2, prefill_tokens=10_000, prefill_us=3_000_000))})
    assert again.prefill_us_per_token == pytest.approx(200)
    assert seen.look({}).prefill_us_per_token == pytest.approx(200)
    reborn = node(engine(2, prefill_tokens=20_000, prefill_us=2_000_000), epoch=2)
    assert seen.look({"a": reborn}).prefill_us_per_token == pytest.approx(150)


def test_engines_of_another_model_do_not_count_where_one_is_named() -> None:
    nodes = {
        "a": node(
            engine(1, model="llama", prefill_tokens=2_000, prefill_us=200_000),
            engine(2, model="tiny", prefill_tokens=2_000, prefill_us=2_000),
        )
    }
    assert SpeedsSeen("llama").look(nodes).prefill_us_per_token == pytest.approx(100)
    assert SpeedsSeen().look(nodes).prefill_us_per_token == pytest.approx(50.5)
