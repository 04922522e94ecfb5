"""What a link between two slabs promises. node.peers is its only user.

    connect ──▶ post_read ──▶ poll ... poll ──▶ ReadEnd(DONE | FAILED)
                    │                               ▲
                    └────────── abandon ────────────┘   the end is still reported, however late

A read is one-sided: it copies bytes out of a peer's registered memory into ours, and nobody at the
peer is asked. Whether those bytes are still what was wanted is not a link's business (rule 2:
headers are read afterwards, as a read of their own).

The word that matters here is *ended*: nothing writes into the read's target any more, nor ever
will. Slots and buffers are reused on the strength of it (rule 3), so a link that is not sure says
nothing. Not thread-safe: one thread makes all calls.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvray.core.ids import ReadId

Words = npt.NDArray[np.uint64]  # addresses, or counts of bytes

MAX_SEGMENTS = 8_192  # of one read: a batch of 32 MiB in slots of 4 KiB, the smallest there are


class ReadOutcome(Enum):
    DONE = "done"  # every byte is in the target
    FAILED = "failed"  # it has ended all the same; the target's content is undefined


@dataclass(frozen=True, slots=True)
class ReadEnd:
    """The end of one read, reported once. reason is for people; empty if DONE."""

    read_id: ReadId
    outcome: ReadOutcome
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """What one read copies: bytes[i] from remote[i], at the peer, to local[i], here."""

    local: Words
    remote: Words
    bytes: Words

    def __post_init__(self) -> None:
        assert len(self.local) == len(self.remote) == len(self.bytes)
        assert 0 < len(self.bytes) <= MAX_SEGMENTS, f"a read of {len(self.bytes)} segments"
        assert all(part.dtype == np.uint64 for part in (self.local, self.remote, self.bytes))
        assert self.bytes.all(), "an empty segment"

    def __len__(self) -> int:
        return len(self.bytes)

    def coalesced(self) -> "Segments":
        """The same copy in fewer segments: neighbours that touch on both sides become one.

        The order is kept, so it helps whose segments come in the order of their slots, as the
        blocks of one prompt mostly do.
        """
        follows = (self.local[:-1] + self.bytes[:-1] == self.local[1:]) & (
            self.remote[:-1] + self.bytes[:-1] == self.remote[1:]
        )
        starts = np.flatnonzero(np.concatenate(([True], ~follows)))
        if len(starts) == len(self):
            return self
        return Segments(
            local=self.local[starts],
            remote=self.remote[starts],
            bytes=np.add.reduceat(self.bytes, starts),
        )


class Link(Protocol):
    """One end of all connections of a NodeStore. LinkError is the only error it raises."""

    @property
    def name(self) -> str:
        """Unique in the cluster and new in every epoch, so that an old end is never mistaken."""
        ...

    @property
    def metadata(self) -> bytes:
        """What a peer needs to connect. Names the memory that is registered when it is read."""
        ...

    @property
    def in_flight(self) -> int:
        """Reads that have been posted and whose end has not been reported."""
        ...

    @property
    def hints_seen(self) -> int:
        """Grows when a peer says that it is reading from us and depends on our poll()."""
        ...

    def register(self, address: int, length_bytes: int) -> None:
        """Allow this memory as a target of reads, and as a source for peers that get metadata
        read later. It stays mapped until the link is closed.
        """
        ...

    def connect(self, peer_name: str, peer_metadata: bytes) -> None:
        """Make a peer known, in place of one of the same name. Talks to nobody; LinkError if the
        metadata are no good, or while reads from the one of that name are in flight.
        """
        ...

    def disconnect(self, peer_name: str) -> None:
        """Forget a peer. Its reads in flight go on until they end. May be repeated."""
        ...

    def post_read(self, read_id: ReadId, peer_name: str, segments: Segments) -> None:
        """Start a read; may block for as long as the copy takes (same host: 0.1 ms a MiB).

        LinkError: it has not been started and nothing is written any more. That is so for an
        unknown peer, for memory that is not registered on either side, and for a peer whose
        death is known. Otherwise exactly one ReadEnd follows.
        """
        ...

    def poll(self) -> list[ReadEnd]:
        """Make progress, on our reads and on what peers want of us; never blocks."""
        ...

    def abandon(self, read_id: ReadId) -> None:
        """Nobody waits for this read. It goes on; its end is reported. Ended ones: no effect."""
        ...

    def close(self) -> None:
        """Give everything back; peers see this end as dead. Reads still in flight are not ended
        by it: what they write into must stay mapped for as long as the process lives.
        """
        ...
