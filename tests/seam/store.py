"""A NodeStore for engines that are played: real slab, socket and loop. It may be killed."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from kvray.core.ids import BlockKey, Maker, Namespace, SlotState
from kvray.core.messages import Grant
from kvray.link.loopback import LoopbackLink
from kvray.node.client import NodeClient, Reservation
from kvray.node.inbox import Question
from tests.ray_nodes import wait_until
from tests.served_node import ServedNode
from tests.slabs import NODE, Host

AMPLE_BUDGET_S = 5.0  # of a client that has no scheduler step to keep
ANSWER_LIMIT_S = 10.0
MAKER = Maker(1 << 32 | 1)  # of all engines here


class SeamStore:
    """runtime: a folder whose path is short enough for a socket's."""

    def __init__(self, runtime: Path) -> None:
        self.host = Host(runtime)
        self.slab = self.host.open()
        self._frozen = threading.Event()
        self._others: list[NodeClient] = []
        self.node: ServedNode | None = None
        self.start()

    def settings(self) -> dict[str, Any]:
        """What an engine must know to find it."""
        return {
            "cluster_name": self.host.cluster,
            "node_id": str(NODE),
            "runtime_dir": str(self.host.runtime),
        }

    def start(self) -> None:
        self.node = ServedNode(self.slab, lambda epoch: LoopbackLink(f"seam:{epoch}"))
        self.node.start()

    def kill(self) -> None:
        """As kill -9: every connection breaks, the slab stays."""
        if self.node is not None:
            self.thaw()
            self.node.stop()
            self.node = None

    def freeze(self) -> None:
        """It hears and says nothing until thaw(); returns when that is so."""
        self._frozen = may_go_on = threading.Event()
        is_frozen = threading.Event()

        def stay() -> None:
            is_frozen.set()
            may_go_on.wait()

        assert self.node is not None
        self.node.inbox.append(Question(stay, Future()))
        assert is_frozen.wait(ANSWER_LIMIT_S)

    def thaw(self) -> None:
        self._frozen.set()

    def ask(self, question: Any) -> Any:
        """Worked out on the loop's thread, given its Serving."""
        node = self.node
        assert node is not None
        answer: Future[Any] = Future()
        node.inbox.append(Question(lambda: question(node.serving), answer))
        return answer.result(ANSWER_LIMIT_S)

    # ---- another engine

    def other(self, namespace: Namespace) -> NodeClient:
        """Another engine of the same namespace, connected."""
        socket = str(self.slab.paths.socket)
        client = NodeClient(
            find_socket=lambda: socket,
            engine_nonce=len(self._others) + 1,
            namespace=namespace,
            label="another engine",
            maker=MAKER,
            budget_s=AMPLE_BUDGET_S,
        )
        self._others.append(client)
        client.start()
        self._wait_connected(client)
        return client

    def begin_writing(
        self, client: NodeClient, keys: Sequence[BlockKey], slot_bytes: int
    ) -> Reservation:
        """Whoever looks these up waits: somebody of this node is computing them."""
        client.begin_step()
        reserved = client.reserve(keys, run_lengths=[len(keys)], run_slot_bytes=[slot_bytes])
        assert reserved is not None
        assert set(reserved.grants) == {Grant.GRANTED}
        return reserved

    # ---- what is left

    def lost_slots(self) -> int:
        """Slots that are neither empty nor READY, once the other engines have given up theirs."""
        self.end_others()

        def count(serving: Any) -> int:
            serving.check()
            states = self.slab.headers["state"]
            return int(((states != 0) & (states != SlotState.READY)).sum())

        return int(self.ask(count))

    def pins(self) -> int:
        return int(self.ask(lambda serving: len(serving._store._pins)))  # noqa: SLF001

    def end_others(self) -> None:
        for client in self._others:
            if self.node is not None:
                self._wait_connected(client)  # to say bye
            client.close()
        self._others.clear()

    def _wait_connected(self, client: NodeClient) -> None:
        wait_until(lambda: client.session is not None, what="a session of the other engine")

    def close(self) -> None:
        self.thaw()
        self.end_others()
        self.kill()
        self.slab.close(unlink=True)
