"""The link thread over loopback: reads end once, scratch rows are in quarantine, idle is idle.

LinkLoop has no clock, so time is a number here; LinkThread is tested for what a thread adds.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import pytest

from kvray.core.commands import (
    NO_OFFSETS,
    AbandonRead,
    ConnectPeer,
    DisconnectPeer,
    PostRead,
    ReadKind,
)
from kvray.core.header_runs import Offsets, header_runs
from kvray.core.ids import Epoch, NodeId, ReadId, SlabId, SlotIndex
from kvray.core.layout import HEADER_BYTES, SLOT_HEADER_DTYPE, Geometry
from kvray.core.messages import NodeInfo
from kvray.core.way import Outcome
from kvray.errors import LinkError
from kvray.link.base import Link, ReadOutcome, Segments
from kvray.link.loopback import Fate, LoopbackLink, LoopbackNetwork
from kvray.node import pace
from kvray.node.link_loop import CONNECT_LIMIT_US, MAX_READS, LinkLoop, OpenLink, Wake
from kvray.node.link_measures import MAX_MEASURES, PIECE_BYTES, TARGET_BYTES
from kvray.node.pace import BUSY_WINDOW_US, IDLE_POLL_US
from kvray.node.peers import (
    ConnectFailed,
    Ending,
    LinkEvent,
    LinkFailed,
    LinkOpened,
    LinkThread,
    MeasureEnded,
    MeasureRead,
    PeerConnected,
    ReadEnded,
    _Bell,
)
from kvray.node.scratch import ROWS_PER_PAGE, HeaderScratch
from tests.contract.link_contract import Memory, pattern

EVENT_LIMIT_S = 10.0  # what comes at once comes in milliseconds; a busy machine gets more
GEOMETRY = Geometry(slab_bytes=1 << 20, extent_bytes=1 << 16)
SECOND_US = 1_000_000

E = TypeVar("E")


class Peer:
    """A node to read from: its slab full of a pattern, its headers numbered."""

    def __init__(self, network: LoopbackNetwork, node_id: str, epoch: int = 1) -> None:
        self.slab = Memory(GEOMETRY.slab_bytes)
        self.slab.bytes[:] = pattern(GEOMETRY.slab_bytes, stamp=len(node_id))
        start = GEOMETRY.slot_table_offset
        headers = self.slab.bytes[start:][: GEOMETRY.slot_count * HEADER_BYTES]
        self.headers = headers.view(SLOT_HEADER_DTYPE)
        self.headers["generation"] = np.arange(GEOMETRY.slot_count)
        self.link = LoopbackLink(f"{node_id}@{epoch}", network=network)
        self.link.register(self.slab.address, self.slab.length_bytes)
        self.info = NodeInfo(
            node_id=NodeId(node_id),
            epoch=Epoch(epoch),
            link_name=self.link.name,
            link_metadata=self.link.metadata,
            slab_id=SlabId(bytes(16)),
            slab_address=self.slab.address,
            slab_bytes=GEOMETRY.slab_bytes,
            extent_bytes=GEOMETRY.extent_bytes,
            host="here",
            kvray_version="0",
            format_version=1,
        )


class Node:
    """The node that reads: its slab, its LinkLoop, the time, what has been reported."""

    def __init__(self, *, scratch_pages: int = 4, opened: bool = True) -> None:
        self.network = LoopbackNetwork()
        self.slab = Memory(GEOMETRY.slab_bytes)
        self.events: list[object] = []
        self.fates: dict[int, Fate] = {}  # by read id; ids below 0 are probes and timed ones
        self.probe_fate = Fate()
        self.posted: list[Segments] = []
        self.scratch = HeaderScratch(scratch_pages)
        self.loop = LinkLoop(
            slab_address=self.slab.address,
            slab_bytes=self.slab.length_bytes,
            on_event=self.events.append,
            scratch=self.scratch,
        )
        self.now_us = 1_000
        self.links: list[LoopbackLink] = []
        self.peers: list[Peer] = []
        if opened:
            self.open()

    def open(self) -> LoopbackLink:
        self.do(OpenLink(self.make_link))
        return self.links[-1]

    def make_link(self) -> Link:
        name = f"me@{len(self.links) + 1}"
        self.links.append(LoopbackLink(name, network=self.network, fate=self._fate))
        return self.links[-1]

    def _fate(self, read_id: ReadId, _peer_name: str, segments: Segments) -> Fate:
        self.posted.append(segments)
        return self.fates.get(read_id, Fate() if read_id > 0 else self.probe_fate)

    def do(self, command: object) -> None:
        self.loop.do(command, self.now_us)  # type: ignore[arg-type]
        self.loop.check()

    def poll(self, count: int = 1) -> None:
        for _ in range(count):
            self.loop.poll(self.now_us)
            self.loop.settle(self.now_us)
            self.loop.check()

    def run_for(self, duration_us: int) -> int:
        """As the thread does it. Returns how often it polled."""
        polled_before = self.loop.poll_count
        until_us = self.now_us + duration_us
        while self.now_us < until_us:
            self.now_us += self.loop.next_wait_us(self.now_us)
            self.loop.poll(self.now_us)
            self.loop.settle(self.now_us)
        self.loop.check()
        return self.loop.poll_count - polled_before

    def with_peer(self, node_id: str = "peer") -> Peer:
        peer = Peer(self.network, node_id)
        self.peers.append(peer)  # its memory is read from for as long as this node lives
        self.do(ConnectPeer(peer.info))
        self.poll()
        assert self.take(PeerConnected)
        return peer

    def take(self, kind: type[E]) -> list[E]:
        """The events of one kind so far, each once."""
        taken = [event for event in self.events if isinstance(event, kind)]
        self.events[:] = [event for event in self.events if not isinstance(event, kind)]
        return taken

    def take_end(self) -> ReadEnded:
        (ended,) = self.take(ReadEnded)
        return ended


def payload(read_id: int, peer: Peer, *pieces: tuple[int, int, int]) -> PostRead:
    """pieces: (offset at the peer, offset here, bytes)."""
    remote, local, sizes = np.array(pieces, np.uint64).T.copy()
    return PostRead(
        ReadId(read_id), peer.info.node_id, peer.info.epoch, ReadKind.PAYLOAD, remote, local, sizes
    )


def header_offsets(*slots: int) -> Offsets:
    return np.array([GEOMETRY.header_offset(SlotIndex(slot)) for slot in slots], np.uint64)


def with_headers(post: PostRead, *slots: int) -> PostRead:
    return replace(post, header_runs=header_runs(header_offsets(*slots)))


def node_that_reads_headers_along(fate: Fate) -> Node:
    """The payload of its read 1 has come; fate: of the headers."""
    node = Node()
    peer = node.with_peer()
    node.fates[1] = Fate(polls=2)
    node.do(with_headers(payload(1, peer, (8192, 65536, 4096)), 5))
    node.poll()
    node.fates[1] = fate
    node.poll()
    return node


def headers(read_id: int, peer: Peer, *slots: int) -> PostRead:
    remote = header_offsets(*slots)
    return PostRead(
        ReadId(read_id),
        peer.info.node_id,
        peer.info.epoch,
        ReadKind.HEADERS,
        remote,
        NO_OFFSETS,
        np.full(len(slots), HEADER_BYTES, np.uint64),
    )


# -- reads --------------------------------------------------------------------------------------


def test_a_payload_read_puts_the_peers_bytes_into_our_slab() -> None:
    node = Node()
    peer = node.with_peer()
    node.do(payload(1, peer, (8192, 65536, 4096), (40960, 4096, 100)))
    node.poll()
    ended = node.take_end()
    assert (ended.read_id, ended.kind, ended.ending) == (1, ReadKind.PAYLOAD, Ending.DONE)
    assert np.array_equal(node.slab.bytes[65536:69632], peer.slab.bytes[8192:12288])
    assert np.array_equal(node.slab.bytes[4096:4196], peer.slab.bytes[40960:41060])


def test_a_header_read_comes_with_its_rows_in_the_order_asked_for() -> None:
    node = Node()
    peer = node.with_peer()
    slots = [5, 3, 200, 4, 201]
    node.do(headers(1, peer, *slots))
    node.poll()
    ended = node.take_end()
    assert ended.headers["generation"].tolist() == slots
    assert ended.headers.dtype == SLOT_HEADER_DTYPE


def test_a_payload_read_comes_with_its_headers_as_they_are_when_it_has_come() -> None:
    node = Node()
    peer = node.with_peer()
    node.fates[1] = Fate(polls=2)
    node.do(with_headers(payload(1, peer, (8192, 65536, 4096), (40960, 4096, 100)), 3, 7))
    node.poll()
    assert not node.take(ReadEnded), "the payload is on its way"
    peer.headers["generation"][7] = 99  # what the slots hold has changed meanwhile
    node.fates[1] = Fate(polls=3)  # of the headers
    node.poll()
    assert np.array_equal(node.slab.bytes[65536:69632], peer.slab.bytes[8192:12288])
    assert not node.take(ReadEnded), "the headers are on their way"
    node.poll(2)
    ended = node.take_end()
    assert (ended.read_id, ended.kind, ended.ending) == (1, ReadKind.PAYLOAD, Ending.DONE)
    assert ended.headers["generation"].tolist() == [3, 99]
    assert node.scratch.free_count == node.scratch.page_count


def test_a_payload_whose_headers_can_not_be_read_along_comes_without_them() -> None:
    node = Node(scratch_pages=1)
    peer = node.with_peer()
    too_many = range(ROWS_PER_PAGE + 1)
    node.do(with_headers(payload(1, peer, (8192, 65536, 4096)), *too_many))
    node.poll()
    ended = node.take_end()
    assert (ended.kind, ended.ending, len(ended.headers)) == (ReadKind.PAYLOAD, Ending.DONE, 0)

    node.fates[2] = Fate(polls=2)
    node.do(with_headers(payload(2, peer, (8192, 65536, 4096)), 5))
    node.do(DisconnectPeer(peer.info.node_id, peer.info.epoch))
    node.poll(2)
    ended = node.take_end()
    assert (ended.kind, ended.ending, len(ended.headers)) == (ReadKind.PAYLOAD, Ending.DONE, 0)


def test_a_payload_read_fails_with_its_headers() -> None:
    node = node_that_reads_headers_along(Fate(outcome=ReadOutcome.FAILED))
    ended = node.take_end()
    assert (ended.kind, ended.ending, len(ended.headers)) == (ReadKind.PAYLOAD, Ending.FAILED, 0)
    assert node.scratch.free_count == node.scratch.page_count


def test_nobody_waits_for_the_headers_of_a_payload_that_was_abandoned() -> None:
    node = Node()
    peer = node.with_peer()
    node.fates[1] = Fate(polls=2)
    node.do(with_headers(payload(1, peer, (8192, 65536, 4096)), 5))
    node.do(AbandonRead(ReadId(1)))
    node.fates[1] = Fate(held_by=threading.Event())  # headers would never come
    node.poll(2)
    ended = node.take_end()
    assert (ended.kind, ended.ending, len(ended.headers)) == (ReadKind.PAYLOAD, Ending.DONE, 0)


def test_headers_of_a_read_that_was_abandoned_after_its_payload_hold_its_end_back() -> None:
    silent = threading.Event()
    node = node_that_reads_headers_along(Fate(held_by=silent))
    node.do(AbandonRead(ReadId(1)))
    node.poll(3)
    assert not node.take(ReadEnded)
    assert node.scratch.free_count == node.scratch.page_count - 1
    silent.set()
    node.poll()
    assert node.take_end().ending is Ending.DONE
    assert node.scratch.free_count == node.scratch.page_count


def test_header_rows_are_copies_that_later_reads_do_not_change() -> None:
    node = Node(scratch_pages=1)
    peer = node.with_peer()
    node.do(headers(1, peer, 7))
    node.poll()
    first = node.take_end()
    node.do(headers(2, peer, 8))
    node.poll()
    assert first.headers["generation"].tolist() == [7]
    assert node.take_end().headers["generation"].tolist() == [8]


def test_more_headers_than_a_page_holds_come_in_one_read() -> None:
    node = Node(scratch_pages=4)
    peer = node.with_peer()
    slots = list(range(3 * ROWS_PER_PAGE + 1))[::-1]
    node.do(headers(1, peer, *slots))
    node.poll()
    assert node.take_end().headers["generation"].tolist() == slots


def test_each_read_ends_once_also_one_that_fails() -> None:
    node = Node()
    peer = node.with_peer()
    node.fates = {2: Fate(outcome=ReadOutcome.FAILED), 3: Fate(polls=3)}
    for read_id in (1, 2, 3):
        node.do(payload(read_id, peer, (0, read_id * 8192, 8192)))
    node.poll(5)
    endings = {ended.read_id: ended.ending for ended in node.take(ReadEnded)}
    assert endings == {1: Ending.DONE, 2: Ending.FAILED, 3: Ending.DONE}
    assert node.loop.in_flight == 0


def test_an_abandoned_read_is_reported_when_it_ends_and_not_before() -> None:
    node = Node()
    peer = node.with_peer()
    held_by = threading.Event()
    node.fates = {1: Fate(held_by=held_by)}
    node.do(payload(1, peer, (0, 0, 4096)))
    node.do(AbandonRead(ReadId(1)))
    node.do(AbandonRead(ReadId(1)))
    node.do(AbandonRead(ReadId(9)))  # ended long ago
    node.poll(100)
    assert node.take(ReadEnded) == []
    assert not node.slab.bytes.any()
    held_by.set()
    node.poll()
    assert node.take_end().ending is Ending.DONE
    assert node.slab.bytes[:4096].any(), "it has written late: its target was in quarantine"


# -- what is refused ----------------------------------------------------------------------------


def test_what_can_not_be_read_is_an_event_and_starts_nothing() -> None:
    node = Node()
    peer = node.with_peer()
    other_epoch = Peer(node.network, "peer", epoch=2)
    stranger = Peer(node.network, "stranger")
    node.take(LinkOpened)
    end = GEOMETRY.slab_bytes
    for read, reason in [
        (payload(1, stranger, (0, 0, 64)), "not connected"),
        (payload(2, other_epoch, (0, 0, 64)), "not connected"),
        (payload(3, peer, (end - 63, 0, 64)), "outside of the slab"),
        (payload(4, peer, (0, 0, 64), (2**64 - 32, 64, 64)), "outside of the slab"),
        (payload(5, peer, (0, 0, 64), (end + 4096, 64, 64)), "outside of the slab"),
        (payload(6, peer, (0, 0, 2**64 - 1)), "outside of the slab"),
        (headers(7, peer, 2**30), "outside of the slab"),
        (headers(8, peer), "pieces"),
    ]:
        node.do(read)
        ended = node.take_end()
        assert (ended.read_id, ended.ending) == (read.read_id, Ending.REFUSED)
        assert reason in ended.reason
    node.poll(3)
    assert node.events == []
    assert node.loop.in_flight == 0
    assert node.scratch.free_count == node.scratch.page_count


def test_a_target_outside_of_our_slab_is_a_bug() -> None:
    node = Node()
    peer = node.with_peer()
    with pytest.raises(AssertionError, match="foreign target"):
        node.do(payload(1, peer, (0, GEOMETRY.slab_bytes - 63, 64)))


def test_a_read_that_the_link_does_not_take_is_refused_and_its_rows_are_free() -> None:
    node = Node()
    peer = node.with_peer()
    node.fates = {1: Fate(refusal="the cable is out")}
    node.do(headers(1, peer, 1))
    ended = node.take_end()
    assert (ended.ending, ended.reason) == (Ending.REFUSED, "the cable is out")
    assert node.scratch.free_count == node.scratch.page_count


def test_reads_that_do_not_end_reach_a_limit() -> None:
    node = Node()
    peer = node.with_peer()
    held_by = threading.Event()
    node.fates = {read_id: Fate(held_by=held_by) for read_id in range(1, MAX_READS + 1)}
    for read_id in range(1, MAX_READS + 1):
        node.loop.do(payload(read_id, peer, (0, 0, 64)), node.now_us)
    node.do(payload(MAX_READS + 1, peer, (0, 0, 64)))
    assert node.take_end().ending is Ending.REFUSED
    held_by.set()
    node.poll()
    assert len(node.take(ReadEnded)) == MAX_READS
    node.do(payload(MAX_READS + 2, peer, (0, 0, 64)))
    node.poll()
    assert node.take_end().ending is Ending.DONE


# -- scratch rows -------------------------------------------------------------------------------


def test_the_rows_of_an_abandoned_read_are_nobody_elses_until_it_has_ended() -> None:
    # Goal: a late header never lands in the rows of another read.
    # Method: two pages; one is held by a read that hangs, the other is used again and again.
    node = Node(scratch_pages=2)
    peer = node.with_peer()
    held_by = threading.Event()
    node.fates = {1: Fate(held_by=held_by)}
    node.do(headers(1, peer, 11))
    node.do(AbandonRead(ReadId(1)))
    for read_id in range(2, 10):
        node.do(headers(read_id, peer, 20 + read_id))
        node.poll()
        assert node.take_end().headers["generation"].tolist() == [20 + read_id]
    node.fates[10] = Fate(polls=2)
    node.do(headers(10, peer, 30))
    node.do(headers(11, peer, 31))
    refused = node.take_end()
    assert (refused.read_id, refused.ending) == (11, Ending.REFUSED)
    held_by.set()
    node.poll(2)
    late, own = node.take(ReadEnded)
    assert (late.read_id, late.headers["generation"].tolist()) == (1, [11])
    assert (own.read_id, own.headers["generation"].tolist()) == (10, [30])
    assert node.scratch.free_count == 2


def test_a_read_of_more_rows_than_are_free_takes_none_of_them() -> None:
    node = Node(scratch_pages=2)
    peer = node.with_peer()
    node.do(headers(1, peer, *range(2 * ROWS_PER_PAGE + 1)))
    assert node.take_end().ending is Ending.REFUSED
    node.do(headers(2, peer, *range(2 * ROWS_PER_PAGE)))
    node.poll()
    assert node.take_end().ending is Ending.DONE


def test_scattered_headers_are_read_without_gaps_when_room_is_short() -> None:
    # Method: one of two pages is taken; the other has room for 64 rows, not for the 196 from the
    # first of these headers to the last.
    node = Node(scratch_pages=2)
    peer = node.with_peer()
    held_by = threading.Event()
    node.fates = {1: Fate(held_by=held_by)}
    node.do(headers(1, peer, 3))
    node.do(headers(2, peer, 100, 5, 200))
    node.poll()
    ended = node.take_end()
    assert (ended.read_id, ended.headers["generation"].tolist()) == (2, [100, 5, 200])
    held_by.set()
    node.poll()
    assert node.scratch.free_count == 2


# -- reads that are only timed ------------------------------------------------------------------


def measure(measure_id: int, peer: Peer, size: int = 64, limit_us: int = SECOND_US) -> MeasureRead:
    return MeasureRead(measure_id, peer.info.node_id, peer.info.epoch, size, limit_us)


def test_a_read_is_timed_from_its_post_until_after_the_poll_that_saw_its_end() -> None:
    node = Node()
    peer = node.with_peer()
    before = node.slab.bytes.copy()
    node.probe_fate = Fate(polls=2)
    node.do(measure(1, peer, 8192))
    node.poll()
    assert node.take(MeasureEnded) == []
    node.now_us += 300
    node.loop.poll(node.now_us)
    node.loop.settle(node.now_us + 40)
    assert node.take(MeasureEnded) == [MeasureEnded(1, Outcome.MEASURED, 340)]
    assert node.take(ReadEnded) == []
    assert np.array_equal(node.slab.bytes, before), "nothing is written into the slab"
    assert node.scratch.free_count == node.scratch.page_count
    assert node.loop.in_flight == 0


def test_a_large_one_comes_from_all_over_the_slab_into_little_scratch_memory() -> None:
    node = Node(scratch_pages=TARGET_BYTES // 4096)
    peer = node.with_peer()
    node.do(measure(1, peer, 8 * PIECE_BYTES + 100))
    node.poll()
    (ended,) = node.take(MeasureEnded)
    assert ended.outcome is Outcome.MEASURED
    segments = node.posted[-1]
    assert segments.bytes.sum() == 8 * PIECE_BYTES + 100
    start, stop = node.scratch.address, node.scratch.address + TARGET_BYTES
    assert (segments.local >= start).all()
    assert (segments.local + segments.bytes <= stop).all()


def test_a_late_one_is_told_once_and_keeps_its_rows_until_it_has_ended() -> None:
    node = Node(scratch_pages=2)
    peer = node.with_peer()
    held_by = threading.Event()
    node.probe_fate = Fate(held_by=held_by)
    node.do(measure(1, peer, limit_us=1_000))
    node.run_for(3_000)
    (late,) = node.take(MeasureEnded)
    assert (late.measure_id, late.outcome) == (1, Outcome.LATE)
    node.run_for(2 * BUSY_WINDOW_US)
    assert node.run_for(SECOND_US) == SECOND_US // IDLE_POLL_US, "nobody waits for it any more"
    assert node.scratch.free_count == 1
    node.probe_fate = Fate()
    node.do(headers(1, peer, 11))
    node.poll()
    assert node.take_end().headers["generation"].tolist() == [11]
    held_by.set()
    node.poll()
    assert node.take(MeasureEnded) == []
    assert node.scratch.free_count == 2


def test_one_that_is_slow_holds_up_no_other_read() -> None:
    node = Node()
    peer = node.with_peer()
    node.probe_fate = Fate(held_by=threading.Event())
    node.do(measure(1, peer, 8192))
    node.do(with_headers(payload(1, peer, (8192, 65536, 4096)), 5))
    node.poll(2)
    ended = node.take_end()
    assert (ended.ending, ended.headers["generation"].tolist()) == (Ending.DONE, [5])
    assert node.loop.in_flight == 1


def test_late_ones_are_few() -> None:
    node = Node(scratch_pages=8)
    peer = node.with_peer()
    node.probe_fate = Fate(held_by=threading.Event())
    for measure_id in range(MAX_MEASURES + 1):
        node.do(measure(measure_id, peer, limit_us=0))
    node.now_us += 1
    node.poll()
    outcomes = [ended.outcome for ended in node.take(MeasureEnded)]
    assert outcomes == [Outcome.SKIPPED, *[Outcome.LATE] * MAX_MEASURES]


def test_one_that_can_not_be_started_says_why() -> None:
    node = Node(scratch_pages=1)
    peer = node.with_peer()
    stranger = Peer(node.network, "stranger")
    node.do(measure(1, stranger))
    node.do(measure(2, peer, 8192))
    node.probe_fate = Fate(refusal="it is dead")
    node.do(measure(3, peer))
    node.probe_fate = Fate(outcome=ReadOutcome.FAILED)
    node.do(measure(4, peer))
    node.poll()
    ended = {ended.measure_id: ended for ended in node.take(MeasureEnded)}
    assert {n: e.outcome for n, e in ended.items()} == {
        1: Outcome.NOT_CONNECTED,
        2: Outcome.SKIPPED,
        3: Outcome.FAILED,
        4: Outcome.FAILED,
    }
    assert all(e.reason for e in ended.values())
    assert node.scratch.free_count == 1


def test_one_goes_on_with_the_old_link_when_a_new_one_is_opened() -> None:
    node = Node()
    peer = node.with_peer()
    held_by = threading.Event()
    node.probe_fate = Fate(held_by=held_by)
    node.do(measure(1, peer))
    node.open()
    held_by.set()
    node.poll()
    assert [ended.outcome for ended in node.take(MeasureEnded)] == [Outcome.MEASURED]
    assert node.links[0].metadata not in node.network.links


# -- peers --------------------------------------------------------------------------------------


def test_a_peer_is_connected_when_a_first_read_has_come_back() -> None:
    node = Node()
    node.probe_fate = Fate(polls=3)
    peer = Peer(node.network, "peer")
    node.do(ConnectPeer(peer.info))
    node.poll(2)
    assert node.take(PeerConnected) == []
    node.now_us += 7_000
    node.poll()
    assert node.take(PeerConnected) == [PeerConnected(NodeId("peer"), Epoch(1), took_ms=7)]
    assert node.take(ReadEnded) == [], "nobody has asked for that read"


def test_a_peer_that_is_not_there_fails_to_connect() -> None:
    node = Node()
    peer = Peer(node.network, "peer")
    peer.link.close()
    node.do(ConnectPeer(peer.info))
    (failed,) = node.take(ConnectFailed)
    assert (failed.node_id, failed.epoch) == ("peer", 1)
    node.do(payload(1, peer, (0, 0, 64)))
    assert node.take_end().ending is Ending.REFUSED


def test_a_peer_that_is_silent_is_given_up_but_may_still_be_read_from() -> None:
    node = Node()
    silence = threading.Event()
    node.probe_fate = Fate(held_by=silence)
    peer = Peer(node.network, "peer")
    node.do(ConnectPeer(peer.info))
    node.take(LinkOpened)
    node.run_for(CONNECT_LIMIT_US - SECOND_US)
    assert node.events == []
    node.run_for(2 * SECOND_US)
    (failed,) = node.take(ConnectFailed)
    assert "no answer" in failed.reason
    node.do(payload(1, peer, (0, 0, 64)))
    node.poll()
    assert node.take_end().ending is Ending.DONE
    silence.set()
    node.poll()
    assert node.take(PeerConnected) == []
    assert node.scratch.free_count == node.scratch.page_count


def test_a_peer_that_could_not_be_connected_is_tried_again_at_the_next_read() -> None:
    # Method: a link does not take a peer again while a read from it is in flight.
    node = Node()
    peer = node.with_peer()
    held_by = threading.Event()
    node.fates = {1: Fate(held_by=held_by)}
    node.do(payload(1, peer, (0, 0, 64)))
    node.do(DisconnectPeer(peer.info.node_id, peer.info.epoch))
    node.do(ConnectPeer(peer.info))
    assert len(node.take(ConnectFailed)) == 1
    node.do(payload(2, peer, (0, 64, 64)))
    assert node.take_end().ending is Ending.REFUSED
    held_by.set()
    node.poll()
    assert node.take_end().ending is Ending.DONE
    node.do(payload(3, peer, (0, 64, 64)))
    node.poll()
    assert node.take_end().ending is Ending.DONE


def test_a_disconnected_peer_is_not_read_from_but_its_reads_end() -> None:
    node = Node()
    peer = node.with_peer()
    node.fates = {1: Fate(polls=2)}
    node.do(payload(1, peer, (0, 0, 64)))
    node.do(DisconnectPeer(peer.info.node_id, peer.info.epoch))
    node.do(DisconnectPeer(peer.info.node_id, peer.info.epoch))
    node.do(payload(2, peer, (0, 0, 64)))
    assert node.take_end().ending is Ending.REFUSED
    node.poll(2)
    assert node.take_end().read_id == 1


def test_a_peer_that_is_disconnected_while_it_is_being_connected_is_not_waited_for() -> None:
    node = Node()
    silence = threading.Event()
    node.probe_fate = Fate(held_by=silence)
    peer = Peer(node.network, "peer")
    node.do(ConnectPeer(peer.info))
    node.do(DisconnectPeer(peer.info.node_id, peer.info.epoch))
    node.take(LinkOpened)
    node.run_for(2 * BUSY_WINDOW_US)
    assert node.run_for(SECOND_US) == SECOND_US // IDLE_POLL_US
    silence.set()
    node.run_for(CONNECT_LIMIT_US)
    assert node.events == []
    assert node.scratch.free_count == node.scratch.page_count


# -- a new epoch --------------------------------------------------------------------------------


def test_a_new_epoch_gets_a_new_link_and_the_old_one_goes_when_its_reads_have_ended() -> None:
    node = Node()
    peer = node.with_peer()
    old = node.links[0]
    held_by = threading.Event()
    node.fates = {1: Fate(held_by=held_by)}
    node.do(payload(1, peer, (0, 0, 4096)))
    node.take(LinkOpened)

    new = node.open()
    assert node.take(LinkOpened) == [LinkOpened(new.name, new.metadata)]
    node.do(payload(2, peer, (0, 8192, 64)))
    assert node.take_end().ending is Ending.REFUSED, "peers are connected anew"
    node.do(ConnectPeer(peer.info))
    node.do(payload(3, peer, (0, 8192, 64)))
    node.poll()
    assert node.take_end().ending is Ending.DONE
    assert old.metadata in node.network.links

    held_by.set()
    node.poll()
    assert node.take_end().ending is Ending.DONE
    assert old.metadata not in node.network.links
    assert new.metadata in node.network.links


def test_a_link_that_can_not_be_opened_leaves_the_old_one_at_work() -> None:
    node = Node()
    peer = node.with_peer()

    def fails() -> Link:
        raise LinkError("no agent")

    node.do(OpenLink(fails))
    assert node.take(LinkFailed) == [LinkFailed("no agent")]
    node.do(payload(1, peer, (0, 0, 64)))
    node.poll()
    assert node.take_end().ending is Ending.DONE


def test_before_a_link_is_open_everything_is_refused() -> None:
    node = Node(opened=False)
    peer = Peer(node.network, "peer")
    node.do(ConnectPeer(peer.info))
    assert len(node.take(ConnectFailed)) == 1
    node.do(payload(1, peer, (0, 0, 64)))
    assert node.take_end().ending is Ending.REFUSED


# -- how often it polls -------------------------------------------------------------------------


def idle_node() -> tuple[Node, Peer]:
    node = Node()
    peer = node.with_peer()
    node.run_for(2 * BUSY_WINDOW_US)
    return node, peer


def test_an_idle_node_polls_as_seldom_as_it_may() -> None:
    node, _ = idle_node()
    assert node.run_for(10 * SECOND_US) == 10 * SECOND_US // IDLE_POLL_US


def test_a_read_that_is_awaited_is_polled_for_quickly() -> None:
    node, peer = idle_node()
    node.fates = {1: Fate(held_by=threading.Event())}
    node.do(payload(1, peer, (0, 0, 64)))
    assert node.loop.next_wait_us(node.now_us) <= 50
    assert 900 <= node.run_for(SECOND_US) <= 1_100


def test_an_abandoned_read_costs_no_more_than_idling() -> None:
    node, peer = idle_node()
    node.fates = {1: Fate(held_by=threading.Event())}
    node.do(payload(1, peer, (0, 0, 64)))
    node.do(AbandonRead(ReadId(1)))
    node.run_for(2 * BUSY_WINDOW_US)
    assert node.run_for(10 * SECOND_US) == 10 * SECOND_US // IDLE_POLL_US


@pytest.mark.parametrize("by_hint", [False, True])
def test_a_peer_that_is_about_to_read_from_us_is_answered_quickly_for_a_while(
    by_hint: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    node, peer = idle_node()
    if by_hint:
        (mine,) = node.links
        peer.link.connect(mine.name, mine.metadata)
        target = Memory(4096)
        peer.link.register(target.address, 4096)
        first = np.full(1, node.slab.address, np.uint64)
        there = np.full(1, target.address, np.uint64)
        peer.link.post_read(ReadId(1), mine.name, Segments(there, first, np.full(1, 64, np.uint64)))
        node.poll()
    else:
        node.do(Wake())
    quick = node.run_for(BUSY_WINDOW_US)
    idle = node.run_for(BUSY_WINDOW_US)
    assert quick >= BUSY_WINDOW_US // 1_000
    assert idle <= 1 + BUSY_WINDOW_US // IDLE_POLL_US


# -- the thread ---------------------------------------------------------------------------------


class Threaded:
    """A LinkThread over loopback; its events arrive in a queue, with the thread that put them."""

    def __init__(self, fate: Callable[..., Fate] = lambda *_: Fate()) -> None:
        self.network = LoopbackNetwork()
        self.slab = Memory(GEOMETRY.slab_bytes)
        self.events: SimpleQueue[LinkEvent] = SimpleQueue()
        self.event_threads: set[str] = set()
        self.fate = fate
        self.thread = LinkThread(
            slab_address=self.slab.address,
            slab_bytes=self.slab.length_bytes,
            on_event=self._on_event,
            scratch_pages=4,
        )

    def _on_event(self, event: LinkEvent) -> None:
        self.event_threads.add(threading.current_thread().name)
        self.events.put(event)

    def make_link(self) -> Link:
        return LoopbackLink("me@1", network=self.network, fate=self.fate)

    def next(self) -> LinkEvent:
        return self.events.get(timeout=EVENT_LIMIT_S)

    def with_peer(self) -> Peer:
        peer = Peer(self.network, "peer")
        self.thread.open(self.make_link)
        self.thread.submit(ConnectPeer(peer.info))
        assert isinstance(self.next(), LinkOpened)
        assert isinstance(self.next(), PeerConnected)
        return peer


@pytest.fixture
def threaded() -> Iterator[Threaded]:
    node = Threaded()
    yield node
    node.thread.close()


def link_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvray-link"]


def test_reads_go_through_the_thread_and_come_back_from_it(threaded: Threaded) -> None:
    peer = threaded.with_peer()
    threaded.thread.submit(payload(1, peer, (8192, 0, 4096)))
    threaded.thread.submit(headers(2, peer, 9))
    first, second = threaded.next(), threaded.next()
    assert isinstance(first, ReadEnded)
    assert isinstance(second, ReadEnded)
    assert first.ending is Ending.DONE
    assert np.array_equal(threaded.slab.bytes[:4096], peer.slab.bytes[8192:12288])
    assert second.headers["generation"].tolist() == [9]
    assert threaded.event_threads == {"kvray-link"}
    assert threaded.thread.snapshot()["reads_done"] == 2


def test_a_command_does_not_wait_for_the_idle_poll(
    threaded: Threaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Method: an idle poll that comes only after the event would have been given up.
    peer = threaded.with_peer()
    monkeypatch.setattr(pace, "IDLE_POLL_US", int(10 * EVENT_LIMIT_S * SECOND_US))
    monkeypatch.setattr(pace, "BUSY_WINDOW_US", 0)
    for read_id in range(1, 20):
        threaded.thread.submit(payload(read_id, peer, (0, 0, 64)))
        ended = threaded.next()
        assert isinstance(ended, ReadEnded)
        assert ended.read_id == read_id


def test_a_bell_wakes_who_waits_or_who_comes_next_and_once() -> None:
    # Method: a wait that nothing ended would last for longer than the test may.
    bell = _Bell()
    bell.ring()
    bell.ring()
    bell.wait(10 * EVENT_LIMIT_S)
    bell.wait(0.0)
    bell.wait(1e-6)
    rings = threading.Timer(0.01, bell.ring)
    rings.start()
    bell.wait(10 * EVENT_LIMIT_S)
    rings.join()


def test_closing_ends_the_thread_and_the_link() -> None:
    node = Threaded()
    peer = node.with_peer()
    node.thread.submit(payload(1, peer, (0, 0, 64)))
    assert isinstance(node.next(), ReadEnded)
    assert node.thread.close() == 0
    assert link_threads() == []
    assert list(node.network.links) == [peer.link.metadata]
    node.thread.submit(payload(2, peer, (0, 0, 64)))
    assert node.thread.close() == 0, "closing again does no harm"
    assert node.events.empty()


def test_closing_says_how_many_reads_have_not_ended() -> None:
    held_by = threading.Event()
    node = Threaded(fate=lambda read_id, *_: Fate(held_by=held_by if read_id > 1 else None))
    peer = node.with_peer()
    for read_id in (1, 2, 3):
        node.thread.submit(payload(read_id, peer, (0, 0, 64)))
    assert isinstance(node.next(), ReadEnded)
    assert node.thread.close() == 2
    assert link_threads() == []


def test_a_link_that_can_not_be_opened_is_an_event(threaded: Threaded) -> None:
    def fails() -> Link:
        raise LinkError("no agent")

    threaded.thread.open(fails)
    assert threaded.next() == LinkFailed("no agent")
    threaded.thread.open(threaded.make_link)
    assert isinstance(threaded.next(), LinkOpened)


def test_a_bug_ends_the_thread_and_says_so() -> None:
    node = Threaded()
    peer = node.with_peer()
    node.thread.submit(payload(-1, peer, (0, 0, 64)))
    failed = node.next()
    assert isinstance(failed, LinkFailed)
    assert failed.fatal
    node.thread.close()
    assert link_threads() == []
