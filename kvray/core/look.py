"""One look at the keys of a lookup: which are here, which are worth waiting for, which are not."""

import msgspec

from kvray.core.commands import MissReason
from kvray.core.fetch import FetchCore
from kvray.core.ids import BlockKey
from kvray.core.messages import KeyState, Lookup
from kvray.core.store import StoreCore

# Nothing is waited for then, not even what is on its way already.
_NO_WAIT = (MissReason.OVERLOADED, MissReason.LOCAL_ONLY)


class Run(msgspec.Struct, frozen=True, gc=False):
    """Keys [start, stop) of a lookup."""

    start: int
    stop: int
    is_prefix: bool
    slot_bytes: int


def runs_of(message: Lookup) -> list[Run]:
    runs: list[Run] = []
    start = 0
    for length, is_prefix, slot_bytes in zip(
        message.run_lengths, message.run_is_prefix, message.run_slot_bytes, strict=True
    ):
        runs.append(Run(start, start + length, is_prefix, slot_bytes))
        start += length
    return runs


class Look:
    """One pass over the keys of a lookup: what each of them is just now."""

    __slots__ = (
        "_awaited",
        "_fetch",
        "_keys",
        "_no_fetch",
        "_store",
        "hits",
        "misses",
        "states",
        "wants",
        "writes",
    )

    def __init__(
        self,
        store: StoreCore,
        fetch: FetchCore,
        keys: list[BlockKey],
        no_fetch: MissReason | None,
    ) -> None:
        self._store = store
        self._fetch = fetch
        self._keys = keys
        self._no_fetch = no_fetch
        self.states = bytearray(len(keys))
        self.hits: list[int] = []
        self.writes: list[int] = []  # being written by an engine
        self.wants: list[int] = []  # being fetched, or to be
        self.misses: dict[MissReason, int] = {}
        self._awaited: set[BlockKey] = set()

    def run(self, run: Run) -> None:
        find, states, hits, keys = self._store.find, self.states, self.hits, self._keys
        slot_bytes = run.slot_bytes
        for index in range(run.start, run.stop):
            place = find(keys[index])
            if place is not None and place.bytes == slot_bytes:
                states[index] = KeyState.HIT
                hits.append(index)
                continue
            reason = self._absent(index, is_here=place is not None)
            if reason is None:
                states[index] = KeyState.WAIT
                continue
            self._count(reason, 1)
            if run.is_prefix:
                self._count(MissReason.BEHIND, run.stop - index - 1)
                return

    def wants_of(self, run: Run) -> list[int]:
        return [index for index in self.wants if run.start <= index < run.stop]

    def spoil(self) -> None:
        """Nothing of it counts."""
        self.states = bytearray(len(self.states))
        self._count(MissReason.OVERLOADED, len(self.hits) + len(self.writes) + len(self.wants))
        for indices in (self.hits, self.writes, self.wants):
            indices.clear()

    def _absent(self, index: int, *, is_here: bool) -> MissReason | None:
        """Why this key, which is not a hit, is a miss; None if it is worth waiting for."""
        key = self._keys[index]
        if is_here:
            return MissReason.OTHER_SIZE
        if self._no_fetch in _NO_WAIT:
            return self._no_fetch
        if key in self._awaited:
            return MissReason.BEHIND  # named twice, and waited for once
        if key in self._fetch or not self._store.is_writing(key):
            if key not in self._fetch and self._no_fetch is not None:
                return self._no_fetch
            self.wants.append(index)
        else:
            self.writes.append(index)
        self._awaited.add(key)
        return None

    def _count(self, reason: MissReason, count: int) -> None:
        if count:
            self.misses[reason] = self.misses.get(reason, 0) + count
