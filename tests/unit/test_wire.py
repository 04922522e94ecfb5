"""One packet over the local socket: whole or not at all, and no descriptor is ever left over."""

import array
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvray.core.messages import MAX_MESSAGE_BYTES
from kvray.errors import RemoteProtocolError
from kvray.node import wire

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        wire.prepare(left)
        wire.prepare(right)
        yield left, right


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def send_fds(sock: socket.socket, data: bytes, *fds: int) -> None:
    """What a client that does not keep to the rules would do."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_the_longest_message_passes_and_keeps_its_bounds(pair: Pair) -> None:
    sender, receiver = pair
    longest = os.urandom(MAX_MESSAGE_BYTES)
    wire.send(sender, longest)
    wire.send(sender, b"next")
    buffer = wire.make_buffer()
    assert wire.receive(receiver, buffer) == wire.Packet(longest)
    assert wire.receive(receiver, buffer) == wire.Packet(b"next")
    with pytest.raises(BlockingIOError):
        wire.receive(receiver, buffer)


def test_a_longer_one_is_a_fault_of_its_sender_and_the_next_one_is_whole(pair: Pair) -> None:
    sender, receiver = pair
    sender.send(bytes(MAX_MESSAGE_BYTES + 1))
    sender.send(b"next")
    buffer = wire.make_buffer()
    with pytest.raises(RemoteProtocolError, match=f"longer than {MAX_MESSAGE_BYTES} bytes"):
        wire.receive(receiver, buffer)
    assert wire.receive(receiver, buffer) == wire.Packet(b"next")


def test_a_receiver_that_is_behind_is_told_to_the_sender(pair: Pair) -> None:
    sender, receiver = pair
    message = bytes(MAX_MESSAGE_BYTES)
    held = 0
    with suppress(BlockingIOError):
        while held < 100:
            wire.send(sender, message)
            held += 1
    assert 1 <= held < 10  # bounded by the kernel's buffer, which holds at least one
    buffer = wire.make_buffer()
    for _ in range(held):
        assert wire.receive(receiver, buffer) == wire.Packet(message)
    wire.send(sender, message)


def test_a_descriptor_is_handed_over_and_stays_the_senders(pair: Pair) -> None:
    sender, receiver = pair
    before = open_fds()
    sent = os.memfd_create("slab")
    os.write(sent, b"of the slab")
    wire.send(sender, b"take it", sent)
    packet = wire.receive(receiver, wire.make_buffer(), takes_fd=True)
    assert packet is not None
    assert packet.data == b"take it"
    assert packet.fd is not None
    assert not os.get_inheritable(packet.fd)
    os.close(sent)
    assert os.pread(packet.fd, 11, 0) == b"of the slab"
    os.close(packet.fd)
    assert open_fds() == before


def test_a_descriptor_that_was_not_asked_for_never_gets_in(pair: Pair) -> None:
    sender, receiver = pair
    before = open_fds()
    send_fds(sender, b"take this", 0)
    with pytest.raises(RemoteProtocolError, match="no descriptor"):
        wire.receive(receiver, wire.make_buffer())
    assert open_fds() == before


@pytest.mark.parametrize("count", [2, 3, 50])
def test_more_than_one_descriptor_is_a_fault_and_none_of_them_stays(pair: Pair, count: int) -> None:
    sender, receiver = pair
    before = open_fds()
    send_fds(sender, b"take these", *[0] * count)
    with pytest.raises(RemoteProtocolError, match="one descriptor"):
        wire.receive(receiver, wire.make_buffer(), takes_fd=True)
    assert open_fds() == before


def test_a_descriptor_of_a_message_that_is_too_long_does_not_stay(pair: Pair) -> None:
    sender, receiver = pair
    before = open_fds()
    send_fds(sender, bytes(MAX_MESSAGE_BYTES + 1), 0)
    with pytest.raises(RemoteProtocolError, match="longer than"):
        wire.receive(receiver, wire.make_buffer(), takes_fd=True)
    assert open_fds() == before


def test_what_was_sent_before_the_end_is_heard_and_then_the_end(pair: Pair) -> None:
    sender, receiver = pair
    wire.send(sender, b"last words")
    sender.close()
    buffer = wire.make_buffer()
    assert wire.receive(receiver, buffer) == wire.Packet(b"last words")
    assert wire.receive(receiver, buffer) is None
    with pytest.raises(BrokenPipeError):  # an error, and no SIGPIPE
        wire.send(receiver, b"anybody there?")


def test_an_empty_packet_with_a_descriptor_is_an_end_and_leaves_nothing(pair: Pair) -> None:
    sender, receiver = pair
    before = open_fds()
    send_fds(sender, b"", 0)
    assert wire.receive(receiver, wire.make_buffer(), takes_fd=True) is None
    assert open_fds() == before
