"""Goal: what kvray takes from a CUDA driver it gives back, it makes no context where none is, and
its kernel compiles. Method: the driver of host_cuda.c, compared by the compiler with cuda.h where
that is installed; NVRTC, which needs no GPU.
"""

import ctypes
import importlib.util
import logging

import pytest

from kvray.engine import gather
from kvray.engine.cuda_driver import CudaError, Driver, _Attributes, the_driver
from tests.gpu.caches import LLAMA_8B
from tests.gpu.rig import ON_THE_HOST, ORDINAL, host_cuda, open_rig, why_no_gpu
from tests.gpu.test_round_trip import BLOCK_COUNT, some_blocks

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # A100, A10, L4, H100, B200, RTX 50


def test_nothing_is_left_in_the_driver(caplog: pytest.LogCaptureFixture) -> None:
    """Streams, events, memory on both sides, registrations, contexts."""
    library = host_cuda()
    if library is None:
        pytest.skip("no C compiler for the host's CUDA driver")
    before = taken(str(library))
    with (
        caplog.at_level(logging.INFO),
        open_rig(ON_THE_HOST[1], LLAMA_8B, "bf16", blocks=BLOCK_COUNT) as rig,
    ):
        places = rig.store(some_blocks(LLAMA_8B, 1))
        rig.load(some_blocks(LLAMA_8B, 2), places)
    after = taken(str(library))
    assert after[:6] == before[:6]
    assert after[6] > before[6], "no batch was copied"
    assert "driver 13000, batched copies yes, gather kernel no" in caplog.text


def taken(library: str) -> list[int]:
    """Streams, events, host and device memory, registrations, contexts; batches and pieces."""
    counts = (ctypes.c_longlong * 8)()
    ctypes.CDLL(library).host_cuda_counts(counts)
    return list(counts)


def test_the_attributes_of_a_batch_are_laid_out_as_cuda_has_them() -> None:
    """As in cuda.h of 12.9 and 13.5: an enum, two locations of two ints, flags."""
    offsets = [getattr(_Attributes, name).offset for name, _ in _Attributes._fields_]
    assert offsets == [0, 4, 12, 20]
    assert ctypes.sizeof(_Attributes) == 24


def test_what_the_driver_refuses_has_its_name() -> None:
    library = host_cuda()
    if library is None:
        pytest.skip("no C compiler for the host's CUDA driver")
    driver = Driver(str(library))
    with pytest.raises(CudaError, match="cuStreamCreateWithPriority: CUDA_ERROR_INVALID_CONTEXT"):
        driver.make_stream()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_compiles(architecture: str) -> None:
    """Needs cupy and NVRTC, no GPU: cupy loads and compiles without one."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed (make install-gpu)")
    from cupy.cuda import nvrtc

    if int(architecture) not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    program = nvrtc.createProgram(gather.SOURCE, "gather.cu", (), ())
    options = (*gather.compile_options(), f"--gpu-architecture=sm_{architecture}")
    nvrtc.compileProgram(program, options)
    assert gather.KERNEL.encode() in nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)


def test_a_driver_that_was_only_asked_makes_no_context() -> None:
    """The same question that test_pair puts to a process with slab and NIXL."""
    driver = the_driver()
    if driver is None:
        pytest.skip(f"needs a GPU: {why_no_gpu()}")
    assert driver.device_count() > 0
    assert isinstance(driver.has_context(ORDINAL), bool)
