"""One seed, from start to verdict."""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvray.core import clients, node
from tests.sim.heal import heal
from tests.sim.profile import CLOGGED_MS, DURATION_US, SESSION_GRACE_MS
from tests.sim.world import World


@dataclass(slots=True)
class Outcome:
    """What a seed has come to. failure: the traceback, empty if all went well."""

    seed: int
    events: int
    digest: int
    loads_ok: int
    fetched_blocks: int
    taken_over_blocks: int
    spared_blocks: int
    wanted_blocks: int
    faults: Counter[str]
    failure: str = ""
    story: list[str] = field(default_factory=list)


@contextmanager
def short_limits() -> Iterator[None]:
    """Limits of the cores that no argument sets, low enough for a run to meet them."""
    before = clients.SESSION_GRACE_MS, node.CLOGGED_MS
    clients.SESSION_GRACE_MS, node.CLOGGED_MS = SESSION_GRACE_MS, CLOGGED_MS
    try:
        yield
    finally:
        clients.SESSION_GRACE_MS, node.CLOGGED_MS = before


def run_seed(seed: int, *, trace: bool = False) -> Outcome:
    """Never raises for what goes wrong in the cluster."""
    failure = ""
    with short_limits():
        world = World(seed, trace=trace)
        try:
            world.run(DURATION_US)
            heal(world)
            for machine in world.machines.values():
                machine.crash()  # counts what it has fetched
        except Exception:  # noqa: BLE001 (whatever a core raises is what is looked for)
            failure = traceback.format_exc()
    story = world.story
    return Outcome(
        seed,
        world.schedule.event_count,
        story.digest,
        story.loads_ok,
        story.fetched_blocks,
        story.taken_over_blocks,
        story.spared_blocks,
        story.wanted_blocks,
        story.faults,
        failure,
        story.lines() if failure else [],
    )
