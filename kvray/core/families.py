"""Which models have engines that do not share: those with more than one namespace in the cluster.

For the reason of a miss: what another engine of the model has computed can not be found under other
names, and looks as if nobody had ever seen it.
"""

from collections.abc import Sequence

from kvray.core.ids import NodeId
from kvray.core.messages import MAX_SPLIT_MODELS, EngineUse


class Families:
    """What the nodes have said of their engines."""

    def __init__(self) -> None:
        self._of_node: dict[NodeId, tuple[EngineUse, ...]] = {}
        self.split: list[str] = []  # sorted, at most MAX_SPLIT_MODELS

    def tell(self, node_id: NodeId, engines: Sequence[EngineUse]) -> None:
        """These are the engines of a node now."""
        if engines:
            self._of_node[node_id] = tuple(engines)
        else:
            self._of_node.pop(node_id, None)
        namespaces: dict[str, set[bytes]] = {}
        for uses in self._of_node.values():
            for use in uses:
                if use.model:
                    namespaces.setdefault(use.model, set()).add(use.namespace)
        split = sorted(model for model, names in namespaces.items() if len(names) > 1)
        self.split = split[:MAX_SPLIT_MODELS]

    def forget(self, node_id: NodeId) -> None:
        if node_id in self._of_node:
            self.tell(node_id, ())
