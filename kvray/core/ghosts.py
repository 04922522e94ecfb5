"""What was here not long ago, and why it is no more: for the reason of a miss, never for a hit.

    key ─▶ place in a table of fixed size: 62 bits of the key, 2 bits why

A newer key may take the place of an older one, so this forgets at random, the older a key the more
likely: of the last N that were noted, N being the size of the table, 1 - 1/e are known. A key that
was never noted is taken for one that was with a probability of at most 2^-62.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kvray.core.ids import KEY_BYTES
from kvray.core.rowindex import SPREAD, U64, Indices

Codes = NDArray[np.uint8]

NODE_GHOSTS = 1 << 18  # 2 MiB: more than most slabs have slots
DIRECTORY_GHOSTS = 1 << 20  # 8 MiB, beside 72 bytes for each of up to 33 million entries
_WHY_MASK = np.uint64(3)


class Why(IntEnum):
    """Codes in LocateReply.gone, one a key."""

    UNKNOWN = 0  # never noted, or forgotten
    EVICTED = 1
    PEER_GONE = 2  # with the node that had it


class Ghosts:
    """size: a power of two."""

    def __init__(self, size: int) -> None:
        assert size & (size - 1) == 0
        self._table: U64 = np.zeros(size, np.uint64)
        self._shift = np.uint64(65 - size.bit_length())

    def note(self, low: U64, high: U64, why: Why) -> None:
        """low, high: the halves of each key, as numbers."""
        self._table[self._places(low, high)] = (high & ~_WHY_MASK) | np.uint64(why)

    def why(self, low: U64, high: U64) -> Codes:
        """A Why of each key."""
        found = self._table[self._places(low, high)]
        known = (found ^ high) <= _WHY_MASK
        codes: Codes = np.where(known, found & _WHY_MASK, 0).astype(np.uint8)
        return codes

    def _places(self, low: U64, high: U64) -> Indices:
        # Keys are digests, so each half would do; in tests they are not.
        places: Indices = (((low ^ high * SPREAD) * SPREAD) >> self._shift).astype(np.intp)
        return places


def halves(keys: bytes) -> tuple[U64, U64]:
    """The first and the last 8 bytes of each key."""
    assert len(keys) % KEY_BYTES == 0
    numbers = np.frombuffer(keys, "<u8").reshape(-1, 2)
    return np.ascontiguousarray(numbers[:, 0]), np.ascontiguousarray(numbers[:, 1])
