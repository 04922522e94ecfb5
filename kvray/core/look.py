"""One look at the keys of a lookup: which are here, which are worth waiting for, which are not."""

from typing import cast

import msgspec

from kvray.core.fetch import FetchCore
from kvray.core.ids import BlockKey
from kvray.core.messages import KeyState, Lookup
from kvray.core.reasons import MissReason
from kvray.core.slots import Block
from kvray.core.store import StoreCore
from kvray.core.trusted import Trusted, bytes_of, mark_of

_HIT, _MISS, _WAIT = int(KeyState.HIT), int(KeyState.MISS), int(KeyState.WAIT)

# Nothing is waited for then, not even what is on its way already.
_NO_WAIT = (MissReason.OVERLOADED, MissReason.LOCAL_ONLY)
# There is nobody to ask.
_NOWHERE = (MissReason.NEVER_SEEN, MissReason.PEER_GONE, MissReason.NAMESPACE_DIFFERS)


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
        "_blocks",
        "_causes",
        "_fetch",
        "_keys",
        "_no_fetch",
        "_store",
        "_trusted",
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
        trusted: Trusted,
        no_fetch: MissReason | None,
    ) -> None:
        self._store = store
        self._fetch = fetch
        self._keys = keys
        self._blocks = store.blocks_of(keys)
        self._trusted = trusted
        self._no_fetch = no_fetch
        self.states = bytearray([_HIT]) * len(keys)  # HITs; what is none is crossed out
        self.writes: list[int] = []  # being written by an engine
        self.wants: list[int] = []  # being fetched, or to be
        self.misses: dict[MissReason, int] = {}
        self._causes: dict[int, tuple[int, MissReason]] = {}  # by run: its first miss, and why
        self._awaited: set[BlockKey] = set()

    def run(self, run: Run) -> None:
        states = self.states
        # Mostly all blocks of a run have one maker: the engine's own, or the last one's.
        wanted = mark_of(run.slot_bytes, self._trusted.maker)
        index = run.start
        for block in self._blocks[run.start : run.stop]:
            if block is None or block.mark != wanted:
                reason = self._doubt(block, run.slot_bytes) or self._absent(index, block)
                if reason is None and block is not None and block.mark:
                    wanted = block.mark
                    index += 1
                    continue
                if reason is None:
                    states[index] = _WAIT
                    index += 1
                    continue
                self._causes.setdefault(run.start, (index, reason))
                if run.is_prefix:
                    self._count(reason, 1)
                    self._count(MissReason.BEHIND, run.stop - index - 1)
                    states[index : run.stop] = bytes(run.stop - index)
                    return
                self._count(reason, 1)
                states[index] = _MISS
            index += 1

    def causes(self) -> dict[int, MissReason]:
        """Of the first miss of each run, by its index, when all runs have been looked at."""
        return dict(self._causes.values())

    def hits(self) -> list[int]:
        """The indices, when all runs have been looked at."""
        return [index for index, state in enumerate(self.states) if state == _HIT]

    def blocks(self) -> list[Block]:
        """Of the hits, in order."""
        if self.states.count(_HIT) == len(self._blocks):
            return cast("list[Block]", self._blocks)
        return [block for index in self.hits() if (block := self._blocks[index]) is not None]

    def wants_of(self, run: Run) -> list[int]:
        return [index for index in self.wants if run.start <= index < run.stop]

    def new_wants_of(self, run: Run) -> int:
        """How many of its wants nobody is fetching yet."""
        return sum(self._keys[index] not in self._fetch for index in self.wants_of(run))

    def refuse(self, run: Run, reason: MissReason) -> None:
        """What the run wants is not fetched: misses, and in a prefix run all that waits behind."""
        refused = set(self.wants_of(run))
        self._count(reason, len(refused))
        self._causes[run.start] = min(
            (min(refused), reason), self._causes.get(run.start, (run.stop, reason))
        )
        behind: set[int] = set()
        if run.is_prefix:
            behind = {index for index in self.writes if min(refused) < index < run.stop}
            self._count(MissReason.BEHIND, len(behind))
        for index in refused | behind:
            self.states[index] = _MISS
        self.wants = [index for index in self.wants if index not in refused]
        self.writes = [index for index in self.writes if index not in behind]

    def audit(self, runs: list[Run]) -> BlockKey | None:
        """Make the last hit of a prefix run a miss, if it is another maker's and nothing is waited
        for. Its key; None if there is none such.
        """
        if self.wants or self.writes:
            return None
        for run in runs:
            hits = self.states[run.start : run.stop].count(_HIT)
            index = run.start + hits - 1
            block = self._blocks[index] if run.is_prefix and hits > 1 else None
            if block is not None and block.place.maker != self._trusted.maker:
                self.states[index] = _MISS
                self._count(MissReason.AUDITED, 1)
                self._causes[run.start] = (index, MissReason.AUDITED)
                return self._keys[index]
        return None

    def spoil(self, reason: MissReason) -> None:
        """Nothing of it counts."""
        self._count(reason, len(self.states) - self.states.count(_MISS))
        self._causes = {0: (0, reason)} if self.states else {}
        self.states = bytearray(len(self.states))
        self.writes.clear()
        self.wants.clear()

    def _doubt(self, block: Block | None, slot_bytes: int) -> MissReason | None:
        """Why what is here, or is being written here, is a miss; None if it is not."""
        if block is None:
            return None
        if block.mark and bytes_of(block.mark) != slot_bytes:
            return MissReason.OTHER_SIZE
        return None if self._trusted.accepts(block.place.maker) else MissReason.UNTRUSTED

    def _absent(self, index: int, block: Block | None) -> MissReason | None:
        """Why this key is a miss; None if it is a hit after all, or worth waiting for."""
        key = self._keys[index]
        if block is not None and block.mark:
            return None
        if self._no_fetch in _NO_WAIT:
            return self._no_fetch
        if key in self._awaited:
            return MissReason.BEHIND  # named twice, and waited for once
        if key in self._fetch or not self._store.is_writing(key):
            if key not in self._fetch and self._no_fetch is not None:
                if self._no_fetch in _NOWHERE and self._store.was_evicted(key):
                    return MissReason.EVICTED
                return self._no_fetch
            self.wants.append(index)
        else:
            self.writes.append(index)
        self._awaited.add(key)
        return None

    def _count(self, reason: MissReason, count: int) -> None:
        if count:
            self.misses[reason] = self.misses.get(reason, 0) + count
