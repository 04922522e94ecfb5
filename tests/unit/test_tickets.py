"""Goal: an engine copies to and from nothing but the payload, whatever a NodeStore answers; what
was answered early and late is told apart.

Method: answers are given to the pages of a ticket by hand, as NodeClient gives them.
"""

import pytest

from kvray.core.codec import pack_slots
from kvray.core.ids import BlockKey, Generation, SlabId, SlotIndex
from kvray.core.layout import Geometry
from kvray.core.messages import Grant, KeyState
from kvray.core.reasons import MissReason
from kvray.errors import RemoteProtocolError
from kvray.node.tickets import LookupPage, ReservePage, Ticket, cut_page, make_runs

GEOMETRY = Geometry(slab_bytes=16 << 20, extent_bytes=1 << 20)
BEGIN, END = GEOMETRY.payload_offset, GEOMETRY.used_bytes
PAGE = 4_096
HIT, MISS, WAIT = KeyState.HIT, KeyState.MISS, KeyState.WAIT
OUTSIDE = [0, BEGIN - 1, END - PAGE + 1, END, 2**63 - 1, 2**63, 2**64 - 1]


def page_of(*slot_bytes: int) -> LookupPage:
    """A lookup of two keys for each size."""
    runs = make_runs([2] * len(slot_bytes), [False] * len(slot_bytes), slot_bytes)
    keys = [BlockKey(bytes([n]) * 16) for n in range(2 * len(slot_bytes))]
    return LookupPage(Ticket(keys, SlabId(bytes(16))), cut_page(runs, 0), GEOMETRY)


def rows(*offsets: int) -> bytes:
    return pack_slots((SlotIndex(n), Generation(n + 1), offset) for n, offset in enumerate(offsets))


@pytest.mark.parametrize("offset", OUTSIDE)
@pytest.mark.parametrize("hits", [1, 2])
def test_one_place_outside_the_payload_spoils_the_answer(offset: int, hits: int) -> None:
    page = page_of(PAGE)
    states, slots = bytes([HIT, HIT][:hits] + [MISS] * (2 - hits)), rows(*[BEGIN, offset][-hits:])
    with pytest.raises(RemoteProtocolError, match="does not lie in the payload"):
        page.answer(states, slots)
    assert page.ticket.place(0) is None
    reserve = ReservePage(page.cut, GEOMETRY)
    grants = bytes([Grant.GRANTED, Grant.GRANTED if hits == 2 else Grant.FULL])
    with pytest.raises(RemoteProtocolError, match="does not lie in the payload"):
        reserve.answer(grants, slots)
    assert reserve.places == {}


@pytest.mark.parametrize("offset", OUTSIDE)
def test_each_place_is_held_to_the_size_of_its_own_run(offset: int) -> None:
    states = bytes([HIT, MISS, MISS, HIT])
    last_big = END - 4 * PAGE
    fits = page_of(PAGE, 4 * PAGE)
    fits.answer(states, rows(END - PAGE, last_big))
    assert [fits.ticket.place(i) for i in range(4)] == [
        (0, 1, END - PAGE), None, None, (1, 2, last_big)
    ]  # fmt: skip
    for places in ((END - PAGE, last_big + PAGE), (offset, last_big), (END - PAGE, offset)):
        with pytest.raises(RemoteProtocolError, match="does not lie in the payload"):
            page_of(PAGE, 4 * PAGE).answer(states, rows(*places))


def test_a_size_that_no_slab_has_fits_nowhere() -> None:
    for sizes in ((END,), (PAGE, END)):
        page = page_of(*sizes)
        states = bytes([HIT] * 2 * len(sizes))
        with pytest.raises(RemoteProtocolError, match="does not lie in the payload"):
            page.answer(states, rows(*[BEGIN] * 2 * len(sizes)))


def test_a_place_that_came_late_stands_beside_those_of_the_answer() -> None:
    page = page_of(PAGE)
    page.answer(bytes([HIT, WAIT]), rows(BEGIN))
    page.update([1], bytes([HIT]), pack_slots([(SlotIndex(7), Generation(9), BEGIN + PAGE)]))
    ticket = page.ticket
    assert ticket.settled
    assert page.done
    assert [ticket.place(0), ticket.place(1)] == [(0, 1, BEGIN), (7, 9, BEGIN + PAGE)]
    assert [ticket.from_peer(0), ticket.from_peer(1)] == [False, True]


class Looking(Ticket):
    """An engine's thread that looks whenever a state has changed, as it may."""

    __slots__ = ("seen",)

    def look(self) -> None:
        self.seen = [*getattr(self, "seen", []), self.causes.get(1)]

    def put(self, start: int, states: bytes, slots: bytes) -> None:
        super().put(start, states, slots)
        self.look()

    def change(self, index: int, state: int, place: tuple[int, int, int] | None) -> None:
        super().change(index, state, place)
        self.look()


def test_whoever_sees_a_miss_sees_its_cause() -> None:
    at_once, later = page_of(PAGE), page_of(PAGE)
    for page in (at_once, later):
        page.ticket = Looking(page.ticket.keys, page.ticket.slab_id)
    causes = {1: MissReason.EVICTED}

    at_once.answer(bytes([HIT, MISS]), rows(BEGIN), causes)
    later.answer(bytes([HIT, WAIT]), rows(BEGIN))
    later.update([1], bytes([MISS]), b"", causes)

    for page, seen in ((at_once, [MissReason.EVICTED]), (later, [None, MissReason.EVICTED])):
        assert isinstance(page.ticket, Looking)
        assert page.ticket.seen == seen


# -- given back ------------------------------------------------------------------------------------


def test_an_update_for_what_is_being_given_back_is_no_breach() -> None:
    """The engine's thread has begun to give it back, and its op is not forgotten yet."""
    page = page_of(PAGE)
    page.answer(bytes([WAIT, WAIT]), b"")
    page.ticket.release()
    page.update([0], bytes([HIT]), rows(BEGIN))
    page.update([1], bytes([MISS]), b"")
    assert page.ticket.settled


def test_an_update_for_what_nobody_has_given_back_is_one() -> None:
    page = page_of(PAGE)
    page.answer(bytes([MISS, WAIT]), b"")
    with pytest.raises(RemoteProtocolError, match="not waited for"):
        page.update([0], bytes([HIT]), rows(BEGIN))
