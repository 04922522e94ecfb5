"""Who computes what, in a simulated cluster.

In one seed of three there are engines of three makers: two classes that compute alike, and one that
computes something else under the same names. Each of them stores its canary now and then, as an
ordinary chain; nodes find, compare and trust by themselves. What is checked:

    told       no HIT and no COMING names a block of a maker that this life of the NodeStore has not
               seen to compute what the asking engine does
    loaded     no load brings bytes of the maker that computes something else
    audited    no audit of makers that compute alike finds a difference
    in time    when all has healed, makers that compute alike trust each other
"""

from functools import lru_cache
from typing import Final

from kvray.core.audit import audit_key
from kvray.core.commands import Verdict
from kvray.core.ids import BlockKey, Maker, Namespace
from kvray.core.keys import canary_keys
from kvray.core.messages import ChunkShape
from tests.shells import BLOCK_BYTES, stamp

NAMESPACE: Final = Namespace(b"n" * 16)
FIRST, SECOND, WRONG = Maker(1 << 32 | 1), Maker(2 << 32 | 1), Maker(3 << 32 | 1)
CHUNKS: Final = [ChunkShape(BLOCK_BYTES, BLOCK_BYTES // 4, "bytes")]  # not a bit may differ
CANARY_PERIOD_US = 3_000_000
AUDIT_RATE: Final = 0.2  # 40 times as often as there may be
SETTLED_US = 15_000_000  # > the longest rest without a verdict, and a fetch

_FLIPPED: Final = bytes(range(0xFF, -1, -1))  # every bit of each byte
_CANARIES: Final = {m: canary_keys(NAMESPACE, m, 0) for m in (FIRST, SECOND, WRONG)}
_CHUNK_OF: Final = {key: n for keys in _CANARIES.values() for n, key in enumerate(keys)}
_AUDITED: Final[dict[BlockKey, BlockKey]] = {}  # by the audit's key, the block's


def note_audits(blocks: list[BlockKey]) -> None:
    """An engine stores these, perhaps under the keys of audits: the content is the same."""
    _AUDITED.update((audit_key(block), block) for block in blocks if block not in _AUDITED)


def is_audit(block: BlockKey) -> bool:
    return block in _AUDITED


def maker_of(number: int, *, are_several: bool) -> Maker:
    """Of the engine with this number."""
    return (FIRST, SECOND, FIRST, WRONG)[number % 4] if are_several else FIRST


def canary_of(maker: Maker) -> list[BlockKey]:
    return list(_CANARIES[maker])


def is_canary(block: BlockKey) -> bool:
    return block in _CHUNK_OF


def are_alike(one: int, other: int) -> bool:
    """Whether they compute the same."""
    return (one == WRONG) == (other == WRONG)


@lru_cache(maxsize=4_096)
def content_of(block: BlockKey, block_bytes: int, maker: int) -> bytes:
    """What this maker computes for a block. Canaries have other keys and the same content."""
    block = _AUDITED.get(block, block)
    chunk = _CHUNK_OF.get(block)
    same = block if chunk is None else BlockKey(bytes([chunk]) * 16)
    content = stamp(same, block_bytes)
    return content if maker != WRONG else content.translate(_FLIPPED)


class Seen:
    """What one life of a NodeStore has seen to be equal: by what it was told of its comparisons."""

    def __init__(self) -> None:
        self._equal: set[tuple[int, int]] = set()

    def note(self, mine: int, other: int, verdicts: tuple[Verdict, ...]) -> None:
        if len(verdicts) > 1 and set(verdicts) == {Verdict.EQUAL}:
            assert are_alike(mine, other), "different makers were found equal"
            self._equal.add((mine, other))

    def may_load(self, mine: int, other: int) -> bool:
        return mine == other or (mine, other) in self._equal
