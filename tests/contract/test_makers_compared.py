"""Goal: two engines of unlike makers on a real NodeStore share once it has compared their canaries.

Method: a NodeStore without Ray, its own thread that compares, and two clients through the socket.
Prints how long it took from the second canary to trust.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from kvray.core.ids import BlockKey, Maker, Namespace
from kvray.core.keys import block_keys, canary_keys
from kvray.core.messages import ChunkShape, Grant, KeyState, NoiseLevels
from kvray.core.reasons import MissReason
from kvray.link.loopback import LoopbackLink, LoopbackNetwork
from kvray.node.client import ClientState, NodeClient
from tests.served_node import ServedNode, served_node

NAMESPACE = Namespace(b"n" * 16)
PIECE_BYTES, PIECES = 1_024, 16
SIZE = PIECE_BYTES * PIECES
LIMIT_S = 20.0


@pytest.fixture
def runtime() -> Iterator[Path]:
    with TemporaryDirectory(prefix="kvray-") as folder:  # a socket's path must be short
        yield Path(folder)


def wait_for(condition: Callable[[], bool]) -> float:
    begun_s = time.monotonic()
    while not condition():
        assert time.monotonic() < begun_s + LIMIT_S, "does not come about"
        time.sleep(0.002)
    return time.monotonic() - begun_s


class Engine:
    """A client that has computed its canary."""

    def __init__(self, node: ServedNode, maker: int, canary: list[bytes]) -> None:
        self.maker = Maker(maker)
        self.canary = canary
        self.client = NodeClient(
            find_socket=lambda: str(node.slab.paths.socket),
            engine_nonce=maker,
            namespace=Namespace(b""),
            label="an engine",
            budget_s=LIMIT_S,
            map_slab=True,
            retry_first_s=0.01,
        )
        self.client.start()
        wait_for(lambda: self.client.state is ClientState.CONNECTED)
        self.client.introduce(
            NAMESPACE,
            fields={},
            maker=self.maker,
            chunks=[ChunkShape(SIZE, PIECE_BYTES, "bfloat16")],
            noise=NoiseLevels(0.0, 0.002),
        )
        wait_for(lambda: self.client.is_introduced)

    def store(self, keys: list[BlockKey], contents: list[bytes]) -> None:
        self.client.begin_step()
        reserved = self.client.reserve(keys, run_lengths=[len(keys)], run_slot_bytes=[SIZE])
        assert reserved is not None
        assert set(reserved.grants) == {Grant.GRANTED}
        session = self.client.session
        assert session is not None
        assert session.slab is not None
        for index, content in enumerate(contents):
            ctypes.memmove(session.slab.address + reserved.places[index][2], content, SIZE)
        self.client.commit(reserved.slab_id, list(reserved.places.values()))
        assert self.client.drain(LIMIT_S)

    def store_canary(self) -> None:
        self.store(canary_keys(NAMESPACE, self.maker, 0), self.canary)

    def states(self, keys: list[BlockKey]) -> tuple[list[int], set[MissReason]]:
        self.client.begin_step()
        ticket = self.client.lookup(
            keys,
            run_lengths=[len(keys)],
            run_is_prefix=[True],
            run_slot_bytes=[SIZE],
            deadline_ms=100,
        )
        assert ticket is not None
        wait_for(lambda: ticket.settled)
        self.client.unpin(ticket)
        return list(ticket.states), set(ticket.causes.values())


def numbers(seed: int, factor: float = 1.0) -> bytes:
    """bfloat16."""
    values = np.random.default_rng(seed).standard_normal(SIZE // 2).astype(np.float32) * factor
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def canary(seed: int, factor: float = 1.0) -> list[bytes]:
    return [numbers(seed + chunk, factor) for chunk in range(2)]


@contextmanager
def engines(
    runtime: Path, first: list[bytes], second: list[bytes]
) -> Iterator[tuple[ServedNode, Engine, Engine]]:
    network = LoopbackNetwork()
    with served_node(runtime, lambda epoch: LoopbackLink(f"node@{epoch}", network=network)) as node:
        wait_for(lambda: node.is_serving_peers)
        one, two = Engine(node, 1 << 32 | 1, first), Engine(node, 2 << 32 | 1, second)
        try:
            yield node, one, two
        finally:
            one.client.close()
            two.client.close()


def test_unlike_makers_that_compute_alike_share_soon(
    runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = block_keys(NAMESPACE, [b"a", b"b"])
    with engines(runtime, canary(0), canary(0, 1.004)) as (_, one, two):
        one.store(keys, [numbers(1), numbers(2)])
        one.store_canary()
        states, causes = two.states(keys)
        assert states == [KeyState.MISS] * 2
        assert causes == {MissReason.UNTRUSTED}
        two.store_canary()
        took_s = wait_for(lambda: two.states(keys)[0] == [KeyState.HIT] * 2)
    with capsys.disabled():
        print(f"\ntrusted {took_s * 1_000:.0f} ms after the second canary")  # noqa: T201


def test_makers_that_compute_something_else_are_told_apart(
    runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = block_keys(NAMESPACE, [b"a"])
    with engines(runtime, canary(0), canary(9)) as (_, one, two):
        one.store(keys, [numbers(1)])
        one.store_canary()
        two.store_canary()
        wait_for(lambda: "compute different blocks" in caplog.text)
        assert two.states(keys) == ([KeyState.MISS], {MissReason.UNTRUSTED})
