"""Messages to bytes and back, and the packed fields inside them.

    1 byte   FORMAT_VERSION
    rest     msgpack of one struct of core.messages, its type in the field "type"

What `decode` lets through is well formed (core.wellformed) and can be used without another look at
lengths and ranges. Whatever else comes is the other side's fault (RemoteProtocolError) and has not
been acted on. `encode` asserts the same: to send what the other side must refuse is a bug here.
"""

from collections.abc import Iterable, Sequence
from itertools import starmap
from struct import Struct
from typing import TYPE_CHECKING, Final, TypeVar, cast

import msgspec
import numpy as np

from kvray.core.ids import (
    KEY_BYTES,
    NAMESPACE_BYTES,
    BlockKey,
    Generation,
    Maker,
    Namespace,
    Origin,
    SlotIndex,
)
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import (
    ENTRY_DTYPE,
    LOCATION_DTYPE,
    MAKER_DTYPE,
    MAX_CALL_BYTES,
    MAX_MESSAGE_BYTES,
    SLOT_DTYPE,
    ControlMessage,
    Message,
)
from kvray.core.wellformed import check_message
from kvray.errors import RemoteProtocolError, VersionMismatchError

if TYPE_CHECKING:
    from typing_extensions import TypeForm

M = TypeVar("M")
SlotRow = tuple[SlotIndex, Generation, int]  # slot, generation, offset
# key, slot, bytes, generation, ...
EntryRow = tuple[BlockKey, SlotIndex, int, Generation, Origin, Maker]
LocationRow = tuple[int, int, SlotIndex, int, Generation, Maker]  # key_index, node, slot, bytes ...

_VERSION: Final = bytes([FORMAT_VERSION])
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The bytes of one message. Asserts that `decode` would let it through."""
    try:
        check_message(message)
        data = _VERSION + _ENCODER.encode(message)
    except (RemoteProtocolError, UnicodeEncodeError, OverflowError) as exc:
        raise AssertionError(f"{type(message).__name__} may not be sent: {exc}") from exc
    limit = MAX_CALL_BYTES if isinstance(message, ControlMessage) else MAX_MESSAGE_BYTES
    assert len(data) <= limit, f"{type(message).__name__} has {len(data)} bytes, limit {limit}"
    return data


def decode(data: bytes | bytearray | memoryview, *, max_bytes: int, expect: "TypeForm[M]") -> M:
    """The message in data, if it is one of `expect` (a message type, or a union of them).

    Raises VersionMismatchError if the other side speaks another version of the format and
    RemoteProtocolError for anything else that is not a well-formed message of that type.
    """
    if not 0 < len(data) <= max_bytes:
        raise RemoteProtocolError(f"a message has {len(data)} bytes; 1 to {max_bytes} are allowed")
    if data[0] != FORMAT_VERSION:
        raise VersionMismatchError(
            f"the other side speaks format version {data[0]}, this one {FORMAT_VERSION}; "
            f"install the same release of kvray on both"
        )
    try:
        message: Message = _DECODER.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        # RecursionError: deep nesting in a field that no message has.
        raise RemoteProtocolError(f"not a message: {exc}") from exc
    if not isinstance(message, cast("type", expect)):
        raise RemoteProtocolError(f"{type(message).__name__} must not be said here")
    try:
        check_message(message)
    except RemoteProtocolError as exc:
        raise RemoteProtocolError(f"{type(message).__name__}: {exc}") from exc
    return cast("M", message)


# -- packed fields -----------------------------------------------------------------------------

_SLOT: Final = Struct("<IQQ")
_ENTRY: Final = Struct("<16sIIQBQ")
_LOCATION: Final = Struct("<IHIIQQ")
_MAKER: Final = Struct("<16sQ")
_KEY_DTYPE: Final = np.dtype(("V", KEY_BYTES))
assert _SLOT.size == SLOT_DTYPE.itemsize
assert _ENTRY.size == ENTRY_DTYPE.itemsize
assert _LOCATION.size == LOCATION_DTYPE.itemsize
assert _MAKER.size == MAKER_DTYPE.itemsize


def pack_keys(keys: Sequence[BlockKey]) -> bytes:
    """One key after another."""
    packed = b"".join(keys)
    assert len(packed) == KEY_BYTES * len(keys), "a key has another length"
    return packed


def unpack_keys(packed: bytes) -> list[BlockKey]:
    # tolist() of a void array makes bytes objects: 11 ns a key, slicing takes 54.
    keys: list[BlockKey] = np.frombuffer(packed, _KEY_DTYPE).tolist()
    return keys


def pack_slot(slot: int, generation: int, offset: int) -> bytes:
    """One SLOT_DTYPE row."""
    return _SLOT.pack(slot, generation, offset)


def pack_slots(rows: Iterable[SlotRow]) -> bytes:
    """SLOT_DTYPE rows out of (slot, generation, offset)."""
    return b"".join(starmap(_SLOT.pack, rows))


def unpack_slots(packed: bytes) -> list[SlotRow]:
    return cast("list[SlotRow]", list(_SLOT.iter_unpack(packed)))


def pack_entries(rows: Iterable[EntryRow]) -> bytes:
    """ENTRY_DTYPE rows out of (key, slot, bytes, generation, origin, maker)."""
    rows = list(rows)
    assert all(len(row[0]) == KEY_BYTES for row in rows), "a key has another length"
    return b"".join(starmap(_ENTRY.pack, rows))


def unpack_entries(packed: bytes) -> list[EntryRow]:
    """origin comes back as a plain int that equals its Origin."""
    return cast("list[EntryRow]", list(_ENTRY.iter_unpack(packed)))


def pack_locations(rows: Iterable[LocationRow]) -> bytes:
    """LOCATION_DTYPE rows out of (key_index, node, slot, bytes, generation, maker)."""
    return b"".join(starmap(_LOCATION.pack, rows))


def unpack_locations(packed: bytes) -> list[LocationRow]:
    return cast("list[LocationRow]", list(_LOCATION.iter_unpack(packed)))


def pack_makers(rows: Iterable[tuple[Namespace, Maker]]) -> bytes:
    """MAKER_DTYPE rows out of (namespace, maker)."""
    rows = list(rows)
    assert all(len(row[0]) == NAMESPACE_BYTES for row in rows), "a namespace has another length"
    return b"".join(starmap(_MAKER.pack, rows))


def unpack_makers(packed: bytes) -> list[tuple[Namespace, Maker]]:
    return cast("list[tuple[Namespace, Maker]]", list(_MAKER.iter_unpack(packed)))
