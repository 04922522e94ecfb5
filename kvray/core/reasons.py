"""Why something that was asked for had to be computed: one set of names everywhere.

    NodeStore   of each key that is a miss; the first of each run goes to the engine (LookupReply)
    engine      of each prompt token that neither its device nor kvray had (engine.sources)

A prefix breaks at its first miss, so the reason of that one is the reason of all behind it.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

# An engine's counters of prompt tokens, see engine.sources.
HIT_SOURCES = ("device", "local", "peer")
HIT_PREFIX, MISS_PREFIX, COMPUTED = "hit_tokens_", "miss_tokens_", "computed_tokens"


class MissReason(StrEnum):
    # What a NodeStore says of a key.
    NEVER_SEEN = "never_seen"  # neither here nor listed in the directory
    EVICTED = "evicted"  # it was here, or listed, not long ago; or its last source has it no more
    PEER_GONE = "peer_gone"  # its last source failed or has left, or is avoided since it failed
    DEADLINE = "deadline"  # it may have been on its way
    BELOW_BREAK_EVEN = "below_break_even"  # computing it is quicker: too short, too slow a link
    NAMESPACE_DIFFERS = "namespace_differs"  # another engine of the model shares nothing with this
    SLAB_FULL = "slab_full"  # found, but the slab had no slot for it
    DIRECTORY_SILENT = "directory_silent"
    OVERLOADED = "overloaded"  # a limit: blocks in flight, unended reads, pins, waiting lookups
    OTHER_SIZE = "other_size"  # listed with other bytes than wanted
    WRITER_FAILED = "writer_failed"  # the local engine that was writing it gave up
    UNPROVEN = "unproven"  # the asking engine has not computed its canary yet
    UNTRUSTED = "untrusted"  # found, by a maker that was not seen to compute what this engine does
    AUDITED = "audited"  # it is here, and computed once more to be compared; see core.audit
    LOCAL_ONLY = "local_only"  # the lookup did not want a fetch
    BEHIND = "behind"  # behind the first miss of its prefix run: nobody looked for it

    # What only an engine can say, of tokens.
    TAIL = "tail"  # behind the last full chunk, or the last token, which vLLM always computes
    BYPASSED = "bypassed"  # the request goes without kvray: images, weights that have changed, ...
    NO_NODE_STORE = "no_node_store"  # none was connected, or it was lost meanwhile
    NODE_STORE_SLOW = "node_store_slow"  # it had not answered within the step's budget
    LOAD_FAILED = "load_failed"  # found, and the copy to the device failed


def tokens_by_source(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Of these engines or nodes together: device, local, peer, computed."""
    counted = list(counters)
    hits = {
        source: sum(each.get(HIT_PREFIX + source, 0) for each in counted) for source in HIT_SOURCES
    }
    return hits | {"computed": sum(each.get(COMPUTED, 0) for each in counted)}


def tokens_by_reason(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The computed ones, by MissReason; those that never happened are left out."""
    counted = list(counters)
    sums = {
        reason.value: sum(each.get(MISS_PREFIX + reason, 0) for each in counted)
        for reason in MissReason
    }
    return {reason: tokens for reason, tokens in sums.items() if tokens}
