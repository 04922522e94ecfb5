"""The comparisons of audits under way, for core.trust: a block, and what was computed for it anew.

begin ─▶ both pinned, CompareBlocks ─▶ end, or too late: unpinned, and the copy is evicted
"""

from collections.abc import Collection

from kvray.core.commands import BlockPair, CompareBlocks
from kvray.core.deadlines import Deadlines
from kvray.core.ids import BlockKey, Maker, Namespace, OpId
from kvray.core.slots import Block
from kvray.core.store import TRUST, StoreCore
from kvray.core.tolerance import tolerance_of
from kvray.core.trusted import Own, Pair

MAX_AUDITS = 8  # compared at a time; one more is not compared


class CopiesCompared:
    """Whatever becomes of a comparison, the copy goes."""

    def __init__(self, store: StoreCore) -> None:
        self._store = store
        self._pairs: dict[OpId, tuple[Pair, BlockKey]] = {}  # with the key of the copy
        self._due: Deadlines[OpId] = Deadlines()

    def begin(
        self,
        op: OpId,
        namespace: Namespace,
        own: Own | None,
        *,
        trusted: Collection[Maker],
        key: BlockKey,
        name: BlockKey,
        now_ms: int,
        deadline_ms: int,
    ) -> CompareBlocks | None:
        """key: of the block; name: of its copy, which an engine like `own` has stored. None if it
        is not compared: where another block has taken the key since, by a maker that is not among
        the trusted ones, nobody has said that they compute the same.
        """
        copy, block = self._store.blocks_of([name, key])
        asked = None
        if block is not None and block.place.maker in trusted:
            asked = self._asked(op, own, copy, block)
        if asked is None or copy is None or block is None or len(self._pairs) >= MAX_AUDITS:
            self._store.evict(name)
            return None
        if not self._store.pin_blocks((TRUST, op), [copy, block], now_ms):
            self._store.evict(name)
            return None
        self._pairs[op] = ((namespace, copy.place.maker, block.place.maker), name)
        self._due.set(op, deadline_ms)
        return asked

    def end(self, op: OpId) -> Pair | None:
        """It has been compared, or takes too long; None if it is no audit."""
        audited = self._pairs.pop(op, None)
        if audited is None:
            return None
        pair, name = audited
        self._due.discard(op)
        self._store.unpin((TRUST, op))
        self._store.evict(name)
        return pair

    def end_late(self, now_ms: int) -> None:
        for op in self._due.take_due(now_ms):
            self.end(op)

    def next_ms(self) -> int | None:
        return self._due.next_ms()

    def _asked(
        self, op: OpId, own: Own | None, copy: Block | None, block: Block | None
    ) -> CompareBlocks | None:
        if own is None or copy is None or block is None or not (copy.mark and block.mark):
            return None
        size = copy.place.bytes
        shape = next((shape for shape in own.chunks if shape.slot_bytes == size), None)
        if shape is None:
            return None
        # It was computed in another batch than the first time, and behind blocks that were loaded.
        makers = copy.place.maker, block.place.maker
        tolerance = tolerance_of(*makers, own.noise, is_canary=False)
        return CompareBlocks(op, (BlockPair(copy.place, block.place, shape),), tolerance)

    def check(self) -> None:
        assert len(self._pairs) <= MAX_AUDITS
        assert len(self._due) == len(self._pairs)
        self._due.check()
