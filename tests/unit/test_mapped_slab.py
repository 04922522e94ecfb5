"""Goal: an engine maps the slab it was promised and nothing else, and its look at the headers
tells every content from every other. Method: a real owner beside it, and single wrong fields.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvray.core.effects import Place
from kvray.core.ids import SlabId
from kvray.core.layout import PAGE_BYTES
from kvray.errors import RemoteProtocolError, VersionMismatchError
from kvray.node.mapped import MappedSlab
from kvray.node.slab import SlabOwner
from tests.slabs import BLOCK_BYTES, GEOMETRY, Host, Writer, key_of, map_slab

BLOCK_COUNT = 5
READS_AT_MOST = 20_000


@pytest.fixture
def slab() -> Iterator[SlabOwner]:
    with TemporaryDirectory(prefix="kvray-") as runtime:  # a socket's path must be short
        host = Host(Path(runtime))
        yield host.open()
        host.close()


@pytest.fixture
def places(slab: SlabOwner) -> list[Place]:
    writer = Writer(slab)
    return [writer.write(key_of(number)) for number in range(BLOCK_COUNT)]


def columns(places: list[Place]) -> dict[str, Any]:
    return {
        "slots": np.array([place.slot for place in places], np.uint32),
        "generations": np.array([place.generation for place in places], np.uint64),
        "offsets": np.array([place.offset for place in places], np.uint64),
        "slot_bytes": np.array([place.bytes for place in places], np.uint64),
        "keys": b"".join(place.key for place in places),
    }


# ── is it the promised file ──────────────────────────────────────────────────────────────────────


def mapped_with(slab: SlabOwner, **wrong: Any) -> MappedSlab:
    promised: dict[str, Any] = {
        "slab_bytes": GEOMETRY.slab_bytes,
        "extent_bytes": GEOMETRY.extent_bytes,
        "slab_id": slab.slab_id,
    }
    return MappedSlab.from_fd(slab.fd, **(promised | wrong))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"slab_bytes": GEOMETRY.slab_bytes + 4096}, "the file has"),
        ({"slab_bytes": 10}, "impossible slab"),
        ({"extent_bytes": 128 * 1024}, "header page says"),
        ({"slab_id": SlabId(b"x" * 16)}, "was announced"),
        ({"slab_id": SlabId(b"")}, "was announced"),
    ],
)
def test_another_file_than_promised_is_refused(
    slab: SlabOwner, wrong: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        mapped_with(slab, **wrong)


def test_something_that_is_no_slab_is_refused(slab: SlabOwner) -> None:
    os.pwrite(slab.fd, b"KVRAYSL1", 0)
    with pytest.raises(RemoteProtocolError, match="no slab"):
        mapped_with(slab)


def test_another_format_is_named(slab: SlabOwner) -> None:
    os.pwrite(slab.fd, (7).to_bytes(4, "little"), 8)
    with pytest.raises(VersionMismatchError, match="format 7"):
        mapped_with(slab)


# ── the mapping ──────────────────────────────────────────────────────────────────────────────────


def test_a_worker_writes_payload_and_can_not_write_headers(
    slab: SlabOwner, places: list[Place]
) -> None:
    mapped = map_slab(slab)
    with pytest.raises(ValueError, match="read-only"):
        mapped.headers["state"][places[0].slot] = 0
    where = (ctypes.c_uint8 * 4).from_address(mapped.address + places[0].offset)
    where[:] = list(b"part")
    assert bytes(slab.memory[places[0].offset :][:4]) == b"part"


def test_a_mapping_outlives_its_owner(slab: SlabOwner, places: list[Place]) -> None:
    mapped = map_slab(slab)
    slab.close(unlink=False)
    assert mapped.all_match(**columns(places))


def test_a_mapping_outlives_its_slab_and_finds_no_block_in_it(
    slab: SlabOwner, places: list[Place]
) -> None:
    mapped = map_slab(slab)
    slab.close(unlink=True)
    assert not mapped.all_match(**columns(places[:1]))


def test_populating_fills_the_page_tables_and_changes_nothing(
    slab: SlabOwner, places: list[Place]
) -> None:
    before = bytes(slab.memory)
    mapped = map_slab(slab)
    assert mapped.populate()
    assert resident_bytes(mapped.address) == GEOMETRY.slab_bytes
    assert bytes(slab.memory) == before


def test_a_part_can_be_populated(slab: SlabOwner) -> None:
    mapped = map_slab(slab)
    assert mapped.populate(offset=PAGE_BYTES * 3 + 1, length_bytes=PAGE_BYTES)
    assert resident_bytes(mapped.address) == 2 * PAGE_BYTES


def resident_bytes(address: int) -> int:
    """Of the mapping that begins there, as this process's page tables have it."""
    rows = iter(Path("/proc/self/smaps").read_text().splitlines())
    for row in rows:
        if row.startswith(f"{address:x}-"):
            return next(int(r.split()[1]) * 1024 for r in rows if r.startswith("Rss:"))
    raise AssertionError


# ── the look at the headers ──────────────────────────────────────────────────────────────────────


def test_what_was_committed_matches(slab: SlabOwner, places: list[Place]) -> None:
    mapped = map_slab(slab)
    assert mapped.headers_match(**columns(places)).tolist() == [True] * BLOCK_COUNT
    assert mapped.all_match(**columns(places))
    assert mapped.all_match(**columns([]))


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ("generations", 1),
        ("generations", 2**63),
        ("offsets", 4096),
        ("slot_bytes", 1),
        ("slots", 1),
    ],
)
def test_one_wrong_number_is_one_mismatch(
    slab: SlabOwner, places: list[Place], column: str, wrong: int
) -> None:
    told = columns(places)
    told[column][2] += told[column].dtype.type(wrong)
    expected = [True, True, False, True, True]
    assert map_slab(slab).headers_match(**told).tolist() == expected
    assert not map_slab(slab).all_match(**told)


@pytest.mark.parametrize("slot", [GEOMETRY.slot_count, GEOMETRY.slot_count + 1, 2**32 - 1])
def test_a_slot_behind_the_last_does_not_match(
    slab: SlabOwner, places: list[Place], slot: int
) -> None:
    told = columns(places)
    told["slots"][0] = slot
    assert map_slab(slab).headers_match(**told).tolist() == [False] + [True] * 4


@pytest.mark.parametrize("place", range(16))
def test_each_byte_of_a_key_counts(slab: SlabOwner, places: list[Place], place: int) -> None:
    told = columns(places)
    keys = bytearray(told["keys"])
    keys[16 * 4 + place] ^= 0x80
    told["keys"] = bytes(keys)
    assert map_slab(slab).headers_match(**told).tolist() == [True] * 4 + [False]


def test_a_slot_that_is_written_or_evicted_or_rewritten_does_not_match(slab: SlabOwner) -> None:
    mapped = map_slab(slab)
    writer = Writer(slab)
    place = writer.reserve(key_of(1))
    assert not mapped.all_match(**columns([place]))
    writer.fill(place)
    writer.commit(place)
    assert mapped.all_match(**columns([place]))
    writer.evict(place.key)
    assert not mapped.all_match(**columns([place]))
    writer.write(place.key)
    assert not mapped.all_match(**columns([place])), "the same key, but another generation"


@pytest.mark.parametrize("column", ["generations", "offsets", "slot_bytes", "keys"])
def test_columns_of_unequal_length_are_refused(
    slab: SlabOwner, places: list[Place], column: str
) -> None:
    told = columns(places)
    told[column] = told[column][:-1]
    with pytest.raises(RemoteProtocolError, match="5 slots come with"):
        map_slab(slab).headers_match(**told)


def test_a_payload_outside_the_extents_is_found_out(slab: SlabOwner) -> None:
    mapped = map_slab(slab)
    begin, end = GEOMETRY.payload_offset, GEOMETRY.used_bytes

    def contains(offset: int, count_bytes: int) -> bool:
        first = np.array([begin, offset], np.uint64)
        return mapped.contains(first, np.array([1, count_bytes], np.uint64))

    assert contains(begin, end - begin)
    assert contains(end - BLOCK_BYTES, BLOCK_BYTES)
    assert not contains(begin - 1, 1)
    assert not contains(end - BLOCK_BYTES, BLOCK_BYTES + 1)
    assert not contains(end + 1, 0)
    assert not contains(2**64 - 1, 2)
    assert not contains(begin, 2**64 - 1)


def test_a_slot_rewritten_under_a_reader_is_never_taken_for_whole(slab: SlabOwner) -> None:
    """Reads payload first and headers then, as every reader does, while the owner rewrites as
    fast as it can; the interpreter changes between the two between any two of their steps.
    """
    mapped, writer = map_slab(slab), Writer(slab)
    announced = [writer.write(key_of(number)) for number in range(4)]
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for index in range(len(announced)):
                writer.evict(announced[index].key)
                announced[index] = writer.write(announced[index].key)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=rewrite)
    thread.start()
    accepted = torn = 0
    try:
        for _ in range(READS_AT_MOST):
            place = announced[accepted % len(announced)]
            payload = read(mapped, place.offset)
            whole = bool((payload == place.generation).all())
            matches = mapped.all_match(**columns([place]))
            assert whole or not matches
            accepted, torn = accepted + matches, torn + (not whole)
            if accepted >= 300 and torn:
                break
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert accepted >= 300
    assert torn, "no read met a rewrite: the test shows nothing"


def read(mapped: MappedSlab, offset: int) -> npt.NDArray[np.uint64]:
    """In steps, so that a rewrite can come between."""
    words = (ctypes.c_uint64 * (BLOCK_BYTES // 8)).from_address(mapped.address + offset)
    source = np.frombuffer(memoryview(words), np.uint64)
    return np.concatenate([source[begin : begin + 64] for begin in range(0, len(source), 64)])


# ── what is on its way ───────────────────────────────────────────────────────────────────────────


def test_what_is_ready_counts_up_to_the_first_that_is_being_written(slab: SlabOwner) -> None:
    writer = Writer(slab)
    places = [writer.write(key_of(0)), writer.reserve(key_of(1)), writer.write(key_of(2))]
    mapped = map_slab(slab)

    assert mapped.leading_ready(**columns(places)) == 1
    writer.commit(places[1])
    assert mapped.leading_ready(**columns(places)) == 3
    assert mapped.leading_ready(**columns([])) == 0


def test_a_slot_that_is_neither_ready_nor_being_written_never_will_be(slab: SlabOwner) -> None:
    writer = Writer(slab)
    places = [writer.reserve(key_of(0)), writer.write(key_of(1))]
    mapped = map_slab(slab)
    assert mapped.leading_ready(**columns(places)) == 0

    writer.evict(key_of(1))
    assert mapped.leading_ready(**columns(places)) is None


@pytest.mark.parametrize("column", ["generations", "offsets", "slot_bytes", "keys"])
def test_what_is_being_written_must_be_what_was_told(slab: SlabOwner, column: str) -> None:
    writer = Writer(slab)
    told = columns([writer.reserve(key_of(0))])
    told[column] = b"x" * 16 if column == "keys" else told[column] + 1

    assert map_slab(slab).leading_ready(**told) is None
