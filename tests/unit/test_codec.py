"""Goal: what leaves `encode` comes back equal from `decode`, and nothing malformed comes back.

Method: one message of every kind; for every rule of core.wellformed one message that breaks only
this rule, encoded behind the back of `encode`.
"""

from typing import Any

import msgspec
import pytest

from kvray.core.codec import (
    decode,
    encode,
    pack_entries,
    pack_keys,
    pack_locations,
    pack_makers,
    pack_slots,
    unpack_entries,
    unpack_keys,
    unpack_locations,
    unpack_slots,
)
from kvray.core.ids import (
    BlockKey,
    ClientId,
    Epoch,
    Generation,
    Maker,
    Namespace,
    NodeId,
    OpId,
    Origin,
    Role,
    SlabId,
    SlotIndex,
    Term,
)
from kvray.core.layout import FORMAT_VERSION, MAX_EXTENT_BYTES
from kvray.core.messages import (
    MAX_CALL_BYTES,
    MAX_CHANGES_PER_ANNOUNCE,
    MAX_CHUNK_SHAPES,
    MAX_DEADLINE_MS,
    MAX_DOUBTFUL_KEYS,
    MAX_EPOCH,
    MAX_KEYS_PER_MESSAGE,
    MAX_LINK_METADATA_BYTES,
    MAX_LOCATE_KEYS,
    MAX_MAKERS_SAID,
    MAX_MESSAGE_BYTES,
    MAX_NAME_BYTES,
    MAX_PERIOD_MS,
    MAX_READ_KEYS,
    MAX_ROSTER_NODES,
    MAX_SOURCES_PER_KEY,
    MAX_SPLIT_MODELS,
    MAX_TEXT_BYTES,
    MAX_WRITING_LISTED,
    Abandon,
    Ack,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    Bye,
    ChunkShape,
    Commit,
    ControlMessage,
    Hello,
    HelloReply,
    Introduce,
    LocalAnswer,
    LocalRequest,
    Locate,
    LocateReply,
    Lookup,
    LookupReply,
    LookupUpdate,
    Message,
    NodeHello,
    NodeHelloReply,
    NodeInfo,
    NoiseLevels,
    Refused,
    Report,
    Reserve,
    ReserveReply,
    RosterNews,
    Unpin,
)
from kvray.errors import RemoteProtocolError, VersionMismatchError

OP = OpId(7)
SLAB = SlabId(bytes(range(16)))
KEYS = [BlockKey(bytes([i]) * 15 + b"\0") for i in range(3)]
SLOTS = pack_slots([(SlotIndex(4), Generation(5), 4_096), (SlotIndex(9), Generation(6), 8_192)])
ENTRY = (KEYS[0], SlotIndex(4), 4_000, Generation(5), Origin.COPY, Maker(9))
INFO = NodeInfo(
    node_id=NodeId("node-a"),
    epoch=Epoch(1_700_000_000_000),
    link_name="node-a/1700000000000",
    link_metadata=b"agent",
    slab_id=SLAB,
    slab_address=2**47,
    slab_bytes=64 * 2**20,
    extent_bytes=2**20,
    host="host-a",
    kvray_version="0.1.0",
    format_version=FORMAT_VERSION,
)
LOCATION = (2, 0, SlotIndex(4), 4_000, Generation(5), Maker(9))

HELLO = Hello(
    op=OP,
    client=ClientId(pid=41, start_ticks=99, nonce=2**64 - 1),
    role=Role.ENGINE,
    engine_nonce=2**64 - 1,
    namespace=Namespace(bytes(16)),
    label="SmolLM2, rank 0",
    slab_id=SLAB,
    writing=SLOTS,
)
INTRODUCE = Introduce(
    op=OP,
    namespace=Namespace(bytes(16)),
    fields={"dtype": "bfloat16"},
    maker=Maker(2**64 - 1),
    chunks=[ChunkShape(slot_bytes=4_096, piece_bytes=512, dtype="bfloat16")],
    noise=NoiseLevels(alone=0.0, batched=0.01),
)
HELLO_REPLY = HelloReply(
    op=OP,
    node_id=NodeId("node-a"),
    epoch=Epoch(1),
    slab_id=SLAB,
    slab_bytes=64 * 2**20,
    extent_bytes=2**20,
)
LOOKUP = Lookup(
    op=OP,
    keys=pack_keys(KEYS),
    run_lengths=[2, 1],
    run_is_prefix=[True, False],
    run_slot_bytes=[4_096, MAX_EXTENT_BYTES],
    deadline_ms=2_000,
)
LOOKUP_REPLY = LookupReply(op=OP, states=bytes([1, 2, 3, 0]), slots=SLOTS)
LOOKUP_UPDATE = LookupUpdate(op=OP, indices=[7, 1, 1_023], states=bytes([1, 0, 3]), slots=SLOTS)
UNPIN = Unpin(op=OP, lookup_op=OpId(6))
RESERVE = Reserve(op=OP, keys=pack_keys(KEYS), run_lengths=[3], run_slot_bytes=[1])
RESERVE_REPLY = ReserveReply(op=OP, grants=bytes([0, 1, 2, 0]), slots=SLOTS)
COMMIT = Commit(op=OP, slab_id=SLAB, slots=SLOTS)
ABANDON = Abandon(op=OP, slab_id=SLAB, slots=b"", reserve_op=OpId(3))
REPORT = Report(op=OP, counters={"tokens_from_peers": 3_456})
NODE_HELLO = NodeHello(info=INFO, wall_clock_ms=1_700_000_000_000)
NODE_HELLO_REPLY = NodeHelloReply(
    term=Term(1),
    accepted_epoch=Epoch(2),
    roster_version=3,
    roster=[INFO],
    heartbeat_period_ms=200,
)
ANNOUNCE = Announce(
    node_id=NodeId("node-a"),
    epoch=Epoch(2),
    term=Term(1),
    sequence=1,
    roster_version=0,
    adds=pack_entries([ENTRY]),
    removes=pack_keys(KEYS),
    doubtful=pack_keys(KEYS),
    in_use=True,
)
ANNOUNCE_REPLY = AnnounceReply(
    status=AnnounceStatus.RESYNC,
    term=Term(1),
    roster_version=3,
    heartbeat_period_ms=200,
    news=RosterNews(2, [INFO], [NodeId("node-b")]),
    read=pack_keys(KEYS),
    spare=pack_keys(KEYS),
)
LOCATE = Locate(node_id=NodeId("node-a"), epoch=Epoch(2), keys=pack_keys(KEYS))
LOCATE_REPLY = LocateReply(
    term=Term(1),
    nodes=[NodeId("node-b")],
    epochs=[Epoch(4)],
    locations=pack_locations([LOCATION]),
)
REFUSED = Refused(op=OP, reason="no", fatal=True)
MESSAGES: list[Message] = [
    HELLO,
    INTRODUCE,
    HELLO_REPLY,
    REFUSED,
    LOOKUP,
    LOOKUP_REPLY,
    LOOKUP_UPDATE,
    UNPIN,
    RESERVE,
    RESERVE_REPLY,
    COMMIT,
    ABANDON,
    REPORT,
    Bye(op=OP),
    Ack(op=OP),
    NODE_HELLO,
    NODE_HELLO_REPLY,
    ANNOUNCE,
    ANNOUNCE_REPLY,
    LOCATE,
    LOCATE_REPLY,
]


def read(data: bytes, expect: Any = Message) -> Any:
    return decode(data, max_bytes=MAX_CALL_BYTES, expect=expect)


def with_(message: Message, **changes: Any) -> tuple[Message, str]:
    """The message with changed fields, and the name of the first."""
    return msgspec.structs.replace(message, **changes), next(iter(changes))


def info_with(**changes: Any) -> tuple[Message, str]:
    return msgspec.structs.replace(NODE_HELLO, info=msgspec.structs.replace(INFO, **changes)), next(
        iter(changes)
    )


BROKEN: list[tuple[Message, str]] = [
    with_(HELLO, op=OpId(-1)),
    (msgspec.structs.replace(HELLO, client=ClientId(pid=0, start_ticks=1, nonce=1)), "pid"),
    (msgspec.structs.replace(HELLO, client=ClientId(pid=2**32, start_ticks=1, nonce=1)), "pid"),
    (msgspec.structs.replace(HELLO, client=ClientId(pid=1, start_ticks=-1, nonce=1)), "start"),
    (msgspec.structs.replace(HELLO, client=ClientId(pid=1, start_ticks=1, nonce=-1)), "nonce"),
    with_(HELLO, engine_nonce=-1),
    with_(HELLO, namespace=bytes(15)),
    with_(HELLO, label="x" * (MAX_TEXT_BYTES + 1)),
    with_(HELLO, label="\N{SNOWMAN}" * (MAX_TEXT_BYTES // 3 + 1)),
    with_(HELLO, slab_id=bytes(17)),
    with_(HELLO, writing=SLOTS + b"x"),
    with_(HELLO, writing=bytes(20 * (MAX_WRITING_LISTED + 1))),
    (msgspec.structs.replace(HELLO, slab_id=SlabId(b"")), "writing"),
    with_(INTRODUCE, op=-1),
    with_(INTRODUCE, namespace=bytes(15)),
    with_(INTRODUCE, maker=-1),
    with_(INTRODUCE, chunks=INTRODUCE.chunks * (MAX_CHUNK_SHAPES + 1)),
    (with_(INTRODUCE, chunks=[ChunkShape(0, 0, "x")])[0], "slot_bytes"),
    (with_(INTRODUCE, chunks=[ChunkShape(4_096, 8_192, "x")])[0], "piece_bytes"),
    (with_(INTRODUCE, chunks=[ChunkShape(4_096, 4_095, "x")])[0], "whole pieces"),
    (with_(INTRODUCE, chunks=[ChunkShape(4_096, 512, "x" * 256)])[0], "dtype"),
    with_(INTRODUCE, noise=NoiseLevels(alone=float("nan"))),
    with_(INTRODUCE, noise=NoiseLevels(batched=1.1)),
    with_(HELLO, maker=-1),
    with_(HELLO_REPLY, slab_id=b""),
    with_(HELLO_REPLY, epoch=-1),
    with_(HELLO_REPLY, slab_bytes=-1),
    with_(HELLO_REPLY, extent_bytes=1),
    with_(REFUSED, reason="x" * (MAX_TEXT_BYTES + 1)),
    with_(LOOKUP, keys=LOOKUP.keys[:-1]),
    (
        Lookup(OP, bytes(16 * 1_025), [1_025], [True], [1], deadline_ms=1),
        f"keys has 1025 rows; at most {MAX_KEYS_PER_MESSAGE}",
    ),
    with_(LOOKUP, run_lengths=[2, 2]),
    with_(LOOKUP, run_lengths=[3, 0]),
    with_(LOOKUP, run_lengths=[4, -1]),
    (msgspec.structs.replace(LOOKUP, run_lengths=[3]), "1 runs, 2 slot sizes"),
    (msgspec.structs.replace(LOOKUP, run_is_prefix=[True]), "2 runs, 1 is_prefix"),
    with_(LOOKUP, run_slot_bytes=[0, 1]),
    with_(LOOKUP, run_slot_bytes=[1, MAX_EXTENT_BYTES + 1]),
    with_(LOOKUP, deadline_ms=-1),
    with_(LOOKUP, deadline_ms=MAX_DEADLINE_MS + 1),
    with_(LOOKUP_REPLY, states=bytes([1, 2, 1, 4])),
    (with_(LOOKUP_REPLY, states=bytes([1, 3, 1, 0]))[0], "slots"),
    with_(LOOKUP_REPLY, states=bytes(MAX_KEYS_PER_MESSAGE + 1)),
    with_(LOOKUP_REPLY, slots=SLOTS[:20]),
    with_(LOOKUP_REPLY, slots=SLOTS[:-1]),
    with_(LOOKUP_UPDATE, states=bytes([1, 2, 1])),
    with_(LOOKUP_UPDATE, indices=[7, 1]),
    with_(LOOKUP_UPDATE, indices=[7, 1, 1_024]),
    with_(LOOKUP_UPDATE, indices=[7, 1, -1]),
    with_(LOOKUP_UPDATE, indices=[7, 1, 7]),
    with_(LOOKUP_UPDATE, slots=b""),
    with_(UNPIN, op=-1),
    with_(UNPIN, lookup_op=-1),
    with_(RESERVE, keys=RESERVE.keys[:-16]),
    with_(RESERVE_REPLY, grants=bytes([0, 1, 3, 0])),
    with_(RESERVE_REPLY, slots=b""),
    with_(COMMIT, slab_id=b""),
    with_(COMMIT, slots=bytes(20 * (MAX_KEYS_PER_MESSAGE + 1))),
    with_(ABANDON, slab_id=b""),
    with_(ABANDON, slots=bytes(19)),
    with_(ABANDON, reserve_op=-1),
    with_(REPORT, counters={str(i): i for i in range(257)}),
    (Report(OP, {"x" * 256: 1}), "a counter's name has 256 bytes"),
    (Report(OP, {"x": -1}), "a counter is -1"),
    (Bye(op=OpId(-1)), "op"),
    info_with(node_id="x" * 256),
    info_with(epoch=MAX_EPOCH + 1),
    info_with(link_name="x" * 256),
    info_with(link_metadata=bytes(MAX_LINK_METADATA_BYTES + 1)),
    info_with(slab_id=b""),
    info_with(slab_address=-1),
    info_with(slab_bytes=2**20),
    info_with(host="x" * 256),
    info_with(kvray_version="x" * 256),
    info_with(format_version=-1),
    with_(NODE_HELLO, wall_clock_ms=-1),
    with_(NODE_HELLO_REPLY, term=-1),
    with_(NODE_HELLO_REPLY, accepted_epoch=-1),
    with_(NODE_HELLO_REPLY, roster_version=-1),
    with_(NODE_HELLO_REPLY, heartbeat_period_ms=0),
    with_(NODE_HELLO_REPLY, roster=[INFO] * (MAX_ROSTER_NODES + 1)),
    with_(ANNOUNCE, node_id="x" * 256),
    with_(ANNOUNCE, epoch=-1),
    with_(ANNOUNCE, term=-1),
    with_(ANNOUNCE, sequence=0),
    with_(ANNOUNCE, roster_version=-1),
    with_(ANNOUNCE, adds=bytes(32)),
    with_(ANNOUNCE, adds=bytes(41)),
    with_(ANNOUNCE, adds=ANNOUNCE.adds[:-9] + b"\2" + bytes(8)),
    with_(ANNOUNCE, adds=ANNOUNCE.adds * (MAX_CHANGES_PER_ANNOUNCE + 1)),
    with_(ANNOUNCE, removes=bytes(15)),
    with_(ANNOUNCE, removes=bytes(16 * (MAX_CHANGES_PER_ANNOUNCE + 1))),
    with_(ANNOUNCE, resync_part=-1),
    (msgspec.structs.replace(ANNOUNCE, resync_last=True), "the last part of no resync"),
    (msgspec.structs.replace(ANNOUNCE, resync_part=1), "a part of a resync has removes"),
    with_(ANNOUNCE, doubtful=bytes(15)),
    with_(ANNOUNCE, doubtful=bytes(16 * (MAX_DOUBTFUL_KEYS + 1))),
    with_(ANNOUNCE_REPLY, read=bytes(16 * (MAX_READ_KEYS + 1))),
    with_(ANNOUNCE_REPLY, spare=bytes(16 * (MAX_DOUBTFUL_KEYS + 1))),
    with_(ANNOUNCE_REPLY, term=-1),
    with_(ANNOUNCE_REPLY, roster_version=-1),
    with_(ANNOUNCE_REPLY, heartbeat_period_ms=60_001),
    with_(ANNOUNCE_REPLY, news=RosterNews(0, [INFO] * (MAX_ROSTER_NODES + 1))),
    with_(ANNOUNCE_REPLY, news=RosterNews(1, [], [NodeId("b")] * (MAX_ROSTER_NODES + 1))),
    with_(ANNOUNCE_REPLY, news=RosterNews(1, [], [NodeId("b" * (MAX_NAME_BYTES + 1))])),
    with_(ANNOUNCE_REPLY, news=RosterNews(-1, [])),
    with_(LOCATE, node_id="x" * 256),
    with_(LOCATE, epoch=-1),
    with_(LOCATE, keys=bytes(16 * (MAX_LOCATE_KEYS + 1))),
    with_(LOCATE_REPLY, term=-1),
    with_(LOCATE_REPLY, nodes=[]),
    with_(LOCATE_REPLY, nodes=["x" * 256]),
    with_(LOCATE_REPLY, epochs=[-1]),
    (LocateReply(Term(1), [NodeId("a")] * 2_000, [Epoch(1)] * 2_000, b""), "the count of nodes"),
    with_(LOCATE_REPLY, locations=LOCATE_REPLY.locations[:-1]),
    with_(
        LOCATE_REPLY, locations=pack_locations([(0, 1, SlotIndex(0), 1, Generation(1), Maker(1))])
    ),
    with_(
        LOCATE_REPLY, locations=pack_locations([(0, 0, SlotIndex(0), 0, Generation(1), Maker(1))])
    ),
    with_(
        LOCATE_REPLY,
        locations=LOCATE_REPLY.locations * (MAX_LOCATE_KEYS * MAX_SOURCES_PER_KEY + 1),
    ),
    (
        msgspec.structs.replace(
            LOCATE_REPLY,
            locations=pack_locations(
                [(MAX_LOCATE_KEYS, 0, SlotIndex(0), 1, Generation(1), Maker(1))]
            ),
        ),
        "key_index",
    ),
    with_(
        LOCATE_REPLY,
        locations=pack_locations([LOCATION, (1, 0, SlotIndex(0), 1, Generation(1), Maker(1))]),
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_comes_back_equal_and_of_its_type(message: Message) -> None:
    assert read(encode(message)) == message
    assert type(read(encode(message), expect=type(message))) is type(message)


def test_every_message_has_an_example_here() -> None:
    assert {type(message) for message in MESSAGES} == set(Message.__args__)


@pytest.mark.parametrize(("message", "field"), BROKEN)
def test_a_message_that_breaks_one_rule_is_the_other_sides_fault(
    message: Message, field: str
) -> None:
    data = bytes([FORMAT_VERSION]) + msgspec.msgpack.encode(message)
    with pytest.raises(RemoteProtocolError, match=field) as caught:
        decode(data, max_bytes=2 * MAX_CALL_BYTES, expect=Message)
    assert not isinstance(caught.value, VersionMismatchError)
    with pytest.raises(AssertionError, match="may not be sent"):
        encode(message)


def test_a_request_is_no_answer_and_an_answer_is_no_request() -> None:
    assert read(encode(LOOKUP), LocalRequest) == LOOKUP
    for wrong in (LocalAnswer, ControlMessage, Reserve):
        with pytest.raises(RemoteProtocolError, match="Lookup must not be said here"):
            read(encode(LOOKUP), wrong)


def test_another_version_is_named_before_anything_else_is_believed() -> None:
    for version in (0, FORMAT_VERSION + 1, 255):
        with pytest.raises(VersionMismatchError, match=f"version {version}, this one"):
            read(bytes([version]) + b"whatever")


def test_nothing_and_too_much_are_refused_unread() -> None:
    data = encode(LOOKUP)
    with pytest.raises(RemoteProtocolError, match="0 bytes"):
        read(b"")
    with pytest.raises(RemoteProtocolError, match=f"{len(data)} bytes"):
        decode(data, max_bytes=len(data) - 1, expect=Message)


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"\xc1",
        b"\x81\xa4type\xa3now",  # an unknown type
        b"\x81\xa4type\xa3ack",  # a field is missing
        b"\x82\xa4type\xa3ack\xa2op\xa17",  # a text where a number belongs
        b"\x82\xa4type\xa3ack\xa2op\x07\x00",  # something behind it
        b"\x83\xa4type\xa3ack\xa2op\x07\xa1x" + b"\x91" * 100_000,  # nested without end
        b"\x83\xa4type\xa7refused\xa2op\x07\xa6reason\xa2\xff\xfe",  # no utf-8
        b"\x82\xa4type\xa3ack\xa2op\xcb" + bytes(8),  # 0.0 is no number of an operation
        b"\xdf\xff\xff\xff\xff",  # four thousand million fields
    ],
)
def test_what_is_no_message_is_the_other_sides_fault(rest: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not a message"):
        read(bytes([FORMAT_VERSION]) + rest)


def test_the_largest_messages_fit_their_limits() -> None:
    keys = bytes(16 * MAX_KEYS_PER_MESSAGE)
    ones = [1] * MAX_KEYS_PER_MESSAGE
    sizes = [MAX_EXTENT_BYTES] * MAX_KEYS_PER_MESSAGE
    slots = b"\xff" * 20 * MAX_KEYS_PER_MESSAGE
    indices = list(range(MAX_KEYS_PER_MESSAGE))
    largest: list[Message] = [
        msgspec.structs.replace(HELLO, writing=b"\xff" * 20 * MAX_WRITING_LISTED),
        Lookup(OP, keys, ones, [True] * len(ones), sizes, deadline_ms=1),
        Reserve(OP, keys, ones, sizes),
        LookupReply(OP, b"\1" * len(ones), slots),
        LookupUpdate(OP, indices, b"\1" * len(ones), slots),
        Commit(OP, SLAB, slots),
        Report(OP, {f"{i:0255}": 2**64 - 1 for i in range(256)}),
    ]
    assert all(len(encode(message)) <= MAX_MESSAGE_BYTES for message in largest)

    info = msgspec.structs.replace(
        INFO,
        node_id=NodeId("n" * MAX_NAME_BYTES),
        link_name="l" * MAX_NAME_BYTES,
        link_metadata=bytes(MAX_LINK_METADATA_BYTES),
        slab_address=2**64 - 1,
        slab_bytes=2**43,
        extent_bytes=2**30,
        host="h" * MAX_NAME_BYTES,
        kvray_version="v" * MAX_NAME_BYTES,
    )
    locations = pack_locations([(MAX_LOCATE_KEYS - 1, 0, SlotIndex(1), 1, Generation(1), Maker(1))])
    for message in (
        msgspec.structs.replace(NODE_HELLO_REPLY, roster=[info] * MAX_ROSTER_NODES),
        msgspec.structs.replace(
            ANNOUNCE,
            adds=ANNOUNCE.adds * MAX_CHANGES_PER_ANNOUNCE,
            removes=bytes(16 * MAX_CHANGES_PER_ANNOUNCE),
        ),
        AnnounceReply(
            AnnounceStatus.OK,
            Term(MAX_EPOCH),
            2**64 - 1,
            MAX_PERIOD_MS,
            news=RosterNews(0, [info] * MAX_ROSTER_NODES),
            read=bytes(16 * MAX_READ_KEYS),
            spare=bytes(16 * MAX_DOUBTFUL_KEYS),
            split=["m" * MAX_TEXT_BYTES] * MAX_SPLIT_MODELS,
            makers=pack_makers([(Namespace(b"n" * 16), Maker(2**64 - 1))] * MAX_MAKERS_SAID),
        ),
        LocateReply(
            Term(1),
            [NodeId("n" * MAX_NAME_BYTES)] * MAX_ROSTER_NODES,
            [Epoch(MAX_EPOCH)] * MAX_ROSTER_NODES,
            locations * (MAX_LOCATE_KEYS * MAX_SOURCES_PER_KEY),
        ),
    ):
        assert read(encode(message)) == message


def test_a_key_that_ends_in_zeros_keeps_them() -> None:
    keys = [BlockKey(bytes(16)), BlockKey(b"k" + bytes(15))]
    assert unpack_keys(pack_keys(keys)) == keys
    rows = [
        (key, SlotIndex(2**32 - 1), 2**32 - 1, Generation(2**64 - 1), Origin.COPY, Maker(2**64 - 1))
        for key in keys
    ]
    assert unpack_entries(pack_entries(rows)) == rows


def test_packed_rows_come_back_as_plain_tuples() -> None:
    slots = [
        (SlotIndex(0), Generation(2**64 - 1), 2**64 - 1),
        (SlotIndex(2**32 - 1), Generation(0), 0),
    ]
    assert unpack_slots(pack_slots(slots)) == slots
    locations = [
        (2**32 - 1, 2**16 - 1, SlotIndex(2**32 - 1), 2**32 - 1, Generation(2**64 - 1), Maker(5))
    ]
    assert unpack_locations(pack_locations(locations)) == locations
    assert unpack_keys(b"") == []
    assert unpack_slots(b"") == []
    assert unpack_entries(b"") == []


def test_a_key_of_another_length_is_never_packed() -> None:
    with pytest.raises(AssertionError, match="another length"):
        pack_keys([BlockKey(bytes(15))])
    with pytest.raises(AssertionError, match="another length"):
        pack_entries(
            [(BlockKey(bytes(17)), SlotIndex(0), 1, Generation(1), Origin.ORIGINAL, Maker(1))]
        )
