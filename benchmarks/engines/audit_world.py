"""What the parts of audit.py share: two nodes, kvray on them twice, and engines in float32, where
an answer does not hang on how a prompt was cut.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
VERDICTS = (EQUAL, DIFFERENT) = ("equal", "different")  # core.trust's words
VERDICT_LIMIT_S = 30.0  # until B has met A's canary, or it never will


@dataclass(frozen=True)
class Scene:
    """nodes: with audits at their default; off: the same machines, without any. mode: users have an
    EngineCore of its own; in one process an engine is up sooner. engines: all that were started.
    """

    nodes: Nodes
    off: Nodes
    folder: Path
    mode: EngineMode
    engines: list[Engine] = field(default_factory=list)

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
        engine = start_engine(
            arguments.pop("model", tiny()),
            folder=self.folder,
            mode=self.mode,
            environment=environment,
            dtype="float32",
            max_model_len=2_048,
            kv_cache_memory_bytes=POOL_BYTES,
            **arguments,
        )
        self.engines.append(engine)
        return engine


@contextmanager
def scene(*, is_smoke: bool) -> Iterator[Scene]:
    mode = EngineMode.IN_PROCESS if is_smoke else EngineMode.MULTIPROCESS
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvray-audit-")))
        nodes = stack.enter_context(running_nodes(2, slab_bytes=SLAB_BYTES))
        off = stack.enter_context(
            another_cluster(nodes, name="off", slab_bytes=SLAB_BYTES, audit_rate=0.0)
        )
        stage = Scene(nodes, off, folder, mode)
        stack.callback(_end, stage.engines)
        yield stage


@contextmanager
def ending(*engines: Engine) -> Iterator[None]:
    """They are up inside, and gone afterwards."""
    try:
        for engine in engines:
            engine.ready()
        yield
    finally:
        _end(engines)


def _end(engines: Iterable[Engine]) -> None:
    """Those that have not ended."""
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


def audited_chunks(nodes: Nodes) -> int:
    """On node 1, of all its engines."""
    return int(nodes.status(1)["trust"]["audited_chunks"])


def verdict(nodes: Nodes, b: Engine, a: Engine) -> str | None:
    """What node 1, which is B's, has seen of A's maker: "equal" or "different"; None while it has
    not compared the two, or if it never does.
    """
    mine, other = (engine.call(in_engine.stats) for engine in (b, a))
    wanted = (mine["namespace"], mine["canary"]["maker"], other["canary"]["maker"])
    for pair in nodes.status(1)["trust"]["pairs"]:
        if (pair["namespace"], pair["mine"], pair["other"]) == wanted:
            state: str = pair["state"]
            return state if state in VERDICTS else None
    return None


def is_same_maker(b: Engine, a: Engine) -> bool:
    makers = [engine.call(in_engine.canary)["maker"] for engine in (a, b)]
    return makers[0] is not None and makers[0] == makers[1]


def wait_verdict(nodes: Nodes, b: Engine, a: Engine) -> str:
    """It does not come for two of one maker, or under two names."""
    wait_until(
        lambda: verdict(nodes, b, a) is not None,
        what="a verdict on another maker's canary",
        limit_s=VERDICT_LIMIT_S,
    )
    return str(verdict(nodes, b, a))
