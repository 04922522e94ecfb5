"""The audit: rarely, a block of another maker is computed once more, and compared.

    look-up ─its last hit is another's, and there is credit─▶ a miss: the engine computes it
    reserve ─finds the key READY by another maker─▶ granted under a name of the audit's own
    commit  ─▶ AUDITED: core.trust compares the two, and the new one is evicted

A machine that has begun to compute something else since its canary is seen by it. What it costs in
prefill is bounded by the rate: one chunk is told as a miss for so many that were stored, and never
more than one is saved up. A store that finds its key taken costs no prefill, and is audited too.

This file says which block; what is made of a comparison is core.trust's to say.
"""

from collections.abc import Iterable
from hashlib import blake2b

from kvray.core.ids import KEY_BYTES, BlockKey

# At a time: each is a slot that nobody else has, and some MB to compare.
MAX_AUDITS = 4
MAX_WANTED = 64  # told as misses, and not stored yet: requests that end before are forgotten


def audit_key(key: BlockKey) -> BlockKey:
    """Under which a block is stored that is compared and dropped."""
    return BlockKey(blake2b(key, digest_size=KEY_BYTES, person=b"kvray audit").digest())


class Audits:
    """One per NodeStore. rate: of the stored blocks, how many may be computed for an audit."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._credit = 0.0
        self._wanted: dict[BlockKey, None] = {}  # told as misses
        self._under_way: dict[BlockKey, BlockKey] = {}  # by the audit's key, the block's

    @property
    def is_due(self) -> bool:
        """Whether a chunk may be told as a miss that is none."""
        return self._credit >= 1.0 and len(self._under_way) < MAX_AUDITS

    @property
    def is_busy(self) -> bool:
        """Whether an engine stores something for an audit."""
        return bool(self._under_way)

    def stored(self, count: int) -> None:
        """Engines have computed so many blocks."""
        self._credit = min(1.0, self._credit + self._rate * count)

    def want(self, key: BlockKey) -> None:
        """It was told as a miss."""
        self._credit = 0.0
        self._wanted[key] = None
        if len(self._wanted) > MAX_WANTED:
            del self._wanted[next(iter(self._wanted))]

    def begin(self, key: BlockKey) -> BlockKey | None:
        """The key under which an engine stores once more what is here by another maker; None if it
        shall not.
        """
        name = audit_key(key)
        if not self._rate or len(self._under_way) >= MAX_AUDITS or name in self._under_way:
            return None
        self._wanted.pop(key, None)
        self._under_way[name] = key
        return name

    def end(self, names: Iterable[BlockKey]) -> list[tuple[BlockKey, BlockKey]]:
        """Of these keys, written or given up, those of audits: the block's, and the audit's."""
        if not self._under_way:
            return []
        return [(self._under_way.pop(name), name) for name in names if name in self._under_way]

    def check(self) -> None:
        assert 0.0 <= self._credit <= 1.0
        assert len(self._wanted) <= MAX_WANTED
        assert len(self._under_way) <= MAX_AUDITS
