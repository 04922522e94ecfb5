"""The unix socket between a process of an engine and its NodeStore, and the client at its end.

    Client ──to_node, in order──▶ NodeProcess        closed by the client: what is under way arrives
           ◀──to_client, in order──                  the NodeStore ends: the same, the other way

A client comes back after a while, says hello and lists what it may still write. What it says
without waiting for an answer is kept in its outbox until it is acknowledged, and said again in
each new session.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvray.core.codec import decode, encode, pack_slots, unpack_slots
from kvray.core.ids import ClientId, Namespace, OpId, Role, SlabId
from kvray.core.messages import (
    MAX_MESSAGE_BYTES,
    Abandon,
    Ack,
    Bye,
    Commit,
    Hello,
    HelloReply,
    LocalAnswer,
    LocalRequest,
    Refused,
    Unpin,
)
from tests.shells import Slot
from tests.sim.makers import CHUNKS, NAMESPACE, maker_of
from tests.sim.slabs import WatchedSlab

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.process import NodeProcess
    from tests.sim.world import World

Kept = Commit | Abandon | Unpin | Bye


class Session:
    """One connection. Both directions keep their order."""

    def __init__(self, client: "Client", node: "NodeProcess", session_id: int) -> None:
        self.session_id = session_id
        self.node = node
        self._client = client
        self._world = node.world
        self._there_us = self._back_us = 0
        self._closed = False  # by the client
        node.sessions[session_id] = self

    def to_node(self, message: LocalRequest) -> None:
        self._send(self._arrive, encode(message))

    def close(self) -> None:
        """By the client: it hears nothing more."""
        if not self._closed:
            self._closed = True
            self._send(self.node.on_closed, self)

    def _send(self, action: Callable[..., None], argument: object) -> None:
        world = self._world
        at_us = world.schedule.now_us + world.random.randrange(20, 300)
        self._there_us = max(self._there_us, at_us)
        world.schedule.at(self._there_us, action, argument)

    def _arrive(self, data: bytes) -> None:
        self.node.on_data(self, data)

    def to_client(self, data: bytes, slab: WatchedSlab) -> None:
        """slab: its file descriptor, which only a HelloReply carries."""
        self._answer(self._deliver, data, slab)

    def node_is_gone(self) -> None:
        """Or has dropped this session."""
        self._answer(self._lost)

    def _answer(self, action: Callable[..., None], *arguments: object) -> None:
        world = self._world
        at_us = world.schedule.now_us + world.random.randrange(20, 300)
        self._back_us = max(self._back_us, at_us)
        world.schedule.at(self._back_us, action, *arguments)

    def _deliver(self, data: bytes, slab: WatchedSlab) -> None:
        if not self._closed:
            answer: LocalAnswer = decode(data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalAnswer)
            self._client.hear(answer, slab)

    def _lost(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.on_lost()


class Client:
    """One process, while it lives: an engine's (on_answer) or a worker's."""

    def __init__(
        self,
        world: "World",
        machine: "Machine",
        client_id: ClientId,
        *,
        role: Role,
        engine_nonce: int,
    ) -> None:
        self.world = world
        self.machine = machine
        self.client_id = client_id
        self.maker = maker_of(engine_nonce, are_several=world.has_makers)
        self.slab: WatchedSlab | None = None  # mapped; the last one that was handed over
        self.is_dead = False
        self.has_left = False  # has said bye: the last thing that it says
        self.stays_away_until_us = 0
        self.on_answer: Callable[[LocalAnswer], None] = lambda answer: None
        self.on_session: Callable[[], None] = lambda: None
        self.on_loss: Callable[[], None] = lambda: None
        self.unsaid: dict[OpId, Kept] = {}  # not acknowledged
        self.writing: dict[tuple[SlabId, int, int], Slot] = {}  # granted, see node.telling
        self._role = role
        self._engine_nonce = engine_nonce
        self._session: Session | None = None
        self._is_greeted = False
        self._ops = 0
        self._retrying = False
        self.connect_later(1_000)

    @property
    def name(self) -> str:
        return f"{self.machine.name}/{self.client_id.pid}"

    @property
    def is_connected(self) -> bool:
        return self._is_greeted

    @property
    def node(self) -> "NodeProcess | None":
        """Whom it talks to."""
        return self._session.node if self._session is not None and self._is_greeted else None

    def op(self) -> OpId:
        self._ops += 1
        return OpId(self._ops)

    # -- saying ----------------------------------------------------------------------------------

    def ask(self, message: LocalRequest) -> bool:
        """False if there is nobody to ask."""
        if self._session is None or not self._is_greeted:
            return False
        self._session.to_node(message)
        return True

    def tell(self, message: Kept) -> None:
        """Said now, or in the next session, until it is acknowledged."""
        world = self.world
        self.unsaid[message.op] = message
        if world.hits("said_late", self.name, type(message).__name__):
            delay_us = world.random.choice((5_000, 200_000, 1_500_000))
            world.schedule.after(delay_us, self._say_again, message)
            return
        self.ask(message)
        if world.hits("said_twice", self.name, type(message).__name__):
            delay_us = world.random.choice((100, 5_000, 500_000, 3_000_000))
            world.schedule.after(delay_us, self._say_again, message)

    def _say_again(self, message: Kept) -> None:
        if not self.is_dead and not self.has_left:
            self.ask(message)

    def commit(self, slab_id: SlabId, places: list[Slot]) -> None:
        self.tell(Commit(self.op(), slab_id, pack_slots(places)))

    def abandon(self, slab_id: SlabId, places: list[Slot]) -> None:
        self.forget(slab_id, places)
        self.tell(Abandon(self.op(), slab_id, pack_slots(places)))

    def undo(self, reserve_op: OpId, slab_id: SlabId) -> None:
        self.tell(Abandon(self.op(), slab_id, b"", reserve_op))

    def unpin(self, lookup_op: OpId) -> None:
        self.tell(Unpin(self.op(), lookup_op))

    def forget(self, slab_id: SlabId, places: list[Slot]) -> None:
        for slot, generation, _ in places:
            self.writing.pop((slab_id, slot, generation), None)

    # -- the session -----------------------------------------------------------------------------

    def connect_later(self, delay_us: int) -> None:
        if not self._retrying:
            self._retrying = True
            self.world.schedule.after(delay_us, self._connect)

    def _connect(self) -> None:
        self._retrying = False
        if self.is_dead or self._session is not None:
            return
        world, node = self.world, self.machine.process
        if node is None or world.schedule.now_us < self.stays_away_until_us:
            self.connect_later(world.random.randrange(20_000, 300_000))
            return
        self._session = Session(self, node, world.new_session())
        slab_id = self.slab.slab_id if self.slab is not None else SlabId(b"")
        if world.hits("hello_confused", self.name):
            # It does not know any more which slab it has, until it says hello once more.
            slab_id = SlabId(b"")
            world.schedule.after(
                world.random.randrange(1_000, 1_000_000), self._renew, self._session
            )
        rows = [place for (of, _, _), place in self.writing.items() if of == slab_id]
        self._session.to_node(
            Hello(
                self.op(),
                self.client_id,
                self._role,
                self._engine_nonce,
                NAMESPACE if self._role is Role.ENGINE else Namespace(b""),
                "a model",
                slab_id,
                pack_slots((slot, generation, 0) for slot, generation, _ in rows),
                maker=self.maker,
                chunks=CHUNKS,
            )
        )

    def _renew(self, session: Session) -> None:
        if self._session is session:
            self.lose_session()

    def hear(self, answer: LocalAnswer, slab: WatchedSlab) -> None:
        if self.is_dead:
            return
        if isinstance(answer, HelloReply):
            assert answer.slab_id == slab.slab_id
            self.slab = slab
            self._is_greeted = True
            self.on_session()
            for message in list(self.unsaid.values()):
                self.ask(message)
        elif isinstance(answer, Ack):
            said = self.unsaid.pop(answer.op, None)
            if isinstance(said, Commit):
                self.forget(said.slab_id, unpack_slots(said.slots))
        else:
            assert not isinstance(answer, Refused), answer.reason
            self.on_answer(answer)

    def lose_session(self, *, away_us: int = 0) -> None:
        """The client closes it, or it breaks."""
        if self._session is not None:
            self._session.close()
            self.stays_away_until_us = self.world.schedule.now_us + away_us
            self.on_lost()

    def on_lost(self) -> None:
        self._session = None
        self._is_greeted = False
        if not self.is_dead:
            self.on_loss()
            self.connect_later(self.world.random.randrange(10_000, 200_000))

    def die(self) -> None:
        """Its process ends; the kernel closes the socket."""
        self.is_dead = True
        if self._session is not None:
            self._session.close()
            self._session = None
        self._is_greeted = False
