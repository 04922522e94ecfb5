"""An engine: an EngineCore that has requests, and the worker that copies for it.

Prompts are chains of keys that all engines share, so that what one has stored another one fetches.
"""

from typing import TYPE_CHECKING

from kvray.core.ids import BlockKey, ClientId, OpId, Role
from kvray.core.messages import (
    Bye,
    LocalAnswer,
    Lookup,
    LookupReply,
    LookupUpdate,
    Reserve,
    ReserveReply,
)
from tests.sim.copies import Worker
from tests.sim.makers import CANARY_PERIOD_US, canary_of
from tests.sim.requests import Request, chain
from tests.sim.session import Client

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.world import World

MAX_REQUESTS = 6  # of one engine at a time
RESERVE_BUDGET_US = 2_000  # then the step goes on without an answer


class Engine:
    """From its start to its death."""

    def __init__(self, world: "World", machine: "Machine") -> None:
        self.world = world
        self.machine = machine
        pid = world.new_pid()
        self.client = Client(
            world, machine, ClientId(pid, pid, pid), role=Role.ENGINE, engine_nonce=pid
        )
        self.client.on_answer = self._hear
        self.client.on_loss = self._lose_waits
        if world.random.randrange(2):
            self.worker = Worker(world, self.client)
        else:
            other = world.new_pid()
            client_id = ClientId(other, other, other)
            self.worker = Worker.of_its_own(world, machine, client_id, pid)
        self.is_dead = False
        self.is_stopping = False  # has no new requests
        self.requests: list[Request] = []
        self._lookups: dict[OpId, Request] = {}
        self._reserves: dict[OpId, Request] = {}
        self._next()
        if world.has_makers:
            self._store_canary()

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def is_quiet(self) -> bool:
        return not self.requests and not self.client.unsaid and not self.worker.is_busy

    def _next(self) -> None:
        if self.is_dead or self.is_stopping:
            return
        world, random = self.world, self.world.random
        if len(self.requests) < MAX_REQUESTS and self.client.is_connected:
            number = random.randrange(world.profile.chain_count)
            self.begin(chain(number, random.randrange(1, 7)))
        period_us = world.profile.request_period_us
        world.schedule.after(random.randrange(period_us // 10, 2 * period_us), self._next)

    def _store_canary(self) -> None:
        """As if it were a prompt: an engine would keep it pinned, and this one may lose it."""
        if self.is_dead or self.is_stopping:
            return
        if self.client.is_connected:
            self.begin(canary_of(self.client.maker), deadline_ms=300, fetch=False)
        self.world.schedule.after(CANARY_PERIOD_US, self._store_canary)

    def ask_again(self, prompts: list[list[BlockKey]]) -> None:
        """What others were asked before it."""
        if self.is_dead or self.is_stopping or not self.client.is_connected:
            return
        for keys in prompts:
            self.begin(keys)

    def begin(
        self, keys: list[BlockKey], *, deadline_ms: int | None = None, fetch: bool | None = None
    ) -> Request:
        """A request with this prompt; by dice what is not said."""
        random = self.world.random
        self.world.keys.update(keys)
        request = Request(self, keys)
        self.requests.append(request)
        request.ask(
            deadline_ms=deadline_ms or random.choice((30, 300, 1_000, 2_000)),
            fetch=random.randrange(20) > 0 if fetch is None else fetch,
        )
        return request

    def hog(self) -> None:
        """Reserve much, and take long."""
        request = Request(self, chain(900 + self.world.random.randrange(3), 20))
        self.world.keys.update(request.keys)
        request.is_slow = True
        self.requests.append(request)
        request.reserve(request.keys)

    # -- questions -------------------------------------------------------------------------------

    def lookup(self, request: Request, message: Lookup) -> bool:
        self._lookups[message.op] = request
        if self.client.ask(message):
            return True
        del self._lookups[message.op]
        return False

    def reserve(self, request: Request, message: Reserve) -> bool:
        if not self.client.ask(message):
            return False
        self._reserves[message.op] = request
        self.world.schedule.after(RESERVE_BUDGET_US, self._give_up_reserve, message.op)
        return True

    def _give_up_reserve(self, op: OpId) -> None:
        request = self._reserves.pop(op, None)
        if request is not None and not self.is_dead:
            self.client.undo(op, request.slab_id)
            request.end()

    def forget(self, op: OpId) -> None:
        self._lookups.pop(op, None)

    def _hear(self, answer: LocalAnswer) -> None:
        if isinstance(answer, (LookupReply, LookupUpdate)):
            request = self._lookups.get(answer.op)
            if request is not None:
                request.hear(answer)
        elif isinstance(answer, ReserveReply):
            request = self._reserves.pop(answer.op, None)
            if request is not None:  # else it has been undone
                request.granted(answer)

    def _lose_waits(self) -> None:
        for op in list(self._reserves):
            self._give_up_reserve(op)
        for request in list(self._lookups.values()):
            request.lose()

    # -- its end ---------------------------------------------------------------------------------

    def bye(self) -> None:
        """Detaches: once everything is said."""
        self.is_stopping = True
        if not self.is_quiet:
            self.world.schedule.after(100_000, self.bye)
        elif not self.is_dead:
            self.client.has_left = True
            if self.client.ask(Bye(self.client.op())):
                self.world.note(self.name, "says bye")
            self.world.schedule.after(20_000, self.die, 0)

    def die(self, worker_lives_us: int) -> None:
        """kill -9. A worker in a process of its own may live a little longer."""
        if self.is_dead:
            return
        self.is_dead = True
        self.requests.clear()
        self.client.die()
        self.world.process_ends(self.client.client_id)
        if self.worker.client is self.client:
            self.worker.die()
        else:
            self.world.orphans.append(self.worker)
            self.world.schedule.after(worker_lives_us + 1, end_worker, self.worker)


def end_worker(worker: Worker) -> None:
    """The process of a worker ends."""
    if not worker.is_dead:
        worker.die()
        worker.client.die()
        worker.world.process_ends(worker.client.client_id)
        worker.world.orphans.remove(worker)
