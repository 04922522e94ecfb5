"""The canary of one engine: which round of it is due, and what its rounds have shown.

    DUE ──its requests are with the scheduler──▶ COMPUTING ──all rounds are read──▶ PROVEN
     ▲                                              │                                  │
     ├──────────── given up, and tried again ───────┤                                  │
     └──────────── the weights change ──────────────┴──────────────────────────────────┘
    REFUSED: this engine cannot compute it, or not to its end; it runs uncached and says why

The rounds:

    FIRST     the canary alone: what counts, and what is stored under the maker's name
    BATCHED   once more, beside another prompt in one batch: what the batch changes
    ALONE     once more alone, only if BATCHED was not bit for bit the same

Two engines of one kind that compute the canary bit for bit alike have one *maker*: what one of them
has stored the other may load. Engines of different makers share only after their NodeStores have
compared the canaries themselves, within what this engine's own numbers differ by when it computes
the same chunk once more (see core.trust).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any

from kvray.core.ids import Maker

MAX_TRIES = 8  # of a round that is given up under it (paused, aborted); then REFUSED

BlockIds = tuple[Sequence[int], ...]  # on the device, for each of the engine's cache groups


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
    CanaryState.COMPUTING: set(CanaryState) - {CanaryState.COMPUTING},
    CanaryState.PROVEN: {CanaryState.DUE},
    CanaryState.REFUSED: {CanaryState.REFUSED},
}


@dataclass(frozen=True, slots=True)
class RankSaw:
    """One rank's part of a round. digest: of the bytes of all chunks. distance: the largest
    relative error of a layer against the FIRST round. layer_counts: for each cache group in how
    many pieces of equal size a chunk is divided. machine: what the rank computes with, plain data.
    """

    digest: bytes
    distance: float
    layer_counts: tuple[int, ...]
    machine: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Proof:
    """What an engine was seen to compute.

    maker: 64 bits, never 0: the class (build, machine, batch limits) in the high half, a digest of
    the canary's bytes over all ranks in the low one. alone, batched: relative errors of the own
    canary computed again. layer_counts: of the first rank, see RankSaw.
    """

    maker: Maker
    alone: float
    batched: float
    layer_counts: tuple[int, ...]


class CanaryRounds:
    """why: for people, what stands in its way. class_facts: what else than the machines decides
    how an engine rounds.
    """

    def __init__(self, class_facts: Mapping[str, Any]) -> None:
        self.state = CanaryState.DUE
        self.why = "it has not been computed yet"
        self.proof: Proof | None = None
        self.round = Round.FIRST
        self._class_facts = class_facts
        self._tries = 0
        self._canary_id = ""
        self._blocks: dict[str, BlockIds | None] = {}  # of this round's requests; None: not ended
        self._first: Sequence[RankSaw] = ()
        self._batched = 0.0

    def weights_change(self) -> None:
        """What was computed so far says nothing of the weights that come."""
        self.proof = None
        self._blocks.clear()
        self._tries = 0
        self.round = Round.FIRST
        if self.state is not CanaryState.REFUSED:
            self._move(CanaryState.DUE, "the weights have changed since it was computed")

    def begin(self, canary_id: str, beside: Iterable[str]) -> None:
        """These requests are with the scheduler: the canary's, and what is computed beside it."""
        self._canary_id = canary_id
        self._blocks = dict.fromkeys((canary_id, *beside))
        self._move(CanaryState.COMPUTING, "it is being computed")

    def request_ended(self, req_id: str, block_ids: BlockIds, *, is_whole: bool) -> None:
        """is_whole: all its tokens were computed. Requests of an older round count no more."""
        if req_id in self._blocks:
            self._blocks[req_id] = block_ids if is_whole or req_id != self._canary_id else ()

    @property
    def is_readable(self) -> bool:
        """All requests of this round have ended."""
        return self.state is CanaryState.COMPUTING and None not in self._blocks.values()

    def take_blocks(self) -> tuple[BlockIds, list[BlockIds]] | None:
        """Of a readable round: the canary's device blocks, and those of all its requests. None if
        it was given up, and is due once more.
        """
        assert self.is_readable
        taken, self._blocks = self._blocks, {}
        canary = taken[self._canary_id]
        if canary:
            return canary, [blocks for blocks in taken.values() if blocks]
        self._tries += 1
        if self._tries >= MAX_TRIES:
            self.refuse(f"it was aborted {MAX_TRIES} times")
        else:
            self._move(CanaryState.DUE, "it was aborted")
        return None

    def read(self, ranks: Sequence[RankSaw]) -> None:
        """What all ranks saw in this round, by rank."""
        distance = max(rank.distance for rank in ranks)
        if self.round is Round.FIRST:
            self._first = ranks
            self._next(Round.BATCHED)
        elif self.round is Round.BATCHED and distance:
            self._batched = distance
            self._next(Round.ALONE)
        else:
            batched = self._batched if self.round is Round.ALONE else 0.0
            self.proof = Proof(
                maker=self._maker(),
                alone=distance,
                batched=max(batched, distance),
                layer_counts=self._first[0].layer_counts,
            )
            self._move(CanaryState.PROVEN, "")

    def refuse(self, why: str) -> None:
        self._move(CanaryState.REFUSED, why)

    def _next(self, following: Round) -> None:
        self.round = following
        self._tries = 0
        self._move(CanaryState.DUE, "it is being computed")

    def _maker(self) -> Maker:
        facts = [self._class_facts, *(dict(rank.machine) for rank in self._first)]
        kind = _digest_of_32_bits(json.dumps(facts, sort_keys=True).encode())
        low = _digest_of_32_bits(b"".join(rank.digest for rank in self._first))
        return Maker((kind or 1) << 32 | low)

    def _move(self, state: CanaryState, why: str) -> None:
        assert state in _MOVES[self.state], f"{self.state} cannot become {state}"
        self.state = state
        self.why = why


def _digest_of_32_bits(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "little")
