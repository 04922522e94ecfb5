"""A KVRayRouter whose directory is silent, in a module of its own: Serve loads a router by the name
of its class. Only where ray.serve can be loaded.
"""

from typing import Any

from kvray.errors import NodeLostError
from kvray.serve.router import KVRayRouter


class NobodyAnswers(KVRayRouter):
    def initialize_state(self, **settings: Any) -> None:
        super().initialize_state(**settings, look=_lost)


def _lost() -> frozenset[str]:
    raise NodeLostError("the directory does not answer")
