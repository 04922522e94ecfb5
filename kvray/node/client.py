"""The engine's end of the local socket: NodeClient in EngineCore, WorkerClient in each worker.

    ABSENT ──hello answered──▶ CONNECTED ──no answer within the step's budget──▶ SILENT
       ▲                        │     ◀───────────anything heard────────────────  │
       └────connection lost─────┴─────────────────────────────────────────────────┘
    any ──close──▶ CLOSED

Who does what. The engine's thread asks (lookup, reserve): it sends and reads its answer itself, for
as long as this step's budget lasts, and never for longer. The connector's thread connects, and
hears whatever comes while nobody asks: updates, late answers, acks, the end. The outbox's thread
(telling) sends what needs no answer, and knows which slots may still be written into.
Nothing that the socket or the NodeStore does is raised to the engine: a fault is no session, no
answer is a miss.
Imports neither Ray nor NIXL nor vLLM nor torch.
"""

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from kvray.core.codec import encode, pack_keys, pack_slots
from kvray.core.ids import (
    UNKNOWN_MAKER,
    BlockKey,
    ClientId,
    Maker,
    Namespace,
    OpId,
    Role,
    SlabId,
)
from kvray.core.messages import (
    MAX_COMPUTE_US,
    MAX_NOISE,
    MAX_WRITING_LISTED,
    ChunkShape,
    Hello,
    Introduce,
    KeyState,
    LocalAnswer,
    Lookup,
    NoiseLevels,
    Reserve,
)
from kvray.node import process, wire
from kvray.node.connector import RETRY_FIRST_S, RETRY_LAST_S, Connection, Connector, Session
from kvray.node.outbox import OUTBOX_LIMIT
from kvray.node.patience import BUDGET_S, Patience
from kvray.node.questions import Questions
from kvray.node.telling import Teller
from kvray.node.tickets import (
    LookupPage,
    Place,
    Reservation,
    ReservePage,
    Ticket,
    cut_page,
    make_runs,
)
from kvray.node.worker_client import WorkerClient

__all__ = ["ClientState", "NodeClient", "Reservation", "Session", "Ticket", "WorkerClient"]

LISTEN_SLICE_S = 0.001  # how late an engine that listens hears of a new request; vLLM sleeps so too
CLOSE_DEADLINE_S = 2.0  # the outbox is drained, Bye acknowledged, the threads joined
JOIN_S = 1.0  # what the threads get in any case; they only have to wake up
_MISS = int(KeyState.MISS)
MAX_LABEL_CHARS = 1_024  # a model's path and more


class ClientState(Enum):
    """See the picture in the module's docstring."""

    ABSENT = "absent"  # no NodeStore: look-ups are misses, nothing is stored
    CONNECTED = "connected"
    SILENT = "silent"  # an answer is overdue: not asked again until anything is heard
    CLOSED = "closed"


class NodeClient:
    """One per engine. lookup, reserve, listen and begin_step belong to the engine's thread; the
    others may be called from any.

    engine_nonce tells several engines in one process apart. namespace, label, model and fields (of
    the namespace) are for people; `introduce` says them and maker anew, and more.
    on_session is called on the connector's thread for each new session and must not wait for
    anything.
    """

    def __init__(
        self,
        *,
        find_socket: Callable[[], str | None],
        engine_nonce: int,
        namespace: Namespace,
        label: str,
        model: str = "",
        fields: Mapping[str, str] | None = None,
        maker: Maker = UNKNOWN_MAKER,
        role: Role = Role.ENGINE,
        on_session: Callable[[Session], None] | None = None,
        budget_s: float = BUDGET_S,
        map_slab: bool = False,
        outbox_limit: int = OUTBOX_LIMIT,
        retry_first_s: float = RETRY_FIRST_S,
        retry_last_s: float = RETRY_LAST_S,
    ) -> None:
        self.counters: Counter[str] = Counter()
        start_ticks = process.start_ticks(os.getpid())
        self._client_id = (
            None if start_ticks is None else ClientId(os.getpid(), start_ticks, engine_nonce)
        )
        self._role = role
        self._label = _shown(label)
        self._model = _shown(model)
        self._on_session = on_session
        self._patience = Patience(budget_s)
        self._ops = itertools.count(1)
        # What this engine has said of itself last, and what each hello says again.
        self._said = Introduce(OpId(0), namespace, dict(fields or {}), maker)
        self._connection: Connection | None = None
        self._closed = False
        self._closing = threading.Lock()
        self._teller = Teller(self._ops, self.counters, outbox_limit=outbox_limit)
        self._questions = Questions(self._teller, self.counters)
        self._connector = Connector(
            name="kvray-client",
            find_socket=find_socket,
            hello=self._hello,
            on_open=self._opened,
            on_message=self._heard,
            on_lost=self._lost,
            map_slab=map_slab,
            retry_first_s=retry_first_s,
            retry_last_s=retry_last_s,
        )

    def start(self) -> None:
        """Connect in the background, and again whenever the NodeStore was lost. Returns at once."""
        self._connector.start()
        self._teller.start()

    @property
    def session(self) -> Session | None:
        """What the connected NodeStore said of itself; None while there is none."""
        connection = self._connection
        return None if connection is None or connection.has_ended() else connection.session

    @property
    def state(self) -> ClientState:
        if self._closed:
            return ClientState.CLOSED
        if self.session is None:
            return ClientState.ABSENT
        return ClientState.SILENT if self._patience.is_silent else ClientState.CONNECTED

    @property
    def may_answer_soon(self) -> bool:
        """Whether a question that was not asked in this step is worth another try in the next."""
        return self._patience.may_hear_soon and self.session is not None

    @property
    def reason(self) -> str:
        """Why there is no session; empty if there is one. For people."""
        return self._connector.reason

    @property
    def is_introduced(self) -> bool:
        """Whether the NodeStore knows this engine for what `introduce` has said last. Until it does
        nothing is looked up and nothing reserved: what is stored is stored under a maker's name.
        """
        return not self._teller.is_introducing

    def introduce(
        self,
        namespace: Namespace,
        *,
        fields: Mapping[str, str],
        maker: Maker = UNKNOWN_MAKER,
        chunks: Sequence[ChunkShape] = (),
        noise: NoiseLevels | None = None,
    ) -> None:
        """Say who this engine is from now on, instead of what was said before; see
        messages.Introduce. For any thread; does not wait, see is_introduced.

        Noise beyond MAX_NOISE, and what is no number, is said as MAX_NOISE.
        """
        noise = noise or NoiseLevels()
        bounded = [n if 0.0 <= n <= MAX_NOISE else MAX_NOISE for n in (noise.alone, noise.batched)]
        op = OpId(next(self._ops))
        self._said = Introduce(
            op, namespace, dict(fields), maker, list(chunks), NoiseLevels(*bounded)
        )
        self._teller.introduce(self._said)

    # ---- the engine's step

    def begin_step(self) -> None:
        """A new scheduler step: the whole budget is there again."""
        self._patience.begin_step()

    def lookup(
        self,
        keys: Sequence[BlockKey],
        *,
        run_lengths: Sequence[int],
        run_is_prefix: Sequence[bool],
        run_slot_bytes: Sequence[int],
        deadline_ms: int,
        fetch: bool = True,
        key_compute_us: int = 0,
        may_audit: bool = False,
    ) -> Ticket | None:
        """Ask for all keys of one request (see messages.Lookup). None: not asked, all misses;
        among other reasons, because an introduction has not been heard yet.

        A ticket that was not answered within the budget stays good: its answer is put into it when
        it comes. A prefix that breaks in one page is not asked on in the next.
        """
        assert sum(run_lengths) == len(keys)
        connection = self._connection
        if connection is None or self._teller.is_introducing:
            return None
        session = connection.session
        ticket = Ticket(keys, session.slab_id)
        runs = make_runs(run_lengths, run_is_prefix, run_slot_bytes)
        start = 0
        while start < len(ticket.keys):
            cut = cut_page(runs, start)
            page = LookupPage(ticket, cut, session.geometry)
            op = OpId(next(self._ops))
            message = Lookup(
                op=op,
                keys=pack_keys(ticket.keys[cut.start : cut.stop]),
                run_lengths=[run.stop - run.start for run in cut.runs],
                run_is_prefix=[run.is_prefix for run in cut.runs],
                run_slot_bytes=[run.slot_bytes for run in cut.runs],
                deadline_ms=deadline_ms,
                fetch=fetch,
                key_compute_us=min(key_compute_us, MAX_COMPUTE_US),
                # A miss in an earlier page would be one for all that follows.
                may_audit=may_audit and cut.stop == len(ticket.keys),
            )
            ticket.answered = False
            ticket.ops.append(op)
            self._questions.put(op, page)
            if not self._ask(connection, message, page):
                self._questions.forget(op)
                ticket.ops.pop()
                if not ticket.ops:
                    return None
                ticket.answered = True
                break
            start = cut.stop
            if not page.answered:
                page.overdue = True
                break
            if cut.continues is not None and cut.continues.is_prefix:
                first = max(cut.start, cut.continues.start)
                if _MISS in ticket.states[first : cut.stop]:
                    start = cut.continues.stop
                    ticket.miss(cut.stop, start)
        ticket.miss(start)
        self.counters["lookups"] += 1
        return ticket

    def reserve(
        self,
        keys: Sequence[BlockKey],
        *,
        run_lengths: Sequence[int],
        run_slot_bytes: Sequence[int],
    ) -> Reservation | None:
        """Ask for slots to store these blocks. None: not asked, refused, or no answer within the
        budget; then whatever the NodeStore grants all the same is undone.

        Each granted place is given back with commit or abandon once no rank writes into it.
        """
        assert sum(run_lengths) == len(keys)
        connection = self._connection
        if connection is None or not keys or self._teller.is_introducing:
            return None
        slab_id, geometry = connection.session.slab_id, connection.session.geometry
        runs = make_runs(run_lengths, [False] * len(run_lengths), run_slot_bytes)
        grants = b""
        places: dict[int, Place] = {}
        asked: list[OpId] = []
        while len(grants) < len(keys):
            cut = cut_page(runs, len(grants))
            page = ReservePage(cut, geometry)
            op = OpId(next(self._ops))
            message = Reserve(
                op=op,
                keys=pack_keys(keys[cut.start : cut.stop]),
                run_lengths=[run.stop - run.start for run in cut.runs],
                run_slot_bytes=[run.slot_bytes for run in cut.runs],
            )
            self._questions.put(op, page)
            sent = self._ask(connection, message, page)
            self._questions.forget(op)
            if sent:
                asked.append(op)
            if page.grants is None:
                self._teller.undo(asked, slab_id, places.values())
                return None
            grants += page.grants
            places |= page.places
        self.counters["reserves"] += 1
        return Reservation(asked[0], slab_id, grants, places)

    def _ask(
        self, connection: Connection, message: Lookup | Reserve, page: LookupPage | ReservePage
    ) -> bool:
        """Send a question and read until it is answered, the connection ends or the budget does.
        False: it was not sent. If it was and page is not answered, the answer is overdue.
        """
        patience = self._patience
        if patience.is_silent:
            return False
        if patience.is_spent:
            self.counters["budget_spent"] += 1
            return False
        begun_s = time.perf_counter()
        end_s = begun_s + patience.left_s
        if not connection.reading.acquire(timeout=patience.left_s):
            patience.left_s = 0.0
            return False
        try:
            if connection.has_ended():
                return False
            connection.divert()
            try:
                wire.send(connection.sock, encode(message))
                while not page.answered and not connection.has_ended():
                    left_s = end_s - time.perf_counter()
                    if left_s <= 0:
                        patience.overdue()
                        self.counters["overdue_answers"] += 1
                        break
                    connection.wait_answer(left_s)
                    connection.hear(self._heard)
            except BlockingIOError:  # it does not even read
                patience.overdue()
                self.counters["overdue_answers"] += 1
                return False
            except OSError as exc:
                connection.end(f"the connection broke: {exc.strerror}")
                return False
            finally:
                connection.restore()
            if connection.has_ended() and isinstance(page, LookupPage):
                page.ticket.lose()
            return True
        finally:
            connection.reading.release()
            patience.left_s -= time.perf_counter() - begun_s

    def listen(self, enough: Callable[[], bool], *, limit_s: float) -> None:
        """Hear what comes, while the engine has nothing else to do: until enough(), which is asked
        after every message and every LISTEN_SLICE_S, or limit_s is over, or the connection is.
        """
        connection = self._connection
        end_s = time.perf_counter() + limit_s
        if connection is None or enough() or not connection.reading.acquire(timeout=LISTEN_SLICE_S):
            return
        try:
            if connection.has_ended():
                return
            connection.divert()
            try:
                while (left_s := end_s - time.perf_counter()) > 0 and not enough():
                    connection.wait_answer(min(left_s, LISTEN_SLICE_S))
                    connection.hear(self._heard)
                    if connection.has_ended():
                        return
            finally:
                connection.restore()
        finally:
            connection.reading.release()

    # ---- what needs no answer; never waits

    def unpin(self, ticket: Ticket) -> None:
        """Give a ticket back: its pins end, its WAITs are misses. Idempotent."""
        if ticket.release():
            for op in tuple(ticket.ops):  # what is heard of it meanwhile changes nothing any more
                self._questions.forget(op)
                self._teller.unpin(op)

    def commit(self, slab_id: SlabId, places: Sequence[Place]) -> None:
        """Every rank has written its part of these slots. Repeated until it is acknowledged."""
        self._teller.commit(slab_id, places)

    def abandon(self, slab_id: SlabId, places: Sequence[Place]) -> None:
        """No rank writes into these slots any more, and they are worth nothing. Repeated too."""
        self._teller.abandon(slab_id, places)

    def report(self, counters: Mapping[str, int]) -> None:
        """Counters since the last report. Said at most once, so one may be lost."""
        self._teller.report(counters)

    # ---- the end

    def drain(self, deadline_s: float) -> bool:
        """Wait until everything that was committed, abandoned and unpinned is acknowledged;
        whether it is at the deadline.
        """
        return self._teller.drain(deadline_s)

    def close(self, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        """Drain, say bye and end the threads. Open tickets are lost. Idempotent; who comes second
        waits for the first.
        """
        end_s = time.monotonic() + deadline_s
        with self._closing:
            if self._closed:
                return
            if self.session is not None:
                self.drain(deadline_s)
                self._teller.bye(end_s - time.monotonic())
            self._closed = True
            self._connector.close(max(JOIN_S, end_s - time.monotonic()))
            self._teller.close(JOIN_S)

    # ---- on the connector's thread

    def _hello(self, last: Session | None) -> Hello | str:
        if self._client_id is None:
            return "the start time of this process can not be read"
        rows = [] if last is None else self._teller.still_written(last.slab_id)
        if len(rows) > MAX_WRITING_LISTED:
            return f"{len(rows)} slots are being written, more than a hello can list"
        said = self._said
        return Hello(
            op=OpId(next(self._ops)),
            client=self._client_id,
            role=self._role,
            engine_nonce=self._client_id.nonce,
            namespace=said.namespace,
            label=self._label,
            slab_id=SlabId(b"") if last is None else last.slab_id,
            writing=pack_slots(rows),
            model=self._model,
            fields=said.fields,
            maker=said.maker,
            chunks=said.chunks,
            noise=said.noise,
        )

    def _opened(self, connection: Connection) -> None:
        self.counters["sessions"] += 1
        self._patience.heard()
        self._connection = connection
        self._teller.open(connection)
        if self._on_session is not None:
            self._on_session(connection.session)

    def _lost(self) -> None:
        self._connection = None
        self._teller.lost()
        self._questions.lose()

    # ---- whoever receives

    def _heard(self, connection: Connection, message: LocalAnswer) -> None:
        """`reading` of the connection is held. Raises RemoteProtocolError."""
        self._patience.heard()
        self._questions.hear(connection.session.slab_id, message)

    # ---- for people and tests

    def snapshot(self) -> dict[str, Any]:
        return {
            "state": self.state.value,
            "reason": self.reason,
            **self._questions.snapshot(),
            **self._teller.snapshot(),
            "counters": dict(self.counters),
        }

    def check(self) -> None:
        """To be called on the engine's thread, between its questions."""
        self._teller.check()
        self._questions.check()


def _shown(text: str) -> str:
    """A model's path may have any character; what is said of it goes to terminals and logs."""
    return "".join(char if char.isprintable() else "?" for char in text)[:MAX_LABEL_CHARS]
