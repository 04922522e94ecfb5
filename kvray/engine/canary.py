"""The canary: a fixed prompt that an engine computes by itself, so that it can be seen what it
computes before anybody loads a block of it. What its rounds show is core.canary's to say.

While an engine is not PROVEN it neither stores nor loads. A canary has a salt of its own and goes
without kvray, so nothing of it is loaded and none of its blocks enters under a user's name.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvray.core.canary import BlockIds, CanaryRounds, CanaryState, Proof, Round
from kvray.core.keys import CANARY_CHUNKS
from kvray.engine import versions
from kvray.engine.canary_rank import FLOATS, RankReport, rank_take

logger = logging.getLogger("kvray.engine")

ID_PREFIX = "kvray-canary-"  # of the request ids; an id of vLLM's front ends has no such beginning
MAX_STEPS = 1_000  # of a round while nobody else computes: chunked prefill takes a handful


@dataclass(frozen=True, slots=True)
class CanaryGroup:
    """One cache group. index: vLLM's. dtype: of its numbers, by torch's name without "torch."."""

    index: int
    tokens_per_block: int
    tokens_per_chunk: int
    dtype: str


class Canary:
    """In EngineCore, on its thread."""

    def __init__(self, vllm_config: Any, groups: Sequence[CanaryGroup]) -> None:
        self.groups = tuple(groups)
        self._rounds = CanaryRounds(
            {
                "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
                "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
            }
        )
        self._vocabulary = int(vllm_config.model_config.get_vocab_size())
        self._token_count = CANARY_CHUNKS * max(group.tokens_per_chunk for group in groups) + 1
        self._number = 0  # of the requests so far: each has an id of its own
        if (refusal := self._refusal(vllm_config)) is not None:
            self._rounds.refuse(refusal)

    @property
    def refusal(self) -> str | None:
        """Why it will never be computed."""
        return self._rounds.why if self._rounds.state is CanaryState.REFUSED else None

    @property
    def proof(self) -> Proof | None:
        return self._rounds.proof

    # ---- what happens

    def weights_change(self) -> None:
        """What was computed so far says nothing of the weights that come."""
        self._rounds.weights_change()

    def is_own(self, req_id: str) -> bool:
        return req_id.startswith(ID_PREFIX)

    def request_ended(self, req_id: str, computed_tokens: int, block_ids: BlockIds) -> None:
        """Before its device blocks are given back. block_ids: for each of vLLM's cache groups."""
        is_whole = computed_tokens >= self._token_count
        self._rounds.request_ended(req_id, block_ids, is_whole=is_whole)

    def advance(self, engine_core: Any) -> bool:
        """Between two steps: go on as far as that is possible without one. Whether requests of the
        canary are with the scheduler when it returns, so that steps are wanted.
        """
        if self._rounds.is_readable:
            self._read(engine_core)
        if self._rounds.state is CanaryState.DUE and versions.may_compute(engine_core):
            self._ask(engine_core)
        return self._rounds.state is CanaryState.COMPUTING

    def snapshot(self) -> dict[str, Any]:
        """For people. maker: in hex."""
        proof = self.proof
        return {
            "state": self._rounds.state.value,
            "why": self._rounds.why,
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
        canary_id = self._add(engine_core, self._tokens(0))
        beside = []
        if self._rounds.round is Round.BATCHED:
            beside.append(self._add(engine_core, self._tokens(self._token_count)))
        self._rounds.begin(canary_id, beside)

    def _add(self, engine_core: Any, tokens: list[int]) -> str:
        self._number += 1
        req_id = f"{ID_PREFIX}{self._number}"
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
        taken = self._rounds.take_blocks()
        if taken is None:
            return
        block_ids, of_all = taken
        chunks = [self._chunks(group, block_ids[group.index]) for group in self.groups]
        if not all(chunks):
            self._rounds.refuse("a window of it is smaller than a chunk")
            return
        dtypes = [group.dtype for group in self.groups]
        is_first = self._rounds.round is Round.FIRST
        reports: list[RankReport] = engine_core.model_executor.collective_rpc(
            rank_take, args=(chunks, dtypes, is_first)
        )
        versions.forget_blocks(engine_core, of_all)
        self._rounds.read([report.saw for report in sorted(reports, key=lambda one: one.rank)])

    def _chunks(self, group: CanaryGroup, block_ids: Sequence[int]) -> list[list[int]]:
        """The last whole chunks of the canary that are on the device: CANARY_CHUNKS of them, or
        none. A window has let go of what lies before it (block 0); where it leaves one chunk, that
        one stands for both.
        """
        blocks_per_chunk = group.tokens_per_chunk // group.tokens_per_block
        whole = (self._token_count - 1) // group.tokens_per_chunk
        chunks = [
            list(block_ids[i * blocks_per_chunk : (i + 1) * blocks_per_chunk])
            for i in range(max(0, whole - CANARY_CHUNKS), whole)
        ]
        held = [chunk for chunk in chunks if all(chunk)]
        return [held[0], held[-1]] if held else []


def prove(canary: Canary, engine_core: Any) -> None:
    """Compute as much of the canary as can be without anybody waiting for it: all of it where the
    engine has no other request, else its requests join those of the next step.
    """
    for _ in range(MAX_STEPS):
        if not canary.advance(engine_core) or versions.has_others(engine_core, canary.is_own):
            return
        versions.step(engine_core)
    logger.warning("kvray: the canary has not ended after %d steps; it goes on", MAX_STEPS)
