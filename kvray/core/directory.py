"""DirectoryCore: who holds what, and who is alive. A hint: whoever reads proves what it has read.

    NodeHello ─▶ on_hello        a node enters the roster, with an epoch greater than any before
    Announce ─▶ on_announce      heartbeat, changes of its set, parts of the whole set
    Locate ─▶ on_locate          where these keys are
    on_tick, on_bye, on_node_dead    who has left

Three parts: the roster (core.roster) knows epochs and silence, a mirror of each node on it
(core.mirror) follows what the node announces, the catalogue (core.catalogue) holds the entries of
all. Not here: any call. The answers of on_* are the messages to send back.

A node of a lower epoch, a buried one and one that has not said hello in this term can say what they
like: nothing of it is taken over, and none of their entries is located.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvray.core.catalogue import MAX_LISTINGS, Catalogue, Listing, Standing
from kvray.core.codec import pack_keys, pack_makers
from kvray.core.families import Families
from kvray.core.ids import (
    KEY_BYTES,
    BlockKey,
    Epoch,
    Generation,
    Maker,
    NodeId,
    Origin,
    SlotIndex,
    Term,
)
from kvray.core.messages import (
    LOCATION_DTYPE,
    MAX_ROSTER_NODES,
    MAX_SOURCES_PER_KEY,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    Locate,
    LocateReply,
    NodeHello,
    NodeHelloReply,
    NodeInfo,
)
from kvray.core.mirror import Mirror, MirrorCounts, MirrorState
from kvray.core.roster import QUIET_AFTER_MS, Member, NodeState, Roster
from kvray.core.uses import Uses, homes

__all__ = [
    "DirectoryCore",
    "DirectoryLimits",
    "Location",
    "NodeEvent",
    "NodeState",
]

TICK_MS = 200  # how often to call on_tick: a fifth of the time after which a node is a suspect
# Sets that are collected at a time. One node fills half of the directory's time with its parts; a
# few leave no gap, and a thousand at once would only wait longer and delay each other's heartbeat.
MAX_COLLECTING = 8
MAX_ASKED = 64  # locates whose uses are still to be noted: 4 MiB of keys, if all are long
MAX_EVENTS = 4_096  # kept until drained, the oldest lost: they are for the log only


_Asked = tuple[bytes, NDArray[np.intp], NDArray[np.uint16]]  # keys, and where they are


@dataclass(frozen=True, slots=True)
class DirectoryLimits:
    """Every limit of a DirectoryCore."""

    max_nodes: int = MAX_ROSTER_NODES  # one more is not admitted
    # 64 nodes with 1 TiB of 2 MiB blocks each; 2.5 GB of memory. What does not fit is not listed,
    # so it is not found, and is asked for again when there is room.
    max_entries: int = 32 * 1024 * 1024
    quiet_after_ms: int = QUIET_AFTER_MS


@dataclass(frozen=True, slots=True)
class Location:
    """One copy of a block, for people."""

    node_id: NodeId
    epoch: Epoch
    slot: SlotIndex
    generation: Generation
    bytes: int
    origin: Origin
    suspect: bool
    maker: Maker


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A node has changed its state; one log line each."""

    node_id: NodeId
    epoch: Epoch
    state: NodeState
    silent_ms: int


class DirectoryCore:
    """One thread calls it. No call takes time with the number of entries, but for the growth of the
    indexes (about 0.3 us an entry, whenever their number has doubled), `check` and `where`.
    """

    def __init__(self, term: Term, limits: DirectoryLimits | None = None) -> None:
        """term: greater than that of any directory of this cluster before."""
        self._term: Final = term
        limits = limits or DirectoryLimits()
        assert 2 * limits.max_nodes < MAX_LISTINGS
        self._roster = Roster(max_nodes=limits.max_nodes, quiet_after_ms=limits.quiet_after_ms)
        self._catalogue = Catalogue(max_rows=limits.max_entries)
        self._mirrors: dict[NodeId, Mirror] = {}
        self._shown: dict[Listing, Member] = {}  # whose listings can be located
        self._mirror_counts = MirrorCounts()
        self._uses: dict[NodeId, Uses] = {}  # of those who have blocks that others wanted
        self._asked: list[_Asked] = []  # what is still to be noted there
        self._families = Families()
        self._events: list[NodeEvent] = []
        self._announce_count = 0
        self._asked_key_count = 0
        self._location_count = 0

    # -- events ----------------------------------------------------------------------------------

    def on_hello(self, hello: NodeHello, now_ms: int) -> NodeHelloReply:
        """Admit the node if its epoch is the one it has to have; an announce of its will be
        answered with RESYNC, when its turn has come.

        hello.wall_clock_ms is that of the node's start, the same in each hello of one epoch.
        """
        self._roster.advance(now_ms)
        welcome = self._roster.hello(hello.info, hello.wall_clock_ms)
        member = self._roster.find(hello.info.node_id)
        period_ms = self._roster.period_ms
        if welcome.admitted:
            assert member is not None
            if welcome.fresh:
                self._roster.note_use()
                self._admit(member)
            mirror = self._mirrors[member.node_id]
            mirror.restart(hello.sequence)
            mirror.show(last=False)
            period_ms = self._roster.tell_period(member)
            self._note(member)
        return NodeHelloReply(
            term=self._term,
            accepted_epoch=welcome.epoch,
            roster_version=self._roster.version,
            roster=self._roster.infos(),
            heartbeat_period_ms=period_ms,
        )

    def on_announce(self, announce: Announce, now_ms: int) -> AnnounceReply:
        """Take note of a heartbeat and of what it says."""
        self._roster.advance(now_ms)
        self._announce_count += 1
        self._note_uses()
        member = self._roster.find(announce.node_id)
        if member is None or announce.epoch > member.epoch:
            return self._reply(AnnounceStatus.UNKNOWN, announce, None)
        if announce.epoch < member.epoch or not member.is_listed:
            return self._reply(AnnounceStatus.BURIED, announce, None)
        if announce.term != self._term:
            return self._reply(AnnounceStatus.UNKNOWN, announce, None)
        if announce.in_use or announce.adds or announce.removes:
            self._roster.note_use()
        mirror = self._mirrors[announce.node_id]
        listing = mirror.listing
        # An old announce, repeated or overtaken, is no sign of life.
        if mirror.follow(announce):
            if announce.engines is not None:
                self._families.tell(announce.node_id, announce.engines)
            if mirror.listing != listing:
                del self._shown[listing]
                self._shown[mirror.listing] = member
            if self._roster.hear(member):
                mirror.show(last=False)
                self._note(member)
        wanted = mirror.state is MirrorState.WANTED and self._may_collect()
        status = AnnounceStatus.RESYNC if wanted else AnnounceStatus.OK
        return self._reply(status, announce, member)

    def on_locate(self, locate: Locate, now_ms: int) -> LocateReply:
        """Where the keys are, but for the asker itself; nodes that are suspects come last."""
        self._roster.advance(now_ms)
        self._roster.note_use()
        own = self._mirrors.get(locate.node_id)
        at, rows = self._catalogue.locate(
            locate.keys, limit=MAX_SOURCES_PER_KEY, without=own.listing if own else None
        )
        self._asked.append((locate.keys, at, rows["listing"]))
        if len(self._asked) >= MAX_ASKED:
            self._note_uses()
        self._asked_key_count += len(locate.keys) // KEY_BYTES
        self._location_count += len(rows)
        listings, node_column = _numbered(rows["listing"])
        locations = np.zeros(len(rows), LOCATION_DTYPE)
        locations["key_index"], locations["node"] = at, node_column
        for name in ("slot", "bytes", "generation"):
            locations[name] = rows[name]
        locations["maker"] = self._catalogue.makers_of(rows)
        members = [self._shown[Listing(listing)] for listing in listings]
        gone = self._catalogue.why_missing(locate.keys, at)
        return LocateReply(
            term=self._term,
            nodes=[member.node_id for member in members],
            epochs=[member.epoch for member in members],
            locations=locations.tobytes(),
            gone=b"" if gone is None else gone.tobytes(),
        )

    def on_tick(self, now_ms: int) -> None:
        """Every TICK_MS. Finds silent nodes, and clears some of what buried ones have left."""
        self._roster.advance(now_ms)
        suspects, dead = self._roster.find_silent()
        for member in suspects:
            self._mirrors[member.node_id].show(last=True)
            self._note(member)
        for member in dead:
            self._bury(member)
        self._catalogue.sweep()

    def on_node_dead(self, node_id: NodeId, epoch: Epoch) -> None:
        """Ray says so. Nothing happens if a greater epoch has come since, or it is buried."""
        member = self._roster.find(node_id)
        if member is not None and member.is_listed and member.epoch <= epoch:
            self._bury(member)

    def on_bye(self, node_id: NodeId, epoch: Epoch) -> None:
        """The node says so itself."""
        self.on_node_dead(node_id, epoch)

    # -- questions -------------------------------------------------------------------------------

    def roster(self) -> list[NodeInfo]:
        """Who is alive, suspects included."""
        return self._roster.infos()

    def state_of(self, node_id: NodeId) -> NodeState | None:
        """None: never heard of it, or forgotten."""
        member = self._roster.find(node_id)
        return member.state if member else None

    def where(self, keys: list[BlockKey]) -> list[list[Location]]:
        """All locations of each key, for people. Takes a Python object each."""
        found: list[list[Location]] = [[] for _ in keys]
        at, rows = self._catalogue.locate(pack_keys(keys), limit=MAX_ROSTER_NODES)
        makers = self._catalogue.makers_of(rows).tolist()
        for index, row, maker in zip(at.tolist(), rows, makers, strict=True):
            member = self._shown[Listing(int(row["listing"]))]
            found[index].append(
                Location(
                    node_id=member.node_id,
                    epoch=member.epoch,
                    slot=SlotIndex(int(row["slot"])),
                    generation=Generation(int(row["generation"])),
                    bytes=int(row["bytes"]),
                    origin=Origin(int(row["origin"])),
                    suspect=member.state is NodeState.SUSPECT,
                    maker=Maker(maker),
                )
            )
        return found

    def drain_events(self) -> list[NodeEvent]:
        """What has happened to nodes since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    # -- private ---------------------------------------------------------------------------------

    def _reply(
        self, status: AnnounceStatus, announce: Announce, member: Member | None
    ) -> AnnounceReply:
        """member: to whom it is said; None if it is not on the roster with this epoch."""
        period_ms = self._roster.period_ms
        if member is not None:
            period_ms = self._roster.tell_period(member)
        uses = self._uses.pop(announce.node_id, None) if member is not None else None
        return AnnounceReply(
            status=status,
            term=self._term,
            roster_version=self._roster.version,
            heartbeat_period_ms=period_ms,
            news=self._roster.news(announce.roster_version) if member is not None else None,
            read=uses.keys() if uses is not None else b"",
            spare=self._spare(member, announce.doubtful) if member is not None else b"",
            split=self._families.split,
            makers=pack_makers(self._families.makers_for(announce.node_id)),
        )

    def _note_uses(self) -> None:
        """Whoever is the home of a key that another node has asked for hears of it. Not while that
        one waits for its answer, but before a listing can become another node's.
        """
        for keys, at, listings in self._asked:
            for listing, wanted in homes(keys, at, listings):
                member = self._shown[Listing(listing)]
                self._uses.setdefault(member.node_id, Uses()).add(wanted)
        self._asked.clear()

    def _spare(self, member: Member, doubtful: bytes) -> bytes:
        """Those of its keys that have another home, which is no suspect."""
        if not doubtful:
            return b""
        own = self._mirrors[member.node_id].listing
        at, rows = self._catalogue.locate(doubtful, limit=MAX_SOURCES_PER_KEY)
        return b"".join(
            keys
            for listing, keys in homes(doubtful, at, rows["listing"])
            if listing != own and self._shown[Listing(listing)].state is NodeState.ALIVE
        )

    def _may_collect(self) -> bool:
        states = (mirror.state for mirror in self._mirrors.values())
        return sum(state is MirrorState.COLLECTING for state in states) < MAX_COLLECTING

    def _admit(self, member: Member) -> None:
        self._drop_mirror(member.node_id)
        mirror = Mirror(self._catalogue, self._mirror_counts)
        self._mirrors[member.node_id] = mirror
        self._shown[mirror.listing] = member

    def _drop_mirror(self, node_id: NodeId) -> None:
        self._note_uses()
        self._uses.pop(node_id, None)
        mirror = self._mirrors.pop(node_id, None)
        if mirror is not None:
            del self._shown[mirror.listing]
            mirror.drop()

    def _bury(self, member: Member) -> None:
        self._roster.bury(member)
        self._families.forget(member.node_id)
        self._drop_mirror(member.node_id)
        self._note(member)

    def _note(self, member: Member) -> None:
        silent_ms = self._roster.silent_ms(member)
        self._events.append(NodeEvent(member.node_id, member.epoch, member.state, silent_ms))
        del self._events[:-MAX_EVENTS]

    # -- for people and tests --------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        roster = self._roster.snapshot()
        for node_id, mirror in self._mirrors.items():
            roster["nodes"][node_id] |= {
                "entries": len(mirror),
                "unlisted": mirror.unlisted,
                "mirror": mirror.state.value,
                "sequence": mirror.sequence,
            }
        return {
            "term": self._term,
            "roster_version": roster["version"],
            "nodes": roster["nodes"],
            "entries": sum(map(len, self._mirrors.values())),
            "split_models": list(self._families.split),
            "catalogue": self._catalogue.snapshot(),
            "counts": {
                "announces": self._announce_count,
                "asked_keys": self._asked_key_count,
                "locations": self._location_count,
                **asdict(self._mirror_counts),
            },
        }

    def check(self) -> None:
        """Roster, mirrors and listings belong together, in both directions."""
        self.check_roster()
        self._catalogue.check()
        collected = [mirror.collected for mirror in self._mirrors.values()]
        hidden = {listing for listing in collected if listing is not None}
        shown = self._catalogue.listings(Standing.SHOWN, Standing.LAST)
        assert self._shown.keys() == shown, "a shown set of nobody"
        assert hidden == self._catalogue.listings(Standing.HIDDEN), "a collected set of nobody"

    def check_roster(self) -> None:
        """The part of `check` that does not go through the entries: cheap enough for each event
        of a simulated cluster.
        """
        self._roster.check()
        members = {member.node_id: member for member in self._roster.members()}
        assert members.keys() == self._mirrors.keys(), "a node without a mirror, or the reverse"
        assert self._uses.keys() <= members.keys(), "uses of nobody"
        assert len(self._asked) < MAX_ASKED
        shown = {mirror.listing for mirror in self._mirrors.values()}
        assert shown == self._shown.keys(), "a listing without a node, or the reverse"
        for node_id, mirror in self._mirrors.items():
            member = members[node_id]
            assert self._shown[mirror.listing] is member
            suspect = member.state is NodeState.SUSPECT
            expected = Standing.LAST if suspect else Standing.SHOWN
            assert self._catalogue.standing(mirror.listing) is expected
            mirror.check()
        assert len(self._events) <= MAX_EVENTS


def _numbered(listings: NDArray[np.uint16]) -> tuple[list[int], NDArray[np.uint16]]:
    """The different listings, and for each place the index into them."""
    numbers = np.bincount(listings, minlength=1).nonzero()[0]
    index_of: NDArray[np.uint16] = np.empty(numbers[-1] + 1 if len(numbers) else 0, np.uint16)
    index_of[numbers] = np.arange(len(numbers))
    return numbers.tolist(), index_of[listings]
