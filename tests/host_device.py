"""A Device of real memory and real threads: streams that work in order, and an engine's stream that
a test can hold up. What StreamExecutor does with a GPU it does with this, and bytes move.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np

from kvray.core.direction import Direction
from kvray.engine.copier import CpuExecutor, Executor
from kvray.engine.raw_copy import Pointers, copy_pieces
from kvray.engine.streams import StreamExecutor

LIMIT_S = 30.0  # for what takes milliseconds


class HostMark:
    def __init__(self) -> None:
        self._fired = threading.Event()
        self.at_s = 0.0

    def fire(self) -> None:
        self.at_s = time.perf_counter()
        self._fired.set()

    @property
    def has_fired(self) -> bool:
        return self._fired.is_set()

    def wait(self) -> None:
        assert self._fired.wait(LIMIT_S), "a mark that nothing fires"


class HostStream:
    """Does what it is given, in that order, on a thread of its own."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"host-{name}", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def mark(self) -> HostMark:
        mark = HostMark()
        self.put(mark.fire)
        return mark

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class HostDevice:
    """See kvray.engine.streams.Device. engine: the model's stream. refuses: raised by the next
    call of that name. lost_at: from the first call of that name on, every call raises.
    """

    def __init__(self) -> None:
        self.engine = HostStream("engine")
        self._streams = {direction: HostStream(direction.value) for direction in Direction}
        self.refuses: dict[str, Exception] = {}
        self.lost_at = ""
        self._is_lost = False
        self.unreleased = 0

    def _may(self, name: str) -> None:
        self._is_lost = self._is_lost or name == self.lost_at
        if self._is_lost:
            raise RuntimeError("the device has fallen off the bus")
        if name in self.refuses:
            raise self.refuses.pop(name)

    def enter(self) -> None:
        self._may("enter")

    def engine_mark(self) -> HostMark:
        self._may("engine_mark")
        self.unreleased += 1
        return self.engine.mark()

    def wait_for(self, direction: Direction, mark: HostMark) -> None:
        self._may("wait_for")
        self._streams[direction].put(mark.wait)

    def copy(
        self, direction: Direction, sources: Pointers, targets: Pointers, piece_bytes: Pointers
    ) -> None:
        self._may("copy")
        if (piece_bytes.astype(np.int64) < 0).any():
            raise ValueError("a piece of less than nothing")
        self._streams[direction].put(lambda: copy_pieces(sources, targets, piece_bytes))

    def mark(self, direction: Direction) -> HostMark:
        self._may("mark")
        self.unreleased += 1
        return self._streams[direction].mark()

    def has_fired(self, mark: HostMark) -> bool:
        self._may("has_fired")
        return mark.has_fired

    def seconds(self, begin: HostMark, end: HostMark) -> float:
        return end.at_s - begin.at_s

    def release(self, mark: HostMark) -> None:
        self.unreleased -= 1

    def close(self) -> None:
        """The engine's stream is the engine's: the test ends it."""
        for stream in self._streams.values():
            stream.close()


EXECUTORS = ("one thread", "two threads", "streams")


@contextmanager
def an_executor(kind: str) -> Iterator[Executor]:
    """Each kind promises the same. At the end all has ended, and every mark was given back."""
    if kind != "streams":
        threads = CpuExecutor(1 if kind == "one thread" else 2)
        yield threads
        threads.close()
        return
    device = HostDevice()
    streams = StreamExecutor(device)
    yield streams
    streams.close()
    device.engine.close()
    assert device.unreleased == 0, "marks that nobody asks about any more"
