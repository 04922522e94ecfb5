"""Every limit of a StoreCore, each with its reason."""

from dataclasses import dataclass

GENERATION_BATCH = 4_096  # one write to the header page per so many reservations
EXTENT_SCAN = 256  # coldest blocks looked at to choose an extent to empty: well under 0.1 ms


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Every limit of a StoreCore."""

    # Share of a size class that copies may hold before they go first: small, since each copy costs
    # the cluster a block, and a peer's block is nearly as fast as an own one. On the public
    # conversation trace (benchmarks/hit_rate.py) 10 % instead lose 3 to 5 % of all hits.
    probation_fraction: float = 0.01
    # Share that blocks used more than once may keep from the stream of new ones. On the same trace
    # 15 % hit as much as 10 % where room is ample and 1.5 % more where it is short; 20 % hit less.
    reused_fraction: float = 0.15
    # 256 lookups of 1,024 keys; beyond it a lookup finds nothing. About 100 bytes each.
    max_pins: int = 262_144
    # WRITING slots: 64 messages of 1,024 keys. Writers that never report can not take more.
    max_reservations: int = 65_536
    # See core.extents: how long a class must be unused before it counts as idle, and how long a
    # cut lives when there are more classes than extents. Far longer than filling an extent takes.
    recut_rest_ms: int = 10_000
