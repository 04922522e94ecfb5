"""In EngineCore: where each prompt's tokens came from, and why the others had to be computed.

    prompt  [ device | local, peer ..... | computed, for one reason ..... | tail ]
            its own    loaded by kvray     from the first miss on           no full chunk

Every prompt token of every request is counted once: as a hit of one source, or as computed for one
reason (core.reasons). A preempted request is not counted again. What is being loaded counts when
the load has ended: as hits, or as computed, if it failed.
"""

from dataclasses import dataclass

from kvray.core.reasons import COMPUTED, HIT_PREFIX, HIT_SOURCES, MISS_PREFIX, MissReason
from kvray.node.client import Ticket

NO_SUMS = ("longest_wait_ms",)


@dataclass(slots=True)
class Prompt:
    """What is known of one request's prompt. why: the reason for all of it, if no ticket says more.
    local_tokens, peer_tokens: of a load that has not ended.
    """

    device_tokens: int = 0  # as the scheduler said last
    peer_chunk_tokens: int = 0  # of the chunks of its last load, those from peers
    why: MissReason | None = None
    counted: bool = False
    local_tokens: int = 0
    peer_tokens: int = 0

    @property
    def loading_tokens(self) -> int:
        return self.local_tokens + self.peer_tokens


class TokenCounts:
    """Adds to the counters of one engine. chunk_tokens: of the smallest chunk."""

    def __init__(self, counters: dict[str, int], *, chunk_tokens: int) -> None:
        self._counters = counters
        self._chunk_tokens = chunk_tokens
        self._said: dict[str, int] = {}
        self._fresh: dict[str, int] = {}
        hits = [HIT_PREFIX + source for source in HIT_SOURCES]
        counters |= dict.fromkeys((*hits, COMPUTED), 0)

    def admitted(
        self, prompt: Prompt, *, prompt_tokens: int, external_tokens: int, reason: MissReason
    ) -> None:
        """The request has found a place on the device, and vLLM has asked kvray to load so much.
        reason: of what nobody has, up to the last full chunk.
        """
        if prompt.counted:
            return
        prompt.counted = True
        prompt.peer_tokens = min(prompt.peer_chunk_tokens, external_tokens)
        prompt.local_tokens = external_tokens - prompt.peer_tokens
        had_tokens = min(prompt_tokens, prompt.device_tokens + external_tokens)
        full_tokens = prompt_tokens // self._chunk_tokens * self._chunk_tokens
        tail_tokens = prompt_tokens - max(full_tokens, had_tokens)
        self._add("hit_tokens_device", had_tokens - external_tokens)
        self._compute(prompt_tokens - had_tokens - tail_tokens, reason)
        self._compute(tail_tokens, MissReason.TAIL)

    def load_ended(self, prompt: Prompt, failed: MissReason | None) -> None:
        """failed: why, if it did."""
        if failed is None:
            self._add("hit_tokens_local", prompt.local_tokens)
            self._add("hit_tokens_peer", prompt.peer_tokens)
        else:
            self._compute(prompt.loading_tokens, failed)
        prompt.local_tokens = prompt.peer_tokens = 0

    def take_grown(self) -> dict[str, int]:
        """What has been added since the last call, by name; of what can be added up only."""
        grown = {
            name: value - self._said.get(name, 0)
            for name, value in self._counters.items()
            if value > self._said.get(name, 0) and name not in NO_SUMS
        }
        for name in grown:
            self._said[name] = self._counters[name]
        return grown

    def take_fresh(self) -> dict[str, int]:
        """Tokens that have been counted since the last call, by the counter's name. Asked in every
        step, so nothing is compared for it.
        """
        if not self._fresh:
            return {}
        fresh, self._fresh = self._fresh, {}
        return fresh

    def _compute(self, tokens: int, reason: MissReason) -> None:
        self._add(MISS_PREFIX + reason, tokens)
        self._add(COMPUTED, tokens)

    def _add(self, name: str, tokens: int) -> None:
        if tokens > 0:
            self._counters[name] = self._counters.get(name, 0) + tokens
            self._fresh[name] = self._fresh.get(name, 0) + tokens


def cause_of(ticket: Ticket) -> MissReason:
    """Why the first key that is a miss is one; TAIL if none is."""
    if ticket.causes:
        return ticket.causes[min(ticket.causes)]
    if ticket.lost:
        return MissReason.NO_NODE_STORE
    return MissReason.TAIL if ticket.answered else MissReason.NODE_STORE_SLOW


def failure_of(ticket: Ticket | None) -> MissReason:
    """Why a load has failed: what came to nothing on its way, if anything did."""
    cause = MissReason.TAIL if ticket is None else cause_of(ticket)
    return MissReason.LOAD_FAILED if cause is MissReason.TAIL else cause
