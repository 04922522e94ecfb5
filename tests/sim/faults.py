"""What goes wrong, and when. Each kind comes by itself, at the rate that the profile gives it.

What happens to single messages, reads and copies is decided where they are made (World.hits).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.engine import Engine
from tests.sim.machine import Machine
from tests.sim.makers import is_canary
from tests.sim.network import DIRECTORY
from tests.sim.process import NodeProcess

if TYPE_CHECKING:
    from tests.sim.world import World

_PARTITIONS_US = (100_000, 700_000, 2_000_000, 5_000_000)
MAX_TAKEN_OVER, TAKE_OVER_MS = 8, 1_000
LONG_AWAY_US = 5_000_000  # > SESSION_GRACE_MS, by every clock
_FREEZES_US = (200_000, 1_000_000, 4_000_000)


class Faults:
    """All of a run, until `stop`."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._random = world.random
        self.stopped = False
        doers: dict[str, Callable[[], str | None]] = {
            "partition_one_way": self._cut_one_way,
            "partition_two_way": self._cut_two_way,
            "crash_slab_kept": self._crash_keeping,
            "crash_slab_lost": self._crash_losing,
            "crash_torn": self._light_fuse,
            "freeze": self._freeze,
            "clock_jump": self._jump_clock,
            "directory_restart": self._restart_directory,
            "engine_crash": self._crash_engine,
            "engine_bye": self._detach_engine,
            "session_lost": self._lose_session,
            "session_long_lost": self._lose_session_for_long,
            "engine_slow": self._slow_engine,
            "hog": self._hog,
            "clear": self._clear,
            "drain": self._drain,
            "wrong_death_notice": self._wrong_notice,
            "old_hello": self._repeat_old_hello,
        }
        for kind, doer in doers.items():
            self._next(kind, doer)

    def stop(self) -> None:
        self.stopped = True

    def _next(self, kind: str, doer: Callable[[], str | None]) -> None:
        rate = self._world.profile.rates[kind]
        if rate > 0:
            delay_us = int(self._random.expovariate(rate) * 1e6)
            self._world.schedule.after(delay_us, self._happen, kind, doer)

    def _happen(self, kind: str, doer: Callable[[], str | None]) -> None:
        if self.stopped:
            return
        victim = doer()
        # A fuse is counted when it has burnt down.
        if victim is not None and kind != "crash_torn":
            self._world.fault(kind, victim)
        self._next(kind, doer)

    # -- whom ------------------------------------------------------------------------------------

    def _machine(self) -> Machine:
        """Rather one whose slab is being written."""
        machines = list(self._world.machines.values())
        busy = [machine for machine in machines if machine.slab.writings]
        return self._random.choice(busy if busy and self._random.randrange(2) else machines)

    def _process(self) -> NodeProcess | None:
        return self._machine().process

    def _engine(self) -> Engine | None:
        """Rather one that is writing."""
        engines = self._world.engines
        busy = [engine for engine in engines if engine.worker.is_busy]
        chosen = busy if busy and self._random.randrange(2) else engines
        return self._random.choice(chosen) if chosen else None

    def _link(self) -> tuple[str, str]:
        """The directory is at half of them."""
        names = [str(name) for name in self._world.machines]
        one, other = self._random.sample(names, 2)
        return (one, DIRECTORY if self._random.randrange(2) else other)

    # -- network and directory -------------------------------------------------------------------

    def _cut_one_way(self) -> str:
        link = self._link()
        if self._random.randrange(2):
            link = (link[1], link[0])
        self._world.network.cut([link], self._random.choice(_PARTITIONS_US))
        return "->".join(link)

    def _cut_two_way(self) -> str:
        one, other = self._link()
        links = [(one, other), (other, one)]
        self._world.network.cut(links, self._random.choice(_PARTITIONS_US))
        return f"{one} {other}"

    def _restart_directory(self) -> str | None:
        if self._world.directory.core is None:
            return None
        self._world.directory.crash(self._random.choice((100_000, 800_000, 3_000_000)))
        return DIRECTORY

    def _wrong_notice(self) -> str:
        machine = self._machine()
        self._world.directory.wrong_notice(machine.node_id)
        return machine.name

    def _repeat_old_hello(self) -> str | None:
        """It was under way for long: its node may be buried by now, or another epoch."""
        return self._world.network.repeat_hello()

    # -- nodes -----------------------------------------------------------------------------------

    def _crash_keeping(self) -> str | None:
        return self._crash(keep_slab=True)

    def _crash_losing(self) -> str | None:
        return self._crash(keep_slab=False)

    def _crash(self, *, keep_slab: bool) -> str | None:
        machine = self._machine()
        if machine.process is None:
            return None
        machine.crash(keep_slab=keep_slab)
        return machine.name

    def _light_fuse(self) -> str | None:
        process = self._process()
        if process is None:
            return None
        process.crash_after = self._random.randrange(30)
        return process.name

    def _freeze(self) -> str | None:
        process = self._process()
        if process is None or process.frozen:
            return None
        process.freeze(self._random.choice(_FREEZES_US), reads=self._random.randrange(2) == 0)
        return process.name

    def _jump_clock(self) -> str:
        """Seen at the next start of a NodeStore."""
        machine = self._machine()
        machine.clock.wall_ms += self._random.choice((-3_600_000, -60_000, 60_000, 3_600_000))
        return machine.name

    def _clear(self) -> str | None:
        process = self._process()
        if process is None:
            return None
        process.event(process.core.clear)
        return process.name

    def _drain(self) -> str | None:
        """A node leaves: another one takes over some of its blocks, then it goes with its slab, and
        some time later there is a new one.
        """
        machines = [m for m in self._world.machines.values() if m.process is not None]
        if len(machines) < 2:
            return None
        leaving, staying = self._random.sample(machines, 2)
        assert leaving.process is not None
        assert staying.process is not None
        process = leaving.process
        process.event(process.core.drain)
        wants = [(place.key, place.bytes) for place in process.store.entries()]
        staying.process.take_over(wants[:MAX_TAKEN_OVER], within_ms=TAKE_OVER_MS)
        self._world.schedule.after(2_000 * TAKE_OVER_MS, self._leave, process)
        return leaving.name

    def _leave(self, process: NodeProcess) -> None:
        if not process.ended:
            process.machine.crash(keep_slab=False)

    # -- engines ---------------------------------------------------------------------------------

    def _crash_engine(self) -> str | None:
        engine = self._engine()
        if engine is None:
            return None
        self._world.replace(engine)
        lives_us = self._random.choice((0, 0, 50_000, 1_000_000, 4_000_000))
        if lives_us and engine.worker.client is not engine.client:
            self._world.count("orphaned_worker")
            if self._random.randrange(2):  # it writes on, and nobody hears of it
                engine.worker.client.lose_session(away_us=lives_us)
                self._world.count("orphan_without_session")
        engine.die(lives_us)
        return engine.name

    def _detach_engine(self) -> str | None:
        engine = self._engine()
        if engine is None:
            return None
        self._world.replace(engine)
        engine.bye()
        return engine.name

    def _lose_session(self) -> str | None:
        engine = self._engine()
        if engine is None:
            return None
        engine.client.lose_session()
        return engine.name

    def _lose_session_for_long(self) -> str | None:
        """It is given up, and those who asked it for something ask the others on its node."""
        engine = self._engine()
        if engine is None:
            return None
        engine.client.lose_session(away_us=LONG_AWAY_US)
        delay_us = self._random.randrange(LONG_AWAY_US - 1_500_000, LONG_AWAY_US)
        for other in self._world.engines:
            if other is not engine and other.machine is engine.machine:
                asked = [request.keys for request in engine.requests]
                prompts = [keys for keys in asked if not is_canary(keys[0])]  # nobody asks for one
                self._world.schedule.after(delay_us, other.ask_again, prompts)
        return engine.name

    def _slow_engine(self) -> str | None:
        engine = self._engine()
        if engine is None:
            return None
        now_us = self._world.schedule.now_us
        engine.worker.slow_until_us = now_us + self._random.choice((300_000, 2_000_000))
        return engine.name

    def _hog(self) -> str | None:
        engine = self._engine()
        if engine is None or not engine.client.is_connected:
            return None
        engine.hog()
        return engine.name
