"""The real link: one-sided NIXL reads over UCX. Nothing else in kvray uses it.

Made for NIXL 1.5.1 and 1.3.2. Tested over cma (same host) and TCP. Not tested over RDMA, for want
of the hardware; what is assumed of it is marked "RDMA:".

- The progress thread stays off: it burns a core for ever. So a peer gets on only while we poll(),
  which matters until a connection has been made and, over TCP, for every byte that it reads.
- A peer that waits for us says so: from 1 ms on, a read that has not ended sends its target a
  notification, which the target's next poll() counts in hints_seen. cma and (RDMA:) real one-sided
  transports have mostly ended by then and send none.
- One transfer a segment. NIXL keeps only the last UCX request of a transfer with many segments and
  frees the others while they are in progress, so an error of such a transfer says nothing about
  who still writes where. Of a transfer with one segment it does. That costs some microseconds a
  segment, which shows in small slots; segments that touch are one (Segments.coalesced).
- Over cma nothing is ever in progress: the bytes are copied within the call that posts. So a peer
  whose segments have all ended like that, and many of them (AT_ONCE_SEGMENTS), gets a read as one
  transfer; one segment that has not, or a failure, and it is one transfer a segment again. Should
  such a transfer fail after its post all the same, nobody knows what is still written, and the
  read never ends: it is lost, and its slots stay in quarantine for as long as the process lives.
  Its peer gets a new connection, as after any failure: nothing is asked of its handles any more.
- So transfers are made by the bindings themselves, not by nixl_agent: its wrapper costs one more
  microsecond for each, and its handles release themselves when they are collected.
- A handle is released when it has ended, never before: releasing cancels, and what is cancelled
  may write all the same. A peer is not removed while a read from it is in flight, because NIXL
  then answers NOT_FOUND for the handle, whatever the transfer does.
- An error means (by the sources of NIXL and UCX; nobody promises it) that the endpoint has failed:
  UCX closes it by force and completes all that was in flight on it, in its next progress calls.
  NIXL reports the first error it sees, not the last end (and 1.3.2 forgets a peer that has
  disconnected: NOT_FOUND for its other handles). So a failed read is in flight until SETTLE_POLLS
  and SETTLE_NS have passed.

- A network that goes silent gives no error. TCP waits for it for a quarter of an hour, longer and
  longer between two attempts, so that a link that has been healed would stay dead for as long as it
  was cut. TCP_LIMITS end such a connection soon; the next read makes another one.

UCX chooses the transports, and needs no setting; it is told the interfaces (UCX_NET_DEVICES, unless
that is set), since it listens on all of them else. `transports` narrows the choice (UCX's names, as
"tcp" or "rc,cuda_copy"): it becomes the variable UCX_TLS of this process, set before the agent is
made and therefore never in a process that does other things with UCX. A UCX_TLS that is there
already wins: whoever set it knows this host.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvray.core.ids import ReadId
from kvray.errors import LinkError
from kvray.link.base import ReadEnd, ReadOutcome, Segments, Words
from kvray.link.nixl_package import load_nixl

nixl = load_nixl()

logger = logging.getLogger(__name__)

HINT_AFTER_NS = 1_000_000  # a read over cma or (RDMA:) a NIC has mostly ended by then
HINT_EVERY_NS = 25_000_000  # several in the time for which a target stays awake after one
HINT = b"kvray is reading"
# RDMA: a NIC may write until UCX has moved the queue pair to the error state and flushed it; that
# takes some progress calls and much less than a millisecond. Over cma and TCP nothing writes but
# our own progress calls.
# In a row. A read over a network needs its peer's answer, and hardly ever has it when its post
# returns; so often never.
AT_ONCE_SEGMENTS = 64
SETTLE_POLLS = 8
SETTLE_NS = 20_000_000

# Settings of UCX, unless somebody has set them: for how long sent bytes may be unacknowledged, and
# what tells a connection that only listens that its peer is gone. (A read is abandoned after 1 s.)
# The UCX of NIXL 1.3.2 does not know the first.
TCP_LIMITS = {
    "UCX_TCP_USER_TIMEOUT": "1500ms",
    "UCX_TCP_KEEPIDLE": "2s",
    "UCX_TCP_KEEPINTVL": "1s",
    "UCX_TCP_KEEPCNT": "2",
}

# NIXL's exceptions have no base of their own.
_ERRORS: tuple[type[Exception], ...] = (
    *(
        error
        for error in vars(nixl._bindings).values()  # noqa: SLF001 (the package offers no other way)
        if isinstance(error, type) and issubclass(error, Exception)
    ),
    RuntimeError,  # from pybind11: a C++ exception that NIXL did not expect
)

_READ = nixl._bindings.NIXL_READ  # noqa: SLF001
_DONE = nixl._bindings.NIXL_SUCCESS  # noqa: SLF001
_IN_PROGRESS = nixl._bindings.NIXL_IN_PROG  # noqa: SLF001
_AS_PREPARED = True  # do not look for segments that could be merged: there is one

# Agents that were closed with reads in flight, and what those hold. They end with the process.
_unended: list[Any] = []


@dataclass(slots=True, eq=False)
class _Peer:
    """in_flight reads keep it in the agent. leaving: it goes when they have ended. broken: its
    connection has failed; a new one is made before the next read.
    """

    name: str
    metadata: bytes
    in_flight: int = 0
    leaving: bool = False
    broken: bool = False
    hinted_ns: int = 0
    ended_at_once: int = 0  # segments in a row that had ended when their post returned

    @property
    def ends_at_once(self) -> bool:
        """As over cma."""
        return self.ended_at_once >= AT_ONCE_SEGMENTS


@dataclass(slots=True, eq=False)
class _Read:
    """Ended when handles is empty and it has settled. failure: why it is not DONE."""

    read_id: ReadId
    peer: _Peer
    posted_ns: int
    handles: deque[int] = field(default_factory=deque)
    failed_handles: list[int] = field(default_factory=list)  # kept until it has settled
    failure: str = ""
    joint_handles: set[int] = field(default_factory=set)  # of several segments, in progress
    is_lost: bool = False  # one of those has failed: nobody will know when all has ended
    settled_ns: int = 0
    settle_polls: int = 0
    abandoned: bool = False


class NixlLink:
    """A Link. name must carry the epoch. Making one takes 0.4 to 1.4 s the first time."""

    def __init__(self, name: str, *, transports: str = "", devices: str = "") -> None:
        """devices: on which UCX may listen and connect, see kvray.network; empty: all."""
        if transports:
            present = os.environ.setdefault("UCX_TLS", transports)
            if present != transports:
                logger.info("UCX_TLS is %s here; transports=%s ignored", present, transports)
        for variable, value in TCP_LIMITS.items():
            os.environ.setdefault(variable, value)
        if devices:
            os.environ.setdefault("UCX_NET_DEVICES", devices)
        self.name = name
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[ReadId, _Read] = {}
        self._lost: dict[ReadId, _Read] = {}  # in flight for ever, and their peers' no more
        self._registered: list[Any] = []
        self._hints_seen = 0
        with _named(f"no NIXL agent {name}"):
            self._agent: Any = nixl.nixl_agent(
                name, nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            )
        self._transfers: Any = self._agent.agent  # the bindings' own agent; its handles are numbers
        if "UCX" not in self._agent.backends:
            raise LinkError("NIXL has no UCX backend here; is the wheel whole?")

    @property
    def metadata(self) -> bytes:
        with _named("no metadata"):
            return bytes(self._agent.get_agent_metadata())

    @property
    def in_flight(self) -> int:
        return len(self._reads) + len(self._lost)

    @property
    def hints_seen(self) -> int:
        return self._hints_seen

    def register(self, address: int, length_bytes: int) -> None:
        with _named(f"{length_bytes} bytes at {address:#x} can not be registered"):
            self._registered.append(
                self._agent.register_memory([(address, length_bytes, 0, "")], "DRAM")
            )

    def connect(self, peer_name: str, peer_metadata: bytes) -> None:
        old = self._peers.get(peer_name)
        if old is not None:
            if old.in_flight:
                raise LinkError(f"{old.in_flight} reads from {peer_name} have not ended")
            self._remove(old)
        peer = _Peer(peer_name, peer_metadata)
        self._add(peer)
        self._peers[peer_name] = peer

    def disconnect(self, peer_name: str) -> None:
        peer = self._peers.get(peer_name)
        if peer is None:
            return
        if peer.in_flight:
            peer.leaving = True
        else:
            self._remove(peer)

    def post_read(self, read_id: ReadId, peer_name: str, segments: Segments) -> None:
        assert read_id not in self._reads
        assert read_id not in self._lost
        peer = self._peers.get(peer_name)
        if peer is None or peer.leaving:
            raise LinkError(f"{peer_name} is not connected")
        if peer.broken:
            self._restore(peer)
        read = _Read(read_id, peer, time.monotonic_ns())
        runs = segments.coalesced()
        with (
            self._prepared("NIXL_INIT_AGENT", runs.local, runs.bytes) as local,
            self._prepared(peer_name, runs.remote, runs.bytes) as remote,
        ):
            posted = 0
            while posted < len(runs) and not read.failure:
                count = len(runs) - posted if peer.ends_at_once else 1
                self._post(read, local, remote, list(range(posted, posted + count)))
                posted += count
        if read.failure and not read.handles and not read.failed_handles:
            raise LinkError(f"read from {peer_name}: {read.failure}")
        self._reads[read_id] = read
        peer.in_flight += 1

    def poll(self) -> list[ReadEnd]:
        with _named("NIXL made no progress"):
            self._hints_seen += sum(map(len, self._agent.get_new_notifs().values()))
        ends = []
        now_ns = time.monotonic_ns()
        for read in list(self._reads.values()):
            self._advance(read)
            if read.is_lost:
                self._lose(read)
                continue
            if read.handles:
                self._hint(read, now_ns)
            elif read.settle_polls:
                read.settle_polls -= 1
            elif now_ns >= read.settled_ns:
                ends.append(self._end(read))
        return ends

    def abandon(self, read_id: ReadId) -> None:
        read = self._reads.get(read_id)
        if read is not None:
            read.abandoned = True

    def close(self) -> None:
        if self.in_flight:
            _unended.append((self._agent, self._reads, self._lost))
            logger.warning(
                "%s closed with %d reads that have not ended; they end with this process",
                self.name,
                self.in_flight,
            )
        else:
            for peer in list(self._peers.values()):
                self._remove(peer)
            with suppress(*_ERRORS):  # given back with the agent then
                for region in self._registered:
                    self._agent.deregister_memory(region)
        self._registered = []
        self._peers = {}
        self._reads, self._lost = {}, {}
        self._agent = self._transfers = None

    # -- reads -------------------------------------------------------------------------------

    @contextmanager
    def _prepared(self, agent_name: str, addresses: Words, sizes_bytes: Words) -> Iterator[int]:
        """NIXL's list of one side of a read. LinkError if not all of it is registered there."""
        rows = np.column_stack((addresses, sizes_bytes, np.zeros_like(addresses)))
        with _named(f"not to be had from {agent_name}"):
            listed = self._agent.prep_xfer_dlist(agent_name, rows, "DRAM")
        try:
            yield listed._handle  # noqa: SLF001 (its number, for the bindings)
        finally:  # what has been posted has its own copy
            with suppress(*_ERRORS):
                self._agent.release_dlist_handle(listed)

    def _post(self, read: _Read, local: int, remote: int, where: list[int]) -> None:
        """Post these segments: a handle more, or bytes that are here already, or a failure."""
        peer = read.peer
        try:
            handle = self._transfers.makeXferReq(
                _READ, local, where, remote, where, b"", [], _AS_PREPARED
            )
        except _ERRORS as exc:  # 1.3.2: the post before it has found the peer gone
            self._fail(read, exc, None)
            return
        try:
            state = self._transfers.postXferReq(handle, b"")
        except _ERRORS as exc:
            self._fail(read, exc, handle)
        else:
            if state == _DONE:
                peer.ended_at_once += len(where)
                self._release(handle)
            else:
                peer.ended_at_once = 0
                read.handles.append(handle)
                if len(where) > 1:
                    read.joint_handles.add(handle)

    def _advance(self, read: _Read) -> None:
        """Drop the handles that have ended. Looks no further than the first that has not: UCX
        works in order, and each look is a call into NIXL, which makes progress on all.
        """
        while read.handles:
            handle = read.handles[0]
            try:
                state = self._transfers.getXferStatus(handle)
            except _ERRORS as exc:
                self._fail(read, exc, read.handles.popleft())
                continue
            if state == _IN_PROGRESS:
                return
            read.handles.popleft()
            if state == _DONE:
                read.joint_handles.discard(handle)
                self._release(handle)
            else:
                self._fail(read, RuntimeError(str(state)), handle)

    def _fail(self, read: _Read, exc: Exception, handle: int | None) -> None:
        """handle: one that UCX may have to do with; None if nothing has been given to it."""
        read.failure = read.failure or _text(exc)
        read.peer.ended_at_once = 0
        if handle is None:
            return
        read.is_lost = read.is_lost or handle in read.joint_handles
        read.failed_handles.append(handle)
        read.peer.broken = True
        read.settled_ns = time.monotonic_ns() + SETTLE_NS
        read.settle_polls = SETTLE_POLLS

    def _lose(self, read: _Read) -> None:
        """Its handles are kept, and never asked again: so its peer may go, or be connected anew."""
        logger.error("a read from %s will never end: %s", read.peer.name, read.failure)
        self._lost[read.read_id] = self._reads.pop(read.read_id)
        self._leave(read.peer)

    def _end(self, read: _Read) -> ReadEnd:
        del self._reads[read.read_id]
        for handle in read.failed_handles:
            self._release(handle)
        self._leave(read.peer)
        if read.failure:
            return ReadEnd(read.read_id, ReadOutcome.FAILED, read.failure)
        return ReadEnd(read.read_id, ReadOutcome.DONE)

    def _hint(self, read: _Read, now_ns: int) -> None:
        peer = read.peer
        if (
            not read.abandoned
            and now_ns - read.posted_ns > HINT_AFTER_NS
            and now_ns - peer.hinted_ns > HINT_EVERY_NS
        ):
            peer.hinted_ns = now_ns
            with suppress(*_ERRORS):  # what is wrong with the peer, the read itself will say
                self._agent.send_notif(peer.name, HINT)

    def _release(self, handle: int) -> None:
        with suppress(*_ERRORS):  # it has ended: at worst its memory is kept
            self._transfers.releaseXferReq(handle)

    # -- peers -------------------------------------------------------------------------------

    def _add(self, peer: _Peer) -> None:
        try:
            found = self._agent.add_remote_agent(peer.metadata)
            found_name = found.decode() if isinstance(found, bytes) else str(found)
        except Exception as exc:  # whatever is wrong with it is in what the peer has announced
            self._drop(peer.name)  # it may have been added in part
            raise LinkError(f"{peer.name} can not be connected: {_text(exc)}") from exc
        if found_name != peer.name:
            if found_name not in self._peers:
                self._drop(found_name)
            raise LinkError(f"the metadata of {peer.name} are those of {found_name}")

    def _leave(self, peer: _Peer) -> None:
        """One read fewer depends on it."""
        peer.in_flight -= 1
        if peer.leaving and not peer.in_flight:
            self._remove(peer)

    def _remove(self, peer: _Peer) -> None:
        assert not peer.in_flight
        self._peers.pop(peer.name, None)
        self._drop(peer.name)

    def _drop(self, peer_name: str) -> None:
        with suppress(*_ERRORS):  # it is not there, or 1.3.2 has removed it
            self._agent.remove_remote_agent(peer_name)

    def _restore(self, peer: _Peer) -> None:
        """A new connection to a peer whose old one has failed."""
        if peer.in_flight:
            raise LinkError(f"{peer.name} has failed, and {peer.in_flight} reads have not ended")
        self._drop(peer.name)
        self._add(peer)
        peer.broken = False

    def check(self) -> None:
        """Assert that reads and peers agree, both ways."""
        counted: dict[_Peer, int] = {}
        for read in self._reads.values():
            counted[read.peer] = counted.get(read.peer, 0) + 1
        for peer, count in counted.items():
            assert self._peers.get(peer.name) is peer, "a read from a peer that was forgotten"
            assert peer.in_flight == count
        for peer in self._peers.values():
            assert peer.in_flight == counted.get(peer, 0)
            assert peer.in_flight or not peer.leaving, "a peer that should have gone"


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Foreign errors become LinkError here and nowhere else."""
    try:
        yield
    except _ERRORS as exc:
        raise LinkError(f"{what}: {_text(exc)}") from exc


def _text(exc: Exception) -> str:
    name = type(exc).__name__
    text = str(exc)
    return text if text.startswith("NIXL") else f"{name}: {text}"
