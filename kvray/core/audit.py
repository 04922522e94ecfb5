"""The audit: rarely, a block of another maker is computed once more, and compared.

    look-up ─its last hit is another's, and there is credit─▶ a miss: the engine computes it
    reserve ─finds the key READY by another maker─▶ granted under a name of the audit's own
    commit  ─▶ AUDITED: core.trust compares the two, and the new one is evicted

A machine that has begun to compute something else since its canary is seen by it. How often it
happens is the node's rate: one chunk is told as a miss for so many that were stored, and never more
than one is saved up. What it costs in prefill is bounded by each engine for itself (AuditBudget),
for a node sees neither tokens nor who computed what is stored: answers are stored too, and a block
that comes back from the device, and a chunk of a hybrid model is a block of each cache group. A
store that finds its key taken costs no prefill, and is audited too.

This file says which block; what is made of a comparison is core.trust's to say.
"""

from collections.abc import Iterable
from hashlib import blake2b

from kvray.core.ids import KEY_BYTES, BlockKey

MAX_PREFILL_SHARE = 0.005  # of the prompt tokens that an engine has computed
# At a time: each is a slot that nobody else has, and some MB to compare.
MAX_AUDITS = 4
MAX_WANTED = 64  # told as misses, and not stored yet: requests that end before are forgotten


def audit_key(key: BlockKey) -> BlockKey:
    """Under which a block is stored that is compared and dropped."""
    return BlockKey(blake2b(key, digest_size=KEY_BYTES, person=b"kvray audit").digest())


class AuditBudget:
    """One per engine, in tokens: how much of its prefill has been for audits. What a look-up may
    cost is lent to it until its answer is known, so look-ups side by side never cost more.
    """

    def __init__(self) -> None:
        self.spent_tokens = 0
        self._lent_tokens = 0

    def lend(self, cost_tokens: int, *, computed_tokens: int) -> int:
        """What is lent to a look-up that may cost so much: all of it, or nothing and it may not be
        audited. computed_tokens: of the engine's prompts, so far.
        """
        after_tokens = self.spent_tokens + self._lent_tokens + cost_tokens
        if after_tokens > MAX_PREFILL_SHARE * computed_tokens:
            return 0
        self._lent_tokens += cost_tokens
        return cost_tokens

    def settle(self, lent_tokens: int, *, is_audited: bool) -> None:
        """The look-up is over. is_audited: it was told a miss for an audit."""
        self._lent_tokens -= lent_tokens
        self.spent_tokens += lent_tokens if is_audited else 0
        assert self._lent_tokens >= 0, "settled twice"


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
