"""What goes out next, what waits for what, and when a job has ended. Decides, and copies nothing.

    submit ──▶ ARRIVING ──the last piece has come──▶ ISSUING ──the last is out──▶ COPYING
                  │ never will, or is waited for        │ an issue failed          │ nothing of it
                  ▼                                     ▼                          ▼ moves any more
                 CUT ◀──────────────────────────────────┘                       PROVING
                  │ nothing of it moves any more                                   │ proved, or not
                  ▼                                                                ▼
                ENDED, not ok                                                    ENDED

A part is some pieces of one job, put on the stream of its direction by one call. What is promised:

    - A stream works in order, so parts of one direction end in the order in which they went out.
    - The first part of a job waits for what the engine had begun before the job was submitted
      (`after_engine`): the model may still write what a store reads, and vLLM may still clear what
      a load writes. Later parts are behind it on the same stream. Loads and stores wait for nothing
      else: a slot is loaded only after its store was committed, and vLLM waits for a store before
      it gives its blocks away.
    - Jobs go out in the order of submission. One whose sources are still coming holds up nobody.
    - A job ends after its last part has, also when it failed long before: until then something
      might still write into its targets (rule 3).

One thread of an executor does what is said here (engine.streams), under its lock.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvray.core.direction import Direction

# Of one part. A job that is cut, and is waited for, ends after the parts that are out: 256 MiB are
# 5 ms at 50 GB/s. The pieces are what a descriptor buffer of 0.4 MB holds.
MAX_PART_BYTES = 256 * 1024**2
MAX_PART_PIECES = 16_384
# Of a direction: one moves, one is next, two in hand for a thread that wakes late.
MAX_PARTS_OUT = 4


class CopyState(Enum):
    """See the picture in the module's docstring."""

    ARRIVING = "arriving"
    ISSUING = "issuing"
    COPYING = "copying"
    CUT = "cut"
    PROVING = "proving"
    ENDED = "ended"


class Part(NamedTuple):
    """Pieces [begin, end) of a job. after_engine: the stream has to wait for the engine first."""

    job_id: int
    direction: Direction
    begin: int
    end: int
    after_engine: bool


class Ended(NamedTuple):
    job_id: int
    ok: bool


@dataclass(slots=True, eq=False)
class _Job:
    """cuts: where parts end at the latest, as piece indices; the last one is the end of the job.
    come: pieces whose sources are whole. gone: pieces that went out. out: parts that are out.
    """

    job_id: int
    direction: Direction
    cuts: tuple[int, ...]
    state: CopyState
    come: int
    gone: int = 0
    out: int = 0

    @property
    def piece_count(self) -> int:
        return self.cuts[-1]


def part_cuts(piece_bytes: npt.NDArray[np.uint64]) -> tuple[int, ...]:
    """Where to cut a job into parts: the end of each, as a piece index."""
    count = len(piece_bytes)
    by_count = list(range(MAX_PART_PIECES, count, MAX_PART_PIECES))
    ends = np.cumsum(piece_bytes)
    total_bytes = int(ends[-1]) if count else 0
    wanted = np.arange(MAX_PART_BYTES, total_bytes, MAX_PART_BYTES, dtype=np.uint64)
    by_bytes = (np.searchsorted(ends, wanted) + 1).tolist()
    inner = sorted({cut for cut in by_count + by_bytes if cut < count})
    return (*inner, count)


class CopyOrder:
    """All jobs of one executor. Not safe for several threads."""

    def __init__(self) -> None:
        self._jobs: dict[int, _Job] = {}
        self._waiting: dict[Direction, deque[_Job]] = {way: deque() for way in Direction}
        self._out: dict[Direction, deque[Part]] = {way: deque() for way in Direction}
        self._to_prove: deque[int] = deque()
        self._ended: deque[Ended] = deque()

    # -- what happens ----------------------------------------------------------------------------

    def submit(
        self, job_id: int, direction: Direction, cuts: Sequence[int], *, has_come: bool
    ) -> None:
        """cuts: see part_cuts. has_come: all sources are there; if not, arrived() will tell."""
        assert job_id not in self._jobs, f"job {job_id} is under way already"
        state = CopyState.ISSUING if has_come else CopyState.ARRIVING
        job = _Job(job_id, direction, tuple(cuts), state, come=cuts[-1] if has_come else 0)
        self._jobs[job_id] = job
        self._waiting[direction].append(job)
        self._settle(job)

    def arrived(self, job_id: int, count: int | None) -> None:
        """How many of the first pieces have come by now; None if the others never will."""
        job = self._jobs[job_id]
        assert job.state is CopyState.ARRIVING, job.state
        if count is None:
            self.cut(job_id)
            return
        assert job.come <= count <= job.piece_count, f"{count} of {job.piece_count} have come"
        job.come = count
        if count == job.piece_count:
            job.state = CopyState.ISSUING
        self._settle(job)

    def take_parts(self) -> list[Part]:
        """What is to go out now, loads first. The caller puts each on its stream, in this order,
        and says so with issued().
        """
        parts: list[Part] = []
        for direction in Direction:
            for job in list(self._waiting[direction]):
                while job.gone < job.come and len(self._out[direction]) < MAX_PARTS_OUT:
                    parts.append(self._next_part(job))
        return parts

    def _next_part(self, job: _Job) -> Part:
        next_cut = next(cut for cut in job.cuts if cut > job.gone)
        end = min(next_cut, job.come)
        part = Part(job.job_id, job.direction, job.gone, end, after_engine=job.gone == 0)
        job.gone = end
        job.out += 1
        self._out[job.direction].append(part)
        self._settle(job)
        return part

    def failed(self, part: Part) -> None:
        """The part could not be put on its stream as a whole. It still ends: something of it may
        be on the stream.
        """
        self.cut(part.job_id)

    def ended(self, part: Part) -> None:
        """The stream has done this part, and so all before it."""
        first = self._out[part.direction].popleft()
        assert first == part, f"{part} ended before {first}"
        job = self._jobs[part.job_id]
        job.out -= 1
        self._settle(job)

    def cut(self, job_id: int) -> None:
        """Nothing more of this job goes out, and it is not ok."""
        job = self._jobs[job_id]
        if job.state in (CopyState.ARRIVING, CopyState.ISSUING, CopyState.COPYING):
            if job in self._waiting[job.direction]:
                self._waiting[job.direction].remove(job)
            job.state = CopyState.CUT
            self._settle(job)

    def proved(self, job_id: int, *, ok: bool) -> None:
        assert self._jobs[job_id].state is CopyState.PROVING
        self._end(job_id, ok=ok)

    # -- what follows from it --------------------------------------------------------------------

    def take_proofs(self) -> list[int]:
        """Jobs whose bytes have all moved: is it what it should be? The answer is proved()."""
        found = list(self._to_prove)
        self._to_prove.clear()
        return found

    def take_ended(self) -> list[Ended]:
        found = list(self._ended)
        self._ended.clear()
        return found

    def arriving(self) -> list[int]:
        return [job.job_id for job in self._jobs.values() if job.state is CopyState.ARRIVING]

    @property
    def has_parts(self) -> bool:
        """Whether take_parts() would give one."""
        return any(
            job.gone < job.come and len(self._out[direction]) < MAX_PARTS_OUT
            for direction in Direction
            for job in self._waiting[direction]
        )

    @property
    def is_moving(self) -> bool:
        """Whether a part is out."""
        return any(self._out.values())

    def __len__(self) -> int:
        """Jobs that have not ended."""
        return len(self._jobs)

    def state_of(self, job_id: int) -> CopyState:
        job = self._jobs.get(job_id)
        return CopyState.ENDED if job is None else job.state

    def _settle(self, job: _Job) -> None:
        if job.state is CopyState.ISSUING and job.gone == job.piece_count:
            self._waiting[job.direction].remove(job)
            job.state = CopyState.COPYING
        if job.out:
            return
        if job.state is CopyState.COPYING:
            job.state = CopyState.PROVING
            self._to_prove.append(job.job_id)
        elif job.state is CopyState.CUT:
            self._end(job.job_id, ok=False)

    def _end(self, job_id: int, *, ok: bool) -> None:
        del self._jobs[job_id]
        self._ended.append(Ended(job_id, ok))

    def check(self) -> None:
        """Every relation, in both directions."""
        out = [part for parts in self._out.values() for part in parts]
        waiting = [job for jobs in self._waiting.values() for job in jobs]
        assert len(waiting) == len({job.job_id for job in waiting})
        for direction, parts in self._out.items():
            assert len(parts) <= MAX_PARTS_OUT
            assert all(part.direction is direction for part in parts)
        assert {part.job_id for part in out} <= self._jobs.keys(), "a part of a job that has ended"
        for job in self._jobs.values():
            may_go_out = job.state in (CopyState.ARRIVING, CopyState.ISSUING)
            assert may_go_out == (job in waiting), job
            assert 0 <= job.gone <= job.come <= job.piece_count, job
            assert job.out == sum(part.job_id == job.job_id for part in out), job
            assert job.state is not CopyState.ISSUING or job.gone < job.piece_count, job
            assert job.state is not CopyState.COPYING or job.out, job
            assert job.state is not CopyState.CUT or job.out, job
            assert job.state is not CopyState.PROVING or not job.out, job
