"""Who moves the bytes of a job: the seam between what is copied (pieces) and how.

    Pieces ──Executor.submit──▶ ... bytes move ... ──▶ finished(): CopyEnd

An Executor knows pointers and directions only. CpuExecutor moves them with threads; streams has the
one for devices whose copies are ordered by streams and events, as on CUDA. Both get the same
arrays and promise the same (tests/unit/test_copier.py holds both of them to it).
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from kvray.core.direction import Direction
from kvray.engine.raw_copy import Pointers, copy_pieces

logger = logging.getLogger("kvray.engine")

CPU_THREADS = 2  # one moves about two thirds of what two move; more would be the engine's cores
MIN_SPLIT_BYTES = 4 * 1024**2  # 0.3 ms of copying; waking the second thread takes 0.05 ms
MAX_PART_BYTES = 64 * 1024**2  # so that a load waits at most 6 ms behind a part of a store
LOOK_S = 0.001  # at what has arrived: a batch of a fetch takes 5 ms, a look 0.02 ms
CLOSE_LIMIT_S = 30.0  # what is queued is copied first; 30 s are 300 GB


class CopyEnd(NamedTuple):
    """A job that has ended. seconds: from its first byte to its last, without waiting in line."""

    job_id: int
    ok: bool
    bytes: int
    seconds: float


class Executor(Protocol):
    """Who moves the bytes. Called on the worker's own thread; raises nothing that a copy does.

    Each submitted job is reported by finished() exactly once. verify runs after the last byte has
    arrived and before the job is reported; if it returns False or raises, the job is not ok.
    keep_alive is held until then: what the pointers point into.

    arrived: how many of the first pieces have a whole source by now, or None if the others never
    will, and then the job is not ok. It is asked until it says all or None, by one thread at a
    time; what it has named is copied meanwhile, and other jobs are not held up.
    """

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
        """Start copying; returns before it is done."""

    def finished(self) -> list[CopyEnd]:
        """Jobs that have ended since the last call. Does not wait."""

    def wait(self, job_ids: Iterable[int]) -> None:
        """Returns when none of these is under way any more. They are still reported. What has not
        arrived yet is not waited for: such a job is not ok.
        """

    def wait_any(self, timeout_s: float) -> bool:
        """Waits for a job to end that finished() has not told yet; whether there is one."""

    def close(self) -> bool:
        """Returns when everything that was submitted has ended; what has not arrived yet and later
        jobs end as not ok. False: CLOSE_LIMIT_S have passed, and bytes may still move.
        """


@dataclass(slots=True, eq=False)
class _Job:
    job_id: int
    verify: Callable[[], bool] | None
    keep_alive: object
    bytes: int
    parts_left: int = 0  # queued or under way; and one if more of it is to arrive
    ok: bool = True
    started_s: float | None = None


class _Part(NamedTuple):
    job: _Job
    sources: Pointers
    targets: Pointers
    piece_bytes: Pointers

    def copy(self) -> bool:
        copy_pieces(self.sources, self.targets, self.piece_bytes)
        return True


@dataclass(slots=True, eq=False)
class _Arriving:
    """A job whose sources are still coming: one more part of it, until they have or never will.
    begun: how many of its first pieces are copied or queued.
    """

    whole: _Part
    arrived: Callable[[], int | None]
    urgent: bool
    begun: int = 0

    def look(self) -> int | None:
        """See Executor. An error of the look is the end of the job, as one of its copy."""
        try:
            return self.arrived()
        except Exception:
            logger.exception("copy job %d failed", self.whole.job.job_id)
            return None


class CpuExecutor:
    """An Executor of threads. A large job is divided among them; loads go before stores, and
    jobs of one direction begin in the order of their submission.

    While a job has sources that are still coming, one thread that has nothing to copy looks at them
    every LOOK_S; the others, and all of them otherwise, sleep until there is something to do.
    """

    def __init__(self, threads: int | None = None) -> None:
        """threads: CPU_THREADS if None, or one where this process may use one core only."""
        self._thread_count = threads or min(CPU_THREADS, len(os.sched_getaffinity(0)))
        self._changed = threading.Condition()  # guards everything below
        self._urgent: deque[_Part] = deque()
        self._patient: deque[_Part] = deque()
        self._arriving: list[_Arriving] = []
        self._somebody_looks = False
        self._under_way: dict[int, _Job] = {}
        self._ended: list[CopyEnd] = []
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"kvray-copier-{index}", daemon=True)
            for index in range(self._thread_count)
        ]
        for thread in self._threads:
            thread.start()

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
        urgent = direction is Direction.LOAD
        assert len(sources) == len(targets) == len(piece_bytes)
        job = _Job(
            job_id=job_id, verify=verify, keep_alive=keep_alive, bytes=int(piece_bytes.sum())
        )
        whole = _Part(job, sources, targets, piece_bytes)
        with self._changed:
            assert job_id not in self._under_way, f"job {job_id} is under way already"
            if self._closing:
                self._ended.append(CopyEnd(job_id, ok=False, bytes=0, seconds=0.0))
                return
            self._under_way[job_id] = job
            if arrived is None:
                self._queue(whole, 0, len(sources), urgent=urgent)
            else:
                job.parts_left = 1
                self._arriving.append(_Arriving(whole, arrived, urgent))
                self._look()
            self._changed.notify_all()

    def finished(self) -> list[CopyEnd]:
        with self._changed:
            ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: Iterable[int]) -> None:
        waited_for = set(job_ids)
        with self._changed:
            for arriving in list(self._arriving):
                if arriving.whole.job.job_id in waited_for:
                    self._end_arriving(arriving, ok=False)
            self._changed.wait_for(lambda: self._under_way.keys().isdisjoint(waited_for))

    def wait_any(self, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._under_way, timeout_s)
            return bool(self._ended)

    def close(self) -> bool:
        with self._changed:
            self._closing = True
            for arriving in list(self._arriving):
                self._end_arriving(arriving, ok=False)
            self._changed.notify_all()
        deadline_s = time.monotonic() + CLOSE_LIMIT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        has_ended = not any(thread.is_alive() for thread in self._threads)
        if not has_ended:
            logger.warning("copies were still under way %.0f s after close", CLOSE_LIMIT_S)
        return has_ended

    def _work(self) -> None:
        while (part := self._next_part()) is not None:
            self._end_part(part.job, ok=succeeds(part.copy, part.job.job_id))

    def _next_part(self) -> _Part | None:
        """Waits for one; None at the end."""
        with self._changed:
            while True:
                self._look()
                if self._urgent or self._patient or self._closing:
                    break
                looks = bool(self._arriving) and not self._somebody_looks
                self._somebody_looks = self._somebody_looks or looks
                self._changed.wait(LOOK_S if looks else None)
                if looks:
                    self._somebody_looks = False
            parts = self._urgent or self._patient
            if not parts:
                return None
            part = parts.popleft()
            if part.job.started_s is None:
                part.job.started_s = time.perf_counter()
            return part

    def _look(self) -> None:
        """Queue what has arrived since the last look. The lock is held."""
        for arriving in list(self._arriving):
            count = arriving.look()
            if count is None:
                self._end_arriving(arriving, ok=False)
                continue
            if count > arriving.begun:
                self._queue(arriving.whole, arriving.begun, count, urgent=arriving.urgent)
                arriving.begun = count
            if count == len(arriving.whole.sources):
                self._end_arriving(arriving, ok=True)

    def _end_arriving(self, arriving: _Arriving, *, ok: bool) -> None:
        """Nothing more of this job is to be queued but an empty part, which ends it if the others
        have ended. The lock is held.
        """
        self._arriving.remove(arriving)
        job = arriving.whole.job
        job.ok = job.ok and ok
        job.parts_left -= 1
        self._queue(arriving.whole, 0, 0, urgent=arriving.urgent)

    def _queue(self, whole: _Part, begin: int, end: int, *, urgent: bool) -> None:
        """Pieces [begin, end) of a job, divided among the threads. The lock is held."""
        job = whole.job
        cuts = _cuts(whole.piece_bytes[begin:end], thread_count=self._thread_count)
        parts = [
            _Part(job, *(column[begin + first : begin + last] for column in whole[1:]))
            for first, last in pairwise(cuts)
        ]
        job.parts_left += len(parts)
        (self._urgent if urgent else self._patient).extend(parts)
        self._changed.notify_all()

    def _end_part(self, job: _Job, *, ok: bool) -> None:
        with self._changed:
            job.ok = job.ok and ok
            job.parts_left -= 1
            if job.parts_left:
                return
        assert job.started_s is not None
        seconds = time.perf_counter() - job.started_s
        # The other parts' threads have let go of the lock after their copies: verify sees them all.
        if job.ok and job.verify is not None:
            job.ok = succeeds(job.verify, job.job_id)
        end = CopyEnd(job.job_id, job.ok, job.bytes if job.ok else 0, seconds)
        with self._changed:
            del self._under_way[job.job_id]
            self._ended.append(end)
            self._changed.notify_all()


def _cuts(piece_bytes: Pointers, *, thread_count: int) -> list[int]:
    """Where to divide a job: piece indices, first and last included; parts of about equal bytes."""
    count = len(piece_bytes)
    ends = np.cumsum(piece_bytes)
    total_bytes = int(ends[-1]) if count else 0
    part_count = -(-total_bytes // MAX_PART_BYTES)
    if total_bytes >= MIN_SPLIT_BYTES:
        part_count = max(part_count, thread_count)
    if part_count <= 1:
        return [0, count]
    wanted_ends = np.arange(1, part_count) * (total_bytes // part_count)
    inner = np.searchsorted(ends, wanted_ends.astype(np.uint64)) + 1
    return [0, *np.unique(inner[inner < count]).tolist(), count]


def succeeds(action: Callable[[], bool], job_id: int) -> bool:
    """Whether it returns True. A copier thread outlives every job, and a job that failed is a
    value for its engine: the block is computed again.
    """
    try:
        return action()
    except Exception:
        logger.exception("copy job %d failed", job_id)
        return False
