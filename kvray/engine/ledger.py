"""Which copy job belongs to what, and which ranks have not reported it yet. Pure.

vLLM's connector completes every job as good and forgets those that a reset made stale. kvray has
to know more: a store is committed only if no rank failed, a slot is given back only after every
rank has let go of it (rule 3), and what was copied before the weights changed counts for nothing.

    begin ──▶ OPEN ──every rank reported──▶ finished: GOOD, FAILED (a rank failed), or VOID (stale)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

Subject = TypeVar("Subject")

MAX_OPEN_JOBS = 65_536  # a job is a request's store in one step or its load; engines hold thousands


class JobKind(Enum):
    LOAD = "load"
    STORE = "store"


class Outcome(Enum):
    GOOD = "good"
    FAILED = "failed"
    VOID = "void"  # the namespace was renewed while it ran


@dataclass(slots=True)
class _Job(Generic[Subject]):
    kind: JobKind
    subject: Subject
    pending_ranks: int
    failed: bool = False
    void: bool = False


@dataclass(frozen=True, slots=True)
class Finished(Generic[Subject]):
    job_id: int
    kind: JobKind
    subject: Subject
    outcome: Outcome


class JobLedger(Generic[Subject]):
    """Jobs by vLLM's id, which counts upwards and is never reused by one engine."""

    def __init__(self, rank_count: int) -> None:
        assert rank_count > 0
        self._rank_count = rank_count
        self._open: dict[int, _Job[Subject]] = {}
        self.void_before = 0  # jobs with smaller ids belong to weights that are gone

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, job_id: int, kind: JobKind, subject: Subject) -> None:
        assert job_id not in self._open
        assert len(self._open) < MAX_OPEN_JOBS
        self._open[job_id] = _Job(kind, subject, self._rank_count)

    def report(
        self, completed: Mapping[int, int], failed: Iterable[int]
    ) -> list[Finished[Subject]]:
        """Take what some ranks reported: for each job how many of them ended it, and which jobs
        failed on at least one. Unknown ids (of a connector before this one) are skipped.
        """
        for job_id in failed:
            if (job := self._open.get(job_id)) is not None:
                job.failed = True
        finished: list[Finished[Subject]] = []
        for job_id, count in completed.items():
            job = self._open.get(job_id)
            if job is None:
                continue
            assert 0 < count <= job.pending_ranks, "a rank reported a job twice"
            job.pending_ranks -= count
            if job.pending_ranks == 0:
                del self._open[job_id]
                outcome = (
                    Outcome.VOID if job.void else Outcome.FAILED if job.failed else Outcome.GOOD
                )
                finished.append(Finished(job_id, job.kind, job.subject, outcome))
        return finished

    def renew(self) -> None:
        """The weights change now: everything under way is void when it ends."""
        for job_id, job in self._open.items():
            job.void = True
            self.void_before = max(self.void_before, job_id + 1)

    def lose(self) -> list[Finished[Subject]]:
        """Every copy has ended, and no rank will report it: all that is open has failed."""
        pending = {job_id: job.pending_ranks for job_id, job in self._open.items()}
        return self.report(pending, list(pending))

    def subjects(self, kind: JobKind) -> list[Subject]:
        """Of the open jobs of one kind, in the order of their begin. May be called from another
        thread: list() of a dict's values is one step under the GIL.
        """
        return [job.subject for job in list(self._open.values()) if job.kind is kind]

    def check(self) -> None:
        for job_id, job in self._open.items():
            assert 0 < job.pending_ranks <= self._rank_count
            assert not job.void or job_id < self.void_before
