"""Who waits for which block, and what each is to be told.

    open ─▶ join, for each key ─▶ settled, left, or due: told once at most, then gone
                       └▶ (told where it will be, once its slot is known)

A waiter is a Lookup. It has one deadline for all its keys, and exists here as long as it waits.
"""

from collections.abc import Iterable
from typing import Any

from kvray.core.commands import Arrived, Coming, Missed, Waiter
from kvray.core.deadlines import Deadlines
from kvray.core.effects import Place
from kvray.core.ids import BlockKey
from kvray.core.reasons import MissReason


class Waits:
    """The relation of waiters and keys, kept both ways."""

    def __init__(self) -> None:
        self._keys: dict[Waiter, dict[BlockKey, None]] = {}
        self._waiters: dict[BlockKey, dict[Waiter, None]] = {}
        self._deadlines: Deadlines[Waiter] = Deadlines()
        self._coming: dict[Waiter, dict[BlockKey, Place]] = {}  # to be told
        self._arrived: dict[Waiter, list[BlockKey]] = {}  # to be told
        self._missed: dict[tuple[Waiter, MissReason], list[BlockKey]] = {}  # to be told

    def __contains__(self, waiter: object) -> bool:
        return waiter in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def has_missed(self) -> bool:
        """Whether there are misses that have not been taken."""
        return bool(self._missed)

    def is_wanted(self, key: BlockKey) -> bool:
        return key in self._waiters

    def waiters(self) -> list[Waiter]:
        return list(self._keys)

    def keys_of(self, waiter: Waiter) -> list[BlockKey]:
        """What it waits for, in the order in which it asked."""
        return list(self._keys.get(waiter, ()))

    def join(self, waiter: Waiter, key: BlockKey, deadline_ms: int) -> None:
        """Not for a key that it waits for already. deadline_ms counts the first time."""
        keys = self._keys.get(waiter)
        if keys is None:
            keys = self._keys[waiter] = {}
            self._deadlines.set(waiter, deadline_ms)
        assert key not in keys, "waits twice for a key"
        keys[key] = None
        self._waiters.setdefault(key, {})[waiter] = None

    def leave(self, waiter: Waiter, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """It waits no more for these, and is told nothing. Names those that nobody wants now."""
        unwanted: list[BlockKey] = []
        for key in keys:
            if key in self._keys.get(waiter, ()):
                self._part(waiter, key)
                if key not in self._waiters:
                    unwanted.append(key)
        return unwanted

    def come(self, place: Place) -> None:
        """Everyone who waits for its key is told where it will be."""
        for waiter in self._waiters.get(place.key, ()):
            self.tell_coming(waiter, place)

    def tell_coming(self, waiter: Waiter, place: Place) -> None:
        """One that has begun to wait when the slot was known already."""
        self._coming.setdefault(waiter, {})[place.key] = place

    def arrive(self, key: BlockKey) -> None:
        """Everyone who waits for the key is told that it is there."""
        for waiter in self._waiters.pop(key, ()):
            self._drop(waiter, key)
            arrived = self._arrived.get(waiter)
            if arrived is None:
                arrived = self._arrived[waiter] = []
            arrived.append(key)

    def miss(self, key: BlockKey, reason: MissReason) -> None:
        """Everyone who waits for the key is told that it does not come."""
        for waiter in self._waiters.pop(key, ()):
            self._drop(waiter, key)
            self.tell_missed(waiter, key, reason)

    def tell_missed(self, waiter: Waiter, key: BlockKey, reason: MissReason) -> None:
        """One that does not even begin to wait, or waits no more."""
        self._missed.setdefault((waiter, reason), []).append(key)

    def take_due(self, now_ms: int) -> list[Waiter]:
        """Whose deadline has come. The caller makes them leave."""
        return self._deadlines.take_due(now_ms)

    def next_ms(self) -> int | None:
        return self._deadlines.next_ms()

    def take_told(self) -> list[Coming | Arrived | Missed]:
        """What there is to tell since the last call: what is coming first, since some of it may
        have been settled since.
        """
        if not self._coming and not self._arrived and not self._missed:
            return []
        told: list[Coming | Arrived | Missed] = [
            Coming(waiter, tuple(places.values())) for waiter, places in self._coming.items()
        ]
        told += [Arrived(waiter, tuple(keys)) for waiter, keys in self._arrived.items()]
        told += [
            Missed(waiter, tuple(keys), reason) for (waiter, reason), keys in self._missed.items()
        ]
        self._coming.clear()
        self._arrived.clear()
        self._missed.clear()
        return told

    def _part(self, waiter: Waiter, key: BlockKey) -> None:
        self._drop(waiter, key)
        waiters = self._waiters[key]
        del waiters[waiter]
        if not waiters:
            del self._waiters[key]

    def _drop(self, waiter: Waiter, key: BlockKey) -> None:
        """From what it waits for. The other way round is the caller's."""
        keys = self._keys[waiter]
        del keys[key]
        if not keys:
            del self._keys[waiter]
            self._deadlines.discard(waiter)

    def snapshot(self) -> dict[str, Any]:
        return {"waiters": len(self._keys), "keys": len(self._waiters)}

    def check(self, wanted: Iterable[BlockKey] | None = None) -> None:
        """Assert the relation both ways; wanted: every key that may be waited for."""
        pairs = {(waiter, key) for waiter, keys in self._keys.items() for key in keys}
        turned = {(waiter, key) for key, waiters in self._waiters.items() for waiter in waiters}
        assert pairs == turned, "who waits for what differs from what is waited for by whom"
        assert all(self._keys.values()), "waits for nothing"
        assert all(self._waiters.values()), "is waited for by nobody"
        assert all(waiter in self._deadlines for waiter in self._keys), "waits for ever"
        assert len(self._deadlines) == len(self._keys), "a deadline of nobody"
        self._deadlines.check()
        assert not self._coming, "not told"
        assert not self._arrived, "not told"
        assert not self._missed, "not told"
        if wanted is not None:
            assert self._waiters.keys() <= set(wanted), "waits for what nobody brings"
