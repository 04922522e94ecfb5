"""KVRayRouters that are told which nodes serve, in a module of their own: Serve loads a router by
the name of its class. Only where ray.serve can be loaded.
"""

from typing import Any

import ray

from kvray.errors import NodeLostError
from kvray.serve.router import KVRayRouter


class AllServe(KVRayRouter):
    def initialize_state(self, **settings: Any) -> None:
        super().initialize_state(**settings, look=_alive)


class NobodyAnswers(KVRayRouter):
    def initialize_state(self, **settings: Any) -> None:
        super().initialize_state(**settings, look=_lost)


def _alive() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _lost() -> frozenset[str]:
    raise NodeLostError("the directory does not answer")
