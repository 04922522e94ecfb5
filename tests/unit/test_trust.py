"""Whose blocks count: NodeCores whose engines compute alike, nearly alike, or something else.

Goal: no block of a maker that was not seen to compute the same is ever a hit, is fetched, or is
told as coming; and one that was seen to is one, soon.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from kvray.core.commands import CompareBlocks
from kvray.core.ids import BlockKey, Maker
from kvray.core.keys import canary_keys
from kvray.core.messages import Grant, NoiseLevels
from kvray.core.reasons import MissReason
from kvray.core.trust import (
    COMPARE_DEADLINE_MS,
    DENIED_MS,
    MAX_PAIRS,
    MAX_REST_MS,
    TrustState,
)
from tests.nodes import Cluster, Engine
from tests.shells import BLOCK_BYTES, key

A, B, C = (key(n) for n in range(1, 4))
AMX, AVX = 1 << 32, 2 << 32  # classes
NOISY = NoiseLevels(alone=0.0, batched=0.01)
Numbers = "np.ndarray[Any, np.dtype[np.float32]]"


def canary(seed: int = 0, *, error: float = 0.0, chunks: Iterable[int] = (0, 1)) -> Any:
    """Two chunks of numbers; with a relative error in each piece of some of them."""
    random = np.random.default_rng(seed)
    shape = (2, BLOCK_BYTES // 4)
    numbers, noise = random.standard_normal(shape), np.random.default_rng(9).standard_normal(shape)
    for chunk in chunks:
        numbers[chunk] += error * noise[chunk]
    return numbers.astype(np.float32)


def pair(
    mine: int = AMX | 1,
    other: int = AVX | 1,
    *,
    noise: NoiseLevels = NOISY,
    contents: tuple[Any, Any] | None = None,
) -> tuple[Cluster, Engine, Engine]:
    """Nodes a and b; a's engine is of maker `other` and has stored A and B, b's is of `mine`."""
    cluster = Cluster.of("a", "b", requires_proof=True)
    there = Engine(cluster["a"], maker=other, noise=noise)
    here = Engine(cluster["b"], maker=mine, noise=noise)
    for engine, content in zip((there, here), contents or (), strict=False):
        engine.store_canary(content)
    there.store(A, B)
    cluster.pass_ms(1_000)
    return cluster, here, there


def states(engine: Engine) -> dict[str, str]:
    pairs = engine.node.core.snapshot()["trust"]["pairs"]
    return {row["other"]: row["state"] for row in pairs}


def state(engine: Engine, other: Engine) -> TrustState:
    return TrustState(states(engine)[f"{other.maker:016x}"])


def look(engine: Engine, *keys: BlockKey) -> str:
    op = engine.lookup(list(keys))
    engine.node.cluster.settle()
    return engine.answer(op)


def cause(engine: Engine, *keys: BlockKey) -> MissReason:
    op = engine.lookup(list(keys))
    engine.node.cluster.settle()
    return engine.cause(op)


# -- verdicts -------------------------------------------------------------------------------------


def test_what_a_like_engine_has_computed_is_a_hit_from_the_first_question() -> None:
    _, here, _ = pair(AMX | 7, AMX | 7)
    assert look(here, A, B) == "hh"


def test_blocks_of_another_maker_count_once_the_canaries_were_seen_to_be_alike() -> None:
    cluster, here, there = pair(contents=(canary(), canary(error=0.01)))
    assert state(here, there) is TrustState.EQUAL
    assert look(here, A, B) == "hh"
    assert here.node.core.snapshot()["trust"]["canaries_equal"] == 1
    assert state(there, here) is TrustState.EQUAL, "each node has looked for itself"
    here.store(C)
    cluster.pass_ms(500)
    assert look(there, A, B, C) == "hhh"


def test_blocks_of_a_maker_that_computes_something_else_are_never_fetched() -> None:
    cluster, here, there = pair(contents=(canary(0), canary(1)))
    assert state(here, there) is TrustState.DIFFERENT
    assert cause(here, A, B) is MissReason.UNTRUSTED
    cluster.pass_ms(60_000)
    assert cause(here, A, B) is MissReason.UNTRUSTED
    assert here.node.core.snapshot()["fetch"]["fetched_blocks"] == 2, "the canary, and nothing else"
    lines = [line.text for line in here.node.lines if line.warning and "different" in line.text]
    assert len(lines) == 1
    assert f"{there.maker:016x}" in lines[0]
    assert "layers 0, 1, 2, 3" in lines[0]


def test_the_canary_decides_before_a_block_is_asked_for() -> None:
    """The directory names the makers there are: no request waits for a comparison."""
    _, here, there = pair(contents=(canary(), canary()))
    assert here.node.core.snapshot()["lookups"]["lookups"] == 0
    assert state(here, there) is TrustState.EQUAL


def test_without_a_canary_nothing_counts_and_it_is_sought_until_there_is_one() -> None:
    cluster, here, there = pair()
    here.store_canary(canary())
    assert cause(here, A) is MissReason.UNTRUSTED
    cluster.pass_ms(30_000)
    assert cause(here, A) is MissReason.UNTRUSTED
    there.store_canary(canary())
    cluster.pass_ms(MAX_REST_MS + 1_000)
    assert look(here, A) == "h"


def test_like_machines_that_are_exact_must_agree_to_the_bit() -> None:
    contents = canary(), canary(error=1e-6)
    _, here, there = pair(AMX | 1, AMX | 2, contents=contents)
    assert state(here, there) is TrustState.DIFFERENT
    _, here, there = pair(AMX | 1, AVX | 2, contents=contents)
    assert state(here, there) is TrustState.EQUAL, "of another class it is rounding"
    own_noise = NoiseLevels(alone=1e-5, batched=0.01)
    _, here, there = pair(AMX | 1, AMX | 2, contents=contents, noise=own_noise)
    assert state(here, there) is TrustState.EQUAL, "and it is if a machine is not exact itself"


def test_one_chunk_that_differs_is_no_verdict_and_no_trust() -> None:
    contents = canary(), canary(error=2.0, chunks=[1])
    cluster, here, there = pair(contents=contents)
    cluster.pass_ms(5_000)
    assert state(here, there) in (TrustState.UNSEEN, TrustState.FETCHING)
    assert cause(here, A) is MissReason.UNTRUSTED
    assert not [line for line in here.node.lines if line.warning and "different" in line.text]


def test_a_canary_in_another_arrangement_is_seen_whatever_the_noise() -> None:
    content = canary()
    packed = content.reshape(2, 4, -1, 16).transpose(0, 1, 3, 2).reshape(2, -1)
    loud = NoiseLevels(alone=0.5, batched=1.0)
    _, here, there = pair(contents=(content, np.ascontiguousarray(packed)), noise=loud)
    assert state(here, there) is TrustState.DIFFERENT


# -- where trust is asked -------------------------------------------------------------------------


def two_on_one_node(*contents: Any) -> tuple[Cluster, Engine, Engine]:
    cluster = Cluster.of("a", requires_proof=True)
    one = Engine(cluster["a"], maker=AMX | 1, noise=NOISY)
    two = Engine(cluster["a"], maker=AVX | 1, noise=NOISY)
    for engine, content in zip((one, two), contents, strict=False):
        engine.store_canary(content)
    cluster.pass_ms(1_000)
    return cluster, one, two


def test_what_is_here_by_another_maker_is_no_hit_until_it_is_trusted() -> None:
    cluster, one, two = two_on_one_node(canary())
    one.store(A, B)
    assert look(one, A, B) == "hh"
    assert cause(two, A, B) is MissReason.UNTRUSTED
    two.store_canary(canary())
    cluster.pass_ms(MAX_REST_MS + 1_000)
    assert look(two, A, B) == "hh"


def test_what_another_maker_is_writing_is_not_waited_for() -> None:
    _, one, two = two_on_one_node()
    one.reserve(A)
    op = two.lookup([A])
    assert two.answer(op) == "m"
    assert two.cause(op) is MissReason.UNTRUSTED


def test_what_one_waiter_trusts_is_neither_coming_nor_there_for_another_who_does_not() -> None:
    cluster = Cluster.of("a", "b", requires_proof=True)
    Engine(cluster["a"], maker=AMX | 1).store(A)
    like = Engine(cluster["b"], maker=AMX | 1)
    unlike = Engine(cluster["b"], maker=AVX | 1)
    cluster.pass_ms(500)
    cluster.link_is_up = False  # so that the read begins and does not end
    ops = like.lookup([A]), unlike.lookup([A])
    cluster.settle()
    assert like.answer(ops[0]) == "c"
    assert unlike.answer(ops[1]) == "w"
    cluster.link_is_up = True
    cluster.settle()
    assert like.answer(ops[0]) == "h"
    assert unlike.answer(ops[1]) == "m"
    assert unlike.cause(ops[1]) is MissReason.UNTRUSTED


def test_a_source_that_is_trusted_is_read_whatever_others_have() -> None:
    cluster = Cluster.of("a", "b", "c", requires_proof=True)
    Engine(cluster["b"], maker=AMX | 1).store(A)
    cluster.pass_ms(500)
    Engine(cluster["a"], maker=AVX | 1).store(A)  # younger, so it is named first
    here = Engine(cluster["c"], maker=AMX | 1)
    cluster.pass_ms(500)
    assert look(here, A) == "h"


def test_what_an_engine_can_not_use_makes_way_for_what_it_has_computed() -> None:
    cluster, one, two = two_on_one_node(canary(0), canary(1))
    one.store(A)
    assert cause(two, A) is MissReason.UNTRUSTED
    assert list(two.reserve(A)) == [Grant.GRANTED]
    two.write(A)
    two.commit(A)
    assert look(two, A) == "h"
    assert cause(one, A) is MissReason.UNTRUSTED
    cluster.pass_ms(500)


def test_what_is_not_judged_yet_or_pinned_does_not_make_way() -> None:
    cluster, one, two = two_on_one_node(canary(0), canary(1))
    one.store(A)
    one.lookup([A])
    assert list(two.reserve(A)) == [Grant.PRESENT], "it is being read"
    three = Engine(one.node, maker=AVX | 9)
    one.store(B)
    assert list(three.reserve(B)) == [Grant.PRESENT], "its canary may be about to come"
    cluster.pass_ms(10_000)
    assert list(three.reserve(B)) == [Grant.GRANTED], "it has not come"


def test_an_engine_that_has_not_proven_itself_has_no_cache() -> None:
    cluster = Cluster.of("a", requires_proof=True)
    engine = Engine(cluster["a"], maker=0)
    assert list(engine.reserve(A)) == [Grant.FULL]
    assert cause(engine, A, B) is MissReason.UNPROVEN
    engine.introduce(maker=AMX | 1)
    engine.store(A)
    assert look(engine, A) == "h"
    assert cluster["a"].core.snapshot()["lookups"]["misses"] == {"unproven": 2}


def test_without_the_rule_engines_without_a_maker_share_as_ever() -> None:
    cluster = Cluster.of("a", "b", requires_proof=False)
    Engine(cluster["a"], maker=0).store(A)
    here = Engine(cluster["b"], maker=0)
    cluster.pass_ms(500)
    assert look(here, A) == "h"


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_restart_trusts_nobody_and_looks_again() -> None:
    cluster, here, there = pair(contents=(canary(), canary()))
    assert state(here, there) is TrustState.EQUAL
    node = cluster.start("b", cluster.kill("b"))
    again = Engine(node, maker=here.maker, noise=NOISY)
    assert cause(again, A) is MissReason.DIRECTORY_SILENT
    cluster.pass_ms(2_000)
    assert state(again, there) is TrustState.EQUAL
    assert look(again, A) == "h"


def test_a_slot_that_was_rewritten_while_it_was_compared_gives_no_verdict() -> None:
    cluster = Cluster.of("a", requires_proof=True)
    cluster.compares = False
    one = Engine(cluster["a"], maker=AMX | 1, noise=NOISY)
    two = Engine(cluster["a"], maker=AVX | 1, noise=NOISY)
    one.store_canary(canary())
    two.store_canary(canary())
    cluster.pass_ms(500)
    node = cluster["a"]
    (number,) = [n for n, c in node.comparisons.items() if c.pairs[0].mine.maker == one.maker]
    slot = node.comparisons[number].pairs[1].other.slot
    node.slab.headers[slot]["generation"] += 1  # whatever the core believes
    node.end_comparison(number)
    node.slab.headers[slot]["generation"] -= 1
    assert state(one, two) is TrustState.UNSEEN
    one.store(A)
    assert cause(two, A) is MissReason.UNTRUSTED


def test_both_canaries_are_pinned_while_they_are_compared_and_no_longer() -> None:
    cluster = Cluster.of("a", requires_proof=True)
    cluster.compares = False
    one = Engine(cluster["a"], maker=AMX | 1, noise=NOISY)
    two = Engine(cluster["a"], maker=AVX | 1, noise=NOISY)
    one.store_canary(canary())
    two.store_canary(canary())
    cluster.pass_ms(500)
    node = cluster["a"]
    node.do(node.core.clear(cluster.now_ms))
    assert node.core.snapshot()["store"]["ready"] == 4
    cluster.pass_ms(COMPARE_DEADLINE_MS)
    late = [node.compare(n) for n in list(node.comparisons)][:2]
    node.do(node.core.clear(cluster.now_ms))
    assert node.core.snapshot()["store"]["pinned"] == 0
    for done in late:
        node.do(node.core.on_compared(done.comparison_id, done.verdicts, now_ms=cluster.now_ms))
    assert set(states(one).values()) <= {"unseen", "fetching"}, "a verdict that came too late"


def test_each_side_of_a_pair_is_the_maker_it_is_said_to_be() -> None:
    cluster = Cluster.of("a", requires_proof=True)
    cluster.compares = False
    one = Engine(cluster["a"], maker=AMX | 1, noise=NOISY)
    two = Engine(cluster["a"], maker=AVX | 1, noise=NoiseLevels(alone=0.001, batched=0.02))
    one.store_canary(canary(0))
    two.store_canary(canary(0))
    cluster.pass_ms(500)
    asked: list[CompareBlocks] = list(cluster["a"].comparisons.values())
    assert {(c.pairs[0].mine.maker, c.pairs[0].other.maker) for c in asked} == {
        (one.maker, two.maker),
        (two.maker, one.maker),
    }
    for comparison in asked:
        by_mine = comparison.pairs[0].mine.maker
        noise = (one if by_mine == one.maker else two).noise
        assert comparison.tolerance.first == pytest.approx(8 * noise.batched)
        for chunk, compared in enumerate(comparison.pairs):
            for place in (compared.mine, compared.other):
                keys = canary_keys(one.namespace, place.maker, 0)
                assert place.key == keys[chunk], "another chunk, or another's"


def test_a_maker_that_was_found_different_is_looked_at_again_after_a_day() -> None:
    cluster, here, there = pair(contents=(canary(0), canary(1)))
    cluster.kill("a")
    core = here.node.core
    later_ms = cluster.now_ms + DENIED_MS
    here.node.do(core.on_tick(later_ms))
    assert f"{there.maker:016x}" not in states(here)


def test_pairs_are_bounded_and_the_oldest_is_forgotten_with_its_trust() -> None:
    cluster, here, there = pair(contents=(canary(), canary()))
    assert state(here, there) is TrustState.EQUAL
    makers = [(here.namespace, Maker(AVX | n)) for n in range(10, MAX_PAIRS + 10)]
    trust = here.node.core._trust  # noqa: SLF001 - no message names so many
    for start in range(0, len(makers), 64):
        trust.hear(makers[start : start + 64])
        here.node.tick()
    assert len(states(here)) == MAX_PAIRS
    assert f"{there.maker:016x}" not in states(here)
    assert cause(here, A) is MissReason.UNTRUSTED
    cluster.pass_ms(60_000)
    assert look(here, A) == "h", "it was met, and looked at again"
