"""What a NodeStore says of the machine that it runs on, for `kvray doctor`."""

import functools
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

from kvray import __version__
from kvray.config import SHM_FOLDER
from kvray.node.memory import read_host_memory
from kvray.node.opening import memory_usage_threshold

NIXL_NAMES = ("nixl", "nixl-cu13", "nixl-cu12")
INFINIBAND = Path("/sys/class/infiniband")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_facts() -> dict[str, Any]:
    """Plain data. memlock_bytes: -1 for no limit. memory_margin_bytes: until Ray kills workers; -1
    if it does not. boot_id: two nodes with the same one are on one machine.
    """
    memory = read_host_memory(Path(SHM_FOLDER))
    threshold = memory_usage_threshold()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    margin_bytes = int(memory.total * threshold) - memory.used
    return {
        "versions": {
            "python": platform.python_version(),
            "kvray": __version__,
            "ray": _version("ray"),
            "nixl": _version(*NIXL_NAMES),
        },
        "boot_id": BOOT_ID.read_text().strip(),
        "shm_free_bytes": memory.shm_free,
        "shm_total_bytes": memory.shm_total,
        "memlock_bytes": -1 if soft == resource.RLIM_INFINITY else soft,
        "memory_margin_bytes": -1 if threshold >= 1 else margin_bytes,
        "rdma_devices": sorted(p.name for p in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else [],
    }


@functools.cache  # metadata is looked for on the disk
def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""
