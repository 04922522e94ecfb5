"""Goal: a slab that does not fit is refused with the numbers, before anything is allocated.
Method: the arithmetic on made-up hosts, and the real host with sizes that it can not have.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kvray.core.layout import Geometry
from kvray.errors import ConfigError
from kvray.node.memory import HostMemory, check_size, lock_refusal, prefault, read_host_memory
from kvray.node.slab_file import SHM_DIRECTORY
from tests.slabs import GEOMETRY, NODE, Host, Writer, key_of, ready_blocks

GIB = 1024**3
ROOMY = HostMemory(
    shm_free=50 * GIB, shm_total=50 * GIB, available=90 * GIB, total=100 * GIB, used=10 * GIB
)


@pytest.fixture
def host() -> Iterator[Host]:
    with TemporaryDirectory(prefix="kvray-") as runtime:  # a socket's path must be short
        host = Host(Path(runtime))
        yield host
        host.close()


def changed(**numbers: int) -> HostMemory:
    known = {name: getattr(ROOMY, name) for name in ROOMY.__slots__}
    return HostMemory(**(known | numbers))


@pytest.mark.parametrize(
    ("memory", "numbers"),
    [
        (changed(shm_free=9 * GIB), (10 * GIB, 9 * GIB, 50 * GIB)),
        (changed(available=9 * GIB), (10 * GIB, 9 * GIB, 100 * GIB)),
        (changed(used=86 * GIB), (10 * GIB, 96 * GIB, 95 * GIB)),
    ],
    ids=["shm", "available", "ray"],
)
def test_a_slab_that_does_not_fit_is_refused_with_the_numbers(
    memory: HostMemory, numbers: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="Make slab_bytes smaller") as refusal:
        check_size(10 * GIB, memory=memory, freed_bytes=0, memory_usage_threshold=0.95)
    for number in numbers:
        assert str(number) in str(refusal.value)


@pytest.mark.parametrize(
    "exact",
    [changed(shm_free=10 * GIB), changed(available=10 * GIB), changed(used=85 * GIB)],
    ids=["shm", "available", "ray"],
)
def test_a_slab_that_fits_exactly_is_allowed(exact: HostMemory) -> None:
    check_size(10 * GIB, memory=exact, freed_bytes=0, memory_usage_threshold=0.95)
    with pytest.raises(ConfigError):
        check_size(10 * GIB + 1, memory=exact, freed_bytes=0, memory_usage_threshold=0.95)


def test_what_the_old_slab_gives_back_counts() -> None:
    full = changed(shm_free=GIB, available=GIB, used=94 * GIB)
    with pytest.raises(ConfigError):
        check_size(10 * GIB, memory=full, freed_bytes=0, memory_usage_threshold=0.95)
    check_size(10 * GIB, memory=full, freed_bytes=9 * GIB, memory_usage_threshold=0.95)


def test_without_rays_monitor_its_threshold_does_not_count() -> None:
    check_size(10 * GIB, memory=changed(used=94 * GIB), freed_bytes=0, memory_usage_threshold=1.0)


def test_the_host_itself_is_refused_nothing_and_asked_nothing_impossible() -> None:
    memory = read_host_memory(SHM_DIRECTORY)
    found = os.statvfs(SHM_DIRECTORY)
    assert memory.shm_total == found.f_blocks * found.f_frsize
    assert 0 < memory.available <= memory.total
    assert 0 < memory.used < memory.total


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {
                "memory.max": str(4 * GIB),
                "memory.current": str(3 * GIB),
                "memory.stat": f"anon 5\nactive_file {GIB // 2}\ninactive_file {GIB // 2}\n",
            },
            (4 * GIB, 2 * GIB),
        ),
        (
            {
                "memory/memory.limit_in_bytes": str(4 * GIB),
                "memory/memory.usage_in_bytes": str(GIB),
                "memory/memory.stat": "total_active_file 0\ntotal_inactive_file 0\n",
            },
            (4 * GIB, GIB),
        ),
        ({"memory.max": "max", "memory.current": "1", "memory.stat": ""}, None),
        (
            {
                "memory/memory.limit_in_bytes": str(2**63 - 4096),
                "memory/memory.usage_in_bytes": "1",
                "memory/memory.stat": "",
            },
            None,
        ),
        ({}, None),
    ],
    ids=["v2", "v1", "v2 without limit", "v1 without limit", "no cgroup"],
)
def test_a_container_has_the_memory_of_its_limit(
    tmp_path: Path, files: dict[str, str], expected: tuple[int, int] | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    memory = read_host_memory(SHM_DIRECTORY, cgroup=tmp_path)
    if expected is None:
        page_count = os.sysconf("SC_PHYS_PAGES")
        assert memory.total == page_count * os.sysconf("SC_PAGE_SIZE")
    else:
        assert (memory.total, memory.used) == expected
        assert memory.available <= memory.total - memory.used


def test_a_slab_larger_than_the_host_is_refused_and_the_old_one_kept(host: Host) -> None:
    before = host.open()
    Writer(before).write(key_of(1))
    before.close(unlink=False)
    free_before = os.statvfs(SHM_DIRECTORY).f_bavail
    too_large = os.statvfs(SHM_DIRECTORY).f_blocks * os.sysconf("SC_PAGE_SIZE") + GIB

    with pytest.raises(ConfigError, match=r"/dev/shm has \d+ bytes free of \d+, and 2097152 more"):
        host.open(geometry=Geometry(slab_bytes=too_large, extent_bytes=64 * 1024**2))

    assert abs(os.statvfs(SHM_DIRECTORY).f_bavail - free_before) < 10_000
    assert list(ready_blocks(host.open())) == [key_of(1)]


def test_rays_threshold_is_asked_before_the_slab_is_made(host: Host) -> None:
    with pytest.raises(ConfigError, match="RAY_memory_usage_threshold=0"):
        host.open(memory_usage_threshold=0.0001)
    assert host.files() == []


# ── locking in memory ────────────────────────────────────────────────────────────────────────────


def run_unprivileged(host: Host, lock: str, memlock_bytes: int) -> str:
    with host.process("refused", lock=lock, memlock_bytes=memlock_bytes) as process:
        said, _ = process.communicate(timeout=60)
    return said.strip()


def test_lock_required_is_refused_before_anything_is_allocated(host: Host) -> None:
    said = run_unprivileged(host, "required", 64 * 1024)
    assert said.startswith("ConfigError lock=required: the slab has 2097152 bytes")
    assert "may lock 65536 and 65536" in said
    assert "ulimit -l" in said
    assert host.files() == []


def test_lock_auto_goes_on_without(host: Host) -> None:
    assert run_unprivileged(host, "auto", 64 * 1024) == "open False"


@pytest.mark.parametrize("lock", ["auto", "required"])
def test_a_slab_within_the_limit_is_locked(host: Host, lock: str) -> None:
    assert run_unprivileged(host, lock, 4 * GEOMETRY.slab_bytes) == "open True"


def test_lock_off_does_not_ask(host: Host) -> None:
    assert run_unprivileged(host, "off", 4 * GEOMETRY.slab_bytes) == "open False"


def test_asking_whether_it_may_be_locked_locks_nothing() -> None:
    def locked() -> list[str]:
        status = Path("/proc/self/status").read_text().splitlines()
        return [line for line in status if line.startswith(("VmLck", "VmPin"))]

    before = locked()
    lock_refusal(16 * GIB)  # whatever the answer is here
    assert locked() == before


def test_prefaulting_an_old_kernels_way_touches_every_page(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = host.open()
    path = SHM_DIRECTORY / f"kvray-{host.cluster}-{NODE[:16]}.slab"
    assert path.stat().st_blocks * 512 == GEOMETRY.slab_bytes
    monkeypatch.setattr("kvray.node.memory.populate_pages", lambda *_: False)
    slab.memory[4096 * 5] = 1
    prefault(slab.address + 4096, 4096 * 7)
    assert bytes(slab.memory[4096 : 4096 * 8 : 4096]) == bytes(7)
