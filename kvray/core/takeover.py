"""Blocks that a leaving node leaves to this one, which keeps them as if they were its own.

    take ─▶ READY here ────────────────────────┬─▶ kept ──┐
       └──▶ wanted ─▶ fetched like any other ──┘          ├─▶ all settled: TookOver
                         └─▶ missed: not kept ────────────┘

Nothing is evicted for them: whoever leaves asks others then. What has been fetched for them is no
copy on probation any more, since its original goes.
"""

from collections.abc import Iterable, Sequence

import msgspec

from kvray.core.commands import Arrived, FetchCommand, Missed, TookOver, Waiter
from kvray.core.fetch import FetchCore
from kvray.core.ids import BlockKey, OpId
from kvray.core.store import NODE, StoreCore

MAX_TAKE_OVERS = 64  # calls at a time; whoever drains has a few under way for each peer


class _Call(msgspec.Struct, eq=False):
    """waiting: keys that have not been settled."""

    call_id: int
    waiting: set[BlockKey]
    kept: list[BlockKey]


class TakeOvers:
    """One per NodeStore. Wants blocks of FetchCore, as a lookup does; pins nothing."""

    def __init__(self, store: StoreCore, fetch: FetchCore) -> None:
        self._store = store
        self._fetch = fetch
        self._calls: dict[OpId, _Call] = {}
        self._last_op = OpId(0)
        self._done: list[TookOver] = []
        self.kept_count = 0

    def take(
        self, call_id: int, wants: Sequence[tuple[BlockKey, int]], *, deadline_ms: int
    ) -> list[FetchCommand]:
        """wants: (key, payload bytes), no key twice. Ends in one TookOver, which names what is
        here, at deadline_ms (absolute) at the latest. Of too many calls each
        is told only of what is here already.
        """
        call = _Call(call_id, set(), [])
        missing = []
        for key, want_bytes in wants:
            # What an engine of this node is writing is not fetched as well: to be asked for again.
            is_written = self._store.is_writing(key) and key not in self._fetch
            if not self._keep(call, key) and not is_written:
                missing.append((key, want_bytes))
        if len(self._calls) >= MAX_TAKE_OVERS or not missing:
            self._end(call)
            return []
        self._last_op = OpId(self._last_op + 1)
        self._calls[self._last_op] = call
        call.waiting.update(key for key, _ in missing)
        return self._fetch.want((NODE, self._last_op), missing, deadline_ms=deadline_ms)

    def wants(self, key: BlockKey) -> bool:
        """Whether this key is to be kept when it comes, so that nothing may be evicted for it."""
        return any(key in call.waiting for call in self._calls.values())

    def on_settled(self, told: Arrived | Missed) -> None:
        """What FetchCore says of keys that were wanted here."""
        op = told.waiter[1]
        call = self._calls[op]
        for key in told.keys:
            call.waiting.discard(key)
            if isinstance(told, Arrived):
                self._keep(call, key)
        if not call.waiting:
            del self._calls[op]
            self._end(call)

    def take_done(self) -> list[TookOver]:
        """The calls that have ended since the last time."""
        done, self._done = self._done, []
        return done

    def waiters(self) -> Iterable[Waiter]:
        return [(NODE, op) for op in self._calls]

    def _keep(self, call: _Call, key: BlockKey) -> bool:
        if not self._store.keep(key):
            return False
        call.kept.append(key)
        return True

    def _end(self, call: _Call) -> None:
        """What came first may have been evicted again while the last was waited for."""
        kept = tuple(key for key in call.kept if self._store.find(key) is not None)
        self.kept_count += len(kept)
        self._done.append(TookOver(call.call_id, kept))

    def check(self) -> None:
        assert len(self._calls) <= MAX_TAKE_OVERS
        assert not self._done, "not told"
        for op, call in self._calls.items():
            assert call.waiting, "waits for nothing"
            assert call.waiting == set(self._fetch.wanted_by((NODE, op))), "nobody brings it"
