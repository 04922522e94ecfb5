"""What the directory is told, and what it says of others. One call at a time.

    LINKING ──the link is open──▶ GREETING ──hello accepted──▶ JOINED
      ▲ └◀──a greater epoch is wanted──┘ ▲ └─unknown, another term─┘ │
      └──────────────── buried ──────────┼───────────────────────────┘

When the directory asks for it, as it does some time after a hello, the whole set is sent in parts,
and replaces what the directory has; changes come after it. A call that is not answered in time is
made again, word for word: its number tells the directory that it is the same, and an answer to
either of the two is an answer. So nothing that has been drained from the store is lost, whatever
happens to a call.

Locates are not made here: they do not wait for one another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvray.core.codec import EntryRow, pack_entries, pack_keys, unpack_keys, unpack_makers
from kvray.core.commands import CallDirectory, Log, TakeEpoch
from kvray.core.effects import Place
from kvray.core.ids import Epoch, Maker, Namespace, NodeId, Term
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import (
    MAX_DOUBTFUL_KEYS,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    EngineUse,
    NodeHello,
    NodeHelloReply,
    NodeInfo,
    RosterNews,
)
from kvray.core.roster import QUIET_AFTER_MS
from kvray.core.slots import Block
from kvray.core.store import StoreCore

AnnouncingCommand = CallDirectory | TakeEpoch | Log


@dataclass(frozen=True, slots=True)
class AnnouncingLimits:
    """Every limit of Announcing."""

    # Entries of one announce: packing 2,048 takes about 1 ms of the thread that answers engines,
    # whose budget for a whole step is 2 ms. A resync of a million blocks is 500 calls, about 1 s.
    max_entries: int = 2_048
    # From a change to its announce: a prefill commits its blocks within a few ms, in one call then.
    debounce_ms: int = 5
    # Until the directory has said how often; and after the first use in quiet_after_ms or more:
    # by then the directory may think that nobody uses the cache, and have said a longer one.
    first_period_ms: int = 300
    quiet_after_ms: int = QUIET_AFTER_MS
    # A call is made again after so long, or after one and a half periods: the directory buries
    # after five periods of silence, at least 1,500 ms.
    call_timeout_ms: int = 400
    # After a failed call, growing to the second: a directory that Ray restarts needs 1 to 3 s.
    first_retry_ms: int = 100
    last_retry_ms: int = 1_000
    # Without an answer for so long (and for so many periods) the directory counts as silent.
    silent_ms: int = 1_500
    silent_periods: int = 5
    max_call_ids: int = 8  # of one message; answers to older ones are ignored


class AnnouncingState(Enum):
    """See the picture in the module's docstring."""

    LINKING = "linking"  # no link of this epoch: nobody could read from this node
    GREETING = "greeting"
    JOINED = "joined"


class Announcing:
    """One per NodeStore. Takes changes and entries from the store, nothing else."""

    def __init__(
        self,
        info: NodeInfo,
        store: StoreCore,
        *,
        call_ids: Iterator[int],
        wall_clock_offset_ms: int,
        now_ms: int,
        limits: AnnouncingLimits | None = None,
    ) -> None:
        """call_ids: shared with whoever else calls the directory.
        wall_clock_offset_ms: add it to now_ms and it is the time of day.
        """
        self.info = info
        self.state = AnnouncingState.LINKING
        self.term = Term(0)
        self.roster: dict[NodeId, NodeInfo] = {}  # without this node
        self.roster_changed = False  # the caller sets it back
        self._limits = limits or AnnouncingLimits()
        self._store = store
        self._call_ids = call_ids
        self._wall_clock_offset_ms = wall_clock_offset_ms
        self._born_ms = now_ms + wall_clock_offset_ms
        self._roster_version = 0
        self._period_ms = self._limits.first_period_ms
        self._sequence = 0  # of the last announce of this epoch
        self._set: list[Block] | None = None  # the whole set, while it is sent
        self._set_sent = 0
        self._part = 0
        self._said: NodeHello | Announce | None = None  # not answered yet
        self._said_ids: list[int] = []
        self._again_ms = 0  # when to say it again
        self._retry_ms = self._limits.first_retry_ms
        self._greet_after_ms = 0
        self._next_ms = now_ms  # when to say something new: the heartbeat, or what has changed
        self._in_use = False  # since the last announce
        self._used_ms = now_ms  # the directory takes our hello for a use
        self.engines: list[EngineUse] = []  # of this node; the caller sets it, and notes a change
        self.makers: list[tuple[Namespace, Maker]] = []  # of namespaces with several makers
        self.split: frozenset[str] = frozenset()  # models of which the cluster has two namespaces
        self._told_engines: list[EngineUse] | None = None  # what the directory knows of `engines`
        self._heard_ms = now_ms
        self._was_heard = False
        self.counters = dict.fromkeys(
            (
                "announces",
                "announced_adds",
                "announced_removes",
                "resyncs",
                "repeated_calls",
                "read_by_peers",
                "spared",
            ),
            0,
        )

    def is_reachable(self, now_ms: int) -> bool:
        """Whether it is worth asking the directory anything."""
        return self.state is AnnouncingState.JOINED and now_ms < self._silent_at_ms()

    def next_deadline_ms(self) -> int | None:
        """When on_tick has something to do. None while LINKING."""
        if self.state is AnnouncingState.LINKING:
            return None
        due_ms = self._again_ms if self._said is not None else self._next_ms
        return min(due_ms, self._silent_at_ms()) if self._was_heard else due_ms

    # -- events ----------------------------------------------------------------------------------

    def note_change(self, now_ms: int) -> None:
        """The store may have something to announce."""
        if self.state is AnnouncingState.JOINED:
            self._next_ms = min(self._next_ms, now_ms + self._limits.debounce_ms)

    def note_use(self, now_ms: int) -> None:
        """An engine has asked for something."""
        if self.state is AnnouncingState.JOINED:
            if now_ms - self._used_ms >= self._limits.quiet_after_ms:
                self._next_ms = min(self._next_ms, now_ms + self._limits.first_period_ms)
            self._in_use = True
            self._used_ms = now_ms

    def on_tick(self, now_ms: int) -> list[AnnouncingCommand]:
        """Say what is due."""
        commands: list[AnnouncingCommand] = []
        if self._was_heard and now_ms >= self._silent_at_ms():
            self._was_heard = False
            silent_ms = now_ms - self._heard_ms
            commands.append(Log(f"the directory has been silent for {silent_ms} ms", warning=True))
        if self.state is AnnouncingState.LINKING:
            return commands
        if self._said is not None:
            if now_ms >= self._again_ms:
                self.counters["repeated_calls"] += 1
                commands.append(self._call(now_ms))
        elif now_ms >= self._next_ms:
            self._said = self._next_message(now_ms)
            commands.append(self._call(now_ms))
        return commands

    def on_reply(
        self, call_id: int, reply: NodeHelloReply | AnnounceReply, now_ms: int
    ) -> list[AnnouncingCommand]:
        """The answer to one of our calls; of others it takes no notice."""
        said = self._said
        if call_id not in self._said_ids or said is None:
            return []
        if isinstance(said, NodeHello) != isinstance(reply, NodeHelloReply):
            return []  # not an answer: the call is made again
        self._said = None
        self._said_ids.clear()
        self._retry_ms = self._limits.first_retry_ms
        self._heard_ms = now_ms
        self._period_ms = reply.heartbeat_period_ms
        self._next_ms = min(self._next_ms, now_ms + self._period_ms)  # it may be a shorter one
        if isinstance(reply, NodeHelloReply):
            return self._welcomed(reply, now_ms)
        assert isinstance(said, Announce)
        return self._acknowledged(said, reply, now_ms)

    def on_failed(self, call_id: int, now_ms: int) -> None:
        """A call has come to nothing. It is made again after a while."""
        if self._said is not None and self._said_ids[-1:] == [call_id]:
            self._again_ms = min(self._again_ms, now_ms + self._retry_ms)
            self._retry_ms = min(2 * self._retry_ms, self._limits.last_retry_ms)

    def on_linked(self, info: NodeInfo, now_ms: int) -> None:
        """The shell has done what TakeEpoch says. info: with the epoch and the new link."""
        assert self.state is AnnouncingState.LINKING
        assert info.epoch >= self.info.epoch
        self.info = info
        self.state = AnnouncingState.GREETING
        self._sequence = 0
        self._next_ms = now_ms

    # -- what is said ----------------------------------------------------------------------------

    def _call(self, now_ms: int) -> CallDirectory:
        assert self._said is not None
        call_id = next(self._call_ids)
        self._said_ids.append(call_id)
        del self._said_ids[: -self._limits.max_call_ids]
        timeout_ms = max(self._limits.call_timeout_ms, 3 * self._period_ms // 2)
        self._again_ms = now_ms + timeout_ms
        return CallDirectory(call_id, self._said, timeout_ms)

    def _next_message(self, now_ms: int) -> NodeHello | Announce:
        self._next_ms = now_ms + self._period_ms
        if self.state is AnnouncingState.GREETING:
            # The time of day when this epoch was chosen, which is not below it: so a directory that
            # has never seen a greater one has no reason to ask for another, and another link.
            return NodeHello(self.info, self._born_ms, self._sequence)
        self._sequence += 1
        self.counters["announces"] += 1
        if self._set is not None:
            return self._next_part(self._set, now_ms)
        adds, removes = self._store.drain_changes(self._limits.max_entries)
        self.counters["announced_adds"] += len(adds)
        self.counters["announced_removes"] += len(removes)
        if len(adds) + len(removes) == self._limits.max_entries:
            self._next_ms = now_ms  # there may be more
        return self._announce(pack_entries(map(_entry, adds)), pack_keys(removes))

    def _next_part(self, blocks: list[Block], now_ms: int) -> Announce:
        """A part of the whole set: of what was there when the resync began, what still is. What has
        changed since then is told after the last part, and so counts more.
        """
        start = self._set_sent
        self._set_sent = stop = start + self._limits.max_entries
        self._part += 1
        is_last = stop >= len(blocks)
        if is_last:
            self._set = None
            self.counters["resyncs"] += 1
        self._next_ms = now_ms
        places = self._store.list_ready(blocks[start:stop])
        adds = pack_entries(map(_entry, places))
        return self._announce(adds, b"", part=self._part, is_last=is_last)

    def _announce(
        self, adds: bytes, removes: bytes, *, part: int = 0, is_last: bool = False
    ) -> Announce:
        in_use, self._in_use = self._in_use, False
        return Announce(
            self.info.node_id,
            self.info.epoch,
            self.term,
            self._sequence,
            self._roster_version,
            adds,
            removes,
            part,
            is_last,
            doubtful=b"" if part else pack_keys(self._store.take_doubtful(MAX_DOUBTFUL_KEYS)),
            in_use=in_use,
            engines=None if self.engines == self._told_engines else self.engines,
        )

    # -- what is heard ---------------------------------------------------------------------------

    def _welcomed(self, reply: NodeHelloReply, now_ms: int) -> list[AnnouncingCommand]:
        self.term = reply.term
        if reply.accepted_epoch > self.info.epoch:
            return self._rename(reply.accepted_epoch, Log("the directory wants a greater epoch"))
        if reply.accepted_epoch < self.info.epoch:
            return []  # no answer to what was said: said again with the next heartbeat
        self.state = AnnouncingState.JOINED
        self._was_heard = True
        self._take_roster(reply.roster_version, reply.roster)
        self._told_engines = None
        # Whatever is READY will be asked for.
        self._store.forget_changes()
        self._next_ms = now_ms
        text = f"joined the directory (term {self.term}) as epoch {self.info.epoch}"
        return [Log(f"{text}, {len(self.roster)} peers")]

    def _acknowledged(
        self, said: Announce, reply: AnnounceReply, now_ms: int
    ) -> list[AnnouncingCommand]:
        if reply.status is AnnounceStatus.BURIED:
            self._born_ms = now_ms + self._wall_clock_offset_ms
            return self._rename(
                Epoch(max(self.info.epoch + 1, self._born_ms)),
                Log("the directory has buried this node", warning=True),
            )
        if reply.status is AnnounceStatus.UNKNOWN or reply.term != said.term:
            self.state = AnnouncingState.GREETING
            self._set = None
            # At once; but a directory that welcomes and then does not know us is not stormed.
            self._next_ms = now_ms + self._greet_after_ms
            self._greet_after_ms = min(
                max(2 * self._greet_after_ms, self._limits.first_retry_ms),
                self._limits.last_retry_ms,
            )
            return [Log(f"the directory does not know this node; its term is {reply.term}")]
        commands: list[AnnouncingCommand] = []
        if not self._was_heard:
            self._was_heard = True
            commands.append(Log("the directory answers again"))
        self._greet_after_ms = 0
        if said.engines is not None:
            self._told_engines = said.engines
        self.split = frozenset(reply.split)
        self.makers = unpack_makers(reply.makers)
        if reply.news is not None:
            self._follow_roster(reply.news, reply.roster_version)
        if reply.status is AnnounceStatus.RESYNC:
            self._begin_resync(now_ms)
        self._take_hints(reply, now_ms)
        return commands

    def _take_hints(self, reply: AnnounceReply, now_ms: int) -> None:
        """Spares first: what peers want now is none."""
        spare, read = unpack_keys(reply.spare), unpack_keys(reply.read)
        self.counters["spared"] += len(spare)
        self.counters["read_by_peers"] += len(read)
        self._store.spare(spare)
        self._store.read(read, now_ms)

    def _begin_resync(self, now_ms: int) -> None:
        self._set = self._store.begin_listing()
        self._set_sent = self._part = 0
        self._next_ms = now_ms

    def _rename(self, epoch: Epoch, reason: Log) -> list[AnnouncingCommand]:
        self.state = AnnouncingState.LINKING
        self._set = None
        self._take_roster(0, [])
        return [reason, Log(f"epoch {self.info.epoch} becomes {epoch}"), TakeEpoch(epoch)]

    def _take_roster(self, version: int, infos: list[NodeInfo]) -> None:
        self.roster = {}
        self._change_roster(version, infos)

    def _follow_roster(self, news: RosterNews, version: int) -> None:
        if news.since not in (0, self._roster_version):
            self._roster_version = 0  # no news of what is known here: all of it next time
        elif news.since == 0:
            self._take_roster(version, news.joined)
        else:
            left = set(news.left)
            self.roster = {name: info for name, info in self.roster.items() if name not in left}
            self._change_roster(version, news.joined)

    def _change_roster(self, version: int, infos: list[NodeInfo]) -> None:
        """Nodes of another format can not be read from, and are left out."""
        self._roster_version = version
        for info in infos:
            if info.node_id == self.info.node_id:
                continue
            if info.format_version == FORMAT_VERSION:
                self.roster[info.node_id] = info
            else:
                self.roster.pop(info.node_id, None)
        self.roster_changed = True

    # -- private ---------------------------------------------------------------------------------

    def _silent_at_ms(self) -> int:
        limits = self._limits
        return self._heard_ms + max(limits.silent_ms, limits.silent_periods * self._period_ms)

    def snapshot(self) -> dict[str, Any]:
        return {
            "state": self.state.value,
            "term": self.term,
            "epoch": self.info.epoch,
            "sequence": self._sequence,
            "roster_version": self._roster_version,
            "peers": len(self.roster),
            "heartbeat_period_ms": self._period_ms,
            "heard_ms": self._heard_ms,
            "resync_left": 0 if self._set is None else max(0, len(self._set) - self._set_sent),
        } | self.counters

    def check(self) -> None:
        assert (self._said is not None) == bool(self._said_ids), "asked, but not known what"
        assert len(self._said_ids) <= self._limits.max_call_ids
        is_joined = self.state is AnnouncingState.JOINED
        assert self._set is None or is_joined, "a resync of nobody"
        assert is_joined or not isinstance(self._said, Announce)
        assert self.info.node_id not in self.roster
        if self.state is AnnouncingState.LINKING:
            assert self._said is None
            assert not self.roster


def _entry(place: Place) -> EntryRow:
    return place.key, place.slot, place.bytes, place.generation, place.origin, place.maker
