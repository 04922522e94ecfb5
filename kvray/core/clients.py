"""Who uses the slab: the rows of its table of clients, and the session of each.

      hello ─▶ OPEN ◀──hello── SILENT ──silent for long──▶ LAPSED ──hello──▶ OPEN
                │  └──session──▶ ▲ │                         │ ▲
                │      closed      │            restart of ──┼─┘
                │                  │            this node    │
                └──────────────────┴──bye, process gone──────┴──▶ GONE ──▶ row cleared

A client is a process with a nonce, not a session (rule 3): a closed session ends nothing but its
answers, and a row stays until nobody who is named by it, or works for it, can write any more. An
ENGINE's slots are written by the WORKERs that name its nonce, so its row outlives it until they
are gone too; only then may its slots be used again.

Pins and slots are core.store's; this file says whose they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvray.core.commands import WriteClient
from kvray.core.deadlines import Deadlines
from kvray.core.header_page import ClientRow
from kvray.core.ids import UNKNOWN_MAKER, ClientId, Maker, Namespace, OpId, Role, SlotIndex
from kvray.core.layout import MAX_CLIENTS
from kvray.core.messages import ChunkShape, EngineUse, Hello, Introduce, NoiseLevels
from kvray.core.trusted import Own

# A session that breaks comes back within seconds (client.py retries after 1 to 5 s). An engine
# that does not is hung or detached badly: its pins must not keep blocks for as long as it lives.
SESSION_GRACE_MS = 30_000
NO_NAMESPACE = Namespace(b"")
NO_NOISE = NoiseLevels()
MAX_COUNTER_NAMES = 128  # kept of an engine's reports; it has 60, half of them for durations


class ClientState(Enum):
    """See the picture in the module's docstring."""

    OPEN = "open"
    SILENT = "silent"  # without a session; has its pins and slots
    LAPSED = "lapsed"  # without a session; its slots are in quarantine
    GONE = "gone"  # an ENGINE whose workers may still write


@dataclass(slots=True, eq=False)
class Client:
    """One row of the table."""

    client_id: ClientId
    row: int
    role: Role
    engine_nonce: int
    state: ClientState
    session_id: int | None = None
    namespace: Namespace = NO_NAMESPACE
    label: str = ""
    model: str = ""
    fields: dict[str, str] = field(default_factory=dict)  # of its namespace, for people
    maker: Maker = UNKNOWN_MAKER
    chunks: list[ChunkShape] = field(default_factory=list)
    noise: NoiseLevels = NO_NOISE
    writing: dict[SlotIndex, OpId] = field(default_factory=dict)  # reserved, by which Reserve
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def is_engine(self) -> bool:
        return self.role is Role.ENGINE


@dataclass(frozen=True, slots=True)
class Admission:
    """write: for a new row. replaced: the session that was the client's until now."""

    client: Client
    write: WriteClient | None
    replaced: int | None


class Clients:
    """The table. Each method that changes a row says what is to be written into the slab."""

    def __init__(self, rows: Sequence[ClientRow] = ()) -> None:
        """rows: of the slab that was adopted. Who they are about may be gone by now: watch them."""
        self._by_id: dict[ClientId, Client] = {}
        self._by_session: dict[int, Client] = {}
        self._free_rows = sorted(set(range(MAX_CLIENTS)) - {row.row for row in rows}, reverse=True)
        self._silent: Deadlines[ClientId] = Deadlines()
        self.totals: dict[str, int] = {}  # what all engines have said, those that are gone too
        for row in rows:
            client = Client(row.client, row.row, row.role, row.engine_nonce, ClientState.LAPSED)
            self._by_id[client.client_id] = client

    def __iter__(self) -> Iterator[Client]:
        return iter(list(self._by_id.values()))

    def of_session(self, session_id: int) -> Client | None:
        return self._by_session.get(session_id)

    def of_process(self, pid: int, start_ticks: int) -> list[Client]:
        return [
            client
            for client in self._by_id.values()
            if (client.client_id.pid, client.client_id.start_ticks) == (pid, start_ticks)
        ]

    def writers_of(self, engine: Client) -> list[Client]:
        """Who may still write into an engine's slots: it and its workers, but for the GONE."""
        return [
            client
            for client in self._by_id.values()
            if client.state is not ClientState.GONE
            and (
                client is engine
                or (not client.is_engine and client.engine_nonce == engine.engine_nonce)
            )
        ]

    def gone_engines(self) -> list[Client]:
        """Whose rows are kept for their workers."""
        return [client for client in self._by_id.values() if client.state is ClientState.GONE]

    # -- changes ---------------------------------------------------------------------------------

    def admit(self, session_id: int, hello: Hello) -> Admission | str:
        """A hello. A client that is known keeps its row; an older session of it is forgotten.
        Returns the reason if it can not be admitted.
        """
        other = self._by_session.get(session_id)
        if other is not None and other.client_id != hello.client:
            return "this session has said hello as another client"
        client = self._by_id.get(hello.client)
        write = None
        if client is None:
            if not self._free_rows:
                return f"{MAX_CLIENTS} clients use this slab already; more can not be"
            client = Client(
                hello.client,
                self._free_rows.pop(),
                hello.role,
                hello.engine_nonce,
                ClientState.LAPSED,
            )
            self._by_id[hello.client] = client
            write = WriteClient(client.row, hello.client, hello.role, hello.engine_nonce)
        elif (client.role, client.engine_nonce) != (hello.role, hello.engine_nonce):
            return "this client has said hello with another role or engine before"
        replaced = client.session_id if client.session_id != session_id else None
        if replaced is not None:
            del self._by_session[replaced]
        client.session_id = session_id
        client.label, client.model = hello.label, hello.model
        self.introduce(client, hello)
        client.state = ClientState.OPEN
        self._by_session[session_id] = client
        self._silent.discard(client.client_id)
        return Admission(client, write, replaced)

    def introduce(self, client: Client, said: Hello | Introduce) -> None:
        """What it says of itself, in place of what it said before."""
        client.namespace, client.fields = said.namespace, said.fields
        client.maker, client.chunks, client.noise = said.maker, said.chunks, said.noise

    def close(self, session_id: int, now_ms: int) -> Client | None:
        """A session has ended; its client, if it was its session until now."""
        client = self._by_session.pop(session_id, None)
        if client is not None:
            client.session_id = None
            client.state = ClientState.SILENT
            self._silent.set(client.client_id, now_ms + SESSION_GRACE_MS)
        return client

    def take_lapsed(self, now_ms: int) -> list[Client]:
        """Those that have been SILENT for too long, LAPSED from now on."""
        lapsed = [self._by_id[client_id] for client_id in self._silent.take_due(now_ms)]
        for client in lapsed:
            client.state = ClientState.LAPSED
        return lapsed

    def leave(self, client: Client) -> None:
        """It has said bye or its process is gone: GONE, with its row still there."""
        if client.session_id is not None:
            del self._by_session[client.session_id]
            client.session_id = None
        self._silent.discard(client.client_id)
        client.state = ClientState.GONE

    def clear(self, client: Client) -> WriteClient:
        """Nothing in the slab is of this GONE client any more: its row is free."""
        assert client.state is ClientState.GONE
        assert not client.writing
        del self._by_id[client.client_id]
        self._free_rows.append(client.row)
        return WriteClient(client.row, None, client.role, client.engine_nonce)

    def engine_uses(self) -> list[EngineUse]:
        """Of the engines that are there, each once."""
        engines = (
            client
            for client in self._by_id.values()
            if client.is_engine and client.state in (ClientState.OPEN, ClientState.SILENT)
        )
        return sorted({EngineUse(each.model, each.namespace, each.maker) for each in engines})

    def introduced(self) -> dict[tuple[Namespace, Maker], Own]:
        """What the engines that are there have said of what they compute, by maker."""
        return {
            (client.namespace, client.maker): Own(tuple(client.chunks), client.noise)
            for client in self._by_id.values()
            if client.is_engine
            and client.state in (ClientState.OPEN, ClientState.SILENT)
            and client.maker != UNKNOWN_MAKER
        }

    def next_deadline_ms(self) -> int | None:
        return self._silent.next_ms()

    def report(self, client: Client, counters: dict[str, int]) -> None:
        """Add up what an engine says of itself. Names beyond MAX_COUNTER_NAMES are not kept."""
        for kept in (client.counters, self.totals):
            for name, count in counters.items():
                if name in kept or len(kept) < MAX_COUNTER_NAMES:
                    kept[name] = kept.get(name, 0) + count

    def snapshot(self) -> list[dict[str, Any]]:
        return [
            {
                "pid": client.client_id.pid,
                "role": client.role.name.lower(),
                "state": client.state.value,
                "label": client.label,
                "model": client.model,
                "fields": dict(client.fields),
                "namespace": client.namespace.hex(),
                "maker": f"{client.maker:016x}",
                "chunk_kinds": len(client.chunks),
                "row": client.row,
                "writing": len(client.writing),
                "counters": dict(client.counters),
            }
            for client in self._by_id.values()
        ]

    def check(self) -> None:
        """Assert that rows, sessions and states agree, both ways."""
        rows = [client.row for client in self._by_id.values()]
        assert sorted(rows + self._free_rows) == list(range(MAX_CLIENTS)), "a row lost or doubled"
        for session_id, client in self._by_session.items():
            assert client.session_id == session_id
            assert self._by_id.get(client.client_id) is client
        for client_id, client in self._by_id.items():
            assert client.client_id == client_id
            is_open = client.state is ClientState.OPEN
            assert is_open == (client.session_id is not None)
            if client.session_id is not None:
                assert self._by_session.get(client.session_id) is client
            assert (client.state is ClientState.SILENT) == (client_id in self._silent)
            has_slots = client.state in (ClientState.OPEN, ClientState.SILENT)
            assert has_slots or not client.writing, "slots of somebody who lapsed or is gone"
            assert client.is_engine or not client.writing, "a worker has reserved"
        self._silent.check()
