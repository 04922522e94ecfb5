"""Whose blocks count for an engine: asked for each block that it finds, so it must be cheap.

core.trust decides; this is what it decides into. A block's mark is its maker and its size in one
number: one comparison tells that a block is what a run wants.
"""

from functools import lru_cache

import msgspec

from kvray.core.ids import Maker, Namespace
from kvray.core.messages import ChunkShape, NoiseLevels

MAX_MET = 256  # makers that were met since somebody last looked; what is lost is met again

_SIZE_BITS = 32
_SIZE_MASK = (1 << _SIZE_BITS) - 1


class Own(msgspec.Struct, frozen=True):
    """What an engine of this node has said of its blocks and of itself; see messages.Introduce."""

    chunks: tuple[ChunkShape, ...]
    noise: NoiseLevels


Pair = tuple[Namespace, Maker, Maker]  # a namespace, the maker that trusts, and another


@lru_cache(maxsize=4_096)  # so that a million blocks share a few numbers
def mark_of(payload_bytes: int, maker: Maker) -> int:
    """Of a READY block; 0 is no mark, since no block has 0 bytes."""
    return maker << _SIZE_BITS | payload_bytes


def bytes_of(mark: int) -> int:
    return mark & _SIZE_MASK


def maker_of(mark: int) -> Maker:
    return Maker(mark >> _SIZE_BITS)


class Trusted:
    """The makers whose blocks count for the engines of one maker in one namespace. It is alive:
    whoever holds it sees each verdict at once.
    """

    __slots__ = ("_met", "maker", "makers", "namespace", "refused")

    def __init__(self, namespace: Namespace, maker: Maker, met: dict[Pair, None]) -> None:
        """met: where makers are noted that are met and not trusted."""
        self.namespace = namespace
        self.maker = maker
        self.makers = {maker}
        self.refused: set[Maker] = set()  # different, or long without a verdict
        self._met = met

    def accepts(self, maker: Maker) -> bool:
        """Whether a block of this maker counts. One that does not has been met."""
        if maker in self.makers:
            return True
        if len(self._met) < MAX_MET:
            self._met[self.namespace, self.maker, maker] = None
        return False
