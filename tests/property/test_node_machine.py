"""Whole nodes under any interleaving: engines, workers, peers, a directory, restarts, silence.

What is held to the bytes: each HIT when it is told, and each pinned block at every step. What may
write late does: workers of dead engines, abandoned reads. At the end everything is let go of, and
nothing may be left: no pin, no slot in quarantine, no waiter, no difference to the directory.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvray.core.clients import SESSION_GRACE_MS
from kvray.core.fetch import FetchLimits
from kvray.core.ids import BlockKey, ClientId, OpId, SlotState
from kvray.core.messages import KeyState
from tests.nodes import Cluster, Engine, Node, Slot, worker_of
from tests.shells import BLOCK_BYTES, key, stamp

KEYS = [key(n) for n in range(24)]  # more than a slab has slots
NAMES = ["a", "b"]
LIMITS = FetchLimits(max_unended_reads=4, batch_blocks=3, batch_bytes=3 * BLOCK_BYTES)

some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=8, unique=True)
which = st.integers(0, 3)


class Worker:
    """A process that copies for an engine, and does not hear when it dies."""

    def __init__(self, engine: Engine) -> None:
        self.client_id: ClientId = worker_of(engine)
        self.told: dict[BlockKey, Slot] = {}  # slots that it may still write into


class NodeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster.of(*NAMES, slot_count=16, limits=LIMITS)
        self.engines: list[Engine] = []
        self.workers: dict[Engine, Worker] = {}
        self.orphans: list[tuple[Node, Worker]] = []
        self.silent: set[Engine] = set()  # those without a session
        self.deadlines: dict[tuple[Engine, OpId], int] = {}
        for n in range(3):
            self.new_engine(NAMES[n % 2])

    def new_engine(self, name: str) -> None:
        engine = Engine(self.cluster[name])
        self.engines.append(engine)
        self.workers[engine] = Worker(engine)

    def engine(self, n: int) -> Engine:
        return self.engines[n % len(self.engines)]

    def talking(self, n: int) -> Engine | None:
        engine = self.engine(n)
        return None if engine in self.silent else engine

    # -- engines ---------------------------------------------------------------------------------

    @rule(n=which, keys=some_keys)
    def stores(self, n: int, keys: list[BlockKey]) -> None:
        if (engine := self.talking(n)) is not None:
            new = [k for k in keys if k not in engine.reserved]
            engine.store(*new)

    @rule(n=which, keys=some_keys)
    def reserves(self, n: int, keys: list[BlockKey]) -> None:
        if (engine := self.talking(n)) is not None:
            engine.reserve(*(k for k in keys if k not in engine.reserved))
            self.workers[engine].told = dict(engine.reserved)

    @rule(n=which, data=st.data(), good=st.booleans())
    def copies_end(self, n: int, data: st.DataObject, good: bool) -> None:  # noqa: FBT001
        engine = self.talking(n)
        if engine is None or not engine.reserved:
            return
        k = data.draw(st.sampled_from(sorted(engine.reserved)))
        engine.write(k)
        self.workers[engine].told.pop(k, None)
        if good:
            engine.commit(k)
        else:
            engine.abandon(k)

    @rule(
        n=which,
        keys=some_keys,
        more=some_keys,
        prefix=st.booleans(),
        within_ms=st.sampled_from([0, 30, 400, 2_000]),
    )
    def looks_up(
        self,
        n: int,
        keys: list[BlockKey],
        more: list[BlockKey],
        prefix: bool,  # noqa: FBT001
        within_ms: int,
    ) -> None:
        if (engine := self.talking(n)) is not None:
            runs = [run for run in (keys, more) if run]
            op = engine.lookup(*runs, prefix=prefix, within_ms=within_ms)
            self.deadlines[engine, op] = self.cluster.now_ms + within_ms

    @rule(n=which, data=st.data())
    def unpins(self, n: int, data: st.DataObject) -> None:
        engine = self.talking(n)
        if engine is not None and engine.states:
            self.unpin(engine, data.draw(st.sampled_from(sorted(engine.states))))

    def unpin(self, engine: Engine, op: OpId) -> None:
        engine.unpin(op)
        engine.states.pop(op)
        engine.places.pop(op, None)
        self.deadlines.pop((engine, op), None)

    # -- sessions and processes ------------------------------------------------------------------

    @rule(n=which, what=st.sampled_from(["session lost", "hello", "hello", "engine dies"]))
    def a_process_or_its_session_ends(self, n: int, what: str) -> None:
        if what == "session lost":
            self.loses_its_session(n)
        elif what == "hello":
            self.says_hello_again(n)
        else:
            self.engine_dies(n)

    def loses_its_session(self, n: int) -> None:
        if (engine := self.talking(n)) is not None:
            engine.listen()
            engine.lose_session()
            self.silent.add(engine)
            self.lose_waits(engine)

    def lose_waits(self, engine: Engine) -> None:
        """What a client does when its session ends."""
        for states in engine.states.values():
            for waiting in (KeyState.WAIT, KeyState.COMING):
                states[:] = states.replace(bytes([waiting]), bytes([KeyState.MISS]))

    def says_hello_again(self, n: int) -> None:
        engine = self.engine(n)
        if engine not in self.silent:
            engine.listen()
            self.lose_waits(engine)
        self.greet(engine, self.cluster[engine.node.name])

    def greet(self, engine: Engine, node: Node) -> None:
        engine.hello(engine.reserved.values(), node=node)
        self.silent.discard(engine)

    def engine_dies(self, n: int) -> None:
        engine = self.engine(n)
        engine.die()
        self.engines.remove(engine)
        self.silent.discard(engine)
        self.orphans.append((engine.node, self.workers.pop(engine)))
        self.deadlines = {at: ms for at, ms in self.deadlines.items() if at[0] is not engine}
        self.new_engine(engine.node.name)

    @precondition(lambda self: self.orphans)
    @rule(data=st.data())
    def orphan_dies(self, data: st.DataObject) -> None:
        node, worker = data.draw(st.sampled_from(self.orphans))
        self.orphans.remove((node, worker))
        self.cluster[node.name].process_gone(worker.client_id)

    @rule()
    def workers_write_late(self) -> None:
        for node, worker in self.orphans:
            for k, (_, _, offset) in worker.told.items():
                node.slab.memory[offset : offset + BLOCK_BYTES] = stamp(k)

    # -- nodes, link, directory ------------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        what=st.sampled_from(["kill", "clear", "bury", "away", "back", "back", "back"]),
    )
    def a_node_or_the_directory_suffers(self, name: str, what: str) -> None:
        if what == "kill":
            self.node_is_killed_and_restarts(name)
        elif what == "clear":
            node = self.cluster[name]
            node.do(node.core.clear(self.cluster.now_ms))
        elif what == "bury":
            self.a_node_is_buried(name)
        elif what == "away":
            self.cluster.directory = None
        else:
            self.cluster.restart_directory()

    def node_is_killed_and_restarts(self, name: str) -> None:
        slab = self.cluster.kill(name)
        node = self.cluster.start(name, slab, limits=LIMITS)
        for engine in self.engines:
            if engine.node.name == name:
                engine.states.clear()  # its pins are gone: the client asks again
                engine.places.clear()
                engine.node = node
                self.greet(engine, node)
        self.orphans = [(node if n.name == name else n, w) for n, w in self.orphans]
        self.deadlines = {at: ms for at, ms in self.deadlines.items() if at[0].node is not node}

    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def a_call_ends(self, data: st.DataObject, ok: bool) -> None:  # noqa: FBT001
        calls = [(node, call) for node in self.cluster.nodes.values() for call in node.calls]
        if calls:
            node, call_id = data.draw(st.sampled_from(calls))
            (node.answer_call if ok else node.fail_call_of)(call_id)
            node.open_links()

    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def a_read_ends(self, data: st.DataObject, ok: bool) -> None:  # noqa: FBT001
        reads = [(node, read) for node in self.cluster.nodes.values() for read in node.reads]
        if reads:
            node, read_id = data.draw(st.sampled_from(reads))
            node.end_read(read_id, ok=ok)

    @rule()
    def all_goes_well_for_a_moment(self) -> None:
        self.cluster.settle()

    @rule(n=which, m=which, keys=some_keys, good=st.booleans())
    def one_stores_and_another_asks(
        self,
        n: int,
        m: int,
        keys: list[BlockKey],
        good: bool,  # noqa: FBT001
    ) -> None:
        """The usual way, up to the reads; so that it is as frequent as what goes wrong."""
        self.stores(n, keys)
        self.time_passes(5)
        self.calls_end()
        self.looks_up(m, keys, [], prefix=False, within_ms=2_000)
        if good:
            self.calls_end()

    @rule()
    def calls_end(self) -> None:
        """All of them, well; reads take their time."""
        for node in self.cluster.nodes.values():
            while node.calls and self.cluster.directory is not None:
                node.answer_call(min(node.calls))
                node.open_links()

    def a_node_is_buried(self, name: str) -> None:
        if self.cluster.directory is not None:
            info = self.cluster[name].core.info
            self.cluster.directory.on_node_dead(info.node_id, info.epoch)

    @rule()
    def the_link_changes(self) -> None:
        self.cluster.link_is_up = not self.cluster.link_is_up

    @rule(after_ms=st.sampled_from([0, 5, 5, 30, 30, 300, 2_000, SESSION_GRACE_MS]))
    def time_passes(self, after_ms: int) -> None:
        """Nobody answers meanwhile."""
        self.cluster.now_ms += after_ms
        if self.cluster.directory is not None:
            self.cluster.directory.on_tick(self.cluster.now_ms)
        for node in self.cluster.nodes.values():
            node.tick()
        if after_ms == SESSION_GRACE_MS:
            for engine in self.silent:
                engine.places.clear()

    # -- what always holds -----------------------------------------------------------------------

    @invariant()
    def what_is_pinned_keeps_its_bytes(self) -> None:
        for engine in self.engines:
            engine.listen()
            for op, places in engine.places.items():
                for i, row in places.items():
                    engine.assert_holds(engine.keys[op][i], row)

    @invariant()
    def nobody_waits_beyond_its_deadline(self) -> None:
        for (engine, op), deadline_ms in self.deadlines.items():
            engine.listen()
            is_told = engine not in self.silent and op in engine.states
            if is_told and deadline_ms <= self.cluster.now_ms:
                node = engine.node
                due_ms = node.core.next_deadline_ms()
                late = is_waiting(engine.states[op])
                assert not late or (due_ms is not None and due_ms <= self.cluster.now_ms)

    @invariant()
    def at_most_one_slot_of_a_key_is_ready(self) -> None:
        for node in self.cluster.nodes.values():
            ready = node.slab.headers[node.slab.headers["state"] == SlotState.READY]
            keys = [row["key"].tobytes() for row in ready]
            assert len(set(keys)) == len(keys)

    def teardown(self) -> None:
        cluster = self.cluster
        cluster.link_is_up = True
        if cluster.directory is None:
            cluster.restart_directory()
        cluster.pass_ms(12_000)
        for engine in self.engines:
            if engine in self.silent:
                self.greet(engine, cluster[engine.node.name])
            engine.listen()
            for op in list(engine.states):
                assert not is_waiting(engine.states[op]), "waits for ever"
                self.unpin(engine, op)
            engine.abandon(*list(engine.reserved))
        for node, worker in self.orphans:
            cluster[node.name].process_gone(worker.client_id)
        cluster.pass_ms(500)
        self.assert_the_directory_is_right()
        for node in cluster.nodes.values():
            assert not node.reads
            assert node.slab.states().keys() <= {SlotState.READY}, "a slot has leaked"
            snapshot = node.core.snapshot()
            assert snapshot["lookups"]["waiting"] == 0
            assert snapshot["fetch"]["blocks"] == {}
            node.do(node.core.clear(cluster.now_ms))
            assert node.slab.states() == {}, "a pin has leaked"

    def assert_the_directory_is_right(self) -> None:
        """After healing and a few heartbeats it equals the union of READY blocks."""
        directory = self.cluster.directory
        assert directory is not None
        directory.check()
        listed = {
            (location.node_id, k, location.slot, location.generation)
            for k, at in zip(KEYS, directory.where(KEYS), strict=True)
            for location in at
        }
        ready = {
            (
                node.core.info.node_id,
                key(int.from_bytes(r["key"].tobytes(), "big")),
                i,
                int(r["generation"]),
            )
            for node in self.cluster.nodes.values()
            for i, r in enumerate(node.slab.headers)
            if r["state"] == SlotState.READY
        }
        assert listed == ready, "a phantom, or one is missing"


def is_waiting(states: bytearray) -> bool:
    return KeyState.WAIT in states or KeyState.COMING in states


NodeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestNode = NodeMachine.TestCase
