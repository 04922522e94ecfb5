"""What the parts of audit.py share: two nodes, kvray on them twice, and engines in float32, where
an answer does not hang on how a prompt was cut.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_world import cpu_binding
from kvray.core.reasons import tokens_by_source
from kvray.engine.arguments import transfer_settings
from tests import in_engine
from tests.engines import Answer, Engine, start_engine
from tests.engines import Mode as EngineMode
from tests.models import tiny
from tests.ray_nodes import Nodes, another_cluster, running_nodes, wait_until

TOKENS = 1_000  # of a document: seven chunks and a tail
ANSWER_TOKENS = 8
POOL_BYTES = 64 << 20  # 4,096 tokens of the tiny model in float32
SLAB_BYTES = 768 << 20  # all that one node's engines store, so that nothing is evicted
VERDICT_LIMIT_S = 30.0  # until B has met A's canary, or it never will


@dataclass(frozen=True, slots=True)
class Trust:
    """What node 1 has seen of other makers, all its engines together."""

    equal: int
    different: int
    audited_chunks: int

    @classmethod
    def of(cls, nodes: Nodes) -> "Trust":
        found = nodes.status(1)["trust"]
        return cls(found["canaries_equal"], found["canaries_different"], found["audited_chunks"])

    @property
    def verdicts(self) -> int:
        return self.equal + self.different


@dataclass(frozen=True)
class Scene:
    """nodes: with audits at their default; off: the same machines, without any. mode: users have an
    EngineCore of its own; in one process an engine is up sooner.
    """

    nodes: Nodes
    off: Nodes
    folder: Path
    mode: EngineMode

    def start(self, nodes: Nodes | None, index: int = 0, **arguments: Any) -> Engine:
        """An engine that belongs to node `index`, or one without kvray. Returns at once."""
        if nodes is not None:
            # Not Nodes.transfer: that is patient, and a benchmark is about what users get.
            settings = nodes.cluster.engine_settings() | {"node_id": nodes.node_ids[index]}
            arguments["kv_transfer_config"] = transfer_settings(settings)
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": cpu_binding(),
            **arguments.pop("environment", {}),
        }
        return start_engine(
            arguments.pop("model", tiny()),
            folder=self.folder,
            mode=self.mode,
            environment=environment,
            dtype="float32",
            max_model_len=2_048,
            kv_cache_memory_bytes=POOL_BYTES,
            **arguments,
        )


@contextmanager
def scene(*, is_smoke: bool) -> Iterator[Scene]:
    mode = EngineMode.IN_PROCESS if is_smoke else EngineMode.MULTIPROCESS
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvray-audit-")))
        nodes = stack.enter_context(running_nodes(2, slab_bytes=SLAB_BYTES))
        off = stack.enter_context(
            another_cluster(nodes, name="off", slab_bytes=SLAB_BYTES, audit_rate=0.0)
        )
        yield Scene(nodes, off, folder, mode)


@contextmanager
def ending(*engines: Engine) -> Iterator[None]:
    """They are up inside, and gone afterwards."""
    try:
        for engine in engines:
            engine.ready()
        yield
    finally:
        for engine in engines:
            engine.ask_to_end()
        for engine in engines:
            engine.close()


def ask_all(engine: Engine, documents: Sequence[list[int]]) -> list[Answer]:
    return [engine.generate(one, max_tokens=ANSWER_TOKENS) for one in documents]


def wrong(answers: Sequence[Answer], controls: Sequence[Answer]) -> int:
    """How many differ. Controls may go on for longer."""
    return sum(
        answer.tokens != control.tokens[: len(answer.tokens)]
        for answer, control in zip(answers, controls, strict=True)
    )


def counters_of(engine: Engine) -> dict[str, int]:
    """When all that it has stored is in its slab."""
    found: dict[str, int] = engine.call(in_engine.settle)["counters"]
    return found


def loaded_tokens(counters: dict[str, int]) -> int:
    """By kvray; what the device had is not in it."""
    found = tokens_by_source([counters])
    return found["local"] + found["peer"]


def wait_verdict(nodes: Nodes, before: Trust) -> Trust:
    """Until node 1 has met a maker more. What it has seen then."""
    wait_until(
        lambda: Trust.of(nodes).verdicts > before.verdicts,
        what="a verdict on another maker's canary",
        limit_s=VERDICT_LIMIT_S,
    )
    return Trust.of(nodes)
