"""Which of the ways a part of a job takes over PCIe. Pure: a function of what the part looks like.

    BATCH    one call of the driver; copy engines move the pieces, each with a cost of its own
    GATHER   one kernel moves all pieces, on a few multiprocessors; for many small ones
    SINGLE   a call for each piece: memory that is not locked, for which nothing else is promised,
             and drivers before 12.8

Where GATHER and BATCH cross is a matter of the card and of PCIe: benchmarks/gpu.py measures both at
each page size, and prints where they do. Until it has run, the bounds are a guess near what vLLM's
own copies use on an H100 (28 KiB for loads; stores always by copy engine).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from kvray.core.direction import Direction


class Way(Enum):
    """See the module's docstring."""

    BATCH = "batch"
    GATHER = "gather"
    SINGLE = "single"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What this device, its driver and its libraries can do."""

    batches: bool
    gathers: bool


# Pieces whose mean is smaller go by GATHER.
GATHER_BELOW_BYTES: Mapping[Direction, int] = MappingProxyType(
    {Direction.LOAD: 32 * 1024, Direction.STORE: 0}
)
MIN_GATHER_PIECES = 16  # with fewer there is one for each block of threads, or none


def choose_way(
    *,
    direction: Direction,
    piece_count: int,
    total_bytes: int,
    is_locked: bool,
    abilities: Abilities,
    gather_below_bytes: Mapping[Direction, int] = GATHER_BELOW_BYTES,
) -> Way:
    """is_locked: whether all of its pieces in the slab are registered with the driver."""
    if not is_locked:
        return Way.SINGLE
    is_small = total_bytes < gather_below_bytes[direction] * piece_count
    if abilities.gathers and is_small and piece_count >= MIN_GATHER_PIECES:
        return Way.GATHER
    return Way.BATCH if abilities.batches else Way.SINGLE
