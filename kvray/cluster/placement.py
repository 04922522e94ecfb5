"""Where kvray's actors are placed, how they are found again, and what cleans up after them.

directory     on the head node (a head that is gone takes the Ray cluster with it anyway)
NodeStore     one per Ray node, on that node and on no other
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvray.actors import RAY_NAMESPACE, alive_nodes, directory_name, node_store_name
from kvray.config import Config

NODE_CONCURRENCY = 4  # calls at a time: a wake() must not wait behind a status()

# Of every actor of kvray. No CPU: Ray schedules by it, and kvray must not take one from an engine.
# Restarted without end: what was wrong the first time is told by status(), not by dying. Task
# events are Ray's list of calls for its dashboard, and a heartbeat is a call.
ACTOR_OPTIONS: Mapping[str, Any] = {
    "namespace": RAY_NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "max_restarts": -1,
    "num_cpus": 0,
    "enable_task_events": False,
}


def place_node_store(settings: dict[str, object], node_id: str) -> None:
    """Make the NodeStore of a Ray node if there is none. Called by the directory's supervisor.

    Ray does not wait for it to start, and never places it elsewhere.
    """
    from kvray.node.actor import NodeStore

    config = Config.parse(settings)
    ray.remote(NodeStore).options(
        name=node_store_name(config.cluster_name, node_id),
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        max_concurrency=NODE_CONCURRENCY,
        **ACTOR_OPTIONS,
    ).remote(settings, node_id)


def make_directory(config: Config, starter: str) -> Any:  # noqa: ANN401 (Ray's handle)
    """On the head node, without which there is no Ray cluster anyway; its actor if it is there."""
    from kvray.directory.actor import Directory

    heads = [
        node_id
        for node_id, node in alive_nodes().items()
        if "node:__internal_head__" in node["Resources"]
    ]
    # Not soft: Ray then takes another node now and then, whose death would end the directory too.
    strategy = NodeAffinitySchedulingStrategy(heads[0], soft=False) if heads else "DEFAULT"
    return (
        ray.remote(Directory)
        .options(
            name=directory_name(config.cluster_name), scheduling_strategy=strategy, **ACTOR_OPTIONS
        )
        .remote(config.to_dict(), place_node_store, starter)
    )


def actor_names(prefix: str) -> list[str]:
    """Of kvray's actors that are there, or are being restarted."""
    return sorted(
        actor["name"]
        for actor in list_named_actors(all_namespaces=True)
        if actor["namespace"] == RAY_NAMESPACE and actor["name"].startswith(prefix)
    )


def gather(refs: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
    """What came of each call; None where nothing came by the deadline."""
    if refs:
        ray.wait(list(refs.values()), num_returns=len(refs), timeout=deadline_s)
    answers: dict[str, Any] = dict.fromkeys(refs)
    for name, ref in refs.items():
        with contextlib.suppress(RayError):  # died, or is not done
            answers[name] = ray.get(ref, timeout=0)
    return answers


def sweep(settings: dict[str, object], node_ids: Sequence[str], deadline_s: float) -> list[str]:
    """Clean up after NodeStores that could not do it themselves; what is left, for people."""
    if not node_ids:
        return []
    from kvray.node.opening import clean_up

    task = ray.remote(clean_up)
    answers = gather(
        {
            node_id: task.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(settings, node_id)
            for node_id in node_ids
        },
        deadline_s,
    )
    left: list[str] = []
    for node_id, paths in answers.items():
        left += [f"what node {node_id} had (it is silent)"] if paths is None else paths
    return left
