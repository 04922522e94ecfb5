"""The test engines themselves: they start, they reuse their device cache, they leave nothing."""

import os
import random
from typing import Any

import pytest

from tests.conftest import EngineFactory
from tests.engines import EngineError, Mode
from tests.models import VOCABULARY, tiny, tiny_gemma2

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

MODES = [
    pytest.param(Mode.IN_PROCESS, id="in-process"),
    pytest.param(Mode.MULTIPROCESS, id="multiprocess", marks=pytest.mark.slow),
    pytest.param(Mode.ASYNC, id="async", marks=pytest.mark.slow),
]


def prompt_of(token_count: int, *, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1, VOCABULARY) for _ in range(token_count)]


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_answers_and_hits_its_own_prefix_cache(
    engine_factory: EngineFactory, mode: Mode
) -> None:
    engine = engine_factory(tiny(), mode=mode)
    prompt = prompt_of(1_000, seed=1)

    cold = engine.generate(prompt, max_tokens=4)
    warm = engine.generate(prompt, max_tokens=4)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 896)  # seven blocks of 128
    assert len(cold.tokens) == len(warm.tokens) == 4
    assert 0 < warm.ttft_ms < cold.ttft_ms

    assert engine.reset_prefix_cache()
    again = engine.generate(prompt, max_tokens=4)
    assert (again.cached_tokens, again.tokens) == (0, cold.tokens)

    salted = engine.generate_many([prompt, prompt_of(300, seed=2)], cache_salt="other")
    assert [answer.cached_tokens for answer in salted] == [0, 0]

    assert engine.call(client_pid) in engine.processes()
    engine.close()
    assert engine.processes() == []


def test_what_an_engine_raises_is_raised_in_the_test(engine_factory: EngineFactory) -> None:
    engine = engine_factory(tiny_gemma2())
    with pytest.raises(EngineError, match="no such thing"):
        engine.call(fail)
    assert engine.generate(prompt_of(200, seed=3)).finish_reason == "length"

    engine.kill()
    with pytest.raises(EngineError, match="has ended"):
        engine.generate(prompt_of(200, seed=3))


@pytest.mark.slow
def test_a_killed_engine_leaves_no_process_and_no_shared_memory(
    engine_factory: EngineFactory,
) -> None:
    engine = engine_factory(tiny(), mode=Mode.MULTIPROCESS).ready()
    assert len(engine.processes()) >= 3  # client, EngineCore, Worker
    shared_memory = engine.group.shared_memory()
    assert {path.name.split("_")[0] for path in shared_memory} >= {"psm"}

    engine.kill()
    assert engine.processes() == []
    assert not any(path.exists() for path in shared_memory)


def client_pid(_llm: Any) -> int:
    return os.getpid()


def fail(_llm: Any) -> None:
    message = "no such thing"
    raise LookupError(message)
