"""Goal: whatever bytes come, `decode` gives a well-formed message or RemoteProtocolError.

Method: hypothesis makes messages of every kind (they come back equal), mutates their bytes, and
sends arbitrary ones. "Well-formed" is checked by encoding the result again, which asserts it.
"""

from collections.abc import Sequence
from typing import Any, cast

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvray.core.codec import (
    SlotRow,
    decode,
    encode,
    pack_entries,
    pack_keys,
    pack_locations,
    pack_slots,
    unpack_entries,
    unpack_keys,
    unpack_locations,
    unpack_slots,
)
from kvray.core.ghosts import Why
from kvray.core.ids import BlockKey, ClientId, Role
from kvray.core.layout import FORMAT_VERSION, MAX_EXTENT_BYTES
from kvray.core.messages import (
    MAX_CALL_BYTES,
    MAX_COMPUTE_US,
    MAX_DEADLINE_MS,
    MAX_EPOCH,
    MAX_NOISE,
    MAX_PERIOD_MS,
    Abandon,
    Ack,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    Bye,
    ChunkShape,
    Commit,
    EngineUse,
    Grant,
    Hello,
    HelloReply,
    Introduce,
    KeyState,
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
from kvray.core.reasons import MissReason
from kvray.errors import RemoteProtocolError

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 2**32 - 1)
slot_sizes = st.integers(1, MAX_EXTENT_BYTES)
epochs = st.integers(0, MAX_EPOCH)
names = st.text(max_size=20).filter(str.isprintable)
key = st.binary(min_size=16, max_size=16)
slab_id = namespaces = key
slot_rows = st.lists(st.tuples(u32, u64, u64), max_size=6)
entry_rows = st.lists(st.tuples(key, u32, sizes, u64, st.sampled_from([0, 1]), u64), max_size=6)
slots = slot_rows.map(lambda rows: pack_slots(cast("list[SlotRow]", rows)))
keys = st.lists(key.map(BlockKey), max_size=6).map(pack_keys)
PLACED: set[int] = {KeyState.HIT, KeyState.COMING}
geometry = st.tuples(st.integers(2**24, 2**40), st.sampled_from([2**16, 2**20, 3 * 4_096 * 9]))


@st.composite
def runs(draw: Any) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, 4), max_size=4))
    count = len(lengths)
    return {
        "keys": draw(st.binary(min_size=16 * sum(lengths), max_size=16 * sum(lengths))),
        "run_lengths": lengths,
        "run_slot_bytes": draw(st.lists(slot_sizes, min_size=count, max_size=count)),
    }


@st.composite
def coded(draw: Any, codes: list[int], placed: set[int], name: str) -> dict[str, bytes]:
    """States or grants, and one slot for each that has one."""
    values = bytes(draw(st.lists(st.sampled_from(codes), max_size=6)))
    count = sum(value in placed for value in values)
    rows = draw(st.lists(st.tuples(u32, u64, u64), min_size=count, max_size=count))
    return {name: values, "slots": pack_slots(rows)}


def causes(draw: Any, indices: Sequence[int]) -> dict[int, MissReason]:
    """Of some of these."""
    if not indices:
        return {}
    return cast(
        "dict[int, MissReason]",
        draw(st.dictionaries(st.sampled_from(indices), st.sampled_from(MissReason), max_size=3)),
    )


@st.composite
def lookups(draw: Any) -> Lookup:
    cut = draw(runs())
    count = len(cut["run_lengths"])
    return Lookup(
        op=draw(u64),
        **cut,
        run_is_prefix=draw(st.lists(st.booleans(), min_size=count, max_size=count)),
        deadline_ms=draw(st.integers(0, MAX_DEADLINE_MS)),
        fetch=draw(st.booleans()),
        key_compute_us=draw(st.integers(0, MAX_COMPUTE_US)),
        may_audit=draw(st.booleans()),
    )


@st.composite
def updates(draw: Any) -> LookupUpdate:
    answer = draw(coded([KeyState.MISS, KeyState.HIT, KeyState.COMING], PLACED, "states"))
    count = len(answer["states"])
    index = st.integers(0, 1_023)
    indices = draw(st.lists(index, unique=True, min_size=count, max_size=count))
    return LookupUpdate(op=draw(u64), indices=indices, **answer, causes=causes(draw, indices))


@st.composite
def lookup_replies(draw: Any) -> LookupReply:
    answer = draw(coded(list(KeyState), PLACED, "states"))
    return LookupReply(op=draw(u64), **answer, causes=causes(draw, range(len(answer["states"]))))


@st.composite
def infos(draw: Any) -> NodeInfo:
    slab_bytes, extent_bytes = draw(geometry)
    return NodeInfo(
        node_id=draw(names),
        epoch=draw(epochs),
        link_name=draw(names),
        link_metadata=draw(st.binary(max_size=40)),
        slab_id=draw(slab_id),
        slab_address=draw(u64),
        slab_bytes=slab_bytes,
        extent_bytes=extent_bytes,
        host=draw(names),
        kvray_version=draw(names),
        format_version=draw(u32),
    )


@st.composite
def announces(draw: Any) -> Announce:
    part = draw(st.integers(0, 3))
    return Announce(
        node_id=draw(names),
        epoch=draw(epochs),
        term=draw(epochs),
        sequence=draw(st.integers(1, 2**64 - 1)),
        roster_version=draw(u64),
        adds=pack_entries(draw(entry_rows)),
        removes=b"" if part else draw(keys),
        resync_part=part,
        resync_last=bool(part) and draw(st.booleans()),
        doubtful=draw(keys),
        in_use=draw(st.booleans()),
        engines=draw(
            st.none()
            | st.lists(st.builds(EngineUse, model=names, namespace=namespaces), max_size=3)
        ),
    )


@st.composite
def locate_replies(draw: Any) -> LocateReply:
    nodes = draw(st.lists(names, min_size=1, max_size=4))
    index = st.integers(0, 20)
    row = st.tuples(index, st.integers(0, len(nodes) - 1), u32, sizes, u64, u64)
    return LocateReply(
        term=draw(epochs),
        nodes=nodes,
        epochs=draw(st.lists(epochs, min_size=len(nodes), max_size=len(nodes))),
        locations=pack_locations(sorted(draw(st.lists(row, max_size=6)))),
        gone=bytes(draw(st.lists(st.sampled_from(Why), max_size=6))),
    )


said = {
    "namespace": namespaces,
    "fields": st.dictionaries(names, names, max_size=3),
    "maker": u64,
    "chunks": st.lists(
        st.builds(
            lambda piece_bytes, count, dtype: ChunkShape(piece_bytes * count, piece_bytes, dtype),
            st.integers(1, 2**20),
            st.integers(1, 64),
            names,
        ),
        max_size=3,
    ),
    "noise": st.builds(NoiseLevels, st.floats(0, MAX_NOISE), st.floats(0, MAX_NOISE)),
}
rosters = st.lists(infos(), max_size=3)
periods = st.integers(1, MAX_PERIOD_MS)
clients = st.builds(ClientId, pid=st.integers(1, 2**32 - 1), start_ticks=u64, nonce=u64)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Hello,
        op=u64,
        client=clients,
        role=st.sampled_from(Role),
        engine_nonce=u64,
        label=names,
        slab_id=slab_id,
        writing=slots,
        model=names,
        **said,
    ),
    st.builds(Introduce, op=u64, **said),
    st.builds(
        lambda op, node_id, epoch, slab, cut: HelloReply(op, node_id, epoch, slab, *cut),
        u64,
        names,
        epochs,
        slab_id,
        geometry,
    ),
    st.builds(Refused, op=u64, reason=names, fatal=st.booleans()),
    lookups(),
    lookup_replies(),
    updates(),
    st.builds(Unpin, op=u64, lookup_op=u64),
    st.builds(lambda op, cut: Reserve(op=op, **cut), u64, runs()),
    st.builds(
        lambda op, answer: ReserveReply(op=op, **answer),
        u64,
        coded(list(Grant), {Grant.GRANTED}, "grants"),
    ),
    st.builds(Commit, op=u64, slab_id=slab_id, slots=slots),
    st.builds(Abandon, op=u64, slab_id=slab_id, slots=slots, reserve_op=u64),
    st.builds(Report, op=u64, counters=st.dictionaries(names, u64, max_size=5)),
    st.builds(Bye, op=u64),
    st.builds(Ack, op=u64),
    st.builds(NodeHello, info=infos(), wall_clock_ms=epochs),
    st.builds(
        NodeHelloReply,
        term=epochs,
        accepted_epoch=epochs,
        roster_version=u64,
        roster=rosters,
        heartbeat_period_ms=periods,
    ),
    announces(),
    st.builds(
        AnnounceReply,
        status=st.sampled_from(AnnounceStatus),
        term=epochs,
        roster_version=u64,
        heartbeat_period_ms=periods,
        news=st.none()
        | st.builds(RosterNews, since=u64, joined=rosters, left=st.lists(names, max_size=3)),
        read=keys,
        spare=keys,
        split=st.lists(names, max_size=3),
    ),
    st.builds(Locate, node_id=names, epoch=epochs, keys=keys),
    locate_replies(),
)


def read(data: bytes) -> Message | None:
    """The message, or None for what was refused. Anything else that is raised fails the test."""
    try:
        message = decode(data, max_bytes=MAX_CALL_BYTES, expect=Message)
    except RemoteProtocolError:
        return None
    encode(message)  # asserts that it is well formed
    return message


@settings(max_examples=400)
@given(messages)
def test_every_message_comes_back_equal(message: Message) -> None:
    data = encode(message)
    assert decode(data, max_bytes=len(data), expect=type(message)) == message
    assert decode(memoryview(data), max_bytes=len(data), expect=Message) == message


@settings(max_examples=400)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_message_or_refused(data: bytes) -> None:
    read(data)
    read(bytes([FORMAT_VERSION]) + data)


@settings(max_examples=600)
@given(messages, st.data())
def test_mutated_messages_are_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    mutated = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated)))
        piece = data.draw(st.binary(max_size=4))
        mutated[at : at + data.draw(st.integers(0, 4))] = piece
    read(bytes(mutated))


json_like: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=600)
@given(messages, st.data())
def test_a_field_of_another_value_or_type_is_a_message_or_refused(
    message: Message, data: st.DataObject
) -> None:
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(json_like)
    read(bytes([FORMAT_VERSION]) + msgspec.msgpack.encode(fields))


@given(
    slot_rows,
    entry_rows,
    st.lists(key),
    st.lists(st.tuples(u32, st.integers(0, 9), u32, u32, u64, u64)),
)
def test_packed_rows_come_back_equal(
    slot_list: Any, entry_list: Any, key_list: Any, location_list: Any
) -> None:
    assert unpack_slots(pack_slots(slot_list)) == slot_list
    assert unpack_entries(pack_entries(entry_list)) == entry_list
    assert unpack_keys(pack_keys(key_list)) == key_list
    assert unpack_locations(pack_locations(location_list)) == location_list
