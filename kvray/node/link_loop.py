"""What the link thread does, one step at a time. It has neither thread nor clock.

    do(command) ──▶ Link ──▶ poll() ──▶ on_event(LinkEvent)
                     ▲          │
                     └─ headers ┘ of a payload that has come

Each PostRead ends in exactly one ReadEnded, as each read of a link does; until then its target
slots and its scratch rows are in quarantine, abandoned or not. Nothing is decided here about
blocks: which read, when to give one up and what a header proves are core.fetch's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from kvray.core.commands import (
    NO_OFFSETS,
    AbandonRead,
    ConnectPeer,
    DisconnectPeer,
    Headers,
    PostRead,
    ReadKind,
)
from kvray.core.header_runs import HeaderRuns, Offsets, header_runs
from kvray.core.ids import Epoch, NodeId, ReadId
from kvray.core.layout import HEADER_BYTES, SLOT_HEADER_DTYPE
from kvray.core.messages import NodeInfo
from kvray.core.way import Outcome
from kvray.errors import LinkError
from kvray.link.base import MAX_SEGMENTS, Link, ReadEnd, ReadOutcome, Segments, Words
from kvray.node.link_measures import LinkMeasures, MeasureEnded, MeasureRead
from kvray.node.pace import PollPace
from kvray.node.scratch import HeaderScratch, Span

MAX_READS = 1_024  # in flight, abandoned ones too; above core.fetch's own caps, so never the first
# A live peer answers within some of its idle polls (below 0.2 s, seen); a busy host needs longer.
CONNECT_LIMIT_US = 5_000_000

NO_HEADERS: Headers = np.empty(0, SLOT_HEADER_DTYPE)

MakeLink = Callable[[], Link]
_PeerId = tuple[NodeId, Epoch]


class Ending(Enum):
    DONE = "done"
    FAILED = "failed"
    REFUSED = "refused"  # it was never started: not connected, out of range, no scratch rows


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """The link works. name and metadata belong into NodeInfo."""

    name: str
    metadata: bytes


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """No link could be opened; or, if fatal, the link thread has ended for a bug."""

    reason: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A first read from this peer has come back: the next one pays for no connection."""

    node_id: NodeId
    epoch: Epoch
    took_ms: int


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """For the log: reads from this peer may still be asked for, and try again."""

    node_id: NodeId
    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class ReadEnded:
    """headers: a copy of the rows if it is DONE and was a HEADERS read, or one of PAYLOAD whose
    headers could be read, too; else NO_HEADERS.
    """

    read_id: ReadId
    kind: ReadKind
    ending: Ending
    reason: str = ""
    headers: Headers = field(default_factory=lambda: NO_HEADERS)


LinkEvent = LinkOpened | LinkFailed | PeerConnected | ConnectFailed | ReadEnded | MeasureEnded


@dataclass(frozen=True, slots=True)
class OpenLink:
    """Make a link and use it from now on. One that was there goes when its reads have ended."""

    make_link: MakeLink


@dataclass(frozen=True, slots=True)
class Wake:
    """A peer is about to connect to us or to read from us."""


LinkCommand = OpenLink | ConnectPeer | DisconnectPeer | PostRead | AbandonRead | MeasureRead | Wake


@dataclass(slots=True, eq=False)
class _Peer:
    info: NodeInfo
    known: bool = False  # to the link
    probe: ReadId | None = None  # a read that only makes the connection
    asked_us: int = 0


@dataclass(slots=True, eq=False)
class _Rows:
    """Where the headers of a HEADERS read are: in these rows of this span."""

    span: Span
    runs: HeaderRuns


@dataclass(slots=True, eq=False)
class _Read:
    """post: as it was asked for. rows: of the headers that are on their way, by then also of a
    PAYLOAD; None while it is the payload that is.
    """

    link: Link
    post: PostRead
    rows: _Rows | None
    abandoned: bool = False

    @property
    def peer_id(self) -> _PeerId:
        return self.post.node_id, self.post.epoch


class LinkLoop:
    """One step at a time: do() what was asked, poll(), settle(), and sleep for at most
    next_wait_us().

    slab: the local target of payload reads, registered with every link that is opened. on_event is
    called from inside do(), poll() and settle(). Time is microseconds of any monotonic clock.
    """

    def __init__(
        self,
        *,
        slab_address: int,
        slab_bytes: int,
        on_event: Callable[[LinkEvent], None],
        scratch: HeaderScratch,
    ) -> None:
        self._slab_address = slab_address
        self._slab_bytes = slab_bytes
        self._on_event = on_event
        self._scratch = scratch
        self._pace = PollPace()
        self._link: Link | None = None
        self._retired: list[Link] = []  # closed when their last read has ended
        self._peers: dict[_PeerId, _Peer] = {}
        self._reads: dict[ReadId, _Read] = {}
        self._measures = LinkMeasures(scratch)
        self._awaited = 0  # reads in flight that nobody has abandoned
        self._hints_seen = 0
        self._next_own_id = -1  # own reads count down from here: the NodeStore's count up
        self.poll_count = 0
        self.ended_counts = dict.fromkeys(Ending, 0)
        self.read_bytes = 0  # of payload, asked for in reads that were posted

    @property
    def in_flight(self) -> int:
        return len(self._reads) + len(self._measures)

    def do(self, command: LinkCommand, now_us: int) -> None:
        match command:
            case PostRead():
                self._post(command)
            case AbandonRead(read_id):
                self._abandon(read_id)
            case ConnectPeer(info):
                self._connect(info, now_us)
            case DisconnectPeer(node_id, epoch):
                self._disconnect((node_id, epoch))
            case OpenLink(make_link):
                self._open(make_link)
            case MeasureRead():
                self._measure(command, now_us)
            case Wake():
                pass
        self._pace.stir(now_us)

    def poll(self, now_us: int) -> None:
        """Make progress on both sides, report what has ended."""
        self.poll_count += 1
        for link in self._links():
            while ends := link.poll():  # again: the end of one read may have begun another
                for end in ends:
                    self._end(end, now_us)
        hints_seen = sum(link.hints_seen for link in self._links())
        if hints_seen != self._hints_seen:
            self._hints_seen = hints_seen
            self._pace.stir(now_us)
        if self._retired:
            self._close_retired()
        self._give_up_probes(now_us)

    def settle(self, now_us: int) -> None:
        """Say what was measured. now_us: after the poll, which may have taken long itself."""
        for ended in self._measures.take_ended(now_us):
            self._on_event(ended)

    def next_wait_us(self, now_us: int) -> int:
        return self._pace.next_wait_us(now_us, awaited=self._awaited + self._measures.awaited > 0)

    def close(self) -> int:
        """How many reads have not ended: if not 0, slab and scratch must stay mapped for ever."""
        for link in self._links():
            link.close()
        self._link = None
        self._retired = []
        return self.in_flight

    # -- links and peers ---------------------------------------------------------------------

    def _links(self) -> list[Link]:
        return self._retired if self._link is None else [self._link, *self._retired]

    def _open(self, make_link: MakeLink) -> None:
        link: Link | None = None
        try:
            link = make_link()
            link.register(self._slab_address, self._slab_bytes)
            metadata = link.metadata  # before the scratch rows, which are no business of peers
            link.register(self._scratch.address, self._scratch.length_bytes)
        except LinkError as exc:
            if link is not None:
                link.close()  # it will be tried again, and again
            self._on_event(LinkFailed(str(exc)))
            return
        if self._link is not None:
            for read_id in [peer.probe for peer in self._peers.values() if peer.probe is not None]:
                self._abandon(read_id)
            self._retired.append(self._link)
        self._link = link
        self._peers = {}  # whoever is still of interest is connected again
        self._on_event(LinkOpened(link.name, metadata))

    def _close_retired(self) -> None:
        for link in [link for link in self._retired if not link.in_flight]:
            self._hints_seen -= link.hints_seen
            self._retired.remove(link)
            link.close()

    def _connect(self, info: NodeInfo, now_us: int) -> None:
        peer_id = (info.node_id, info.epoch)
        self._disconnect(peer_id)
        peer = _Peer(info, asked_us=now_us)
        self._peers[peer_id] = peer
        reason = self._make_known(peer) or self._probe(peer)
        if reason:
            self._on_event(ConnectFailed(*peer_id, reason))

    def _make_known(self, peer: _Peer) -> str:
        """Why it can not be read from; empty if it can."""
        if self._link is None:
            return "no link is open"
        if not peer.known:
            try:
                self._link.connect(peer.info.link_name, peer.info.link_metadata)
            except LinkError as exc:
                return str(exc)
            peer.known = True
        return ""

    def _probe(self, peer: _Peer) -> str:
        """Read 64 bytes, so that the connection is made now and not by the first block."""
        read_id = self._own_id()
        reason = self._start(_headers(read_id, peer, np.zeros(1, np.uint64)), peer)
        if not reason:
            peer.probe = read_id
        return reason

    def _own_id(self) -> ReadId:
        self._next_own_id -= 1
        return ReadId(self._next_own_id + 1)

    def _disconnect(self, peer_id: _PeerId) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return
        if peer.probe is not None:
            self._abandon(peer.probe)
        if peer.known and self._link is not None:
            self._link.disconnect(peer.info.link_name)

    def _give_up_probes(self, now_us: int) -> None:
        for peer_id, peer in self._peers.items():
            if peer.probe is not None and now_us - peer.asked_us > CONNECT_LIMIT_US:
                self._abandon(peer.probe)
                peer.probe = None
                limit_ms = CONNECT_LIMIT_US // 1_000
                self._on_event(ConnectFailed(*peer_id, f"no answer in {limit_ms} ms"))

    def _probed(self, peer_id: _PeerId, end: ReadEnd, now_us: int) -> None:
        peer = self._peers.get(peer_id)
        if peer is None or peer.probe != end.read_id:
            return  # disconnected, or given up
        peer.probe = None
        if end.outcome is ReadOutcome.DONE:
            self._on_event(PeerConnected(*peer_id, (now_us - peer.asked_us) // 1_000))
        else:
            self._on_event(ConnectFailed(*peer_id, end.reason))

    # -- reads -------------------------------------------------------------------------------

    def _post(self, command: PostRead) -> None:
        assert not _is_probe(command.read_id)
        peer = self._peers.get((command.node_id, command.epoch))
        if peer is None:
            reason = f"node {command.node_id} epoch {command.epoch} is not connected"
        else:
            reason = self._make_known(peer) or self._start(command, peer)
        if reason:
            self.ended_counts[Ending.REFUSED] += 1
            self._on_event(ReadEnded(command.read_id, command.kind, Ending.REFUSED, reason))

    def _start(self, post: PostRead, peer: _Peer, *, part_of: PostRead | None = None) -> str:
        """Why it can not be started; empty if it has been. part_of: whose headers these are."""
        link = self._link
        assert link is not None
        assert post.read_id not in self._reads
        info = peer.info
        remote_offsets, sizes_bytes = post.remote_offsets, post.bytes
        if len(self._reads) >= MAX_READS:
            return f"{MAX_READS} reads have not ended"
        if not 0 < len(sizes_bytes) <= MAX_SEGMENTS:
            return f"a read has 1 to {MAX_SEGMENTS} pieces, not {len(sizes_bytes)}"
        if _outside(remote_offsets, sizes_bytes, info.slab_bytes):
            return f"outside of the slab of node {info.node_id}, of {info.slab_bytes} bytes"
        rows: _Rows | None = None
        if post.kind is ReadKind.HEADERS:
            assert (sizes_bytes == HEADER_BYTES).all(), "a header has another size"
            rows = self._take_rows(remote_offsets, part_of.header_runs if part_of else None)
            if rows is None:
                return f"no room for {len(sizes_bytes)} headers: {self._scratch.free_count} pages"
            remote_offsets, sizes_bytes = rows.runs.remote_offsets, rows.runs.bytes
            first = np.uint64(self._scratch.address_of(rows.span))
            local = first + np.cumsum(sizes_bytes) - sizes_bytes
        else:
            assert not _outside(post.local_offsets, sizes_bytes, self._slab_bytes), (
                "a foreign target"
            )
            local = np.uint64(self._slab_address) + post.local_offsets
        remote: Words = np.uint64(info.slab_address) + remote_offsets
        try:
            link.post_read(post.read_id, info.link_name, Segments(local, remote, sizes_bytes))
        except LinkError as exc:
            if rows is not None:
                self._scratch.give_back(rows.span)
            return str(exc)
        if rows is None:
            self.read_bytes += int(sizes_bytes.sum())
        self._reads[post.read_id] = _Read(link, part_of or post, rows)
        self._awaited += 1
        return ""

    def _measure(self, command: MeasureRead, now_us: int) -> None:
        peer = self._peers.get((command.node_id, command.epoch))
        if peer is None:
            reason = f"node {command.node_id} epoch {command.epoch} is not connected"
        else:
            reason = self._make_known(peer)
        if peer is None or reason:
            ended: MeasureEnded | None = MeasureEnded(
                command.measure_id, Outcome.NOT_CONNECTED, reason=reason
            )
        else:
            assert self._link is not None
            ended = self._measures.start(command, self._own_id(), self._link, peer.info, now_us)
        if ended is not None:
            self._on_event(ended)

    def _take_rows(self, offsets: Offsets, runs: HeaderRuns | None) -> _Rows | None:
        """Room for these headers and what is read along with them; for nothing else where that is
        too much; None if there is not even that. runs: of these, if somebody has made them.
        """
        runs = runs or header_runs(offsets)
        span = self._scratch.take(runs.row_count)
        if span is None:
            runs = header_runs(offsets, gap_bytes=0)
            span = self._scratch.take(runs.row_count)
        return None if span is None else _Rows(span, runs)

    def _abandon(self, read_id: ReadId) -> None:
        read = self._reads.get(read_id)
        if read is not None and not read.abandoned:
            read.abandoned = True
            self._awaited -= 1
            read.link.abandon(read_id)

    def _end(self, end: ReadEnd, now_us: int) -> None:
        if self._measures.end(end):
            return
        read = self._reads.pop(end.read_id)
        self._awaited -= not read.abandoned
        done = end.outcome is ReadOutcome.DONE
        headers = NO_HEADERS
        if read.rows is not None:
            if done:
                headers = self._scratch.rows(read.rows.span, read.rows.runs.rows)
            self._scratch.give_back(read.rows.span)
        elif done and not read.abandoned and self._read_headers(read):
            return
        if _is_probe(end.read_id):
            self._probed(read.peer_id, end, now_us)
            return
        ending = Ending.DONE if done else Ending.FAILED
        self.ended_counts[ending] += 1
        self._on_event(ReadEnded(end.read_id, read.post.kind, ending, end.reason, headers))

    def _read_headers(self, payload: _Read) -> bool:
        """A payload has come: read its headers, under its id. False: nobody does."""
        post, peer = payload.post, self._peers.get(payload.peer_id)
        runs = post.header_runs
        if peer is None or runs is None or self._make_known(peer):
            return False
        headers = _headers(post.read_id, peer, runs.offsets)
        return not self._start(headers, peer, part_of=post)

    def snapshot(self) -> dict[str, int | str]:
        """May be called by any thread; the numbers need not be of one moment."""
        link = self._link
        return {
            "link": link.name if link is not None else "",
            "retired_links": len(self._retired),
            "peers": len(self._peers),
            "reads_in_flight": len(self._reads),
            "measures_in_flight": len(self._measures),
            "reads_abandoned": len(self._reads) - self._awaited,
            "scratch_pages_free": self._scratch.free_count,
            "polls": self.poll_count,
            "hints_seen": self._hints_seen,
            "read_bytes": self.read_bytes,
            **{f"reads_{ending.value}": count for ending, count in self.ended_counts.items()},
        }

    def check(self) -> None:
        """Assert that reads, links, probes and scratch rows agree, both ways."""
        by_link: dict[int, int] = {id(link): 0 for link in self._links()}
        for read in self._reads.values():
            by_link[id(read.link)] += 1
        for link in self._measures.links():
            by_link[id(link)] += 1
        for link in self._links():
            assert link.in_flight == by_link[id(link)], "a read that only one side knows"
        assert self._awaited == sum(not read.abandoned for read in self._reads.values())
        spans = [read.rows.span for read in self._reads.values() if read.rows is not None]
        self._scratch.check([*spans, *self._measures.spans()])
        for peer_id, peer in self._peers.items():
            if peer.probe is not None:
                assert self._reads[peer.probe].peer_id == peer_id
        for read_id, read in self._reads.items():
            if _is_probe(read_id) and not read.abandoned:
                assert self._peers[read.peer_id].probe == read_id


def _headers(read_id: ReadId, peer: _Peer, offsets: Offsets) -> PostRead:
    info, sizes_bytes = peer.info, np.full(len(offsets), HEADER_BYTES, np.uint64)
    return PostRead(
        read_id, info.node_id, info.epoch, ReadKind.HEADERS, offsets, NO_OFFSETS, sizes_bytes
    )


def _is_probe(read_id: ReadId) -> bool:
    """A read that only makes a connection."""
    return read_id < 0


def _outside(offsets: Offsets, sizes_bytes: Offsets, limit_bytes: int) -> bool:
    """Whether any [offset, offset + size) reaches beyond [0, limit_bytes)."""
    limit = np.uint64(limit_bytes)
    if (sizes_bytes > limit).any():
        return True
    return bool((offsets > limit - sizes_bytes).any())
