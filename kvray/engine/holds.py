"""Which requests wait for kvray, and for how long they may: their answer is RETRY meanwhile.

    held ──every key is a hit or a miss, or the deadline──▶ goes on
      ├── its look-up is under way: until it settles
      └── it could not be asked about in this step: until the next one, a few times

A request has one deadline for all of it. Steps in which others are computed meanwhile take as long
as they take; the deadline is looked at between them.
"""

import time
from collections.abc import Callable, Sequence

from kvray.config import EngineConfig
from kvray.engine.requests import RequestEvent, RequestState, RequestView
from kvray.node.client import NodeClient

# Steps in which a look-up could not be asked, since the answer to the one before it is late. One
# without work takes a millisecond, and a NodeStore that waits for a core gets one within ten.
MAX_UNASKED_STEPS = 16
MAX_RESTING = 32  # requests to look through every millisecond; with more, vLLM's own loop goes on
_ANSWERED = frozenset({RequestState.EARLY, RequestState.ASKED})
REST_LIMIT_S = 0.1  # then vLLM has a step all the same: it may wait for what we know nothing of


class Holds:
    """Called on the scheduler's thread only. counters: of the engine; this has two of them."""

    def __init__(self, config: EngineConfig, counters: dict[str, int]) -> None:
        self._loads_early = config.loads_early
        self._deadline_s = config.lookup_deadline_ms / 1_000
        self._counters = counters

    def left_s(self, view: RequestView) -> float:
        """Of the deadline of its ticket; negative when it is over."""
        return view.asked_s + self._deadline_s - time.monotonic()

    def begin(self, view: RequestView) -> None:
        view.held_s = view.held_s or time.monotonic()

    def end(self, view: RequestView) -> None:
        """The request waits for kvray no more: each of its keys is a hit or a miss."""
        if view.held_s:
            held_ms = round((time.monotonic() - view.held_s) * 1_000)
            self._counters["longest_wait_ms"] = max(self._counters["longest_wait_ms"], held_ms)
            view.held_s = 0.0

    def until_next_step(self, view: RequestView, client: NodeClient) -> bool:
        """Hold a request that could not be asked about; False if it has waited for long enough, or
        nobody would answer in the next step either.
        """
        if not self.may_wait(view) or view.unasked_steps >= MAX_UNASKED_STEPS:
            return False
        if not client.may_answer_soon:
            return False
        view.move(RequestEvent.NOT_ASKED)
        view.unasked_steps += 1
        self.begin(view)
        return True

    def may_wait(self, view: RequestView) -> bool:
        """Whether it may be held for yet another step, in which it is asked about."""
        return not view.held_s or time.monotonic() - view.held_s < self._deadline_s

    def is_held(self, view: RequestView) -> bool:
        """Whether `lookup` would say RETRY, and `begin` would not ask anew."""
        ticket = view.ticket
        if view.state not in _ANSWERED or ticket is None or ticket.settled:
            return False
        if view.state is RequestState.EARLY and view.has_old_miss(time.monotonic()):
            return False
        return not (self._loads_early and ticket.arriving)

    def rest(
        self,
        views: Sequence[RequestView | None],
        client: NodeClient,
        is_wanted: Callable[[], bool],
    ) -> None:
        """Nothing can be computed before one of these requests, all that there are, has its
        answer: hear what comes until one has, or its deadline, or somebody wants the engine.
        """
        if not 0 < len(views) <= MAX_RESTING:
            return
        held = [view for view in views if view is not None and self.is_held(view)]
        if len(held) < len(views):
            return
        for view in held:
            self.begin(view)
        self._counters["rests"] += 1
        client.listen(
            lambda: is_wanted() or not all(self.is_held(view) for view in held),
            limit_s=min(REST_LIMIT_S, *map(self.left_s, held)),
        )
