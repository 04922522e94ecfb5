"""What an engine tells its NodeStore without waiting: commits, abandons, unpins, reports, and who
it is.

    put ──▶ unsent ──take, sent by the outbox's thread──▶ unacknowledged ──Ack──▶ gone
               ▲                                               │
               └────────────── rewind, after a reconnect ◀─────┘

Everything here may be said twice without harm and lost without danger: the NodeStore then keeps a
pin or a reservation until the client is gone. So there is a bound, and nothing on disk. Safe for
any number of threads; no socket here.
"""

import threading
import time
from collections import deque

from kvray.core.ids import OpId
from kvray.core.messages import Abandon, Bye, Commit, Introduce, Report, Unpin

OutboxMessage = Abandon | Bye | Commit | Introduce | Report | Unpin

OUTBOX_LIMIT = 4_096  # messages: some 20 s of a busy engine (100 requests/s, 2 messages each)


class Outbox:
    """put, acknowledge and rewind never block."""

    def __init__(self, limit: int = OUTBOX_LIMIT) -> None:
        assert limit > 1, "an introduction is never dropped for what comes after it"
        self.dropped_count = 0
        self._limit = limit
        self._changed = threading.Condition()
        self._unacknowledged: dict[OpId, OutboxMessage] = {}  # unsent ones included; oldest first
        self._unsent: deque[OpId] = deque()
        self._open = False  # somebody takes what is sent
        self._closed = False

    def put(self, message: OutboxMessage) -> OutboxMessage | None:
        """Returns the oldest message if it had to be dropped for this one. An introduction takes
        the place of the one before, and is never dropped: until it is heard nothing is asked.
        """
        dropped = None
        with self._changed:
            if self._closed:
                return message
            if isinstance(message, Introduce):
                for op in self._introductions():
                    del self._unacknowledged[op]
            if len(self._unacknowledged) >= self._limit:
                kept = self._introductions()
                oldest = next(op for op in self._unacknowledged if op not in kept)
                dropped = self._unacknowledged.pop(oldest)
                self.dropped_count += 1
                if self._unsent and self._unsent[0] == dropped.op:
                    self._unsent.popleft()
            self._unacknowledged[message.op] = message
            self._unsent.append(message.op)
            if self._open:
                self._changed.notify_all()
        return dropped

    def take(self) -> OutboxMessage | None:
        """The next message to send; sleeps until there is one and somebody to send it to. None
        after close.
        """
        with self._changed:
            while not self._closed:
                while self._open and self._unsent:
                    message = self._unacknowledged.get(self._unsent.popleft())
                    if message is not None:
                        return message
                self._changed.wait()
        return None

    def acknowledge(self, op: OpId) -> OutboxMessage | None:
        """The message that this Ack is for, the first time."""
        with self._changed:
            message = self._unacknowledged.pop(op, None)
            if not self._unacknowledged:
                self._changed.notify_all()
        return message

    def rewind(self) -> None:
        """A new connection: say everything again that is not acknowledged, in the old order."""
        with self._changed:
            self._unsent = deque(self._unacknowledged)
            self._open = True
            self._changed.notify_all()

    def pause(self) -> None:
        """The connection is lost: collect until rewind. A report that was sent is not sent again,
        since it would count twice; a Bye has said itself.
        """
        with self._changed:
            self._open = False
            unsent = set(self._unsent)
            for op, message in list(self._unacknowledged.items()):
                if isinstance(message, Bye) or (isinstance(message, Report) and op not in unsent):
                    del self._unacknowledged[op]
            self._changed.notify_all()

    def wait_empty(self, deadline_s: float) -> bool:
        """Sleep until everything is acknowledged; whether it is at the deadline (relative)."""
        end_s = time.monotonic() + deadline_s
        with self._changed:
            while self._unacknowledged:
                left_s = end_s - time.monotonic()
                if left_s <= 0 or self._closed:
                    return False
                self._changed.wait(left_s)
        return True

    def close(self) -> None:
        """Wake and end everybody who sleeps here; what is left is dropped."""
        with self._changed:
            self._closed = True
            self._unacknowledged.clear()
            self._unsent.clear()
            self._changed.notify_all()

    def unacknowledged(self) -> list[OutboxMessage]:
        """Oldest first."""
        with self._changed:
            return list(self._unacknowledged.values())

    def _introductions(self) -> list[OpId]:
        """One at most, mostly none."""
        messages = self._unacknowledged.items()
        return [op for op, message in messages if isinstance(message, Introduce)]

    def check(self) -> None:
        with self._changed:
            assert len(self._unacknowledged) <= self._limit
            assert all(op == message.op for op, message in self._unacknowledged.items())
            assert len(set(self._unsent)) == len(self._unsent)
            assert len(self._introductions()) <= 1
