"""What an engine has asked its NodeStore and not been told yet, and what an answer does to it.

    lookup ──▶ LookupPage ──reply──▶ answered ──updates──▶ done, forgotten
    reserve ─▶ ReservePage ──reply─▶ answered; the caller forgets it, answered or not

The engine's thread puts questions in and takes them out; whoever holds the connection's `reading`
hears. No socket and no clock here.
"""

import logging
from collections import Counter

from kvray.core.ids import OpId, SlabId
from kvray.core.messages import (
    Ack,
    KeyState,
    LocalAnswer,
    LookupReply,
    LookupUpdate,
    Refused,
    ReserveReply,
)
from kvray.errors import RemoteProtocolError
from kvray.node.telling import Teller
from kvray.node.tickets import LookupPage, ReservePage

logger = logging.getLogger("kvray.node")

_MISS = int(KeyState.MISS)


class Questions:
    """Of one client. teller: hears what is no question's answer, and which slots were granted.
    counters: gets late_answers and refused. What is kept here ends with the tickets of the caller,
    who gives each one back.
    """

    def __init__(self, teller: Teller, counters: Counter[str]) -> None:
        self._teller = teller
        self._counters = counters
        self._lookups: dict[OpId, LookupPage] = {}  # with a key that may still be answered
        self._reserves: dict[OpId, ReservePage] = {}  # of the call that is under way

    def put(self, op: OpId, page: LookupPage | ReservePage) -> None:
        """Before it is sent: its answer may be heard by another thread."""
        if isinstance(page, LookupPage):
            self._lookups[op] = page
        else:
            self._reserves[op] = page

    def forget(self, op: OpId) -> None:
        """It was not sent, or nobody waits for its answer. May be repeated."""
        self._lookups.pop(op, None)
        self._reserves.pop(op, None)

    def lose(self) -> None:
        """The connection has ended: what was waited for in a look-up is a miss."""
        for page in list(self._lookups.values()):
            page.ticket.lose()
        self._lookups.clear()

    def hear(self, slab_id: SlabId, message: LocalAnswer) -> None:
        """slab_id: of the connection's session. Raises RemoteProtocolError."""
        match message:
            case LookupReply():
                self._hear_lookup(message)
            case LookupUpdate():
                if (page := self._lookups.get(message.op)) is not None:  # else unpinned meanwhile
                    page.update(message.indices, message.states, message.slots, message.causes)
                    self._forget_if_done(message.op, page)
            case ReserveReply():
                self._hear_reserve(slab_id, message)
            case Ack():
                self._teller.acknowledged(message.op)
            case Refused():
                self._hear_refused(message)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} was not asked for")

    def _hear_lookup(self, reply: LookupReply) -> None:
        page = self._lookups.get(reply.op)
        if page is None or page.overdue:
            self._counters["late_answers"] += 1
        if page is None:
            return  # unpinned meanwhile, and that is said in the outbox
        page.answer(reply.states, reply.slots, reply.causes)
        if reply.states.count(_MISS) == len(reply.states):
            page.ticket.ops.remove(reply.op)  # nothing is pinned for it, and nothing will be
        self._forget_if_done(reply.op, page)

    def _forget_if_done(self, op: OpId, page: LookupPage) -> None:
        if page.done:
            self._lookups.pop(op, None)

    def _hear_reserve(self, slab_id: SlabId, reply: ReserveReply) -> None:
        page = self._reserves.get(reply.op)
        if page is None:
            self._counters["late_answers"] += 1  # reserve has undone it when it gave up
            return
        page.answer(reply.grants, reply.slots)
        # Remembered before anybody can lose the connection and say hello without it.
        self._teller.granted(slab_id, page.places.values())

    def _hear_refused(self, refused: Refused) -> None:
        self._counters["refused"] += 1
        logger.debug("refused: %s", refused.reason)
        if (page := self._lookups.pop(refused.op, None)) is not None:
            page.give_up()
        elif (reserve := self._reserves.get(refused.op)) is not None:
            reserve.give_up()
        else:
            self._teller.acknowledged(refused.op)

    # ---- for people and tests

    def snapshot(self) -> dict[str, int]:
        return {"open_lookups": len(self._lookups)}

    def check(self) -> None:
        """To be called between the client's questions."""
        assert not self._reserves
        for op, page in list(self._lookups.items()):
            assert op in page.ticket.ops
            assert page.done == (page.waiting == 0 and page.answered)
