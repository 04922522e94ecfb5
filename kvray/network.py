"""On which network interfaces kvray's processes listen.

A process that can open a TCP connection to UCX can read and write this process's memory
(SECURITY.md), and UCX listens on all interfaces unless it is told on which ones. So it is told: the
interface of the address that Ray knows this node by, and the RDMA devices. Where that address is
loopback, as in a cluster that `kvray start` has begun, nobody on the network can connect.
"""

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INFINIBAND = Path("/sys/class/infiniband")
PROC = Path("/proc/self")
ACTIVE = "4"  # how the state of a port that works begins (sysfs-class-infiniband)
LISTENS = "0A"  # TCP_LISTEN in /proc/net/tcp
LOOPBACK = "lo"
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_REQUEST = struct.Struct("16s24s")  # struct ifreq: name, address


@dataclass(frozen=True, slots=True)
class Listener:
    """A port of this process. address: as the kernel has it; "0.0.0.0" and "::" are all of them."""

    address: str
    port: int


def ucx_devices(node_address: str, infiniband: Path = INFINIBAND) -> str:
    """For UCX_NET_DEVICES. Empty, for UCX's own choice, if no interface has that address: then the
    network translates it, and which interface it comes in by is not known here.
    """
    interface = interface_of(node_address)
    if interface is None:
        return ""
    if interface == LOOPBACK:
        return interface
    ports = sorted(infiniband.glob("*/ports/*"))
    active = [port for port in ports if _text(port / "state").startswith(ACTIVE)]
    return ",".join([*(f"{port.parent.parent.name}:{port.name}" for port in active), interface])


def interface_of(address: str) -> str | None:
    """The one that has this address; loopback for all of its addresses."""
    try:
        wanted = ipaddress.ip_address(address)
    except ValueError:
        return None
    if wanted.is_loopback:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address of this family
                answer = fcntl.ioctl(sock, _GET_ADDRESS, _REQUEST.pack(name.encode(), b""))
                if ipaddress.IPv4Address(answer[20:24]) == wanted:
                    return name
    for line in _text(Path("/proc/self/net/if_inet6")).splitlines():
        digits, *_, name = line.split()
        if ipaddress.IPv6Address(bytes.fromhex(digits)) == wanted:
            return name
    return None


def listeners(proc: Path = PROC) -> list[Listener]:
    """All TCP ports on which this process listens, Ray's own of it included."""
    own = set()
    for descriptor in (proc / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            own.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in _text(proc / "net" / table).splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and f"socket:[{words[9]}]" in own:
                address, port = words[1].split(":")
                found.add(Listener(_address_of(address), int(port, 16)))
    return sorted(found, key=lambda one: (one.address, one.port))


def _address_of(digits: str) -> str:
    """Each 32 bits of an address are in the order of this machine's bytes."""
    raw = bytes.fromhex(digits)
    words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _text(path: Path) -> str:
    """Empty if the kernel does not say it."""
    try:
        return path.read_text()
    except OSError:
        return ""
