"""Between two steps of an engine whose every request waits for kvray: listen, do not go round.

vLLM's loop would take one step without work after another until the blocks are there, and sleep a
millisecond between two (v1/engine/core.py). Each wakes the workers, which then spin on their queue
for a second (SpinCondition in shm_broadcast.py), on cores that the NodeStore copies with. So where
no request runs, nothing is being copied and each request waits for its look-up, the loop listens to
the NodeStore instead, until the first of them can go on or somebody wants something of the engine.
"""

import functools
from collections.abc import Callable
from typing import Any


def install() -> None:
    """Wrap the two places that take a step, in this process. To be called once."""
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.core_client import InprocClient

    _wrap_process(EngineCoreProc)
    _wrap_in_process(InprocClient)


def _wrap_process(engine_core_class: Any) -> None:
    original = engine_core_class._process_engine_step  # noqa: SLF001 (no public name)

    @functools.wraps(original)
    def _process_engine_step(self: Any) -> Any:
        _rest(self, lambda: not self.input_queue.empty())
        return original(self)

    engine_core_class._process_engine_step = _process_engine_step  # noqa: SLF001


def _wrap_in_process(client_class: Any) -> None:
    original = client_class.get_output

    @functools.wraps(original)
    def get_output(self: Any) -> Any:
        _rest(self.engine_core, lambda: False)  # who could want something is in this very call
        return original(self)

    client_class.get_output = get_output


def _rest(engine_core: Any, is_wanted: Callable[[], bool]) -> None:
    from kvray.engine.connector import KVRayConnector

    connector = engine_core.scheduler.connector
    if isinstance(connector, KVRayConnector):
        connector.rest(engine_core, is_wanted)
