"""Goal: a load that begins before all of its blocks have come has their bytes or fails, in time,
and holds up nobody. Method: a real slab whose owner commits when the story says so, real threads.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

pytest.importorskip("vllm")

from kvray.core.direction import Direction
from kvray.core.effects import Place
from kvray.engine.arrivals import Arrivals
from kvray.engine.copier import CopyEnd, CpuExecutor, Executor
from kvray.engine.jobs import SlotSpec
from kvray.node.mapped import MappedSlab
from tests.host_device import EXECUTORS, an_executor
from tests.slabs import BLOCK_BYTES, Host, Writer, key_of, map_slab

pytestmark = [pytest.mark.engine]

LIMIT_S = 30.0  # for what takes milliseconds
LONG_S = 600.0  # a deadline that no story reaches
PIECES = 4  # of a slot
LOAD, OTHER = 1, 2


@pytest.fixture
def writer() -> Iterator[Writer]:
    with TemporaryDirectory(prefix="kvray-") as runtime:  # a socket's path must be short
        host = Host(Path(runtime))
        yield Writer(host.open())
        host.close()


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with an_executor(request.param) as executor:
        yield executor


class Load:
    """A rank's load of these slots into memory of its own."""

    def __init__(self, slab: MappedSlab, places: list[Place], *, within_s: float = LONG_S) -> None:
        spec = SlotSpec.of(
            slab.slab_id,
            [place.key for place in places],
            [(place.slot, place.generation, place.offset) for place in places],
            [place.bytes for place in places],
        )
        ends = np.arange(1, len(places) + 1) * PIECES
        self.slab = slab
        self.places = places
        self.target = np.zeros(len(places) * BLOCK_BYTES, np.uint8)
        self.arrivals = Arrivals(slab, spec, ends, until_s=time.monotonic() + within_s)

    def begin(self, executor: Executor) -> None:
        piece_bytes = BLOCK_BYTES // PIECES
        steps = np.arange(len(self.places) * PIECES, dtype=np.uint64) * np.uint64(piece_bytes)
        offsets = np.array([place.offset for place in self.places], np.uint64)
        in_slot = np.arange(PIECES, dtype=np.uint64) * np.uint64(piece_bytes)
        executor.submit(
            LOAD,
            np.uint64(self.slab.address) + (offsets[:, None] + in_slot).ravel(),
            np.uint64(self.target.ctypes.data) + steps,
            np.full(len(steps), piece_bytes, np.uint64),
            arrived=self.arrivals.pieces,
            verify=self.arrivals.all_match,
            keep_alive=(self.slab, self.target),
            direction=Direction.LOAD,
        )

    def holds(self, index: int) -> bool:
        """Whether this block is here: it was filled with its generation."""
        words = self.target[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES].view(np.uint64)
        return bool((words == self.places[index].generation).all())


def copy_something_else(executor: Executor) -> None:
    """Another job, begun later and less urgent. Returns when it has been reported, and nothing
    else has.
    """
    source, target = np.arange(1 << 16, dtype=np.uint8), np.zeros(1 << 16, np.uint8)
    sources, targets = (np.array([a.ctypes.data], np.uint64) for a in (source, target))
    sizes = np.array([source.nbytes], np.uint64)
    executor.submit(OTHER, sources, targets, sizes, direction=Direction.STORE)
    assert executor.wait_any(LIMIT_S)
    assert [(end.job_id, end.ok) for end in executor.finished()] == [(OTHER, True)]
    assert (source == target).all()


def end_of(executor: Executor) -> CopyEnd:
    assert executor.wait_any(LIMIT_S)
    (end,) = executor.finished()
    assert end.job_id == LOAD
    return end


def reserve(writer: Writer, number: int) -> Place:
    """A slot that is being filled: what is in it is not the block yet."""
    place = writer.reserve(key_of(number))
    writer.slab.memory[place.offset : place.offset + place.bytes] = b"\xff" * place.bytes
    return place


def test_a_load_copies_what_has_come_and_waits_for_the_rest(
    writer: Writer, executor: Executor
) -> None:
    head = writer.write(key_of(1))
    tail = reserve(writer, 2)
    load = Load(map_slab(writer.slab), [head, tail])
    load.begin(executor)

    copy_something_else(executor)  # a load that waits holds up nobody
    assert executor.finished() == []
    assert not load.target[BLOCK_BYTES:].any(), "copied before it was there"

    writer.fill(tail)
    writer.commit(tail)
    assert end_of(executor).ok
    assert load.holds(0)
    assert load.holds(1)


def test_blocks_that_come_one_by_one_are_all_copied(writer: Writer, executor: Executor) -> None:
    head = writer.write(key_of(0))
    coming = [reserve(writer, number) for number in range(1, 6)]
    load = Load(map_slab(writer.slab), [head, *coming])
    load.begin(executor)

    for place in coming:
        copy_something_else(executor)
        writer.fill(place)
        writer.commit(place)

    assert end_of(executor).ok
    assert all(load.holds(i) for i in range(6))


def gives_up(writer: Writer, place: Place) -> None:
    writer.abandon(place)


def is_late(writer: Writer, place: Place) -> None:
    """Its read is abandoned."""
    assert writer.core.quarantine(place.slot, place.generation)
    writer.apply()


def comes_to_another_block(writer: Writer, place: Place) -> None:
    gives_up(writer, place)
    other = writer.write(key_of(77))
    assert other.slot == place.slot


@pytest.mark.parametrize("what", [gives_up, is_late, comes_to_another_block])
def test_a_slot_that_will_not_have_the_block_fails_the_load_at_once(
    writer: Writer, executor: Executor, what: Callable[[Writer, Place], None]
) -> None:
    head, tail = writer.write(key_of(1)), reserve(writer, 2)
    load = Load(map_slab(writer.slab), [head, tail])
    load.begin(executor)
    copy_something_else(executor)

    what(writer, tail)

    assert not end_of(executor).ok


def test_what_has_not_come_at_the_deadline_fails_the_load(
    writer: Writer, executor: Executor
) -> None:
    load = Load(map_slab(writer.slab), [writer.write(key_of(1)), reserve(writer, 2)], within_s=0.05)
    load.begin(executor)

    assert not end_of(executor).ok


def test_what_is_there_already_is_loaded_whatever_the_deadline(
    writer: Writer, executor: Executor
) -> None:
    load = Load(map_slab(writer.slab), [writer.write(key_of(n)) for n in range(3)], within_s=0)
    load.begin(executor)

    assert end_of(executor).ok
    assert load.holds(2)


def test_who_needs_the_device_blocks_back_does_not_wait_for_what_is_coming(
    writer: Writer, executor: Executor
) -> None:
    """vLLM overwrites them right after wait(); a block that comes later must not be copied."""
    tail = reserve(writer, 2)
    load = Load(map_slab(writer.slab), [writer.write(key_of(1)), tail])
    load.begin(executor)

    executor.wait([LOAD])
    assert not end_of(executor).ok
    writer.fill(tail)
    writer.commit(tail)
    copy_something_else(executor)
    assert not load.target[BLOCK_BYTES:].any()


def test_closing_ends_a_load_that_waits(writer: Writer) -> None:
    executor = CpuExecutor(2)
    Load(map_slab(writer.slab), [writer.write(key_of(1)), reserve(writer, 2)]).begin(executor)

    closing = threading.Thread(target=executor.close)
    closing.start()
    closing.join(LIMIT_S)

    assert not closing.is_alive()
    assert [end.ok for end in executor.finished()] == [False]


def test_an_error_of_a_look_fails_its_job_and_no_other(executor: Executor) -> None:
    def look() -> int:
        raise RuntimeError("a header that can not be read")

    page = np.zeros(64, np.uint8)
    pointer = np.array([page.ctypes.data], np.uint64)
    size = np.array([64], np.uint64)
    executor.submit(LOAD, pointer, pointer, size, direction=Direction.LOAD, arrived=look)

    assert not end_of(executor).ok
    copy_something_else(executor)
