"""The cluster: five hosts, a directory, engines, a network, and one seed for all of it."""

from collections.abc import Sequence
from random import Random
from typing import Any

from kvray.core.ids import BlockKey, ClientId, NodeId
from tests.sim.copies import Worker
from tests.sim.directory import Directory
from tests.sim.engine import Engine
from tests.sim.faults import Faults
from tests.sim.machine import Machine, skewed_clock
from tests.sim.network import Network
from tests.sim.profile import NODE_COUNT, Profile
from tests.sim.schedule import Schedule
from tests.sim.story import Story

CHECK_ALL_EVENTS = 100
GONE_DELAY_US = 300_000  # until a pidfd has been heard, at most


class World:
    """Everything of one seed."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.random = Random(seed)
        self.has_makers = seed % 3 == 2  # no die: the stories of all other seeds stay as they were
        self.schedule = Schedule()
        self.story = Story(trace=trace)
        self.profile = Profile.roll(self.random)
        self.network = Network(self)
        self.dead: set[tuple[int, int]] = set()  # processes, by pid and start
        self.engines: list[Engine] = []  # those that are alive and attached
        self.orphans: list[Worker] = []  # their engine is gone
        self.keys: set[BlockKey] = set()  # every one that anybody has asked for
        self._client_ids: dict[int, list[ClientId]] = {}
        self._last_session = self._last_pid = 0
        self.directory = Directory(self, skewed_clock(self.random))
        self.machines: dict[NodeId, Machine] = {}
        for i, extent_count in enumerate(self.profile.extent_counts):
            clock = skewed_clock(self.random)
            machine = Machine(self, f"n{i}", clock, extent_count=extent_count)
            self.machines[machine.node_id] = machine
        self.story.faults["clock_skew"] += NODE_COUNT
        self.directory.start()
        for machine, count in zip(self.machines.values(), self.profile.engine_counts, strict=True):
            self.schedule.after(self.random.randrange(500_000), machine.start)
            for _ in range(count):
                self.schedule.after(self.random.randrange(1_000_000), self.attach, machine)
        self.faults = Faults(self)

    # -- time ------------------------------------------------------------------------------------

    def run(self, duration_us: int) -> None:
        """Let so much time pass."""
        end_us = self.schedule.now_us + duration_us
        while self.schedule.run(end_us):
            if self.schedule.event_count % CHECK_ALL_EVENTS == 0:
                self.check()

    def check(self) -> None:
        """Everything there is."""
        for machine in self.machines.values():
            if machine.process is not None:
                machine.process.check()
        if self.directory.core is not None:
            self.directory.core.check()
        for engine in self.engines:
            for request in engine.requests:
                request.check()

    # -- dice and story --------------------------------------------------------------------------

    def hits(self, kind: str, *details: Any) -> bool:
        """Whether this fault happens to this message, read or copy."""
        chance = self.profile.chances[kind]
        if not chance or self.random.random() >= chance:
            return False
        self.fault(kind, *details)
        return True

    def note(self, who: str, what: str, *details: Any) -> None:
        self.story.note(self.schedule.now_us, who, what, *details)

    def fault(self, kind: str, *details: Any) -> None:
        self.story.fault(self.schedule.now_us, kind, *details)

    def count(self, kind: str) -> None:
        """Something that follows from faults, as often as it comes."""
        self.story.faults[kind] += 1

    def loaded(self, name: str, keys: Sequence[BlockKey]) -> None:
        self.story.loads_ok += 1
        self.note(name, "loads", len(keys), keys[-1][-3:].hex())

    # -- processes -------------------------------------------------------------------------------

    def new_session(self) -> int:
        self._last_session += 1
        return self._last_session

    def new_pid(self) -> int:
        self._last_pid += 1
        self._client_ids[self._last_pid] = [
            ClientId(self._last_pid, self._last_pid, self._last_pid)
        ]
        return self._last_pid

    def clients_of(self, pid: int) -> list[ClientId]:
        return self._client_ids[pid]

    def attach(self, machine: Machine) -> None:
        """A new engine on this host."""
        if not self.faults.stopped:
            self.engines.append(Engine(self, machine))

    def replace(self, engine: Engine) -> None:
        """It goes, and another one comes some time later."""
        self.engines.remove(engine)
        delay_us = self.random.choice((100_000, 1_000_000))
        self.schedule.after(delay_us, self.attach, engine.machine)

    def process_ends(self, client_id: ClientId) -> None:
        """Its pidfd says so to whoever watches it, a moment later."""
        self.dead.add((client_id.pid, client_id.start_ticks))
        delay_us = self.random.randrange(100, GONE_DELAY_US)
        self.schedule.after(delay_us, self._tell_gone, client_id)

    def _tell_gone(self, client_id: ClientId) -> None:
        for machine in self.machines.values():
            if machine.process is not None:
                machine.process.on_process_gone(client_id.pid, client_id.start_ticks)
