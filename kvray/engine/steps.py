"""Where kvray is called between the steps of an engine, in vLLM's two loops.

    EngineCoreProc   the loop of a process of its own: before its first turn, and before each step
    InprocClient     an engine in its front end's process: after its start, before each request that
                     comes, and before each step

Two things happen there. The canary is computed as soon as the engine can compute (see canary).

And where every request waits for kvray, the loop listens instead of going round: vLLM would take
one step without work after another until the blocks are there, and sleep a millisecond between two
(v1/engine/core.py). Each wakes the workers, which then spin on their queue for a second
(SpinCondition in shm_broadcast.py), on cores that the NodeStore copies with. So where no request
runs, nothing is being copied and each request waits for its look-up, the loop listens to the
NodeStore, until the first of them can go on or somebody wants something of the engine.
"""

import functools
from collections.abc import Callable
from typing import Any


def install() -> None:
    """Wrap vLLM's loops, in this process. To be called once."""
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.core_client import InprocClient

    _before(EngineCoreProc, "run_busy_loop", prove)
    _before(EngineCoreProc, "_process_engine_step", _before_step_of_process)
    _before(InprocClient, "get_output", lambda client: _before_step(client.engine_core, _nobody))
    _after(InprocClient, "__init__", lambda client: prove(client.engine_core))
    # Where kvray has come only with the connector, that start is under way already.
    _before(InprocClient, "add_request", lambda client: _prove_at_first(client.engine_core))


def prove_after(engine_core_class: Any, name: str) -> None:
    """Wrap a method of EngineCore after which the engine may have to be proven anew."""
    _after(engine_core_class, name, prove)


def _before(cls: Any, name: str, action: Callable[[Any], None]) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        action(self)
        return original(self, *args, **kwargs)

    setattr(cls, name, call)


def _after(cls: Any, name: str, action: Callable[[Any], None]) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        action(self)
        return answer

    setattr(cls, name, call)


def _nobody() -> bool:
    """Who could want something of an engine in this process is in this very call."""
    return False


def _before_step_of_process(core: Any) -> None:
    _before_step(core, lambda: not core.input_queue.empty())


def _before_step(core: Any, is_wanted: Callable[[], bool]) -> None:
    prove(core)
    connector = _connector(core)
    if connector is not None:
        connector.rest(core, is_wanted)


def prove(core: Any) -> None:
    """Compute the canary as far as it is due, in an engine with kvray; between two steps."""
    connector = _connector(core)
    if connector is not None:
        connector.prove(core)


def _prove_at_first(core: Any) -> None:
    """Only an engine that is not proven yet: else each request would wait where a slab has no room
    for the canary, or where a NodeStore does not answer.
    """
    connector = _connector(core)
    if connector is not None and not connector.is_proven:
        connector.prove(core)


def _connector(core: Any) -> Any:
    from kvray.engine.connector import KVRayConnector

    connector = core.scheduler.connector
    return connector if isinstance(connector, KVRayConnector) else None
