"""In a Serve replica, before it makes its engine: which NodeStore is the engine's own.

Ray Serve LLM loads the class by name, once a replica, in the replica's process: on the Ray node
where EngineCore will run. The engine is told that node's id; the NodeStore's socket follows from
it, so one that comes later is found too.
"""

import dataclasses
import logging
import time

import ray
from ray.llm._internal.serve.engines.vllm.kv_transfer.base import (
    BaseConnectorBackend,
    DefaultPDProtocolMixin,
)

from kvray.actors import log_to_stderr
from kvray.cluster import connect
from kvray.config import EngineConfig
from kvray.engine.discovery import is_there
from kvray.errors import NodeLostError

logger = logging.getLogger("kvray.serve")

# For a node that has joined together with the replica: its NodeStore's process starts in a second,
# and is slower only where it clears a slab of many GiB.
NODE_STORE_DEADLINE_S = 5.0
POLL_S = 0.05


class KVRayBackend(DefaultPDProtocolMixin, BaseConnectorBackend):
    """See Ray's BaseConnectorBackend. Of its protocol for separate prefill replicas nothing is
    used: with kvray any replica finds what any other has computed.
    """

    def setup(self) -> None:
        log_to_stderr()  # Ray forwards it to the driver, and keeps it in the replica's log
        transfer = self.kv_transfer_config
        extra = transfer.get("kv_connector_extra_config") or {}
        config = own_node_store(EngineConfig.parse(extra.get("kvray", {})))
        self.llm_config.update_engine_kwargs(
            kv_transfer_config={
                **transfer,
                "kv_connector_extra_config": {**extra, "kvray": config.to_dict()},
            }
        )


def own_node_store(config: EngineConfig) -> EngineConfig:
    """The same with the Ray node of this process. Says once where its cache is, or why it has none.

    Who has named a socket or a node keeps it. Raises nothing of the cluster's: a replica serves
    with or without kvray.
    """
    if config.socket_path is not None or config.node_id is not None:
        return config
    node_id = ray.get_runtime_context().get_node_id()
    located = dataclasses.replace(config, node_id=node_id)
    try:
        found = connect(config.cluster_name).engine_settings()
    except NodeLostError as exc:
        _warn_uncached(str(exc))
        return located
    located = EngineConfig.parse({**found, **located.to_dict()})
    if _await_socket(located):
        logger.info("kvray: this replica shares its KV through the NodeStore of node %s", node_id)
    else:
        _warn_uncached(
            f"its Ray node {node_id} has no NodeStore that serves. `kvray status` says why "
            "(starting, drained, failed)"
        )
    return located


def _await_socket(config: EngineConfig) -> bool:
    end_s = time.monotonic() + NODE_STORE_DEADLINE_S
    while not is_there(config):
        if time.monotonic() >= end_s:
            return False
        time.sleep(POLL_S)
    return True


def _warn_uncached(reason: str) -> None:
    logger.warning(
        "kvray: this replica runs uncached: %s. Its engine joins by itself when there is one",
        reason,
    )
