"""The canary: a fixed prompt that an engine computes by itself, so that it can be seen what it
computes before anybody loads a block of it.

    DUE ──its requests are with the scheduler──▶ COMPUTING ──all rounds are read──▶ PROVEN
     ▲                                              │                                  │
     ├──────────── given up, and tried again ───────┤                                  │
     └──────────── the weights change ──────────────┴──────────────────────────────────┘
    REFUSED: this engine cannot compute it, or not to its end; it runs uncached and says why

Two engines of one kind that compute the canary bit for bit alike have one *maker*: what one of them
has stored the other may load. Engines of different makers share only after their NodeStores have
compared the canaries themselves, within what this engine's own numbers differ by when it computes
the same chunk once more (see kvray.core.trust). The rounds:

    FIRST     the canary alone: what counts, and what is stored under the maker's name
    BATCHED   once more, beside another prompt in one batch: what the batch changes
    ALONE     once more alone, only if BATCHED was not bit for bit the same

While an engine is not PROVEN it neither stores nor loads. A canary has a salt of its own and goes
without kvray, so nothing of it is loaded and none of its blocks enters under a user's name.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvray.core.keys import CANARY_CHUNKS
from kvray.engine import versions
from kvray.engine.canary_rank import FLOATS, RankReport, rank_take

logger = logging.getLogger("kvray.engine")

ID_PREFIX = "kvray-canary-"  # of the request ids; an id of vLLM's front ends has no such beginning
CHUNKS = CANARY_CHUNKS
MAX_TRIES = 8  # of a round that is given up under it (paused, aborted); then REFUSED
MAX_STEPS = 1_000  # of a round while nobody else computes: chunked prefill takes a handful


class CanaryState(Enum):
    """See the picture in the module's docstring."""

    DUE = "due"
    COMPUTING = "computing"
    PROVEN = "proven"
    REFUSED = "refused"


class Round(Enum):
    FIRST = "first"
    BATCHED = "batched"
    ALONE = "alone"


_MOVES = {
    CanaryState.DUE: {CanaryState.DUE, CanaryState.COMPUTING, CanaryState.REFUSED},
    CanaryState.COMPUTING: set(CanaryState),
    CanaryState.PROVEN: {CanaryState.DUE, CanaryState.PROVEN},
    CanaryState.REFUSED: {CanaryState.DUE, CanaryState.REFUSED},
}


@dataclass(frozen=True, slots=True)
class CanaryGroup:
    """One cache group. index: vLLM's. dtype: of its numbers, by torch's name without "torch."."""

    index: int
    tokens_per_block: int
    tokens_per_chunk: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What an engine was seen to compute.

    maker: 64 bits, never 0: the class (build, machine, batch limits) in the high half, a digest of
    the canary's bytes over all ranks in the low one. alone, batched: relative errors of the own
    canary computed again. layer_counts: for each cache group in how many pieces a rank's part of a
    chunk is divided.
    """

    maker: int
    alone: float
    batched: float
    layer_counts: tuple[int, ...]


class Canary:
    """In EngineCore, on its thread. why: for people, what stands in its way."""

    def __init__(self, vllm_config: Any, groups: Sequence[CanaryGroup]) -> None:
        self.state = CanaryState.DUE
        self.why = "it has not been computed yet"
        self.proof: Proof | None = None
        self.groups = tuple(groups)
        self._vocabulary = int(vllm_config.model_config.get_vocab_size())
        self._class_facts = {
            "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
            "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
        }
        self._token_count = CHUNKS * max(group.tokens_per_chunk for group in groups) + 1
        self._number = 0  # of the requests so far: each has an id of its own
        self._tries = 0
        self._round = Round.FIRST
        self._asked: dict[str, tuple[Sequence[int], ...] | None] = {}  # id: blocks when it ended
        self._canary_id = ""
        self._first: list[RankReport] = []
        self._batched = 0.0
        if (refusal := self._refusal(vllm_config)) is not None:
            self._move(CanaryState.REFUSED, refusal)

    # ---- what happens

    def weights_change(self) -> None:
        """What was computed so far says nothing of the weights that come."""
        self.proof = None
        self._asked.clear()
        self._tries = 0
        self._round = Round.FIRST
        if self.state is not CanaryState.REFUSED:
            self._move(CanaryState.DUE, "the weights have changed since it was computed")

    def is_own(self, req_id: str) -> bool:
        return req_id.startswith(ID_PREFIX)

    def request_ended(
        self, req_id: str, computed_tokens: int, block_ids: tuple[Sequence[int], ...]
    ) -> None:
        """Before its device blocks are given back. block_ids: for each of vLLM's cache groups."""
        if req_id in self._asked:
            whole = computed_tokens >= self._token_count
            self._asked[req_id] = block_ids if whole or req_id != self._canary_id else ()

    def advance(self, engine_core: Any) -> bool:
        """Between two steps: go on as far as that is possible without one. Whether requests of the
        canary are with the scheduler when it returns, so that steps are wanted.
        """
        if self.state is CanaryState.COMPUTING and None not in self._asked.values():
            self._read(engine_core)
        if self.state is CanaryState.DUE and versions.may_compute(engine_core):
            self._ask(engine_core)
        return self.state is CanaryState.COMPUTING

    def snapshot(self) -> dict[str, Any]:
        """For people. maker: in hex."""
        proof = self.proof
        return {
            "state": self.state.value,
            "why": self.why,
            "maker": None if proof is None else f"{proof.maker:016x}",
            "alone": None if proof is None else proof.alone,
            "batched": None if proof is None else proof.batched,
        }

    # ---- private

    def _refusal(self, vllm_config: Any) -> str | None:
        model = vllm_config.model_config
        if model.runner_type != "generate" or model.is_encoder_decoder:
            return "kvray cannot compute its canary with a model that is no decoder of text"
        if model.max_model_len <= self._token_count:
            return (
                f"its canary has {self._token_count} tokens, and max_model_len is "
                f"{model.max_model_len}: set a larger one, or smaller chunk_tokens"
            )
        odd = sorted({group.dtype for group in self.groups} - set(FLOATS))
        return f"kvray cannot compare caches of {', '.join(odd)}" if odd else None

    def _ask(self, engine_core: Any) -> None:
        canary = self._tokens(0)
        self._canary_id = self._add(engine_core, canary)
        if self._round is Round.BATCHED:
            self._add(engine_core, self._tokens(self._token_count))
        self._move(CanaryState.COMPUTING, "it is being computed")

    def _add(self, engine_core: Any, tokens: list[int]) -> str:
        self._number += 1
        req_id = f"{ID_PREFIX}{self._number}"
        self._asked[req_id] = None
        versions.add_own_request(engine_core, req_id, tokens, salt=req_id)
        return req_id

    def _tokens(self, first: int) -> list[int]:
        """Ordinary ones: a vocabulary keeps its special tokens at its ends."""
        span = max(1, self._vocabulary // 2)
        return [
            self._vocabulary // 4 + (first + i) * 7_919 % span for i in range(self._token_count)
        ]

    def _read(self, engine_core: Any) -> None:
        """All requests of this round have ended."""
        block_ids = self._asked[self._canary_id]
        asked, self._asked = self._asked, {}
        if not block_ids:
            self._again("it was aborted")
            return
        chunks = [self._chunks(group, block_ids[group.index]) for group in self.groups]
        if not all(chunks):
            self._move(CanaryState.REFUSED, "a window of it is smaller than a chunk")
            return
        reports: list[RankReport] = engine_core.model_executor.collective_rpc(
            rank_take,
            args=(chunks, [group.dtype for group in self.groups], self._round is Round.FIRST),
        )
        reports.sort(key=lambda report: report.rank)
        versions.forget_blocks(engine_core, [ids for ids in asked.values() if ids])
        self._end_round(reports)

    def _end_round(self, reports: list[RankReport]) -> None:
        distance = max((report.distance or 0.0) for report in reports)
        if self._round is Round.FIRST:
            self._first = reports
            self._next(Round.BATCHED)
        elif self._round is Round.BATCHED and distance:
            self._batched = distance
            self._next(Round.ALONE)
        else:
            batched = self._batched if self._round is Round.ALONE else 0.0
            self.proof = Proof(
                maker=self._maker(),
                alone=distance,
                batched=max(batched, distance),
                layer_counts=self._first[0].layer_counts,
            )
            self._move(CanaryState.PROVEN, "")

    def _next(self, following: Round) -> None:
        self._round = following
        self._tries = 0
        self._move(CanaryState.DUE, "it is being computed")

    def _again(self, what: str) -> None:
        self._tries += 1
        if self._tries >= MAX_TRIES:
            self._move(CanaryState.REFUSED, f"{what} {MAX_TRIES} times")
        else:
            self._move(CanaryState.DUE, what)

    def _chunks(self, group: CanaryGroup, block_ids: Sequence[int]) -> list[list[int]]:
        """The last whole chunks of the canary that are on the device: CHUNKS of them, or none. A
        window has let go of what lies before it (block 0); where it leaves one chunk, that one
        stands for both.
        """
        blocks_per_chunk = group.tokens_per_chunk // group.tokens_per_block
        whole = (self._token_count - 1) // group.tokens_per_chunk
        chunks = [
            list(block_ids[i * blocks_per_chunk : (i + 1) * blocks_per_chunk])
            for i in range(max(0, whole - CHUNKS), whole)
        ]
        held = [chunk for chunk in chunks if all(chunk)]
        return [held[0], held[-1]] if held else []

    def _maker(self) -> int:
        facts = [self._class_facts, *(report.machine for report in self._first)]
        text = json.dumps(facts, sort_keys=True)
        kind = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        bytes_of_all = b"".join(report.digest for report in self._first)
        low = int.from_bytes(hashlib.blake2b(bytes_of_all, digest_size=4).digest(), "little")
        return (kind or 1) << 32 | low

    def _move(self, state: CanaryState, why: str) -> None:
        assert state in _MOVES[self.state], f"{self.state} cannot become {state}"
        self.state = state
        self.why = why


def prove(canary: Canary, engine_core: Any) -> None:
    """Compute as much of the canary as can be without anybody waiting for it: all of it where the
    engine has no other request, else its requests join those of the next step.
    """
    for _ in range(MAX_STEPS):
        if not canary.advance(engine_core) or versions.has_others(engine_core, canary.is_own):
            return
        versions.step(engine_core)
    logger.warning("kvray: the canary has not ended after %d steps; it goes on", MAX_STEPS)
