"""No prompt is in a core dump: neither a NodeStore's nor that of a process that maps a slab as
engines do, whether the slab still has a name or not.

Method: real core files of processes that are told to dump every kind of memory, searched for blocks
whose bytes are random. A process that is searched has looked at its mapping and never copied it.
"""

import os
import resource
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from tests.block_client import Client, payload_of
from tests.ray_nodes import Nodes, running_nodes, wait_until
from tests.slabs import NODE, Host, Writer, key_of

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(180)]

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
ALL_MEMORY = "0x7f"  # of core(5): anonymous, mapped, huge, private and shared
STEP_WORDS = 8 << 20
CORE_LIMIT_S = 60.0  # some hundred MB, on a busy machine


def dump_everything(pid: int) -> Path:
    """Let the process leave a core file, and say where."""
    pattern = CORE_PATTERN.read_text().strip()
    if "/" in pattern or "|" in pattern or "%" in pattern:
        pytest.skip(f"cores go where no test finds them: kernel.core_pattern is {pattern!r}")
    everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    try:
        resource.prlimit(pid, resource.RLIMIT_CORE, everything)
    except PermissionError:
        pytest.skip("this user may not raise the size of core files")
    Path(f"/proc/{pid}/coredump_filter").write_text(ALL_MEMORY)
    folder = Path(f"/proc/{pid}/cwd").resolve()
    suffix = f".{pid}" if Path("/proc/sys/kernel/core_uses_pid").read_text().strip() == "1" else ""
    core = folder / f"{pattern}{suffix}"
    core.unlink(missing_ok=True)
    return core


def content_of(core: Path, pid: int) -> bytes:
    """The whole file, once the process is gone; it is removed."""
    wait_until(lambda: not Path(f"/proc/{pid}/maps").exists(), what="its end", limit_s=CORE_LIMIT_S)
    wait_until(core.exists, what=f"{core}", limit_s=CORE_LIMIT_S)
    try:
        return core.read_bytes()
    finally:
        core.unlink()


def words_of(block: bytes, searched: bytes) -> int:
    """How many of the aligned words of what is searched are words of the block, whose bytes are
    random: none is there by chance. What copies memory keeps the place of a byte in its word.
    """
    wanted = np.unique(np.frombuffer(block, np.uint64, count=len(block) // 8))
    words = np.frombuffer(searched, np.uint64, count=len(searched) // 8)
    found = 0
    for begin in range(0, len(words), STEP_WORDS):
        step = words[begin : begin + STEP_WORDS]
        step = step[step != 0]
        at = np.minimum(np.searchsorted(wanted, step), len(wanted) - 1)
        found += int((wanted[at] == step).sum())
    return found


@pytest.fixture
def host() -> Iterator[Host]:
    with TemporaryDirectory(prefix="kvray-") as runtime:
        host = Host(Path(runtime))
        yield host
        host.close()


@pytest.mark.parametrize("how", ["linked", "unlinked"])
def test_who_maps_a_slab_as_an_engine_does_leaves_none_of_it(host: Host, how: str) -> None:
    slab = host.open()
    place = Writer(slab).reserve(key_of(1))
    secret = secrets.token_bytes(place.bytes)
    slab.memory[place.offset : place.offset + place.bytes] = secret
    with host.process("map", path=str(slab.paths.slab), slab_id=slab.slab_id.hex()) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "mapped\n"
        if how == "unlinked":
            slab.paths.slab.unlink()
        core = dump_everything(process.pid)
        os.kill(process.pid, signal.SIGABRT)
        process.wait(CORE_LIMIT_S)
        dumped = content_of(core, process.pid)
    assert NODE[:16].encode() in dumped, "a core of that process: the slab's path was its argument"
    assert words_of(secret, bytes(slab.memory)) == len(secret) // 8, "it could be found"
    assert words_of(secret, dumped) == 0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(2) as running:
        yield running


def test_a_node_store_at_work_leaves_none_of_its_blocks_nor_of_its_neighbours(nodes: Nodes) -> None:
    a, b = (Client(nodes.cluster, node_id) for node_id in nodes.node_ids)
    try:
        ours, theirs = a.store("ours"), b.store("theirs")
        nodes.wait_listed([*ours, *theirs])
        assert b.hits(ours) == a.hits(theirs) == 1, "each has read from the other"
        for node in nodes.cluster.nodes():
            core = dump_everything(node.pid)
            os.kill(node.pid, signal.SIGABRT)
            dumped = content_of(core, node.pid)
            assert node.node_id.encode() in dumped, "a core of that NodeStore"
            assert [words_of(payload_of(key), dumped) for key in (*ours, *theirs)] == [0, 0]
    finally:
        a.close()
        b.close()
