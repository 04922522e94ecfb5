"""What an engine says of itself to its NodeStore, and shows before it is believed.

    named (handshake, new weights) ──introduced without a maker──▶ nothing of it counts
    canary PROVEN ──introduced with its maker──▶ canary in the slab ──▶ stores and loads

In EngineCore, on its thread. The canary itself is in engine.canary, its place in the slab in
engine.canary_store.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvray.core.canary import Proof
from kvray.core.ids import UNKNOWN_MAKER, Maker, Namespace
from kvray.core.messages import ChunkShape, NoiseLevels
from kvray.engine import canary, versions
from kvray.engine.canary import Canary, CanaryGroup
from kvray.engine.canary_store import CanaryStore
from kvray.engine.lookups import Lookups
from kvray.node.client import NodeClient

POLL_S = 0.005  # an answer of the NodeStore takes less than a millisecond
PUT_LIMIT_S = 0.5  # for a canary to be in the slab: some answers of a NodeStore that is there


class Proving:
    """fields: what is said of the namespace, for people. world_size: in ranks."""

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        *,
        group_configs: Sequence[Any],
        client: NodeClient,
        lookups: Lookups,
        fields: Callable[[], Mapping[str, str]],
    ) -> None:
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        groups = [
            CanaryGroup(
                index=group.group_idx,
                tokens_per_block=group.tokens_per_block,
                tokens_per_chunk=group.tokens_per_chunk,
                dtype=str(specs[group.group_idx].dtype).removeprefix("torch."),
            )
            for group in group_configs
        ]
        self.canary = Canary(vllm_config, groups)
        self._store = CanaryStore(client)
        self._client = client
        self._lookups = lookups
        self._fields = fields
        self._world_size: int = vllm_config.parallel_config.world_size
        self._introduced: tuple[Namespace, Maker] | None = None

    @property
    def why_not(self) -> str | None:
        """Why nothing of this engine will ever count; None where that is not so."""
        refusal = self.canary.refusal
        return None if refusal is None else f"it is not proven: {refusal}"

    def introduce(self) -> None:
        """Say the namespace of now, and as which maker this engine is proven, if it is."""
        proof, shapes = self._proof()
        maker = UNKNOWN_MAKER if proof is None else proof.maker
        self._introduced = (self._lookups.namespace, maker)
        self._client.introduce(
            self._lookups.namespace,
            fields=self._fields(),
            maker=maker,
            chunks=shapes,
            noise=None if proof is None else NoiseLevels(proof.alone, proof.batched),
        )

    def weights_change(self) -> None:
        """What was proven says nothing of the weights that come."""
        self.canary.weights_change()
        self._store.forget()

    def prove(self, engine_core: Any) -> None:
        """Between two steps: what of all this is due. An engine that does nothing yet has done it
        before its first request; any other one goes on before its next step.
        """
        canary.prove(self.canary, engine_core)
        proof, shapes = self._proof()
        if proof is None:
            return
        namespace = self._lookups.namespace
        if self._introduced != (namespace, proof.maker):
            self.introduce()
        is_idle = not versions.has_others(engine_core, self.canary.is_own)
        end_s = time.monotonic() + (PUT_LIMIT_S if is_idle else 0.0)
        while True:
            now_s = time.monotonic()
            self._store.keep(engine_core, proof, namespace=namespace, shapes=shapes, now_s=now_s)
            if now_s >= end_s or self._store.is_put or self._client.session is None:
                return
            time.sleep(POLL_S)

    def _proof(self) -> tuple[Proof | None, list[ChunkShape]]:
        """And how a chunk of each cache group is divided, for those who compare it."""
        proof, slot_bytes = self.canary.proof, self._lookups.slot_bytes
        if proof is None or slot_bytes is None:
            return None, []
        shapes = [
            ChunkShape(
                slot_bytes=slot_bytes[group.index],
                piece_bytes=slot_bytes[group.index] // (self._world_size * layers),
                dtype=group.dtype,
            )
            for group, layers in zip(self.canary.groups, proof.layer_counts, strict=True)
        ]
        return proof, shapes
