"""KVRayRouter: a request of Ray Serve LLM goes to the replica on which its prompt costs least.

    request ──its text──▶ chunks ─┐
    nodes that serve, what they ──┼─▶ core.routing ──▶ replicas, the cheapest first
      have measured (a thread,    │
      every 2 s)                  │
    what was sent where ──────────┘   or two at random, when the directory is silent

    deployment_config={"request_router_config": {
        "request_router_class": "kvray.serve.router:KVRayRouter"}}

A router sees text, the directory knows blocks by the hashes of their tokens: who holds what is this
router's own memory of what it has sent where. From the directory it has which nodes serve; asking
it for a prompt's blocks would need the engine's tokenizer and template, and a call each request.
Several routers (one an ingress replica) do not tell each other; Serve's own queue lengths still
keep requests from a replica that is full.
"""

import dataclasses
import logging
import random
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve._private.common import ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import MultiplexMixin, RequestRouter

from kvray.actors import log_to_stderr
from kvray.core.routing import Cost, Ranking, Rates
from kvray.core.speeds import Speeds, SpeedsSeen
from kvray.errors import ConfigError, KVRayError
from kvray.serve.decisions import Decisions
from kvray.serve.prompts import CHUNK_TOKENS, Prompt, prompt_of

logger = logging.getLogger("kvray.serve")

REFRESH_S = 2.0  # a node that comes or goes is seen so soon; one call to each node
SILENT_S = 10.0  # the directory is restarted within a few seconds; longer is no hiccup
MAX_OPEN = 16_384  # requests without an answer; far above max_ongoing_requests of all replicas
# Serve tries again at least every second while all are full, and that is a new ranking.
CHOOSING_MS = 30_000
CHOICES = 2  # of power of two choices

# What each node that serves says of itself, by its Ray id; raises what a call raises.
Look = Callable[[], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Beliefs:
    """What is believed until it has been measured, and for good if is_fixed."""

    prefill_tokens_per_s: float
    kv_bytes_per_token: float
    link_gb_per_s: float
    copy_gb_per_s: float
    is_fixed: bool = False

    def rates(self, speeds: Speeds) -> Rates:
        known = Speeds() if self.is_fixed else speeds
        token_bytes = known.bytes_per_token or self.kv_bytes_per_token
        return Rates(
            prefill_ms=(known.prefill_us_per_token or 1e6 / self.prefill_tokens_per_s) / 1_000,
            copy_ms=token_bytes / self.copy_gb_per_s / 1e6,
            link_ms=token_bytes / self.link_gb_per_s / 1e6,
            links_ms={pair: token_bytes / rate for pair, rate in known.links.items()},
        )


@dataclass(frozen=True, slots=True)
class View:
    """What the thread has seen last. serving: Ray ids of nodes."""

    serving: frozenset[str]
    rates: Rates
    seen_s: float = float("-inf")  # time.monotonic()

    @property
    def is_silent(self) -> bool:
        return time.monotonic() - self.seen_s > SILENT_S


class Watch:
    """Looks every REFRESH_S, in a thread that ends with stop()."""

    def __init__(
        self, look: Look, beliefs: Beliefs, *, model: str = "", period_s: float = REFRESH_S
    ) -> None:
        self.view = View(frozenset(), beliefs.rates(Speeds()))
        self._look = look
        self._beliefs = beliefs
        self._seen = SpeedsSeen(model)
        self._period_s = period_s
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="kvray-router", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        silent_at_s = time.monotonic() + SILENT_S
        while not self._stopping.is_set():
            try:
                nodes = self._look()
            except (KVRayError, RayError) as exc:
                if silent_at_s <= time.monotonic():
                    silent_at_s = float("inf")  # said once
                    logger.warning("kvray: requests go by two choices from now on: %s", exc)
            else:
                rates = self._beliefs.rates(self._seen.look(nodes))
                if self.view.is_silent:
                    logger.info("kvray: this router ranks by cost: %d nodes serve", len(nodes))
                self.view = View(frozenset(nodes), rates, time.monotonic())
                silent_at_s = time.monotonic() + SILENT_S
            self._stopping.wait(self._period_s)


@dataclass(frozen=True, slots=True)
class Open:
    """A request that was ranked: what for, and on whom it counts, if it does. costs: while Serve
    has not said where it went. ended_on: who has answered it, or rejected it, before that.
    """

    prompt: Prompt
    costs: Mapping[str, Cost]
    counted: Cost | None
    since_ms: float
    ended_on: str = ""


class KVRayRouter(MultiplexMixin, RequestRouter):
    """See the module. Serve makes it, and calls it in one event loop."""

    def initialize_state(
        self,
        *,
        prefill_tokens_per_s: float = 10_000,
        kv_bytes_per_token: float = 131_072,
        link_gb_per_s: float = 10.0,
        copy_gb_per_s: float = 10.0,
        device_tokens: int = 400_000,
        slab_tokens: int = 1_000_000,
        measured: bool = True,
        model: str = "",
        cluster_name: str = "default",
        look: Look | None = None,
        **unknown: object,
    ) -> None:
        """The keywords of request_router_kwargs. The first three are what is believed until
        engines and nodes have measured it, or for good with measured=False; the defaults are those
        of an 8B model. device_tokens, slab_tokens: what one device and one node's slab hold.
        model: as `kvray status` names it, where the cluster serves several; its engines' speeds
        count. look: for tests, which nodes serve. Raises ConfigError for what is not positive, and
        for a name that is none of these.
        """
        log_to_stderr()
        if unknown:
            raise ConfigError(f"KVRayRouter has no setting {', '.join(sorted(unknown))}")
        beliefs: dict[str, float] = {
            "prefill_tokens_per_s": prefill_tokens_per_s,
            "kv_bytes_per_token": kv_bytes_per_token,
            "link_gb_per_s": link_gb_per_s,
            "copy_gb_per_s": copy_gb_per_s,
        }
        sizes = {"device_tokens": device_tokens, "slab_tokens": slab_tokens}
        for name, value in (beliefs | sizes).items():
            if value <= 0:
                raise ConfigError(f"{name} of KVRayRouter must be positive, not {value}")
        watch = Watch(
            look or _look_at(cluster_name),
            Beliefs(**beliefs, is_fixed=not measured),
            model=model,
        )
        self._ranking = Ranking(
            watch.view.rates,
            device_chunks=max(1, device_tokens // CHUNK_TOKENS),
            slab_chunks=max(1, slab_tokens // CHUNK_TOKENS),
        )
        self._decisions = Decisions(self._deployment_id.name, self._deployment_id.app_name)
        self._choosing: OrderedDict[str, Open] = OrderedDict()  # the oldest first
        self._open: OrderedDict[str, Open] = OrderedDict()  # sent, and without an answer
        self._watch = watch
        self._applied: View | None = None
        weakref.finalize(self, self._watch.stop)

    @property
    def is_silent(self) -> bool:
        """Nothing was heard of the directory for SILENT_S: requests go by two choices."""
        return self._watch.view.is_silent

    @property
    def open_count(self) -> int:
        """Requests that were ranked and have no whole answer yet, as far as Serve has said."""
        return len(self._choosing) + len(self._open)

    @property
    def decision_counts(self) -> list[int]:
        """See serve.decisions."""
        return self._decisions.counts

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
        self._sent(pending_request.metadata.internal_request_id, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve may tell of a short answer before it tells that the request was routed, and of a
        request that a full replica has rejected it tells that it was completed.
        """
        name = replica_id.to_full_id_str()
        opened = self._open.get(internal_request_id) or self._choosing.get(internal_request_id)
        if opened is None:
            return
        if opened.counted is not None and opened.counted.replica == name:
            self._open.pop(internal_request_id, None)
            self._choosing.pop(internal_request_id, None)
            self._ranking.completed(name, opened.prompt.chunks, now_ms=_now_ms())
        elif internal_request_id in self._choosing:
            self._choosing[internal_request_id] = dataclasses.replace(opened, ended_on=name)

    def _sent(self, request_id: str, replica_id: ReplicaID) -> None:
        """It is on that replica, which may not be the best: that one was full."""
        opened = self._choosing.pop(request_id, None)
        if opened is None:
            return
        name, now_ms = replica_id.to_full_id_str(), _now_ms()
        cost = opened.costs.get(name)
        if cost != opened.counted:
            self._withdraw(opened, now_ms)
        if cost is None:
            return
        if cost != opened.counted:
            self._ranking.routed(cost, opened.prompt.chunks, now_ms=now_ms)
        if opened.ended_on == name:
            self._ranking.completed(name, opened.prompt.chunks, now_ms=now_ms)
            return
        self._open[request_id] = dataclasses.replace(opened, costs={}, counted=cost)
        if len(self._open) > MAX_OPEN:
            _, dropped = self._open.popitem(last=False)
            self._withdraw(dropped, now_ms)

    def _rank(
        self, candidates: dict[ReplicaID, RunningReplica], request: PendingRequest
    ) -> list[RunningReplica]:
        """Counts the request on the best at once: the next one is ranked before Serve has heard
        from the replica, which takes it some ms. Where two choices decide, it counts when it went.
        """
        request_id = request.metadata.internal_request_id
        before = self._choosing.pop(request_id, None) or self._open.pop(request_id, None)
        prompt = before.prompt if before else prompt_of([*request.args, *request.kwargs.values()])
        with self._decisions.one():
            now_ms = _now_ms()
            self._apply_view()
            if before is not None:
                self._withdraw(before, now_ms)
            self._forget_cancelled(now_ms)
            by_name = {key.to_full_id_str(): replica for key, replica in candidates.items()}
            costs = self._ranking.rank(
                prompt.chunks,
                prompt.tokens,
                chunk_tokens=CHUNK_TOKENS,
                now_ms=now_ms,
                among=list(by_name),
            )
            best = costs[0] if costs and not self.is_silent else None
            if best is not None:
                self._ranking.routed(best, prompt.chunks, now_ms=now_ms)
            by_replica = {cost.replica: cost for cost in costs}
            self._choosing[request_id] = Open(prompt, by_replica, best, now_ms)
        return [by_name[cost.replica] for cost in costs]

    def _forget_cancelled(self, now_ms: float) -> None:
        """Serve tells nothing of a request that was given up before it was sent."""
        while self._choosing:
            request_id, oldest = next(iter(self._choosing.items()))
            if now_ms - oldest.since_ms < CHOOSING_MS and len(self._choosing) < MAX_OPEN:
                return
            del self._choosing[request_id]
            self._withdraw(oldest, now_ms)

    def _withdraw(self, opened: Open, now_ms: float) -> None:
        if opened.counted is not None:
            self._ranking.withdrawn(opened.counted, now_ms=now_ms)

    def _apply_view(self) -> None:
        view = self._watch.view
        if view is self._applied:
            return
        nodes = {
            replica.replica_id.to_full_id_str(): replica.node_id or ""
            for replica in self.curr_replicas.values()
        }
        self._ranking.rates = view.rates
        self._ranking.set_replicas(nodes, serving=view.serving)
        self._applied = view


def _two_of(candidates: list[RunningReplica]) -> list[list[RunningReplica]]:
    """Serve takes the one with the shorter queue."""
    return [random.sample(candidates, min(CHOICES, len(candidates)))] if candidates else []


def _look_at(cluster_name: str) -> Look:
    def look() -> Mapping[str, Mapping[str, Any]]:
        from kvray.cluster import connect

        return {node.node_id: node.details for node in connect(cluster_name).nodes()}

    return look


def _now_ms() -> float:
    return time.monotonic() * 1_000
