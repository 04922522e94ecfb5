"""Catalogue: which blocks are where, in 61 to 86 bytes for one key at one node.

    listing    one set of entries of one (node, epoch). A node has one that is shown, and a second,
               hidden one while a resync collects the set that will replace it.

        open ──▶ HIDDEN ──show──▶ SHOWN ◀──show──▶ LAST
                   └───────────────┴─────drop──────┴────▶ DROPPED ──swept──▶ FREE

    row        one key in one listing: 48 bytes in one array; its maker as a small number
    _heads     key ─▶ the first row of a key; `next` and `prev` chain the rows of one key
    _pairs     key and listing ─▶ its row

Why not a dict: 16 bytes of key and one small int cost 140 to 190 bytes as Python objects, and a
locate of 4,096 keys touches each of them. Here a batch is a few dozen numpy calls.
Whole rows are read with take and compress: indexing rows of a struct costs ten times as much.

Why a row names its listing, and a listing does not name its rows: what a node has must go at once
when it is buried, comes back with a new epoch or has sent its set again, and that is one byte in
`_standing`, which `locate` looks at. The dead rows are found by `sweep`, which goes through the
array with a budget a call. So nothing per node is stored twice, and no event takes time with the
size of a node's set.

All changes of a call belong to one listing, so their keys are different, and they never touch one
chain twice: that is what lets whole arrays be linked and unlinked in one go.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Final, NewType

import numpy as np
from numpy.typing import NDArray

from kvray.core.ghosts import DIRECTORY_GHOSTS, Codes, Ghosts, Why, halves
from kvray.core.ids import KEY_BYTES
from kvray.core.makers import MakerNumbers, Makers
from kvray.core.messages import ENTRY_DTYPE
from kvray.core.rowarray import RowArray, Rows
from kvray.core.rowindex import FIRST_ROW, SPREAD, U32, U64, Bools, Indices, RowIndex

Listing = NewType("Listing", int)

MAX_LISTINGS = 16_384  # numbers in 16 bits: two for each node, and those that wait for the sweep
SWEEP_SCAN_ROWS = 262_144  # looked at in one call: 1 to 4 ms
SWEEP_FREE_ROWS = 32_768  # taken out in one call, and one step of the scan: 20 to 40 ms

ROW_DTYPE: Final = np.dtype(
    [
        ("low", "<u8"),  # of the key: its first and last 8 bytes
        ("high", "<u8"),
        ("generation", "<u8"),
        ("slot", "<u4"),
        ("bytes", "<u4"),  # 0: the key has been removed from a hidden listing (see `remove`)
        ("next", "<u4"),  # row of the same key in another listing; 0: none
        ("prev", "<u4"),
        ("listing", "<u2"),
        ("origin", "u1"),
        ("maker", "<u2"),  # see makers_of
    ],
    align=True,
)
_PAYLOAD: Final = ("slot", "bytes", "generation", "origin")  # same names in ENTRY_DTYPE


class Standing(IntEnum):
    """What `locate` makes of the entries of a listing."""

    FREE = 0
    HIDDEN = 1
    DROPPED = 2
    LAST = 3  # of a suspect
    SHOWN = 4


_LAST = int(Standing.LAST)  # numpy compares with a plain number much faster


class Catalogue:
    """The entries of all nodes. `max_rows` bounds the memory: what does not fit is not listed."""

    def __init__(self, *, max_rows: int) -> None:
        self._rows = RowArray(ROW_DTYPE, used_field="listing", max_rows=max_rows)
        self._heads = RowIndex()
        self._pairs = RowIndex()
        self._standing: NDArray[np.uint8] = np.zeros(MAX_LISTINGS + 1, np.uint8)
        self._row_counts = [0] * (MAX_LISTINGS + 1)
        self._removed_counts = [0] * (MAX_LISTINGS + 1)  # rows with 0 bytes
        self._free_listings = list(range(MAX_LISTINGS, 0, -1))
        self._unswept: set[Listing] = set()  # what sweep has to look for
        self._cursor = FIRST_ROW
        self._ghosts = Ghosts(DIRECTORY_GHOSTS)
        self._makers = MakerNumbers()

    def __len__(self) -> int:
        """Rows in use, those that wait for the sweep included."""
        return len(self._rows)

    @property
    def room(self) -> int:
        """How many more rows there can be."""
        return self._rows.room

    @property
    def size_bytes(self) -> int:
        return self._rows.size_bytes + self._heads.size_bytes + self._pairs.size_bytes

    def count(self, listing: Listing) -> int:
        """Entries of a listing."""
        return self._row_counts[listing] - self._removed_counts[listing]

    def standing(self, listing: Listing) -> Standing:
        return Standing(int(self._standing[listing]))

    def listings(self, *standings: Standing) -> set[Listing]:
        """For tests."""
        return {Listing(n) for n in np.flatnonzero(np.isin(self._standing, standings)).tolist()}

    # -- listings --------------------------------------------------------------------------------

    def open(self) -> Listing | None:
        """A new, hidden listing. None: all numbers are taken until the next sweep."""
        if not self._free_listings:
            return None
        listing = Listing(self._free_listings.pop())
        self._standing[listing] = Standing.HIDDEN
        return listing

    def show(self, listing: Listing, *, last: bool = False) -> None:
        """Let locate find it; last: only behind all others of a key."""
        assert self._standing[listing] not in (Standing.FREE, Standing.DROPPED)
        self._standing[listing] = Standing.LAST if last else Standing.SHOWN
        if self._removed_counts[listing]:
            self._unswept.add(listing)

    def drop(self, listing: Listing) -> None:
        """Nothing of it is located from now on. Its rows go with the next sweeps."""
        assert self._standing[listing] not in (Standing.FREE, Standing.DROPPED)
        self._standing[listing] = Standing.DROPPED
        self._unswept.add(listing)
        self._note_swept(listing)

    # -- entries ---------------------------------------------------------------------------------

    def add(self, listing: Listing, entries: Rows, *, keep: bool = False) -> int:
        """Enter ENTRY_DTYPE rows; a key that is there already gets the new place.

        keep, for hidden listings: a key that is there or was removed stays as it is. Returns how
        many entries did not fit.
        """
        assert not keep or self._standing[listing] == Standing.HIDDEN
        entries = _one_each(entries)
        low, high = halves(entries["key"].tobytes())
        rows = self._find(listing, low, high)
        known = rows > 0
        if not keep and known.any():
            self._overwrite(listing, rows[known], entries.compress(known))
            self._note_swept(listing)
        return self._enter(listing, entries.compress(~known), low[~known], high[~known])

    def remove(self, listing: Listing, keys: bytes) -> int:
        """Take keys out; one that is not there is no error.

        A hidden listing remembers them, so that `add(keep=True)` does not bring them back. Returns
        how many could not be remembered.
        """
        if self._standing[listing] == Standing.HIDDEN:
            entries = np.zeros(len(keys) // KEY_BYTES, ENTRY_DTYPE)
            entries["key"] = np.frombuffer(keys, ("V", KEY_BYTES))
            return self.add(listing, entries)
        low, high = halves(keys)
        self._ghosts.note(low, high, Why.EVICTED)
        rows = self._find(listing, low, high)
        self._take_out(listing, np.unique(rows[rows > 0]))
        self._note_swept(listing)
        return 0

    def locate(
        self, keys: bytes, *, limit: int, without: Listing | None = None
    ) -> tuple[Indices, Rows]:
        """Up to limit shown rows of each key, as (index of the key, row), in the order of the keys.

        The youngest entries of a key come first: a block that many nodes want at once then has a
        source more with each node that has got it, and the first one is not asked by all.
        """
        low, high = halves(keys)
        rows = self._heads.find(_key_hash(low, high), self._same_key(low, high))
        at = rows.nonzero()[0]
        rows = rows[at]
        taken: U32 = np.zeros(len(low), np.uint32)
        found: list[tuple[Indices, Rows, Bools]] = []
        while rows.size:
            content = self._rows.data.take(rows)
            listings = content["listing"]
            standing = self._standing[listings]
            shown = (standing >= _LAST) & (content["bytes"] > 0)
            if without is not None:
                shown &= listings != without
            good = shown.nonzero()[0]
            last = standing[good] == _LAST
            found.append((at[good], content.take(good), last))
            rows = content["next"]
            if not np.count_nonzero(rows):  # cheaper than any()
                break
            taken[at[good[~last]]] += 1  # a key is in `at` once: none is counted twice
            go_on = (rows > 0) & (taken[at] < limit)
            at, rows = at[go_on], rows[go_on]
        return _first_of_each(found, limit)

    def why_missing(self, keys: bytes, at: Indices) -> Codes | None:
        """A Why of each key, 0 for those that were located (at). None if all are 0."""
        missing: Bools = np.ones(len(keys) // KEY_BYTES, np.bool_)
        missing[at] = False
        if not missing.any():
            return None
        codes = self._ghosts.why(*halves(keys))
        codes *= missing
        return codes if codes.any() else None

    def makers_of(self, rows: Rows) -> Makers:
        """Of each of these rows."""
        return self._makers.makers(rows["maker"])

    def entries_of(self, listing: Listing) -> Rows:
        """A copy of the rows of a listing. Goes through all rows: for people and tests."""
        rows: Rows = self._rows.data[: self._rows.end]
        own: Rows = rows[(rows["listing"] == listing) & (rows["bytes"] > 0)]
        return own

    def sweep(self) -> int:
        """Take out some rows of dropped listings, and remembered removals of shown ones.

        To be called now and then. Returns how many rows are free again.
        """
        scanned = freed = 0
        while self._unswept and scanned < SWEEP_SCAN_ROWS and freed < SWEEP_FREE_ROWS:
            start = self._cursor if self._cursor < self._rows.end else FIRST_ROW
            stop = min(start + SWEEP_FREE_ROWS, self._rows.end)
            assert start < stop, "there are rows to be swept, but no rows"
            content = self._rows.data[start:stop]
            standing = self._standing[content["listing"]]
            lost = standing == Standing.DROPPED
            dead = lost | ((standing >= Standing.LAST) & (content["bytes"] == 0))
            listings = content["listing"][dead]
            self._ghosts.note(content["low"][lost], content["high"][lost], Why.PEER_GONE)
            rows = (np.flatnonzero(dead) + start).astype(np.uint32)
            for number in np.unique(listings).tolist():
                self._take_out(Listing(number), rows[listings == number])
                self._note_swept(Listing(number))
            scanned += stop - start
            freed += len(rows)
            self._cursor = stop
        return freed

    # -- rows and chains -------------------------------------------------------------------------

    def _same_key(self, low: U64, high: U64) -> Callable[[Indices, U32], Bools]:
        lows, highs = self._rows.data["low"], self._rows.data["high"]

        def same(wanted: Indices, rows: U32) -> Bools:
            equal: Bools = lows[rows] == low[wanted]
            equal &= highs[rows] == high[wanted]
            return equal

        return same

    def _find(self, listing: Listing, low: U64, high: U64) -> U32:
        """The row of each key in this listing, 0 if it has none."""
        same_key, listings = self._same_key(low, high), self._rows.data["listing"]

        def same(wanted: Indices, rows: U32) -> Bools:
            equal = same_key(wanted, rows)
            equal &= listings[rows] == listing
            return equal

        return self._pairs.find(_pair_hash(low, high, listing), same)

    def _overwrite(self, listing: Listing, rows: U32, entries: Rows) -> None:
        data = self._rows.data
        was_removed = np.count_nonzero(data["bytes"][rows] == 0)
        is_removed = np.count_nonzero(entries["bytes"] == 0)
        self._removed_counts[listing] += int(is_removed) - int(was_removed)
        for name in _PAYLOAD:
            data[name][rows] = entries[name]
        data["maker"][rows] = self._makers.number(entries["maker"])

    def _enter(self, listing: Listing, entries: Rows, low: U64, high: U64) -> int:
        """Make rows for keys that this listing does not have. Returns how many did not fit."""
        count = min(len(entries), self._rows.room)
        unlisted = len(entries) - count
        if not count:
            return unlisted
        entries, low, high = entries[:count], low[:count], high[:count]
        self._make_room(count)
        rows = self._rows.allocate(count)
        content = np.zeros(count, ROW_DTYPE)
        content["low"], content["high"], content["listing"] = low, high, listing
        for name in _PAYLOAD:
            content[name] = entries[name]
        content["maker"] = self._makers.number(entries["maker"])
        # Each new row becomes the first of its key.
        key_hash = _key_hash(low, high)
        firsts = self._heads.find(key_hash, self._same_key(low, high))
        content["next"] = firsts
        self._rows.data[rows] = content
        chained = firsts > 0
        self._rows.data["prev"][firsts[chained]] = rows[chained]
        self._heads.replace(key_hash[chained], firsts[chained], rows[chained])
        self._heads.put(key_hash[~chained], rows[~chained])
        self._pairs.put(_pair_hash(low, high, listing), rows)
        self._row_counts[listing] += count
        self._removed_counts[listing] += int(np.count_nonzero(entries["bytes"] == 0))
        return unlisted

    def _take_out(self, listing: Listing, rows: U32) -> None:
        """Unlink and free rows of one listing, all different."""
        data = self._rows.data
        content = data.take(rows)
        before, after = content["prev"], content["next"]
        # Row 0 takes what is written beyond the ends of chains, and is cleared again.
        data["next"][before] = after
        data["prev"][after] = before
        data[0] = 0
        key_hash = _key_hash(content["low"], content["high"])
        succeeded, alone = (before == 0) & (after > 0), (before == 0) & (after == 0)
        self._heads.replace(key_hash[succeeded], rows[succeeded], after[succeeded])
        self._heads.remove(key_hash[alone], rows[alone])
        self._pairs.remove(_pair_hash(content["low"], content["high"], listing), rows)
        self._row_counts[listing] -= len(rows)
        self._removed_counts[listing] -= int(np.count_nonzero(content["bytes"] == 0))
        self._rows.free(rows)

    def _note_swept(self, listing: Listing) -> None:
        """Forget what is done with: a dropped listing without rows has a free number again."""
        if self._standing[listing] != Standing.DROPPED:
            if not self._removed_counts[listing]:
                self._unswept.discard(listing)
        elif not self._row_counts[listing]:
            self._standing[listing] = Standing.FREE
            self._free_listings.append(listing)
            self._unswept.remove(listing)

    def _make_room(self, count: int) -> None:
        """In both indexes. A few thousand rows at a time: more would be out of the CPU's caches
        between one numpy call and the next, and their temporary copies would be gigabytes.
        """
        if not self._pairs.has_room(count):
            self._pairs.start_again(len(self._rows) + count)
            for rows, content in self._rows.pieces():
                hashes = _pair_hash(content["low"], content["high"], content["listing"])
                self._pairs.put(hashes, rows)
        if not self._heads.has_room(count):
            self._heads.start_again(len(self._heads) + count)
            for every_row, every_content in self._rows.pieces():
                first = np.flatnonzero(every_content["prev"] == 0)
                rows, content = every_row[first], every_content.take(first)
                self._heads.put(_key_hash(content["low"], content["high"]), rows)

    # -- for people and tests --------------------------------------------------------------------

    def snapshot(self) -> dict[str, int]:
        return {
            "rows": len(self),
            "max_rows": len(self) + self.room,
            "listings": MAX_LISTINGS - len(self._free_listings),
            "unswept_listings": len(self._unswept),
            "bytes": self.size_bytes,
            "makers": len(self._makers),
        }

    def check(self) -> None:
        """Every row is in both indexes and in one chain, and nothing else is."""
        self._rows.check()
        self._heads.check()
        self._pairs.check()
        self._makers.check()
        used = self._rows.used()
        content = self._rows.data[used]
        self._check_listings(content)

        following = content["next"]
        has_next = following > 0
        after = self._rows.data.take(following[has_next])
        assert np.array_equal(after["prev"], used[has_next]), "a chain is broken"
        for half in ("low", "high"):
            assert np.array_equal(after[half], content[half][has_next]), "a chain of two keys"
        first = content["prev"] == 0
        assert np.array_equal(np.sort(self._heads.rows()), used[first]), "not the first rows"
        assert np.array_equal(np.sort(self._pairs.rows()), used), "not all rows"
        low, high = content["low"], content["high"]
        same = self._same_key(low[first], high[first])
        found = self._heads.find(_key_hash(low[first], high[first]), same)
        assert np.array_equal(found, used[first]), "a key leads elsewhere"
        for number in np.unique(content["listing"]).tolist():
            own = content["listing"] == number
            found = self._find(Listing(number), low[own], high[own])
            assert np.array_equal(found, used[own]), "a key of a listing leads elsewhere"

    def _check_listings(self, content: Rows) -> None:
        taken = np.flatnonzero(self._standing).tolist()
        free = np.array(self._free_listings, np.intp)
        is_free = np.zeros(MAX_LISTINGS + 1, np.bool_)
        is_free[free] = True
        assert not self._standing[is_free].any(), "a free listing has a standing"
        free_count = np.count_nonzero(is_free)
        assert free_count == len(free) == MAX_LISTINGS - len(taken), "a lost listing"
        assert sum(self._row_counts) == len(content), "rows of a free listing"
        unswept = set()
        for number in taken:
            own = content[content["listing"] == number]
            removed_count = int(np.count_nonzero(own["bytes"] == 0))
            assert self._row_counts[number] == len(own), "rows are counted wrong"
            assert self._removed_counts[number] == removed_count, "removals are counted wrong"
            standing = self._standing[number]
            if standing == Standing.DROPPED or (standing >= Standing.LAST and removed_count):
                unswept.add(number)
        assert unswept == self._unswept, "the sweep looks for something else"


def _key_hash(low: U64, high: U64) -> U64:
    """Keys are digests, so each half would do; in tests they are not."""
    return low ^ (high * SPREAD)


def _pair_hash(low: U64, high: U64, listing: int | NDArray[np.uint16]) -> U64:
    """For one listing, or for one of each key."""
    return _key_hash(low, high) + np.asarray(listing, np.uint64) * SPREAD


def _one_each(entries: Rows) -> Rows:
    """Without doubles of a key, of which the last one counts. Doubles are rare, so looking for
    them must be cheap: sorting 4,096 numbers takes 30 us.
    """
    low, high = halves(entries["key"].tobytes())
    ordered = np.sort(low)
    if not (ordered[1:] == ordered[:-1]).any():
        return entries
    last = {key: index for index, key in enumerate(zip(low.tolist(), high.tolist(), strict=True))}
    return entries[list(last.values())]


def _first_of_each(found: list[tuple[Indices, Rows, Bools]], limit: int) -> tuple[Indices, Rows]:
    """Joined, ordered by key, SHOWN before LAST, and cut to limit a key."""
    if len(found) == 1 and limit:
        return found[0][0], found[0][1]
    if not found:
        return np.zeros(0, np.intp), np.zeros(0, ROW_DTYPE)
    at, rows, last = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(at * 2 + last, kind="stable")
    at, rows = at[order], rows.take(order)
    starts = np.flatnonzero(np.diff(at, prepend=-1))
    rank = np.arange(len(at)) - np.repeat(starts, np.diff(starts, append=len(at)))
    first = rank < limit
    return at[first], rows.compress(first)
