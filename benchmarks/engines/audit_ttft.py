"""What the audit costs: hits of an engine whose node audits, beside one whose node does not.

    nodes   A ──stores──▶ node 0 ──fetched──▶ node 1 ──hits──▶ B     audits at the default rate
    off     the same once more, in the same minute: each question is put to both in turn

B has other batch limits than A, so it is another maker: it has to come to trust A by itself, and
what it stores of its own earns the credit for audits of A's blocks. What is asked for again is in
B's own node: a hit as quick as any, on which a cost shows most.

Two engines that are alike differ by some percent for as long as they live (where their memory
lies), which is more than an audit costs. So there are two of B, and at half time they change
places: each is attached to the other cluster, and half of either median is of either engine.
"""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.engine_world import Instance, Mode
from benchmarks.engines.audit_world import (
    EQUAL,
    Scene,
    ask_all,
    audited_chunks,
    counters_of,
    ending,
    loaded_tokens,
    wait_verdict,
    wrong,
)
from kvray.core.reasons import MissReason, tokens_by_reason
from tests import in_engine
from tests.engines import Answer, Engine
from tests.prompts import CHUNK_TOKENS, full_chunks
from tests.ray_nodes import Nodes

Documents = Sequence[list[int]]

OTHER_BATCH_TOKENS = 2_048  # of a step; an engine with other limits is another maker


@dataclass(frozen=True, slots=True)
class Cost:
    """trusted_after_s: from B's ready() to the verdict on A; None if they are not seen as equal.
    ttft_ms: medians of hits; 0 where there was none. no_hits: questions that were none, since an
    answer came too late, say. missed: tokens that B with audits has computed, by the reason.
    extra_prefill_share: of all of them, what was told as a miss for an audit.
    """

    trusted_after_s: float | None
    ttft_ms: dict[str, float]
    no_hits: int
    audited_chunks: int
    missed: dict[str, int]
    extra_prefill_share: float
    loaded_tokens: int
    requests: int
    wrong_answers: int

    @property
    def ttft_ratio(self) -> float | None:
        """None where it cannot be had."""
        on_ms, off_ms = self.ttft_ms["on"], self.ttft_ms["off"]
        return round(on_ms / off_ms, 4) if on_ms and off_ms else None


@dataclass
class _Side:
    """One cluster's node 1, whichever B is attached there, and what was measured on it."""

    nodes: Nodes
    ttft_ms: list[float] = field(default_factory=list)
    no_hits: int = 0
    requests: int = 0
    wrong_answers: int = 0
    counters: Counter[str] = field(default_factory=Counter)

    def ask(self, b: Instance, document: list[int], control: Answer) -> None:
        """The device has forgotten the document. One that is audited is no whole hit."""
        b.finish_stores()
        b.forget_device()
        answer = b.ask(document)
        self._note([answer], [control])
        if answer.cached_tokens < full_chunks(len(document)) - CHUNK_TOKENS:
            self.no_hits += 1
        else:
            self.ttft_ms.append(answer.ttft_ms)

    def ask_first(self, b: Engine, documents: Documents, controls: Sequence[Answer]) -> None:
        """All of them, which may be on A's node only."""
        assert b.reset_prefix_cache()
        self._note(ask_all(b, documents), controls)

    def ask_filler(self, b: Instance, prompt: list[int]) -> None:
        b.ask(prompt)
        self.requests += 1

    def attach(self, b: Engine, a: Engine) -> tuple[float, str | None]:
        """Seconds from the attach to the verdict on A, and the verdict."""
        settings = self.nodes.cluster.engine_settings() | {"node_id": self.nodes.node_ids[1]}
        b.call(in_engine.attach, settings)
        begun_s = time.monotonic()
        seen = wait_verdict(self.nodes, b, a)
        return time.monotonic() - begun_s, seen

    def detach(self, b: Engine) -> None:
        self.counters.update(counters_of(b))
        b.call(in_engine.detach)

    def _note(self, answers: Sequence[Answer], controls: Sequence[Answer]) -> None:
        self.requests += len(answers)
        self.wrong_answers += wrong(answers, controls)


def measure_cost(
    stage: Scene,
    documents: Documents,
    controls: Sequence[Answer],
    filler: Documents,
    *,
    a: Engine,
    twin: Engine,
    rounds: int,
) -> Cost:
    """a, twin: have stored the documents, on node 0 of nodes and of off. rounds: questions on
    either side.
    """
    before = audited_chunks(stage.nodes)
    pair = [
        stage.start(
            None,
            max_num_batched_tokens=OTHER_BATCH_TOKENS,
            environment={"RAY_ADDRESS": stage.nodes.ray_cluster.address},
        )
        for _ in range(2)
    ]
    on, off = sides = _Side(stage.nodes), _Side(stage.off)
    halves = [range(rounds // 2), range(rounds // 2, rounds)]
    verdicts = []
    with ending(*pair):
        for half, engines in zip(halves, (pair, pair[::-1]), strict=True):
            seen = [
                side.attach(b, other)
                for side, b, other in zip(sides, engines, (a, twin), strict=True)
            ]
            verdicts.append(seen[0])
            instances = [
                Instance(Mode.P2P, 1, b, side.nodes, [other])
                for b, side, other in zip(engines, sides, engines[::-1], strict=True)
            ]
            for side, b in zip(sides, engines, strict=True):
                side.ask_first(b, documents, controls)
            both = list(zip(sides, instances, strict=True))
            for number in half:
                for prompt in filler[number::rounds]:
                    for side, instance in both:
                        side.ask_filler(instance, prompt)
                which = number % len(documents)
                for side, instance in both if number % 2 else both[::-1]:
                    side.ask(instance, documents[which], controls[which])
            for side, b in zip(sides, engines, strict=True):
                side.detach(b)
    assert not audited_chunks(stage.off), "a cluster without audits has made one"
    missed = tokens_by_reason([on.counters])
    trusted_s, seen_first = verdicts[0]
    return Cost(
        trusted_after_s=round(trusted_s, 3) if seen_first == EQUAL else None,
        ttft_ms={
            name: round(statistics.median(side.ttft_ms or [0.0]), 2)
            for name, side in (("on", on), ("off", off))
        },
        no_hits=on.no_hits + off.no_hits,
        audited_chunks=audited_chunks(stage.nodes) - before,
        missed=missed,
        extra_prefill_share=missed.get(MissReason.AUDITED, 0) / sum(missed.values()),
        loaded_tokens=loaded_tokens(on.counters),
        requests=on.requests + off.requests,
        wrong_answers=on.wrong_answers + off.wrong_answers,
    )
