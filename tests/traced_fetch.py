"""A Ray cluster with tracing on, and one fetch between its two nodes. A process of its own, since
Ray does not switch tracing off again in the process that has begun such a cluster.

    python -m tests.traced_fetch FOLDER     writes what each process exports into FOLDER
"""

import os
import sys
from pathlib import Path

from tests.block_client import Client
from tests.ray_nodes import running_nodes, wait_until

FOLDER_VARIABLE = "KVRAY_TEST_SPANS"
HOOK = "tests.traced_fetch:write_spans"
BLOCKS = ("a", "b", "c")


def write_spans() -> None:
    """The hook. Ray calls it in each of its processes, and in this one."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    path = Path(os.environ[FOLDER_VARIABLE]) / f"{os.getpid()}.jsonl"
    exporter = ConsoleSpanExporter(
        out=path.open("w"), formatter=lambda span: span.to_json(indent=None) + "\n"
    )
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def main(folder: Path) -> None:
    os.environ[FOLDER_VARIABLE] = str(folder)
    with running_nodes(2, tracing_startup_hook=HOOK) as nodes:
        owner, reader = (Client(nodes.cluster, node_id) for node_id in nodes.node_ids)
        keys = owner.store(*BLOCKS)
        nodes.wait_listed(keys)
        assert reader.hits(keys) == len(BLOCKS)
        (folder / "nodes").write_text(" ".join(nodes.node_ids))
        wait_until(
            lambda: any("kvray.fetch" in path.read_text() for path in folder.glob("*.jsonl")),
            what="the span of the fetch",
        )
        owner.client.close()
        reader.client.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
