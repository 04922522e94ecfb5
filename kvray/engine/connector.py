"""vLLM's OffloadingConnector with what it lacks: copies that fail, and weights that change.

vLLM's connector does the bookkeeping of chunks, preemption, hybrid groups and ranks. It knows
neither a failed copy (it asserts success and completes every store as good) nor a cache whose
names change. This subclass adds both, through the metadata that vLLM carries anyway:

    EngineCore  build_connector_meta ── jobs, void_before ──▶  workers: copy, compare headers
    EngineCore  update_connector_output ◀── ended, failed ──   every rank
                     │
                     ├─ store good on every rank ──▶ commit, else abandon
                     └─ load failed on any rank  ──▶ recompute; misses for that request

Loaded by name: {"kv_connector": "KVRayConnector", "kv_role": "kv_both",
"kv_connector_module_path": "kvray.engine.connector"}.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from kvray.core.ids import Namespace
from kvray.engine import hooks, support, versions
from kvray.engine.adapter_watch import loaded_with
from kvray.engine.adapters import Adapters, Loaded
from kvray.engine.chunk_names import CHUNK_TOKENS
from kvray.engine.discovery import is_there, socket_finder
from kvray.engine.facts import Facts, facts_of
from kvray.engine.guard import Switch, guarded, nothing
from kvray.engine.jobs import (
    KVRayConnectorMetadata,
    KVRayWorkerMetadata,
    RankHandshake,
    SlotSpec,
)
from kvray.engine.ledger import Finished, JobKind, JobLedger, Outcome
from kvray.engine.lookups import Lookups
from kvray.engine.namespace import (
    NONCE,
    are_named,
    as_text,
    digest,
    gather_fields,
    measured,
    with_facts,
)
from kvray.engine.proving import Proving
from kvray.engine.requests import RequestView, Run
from kvray.engine.spec import FIRST_SESSION_S, engine_nonce
from kvray.engine.transfers import Transfers
from kvray.engine.weights import Weights, weights_of
from kvray.node.client import NodeClient

logger = logging.getLogger("kvray.engine")

SESSION_POLL_S = 0.005  # a hello takes a few ms
CLOSE_DEADLINE_S = 1.0  # for the last commits and the bye; the NodeStore copes without them

Subject = SlotSpec | tuple[str, RequestView]  # a store's slots, or the request that loads


def wait_session(client: NodeClient) -> None:
    """So that the first request of an engine meets a NodeStore that is there. At construction
    only; one that comes later, or does not answer, is met later.
    """
    end_s = time.monotonic() + FIRST_SESSION_S
    while client.session is None and time.monotonic() < end_s:
        time.sleep(SESSION_POLL_S)


class KVRayConnector(OffloadingConnector):
    """Both halves, as vLLM wants it: role SCHEDULER in EngineCore, role WORKER in each worker."""

    is_kvray = True

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        versions.require_tested(versions.installed_version())
        support.require_supported(vllm_config, kv_cache_config)
        support.prepare_settings(vllm_config, kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._world_size: int = vllm_config.parallel_config.world_size
        self._ledger: JobLedger[Subject] = JobLedger(self._world_size)
        self._adapters = Adapters(self._world_size)
        self._layers: dict[str, Any] = {}  # of a worker: those with caches
        self._adapters_said: Loaded = {}
        self._block_pool: Any = None
        self._loading: dict[int, str] = {}
        self._vllm_config = vllm_config
        self._facts: Facts = {}
        self._weights = Weights(None, "this rank has no caches yet")
        self._client: NodeClient | None = None
        self._uncached: str | None = None
        self._proving: Proving | None = None
        self._attached = support.engine_config(vllm_config).attached
        # One for all of kvray in EngineCore: what one part can not do, no other may wait for.
        is_scheduler = role is KVConnectorRole.SCHEDULER
        self.switch = self.lookups.switch if is_scheduler else Switch()
        self._has_left = False
        if role is KVConnectorRole.SCHEDULER:
            self._open(vllm_config, kv_cache_config)

    # ---- in EngineCore

    def _open(self, vllm_config: Any, kv_cache_config: Any) -> None:
        hooks.install()
        config = support.engine_config(vllm_config)
        self._uncached = support.runs_uncached(kv_cache_config)
        fields = gather_fields(
            vllm_config,
            kv_cache_config,
            tokens_per_hash=self.connector_scheduler.config.tokens_per_hash,
            blocks_per_chunk=self.connector_scheduler.config.blocks_per_chunk,
            model_tag=config.model_tag,
        )
        self._client = NodeClient(
            find_socket=socket_finder(config),
            engine_nonce=engine_nonce(vllm_config.kv_transfer_config.engine_id),
            namespace=Namespace(digest(fields)),
            label=f"{vllm_config.model_config.model} pid {os.getpid()}",
            model=str(vllm_config.model_config.model),
            fields=self._said(fields),
            budget_s=config.step_budget_ms / 1_000,
        )
        self.lookups.open(self._client, fields)
        self._proving = Proving(
            vllm_config,
            kv_cache_config,
            group_configs=self.connector_scheduler.config.kv_group_configs,
            client=self._client,
            lookups=self.lookups,
            fields=lambda: self._said(self.lookups.fields),
        )
        self._client.start()
        if is_there(config):
            wait_session(self._client)
        if self._uncached is not None:
            logger.warning("kvray: this engine runs uncached: %s", self._uncached)

    def _said(self, fields: Mapping[str, Any]) -> dict[str, str]:
        return as_text({**fields, CHUNK_TOKENS: self._chunk_tokens()})

    def _chunk_tokens(self) -> int:
        groups = self.connector_scheduler.config.kv_group_configs
        return min(int(group.tokens_per_chunk) for group in groups)

    @guarded(nothing)
    def prove(self, engine_core: Any) -> None:
        """Between two steps; see engine.steps."""
        if self._proving is None or self._uncached is not None:
            return
        self._proving.prove(engine_core)
        if (why := self._proving.why_not) is not None:
            self._uncached = why
            self.lookups.slot_bytes = None
            logger.warning("kvray: this engine runs uncached: %s", why)

    @property
    def is_proven(self) -> bool:
        """It has computed its canary, with the weights of now."""
        return self._proving is not None and self._proving.canary.proof is not None

    @guarded(nothing, also_off=True)
    def end_canary(self, engine_core: Any) -> None:
        """A connector leaves the engine: nobody would read a canary that is still computed."""
        if self._proving is not None:
            versions.end_own_requests(engine_core, self._proving.canary.is_own)

    @property
    def lookups(self) -> Lookups:
        manager = self.connector_scheduler.manager
        assert isinstance(manager, Lookups)
        return manager

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        self._on_handshake([m for m in metadata.values() if isinstance(m, RankHandshake)])

    @guarded(nothing)
    def _on_handshake(self, ranks: list[RankHandshake]) -> None:
        if self._uncached is not None:
            return
        self._uncached = support.mismatch(ranks, self._world_size)
        if self._uncached is not None:
            logger.warning("kvray: this engine runs uncached: %s", self._uncached)
            return
        ranks = sorted(ranks, key=lambda rank: rank.rank)
        facts = [rank.facts for rank in ranks]
        self.lookups.rename(with_facts(self.lookups.fields, facts, nonce=secrets.token_hex(16)))
        if self._proving is not None:
            self._proving.introduce()
        if not are_named(facts):
            self._say_unnamed([rank.why_unnamed for rank in ranks])
        groups = versions.offloaded_group_ids(self._kv_cache_config)
        self.lookups.slot_bytes = {
            group: part_bytes * self._world_size
            for group, part_bytes in zip(groups, ranks[0].part_bytes, strict=True)
        }

    def _say_unnamed(self, reasons: Sequence[str]) -> None:
        tag = self.lookups.fields["model_tag"]
        logger.warning(
            "kvray: the weights of this engine have no digest (%s). %s",
            next((why for why in reasons if why), "no rank says why"),
            f"It shares with engines that have none either and the same model_tag, {tag!r}"
            if tag
            else "It shares with no other engine, unless all with these weights are given the same "
            "model_tag",
        )

    def on_new_request(self, request: Any) -> None:
        super().on_new_request(request)
        self._describe(request)
        self._begin_early(request)

    @guarded(nothing)
    def _describe(self, request: Any) -> None:
        shareable = support.is_shareable(request) and not self._is_own(request)
        salt: bytes | None = b""
        if (adapter := versions.lora_identity(request)) is not None:
            salt = self._adapters.salt(*adapter)
        self.lookups.describe(
            request.request_id,
            salt=salt or b"",
            shareable=shareable and salt is not None,
            adapter=None if adapter is None else adapter[0],
        )

    def _is_own(self, request: Any) -> bool:
        """Whether it is of the canary."""
        return self._proving is not None and self._proving.canary.is_own(request.request_id)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        self._begin_lookup(request, num_computed_tokens)
        self.lookups.note_device_tokens(request.request_id, num_computed_tokens)
        answer: tuple[int | None, bool] = super().get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        return answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._count(request, num_external_tokens)

    @guarded(nothing)
    def _count(self, request: Any, external_tokens: int) -> None:
        if self._is_own(request):
            return  # no user's tokens
        self.lookups.admitted(
            request.request_id,
            prompt_tokens=request.num_prompt_tokens,
            external_tokens=external_tokens,
        )

    @guarded(nothing)
    def _begin_early(self, request: Any) -> None:
        """The scheduler may be busy with others for some steps yet: what peers have can come
        meanwhile. Not for several cache groups, whose hit on the device only vLLM can tell.
        """
        groups = self.connector_scheduler.config.kv_group_configs
        if len(groups) != 1 or self._block_pool is None:
            return
        computed_tokens = versions.device_hit_tokens(
            self._block_pool, request, groups[0], self.connector_scheduler.config.tokens_per_hash
        )
        if computed_tokens is not None:
            self._begin_lookup(request, computed_tokens, early=True)

    @guarded(nothing)
    def _begin_lookup(self, request: Any, num_computed_tokens: int, *, early: bool = False) -> None:
        if request.skip_reading_prefix_cache:
            return
        scheduler = self.connector_scheduler
        status = scheduler._req_status.get(request.request_id)  # noqa: SLF001 (the chain of keys)
        if status is None or status.transfer_jobs:
            return
        status.update_offload_keys()
        runs = [
            Run(
                group=group.group_idx,
                keys=state.offload_keys[num_computed_tokens // group.tokens_per_chunk :],
                is_prefix=group.sliding_window_size_in_chunks is None,
            )
            for group, state in zip(
                scheduler.config.kv_group_configs, status.group_states, strict=True
            )
        ]
        # vLLM loads nothing that is shorter than a chunk: where the device's own hit ends inside
        # one, a hit less could be two.
        may_audit = all(
            num_computed_tokens % group.tokens_per_chunk == 0
            for group in scheduler.config.kv_group_configs
        )
        self.lookups.begin(request.request_id, runs, early=early, may_audit=may_audit)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(self._without_loading(scheduler_output))
        self._note_jobs(meta, scheduler_output)
        return KVRayConnectorMetadata(
            load_jobs=meta.load_jobs,
            store_jobs=meta.store_jobs,
            jobs_to_flush=meta.jobs_to_flush,
            void_before=self._ledger.void_before,
            computes=scheduler_output.total_num_scheduled_tokens > 0,
        )

    def _without_loading(self, scheduler_output: Any) -> Any:
        """vLLM asserts that what was preempted is not being loaded. What was preempted between two
        steps, by reset_prefix_cache, may be: it is asked for and loaded in the very step that tells
        connectors of it.
        """
        preempted = set(scheduler_output.preempted_req_ids or ())
        if not preempted:
            return scheduler_output
        jobs = self.connector_scheduler._jobs.values()  # noqa: SLF001
        loading = {job.req_id for job in jobs if not job.is_store}
        return replace(scheduler_output, preempted_req_ids=preempted - loading)

    @guarded(nothing)
    def _note_jobs(self, meta: Any, scheduler_output: Any) -> None:
        """A step begins. The only place where a job's id and its reservation meet."""
        for job_id, job in meta.store_jobs.items():
            if isinstance(job.dst_spec, SlotSpec):
                self._ledger.begin(job_id, JobKind.STORE, job.dst_spec)
        for job_id, job in meta.load_jobs.items():
            view = self.lookups.view_of(job.req_id)
            if view is not None:
                self._ledger.begin(job_id, JobKind.LOAD, (job.req_id, view))
        self.lookups.scheduled(scheduler_output.num_scheduled_tokens)
        self.lookups.prefill_rate.step_begins(
            scheduler_output.total_num_scheduled_tokens, time.monotonic()
        )

    @guarded(nothing)
    def rest(self, engine_core: Any, is_wanted: Callable[[], bool]) -> None:
        """Before a step: see engine.steps."""
        if len(self._ledger) == 0 and not versions.computes(engine_core):
            self.lookups.rest(engine_core.scheduler.requests, is_wanted)

    def take_events(self) -> Any:
        # The one thing that vLLM asks of a connector at the end of every step.
        self._note_step_end()
        self._leave_if_off()
        return super().take_events()

    @guarded(nothing)
    def _note_step_end(self) -> None:
        self.lookups.step_ends(time.monotonic())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, Any]:
        self._note_end(request, (block_ids,))
        answer: tuple[bool, Any] = super().request_finished(request, block_ids)
        return answer

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, Any]:
        self._note_end(request, block_ids)
        answer: tuple[bool, Any] = super().request_finished_all_groups(request, block_ids)
        return answer

    @guarded(nothing)
    def _note_end(self, request: Any, block_ids: tuple[list[int], ...]) -> None:
        if self._proving is not None:
            computed_tokens = request.num_computed_tokens
            self._proving.canary.request_ended(request.request_id, computed_tokens, block_ids)

    @guarded(nothing, also_off=True)
    def _leave_if_off(self) -> None:
        """A kvray that is off says bye to its NodeStore when no rank copies any more: what it was
        about to give back when the bug came is then taken from it.
        """
        client = self._client
        if self.switch.off is None or self._has_left or client is None or self.pending():
            return
        self._has_left = True
        threading.Thread(target=client.close, name="kvray-leave", daemon=True).start()

    def has_pending_push_work(self) -> bool:
        # Jobs that a reset made stale are forgotten by vLLM, not by us: their slots come back
        # only when every rank has reported them. A kvray that is off keeps no engine awake for it.
        is_on = self.switch.off is None
        return bool(super().has_pending_push_work()) or (is_on and len(self._ledger) > 0)

    def update_connector_output(self, connector_output: Any) -> None:
        finished = self._take_reports(connector_output)
        super().update_connector_output(connector_output)
        self._settle(finished)

    @guarded(lambda *_: [], also_off=True)
    def _take_reports(self, connector_output: Any) -> list[Finished[Subject]]:
        meta = connector_output.kv_connector_worker_meta
        if not isinstance(meta, KVRayWorkerMetadata):
            return []
        if meta.fault is not None:
            self.switch.turn_off(f"in a worker: {meta.fault}")
        self._note_adapters(meta.adapters)  # first: what was copied may be of both
        self.lookups.note_copies(meta.copies)
        return self._ledger.report(meta.completed_jobs, meta.failed_jobs)

    @guarded(nothing, also_off=True)
    def _settle(self, finished: list[Finished[Subject]]) -> None:
        for job in finished:
            good = job.outcome is Outcome.GOOD and self.switch.off is None
            if isinstance(job.subject, SlotSpec):
                self.lookups.store_ended(job.subject, good=good)
            else:
                req_id, view = job.subject
                self.lookups.load_ended(req_id, view, failed=not good)

    @guarded(nothing)
    def adapters_loaded(self, ranks: Mapping[int, Loaded]) -> None:
        """Between two steps; see hooks."""
        self._note_adapters(ranks)

    def _note_adapters(self, ranks: Mapping[int, Loaded]) -> None:
        if not ranks:
            return
        changes = self._adapters.report(ranks)
        for name in changes.lost:
            self.lookups.bar_adapter(name)
        if changes.is_replaced:
            self._ledger.renew()

    def pending(self) -> int:
        """Loads and stores that some rank has not reported yet: those that we know of, or vLLM."""
        return max(len(self._ledger), len(self.connector_scheduler._jobs))  # noqa: SLF001

    def lose_jobs(self) -> None:
        """The workers' halves are gone, and with them every copy: nobody reports any more."""
        self._settle(self._ledger.lose())

    def stats(self) -> dict[str, Any]:
        """For people and for Attachment.stats(): plain data."""
        client, lookups = self._client, self.lookups
        session = client.session if client is not None else None
        return {
            "engine_pid": os.getpid(),
            "namespace": lookups.namespace.hex(),
            "fields": dict(lookups.fields),
            "node_id": session.node_id if session is not None else None,
            "connected": session is not None,
            "uncached": self._uncached or self.switch.off,
            "slot_bytes": dict(lookups.slot_bytes or {}),
            "pending": self.pending(),
            "canary": None if self._proving is None else self._proving.canary.snapshot(),
            "prefill_tokens_per_s": lookups.prefill_rate.tokens_per_s,
            "unacknowledged": client.snapshot()["unacknowledged"] if client is not None else 0,
            "counters": {**lookups.counters, **(client.counters if client is not None else {})},
        }

    def get_kv_connector_stats(self) -> Any:
        # vLLM's loggers assert that an engine with connector statistics had a connector from its
        # construction; an attached one reports through stats() instead. They are taken all the
        # same, since vLLM's scheduler half keeps a number of each look-up until they are.
        found = super().get_kv_connector_stats()
        return None if self._attached else found

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        # In the frontend of an engine, where no connector is made that would have named it.
        support.name_spec(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        super().bind_gpu_block_pool(gpu_block_pool)
        self._block_pool = gpu_block_pool

    def is_tainted(self) -> bool:
        """Whether a request that comes may be given device blocks that are there now. Not only what
        is cached counts: what a request holds may be cached in a later step.
        """
        return self._block_pool is not None and versions.may_reuse(self._block_pool)

    def untaint(self) -> None:
        """The device's own prefix cache was reset: if nothing of the old weights is left, what is
        computed from now on may be stored.
        """
        self.lookups.tainted = self.lookups.tainted and self.is_tainted()
        if not self.is_tainted():
            self._adapters.device_was_reset()

    def reset_cache(self) -> bool | None:
        self.renew(tainted=self.is_tainted())
        answer: bool | None = super().reset_cache()
        return answer

    @guarded(nothing)
    def renew(self, nonce: str | None = None, *, tainted: bool) -> None:
        """Before the weights change, and when vLLM resets the cache. Blocks of this engine get
        new names, what is under way is void, other engines keep theirs.
        """
        self._ledger.renew()
        self.lookups.renew(nonce, tainted=tainted)
        self._begin_proof()

    def _begin_proof(self) -> None:
        """The names have changed: whatever was proven is not proven any more."""
        if self._proving is not None:
            self._proving.weights_change()
            self._proving.introduce()

    @property
    def is_named(self) -> bool:
        """Whether the names of this engine's blocks say which weights made them."""
        return NONCE not in self.lookups.fields

    @guarded(nothing)
    def measured(self, ranks: Sequence[Weights], *, tainted: bool) -> None:
        """After the weights have changed: what each rank has now. Where that can not be had, this
        engine keeps the nonce that it got before the change. Requests that came in between have KV
        of both, as those that came before.
        """
        digests = [rank.digest for rank in ranks if rank.digest is not None]
        if len(digests) < len(ranks):
            reasons = "; ".join(sorted({rank.why for rank in ranks if rank.why}))
            logger.warning(
                "kvray: the new weights of this engine have no digest (%s), so it shares with no "
                "other engine until name_weights() says what they are",
                reasons,
            )
            return
        self._ledger.renew()
        self.lookups.renew(tainted=tainted)
        self.lookups.rename(measured(self.lookups.fields, digests))
        self._begin_proof()

    # ---- in each worker

    @property
    def transfers(self) -> Transfers:
        worker = self.connector_worker.worker
        assert isinstance(worker, Transfers)
        return worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        self._read_facts(kv_caches)

    @guarded(nothing)
    def _read_facts(self, kv_caches: dict[str, Any]) -> None:
        layers = self._layers = versions.attention_layers(self._vllm_config, kv_caches)
        self._weights = weights_of(layers.values())
        self._facts = facts_of(
            layers,
            kv_caches,
            specs={n: layer.get_kv_cache_spec(self._vllm_config) for n, layer in layers.items()},
            num_blocks=self._kv_cache_config.num_blocks,
            weights=self._weights,
        )

    def get_handshake_metadata(self) -> RankHandshake | None:
        if self.connector_worker is None:
            return None
        return replace(self.transfers.handshake(), facts=self._facts, why_unnamed=self._weights.why)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        meta = self._connector_metadata
        if isinstance(meta, KVRayConnectorMetadata):
            self.transfers.begin_step(
                void_before=meta.void_before,
                computes=meta.computes,
            )
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """0.32: a failed load is named by its request."""
        sent, received = self.get_finished(finished_req_ids)
        return versions.transfer_results(
            set(sent or ()), set(received or ()), self._take_failed_requests()
        )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        # vLLM forgets a load's request when it ends, so remember it here.
        self._loading = dict(self.connector_worker._load_jobs)  # noqa: SLF001
        answer: tuple[set[str], set[str]] = super().get_finished(finished_req_ids)
        return answer

    def shutdown(self) -> None:
        super().shutdown()
        if self._client is not None:
            self._client.close(CLOSE_DEADLINE_S)

    def _take_failed_requests(self) -> set[str]:
        failed = self.transfers.failed_since_report
        return {self._loading[job_id] for job_id in failed if job_id in self._loading}

    def get_block_ids_with_load_errors(self) -> set[int]:
        """0.29: a failed load is named by its target blocks; 0.32 is told by request."""
        if versions.reports_failed_requests() or self.connector_worker is None:
            return set()
        return self.transfers.take_failed_blocks()

    def build_connector_worker_meta(self) -> Any:
        meta = super().build_connector_worker_meta()
        if self.connector_worker is None:
            return meta
        adapters = self._take_adapters()
        if meta is None:
            return KVRayWorkerMetadata(adapters=adapters) if adapters else None
        return KVRayWorkerMetadata.wrap(
            meta,
            failed_jobs=self.transfers.take_failed_jobs(),
            copies=self.transfers.take_copies(),
            fault=self.transfers.switch.off,
            adapters=adapters,
        )

    @guarded(lambda *_: {})
    def _take_adapters(self) -> dict[int, Loaded]:
        """Those of this rank, if they are others than it has said last."""
        now = loaded_with(self._layers.values())
        if now == self._adapters_said:
            return {}
        self._adapters_said = now
        return {self._vllm_config.parallel_config.rank: now}
