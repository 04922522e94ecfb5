"""Which blocks of a node others have asked for, until its next announce.

The home of a block is the node that has had it for longest. Only the home hears of a use, so one
replica of a block stays hot, wherever it is read, and only those that are no home may be spared,
so the last replica is not given up by two nodes at once. Both are hints: what the directory does
not know, or can not keep, costs hits and nothing else.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvray.core.ids import KEY_BYTES
from kvray.core.messages import MAX_READ_KEYS


class Uses:
    """Of one node. At most MAX_READ_KEYS, one after another; what comes then is lost."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys = bytearray()

    def add(self, keys: bytes) -> None:
        self._keys += keys[: MAX_READ_KEYS * KEY_BYTES - len(self._keys)]

    def keys(self) -> bytes:
        return bytes(self._keys)


def homes(
    keys: bytes, at: NDArray[np.intp], listings: NDArray[np.uint16]
) -> Iterator[tuple[int, bytes]]:
    """For each listing that is a home, its keys, in their order.

    at, listings: as Catalogue.locate finds them, for each place the index of its key and whose it
    is. The places of one key are together, the youngest first, so the last one is the home.
    """
    is_last = np.append(at[1:] != at[:-1], True)[: len(at)]
    at, listings = at[is_last], listings[is_last]
    columns: NDArray[Any] = np.frombuffer(keys, f"V{KEY_BYTES}")
    for listing in np.flatnonzero(np.bincount(listings)).tolist():
        yield listing, columns[at[listings == listing]].tobytes()
