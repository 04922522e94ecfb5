"""The worker's end of the local socket: the mapped slab, and that the NodeStore knows of us.

A worker asks nothing and commits nothing; EngineCore does, in its name. It says hello so that the
NodeStore hands over the slab and can watch this process: a slot that it may write into is not given
away before it is gone (rule 3). Everything else is the connector's, on a thread that sleeps.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable

from kvray.core.codec import encode
from kvray.core.ids import ClientId, Namespace, OpId, Role, SlabId
from kvray.core.messages import Bye, Hello, LocalAnswer
from kvray.node import process, wire
from kvray.node.connector import RETRY_FIRST_S, RETRY_LAST_S, Connection, Connector, Session

MAX_LABEL_CHARS = 1_024  # a model's path and a rank
NO_NAMESPACE = Namespace(b"")  # it is for people only, and EngineCore says it
CLOSE_DEADLINE_S = 1.0  # Bye is sent, its Ack awaited, the thread joined


class WorkerClient:
    """One per worker. Methods may be called from any thread, and none but the two that name a
    deadline waits for anything.

    The session of the last connection stays when the NodeStore is lost: its mapping is still good,
    and what was written to it counts or does not count by the NodeStore's rules, not by ours.
    """

    def __init__(
        self,
        *,
        find_socket: Callable[[], str | None],
        engine_nonce: int,
        label: str,
        namespace: Namespace = NO_NAMESPACE,
        on_session: Callable[[Session], None] | None = None,
        retry_first_s: float = RETRY_FIRST_S,
        retry_last_s: float = RETRY_LAST_S,
    ) -> None:
        """on_session: called on the client's thread for each new session, before it is there for
        others, so it must not take long: no job can use the slab until it returns.
        """
        self._client_id: ClientId | None = process.own_client_id()
        self._engine_nonce = engine_nonce
        self._label = label[:MAX_LABEL_CHARS]
        self._namespace = namespace
        self._on_session = on_session
        self._ops = itertools.count(1)
        self._changed = threading.Condition()
        self._session: Session | None = None
        self._connection: Connection | None = None
        self._closed = False
        self._connector = Connector(
            name="kvray-worker",
            find_socket=find_socket,
            hello=self._hello,
            on_open=self._opened,
            on_message=_ignore,
            on_lost=self._lost,
            map_slab=True,
            retry_first_s=retry_first_s,
            retry_last_s=retry_last_s,
        )

    def start(self) -> None:
        """Connect in the background, and again whenever the NodeStore was lost."""
        self._connector.start()

    @property
    def session(self) -> Session | None:
        """The newest one, also while its NodeStore is away; None before the first."""
        return self._session

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def reason(self) -> str:
        """Why there is no connection; empty if there is one. For people."""
        return self._connector.reason

    def session_for(self, slab_id: SlabId | bytes) -> Session | None:
        """The session whose slab this is, with its slab mapped. None if we do not have it (yet):
        then a hello is tried at once in the background, and this job fails.
        """
        session = self._session
        if session is not None and session.slab_id == slab_id:
            return session
        if not self._closed:
            self._connector.wake()
        return None

    def wait_session(self, deadline_s: float) -> Session | None:
        """For start-up: sleep until there is a session, at most this long."""
        with self._changed:
            self._changed.wait_for(lambda: self._session is not None or self._closed, deadline_s)
        return self._session

    def close(self, deadline_s: float = CLOSE_DEADLINE_S, *, says_bye: bool = True) -> None:
        """Say bye if somebody hears it, and end the thread. The mapping lives on with whoever
        still holds the session. Idempotent.

        says_bye: whether this process writes into no slot any more. Without it the connection
        ends, and the NodeStore waits for the end of the process.
        """
        if self._closed:
            return
        self._closed = True
        connection = self._connection
        if connection is not None and says_bye:
            with connection.sending:
                if not connection.has_ended():
                    with contextlib.suppress(OSError):  # its end says the same
                        wire.send(connection.sock, encode(Bye(OpId(next(self._ops)))))
        self._connector.close(deadline_s)
        with self._changed:
            self._changed.notify_all()

    # ---- on the connector's thread

    def _hello(self, last: Session | None) -> Hello | str:
        if self._client_id is None:
            return "the start time of this process can not be read"
        return Hello(
            op=OpId(next(self._ops)),
            client=self._client_id,
            role=Role.WORKER,
            engine_nonce=self._engine_nonce,
            namespace=self._namespace,
            label=self._label,
            slab_id=SlabId(b"") if last is None else last.slab_id,
        )

    def _opened(self, connection: Connection) -> None:
        if self._on_session is not None:
            self._on_session(connection.session)
        with self._changed:
            self._session = connection.session
            self._connection = connection
            self._changed.notify_all()

    def _lost(self) -> None:
        self._connection = None


def _ignore(connection: Connection, message: LocalAnswer) -> None:
    """An Ack of our Bye; a worker is told nothing else."""
