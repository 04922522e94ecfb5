"""What the audit costs: hits of an engine whose node audits, beside one whose node does not.

    nodes   A ──stores──▶ node 0 ──fetched──▶ node 1 ──hits──▶ B     audits at the default rate
    off     the same once more, in the same minute: each question is put to both in turn

B has other batch limits than A, so it is another maker: it has to come to trust A by itself, and
what it stores of its own earns the credit for audits of A's blocks. What is asked for again is in
B's own node: a hit as quick as any, on which a cost shows most.
"""

import statistics
import time
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
from tests.engines import Answer, Engine
from tests.prompts import CHUNK_TOKENS, full_chunks

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
    """One B, and what was measured on it."""

    b: Instance
    ttft_ms: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    no_hits: int = 0

    def ask(self, document: list[int]) -> None:
        """The device has forgotten the document. One that is audited is no whole hit."""
        self.b.finish_stores()
        self.b.forget_device()
        answer = self.b.ask(document)
        self.answers.append(answer)
        if answer.cached_tokens < full_chunks(len(document)) - CHUNK_TOKENS:
            self.no_hits += 1
        else:
            self.ttft_ms.append(answer.ttft_ms)


def measure_cost(
    stage: Scene,
    documents: Sequence[list[int]],
    controls: Sequence[Answer],
    filler: Sequence[list[int]],
    *,
    a: Engine,
    twin: Engine,
    rounds: int,
) -> Cost:
    """a, twin: have stored the documents, on node 0 of nodes and of off. rounds: questions of
    either B.
    """
    before = audited_chunks(stage.nodes)
    b, b_off = (
        stage.start(nodes, 1, max_num_batched_tokens=OTHER_BATCH_TOKENS)
        for nodes in (stage.nodes, stage.off)
    )
    with ending(b):
        begun_s = time.monotonic()
        seen = wait_verdict(stage.nodes, b, a)
        trusted_s = time.monotonic() - begun_s
        with ending(b_off):
            wait_verdict(stage.off, b_off, twin)
            pairs = ((b, stage.nodes, [b_off]), (b_off, stage.off, [b]))
            on, off = sides = [_Side(Instance(Mode.P2P, 1, *pair)) for pair in pairs]
            first = [ask_all(side.b.engine, documents) for side in sides]
            for number in range(rounds):
                for prompt in filler[number::rounds]:
                    for side in sides:
                        side.b.ask(prompt)
                for side in sides if number % 2 else reversed(sides):
                    side.ask(documents[number % len(documents)])
            assert not audited_chunks(stage.off), "a cluster without audits has made one"
        counters = counters_of(b)
        audits = audited_chunks(stage.nodes) - before
    missed = tokens_by_reason([counters])
    asked = [controls[number % len(documents)] for number in range(rounds)]
    return Cost(
        trusted_after_s=round(trusted_s, 3) if seen == EQUAL else None,
        ttft_ms={
            name: round(statistics.median(side.ttft_ms or [0.0]), 2)
            for name, side in (("on", on), ("off", off))
        },
        no_hits=on.no_hits + off.no_hits,
        audited_chunks=audits,
        missed=missed,
        extra_prefill_share=missed.get(MissReason.AUDITED, 0) / sum(missed.values()),
        loaded_tokens=loaded_tokens(counters),
        requests=2 * (len(documents) + len(filler) + rounds),
        wrong_answers=sum(wrong(answers, controls) for answers in first)
        + sum(wrong(side.answers, asked) for side in sides),
    )
