"""Mirror: the directory's copy of one node's set, kept in step by numbered announces.

    hello ─▶ WANTED ──part 1──▶ COLLECTING ──last part──▶ IN_STEP
               ▲                  │    ▲                   │   │
               ├──gap, wrong part─┘    └──────part 1───────┘   │
               └──gap, or there is room for what did not fit───┘

A gap in the numbers means that changes have been lost, so the whole set is wanted. While its parts
are collected the old entries stay to be found; the new ones take their place in one step, and are
not found by anybody before. Changes that come meanwhile are applied to both, and count more than
the parts: a part may be older than they are.

An announce with an old number is void. Epochs and terms are compared before one gets here.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from kvray.core.catalogue import Catalogue, Listing
from kvray.core.messages import ENTRY_DTYPE, Announce
from kvray.core.rowarray import Rows


class MirrorState(Enum):
    """See the picture above."""

    WANTED = "wanted"
    COLLECTING = "collecting"
    IN_STEP = "in step"


@dataclass(slots=True)
class MirrorCounts:
    """Of all mirrors of a directory, since its start."""

    repeated: int = 0
    gaps: int = 0
    resyncs: int = 0
    unlisted: int = 0


class Mirror:
    """Of one node in one epoch."""

    def __init__(self, catalogue: Catalogue, counts: MirrorCounts) -> None:
        self.state = MirrorState.WANTED
        self.sequence = 0  # of the last announce
        self.unlisted = 0  # entries that did not fit; removes of them are not noticed
        self._catalogue = catalogue
        self._counts = counts
        self.listing = self._open()
        self.collected: Listing | None = None  # what will replace `listing`, while COLLECTING
        self._collected_unlisted = 0
        self._next_part = 1
        catalogue.show(self.listing)

    def __len__(self) -> int:
        return self._catalogue.count(self.listing)

    def show(self, *, last: bool) -> None:
        """last: the node is a suspect."""
        self._catalogue.show(self.listing, last=last)

    def follow(self, announce: Announce) -> bool:
        """Take over what an announce says. False if it is an old one.

        `listing` may be another one afterwards.
        """
        if announce.sequence <= self.sequence:
            self._counts.repeated += 1
            return False
        if announce.sequence != self.sequence + 1:
            self._counts.gaps += 1
            self._want()
        self.sequence = announce.sequence
        adds: Rows = np.frombuffer(announce.adds, ENTRY_DTYPE)
        if announce.resync_part:
            self._collect(announce.resync_part, adds)
            if announce.resync_last and self.collected is not None:
                self._replace()
        else:
            self._change(adds, announce.removes)
        self._want_what_fits_now()
        return True

    def restart(self, sequence: int) -> None:
        """The node has said hello, after the announce with this number. What it said up to there is
        void: a part of a set that came late would be collected, and no other would follow it.
        """
        self.sequence = sequence
        self._want()

    def drop(self) -> None:
        """The node is gone, or another epoch has come. The mirror is of no use afterwards."""
        self._want()
        self._catalogue.drop(self.listing)

    def _change(self, adds: Rows, removes: bytes) -> None:
        """Removes first: a key in both has been stored again."""
        forgotten = 0
        if removes:
            self._catalogue.remove(self.listing, removes)
            if self.collected is not None:
                forgotten = self._catalogue.remove(self.collected, removes)
        if len(adds):
            self._count_unlisted(self._catalogue.add(self.listing, adds))
            if self.collected is not None:
                self._collected_unlisted += self._catalogue.add(self.collected, adds)
        if forgotten:
            self._want()  # a later part could bring a removed key back

    def _collect(self, part: int, adds: Rows) -> None:
        if part == 1:
            self._want()
            self.collected = self._open()
            self._collected_unlisted = 0
            self._next_part = 1
            self.state = MirrorState.COLLECTING
        if self.collected is None or part != self._next_part:
            self._want()
            return
        self._next_part += 1
        if len(adds):
            self._collected_unlisted += self._catalogue.add(self.collected, adds, keep=True)

    def _replace(self) -> None:
        assert self.collected is not None
        self._catalogue.drop(self.listing)
        self.listing, self.collected = self.collected, None
        self._catalogue.show(self.listing)
        self.unlisted = 0
        self._count_unlisted(self._collected_unlisted)
        self.state = MirrorState.IN_STEP
        self._counts.resyncs += 1

    def _want(self) -> None:
        """The whole set, from its first part on."""
        if self.collected is not None:
            self._catalogue.drop(self.collected)
            self.collected = None
        self.state = MirrorState.WANTED

    def _want_what_fits_now(self) -> None:
        """While the new set is collected both are there, so both must fit."""
        fits = len(self) + self.unlisted <= self._catalogue.room
        if self.unlisted and fits and self.state is MirrorState.IN_STEP:
            self._want()

    def _count_unlisted(self, count: int) -> None:
        self.unlisted += count
        self._counts.unlisted += count

    def _open(self) -> Listing:
        """If all numbers are taken, most of them wait for the sweep: the roster is smaller."""
        while (listing := self._catalogue.open()) is None:
            self._catalogue.sweep()
        return listing

    def check(self) -> None:
        assert (self.state is MirrorState.COLLECTING) == (self.collected is not None)
        assert self.collected != self.listing
