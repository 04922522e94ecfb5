"""The directory actor: its lives, its clock, Ray's death notices, and what its answers may say."""

from typing import TYPE_CHECKING

import msgspec

from kvray.core.codec import pack_keys, unpack_entries, unpack_keys
from kvray.core.directory import TICK_MS, DirectoryCore, DirectoryLimits
from kvray.core.ids import Epoch, NodeId, Term
from kvray.core.messages import (
    MAX_DOUBTFUL_KEYS,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    Locate,
    LocateReply,
    NodeHello,
    NodeHelloReply,
)
from kvray.core.roster import BURY_MS, BURY_PERIODS, QUIET_AFTER_MS, NodeState
from tests.sim.clocks import Clock

if TYPE_CHECKING:
    from tests.sim.world import World

QUIET_TOO_SOON_MS = 200  # in every other term: a pause between two loads is the end of the work

WRONG_HINTS = 0.02  # of the answers to announces

Reply = NodeHelloReply | AnnounceReply | LocateReply


class Directory:
    """core is None while Ray restarts it."""

    def __init__(self, world: "World", clock: Clock) -> None:
        self._world = world
        self._clock = clock
        self._term = 0
        self.core: DirectoryCore | None = None
        # What has been said in this term: an epoch is dead once buried or replaced.
        self._alive: dict[NodeId, Epoch] = {}
        self._dead: dict[NodeId, Epoch] = {}  # the greatest one
        self._heard_ms: dict[NodeId, int] = {}  # any word of it
        self._told_ms: dict[NodeId, tuple[int, int]] = {}  # its last two heartbeat periods
        self._numbers: dict[tuple[NodeId, Epoch], int] = {}  # the greatest one of its announces

    def start(self) -> None:
        """Empty, with a greater term."""
        if self.core is not None:
            return
        self._term = max(self._term + 1, self._now_ms() + self._clock.wall_ms)
        quiet_after_ms = QUIET_TOO_SOON_MS if self._term % 2 else QUIET_AFTER_MS
        self.core = DirectoryCore(Term(self._term), DirectoryLimits(quiet_after_ms=quiet_after_ms))
        self._told_ms.clear()
        self._numbers.clear()
        self._alive.clear()
        self._dead.clear()
        self._world.note("directory", "starts", f"term {self._term}")
        self._world.schedule.after(TICK_MS * 1_000, self._tick, self.core)

    def crash(self, down_us: int) -> None:
        self.core = None
        self._world.schedule.after(down_us, self.start)

    def _now_ms(self) -> int:
        return self._clock.ms(self._world.schedule.now_us)

    def _tick(self, core: DirectoryCore) -> None:
        if core is not self.core:
            return
        now_ms = self._now_ms()
        core.on_tick(now_ms)
        self._follow(core)
        for node_id in self._alive:
            silent_ms = now_ms - self._heard_ms[node_id]
            buried_ms = max(BURY_MS, BURY_PERIODS * max(self._told_ms[node_id]))
            assert silent_ms < buried_ms + TICK_MS, f"{node_id}, silent for long, is alive"
        core.check_roster()
        self._world.schedule.after(TICK_MS * 1_000, self._tick, core)

    # -- messages --------------------------------------------------------------------------------

    def answer(self, message: NodeHello | Announce | Locate) -> Reply:
        core = self.core
        assert core is not None
        now_ms = self._now_ms()
        reply: Reply
        if isinstance(message, NodeHello):
            self._heard_ms[message.info.node_id] = now_ms
            self._count(message.info.node_id, message.info.epoch, message.sequence)
            reply = core.on_hello(message, now_ms)
            if reply.accepted_epoch == message.info.epoch:
                self._told(message.info.node_id, reply.heartbeat_period_ms)
            self._follow(core)
            core.check_roster()
        elif isinstance(message, Announce):
            self._heard_ms[message.node_id] = now_ms
            reply = core.on_announce(message, now_ms)
            self._follow(core)
            is_believed = reply.status in (AnnounceStatus.OK, AnnounceStatus.RESYNC)
            if message.epoch <= self._dead.get(message.node_id, 0):
                assert reply.status is AnnounceStatus.BURIED, "a buried node is believed"
            if message.term != self._term:
                assert not is_believed, "what was said to another directory is believed"
            if is_believed:
                self._told(message.node_id, reply.heartbeat_period_ms)
                self._follow_number(message)
            core.check_roster()
            reply = self._hinted(core, message, reply)
        else:
            reply = core.on_locate(message, now_ms)
            self._follow(core)
            for node_id, epoch in zip(reply.nodes, reply.epochs, strict=True):
                assert self._alive.get(node_id) == epoch, "a location of a buried epoch"
                assert node_id != message.node_id, "the asker is told of itself"
        return reply

    def _follow_number(self, announce: Announce) -> None:
        """What is not answered is said again, so no number of an epoch is ever missing, and none of
        the changes that came with it.
        """
        before = self._numbers.get((announce.node_id, announce.epoch), 0)
        assert announce.sequence <= before + 1, "an announce is lost for good"
        self._count(announce.node_id, announce.epoch, announce.sequence)

    def _count(self, node_id: NodeId, epoch: Epoch, number: int) -> None:
        before = self._numbers.get((node_id, epoch), 0)
        self._numbers[node_id, epoch] = max(before, number)

    def _told(self, node_id: NodeId, period_ms: int) -> None:
        """A member has been told it. Others are told, too, but nobody waits for their heartbeat."""
        self._told_ms[node_id] = (self._told_ms.get(node_id, (0, 0))[1], period_ms)

    def _hinted(
        self, core: DirectoryCore, announce: Announce, reply: AnnounceReply
    ) -> AnnounceReply:
        """Whatever is spared is somewhere else too. Now and then the hints are as wrong as can be:
        they may cost hits and nothing else.
        """
        spare, wanted = unpack_keys(reply.spare), unpack_keys(reply.read)
        assert set(spare) <= set(unpack_keys(announce.doubtful)), "spared, and nobody has asked"
        for places in core.where(spare):
            others = [place for place in places if place.node_id != announce.node_id]
            assert others, "spared, and nobody else has it"
        self._world.story.spared_blocks += len(spare)
        self._world.story.wanted_blocks += len(wanted)
        if self._world.random.random() >= WRONG_HINTS:
            return reply
        self._world.fault("hint_wrong", announce.node_id)
        added = [row[0] for row in unpack_entries(announce.adds)][:MAX_DOUBTFUL_KEYS]
        return msgspec.structs.replace(reply, spare=pack_keys(added), read=announce.doubtful)

    def _follow(self, core: DirectoryCore) -> None:
        """Note who has been buried, and whom a greater epoch has replaced."""
        for event in core.drain_events():
            known = self._alive.get(event.node_id, Epoch(0))
            if event.state is NodeState.BURIED:
                assert event.epoch == known
                del self._alive[event.node_id]
                self._dead[event.node_id] = event.epoch
                self._world.note("directory", "buries", event.node_id, event.epoch)
                continue
            dead = self._dead.get(event.node_id, Epoch(0))
            assert event.epoch > dead, "an epoch comes back"
            assert event.epoch >= known, "a lower epoch is taken over"
            if known and event.epoch > known:
                self._dead[event.node_id] = known
            self._alive[event.node_id] = event.epoch

    # -- Ray's notices ---------------------------------------------------------------------------

    def ray_notices(self, node_id: NodeId, down_us: int) -> None:
        """A node's process has died. Ray says so in time, too late, or never."""
        world = self._world
        kind = world.random.choice(("right", "late", "missing", "missing"))
        world.fault(f"notice_{kind}", node_id)
        if kind == "right":
            world.schedule.after(world.random.randrange(1, down_us), self._on_dead, node_id)
        elif kind == "late":
            delay_us = down_us + world.random.randrange(1_000, 3_000_000)
            world.schedule.after(delay_us, self._on_dead, node_id)

    def _on_dead(self, node_id: NodeId) -> None:
        """As directory.actor does: whatever epoch is there now, is dead."""
        core = self.core
        if core is None:
            return
        for info in core.roster():
            if info.node_id == node_id:
                core.on_node_dead(node_id, info.epoch)
        self._follow(core)
        core.check_roster()

    def wrong_notice(self, node_id: NodeId) -> None:
        self._on_dead(node_id)
