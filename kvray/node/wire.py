"""One message over the unix SEQPACKET socket between an engine and its NodeStore.

    send ──▶ one packet: the encoded message, at most MAX_MESSAGE_BYTES, and at most one descriptor
             (SCM_RIGHTS) ──▶ receive

The kernel keeps the bounds of messages: a packet is taken whole or not at all, so several threads
may send on one socket without a lock, and a reader is never in the middle of something. What does
not fit the buffer is cut off by the kernel and flagged; that is a fault of the sender. Bytes in,
bytes out: what they mean is core.codec's. Not here: who may speak (server), when to wait (client).
"""

import array
import os
import socket

import msgspec

from kvray.core.messages import MAX_MESSAGE_BYTES
from kvray.errors import RemoteProtocolError

# The kernel doubles what is asked for. So a message of MAX_MESSAGE_BYTES fits even where the
# default is smaller, and a frozen reader can hold back about two of them before EAGAIN.
SEND_BUFFER_BYTES = MAX_MESSAGE_BYTES + 4_096
FD_BYTES = array.array("i").itemsize
# As plain numbers: an `&` of two enum members takes a microsecond, and each message has two.
NOSIGNAL, CLOEXEC = int(socket.MSG_NOSIGNAL), int(socket.MSG_CMSG_CLOEXEC)
TRUNCATED, RIGHTS_TRUNCATED = int(socket.MSG_TRUNC), int(socket.MSG_CTRUNC)


class Packet(msgspec.Struct, frozen=True, gc=False):
    """One received message. The receiver owns fd and closes it."""

    data: bytes
    fd: int | None = None


def make_buffer() -> bytearray:
    """For receive: reused, since 200 KiB a message would be an mmap each."""
    return bytearray(MAX_MESSAGE_BYTES)


def make_socket() -> socket.socket:
    """A new non-blocking socket of the only kind that is used here."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    prepare(sock)
    return sock


def prepare(sock: socket.socket) -> None:
    """Set up an accepted socket like one of make_socket."""
    sock.settimeout(0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def send(sock: socket.socket, data: bytes, fd: int | None = None) -> None:
    """Send one message, whole or not at all. The descriptor is copied; the caller keeps its own.

    Raises BlockingIOError if the receiver is behind, another OSError if it is gone.
    """
    assert 0 < len(data) <= MAX_MESSAGE_BYTES, "core limits keep every message below this"
    if fd is None:
        sent = sock.send(data, NOSIGNAL)
    else:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
        sent = sock.sendmsg([data], [rights], NOSIGNAL)
    assert sent == len(data)


def receive(sock: socket.socket, buffer: bytearray, *, takes_fd: bool = False) -> Packet | None:
    """Take one message; None at the end of the connection. One thread at a time per buffer.

    With takes_fd=False no descriptor ever enters this process: the kernel drops it and says so.
    Raises BlockingIOError if there is none, another OSError if the connection broke,
    RemoteProtocolError if the packet is longer than buffer or carries descriptors that it may not.
    """
    ancillary_bytes = socket.CMSG_SPACE(FD_BYTES) if takes_fd else 0
    count, ancillary, flags, _ = sock.recvmsg_into((buffer,), ancillary_bytes, CLOEXEC)
    fds = _descriptors(ancillary) if ancillary else []
    try:
        if flags & TRUNCATED:
            raise RemoteProtocolError(f"a message is longer than {len(buffer)} bytes")
        if flags & RIGHTS_TRUNCATED or len(fds) > 1:
            limit = "one descriptor" if takes_fd else "no descriptor"
            raise RemoteProtocolError(f"a message may carry {limit}, this one carries more")
        if count == 0:
            return None  # SEQPACKET can not tell an empty message from the end; nobody sends one
        return Packet(bytes(memoryview(buffer)[:count]), fds.pop() if fds else None)
    finally:
        for fd in fds:  # whatever was not handed out
            os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % FD_BYTES])
    return fds.tolist()
