"""What the cores want done. Plain values: whoever runs a core does them in order.

    FetchCore ──FetchCommand──▶ NodeCore ──NodeCommand──▶ the NodeStore's shell, or the simulator

NodeCore answers each event with a list of NodeCommands. Effects come first in it, so that the slab
says what an answer says before the answer leaves; a shell that goes through the list once, in
order, is right.

Who owns what: sockets, the slab, Ray calls, links, scratch memory for headers and pidfds are the
shell's; every decision about them is the core's.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kvray.core.effects import Effect, Place
from kvray.core.header_runs import HeaderRuns, Offsets
from kvray.core.ids import BlockKey, ClientId, Epoch, Maker, NodeId, OpId, ReadId, Role
from kvray.core.messages import Announce, ChunkShape, LocalAnswer, Locate, NodeHello, NodeInfo
from kvray.core.reasons import MissReason
from kvray.core.tolerance import Tolerance

# A Lookup of a client; the node itself, for one that leaves, or for a canary (core.trust).
Waiter = tuple[ClientId | Literal["node", "trust"], OpId]
Headers = npt.NDArray[Any]  # SLOT_HEADER_DTYPE rows
NO_OFFSETS: Offsets = np.empty(0, np.uint64)


class ReadKind(Enum):
    """PAYLOAD goes into slots of the slab; HEADERS goes into scratch memory of the shell."""

    PAYLOAD = "payload"
    HEADERS = "headers"


# -- FetchCore to NodeCore ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskDirectory:
    """Answer with on_located(locate_id) or on_locate_failed(locate_id)."""

    locate_id: int
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class ReserveTargets:
    """Answer with on_reserved(batch_id), with one StoreCore.reserve answer a want."""

    batch_id: int
    wants: tuple[tuple[BlockKey, int], ...]  # key, payload bytes
    makers: tuple[Maker, ...]  # of each, as its source was said to be


@dataclass(frozen=True, slots=True)
class CommitTargets:
    """Verified: these WRITING slots hold what they should."""

    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class ReleaseTargets:
    """Nothing writes into these slots any more: WRITING or QUARANTINE becomes ABSENT."""

    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class QuarantineTargets:
    """Their read has been abandoned and has not ended. ReleaseTargets follows when it has."""

    read_id: ReadId
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Arrived:
    """These keys are in the store, READY or (rarely) being written by an engine: look there."""

    waiter: Waiter
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Coming:
    """Blocks for this waiter will be READY in these slots, or not come from there at all. May be
    said again of a key, with another slot. Arrived or Missed follows for each.
    """

    waiter: Waiter
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Missed:
    """These keys do not come for this waiter."""

    waiter: Waiter
    keys: tuple[BlockKey, ...]
    reason: MissReason


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """A peer did not answer, or answered with a failure, and is avoided for a while."""

    node_id: NodeId
    epoch: Epoch
    avoid_ms: int
    reason: str


# -- both ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class PostRead:
    """Read from a peer. It ends in exactly one on_read_done, or if headers have come in one
    on_headers; also after AbandonRead, however late that is.

    Headers are read only after their payload has come, and must be posted as a transfer of their
    own (rule 2). Whoever reads a payload can do that at once, and so save a turn of two threads:
    header_runs says where they are. If it does not (on_read_done), a HEADERS read follows. They
    go to scratch memory of the shell, one after another, which must not be used again before the
    read has ended.
    """

    read_id: ReadId
    node_id: NodeId
    epoch: Epoch  # of the peer; the link's name for it carries it
    kind: ReadKind
    remote_offsets: Offsets  # from the start of the peer's slab
    local_offsets: Offsets  # from the start of ours; NO_OFFSETS for HEADERS
    bytes: Offsets  # of each piece; as long as remote_offsets
    # Of the same blocks, at the peer; None for HEADERS. Made before the payload is read: whoever
    # reads would make it while nothing is on its way, and out of a cache full of payload.
    header_runs: HeaderRuns | None = None


@dataclass(frozen=True, slots=True)
class AbandonRead:
    """Nobody waits for this read any more. Keep its handle; say when it has ended."""

    read_id: ReadId


FetchCommand = (
    AskDirectory
    | ReserveTargets
    | CommitTargets
    | ReleaseTargets
    | QuarantineTargets
    | Coming
    | Arrived
    | Missed
    | PeerFailed
    | PostRead
    | AbandonRead
)


# -- NodeCore to its shell ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WriteClient:
    """Write a row of the slab's table of clients; client None clears it. In order with the
    effects: a row is written before the first slot that names it, cleared after the last.
    """

    row: int
    client: ClientId | None
    role: Role
    engine_nonce: int


class Send(msgspec.Struct, frozen=True):
    """with_fd: the slab's file descriptor goes with it (HelloReply)."""

    session_id: int
    message: LocalAnswer
    with_fd: bool = False


@dataclass(frozen=True, slots=True)
class Drop:
    """End a session for a fault of its client. on_session_closed for it changes nothing more."""

    session_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class WatchProcess:
    """Call on_process_gone(pid, start_ticks) once this process has ended, at once if it has
    already. May come again for a process that is watched.
    """

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class CallDirectory:
    """Ends in on_directory_reply(call_id) or on_directory_failed(call_id); an answer that comes
    after timeout_ms may still be handed in. The shell may give the call up then.
    """

    call_id: int
    message: NodeHello | Announce | Locate
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class ConnectPeer:
    """Make the link to a peer now, so that the first read does not pay for it. An older
    connection to the same node has been disconnected before.
    """

    info: NodeInfo


@dataclass(frozen=True, slots=True)
class DisconnectPeer:
    """Its unended reads have been abandoned."""

    node_id: NodeId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class TakeEpoch:
    """Take this epoch, the one from the start or a greater one: write it into the slab's page, open
    a link that is named after it, then call on_linked with the NodeInfo that says so. Engines are
    served meanwhile. ConnectPeer follows for every peer.
    """

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class TookOver:
    """The end of NodeCore.take_over: these of its keys are READY here, and stay as long as any."""

    call_id: int
    keys: tuple[BlockKey, ...]


class Verdict(Enum):
    """Of two blocks. NONE: it could not be told, or a header no longer said what was compared."""

    EQUAL = "equal"
    DIFFERENT = "different"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class BlockPair:
    """Two READY blocks of this slab; see messages.ChunkShape."""

    mine: Place
    other: Place
    shape: ChunkShape


@dataclass(frozen=True, slots=True)
class CompareBlocks:
    """Compare each pair, somewhere that holds up nothing, and prove both headers after that: the
    state is READY, then key, generation and maker are those of the Place. Ends in
    NodeCore.on_compared with a Verdict for each pair, in order. They are pinned until then, but no
    longer than trust.COMPARE_DEADLINE_MS.
    """

    comparison_id: int
    pairs: tuple[BlockPair, ...]
    tolerance: Tolerance


@dataclass(frozen=True, slots=True)
class Log:
    """One line for people about a rare thing."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Restart:
    """Reads that do not end hold so much that nothing can be fetched any more: only the end of
    this process ends them. Log the reason and die into a new epoch.
    """

    reason: str


NodeCommand = (
    Effect
    | WriteClient
    | Send
    | Drop
    | WatchProcess
    | CallDirectory
    | ConnectPeer
    | DisconnectPeer
    | TakeEpoch
    | PostRead
    | AbandonRead
    | TookOver
    | CompareBlocks
    | Log
    | Restart
)
