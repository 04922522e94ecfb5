"""Roster: which nodes there are, in which epoch, and when a silent one is given up.

    hello, but with too low an epoch: told a greater one
        │
        ▼             hello with it            silent          silent longer, or
    EXPECTED ─────────────────────────▶ ALIVE ────────▶ SUSPECT ──death notice, bye──▶ BURIED
        ▲                               ▲  ▲ ◀──heard──────┘                             │
        │                               │  └──────── hello with a greater epoch ─────────┤
        └───────────────────────────────┼─────── hello with too low an epoch ────────────┘
                                   (a greater epoch also replaces a lower one that is ALIVE)

On the roster are ALIVE and SUSPECT nodes. An epoch that has been given to one process is never
given to another, so what is said in the name of a lower epoch, or of a buried one, is void.

While nobody uses the cache, heartbeats are rare, and a loss costs nobody anything until it is
noticed; with the first use they are frequent again.

Time is the directory's own. A pause of the directory itself (a frozen machine, a long garbage
collection) is not the silence of its nodes, whose messages wait in its queue: so of the time
between two events at most MAX_STEP_MS counts.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvray.core.ids import Epoch, NodeId
from kvray.core.messages import (
    MAX_EPOCH,
    MAX_PERIOD_MS,
    MAX_ROSTER_NODES,
    NodeInfo,
    RosterNews,
)

# A heartbeat is a Ray call, which takes about 1 ms of CPU at each of its ends: every 300 ms it is
# 0.3 % of a core for a node, and as much for the directory, for each node. A loss is noticed in 1
# to 1.5 s.
SMALL_CLUSTER_NODES, SMALL_CLUSTER_PERIOD_MS = 10, 300
LARGE_CLUSTER_NODES, LARGE_CLUSTER_PERIOD_MS = 1_000, 2_000
# A directory of two quiet nodes may use 1.5 % of a core, Ray's own part of an idle actor included
# (test_a_quiet_cluster_costs_almost_nothing). A loss is noticed in 3 to 5 s then.
QUIET_PERIOD_MS = 1_000
QUIET_AFTER_MS = 5_000  # without any use: a pause between two requests is no end of the work
SUSPECT_PERIODS, SUSPECT_MS = 3, 1_000  # whichever is longer: two heartbeats may be lost
BURY_PERIODS, BURY_MS = 5, 1_500  # > a NodeStore's worst pause; a wrong burial costs misses
MAX_STEP_MS = 400  # <= SUSPECT_MS - 2 heartbeats of a small cluster: a pause makes no suspects
MAX_CHANGES = MAX_ROSTER_NODES  # remembered, a node's last: who has missed more hears of all nodes
MAX_GONE = 4_096  # nodes off the roster that are remembered, the oldest forgotten first


class NodeState(Enum):
    """See the picture above."""

    EXPECTED = "expected"
    ALIVE = "alive"
    SUSPECT = "suspect"
    BURIED = "buried"


@dataclass(slots=True)
class Member:
    """What the roster knows of one node. Others read it and never write to it."""

    node_id: NodeId
    state: NodeState = NodeState.EXPECTED
    info: NodeInfo | None = None  # of the last epoch that was on the roster
    granted: Epoch | None = None  # the last epoch that this node was told to take
    heard_ms: int = 0
    told_ms: int = 0  # the heartbeat period in the last two replies, of which one may be lost
    told_before_ms: int = 0

    @property
    def epoch(self) -> Epoch:
        return self.info.epoch if self.info else Epoch(0)

    @property
    def is_listed(self) -> bool:
        return self.state in (NodeState.ALIVE, NodeState.SUSPECT)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to a hello. admitted: on the roster with `epoch`. fresh: was not before."""

    epoch: Epoch
    admitted: bool
    fresh: bool = False


def heartbeat_period_ms(node_count: int, *, is_quiet: bool = False) -> int:
    """How often each of so many nodes announces: constant, then linear, then constant."""
    large = LARGE_CLUSTER_NODES - SMALL_CLUSTER_NODES
    above = min(max(node_count - SMALL_CLUSTER_NODES, 0), large)
    rise_ms = LARGE_CLUSTER_PERIOD_MS - SMALL_CLUSTER_PERIOD_MS
    period_ms = SMALL_CLUSTER_PERIOD_MS + above * rise_ms // large
    return max(period_ms, QUIET_PERIOD_MS) if is_quiet else period_ms


class Roster:
    """Membership, without what the members have. `version` grows with every change of `infos`.

    While a thousand nodes join, each of them hears of each other one once: the changes since a
    version are told, not the whole roster with each heartbeat.
    """

    def __init__(self, *, max_nodes: int, quiet_after_ms: int = QUIET_AFTER_MS) -> None:
        self.version = 1
        self._max_nodes = max_nodes
        self._quiet_after_ms = quiet_after_ms
        self._listed: dict[NodeId, Member] = {}
        self._gone: dict[NodeId, Member] = {}  # EXPECTED and BURIED, the latest last
        self._changes: dict[NodeId, int] = {}  # the version of a node's last, the latest last
        self._forgotten = 0  # changes up to this version are not all in there
        self._now_ms: int | None = None  # of the last event, by the caller's clock
        self._clock_ms = 0  # the directory's own time
        self._used_ms = 0

    def __len__(self) -> int:
        return len(self._listed)

    def advance(self, now_ms: int) -> None:
        """Before any other verb of an event."""
        if self._now_ms is not None:
            self._clock_ms += min(max(now_ms - self._now_ms, 0), MAX_STEP_MS)
        self._now_ms = now_ms

    @property
    def period_ms(self) -> int:
        """The heartbeat period of now."""
        is_quiet = self._clock_ms - self._used_ms >= self._quiet_after_ms
        return heartbeat_period_ms(len(self._listed), is_quiet=is_quiet)

    def note_use(self) -> None:
        """Somebody needs what the nodes have."""
        self._used_ms = self._clock_ms

    def find(self, node_id: NodeId) -> Member | None:
        """On the roster, or remembered."""
        return self._listed.get(node_id) or self._gone.get(node_id)

    def infos(self) -> list[NodeInfo]:
        return [member.info for member in self._listed.values() if member.info]

    def news(self, since: int) -> RosterNews | None:
        """For who knows version `since` of this very roster; 0: for who knows none."""
        if since == self.version:
            return None
        if not max(self._forgotten, 1) <= since < self.version:
            return RosterNews(0, self.infos())
        joined, left = [], []
        for node_id, version in reversed(self._changes.items()):
            if version <= since:
                break
            member = self._listed.get(node_id)
            if member is None:
                left.append(node_id)
            elif member.info is not None:
                joined.append(member.info)
        return RosterNews(since, joined, left)

    def members(self) -> list[Member]:
        """Those on the roster."""
        return list(self._listed.values())

    def hello(self, info: NodeInfo, wall_clock_ms: int) -> Welcome:
        """Admit a node whose epoch is the greatest ever; tell others which one to take.

        A node that repeats a hello word for word (its answer was lost, or the directory had lost
        count) is admitted again with the same epoch.
        """
        member = self.find(info.node_id) or Member(info.node_id)
        if member.is_listed and info == member.info:
            self._hear(member)
            return Welcome(info.epoch, admitted=True)
        asked, highest = info.epoch, max(member.epoch, member.granted or 0)
        # Told before, it is admitted whatever the wall clock says by now.
        if asked != member.granted or asked <= member.epoch:
            wanted = max(asked, wall_clock_ms, highest + 1 if asked <= highest else 0)
            granted = Epoch(min(wanted, MAX_EPOCH))
            if granted != asked or asked <= highest:
                member.granted = granted
                self._expect(member)
                return Welcome(granted, admitted=False)
        if not member.is_listed and len(self._listed) >= self._max_nodes:
            return Welcome(asked, admitted=False)
        self._gone.pop(info.node_id, None)
        self._listed[info.node_id] = member
        member.info = info
        self._hear(member)
        self._note_change(member)
        return Welcome(asked, admitted=True, fresh=True)

    def hear(self, member: Member) -> bool:
        """A sign of life. True if the node was a suspect."""
        was_suspect = member.state is NodeState.SUSPECT
        self._hear(member)
        return was_suspect

    def tell_period(self, member: Member) -> int:
        """The heartbeat period for a reply to this member."""
        member.told_before_ms = member.told_ms
        member.told_ms = self.period_ms
        return member.told_ms

    def find_silent(self) -> tuple[list[Member], list[Member]]:
        """Members that have become suspects, and those to be buried (the caller does it)."""
        suspects, dead = [], []
        for member in self._listed.values():
            silent_ms = self.silent_ms(member)
            period_ms = max(member.told_ms, member.told_before_ms)
            if silent_ms >= max(BURY_MS, BURY_PERIODS * period_ms):
                dead.append(member)
            elif (
                silent_ms >= max(SUSPECT_MS, SUSPECT_PERIODS * period_ms)
                and member.state is NodeState.ALIVE
            ):
                member.state = NodeState.SUSPECT
                suspects.append(member)
        return suspects, dead

    def silent_ms(self, member: Member) -> int:
        """For how long, in the directory's own time."""
        return self._clock_ms - member.heard_ms

    def bury(self, member: Member) -> None:
        assert member.is_listed
        del self._listed[member.node_id]
        member.state = NodeState.BURIED
        self._remember(member)
        self._note_change(member)

    def _note_change(self, member: Member) -> None:
        self.version += 1
        self._changes.pop(member.node_id, None)
        self._changes[member.node_id] = self.version
        if len(self._changes) > MAX_CHANGES:
            self._forgotten = self._changes.pop(next(iter(self._changes)))

    def _hear(self, member: Member) -> None:
        member.heard_ms = self._clock_ms
        member.state = NodeState.ALIVE

    def _expect(self, member: Member) -> None:
        """It will say hello again. A lower epoch that is on the roster stays there until then."""
        if not member.is_listed:
            member.state = NodeState.EXPECTED
            self._remember(member)

    def _remember(self, member: Member) -> None:
        self._gone.pop(member.node_id, None)
        self._gone[member.node_id] = member
        if len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]

    def snapshot(self) -> dict[str, Any]:
        members = [*self._listed.values(), *self._gone.values()]
        return {
            "version": self.version,
            "nodes": {
                member.node_id: {
                    "state": member.state.value,
                    "epoch": member.epoch,
                    "host": member.info.host if member.info else "",
                    "silent_ms": self.silent_ms(member),
                    "heartbeat_period_ms": member.told_ms,
                }
                for member in members
            },
        }

    def check(self) -> None:
        assert len(self._listed) <= self._max_nodes
        assert len(self._gone) <= MAX_GONE
        assert not self._listed.keys() & self._gone.keys(), "on the roster and off it"
        assert len(self._changes) <= MAX_CHANGES
        versions = list(self._changes.values())
        assert versions == sorted(set(versions)), "changes out of order"
        assert all(self._forgotten < version <= self.version for version in versions)
        for node_id, member in self._listed.items():
            assert member.is_listed, "a buried node is on the roster"
            assert member.info is not None
            assert member.info.node_id == node_id == member.node_id
            assert member.heard_ms <= self._clock_ms
            assert max(member.told_ms, member.told_before_ms) <= MAX_PERIOD_MS
        for node_id, member in self._gone.items():
            assert not member.is_listed, "a living node is off the roster"
            assert member.node_id == node_id
