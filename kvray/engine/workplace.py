"""Who copies for a worker, by where its caches are: threads for a CPU, streams for a GPU.

torch is asked only for what vLLM has loaded it for: the device, and the stream on which the model
runs just now.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from kvray.engine.copier import CpuExecutor, Executor
from kvray.engine.cuda import CudaDevice
from kvray.engine.cuda_driver import LIBRARY, CudaError, the_driver
from kvray.engine.page_tables import PageTables
from kvray.engine.streams import StreamExecutor
from kvray.errors import NotAttachedError
from kvray.node.client import Session

logger = logging.getLogger("kvray.engine")


@dataclass(frozen=True, slots=True)
class Copies:
    """device: of a GPU, whose memory the slab is locked for."""

    executor: Executor
    device: CudaDevice | None = None
    page_tables: PageTables = field(default_factory=PageTables)

    def meet(self, session: Session) -> None:
        """A slab that jobs will be about. What is done for it goes on when this has returned."""
        if session.slab is None:
            return
        self.page_tables.fill(session.slab)
        if self.device is not None:
            self.device.pins.begin(session.slab)

    def close(self) -> bool:
        """Returns when all copies have ended and nothing is locked any more. False: not all have,
        or nobody can tell.
        """
        self.page_tables.stop()
        has_ended = self.executor.close()
        if self.device is None:
            return has_ended
        if not self.device.is_closed:  # the end of the process unlocks it
            logger.warning("the slab stays locked: copies of it have not ended")
            return False
        self.device.let_go()
        return has_ended


def open_copies(device: Any) -> Copies:
    """device: torch's, of the caches. On the worker's own thread, whose device it is.

    Raises NotAttachedError where kvray can not copy.
    """
    if device.type == "cpu":
        return Copies(CpuExecutor())
    assert device.type == "cuda", f"caches on {device}, which support.require_copies refuses"
    driver = the_driver()
    if driver is None:
        raise NotAttachedError(
            f"kvray needs {LIBRARY} with CUDA's driver API to copy for {device}; this process can "
            "not load it. Is NVIDIA's driver visible here (in a container: its compute capability)?"
        )
    ordinal = _ordinal(device)
    try:
        cuda = CudaDevice(driver, ordinal, engine_stream=_current_stream(device))
    except CudaError as exc:
        raise NotAttachedError(f"CUDA's driver refused device {ordinal} to kvray: {exc}") from exc
    return Copies(StreamExecutor(cuda), cuda)


def _ordinal(device: Any) -> int:
    """torch's device numbers are the driver's: both count what CUDA_VISIBLE_DEVICES names."""
    import torch

    return int(torch.cuda.current_device() if device.index is None else device.index)


def _current_stream(device: Any) -> Any:
    import torch

    return lambda: int(torch.cuda.current_stream(device).cuda_stream)


def is_rocm() -> bool:
    """vLLM calls AMD's GPUs cuda, as torch does."""
    import torch

    return torch.version.hip is not None
