"""A link inside one process: a read is a memmove. For tests, and for a node that has no peers.

    LoopbackNetwork ── the links that can reach each other
     ├── LoopbackLink "a"   its registered regions, its reads in flight
     └── LoopbackLink "b"

It is as bad as the real one where a test asks for it: `fate` decides, read by read, whether a read
comes late, fails, hangs or can not be posted. Nothing depends on time: lateness is counted in
polls, a hang ends when the test says so.
"""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass

from kvray.core.ids import ReadId
from kvray.errors import LinkError
from kvray.link.base import ReadEnd, ReadOutcome, Segments


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one read.

    polls      it ends in this poll() of the reader after post_read (1: the next one); its bytes
               are copied then, not before, so that an abandoned read writes late
    held_by    it does not end before this event is set, whatever happens to the peer: a network
               that has gone silent
    outcome    FAILED copies the first half of the segments all the same
    refusal    not empty: post_read raises LinkError with this text
    """

    polls: int = 1
    held_by: threading.Event | None = None
    outcome: ReadOutcome = ReadOutcome.DONE
    refusal: str = ""


FateOf = Callable[[ReadId, str, Segments], Fate]  # of a read, given its peer's name

GOOD_FATE = Fate()


def good_fate(_read_id: ReadId, _peer_name: str, _segments: Segments) -> Fate:
    return GOOD_FATE


class LoopbackNetwork:
    """Who can reach whom. Its links may be used by different threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while bytes are copied, so that a source stays mapped
        self.links: dict[bytes, LoopbackLink] = {}  # by metadata
        self.links_made = 0


PROCESS_NETWORK = LoopbackNetwork()


@dataclass(slots=True)
class _Read:
    read_id: ReadId
    peer_name: str
    source: "LoopbackLink"
    segments: Segments
    fate: Fate
    polls_left: int


class LoopbackLink:
    """A Link. fate: called for each read that is posted; may be given to tests only."""

    def __init__(
        self,
        name: str,
        *,
        network: LoopbackNetwork = PROCESS_NETWORK,
        fate: FateOf = good_fate,
    ) -> None:
        self.name = name
        self._network = network
        self._fate = fate
        self._regions: list[tuple[int, int]] = []  # [start, stop)
        self._peers: dict[str, bytes] = {}
        self._reads: dict[ReadId, _Read] = {}
        self._hints_seen = 0
        self._closed = False
        with network.lock:
            network.links_made += 1  # a link of the same name that came before has other metadata
            self.metadata = f"{name}#{network.links_made}".encode()
            network.links[self.metadata] = self

    @property
    def in_flight(self) -> int:
        return len(self._reads)

    @property
    def hints_seen(self) -> int:
        return self._hints_seen

    def register(self, address: int, length_bytes: int) -> None:
        self._regions.append((address, address + length_bytes))

    def connect(self, peer_name: str, peer_metadata: bytes) -> None:
        peer = self._network.links.get(peer_metadata)
        if peer is None or peer is self or peer.name != peer_name:
            raise LinkError(
                f"{self.name}: no link {peer_name!r} has the metadata {peer_metadata!r}"
            )
        if any(read.peer_name == peer_name for read in self._reads.values()):
            raise LinkError(f"{self.name}: reads from {peer_name} have not ended")
        self._peers[peer_name] = peer_metadata

    def disconnect(self, peer_name: str) -> None:
        self._peers.pop(peer_name, None)

    def post_read(self, read_id: ReadId, peer_name: str, segments: Segments) -> None:
        assert read_id not in self._reads
        source = self._network.links.get(self._peers.get(peer_name, b""))
        if source is None:
            raise LinkError(f"{self.name}: {peer_name} is not connected, or gone")
        for link, starts in ((self, segments.local), (source, segments.remote)):
            stops = starts + segments.bytes
            if not all(map(link.covers, starts.tolist(), stops.tolist())):
                raise LinkError(f"{self.name}: not all of it is registered by {link.name}")
        fate = self._fate(read_id, peer_name, segments)
        if fate.refusal:
            raise LinkError(fate.refusal)
        self._reads[read_id] = _Read(
            read_id, peer_name, source, segments, fate, polls_left=max(1, fate.polls)
        )
        with self._network.lock:
            source.take_hint()

    def poll(self) -> list[ReadEnd]:
        ends = []
        for read in list(self._reads.values()):
            read.polls_left = max(0, read.polls_left - 1)
            held = read.fate.held_by is not None and not read.fate.held_by.is_set()
            if read.polls_left == 0 and not held:
                del self._reads[read.read_id]
                ends.append(self._end(read))
        return ends

    def abandon(self, read_id: ReadId) -> None:
        """Nothing to do: a read is kept until its end anyway."""

    def close(self) -> None:
        """A read that hangs never writes after this: nobody is left to copy."""
        with self._network.lock:
            self._network.links.pop(self.metadata, None)
            self._regions.clear()
            self._closed = True

    def covers(self, start: int, stop: int) -> bool:
        """Whether [start, stop) is registered memory."""
        return any(first <= start and stop <= last for first, last in self._regions)

    def take_hint(self) -> None:
        self._hints_seen += 1

    def _end(self, read: _Read) -> ReadEnd:
        failed = read.fate.outcome is ReadOutcome.FAILED
        segments = read.segments
        count = (len(segments) + 1) // 2 if failed else len(segments)
        with self._network.lock:
            if read.source._closed:  # noqa: SLF001 (a link of the same class)
                return ReadEnd(read.read_id, ReadOutcome.FAILED, f"{read.peer_name} is gone")
            for local, remote, length_bytes in zip(
                segments.local[:count].tolist(),
                segments.remote[:count].tolist(),
                segments.bytes[:count].tolist(),
                strict=True,
            ):
                ctypes.memmove(local, remote, length_bytes)
        if failed:
            return ReadEnd(read.read_id, ReadOutcome.FAILED, "it was to fail")
        return ReadEnd(read.read_id, ReadOutcome.DONE)
