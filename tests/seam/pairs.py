"""One state, one event, and what became of the requests.

A request waits for kvray in a step that computes nothing. It may do so until its deadline, and then
for MAX_IDLE_STEPS more.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.config import KVTransferConfig

from kvray.engine.arguments import transfer_settings
from tests.seam.engine import LOOKUP_DEADLINE_MS, SeamEngine, vllm_config
from tests.seam.states import World, prompt
from tests.seam.store import SeamStore

MAX_IDLE_STEPS = 2
MAX_STEPS = 2_000  # of a request: a bug, if it is not over by then
FLUSH_STEPS = 3  # what has finished is stored, reported, and forgotten
# Far more than a question takes, on a host that runs other tests too; less than the deadline.
STEP_BUDGET_MS = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """unfinished: requests that wait for longer than they may. The others are counted at the end,
    when every request is over.
    """

    unfinished: int
    lost_device_blocks: int
    lost_slots: int
    pins: int
    tickets: int
    jobs: int

    @property
    def is_good(self) -> bool:
        return self == Outcome(0, 0, 0, 0, 0, 0)


class Seam:
    """Makes worlds: vLLM's configuration is made once."""

    def __init__(self, folder: Path) -> None:
        self._runtime = folder / "run"
        self._runtime.mkdir(mode=0o700)
        model = folder / "model"
        model.mkdir()
        self._config: Any = None
        self._model = model

    @contextmanager
    def world(self, *, step_budget_ms: int = STEP_BUDGET_MS) -> Iterator[World]:
        store = SeamStore(self._runtime)
        try:
            if self._config is None:
                self._config = vllm_config(self._model)
            settings = {
                "lookup_deadline_ms": LOOKUP_DEADLINE_MS,
                "step_budget_ms": step_budget_ms,
                **store.settings(),
            }
            # A detach takes it away.
            self._config.kv_transfer_config = KVTransferConfig(**transfer_settings(settings))
            engine = SeamEngine(self._config, store)
            try:
                yield World(engine)
            finally:
                store.thaw()
                engine.close()
        finally:
            store.close()


@contextmanager
def seam() -> Iterator[Seam]:
    with tempfile.TemporaryDirectory(prefix="kvray-") as folder:
        yield Seam(Path(folder))


def judge(seam: Seam, state: Callable[[World], None], event: Callable[[World], None]) -> Outcome:
    with seam.world() as world:
        world.fill_slab()
        state(world)
        event(world)
        unfinished = finish(world.engine)
        if not unfinished:
            # Life goes on for others, too.
            world.engine.add("next", prompt())
            unfinished = finish(world.engine)
        return count(world, unfinished=unfinished)


def finish(engine: SeamEngine) -> int:
    """Steps until every request is over; how many wait for kvray for longer than they may."""
    begun_s = time.monotonic()
    idle_steps = 0
    for _ in range(MAX_STEPS):
        if not engine.unfinished():
            return 0
        computed = engine.step()
        # A request's deadline runs from when it was asked about.
        asked_s = (view.asked_s for view in engine.connector.lookups._requests.values())  # noqa: SLF001
        until_s = max(begun_s, *asked_s, 0.0) + LOOKUP_DEADLINE_MS / 1_000
        idle_steps = 0 if computed else idle_steps + (time.monotonic() > until_s)
        if idle_steps > MAX_IDLE_STEPS:
            break
    return len(engine.unfinished())


def count(world: World, *, unfinished: int) -> Outcome:
    """What is left when the requests are over, or have been aborted."""
    engine, store = world.engine, world.engine.store
    for name in engine.unfinished():
        engine.abort(name)
    for _ in range(FLUSH_STEPS):
        engine.step()
    store.thaw()
    connector = engine.connector
    jobs = len(engine.scheduler.requests)
    client = connector._client  # noqa: SLF001
    assert client is not None
    if engine.attached() is not None:
        jobs += connector.pending()
    if store.node is None:
        store.start()
    if engine.attached() is not None and connector.switch.off is None:
        jobs += len(connector.lookups._requests)  # noqa: SLF001
        engine.wait_connected()
        engine.wait_heard()
    else:
        engine.wait_left()
    tickets = client.snapshot()["open_lookups"]
    return Outcome(
        unfinished=unfinished,
        lost_device_blocks=engine.lost_device_blocks(),
        lost_slots=store.lost_slots(),
        pins=store.pins(),
        tickets=tickets,
        jobs=jobs,
    )
