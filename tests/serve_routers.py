"""KVRayRouters that are told which nodes serve, in a module of their own: Serve loads a router by
the name of its class. Only where ray.serve can be loaded.
"""

from typing import Any

import ray

from kvray.errors import NodeLostError
from kvray.serve.router import KVRayRouter


class AllServe(KVRayRouter):
    """Nobody has measured anything, so the keywords count."""

    def initialize_state(self, **settings: Any) -> None:
        super().initialize_state(**settings, look=_alive)


class NobodyAnswers(KVRayRouter):
    def initialize_state(self, **settings: Any) -> None:
        super().initialize_state(**settings, look=_lost)


def _alive() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: {} for node in ray.nodes() if node["Alive"]}


def _lost() -> dict[str, dict[str, Any]]:
    raise NodeLostError("the directory does not answer")
