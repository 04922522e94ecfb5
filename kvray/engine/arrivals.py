"""Which slots of a load have come, while the NodeStore is still fetching the others.

    told with the job: slot, generation, key, offset, bytes
      header READY, and it fits ──▶ may be copied (and is compared again after the copy)
      header WRITING, and it fits ─▶ not yet
      anything else, or not READY in time ──▶ never: the load has failed

Slots are taken in order: a chain is worth something up to its first gap only, and its blocks are
fetched in order. No thread and no wait here: the copier's threads look now and then (LOOK_S there).
"""

import time
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvray.node.mapped import MappedSlab


class SlotsTold(Protocol):
    """What a load was told of its slots: see jobs.SlotSpec, which is vLLM's too."""

    @property
    def slots(self) -> npt.NDArray[np.uint32]: ...
    @property
    def generations(self) -> npt.NDArray[np.uint64]: ...
    @property
    def offsets(self) -> npt.NDArray[np.uint64]: ...
    @property
    def slot_bytes(self) -> npt.NDArray[np.uint64]: ...
    @property
    def keys(self) -> bytes: ...
    def keys_from(self, index: int) -> bytes: ...
    def __len__(self) -> int: ...


class Arrivals:
    """Of one load on one rank. Called by one thread at a time."""

    def __init__(
        self,
        slab: MappedSlab,
        slots: SlotsTold,
        slot_ends: npt.NDArray[np.int64],
        *,
        until_s: float,
    ) -> None:
        """slot_ends: for each slot the end of its pieces, see pieces.Pieces. until_s: by
        time.monotonic(); what is not there then does not come.
        """
        self._slab = slab
        self._slots = slots
        self._slot_ends = slot_ends
        self._until_s = until_s
        self._come = 0  # slots

    def pieces(self) -> int | None:
        """How many of the first pieces may be copied now; None if the others never may."""
        slots, begin = self._slots, self._come
        # The clock first: what has come in time counts, however late this thread looks.
        is_late = time.monotonic() >= self._until_s
        come = self._slab.leading_ready(
            slots.slots[begin:],
            slots.generations[begin:],
            slots.offsets[begin:],
            slots.slot_bytes[begin:],
            slots.keys_from(begin),
        )
        if come is None:
            return None
        self._come += come
        if is_late and self._come < len(slots):
            return None
        return int(self._slot_ends[self._come - 1]) if self._come else 0

    def all_match(self) -> bool:
        """Whether all of it still is what was told: to be asked after the copy (rule 2)."""
        slots = self._slots
        return self._slab.all_match(
            slots.slots, slots.generations, slots.offsets, slots.slot_bytes, slots.keys
        )
