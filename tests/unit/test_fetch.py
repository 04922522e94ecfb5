"""A block comes from a peer, or its waiters hear in time that it does not."""

from collections.abc import Callable

import pytest

from kvray.core.commands import AskDirectory, Missed, ReadKind
from kvray.core.fetch import FetchLimits, Source
from kvray.core.ids import BlockKey, Epoch, Generation, NodeId, SlotIndex, SlotState
from kvray.core.reasons import MissReason
from tests.fetching import BLOCK_BYTES, FetchWorld, Target, key, node_info, waiter

A, B, C = key(1), key(2), key(3)
ME, YOU = waiter(1), waiter(2)


def test_a_block_is_located_read_proven_and_only_then_committed() -> None:
    world = FetchWorld.with_peers("peer")
    source = world.fill("peer", 7, A)

    world.want(ME, [A])
    world.locate([source])
    (payload,) = world.posted(ReadKind.PAYLOAD)
    assert world.states() == [Target.WRITING]
    world.end_read()
    (headers,) = world.posted(ReadKind.HEADERS)
    assert world.states() == [Target.WRITING]
    world.end_read()

    assert world.arrived == [(ME, A)]
    assert world.states() == [Target.READY]
    assert (payload.node_id, payload.epoch) == (headers.node_id, headers.epoch) == ("peer", 1)
    assert world.core.snapshot()["fetched_bytes"] == BLOCK_BYTES


def test_a_block_is_fetched_once_however_many_wait_for_it() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A])
    world.want(YOU, [A])
    assert len(world.locates) == 1
    world.locate([world.fill("peer", 7, A)])
    world.want(waiter(3), [A])
    world.end_read()
    world.end_read()

    assert world.arrived == [(ME, A), (YOU, A), (waiter(3), A)]
    assert len(world.targets) == 1


def test_a_read_that_overlaps_a_rewrite_does_not_count() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A])
    world.locate([world.fill("peer", 7, A, generation=1)])
    world.end_read()
    world.fill("peer", 7, B, generation=2)  # the owner has evicted it meanwhile
    world.end_read()

    assert world.missed == [(ME, A, MissReason.EVICTED)]
    assert world.states() == [Target.FREE]


def test_the_same_block_in_a_later_generation_does_not_count_either() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A])
    world.locate([world.fill("peer", 7, A, generation=1)])
    world.fill("peer", 7, A, generation=2)  # rewritten while it was read: torn, whatever the key
    world.end_read()
    world.end_read()

    assert world.missed == [(ME, A, MissReason.EVICTED)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", SlotState.WRITING),
        ("state", SlotState.QUARANTINE),
        ("state", SlotState.ABSENT),
        ("generation", 2),
        ("key", B),
        ("offset", 0),
        ("bytes", BLOCK_BYTES - 1),
        ("maker", 8),
    ],
)
def test_a_header_that_differs_in_anything_is_no_proof(name: str, value: int | bytes) -> None:
    world = FetchWorld.with_peers("peer")
    world.lies[name] = value
    world.want(ME, [A])
    world.locate([world.fill("peer", 7, A)])
    world.end_read()
    world.end_read()

    assert world.missed == [(ME, A, MissReason.EVICTED)]


def test_after_a_stale_source_the_next_one_is_read() -> None:
    world = FetchWorld.with_peers("old", "good")
    stale = world.fill("old", 3, A)
    world.fill("old", 3, B, generation=2)
    good = world.fill("good", 5, A)

    world.want(ME, [A])
    world.locate([stale, good])
    for _ in range(4):  # payload and headers of the one, then of the other
        world.end_read()

    assert world.arrived == [(ME, A)]
    assert sorted(state.value for state in world.states()) == ["free", "ready"]


def test_only_the_blocks_whose_header_fits_are_committed() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A, B, C])
    world.locate(*([world.fill("peer", n, k)] for n, k in enumerate((A, B, C))))
    world.end_read()
    world.fill("peer", 1, key(9), generation=2)
    world.end_read()

    assert world.arrived == [(ME, A), (ME, C)]
    assert world.missed == [(ME, B, MissReason.EVICTED)]


@pytest.mark.parametrize(
    ("hint", "reason"),
    [
        (lambda s: [], MissReason.NEVER_SEEN),
        (lambda s: [_of(s, node_id=NodeId("stranger"))], MissReason.PEER_GONE),
        (lambda s: [_of(s, epoch=Epoch(0))], MissReason.PEER_GONE),
        (lambda s: [_of(s, slot=SlotIndex(1 << 20))], MissReason.EVICTED),
        (lambda s: [_of(s, slot=SlotIndex(63))], MissReason.EVICTED),  # beyond 32 slots of 8 KiB
        (lambda s: [_of(s, bytes=BLOCK_BYTES * 2)], MissReason.OTHER_SIZE),
    ],
)
def test_a_hint_that_can_not_be_true_is_a_miss(
    hint: Callable[[Source], list[Source]], reason: MissReason
) -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A])
    world.locate(hint(world.fill("peer", 7, A)))

    assert world.missed == [(ME, A, reason)]
    assert not world.reads


def _of(
    source: Source,
    *,
    node_id: NodeId | None = None,
    epoch: Epoch | None = None,
    slot: SlotIndex | None = None,
    bytes: int | None = None,
) -> Source:
    return Source(
        source.node_id if node_id is None else node_id,
        source.epoch if epoch is None else epoch,
        source.slot if slot is None else slot,
        Generation(source.generation),
        source.bytes if bytes is None else bytes,
    )


def test_a_silent_directory_is_a_miss_at_the_locates_deadline() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A])
    source = world.fill("peer", 7, A)
    assert world.core.next_deadline_ms() == FetchLimits().locate_deadline_ms
    world.tick(FetchLimits().locate_deadline_ms)
    assert world.missed == [(ME, A, MissReason.DIRECTORY_SILENT)]

    world.locate([source])  # too late

    assert not world.reads


def test_a_waiter_is_told_at_its_own_deadline_and_the_read_goes_on() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A], within_ms=50)
    world.locate([world.fill("peer", 7, A)])
    world.tick(50)
    assert world.missed == [(ME, A, MissReason.DEADLINE)]

    world.end_read()
    world.end_read()

    assert world.states() == [Target.READY]
    assert world.arrived == []


def test_a_failed_read_gives_its_targets_back_and_its_peer_is_avoided_for_a_while() -> None:
    world = FetchWorld.with_peers("peer")
    source = world.fill("peer", 7, A)
    world.want(ME, [A])
    world.locate([source])
    world.end_read(ok=False)
    assert world.missed == [(ME, A, MissReason.PEER_GONE)]
    assert world.states() == [Target.FREE]
    assert [failed.avoid_ms for failed in world.failed_peers] == [500]

    world.want(YOU, [A])
    world.locate([source])
    assert world.missed[-1] == (YOU, A, MissReason.PEER_GONE)
    assert not world.reads

    world.tick(500)
    world.want(waiter(3), [A])
    world.locate([source])
    assert len(world.reads) == 1


def test_avoidance_doubles_up_to_a_second_and_a_proven_read_ends_it() -> None:
    world = FetchWorld.with_peers("peer")
    source = world.fill("peer", 7, A)
    for n in range(6):
        world.want(waiter(n), [A])
        world.locate([source])
        world.end_read(ok=False)
        world.tick(world.failed_peers[-1].avoid_ms)
    assert [f.avoid_ms for f in world.failed_peers] == [500, 1_000, 1_000, 1_000, 1_000, 1_000]

    world.want(ME, [A])
    world.locate([source])
    world.end_read()
    world.end_read()
    world.want(YOU, [B])
    world.locate([world.fill("peer", 8, B)])
    world.end_read(ok=False)

    assert world.failed_peers[-1].avoid_ms == 500


def test_a_late_read_is_abandoned_and_its_slots_stay_in_quarantine_until_it_has_ended() -> None:
    world = FetchWorld.with_peers("silent", "good")
    hints = [world.fill("silent", 3, A), world.fill("good", 5, A)]
    world.want(ME, [A], within_ms=5_000)
    world.locate(hints)
    world.tick(FetchLimits().payload_deadline_ms)
    assert world.states() == [Target.QUARANTINE, Target.WRITING]
    (late,) = [read_id for read_id, read in world.reads.items() if read.is_abandoned]

    world.end_read(max(world.reads))
    world.end_read(max(world.reads))
    assert world.arrived == [(ME, A)]
    assert world.states() == [Target.QUARANTINE, Target.READY]

    world.end_read(late)

    assert world.states() == [Target.FREE, Target.READY]


def test_headers_that_come_with_their_payload_prove_it_without_another_read() -> None:
    world = FetchWorld.with_peers("peer", "other")
    hints = [world.fill("peer", 7, A), world.fill("other", 8, A)]
    world.want(ME, [A])
    world.locate(hints)
    world.end_read(with_headers=True)
    assert world.arrived == [(ME, A)]
    assert not world.reads

    world.want(ME, [B])
    hints = [world.fill("peer", 9, B), world.fill("other", 9, B)]
    world.fill("peer", 9, C, generation=2)  # another block has taken its slot
    world.locate(hints)
    world.end_read(with_headers=True)
    (again,) = world.posted(ReadKind.PAYLOAD)
    assert again.node_id == "other"
    world.end_read(with_headers=True)
    assert world.arrived == [(ME, A), (ME, B)]


def test_headers_of_an_abandoned_payload_free_its_slots_and_prove_nothing() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A], within_ms=5_000)
    world.locate([world.fill("peer", 7, A)])
    world.tick(FetchLimits().payload_deadline_ms)
    assert world.states() == [Target.QUARANTINE]
    world.end_read(with_headers=True)
    assert world.states() == [Target.FREE]
    assert world.missed == [(ME, A, MissReason.PEER_GONE)]


def test_late_headers_keep_no_slot_since_the_payload_has_ended() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A], within_ms=5_000)
    world.locate([world.fill("peer", 7, A)])
    world.end_read()
    world.tick(FetchLimits().headers_deadline_ms)
    assert world.missed == [(ME, A, MissReason.PEER_GONE)]
    assert world.states() == [Target.FREE]

    world.end_read()  # the headers come after all: nobody minds

    assert world.arrived == []


def test_one_silent_peer_does_not_take_the_place_of_others() -> None:
    limits = FetchLimits(batch_blocks=1, max_reads_per_peer=2, max_unended_reads=4)
    world = FetchWorld.with_peers("silent", "good", limits=limits)
    keys = [key(n) for n in range(10)]
    for n, k in enumerate(keys):  # however often it is tried again
        world.want(waiter(n), [k], within_ms=5_000)
        world.locate([world.fill("silent", n, k)])
        world.tick(8_000)
    assert len(world.reads) == 2

    world.want(ME, [A])
    world.locate([world.fill("good", 1, A)])
    world.end_read(max(world.reads))
    world.end_read(max(world.reads))

    assert world.arrived == [(ME, A)]


def test_a_peer_that_owes_the_end_of_a_read_is_asked_for_fewer_at_a_time() -> None:
    limits = FetchLimits(batch_blocks=1, max_reads_per_peer=2)
    world = FetchWorld.with_peers("peer", limits=limits)
    world.want(ME, [A])
    world.locate([world.fill("peer", 1, A)])
    world.tick(limits.payload_deadline_ms)
    world.tick(500)

    world.want(YOU, [B, C])
    world.locate([world.fill("peer", 2, B)], [world.fill("peer", 3, C)])
    assert len(world.reads) == 2, "the abandoned one, and one more"
    world.end_read(min(world.reads))

    assert len(world.reads) == 2


def test_a_peer_that_leaves_and_comes_back_in_the_same_epoch_owes_what_it_owed() -> None:
    limits = FetchLimits(batch_blocks=1, max_reads_per_peer=1)
    world = FetchWorld.with_peers("peer", limits=limits)
    world.want(ME, [A])
    world.locate([world.fill("peer", 1, A)])
    world.roster()
    world.roster(node_info("peer"))
    world.want(YOU, [B])
    world.locate([world.fill("peer", 2, B)])
    assert world.missed[-1] == (YOU, B, MissReason.PEER_GONE)

    world.end_read()
    world.want(waiter(3), [B])
    world.locate([world.fill("peer", 2, B)])

    assert len(world.posted(ReadKind.PAYLOAD)) == 1


def test_at_the_cap_of_unended_reads_nothing_more_is_fetched() -> None:
    limits = FetchLimits(batch_blocks=1, max_reads_per_peer=1, max_unended_reads=2)
    world = FetchWorld.with_peers("a", "b", "c", limits=limits)
    for n, name in enumerate(("a", "b")):
        world.want(waiter(n), [key(n)])
        world.locate([world.fill(name, 1, key(n))])
    world.tick(limits.payload_deadline_ms)
    assert world.core.is_clogged
    world.want(ME, [C])
    assert world.missed[-1] == (ME, C, MissReason.OVERLOADED)

    world.end_read()

    world.want(YOU, [C])
    world.locate([world.fill("c", 1, C)])
    assert len(world.posted(ReadKind.PAYLOAD)) == 2


def test_a_full_slab_is_a_miss() -> None:
    world = FetchWorld.with_peers("peer")
    world.free_slots = 1
    world.want(ME, [A, B])
    world.locate([world.fill("peer", 1, A)], [world.fill("peer", 2, B)])
    world.end_read()
    world.end_read()

    assert world.arrived == [(ME, A)]
    assert world.missed == [(ME, B, MissReason.SLAB_FULL)]


def test_what_an_engine_here_has_written_meanwhile_need_not_be_fetched() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A, B])
    world.write_into(A)
    assert world.arrived == [(ME, A)]
    world.present.add(B)  # being written just now
    world.locate([world.fill("peer", 1, A)], [world.fill("peer", 2, B)])

    assert world.arrived == [(ME, A), (ME, B)]
    assert not world.reads


def test_another_size_than_the_one_under_way_is_a_miss() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A])
    world.want(YOU, [A], block_bytes=BLOCK_BYTES * 2)

    assert world.missed == [(YOU, A, MissReason.OTHER_SIZE)]


def test_nothing_is_reserved_for_what_is_forgotten_while_it_is_located() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A, B])
    world.want(YOU, [B])
    world.forget(ME)
    world.locate([world.fill("peer", 1, A)], [world.fill("peer", 2, B)])

    (payload,) = world.posted(ReadKind.PAYLOAD)
    assert len(payload.bytes) == 1
    world.end_read()
    world.end_read()
    assert world.arrived == [(YOU, B)]


def test_a_want_forgotten_and_made_again_is_asked_about_again() -> None:
    world = FetchWorld.with_peers("peer")
    world.want(ME, [A])
    world.forget(ME)
    world.want(YOU, [A])
    source = world.fill("peer", 1, A)
    world.locate([])  # of the first one, and nobody minds

    world.locate([source])
    world.end_read()
    world.end_read()

    assert world.arrived == [(YOU, A)]


def test_a_target_granted_for_what_was_forgotten_meanwhile_is_given_back() -> None:
    world = FetchWorld.with_peers("peer")
    world.holds_reservations = True
    world.want(ME, [A, B])
    world.locate([world.fill("peer", 1, A)], [world.fill("peer", 2, B)])
    world.forget(ME, [A])
    world.reserve(min(world.reservations))

    assert world.states() == [Target.FREE, Target.WRITING]


def test_misses_are_named_before_anything_is_reserved_for_what_they_make_worthless() -> None:
    world = FetchWorld.with_peers("peer")
    core = world.core
    commands = core.want(ME, [(A, BLOCK_BYTES), (B, BLOCK_BYTES)], deadline_ms=1_000)
    commands += core.advance(0)
    found = [[], [world.fill("peer", 1, B)]]
    assert isinstance(commands[0], AskDirectory)
    told = core.on_located(commands[0].locate_id, found, now_ms=0)
    assert [type(command).__name__ for command in told] == ["Missed"]

    core.forget(ME, [B])  # what a prefix run does

    assert core.advance(0) == []
    core.check()


def test_nothing_is_reserved_while_a_plan_names_misses() -> None:
    world = FetchWorld.with_peers("bad", "good")
    core = world.core
    world.want(YOU, [C])
    world.locate([world.fill("bad", 3, C)])
    world.end_read(ok=False)  # avoided from now on
    (ask,) = core.want(ME, [(A, BLOCK_BYTES), (B, BLOCK_BYTES)], deadline_ms=1_000) + core.advance(
        0
    )
    assert isinstance(ask, AskDirectory)
    found = [[world.fill("bad", 1, A)], [world.fill("good", 1, B)]]
    assert core.on_located(ask.locate_id, found, now_ms=0) == []

    assert core.advance(0) == [Missed(ME, (A,), MissReason.PEER_GONE)]
    core.forget(ME, [B])

    assert core.advance(0) == []


def a_block_in_the_queue_of_the_first_peer() -> FetchWorld:
    """A is being read from `first`, and so will B be, though `second` has it too: it is busy."""
    world = FetchWorld.with_peers(
        "first", "second", limits=FetchLimits(batch_blocks=1, max_reads_per_peer=1)
    )
    world.want(YOU, [C, key(4)])
    world.locate([world.fill("second", 3, C)], [world.fill("second", 4, key(4))])
    world.want(ME, [A, B])
    b_hints = [world.fill("first", 2, B), world.fill("second", 2, B)]
    world.locate([world.fill("first", 1, A)], b_hints)
    assert [post.node_id for post in world.posted(ReadKind.PAYLOAD)] == ["second", "first"]
    return world


def test_what_waits_for_its_turn_at_a_peer_that_fails_is_read_elsewhere() -> None:
    world = a_block_in_the_queue_of_the_first_peer()
    world.end_read(max(world.reads), ok=False)
    while world.reads:
        assert {post.node_id for post in world.posted(ReadKind.PAYLOAD)} <= {"second"}
        world.end_read()

    assert world.arrived[-1] == (ME, B)


def test_what_waits_for_its_turn_at_a_peer_that_leaves_is_read_elsewhere() -> None:
    world = a_block_in_the_queue_of_the_first_peer()
    world.roster(node_info("second"))
    while live := [read_id for read_id, read in world.reads.items() if not read.is_abandoned]:
        world.end_read(min(live))

    assert world.arrived[-1] == (ME, B)


def test_a_second_source_is_not_believed_any_more_once_its_node_has_another_epoch() -> None:
    world = FetchWorld.with_peers("bad", "restarted")
    world.want(ME, [A])
    world.locate([world.fill("bad", 1, A), world.fill("restarted", 1, A)])
    world.roster(node_info("bad"), node_info("restarted", epoch=2))
    world.end_read(ok=False)

    assert world.missed == [(ME, A, MissReason.PEER_GONE)]
    assert not world.reads


def test_a_peer_that_leaves_the_roster_is_given_up_at_once() -> None:
    world = FetchWorld.with_peers("leaving", "good")
    hints = [world.fill("leaving", 3, A), world.fill("good", 5, A)]
    world.want(ME, [A])
    world.locate(hints)
    world.roster(node_info("good"))
    assert world.states() == [Target.QUARANTINE, Target.WRITING]

    world.end_read(max(world.reads))
    world.end_read(max(world.reads))

    assert world.arrived == [(ME, A)]


def test_nothing_of_a_lower_epoch_is_believed() -> None:
    world = FetchWorld.with_peers("peer")
    source = world.fill("peer", 3, A)
    world.want(ME, [A])
    world.locate([source])
    world.end_read()
    world.roster(node_info("peer", epoch=2))  # it was restarted while its headers were read
    assert world.missed == [(ME, A, MissReason.PEER_GONE)]

    world.want(YOU, [A])
    world.locate([source])

    assert world.missed[-1] == (YOU, A, MissReason.PEER_GONE)


def test_reads_of_a_peer_are_few_and_bounded_and_the_rest_waits_for_its_turn() -> None:
    limits = FetchLimits(batch_bytes=4 * BLOCK_BYTES, max_reads_per_peer=2)
    world = FetchWorld.with_peers("peer", limits=limits)
    keys = [key(n) for n in range(20)]
    world.want(ME, keys)
    world.locate(*([world.fill("peer", n, k)] for n, k in enumerate(keys)))
    assert [len(post.bytes) for post in world.posted(ReadKind.PAYLOAD)] == [4, 4]
    assert len(world.targets) == len(keys), "but all have their slots"

    while world.reads:
        world.end_read()

    assert world.arrived == [(ME, k) for k in keys]


def test_two_nodes_that_hold_everything_share_the_work() -> None:
    limits = FetchLimits(batch_bytes=4 * BLOCK_BYTES)
    world = FetchWorld.with_peers("a", "b", limits=limits)
    keys = [key(n) for n in range(16)]
    world.want(ME, keys)
    world.locate(*([world.fill("a", n, k), world.fill("b", n, k)] for n, k in enumerate(keys)))

    assert sorted(post.node_id for post in world.posted(ReadKind.PAYLOAD)) == ["a", "a", "b", "b"]


def test_keys_that_find_no_call_share_the_next_one() -> None:
    world = FetchWorld.with_peers("peer", limits=FetchLimits(max_locates=1))
    for n in range(5):
        world.want(waiter(n), [key(n)])
    assert list(world.locates.values()) == [(key(0),)]

    world.locate([])

    assert list(world.locates.values()) == [(key(1), key(2), key(3), key(4))]


def test_beyond_the_limit_of_fetches_a_want_is_a_miss_at_once() -> None:
    world = FetchWorld.with_peers("peer", limits=FetchLimits(max_fetches=1))
    world.want(ME, [A, B])
    assert world.missed == [(ME, B, MissReason.OVERLOADED)]

    world.locate([])

    assert world.missed[-1] == (ME, A, MissReason.NEVER_SEEN)


def test_the_busy_time_is_the_time_with_a_read_under_way() -> None:
    world = FetchWorld.with_peers("peer")
    for n, k in enumerate((A, B)):
        world.want(waiter(n), [k])
        world.locate([world.fill("peer", n, k)])
        world.tick(30)
        world.end_read()
        world.tick(5)
        world.end_read()
        world.tick(1_000)

    assert world.core.snapshot()["fetch_busy_ms"] == 70


def test_an_idle_core_has_no_deadline() -> None:
    world = FetchWorld.with_peers("peer")
    assert world.core.next_deadline_ms() is None
    world.want(ME, [A])
    world.locate([])

    assert world.core.next_deadline_ms() is None


# ── what is coming is told before it is read ─────────────────────────────────────────────────────


def chain_at(world: FetchWorld, peer: str, count: int) -> list[BlockKey]:
    """ME wants a chain of blocks that this peer has."""
    keys = [key(n) for n in range(count)]
    world.want(ME, keys)
    world.locate(*([world.fill(peer, n, k)] for n, k in enumerate(keys)))
    return keys


def test_the_places_of_a_whole_chain_are_told_before_its_head_has_come() -> None:
    limits = FetchLimits(batch_blocks=2, max_reads_per_peer=1)
    world = FetchWorld.with_peers("peer", limits=limits)
    keys = chain_at(world, "peer", 6)

    assert list(world.coming[ME]) == keys
    assert not world.arrived
    while world.reads:
        world.end_read()
    assert world.arrived == [(ME, k) for k in keys], "each in the slot that was told (the world)"


def test_who_joins_a_fetch_whose_slot_is_known_is_told_it_at_once() -> None:
    world = FetchWorld.with_peers("peer")
    chain_at(world, "peer", 1)

    world.want(YOU, [key(0)])

    assert world.coming[YOU] == world.coming[ME]


def test_slots_are_reserved_a_few_batches_ahead_and_no_further() -> None:
    limits = FetchLimits(batch_blocks=1, max_reads_per_peer=1, max_batches_ahead_per_peer=3)
    world = FetchWorld.with_peers("peer", limits=limits)
    keys = chain_at(world, "peer", 10)

    assert set(world.coming[ME]) == set(keys[:4]), "one is read, three are ahead"
    world.end_read()
    world.end_read()
    assert set(world.coming[ME]) == set(keys[:5])


def test_batches_ahead_of_one_peer_do_not_hold_up_another() -> None:
    limits = FetchLimits(batch_blocks=1, max_reads_per_peer=1, max_batches_ahead=2)
    world = FetchWorld.with_peers("long", "short", limits=limits)
    chain_at(world, "long", 10)

    world.want(YOU, [key(20)])
    world.locate([world.fill("short", 1, key(20))])

    assert [post.node_id for post in world.posted(ReadKind.PAYLOAD)] == ["long", "short"]


def test_the_first_of_several_batches_is_small_so_that_it_comes_soon() -> None:
    limits = FetchLimits(batch_bytes=4 * BLOCK_BYTES, first_batch_bytes=BLOCK_BYTES)
    world = FetchWorld.with_peers("peer", limits=limits)
    chain_at(world, "peer", 9)
    assert [len(post.bytes) for post in world.posted(ReadKind.PAYLOAD)] == [1, 4]

    world = FetchWorld.with_peers("peer", limits=limits)
    chain_at(world, "peer", 4)
    assert [len(post.bytes) for post in world.posted(ReadKind.PAYLOAD)] == [4], "all fits in one"


def test_what_is_asked_of_the_next_source_is_told_its_new_place() -> None:
    world = FetchWorld.with_peers("bad", "good")
    world.want(ME, [A])
    world.locate([world.fill("bad", 1, A), world.fill("good", 1, A)])
    first = world.coming[ME][A]
    world.end_read(ok=False)

    second = world.coming[ME][A]
    assert second.generation != first.generation
    world.end_read()
    world.end_read()
    assert world.arrived == [(ME, A)]


def test_a_slot_whose_turn_has_not_come_is_given_back_when_nobody_wants_it_any_more() -> None:
    limits = FetchLimits(batch_blocks=1, max_reads_per_peer=1)
    world = FetchWorld.with_peers("peer", limits=limits)
    keys = chain_at(world, "peer", 4)

    world.forget(ME, keys[1:])

    assert world.states() == [Target.WRITING, Target.FREE, Target.FREE, Target.FREE]
    while world.reads:
        world.end_read()
    assert world.arrived == [(ME, keys[0])]


def test_a_miss_at_the_deadline_gives_back_what_was_reserved_ahead() -> None:
    limits = FetchLimits(batch_blocks=1, max_reads_per_peer=1)
    world = FetchWorld.with_peers("peer", limits=limits)
    keys = chain_at(world, "peer", 3)

    world.tick(1_000)

    assert [block for _, block, _ in world.missed] == keys
    assert world.states() == [Target.QUARANTINE, Target.FREE, Target.FREE]


def test_few_blocks_are_reserved_ahead_however_small_they_are() -> None:
    limits = FetchLimits(batch_blocks=2, max_reads_per_peer=1, max_blocks_ahead=4)
    world = FetchWorld.with_peers("peer", limits=limits)
    keys = chain_at(world, "peer", 20)

    assert set(world.coming[ME]) == set(keys[:6]), "two are read, four are ahead"
