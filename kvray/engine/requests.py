"""What kvray knows of one request of an engine: what it may still do, and what it waits for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from vllm.v1.kv_offload.base import OffloadKey

from kvray.core.messages import KeyState
from kvray.core.reasons import MissReason
from kvray.engine.sources import Prompt
from kvray.node.client import Ticket

# How long a miss is believed that was said before the scheduler asked. Whoever waits behind the
# prefill of others waits for longer, and what was missing may have been stored meanwhile. Whoever
# does not would only wait for the same answer again: a step without work, after which vLLM's
# processes spin for a second (see engine.steps), beside the prefill that begins then.
FRESH_MISS_S = 0.1


@dataclass(frozen=True, slots=True)
class Run:
    """Keys of one cache group of one request, from the device's own hit on.

    is_prefix: full attention, where only the keys before the first miss are worth anything; in a
    sliding-window group each key counts by itself.
    """

    group: int
    keys: Sequence[OffloadKey]
    is_prefix: bool


class Access(Enum):
    """What a request may still do with kvray.

    OPEN ──deadline, failed load──▶ MISSING ──preempted──▶ OPEN
      └────── weights change, no safe key ──▶ BARRED (for the rest of its life)
    """

    OPEN = "open"  # looks up and stores
    MISSING = "missing"  # every look-up is a miss; stores
    BARRED = "barred"  # neither looks up nor stores


@dataclass(slots=True)
class RequestView:
    """What kvray knows of one request. salt: 16 bytes of a LoRA adapter's content, or nothing."""

    access: Access = Access.OPEN
    salt: bytes = b""
    ticket: Ticket | None = None
    index: dict[OffloadKey, int] = field(default_factory=dict)
    asked_s: float = 0.0  # when the ticket began
    held_s: float = 0.0  # since when its answer is RETRY; 0 while it is not
    loading: bool = False
    finished: bool = False
    postponed_steps: int = 0  # since its last store
    postponed_chunks: int = 0  # offered, not stored, to be offered again
    early: bool = False  # its ticket is from before the scheduler asked
    unasked: bool = False  # in this step the NodeStore could not be asked: in the next one
    unasked_steps: int = 0  # such steps so far
    early_cause: MissReason | None = None  # what an early answer said that is given up by now
    prompt: Prompt = field(default_factory=Prompt)

    def has_old_miss(self, now_s: float) -> bool:
        """Whether somebody may have stored by now what was missing."""
        if self.ticket is None or KeyState.MISS not in self.ticket.states:
            return False
        return now_s - self.asked_s > FRESH_MISS_S

    def is_outdated(self, runs: Sequence[Run], now_s: float) -> bool:
        """Whether an early answer may not be the best that there is by now: it has an old miss, or
        the device has evicted what it had.
        """
        if self.ticket is None or self.has_old_miss(now_s):
            return True
        return any(key not in self.index for run in runs for key in run.keys[:1])
