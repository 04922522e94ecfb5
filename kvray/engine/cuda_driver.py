"""CUDA's driver API, as far as kvray calls it: ctypes on libcuda, which comes with the driver.

Not the runtime API: a process with torch and cupy may have two runtimes (CUDA 12 and 13, one of
them linked statically), each with its own idea of the current device; there is one driver. Every
call lets go of the GIL. Signatures: cuda.h of CUDA 12.9 and 13.5, which tests/gpu/host_cuda.c is
compiled against. Not run on a GPU yet.

The batched copy exists from driver 12.8 on, with a pointer to the index that failed; 13.0 has a
second version without it. cupy 14.2 offers neither.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from typing import Any

LIBRARY = "libcuda.so.1"
BATCH_VERSION = 12_080  # cuMemcpyBatchAsync
BATCH_VERSION_2 = 13_000  # the one without failIdx

_NOT_READY = 600  # CUDA_ERROR_NOT_READY: an event that has not fired
_STREAM_NON_BLOCKING = 1  # does not wait for, nor hold up, the default stream
_EVENT_WITHOUT_TIMES = 2
_PORTABLE, _MAPPED = 1, 2  # for all contexts of the process; kernels may use it
_CAPTURE_RELAXED = 2
_CAN_USE_HOST_POINTER = 91  # kernels may use the address that the CPU uses
_LAST_PRIORITY = 0  # the default; there is none below it

_u64 = ctypes.c_uint64  # CUdeviceptr

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuDevicePrimaryCtxGetState": (c_int, POINTER(c_uint), POINTER(c_int)),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cuStreamCreateWithPriority": (POINTER(c_void_p), c_uint, c_int),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(_u64), c_size_t),
    "cuMemFree_v2": (_u64,),
    "cuMemcpyHtoDAsync_v2": (_u64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _u64, c_size_t, c_void_p),
}


class CudaError(Exception):
    """What the driver has refused. name: CUDA's name of the error."""

    def __init__(self, call: str, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.call = call
        self.name = name


class _Location(Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _Attributes(Structure):
    """CUmemcpyAttributes. The hints are for managed memory, which neither side is."""

    _fields_ = (
        ("source_order", c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", c_uint),
    )


# In the order of the stream, as a store must be: the model writes what it reads. Or in any order:
# nothing on the GPU writes what a load reads, so the driver may read ahead.
IN_STREAM_ORDER, IN_ANY_ORDER = 1, 3


class Driver:
    """The driver of this process. Handles (contexts, streams, events) are plain numbers. Raises
    CudaError for what the driver refuses, OSError if there is no driver.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(library)
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        self._error_name = self._library.cuGetErrorName
        self._error_name.argtypes = (c_int, POINTER(c_char_p))
        self._call("cuInit", 0)
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        self.version = version.value
        self._batch = self._find_batch()

    def _find_batch(self) -> Any:
        """The batched copy that this driver has, or None."""
        rows = (c_void_p, c_void_p, c_void_p, c_size_t, POINTER(_Attributes), POINTER(c_size_t))
        if self.version >= BATCH_VERSION_2:
            call = getattr(self._library, "cuMemcpyBatchAsync_v2", None)
            if call is not None:
                call.argtypes = (*rows, c_size_t, c_void_p)
                return call
        if self.version >= BATCH_VERSION:
            call = getattr(self._library, "cuMemcpyBatchAsync", None)
            if call is not None:
                call.argtypes = (*rows, c_size_t, POINTER(c_size_t), c_void_p)
                return call
        return None

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = c_char_p()
            self._error_name(code, byref(text))
            raise CudaError(name, (text.value or b"error %d" % code).decode())

    # -- devices and contexts --------------------------------------------------------------------

    def device_count(self) -> int:
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def device_name(self, ordinal: int) -> str:
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), self._device(ordinal))
        return name.value.decode()

    def _device(self, ordinal: int) -> int:
        device = c_int()
        self._call("cuDeviceGet", byref(device), ordinal)
        return device.value

    def kernels_see_host_pointers(self, ordinal: int) -> bool:
        """Whether a kernel may use a registered address as it is."""
        found = c_int()
        self._call(
            "cuDeviceGetAttribute", byref(found), _CAN_USE_HOST_POINTER, self._device(ordinal)
        )
        return bool(found.value)

    def has_context(self, ordinal: int) -> bool:
        """Whether this process has a primary context on the device. Makes none."""
        flags, active = c_uint(), c_int()
        self._call("cuDevicePrimaryCtxGetState", self._device(ordinal), byref(flags), byref(active))
        return bool(active.value)

    def retain_context(self, ordinal: int) -> int:
        """The device's primary context: the one that torch uses."""
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device(ordinal))
        assert context.value
        return context.value

    def release_context(self, ordinal: int) -> None:
        self._call("cuDevicePrimaryCtxRelease_v2", self._device(ordinal))

    @contextmanager
    def in_context(self, context: int) -> Iterator[None]:
        """On this thread, which may be capturing a graph meanwhile, or be beside one that is."""
        self._call("cuCtxPushCurrent_v2", context)
        mode = c_int(_CAPTURE_RELAXED)
        try:
            # vLLM captures graphs in the mode in which other threads' calls would spoil them.
            self._call("cuThreadExchangeStreamCaptureMode", byref(mode))
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", byref(mode))
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    # -- streams and events ----------------------------------------------------------------------

    def make_stream(self) -> int:
        """Of the last priority. (It decides between kernels; copy engines know no priorities.)"""
        stream = c_void_p()
        self._call(
            "cuStreamCreateWithPriority", byref(stream), _STREAM_NON_BLOCKING, _LAST_PRIORITY
        )
        assert stream.value
        return stream.value

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def wait_event(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def make_event(self, *, has_time: bool) -> int:
        event = c_void_p()
        self._call("cuEventCreate", byref(event), 0 if has_time else _EVENT_WITHOUT_TIMES)
        assert event.value
        return event.value

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def has_fired(self, event: int) -> bool:
        code = self._library.cuEventQuery(event)
        if code == _NOT_READY:
            return False
        self._check("cuEventQuery", code)
        return True

    def seconds(self, begin: int, end: int) -> float:
        milliseconds = c_float()
        self._call("cuEventElapsedTime", byref(milliseconds), begin, end)
        return milliseconds.value / 1_000

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", event)

    # -- memory ----------------------------------------------------------------------------------

    def register(self, address: int, length_bytes: int) -> None:
        """Lock these pages and let the device read and write them."""
        self._call("cuMemHostRegister_v2", address, length_bytes, _PORTABLE | _MAPPED)

    def unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def allocate_host(self, length_bytes: int) -> int:
        """Locked memory of its own."""
        address = c_void_p()
        self._call("cuMemHostAlloc", byref(address), length_bytes, _PORTABLE)
        assert address.value
        return address.value

    def free_host(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def allocate(self, length_bytes: int) -> int:
        """On the device."""
        address = _u64()
        self._call("cuMemAlloc_v2", byref(address), length_bytes)
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def copy_in(self, target: int, source: int, length_bytes: int, stream: int) -> None:
        """Host to device. From memory that is not registered it is read before this returns."""
        self._call("cuMemcpyHtoDAsync_v2", target, source, length_bytes, stream)

    def copy_out(self, target: int, source: int, length_bytes: int, stream: int) -> None:
        """Device to host. Into memory that is not registered it has ended when this returns."""
        self._call("cuMemcpyDtoHAsync_v2", target, source, length_bytes, stream)

    @property
    def has_batches(self) -> bool:
        return self._batch is not None

    def copy_batch(
        self, targets: int, sources: int, sizes: int, count: int, *, source_order: int, stream: int
    ) -> None:
        """targets, sources, sizes: addresses of arrays of `count` 64-bit words, which stay as they
        are until the stream has done it. The copies of a batch have no order among themselves.
        """
        assert count, "CUDA knows no batch of nothing"
        attributes, first = _Attributes(source_order=source_order), c_size_t(0)
        rows = targets, sources, sizes, count, byref(attributes), byref(first), 1
        if len(self._batch.argtypes) == len(rows) + 1:
            self._check("cuMemcpyBatchAsync_v2", self._batch(*rows, stream))
            return
        failed = c_size_t()
        self._check("cuMemcpyBatchAsync", self._batch(*rows, byref(failed), stream))


@cache
def the_driver() -> Driver | None:
    """None where there is none, or none that may be used."""
    try:
        return Driver()
    except (OSError, AttributeError, CudaError):
        return None
