"""Which way a copy between slab and device goes."""

from enum import StrEnum


class Direction(StrEnum):
    """A request waits for a load; nobody waits for a store, so it gives way where both want the
    same thing.
    """

    LOAD = "load"  # slab to device
    STORE = "store"  # device to slab
