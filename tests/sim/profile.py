"""How bad a seed is: the size of its cluster, its limits, and how often each fault comes.

Not every seed has every fault (half of them, by dice): states that lie deep are reached in a world
that is calm but for one thing.
"""

from dataclasses import dataclass, field
from random import Random

from kvray.core.announcing import AnnouncingLimits
from kvray.core.fetch import FetchLimits
from tests.shells import BLOCK_BYTES

NODE_COUNT = 5
DURATION_US = 30_000_000

# Low enough for a run of 30 s with 32 slots to meet them.
FETCH_LIMITS = FetchLimits(
    max_fetches=64,
    max_unended_reads=6,
    max_locates=2,
    max_locate_keys=8,
    batch_bytes=4 * BLOCK_BYTES,
    batch_blocks=3,
    first_batch_bytes=BLOCK_BYTES,
    max_batches_ahead_per_peer=2,
    max_batches_ahead=3,
)
ANNOUNCING_LIMITS = AnnouncingLimits(max_entries=4)
SESSION_GRACE_MS = 3_000  # instead of 30,000: core.clients reads it when a session closes
CLOGGED_MS = 4_000  # instead of 30,000: core.node

# How many times a second, in the whole cluster.
RATES = {
    "partition_one_way": 0.15,
    "partition_two_way": 0.15,
    "crash_slab_kept": 0.12,
    "crash_slab_lost": 0.05,
    "crash_torn": 0.15,
    "freeze": 0.15,
    "clock_jump": 0.10,
    "directory_restart": 0.10,
    "engine_crash": 0.20,
    "engine_bye": 0.05,
    "session_lost": 0.25,
    "session_long_lost": 0.10,
    "engine_slow": 0.15,
    "hog": 0.15,
    "clear": 0.05,
    "drain": 0.10,
    "wrong_death_notice": 0.10,
    "old_hello": 0.20,
}
# How likely, each time there is one.
CHANCES = {
    "call_dropped": 0.05,
    "call_duplicated": 0.05,
    "call_delayed": 0.05,
    "hello_duplicated": 0.4,
    "answer_dropped": 0.05,
    "answer_duplicated": 0.05,
    "answer_delayed": 0.05,
    "read_failed": 0.05,
    "read_slow": 0.05,
    "read_stuck": 0.02,
    "copy_failed": 0.03,
    "copy_slow": 0.1,
    "said_twice": 0.05,
    "said_late": 0.05,
    "gave_up_early": 0.05,
    "hello_confused": 0.1,
    "other_size": 0.05,
    "extent_damaged": 0.2,
}


@dataclass(frozen=True, slots=True)
class Profile:
    """What a seed is like."""

    extent_counts: tuple[int, ...]  # of each node's slab
    engine_counts: tuple[int, ...]  # on each node
    request_period_us: int  # of each engine, in the mean
    chain_count: int  # prompts that all engines share
    rates: dict[str, float] = field(default_factory=dict)
    chances: dict[str, float] = field(default_factory=dict)

    @classmethod
    def roll(cls, random: Random) -> "Profile":
        def pick(table: dict[str, float]) -> dict[str, float]:
            strengths = (0, 0, 0.5, 1, 2)
            return {kind: usual * random.choice(strengths) for kind, usual in table.items()}

        return cls(
            extent_counts=tuple(random.choice((1, 1, 2)) for _ in range(NODE_COUNT)),
            engine_counts=random.choice(((2, 1, 1, 1, 0), (2, 2, 0, 1, 0), (2, 1, 1, 0, 1))),
            request_period_us=random.choice((300_000, 500_000, 800_000)),
            chain_count=random.choice((4, 8, 16)),
            rates=pick(RATES),
            chances=pick(CHANCES),
        )
