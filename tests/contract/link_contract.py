"""What kvray.link.base promises, as tests that every link passes.

A suite is a subclass that says how to make a link and how to start an owner: the other end, with
memory to read from. Over NIXL the owner is a process of its own.
"""

import mmap
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pytest

from kvray.core.ids import ReadId
from kvray.errors import LinkError
from kvray.link.base import Link, ReadEnd, ReadOutcome, Segments

END_LIMIT_S = 20.0  # a first connection on a busy two-core machine takes 0.1 s
KILL_LIMIT_S = 10.0  # over TCP and cma a death is seen within 0.1 s
MIB = 1 << 20

Bytes = npt.NDArray[np.uint8]


@lru_cache(maxsize=8)
def pattern(length_bytes: int, stamp: int) -> Bytes:
    """Bytes that say where they come from: neighbours, pages and stamps differ."""
    position = np.arange(length_bytes, dtype=np.uint64)
    mixed = (position * np.uint64(2_654_435_761) + np.uint64(stamp)) >> np.uint64(11)
    result: Bytes = (mixed ^ position).astype(np.uint8)
    return result


class Memory:
    """Page-aligned, zeroed, mapped for as long as the object lives."""

    def __init__(self, length_bytes: int) -> None:
        self.bytes: Bytes = np.frombuffer(mmap.mmap(-1, length_bytes), np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self.length_bytes = length_bytes


class Owner(Protocol):
    """The other end. Its memory holds pattern(length_bytes, stamp)."""

    name: str
    metadata: bytes
    address: int
    length_bytes: int
    stamp: int

    def pause(self) -> None:
        """From now on it answers nobody: a first read from it does not come back."""
        ...

    def resume(self) -> None: ...

    def hints_seen(self) -> int: ...

    def kill(self) -> None:
        """It is gone, without a word."""
        ...


class Reader:
    """A link with memory to read into, and the ends that it has reported so far."""

    def __init__(self, link: Link, length_bytes: int = 4 * MIB) -> None:
        self.link = link
        self.memory = Memory(length_bytes)
        self.ends: dict[ReadId, ReadEnd] = {}
        link.register(self.memory.address, length_bytes)

    def connect(self, owner: Owner) -> None:
        self.link.connect(owner.name, owner.metadata)

    def post(self, read_id: int, owner: Owner, *pieces: tuple[int, int, int]) -> None:
        """pieces: (offset here, offset at the owner, bytes)."""
        self.link.post_read(ReadId(read_id), owner.name, self.segments(owner, *pieces))

    def segments(self, owner: Owner, *pieces: tuple[int, int, int]) -> Segments:
        here, there, sizes = np.array(pieces, np.uint64).T
        return Segments(
            local=here + np.uint64(self.memory.address),
            remote=there + np.uint64(owner.address),
            bytes=sizes.copy(),
        )

    def poll(self) -> None:
        for end in self.link.poll():
            assert end.read_id not in self.ends, "a read has ended twice"
            self.ends[end.read_id] = end

    def wait(self, *read_ids: int, limit_s: float = END_LIMIT_S) -> list[ReadEnd]:
        wanted = [ReadId(read_id) for read_id in read_ids]
        self.poll_until(lambda: all(read_id in self.ends for read_id in wanted), limit_s=limit_s)
        return [self.ends[read_id] for read_id in wanted]

    def poll_until(self, condition: Callable[[], bool], *, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"nothing in {limit_s} s; ended: {self.ends}"
            self.poll()
            time.sleep(0.0002)  # lets the owner run: two processes share this machine's cores

    def holds(self, owner: Owner, *pieces: tuple[int, int, int]) -> bool:
        source = pattern(owner.length_bytes, owner.stamp)
        return all(
            np.array_equal(self.memory.bytes[here : here + size], source[there : there + size])
            for here, there, size in pieces
        )


class LinkContract:
    """Subclasses give the fixtures make_link, start_owner and owner."""

    @pytest.fixture
    def make_link(self) -> Callable[[], Link]:
        raise NotImplementedError

    @pytest.fixture
    def start_owner(self) -> Callable[[], Owner]:
        """Of a new name each time; ended by the fixture."""
        raise NotImplementedError

    @pytest.fixture
    def owner(self) -> Owner:
        """One that several tests may share."""
        raise NotImplementedError

    @pytest.fixture
    def reader(self, make_link: Callable[[], Link]) -> Reader:
        return Reader(make_link())

    # -- reading -----------------------------------------------------------------------------

    def test_bytes_arrive(self, reader: Reader, owner: Owner) -> None:
        reader.connect(owner)
        reader.post(1, owner, (0, 4096, MIB))
        (end,) = reader.wait(1)
        assert end.outcome is ReadOutcome.DONE
        assert reader.holds(owner, (0, 4096, MIB))
        assert not reader.memory.bytes[MIB:].any()
        assert reader.link.in_flight == 0

    def test_each_of_many_segments_lands_in_its_place_and_nowhere_else(
        self, reader: Reader, owner: Owner
    ) -> None:
        random = np.random.default_rng(1)
        slots = random.permutation(256).tolist()
        pieces = [
            (index * 8192, slot * 8192, size)
            for index, (slot, size) in enumerate(
                zip(slots, random.integers(1, 8192, 256).tolist(), strict=True)
            )
        ]
        reader.connect(owner)
        reader.post(1, owner, *pieces)
        (end,) = reader.wait(1)
        assert end.outcome is ReadOutcome.DONE
        assert reader.holds(owner, *pieces)
        for here, _, size in pieces:
            assert not reader.memory.bytes[here + size : here + 8192].any()

    def test_segments_that_touch_on_one_side_only_are_not_mixed_up(
        self, reader: Reader, owner: Owner
    ) -> None:
        pieces = [
            (0, 0, 4096),
            (4096, 4096, 4096),  # touches on both sides
            (8192, 65536, 4096),  # here only
            (65536, 69632, 4096),  # there only
        ]
        reader.connect(owner)
        reader.post(1, owner, *pieces)
        reader.wait(1)
        assert reader.holds(owner, *pieces)
        assert not reader.memory.bytes[12288:65536].any()

    def test_several_reads_at_once_end_once_each(self, reader: Reader, owner: Owner) -> None:
        pieces = {
            read_id: (read_id * 65536, (40 - read_id) * 65536, 50_000) for read_id in range(1, 33)
        }
        reader.connect(owner)
        for read_id, piece in pieces.items():
            reader.post(read_id, owner, piece)
        ends = reader.wait(*pieces)
        assert {end.outcome for end in ends} == {ReadOutcome.DONE}
        assert reader.holds(owner, *pieces.values())
        assert reader.link.poll() == []

    def test_a_second_read_sees_what_the_first_saw_or_something_newer(
        self, reader: Reader, owner: Owner
    ) -> None:
        # Rule 2 rests on it: a header is read after its payload, by a read posted after its end.
        reader.connect(owner)
        reader.post(1, owner, (0, 0, MIB))
        reader.wait(1)
        reader.post(2, owner, (2 * MIB, 0, 64))
        reader.wait(2)
        assert reader.holds(owner, (0, 0, MIB), (2 * MIB, 0, 64))

    def test_many_readers_of_one_owner_do_not_disturb_each_other(
        self, make_link: Callable[[], Link], owner: Owner
    ) -> None:
        readers = [Reader(make_link()) for _ in range(3)]
        faults: list[str] = []

        def read_all(first: int, reader: Reader) -> None:
            for read_id in range(1, 21):
                piece = (0, (first + read_id) * 65536, 65536)
                reader.post(read_id, owner, piece)
                (end,) = reader.wait(read_id)
                if end.outcome is not ReadOutcome.DONE or not reader.holds(owner, piece):
                    faults.append(f"reader {first}, read {read_id}: {end}")

        for reader in readers:
            reader.connect(owner)
        threads = [
            threading.Thread(target=read_all, args=(index, reader))
            for index, reader in enumerate(readers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * END_LIMIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert faults == []
        assert [len(reader.ends) for reader in readers] == [20, 20, 20]

    # -- what can not be read ----------------------------------------------------------------

    def test_a_peer_that_was_never_connected_is_an_error(
        self, reader: Reader, owner: Owner
    ) -> None:
        with pytest.raises(LinkError):
            reader.post(1, owner, (0, 0, 64))
        assert reader.link.in_flight == 0
        assert reader.link.poll() == []

    def test_memory_that_is_not_registered_is_an_error_on_either_side(
        self, reader: Reader, owner: Owner
    ) -> None:
        reader.connect(owner)
        for piece in [
            (reader.memory.length_bytes - 63, 0, 64),
            (0, owner.length_bytes - 63, 64),
        ]:
            with pytest.raises(LinkError):
                reader.post(1, owner, piece)
        assert reader.link.in_flight == 0
        reader.post(2, owner, (0, 0, 64))  # nothing of that has hurt the connection
        (end,) = reader.wait(2)
        assert end.outcome is ReadOutcome.DONE

    def test_metadata_that_are_not_the_peers_are_an_error(
        self, reader: Reader, owner: Owner
    ) -> None:
        for name, metadata in [
            ("somebody-else@1", owner.metadata),
            (owner.name, b""),
            (owner.name, b"nonsense"),
            (owner.name, owner.metadata[: len(owner.metadata) // 2]),
            (reader.link.name, reader.link.metadata),
        ]:
            with pytest.raises(LinkError):
                reader.link.connect(name, metadata)
        with pytest.raises(LinkError):
            reader.post(1, owner, (0, 0, 64))
        reader.connect(owner)
        reader.post(2, owner, (0, 0, 64))
        reader.wait(2)

    # -- peers that come and go --------------------------------------------------------------

    def test_a_killed_peer_is_noticed_and_never_leaves_wrong_bytes(
        self, reader: Reader, start_owner: Callable[[], Owner]
    ) -> None:
        # Method: reads of 4 MiB in 64 segments without pause, the peer killed under one of them.
        owner = start_owner()
        reader.connect(owner)
        pieces = [(index * 65536, (63 - index) * 65536, 65536) for index in range(64)]
        reader.post(1, owner, *pieces)
        reader.wait(1)
        killer = threading.Timer(0.005, owner.kill)
        deadline = time.monotonic() + KILL_LIMIT_S
        read_id = 1
        noticed = False
        killer.start()
        try:
            while not noticed:
                assert time.monotonic() < deadline, "its death has gone unnoticed"
                read_id += 1
                reader.memory.bytes[:] = 0
                try:
                    reader.post(read_id, owner, *pieces)
                except LinkError:
                    noticed = True
                else:
                    (end,) = reader.wait(read_id, limit_s=KILL_LIMIT_S)
                    noticed = end.outcome is ReadOutcome.FAILED
                    assert noticed or reader.holds(owner, *pieces)
        finally:
            killer.join()
        assert reader.link.in_flight == 0

    def test_a_restarted_peer_is_read_from_under_its_new_name(
        self, reader: Reader, start_owner: Callable[[], Owner]
    ) -> None:
        old = start_owner()
        reader.connect(old)
        reader.post(1, old, (0, 0, MIB))
        reader.wait(1)
        old.kill()
        new = start_owner()
        assert new.name != old.name
        reader.connect(new)
        reader.link.disconnect(old.name)
        reader.post(2, new, (0, 0, MIB))
        (end,) = reader.wait(2)
        assert end.outcome is ReadOutcome.DONE
        assert reader.holds(new, (0, 0, MIB))
        with pytest.raises(LinkError):
            reader.post(3, old, (0, 0, 64))

    def test_connecting_again_and_disconnecting_twice_do_no_harm(
        self, reader: Reader, owner: Owner
    ) -> None:
        for read_id in range(1, 4):
            reader.connect(owner)
            reader.connect(owner)
            reader.post(read_id, owner, (0, 0, 64))
            (end,) = reader.wait(read_id)
            assert end.outcome is ReadOutcome.DONE
            reader.link.disconnect(owner.name)
            reader.link.disconnect(owner.name)
            with pytest.raises(LinkError):
                reader.post(9, owner, (0, 0, 64))

    # -- reads that nobody waits for ---------------------------------------------------------

    def test_an_abandoned_read_is_in_flight_until_it_has_ended(
        self, make_link: Callable[[], Link], owner: Owner
    ) -> None:
        # Method: a peer that does not answer can not be connected to, so a first read hangs.
        reader = Reader(make_link())
        owner.pause()
        try:
            reader.connect(owner)
            reader.post(1, owner, (0, 0, MIB))
            for _ in range(200):
                reader.poll()
            reader.link.abandon(ReadId(1))
            for _ in range(200):
                reader.poll()
            # Over cma the bytes are there by now, and NIXL does not know it yet.
            assert reader.ends == {}
            assert reader.link.in_flight == 1
        finally:
            owner.resume()
        (end,) = reader.wait(1)
        assert end.outcome is ReadOutcome.DONE
        assert reader.holds(owner, (0, 0, MIB))
        reader.link.abandon(ReadId(1))
        reader.link.abandon(ReadId(7))
        assert reader.link.poll() == []

    def test_a_peer_is_forgotten_at_once_but_its_reads_go_on(
        self, make_link: Callable[[], Link], owner: Owner
    ) -> None:
        reader = Reader(make_link())
        owner.pause()
        try:
            reader.connect(owner)
            reader.post(1, owner, (0, 0, MIB))
            with pytest.raises(LinkError):
                reader.connect(owner)  # would lose the read that is in flight
            reader.link.disconnect(owner.name)
            with pytest.raises(LinkError):
                reader.post(2, owner, (0, 0, 64))
            assert reader.link.in_flight == 1
        finally:
            owner.resume()
        (end,) = reader.wait(1)
        assert end.outcome is ReadOutcome.DONE
        assert reader.holds(owner, (0, 0, MIB))

    def test_a_peer_that_is_waited_for_learns_of_it(
        self, make_link: Callable[[], Link], owner: Owner
    ) -> None:
        seen_before = owner.hints_seen()
        reader = Reader(make_link())
        owner.pause()
        try:
            reader.connect(owner)
            reader.post(1, owner, (0, 0, 64))
            deadline = time.monotonic() + 0.01  # a read that is quick needs no hint
            reader.poll_until(lambda: time.monotonic() > deadline, limit_s=END_LIMIT_S)
        finally:
            owner.resume()
        reader.wait(1)
        reader.poll_until(lambda: owner.hints_seen() > seen_before, limit_s=END_LIMIT_S)

    # -- giving back -------------------------------------------------------------------------

    def test_closing_gives_back_threads_and_files(
        self, make_link: Callable[[], Link], owner: Owner
    ) -> None:
        def use_one() -> None:
            reader = Reader(make_link(), 65536)
            reader.connect(owner)
            reader.post(1, owner, (0, 0, 65536))
            reader.wait(1)
            reader.link.close()

        use_one()  # what a process pays once
        before = _threads_and_files()
        for _ in range(5):
            use_one()
        after = _threads_and_files()
        assert after[0] <= before[0]
        assert after[1] <= before[1]

    def test_closing_with_a_read_in_flight_neither_waits_nor_crashes(
        self, make_link: Callable[[], Link], owner: Owner
    ) -> None:
        # The last one: what such a link keeps, it keeps until the process ends.
        reader = Reader(make_link())
        owner.pause()
        try:
            reader.connect(owner)
            reader.post(1, owner, (0, 0, MIB))
            started = time.monotonic()
            reader.link.close()
            assert time.monotonic() - started < 1.0
        finally:
            owner.resume()
        _kept.append(reader.memory)  # it may be written until the process ends
        after = Reader(make_link())
        after.connect(owner)
        after.post(1, owner, (0, 0, MIB))
        (end,) = after.wait(1)
        assert end.outcome is ReadOutcome.DONE


_kept: list[Memory] = []


def _threads_and_files() -> tuple[int, int]:
    return (
        len(list(Path("/proc/self/task").iterdir())),
        len(list(Path("/proc/self/fd").iterdir())),
    )
