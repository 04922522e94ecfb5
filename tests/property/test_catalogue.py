"""Goal: a Catalogue is a dict of dicts, whatever the keys, and never more rows than it may have.

Method: a hypothesis machine does the same to a Catalogue and to plain dicts. Its keys have equal
halves and, in half of the runs, nearly equal hashes: then probes are long, and chains get mixed up
if they can be.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvray.core import catalogue as module
from kvray.core.catalogue import Catalogue, Listing, Standing
from kvray.core.codec import pack_entries, pack_keys
from kvray.core.ids import BlockKey, Generation, Maker, Origin, SlotIndex
from kvray.core.messages import ENTRY_DTYPE
from kvray.core.rowarray import Rows

LISTINGS = 4
KEYS = [BlockKey(bytes(8) + bytes([i]) * 8) for i in range(4)]
KEYS += [BlockKey(bytes([i]) * 8 + bytes(8)) for i in range(1, 5)]
keys = st.sampled_from(KEYS)
entries = st.lists(st.tuples(keys, st.integers(0, 9), st.integers(1, 9)), max_size=10)


def maker_of(slot: int) -> Maker:
    """A few, the unknown one among them."""
    return Maker(slot % 4 << 62)


class CatalogueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.listings: list[Listing] = []
        # A hidden listing remembers removed keys: None.
        self.model: dict[Listing, dict[BlockKey, tuple[int, int] | None]] = {}
        self.standing: dict[Listing, Standing] = {}

    @initialize(max_rows=st.sampled_from([8, 10_000]), good_hash=st.booleans())
    def begin(self, max_rows: int, good_hash: bool) -> None:  # noqa: FBT001 - a rule
        self.max_rows = max_rows
        self.patch = pytest.MonkeyPatch()
        if not good_hash:
            self.patch.setattr(module, "_key_hash", lambda low, _high: low & np.uint64(1))
            self.patch.setattr(
                module, "_pair_hash", lambda low, _high, _listing: low & np.uint64(1)
            )
        self.catalogue = Catalogue(max_rows=max_rows)
        for _ in range(LISTINGS):
            self.open()

    def open(self) -> None:
        listing = self.catalogue.open()
        assert listing is not None
        self.listings.append(listing)
        self.model[listing] = {}
        self.standing[listing] = Standing.HIDDEN

    @rule(index=st.integers(0, LISTINGS - 1), last=st.booleans())
    def show(self, index: int, last: bool) -> None:  # noqa: FBT001 - a rule
        listing = self.listings[index]
        self.catalogue.show(listing, last=last)
        self.standing[listing] = Standing.LAST if last else Standing.SHOWN
        self.model[listing] = {k: v for k, v in self.model[listing].items() if v is not None}

    @rule(index=st.integers(0, LISTINGS - 1))
    def drop_and_open_another(self, index: int) -> None:
        listing = self.listings.pop(index)
        self.catalogue.drop(listing)
        del self.model[listing], self.standing[listing]
        self.open()

    @rule(index=st.integers(0, LISTINGS - 1), rows=entries, keep=st.booleans())
    def add(self, index: int, rows: list[Any], keep: bool) -> None:  # noqa: FBT001 - a rule
        listing, room = self.listings[index], self.catalogue.room
        keep = keep and self.standing[listing] is Standing.HIDDEN
        before = self.model[listing]
        wanted = {key: (slot, generation) for key, slot, generation in rows}
        packed = pack_entries(
            (key, SlotIndex(slot), 7, Generation(generation), Origin.COPY, maker_of(slot))
            for key, slot, generation in rows
        )
        unlisted = self.catalogue.add(listing, np.frombuffer(packed, ENTRY_DTYPE), keep=keep)
        # A listing that was hidden may still have rows of keys it remembered: they need no room.
        assert unlisted <= max(0, len(wanted.keys() - before.keys()) - room)
        missing = wanted.keys() - before.keys() - self.entries_of(listing).keys()
        assert len(missing) == unlisted
        for key in wanted.keys() - missing:
            if not keep or key not in before:
                before[key] = wanted[key]

    @rule(index=st.integers(0, LISTINGS - 1), gone=st.lists(keys, max_size=8))
    def remove(self, index: int, gone: list[BlockKey]) -> None:
        listing, room = self.listings[index], self.catalogue.room
        own = self.model[listing]
        hidden = self.standing[listing] is Standing.HIDDEN
        forgotten = self.catalogue.remove(listing, pack_keys(gone))
        if hidden:
            assert forgotten == max(0, len(set(gone) - own.keys()) - room)
            for key in gone:
                # Which of the unknown ones were remembered does not matter: none is there.
                if key in own or not forgotten:
                    own[key] = None
            if forgotten:
                self.drop_and_open_another(index)
        else:
            assert forgotten == 0
            for key in gone:
                own.pop(key, None)

    @rule()
    def sweep(self) -> None:
        self.catalogue.sweep()

    @rule(
        asked=st.lists(keys, max_size=8),
        limit=st.integers(1, 3),
        index=st.none() | st.integers(0, LISTINGS - 1),
    )
    def locate(self, asked: list[BlockKey], limit: int, index: int | None) -> None:
        without = None if index is None else self.listings[index]
        at, rows = self.catalogue.locate(pack_keys(asked), limit=limit, without=without)
        assert at.tolist() == sorted(at.tolist())
        for i, key in enumerate(asked):
            found = [
                (Listing(int(row["listing"])), (int(row["slot"]), int(row["generation"])))
                for row in rows[at == i]
            ]
            expected = {
                listing: own[key]
                for listing, own in self.model.items()
                if self.standing[listing] >= Standing.LAST
                and listing != without
                and own.get(key) is not None
            }
            assert len(found) == min(limit, len(expected)) == len(dict(found))
            assert all(expected[listing] == place for listing, place in found)
            grades = [self.standing[listing] for listing, _ in found]
            assert grades == sorted(grades, reverse=True), "a suspect is not the last"
            best = sorted((self.standing[listing] for listing in expected), reverse=True)
            assert grades == best[:limit], "a suspect is named, and a better one is not"

    def entries_of(self, listing: Listing) -> dict[bytes, tuple[int, int]]:
        return {
            row["low"].tobytes() + row["high"].tobytes(): (int(row["slot"]), int(row["generation"]))
            for row in self.catalogue.entries_of(listing)
        }

    @invariant()
    def same(self) -> None:
        for listing, own in self.model.items():
            expected = {key: place for key, place in own.items() if place is not None}
            assert self.entries_of(listing) == expected
            assert self.catalogue.count(listing) == len(expected)
            rows = self.catalogue.entries_of(listing)
            makers = self.catalogue.makers_of(rows).tolist()
            assert makers == [maker_of(slot) for slot in rows["slot"].tolist()]
        assert len(self.catalogue) <= self.max_rows
        self.catalogue.check()

    def teardown(self) -> None:
        if not self.listings:
            return
        for listing in self.listings:
            self.catalogue.drop(listing)
        while self.catalogue.snapshot()["unswept_listings"]:
            self.catalogue.sweep()
        assert len(self.catalogue) == 0
        assert self.catalogue.snapshot()["listings"] == 0
        self.catalogue.check()
        self.patch.undo()


TestCatalogue = CatalogueMachine.TestCase
TestCatalogue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def shown(catalogue: Catalogue) -> Listing:
    listing = catalogue.open()
    assert listing is not None
    catalogue.show(listing)
    return listing


def random_entries(count: int, seed: int) -> Rows:
    rows = np.zeros(count, ENTRY_DTYPE)
    rows["key"] = np.frombuffer(np.random.default_rng(seed).bytes(16 * count), "V16")
    rows["bytes"] = 7
    return rows


def test_many_rows_come_and_go_in_few_bytes() -> None:
    catalogue = Catalogue(max_rows=1_000_000)
    held = {shown(catalogue): random_entries(50_000, seed) for seed in range(4)}
    for listing, rows in held.items():
        for start in range(0, len(rows), 4_096):
            assert catalogue.add(listing, rows[start : start + 4_096]) == 0
    assert catalogue.size_bytes < 80 * len(catalogue), "the promise of the docstring"

    def churn() -> None:
        for listing, rows in held.items():
            catalogue.remove(listing, rows["key"][:40_000].tobytes())
            catalogue.add(listing, rows[:40_000])

    churn()  # places that were removed may make an index grow once
    size_bytes = catalogue.size_bytes
    for _ in range(4):
        churn()
    assert catalogue.size_bytes <= 1.1 * size_bytes, "churn costs no memory"
    assert catalogue.size_bytes < 80 * len(catalogue), "the promise of the docstring"
    for rows in held.values():
        at, _ = catalogue.locate(rows["key"].tobytes(), limit=1)
        assert np.array_equal(at, np.arange(50_000))
    catalogue.check()


def test_indexes_that_grow_keep_the_chains_of_keys_that_many_have() -> None:
    catalogue = Catalogue(max_rows=100_000)
    first, second, third = shown(catalogue), shown(catalogue), shown(catalogue)
    common = random_entries(500, seed=7)
    for listing in (first, second):
        catalogue.add(listing, common)
    catalogue.add(third, random_entries(20_000, seed=8))
    catalogue.check()
    at, rows = catalogue.locate(common["key"].tobytes(), limit=3)
    assert np.array_equal(at, np.repeat(np.arange(500), 2))
    assert rows["listing"].tolist() == [second, first] * 500


def test_rows_that_were_freed_one_by_one_are_all_used_again() -> None:
    catalogue = Catalogue(max_rows=3_000)
    listing, rows = shown(catalogue), random_entries(3_000, seed=9)
    catalogue.add(listing, rows)
    for row in rows[:1_500]:
        catalogue.remove(listing, row["key"].tobytes())
    catalogue.check()
    assert catalogue.add(listing, rows) == 0
    catalogue.check()


def test_a_sweep_keeps_to_its_budget(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "SWEEP_FREE_ROWS", 100)
    catalogue = Catalogue(max_rows=10_000)
    listing = shown(catalogue)
    catalogue.add(listing, random_entries(1_000, seed=6))
    catalogue.drop(listing)
    assert [catalogue.sweep() for _ in range(11)] == [100] * 10 + [0]
    assert len(catalogue) == 0
