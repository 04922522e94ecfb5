"""The loopback link: the contract, and that it is as bad as a test asks it to be."""

import itertools
import threading
from collections.abc import Callable

import numpy as np
import pytest

from kvray.core.ids import ReadId
from kvray.errors import LinkError
from kvray.link.base import Link, ReadOutcome, Segments
from kvray.link.loopback import Fate, LoopbackLink, LoopbackNetwork
from tests.contract.link_contract import LinkContract, Memory, Owner, Reader, pattern

OWNER_BYTES = 8 << 20

_numbers = itertools.count(1)


class LoopbackOwner:
    """Its pause is what a silent owner looks like from outside: reads from it hang."""

    def __init__(self, network: LoopbackNetwork) -> None:
        number = next(_numbers)
        self.stamp = number
        self.answers = threading.Event()
        self.answers.set()
        self._link = LoopbackLink(f"owner@{number}", network=network)
        self._memory = Memory(OWNER_BYTES)
        self._memory.bytes[:] = pattern(OWNER_BYTES, self.stamp)
        self._link.register(self._memory.address, OWNER_BYTES)
        self.name = self._link.name
        self.metadata = self._link.metadata
        self.address = self._memory.address
        self.length_bytes = OWNER_BYTES

    def pause(self) -> None:
        self.answers.clear()

    def resume(self) -> None:
        self.answers.set()

    def hints_seen(self) -> int:
        return self._link.hints_seen

    def kill(self) -> None:
        self._link.close()


class TestLoopbackLink(LinkContract):
    @pytest.fixture
    def network(self) -> LoopbackNetwork:
        return LoopbackNetwork()

    @pytest.fixture
    def make_link(self, network: LoopbackNetwork, owner: LoopbackOwner) -> Callable[[], Link]:
        def fate(_read_id: ReadId, peer_name: str, _segments: Segments) -> Fate:
            return Fate(held_by=owner.answers if peer_name == owner.name else None)

        return lambda: LoopbackLink(f"reader@{next(_numbers)}", network=network, fate=fate)

    @pytest.fixture
    def start_owner(self, network: LoopbackNetwork) -> Callable[[], Owner]:
        return lambda: LoopbackOwner(network)

    @pytest.fixture
    def owner(self, network: LoopbackNetwork) -> LoopbackOwner:
        return LoopbackOwner(network)


# -- fates --------------------------------------------------------------------------------------


def reader_with(fate: Fate) -> tuple[Reader, LoopbackOwner]:
    network = LoopbackNetwork()
    owner = LoopbackOwner(network)
    link = LoopbackLink("reader@1", network=network, fate=lambda *_: fate)
    reader = Reader(link)
    reader.connect(owner)
    return reader, owner


def test_a_late_read_writes_in_the_poll_that_reports_it_and_not_before() -> None:
    reader, owner = reader_with(Fate(polls=3))
    reader.post(1, owner, (0, 0, 64))
    for _ in range(2):
        reader.poll()
        assert reader.ends == {}
        assert not reader.memory.bytes.any()
    reader.poll()
    assert reader.ends[ReadId(1)].outcome is ReadOutcome.DONE
    assert reader.holds(owner, (0, 0, 64))


def test_a_hanging_read_hangs_even_when_its_peer_dies_and_ends_when_it_is_let_go() -> None:
    held_by = threading.Event()
    reader, owner = reader_with(Fate(held_by=held_by))
    reader.post(1, owner, (0, 0, 64))
    owner.kill()
    for _ in range(50):
        reader.poll()
    assert reader.link.in_flight == 1
    held_by.set()
    reader.poll()
    assert reader.ends[ReadId(1)].outcome is ReadOutcome.FAILED
    assert not reader.memory.bytes.any()


def test_a_failed_read_leaves_a_part_of_the_bytes() -> None:
    reader, owner = reader_with(Fate(outcome=ReadOutcome.FAILED))
    pieces = [(index * 8192, index * 4096, 4096) for index in range(4)]
    reader.post(1, owner, *pieces)
    reader.poll()
    assert reader.ends[ReadId(1)].outcome is ReadOutcome.FAILED
    assert reader.holds(owner, *pieces[:2])
    assert not reader.memory.bytes[16384:].any()


def test_a_read_that_is_refused_is_not_in_flight() -> None:
    reader, owner = reader_with(Fate(refusal="not today"))
    with pytest.raises(LinkError, match="not today"):
        reader.post(1, owner, (0, 0, 64))
    assert reader.link.in_flight == 0


def test_a_fate_is_chosen_read_by_read() -> None:
    network = LoopbackNetwork()
    owner = LoopbackOwner(network)
    asked: list[tuple[ReadId, str, int]] = []

    def fate(read_id: ReadId, peer_name: str, segments: Segments) -> Fate:
        asked.append((read_id, peer_name, len(segments)))
        return Fate(outcome=ReadOutcome.FAILED if read_id == 2 else ReadOutcome.DONE)

    reader = Reader(LoopbackLink("reader@1", network=network, fate=fate))
    reader.connect(owner)
    for read_id in (1, 2, 3):
        reader.post(read_id, owner, (0, 0, 64), (8192, 8192, 64))
    ends = reader.wait(1, 2, 3)
    assert [end.outcome.name for end in ends] == ["DONE", "FAILED", "DONE"]
    assert asked == [(ReadId(1), owner.name, 2), (ReadId(2), owner.name, 2), (3, owner.name, 2)]


# -- segments -----------------------------------------------------------------------------------


def segments(*pieces: tuple[int, int, int]) -> Segments:
    local, remote, sizes = np.array(pieces, np.uint64).T
    return Segments(local.copy(), remote.copy(), sizes.copy())


def test_coalescing_joins_what_touches_on_both_sides_and_keeps_the_order() -> None:
    joined = segments(
        (0, 100, 10), (10, 110, 5), (15, 300, 5), (40, 305, 5), (45, 310, 1), (46, 311, 2)
    ).coalesced()
    assert list(
        zip(joined.local.tolist(), joined.remote.tolist(), joined.bytes.tolist(), strict=True)
    ) == [(0, 100, 15), (15, 300, 5), (40, 305, 8)]


def test_coalescing_leaves_alone_what_does_not_touch() -> None:
    scattered = segments((0, 0, 10), (20, 10, 10), (10, 30, 10))
    assert scattered.coalesced() is scattered


def test_coalescing_never_changes_which_byte_goes_where() -> None:
    # Method: random copies, many of them touching, as maps from target byte to source byte.
    random = np.random.default_rng(7)
    for _ in range(200):
        pieces = []
        local, remote = 0, 10_000
        for _ in range(random.integers(1, 12)):
            size = int(random.integers(1, 6))
            local += int(random.choice([0, 0, 0, 3]))
            remote += int(random.choice([0, 0, 0, 5, -40]))
            pieces.append((local, remote, size))
            local, remote = local + size, remote + size
        before = segments(*pieces)
        assert _byte_map(before.coalesced()) == _byte_map(before)


def _byte_map(copies: Segments) -> dict[int, int]:
    return {
        local + index: remote + index
        for local, remote, size in zip(
            copies.local.tolist(), copies.remote.tolist(), copies.bytes.tolist(), strict=True
        )
        for index in range(size)
    }
