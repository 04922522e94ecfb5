"""Goal: the directory never names a place of an epoch that is over, forgets nothing that a node has
announced, and says so when it has lost count.

Method: stories of two or three nodes. `Node` says what a NodeStore would say, word by word, so that
a story can leave messages out, repeat them or send them late. The core is checked after each.
"""

import json
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from kvray.core.codec import decode, encode, pack_entries, pack_keys, unpack_keys, unpack_locations
from kvray.core.directory import (
    MAX_COLLECTING,
    MAX_EVENTS,
    TICK_MS,
    DirectoryCore,
    DirectoryLimits,
    NodeState,
)
from kvray.core.ids import (
    KEY_BYTES,
    BlockKey,
    Epoch,
    Generation,
    Maker,
    NodeId,
    Origin,
    SlabId,
    SlotIndex,
    Term,
)
from kvray.core.messages import (
    MAX_CALL_BYTES,
    MAX_EPOCH,
    MAX_READ_KEYS,
    MAX_SOURCES_PER_KEY,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    ControlMessage,
    Locate,
    LocateReply,
    NodeHello,
    NodeHelloReply,
    NodeInfo,
    RosterNews,
)
from kvray.core.roster import (
    MAX_CHANGES,
    MAX_GONE,
    QUIET_AFTER_MS,
    QUIET_PERIOD_MS,
    Roster,
    heartbeat_period_ms,
)

OK, RESYNC = AnnounceStatus.OK, AnnounceStatus.RESYNC
BURIED, UNKNOWN = AnnounceStatus.BURIED, AnnounceStatus.UNKNOWN
A, B, C, D = (BlockKey(bytes([i]) * 16) for i in range(1, 5))
BLOCK_BYTES = 40_000
MAKER = Maker(2**64 - 2)
M = TypeVar("M", bound=ControlMessage)


class Cluster:
    """One directory and its clock."""

    def __init__(self, *, term: int = 1, limits: DirectoryLimits | None = None) -> None:
        self.term = Term(term)
        self.now_ms = 1_000_000
        self.core = DirectoryCore(self.term, limits)

    def wait(self, duration_ms: int, *beating: "Node") -> None:
        """Time passes in ticks; the nodes named announce in each of them."""
        for _ in range(duration_ms // TICK_MS):
            self.now_ms += TICK_MS
            for node in beating:
                node.announce()
            self.core.on_tick(self.now_ms)
        self.core.check()

    def where(self, key: BlockKey) -> list[tuple[str, int, int]]:
        """(node, epoch, generation) of each place, the best first."""
        return [(x.node_id, x.epoch, x.generation) for x in self.core.where([key])[0]]

    def states(self) -> list[tuple[str, NodeState]]:
        return [(event.node_id, event.state) for event in self.core.drain_events()]


class Node:
    """What one NodeStore says. It keeps to the protocol only as far as the story does."""

    def __init__(self, cluster: Cluster, name: str, *, epoch: int = 10) -> None:
        self.cluster = cluster
        self.info = NodeInfo(
            node_id=NodeId(name),
            epoch=Epoch(epoch),
            link_name=f"{name}/{epoch}",
            link_metadata=b"agent",
            slab_id=SlabId(bytes(16)),
            slab_address=4_096,
            slab_bytes=2**26,
            extent_bytes=2**20,
            host="localhost",
            kvray_version="0.1.0",
            format_version=1,
        )
        self.sequence = 0
        self.roster_version = 0

    def hello(
        self, *, epoch: int | None = None, wall_clock_ms: int = 0, sequence: int = 0
    ) -> NodeHelloReply:
        if epoch is not None:
            self.info = msgspec.structs.replace(self.info, epoch=Epoch(epoch))
        hello = NodeHello(self.info, wall_clock_ms, sequence)
        reply = self.cluster.core.on_hello(sent(hello), self.cluster.now_ms)
        self.cluster.core.check()
        return sent(reply)

    def join(self, *keys: BlockKey) -> "Node":
        """Hello, and the whole set in one part."""
        assert self.hello().accepted_epoch == self.info.epoch
        self.part(1, *keys, last=True)
        return self

    def say(
        self, adds: Iterable[BlockKey] = (), removes: Iterable[BlockKey] = (), generation: int = 1
    ) -> Announce:
        """The next announce, not sent yet."""
        self.sequence += 1
        rows = [
            (key, SlotIndex(key[0]), BLOCK_BYTES, Generation(generation), Origin.ORIGINAL, MAKER)
            for key in adds
        ]
        return Announce(
            node_id=self.info.node_id,
            epoch=self.info.epoch,
            term=self.cluster.term,
            sequence=self.sequence,
            roster_version=self.roster_version,
            adds=pack_entries(rows),
            removes=pack_keys(list(removes)),
        )

    def send(self, announce: Announce) -> AnnounceReply:
        reply = self.cluster.core.on_announce(sent(announce), self.cluster.now_ms)
        self.cluster.core.check()
        return sent(reply)

    def announce(self, *adds: BlockKey, generation: int = 1) -> AnnounceStatus:
        return self.send(self.say(adds, generation=generation)).status

    def remove(self, *keys: BlockKey) -> AnnounceStatus:
        return self.send(self.say(removes=keys)).status

    def part(
        self, part: int, *keys: BlockKey, last: bool = False, generation: int = 1
    ) -> AnnounceStatus:
        announce = self.say(keys, generation=generation)
        return self.send(
            msgspec.structs.replace(announce, resync_part=part, resync_last=last)
        ).status

    def lose(self, *adds: BlockKey) -> Announce:
        """An announce that does not arrive (now)."""
        return self.say(adds)

    def locate(self, *keys: BlockKey) -> list[tuple[int, str, int]]:
        """(index of the key, node, generation)."""
        locate = Locate(self.info.node_id, self.info.epoch, pack_keys(keys))
        reply: LocateReply = sent(self.cluster.core.on_locate(sent(locate), self.cluster.now_ms))
        rows = unpack_locations(reply.locations)
        assert all(row[2:4] == (keys[row[0]][0], BLOCK_BYTES) for row in rows)
        assert all(row[5] == MAKER for row in rows)
        return [(row[0], reply.nodes[row[1]], row[4]) for row in rows]


def sent(message: M) -> M:
    """As it comes out at the other side."""
    return decode(encode(message), max_bytes=MAX_CALL_BYTES, expect=type(message))


def test_a_block_is_found_by_others_from_its_announce_to_its_removal() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(), Node(cluster, "b").join()
    assert reader.locate(A, B, C) == []
    node.announce(A, C, generation=7)
    assert reader.locate(A, B, C) == [(0, "a", 7), (2, "a", 7)]
    node.remove(A)
    assert reader.locate(A, B, C) == [(2, "a", 7)]


def test_a_node_is_never_told_to_fetch_from_itself() -> None:
    cluster = Cluster()
    node, other = Node(cluster, "a").join(A), Node(cluster, "b").join(A, B)
    assert node.locate(A, B) == [(0, "b", 1), (1, "b", 1)]
    assert other.locate(A, B) == [(0, "a", 1)]


def test_a_block_stored_again_is_found_at_its_new_place_only() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A, B), Node(cluster, "b").join()
    node.announce(A, generation=8)
    node.send(node.say([B], removes=[B], generation=9))
    assert reader.locate(A, B) == [(0, "a", 8), (1, "a", 9)]


def test_a_key_named_twice_in_one_message_counts_once_and_the_last_time() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(), Node(cluster, "b").join()
    first, second = node.say([A, B], generation=3), node.say([A], generation=4)
    node.sequence = first.sequence
    node.send(msgspec.structs.replace(first, adds=first.adds + second.adds))
    assert reader.locate(A, B) == [(0, "a", 4), (1, "a", 3)]
    node.remove(A, A, B, C)
    assert reader.locate(A, B) == []
    assert reader.locate(A, A) == []


# -- epochs ------------------------------------------------------------------------------------


def test_a_first_epoch_is_at_least_the_wall_clock_and_holds_when_it_is_asked_for_again() -> None:
    cluster = Cluster()
    node = Node(cluster, "a")
    assert node.hello(epoch=3, wall_clock_ms=5_000).accepted_epoch == 5_000
    assert cluster.core.roster() == []
    assert node.announce() is UNKNOWN
    assert node.hello(epoch=5_000, wall_clock_ms=5_001).accepted_epoch == 5_000
    assert cluster.core.roster() == [node.info]


def test_a_restart_ends_the_old_epoch_and_all_that_it_has_said() -> None:
    cluster = Cluster()
    old, reader = Node(cluster, "a").join(A, B), Node(cluster, "b").join()
    new = Node(cluster, "a", epoch=11)
    new.hello()
    assert reader.locate(A, B) == []
    assert old.announce(C) is BURIED
    assert old.part(1, A, B, last=True) is BURIED
    new.part(1, B, last=True, generation=20)
    assert cluster.where(B) == [("a", 11, 20)]
    assert reader.locate(A, B, C) == [(1, "a", 20)]


def test_a_second_process_never_gets_an_epoch_that_another_one_was_given() -> None:
    cluster = Cluster()
    first, second = Node(cluster, "a").join(A), Node(cluster, "a")
    second.info = msgspec.structs.replace(second.info, slab_address=8_192)
    assert second.hello().accepted_epoch == 11
    assert cluster.core.roster() == [first.info], "the first one lives until the second is there"
    third = Node(cluster, "a")
    third.info = msgspec.structs.replace(third.info, slab_address=12_288)
    assert third.hello().accepted_epoch == 12
    assert third.hello(epoch=12).accepted_epoch == 12
    assert second.hello(epoch=11).accepted_epoch == 13
    assert cluster.core.roster() == [third.info]


def test_a_hello_whose_answer_was_lost_is_answered_again_and_costs_a_resync() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A), Node(cluster, "b").join()
    assert node.hello().accepted_epoch == node.info.epoch
    assert reader.locate(A) == [(0, "a", 1)], "what was known stays to be found"
    assert node.announce() is RESYNC
    assert node.part(1, B, last=True) is OK
    assert reader.locate(A, B) == [(1, "a", 1)]


def test_after_a_repeated_hello_a_node_may_count_from_one_again() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A), Node(cluster, "b").join()
    node.announce(B)
    node.hello()
    node.sequence = 0
    assert node.announce(C) is RESYNC, "nobody knows what was lost"
    assert reader.locate(A, B, C) == [(0, "a", 1), (1, "a", 1), (2, "a", 1)]
    assert node.part(1, C, last=True) is OK
    assert reader.locate(A, B, C) == [(2, "a", 1)]


def test_a_part_that_comes_after_the_next_hello_is_void() -> None:
    """Found by the property test: it was collected, and no other part ever followed it."""
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A), Node(cluster, "b").join()
    late = msgspec.structs.replace(node.lose(A), resync_part=1)
    node.hello(sequence=node.sequence)
    node.send(late)
    assert node.announce(B) is RESYNC, "the set is wanted since the hello"
    assert node.part(1, A, B, last=True) is OK
    assert reader.locate(A, B) == [(0, "a", 1), (1, "a", 1)]


def test_a_new_directory_learns_all_and_the_nodes_keep_their_epochs() -> None:
    cluster = Cluster()
    node = Node(cluster, "a", epoch=5_000).join(A)
    node.cluster = cluster = Cluster(term=2)
    assert node.announce() is UNKNOWN
    assert node.hello(wall_clock_ms=4_990).accepted_epoch == 5_000
    assert node.announce(B) is RESYNC
    assert node.part(1, A, B, last=True) is OK
    assert cluster.where(A) == cluster.where(B) == [("a", 5_000, 1)]


def test_what_was_said_to_the_directory_before_is_void() -> None:
    cluster = Cluster()
    node = Node(cluster, "a")
    late = node.say([A])
    node.cluster = cluster = Cluster(term=2)
    node.hello()
    assert node.send(late).status is UNKNOWN
    assert cluster.where(A) == []


def test_the_last_number_of_an_epoch_is_an_end_and_no_crash() -> None:
    cluster = Cluster()
    node, other = Node(cluster, "a", epoch=MAX_EPOCH), Node(cluster, "a", epoch=MAX_EPOCH)
    node.join(A)
    other.info = msgspec.structs.replace(other.info, slab_address=8_192)
    for _ in range(3):
        assert other.hello().accepted_epoch == MAX_EPOCH
    assert cluster.core.roster() == [node.info]


# -- silence -----------------------------------------------------------------------------------


def test_a_silent_node_is_a_suspect_then_buried_and_its_blocks_are_last_then_gone() -> None:
    cluster = Cluster()
    other = Node(cluster, "b").join(A)
    silent, reader = Node(cluster, "a").join(A), Node(cluster, "c").join()
    assert reader.locate(A) == [(0, "a", 1), (0, "b", 1)], "the youngest first"
    cluster.wait(1_500, other, reader)
    assert cluster.core.state_of(silent.info.node_id) is NodeState.SUSPECT
    assert reader.locate(A) == [(0, "b", 1), (0, "a", 1)]
    cluster.wait(1_000, other, reader)
    assert cluster.core.state_of(silent.info.node_id) is NodeState.BURIED
    assert reader.locate(A) == [(0, "b", 1)]
    assert [info.node_id for info in cluster.core.roster()] == ["b", "c"]
    assert cluster.states()[-2:] == [("a", NodeState.SUSPECT), ("a", NodeState.BURIED)]


def test_a_suspect_that_speaks_is_as_good_as_any() -> None:
    cluster = Cluster()
    other, reader = Node(cluster, "b").join(A), Node(cluster, "c").join()
    node = Node(cluster, "a").join(A)
    cluster.wait(1_500, other, reader)
    assert node.announce() is OK
    assert reader.locate(A) == [(0, "a", 1), (0, "b", 1)]
    assert cluster.states()[-2:] == [("a", NodeState.SUSPECT), ("a", NodeState.ALIVE)]


def test_a_frozen_node_that_speaks_after_its_burial_needs_a_new_epoch() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A), Node(cluster, "c").join()
    cluster.wait(2_500, reader)
    assert node.announce(B) is BURIED
    assert node.hello().accepted_epoch == 11, "the old epoch does not come back"
    assert node.announce() is BURIED
    assert reader.locate(A, B) == []
    assert node.hello(epoch=11).accepted_epoch == 11
    node.sequence = 0
    assert node.part(1, A, last=True) is OK
    assert cluster.where(A) == [("a", 11, 1)]


def test_a_pause_of_the_directory_is_not_the_silence_of_its_nodes() -> None:
    cluster = Cluster()
    node = Node(cluster, "a").join(A)
    cluster.now_ms += 60_000
    cluster.core.on_tick(cluster.now_ms)
    assert cluster.core.state_of(node.info.node_id) is NodeState.ALIVE
    cluster.now_ms -= 5_000
    cluster.core.on_tick(cluster.now_ms)
    cluster.wait(1_000)
    assert cluster.core.state_of(node.info.node_id) is NodeState.SUSPECT, "a clock that goes back"


def test_an_old_message_is_no_sign_of_life() -> None:
    cluster = Cluster()
    node = Node(cluster, "a").join()
    announce = node.say([A])
    node.send(announce)
    for _ in range(6):
        cluster.wait(250)
        node.send(announce)
    assert cluster.core.state_of(node.info.node_id) is NodeState.SUSPECT


def test_heartbeats_are_rarer_in_a_large_cluster() -> None:
    periods = [heartbeat_period_ms(count) for count in range(2_000)]
    assert periods[1] == periods[10] == 300
    assert periods[505] == 1_150
    assert periods[1_000] == periods[1_999] == 2_000
    assert periods == sorted(periods)


def test_heartbeats_are_rare_while_nobody_uses_the_cache_and_frequent_with_the_first_use() -> None:
    cluster = Cluster()
    node, other = Node(cluster, "a").join(A), Node(cluster, "b").join()

    def period_ms() -> int:
        return node.send(node.say()).heartbeat_period_ms

    def pass_quietly(duration_ms: int) -> None:
        for _ in range(duration_ms // TICK_MS):
            cluster.now_ms += TICK_MS
            node.announce()
            other.announce()

    assert period_ms() == 300
    pass_quietly(QUIET_AFTER_MS)
    assert period_ms() == QUIET_PERIOD_MS
    # It has the time it was told: five periods of a second.
    cluster.wait(4_800, other)
    assert cluster.core.state_of(node.info.node_id) is NodeState.SUSPECT
    cluster.wait(400, other)
    assert cluster.core.state_of(node.info.node_id) is NodeState.BURIED
    assert node.hello(epoch=11).heartbeat_period_ms == 300, "a node that comes is a use"
    node.part(1, A, last=True)

    uses: list[Callable[[], object]] = [
        lambda: other.locate(A),
        lambda: other.announce(B),
        lambda: other.remove(B),
        lambda: other.send(msgspec.structs.replace(other.say(), in_use=True)),
    ]
    for use in uses:
        pass_quietly(QUIET_AFTER_MS)
        assert period_ms() == QUIET_PERIOD_MS
        use()
        assert period_ms() == 300


def test_a_node_of_a_large_cluster_has_the_time_it_was_told() -> None:
    cluster = Cluster()
    nodes = [Node(cluster, f"n{i}") for i in range(310)]
    for node in nodes:
        cluster.core.on_hello(NodeHello(info=node.info, wall_clock_ms=0), cluster.now_ms)
    assert nodes[0].hello().heartbeat_period_ms == 815
    # All others leave, so that heartbeats must be more frequent again; this node is told so, but
    # the answer may have been lost.
    for node in nodes[1:]:
        cluster.core.on_bye(node.info.node_id, node.info.epoch)
    assert nodes[0].send(nodes[0].say()).heartbeat_period_ms == 300
    states: list[NodeState | None] = []
    for duration_ms in (2_400, 200, 1_400, 200):  # 3 * 815 is in the second, 5 * 815 in the last
        cluster.wait(duration_ms)
        states.append(cluster.core.state_of(nodes[0].info.node_id))
    assert states == [NodeState.ALIVE, NodeState.SUSPECT, NodeState.SUSPECT, NodeState.BURIED]


def test_a_death_notice_or_a_bye_buries_that_epoch_and_no_later_one() -> None:
    cluster = Cluster()
    node = Node(cluster, "a", epoch=12).join(A)
    cluster.core.on_node_dead(node.info.node_id, Epoch(11))
    cluster.core.on_bye(NodeId("never heard of"), Epoch(11))
    assert cluster.where(A) == [("a", 12, 1)]
    cluster.core.on_bye(node.info.node_id, Epoch(12))
    cluster.core.on_node_dead(node.info.node_id, Epoch(12))
    cluster.core.check()
    assert cluster.where(A) == []
    assert node.announce() is BURIED
    assert cluster.states() == [("a", NodeState.ALIVE), ("a", NodeState.BURIED)]


# -- gaps and resync ---------------------------------------------------------------------------


def test_a_gap_is_noticed_and_the_whole_set_replaces_what_was_known() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A, B), Node(cluster, "b").join()
    node.sequence += 1  # lost: B has been removed and C stored
    assert node.announce(D) is RESYNC
    assert node.announce() is RESYNC, "until it comes"
    assert reader.locate(A, B, C, D) == [(0, "a", 1), (1, "a", 1), (3, "a", 1)]
    assert node.part(1, A) is OK
    assert node.part(2, C) is OK
    assert reader.locate(A, B, C, D) == [(0, "a", 1), (1, "a", 1), (3, "a", 1)], "not in halves"
    assert node.part(3, D, last=True) is OK
    assert reader.locate(A, B, C, D) == [(0, "a", 1), (2, "a", 1), (3, "a", 1)]
    assert node.announce() is OK


def test_sets_are_asked_for_a_few_at_a_time_and_changes_are_heard_meanwhile() -> None:
    cluster = Cluster()
    nodes = [Node(cluster, f"n{i}") for i in range(MAX_COLLECTING + 2)]
    for node in nodes:
        node.hello()
    *first, next_, last = nodes
    assert {node.part(1, A) for node in first} == {OK}
    assert [next_.announce(), last.announce(B)] == [OK, OK], "not yet"
    assert first[0].locate(B) == [(0, last.info.node_id, 1)]
    first[0].part(2, B, last=True)
    assert next_.announce() is RESYNC
    next_.part(1, C)
    assert last.announce() is OK
    cluster.core.on_bye(first[1].info.node_id, first[1].info.epoch)
    assert last.announce() is RESYNC, "a node that is gone gives its turn back"


def test_changes_during_a_resync_are_seen_at_once_and_outlive_it() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A, B), Node(cluster, "b").join()
    node.part(1, A)
    node.announce(C, generation=5)
    node.remove(A)
    assert reader.locate(A, B, C) == [(1, "a", 1), (2, "a", 5)]
    node.part(2, B, last=True)
    assert reader.locate(A, B, C) == [(1, "a", 1), (2, "a", 5)]


def test_a_part_made_from_an_older_copy_of_the_set_does_not_undo_changes() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A, B, C), Node(cluster, "b").join()
    node.part(1)  # the copy is taken here: A, B, C
    node.remove(A, B)
    node.announce(B, generation=6)
    node.announce(C, generation=7)
    assert node.part(2, A, B, C, last=True) is OK
    assert reader.locate(A, B, C) == [(1, "a", 6), (2, "a", 7)]
    cluster.wait(TICK_MS, node, reader)
    assert cluster.core.snapshot()["catalogue"]["rows"] == 2, "what was removed is forgotten"
    assert node.announce(A, generation=8) is OK
    assert reader.locate(A) == [(0, "a", 8)]
    cluster.wait(250, node, reader)
    assert cluster.core.snapshot()["catalogue"]["rows"] == 3


def test_a_key_that_is_removed_during_a_resync_and_again_after_it_is_gone() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A, B), Node(cluster, "b").join()
    node.part(1)
    node.remove(A)
    assert node.part(2, A, B, last=True) is OK
    assert node.remove(A) is OK
    assert reader.locate(A, B) == [(1, "a", 1)]
    assert cluster.core.snapshot()["catalogue"]["unswept_listings"] == 1, (
        "the set that was replaced"
    )
    cluster.wait(TICK_MS, node, reader)
    assert cluster.core.snapshot()["catalogue"]["rows"] == 1


def test_a_lost_announce_during_a_resync_begins_it_anew() -> None:
    cluster = Cluster()
    node, reader = Node(cluster, "a").join(A), Node(cluster, "b").join()
    node.part(1, A)
    node.sequence += 1  # lost: A has been removed
    assert node.part(2, B, last=True) is RESYNC
    assert reader.locate(A, B) == [(0, "a", 1)]
    assert node.part(1, B, last=True) is OK
    assert reader.locate(A, B) == [(1, "a", 1)]


def test_parts_in_a_wrong_order_are_no_set() -> None:
    cluster = Cluster()
    node = Node(cluster, "a").join(A)
    assert node.part(2, B, last=True) is RESYNC
    node.part(1, B)
    assert node.part(3, C, last=True) is RESYNC
    assert cluster.where(A) == [("a", 10, 1)]
    node.part(1, B)
    assert node.part(1, C, last=True) is OK, "a second first part begins anew"
    assert cluster.where(A) == cluster.where(B) == []
    assert cluster.where(C) == [("a", 10, 1)]


def test_announces_that_overtake_each_other_cost_a_resync_and_no_truth() -> None:
    cluster = Cluster()
    node = Node(cluster, "a").join()
    early = node.say([A])
    late = node.say(removes=[A])
    assert node.send(late).status is RESYNC
    assert node.send(early).status is RESYNC
    assert cluster.where(A) == [], "the older of the two is void"
    assert node.part(1, last=True) is OK


def test_a_node_that_is_gone_takes_its_half_collected_set_along() -> None:
    cluster = Cluster()
    node = Node(cluster, "a").join(A)
    node.part(1, A, B, C)
    cluster.core.on_bye(node.info.node_id, node.info.epoch)
    cluster.core.check()
    cluster.wait(TICK_MS)
    assert cluster.core.snapshot()["catalogue"]["rows"] == 0


# -- roster and limits -------------------------------------------------------------------------


def test_the_roster_is_sent_to_those_who_do_not_have_it() -> None:
    cluster = Cluster()
    node = Node(cluster, "a").join()
    first = node.send(node.say())
    node.roster_version = first.roster_version
    assert first.news == RosterNews(0, [node.info]), "who knows nothing hears all"
    assert node.send(node.say()).news is None
    other = Node(cluster, "b").join()
    second = node.send(node.say())
    assert second.news == RosterNews(first.roster_version, [other.info])
    node.roster_version = second.roster_version
    third = Node(cluster, "c").join()
    cluster.core.on_bye(other.info.node_id, other.info.epoch)
    news = node.send(node.say()).news
    assert news == RosterNews(second.roster_version, [third.info], [other.info.node_id])


def test_who_has_missed_too_much_hears_the_whole_roster() -> None:
    """Goal: what is remembered of changes is bounded, and whoever needs more hears all."""
    cluster, roster = Cluster(), Roster(max_nodes=10)
    roster.advance(0)
    stays = Node(cluster, "stays").info
    roster.hello(stays, 0)
    known = roster.version
    names = [f"n{number}" for number in range(MAX_CHANGES - 1)]
    for name in names:
        roster.hello(Node(cluster, name).info, 0)
        member = roster.find(NodeId(name))
        assert member is not None
        roster.bury(member)
    assert roster.news(known) == RosterNews(known, [], [NodeId(name) for name in reversed(names)])
    later = [Node(cluster, name).info for name in ("later", "last")]
    for info in later:
        roster.hello(info, 0)
    assert roster.news(known) == RosterNews(0, [stays, *later])
    assert roster.news(roster.version - 1) == RosterNews(roster.version - 1, [later[-1]])
    roster.check()


def test_a_full_roster_admits_nobody_but_those_on_it() -> None:
    cluster = Cluster(limits=DirectoryLimits(max_nodes=1))
    node, other = Node(cluster, "a").join(A), Node(cluster, "b")
    other.hello()
    assert other.announce(B) is UNKNOWN
    assert cluster.where(B) == []
    again = Node(cluster, "a", epoch=11).join(B)
    assert cluster.core.roster() == [again.info]
    cluster.core.on_bye(node.info.node_id, again.info.epoch)
    assert other.hello().roster == [other.info]


def test_nodes_that_are_gone_are_remembered_but_not_for_ever() -> None:
    cluster = Cluster()
    for i in range(MAX_GONE + 10):
        node = Node(cluster, f"n{i}")
        cluster.core.on_hello(NodeHello(info=node.info, wall_clock_ms=0), cluster.now_ms)
        cluster.core.on_bye(node.info.node_id, node.info.epoch)
    cluster.core.check()
    assert cluster.core.state_of(NodeId("n9")) is None
    assert cluster.core.state_of(NodeId("n10")) is NodeState.BURIED
    assert len(cluster.core.snapshot()["nodes"]) == MAX_GONE
    assert len(cluster.core.drain_events()) == MAX_EVENTS
    assert cluster.core.drain_events() == []


def test_what_does_not_fit_is_not_listed_and_is_asked_for_when_there_is_room() -> None:
    cluster = Cluster(limits=DirectoryLimits(max_entries=4))
    first, second = Node(cluster, "a").join(A, B, C), Node(cluster, "b").join(A, B)
    assert [len(cluster.where(key)) for key in (A, B, C)] == [2, 1, 1]
    assert cluster.core.snapshot()["nodes"]["b"]["unlisted"] == 1
    assert second.announce() is OK, "as long as there is no room there is nothing to be done"
    first.remove(A, B, C)
    assert second.announce() is RESYNC
    assert second.part(1, A, B, last=True) is OK
    assert [cluster.where(key) for key in (A, B)] == [[("b", 10, 1)]] * 2
    assert cluster.core.snapshot()["nodes"]["b"]["unlisted"] == 0


def test_a_removal_that_can_not_be_remembered_begins_the_resync_anew() -> None:
    cluster = Cluster(limits=DirectoryLimits(max_entries=2))
    node = Node(cluster, "a").join(A)
    node.part(1, B)  # now the catalogue is full
    assert node.remove(C) is RESYNC
    assert cluster.where(A) == [("a", 10, 1)]


def test_of_a_block_that_everybody_has_the_youngest_few_are_named() -> None:
    cluster = Cluster()
    nodes = [Node(cluster, f"n{i}").join(A, B) for i in range(MAX_SOURCES_PER_KEY + 4)]
    nodes[1].remove(B)
    located = nodes[-1].locate(A, B, C)
    youngest = [f"n{i}" for i in reversed(range(len(nodes) - 1))][:MAX_SOURCES_PER_KEY]
    assert [node for index, node, _ in located if index == 0] == youngest
    assert [node for index, node, _ in located if index == 1] == youngest
    assert len(cluster.where(B)) == len(nodes) - 1


def test_the_snapshot_is_plain_data() -> None:
    cluster = Cluster()
    Node(cluster, "a").join(A)
    Node(cluster, "b").hello(epoch=1, wall_clock_ms=9)
    snapshot = cluster.core.snapshot()
    assert json.loads(json.dumps(snapshot)) == snapshot
    assert snapshot["nodes"]["a"]["entries"] == snapshot["entries"] == 1
    assert snapshot["nodes"]["b"]["state"] == "expected"


# -- homes -----------------------------------------------------------------------------------------


def heartbeat(node: Node, *doubtful: BlockKey) -> AnnounceReply:
    announce = msgspec.structs.replace(node.say(), doubtful=pack_keys(doubtful))
    return node.send(announce)


def test_the_home_of_a_block_hears_once_that_it_is_wanted() -> None:
    """Whoever has had it for longest, and nobody else; not when it asks itself."""
    cluster = Cluster()
    home, copy, asker = (Node(cluster, name).join() for name in "abc")
    home.announce(A, B)
    copy.announce(A, C)
    home.locate(C)
    asker.locate(A, B, C, D)
    assert unpack_keys(heartbeat(home).read) == [A, B]
    assert unpack_keys(heartbeat(copy).read) == [C, C]
    assert heartbeat(home).read == heartbeat(copy).read == heartbeat(asker).read == b""


def test_only_so_many_wanted_keys_are_kept_for_a_node() -> None:
    cluster = Cluster()
    home, asker = (Node(cluster, name).join() for name in "ab")
    home.announce(A, B)
    for _ in range(MAX_READ_KEYS):
        asker.locate(A, B)
    assert len(heartbeat(home).read) == MAX_READ_KEYS * KEY_BYTES


def test_what_was_wanted_of_an_epoch_before_is_forgotten() -> None:
    cluster = Cluster()
    home, asker = (Node(cluster, name).join() for name in "ab")
    home.announce(A)
    asker.locate(A)
    home.hello(epoch=home.info.epoch + 1)
    home.sequence = 0
    assert heartbeat(home).read == b""


def test_of_those_who_have_a_block_its_home_alone_may_not_spare_it() -> None:
    cluster = Cluster()
    home, copy = (Node(cluster, name).join() for name in "ab")
    home.announce(A, B)
    copy.announce(A, C)
    assert unpack_keys(heartbeat(home, A, B, D).spare) == []
    assert unpack_keys(heartbeat(copy, A, C).spare) == [A]
    home.remove(A)
    assert unpack_keys(heartbeat(copy, A, C).spare) == []


def test_nothing_is_spared_for_a_suspect() -> None:
    cluster = Cluster()
    home, copy = (Node(cluster, name).join() for name in "ab")
    home.announce(A)
    copy.announce(A)
    cluster.wait(1_200, copy)
    assert cluster.core.state_of(home.info.node_id) is NodeState.SUSPECT
    assert heartbeat(copy, A).spare == b""
