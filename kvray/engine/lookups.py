"""In EngineCore: what is cached, and where to store what is not. An OffloadingManager of vLLM.

vLLM asks key by key and step by step; kvray asks its NodeStore once per request, for the whole
chain of keys, and answers every later question from memory:

    begin ──▶ ticket open ──all keys HIT or MISS, or the deadline──▶ vLLM loads the hits
                 │     └────the first HIT, the rest COMING────▶ vLLM loads both   │
                 └──finished, preempted, renewed──▶ unpin ◀──copy ended───────────┘

vLLM loads once for a request. So that a long chain need not be there as a whole before its load
begins, what is on its way from a peer into a known slot counts as a hit, as soon as a first block
has come; the workers wait for each slot (engine.arrivals). What fails to come is a failed load.

The NodeStore has a step's budget for all questions of that step. A request that can not be asked
about any more is asked about in the next step, a few times: computing it takes longer than those.

A request has one deadline for everything that kvray does for it. After it and after one failed
load its answers are misses until it ends or is preempted. New weights, a switch-off and a detach
are events of each request that there is (engine.requests): afterwards it waits for nothing.
"""

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)

from kvray.config import EngineConfig
from kvray.core.audit import AuditBudget
from kvray.core.ids import BlockKey, Namespace, SlabId
from kvray.core.keys import block_keys
from kvray.core.messages import Grant, KeyState
from kvray.core.reasons import COMPUTED, MissReason
from kvray.core.speeds import PREFILL_TOKENS, PREFILL_US, STORED_BYTES, STORED_TOKENS
from kvray.engine import metrics, versions
from kvray.engine.guard import Switch, guarded, nothing
from kvray.engine.holds import Holds
from kvray.engine.jobs import SlotSpec
from kvray.engine.namespace import digest, renewed
from kvray.engine.prefill_rate import PrefillRate
from kvray.engine.requests import RequestEvent, RequestState, RequestView, Run
from kvray.engine.sources import TokenCounts, cause_of, failure_of
from kvray.node.client import NodeClient

logger = logging.getLogger("kvray.engine")

MAX_EARLY_LOOKUPS = 4  # the next few: what they have found can not be evicted while they wait
# Steps in which a request's chunks are offered again when the NodeStore did not answer in time. An
# answer that is late by more than so many steps is no hiccup of a busy host; and vLLM logs a line
# for each.
MAX_POSTPONED_STEPS = 4


class Lookups(OffloadingManager):
    """One per engine. Called on the scheduler's thread only.

    slot_bytes: per cache group (vLLM's index) the bytes of one chunk over all ranks; None until
    every rank has said hello, and while it is None kvray is a miss.
    """

    def __init__(self, *, config: EngineConfig, tokens_per_chunk: Mapping[int, int]) -> None:
        self.switch = Switch()  # the connector's, too
        self.switch.when_off(self.drain)
        self._config = config
        self._tokens_per_chunk = dict(tokens_per_chunk)
        self.slot_bytes: dict[int, int] | None = None
        self.tainted = False  # device blocks of old weights may still be cached: store nothing
        self.draining = False  # nothing is looked up or stored any more
        self.prefill_rate = PrefillRate()
        self._requests: dict[str, RequestView] = {}
        self._with_ticket: dict[str, RequestView] = {}
        self.counters: dict[str, int] = dict.fromkeys(
            (
                "loaded_bytes",
                "stored_chunks",
                STORED_BYTES,
                STORED_TOKENS,
                PREFILL_TOKENS,
                PREFILL_US,
                "dropped_chunks",
                "early_loads",
                "failed_loads",
                "failed_stores",
                "lookups",
                "rests",
                "expired_lookups",
                "longest_wait_ms",
            ),
            0,
        )
        self._holds = Holds(config, self.counters)
        chunk_tokens = min(self._tokens_per_chunk.values(), default=1)
        self._chunk_tokens = chunk_tokens
        self._tokens = TokenCounts(self.counters, chunk_tokens=chunk_tokens)
        self._audits = AuditBudget()

    def open(self, client: NodeClient, fields: Mapping[str, Any]) -> None:
        """The connector's part of the construction, since vLLM makes this object by itself.
        fields: see namespace.gather_fields.
        """
        self._client = client
        self._fields = dict(fields)
        self.namespace = Namespace(digest(self._fields))

    @property
    def fields(self) -> Mapping[str, Any]:
        """What the namespace is the digest of."""
        return self._fields

    def rename(self, fields: Mapping[str, Any]) -> None:
        """Blocks have these names from now on: before anything is asked, or after renew()."""
        self._fields = dict(fields)
        self.namespace = Namespace(digest(self._fields))
        logger.info("kvray: the namespace is %s", self.namespace.hex())

    # ---- a request arrives

    @guarded(lambda *_: RequestOffloadingContext())
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        state = RequestState.BARRED if self.draining else RequestState.OPEN
        self._requests[req_context.req_id] = RequestView(state)
        return RequestOffloadingContext()

    def describe(
        self, req_id: str, *, salt: bytes, shareable: bool, adapter: str | None = None
    ) -> None:
        """salt joins the adapter's content to each key, adapter is its name. Not shareable: its
        hashes do not cover all that made its KV, so it goes without kvray.
        """
        view = self._requests.get(req_id)
        if view is not None:
            view.salt, view.adapter = salt, adapter
            if not shareable:
                self._move(req_id, view, RequestEvent.BAR)
                view.prompt.why = MissReason.BYPASSED

    def begin(
        self, req_id: str, runs: Sequence[Run], *, early: bool = False, may_audit: bool = True
    ) -> None:
        """Ask for all keys of a request at once; idempotent until its ticket ends. early: before
        the scheduler asks, while it has other work. Then a few at a time, since each holds what it
        has found, and a question that finds no answer will be asked again. may_audit: a hit less is
        a chunk less, and no more.
        """
        view = self._requests.get(req_id)
        if view is None:
            return
        if not early:
            self._take_turn(req_id, view, runs)
        is_full = early and len(self._with_ticket) >= MAX_EARLY_LOOKUPS
        if view.state is not RequestState.OPEN or self.slot_bytes is None or is_full:
            return
        runs = [run for run in runs if run.keys]
        if not runs:
            self._holds.end(view)
            return
        offload_keys = [key for run in runs for key in run.keys]
        self.counters["lookups"] += 1
        audit_tokens = self._lend_audit_tokens(runs) if may_audit else 0
        ticket = self._client.lookup(
            block_keys(self.namespace, offload_keys, view.salt),
            run_lengths=[len(run.keys) for run in runs],
            run_is_prefix=[run.is_prefix for run in runs],
            run_slot_bytes=[self.slot_bytes[run.group] for run in runs],
            deadline_ms=self._config.lookup_deadline_ms,
            key_compute_us=self._key_compute_us(runs),
            may_audit=audit_tokens > 0,
        )
        if ticket is None:
            self._audits.settle(audit_tokens, is_audited=False)
            if not early and not self._holds.until_next_step(view, self._client):
                self._give_up(view)
            return
        view.unasked_steps = 0
        view.ticket, view.audit_tokens = ticket, audit_tokens
        view.move(RequestEvent.ASK_EARLY if early else RequestEvent.ASK)
        view.index = {key: i for i, key in enumerate(offload_keys)}
        view.asked_s = time.monotonic()
        self._with_ticket[req_id] = view

    def _take_turn(self, req_id: str, view: RequestView, runs: Sequence[Run]) -> None:
        """The scheduler asks for it: what was said before is good, or is asked again."""
        is_early = view.state is RequestState.EARLY
        if is_early and view.is_outdated(runs, time.monotonic()):
            view.early_cause = None if view.ticket is None else cause_of(view.ticket)
            self._move(req_id, view, RequestEvent.OUTDATE)
        else:
            view.move(RequestEvent.TURN)

    def _give_up(self, view: RequestView) -> None:
        """It could not be asked about, and waits for that no longer."""
        self._holds.end(view)
        view.move(RequestEvent.GIVE_UP)
        view.prompt.why = self._unasked(view.early_cause)

    def _key_compute_us(self, runs: Sequence[Run]) -> int:
        """What computing one block would take; a chunk's time is shared by its cache groups."""
        if not self._config.break_even:
            return 0
        tokens = min(self._tokens_per_chunk[run.group] for run in runs)
        return round(self.prefill_rate.us_per_token * tokens / len(runs))

    def _lend_audit_tokens(self, runs: Sequence[Run]) -> int:
        """What is computed more at the most if the last hit of a run is a miss: its chunk. In a
        hybrid model the other groups may have nothing that ends where the hit then does.
        """
        cost_tokens = self._chunk_tokens
        if len(self._tokens_per_chunk) > 1:
            cost_tokens = max(len(run.keys) * self._tokens_per_chunk[run.group] for run in runs)
        return self._audits.lend(cost_tokens, computed_tokens=self.counters[COMPUTED])

    @guarded(lambda *_: LookupResult.MISS)
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        view = self._requests.get(req_context.req_id)
        if view is None:
            return LookupResult.MISS
        if view.state is RequestState.UNASKED:
            if self._holds.may_wait(view):
                return LookupResult.RETRY
            self._give_up(view)
        ticket = view.ticket
        if ticket is None or view.state.is_loading or (i := view.index.get(key)) is None:
            return LookupResult.MISS
        may_load_early = self._config.loads_early and ticket.arriving
        if may_load_early or ticket.settled:
            self._holds.end(view)
        state = ticket.states[i]
        if state == KeyState.HIT:
            return LookupResult.HIT
        if state == KeyState.MISS or view.state is RequestState.OVERDUE:
            return LookupResult.MISS
        if state == KeyState.COMING and may_load_early:
            return LookupResult.HIT
        self._holds.begin(view)
        if self._holds.left_s(view) > 0:
            return LookupResult.RETRY
        self._holds.end(view)
        # Whatever has arrived by now counts; the rest of this request is computed.
        view.move(RequestEvent.DEADLINE)
        view.prompt.why = MissReason.DEADLINE
        self.counters["expired_lookups"] += 1
        return LookupResult.MISS

    def rest(self, req_ids: Collection[str], is_wanted: Callable[[], bool]) -> None:
        """Nothing can be computed before one of these requests, all that there are, has its
        answer: hear what comes until one has, or its deadline, or somebody wants the engine.
        """
        self._holds.rest([self._requests.get(name) for name in req_ids], self._client, is_wanted)

    # ---- load

    @guarded(lambda *_: SlotSpec.void())
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        view = self._requests[req_context.req_id]
        ticket, slot_bytes = view.ticket, self.slot_bytes
        session = self._client.session
        view.move(RequestEvent.LOAD)
        view.prompt.peer_chunk_tokens = 0
        if ticket is None or slot_bytes is None or session is None:
            return SlotSpec.void()
        wait_ms = 0
        block_key_list: list[BlockKey] = []
        places: list[tuple[int, int, int]] = []
        sizes: list[int] = []
        for key in keys:
            index = view.index[key]
            place = ticket.place(index)
            if place is None:
                return SlotSpec.void()  # it was coming a moment ago
            if ticket.states[index] != KeyState.HIT and not wait_ms:
                wait_ms = max(1, round(self._holds.left_s(view) * 1_000))
            group = get_offload_group_idx(key)
            block_key_list.append(ticket.keys[index])
            places.append(place)
            sizes.append(slot_bytes[group])
            if group == min(slot_bytes) and ticket.from_peer(index):  # once, not once a group
                view.prompt.peer_chunk_tokens += self._tokens_per_chunk[group]
        self.counters["loaded_bytes"] += sum(sizes)
        self.counters["early_loads"] += wait_ms > 0
        return SlotSpec.of(ticket.slab_id, block_key_list, places, sizes, wait_ms=wait_ms)

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> Any:
        """0.32 only: where a hit came from, for vLLM's own statistics."""
        view = self._requests.get(req_context.req_id)
        from_peer = (
            view is not None
            and view.ticket is not None
            and (i := view.index.get(key)) is not None
            and view.ticket.from_peer(i)
        )
        return versions.hit_source(from_peer=from_peer)

    def load_ended(self, req_id: str, view: RequestView, *, failed: bool) -> None:
        """Every rank has reported the load; its slots are no longer read."""
        self._tokens.load_ended(view.prompt, failure_of(view.ticket) if failed else None)
        self.counters["failed_loads"] += failed
        self._move(req_id, view, RequestEvent.LOAD_FAILED if failed else RequestEvent.LOAD_ENDED)

    # ---- where its tokens come from

    def note_device_tokens(self, req_id: str, tokens: int) -> None:
        """The scheduler is about to find a place for the request."""
        view = self._requests.get(req_id)
        if view is not None:
            view.prompt.device_tokens = tokens

    def admitted(self, req_id: str, *, prompt_tokens: int, external_tokens: int) -> None:
        """It has found one; external_tokens: that vLLM has asked kvray to load for it."""
        view = self._requests.get(req_id)
        if view is not None:
            self._tokens.admitted(
                view.prompt,
                prompt_tokens=prompt_tokens,
                external_tokens=external_tokens,
                reason=self._reason(view),
            )

    def _unasked(self, known: MissReason | None) -> MissReason:
        """Why a request that could not be asked about is computed. known: of an earlier answer."""
        if known is not None and known is not MissReason.TAIL:
            return known
        is_there = self._client.session is not None
        return MissReason.NODE_STORE_SLOW if is_there else MissReason.NO_NODE_STORE

    def _reason(self, view: RequestView) -> MissReason:
        if view.state.is_barred or self.slot_bytes is None or self.draining:
            return MissReason.BYPASSED
        if view.prompt.why is not None:
            return view.prompt.why
        return MissReason.BYPASSED if view.ticket is None else cause_of(view.ticket)

    def _report(self) -> None:
        """To the NodeStore, which adds up what its engines say."""
        if self._client.session is not None and (grown := self._tokens.take_grown()):
            self._client.report(grown)

    @guarded(nothing)
    def get_stats(self) -> OffloadingConnectorStats | None:
        """For vLLM's own metrics, in every step: tokens since the last one."""
        fresh = self._tokens.take_fresh()
        return metrics.stats_of(fresh) if fresh else None

    def view_of(self, req_id: str) -> RequestView | None:
        return self._requests.get(req_id)

    # ---- store

    @guarded(lambda *_: PrepareStoreOutput([], SlotSpec.void(), []))
    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """Reserve slots for chunks that have been computed. A store never waits: what there is no
        room for is dropped and counted. None, if no answer came within the step's budget: vLLM
        offers the same chunks again in the next step of this request, a few times.
        """
        nothing_to_store = PrepareStoreOutput([], SlotSpec.void(), [])
        view = self._requests.get(req_context.req_id)
        slot_bytes = self.slot_bytes
        if (
            view is None
            or not view.state.may_store
            or slot_bytes is None
            or self.tainted
            or self.draining
            or not keys
            or self._client.session is None
        ):
            return nothing_to_store
        view.postponed_chunks = 0  # they are among these
        offload_keys = list(keys)
        sizes = [slot_bytes[get_offload_group_idx(key)] for key in offload_keys]
        names = block_keys(self.namespace, offload_keys, view.salt)
        reservation = self._client.reserve(
            names, run_lengths=_runs(sizes), run_slot_bytes=_firsts(sizes)
        )
        if reservation is None:
            if view.postponed_steps < MAX_POSTPONED_STEPS:
                view.postponed_steps += 1
                view.postponed_chunks = len(offload_keys)
                return None
            self.counters["dropped_chunks"] += len(offload_keys)
            return nothing_to_store
        view.postponed_steps = 0
        granted = [i for i, grant in enumerate(reservation.grants) if grant == Grant.GRANTED]
        self.counters["dropped_chunks"] += sum(grant == Grant.FULL for grant in reservation.grants)
        if not granted:
            return nothing_to_store
        spec = SlotSpec.of(
            reservation.slab_id,
            [names[i] for i in granted],
            [reservation.places[i] for i in granted],
            [sizes[i] for i in granted],
        )
        return PrepareStoreOutput([offload_keys[i] for i in granted], spec, [])

    def store_ended(self, spec: SlotSpec, *, good: bool) -> None:
        """Every rank has reported the store. Only now may a slot be given away (rule 3)."""
        if good:
            self.counters["stored_chunks"] += len(spec)
            self.counters[STORED_BYTES] += int(spec.slot_bytes.sum())
            # A chunk of a hybrid model has a slot in each cache group.
            groups = len(self.slot_bytes or (0,))
            self.counters[STORED_TOKENS] += len(spec) * self._chunk_tokens // groups
            self._client.commit(SlabId(spec.slab_id), spec.places())
        else:
            self.counters["failed_stores"] += 1
            self._client.abandon(SlabId(spec.slab_id), spec.places())

    def note_copies(self, copies: Mapping[str, int]) -> None:
        """How long copies of the ranks took, by the names of the counters."""
        for name, count in copies.items():
            self.counters[name] = self.counters.get(name, 0) + count

    # ---- the end of a step, of a request, of the weights

    def step_ends(self, now_s: float) -> None:
        """The oldest step that has begun is over."""
        self.prefill_rate.step_ends(now_s)
        self.counters[PREFILL_TOKENS] = self.prefill_rate.total_tokens
        self.counters[PREFILL_US] = self.prefill_rate.total_us

    def scheduled(self, req_ids: Iterable[str]) -> None:
        """These requests compute in this step, so what was pinned for a load that did not come
        about is let go.
        """
        if self._with_ticket:
            for req_id in req_ids:
                view = self._with_ticket.get(req_id)
                if view is not None and not view.state.is_loading:
                    self._move(req_id, view, RequestEvent.COMPUTE)

    @guarded(nothing)
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        for req_id in context.preempted_req_ids:
            view = self._requests.get(req_id)
            if view is not None:
                view.move(RequestEvent.PREEMPT)
        self._client.begin_step()

    @guarded(nothing)
    def on_request_finished(self, req_context: ReqContext) -> None:
        view = self._requests.get(req_context.req_id)
        if view is None:
            return
        self.counters["dropped_chunks"] += view.postponed_chunks  # there is no next step
        self._move(req_context.req_id, view, RequestEvent.FINISH)
        self._report()

    def renew(self, nonce: str | None = None, *, tainted: bool) -> None:
        """The weights are about to change: from here on this engine's blocks have other names.

        nonce: an operator's name for the new weights, so that engines that got the same ones
        share; random without. Requests alive at it store nothing more and hit nothing more,
        since their KV is made of both. tainted: the device still caches blocks of the old
        weights, which a new request would take for the new ones.
        """
        self._fields = renewed(self._fields, nonce or secrets.token_hex(16))
        self.namespace = Namespace(digest(self._fields))
        self.tainted = tainted
        self._bar_all()
        logger.info("kvray: weights change, namespace is %s from now on", self.namespace.hex())

    def bar_adapter(self, name: str) -> None:
        """An adapter is not loaded any more, or is another one: what its requests have is not what
        their keys say.
        """
        for req_id, view in self._requests.items():
            if view.adapter == name:
                self._move(req_id, view, RequestEvent.BAR)

    @guarded(nothing, also_off=True)
    def shutdown(self) -> None:
        """The engine ends, or is given back: what its last requests have stored is still said."""
        self._report()

    def drain(self) -> None:
        """Nothing is looked up or stored any more: kvray is taken out, or has switched itself off.
        What is under way ends as it would, and each request that waits goes on without kvray.
        """
        self.draining = True
        self._bar_all()

    def _bar_all(self) -> None:
        for req_id, view in self._requests.items():
            self._move(req_id, view, RequestEvent.BAR)

    def _move(self, req_id: str, view: RequestView, event: RequestEvent) -> None:
        """An event after which it may hold nothing any more: then its ticket is given back."""
        view.move(event)
        if not view.state.has_ticket:
            self._holds.end(view)
            if view.ticket is not None:
                self._client.unpin(view.ticket)
                is_audited = MissReason.AUDITED in view.ticket.causes.values()
                self._audits.settle(view.audit_tokens, is_audited=is_audited)
                view.ticket, view.audit_tokens = None, 0
                view.index = {}
            if self._with_ticket.get(req_id) is view:
                del self._with_ticket[req_id]
        if view.state is RequestState.FINISHED and self._requests.get(req_id) is view:
            del self._requests[req_id]

    def check(self) -> None:
        """To be called between two steps: a request has a ticket exactly if its state says so."""
        for view in self._requests.values():
            view.check()
        held = {id(view) for view in self._requests.values() if view.ticket is not None}
        assert {id(view) for view in self._with_ticket.values()} == held


def _firsts(sizes: Sequence[int]) -> list[int]:
    """The values of the runs of equal sizes."""
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] != size]


def _runs(sizes: Sequence[int]) -> list[int]:
    """The lengths of the runs of equal sizes."""
    starts = [i for i in range(len(sizes)) if i == 0 or sizes[i - 1] != sizes[i]]
    return [stop - start for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]
