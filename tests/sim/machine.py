"""A host of the cluster: what outlives its processes.

down ──start──▶ NodeProcess (serves, frozen) ──crash──▶ down
"""

from random import Random
from typing import TYPE_CHECKING

from kvray.core.ids import BlockKey, NodeId
from tests.sim.clocks import Clock
from tests.sim.process import NodeProcess
from tests.sim.slabs import WatchedSlab

if TYPE_CHECKING:
    from tests.sim.world import World


class Machine:
    """One host: what outlives its processes."""

    def __init__(self, world: "World", name: str, clock: Clock, *, extent_count: int) -> None:
        self.world = world
        self.name = name
        self.node_id = NodeId(name)
        self.clock = clock
        self.process: NodeProcess | None = None
        self._extent_count = extent_count
        self._slab_count = 0
        self.slab = self._new_slab()

    def _new_slab(self) -> WatchedSlab:
        self._slab_count += 1
        return WatchedSlab(f"{self.name}.{self._slab_count}", extent_count=self._extent_count)

    def start(self) -> None:
        """A NodeStore starts, unless one is there."""
        if self.process is None:
            if self.world.hits("extent_damaged", self.name):
                self.slab.damage_extent(self.world.random)
            self.process = NodeProcess(self)
            self.process.begin()

    def crash(self, *, keep_slab: bool = True, down_us: int | None = None) -> None:
        """kill -9. It comes back by itself after down_us."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.transfers:
            self.world.count("crash_mid_read")
        process.end()
        if not keep_slab:
            self.slab = self._new_slab()
        world = self.world
        world.note(self.name, "crashed", "slab kept" if keep_slab else "slab lost")
        if down_us is None:
            down_us = world.random.choice((50_000, 300_000, 1_500_000, 4_000_000))
        world.schedule.after(down_us, self.start)
        world.directory.ray_notices(self.node_id, down_us)

    def being_stored(self) -> list[BlockKey]:
        """What an engine of this host is writing just now, if any does."""
        workers = [engine.worker for engine in self.world.engines if engine.machine is self]
        return next((keys for worker in workers if (keys := worker.storing())), [])

    @property
    def now_ms(self) -> int:
        return self.clock.ms(self.world.schedule.now_us)


def skewed_clock(random: Random) -> Clock:
    """Hosts agree on nothing."""
    return Clock(
        begin_ms=random.randrange(10_000_000),
        rate_ppm=random.choice((0, 0, -50_000, 50_000, -250_000, 250_000)),
        wall_ms=1_000_000_000 + random.choice((0, 0, -600_000, 600_000, -86_400_000)),
    )
