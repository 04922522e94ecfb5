"""KVRayRouter: a request of Ray Serve LLM goes to the replica on which its prompt costs least.

    request ──its text──▶ chunks ─┐
    nodes that serve ─────────────┼─▶ core.routing ──▶ replicas, the cheapest first
      (a thread, every 2 s)       │
    what was sent where ──────────┘   or two at random, when the directory is silent

    deployment_config={"request_router_config": {
        "request_router_class": "kvray.serve.router:KVRayRouter",
        "request_router_kwargs": {"prefill_tokens_per_s": 20_000, "link_gb_per_s": 20.0}}}

A router sees text, the directory knows blocks by the hashes of their tokens: who holds what is this
router's own memory of what it has sent where. From the directory it has which nodes serve; asking
it for a prompt's blocks would need the engine's tokenizer and template, and a call each request.
Several routers (one an ingress replica) do not tell each other; Serve's own queue lengths still
keep requests from a replica that is full.
"""

import logging
import random
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ray.exceptions import RayError
from ray.serve._private.common import ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import MultiplexMixin, RequestRouter

from kvray.core.routing import Cost, Ranking, Rates
from kvray.errors import ConfigError, KVRayError
from kvray.serve.prompts import CHUNK_TOKENS, Prompt, prompt_of

logger = logging.getLogger("kvray.serve")

REFRESH_S = 2.0  # a node that comes or goes is seen so soon; one call to each node
SILENT_S = 10.0  # the directory is restarted within a few seconds; longer is no hiccup
MAX_OPEN = 16_384  # requests without an answer; far above max_ongoing_requests of all replicas
CHOICES = 2  # of power of two choices

Look = Callable[[], frozenset[str]]  # Ray ids of the nodes that serve; raises what a call raises


@dataclass(slots=True)
class View:
    """What the thread has seen last. Replaced as a whole, never changed."""

    serving: frozenset[str] = frozenset()
    seen_s: float = field(default=float("-inf"))  # time.monotonic()


class Watch:
    """Looks every REFRESH_S, in a thread that ends with stop()."""

    def __init__(self, look: Look, period_s: float = REFRESH_S) -> None:
        self.view = View()
        self._look = look
        self._period_s = period_s
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="kvray-router", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.view = View(self._look(), time.monotonic())
            except (KVRayError, RayError) as exc:
                logger.debug("the directory does not answer: %s", exc)
            self._stopping.wait(self._period_s)


@dataclass(frozen=True, slots=True)
class Open:
    """A request that was ranked: what for, and on whom it runs now."""

    prompt: Prompt
    costs: dict[str, Cost]
    replica: str = ""


class KVRayRouter(MultiplexMixin, RequestRouter):
    """See the module. Serve makes it, and calls it in one event loop."""

    def initialize_state(
        self,
        *,
        prefill_tokens_per_s: float = 10_000,
        kv_bytes_per_token: int = 131_072,
        link_gb_per_s: float = 10.0,
        copy_gb_per_s: float = 10.0,
        device_tokens: int = 400_000,
        slab_tokens: int = 1_000_000,
        cluster_name: str = "default",
        look: Look | None = None,
        **unknown: object,
    ) -> None:
        """The keywords of request_router_kwargs. Only ratios matter: measured values of `kvray
        doctor` (links) and of the engine's log are good enough, and the defaults are those of an
        8B model. device_tokens, slab_tokens: what one device and one node's slab hold. look: for
        tests, which nodes serve. Raises ConfigError for what is not positive, and for a name that
        is none of these.
        """
        if unknown:
            raise ConfigError(f"KVRayRouter has no setting {', '.join(sorted(unknown))}")
        given = {
            "prefill_tokens_per_s": prefill_tokens_per_s,
            "kv_bytes_per_token": kv_bytes_per_token,
            "link_gb_per_s": link_gb_per_s,
            "copy_gb_per_s": copy_gb_per_s,
            "device_tokens": device_tokens,
            "slab_tokens": slab_tokens,
        }
        for name, value in given.items():
            if value <= 0:
                raise ConfigError(f"{name} of KVRayRouter must be positive, not {value}")
        rates = Rates(
            prefill_ms=1_000 / prefill_tokens_per_s,
            copy_ms=kv_bytes_per_token / copy_gb_per_s / 1e6,
            link_ms=kv_bytes_per_token / link_gb_per_s / 1e6,
        )
        self._ranking = Ranking(
            rates,
            device_chunks=max(1, device_tokens // CHUNK_TOKENS),
            slab_chunks=max(1, slab_tokens // CHUNK_TOKENS),
        )
        self._open: OrderedDict[str, Open] = OrderedDict()
        self._watch = Watch(look or _look_at(cluster_name))
        self._applied: View | None = None
        weakref.finalize(self, self._watch.stop)

    @property
    def is_silent(self) -> bool:
        """Nothing was heard of the directory for SILENT_S: requests go by two choices."""
        return time.monotonic() - self._watch.view.seen_s > SILENT_S

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._applied = None

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, Serve takes the first that is not full."""
        candidates = {replica.replica_id: replica for replica in candidate_replicas}
        if pending_request is None:
            return _two_of(list(candidates.values()))
        if pending_request.metadata.multiplexed_model_id:
            allowed = self.apply_multiplex_routing(pending_request)
            candidates = {key: value for key, value in candidates.items() if key in allowed}
        # Serve tries again at once without it, in a loop without a pause.
        pending_request.routing_context.should_backoff = True
        ranked = self._rank(candidates, pending_request)
        if self.is_silent or not ranked:
            return _two_of(list(candidates.values()))
        best, *others = ranked
        return [[best], others[:1], others[1:]]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: ReplicaResult,  # noqa: ARG002 (Serve's signature)
    ) -> None:
        self._note_routed(pending_request.metadata.internal_request_id, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve may tell of a short answer before it tells that the request was routed, and tells
        nothing of that at all where replicas can not reject.
        """
        opened = self._open.get(internal_request_id)
        if opened is not None and not opened.replica:
            self._note_routed(internal_request_id, replica_id)
        opened = self._open.pop(internal_request_id, None)
        if opened is not None and opened.replica == replica_id.to_full_id_str():
            self._ranking.completed(opened.replica, now_ms=_now_ms())

    def _note_routed(self, request_id: str, replica_id: ReplicaID) -> None:
        opened = self._open.get(request_id)
        cost = opened.costs.get(replica_id.to_full_id_str()) if opened else None
        if opened is None or cost is None:
            return
        self._ranking.routed(cost, opened.prompt.chunks, now_ms=_now_ms())
        self._open[request_id] = Open(opened.prompt, {}, cost.replica)

    def _rank(
        self, candidates: dict[ReplicaID, RunningReplica], request: PendingRequest
    ) -> list[RunningReplica]:
        self._apply_view()
        request_id = request.metadata.internal_request_id
        known = self._open.pop(request_id, None)
        prompt = known.prompt if known else prompt_of([*request.args, *request.kwargs.values()])
        by_name = {key.to_full_id_str(): replica for key, replica in candidates.items()}
        costs = self._ranking.rank(
            prompt.chunks,
            prompt.tokens,
            chunk_tokens=CHUNK_TOKENS,
            now_ms=_now_ms(),
            among=list(by_name),
        )
        self._open[request_id] = Open(prompt, {cost.replica: cost for cost in costs})
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return [by_name[cost.replica] for cost in costs]

    def _apply_view(self) -> None:
        view = self._watch.view
        if self._applied is not None and view.serving == self._applied.serving:
            return
        nodes = {
            replica.replica_id.to_full_id_str(): replica.node_id or ""
            for replica in self.curr_replicas.values()
        }
        self._ranking.set_replicas(nodes, serving=view.serving)
        self._applied = view


def _two_of(candidates: list[RunningReplica]) -> list[list[RunningReplica]]:
    """Serve takes the one with the shorter queue."""
    return [random.sample(candidates, min(CHOICES, len(candidates)))] if candidates else []


def _look_at(cluster_name: str) -> Look:
    def look() -> frozenset[str]:
        from kvray.cluster import connect

        return frozenset(node.node_id for node in connect(cluster_name).nodes())

    return look


def _now_ms() -> float:
    return time.monotonic() * 1_000
