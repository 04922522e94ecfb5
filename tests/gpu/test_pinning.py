"""Goal: the slab is locked for the device in pieces that no slot crosses, and unlocked whatever
ends first; where it can not be locked, one line says why and what to do. Method: kvray's CUDA code
on the driver of host_cuda.c, which counts what is registered and refuses what a driver would.
"""

import ctypes
import gc
import logging
from collections.abc import Iterator

import pytest

from kvray.core.layout import Geometry
from kvray.engine import pinning
from kvray.engine.cuda import CudaRegistrar
from kvray.engine.cuda_driver import CudaError, Driver
from kvray.engine.pinning import Pins
from tests.gpu.rig import LIMIT_S, ORDINAL, NodeSlab, host_cuda

EXTENT = 256 * 1024
GEOMETRY = Geometry(8 * 1024**2, EXTENT)


@pytest.fixture
def slab() -> Iterator[NodeSlab]:
    slab = NodeSlab(GEOMETRY)
    yield slab
    slab.close()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return make_driver(monkeypatch)


def make_driver(monkeypatch: pytest.MonkeyPatch, *, lockable_bytes: int | None = None) -> Driver:
    library = host_cuda()
    if library is None:
        pytest.skip("no C compiler for the host's CUDA driver")
    monkeypatch.delenv("HOST_CUDA_VERSION", raising=False)
    monkeypatch.delenv("HOST_CUDA_LOCKABLE", raising=False)
    if lockable_bytes is not None:
        monkeypatch.setenv("HOST_CUDA_LOCKABLE", str(lockable_bytes))
    return Driver(str(library))


def pins_of(driver: Driver) -> Pins:
    return Pins(CudaRegistrar(driver, driver.retain_context(ORDINAL)))


def registered(driver: Driver) -> int:
    """How many pieces are."""
    counts = (ctypes.c_longlong * 8)()
    driver._library.host_cuda_counts(counts)  # noqa: SLF001
    return counts[4]


def test_the_payload_is_locked_in_pieces_of_whole_extents(
    slab: NodeSlab, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "PIECE_BYTES", 3 * EXTENT + 1)
    pins, mapped = pins_of(driver), slab.map()
    begin, end = (mapped.address + n for n in (GEOMETRY.payload_offset, GEOMETRY.used_bytes))
    assert not pins.covers(begin, end)
    pins.begin(mapped)
    pins.begin(mapped)  # a NodeStore that came back with the same slab
    assert pins.wait(LIMIT_S)
    assert pins.covers(begin, end)
    assert not pins.covers(begin - 1, end)
    assert not pins.covers(begin, end + 1)
    assert registered(driver) == -(-GEOMETRY.extent_count // 3)
    with (
        driver.in_context(driver.retain_context(ORDINAL)),
        pytest.raises(CudaError, match="ALREADY"),
    ):
        driver.register(begin + 3 * EXTENT, EXTENT)  # where the second piece begins
    pins.close()
    assert registered(driver) == 0
    assert not pins.covers(begin, end)


def test_a_slab_that_is_gone_is_unlocked_before_its_memory_goes(
    slab: NodeSlab, driver: Driver
) -> None:
    """A NodeStore of another geometry: the old slab lasts as long as its last copy."""
    pins, mapped = pins_of(driver), slab.map()
    address = mapped.address
    pins.begin(mapped)
    assert pins.wait(LIMIT_S)
    assert registered(driver) > 0
    del mapped
    gc.collect()
    assert registered(driver) == 0
    assert not pins.covers(address + GEOMETRY.payload_offset, address + GEOMETRY.used_bytes)
    again = slab.map()
    pins.begin(again)
    assert pins.wait(LIMIT_S)
    assert registered(driver) > 0
    pins.close()
    assert registered(driver) == 0


def test_a_slab_that_can_not_be_locked_gives_one_line_that_says_what_to_do(
    slab: NodeSlab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pinning, "PIECE_BYTES", EXTENT)
    driver = make_driver(monkeypatch, lockable_bytes=2 * EXTENT)
    pins, mapped = pins_of(driver), slab.map()
    with caplog.at_level(logging.WARNING):
        pins.begin(mapped)
        assert pins.wait(LIMIT_S)
    (line,) = caplog.messages
    slab_bytes = GEOMETRY.extent_count * EXTENT
    assert f"expected to lock {slab_bytes} bytes, {2 * EXTENT} are" in line
    assert "cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY" in line
    assert "RLIMIT_MEMLOCK" in line
    assert "docker run --ulimit memlock=-1" in line
    begin = mapped.address + GEOMETRY.payload_offset
    assert pins.covers(begin, begin + 2 * EXTENT)
    assert not pins.covers(begin + EXTENT, begin + 3 * EXTENT)
    pins.close()
    assert registered(driver) == 0


def test_nothing_is_locked_after_the_end(slab: NodeSlab, driver: Driver) -> None:
    pins, mapped = pins_of(driver), slab.map()
    pins.close()
    pins.begin(mapped)
    assert registered(driver) == 0
