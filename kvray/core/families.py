"""Which engines of a model do not share: models with several namespaces in the cluster, and
namespaces with several makers.

Of models for the reason of a miss: what another engine of the model has computed can not be found
under other names, and looks as if nobody had ever seen it. Of makers so that nodes compare what
they compute before an engine asks for the first block of it.
"""

from collections.abc import Sequence

from kvray.core.ids import NAMESPACE_BYTES, UNKNOWN_MAKER, Maker, Namespace, NodeId
from kvray.core.messages import MAX_MAKERS_SAID, MAX_SPLIT_MODELS, EngineUse


class Families:
    """What the nodes have said of their engines."""

    def __init__(self) -> None:
        self._of_node: dict[NodeId, tuple[EngineUse, ...]] = {}
        self._makers: dict[Namespace, list[Maker]] = {}  # sorted; of those with several only
        self.split: list[str] = []  # sorted, at most MAX_SPLIT_MODELS

    def tell(self, node_id: NodeId, engines: Sequence[EngineUse]) -> None:
        """These are the engines of a node now."""
        if engines:
            self._of_node[node_id] = tuple(engines)
        else:
            self._of_node.pop(node_id, None)
        namespaces: dict[str, set[Namespace]] = {}
        makers: dict[Namespace, set[Maker]] = {}
        for uses in self._of_node.values():
            for use in uses:
                if use.model:
                    namespaces.setdefault(use.model, set()).add(use.namespace)
                if use.maker != UNKNOWN_MAKER and len(use.namespace) == NAMESPACE_BYTES:
                    makers.setdefault(use.namespace, set()).add(use.maker)
        split = sorted(model for model, names in namespaces.items() if len(names) > 1)
        self.split = split[:MAX_SPLIT_MODELS]
        self._makers = {space: sorted(found) for space, found in makers.items() if len(found) > 1}

    def makers_for(self, node_id: NodeId) -> list[tuple[Namespace, Maker]]:
        """The makers of the namespaces that this node's engines use, where there are several; at
        most MAX_MAKERS_SAID.
        """
        if not self._makers:
            return []
        own = sorted({use.namespace for use in self._of_node.get(node_id, ())})
        rows = [(space, maker) for space in own for maker in self._makers.get(space, ())]
        return rows[:MAX_MAKERS_SAID]

    def forget(self, node_id: NodeId) -> None:
        if node_id in self._of_node:
            self.tell(node_id, ())
