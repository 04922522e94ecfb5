"""A read is one span, from its beginning to its end or to when nobody waits for it any more."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from kvray.core.commands import NO_OFFSETS, PostRead, ReadKind
from kvray.core.ids import Epoch, NodeId, ReadId
from kvray.node.spans import Spans

NODE, PEER = NodeId("a" * 56), NodeId("b" * 56)


def read_of(number: int, kind: ReadKind = ReadKind.PAYLOAD, blocks: int = 2) -> PostRead:
    offsets = np.arange(blocks, dtype=np.uint64) * 4_096
    sizes = np.full(blocks, 1_000, np.uint64)
    return PostRead(ReadId(number), PEER, Epoch(1), kind, offsets, NO_OFFSETS, sizes)


def test_how_a_read_ended_is_said_once() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans(NODE, provider.get_tracer("test"))
    for number in (1, 2, 3):
        spans.begin(read_of(number))
    spans.begin(read_of(4, ReadKind.HEADERS))
    spans.end(ReadId(2), "abandoned")
    spans.end(ReadId(1), "done")
    spans.end(ReadId(2), "failed", "it ends late, and nobody asks how")
    spans.end(ReadId(3), "failed", "the peer is gone")
    spans.end(ReadId(4), "done")
    spans.end(ReadId(5), "done")  # never begun

    spans.close()  # what has ended is exported before
    found = [
        (span.name, (span.attributes or {})["kvray.outcome"], span.status.status_code)
        for span in exporter.get_finished_spans()
    ]
    assert found == [
        ("kvray.fetch", "abandoned", StatusCode.ERROR),
        ("kvray.fetch", "done", StatusCode.UNSET),
        ("kvray.fetch", "failed", StatusCode.ERROR),
        ("kvray.verify", "done", StatusCode.UNSET),
    ]
    assert exporter.get_finished_spans()[2].status.description == "the peer is gone"
    assert dict(exporter.get_finished_spans()[1].attributes or {}) == {
        "kvray.node": "a" * 16,
        "kvray.peer": "b" * 16,
        "kvray.bytes": 2_000,
        "kvray.blocks": 2,
        "kvray.outcome": "done",
    }


def test_a_slow_exporter_delays_nobody_and_what_it_can_not_take_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvray.node.spans.MAX_QUEUED", 2)
    exporting, may_go_on = threading.Event(), threading.Event()

    class Slow(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            exporting.set()
            may_go_on.wait()
            return super().export(spans)

    exporter, provider = Slow(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans(NODE, provider.get_tracer("test"))
    spans.begin(read_of(1))
    spans.end(ReadId(1), "done")
    assert exporting.wait(10)
    for number in (2, 3, 4, 5):  # returns at once: nobody sets may_go_on meanwhile
        spans.begin(read_of(number))
        spans.end(ReadId(number), "done")
    assert spans.dropped_count == 2
    may_go_on.set()
    spans.close()
    assert len(exporter.get_finished_spans()) == 3
