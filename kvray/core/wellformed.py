"""What a message must be like so that it can be used without another look at it.

Every packed field is whole rows, every count is within its limit, lists that belong together have
equal lengths, numbers fit their field, codes have a meaning. Types are the codec's: a field that is
no bytes never gets here.

Not checked: whether a slot, a key or an operation exists. Its owner knows, and it is a value there.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np

from kvray.core.ghosts import Why
from kvray.core.ids import KEY_BYTES, NAMESPACE_BYTES, SLAB_ID_BYTES, Origin
from kvray.core.layout import MAX_EXTENT_BYTES, Geometry
from kvray.core.messages import (
    ENTRY_DTYPE,
    LOCATION_DTYPE,
    MAKER_DTYPE,
    MAX_CHANGES_PER_ANNOUNCE,
    MAX_CHUNK_SHAPES,
    MAX_COMPUTE_US,
    MAX_COUNTERS,
    MAX_DEADLINE_MS,
    MAX_DOUBTFUL_KEYS,
    MAX_ENGINE_USES,
    MAX_EPOCH,
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    MAX_KEYS_PER_MESSAGE,
    MAX_LINK_METADATA_BYTES,
    MAX_LOCATE_KEYS,
    MAX_MAKERS_SAID,
    MAX_NAME_BYTES,
    MAX_NOISE,
    MAX_PERIOD_MS,
    MAX_READ_KEYS,
    MAX_ROSTER_NODES,
    MAX_SOURCES_PER_KEY,
    MAX_SPLIT_MODELS,
    MAX_TEXT_BYTES,
    MAX_WRITING_LISTED,
    SLOT_DTYPE,
    Abandon,
    Ack,
    Announce,
    AnnounceReply,
    Bye,
    Commit,
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
    Refused,
    Report,
    Reserve,
    ReserveReply,
    Unpin,
)
from kvray.errors import ConfigError, RemoteProtocolError

MAX_U64 = 2**64 - 1
MAX_U32 = 2**32 - 1

# Made once: an enum is slow to go through, and these are looked at in each message of an engine.
_STATES, _GRANTS, _WHYS = bytes(KeyState), bytes(Grant), bytes(Why)
_CHANGED = bytes([KeyState.HIT, KeyState.MISS, KeyState.COMING])
_HIT, _COMING, _GRANTED = int(KeyState.HIT), int(KeyState.COMING), int(Grant.GRANTED)
_SLOT_BYTES = SLOT_DTYPE.itemsize


def check_message(message: Message) -> None:
    """Raises RemoteProtocolError, which names the field."""
    _CHECKS[type(message)](message)


# -- what a message is made of -----------------------------------------------------------------


def _require(condition: bool, fault: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not condition:
        raise RemoteProtocolError(fault)


def _number(name: str, value: int, most: int, *, least: int = 0) -> None:
    if not least <= value <= most:
        raise RemoteProtocolError(f"{name} is {value}; it must be between {least} and {most}")


def _text(name: str, value: str, limit_bytes: int) -> None:
    size_bytes = len(value.encode())
    if size_bytes > limit_bytes:
        raise RemoteProtocolError(f"{name} has {size_bytes} bytes; at most {limit_bytes}")


def _name(name: str, value: str, limit_bytes: int) -> None:
    """A text that is shown to people, in logs and terminals: nothing in it moves a cursor, ends a
    line or is swallowed.
    """
    _text(name, value, limit_bytes)
    if not value.isprintable():
        raise RemoteProtocolError(f"{name} is {value[:80]!r}; it must have printable characters")


def _exactly(name: str, value: bytes, *lengths_bytes: int) -> None:
    if len(value) not in lengths_bytes:
        raise RemoteProtocolError(f"{name} has {len(value)} bytes; it must have {lengths_bytes}")


def _rows(name: str, packed: bytes, row_bytes: int, most: int) -> int:
    """How many rows there are."""
    count, rest = divmod(len(packed), row_bytes)
    if rest:
        raise RemoteProtocolError(f"{name} has {len(packed)} bytes, no multiple of {row_bytes}")
    if count > most:
        raise RemoteProtocolError(f"{name} has {count} rows; at most {most}")
    return count


def _slots(packed: bytes, count: int) -> None:
    if len(packed) != count * _SLOT_BYTES:
        rows = _rows("slots", packed, _SLOT_BYTES, MAX_KEYS_PER_MESSAGE)
        raise RemoteProtocolError(f"slots has {rows} rows; {count} belong to it")


def _codes(name: str, codes: bytes, allowed: bytes) -> None:
    if len(codes) > MAX_KEYS_PER_MESSAGE:
        raise RemoteProtocolError(f"{name} has {len(codes)} rows; at most {MAX_KEYS_PER_MESSAGE}")
    if unknown := codes.translate(None, allowed):
        raise RemoteProtocolError(f"{name} has the code {unknown[0]}; one of {list(allowed)}")


def _runs(keys: bytes, run_lengths: list[int], run_slot_bytes: list[int]) -> None:
    count = _rows("keys", keys, KEY_BYTES, MAX_KEYS_PER_MESSAGE)
    # Runs of one key and more that add up to count: so there are at most count of them.
    if run_lengths and min(run_lengths) < 1:
        raise RemoteProtocolError(f"run_lengths has {min(run_lengths)}; a run has a key")
    if sum(run_lengths) != count:
        raise RemoteProtocolError(f"run_lengths adds up to {sum(run_lengths)}; {count} keys")
    if len(run_slot_bytes) != len(run_lengths):
        raise RemoteProtocolError(f"{len(run_lengths)} runs, {len(run_slot_bytes)} slot sizes")
    if run_slot_bytes:
        _number("run_slot_bytes", min(run_slot_bytes), MAX_EXTENT_BYTES, least=1)
        _number("run_slot_bytes", max(run_slot_bytes), MAX_EXTENT_BYTES, least=1)


def _geometry(slab_bytes: int, extent_bytes: int) -> None:
    _number("slab_bytes", slab_bytes, MAX_U64)
    try:
        Geometry(slab_bytes, extent_bytes)
    except ConfigError as exc:
        raise RemoteProtocolError(f"no slab is cut so: {exc}") from exc


# -- engine and NodeStore ----------------------------------------------------------------------


def _check_hello(m: Hello) -> None:
    _number("op", m.op, MAX_U64)
    _number("pid", m.client.pid, MAX_U32, least=1)
    _number("start_ticks", m.client.start_ticks, MAX_U64)
    _number("nonce", m.client.nonce, MAX_U64)
    _number("engine_nonce", m.engine_nonce, MAX_U64)
    _name("label", m.label, MAX_TEXT_BYTES)
    _exactly("slab_id", m.slab_id, 0, SLAB_ID_BYTES)
    _name("model", m.model, MAX_TEXT_BYTES)
    _introduction(m)
    count = _rows("writing", m.writing, SLOT_DTYPE.itemsize, MAX_WRITING_LISTED)
    _require(bool(m.slab_id) or not count, "writing names slots of no slab")


def _check_introduce(m: Introduce) -> None:
    _number("op", m.op, MAX_U64)
    _introduction(m)


def _introduction(m: Hello | Introduce) -> None:
    _exactly("namespace", m.namespace, 0, NAMESPACE_BYTES)
    _number("the count of fields", len(m.fields), MAX_FIELDS)
    for name, value in m.fields.items():
        _name("a field's name", name, MAX_NAME_BYTES)
        _name(f"field {name}", value, MAX_FIELD_BYTES)
    _number("maker", m.maker, MAX_U64)
    _number("the count of chunks", len(m.chunks), MAX_CHUNK_SHAPES)
    for shape in m.chunks:
        _number("a chunk's slot_bytes", shape.slot_bytes, MAX_EXTENT_BYTES, least=1)
        _number("a chunk's piece_bytes", shape.piece_bytes, shape.slot_bytes, least=1)
        whole = shape.slot_bytes % shape.piece_bytes == 0
        _require(whole, "a chunk of slot_bytes that are no whole pieces of piece_bytes")
        _name("a chunk's dtype", shape.dtype, MAX_NAME_BYTES)
    for name, level in (("alone", m.noise.alone), ("batched", m.noise.batched)):
        _require(0.0 <= level <= MAX_NOISE, f"noise {name} is {level}; at most {MAX_NOISE}")


def _check_hello_reply(m: HelloReply) -> None:
    _number("op", m.op, MAX_U64)
    _name("node_id", m.node_id, MAX_NAME_BYTES)
    _number("epoch", m.epoch, MAX_EPOCH)
    _exactly("slab_id", m.slab_id, SLAB_ID_BYTES)
    _geometry(m.slab_bytes, m.extent_bytes)


def _check_refused(m: Refused) -> None:
    _number("op", m.op, MAX_U64)
    _text("reason", m.reason, MAX_TEXT_BYTES)


def _check_lookup(m: Lookup) -> None:
    _number("op", m.op, MAX_U64)
    _runs(m.keys, m.run_lengths, m.run_slot_bytes)
    if len(m.run_is_prefix) != len(m.run_lengths):
        raise RemoteProtocolError(f"{len(m.run_lengths)} runs, {len(m.run_is_prefix)} is_prefix")
    _number("deadline_ms", m.deadline_ms, MAX_DEADLINE_MS)
    _number("key_compute_us", m.key_compute_us, MAX_COMPUTE_US)


def _check_lookup_reply(m: LookupReply) -> None:
    _number("op", m.op, MAX_U64)
    _codes("states", m.states, _STATES)
    _slots(m.slots, _placed(m.states))
    if m.causes:
        _number("causes", min(m.causes), len(m.states) - 1)
        _number("causes", max(m.causes), len(m.states) - 1)


def _check_lookup_update(m: LookupUpdate) -> None:
    _number("op", m.op, MAX_U64)
    _codes("states", m.states, _CHANGED)
    if len(m.indices) != len(m.states):
        raise RemoteProtocolError(f"{len(m.indices)} indices, {len(m.states)} states")
    if m.indices:
        _number("indices", min(m.indices), MAX_KEYS_PER_MESSAGE - 1)
        _number("indices", max(m.indices), MAX_KEYS_PER_MESSAGE - 1)
    _require(len(set(m.indices)) == len(m.indices), "indices names a key twice")
    _require(m.causes.keys() <= set(m.indices), "causes names a key that is not settled")
    _slots(m.slots, _placed(m.states))


def _placed(states: bytes) -> int:
    """How many of these come with a place."""
    return states.count(_HIT) + states.count(_COMING)


def _check_unpin(m: Unpin) -> None:
    _number("op", m.op, MAX_U64)
    _number("lookup_op", m.lookup_op, MAX_U64)


def _check_reserve(m: Reserve) -> None:
    _number("op", m.op, MAX_U64)
    _runs(m.keys, m.run_lengths, m.run_slot_bytes)


def _check_reserve_reply(m: ReserveReply) -> None:
    _number("op", m.op, MAX_U64)
    _codes("grants", m.grants, _GRANTS)
    _slots(m.slots, m.grants.count(_GRANTED))


def _check_commit(m: Commit) -> None:
    _number("op", m.op, MAX_U64)
    _exactly("slab_id", m.slab_id, SLAB_ID_BYTES)
    _rows("slots", m.slots, SLOT_DTYPE.itemsize, MAX_KEYS_PER_MESSAGE)


def _check_abandon(m: Abandon) -> None:
    _number("op", m.op, MAX_U64)
    _exactly("slab_id", m.slab_id, SLAB_ID_BYTES)
    _rows("slots", m.slots, SLOT_DTYPE.itemsize, MAX_KEYS_PER_MESSAGE)
    _number("reserve_op", m.reserve_op, MAX_U64)


def _check_report(m: Report) -> None:
    _number("op", m.op, MAX_U64)
    _number("the count of counters", len(m.counters), MAX_COUNTERS)
    for name, value in m.counters.items():
        _name("a counter's name", name, MAX_NAME_BYTES)
        _number("a counter", value, MAX_U64)


def _check_op(m: Bye | Ack) -> None:
    _number("op", m.op, MAX_U64)


# -- NodeStore and directory -------------------------------------------------------------------


def _roster(name: str, roster: list[NodeInfo]) -> None:
    if len(roster) > MAX_ROSTER_NODES:
        raise RemoteProtocolError(f"{name} has {len(roster)} nodes; at most {MAX_ROSTER_NODES}")
    for info in roster:
        _check_node_info(info)


# A roster of a thousand nodes is said again and again with few changes: 1 us an info, and not 8.
@lru_cache(maxsize=2 * MAX_ROSTER_NODES)
def _check_node_info(m: NodeInfo) -> None:
    _name("node_id", m.node_id, MAX_NAME_BYTES)
    _number("epoch", m.epoch, MAX_EPOCH)
    _name("link_name", m.link_name, MAX_NAME_BYTES)
    _rows("link_metadata", m.link_metadata, 1, MAX_LINK_METADATA_BYTES)
    _exactly("slab_id", m.slab_id, SLAB_ID_BYTES)
    _number("slab_address", m.slab_address, MAX_U64)
    _geometry(m.slab_bytes, m.extent_bytes)
    _name("host", m.host, MAX_NAME_BYTES)
    _name("kvray_version", m.kvray_version, MAX_NAME_BYTES)
    _number("format_version", m.format_version, MAX_U32)


def _check_node_hello(m: NodeHello) -> None:
    _check_node_info(m.info)
    _number("wall_clock_ms", m.wall_clock_ms, MAX_EPOCH)
    _number("sequence", m.sequence, MAX_U64 - 1)


def _check_node_hello_reply(m: NodeHelloReply) -> None:
    _number("term", m.term, MAX_EPOCH)
    _number("accepted_epoch", m.accepted_epoch, MAX_EPOCH)
    _number("roster_version", m.roster_version, MAX_U64)
    _number("heartbeat_period_ms", m.heartbeat_period_ms, MAX_PERIOD_MS, least=1)
    _roster("roster", m.roster)


def _check_announce(m: Announce) -> None:
    _name("node_id", m.node_id, MAX_NAME_BYTES)
    _number("epoch", m.epoch, MAX_EPOCH)
    _number("term", m.term, MAX_EPOCH)
    _number("sequence", m.sequence, MAX_U64, least=1)
    _number("roster_version", m.roster_version, MAX_U64)
    if _rows("adds", m.adds, ENTRY_DTYPE.itemsize, MAX_CHANGES_PER_ANNOUNCE):
        adds = np.frombuffer(m.adds, ENTRY_DTYPE)
        _require(bool((adds["bytes"] > 0).all()), "adds has a block of 0 bytes")
        _require(bool((adds["origin"] <= max(Origin)).all()), "adds has an unknown origin")
    removes = _rows("removes", m.removes, KEY_BYTES, MAX_CHANGES_PER_ANNOUNCE)
    _number("resync_part", m.resync_part, MAX_U32)
    _require(m.resync_part > 0 or not m.resync_last, "the last part of no resync")
    _require(m.resync_part == 0 or not removes, "a part of a resync has removes")
    _rows("doubtful", m.doubtful, KEY_BYTES, MAX_DOUBTFUL_KEYS)
    _number("the count of engines", len(m.engines or ()), MAX_ENGINE_USES)
    for engine in m.engines or ():
        _name("an engine's model", engine.model, MAX_TEXT_BYTES)
        _exactly("an engine's namespace", engine.namespace, 0, NAMESPACE_BYTES)
        _number("an engine's maker", engine.maker, MAX_U64)


def _check_announce_reply(m: AnnounceReply) -> None:
    _number("term", m.term, MAX_EPOCH)
    _number("roster_version", m.roster_version, MAX_U64)
    _number("heartbeat_period_ms", m.heartbeat_period_ms, MAX_PERIOD_MS, least=1)
    if m.news is not None:
        _number("news.since", m.news.since, MAX_U64)
        _roster("news.joined", m.news.joined)
        _number("the count of news.left", len(m.news.left), MAX_ROSTER_NODES)
        for node_id in m.news.left:
            _name("news.left", node_id, MAX_NAME_BYTES)
    _rows("read", m.read, KEY_BYTES, MAX_READ_KEYS)
    _rows("spare", m.spare, KEY_BYTES, MAX_DOUBTFUL_KEYS)
    _number("the count of split models", len(m.split), MAX_SPLIT_MODELS)
    for model in m.split:
        _name("a split model", model, MAX_TEXT_BYTES)
    _rows("makers", m.makers, MAKER_DTYPE.itemsize, MAX_MAKERS_SAID)


def _check_locate(m: Locate) -> None:
    _name("node_id", m.node_id, MAX_NAME_BYTES)
    _number("epoch", m.epoch, MAX_EPOCH)
    _rows("keys", m.keys, KEY_BYTES, MAX_LOCATE_KEYS)


def _check_locate_reply(m: LocateReply) -> None:
    _number("term", m.term, MAX_EPOCH)
    _number("the count of nodes", len(m.nodes), MAX_ROSTER_NODES)
    _require(len(m.nodes) == len(m.epochs), f"{len(m.nodes)} nodes, {len(m.epochs)} epochs")
    for node_id in m.nodes:
        _name("nodes", node_id, MAX_NAME_BYTES)
    for epoch in m.epochs:
        _number("epochs", epoch, MAX_EPOCH)
    most = MAX_LOCATE_KEYS * MAX_SOURCES_PER_KEY
    if _rows("locations", m.locations, LOCATION_DTYPE.itemsize, most):
        rows = np.frombuffer(m.locations, LOCATION_DTYPE)
        _number("key_index", int(rows["key_index"].max()), MAX_LOCATE_KEYS - 1)
        in_order = (rows["key_index"][1:] >= rows["key_index"][:-1]).all()
        _require(bool(in_order), "locations is not in the order of the keys")
        _require(int(rows["node"].max()) < len(m.nodes), "locations names an unknown node")
        _require(bool((rows["bytes"] > 0).all()), "locations has a block of 0 bytes")
    if len(m.gone) > MAX_LOCATE_KEYS:
        raise RemoteProtocolError(f"gone has {len(m.gone)} codes; at most {MAX_LOCATE_KEYS}")
    _require(not m.gone.translate(None, _WHYS), "gone has an unknown code")


_CHECKS: Final[dict[type, Callable[[Any], None]]] = {
    Hello: _check_hello,
    HelloReply: _check_hello_reply,
    Introduce: _check_introduce,
    Refused: _check_refused,
    Lookup: _check_lookup,
    LookupReply: _check_lookup_reply,
    LookupUpdate: _check_lookup_update,
    Unpin: _check_unpin,
    Reserve: _check_reserve,
    ReserveReply: _check_reserve_reply,
    Commit: _check_commit,
    Abandon: _check_abandon,
    Report: _check_report,
    Bye: _check_op,
    Ack: _check_op,
    NodeHello: _check_node_hello,
    NodeHelloReply: _check_node_hello_reply,
    Announce: _check_announce,
    AnnounceReply: _check_announce_reply,
    Locate: _check_locate,
    LocateReply: _check_locate_reply,
}
