"""OpenTelemetry spans of a NodeStore's reads from peers, where Ray's own tracing is on.

    Serving ──begin, end──▶ Spans ──queue──▶ a thread ──▶ opentelemetry, set up by Ray's hook

One span for each read of a batch. Payload and headers come in one read where they can, and a
second read, of headers only, is a span of its own. A span has no parent: no trace crosses the
local socket, and a batch serves several requests.

With tracing off there are no Spans, and OpenTelemetry is not even imported. With it on, the thread
that answers engines puts a record into a queue and goes on, however slow the exporter is.
"""

import logging
import threading
import time
from contextlib import suppress
from queue import Full, Queue
from typing import TYPE_CHECKING, NamedTuple

from ray.util.tracing import tracing_helper

from kvray.config import NODE_NAME_CHARS
from kvray.core.commands import PostRead, ReadKind
from kvray.core.ids import NodeId, ReadId

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger("kvray.node")

MAX_QUEUED = 4_096  # reads that have ended: some seconds of a node that does nothing but read
CLOSE_LIMIT_S = 2.0  # a span takes 0.1 ms to write to a file; a node that stops waits for no more
NAMES = {ReadKind.PAYLOAD: "kvray.fetch", ReadKind.HEADERS: "kvray.verify"}
DONE = "done"


class _Read(NamedTuple):
    post: PostRead
    began_ns: int
    ended_ns: int = 0
    outcome: str = ""
    reason: str = ""


class Spans:
    """begin() and end() belong to one thread, and do not wait."""

    def __init__(self, node_id: NodeId, tracer: "Tracer") -> None:
        self._tracer = tracer
        self._node = node_id[:NODE_NAME_CHARS]
        self._open: dict[ReadId, _Read] = {}  # at most as many as core.fetch lets be under way
        self._ended: Queue[_Read | None] = Queue(MAX_QUEUED)
        self.dropped_count = 0
        # A daemon: should an exporter never return, the process can end all the same.
        self._thread = threading.Thread(target=self._run, name="kvray-spans", daemon=True)
        self._thread.start()

    def begin(self, post: PostRead) -> None:
        self._open[post.read_id] = _Read(post, time.time_ns())

    def end(self, read_id: ReadId, outcome: str, reason: str = "") -> None:
        """outcome: how the read has ended, or "abandoned" when nobody waits for it any more. What
        an abandoned one does later is not told.
        """
        read = self._open.pop(read_id, None)
        if read is None:
            return
        try:
            self._ended.put_nowait(
                read._replace(ended_ns=time.time_ns(), outcome=outcome, reason=reason)
            )
        except Full:
            if not self.dropped_count:
                logger.warning("spans of reads are dropped: they are not exported as fast as read")
            self.dropped_count += 1

    def close(self) -> None:
        """What has ended is exported first, as far as CLOSE_LIMIT_S lets it."""
        with suppress(Full):
            self._ended.put(None, timeout=CLOSE_LIMIT_S)
            self._thread.join(CLOSE_LIMIT_S)

    def _run(self) -> None:
        from opentelemetry.trace import StatusCode

        while (read := self._ended.get()) is not None:
            post = read.post
            span = self._tracer.start_span(
                NAMES[post.kind],
                start_time=read.began_ns,
                attributes={
                    "kvray.node": self._node,
                    "kvray.peer": post.node_id[:NODE_NAME_CHARS],
                    "kvray.bytes": int(post.bytes.sum()),
                    "kvray.blocks": len(post.bytes),
                    "kvray.outcome": read.outcome,
                },
            )
            if read.outcome != DONE:
                span.set_status(StatusCode.ERROR, read.reason or read.outcome)
            span.end(end_time=read.ended_ns)


def open_spans(node_id: NodeId) -> Spans | None:
    """None unless Ray's tracing is on in this process, which is known once Ray has begun it."""
    if not tracing_helper._is_tracing_enabled():  # noqa: SLF001 (Ray has no public question)
        return None
    from opentelemetry import trace  # Ray has loaded it, or said which packages are missing

    logger.info("Ray's tracing is on: reads from peers are spans")
    return Spans(node_id, trace.get_tracer("kvray"))
