"""What the directory has not heard yet about the READY blocks of this node."""

from collections.abc import Collection
from itertools import islice

from kvray.core.effects import Place
from kvray.core.ids import BlockKey


class Changes:
    """Adds and removes since they were last drained; one key is in at most one of the two.

    An add that is followed by a remove cancels, unless the directory knows an older place of the
    key (`_replacing`): then the remove must be said. Bounded by the slots of the slab twice over:
    each add is a READY block, and each remove was one when it was last announced.
    """

    __slots__ = ("_adds", "_removes", "_replacing")

    def __init__(self) -> None:
        self._adds: dict[BlockKey, Place] = {}
        self._removes: dict[BlockKey, None] = {}
        self._replacing: set[BlockKey] = set()  # adds whose older place was announced

    def __len__(self) -> int:
        return len(self._adds) + len(self._removes)

    def add(self, place: Place) -> None:
        """The block has become READY."""
        key = place.key
        if key in self._removes:
            del self._removes[key]
            self._replacing.add(key)
        self._adds[key] = place

    def remove(self, key: BlockKey) -> None:
        """The block is READY no more."""
        if self._adds.pop(key, None) is None or key in self._replacing:
            self._replacing.discard(key)
            self._removes[key] = None

    def drain(self, max_changes: int) -> tuple[list[Place], list[BlockKey]]:
        """Removes first: a wrong hint costs a peer a read, a missing one only a hit."""
        removes = list(islice(self._removes, max_changes))
        for key in removes:
            del self._removes[key]
        adds = list(islice(self._adds.values(), max_changes - len(removes)))
        for place in adds:
            del self._adds[place.key]
            self._replacing.discard(place.key)
        return adds, removes

    def is_add(self, key: BlockKey) -> bool:
        return key in self._adds

    def is_remove(self, key: BlockKey) -> bool:
        return key in self._removes

    def forget(self) -> None:
        """The directory is about to hear of everything that is READY now."""
        self._adds, self._removes, self._replacing = {}, {}, set()

    def check(self, ready: Collection[BlockKey]) -> None:
        """Assert that adds are READY and removes are not."""
        assert all(key in ready for key in self._adds), "an add that is not READY"
        assert not any(key in ready for key in self._removes), "a remove that is READY"
        assert self._replacing <= self._adds.keys(), "replaces without an add"
