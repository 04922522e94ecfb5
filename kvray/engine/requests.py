"""What kvray knows of one request of an engine: where it stands, and what it waits for."""

from collections.abc import Mapping, Sequence
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


class RequestState(Enum):
    """Where a request stands with kvray.

         ┌─────────────its answer is old──────────────┐
         ▼                                            │
    ┌▶ OPEN ──asked before its turn──────────────▶ EARLY
    │  │  ▲ └──asked──▶ ASKED ◀──its turn comes──────┘│
    │  │  │              │  │ └──deadline──▶ OVERDUE  │ computes: back to OPEN, OVERDUE to MISSING
    │  │  └──next step── │  └─────load──────┐  │load  │
    │  └─not asked─▶ UNASKED                ▼  ▼
    │                │ for too long       LOADING ──ended──▶ OPEN
    │                ▼                       │
    └──preempted── MISSING ◀──────failed─────┘

    From each of them, for the rest of its life: BARRED, and from LOADING by way of LOADING_BARRED
    (the weights change, kvray is switched off or taken out, its hashes do not cover its KV); and
    FINISHED, from LOADING by way of LEFT, since its device blocks are written to until every rank
    has reported.
    """

    OPEN = "open"  # nothing is asked for it; it may ask
    EARLY = "early"  # asked before the scheduler did
    UNASKED = "unasked"  # in this step the NodeStore could not be asked: in the next one
    ASKED = "asked"  # its keys are hits, misses, or waited for
    OVERDUE = "overdue"  # what has come by the deadline counts, the rest is a miss
    LOADING = "loading"
    MISSING = "missing"  # every look-up is a miss; stores
    BARRED = "barred"  # neither looks up nor stores
    LOADING_BARRED = "loading, barred"
    LEFT = "left"  # it has finished while it was being loaded
    FINISHED = "finished"

    @property
    def has_ticket(self) -> bool:
        """Something is pinned for it, or will be."""
        return self in _WITH_TICKET

    @property
    def is_loading(self) -> bool:
        """Ranks write into its device blocks."""
        return self in _LOADING

    @property
    def may_store(self) -> bool:
        return self in _STORING

    @property
    def is_barred(self) -> bool:
        """It goes without kvray, for the rest of its life."""
        return self in _BARRED


_LOADING = frozenset({RequestState.LOADING, RequestState.LOADING_BARRED, RequestState.LEFT})
_ANSWERED = frozenset({RequestState.EARLY, RequestState.ASKED, RequestState.OVERDUE})
_WITH_TICKET = _LOADING | _ANSWERED
_HELD = frozenset({RequestState.EARLY, RequestState.ASKED, RequestState.UNASKED})
_BARRED = frozenset({RequestState.BARRED, RequestState.LOADING_BARRED})
_STORING = _ANSWERED | {RequestState.OPEN, RequestState.UNASKED, RequestState.MISSING}


class RequestEvent(Enum):
    ASK_EARLY = "asked before its turn"
    ASK = "asked"
    TURN = "its turn comes"  # the scheduler looks for a place for it
    OUTDATE = "its answer is old"
    NOT_ASKED = "not asked"  # the NodeStore could not be asked in this step
    GIVE_UP = "not asked for too long"
    DEADLINE = "deadline"
    COMPUTE = "computes"  # it is scheduled: what is pinned for it is let go
    LOAD = "load"
    LOAD_ENDED = "load ended"
    LOAD_FAILED = "load failed"
    PREEMPT = "preempted"
    BAR = "barred"  # new weights, switch-off, detach, no safe key
    FINISH = "finished"


def _moves() -> dict[RequestState, dict[RequestEvent, RequestState]]:
    """What may follow what. An event that is not here for a state is a bug."""
    s, e = RequestState, RequestEvent
    moves: dict[RequestState, dict[RequestEvent, RequestState]] = {
        s.OPEN: {
            e.ASK_EARLY: s.EARLY,
            e.ASK: s.ASKED,
            e.NOT_ASKED: s.UNASKED,
            e.GIVE_UP: s.MISSING,
        },
        s.EARLY: {e.TURN: s.ASKED, e.OUTDATE: s.OPEN, e.COMPUTE: s.OPEN},
        s.UNASKED: {e.TURN: s.OPEN, e.GIVE_UP: s.MISSING},
        s.ASKED: {e.DEADLINE: s.OVERDUE, e.LOAD: s.LOADING, e.COMPUTE: s.OPEN},
        s.OVERDUE: {e.LOAD: s.LOADING, e.COMPUTE: s.MISSING},
        s.LOADING: {e.LOAD_ENDED: s.OPEN, e.LOAD_FAILED: s.MISSING},
        s.MISSING: {e.PREEMPT: s.OPEN},
        s.BARRED: {},
        s.LOADING_BARRED: {e.LOAD_ENDED: s.BARRED, e.LOAD_FAILED: s.BARRED},
        s.LEFT: {e.LOAD_ENDED: s.FINISHED, e.LOAD_FAILED: s.FINISHED},
    }
    for state, ways in moves.items():
        # Any state that is not over may meet these; TURN and PREEMPT mostly change nothing. vLLM
        # tells of a preemption when it has asked for the same request again.
        ways.setdefault(e.TURN, state)
        ways.setdefault(e.PREEMPT, state)
        ways[e.FINISH] = s.LEFT if state.is_loading else s.FINISHED
        ways[e.BAR] = s.LOADING_BARRED if state.is_loading else s.BARRED
    moves[s.LEFT][e.BAR] = s.LEFT
    return moves


MOVES: Mapping[RequestState, Mapping[RequestEvent, RequestState]] = _moves()


@dataclass(slots=True)
class RequestView:
    """What kvray knows of one request. salt: 16 bytes of a LoRA adapter's content, or nothing.
    adapter: its name.
    """

    state: RequestState = RequestState.OPEN
    salt: bytes = b""
    adapter: str | None = None
    ticket: Ticket | None = None
    index: dict[OffloadKey, int] = field(default_factory=dict)
    asked_s: float = 0.0  # when the ticket began
    held_s: float = 0.0  # since when its answer is RETRY; 0 while it is not
    postponed_steps: int = 0  # since its last store
    postponed_chunks: int = 0  # offered, not stored, to be offered again
    unasked_steps: int = 0  # steps so far in which it could not be asked about
    audit_tokens: int = 0  # lent to its ticket; see core.audit
    early_cause: MissReason | None = None  # what an early answer said that is given up by now
    prompt: Prompt = field(default_factory=Prompt)

    def move(self, event: RequestEvent) -> None:
        after = MOVES[self.state].get(event)
        assert after is not None, f"a request that is {self.state.value}: {event.value}"
        self.state = after

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

    def check(self) -> None:
        """To be called between two calls of vLLM."""
        assert self.state.has_ticket == (self.ticket is not None), self.state
        assert not self.held_s or self.state in _HELD, self.state
