"""The first page of a slab: who made it, how it is cut, who works on it.

    0     magic, format, sum   magic is written last, when the rest of the file is whole
    16    slab id, boot id     which file this is; in which boot of the host its content was written
    48    epoch, slab_bytes, extent_bytes, generation mark
    128   owner                pid and start of the NodeStore that works on it; 0: nobody
    256   cluster, node id     NodeId in full; the file's name has only its beginning
    1024  table of clients     MAX_CLIENTS rows

Any engine can write into this page by mistake, and a start must not believe, or die of, what is
there then. What never changes has a sum (CRC-32). A number that changes lies on 8 bytes with 16
bits of sum in front, and so does the first word of a client's row, with 24: so that a kill leaves
the old or the new one, and never a wrong sum. A page that is damaged is given up with its slab.
"""

import zlib
from binascii import crc_hqx
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvray.core.ids import ClientId, Role
from kvray.core.layout import CLIENT_DTYPE, MAX_CLIENTS, PAGE_BYTES

NUMBER_BITS = 48  # of a number that changes: 8,900 years in ms, and as many generations
MAX_MARK = 1 << 47  # a slab that has used half of its generations was not used: it was damaged
MAX_AHEAD_MS = 24 * 3_600 * 1_000  # an epoch follows a wall clock; no clock is a day ahead

MAX_CLUSTER_BYTES = 32
MAX_NODE_ID_BYTES = 64  # Ray's have 56 hex digits

HEADER_PAGE_DTYPE = np.dtype(
    {
        "names": [
            "magic",
            "format",
            "sum",
            "slab_id",
            "boot_id",
            "epoch",
            "slab_bytes",
            "extent_bytes",
            "generation_mark",
            "owner_pid",
            "owner_start_ticks",
            "cluster",
            "node_id",
            "clients",
        ],
        "formats": [
            "V8",
            "<u4",
            "<u4",
            "V16",
            "V16",
            "<u8",
            "<u8",
            "<u8",
            "<u8",
            "<u8",
            "<u8",
            f"S{MAX_CLUSTER_BYTES}",
            f"S{MAX_NODE_ID_BYTES}",
            (CLIENT_DTYPE, (MAX_CLIENTS,)),
        ],
        "offsets": [0, 8, 12, 16, 32, 48, 56, 64, 72, 128, 136, 256, 288, 1024],
        "itemsize": PAGE_BYTES,
    }
)
assert 1024 + MAX_CLIENTS * CLIENT_DTYPE.itemsize <= PAGE_BYTES

_FIXED = ("format", "slab_id", "boot_id", "slab_bytes", "extent_bytes", "cluster", "node_id")
_CHANGING = ("epoch", "generation_mark", "owner_pid", "owner_start_ticks")
_VALUE = (1 << NUMBER_BITS) - 1

Page = npt.NDArray[Any]  # HEADER_PAGE_DTYPE, shape (1,)


@dataclass(frozen=True, slots=True)
class ClientRow:
    """One row of the table of clients that is in use."""

    row: int  # what `writer` in a slot's header refers to
    client: ClientId
    role: Role
    engine_nonce: int


def fixed_sum(page: Page) -> int:
    """Of what never changes but with the slab's node."""
    return zlib.crc32(b"".join(page[name].tobytes() for name in _FIXED))


def write_number(page: Page, name: str, value: int) -> None:
    """One of the numbers that change, in one store."""
    assert 0 <= value <= _VALUE, f"{name} is {value}"
    page[name][0] = _sum_of(name, value) << NUMBER_BITS | value


def read_number(page: Page, name: str) -> int | None:
    """None if it is damaged."""
    word = int(page[name][0])
    value = word & _VALUE
    return value if word >> NUMBER_BITS == _sum_of(name, value) else None


def _sum_of(name: str, value: int) -> int:
    return crc_hqx(value.to_bytes(8, "little"), _CHANGING.index(name) + 1)


def write_client(page: Page, row: int, client: ClientId | None, role: Role, engine: int) -> None:
    """None clears the row. The word comes last: a row that has one is whole."""
    entry = page["clients"][0][row]
    entry["word"] = 0
    if client is None:
        return
    entry["start_ticks"], entry["nonce"], entry["engine"] = (
        client.start_ticks,
        client.nonce,
        engine,
    )
    entry["word"] = _word_of(client, role, engine)


def _word_of(client: ClientId, role: int, engine: int) -> int:
    text = b"".join(
        number.to_bytes(8, "little")
        for number in (client.pid, role, client.start_ticks, client.nonce, engine)
    )
    return role << 56 | (zlib.crc32(text) & 0xFFFFFF) << 32 | client.pid


def rows_in_use(page: Page) -> Iterator[ClientRow | None]:
    """None for one that is damaged: nobody knows who may still write into its slots."""
    table = page["clients"][0]
    for row in np.flatnonzero(table["word"]).tolist():
        entry = table[row]
        word = int(entry["word"])
        client = ClientId(
            pid=word & 0xFFFFFFFF,
            start_ticks=int(entry["start_ticks"]),
            nonce=int(entry["nonce"]),
        )
        role, engine = word >> 56, int(entry["engine"])
        is_whole = role in _ROLES and word == _word_of(client, role, engine)
        yield ClientRow(row, client, Role(role), engine) if is_whole else None


_ROLES = frozenset(int(role) for role in Role)


def damage(page: Page, *, wall_clock_ms: int) -> str:
    """What of a page of our format cannot be true; empty if nothing is known."""
    if int(page["sum"][0]) != fixed_sum(page):
        return "its header page is damaged"
    numbers = {name: read_number(page, name) for name in _CHANGING}
    for name, value in numbers.items():
        if value is None:
            return f"its header page is damaged ({name})"
    if (numbers["epoch"] or 0) > wall_clock_ms + MAX_AHEAD_MS:
        return f"its epoch {numbers['epoch']} is more than a day ahead of this host's clock"
    if (numbers["generation_mark"] or 0) > MAX_MARK:
        return f"its generation mark is {numbers['generation_mark']}"
    if None in rows_in_use(page):
        return "its header page is damaged (a client)"
    return ""
