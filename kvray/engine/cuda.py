"""The Device of a GPU with CUDA: two streams of its own, batched copies, a gather kernel.

    engine's stream ──event──▶ load stream    slab ──▶ paged cache
                        └────▶ store stream   paged cache ──▶ slab

vLLM's current stream is only ever told to record an event, between two of its launches; nothing is
put into a graph that it captures. cupy is wanted for the kernel only: it compiles and launches it.
Without cupy small pieces take the copy engine too, and the log says so. Not run on a GPU yet.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvray.core.copy_order import MAX_PART_PIECES, MAX_PARTS_OUT
from kvray.core.copy_ways import Abilities, Way, choose_way
from kvray.core.direction import Direction
from kvray.engine import gather
from kvray.engine.cuda_driver import IN_ANY_ORDER, IN_STREAM_ORDER, Driver
from kvray.engine.pinning import Pins
from kvray.engine.raw_copy import Pointers

logger = logging.getLogger("kvray.engine")

_WORD_BYTES = 8
_RING_BYTES = 3 * MAX_PART_PIECES * _WORD_BYTES  # of one part's sources, targets and sizes


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """A mark. has_time: seconds() may be asked about it."""

    handle: int
    has_time: bool


class CudaRegistrar:
    """Registers for one device, from any thread."""

    def __init__(self, driver: Driver, context: int) -> None:
        self._driver = driver
        self._context = context

    def register(self, address: int, length_bytes: int) -> None:
        with self._driver.in_context(self._context):
            self._driver.register(address, length_bytes)

    def unregister(self, address: int) -> None:
        with self._driver.in_context(self._context):
            self._driver.unregister(address)


@dataclass(slots=True, eq=False)
class _Ring:
    """Where a kernel finds its pieces: as many buffers as parts of a direction can be out, so the
    next one is always free. host is locked memory, device a copy of it.
    """

    host: list[int] = field(default_factory=list)
    device: list[int] = field(default_factory=list)
    next: int = 0


class CudaDevice:
    """See kvray.engine.streams.Device. engine_stream: the handle of the stream on which the engine
    launches just now; called on the engine's thread.
    """

    def __init__(
        self,
        driver: Driver,
        ordinal: int,
        *,
        engine_stream: Callable[[], int],
        choose: Callable[..., Way] = choose_way,
    ) -> None:
        """Called on the engine's thread, whose device this is. Raises CudaError."""
        self._driver = driver
        self._ordinal = ordinal
        self._engine_stream = engine_stream
        self._choose = choose
        self._context = driver.retain_context(ordinal)
        self.pins = Pins(CudaRegistrar(driver, self._context))
        self.used: dict[Way, int] = dict.fromkeys(Way, 0)  # parts, for tests and benchmarks
        self._abilities = Abilities(batches=driver.has_batches, gathers=False)
        self._streams: dict[Direction, int] = {}
        self._rings: dict[Direction, _Ring] = {}
        self._kernel: Any = None
        # Filled by release() on the copier thread, emptied by both: a deque needs no lock.
        self._free: dict[bool, deque[Event]] = {True: deque(), False: deque()}
        self._entered = ExitStack()
        self.is_closed = False

    # -- on the engine's thread ------------------------------------------------------------------

    def engine_mark(self) -> Event:
        """In the engine's own context, which is current here."""
        event = self._take_event(has_time=False)
        self._driver.record(event.handle, self._engine_stream())
        return event

    # -- on the copier thread --------------------------------------------------------------------

    def enter(self) -> None:
        driver = self._driver
        self._entered.enter_context(driver.in_context(self._context))
        self._streams = {direction: driver.make_stream() for direction in Direction}
        can_gather = driver.kernels_see_host_pointers(self._ordinal) and self._load_kernel()
        self._abilities = Abilities(batches=driver.has_batches, gathers=can_gather)
        logger.info(
            "copies on %s: driver %d, batched copies %s, gather kernel %s",
            driver.device_name(self._ordinal),
            driver.version,
            "yes" if driver.has_batches else "no (before 12.8: a call for each piece)",
            "yes" if can_gather else "no",
        )

    def _load_kernel(self) -> bool:
        """About a second the first time on a host; cupy keeps what it has compiled."""
        try:
            import cupy

            cupy.cuda.Device(self._ordinal).use()
            module = cupy.RawModule(code=gather.SOURCE, options=gather.compile_options())
            self._kernel = module.get_function(gather.KERNEL)
        except ImportError as exc:
            logger.info(
                "small pieces are copied one by one, for cupy can not be loaded (%s): "
                "pip install 'kvray[cuda13]' (or cuda12)",
                exc,
            )
            return False
        except Exception:  # compilers and drivers have many ways to disagree; copies go on
            logger.exception("small pieces are copied one by one: the kernel can not be made")
            return False
        for direction in Direction:
            ring = self._rings[direction] = _Ring()
            for _ in range(MAX_PARTS_OUT):
                ring.host.append(self._driver.allocate_host(_RING_BYTES))
                ring.device.append(self._driver.allocate(_RING_BYTES))
        return True

    def wait_for(self, direction: Direction, mark: Event) -> None:
        self._driver.wait_event(self._streams[direction], mark.handle)

    def copy(
        self, direction: Direction, sources: Pointers, targets: Pointers, piece_bytes: Pointers
    ) -> None:
        in_slab = sources if direction is Direction.LOAD else targets
        begin, end = int(in_slab.min()), int((in_slab + piece_bytes).max())
        way = self._choose(
            direction=direction,
            piece_count=len(piece_bytes),
            total_bytes=int(piece_bytes.sum()),
            is_locked=self.pins.covers(begin, end),
            abilities=self._abilities,
        )
        self.used[way] += 1
        if way is Way.BATCH:
            self._batch(direction, sources, targets, piece_bytes)
        elif way is Way.GATHER:
            self._gather(direction, sources, targets, piece_bytes)
        else:
            self._copy_each(direction, sources, targets, piece_bytes)

    def _batch(
        self, direction: Direction, sources: Pointers, targets: Pointers, piece_bytes: Pointers
    ) -> None:
        rows = targets, sources, piece_bytes
        assert all(row.dtype == np.uint64 and row.flags.c_contiguous for row in rows)
        self._driver.copy_batch(
            targets=targets.ctypes.data,
            sources=sources.ctypes.data,
            sizes=piece_bytes.ctypes.data,
            count=len(piece_bytes),
            source_order=IN_ANY_ORDER if direction is Direction.LOAD else IN_STREAM_ORDER,
            stream=self._streams[direction],
        )

    def _gather(
        self, direction: Direction, sources: Pointers, targets: Pointers, piece_bytes: Pointers
    ) -> None:
        import cupy

        count, stream, ring = len(piece_bytes), self._streams[direction], self._rings[direction]
        host, on_device = ring.host[ring.next], ring.device[ring.next]
        ring.next = (ring.next + 1) % len(ring.host)
        rows = _words(host, 3 * count).reshape(3, count)
        rows[0], rows[1], rows[2] = sources, targets, piece_bytes
        self._driver.copy_in(on_device, host, rows.nbytes, stream)
        with cupy.cuda.ExternalStream(stream, self._ordinal):
            self._kernel(
                (gather.grid_blocks(count),),
                (gather.THREADS,),
                (np.uint64(on_device), np.uint32(count), np.uint32(count)),
            )

    def _copy_each(
        self, direction: Direction, sources: Pointers, targets: Pointers, piece_bytes: Pointers
    ) -> None:
        copy = self._driver.copy_in if direction is Direction.LOAD else self._driver.copy_out
        stream = self._streams[direction]
        for source, target, length_bytes in zip(
            sources.tolist(), targets.tolist(), piece_bytes.tolist(), strict=True
        ):
            copy(target, source, length_bytes, stream)

    def mark(self, direction: Direction) -> Event:
        event = self._take_event(has_time=True)
        self._driver.record(event.handle, self._streams[direction])
        return event

    def has_fired(self, mark: Event) -> bool:
        return self._driver.has_fired(mark.handle)

    def seconds(self, begin: Event, end: Event) -> float:
        return self._driver.seconds(begin.handle, end.handle)

    def release(self, mark: Event) -> None:
        self._free[mark.has_time].append(mark)

    def close(self) -> None:
        """What was locked stays so until pins.close()."""
        driver = self._driver
        try:
            for stream in self._streams.values():
                driver.synchronize(stream)
                driver.destroy_stream(stream)
            for events in self._free.values():
                while events:
                    driver.destroy_event(events.pop().handle)
            for ring in self._rings.values():
                for address in ring.host:
                    driver.free_host(address)
                for address in ring.device:
                    driver.free(address)
        finally:
            self._streams, self._rings = {}, {}
            self.is_closed = True
            self._entered.close()

    def let_go(self) -> None:
        """After the executor was closed: unlock what was locked, and let go of the context."""
        self.pins.close()
        self._driver.release_context(self._ordinal)

    def _take_event(self, *, has_time: bool) -> Event:
        try:
            return self._free[has_time].pop()
        except IndexError:
            return Event(self._driver.make_event(has_time=has_time), has_time)


def _words(address: int, count: int) -> Pointers:
    """Memory as an array."""
    memory = memoryview((ctypes.c_uint64 * count).from_address(address)).cast("B")
    return np.frombuffer(memory, dtype=np.uint64)
