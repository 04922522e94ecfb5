"""What a caller hands to a public method, checked before it is acted on.

A wrong argument is the caller's error, and no bug: it must be told before it can reach an assert,
since a bug ends the process that it is found in. Each function returns what it was given, or raises
ArgumentError with what was expected and what was found.
"""

from collections.abc import Sequence
from typing import cast

from kvray.core.header_page import MAX_AHEAD_MS, MAX_NODE_ID_BYTES
from kvray.core.ids import KEY_BYTES, BlockKey, Epoch, NodeId
from kvray.core.messages import MAX_EPOCH, MAX_NAME_BYTES
from kvray.errors import ArgumentError

MAX_SHOWN_CHARS = 80  # of a wrong value, in an error


def a_key(found: object) -> BlockKey:
    if type(found) is not bytes or len(found) != KEY_BYTES:
        raise _unfit(f"a key of {KEY_BYTES} bytes", found)
    return BlockKey(found)


def keys(found: object, *, at_most: int) -> list[BlockKey]:
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes, bytearray, memoryview)):
        raise _unfit("a list of keys", found)
    if len(found) > at_most:
        raise ArgumentError(f"expected at most {at_most} keys, found {len(found)}")
    return [a_key(key) for key in found]


def sizes(found: object, *, count: int, at_most: int) -> list[int]:
    """Payload bytes of so many blocks."""
    if not isinstance(found, Sequence) or len(found) != count:
        raise _unfit(f"a list of {count} sizes", found)
    return [a_number(size, "a size", 1, at_most) for size in found]


def a_node_id(found: object) -> NodeId:
    """Of any form that Ray or a test may give it; whether there is such a node is not asked."""
    if type(found) is not str or not 0 < len(found) <= MAX_NODE_ID_BYTES or not found.isascii():
        raise _unfit(f"a node id of 1 to {MAX_NODE_ID_BYTES} characters", found)
    return NodeId(found)


def an_epoch(found: object) -> Epoch:
    return Epoch(a_number(found, "an epoch", 0, MAX_EPOCH))


def a_time(found_ms: int, what: str, *, now_ms: int) -> None:
    """That of another host's wall clock. A number that no clock can have would be the highest for
    ever, and its node could never come back with a higher one.
    """
    if found_ms > now_ms + MAX_AHEAD_MS:
        raise ArgumentError(
            f"expected {what} of today, found {found_ms}: it is {(found_ms - now_ms) // 3_600_000} "
            "hours ahead of the directory's clock. Set that host's clock"
        )


def a_number(found: object, what: str, least: int, most: int) -> int:
    if type(found) is not int or not least <= found <= most:
        raise _unfit(f"{what} of {least} to {most}", found)
    return found


def a_duration(found: object, what: str, *, at_most: float) -> float:
    """A number of seconds or milliseconds, as the name of the argument says."""
    is_number = type(found) in (int, float)
    if not is_number or not 0 <= cast("float", found) <= at_most:  # no nan is
        raise _unfit(f"{what} of 0 to {at_most:g}", found)
    return cast("float", found)


def a_text(found: object, what: str) -> str:
    if type(found) is not str or not 0 < len(found) <= MAX_NAME_BYTES or not found.isprintable():
        raise _unfit(f"{what} of 1 to {MAX_NAME_BYTES} printable characters", found)
    return found


def a_callback(found: object, what: str) -> None:
    if found is not None and not callable(found):
        raise _unfit(f"{what}: a function, or None", found)


def a_flag(found: object, what: str) -> bool:
    if type(found) is not bool:
        raise _unfit(f"{what}: True or False", found)
    return found


def a_message(found: object) -> bytes:
    """Encoded; what is in it is core.codec's to say."""
    if type(found) is not bytes:
        raise _unfit("an encoded message", found)
    return found


def _unfit(expected: str, found: object) -> ArgumentError:
    shown = repr(found) if isinstance(found, (int, float, str, bytes)) else type(found).__name__
    return ArgumentError(f"expected {expected}, found {shown[:MAX_SHOWN_CHARS]}")
