"""A worker's page tables for its slab, filled in the background.

Else the first copies take a page fault per 4 KiB: 30 ms for 100 MB. Filling takes 0.1 s a GiB, so
nothing waits for it: a copy of what is not filled yet takes its faults, as it would without.
"""

import logging
import threading

from kvray.errors import SlabError
from kvray.node.mapped import POPULATE_STEP_BYTES, MappedSlab

logger = logging.getLogger("kvray.engine")


class PageTables:
    """Of one process, for one slab at a time: the filling of another one ends with its next step.
    A slab that a process has met again, in another session, is filled once.
    """

    def __init__(self) -> None:
        self._slab: MappedSlab | None = None

    def fill(self, slab: MappedSlab) -> None:
        """Begin; returns at once."""
        if slab is self._slab:
            return
        self._slab = slab
        # A daemon: a process may end in the middle of it.
        threading.Thread(target=self._fill, args=(slab,), name="kvray-pages", daemon=True).start()

    def stop(self) -> None:
        """With the next step; the mapping is held until then."""
        self._slab = None

    def _fill(self, slab: MappedSlab) -> None:
        for offset in range(0, slab.slab_bytes, POPULATE_STEP_BYTES):
            if self._slab is not slab:
                return
            try:
                if not slab.populate(offset=offset, length_bytes=POPULATE_STEP_BYTES):
                    return
            except SlabError as exc:
                logger.warning("the slab is not filled into the page tables: %s", exc)
                return
