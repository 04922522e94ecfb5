"""A slow link on the real parts: what does not come in time, and what is not worth fetching, is
counted under its name.

Method: two nodes in two network namespaces, joined by TCP that is slowed down; engine A on the far
node computes, engine B on the near one asks. Each has one thread: two that
wait for each other on a busy machine compute slower than the slow link brings. A Ray cluster of its
own, so a module of its own.
"""

import pytest

from benchmarks.fault_link import NAMESPACE
from kvray.core.reasons import MissReason, tokens_by_reason
from tests import in_engine
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.namespaces import Namespaces
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import Nodes, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(240)]

TOKENS = 700  # five chunks of 1 MiB
HOPELESS, SLOW = "8mbit", "50mbit"  # five seconds for such a prompt, and 0.8: it computes quicker
DEADLINE_MS = 950  # of a request; a read that takes a second is a fault of the peer
BREAK_EVEN_LIMIT_S = 60.0  # a peer that was late is avoided for a while
OWN_PROMPTS = 16  # computed by B first: its first steps are slow, and it must know its speed
OWN_SEED = 1_000


@pytest.fixture(scope="module")
def engines(split: Nodes, shared_engine_factory: EngineFactory) -> tuple[Engine, Engine]:
    one_thread = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    b, a = (
        shared_engine_factory(
            tiny(),
            kv_transfer_config=split.transfer(index, lookup_deadline_ms=DEADLINE_MS),
            environment={"PYTHONHASHSEED": "0", **one_thread},
        )
        for index in (0, 1)
    )
    return a.ready(), b.ready()


def reasons_of(split: Nodes, engines: tuple[Engine, Engine], seed: int) -> dict[str, int]:
    """Why B computed a prompt that A has."""
    a, b = engines
    prompt = prompt_of(TOKENS, seed=seed)
    a.generate(prompt)
    a.call(in_engine.settle)
    split.wait_listed(split.keys(1))
    before = b.call(in_engine.settle)["counters"]
    b.generate(prompt)
    after = b.call(in_engine.settle)["counters"]
    grown = {name: count - before.get(name, 0) for name, count in after.items()}
    return tokens_by_reason([grown])


def test_what_does_not_come_in_time_and_what_is_not_worth_waiting_for(
    split: Nodes, engines: tuple[Engine, Engine], net: Namespaces
) -> None:
    for seed in range(OWN_SEED, OWN_SEED + OWN_PROMPTS):
        engines[1].generate(prompt_of(TOKENS, seed=seed))

    net.slow_down(NAMESPACE, HOPELESS)
    late = reasons_of(split, engines, seed=1)
    assert late.get(MissReason.DEADLINE, 0) > 0, late

    net.slow_down(NAMESPACE, SLOW)
    seeds = iter(range(2, OWN_SEED))
    seen: list[dict[str, int]] = []

    def is_computed_by_choice() -> bool:
        seen.append(reasons_of(split, engines, next(seeds)))
        return seen[-1].get(MissReason.BELOW_BREAK_EVEN) == full_chunks(TOKENS)

    wait_until(
        is_computed_by_choice,
        what="a prompt that is not worth fetching",
        limit_s=BREAK_EVEN_LIMIT_S,
    )
    print(late, seen)  # noqa: T201 (for whoever runs this with -s)
    told = split.cluster.status().miss_tokens
    assert told["deadline"] > 0
    wait_until(
        lambda: split.cluster.status().miss_tokens.get("below_break_even", 0) > 0,
        what="B's report",
    )
