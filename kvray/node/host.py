"""What a NodeStore says of the machine that it runs on, for `kvray doctor`."""

import functools
import os
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

from kvray import __version__
from kvray.config import SHM_FOLDER
from kvray.core.way import Counters
from kvray.network import listeners
from kvray.node.memory import read_host_memory
from kvray.node.opening import memory_usage_threshold

NIXL_NAMES = ("nixl", "nixl-cu13", "nixl-cu12")
INFINIBAND = Path("/sys/class/infiniband")
VERBS = Path("/dev/infiniband")  # what UCX opens: not there in a container that was not given it
NET_DEV = Path("/proc/self/net/dev")
RDMA_WORD_BYTES = 4  # the kernel's port_rcv_data counts such (its ABI, sysfs-class-infiniband)
UCX_SETTINGS = ("UCX_TLS", "UCX_NET_DEVICES", "UCX_IB_GID_INDEX")  # that choose the transport
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_facts(node_address: str) -> dict[str, Any]:
    """Plain data. node_address: by which Ray knows this node. memlock_bytes: -1 for no limit.
    memory_margin_bytes: until Ray kills workers; -1 if it does not. boot_id: two nodes with the
    same one are on one machine.
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
        "rdma_ports": {
            name: _text(port / "state") or "unknown" for name, port in _ports(INFINIBAND)
        },
        "has_verbs": any(VERBS.glob("uverbs*")),
        "node_address": node_address,
        "listeners": [[one.address, one.port] for one in listeners()],
        "ucx_settings": {name: os.environ[name] for name in UCX_SETTINGS if name in os.environ},
    }


def read_counters(net_dev: Path = NET_DEV, infiniband: Path = INFINIBAND) -> Counters:
    """What each device has received: interfaces of this process's network namespace, and ports of
    RDMA devices, by "device/port". A port whose driver has no such counter is left out.
    """
    interfaces = {}
    for line in net_dev.read_text().splitlines()[2:]:  # two lines of headings
        name, _, numbers = line.partition(":")
        interfaces[name.strip()] = int(numbers.split()[0])
    ports = {}
    for name, port in _ports(infiniband):
        words = _text(port / "counters" / "port_rcv_data")
        if words.isdigit():
            ports[name] = int(words) * RDMA_WORD_BYTES
    return Counters(interfaces, ports)


def _ports(infiniband: Path) -> list[tuple[str, Path]]:
    found = sorted(infiniband.glob("*/ports/*"))
    return [(f"{port.parent.parent.name}/{port.name}", port) for port in found]


def _text(path: Path) -> str:
    """Empty if the kernel does not say it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@functools.cache  # metadata is looked for on the disk
def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""
