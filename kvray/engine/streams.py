"""An Executor for a device that copies by streams and events, as a GPU does.

    engine's thread   submit: an event behind what the engine has begun ──▶ the queue
    copier thread     look at what is arriving ─▶ put parts on their streams, an event behind each
                      ─▶ look which events have fired ─▶ prove ─▶ report
    engine's thread   finished, wait, wait_any: read what was reported

What comes when is decided by copy_order; what a stream is, by the Device. The engine's thread never
waits for the device, nor for a call that puts copies on a stream (of thousands of pieces it takes
milliseconds). Events are asked, not waited for, and nothing is asked while no copy is under way.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from kvray.core.copy_order import CopyOrder, Part, part_cuts
from kvray.core.direction import Direction
from kvray.engine.copier import CLOSE_LIMIT_S, CopyEnd, succeeds
from kvray.engine.raw_copy import Pointers

logger = logging.getLogger("kvray.engine")

LOOK_S = 0.000_25  # between two looks: 64 MiB take 1.2 ms at 55 GB/s; a look takes 0.02 ms
MAX_LOOK_S = 0.002  # while nothing happens and nothing is arriving: 256 MiB take 5 ms

Mark = Any  # an event of the device: a place in the order of one of its streams


class Device(Protocol):
    """Two streams of copies, one for each direction, and events. All but engine_mark is called by
    the copier thread only; any of it may raise what the device's library raises.
    """

    def enter(self) -> None:
        """Called once, first, by the copier thread."""

    def engine_mark(self) -> Mark:
        """Behind all that the engine has begun so far; by the engine's thread."""

    def wait_for(self, direction: Direction, mark: Mark) -> None:
        """What is put on this stream from now on begins after the mark. Does not wait itself."""

    def copy(
        self, direction: Direction, sources: Pointers, targets: Pointers, piece_bytes: Pointers
    ) -> None:
        """Put these copies on the stream; MAX_PART_PIECES at most. The arrays stay as they are
        until a mark behind them has fired.
        """

    def mark(self, direction: Direction) -> Mark:
        """Behind all that was put on this stream so far."""

    def has_fired(self, mark: Mark) -> bool:
        """Does not wait."""

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Between two marks of one stream that have fired."""

    def release(self, mark: Mark) -> None:
        """Nobody asks about this mark any more."""

    def close(self) -> None:
        """Called once, last, by the copier thread: waits for what is on the streams."""


@dataclass(slots=True, eq=False)
class _Job:
    direction: Direction
    sources: Pointers
    targets: Pointers
    piece_bytes: Pointers
    arrived: Callable[[], int | None] | None
    verify: Callable[[], bool] | None
    keep_alive: object
    engine_mark: Mark
    begin: Mark = None
    seconds: float = 0.0
    has_failed: bool = False  # what is left of it must not pass the wait that may have failed


class StreamExecutor:
    """See Executor and the module's docstring."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._changed = threading.Condition()  # guards everything down to _closing
        self._order = CopyOrder()
        self._jobs: dict[int, _Job] = {}
        self._ended: list[CopyEnd] = []
        self._is_lost = False  # the device, or this executor's thread
        self._closing = False
        self._out: dict[Direction, deque[tuple[Part, Mark]]] = {way: deque() for way in Direction}
        self._look_s = LOOK_S
        self._thread = threading.Thread(target=self._work, name="kvray-copier", daemon=True)
        self._thread.start()

    # -- on the engine's thread ------------------------------------------------------------------

    def submit(
        self,
        job_id: int,
        sources: Pointers,
        targets: Pointers,
        piece_bytes: Pointers,
        *,
        direction: Direction,
        arrived: Callable[[], int | None] | None = None,
        verify: Callable[[], bool] | None = None,
        keep_alive: object = None,
    ) -> None:
        assert len(sources) == len(targets) == len(piece_bytes)
        try:
            engine_mark = self._device.engine_mark()
        except Exception:  # whatever the device's library raises, see Executor
            logger.exception("copy job %d failed", job_id)
            with self._changed:
                self._refuse(job_id)
            return
        with self._changed:
            assert job_id not in self._jobs, f"job {job_id} is under way already"
            if self._closing or self._is_lost:
                self._refuse(job_id)
                return
            self._jobs[job_id] = _Job(
                direction, sources, targets, piece_bytes, arrived, verify, keep_alive, engine_mark
            )
            self._order.submit(job_id, direction, part_cuts(piece_bytes), has_come=arrived is None)
            self._changed.notify_all()

    def _refuse(self, job_id: int) -> None:
        self._ended.append(CopyEnd(job_id, ok=False, bytes=0, seconds=0.0))
        self._changed.notify_all()

    def finished(self) -> list[CopyEnd]:
        with self._changed:
            ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: Iterable[int]) -> None:
        waited_for = set(job_ids)
        with self._changed:
            for job_id in waited_for.intersection(self._order.arriving()):
                self._order.cut(job_id)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._jobs.keys().isdisjoint(waited_for))

    def wait_any(self, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._jobs, timeout_s)
            return bool(self._ended)

    def close(self) -> bool:
        with self._changed:
            self._closing = True
            for job_id in self._order.arriving():
                self._order.cut(job_id)
            self._changed.notify_all()
        self._thread.join(CLOSE_LIMIT_S)
        has_ended = not self._thread.is_alive()
        if not has_ended:
            logger.warning("copies were still under way %.0f s after close", CLOSE_LIMIT_S)
        return has_ended

    # -- on the copier thread --------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._device.enter()
            while self._turn():
                pass
            self._device.close()
        except Exception:  # a thread that ends in silence would leave jobs that never end
            logger.exception("kvray copies nothing more on this device; its blocks are computed")
            self._give_up()

    def _give_up(self) -> None:
        """The device is asked to end what it has; whether it could or not, nothing will tell."""
        with self._changed:
            self._is_lost = True
        try:
            self._device.close()
        except Exception:
            logger.exception("the device did not end its copies")
        with self._changed:
            for job_id in self._jobs:
                self._refuse(job_id)
            self._jobs.clear()
            self._order = CopyOrder()
            self._changed.notify_all()

    def _turn(self) -> bool:
        """One round; False at the end."""
        with self._changed:
            self._look()
            parts = self._order.take_parts()
        for part in parts:
            self._issue(part)
        has_fired = self._note_fired()
        self._look_s = LOOK_S if parts or has_fired else min(2 * self._look_s, MAX_LOOK_S)
        self._prove()
        with self._changed:
            self._report()
            if self._order.has_parts:
                return True
            if self._closing and not self._jobs:
                return False
            # Told of a new job, it goes on at once.
            if self._order.arriving():
                self._changed.wait(LOOK_S)
            elif self._order.is_moving:
                self._changed.wait(self._look_s)
            elif not self._jobs:
                self._changed.wait()
        return True

    def _look(self) -> None:
        """The lock is held: wait() and close() may cut a job between the look and its answer."""
        for job_id in self._order.arriving():
            arrived = self._jobs[job_id].arrived
            assert arrived is not None
            try:
                count = arrived()
            except Exception:
                logger.exception("copy job %d failed", job_id)
                count = None
            self._order.arrived(job_id, count)

    def _issue(self, part: Part) -> None:
        """The lock is not held: this may take milliseconds."""
        job = self._jobs[part.job_id]
        if not job.has_failed:
            job.has_failed = not succeeds(lambda: self._put_on_stream(part, job), part.job_id)
            if job.has_failed:
                with self._changed:
                    self._order.failed(part)
        # Also behind a call that failed: something of it may be on the stream. If not even this
        # can be said, the device is lost, and _work ends.
        self._out[part.direction].append((part, self._device.mark(part.direction)))

    def _put_on_stream(self, part: Part, job: _Job) -> bool:
        if part.after_engine:
            self._device.wait_for(part.direction, job.engine_mark)
            job.begin = self._device.mark(part.direction)
        columns = (job.sources, job.targets, job.piece_bytes)
        self._device.copy(part.direction, *(column[part.begin : part.end] for column in columns))
        return True

    def _note_fired(self) -> bool:
        """Whether any has."""
        has_fired = False
        for out in self._out.values():
            while out and self._device.has_fired(out[0][1]):
                part, mark = out.popleft()
                job = self._jobs[part.job_id]
                if job.begin is not None:
                    job.seconds = self._device.seconds(job.begin, mark)
                self._device.release(mark)
                has_fired = True
                with self._changed:
                    self._order.ended(part)
        return has_fired

    def _prove(self) -> None:
        with self._changed:
            to_prove = self._order.take_proofs()
        for job_id in to_prove:
            verify = self._jobs[job_id].verify
            ok = verify is None or succeeds(verify, job_id)
            with self._changed:
                self._order.proved(job_id, ok=ok)

    def _report(self) -> None:
        """The lock is held."""
        for job_id, ok in self._order.take_ended():
            job = self._jobs.pop(job_id)
            for mark in (job.engine_mark, job.begin):
                if mark is not None:
                    self._device.release(mark)
            moved = int(job.piece_bytes.sum()) if ok else 0
            self._ended.append(CopyEnd(job_id, ok, moved, job.seconds))
            self._changed.notify_all()
