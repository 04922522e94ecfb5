"""Copies that do not begin until they are told to: for what happens in the middle of one.

Runs inside an engine in one process, through Engine.call. vLLM may insist: before it overwrites
device blocks it waits for the copies out of them, and then those are let go and counted.
"""

from collections.abc import Iterable
from typing import Any

from kvray.core.direction import Direction
from kvray.engine.copier import CopyEnd, Executor
from tests import kv_recorder
from tests.in_engine import preemptions, transfers_of

MAX_STEPS = 5_000  # until a copy is submitted; a prefill of these prompts takes one or two


class HeldExecutor:
    """Another Executor whose jobs of one direction wait for let_go()."""

    def __init__(self, inner: Executor, direction: Direction) -> None:
        self.inner = inner
        self.waited_for = 0
        self._direction = direction
        self._held: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @property
    def held(self) -> int:
        return len(self._held)

    def submit(self, job_id: int, *pointers: Any, **options: Any) -> None:
        if options["direction"] is self._direction:
            self._held[job_id] = pointers, options
        else:
            self.inner.submit(job_id, *pointers, **options)

    def finished(self) -> list[CopyEnd]:
        return self.inner.finished()

    def wait(self, job_ids: Iterable[int]) -> None:
        wanted = set(job_ids)
        self.waited_for += len(wanted & self._held.keys())
        self._submit(sorted(wanted & self._held.keys()))
        self.inner.wait(wanted)

    def wait_any(self, timeout_s: float) -> bool:
        return self.inner.wait_any(timeout_s)

    def close(self) -> bool:
        self.let_go()
        return self.inner.close()

    def let_go(self) -> None:
        self._submit(list(self._held))

    def _submit(self, job_ids: Iterable[int]) -> None:
        for job_id in job_ids:
            pointers, options = self._held.pop(job_id)
            self.inner.submit(job_id, *pointers, **options)


def hold(llm: Any, direction: str) -> None:
    """From now on copies of this direction ("load", "store") do not begin."""
    transfers = transfers_of(llm)
    transfers._executor = HeldExecutor(transfers._executor, Direction(direction))


def let_go(llm: Any) -> int:
    """The held copies begin, and later ones are not held. How many vLLM had insisted on."""
    transfers = transfers_of(llm)
    held = transfers._executor
    held.let_go()
    transfers._executor = held.inner
    return int(held.waited_for)


def step_until_held(llm: Any, count: int) -> None:
    """Until so many copies are held back."""
    for _ in range(MAX_STEPS):
        if transfers_of(llm)._executor.held >= count:
            return
        kv_recorder.step(llm)
    message = "no copy was submitted"
    raise TimeoutError(message)


def step_until_preempted(llm: Any, count: int) -> None:
    """Until vLLM has preempted so many requests. See in_engine.count_preemptions."""
    for _ in range(MAX_STEPS):
        if preemptions(llm) >= count:
            return
        kv_recorder.step(llm)
    message = "nothing was preempted"
    raise TimeoutError(message)


def abort(llm: Any, name: str) -> None:
    """Its client goes away."""
    llm.llm_engine.abort_request([name], internal=False)
    kv_recorder.step(llm)


def step_until_running(llm: Any, name: str) -> None:
    """Until a request that had to wait for a load computes."""
    scheduler = kv_recorder.core_of(llm).scheduler
    for _ in range(MAX_STEPS):
        if any(request.request_id.startswith(name) for request in scheduler.running):
            return
        kv_recorder.step(llm)
    message = f"{name} does not run"
    raise TimeoutError(message)
