"""Everything that is said between an engine, a NodeStore and the directory.

All messages are msgspec structs in one tagged union; core.codec puts a version byte before them.
Lists of keys and slots travel as packed bytes (numpy little-endian arrays), since 1,024 Python
objects cost more than the call itself. The packed forms:

    keys         n x 16 bytes, one BlockKey after another
    SLOT_DTYPE   n rows of (slot u4, generation u8, offset u8), a place in the local slab
    ENTRY_DTYPE  n rows of (key V16, slot u4, bytes u4, generation u8, origin u1, maker u8), a block
                 in a set

Engine and NodeStore (unix SEQPACKET socket; payload never crosses it):

    Hello ─▶ HelloReply (with the slab's file descriptor) | Refused
    Introduce ─▶ Ack
    Lookup ─▶ LookupReply ... LookupUpdate*       Unpin ─▶ Ack     (Unpin also ends the waiting)
    Reserve ─▶ ReserveReply                       Commit, Abandon ─▶ Ack
    Report ─▶ Ack                                 Bye ─▶ Ack

NodeStore and directory (Ray calls with encoded messages):

    NodeHello ─▶ NodeHelloReply     Announce ─▶ AnnounceReply     Locate ─▶ LocateReply
"""

from enum import IntEnum

import msgspec
import numpy as np

from kvray.core.ids import (
    UNKNOWN_MAKER,
    ClientId,
    Epoch,
    Maker,
    Namespace,
    NodeId,
    OpId,
    Role,
    SlabId,
    Term,
)
from kvray.core.reasons import MissReason

MAX_KEYS_PER_MESSAGE = 1_024  # 20 bytes a key back: well below the 200 KiB of a SEQPACKET message
MAX_MESSAGE_BYTES = 200 * 1024  # SO_SNDBUF is 212,992 by default; 208 KiB is EMSGSIZE
MAX_CALL_BYTES = 12 * 1024 * 1024  # a Ray call: a whole roster of the longest names is 8.2 MB
MAX_WRITING_LISTED = 4_096  # (slot, generation) pairs an engine may list in Hello

# Of the control messages. With these, each of them stays below MAX_CALL_BYTES.
MAX_CHANGES_PER_ANNOUNCE = 131_072  # adds, and as many removes: 41 and 16 bytes each
MAX_WHERE_KEYS = 65_536  # that a person asks for at once: a prompt of 8 million tokens
MAX_LOCATE_KEYS = 16_384  # 16 full lookups in one call
MAX_SOURCES_PER_KEY = 8  # a fetch tries two or three; 16,384 keys with 8 sources are 3.9 MB
# Of one announce: what goes before the next one, since a store announces each few ms while it
# stores. Far more than a prefill of a chunk evicts, and 0.1 ms of the directory.
MAX_DOUBTFUL_KEYS = 64
# Of one announce's reply: a hint, so what does not fit is lost. A long prompt's chain eight times.
MAX_READ_KEYS = 4_096
MAX_ROSTER_NODES = 1_536  # a roster entry has at most 5.3 KB, and the whole roster is one answer
MAX_LINK_METADATA_BYTES = 4_096  # NIXL's has about 460; more network cards, more addresses
MAX_NAME_BYTES = 255  # node ids, host names, agent names, versions, names of counters
MAX_TEXT_BYTES = 8_192  # a reason or a label: a path or two and a sentence
MAX_COUNTERS = 256  # of one Report
MAX_ENGINE_USES = 96  # of a node: layout.MAX_CLIENTS
MAX_SPLIT_MODELS = 64  # said in a reply; a cluster with more has one thing to mend first
MAX_MAKERS_SAID = 64  # in a reply: pairs of namespace and maker; those beyond are met with blocks
MAX_FIELDS = 64  # of a namespace; there are two dozen
MAX_FIELD_BYTES = 256  # of one field's text; what is longer is said by its digest
MAX_CHUNK_SHAPES = 64  # cache groups of an engine; hybrid models have a handful
MAX_NOISE = 1.0  # relative: what differs by as much as it is large is no noise
MAX_COMPUTE_US = 60_000_000  # of one block: a minute, as no engine is
MAX_DEADLINE_MS = 600_000  # ten minutes: nothing waits for ever, and a second is usual
MAX_PERIOD_MS = 60_000  # between heartbeats; a larger one can only be a mistake
MAX_EPOCH = 2**47  # epochs and terms follow the wall clock in ms; a slab has 48 bits for the next

SLOT_DTYPE = np.dtype([("slot", "<u4"), ("generation", "<u8"), ("offset", "<u8")])
ENTRY_DTYPE = np.dtype(
    [
        ("key", "V16"),
        ("slot", "<u4"),
        ("bytes", "<u4"),
        ("generation", "<u8"),
        ("origin", "u1"),
        ("maker", "<u8"),
    ]
)
MAKER_DTYPE = np.dtype([("namespace", "V16"), ("maker", "<u8")])
# V16 and not S16, which drops trailing zero bytes when it is read.
LOCATION_DTYPE = np.dtype(
    [
        ("key_index", "<u4"),
        ("node", "<u2"),
        ("slot", "<u4"),
        ("bytes", "<u4"),
        ("generation", "<u8"),
        ("maker", "<u8"),
    ]
)


class KeyState(IntEnum):
    """The answer for one key of a Lookup, one byte each.

    WAIT ──slot reserved──▶ COMING ──arrived──▶ HIT
      └────────┬──────────────┘ (again, with another slot, if the next source is asked)
               └── does not come ──▶ MISS
    """

    MISS = 0
    HIT = 1  # READY here and pinned for this operation
    WAIT = 2  # being written or fetched here; a LookupUpdate will say COMING, HIT or MISS
    COMING = 3  # as WAIT, and it will be READY in the slot that is named, or nowhere; not pinned


class Grant(IntEnum):
    """The answer for one key of a Reserve, one byte each."""

    GRANTED = 0
    PRESENT = 1  # READY or being written already: nothing to store
    FULL = 2  # no slot to be had now: this store is dropped


class ChunkShape(msgspec.Struct, frozen=True, array_like=True):
    """How the blocks of one cache group are compared: slot_bytes / piece_bytes pieces, one for each
    layer and rank in an order that is always the same, the first layer's first; of numbers of this
    dtype, by its name in numpy or torch. Numbers of a dtype that is not known must be equal.
    """

    slot_bytes: int
    piece_bytes: int
    dtype: str


class NoiseLevels(msgspec.Struct, frozen=True, array_like=True):
    """By how much, relatively, an engine differs from itself when it computes its canary again:
    by itself as the first time, and beside other requests.
    """

    alone: float = 0.0
    batched: float = 0.0


class Hello(msgspec.Struct, frozen=True, tag="hello", omit_defaults=True):
    """namespace to noise: as in Introduce, the latest one said again."""

    op: OpId
    client: ClientId
    role: Role
    engine_nonce: int  # a WORKER names its engine's nonce; an ENGINE its own
    namespace: Namespace  # for status only; keys are already derived from it
    label: str  # model name and rank, for people
    slab_id: SlabId  # the slab that `writing` speaks of; empty at the first hello
    writing: bytes = b""  # SLOT_DTYPE rows (offset 0): slots this engine may still write into
    # For people: what the engine serves, and what its namespace is the digest of.
    model: str = ""
    fields: dict[str, str] = {}
    maker: Maker = UNKNOWN_MAKER
    chunks: list[ChunkShape] = []
    noise: NoiseLevels = NoiseLevels()


class HelloReply(msgspec.Struct, frozen=True, tag="hello_reply"):
    op: OpId
    node_id: NodeId
    epoch: Epoch
    slab_id: SlabId
    slab_bytes: int
    extent_bytes: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Any request may be answered so. The connection stays open unless the reason is fatal."""

    op: OpId
    reason: str
    fatal: bool = False


class Introduce(msgspec.Struct, frozen=True, tag="introduce"):
    """Who the engine is from now on, in place of what its hello said: said when its namespace is
    known, when it has computed its canary, and after each change of its weights. What it reserves
    afterwards is this maker's.

    chunks: one for each cache group, in their order. fields: for people. May be repeated.
    """

    op: OpId
    namespace: Namespace
    fields: dict[str, str] = {}
    maker: Maker = UNKNOWN_MAKER
    chunks: list[ChunkShape] = []
    noise: NoiseLevels = NoiseLevels()


class Lookup(msgspec.Struct, frozen=True, tag="lookup"):
    """Ask for all keys of one request. run_lengths cut keys into runs; within a run with
    prefix=True only the keys up to the first miss are worth anything, so nothing behind it is
    fetched or pinned. slot_bytes: the size that each run's blocks must have.
    """

    op: OpId
    keys: bytes
    run_lengths: list[int]
    run_is_prefix: list[bool]
    run_slot_bytes: list[int]
    deadline_ms: int  # relative: from receipt until every key is HIT or MISS
    fetch: bool = True  # False: only what is here
    key_compute_us: int = 0  # in which the engine computes one block; 0: it has not measured yet
    may_audit: bool = False  # one hit may be told as a miss; see core.audit


class LookupReply(msgspec.Struct, frozen=True, tag="lookup_reply", omit_defaults=True):
    """causes: of the first MISS in each run its index and its MissReason."""

    op: OpId
    states: bytes  # one KeyState a key
    slots: bytes  # SLOT_DTYPE rows, one for each HIT or COMING in order
    causes: dict[int, MissReason] = {}


class LookupUpdate(msgspec.Struct, frozen=True, tag="lookup_update", omit_defaults=True):
    """causes: as in LookupReply, of the misses of this update."""

    op: OpId
    indices: list[int]  # into the keys of the Lookup
    states: bytes  # HIT, MISS or COMING for each index
    slots: bytes  # SLOT_DTYPE rows, one for each HIT or COMING in order
    causes: dict[int, MissReason] = {}


class Unpin(msgspec.Struct, frozen=True, tag="unpin"):
    """Release all pins of one Lookup and end its waiting. May be repeated without harm."""

    op: OpId
    lookup_op: OpId


class Reserve(msgspec.Struct, frozen=True, tag="reserve"):
    op: OpId
    keys: bytes
    run_lengths: list[int]
    run_slot_bytes: list[int]


class ReserveReply(msgspec.Struct, frozen=True, tag="reserve_reply"):
    op: OpId
    grants: bytes  # one Grant a key
    slots: bytes  # SLOT_DTYPE rows, one for each GRANTED in order


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """The payload of these slots is whole. All or nothing per slot; a slot that is no longer
    this reservation's (other generation, other slab) is ignored. May be repeated.
    """

    op: OpId
    slab_id: SlabId
    slots: bytes  # SLOT_DTYPE rows (offset ignored)


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Nobody writes into these slots any more, and their content is worth nothing. If slots is
    empty, the reservation `reserve_op` is cancelled as a whole (its answer came too late and no
    worker was told of it). May be repeated.
    """

    op: OpId
    slab_id: SlabId
    slots: bytes
    reserve_op: OpId = OpId(0)


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Counters of an engine since its last report, for people: tokens by source and so on."""

    op: OpId
    counters: dict[str, int]


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    op: OpId


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    op: OpId


class NodeInfo(msgspec.Struct, frozen=True, tag="node_info"):
    """One node of the roster: all that a peer needs to read from it."""

    node_id: NodeId
    epoch: Epoch
    link_name: str  # agent name; carries the epoch
    link_metadata: bytes
    slab_id: SlabId
    slab_address: int  # where the owner mapped the slab: base of remote addresses
    slab_bytes: int
    extent_bytes: int
    host: str
    kvray_version: str
    format_version: int


class NodeHello(msgspec.Struct, frozen=True, tag="node_hello"):
    """wall_clock_ms: at the start of this NodeStore, the same in each hello of its life. So a node
    that says hello to a new directory keeps its epoch. sequence: of its last announce in this
    epoch; the next one has the next number. What it said before is void, however late it comes.
    """

    info: NodeInfo
    wall_clock_ms: int
    sequence: int = 0


class NodeHelloReply(msgspec.Struct, frozen=True, tag="node_hello_reply"):
    """accepted_epoch may be greater than asked: take it and say hello again with it."""

    term: Term
    accepted_epoch: Epoch
    roster_version: int
    roster: list[NodeInfo]
    heartbeat_period_ms: int


class EngineUse(msgspec.Struct, frozen=True, order=True):
    """An engine of a node: what it serves, under which names its blocks are, and whose they are."""

    model: str
    namespace: Namespace
    maker: Maker = UNKNOWN_MAKER


class Announce(msgspec.Struct, frozen=True, tag="announce", omit_defaults=True):
    """Heartbeat and changes in one. sequence counts the announces of an epoch from 1.

    resync_part 0: `adds` and `removes` are changes. resync_part 1..n: parts of the whole set,
    which replaces the node's entries when the part with resync_last arrives. A part has no
    removes; changes go on meanwhile in announces of their own and are applied to both. What a
    change says about a key counts more than what a later part says, so all parts may be made from
    one copy of the set: taken when part 1 gets its sequence, never before. An answer RESYNC to an
    announce before the latest part 1 says nothing new.

    doubtful: keys of blocks that go soon here; the reply says which of them other nodes keep.
    in_use: an engine has looked something up here since the last announce.
    engines: those of this node, each use once; None if the directory knows them.
    """

    node_id: NodeId
    epoch: Epoch
    term: Term
    sequence: int
    roster_version: int  # the roster that the node knows
    adds: bytes  # ENTRY_DTYPE rows
    removes: bytes  # keys
    resync_part: int = 0
    resync_last: bool = False
    doubtful: bytes = b""
    in_use: bool = False
    engines: list[EngineUse] | None = None


class AnnounceStatus(IntEnum):
    OK = 0
    RESYNC = 1  # a gap, or a hello before: send the whole set; told to a few nodes at a time
    BURIED = 2  # come back with a new epoch
    UNKNOWN = 3  # say NodeHello first


class RosterNews(msgspec.Struct, frozen=True):
    """What has changed on the roster since version `since`; 0: since it was empty.

    joined: who is on it now and was not, or not with this info. left: who is on it no more.
    """

    since: int
    joined: list[NodeInfo]
    left: list[NodeId] = []


class AnnounceReply(msgspec.Struct, frozen=True, tag="announce_reply"):
    """The home of a block is the node that has had it for longest, as far as the directory knows:
    so of those who have it exactly one keeps it, and hears of its use. Both are hints.

    read: keys that others have asked for since the last reply, and whose home this node is.
    spare: those of the announce's doubtful keys that have another home.
    split: models whose engines, in this cluster, do not all share their blocks.
    makers: MAKER_DTYPE rows, of the namespaces of this node's engines that have several makers.
    """

    status: AnnounceStatus
    term: Term
    roster_version: int
    heartbeat_period_ms: int
    news: RosterNews | None = None  # only if roster_version differs from the node's
    read: bytes = b""
    spare: bytes = b""
    split: list[str] = []
    makers: bytes = b""


class Locate(msgspec.Struct, frozen=True, tag="locate"):
    node_id: NodeId  # the asker; its own entries are left out
    epoch: Epoch
    keys: bytes


class LocateReply(msgspec.Struct, frozen=True, tag="locate_reply"):
    """nodes: the sources named by `locations`, whose node column indexes this list.
    gone: a ghosts.Why of each key; empty if nothing is known of those that are nowhere.
    """

    term: Term
    nodes: list[NodeId]
    epochs: list[Epoch]
    locations: bytes  # LOCATION_DTYPE rows, ordered by key_index
    gone: bytes = b""


LocalRequest = Hello | Introduce | Lookup | Unpin | Reserve | Commit | Abandon | Report | Bye
LocalAnswer = HelloReply | Refused | LookupReply | LookupUpdate | ReserveReply | Ack
ControlMessage = NodeHello | NodeHelloReply | Announce | AnnounceReply | Locate | LocateReply
Message = LocalRequest | LocalAnswer | ControlMessage
