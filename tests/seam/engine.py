"""An engine without a model: vLLM's scheduler half is real, what the workers report is the test's.

add ──▶ Scheduler.schedule ──jobs──▶ under way here ──end_copies──▶ Scheduler.update_from_output
"""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvray.core.ids import BlockKey, Namespace
from kvray.core.keys import block_keys
from kvray.engine import attach, versions
from kvray.engine.arguments import transfer_settings
from kvray.engine.connector import KVRayConnector
from kvray.engine.jobs import KVRayWorkerMetadata, RankHandshake
from kvray.node.client import ClientState
from tests.ray_nodes import wait_until
from tests.seam.store import ANSWER_LIMIT_S, MAKER, SeamStore

BLOCK_TOKENS, CHUNK_TOKENS = 32, 128
DEVICE_BLOCKS = 60
STEP_TOKENS = 512
RANKS = 2
PART_BYTES = 4_096
LOOKUP_DEADLINE_MS = 300
IDLE_STEP_S = 0.001  # what vLLM sleeps after a step without work
MODEL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32_000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": None,
    "max_position_embeddings": 4_096,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
}


def vllm_config(folder: Path) -> Any:
    """Of an engine with two ranks. Takes vLLM a second, so it is made once."""
    folder.joinpath("config.json").write_text(json.dumps(MODEL))
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        block_size=BLOCK_TOKENS,
        max_model_len=2_048,
        dtype="bfloat16",
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=16,
        enable_prefix_caching=True,
        async_scheduling=False,
        load_format="dummy",
        kv_transfer_config=KVTransferConfig(**transfer_settings({})),
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    config.cache_config.num_gpu_blocks = DEVICE_BLOCKS
    config.parallel_config.tensor_parallel_size = RANKS
    config.parallel_config.world_size = RANKS
    return config


@dataclass
class Copy:
    """A job that ranks have been told of. ranks: that have not reported it."""

    req_id: str
    is_load: bool
    ranks: int = RANKS
    failed: bool = False


@dataclass
class SeamEngine:
    config: Any
    store: SeamStore
    copies: dict[int, Copy] = field(default_factory=dict)
    fault: str | None = None  # a worker's, to be told with its next report
    _proven_as: Namespace | None = None

    def __post_init__(self) -> None:
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
        )
        cache = KVCacheConfig(
            num_blocks=DEVICE_BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["model.layers.0.self_attn.attn"], spec)],
        )
        logging.getLogger("vllm").setLevel(logging.ERROR)
        self.scheduler = Scheduler(
            self.config,
            cache,
            StructuredOutputManager(self.config),
            block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
        )
        connector = self.scheduler.connector
        assert isinstance(connector, KVRayConnector)
        self.connector: KVRayConnector = connector
        self.scheduler.recompute_kv_load_failures = True
        ranks = [RankHandshake(rank, (PART_BYTES,), "here") for rank in range(RANKS)]
        connector._on_handshake(ranks)  # noqa: SLF001 (as the workers' start does)
        hash_function = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, hash_function)
        self.core = SimpleNamespace(
            scheduler=self.scheduler,
            vllm_config=self.config,
            request_block_hasher=self.hasher,
            batch_queue=None,
            model_executor=SimpleNamespace(
                collective_rpc=self._collective_rpc, kv_output_aggregator=None
            ),
            _kvray_before=(
                {
                    "recompute_kv_load_failures": False,
                    "requires_kv_delivery": False,
                },
                self.hasher,
            ),
        )
        self.wait_connected()
        self._be_proven()
        client = self.connector._client  # noqa: SLF001
        assert client is not None
        wait_until(lambda: client.is_introduced, what="the introduction")

    def _be_proven(self) -> None:
        """As an engine of this name whose canary was computed: here is no model that could."""
        lookups, client = self.connector.lookups, self.connector._client  # noqa: SLF001
        if client is not None and self._proven_as != lookups.namespace:
            self._proven_as = lookups.namespace
            client.introduce(lookups.namespace, fields={}, maker=MAKER)

    # ---- requests

    def add(self, name: str, tokens: list[int], *, answer_tokens: int = 1) -> Request:
        sampling = SamplingParams(max_tokens=answer_tokens, ignore_eos=True)
        request = Request(name, tokens, sampling, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return request

    def chunk_keys(self, request: Request) -> list[BlockKey]:
        """The names of its full chunks."""
        hashes = CHUNK_TOKENS // BLOCK_TOKENS
        chunk_hashes = request.block_hashes[hashes - 1 :: hashes]
        names = [make_offload_key(block_hash, 0) for block_hash in chunk_hashes]
        return block_keys(self.connector.lookups.namespace, names)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    # ---- steps

    def step(self, *, ends: bool = True) -> int:
        """One step; how many tokens it computed. ends: the ranks report all that was under way
        before it and what it begins.
        """
        if self.attached() is not None:
            self._be_proven()
        output = self.scheduler.schedule()
        self._take_jobs(output.kv_connector_metadata)
        ids = list(output.num_scheduled_tokens)
        samples = [[7] if self._samples(name) else [] for name in ids]
        report = self.end_copies() if ends else KVConnectorOutput()
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: i for i, name in enumerate(ids)},
                sampled_token_ids=samples,
                kv_connector_output=None if report.is_empty() else report,
            ),
        )
        if (connector := self.attached()) is not None:
            connector.lookups.check()
        if not ids:
            time.sleep(IDLE_STEP_S)
        return sum(output.num_scheduled_tokens.values())

    def _samples(self, name: str) -> bool:
        """Whether the whole prompt, and what was answered, has been computed by now."""
        request = self.scheduler.requests.get(name)
        return request is not None and request.num_computed_tokens >= request.num_tokens

    def _take_jobs(self, meta: Any) -> None:
        if meta is None:
            return
        for job_id, job in meta.store_jobs.items():
            self.copies[job_id] = Copy(job.req_id, is_load=False)
        for job_id, job in meta.load_jobs.items():
            # A job without slots fails on every rank.
            self.copies[job_id] = Copy(job.req_id, is_load=True, failed=len(job.src_spec) == 0)
        void_before = getattr(meta, "void_before", 0)
        for job_id, copy in self.copies.items():
            copy.failed |= copy.is_load and job_id < void_before

    def end_copies(self, *, ranks: int = RANKS) -> KVConnectorOutput:
        """So many ranks end what they copy, and say so as the workers' halves do."""
        done = {job_id: min(ranks, copy.ranks) for job_id, copy in self.copies.items()}
        ended = {j: self.copies[j] for j, count in done.items() if count == self.copies[j].ranks}
        for job_id, count in done.items():
            self.copies[job_id].ranks -= count
        report = KVConnectorOutput()
        if done or self.fault is not None:
            failed = {job_id for job_id in done if self.copies[job_id].failed}
            report.kv_connector_worker_meta = KVRayWorkerMetadata(
                completed_jobs=done, failed_jobs=failed, fault=self.fault
            )
        loads = [copy for copy in ended.values() if copy.is_load]
        report.finished_recving = {copy.req_id for copy in loads}
        bad = {copy.req_id for copy in loads if copy.failed}
        if versions.reports_failed_requests():
            report.failed_recving = bad
        else:
            report.invalid_block_ids = {
                block
                for name in bad
                if name in self.scheduler.requests
                for block in self.scheduler.kv_cache_manager.get_block_ids(name)[0]
            }
        for job_id in ended:
            del self.copies[job_id]
        return report

    def report(self, *, ranks: int = RANKS) -> None:
        """Ranks report, and the scheduler hears of it, between two steps."""
        report = self.end_copies(ranks=ranks)
        if failed := getattr(report, "failed_recving", None):  # 0.32
            self.scheduler._handle_failed_recving(failed)  # noqa: SLF001
        if report.invalid_block_ids:
            self.scheduler._handle_invalid_blocks(report.invalid_block_ids, {})  # noqa: SLF001
        self.scheduler._update_from_kv_xfer_finished(report)  # noqa: SLF001

    # ---- what happens to it

    def attached(self) -> KVRayConnector | None:
        connector = self.scheduler.connector
        assert connector is None or isinstance(connector, KVRayConnector)
        return connector

    def drain(self) -> int:
        return attach.kvray_drain(self.core)

    def detach(self, *, at_any_rate: bool = False) -> int:
        return attach.kvray_detach(self.core, at_any_rate)

    def _collective_rpc(self, method: Any, **_options: Any) -> list[int]:
        if method is attach.worker_detach:  # it returns when no copy is under way, and reports none
            self.copies.clear()
        return [1] * RANKS

    def fail_loads(self) -> None:
        """Whatever is being loaded fails on a rank."""
        for copy in self.copies.values():
            copy.failed |= copy.is_load

    def preempt(self) -> None:
        """As vLLM's own reset_prefix_cache(reset_running_requests=True) does."""
        while self.scheduler.running:
            request = self.scheduler.running.pop()
            self.scheduler._preempt_request(  # noqa: SLF001
                request, time.monotonic(), drop_stale_output=True
            )
        self.scheduler.prev_step_scheduled_req_ids.clear()

    def change_weights(self) -> None:
        """As hooks do before update_weights."""
        if (connector := self.attached()) is not None:
            connector.renew(tainted=connector.is_tainted())

    def reset_device_cache(self) -> bool:
        return bool(self.scheduler.reset_prefix_cache())

    def wait_left(self) -> None:
        """kvray is off, and has said bye to its NodeStore."""
        client = self.connector._client  # noqa: SLF001
        assert client is not None
        wait_until(lambda: client.state is ClientState.CLOSED, what="that kvray has left")

    def wait_connected(self) -> None:
        client = self.connector._client  # noqa: SLF001
        assert client is not None
        wait_until(
            lambda: client.session is not None and client.is_introduced,
            what="a NodeStore that knows this engine",
        )

    def wait_heard(self) -> None:
        """What it has told its NodeStore is acknowledged."""
        client = self.connector._client  # noqa: SLF001
        assert client is not None
        assert client.drain(ANSWER_LIMIT_S), "what it says is not heard"

    # ---- what is left

    def unfinished(self) -> list[str]:
        return [r.request_id for r in self.scheduler.requests.values() if not r.is_finished()]

    def lost_device_blocks(self) -> int:
        """Blocks that are neither free nor a request's."""
        pool = self.scheduler.kv_cache_manager.block_pool
        free_blocks = int(pool.get_num_free_blocks())
        return DEVICE_BLOCKS - 1 - free_blocks  # vLLM keeps the null block

    def close(self) -> None:
        if self.attached() is not None:
            self.scheduler.shutdown()
