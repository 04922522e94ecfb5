"""A client of one NodeStore that is no engine: it stores and finds blocks of stamped bytes through
the very socket that engines use.
"""

import ctypes
import hashlib
import os

import kvray
from kvray.config import EngineConfig, find_sockets
from kvray.core.ids import BlockKey, Maker, Namespace
from kvray.core.keys import block_keys, namespace_digest
from kvray.core.messages import Grant, KeyState
from kvray.node.client import ClientState, NodeClient, Ticket
from kvray.node.mapped import MappedSlab
from tests.ray_nodes import wait_until

MAKER = Maker(1 << 32 | 1)  # all of these clients write the same bytes under a key
BLOCK_BYTES = 100_000  # no multiple of a page
AMPLE_BUDGET_S = 5.0  # these clients have no scheduler step to keep


class Client:
    """Stores and finds blocks on one node, as an engine does."""

    def __init__(
        self,
        cluster: kvray.Cluster,
        node_id: str,
        model: str = "model",
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.block_bytes = block_bytes
        self.namespace = namespace_digest({"model": model})
        settings = EngineConfig.parse(cluster.engine_settings() | {"node_id": node_id})
        self.client = NodeClient(
            find_socket=lambda: next(iter(find_sockets(settings)), None),
            engine_nonce=int.from_bytes(os.urandom(7), "little"),
            namespace=Namespace(self.namespace),
            label=f"test client of {node_id[:8]}",
            maker=MAKER,
            budget_s=AMPLE_BUDGET_S,
            map_slab=True,
            retry_first_s=0.05,
            retry_last_s=0.2,
        )
        self.client.start()
        self.wait_connected()

    def wait_connected(self) -> None:
        wait_until(lambda: self.client.state is ClientState.CONNECTED, what="a session")

    def slab(self) -> MappedSlab:
        session = self.client.session
        assert session is not None
        assert session.slab is not None
        return session.slab

    def keys(self, *names: str) -> list[BlockKey]:
        return block_keys(self.namespace, [name.encode() for name in names])

    def store(self, *names: str) -> list[BlockKey]:
        """Reserve, fill and commit a block of each name; returns when that is acknowledged."""
        keys = self.keys(*names)
        self.client.begin_step()
        reserved = self.client.reserve(
            keys, run_lengths=[len(keys)], run_slot_bytes=[self.block_bytes]
        )
        assert reserved is not None
        assert set(reserved.grants) == {Grant.GRANTED}
        slab = self.slab()
        for index, key in enumerate(keys):
            _, _, offset = reserved.places[index]
            ctypes.memmove(
                slab.address + offset, payload_of(key, self.block_bytes), self.block_bytes
            )
        self.client.commit(reserved.slab_id, list(reserved.places.values()))
        assert self.client.drain(5.0)
        return keys

    def look_up(self, keys: list[BlockKey], *, deadline_ms: int = 2_000) -> Ticket:
        """One prefix run; returns when every key is a HIT or a MISS."""
        ticket = self.begin(keys, deadline_ms=deadline_ms)
        wait_until(lambda: ticket.settled, what="the answer", limit_s=deadline_ms / 1_000 + 1)
        return ticket

    def begin(self, keys: list[BlockKey], *, deadline_ms: int) -> Ticket:
        """The same; returns at once."""
        self.client.begin_step()
        ticket = self.client.lookup(
            keys,
            run_lengths=[len(keys)],
            run_is_prefix=[True],
            run_slot_bytes=[self.block_bytes],
            deadline_ms=deadline_ms,
        )
        assert ticket is not None
        return ticket

    def hits(self, keys: list[BlockKey]) -> int:
        """How many of them are there, and that those have the right bytes in the mapped slab."""
        ticket = self.look_up(keys)
        slab = self.slab()
        count = 0
        for index, key in enumerate(keys):
            place = ticket.place(index)
            if ticket.states[index] == KeyState.HIT:
                assert place is not None
                assert ctypes.string_at(slab.address + place[2], self.block_bytes) == payload_of(
                    key, self.block_bytes
                )
                count += 1
        self.client.unpin(ticket)
        return count

    def close(self) -> None:
        self.client.close()


def payload_of(key: BlockKey, block_bytes: int = BLOCK_BYTES) -> bytes:
    """What a block of this key holds: different in each of its pages."""
    return hashlib.shake_128(key).digest(block_bytes)
