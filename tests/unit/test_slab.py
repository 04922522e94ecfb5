"""Goal: one process works on a slab, what it has written survives it, and nothing is lost, taken
over or cut anew under anybody. Method: real files in /dev/shm, real processes, kill -9.
"""

import ctypes
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from kvray.core.effects import MarkGeneration, WriteExtent, WriteHeader
from kvray.core.header_page import HEADER_PAGE_DTYPE, fixed_sum
from kvray.core.ids import (
    BlockKey,
    ClientId,
    ExtentIndex,
    Generation,
    Maker,
    NodeId,
    Origin,
    Role,
    SlotIndex,
    SlotState,
)
from kvray.core.layout import MAX_CLIENTS, PAGE_BYTES, WRITER_NODE, Geometry
from kvray.errors import SlabBusyError
from kvray.node.slab import SlabOwner
from kvray.node.slab_file import SHM_DIRECTORY, sweep
from tests.slabs import (
    BLOCK_BYTES,
    GEOMETRY,
    NODE,
    OTHER_NODE,
    Host,
    Writer,
    key_of,
    map_slab,
    ready_blocks,
)

OFFSET_OF = {name: field[1] for name, field in (HEADER_PAGE_DTYPE.fields or {}).items()}
LARGER = Geometry(slab_bytes=3 * 1024**2, extent_bytes=GEOMETRY.extent_bytes)


@pytest.fixture
def host() -> Iterator[Host]:
    with TemporaryDirectory(prefix="kvray-") as runtime:  # a socket's path must be short
        host = Host(Path(runtime))
        yield host
        host.close()


def header(slot: int, generation: int, state: SlotState) -> WriteHeader:
    return WriteHeader(
        slot=SlotIndex(slot),
        generation=Generation(generation),
        key=key_of(generation),
        offset=GEOMETRY.slot_offset(SlotIndex(slot), BLOCK_BYTES),
        bytes=BLOCK_BYTES - 8,
        state=state,
        origin=Origin.COPY,
        writer=WRITER_NODE,
        extent_generation=7,
        maker=Maker(2**64 - 1),
    )


# ── making one ───────────────────────────────────────────────────────────────────────────────────


def test_a_new_slab_is_private_allocated_and_empty(host: Host) -> None:
    seen: list[tuple[int, int]] = []
    slab = host.open(on_progress=lambda done, total: seen.append((done, total)))

    found = os.fstat(slab.fd)
    assert slab.paths.slab.name == f"kvray-{host.cluster}-0123456789abcdef.slab"
    for path in (slab.paths.slab, slab.paths.lock):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert found.st_size == GEOMETRY.slab_bytes
    assert found.st_blocks * 512 == GEOMETRY.slab_bytes
    assert seen[-1] == (GEOMETRY.slab_bytes, GEOMETRY.slab_bytes)
    assert not slab.adopted
    assert "no slab of this node" in slab.reason
    assert not slab.headers["state"].any()
    assert not slab.extents["slot_bytes"].any()
    assert (slab.epoch, slab.generation_mark, slab.clients()) == (0, 0, [])
    assert os.get_inheritable(slab.fd) is False
    slab.check()


def test_all_pages_are_taken_before_the_first_is_cleared(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a host without room says so at once, and not after a minute of clearing."""
    monkeypatch.setattr("kvray.node.memory.POPULATE_STEP_BYTES", 64 * 1024)
    path = SHM_DIRECTORY / f"kvray-{host.cluster}-{NODE[:16]}.slab"
    taken: list[int] = []
    host.open(on_progress=lambda *_: taken.append(path.stat().st_blocks * 512))
    assert taken == [GEOMETRY.slab_bytes] * (GEOMETRY.slab_bytes // (64 * 1024))


def test_each_new_slab_has_an_id_of_its_own(host: Host) -> None:
    assert host.open(NODE).slab_id != host.open(OTHER_NODE).slab_id


def test_closing_leaves_the_slab_or_takes_it_along(host: Host) -> None:
    slab = host.open()
    slab.close(unlink=False)
    assert host.files() == [NODE[:16]]
    slab.close(unlink=True)  # closed already: says nothing, does nothing
    assert host.files() == [NODE[:16]]
    host.open().close(unlink=True)
    assert host.files() == []
    assert [path.suffix for path in host.runtime.iterdir()] == [".lock"]


def test_a_mapping_that_outlives_the_end_of_a_slab_finds_no_prompt_in_it(host: Host) -> None:
    # An engine lets go when it comes to it, and until then has what it had mapped.
    slab = host.open()
    place = Writer(slab).write(key_of(1))
    engine = map_slab(slab)
    content = np.ctypeslib.as_array(
        (ctypes.c_uint64 * (place.bytes // 8)).from_address(engine.address + place.offset)
    )
    assert (content == place.generation).all()

    slab.close(unlink=True)

    assert not content.any()
    assert not engine.headers["state"].any(), "and no header that calls those zeros a block"


# ── one owner ────────────────────────────────────────────────────────────────────────────────────


def test_a_second_owner_is_refused_and_told_who_is_there(host: Host) -> None:
    slab = host.open()
    with pytest.raises(SlabBusyError, match=f"process {os.getpid()} works on the slab"):
        host.open()
    slab.check()
    slab.close(unlink=False)
    assert host.open().adopted


def test_a_second_owner_is_refused_across_processes_until_the_first_is_gone(host: Host) -> None:
    with host.process("hold") as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        with pytest.raises(SlabBusyError, match=f"process {owner.pid} works on the slab"):
            host.open()
        owner.kill()
        owner.wait()

        slab = host.open()

    assert slab.adopted
    assert slab.previous_owner is not None
    assert slab.previous_owner[0] == owner.pid


def test_a_forked_child_that_outlives_the_owner_does_not_keep_the_lock(host: Host) -> None:
    with host.process("fork") as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "forked\n"
        owner.kill()
        owner.wait()
        assert host.open().adopted
        assert owner.stdin is not None
        owner.stdin.close()
        assert owner.stdout.readline() == "outlived\n"


def test_an_engine_that_maps_the_slab_does_not_keep_the_lock(host: Host) -> None:
    slab = host.open()
    mapped = map_slab(slab)
    slab.close(unlink=False)
    assert host.open().slab_id == mapped.slab_id


def test_a_living_owner_with_its_lock_in_another_folder_is_left_alone(host: Host) -> None:
    slab = host.open()
    elsewhere = host.runtime / "elsewhere"
    with pytest.raises(SlabBusyError, match="KVRAY_RUNTIME_DIR"):
        host.open(runtime=elsewhere)
    assert sweep(host.cluster, [], runtime=elsewhere) == []
    slab.check()


# ── adopting one ─────────────────────────────────────────────────────────────────────────────────


def test_a_restart_finds_what_was_written(host: Host) -> None:
    before = host.open()
    engine = ClientId(pid=17, start_ticks=2**40, nonce=2**62 + 1)
    worker = ClientId(pid=18, start_ticks=2**40 + 1, nonce=5)
    epoch = before.next_epoch(wall_clock_ms=1_000)
    before.write_client(0, engine, role=Role.ENGINE, engine_nonce=engine.nonce)
    before.write_client(MAX_CLIENTS - 1, worker, role=Role.WORKER, engine_nonce=engine.nonce)
    before.write_client(1, worker, role=Role.WORKER)
    before.write_client(1, None)
    before.apply_all(
        [
            MarkGeneration(high_water=4_096),
            WriteExtent(extent=ExtentIndex(1), extent_generation=7, slot_bytes=BLOCK_BYTES),
            header(64, 9, SlotState.WRITING),
            header(64, 9, SlotState.READY),
            header(65, 10, SlotState.WRITING),
        ]
    )
    rows, extents = before.headers.copy(), before.extents.copy()
    before.close(unlink=False)

    after = host.open()

    assert after.adopted
    assert after.slab_id == before.slab_id
    assert (after.epoch, after.generation_mark) == (epoch, 4_096)
    assert [(row.row, row.client, row.role, row.engine_nonce) for row in after.clients()] == [
        (0, engine, Role.ENGINE, engine.nonce),
        (MAX_CLIENTS - 1, worker, Role.WORKER, engine.nonce),
    ]
    assert (after.headers == rows).all()
    assert (after.extents == extents).all()
    assert after.extents[1]["slot_bytes"] == BLOCK_BYTES
    row = after.headers[64]
    assert row["key"].tobytes() == key_of(9)
    assert [int(row[name]) for name in row.dtype.names if name != "key"] == [
        9,
        GEOMETRY.slot_offset(SlotIndex(64), BLOCK_BYTES),
        BLOCK_BYTES - 8,
        0,  # a checksum, which nobody computes
        SlotState.READY,
        Origin.COPY,
        WRITER_NODE,
        7,
        2**64 - 1,
    ]
    after.check()


def test_no_committed_block_is_lost_or_torn_by_kill_9(host: Host) -> None:
    """A process fills and rewrites blocks and is killed in the middle, eight times over, each
    time adopting what the one before has left."""
    seeded = random.Random(3)
    alive: set[str] = set()
    quarantined = 0
    for round_number in range(8):
        with host.process("write") as owner:
            assert owner.stdout is not None
            _, kept, _ = owner.stdout.readline().split()
            assert int(kept) == len(alive)
            for _ in range(seeded.randrange(20, 60)):
                word, key = owner.stdout.readline().split()
                (alive.add if word == "commit" else alive.discard)(key)
            owner.kill()
            for line in owner.stdout:  # what it had said before the kill reached it
                word, key = line.split()
                (alive.add if word == "commit" else alive.discard)(key)

        slab = host.open()
        assert slab.adopted, f"round {round_number}: {slab.reason}"
        found = {key.hex() for key in ready_blocks(slab)}
        assert alive <= found
        assert len(found - alive) <= 1  # committed, and killed before it could say so
        alive = found
        quarantined += int((slab.headers["state"] == SlotState.WRITING).sum())
        assert Writer(slab).core.snapshot()["quarantined"] == quarantined_now(slab)
        slab.close(unlink=False)
    assert quarantined, "no kill came in the middle of a write: the test shows nothing"


def quarantined_now(slab: SlabOwner) -> int:
    return int((slab.headers["state"] == SlotState.QUARANTINE).sum())


def test_another_geometry_is_another_file_and_the_old_mapping_goes_on(host: Host) -> None:
    before = host.open()
    place = Writer(before).write(key_of(1))
    epoch = before.next_epoch(wall_clock_ms=10**12)
    engine = map_slab(before)
    before.close(unlink=False)

    after = host.open(geometry=LARGER)

    assert not after.adopted
    assert f"wanted are {LARGER.slab_bytes}" in after.reason
    assert after.slab_id != engine.slab_id
    assert not after.headers["state"].any()
    assert after.next_epoch(wall_clock_ms=0) > epoch
    match = engine.headers_match(
        np.array([place.slot], np.uint32),
        np.array([place.generation], np.uint64),
        np.array([place.offset], np.uint64),
        np.array([place.bytes], np.uint64),
        place.key,
    )
    assert match.all()
    assert host.files() == [NODE[:16]]


def damage(slab: SlabOwner, offset: int, content: bytes) -> None:
    os.pwrite(slab.fd, content, offset)


def sign(slab: SlabOwner) -> None:
    """As the NodeStore does that writes the fixed part of the page."""
    page = np.frombuffer(os.pread(slab.fd, PAGE_BYTES, 0), HEADER_PAGE_DTYPE)
    damage(slab, OFFSET_OF["sum"], fixed_sum(page).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, bytes(8), "never completed"),
        (8, (99).to_bytes(4, "little"), "format 99"),
        (32, bytes(16), "another boot"),
        (288, b"f" * 56, "of node ffff"),
        (256, b"other" + bytes(27), "of cluster other"),
    ],
)
def test_what_is_not_ours_is_given_up_and_says_why(
    host: Host, offset: int, content: bytes, reason: str
) -> None:
    before = host.open()
    Writer(before).write(key_of(1))
    damage(before, offset, content)
    sign(before)
    old_id = before.slab_id
    before.close(unlink=False)

    after = host.open()

    assert not after.adopted
    assert reason in after.reason
    assert after.slab_id != old_id
    assert not after.headers["state"].any()


FIELDS = [name for name in HEADER_PAGE_DTYPE.names or () if name != "clients"]


@pytest.mark.parametrize("content", [b"\x00", b"\x01", b"\xff"], ids=["zeros", "ones", "all bits"])
@pytest.mark.parametrize("field", [*FIELDS, "clients"])
def test_a_node_starts_whatever_its_page_says(host: Host, field: str, content: bytes) -> None:
    before = host.open()
    Writer(before).write(key_of(1))
    before.close(unlink=False)
    with (SHM_DIRECTORY / f"kvray-{host.cluster}-{NODE[:16]}.slab").open("r+b") as file:
        file.seek(OFFSET_OF[field])
        file.write(content * HEADER_PAGE_DTYPE[field].itemsize)

    after = host.open()
    epoch = after.next_epoch(wall_clock_ms=1_700_000_000_000)
    Writer(after).write(key_of(2))

    assert epoch < 2**47
    assert key_of(2) in ready_blocks(after)
    after.check()


def test_a_slab_with_holes_is_given_up(host: Host) -> None:
    """Its pages would be allocated inside somebody's copy, or not at all."""
    before = host.open()
    before.close(unlink=False)
    path = before.paths.slab
    page = path.read_bytes()[:4096]
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(GEOMETRY.slab_bytes)
        file.write(page)

    assert "bytes are allocated" in host.open().reason


def test_an_opening_that_fails_halfway_leaves_no_slab_and_no_lock(host: Host) -> None:
    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.open(on_progress=interrupted)
    assert host.files() == []
    assert host.open().reason.startswith("new")


# ── slabs of nodes that are gone ─────────────────────────────────────────────────────────────────


def test_the_slab_of_a_dead_node_is_taken_over_by_the_next_one(host: Host) -> None:
    """A raylet that restarts gives its node another id: the blocks are still good."""
    before = host.open(OTHER_NODE)
    place = Writer(before).write(key_of(5))
    before.close(unlink=False)

    after = host.open(NODE, live_node_ids=[NODE])

    assert after.adopted
    assert OTHER_NODE in after.reason
    assert after.slab_id == before.slab_id
    assert list(ready_blocks(after)) == [place.key]
    assert host.files() == [NODE[:16]]
    after.close(unlink=False)
    assert host.open(NODE).adopted, "it is of the new node from now on"


def test_other_slabs_of_dead_nodes_are_removed_and_living_ones_kept(host: Host) -> None:
    living, working, dead = (NodeId(letter * 56) for letter in "abc")
    for node in (living, dead):
        host.open(node, LARGER).close(unlink=False)
    host.open(working, LARGER)  # outlived its node: has its lock still

    host.open(NODE, live_node_ids=[living])

    assert host.files() == sorted([NODE[:16], living[:16], working[:16]])


def test_a_sweep_spares_other_clusters(host: Host) -> None:
    """Also one whose name continues ours."""
    longer = Host(host.runtime)
    longer.cluster = f"{host.cluster[:20]}-x"
    host.cluster = host.cluster[:20]
    longer.open().close(unlink=False)
    host.open().close(unlink=False)

    removed = sweep(host.cluster, [], runtime=host.runtime)

    assert [path.name for path in removed] == [f"kvray-{host.cluster}-{NODE[:16]}.slab"]
    assert len(longer.files()) == 1
    longer.close()


# ── what is written, and in which order ──────────────────────────────────────────────────────────


class Recorder:
    """The table of headers as words, with a list of the stores into it."""

    def __init__(self, words: "memoryview[int]") -> None:
        self.words = words
        self.stores: list[int] = []

    def __setitem__(self, index: int, value: int) -> None:
        self.stores.append(index)
        self.words[index] = value


STATE_WORD = 5


@pytest.mark.parametrize("state", list(SlotState))
def test_the_state_is_the_first_store_of_a_header_or_the_last_if_ready(
    host: Host, state: SlotState, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = host.open()
    slot = 3
    with monkeypatch.context() as patch:
        recorder = Recorder(slab._words)  # noqa: SLF001 (the order of stores is seen only there)
        patch.setattr(slab, "_words", recorder)
        slab.apply(header(slot, 5, state))
    stores = [index - slot * 8 for index in recorder.stores]
    assert sorted(stores) == list(range(8))
    assert stores.index(STATE_WORD) == (len(stores) - 1 if state is SlotState.READY else 0)
    assert slab.headers["state"][slot] == state


def test_headers_do_not_touch_their_neighbours(host: Host) -> None:
    slab = host.open()
    last = GEOMETRY.slot_count - 1
    slab.apply_all(header(slot, slot + 1, SlotState.WRITING) for slot in (0, 7, last))
    written = slab.headers["generation"].nonzero()[0].tolist()
    assert written == [0, 7, last]
    first, end = GEOMETRY.payload_offset, GEOMETRY.slab_bytes
    assert not np.frombuffer(slab.memory[first:end], np.uint8).any()


def test_the_generation_mark_does_not_go_back(host: Host) -> None:
    slab = host.open()
    slab.apply(MarkGeneration(high_water=8_192))
    with pytest.raises(AssertionError):
        slab.apply(MarkGeneration(high_water=4_096))
    assert slab.generation_mark == 8_192


# ── epochs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("last", "hint", "clock", "expected"),
    [(0, 0, 50, 50), (70, 0, 50, 71), (70, 90, 50, 91), (70, 90, 100, 100), (0, 0, 0, 1)],
)
def test_an_epoch_is_greater_than_any_before_it(
    host: Host, last: int, hint: int, clock: int, expected: int
) -> None:
    slab = host.open()
    if last:
        slab.take_epoch(last)
    assert slab.next_epoch(wall_clock_ms=clock, directory_hint=hint) == expected
    assert slab.epoch == expected
    slab.close(unlink=False)
    assert host.open().next_epoch(wall_clock_ms=0) == expected + 1


def test_a_snapshot_is_plain_data(host: Host) -> None:
    def is_plain(value: Any) -> bool:
        return type(value) in (str, int, bool)

    assert all(is_plain(value) for value in host.open().snapshot().values())


def test_a_key_is_sixteen_bytes_whatever_they_are(host: Host) -> None:
    slab = host.open()
    for slot, key in enumerate([bytes(16), b"\xff" * 16, b"\0" * 15 + b"\1", b"\1" + b"\0" * 15]):
        written = header(slot, slot + 1, SlotState.READY)
        slab.apply(
            WriteHeader(
                slot=written.slot,
                generation=written.generation,
                key=BlockKey(key),
                offset=written.offset,
                bytes=written.bytes,
                state=written.state,
                origin=written.origin,
                writer=0,
                extent_generation=1,
            )
        )
        assert slab.headers[slot]["key"].tobytes() == key
