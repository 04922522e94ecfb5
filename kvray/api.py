"""kvray.attach, kvray.enable and what they return.

attach(LLM)        ──▶ Attachment         at once: the engine runs already
attach(AsyncLLM)   ──▶ awaitable of it    await kvray.attach(engine)
enable()           ──▶ engines made after it in this process are kvray's from their start
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvray import cluster as _cluster
from kvray.config import Config
from kvray.core import arguments
from kvray.core.durations import COPY_DIRECTIONS, VALUES_MS, copy_counts
from kvray.core.messages import MAX_DEADLINE_MS
from kvray.core.reasons import tokens_by_reason, tokens_by_source
from kvray.engine.versions import require_installed
from kvray.errors import ConfigError, NotAttachedError

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("kvray")

DETACH_DEADLINE_MS = 5_000  # copies of a full step take milliseconds; a fetch at most a second
DRAIN_POLL_MS = 20  # a step of an idle engine takes 1 to 2 ms


@dataclass(frozen=True, slots=True)
class AttachmentStats:
    """Counters of one engine since its attach. Tokens are counted once a request; bytes are the
    KV bytes of all ranks.
    """

    engine_pid: int
    namespace: str
    node_id: str | None
    connected: bool
    counters: dict[str, int]

    @property
    def hit_tokens(self) -> dict[str, int]:
        """Prompt tokens by where they came from: device, local, peer, computed."""
        return tokens_by_source([self.counters])

    @property
    def miss_tokens(self) -> dict[str, int]:
        """The computed ones by kvray.MissReason, those that there are."""
        return tokens_by_reason([self.counters])

    @property
    def copy_ms(self) -> dict[str, dict[int, int]]:
        """How often a rank's copy took how many ms: "load" (slab to device) and "store", each
        {ms: copies}. ms is rounded up to the bound of a bucket; 10,000 stands for more than 5,000.
        """
        return {
            direction: {
                value_ms: count
                for value_ms, count in zip(
                    VALUES_MS, copy_counts(self.counters, direction), strict=True
                )
                if count
            }
            for direction in COPY_DIRECTIONS
        }

    def to_frame(self) -> "pd.DataFrame":
        """One row a counter: name, value."""
        import pandas as pd

        return pd.DataFrame(sorted(self.counters.items()), columns=["name", "value"])


class Attachment:
    """kvray in one running engine. Give it back with detach(), or leave it until the engine ends.

    Not for use by two threads at once: vLLM's own client is not either.
    """

    def __init__(self, call: Callable[..., Any], cluster: "_cluster.Cluster") -> None:
        self._call = call
        self.cluster = cluster
        self._attached = True

    def stats(self) -> AttachmentStats:
        """Raises NotAttachedError after detach()."""
        self._require_attached()
        return _stats(self._call("kvray_stats"))

    def name_weights(self, version: str) -> None:
        """After the weights of this engine were changed: say what they are now. Engines that were
        told the same version share blocks again; without it a changed engine shares nothing.
        """
        self._require_attached()
        self._call("kvray_name_weights", arguments.a_text(version, "version"))

    def detach(self, deadline_ms: int = DETACH_DEADLINE_MS) -> None:
        """Wait for loads and stores under way, at most deadline_ms, and give the engine back.

        What is not done by then is given up: requests compute what they were loading. A second call
        does nothing.
        """
        arguments.a_duration(deadline_ms, "deadline_ms", at_most=MAX_DEADLINE_MS)
        if not self._attached:
            return
        for _ in _until(deadline_ms):
            if self._call("kvray_drain") == 0 and self._call("kvray_detach") == 0:
                break
            time.sleep(DRAIN_POLL_MS / 1_000)
        else:
            self._call("kvray_detach", True)  # noqa: FBT003 (vLLM's utility calls have no keywords)
        self._attached = False

    def _require_attached(self) -> None:
        if not self._attached:
            raise NotAttachedError("this engine was detached; kvray.attach(llm) attaches it again")


class AsyncAttachment:
    """kvray in one running AsyncLLM; the same as Attachment, awaited."""

    def __init__(self, call: Callable[..., Awaitable[Any]], cluster: "_cluster.Cluster") -> None:
        self._call = call
        self.cluster = cluster
        self._attached = True

    async def stats(self) -> AttachmentStats:
        self._require_attached()
        return _stats(await self._call("kvray_stats"))

    async def name_weights(self, version: str) -> None:
        """See Attachment.name_weights."""
        self._require_attached()
        await self._call("kvray_name_weights", arguments.a_text(version, "version"))

    async def detach(self, deadline_ms: int = DETACH_DEADLINE_MS) -> None:
        """See Attachment.detach."""
        arguments.a_duration(deadline_ms, "deadline_ms", at_most=MAX_DEADLINE_MS)
        if not self._attached:
            return
        for _ in _until(deadline_ms):
            if await self._call("kvray_drain") == 0 and await self._call("kvray_detach") == 0:
                break
            await asyncio.sleep(DRAIN_POLL_MS / 1_000)
        else:
            await self._call("kvray_detach", True)  # noqa: FBT003 (no keywords there)
        self._attached = False

    def _require_attached(self) -> None:
        if not self._attached:
            raise NotAttachedError(
                "this engine was detached; await kvray.attach(engine) attaches it again"
            )


def attach(llm: Any, config: Config | None = None, **settings: Any) -> Any:
    """Let a running engine share its KV cache with every other engine of this Ray cluster.

    llm: vllm.LLM (multiprocess or in-process), or vllm's AsyncLLM, for which this returns an
    awaitable. Starts kvray where it does not run yet, on the Ray cluster of this process, or on a
    local one if there is none. A second attach is a no-op that returns another handle.

    settings: fields of EngineConfig (model_tag="...", lookup_deadline_ms=...).
    Raises NotAttachedError if the engine is busy, has another KV connector, is of an unknown vLLM
    or uses what was not tested, and for what is no engine; ConfigError for an unknown setting;
    MissingPackageError where there is no vLLM. An error changes nothing.
    """
    require_installed("kvray.attach")
    if _is_async(llm):
        return _attach_async(llm, config, settings)
    if not hasattr(llm, "llm_engine"):
        raise NotAttachedError(
            f"kvray.attach takes a vllm.LLM, or vLLM's AsyncLLM; this is {type(llm).__qualname__}. "
            "An engine that Ray Serve or `vllm serve` makes has other doors: kvray.serve.enable, "
            "and --kv-transfer-config"
        )
    core = llm.llm_engine.engine_core
    if hasattr(core, "call_utility"):  # EngineCore in a process of its own
        call: Callable[..., Any] = core.call_utility
    else:

        def call(method: str, *args: Any) -> Any:
            from kvray.engine.attach import DOORS

            engine_core = core.engine_core
            if method == "kvray_drain" and not engine_core.scheduler.has_unfinished_requests():
                engine_core.step()  # nobody else does, and no request's output gets lost
            return DOORS[method](engine_core, *args)

    cluster, kvray = _prepare(config, settings)
    with _explained():
        _raise_refusal(call("kvray_attach", kvray))
    return Attachment(call, cluster)


def enable(config: Config | None = None, **settings: Any) -> "_cluster.Cluster":
    """Switch kvray on for every vLLM engine that this process makes from now on.

    For code that builds its LLM later, and the way to go where attach() can not be used. An engine
    that names a kv_transfer_config itself keeps its own. A second call replaces the settings.
    Raises what attach() does.
    """
    from kvray.engine import inject

    require_installed("kvray.enable")
    cluster, kvray = _prepare(config, settings)
    inject.enable(kvray)
    return cluster


async def _attach_async(
    engine: Any, config: Config | None, settings: dict[str, Any]
) -> AsyncAttachment:
    call = engine.engine_core.call_utility_async
    cluster, kvray = await asyncio.to_thread(_prepare, config, settings)
    with _explained():
        _raise_refusal(await call("kvray_attach", kvray))
    return AsyncAttachment(call, cluster)


def _is_async(llm: Any) -> bool:
    return hasattr(llm, "engine_core") and not hasattr(llm, "llm_engine")


def _prepare(
    config: Config | None, settings: dict[str, Any]
) -> tuple["_cluster.Cluster", dict[str, Any]]:
    """The cluster, started if need be, and what an engine on this node must know of it."""
    from kvray.config import EngineConfig

    EngineConfig.parse(settings)  # a wrong setting is told before anything is started
    cluster = _cluster.start(config, progress=logger.info)  # clearing a large slab takes a while
    return cluster, {**cluster.engine_settings(), **settings}


def _raise_refusal(answer: dict[str, Any]) -> None:
    if "error" in answer:
        kind = {"ConfigError": ConfigError}.get(answer["kind"], NotAttachedError)
        raise kind(answer["error"])


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """vLLM answers a utility call that it does not know with an AttributeError's text."""
    try:
        yield
    except Exception as exc:
        if "kvray_" not in str(exc) or "has no attribute" not in str(exc):
            raise
        raise NotAttachedError(
            "the engine's process does not know kvray. Either kvray was installed after the engine "
            "was started (start it again), or VLLM_PLUGINS is set and leaves kvray out (add "
            "'kvray' to it), or this vLLM is not one that kvray was tested with"
        ) from exc


def _stats(answer: dict[str, Any]) -> AttachmentStats:
    return AttachmentStats(
        engine_pid=answer["engine_pid"],
        namespace=answer["namespace"],
        node_id=answer["node_id"],
        connected=answer["connected"],
        counters=dict(answer["counters"]),
    )


def _until(deadline_ms: int) -> Iterator[None]:
    """Rounds of a wait that ends by itself."""
    end_s = time.monotonic() + deadline_ms / 1_000
    while time.monotonic() < end_s:
        yield
